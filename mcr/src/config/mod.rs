//! Configuration files: TOML to what a daemon is started with and to rules, and back.
//!
//! Whatever is wrong in a file is said with its place, all of it at once. Only [`gather`] touches files.

mod mistake;
pub mod options;
mod read;
mod write;

use std::{
    fs,
    io::{self, Read},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use thiserror::Error;

pub use mistake::Mistake;
pub use read::{read, read_fragment};
pub use write::{HEAD, document, fragment};

use crate::{
    api::wire,
    rule::{Place, Rule},
};
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

/// Longest file that is read, in bytes.
const LONGEST: u64 = wire::MAX_REQUEST_BYTES as u64;

/// Reads a configuration file and the fragments beside it: `rules.d/*.toml`, in the order of their names. What is no
/// regular file, as a pipe, has no fragments.
pub fn gather(file: &Path) -> Result<Vec<Source>, Unreadable> {
    let regular = fs::metadata(file).is_ok_and(|metadata| metadata.is_file());
    if !regular {
        return Ok(vec![source(file, false)?]);
    }
    let mut sources = vec![source(file, true)?];
    let directory = fragments_of(file);
    let unreadable = |error| Unreadable { file: directory.clone(), source: error };
    let entries = match fs::read_dir(&directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(sources),
        Err(error) => return Err(unreadable(error)),
    };
    let paths = entries.map(|entry| entry.map(|entry| entry.path())).collect::<io::Result<Vec<_>>>();
    let mut paths = paths.map_err(unreadable)?;
    // Editors keep files of their own there, whose names begin with a dot.
    let hidden = |path: &Path| path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "toml") && !hidden(path));
    paths.sort();
    for path in paths {
        sources.push(source(&path, true)?);
    }
    Ok(sources)
}

/// Reads a fragment, if there is one.
pub fn fragment_there(file: &Path) -> Result<Option<Source>, Unreadable> {
    match source(file, true) {
        Err(Unreadable { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(None),
        read => read.map(Some),
    }
}

/// Reads a file; one that is to be regular is not waited for.
fn source(file: &Path, regular: bool) -> Result<Source, Unreadable> {
    let unreadable = |source| Unreadable { file: file.to_owned(), source };
    let flags = if regular { libc::O_NONBLOCK } else { 0 };
    let opened = fs::OpenOptions::new().read(true).custom_flags(flags).open(file).map_err(unreadable)?;
    if regular && !opened.metadata().is_ok_and(|metadata| metadata.is_file()) {
        return Err(unreadable(io::Error::other("it is no regular file")));
    }
    let text = io::read_to_string(opened.take(LONGEST + 1)).map_err(unreadable)?;
    if text.len() as u64 > LONGEST {
        return Err(unreadable(io::Error::other(format!("it is longer than {LONGEST} bytes"))));
    }
    let text = text.strip_prefix('\u{feff}').map(str::to_owned).unwrap_or(text);
    Ok(Source { file: file.display().to_string(), text })
}

fn fragments_of(file: &Path) -> PathBuf {
    file.parent().unwrap_or(Path::new("")).join(FRAGMENTS)
}

/// The fragment that mcr writes beside a configuration file.
pub fn own_fragment(file: &Path) -> PathBuf {
    fragments_of(file).join(OWN_FRAGMENT)
}
