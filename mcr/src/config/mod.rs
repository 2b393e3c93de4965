//! Configuration files: TOML to what a daemon is started with and to rules, and back.
//!
//! Whatever is wrong in a file is said with its place, all of it at once. Only [`gather`] touches files.

mod mistake;
pub mod options;
mod read;
mod write;

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use thiserror::Error;

pub use mistake::Mistake;
pub use read::{read, read_fragment};
pub use write::{HEAD, document, fragment};

use crate::rule::{Place, Rule};
use options::Options;

/// The directory of fragments, beside the file that they belong to.
const FRAGMENTS: &str = "rules.d";

/// The fragment that mcr itself writes.
const OWN_FRAGMENT: &str = "mcr-saved.toml";

/// A file as it was read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Source {
    pub file: String,
    pub text: String,
}

/// What a file and its fragments say.
#[derive(Clone, Debug, Default)]
pub struct Config {
    pub options: Options,
    /// Which can stand together, in the order in which they are written.
    pub rules: Vec<(Rule, Place)>,
}

#[derive(Debug, Error)]
#[error("{file} cannot be read")]
pub struct Unreadable {
    file: PathBuf,
    source: io::Error,
}

/// Reads a configuration file and the fragments beside it: `rules.d/*.toml`, in the order of their names.
pub fn gather(file: &Path) -> Result<Vec<Source>, Unreadable> {
    let mut sources = vec![source(file)?];
    let directory = fragments_of(file);
    let unreadable = |error| Unreadable { file: directory.clone(), source: error };
    let entries = match fs::read_dir(&directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(sources),
        Err(error) => return Err(unreadable(error)),
    };
    let paths = entries.map(|entry| entry.map(|entry| entry.path())).collect::<io::Result<Vec<_>>>();
    let mut paths = paths.map_err(unreadable)?;
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "toml"));
    paths.sort();
    for path in paths {
        sources.push(source(&path)?);
    }
    Ok(sources)
}

/// The first mistake, and how many more there are.
pub fn in_one_line(mistakes: &[Mistake]) -> String {
    let Some(first) = mistakes.first() else { return String::new() };
    match mistakes.len() - 1 {
        0 => first.to_string(),
        more => format!("{first}; and {more} more: see `mcr config check FILE`"),
    }
}

fn source(file: &Path) -> Result<Source, Unreadable> {
    let text = fs::read_to_string(file);
    let text = text.map_err(|source| Unreadable { file: file.to_owned(), source })?;
    Ok(Source { file: file.display().to_string(), text })
}

fn fragments_of(file: &Path) -> PathBuf {
    file.parent().unwrap_or(Path::new("")).join(FRAGMENTS)
}

/// The fragment that mcr writes beside a configuration file.
pub fn own_fragment(file: &Path) -> PathBuf {
    fragments_of(file).join(OWN_FRAGMENT)
}
