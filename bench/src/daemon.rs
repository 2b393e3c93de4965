//! `mcr run` on a relay of the site, told what to do through its control socket.

use std::{net::Ipv4Addr, os::unix::process::CommandExt as _, path::PathBuf};

use anyhow::{Context as _, Result, bail};
use mcr::api::{
    client::Client,
    wire::{Pong, Request, RuleOutcome, RuleRemoval, RuleSpec, Stats, StatsQuery, Status, WorkerList},
};
use tests::Process;

use crate::{
    bench::Bench,
    cpu::RELAY_CPU,
    site::{EGRESS, INGRESS, Relay},
};

/// Port of the groups that are relayed.
pub const IN_PORT: u16 = 5000;
/// Port of the groups that they are relayed to.
pub const OUT_PORT: u16 = 6000;

const FIRST_IN: Ipv4Addr = Ipv4Addr::new(239, 1, 0, 1);
const FIRST_OUT: Ipv4Addr = Ipv4Addr::new(239, 2, 0, 1);

/// The group of an input.
pub fn group_in(rule: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(FIRST_IN.to_bits() + rule)
}

/// The group of an output; `of` are the outputs that each rule has.
pub fn group_out(rule: u32, output: u32, of: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(FIRST_OUT.to_bits() + rule * of + output)
}

/// Killed on drop.
#[derive(Debug)]
pub struct Daemon {
    process: Process,
    control: PathBuf,
}

impl Daemon {
    /// Starts it with one worker, on the relay's CPU, and waits until it answers.
    pub fn start(bench: &Bench, relay: &Relay, datapath: &str) -> Result<Self> {
        Self::start_on(bench, relay, datapath, RELAY_CPU)
    }

    /// As [`Self::start`], on another CPU.
    pub fn start_on(bench: &Bench, relay: &Relay, datapath: &str, cpu: usize) -> Result<Self> {
        let control = relay.scratch.dir().join("mcr.sock");
        let mut command = relay.host.command(&bench.mcr);
        command
            .args(["run", "--workers", "1", "--cpus", &cpu.to_string(), "--datapath", datapath])
            .args(["--log-level", "warn", "--control"])
            .arg(&control)
            .arg("--pin-root")
            .arg(relay.scratch.pin_root())
            // An interrupt from the terminal is for the bench, which then ends it.
            .process_group(0);
        let mut daemon = Self { process: Process::spawn(&mut command), control };
        bench.wait_until("the daemon answers", || {
            if daemon.process.ended().is_some() {
                bail!("the daemon ended: {}", daemon.process.stderr().trim());
            }
            Ok(daemon.call::<Pong>(&Request::Ping).is_ok())
        })?;
        Ok(daemon)
    }

    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    fn call<T: serde::de::DeserializeOwned>(&self, request: &Request) -> Result<T> {
        Ok(Client::connect(&self.control)?.call(request)?)
    }

    /// Adds rules by number, each with so many outputs, and waits until all are at work.
    pub fn relay(&self, bench: &Bench, rules: u32, outputs: u32) -> Result<()> {
        let specs = (0..rules).map(|rule| {
            let to: Vec<_> =
                (0..outputs).map(|output| (group_out(rule, output, outputs), OUT_PORT)).collect();
            spec(rule, (group_in(rule), IN_PORT), &to)
        });
        self.relay_all(bench, specs)
    }

    /// Adds one rule between any groups and ports, and waits until it is at work.
    pub fn relay_one(&self, bench: &Bench, from: (Ipv4Addr, u16), to: (Ipv4Addr, u16)) -> Result<()> {
        self.relay_all(bench, [spec(0, from, &[to])])
    }

    fn relay_all(&self, bench: &Bench, specs: impl IntoIterator<Item = RuleSpec>) -> Result<()> {
        let mut client = Client::connect(&self.control)?;
        let mut rules = 0;
        for spec in specs {
            client
                .call::<RuleOutcome>(&Request::RuleAdd(spec))
                .with_context(|| format!("add rule {rules}"))?;
            rules += 1;
        }
        bench.wait_until("all rules are active", || {
            let status: Status = client.call(&Request::Status)?;
            // Redirected rules need no worker.
            Ok(status.rules.active == rules && status.workers_running == status.workers_total)
        })
    }

    /// Adds one more rule, with one output.
    pub fn add(&self, rule: u32) -> Result<()> {
        let spec = spec(rule, (group_in(rule), IN_PORT), &[(group_out(rule, 0, 1), OUT_PORT)]);
        self.call::<RuleOutcome>(&Request::RuleAdd(spec))?;
        Ok(())
    }

    /// Removes a rule; not one more datagram of it leaves.
    pub fn remove(&self, rule: u32) -> Result<()> {
        self.call::<RuleOutcome>(&Request::RuleRemove(RuleRemoval { name: name(rule), save: false }))?;
        Ok(())
    }

    pub fn stats(&self) -> Result<Stats> {
        self.call(&Request::Stats(StatsQuery::default()))
    }

    /// The daemon's process and its workers'.
    pub fn processes(&self) -> Result<Vec<u32>> {
        let WorkerList { workers, .. } = self.call(&Request::Workers)?;
        Ok([self.pid()].into_iter().chain(workers.iter().filter_map(|worker| worker.pid)).collect())
    }
}

fn name(rule: u32) -> String {
    format!("rule{rule}")
}

fn spec(rule: u32, (from, port): (Ipv4Addr, u16), to: &[(Ipv4Addr, u16)]) -> RuleSpec {
    RuleSpec {
        name: Some(name(rule)),
        input: format!("{from}:{port}@{INGRESS}"),
        outputs: to.iter().map(|(group, port)| format!("{group}:{port}@{EGRESS}")).collect(),
        ..RuleSpec::default()
    }
}
