//! `cargo xtask check`: formatting, lints and the eBPF object.

use anyhow::{Context as _, Result};

use crate::{build_ebpf, process, setup};

/// Check formatting, lints, and that the eBPF object is what its sources give
#[derive(Debug, clap::Args)]
pub struct Args {}

const LINTS: [&str; 3] = ["--", "--deny", "warnings"];

pub fn main(_: &Args) -> Result<()> {
    process::run(process::cargo()?.args(["fmt", "--all", "--check"]))
        .context("not formatted: run `cargo fmt --all`")?;
    setup::build()?;
    process::run(
        process::cargo()?
            .args(["clippy", "--workspace", "--exclude", "mcr-ebpf", "--all-targets"])
            .args(LINTS),
    )?;
    // The host's `core` unwinds, which a program without std cannot: for lints it need not.
    process::run(
        process::cargo()?
            .env("CARGO_PROFILE_DEV_PANIC", "abort")
            .args(["clippy", "--package", "mcr-ebpf", "--all-features"])
            .args(LINTS),
    )?;
    build_ebpf::check(&process::workspace()?)
}
