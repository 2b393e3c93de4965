//! The demo's network, all of it in namespaces that are made here and deleted here:
//!
//! ```text
//!    source              switch (snoops IGMP)          relay                receiver
//!  203.0.113.7   eth0 -- port0   br0   port1 -- in0          out0 -- eth0   198.51.100.2
//!                                               192.0.2.1    198.51.100.1
//! ```
//!
//! No route of the relay leads to the source, and its reverse-path check is strict.

use std::{fs, io::ErrorKind, path::Path, process::Command, thread, time::Duration};

use anyhow::{Context as _, Result, bail};

use super::shell::Shell;
use crate::process;

/// Everything that the demo writes, but for pins.
pub const FOLDER: &str = "/run/mcr-demo";
/// Where its daemon pins what it loads.
pub const PINS: &str = "/sys/fs/bpf/mcr-demo";
/// The daemon's socket, for the daemon and its command line.
pub const CONTROL: (&str, &str) = ("MCR_CONTROL", "/run/mcr-demo/mcr.sock");

#[derive(Debug, Clone, Copy)]
pub enum Host {
    Source,
    Switch,
    Relay,
    Receiver,
}

impl Host {
    const ALL: [Self; 4] = [Self::Source, Self::Switch, Self::Relay, Self::Receiver];

    const fn namespace(self) -> &'static str {
        match self {
            Self::Source => "mcr-demo-source",
            Self::Switch => "mcr-demo-switch",
            Self::Relay => "mcr-demo-relay",
            Self::Receiver => "mcr-demo-receiver",
        }
    }

    fn exists(self) -> bool {
        Path::new("/run/netns").join(self.namespace()).exists()
    }

    /// How a command enters: `ip netns exec` would give it a mount namespace of its own,
    /// and what the daemon pins on bpffs would go with it.
    fn entrance(self) -> String {
        format!("nsenter --net=/run/netns/{}", self.namespace())
    }
}

/// Deleted on drop, with every process in it.
#[derive(Debug)]
pub struct Site<'a> {
    shell: &'a Shell,
}

impl<'a> Site<'a> {
    pub fn new(shell: &'a Shell) -> Result<Self> {
        match fs::create_dir(FOLDER) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => bail!(
                "{FOLDER} exists: a demo runs, or one was killed: `cargo xtask demo --clean` removes what it left"
            ),
            made => made.with_context(|| format!("cannot make {FOLDER}"))?,
        }
        println!("$ mkdir {FOLDER}");
        let site = Self { shell };
        site.make_namespaces()?;
        site.make_switch()?;
        site.make_addresses()?;
        Ok(site)
    }

    fn make_namespaces(&self) -> Result<()> {
        println!("\n# Four hosts: a source, a switch that snoops IGMP, the relay, a receiver.");
        for host in Host::ALL {
            self.shell.type_in(&format!("ip netns add {}", host.namespace()))?;
        }
        let cables = [
            ((Host::Source, "eth0"), (Host::Switch, "port0")),
            ((Host::Relay, "in0"), (Host::Switch, "port1")),
            ((Host::Relay, "out0"), (Host::Receiver, "eth0")),
        ];
        for ((host, interface), (peer, peers)) in cables {
            let (host, peer) = (host.namespace(), peer.namespace());
            self.shell.type_in(&format!(
                "ip link add name {interface} netns {host} type veth peer name {peers} netns {peer}"
            ))?;
        }
        Ok(())
    }

    /// A bridge that forwards a group only to ports that joined it. The querier is switched on in a
    /// command of its own: in the same one as the interval it would count only ten seconds later.
    fn make_switch(&self) -> Result<()> {
        for command in [
            "ip link add br0 type bridge mcast_snooping 1 mcast_query_response_interval 10",
            "ip link set br0 type bridge mcast_querier 1",
            "ip address add 192.0.2.254/24 dev br0",
            "ip link set port0 master br0 up",
            "ip link set port1 master br0 up",
            "bridge link set dev port0 mcast_flood off",
            "bridge link set dev port1 mcast_flood off",
            "ip link set br0 up",
        ] {
            self.at(Host::Switch, command)?;
        }
        Ok(())
    }

    fn make_addresses(&self) -> Result<()> {
        println!("\n# The relay has no route to the source, and drops what has none (rp_filter=1).");
        self.at(Host::Relay, "sysctl -q -w net.ipv4.conf.all.rp_filter=1")?;
        for (host, interface, address) in [
            (Host::Source, "eth0", "203.0.113.7/24"),
            (Host::Relay, "in0", "192.0.2.1/24"),
            (Host::Relay, "out0", "198.51.100.1/24"),
            (Host::Receiver, "eth0", "198.51.100.2/24"),
        ] {
            self.at(host, &format!("ip address add {address} dev {interface}"))?;
            self.at(host, &format!("ip link set {interface} up"))?;
        }
        Ok(())
    }

    fn at(&self, host: Host, command: &str) -> Result<()> {
        self.shell.type_in(&format!("{} {command}", host.entrance()))
    }

    /// A command on a host.
    pub fn command(&self, host: Host, program: &Path, args: &[&str]) -> Command {
        let mut command = self.shell.command(host.entrance().split_whitespace());
        command.arg(program).args(args);
        command
    }
}

impl Drop for Site<'_> {
    fn drop(&mut self) {
        println!("\n# Cleaning up.");
        if let Err(error) = clean(self.shell) {
            eprintln!("not all is cleaned up: {error:#}: `cargo xtask demo --clean` tries again");
        }
    }
}

/// Ends what runs in the demo's namespaces and deletes them and the demo's files.
pub fn clean(shell: &Shell) -> Result<()> {
    let hosts: Vec<_> = Host::ALL.into_iter().filter(|host| host.exists()).collect();
    // Asked first, so that the daemon takes its program off the interface.
    for (signal, patience) in [("-TERM", Duration::from_secs(5)), ("-KILL", Duration::from_secs(2))] {
        let processes = processes(shell, &hosts)?;
        if processes.is_empty() {
            break;
        }
        println!("$ kill {signal} {}", processes.join(" "));
        // One that has ended meanwhile makes `kill` complain, and is no trouble.
        let kill = ["kill", signal].into_iter().chain(processes.iter().map(String::as_str));
        let _ = process::output(&mut shell.command(kill));
        let mut waited = Duration::ZERO;
        while waited < patience && !self::processes(shell, &hosts)?.is_empty() {
            let step = Duration::from_millis(50);
            thread::sleep(step);
            waited += step;
        }
    }
    let mut outcome = Ok(());
    for host in hosts {
        println!("$ ip netns delete {}", host.namespace());
        let deleted = process::output(&mut shell.command(["ip", "netns", "delete", host.namespace()]));
        outcome = outcome.and(deleted.map(drop));
    }
    for folder in [PINS, FOLDER].map(Path::new).into_iter().filter(|folder| folder.exists()) {
        println!("$ rm -r {}", folder.display());
        let removed =
            fs::remove_dir_all(folder).with_context(|| format!("cannot remove {}", folder.display()));
        outcome = outcome.and(removed);
    }
    outcome
}

fn processes(shell: &Shell, hosts: &[Host]) -> Result<Vec<String>> {
    let mut processes = Vec::new();
    for host in hosts {
        let listed = process::output(&mut shell.command(["ip", "netns", "pids", host.namespace()]))?;
        processes.extend(listed.split_whitespace().map(str::to_owned));
    }
    Ok(processes)
}
