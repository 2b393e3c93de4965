//! `cargo xtask build-ebpf`: the eBPF object that `mcr` embeds, and the record of what it was built from.
//!
//! The object is kept in git like generated code, so that whoever builds mcr needs stable Rust only.
//! The same sources and the same toolchain give the same bytes, in whatever folder they are built:
//! paths are remapped, and what is left of them after that (DWARF) is cut out.

mod object;
mod record;
mod toolchain;

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};

use self::{record::Record, toolchain::Toolchain};
use crate::{process, setup};

/// Compile the XDP program and write the object that mcr embeds, with its record
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Check that the object in the tree is what its sources give, and write nothing there
    #[arg(long, conflicts_with_all = ["features", "output"])]
    check: bool,
    /// Features of mcr-ebpf, such as `log`; the shipped object is built without
    #[arg(long, value_delimiter = ',', requires = "output")]
    features: Vec<String>,
    /// Write the object here and no record
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
}

const OBJECT: &str = "mcr/bpf/mcr.bpf.o";
const RECORD: &str = "mcr/bpf/mcr.bpf.toml";
const TARGET: &str = "bpfel-unknown-none";

/// Everything said to the compiler that is the same on every machine; part of the record's hash.
const RUSTFLAGS: &[&str] = &[
    // bpf-linker makes BTF out of the debug information.
    "-Cdebuginfo=2",
    "-Clink-arg=--btf",
    "-Ctarget-feature=+allows-misaligned-mem-access",
    // aya-ebpf asks for the architecture only to lay out the registers of a kprobe.
    "--cfg=bpf_target_arch=\"x86_64\"",
];

pub fn main(args: &Args) -> Result<()> {
    let root = process::workspace()?;
    if args.check {
        return check(&root);
    }
    let recorded = Record::read(&root.join(RECORD)).ok();
    let sources = record::hash_of_sources(&root)?;
    let toolchain = Toolchain::find_or_install(&root, recorded.as_ref())?;
    let object = build(&root, &toolchain, &args.features)?;
    if let Some(output) = &args.output {
        return write(output, &object);
    }
    write(&root.join(OBJECT), &object)?;
    let record = Record { sources, object: record::hash(&object), built_with: toolchain.versions };
    write(&root.join(RECORD), record.to_string().as_bytes())
}

/// Fails unless the object in the tree is what the sources in the tree give.
pub fn check(root: &Path) -> Result<()> {
    let again = "run `cargo xtask build-ebpf` and commit what it wrote to mcr/bpf/";
    let recorded = Record::read(&root.join(RECORD))
        .with_context(|| format!("the eBPF object has no record that can be read: {again}"))?;
    let shipped = fs::read(root.join(OBJECT)).with_context(|| format!("cannot read {OBJECT}: {again}"))?;
    if record::hash(&shipped) != recorded.object {
        bail!("{OBJECT} is not the object that {RECORD} describes: {again}");
    }
    if record::hash_of_sources(root)? != recorded.sources {
        bail!("{OBJECT} is older than its sources: {again}");
    }
    let toolchain = Toolchain::find_or_install(root, Some(&recorded))?;
    let rebuilt = build(root, &toolchain, &[])?;
    if toolchain.versions == recorded.built_with {
        if rebuilt != shipped {
            bail!("{OBJECT} is not what its sources give with the toolchain that {RECORD} names: {again}");
        }
        println!("{OBJECT}: rebuilt, byte for byte the same");
        return Ok(());
    }
    println!(
        "{OBJECT} was built with {}, here is {}: the rebuilt object is tested instead of compared",
        recorded.built_with, toolchain.versions
    );
    let path = root.join("target/bpf/rebuilt.bpf.o");
    write(&path, &rebuilt)?;
    verify(&path)?;
    crate::test::packet_table(&path)
        .with_context(|| format!("the packet table with the object rebuilt from {OBJECT}'s sources"))
}

/// Compiles mcr-ebpf and cuts out what is not loaded.
fn build(root: &Path, toolchain: &Toolchain, features: &[String]) -> Result<Vec<u8>> {
    let target_dir = root.join("target/bpf");
    // Unpacks the crates, so that `rustflags` finds the folders they are in.
    process::run(toolchain.cargo(root).args(["fetch", "--quiet", "--target", TARGET]))?;
    let mut cargo = toolchain.cargo(root);
    cargo
        .env("CARGO_ENCODED_RUSTFLAGS", rustflags(root, toolchain)?.join("\x1f"))
        .args(["build", "--quiet", "--release", "--package", "mcr-ebpf", "--target", TARGET])
        .args(["-Zbuild-std=core", "--target-dir"])
        .arg(&target_dir);
    if !features.is_empty() {
        cargo.arg("--features").arg(features.join(","));
    }
    eprintln!("building the XDP program with {}", toolchain.versions);
    process::run(&mut cargo).context("the XDP program does not build")?;
    let linked = target_dir.join(TARGET).join("release/mcr");
    let linked = fs::read(&linked).with_context(|| format!("cannot read {}", linked.display()))?;
    object::without_dwarf(&linked)
}

/// The fixed flags, and a fixed name for every folder that differs from machine to machine.
fn rustflags(root: &Path, toolchain: &Toolchain) -> Result<Vec<String>> {
    let mut folders = Vec::new();
    for library in [toolchain.library(), toolchain.library().canonicalize()?] {
        folders.push((library, "/rust"));
    }
    // One folder per registry; its name depends on how the registry is reached.
    if let Some(registries) = process::home("CARGO_HOME", ".cargo").map(|home| home.join("registry/src")) {
        for registry in fs::read_dir(&registries).into_iter().flatten() {
            folders.push((registry?.path(), "/crates"));
        }
    }
    // Relative, so that the compiler finds our lines and puts them into BTF: they are what
    // the verifier's log and bpftool show beside the instructions.
    folders.push((root.to_owned(), "."));
    let remap = |(from, to): (PathBuf, &str)| format!("--remap-path-prefix={}={to}", from.display());
    Ok(RUSTFLAGS.iter().map(|&flag| flag.to_owned()).chain(folders.into_iter().map(remap)).collect())
}

/// Has this kernel's verifier accept the object, and leaves nothing behind.
fn verify(object: &Path) -> Result<()> {
    setup::test()?;
    let pin = format!("/sys/fs/bpf/mcr-build-ebpf-{}", std::process::id());
    let loaded = process::output(process::as_root("bpftool")?.args(["prog", "load"]).arg(object).args([
        pin.as_str(),
        "type",
        "xdp",
    ]));
    let unpinned = process::output(process::as_root("rm")?.args(["--force", &pin]));
    loaded.context("the kernel's verifier refuses the rebuilt object")?;
    unpinned?;
    Ok(())
}

fn write(path: &Path, content: &[u8]) -> Result<()> {
    let folder = path.parent().context("a file without a folder")?;
    fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    fs::write(path, content).with_context(|| format!("cannot write {}", path.display()))?;
    println!("wrote {} ({} bytes)", path.display(), content.len());
    Ok(())
}
