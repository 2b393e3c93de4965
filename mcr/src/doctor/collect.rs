//! Collects the facts: from the daemon, from netlink and ethtool, from `/proc` and from the wire.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, bail};
use nix::{
    sched::{CpuSet, sched_getaffinity},
    unistd::Pid,
};
use rtnetlink::packet_route::{
    RouteNetlinkMessage,
    link::{LinkAttribute, LinkFlags, LinkMessage, LinkXdp, XdpAttached},
};

use super::{
    facts::{About, Device, Groups, Hook, Host, Look, Observations, Process, Seen, Told},
    findings::{Code, Finding},
    look::look,
    proc_net,
};
use crate::{
    api::{
        client::{Client, ClientError},
        wire::{ConfigText, Request, RuleList, Stats, StatsQuery, Status},
    },
    net::{
        egress_hooks::{self, EgressHooks},
        links::{Link, LinkWatch, Links},
    },
    rule::{IfIndex, InterfaceName, RuleName},
    supervisor::host::is_bpffs,
    sys::{ethtool, netdev, privileges},
};

/// Collects all that bears on `subject`, a rule or an interface, or on everything. Takes as long as the look lasts.
///
/// # Errors
///
/// Where `subject` is neither, or the kernel cannot be asked about interfaces.
pub fn collect(control: &Path, subject: Option<&str>, lasts: Duration) -> anyhow::Result<Observations> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let daemon = Client::connect(control).and_then(|mut client| ask(&mut client));
    let devices = runtime.block_on(devices()).context("the interfaces cannot be read")?;
    let about = about(subject, daemon.as_ref().ok(), &devices)?;
    let rules = daemon.as_ref().map(|told| &told.rules[..]).unwrap_or_default();
    let look = look_for(&about, rules, &devices, lasts);
    let hooks = {
        let _within = runtime.enter();
        hooks(rules, &devices)
    };
    // The first connection has been closed for its silence if the look was a long one.
    let daemon =
        daemon.and_then(|told| Ok(Told { after: Client::connect(control)?.call(&stats())?, ..told }));
    let daemon = daemon.map_err(|error| silence(&error));
    let read = |file: &str| fs::read_to_string(format!("/proc/self/net/{file}")).unwrap_or_default();
    Ok(Observations {
        about,
        daemon,
        devices,
        groups: groups(&read),
        listeners: proc_net::listeners(&read("udp")),
        look,
        hooks,
        host: host(),
    })
}

fn groups(read: &impl Fn(&str) -> String) -> Groups {
    proc_net::groups(&read("igmp"), &read("mcfilter"))
}

fn stats() -> Request {
    Request::Stats(StatsQuery::default())
}

fn ask(client: &mut Client) -> Result<Told, ClientError> {
    let before: Stats = client.call(&stats())?;
    let RuleList { rules, .. } = client.call(&Request::RuleList)?;
    let status: Status = client.call(&Request::Status)?;
    let ConfigText { toml, .. } = client.call(&Request::ConfigShow)?;
    let settings = toml.parse::<toml::Table>().ok();
    let settings = settings.and_then(|table| table.get("daemon")?.as_table().cloned()).unwrap_or_default();
    let seen = |info: crate::api::wire::RuleInfo| {
        // A rule of a newer daemon may say what is not understood here.
        let input = info.input.parse().ok()?;
        let outputs = info.outputs.iter().map(|output| output.to.parse()).collect::<Result<_, _>>().ok()?;
        Some(Seen { info, input, outputs })
    };
    let process = process(client.daemon_pid().unwrap_or_default());
    let rules = rules.into_iter().filter_map(seen).collect();
    Ok(Told { status, rules, after: before.clone(), before, settings, process })
}

/// Why the daemon told nothing.
fn silence(error: &ClientError) -> Finding {
    let (code, next) = match error {
        ClientError::NoDaemon { .. } => (Code::NoDaemon, "sudo mcr run"),
        ClientError::PermissionDenied { .. } => (Code::PermissionDenied, "sudo mcr doctor"),
        ClientError::NotASocket { .. } | ClientError::PathTooLong(_) => {
            (Code::DaemonSilent, "mcr doctor --control PATH")
        }
        _ => (Code::DaemonSilent, "see its log; where it hangs, end it and start it again: sudo mcr run"),
    };
    Finding::problem(code, "daemon", error.to_string(), next)
}

fn about(
    subject: Option<&str>,
    told: Option<&Told>,
    devices: &BTreeMap<InterfaceName, Device>,
) -> anyhow::Result<About> {
    let Some(subject) = subject else { return Ok(About::All) };
    let rules = told.map(|told| &told.rules[..]).unwrap_or_default();
    if rules.iter().any(|rule| rule.info.name == subject) {
        return Ok(About::Rule(subject.to_owned()));
    }
    let interface = subject.parse::<InterfaceName>().ok();
    let named = |name: &InterfaceName| {
        let used = |rule: &Seen| {
            rule.input.interface == *name || rule.outputs.iter().any(|output| output.interface == *name)
        };
        devices.contains_key(name) || rules.iter().any(used)
    };
    match interface.filter(named) {
        Some(interface) => Ok(About::Interface(interface)),
        // A rule may well have that name.
        None if told.is_none() && subject.parse::<RuleName>().is_ok() => Ok(About::Rule(subject.to_owned())),
        None => bail!(
            "'{subject}' is neither a rule nor an interface here: see mcr rule list and ip -br link show"
        ),
    }
}

async fn devices() -> anyhow::Result<BTreeMap<InterfaceName, Device>> {
    let watch = LinkWatch::open()?;
    let mut links: Links = watch.snapshot().await?;
    let (messages, _) = watch.reader().ask(RouteNetlinkMessage::GetLink(LinkMessage::default())).await?;
    let mut devices = BTreeMap::new();
    let mut vlans = Vec::new();
    for message in messages {
        let RouteNetlinkMessage::NewLink(message) = message else { continue };
        let name = message.attributes.iter().find_map(|attribute| match attribute {
            LinkAttribute::IfName(name) => name.parse::<InterfaceName>().ok(),
            _ => None,
        });
        let Some((name, link)) = name.and_then(|name| links.remove(&name).map(|link| (name, link))) else {
            continue;
        };
        if link.kind == "vlan" {
            let below = message.attributes.iter().find_map(|attribute| match attribute {
                LinkAttribute::Link(below) => Some(IfIndex(*below)),
                _ => None,
            });
            vlans.extend(below.map(|below| (below, name.clone())));
        }
        devices.insert(name.clone(), device(&name, link, &message));
    }
    for device in devices.values_mut() {
        let above = vlans.iter().filter(|(below, _)| *below == device.link.index);
        device.vlans = above.map(|(_, name)| name.clone()).collect();
    }
    Ok(devices)
}

fn device(name: &InterfaceName, link: Link, message: &LinkMessage) -> Device {
    let generic = message.attributes.iter().any(|attribute| match attribute {
        LinkAttribute::Xdp(xdp) => {
            xdp.iter().any(|xdp| matches!(xdp, LinkXdp::Attached(XdpAttached::SocketBuffer)))
        }
        _ => false,
    });
    let features = netdev::xdp_features(link.index).ok().flatten();
    let conf = |key: &str| {
        let of = |which: &str| number(&format!("net/ipv4/conf/{which}/{key}"));
        // A name with a dot is a directory all the same.
        of(name.as_str()).max(of("all"))
    };
    Device {
        admin_up: message.header.flags.contains(LinkFlags::Up),
        carrier: message.header.flags.contains(LinkFlags::LowerUp),
        xdp_name: link.xdp_program.and_then(program_name),
        generic_xdp: generic,
        native_xdp: features.map(|features| features & netdev::XDP_BASIC != 0),
        most_rx_queues: ethtool::most_rx_queues(name),
        rx_ring: ethtool::rx_ring(name),
        offloads: ethtool::offloads(name),
        vlans: Vec::new(),
        forced_igmp: conf("force_igmp_version"),
        rp_filter: conf("rp_filter"),
        link,
    }
}

/// Takes `CAP_SYS_ADMIN`.
fn program_name(id: u32) -> Option<String> {
    let program = aya::programs::loaded_programs().flatten().find(|program| program.id() == id)?;
    program.name_as_str().filter(|name| !name.is_empty()).map(str::to_owned)
}

/// Looks where rules come in for what they want, and everywhere else for what might come there instead.
fn look_for(
    about: &About,
    rules: &[Seen],
    devices: &BTreeMap<InterfaceName, Device>,
    lasts: Duration,
) -> Look {
    let asked = |rule: &&Seen| match about {
        About::All => true,
        About::Rule(name) => rule.info.name == *name,
        About::Interface(name) => rule.input.interface == *name,
    };
    let groups: BTreeSet<_> = rules.iter().filter(asked).map(|rule| rule.input.group).collect();
    let alone = match about {
        About::Interface(name) if groups.is_empty() => Some(name),
        _ if groups.is_empty() => return Look::default(),
        _ => None,
    };
    let interfaces: Vec<_> = devices
        .iter()
        .filter(|(name, device)| name.as_str() != "lo" && device.link.up && device.link.ethernet)
        .filter(|(name, _)| alone.is_none_or(|alone| alone == *name))
        .map(|(name, device)| (name.clone(), device.link.index))
        .collect();
    if interfaces.is_empty() { Look::default() } else { look(&interfaces, &groups, lasts) }
}

/// Must be called within the runtime.
fn hooks(rules: &[Seen], devices: &BTreeMap<InterfaceName, Device>) -> BTreeMap<InterfaceName, Hook> {
    let egress: BTreeSet<_> =
        rules.iter().flat_map(|rule| &rule.outputs).map(|output| &output.interface).collect();
    let there = egress.into_iter().filter_map(|name| Some((name.clone(), devices.get(name)?.link.index)));
    let asked: Vec<_> = there.collect();
    // Without the privilege for it nothing is known, and nothing is guessed.
    let Ok(hooks) = EgressHooks::open() else { return BTreeMap::new() };
    let chains = |name: &InterfaceName| egress_hooks::chains_of(name).unwrap_or_default();
    let hook = |(name, why): (InterfaceName, Option<String>)| {
        let chains = why.as_ref().map(|_| chains(&name)).unwrap_or_default();
        (name, Hook { why, chains })
    };
    hooks.read(&asked).into_iter().map(hook).collect()
}

/// What `/proc` shows of the daemon.
fn process(pid: i32) -> Process {
    let namespace = |of: &str, kind: &str| fs::read_link(format!("/proc/{of}/ns/{kind}")).ok();
    let its = |kind: &str| namespace(&pid.to_string(), kind);
    let differ =
        |kind: &str, other: Option<PathBuf>| its(kind).zip(other).is_some_and(|(its, other)| its != other);
    // That of the first process is not for everybody to know.
    let mounts = namespace("1", "mnt").or_else(|| namespace("self", "mnt"));
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let held = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let held = held.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap_or_default();
    let locked = limits.lines().find_map(|line| line.strip_prefix("Max locked memory"));
    Process {
        pid,
        missing: held.map(privileges::lacking).unwrap_or_default(),
        elsewhere: differ("net", namespace("self", "net")),
        private_mounts: differ("mnt", mounts),
        locked_bytes: locked.and_then(|line| line.split_whitespace().next()?.parse().ok()),
    }
}

fn host() -> Host {
    let cpus = sched_getaffinity(Pid::from_raw(0)).map_or(1, |allowed| {
        (0..CpuSet::count()).filter(|&cpu| allowed.is_set(cpu).unwrap_or(false)).count() as u32
    });
    Host {
        cpus,
        io_uring_disabled: number("kernel/io_uring_disabled"),
        bpf_jit_enable: number("net/core/bpf_jit_enable"),
        optmem_max: number("net/core/optmem_max").map(u64::from),
        igmp_max_memberships: number("net/ipv4/igmp_max_memberships"),
        bpffs: Some(is_bpffs(Path::new("/sys/fs/bpf"))),
    }
}

/// A sysctl, if it is there and may be read.
fn number(key: &str) -> Option<u32> {
    let read: io::Result<String> = fs::read_to_string(format!("/proc/sys/{key}"));
    read.ok()?.trim().parse().ok()
}
