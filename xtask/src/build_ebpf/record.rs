//! What an object was built from, and with: kept beside it, compared by `--check`.

use std::{
    collections::BTreeSet,
    fmt::{self, Write as _},
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use sha2::{Digest as _, Sha256};

use super::{RUSTFLAGS, TARGET, toolchain::Versions};
use crate::process;

#[derive(Debug, PartialEq, Eq)]
pub struct Record {
    /// Hash of everything in the tree that the object depends on.
    pub sources: String,
    /// Hash of the object.
    pub object: String,
    pub built_with: Versions,
}

impl Record {
    pub fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        Self::parse(&text).with_context(|| format!("{} is not a record", path.display()))
    }

    fn parse(text: &str) -> Result<Self> {
        let value = |key: &str| {
            text.lines()
                .filter_map(|line| line.split_once(" = "))
                .find(|(name, _)| *name == key)
                .and_then(|(_, value)| value.strip_prefix('"')?.strip_suffix('"'))
                .map(str::to_owned)
                .with_context(|| format!("it has no line `{key} = \"...\"`"))
        };
        Ok(Self {
            sources: value("sources")?,
            object: value("object")?,
            built_with: Versions {
                compiler: value("compiler")?,
                llvm: value("llvm")?,
                linker: value("linker")?,
            },
        })
    }
}

impl fmt::Display for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Versions { compiler, llvm, linker } = &self.built_with;
        writeln!(
            f,
            "# What mcr.bpf.o was built from. Written by `cargo xtask build-ebpf`, compared by its --check."
        )?;
        writeln!(f, "sources = \"{}\"", self.sources)?;
        writeln!(f, "object = \"{}\"", self.object)?;
        writeln!(f, "compiler = \"{compiler}\"")?;
        writeln!(f, "llvm = \"{llvm}\"")?;
        writeln!(f, "linker = \"{linker}\"")
    }
}

/// SHA-256 with its name.
pub fn hash(bytes: &[u8]) -> String {
    let mut text = String::from("sha256:");
    for byte in Sha256::digest(bytes) {
        let _ = write!(text, "{byte:02x}");
    }
    text
}

/// One hash over all that decides what the compiler makes: our sources, the manifests' part in it,
/// the versions of the crates compiled in, and the flags.
pub fn hash_of_sources(root: &Path) -> Result<String> {
    let mut parts = vec![format!("target {TARGET}"), format!("flags {}", RUSTFLAGS.join(" "))];
    for file in files(root)? {
        let content =
            fs::read(root.join(&file)).with_context(|| format!("cannot read {}", file.display()))?;
        parts.push(format!("file {} {}", file.display(), hash(&content)));
    }
    let manifest = root.join("Cargo.toml");
    let manifest =
        fs::read_to_string(&manifest).with_context(|| format!("cannot read {}", manifest.display()))?;
    parts.extend(settings(&manifest).into_iter().map(|setting| format!("setting {setting}")));
    parts.extend(dependencies()?.into_iter().map(|dependency| format!("crate {dependency}")));
    Ok(hash(parts.join("\n").as_bytes()))
}

/// Files of the two crates that are compiled into the object, in one order everywhere.
fn files(root: &Path) -> Result<BTreeSet<PathBuf>> {
    let mut files = BTreeSet::from([PathBuf::from("mcr-common/Cargo.toml")]);
    let mut folders = vec![PathBuf::from("mcr-ebpf"), PathBuf::from("mcr-common/src")];
    while let Some(folder) = folders.pop() {
        let entries =
            fs::read_dir(root.join(&folder)).with_context(|| format!("cannot list {}", folder.display()))?;
        for entry in entries {
            let entry = entry?;
            let path = folder.join(entry.file_name());
            if entry.file_type()?.is_dir() {
                folders.push(path);
            } else {
                files.insert(path);
            }
        }
    }
    Ok(files)
}

/// Lines of the workspace's manifest that reach the object: release profile and edition.
fn settings(manifest: &str) -> Vec<String> {
    let mut section = "";
    let mut settings = Vec::new();
    for line in manifest.lines().map(str::trim) {
        if line.starts_with('[') {
            section = line;
            continue;
        }
        let counts = section.starts_with("[profile.release")
            || section == "[workspace.package]" && line.starts_with("edition");
        if counts && !line.is_empty() && !line.starts_with('#') {
            settings.push(format!("{section} {line}"));
        }
    }
    settings
}

/// Crates compiled into the object and macros that write parts of it: name, locked version, features.
///
/// The macros' own dependencies are left out: their releases do not change what the macros write.
fn dependencies() -> Result<BTreeSet<String>> {
    let tree = |edges: &str| -> Result<String> {
        let mut cargo = process::cargo()?;
        cargo
            .args(["tree", "--quiet", "--package", "mcr-ebpf", "--target", TARGET, "--edges", edges])
            .args(["--prefix", "none", "--no-dedupe", "--format", "{p} {f}"]);
        process::output(&mut cargo)
    };
    let linked = tree("normal,no-proc-macro")?;
    let all = tree("normal")?;
    // A crate of the workspace is shown with its folder: its files are hashed instead.
    Ok(linked
        .lines()
        .chain(all.lines().filter(|line| line.contains("(proc-macro)")))
        .filter(|line| !line.contains("(/"))
        .map(|line| line.trim_end().to_owned())
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_reads_back_as_it_was_written() {
        let record = Record {
            sources: hash(b"sources"),
            object: hash(b"object"),
            built_with: Versions {
                compiler: "rustc 1.96.0 (ac68faa20 2026-05-25)".to_owned(),
                llvm: "22.1.8".to_owned(),
                linker: "bpf-linker 0.13.0".to_owned(),
            },
        };
        assert_eq!(Record::parse(&record.to_string()).expect("a record"), record);
    }

    #[test]
    fn a_record_without_an_object_is_refused() {
        let error = Record::parse("sources = \"sha256:00\"\n").expect_err("no record");
        assert!(error.to_string().contains("object"), "{error}");
    }

    #[test]
    fn only_profile_and_edition_of_the_manifest_count() {
        let manifest = "[workspace.package]\nversion = \"1\"\nedition = \"2024\"\n\n[profile.release]\n# why\n\
                        lto = \"thin\"\n[profile.dev]\nopt-level = 1\n";
        assert_eq!(
            settings(manifest),
            ["[workspace.package] edition = \"2024\"", "[profile.release] lto = \"thin\""]
        );
    }
}
