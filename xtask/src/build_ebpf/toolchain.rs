//! The compiler and linker for the XDP program: found where they are, installed where they can be.
//!
//! `core` is compiled for the BPF target, so the compiler must come with the source of its own library;
//! and the linker must be of the compiler's LLVM, since it reads its bitcode.

use std::{
    env, fmt,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

use super::record::Record;
use crate::{process, setup};

/// The release of bpf-linker that this project builds with, and the LLVMs that it can be built for.
const LINKER_VERSION: &str = "0.13.0";
const LINKER_LLVMS: [u32; 3] = [21, 22, 23];

/// Rust that reads the workspace's manifests (edition 2024, `rust-version`).
const OLDEST_MINOR: u32 = 92;

/// Debian's compiler for its browsers: new, and packaged with its source.
const DEBIAN_COMPILER: [&str; 3] = ["rustc-web", "cargo-web", "rust-web-src"];

/// What decides the bytes of an object besides its sources.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Versions {
    pub compiler: String,
    pub llvm: String,
    pub linker: String,
}

impl fmt::Display for Versions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (LLVM {}), {}", self.compiler, self.llvm, self.linker)
    }
}

/// A compiler and a linker that fit one another.
#[derive(Debug)]
pub struct Toolchain {
    compiler: Compiler,
    linker: PathBuf,
    pub versions: Versions,
}

#[derive(Debug, Clone)]
struct Compiler {
    sysroot: PathBuf,
    version: String,
    llvm: String,
}

impl Toolchain {
    /// A toolchain that is here, the recorded one if there is a choice; else one that is installed now.
    pub fn find_or_install(root: &Path, recorded: Option<&Record>) -> Result<Self> {
        let mut compilers = compilers();
        compilers.sort_by_key(|compiler| {
            recorded.is_none_or(|recorded| recorded.built_with.compiler != compiler.version)
        });
        for compiler in &compilers {
            if let Some(toolchain) = Self::with(root, compiler) {
                return Ok(toolchain);
            }
        }
        let mut refusal = None;
        for compiler in &compilers {
            match install_linker(root, compiler.llvm_major()) {
                Ok(()) => match Self::with(root, compiler) {
                    Some(toolchain) => return Ok(toolchain),
                    None => refusal = Some(anyhow::anyhow!("the bpf-linker just installed does not fit")),
                },
                Err(error) => refusal = Some(error),
            }
        }
        install_compiler().map_err(|error| refusal.unwrap_or(error))?;
        let installed = self::compilers().into_iter().find(|compiler| {
            compilers
                .iter()
                .all(|known| known.sysroot != compiler.sysroot || known.version != compiler.version)
        });
        let compiler = installed.with_context(by_hand)?;
        if Self::with(root, &compiler).is_none() {
            install_linker(root, compiler.llvm_major())?;
        }
        Self::with(root, &compiler).with_context(by_hand)
    }

    fn with(root: &Path, compiler: &Compiler) -> Option<Self> {
        let (linker, linker_llvm) =
            linkers(root).into_iter().find(|(_, llvm)| major(llvm) == compiler.llvm_major())?;
        Some(Self {
            versions: Versions {
                compiler: compiler.version.clone(),
                llvm: compiler.llvm.clone(),
                linker: format!("bpf-linker {LINKER_VERSION} (LLVM {linker_llvm})"),
            },
            compiler: compiler.clone(),
            linker,
        })
    }

    /// The source of the compiler's own library.
    pub fn library(&self) -> PathBuf {
        self.compiler.library()
    }

    /// This toolchain's cargo, in the workspace, with nothing of the caller's own toolchain in the way.
    pub fn cargo(&self, root: &Path) -> Command {
        let path = env::var_os("PATH").unwrap_or_default();
        let folders = self.linker.parent().map(Path::to_owned).into_iter().chain(env::split_paths(&path));
        let mut cargo = Command::new(self.compiler.sysroot.join("bin/cargo"));
        for variable in ["RUSTUP_TOOLCHAIN", "RUSTC_WRAPPER", "RUSTC_WORKSPACE_WRAPPER", "CARGO_BUILD_TARGET"]
        {
            cargo.env_remove(variable);
        }
        for (variable, _) in env::vars_os() {
            if variable.to_string_lossy().starts_with("CARGO_PROFILE_") {
                cargo.env_remove(variable);
            }
        }
        cargo
            .current_dir(root)
            .env("RUSTC", self.compiler.sysroot.join("bin/rustc"))
            // -Zbuild-std on a stable compiler, as aya's own toolchains do it.
            .env("RUSTC_BOOTSTRAP", "1")
            .env("PATH", env::join_paths(folders).unwrap_or(path));
        cargo
    }
}

impl Compiler {
    fn at(rustc: &Path) -> Option<Self> {
        let sysroot = process::output(Command::new(rustc).args(["--print", "sysroot"])).ok()?;
        let sysroot = PathBuf::from(sysroot.trim());
        // A rustup proxy answers for the toolchain that it stands for.
        let about = process::output(Command::new(sysroot.join("bin/rustc")).arg("-vV")).ok()?;
        let field = |name: &str| about.lines().find_map(|line| line.strip_prefix(name)).map(str::to_owned);
        Some(Self { version: about.lines().next()?.to_owned(), llvm: field("LLVM version: ")?, sysroot })
    }

    fn library(&self) -> PathBuf {
        self.sysroot.join("lib/rustlib/src/rust/library")
    }

    fn llvm_major(&self) -> u32 {
        major(&self.llvm)
    }

    fn is_usable(&self) -> bool {
        let minor = self.version.split('.').nth(1).and_then(|minor| minor.parse().ok());
        self.library().join("core").is_dir()
            && self.sysroot.join("bin/cargo").is_file()
            && minor.is_some_and(|minor: u32| minor >= OLDEST_MINOR)
            && LINKER_LLVMS.contains(&self.llvm_major())
    }
}

/// Compilers on this machine that bring the source of their library.
fn compilers() -> Vec<Compiler> {
    let mut candidates = process::find_all("rustc");
    if let Some(toolchains) = process::home("RUSTUP_HOME", ".rustup").map(|home| home.join("toolchains")) {
        let mut entries: Vec<_> =
            toolchains.read_dir().into_iter().flatten().flatten().map(|entry| entry.path()).collect();
        entries.sort();
        candidates.extend(entries.into_iter().map(|toolchain| toolchain.join("bin/rustc")));
    }
    let mut compilers: Vec<Compiler> = Vec::new();
    for compiler in candidates.iter().filter_map(|rustc| Compiler::at(rustc)) {
        if compiler.is_usable() && compilers.iter().all(|known| known.sysroot != compiler.sysroot) {
            compilers.push(compiler);
        }
    }
    compilers
}

/// bpf-linkers of the wanted release on this machine, each with the version of its LLVM.
fn linkers(root: &Path) -> Vec<(PathBuf, String)> {
    let mut candidates = vec![own_tools(root).join("bin/bpf-linker")];
    candidates.extend(process::find_all("bpf-linker"));
    candidates.extend(process::home("CARGO_HOME", ".cargo").map(|home| home.join("bin/bpf-linker")));
    candidates.into_iter().filter_map(|linker| Some((linker.clone(), linker_llvm(&linker)?))).collect()
}

fn linker_llvm(linker: &Path) -> Option<String> {
    let version = process::output(Command::new(linker).arg("--version")).ok()?;
    if version.trim() != format!("bpf-linker {LINKER_VERSION}") {
        return None;
    }
    // LLVM answers this itself, before anything is linked.
    let mut about = Command::new(linker);
    about.args(["--llvm-args=--version", "-o", "/dev/null", "/dev/null"]);
    let about = process::output(&mut about).ok()?;
    let (_, llvm) = about.lines().find_map(|line| line.split_once("LLVM version "))?;
    Some(llvm.trim().to_owned())
}

fn own_tools(root: &Path) -> PathBuf {
    root.join("target/bpf/tools")
}

fn major(version: &str) -> u32 {
    version.split('.').next().and_then(|major| major.parse().ok()).unwrap_or(0)
}

/// Builds bpf-linker for one LLVM: where `cargo install` puts things, unless another one is there already.
fn install_linker(root: &Path, llvm: u32) -> Result<()> {
    let prefix = PathBuf::from(format!("/usr/lib/llvm-{llvm}"));
    if !prefix.join("include/llvm-c").is_dir() {
        let packages = [format!("llvm-{llvm}-dev"), format!("libpolly-{llvm}-dev")];
        if !setup::apt_is_here() {
            bail!(
                "bpf-linker needs LLVM {llvm} with its headers, which is not in {}: install it and run \
                 `LLVM_PREFIX=... cargo install bpf-linker --version {LINKER_VERSION} --no-default-features \
                 --features llvm-{llvm}`",
                prefix.display()
            );
        }
        setup::install("linking the XDP program", &["gcc", "g++", &packages[0], &packages[1]])?;
    }
    let mut cargo = process::cargo()?;
    cargo
        .env("LLVM_PREFIX", &prefix)
        .args(["install", "bpf-linker", "--version", LINKER_VERSION, "--locked"])
        .args(["--no-default-features", "--features", &format!("llvm-{llvm}")]);
    if process::find("bpf-linker").is_some() {
        cargo.arg("--force").arg("--root").arg(own_tools(root));
    }
    eprintln!("installing bpf-linker {LINKER_VERSION} for LLVM {llvm}");
    process::run(&mut cargo).context("the linker for the XDP program cannot be installed")
}

/// Installs a compiler with its source: Debian's where there is one, else a nightly by rustup.
fn install_compiler() -> Result<()> {
    let debian = setup::apt_is_here() && (process::is_root() || process::find("sudo").is_some());
    if debian && setup::install("building the XDP program", &DEBIAN_COMPILER).is_ok() {
        return Ok(());
    }
    if let Some(rustup) = process::find("rustup") {
        let mut rustup = Command::new(rustup);
        rustup.args(["toolchain", "install", "nightly", "--profile", "minimal", "--component", "rust-src"]);
        return process::run(&mut rustup).with_context(by_hand);
    }
    bail!(by_hand());
}

fn by_hand() -> String {
    let [oldest, .., newest] = LINKER_LLVMS;
    format!(
        "no compiler here can build the XDP program: it takes one of LLVM {oldest} to {newest} with the source \
         of its library: `rustup toolchain install nightly --component rust-src`, or on Debian `apt-get install \
         {}`",
        DEBIAN_COMPILER.join(" ")
    )
}
