//! Paced traffic of `mcr gen`, and what `mcr recv` says of it.

use std::{net::Ipv4Addr, os::unix::process::CommandExt as _, process::Command, time::Duration};

use anyhow::{Context as _, Result};
use nix::sys::signal::Signal;
use serde_json::Value;
use tests::{Namespace, Process};

use crate::{
    bench::Bench,
    cpu::SOURCE_CPU,
    site::{SINK, SOURCE, Site},
};

/// One stream at an even rate.
#[derive(Clone, Copy, Debug)]
pub struct Stream {
    pub to: (Ipv4Addr, u16),
    pub rate: u32,
    pub payload: u16,
}

/// What a receiver made of a stream.
#[derive(Clone, Copy, Debug)]
pub struct Heard {
    pub sent: u64,
    /// Each counted once.
    pub received: u64,
    pub p50_us: f64,
    pub p99_us: f64,
}

impl Stream {
    /// Starts sending until the process is ended.
    pub fn start(self, bench: &Bench, site: &Site) -> Process {
        Process::spawn(&mut self.command(bench, site))
    }

    /// Sends for some time; how many datagrams went out. Faster than one a call, runs of them go to the
    /// kernel by one call.
    pub fn send(self, bench: &Bench, site: &Site, time: Duration) -> Result<u64> {
        const FASTEST_ONE_A_CALL: u32 = 200_000;
        let how: &[&str] = if self.rate > FASTEST_ONE_A_CALL { &["--gso"] } else { &[] };
        self.send_so(bench, site, time, how)
    }

    /// Sends for some time, each datagram by itself at its time; how many went out.
    pub fn send_evenly(self, bench: &Bench, site: &Site, time: Duration) -> Result<u64> {
        self.send_so(bench, site, time, &["--even"])
    }

    fn send_so(self, bench: &Bench, site: &Site, time: Duration, how: &[&str]) -> Result<u64> {
        let mut command = self.command(bench, site);
        command.args(["--seconds", &time.as_secs_f64().to_string(), "--json"]).args(how);
        let mut process = Process::spawn(&mut command);
        let printed = bench.wait_for(&mut process, patience(time))?;
        let report: Value = serde_json::from_str(&printed)
            .with_context(|| format!("mcr gen: {}", process.stderr().trim()))?;
        number(&report, "/total/sent")
    }

    /// Sends for some time, each datagram by itself at its time, to a receiver that listens on `at`.
    pub fn exchange(self, bench: &Bench, site: &Site, at: (Ipv4Addr, u16), time: Duration) -> Result<Heard> {
        let mut command = on_source_cpu(bench, &site.sink);
        command.args(["recv", &endpoint(at, SINK), "--json"]);
        let mut receiver = Process::spawn(&mut command);
        receiver.wait_for_stderr("listening on", patience(time));
        let sent = self.send_evenly(bench, site, time)?;
        // What waits in queues.
        bench.pause(Duration::from_millis(300))?;
        receiver.signal(Signal::SIGINT);
        let printed = bench.wait_for(&mut receiver, patience(time))?;
        let report: Value = serde_json::from_str(&printed)
            .with_context(|| format!("mcr recv: {}", receiver.stderr().trim()))?;
        let percentile =
            |name: &str| Ok::<_, anyhow::Error>(micros(number(&report, &format!("/latency/{name}"))?));
        Ok(Heard {
            sent,
            received: number(&report, "/total/unique")?,
            p50_us: percentile("p50_ns").context("nothing arrived")?,
            p99_us: percentile("p99_ns")?,
        })
    }

    fn command(self, bench: &Bench, site: &Site) -> Command {
        let mut command = on_source_cpu(bench, &site.source);
        command.args(["gen", &endpoint(self.to, SOURCE)]);
        command.args(["--rate", &self.rate.to_string(), "--size", &self.payload.to_string()]);
        command
    }
}

fn on_source_cpu(bench: &Bench, host: &Namespace) -> Command {
    let mut command = host.command("taskset");
    command.args(["--cpu-list", &SOURCE_CPU.to_string()]).arg(&bench.mcr).process_group(0);
    command
}

fn endpoint((group, port): (Ipv4Addr, u16), interface: &str) -> String {
    format!("{group}:{port}@{interface}")
}

fn patience(time: Duration) -> Duration {
    time * 5 + Duration::from_secs(20)
}

fn number(report: &Value, pointer: &str) -> Result<u64> {
    report.pointer(pointer).and_then(Value::as_u64).with_context(|| format!("no {pointer} in {report}"))
}

#[expect(clippy::cast_precision_loss, reason = "three digits of it are shown")]
fn micros(ns: u64) -> f64 {
    ns as f64 / 1e3
}
