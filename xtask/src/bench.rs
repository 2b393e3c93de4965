//! `cargo xtask bench`: how fast mcr is, and against what; built as the user, measured as root.

use std::{ffi::OsString, os::unix::process::CommandExt as _};

use anyhow::{Context as _, Result};

use crate::{process, run, setup};

/// Measure mcr and what one would take instead, in namespaces of their own
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Everything shorter and once: two minutes in all
    #[arg(long)]
    quick: bool,
    /// What to measure, of saturation, fanout, streams, rules, latency, lossless, chain, overload, idle, memory and
    /// rule-add [default: everything]
    case: Vec<OsString>,
}

pub fn main(args: &Args) -> Result<()> {
    setup::build()?;
    setup::bench()?;
    let mut cargo = process::cargo()?;
    cargo.args(["build", "--release", "--package", "mcr", "--package", "bench", "--bins"]);
    let built = run::artifacts(cargo.args(["--message-format", run::MESSAGES]))?;
    let executable = |name: &str| {
        let built = built.iter().find(|artifact| artifact.is_binary(name));
        built.map(|artifact| &artifact.executable).with_context(|| format!("cargo built no `{name}`"))
    };
    let (bench, mcr) = (executable("bench")?, executable("mcr")?);
    let mut command = process::as_root(bench)?;
    command.args(&args.case).arg("--mcr").arg(mcr).args(args.quick.then_some("--quick"));
    // Replaces us, so that an interrupt ends the bench alone, which then cleans up.
    let error = command.exec();
    Err(error).with_context(|| format!("cannot start `{}`", process::line(&command)))
}
