//! The licences of what is linked into the binary: each text once, with the crates that it is of.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};

use crate::process;

/// How such files' names begin, in small letters.
const NAMES: [&str; 6] = ["license", "licence", "copying", "copyright", "notice", "unlicense"];

/// How deep in a crate they are looked for: some bring a C library.
const DEPTH: usize = 4;

/// All of them, for a file. The same for the same `Cargo.lock`.
pub fn text() -> Result<String> {
    let folders = folders()?;
    let mut of: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    let mut list = String::new();
    for (name, version, license) in linked()? {
        let folder =
            folders.get(&(name.clone(), version.clone())).context("a crate that cargo does not know")?;
        let mut texts = Vec::new();
        collect(folder, DEPTH, &mut texts)?;
        ensure!(!texts.is_empty(), "{name} {version} ({license}) has no text of its licence");
        for text in texts {
            of.entry(text).or_default().insert(name.clone());
        }
        writeln!(list, "  {name} {version}: {license}")?;
    }
    let mut notices = format!("mcr is built with what others made:\n\n{list}");
    for (text, crates) in of {
        let crates = crates.into_iter().collect::<Vec<_>>().join(", ");
        writeln!(notices, "\n{}\nOf {crates}:\n\n{}", "=".repeat(80), text.trim_end())?;
    }
    Ok(notices)
}

/// Name, version and licence of the crates of others in the binary, and of what generates their code.
fn linked() -> Result<BTreeSet<(String, String, String)>> {
    let mut tree = process::cargo()?;
    tree.args(["tree", "--locked", "--package", "mcr", "--edges", "normal", "--prefix", "none"]);
    let lines = process::output(tree.args(["--format", "{p}|{l}"]))?;
    let read = |line: &str| {
        let (package, license) = line.trim_end_matches(" (*)").split_once('|')?;
        let mut words = package.split(' ');
        let (name, version) = (words.next()?, words.next()?.trim_start_matches('v'));
        // Those of the workspace have a path.
        let of_others = words.next().is_none_or(|word| word == "(proc-macro)");
        of_others.then(|| (name.to_owned(), version.to_owned(), license.to_owned()))
    };
    Ok(lines.lines().filter_map(read).collect())
}

/// Where cargo has each crate.
fn folders() -> Result<BTreeMap<(String, String), PathBuf>> {
    let version = process::output(Command::new("rustc").arg("-vV"))?;
    let host = version.lines().find_map(|line| line.strip_prefix("host: ")).context("rustc names no host")?;
    let mut metadata = process::cargo()?;
    // What other platforms would need is not fetched.
    metadata.args(["metadata", "--locked", "--format-version", "1", "--filter-platform", host]);
    let metadata = process::output(&mut metadata)?;
    let metadata: serde_json::Value = serde_json::from_str(&metadata)?;
    let read = |package: &serde_json::Value| {
        let of = |key: &str| package[key].as_str().map(str::to_owned);
        Some(((of("name")?, of("version")?), Path::new(&of("manifest_path")?).parent()?.to_owned()))
    };
    let packages = metadata["packages"].as_array().context("cargo metadata names no packages")?;
    Ok(packages.iter().filter_map(read).collect())
}

/// The texts in a folder, in the order of their files' names.
fn collect(folder: &Path, depth: usize, texts: &mut Vec<String>) -> Result<()> {
    let entries = fs::read_dir(folder).with_context(|| format!("{} cannot be read", folder.display()))?;
    let mut entries = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    entries.sort();
    for path in entries {
        let name = path.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
        let is_source =
            path.extension().is_some_and(|extension| ["rs", "c", "h"].iter().any(|it| extension == *it));
        if path.is_dir() && depth > 0 && !path.is_symlink() {
            collect(&path, depth - 1, texts)?;
        } else if path.is_file() && !is_source && NAMES.iter().any(|begin| name.starts_with(begin)) {
            texts.push(String::from_utf8_lossy(&fs::read(&path)?).replace("\r\n", "\n"));
        }
    }
    Ok(())
}
