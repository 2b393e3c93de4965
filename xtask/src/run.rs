//! `cargo xtask run -- ARGS`: `mcr`, built as the user and run as root.

use std::{
    ffi::OsString,
    os::unix::process::CommandExt as _,
    path::PathBuf,
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::{process, setup};

/// Build mcr and run it as root
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Build with optimisations, as it is installed
    #[arg(long)]
    release: bool,
    /// Arguments of mcr
    #[arg(last = true)]
    args: Vec<OsString>,
}

pub fn main(args: &Args) -> Result<()> {
    let mcr = build(args.release)?;
    let mut command = process::as_root(&mcr)?;
    // Replaces us, so that signals and the exit status are mcr's own.
    let error = command.args(&args.args).exec();
    Err(error).with_context(|| format!("cannot start `{}`", process::line(&command)))
}

/// Builds the binary as whoever we are; its path.
pub fn build(release: bool) -> Result<PathBuf> {
    setup::build()?;
    let mut cargo = process::cargo()?;
    cargo.args(["build", "--package", "mcr", "--bin", "mcr", "--message-format", MESSAGES]);
    if release {
        cargo.arg("--release");
    }
    let built = artifacts(&mut cargo)?;
    let mcr = built.into_iter().find(|artifact| artifact.is_binary("mcr"));
    Ok(mcr.context("cargo built no `mcr`")?.executable)
}

/// What cargo is asked to print, for [`artifacts`].
pub const MESSAGES: &str = "json-render-diagnostics";

/// An executable that cargo built.
#[derive(Debug)]
pub struct Artifact {
    pub target: String,
    /// `lib`, `bin`, `test` ...
    pub kind: String,
    pub manifest: PathBuf,
    pub executable: PathBuf,
    pub is_test: bool,
}

impl Artifact {
    pub fn is_binary(&self, name: &str) -> bool {
        self.target == name && self.kind == "bin" && !self.is_test
    }
}

/// Runs a build and lists its executables; errors and warnings of the compiler go to stderr.
pub fn artifacts(cargo: &mut Command) -> Result<Vec<Artifact>> {
    let output = cargo
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("cannot start `{}`", process::line(cargo)))?;
    if !output.status.success() {
        bail!("`{}` failed ({})", process::line(cargo), output.status);
    }
    let messages = String::from_utf8_lossy(&output.stdout);
    Ok(messages.lines().filter_map(|line| artifact(&serde_json::from_str(line).ok()?)).collect())
}

fn artifact(message: &Value) -> Option<Artifact> {
    let text = |value: &Value| value.as_str().map(str::to_owned);
    Some(Artifact {
        target: text(&message["target"]["name"])?,
        kind: text(&message["target"]["kind"][0])?,
        manifest: text(&message["manifest_path"])?.into(),
        executable: text(&message["executable"])?.into(),
        is_test: message["profile"]["test"].as_bool()?,
    })
}
