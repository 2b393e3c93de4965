//! What is true, as far as it could be seen: everything that findings are decided from. No I/O.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{Ipv4Addr, SocketAddrV4},
    time::Duration,
};

use super::findings::Finding;
use crate::{
    api::wire::{InterfaceStats, OutputStats, RuleInfo, RuleStats, Stats, Status},
    net::links::Link,
    rule::{Input, InterfaceName, Output},
    sys::ethtool::Offloads,
};

/// What was asked about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum About {
    All,
    Interface(InterfaceName),
    Rule(String),
}

#[derive(Clone, Debug)]
pub struct Observations {
    pub about: About,
    /// What the daemon told, or why it told nothing.
    pub daemon: Result<Told, Finding>,
    pub devices: BTreeMap<InterfaceName, Device>,
    pub groups: Groups,
    /// Where UDP sockets of this host are bound.
    pub listeners: Vec<SocketAddrV4>,
    pub look: Look,
    /// What stands in the way of what each egress interface sends.
    pub hooks: BTreeMap<InterfaceName, Hook>,
    pub host: Host,
}

/// What the daemon told.
#[derive(Clone, Debug)]
pub struct Told {
    pub status: Status,
    pub rules: Vec<Seen>,
    /// Counters before and after the look.
    pub before: Stats,
    pub after: Stats,
    /// `[daemon]` as it runs.
    pub settings: toml::Table,
    pub process: Process,
}

/// A rule, read.
#[derive(Clone, Debug)]
pub struct Seen {
    pub info: RuleInfo,
    pub input: Input,
    /// As many as the rule has, in its order.
    pub outputs: Vec<Output>,
}

/// The daemon's process, as `/proc` shows it.
#[derive(Clone, Debug, Default)]
pub struct Process {
    pub pid: i32,
    /// Names of the capabilities that it uses and does not have.
    pub missing: Vec<String>,
    /// It serves another network namespace than the one that was looked at.
    pub elsewhere: bool,
    /// Its mount namespace is not that of the host's first process, or, where that may not be known, not ours.
    pub private_mounts: bool,
    /// Its limit of locked memory, if it has one.
    pub locked_bytes: Option<u64>,
}

/// An interface.
#[derive(Clone, Debug)]
pub struct Device {
    pub link: Link,
    pub admin_up: bool,
    pub carrier: bool,
    /// Name of the program in its XDP slot.
    pub xdp_name: Option<String>,
    /// A program is in its slot for generic XDP.
    pub generic_xdp: bool,
    /// Its driver runs XDP programs, if the kernel says.
    pub native_xdp: Option<bool>,
    pub most_rx_queues: Option<u32>,
    /// Places of its RX rings, and the most.
    pub rx_ring: Option<(u32, u32)>,
    pub offloads: Option<Offloads>,
    /// VLAN interfaces above it.
    pub vlans: Vec<InterfaceName>,
    /// `force_igmp_version`, with that of all interfaces.
    pub forced_igmp: Option<u32>,
    /// `rp_filter`, with that of all interfaces.
    pub rp_filter: Option<u32>,
}

/// Memberships of the host, whoever has them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Groups {
    pub joined: BTreeMap<(InterfaceName, Ipv4Addr), Group>,
    /// Version of IGMP that is spoken on each interface.
    pub versions: BTreeMap<InterfaceName, u32>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Group {
    /// Sockets that joined it.
    pub users: u32,
    /// Sources that are wanted by name.
    pub sources: BTreeSet<Ipv4Addr>,
}

/// What a short passive look at the wire saw. Frames that an XDP program takes are not among it: counters tell of those.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Look {
    pub lasted: Duration,
    /// Why nothing could be seen.
    pub refused: Option<String>,
    pub seen: BTreeMap<Sighting, u64>,
    /// Interfaces on which IGMP queries were heard, with who asks.
    pub queriers: BTreeMap<InterfaceName, Ipv4Addr>,
}

/// Frames of one kind.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Sighting {
    pub interface: InterfaceName,
    pub group: Ipv4Addr,
    pub source: Ipv4Addr,
    pub fate: Fate,
}

/// What a frame of a group is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fate {
    /// One that can be relayed, to this port.
    Datagram {
        port: u16,
        ttl: u8,
    },
    Vlan(u16),
    Fragment,
    Options,
    BadChecksum,
    /// Ends early, or lies about its length.
    Damaged,
}

/// What an egress interface sends through.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hook {
    /// In words, if there is anything.
    pub why: Option<String>,
    /// Chains of nftables, as `nft` takes them: family, table and chain.
    pub chains: Vec<String>,
}

/// What is the host's as a whole. `None` is what could not be read.
#[derive(Clone, Debug, Default)]
pub struct Host {
    pub cpus: u32,
    pub io_uring_disabled: Option<u32>,
    pub bpf_jit_enable: Option<u32>,
    pub optmem_max: Option<u64>,
    pub igmp_max_memberships: Option<u32>,
    /// A bpffs is mounted at `/sys/fs/bpf`.
    pub bpffs: Option<bool>,
}

/// A rule with its counters before and after the look.
#[derive(Clone, Copy, Debug)]
pub struct Flow<'a> {
    pub rule: &'a Seen,
    pub before: Option<&'a RuleStats>,
    pub after: Option<&'a RuleStats>,
}

impl Observations {
    pub fn told(&self) -> Option<&Told> {
        self.daemon.as_ref().ok().filter(|told| !told.process.elsewhere)
    }

    /// The rules that are asked about.
    pub fn flows(&self) -> impl Iterator<Item = Flow<'_>> {
        let told = self.told();
        let [before, after] =
            told.map_or_else(Default::default, |told| [by_name(&told.before), by_name(&told.after)]);
        let rules = told.into_iter().flat_map(|told| &told.rules).filter(|rule| self.concerns(rule));
        rules.map(move |rule| {
            let name = rule.info.name.as_str();
            Flow { rule, before: before.get(name).copied(), after: after.get(name).copied() }
        })
    }

    fn concerns(&self, rule: &Seen) -> bool {
        match &self.about {
            About::All => true,
            About::Rule(name) => rule.info.name == *name,
            About::Interface(name) => {
                rule.input.interface == *name || rule.outputs.iter().any(|output| output.interface == *name)
            }
        }
    }

    /// The interfaces that are asked about and come in: of the rules, the one that was named, or, with no daemon to name
    /// any, all that are up.
    pub fn ingress(&self) -> BTreeSet<&InterfaceName> {
        match &self.about {
            About::Interface(name) => [name].into(),
            About::All if self.told().is_none() => {
                let up = |(_, device): &(&InterfaceName, &Device)| device.admin_up && device.link.ethernet;
                let others = self.devices.iter().filter(|(name, _)| name.as_str() != "lo").filter(up);
                others.map(|(name, _)| name).collect()
            }
            _ => self.flows().map(|flow| &flow.rule.input.interface).collect(),
        }
    }

    /// The interfaces that the rules asked about send from.
    pub fn egress(&self) -> BTreeSet<&InterfaceName> {
        let outputs = self.flows().flat_map(|flow| &flow.rule.outputs).map(|output| &output.interface);
        match &self.about {
            About::Interface(name) => outputs.filter(|interface| *interface == name).collect(),
            _ => outputs.collect(),
        }
    }

    /// An interface's counters before and after the look, by datapath.
    pub fn counters(&self, name: &InterfaceName) -> Vec<(Option<&InterfaceStats>, &InterfaceStats)> {
        let Some(told) = self.told() else { return Vec::new() };
        let its = |stats: &&InterfaceStats| stats.name == name.as_str();
        let before = |after: &InterfaceStats| {
            told.before.interfaces.iter().filter(its).find(|before| before.datapath == after.datapath)
        };
        told.after.interfaces.iter().filter(its).map(|after| (before(after), after)).collect()
    }

    /// What was seen of a group.
    pub fn sightings(&self, group: Ipv4Addr) -> impl Iterator<Item = (&Sighting, u64)> {
        let seen = self.look.seen.iter().filter(move |(sighting, _)| sighting.group == group);
        seen.map(|(sighting, count)| (sighting, *count))
    }
}

fn by_name(stats: &Stats) -> BTreeMap<&str, &RuleStats> {
    stats.rules.iter().map(|rule| (rule.name.as_str(), rule)).collect()
}

impl<'a> Flow<'a> {
    pub fn name(&self) -> &'a str {
        &self.rule.info.name
    }

    /// Datagrams that came in during the look.
    pub fn arrived(&self) -> u64 {
        let count = |stats: Option<&RuleStats>| stats.map_or(0, |stats| stats.matched.max(stats.received));
        count(self.after).saturating_sub(count(self.before))
    }

    /// Each output with its counters before and after the look.
    pub fn outputs(&self) -> impl Iterator<Item = (&'a Output, Option<&'a OutputStats>, &'a OutputStats)> {
        let after = self.after.map(|stats| &stats.outputs[..]).unwrap_or_default();
        let before = self.before.map(|stats| &stats.outputs[..]).unwrap_or_default();
        self.rule
            .outputs
            .iter()
            .zip(after)
            .map(move |(output, after)| (output, before.iter().find(|before| before.to == after.to), after))
    }
}
