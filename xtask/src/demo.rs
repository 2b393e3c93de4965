//! `cargo xtask demo`: a relay at work, in network namespaces of its own, every step as it can be typed.

mod shell;
mod site;

use std::{
    env,
    ffi::OsStr,
    fs,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use self::{
    shell::{Background, Shell},
    site::{CONTROL, FOLDER, Host, PINS, Site},
};
use crate::{process, run, setup};

/// Show a relay relaying: a stream with no route to its source, in namespaces of its own
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Remove what a demo that was killed has left, and do nothing else
    #[arg(long)]
    clean: bool,
    /// Show this binary instead of building one
    #[arg(long, value_name = "FILE")]
    mcr: Option<PathBuf>,
}

const IN: &str = "239.1.1.1:5000";
const IN_GROUP: &str = "239.1.1.1";
const OUT: &str = "239.2.2.2:6000";
const DATAGRAMS: u64 = 30_000;

const START_WITHIN: Duration = Duration::from_secs(10);
const STREAM_WITHIN: Duration = Duration::from_secs(30);

pub fn main(args: &Args) -> Result<()> {
    if args.clean {
        return if process::is_root() {
            site::clean(&Shell::new(CONTROL)?)
        } else {
            again_as_root(&["--clean".as_ref()])
        };
    }
    let mcr = if let Some(mcr) = &args.mcr {
        mcr.clone()
    } else {
        setup::test()?;
        run::build(false)?
    };
    if !process::is_root() {
        return again_as_root(&["--mcr".as_ref(), mcr.as_ref()]);
    }
    show(&mcr)
}

/// From here on every command needs root: what was built stays the user's.
fn again_as_root(args: &[&OsStr]) -> Result<()> {
    let mut command = process::as_root(env::current_exe().context("xtask's own path")?)?;
    let error = command.arg("demo").args(args).exec();
    Err(error).with_context(|| format!("cannot start `{}`", process::line(&command)))
}

fn show(mcr: &Path) -> Result<()> {
    let mcr = shortest(mcr);
    let shell = Shell::new(CONTROL)?;
    println!("# Each command is shown as it is run, as root.");
    let site = Site::new(&shell)?;
    let demo = Demo { shell: &shell, site: &site, mcr: &mcr };
    let (sent, received) = demo.show().inspect_err(|_| {
        let log = fs::read_to_string(daemon_log()).unwrap_or_default();
        if !shell.is_interrupted() && !log.is_empty() {
            eprintln!("the daemon's log:\n{}", log.trim_end());
        }
    })?;
    drop(site);
    verdict(&sent, &received)
}

fn daemon_log() -> PathBuf {
    Path::new(FOLDER).join("daemon.log")
}

struct Demo<'a> {
    shell: &'a Shell,
    site: &'a Site<'a>,
    mcr: &'a Path,
}

impl Demo<'_> {
    /// From the daemon's start to its end; the summaries of generator and receiver.
    fn show(&self) -> Result<(Value, Value)> {
        let mut daemon = self.start_relay()?;
        let summaries = self.play()?;
        println!("\n# What the relay says of it:");
        self.call(&["rule", "show", "cam1"])?;
        self.call(&["stats"])?;
        println!("\n# The daemon goes, and leaves nothing behind.");
        self.call(&["stop"])?;
        self.shell.wait_for("the daemon ends", START_WITHIN, || Ok(daemon.ended()?.is_some()))?;
        Ok(summaries)
    }

    /// Shows and runs one call of the command line.
    fn call(&self, args: &[&str]) -> Result<()> {
        let mut command = self.command(args);
        self.shell.run(&mut command)
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut words = vec![self.mcr.to_str().unwrap_or("mcr")];
        words.extend(args);
        self.shell.command(words)
    }

    /// Starts the daemon, adds the rule and waits until the switch delivers its group.
    fn start_relay(&self) -> Result<Background> {
        let Self { shell, site, mcr } = self;
        println!("\n# The daemon, on the relay. Its command line talks to it through a socket.");
        shell.show_variable();
        let mut daemon = site.command(Host::Relay, mcr, &["run", "--pin-root", PINS]);
        let mut daemon = shell.start(&mut daemon, &daemon_log(), None)?;
        shell.wait_for("the daemon answers", START_WITHIN, || {
            if let Some(status) = daemon.ended()? {
                bail!("the daemon ended ({status}) before it answered");
            }
            Ok(process::output(&mut self.command(&["ping"])).is_ok())
        })?;

        println!("\n# One rule: this group on that interface goes out there, to another group and port.");
        let (from, to) = (format!("{IN}@in0"), format!("{OUT}@out0"));
        self.call(&["rule", "add", "cam1", "--in", &from, "--out", &to])?;

        println!("\n# With the rule the relay joined the group, so the switch delivers it to the relay.");
        let mut members = site.command(Host::Switch, Path::new("bridge"), &["mdb", "show", "dev", "br0"]);
        shell.wait_for("the switch knows of the membership", START_WITHIN, || {
            Ok(process::output(&mut members)?.contains(IN_GROUP))
        })?;
        shell.run(&mut members)?;
        Ok(daemon)
    }

    /// Plays a stream and receives it; the summaries of generator and receiver.
    fn play(&self) -> Result<(Value, Value)> {
        let Self { shell, site, mcr } = self;
        let file = |name: &str| Path::new(FOLDER).join(name);
        let count = DATAGRAMS.to_string();

        println!("\n# A receiver on the other side,");
        let to = format!("{OUT}@eth0");
        let args = ["recv", &to, "--count", &count, "--seconds", "20", "--json"];
        let mut receiver = site.command(Host::Receiver, mcr, &args);
        let mut receiver = shell.start(&mut receiver, &file("recv.json"), Some(&file("recv.log")))?;
        shell.wait_for("the receiver listens", START_WITHIN, || {
            let said = fs::read_to_string(file("recv.log"))?;
            if let Some(status) = receiver.ended()? {
                bail!("the receiver ended ({status}): {}", said.trim());
            }
            Ok(said.contains("listening"))
        })?;

        println!("\n# and a stream: datagrams as video has them, 10,000 a second.");
        let from = format!("{IN}@eth0");
        let args = ["gen", &from, "--rate", "10000", "--size", "1316", "--count", &count, "--json"];
        let mut generator = site.command(Host::Source, mcr, &args);
        let mut generator = shell.start(&mut generator, &file("gen.json"), Some(&file("gen.log")))?;
        // Their summaries say more than their exit statuses: the verdict reads those.
        shell.wait_for("the stream is sent", STREAM_WITHIN, || Ok(generator.ended()?.is_some()))?;
        shell.wait_for("the stream is received", STREAM_WITHIN, || Ok(receiver.ended()?.is_some()))?;
        let summary = |name: &str| -> Result<Value> {
            let text = fs::read_to_string(file(&format!("{name}.json")))?;
            serde_json::from_str(&text).with_context(|| {
                let said = fs::read_to_string(file(&format!("{name}.log"))).unwrap_or_default();
                format!("`mcr {name}` gave no summary: {}", said.trim())
            })
        };
        Ok((summary("gen")?, summary("recv")?))
    }
}

/// Prints what came of it; an error unless exactly what was sent was received.
fn verdict(sent: &Value, received: &Value) -> Result<()> {
    let count = |summary: &Value, what: &str| {
        summary["total"][what]
            .as_u64()
            .with_context(|| format!("a summary has no total of {what}: {summary}"))
    };
    let (sent, lost, duplicates) =
        (count(sent, "sent")?, count(received, "lost")?, count(received, "duplicates")?);
    let (reordered, latency) = (count(received, "reordered")?, &received["latency"]);
    let received = count(received, "received")?;
    println!();
    if let (Some(median), Some(p99)) = (latency["p50_ns"].as_u64(), latency["p99_ns"].as_u64()) {
        println!("latency from sender to receiver: median {} us, p99 {} us", median / 1000, p99 / 1000);
    }
    let verdict = format!(
        "sent {sent}, received {received}, {lost} lost, {duplicates} duplicated, {reordered} reordered"
    );
    if sent != DATAGRAMS || received != sent || lost + duplicates + reordered != 0 {
        bail!("not exact: {verdict}");
    }
    println!("{verdict}: the relay relayed every datagram once, in order");
    Ok(())
}

/// A path as one would type it from here.
fn shortest(path: &Path) -> PathBuf {
    let here = env::current_dir().ok();
    here.and_then(|here| path.strip_prefix(here).ok())
        .filter(|path| path.components().count() > 1)
        .unwrap_or(path)
        .into()
}
