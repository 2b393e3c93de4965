//! `cargo xtask setup`: what must be installed before mcr builds and its tests run.

use std::{collections::HashSet, process::Command};

use anyhow::{Context as _, Result, bail};

use crate::process;

/// Install what building and testing need (Debian, Ubuntu); elsewhere say what to install
#[derive(Debug, clap::Args)]
pub struct Args {}

/// How to tell that something is there on a system without dpkg.
enum Probe {
    Program(&'static str),
    /// A library with its headers, as pkg-config knows it.
    PkgConfig(&'static str),
    /// A library that is opened at run time, by the start of its file's name.
    SharedLibrary(&'static str),
}

struct Need {
    package: &'static str,
    probe: Probe,
}

const fn need(package: &'static str, probe: Probe) -> Need {
    Need { package, probe }
}

/// xsk-rs compiles libxdp and libbpf, and generates its bindings with libclang.
const BUILD: &[Need] = &[
    need("gcc", Probe::Program("gcc")),
    need("clang", Probe::Program("clang")),
    // For llc, which the build of libxdp looks for.
    need("llvm", Probe::Program("llc")),
    need("libclang-dev", Probe::SharedLibrary("libclang")),
    need("libelf-dev", Probe::PkgConfig("libelf")),
    need("zlib1g-dev", Probe::PkgConfig("zlib")),
    need("libpcap-dev", Probe::PkgConfig("libpcap")),
    need("m4", Probe::Program("m4")),
    need("make", Probe::Program("make")),
    need("pkg-config", Probe::Program("pkg-config")),
];

/// What the tests and the demo call: ip, tc, bridge, bpftool, ethtool, nft, sysctl, and what the examples of the docs do.
const TEST: &[Need] = &[
    need("iproute2", Probe::Program("ip")),
    need("bpftool", Probe::Program("bpftool")),
    need("ethtool", Probe::Program("ethtool")),
    need("nftables", Probe::Program("nft")),
    need("procps", Probe::Program("sysctl")),
    need("python3", Probe::Program("python3")),
    need("socat", Probe::Program("socat")),
];

/// What the bench compares mcr with, and sets its cables with.
const BENCH: &[Need] = &[
    need("ethtool", Probe::Program("ethtool")),
    need("iproute2", Probe::Program("ip")),
    need("smcroute", Probe::Program("smcrouted")),
    need("socat", Probe::Program("socat")),
    need("util-linux", Probe::Program("taskset")),
];

pub fn main(_: &Args) -> Result<()> {
    build()?;
    test()
}

/// What `cargo build` of the workspace needs.
pub fn build() -> Result<()> {
    ensure("building mcr", BUILD)
}

/// What running the tests and the demo needs.
pub fn test() -> Result<()> {
    ensure("running mcr's tests and demo", TEST)
}

/// What running the bench needs.
pub fn bench() -> Result<()> {
    ensure("running mcr's bench", BENCH)
}

fn ensure(purpose: &str, needs: &[Need]) -> Result<()> {
    if !apt_is_here() {
        let missing: Vec<_> =
            needs.iter().filter(|need| !is_there(&need.probe)).map(|need| need.package).collect();
        if missing.is_empty() {
            return Ok(());
        }
        bail!(
            "{purpose} needs what Debian packages as {}: install this system's packages of the same",
            missing.join(" ")
        );
    }
    let packages: Vec<_> = needs.iter().map(|need| need.package).collect();
    install(purpose, &packages)
}

/// Installs the Debian packages that are not there yet; asks nothing of the network when all are.
pub fn install(purpose: &str, packages: &[&str]) -> Result<()> {
    let installed = installed(packages)?;
    let missing: Vec<_> = packages.iter().copied().filter(|package| !installed.contains(*package)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let by_hand = format!("apt-get install {}", missing.join(" "));
    if !process::is_root() && process::find("sudo").is_none() {
        bail!("{purpose} needs packages that are not installed: as root, run `{by_hand}`");
    }
    eprintln!("installing what {purpose} needs: {}", missing.join(" "));
    let by_hand = || format!("{purpose} needs packages that could not be installed: `{by_hand}`");
    process::run(process::as_root("apt-get")?.args(["-qq", "update"])).with_context(by_hand)?;
    let mut apt = process::as_root("env")?;
    apt.args([
        "DEBIAN_FRONTEND=noninteractive",
        "apt-get",
        "-qq",
        "-y",
        "--no-install-recommends",
        "install",
    ]);
    process::run(apt.args(&missing)).with_context(by_hand)
}

/// Debian and what is made from it.
pub fn apt_is_here() -> bool {
    process::find("apt-get").is_some() && process::find("dpkg-query").is_some()
}

fn installed(packages: &[&str]) -> Result<HashSet<String>> {
    // dpkg-query fails when it does not know one of the packages, and still prints the others.
    let output = Command::new("dpkg-query")
        .args(["--show", "--showformat=${Package} ${db:Status-Status}\n"])
        .args(packages)
        .output()
        .context("cannot start dpkg-query")?;
    let listed = String::from_utf8_lossy(&output.stdout);
    let installed = listed.lines().filter_map(|line| line.strip_suffix(" installed"));
    Ok(installed.map(str::to_owned).collect())
}

fn is_there(probe: &Probe) -> bool {
    let succeeds = |command: &mut Command| command.output().is_ok_and(|output| output.status.success());
    match probe {
        Probe::Program(program) => process::find(program).is_some(),
        Probe::PkgConfig(library) => succeeds(Command::new("pkg-config").args(["--exists", library])),
        Probe::SharedLibrary(prefix) => process::find("ldconfig")
            .and_then(|ldconfig| process::output(Command::new(ldconfig).arg("-p")).ok())
            .is_some_and(|cache| cache.lines().any(|line| line.trim_start().starts_with(prefix))),
    }
}
