//! Compiles the bench's BPF programs; clang is there, since mcr itself builds with it.

use std::{env, path::Path, process::Command};

use anyhow::{Context as _, Result, ensure};

const SOURCE: &str = "bpf/bench.bpf.c";

fn main() -> Result<()> {
    println!("cargo::rerun-if-changed={SOURCE}");
    let folder = env::var_os("OUT_DIR").context("OUT_DIR is cargo's to set")?;
    let status = Command::new("clang")
        .args(["-O2", "-g", "-Wall", "-Werror", "-target", "bpf", "-c", SOURCE, "-o"])
        .arg(Path::new(&folder).join("bench.bpf.o"))
        .status()
        .context("cannot start clang: `cargo xtask setup` installs it")?;
    ensure!(status.success(), "clang failed on {SOURCE} ({status})");
    Ok(())
}
