//! Prometheus' own checks, promtool, which the tests call. Debian has it in the package of the server, which would start
//! at once where it is installed: so the package is only unpacked, beside what is built.

use std::{fs, path::Path, process::Command};

use anyhow::{Context as _, Result, bail};

use super::apt_is_here;
use crate::process;

/// Under `target/`, where the tests look first.
const FOLDER: &str = "target/prometheus";

pub fn ensure() -> Result<()> {
    let folder = process::workspace()?.join(FOLDER);
    if folder.join("usr/bin/promtool").exists() || process::find("promtool").is_some() {
        return Ok(());
    }
    if !apt_is_here() {
        bail!("running mcr's tests needs promtool: install this system's package of Prometheus");
    }
    eprintln!("fetching what running mcr's tests needs: promtool");
    fetch(&folder).context("promtool, of Debian's package prometheus, could not be fetched")
}

fn fetch(folder: &Path) -> Result<()> {
    // What a run that was ended left.
    let _none_there = fs::remove_dir_all(folder);
    let download = folder.join("download");
    fs::create_dir_all(&download)?;
    let apt = || {
        let mut apt = Command::new("apt-get");
        process::run(apt.args(["-qq", "download", "prometheus"]).current_dir(&download))
    };
    if apt().is_err() {
        process::run(process::as_root("apt-get")?.args(["-qq", "update"]))?;
        apt()?;
    }
    let package = fs::read_dir(&download)?.next().context("apt-get downloaded nothing")??.path();
    // Whole or not at all: promtool is looked for where it ends up.
    process::run(Command::new("dpkg-deb").arg("-x").arg(&package).arg(download.join("unpacked")))?;
    fs::rename(download.join("unpacked/usr"), folder.join("usr"))?;
    fs::remove_dir_all(&download).map_err(Into::into)
}
