//! What is compared: mcr's datapaths, what one would take instead, and the ceiling.

use std::{fmt::Write as _, fs, net::Ipv4Addr, os::unix::process::CommandExt as _, process::Command};

use anyhow::{Context as _, Result, bail};
use aya::Ebpf;
use tests::Process;

use crate::{
    bench::Bench,
    cpu::RELAY_CPU,
    daemon::{Daemon, IN_PORT, OUT_PORT, group_in, group_out},
    programs,
    site::{EGRESS, EGRESS_ADDRESS, INGRESS, SINK, SOURCE_ADDRESS, Site},
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum System {
    /// Rules that the kernel serves by itself.
    Redirect,
    AfXdp,
    AfPacket,
    /// A process for each output.
    Socat,
    /// The kernel's own multicast routing, set up by smcroute. It forwards and translates nothing.
    KernelRouting,
    /// An XDP program that redirects every datagram as it is, to several outputs by a broadcast.
    Ceiling,
    /// Source and sink on one cable.
    NoRelay,
}

/// What is to be relayed: rule i from [`group_in`] of i to each of its outputs' [`group_out`].
#[derive(Clone, Copy, Debug)]
pub struct Work {
    pub rules: u32,
    pub outputs: u32,
}

impl Work {
    pub const ONE: Self = Self { rules: 1, outputs: 1 };
}

/// Ended on drop.
#[derive(Default)]
pub struct Running {
    pub daemon: Option<Daemon>,
    processes: Vec<Process>,
    ceiling: Option<Ebpf>,
}

impl System {
    pub fn name(self) -> &'static str {
        match self {
            Self::Redirect => "redirect",
            Self::AfXdp => "af-xdp",
            Self::AfPacket => "af-packet",
            Self::Socat => "socat",
            Self::KernelRouting => "kernel routing",
            Self::Ceiling => "ceiling",
            Self::NoRelay => "no relay",
        }
    }

    /// Relays between source and sink.
    pub fn relays(self) -> u8 {
        u8::from(self != Self::NoRelay)
    }

    /// Where the first rule's datagrams arrive.
    pub fn destination(self) -> (Ipv4Addr, u16) {
        match self {
            Self::Redirect | Self::AfXdp | Self::AfPacket | Self::Socat => (group_out(0, 0, 1), OUT_PORT),
            Self::KernelRouting | Self::Ceiling | Self::NoRelay => (group_in(0), IN_PORT),
        }
    }

    /// Starts it on the site's relay and waits until it is ready.
    pub fn start(self, bench: &Bench, site: &Site, work: Work) -> Result<Running> {
        let mut running = Running::default();
        if self == Self::Redirect {
            // A veth takes redirected frames while its other end has GRO, or a program as the sinks that count.
            site.sink.output("ethtool", &["-K", SINK, "gro", "on"]);
        }
        match self {
            Self::Redirect | Self::AfXdp | Self::AfPacket => {
                let daemon = Daemon::start(bench, site.relay(), self.name())?;
                daemon.relay(bench, work.rules, work.outputs)?;
                running.daemon = Some(daemon);
            }
            Self::Socat => running.processes = socat(bench, site, work)?,
            Self::KernelRouting => running.processes = vec![smcroute(bench, site, work.rules)?],
            Self::Ceiling if work.outputs > 1 => {
                let host = &site.relay().host;
                running.ceiling = Some(programs::attach_fan(host, INGRESS, EGRESS, work.outputs)?);
            }
            Self::Ceiling => {
                let host = &site.relay().host;
                let egress = programs::interface_index(host, EGRESS)?;
                let globals = [("target_ifindex", egress)];
                running.ceiling = Some(programs::attach("ceiling", &globals, host, INGRESS)?);
            }
            Self::NoRelay => {}
        }
        Ok(running)
    }
}

fn socat(bench: &Bench, site: &Site, work: Work) -> Result<Vec<Process>> {
    let host = &site.relay().host;
    let mut processes = Vec::new();
    for rule in 0..work.rules {
        for output in 0..work.outputs {
            let (from, to) = (group_in(rule), group_out(rule, output, work.outputs));
            let mut command = on_relay_cpu(host.command("taskset"), "socat");
            command
                .arg("-u")
                .arg(format!("UDP4-RECV:{IN_PORT},bind={from},ip-add-membership={from}:{INGRESS},reuseaddr"))
                .arg(format!(
                    "UDP4-DATAGRAM:{to}:{OUT_PORT},ip-multicast-if={EGRESS_ADDRESS},ip-multicast-ttl=16"
                ));
            processes.push(Process::spawn(&mut command));
        }
    }
    let port = format!(":{IN_PORT:04X} ");
    bench.wait_until("every socat listens", || {
        if let Some(ended) =
            processes.iter_mut().find_map(|process| process.ended().map(|_| process.stderr()))
        {
            bail!("socat ended: {}", ended.trim());
        }
        Ok(host.proc_net("udp").lines().filter(|line| line.contains(&port)).count() == processes.len())
    })?;
    Ok(processes)
}

fn smcroute(bench: &Bench, site: &Site, rules: u32) -> Result<Process> {
    let relay = site.relay();
    let file = |name: &str| relay.scratch.dir().join(name);
    let mut routes = String::new();
    for rule in 0..rules {
        let group = group_in(rule);
        writeln!(routes, "mroute from {INGRESS} source {SOURCE_ADDRESS} group {group} to {EGRESS}")?;
    }
    fs::write(file("smcroute.conf"), routes).context("write smcroute's configuration")?;
    let mut command = on_relay_cpu(relay.host.command("taskset"), "smcrouted");
    command.arg("-n").arg("-f").arg(file("smcroute.conf"));
    command.arg("-u").arg(file("smcroute.sock")).arg("-P").arg(file("smcroute.pid"));
    let mut process = Process::spawn(&mut command);
    bench.wait_until("smcroute has set its routes", || {
        if process.ended().is_some() {
            bail!("smcrouted ended: {}", process.stderr().trim());
        }
        // Below one line of headings.
        Ok(relay.host.proc_net("ip_mr_cache").lines().count() > rules as usize)
    })?;
    Ok(process)
}

fn on_relay_cpu(mut taskset: Command, program: &str) -> Command {
    taskset.args(["--cpu-list", &RELAY_CPU.to_string(), program]).process_group(0);
    taskset
}
