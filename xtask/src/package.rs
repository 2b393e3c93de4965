//! `cargo xtask package`: the Debian package, made by dpkg's own tools from a tree that is laid out here.
//!
//! What is packed depends on the commit alone: files bear its time, and names are in order.

use std::{
    env,
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

use crate::{notices, process, run, setup};

/// Build the Debian package, in target/package
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Pack this binary instead of building one
    #[arg(long, value_name = "FILE")]
    binary: Option<PathBuf>,
    /// Where to put the package
    #[arg(long, value_name = "DIR")]
    output: Option<PathBuf>,
    /// What follows the version, counted up where the same version is packaged again
    #[arg(long, value_name = "N", default_value_t = 1)]
    revision: u32,
}

/// Files and folders of the project, and what they are in the package.
const INSTALLED: [(&str, &str); 9] = [
    ("packaging/mcr.toml", "etc/mcr/mcr.toml"),
    ("packaging/systemd", "usr/lib/systemd/system"),
    ("packaging/sysusers.d", "usr/lib/sysusers.d"),
    ("packaging/tmpfiles.d", "usr/lib/tmpfiles.d"),
    ("packaging/examples", "usr/share/doc/mcr/examples"),
    ("packaging/debian/copyright", "usr/share/doc/mcr/copyright"),
    ("README.md", "usr/share/doc/mcr/README.md"),
    ("CHANGELOG.md", "usr/share/doc/mcr/changelog"),
    ("docs", "usr/share/doc/mcr/docs"),
];

/// The same of what monitors it, for those who have it.
const MONITORING: [(&str, &str); 2] =
    [("packaging/prometheus", "usr/share/mcr/prometheus"), ("packaging/grafana", "usr/share/mcr/grafana")];

/// What the shells look for, and where.
const COMPLETIONS: [(&str, &str); 3] = [
    ("bash", "usr/share/bash-completion/completions/mcr"),
    ("zsh", "usr/share/zsh/vendor-completions/_mcr"),
    ("fish", "usr/share/fish/vendor_completions.d/mcr.fish"),
];

const SCRIPTS: [&str; 3] = ["postinst", "prerm", "postrm"];

/// Kept as the operator has made it.
const CONFFILES: &str = "/etc/mcr/mcr.toml\n";

pub fn main(args: &Args) -> Result<()> {
    setup::package()?;
    let workspace = process::workspace()?;
    let binary = match &args.binary {
        Some(binary) => {
            binary.canonicalize().with_context(|| format!("{} is not there", binary.display()))?
        }
        None => run::build(true)?,
    };
    let output = args.output.clone().unwrap_or_else(|| workspace.join("target/package"));
    let output = std::path::absolute(output)?;
    let release = Release::of(&workspace, args.revision)?;
    let stage = Stage::new(output.join("stage"))?;
    stage.lay_out(&workspace, &binary, &release)?;
    let package = output.join(format!("mcr_{}_{}.deb", release.version, release.architecture));
    let mut build = Command::new("dpkg-deb");
    build.args(["--root-owner-group", "-Zxz", "--build"]).arg(&stage.root).arg(&package);
    process::output(build.env("SOURCE_DATE_EPOCH", &release.epoch))?;
    println!("{}", package.display());
    Ok(())
}

/// What the package says of itself.
struct Release {
    version: String,
    architecture: String,
    maintainer: String,
    /// Of the commit, in seconds.
    epoch: String,
}

impl Release {
    /// The variables are those of Debian's and of the Reproducible Builds' tools.
    fn of(workspace: &Path, revision: u32) -> Result<Self> {
        let commit = |format: &str| {
            let mut git = Command::new("git");
            process::output(git.arg("-C").arg(workspace).args(["log", "-1", &format!("--format={format}")]))
                .map(|text| text.trim().to_owned())
        };
        let epoch = env::var("SOURCE_DATE_EPOCH")
            .or_else(|_| commit("%ct").context("say when it was made by SOURCE_DATE_EPOCH, in seconds"))?;
        let maintainer = match (env::var("DEBFULLNAME"), env::var("DEBEMAIL")) {
            (Ok(name), Ok(address)) => format!("{name} <{address}>"),
            _ => commit("%an <%ae>").context("say who makes it by DEBFULLNAME and DEBEMAIL")?,
        };
        let architecture = process::output(Command::new("dpkg").arg("--print-architecture"))?;
        Ok(Self {
            version: format!("{}-{revision}", env!("CARGO_PKG_VERSION")),
            architecture: architecture.trim().to_owned(),
            maintainer,
            epoch,
        })
    }
}

/// The tree that is packed; gone on drop.
struct Stage {
    root: PathBuf,
}

impl Stage {
    fn new(root: PathBuf) -> Result<Self> {
        if root.exists() {
            fs::remove_dir_all(&root).with_context(|| format!("{} cannot be cleared", root.display()))?;
        }
        Ok(Self { root })
    }

    fn lay_out(&self, workspace: &Path, binary: &Path, release: &Release) -> Result<()> {
        for (from, to) in INSTALLED {
            self.copy(&workspace.join(from), to)?;
        }
        for (from, to) in MONITORING.map(|(from, to)| (workspace.join(from), to)) {
            if from.exists() {
                self.copy(&from, to)?;
            }
        }
        self.copy(binary, "usr/bin/mcr")?;
        let installed = self.root.join("usr/bin/mcr");
        process::output(Command::new("strip").args(["--strip-unneeded", "-R", ".comment"]).arg(&installed))?;
        for (shell, to) in COMPLETIONS {
            let script = process::output(Command::new(binary).args(["completions", shell]))?;
            self.write(to, &script)?;
        }
        let man1 = self.root.join("usr/share/man/man1");
        process::output(Command::new(binary).arg("man").arg(&man1))?;
        self.copy(&workspace.join("packaging/man"), "usr/share/man/man5")?;
        self.write("usr/share/doc/mcr/changelog.Debian", &debian_changelog(release)?)?;
        self.write("usr/share/doc/mcr/third-party-notices", &notices::text()?)?;
        // Made here, so that dpkg knows whose it is.
        fs::create_dir_all(self.root.join("etc/mcr/rules.d"))?;
        for file in files(&self.root)? {
            let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if file.starts_with(self.root.join("usr/share/man"))
                || name.starts_with("changelog")
                || name == "third-party-notices"
            {
                process::output(Command::new("gzip").arg("-9n").arg(&file))?;
            }
        }
        self.describe(workspace, release)?;
        self.set_modes()
    }

    /// `DEBIAN/`, of all that is there by now.
    fn describe(&self, workspace: &Path, release: &Release) -> Result<()> {
        let packed = files(&self.root)?;
        let mut sums = Command::new("md5sum");
        sums.current_dir(&self.root);
        let mut kilobytes = 0;
        for file in &packed {
            sums.arg(file.strip_prefix(&self.root)?);
            kilobytes += fs::metadata(file)?.len().div_ceil(1024);
        }
        let sums = process::output(&mut sums)?;
        let depends = depends(&self.root)?;
        let Release { version, architecture, maintainer, .. } = release;
        let fields = fs::read_to_string(workspace.join("packaging/debian/control"))?;
        let control = format!(
            "{fields}Version: {version}\nArchitecture: {architecture}\nMaintainer: {maintainer}\n\
             Installed-Size: {kilobytes}\nDepends: {depends}\n"
        );
        self.write("DEBIAN/control", &control)?;
        self.write("DEBIAN/md5sums", &sums)?;
        self.write("DEBIAN/conffiles", CONFFILES)?;
        for script in SCRIPTS {
            self.copy(&workspace.join("packaging/debian").join(script), &format!("DEBIAN/{script}"))?;
        }
        Ok(())
    }

    /// Whatever the umask and the modes of the working copy are.
    fn set_modes(&self) -> Result<()> {
        for entry in entries(&self.root)? {
            let is_script = SCRIPTS.iter().any(|script| entry == self.root.join("DEBIAN").join(script));
            let is_run = entry.is_dir() || is_script || entry.starts_with(self.root.join("usr/bin"));
            fs::set_permissions(&entry, Permissions::from_mode(if is_run { 0o755 } else { 0o644 }))?;
        }
        Ok(())
    }

    fn write(&self, to: &str, text: &str) -> Result<()> {
        let to = self.root.join(to);
        fs::create_dir_all(to.parent().context("a file in no folder")?)?;
        fs::write(&to, text).with_context(|| format!("{} cannot be written", to.display()))
    }

    /// Copies a file, or a folder with all that is in it.
    fn copy(&self, from: &Path, to: &str) -> Result<()> {
        let all = if from.is_dir() { files(from)? } else { vec![from.to_owned()] };
        for file in all {
            let below = file.strip_prefix(from)?;
            // Joining nothing would end it with a slash.
            let to = if below == Path::new("") { self.root.join(to) } else { self.root.join(to).join(below) };
            fs::create_dir_all(to.parent().context("a file in no folder")?)?;
            fs::copy(&file, &to).with_context(|| format!("{} cannot be copied", file.display()))?;
        }
        Ok(())
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        let _none_was_made = fs::remove_dir_all(&self.root);
    }
}

/// The libraries' packages, as dpkg finds them for the binary.
fn depends(root: &Path) -> Result<String> {
    // It wants to stand beside a source package's `debian/control`.
    let source = root.with_extension("source");
    fs::create_dir_all(source.join("debian"))?;
    fs::write(source.join("debian/control"), "Source: mcr\n\nPackage: mcr\nArchitecture: any\n")?;
    let mut shlibdeps = Command::new("dpkg-shlibdeps");
    let found = process::output(
        shlibdeps.current_dir(&source).arg("-O").arg(format!("-e{}", root.join("usr/bin/mcr").display())),
    );
    fs::remove_dir_all(&source)?;
    let found = found?;
    let Some(depends) = found.trim().strip_prefix("shlibs:Depends=") else {
        bail!("dpkg-shlibdeps found no library that mcr needs: {}", found.trim());
    };
    Ok(depends.to_owned())
}

fn debian_changelog(release: &Release) -> Result<String> {
    let mut date = Command::new("date");
    let date = process::output(date.args(["-u", "-R", "-d"]).arg(format!("@{}", release.epoch)))?;
    let Release { version, maintainer, .. } = release;
    let date = date.trim();
    Ok(format!(
        "mcr ({version}) unstable; urgency=medium\n\n  * What changed is in changelog.gz.\n\n \
         -- {maintainer}  {date}\n"
    ))
}

/// The files below a folder, in order.
fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut entries = entries(folder)?;
    entries.retain(|entry| entry.is_file());
    Ok(entries)
}

/// All that is below a folder and the folder itself, in order.
fn entries(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut found = vec![folder.to_owned()];
    for entry in fs::read_dir(folder).with_context(|| format!("{} cannot be read", folder.display()))? {
        let path = entry?.path();
        if path.is_dir() {
            found.extend(entries(&path)?);
        } else {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}
