//! Datapaths: what keeps rules from native XDP and from the kernel's own forwarding, and how frames are spread.

use std::collections::BTreeMap;

use super::{Code, Finding, Outcome, of_interface, of_rule};
use crate::{
    api::wire::{Health, count},
    datapath::{af_packet, af_xdp},
    doctor::facts::{Device, Flow, Observations},
    rule::InterfaceName,
};

/// Frames of a look from which on their spread over queues says something.
const TELLING: u64 = 200;

/// mcr's own XDP program, by its name.
const STEERING: &str = "mcr_steer";

pub fn decide(seen: &Observations, outcome: &mut Outcome) {
    for name in seen.ingress() {
        let Some(device) = seen.devices.get(name) else { continue };
        native(seen, name, device, outcome);
        offloads(seen, name, device, outcome);
        queues(seen, name, outcome);
    }
    kernel(seen, outcome);
    cpus(seen, outcome);
}

fn is_on(name: &InterfaceName) -> impl Fn(&Flow<'_>) -> bool {
    move |flow| flow.rule.input.interface == *name
}

/// Whether XDP serves a rule; one that has failed may have its program all the same.
fn by_xdp(flow: &Flow<'_>) -> bool {
    let info = &flow.rule.info;
    info.health != Health::Failed && matches!(info.datapath.as_deref(), Some("af-xdp" | "redirect"))
}

/// What keeps native XDP from an interface.
fn native(seen: &Observations, name: &InterfaceName, device: &Device, outcome: &mut Outcome) {
    let its: Vec<_> = seen.flows().filter(is_on(name)).collect();
    if its.iter().any(by_xdp) {
        if device.generic_xdp {
            let next = format!("mcr rule set {} --datapath af-packet", its[0].name());
            let what = "its program runs as generic XDP, after the kernel has made its buffers: af-packet is as fast";
            outcome.push(Finding::note(Code::GenericXdp, of_interface(name), what, next));
        }
        return;
    }
    // Asked for by name it is a failure, by `auto` a choice.
    let failed = its.iter().find(|flow| {
        let info = &flow.rule.info;
        info.health == Health::Failed && matches!(info.datapath_asked.as_str(), "af-xdp" | "redirect")
    });
    let replaced = its.iter().find(|flow| {
        flow.rule.info.datapath_asked == "auto" && flow.rule.info.datapath.as_deref() == Some("af-packet")
    });
    let words = match (failed, replaced) {
        (Some(flow), _) => flow.rule.info.reason.as_deref(),
        (None, Some(flow)) => {
            let why = &flow.rule.info.datapath_why;
            Some(why.strip_suffix(af_packet::HOST_SEES).unwrap_or(why).trim_end_matches("; "))
        }
        // What is to be had there is worth knowing before there are rules.
        (None, None) if its.is_empty() => None,
        (None, None) => return,
    };
    if let Some((code, what, next)) = obstacle(name, device, words) {
        let what = match (failed, replaced) {
            (Some(_), _) => format!("{what}: what asks for XDP by name is not served"),
            (_, Some(_)) => format!("{what}: `auto` takes af-packet"),
            _ => format!("{what}: `auto` would take af-packet"),
        };
        outcome.push(Finding::problem(code, of_interface(name), what, next).only_if(failed.is_some()));
    }
}

/// What is in the way of XDP; `words` are the daemon's, if it has tried.
fn obstacle(name: &InterfaceName, device: &Device, words: Option<&str>) -> Option<(Code, String, String)> {
    let link = &device.link;
    let kind = &link.kind;
    let says = |word| words.is_some_and(|words| words.contains(word));
    if let Some(program) = link.xdp_program.filter(|_| says("another XDP program")) {
        let what = match device.xdp_name.as_deref() {
            Some(STEERING) => format!("another mcr has its XDP slot (program {program}, {STEERING})"),
            named => format!(
                "program {program}{} of somebody else has its XDP slot, until whoever attached it ends (`bpftool link show` \
                 says who, if a link holds it)",
                named.map(|named| format!(" ({named})")).unwrap_or_default()
            ),
        };
        return Some((Code::XdpSlotTaken, what, format!("sudo bpftool net show dev {name}")));
    }
    // A veth says that it runs none as long as it has fewer than its peer sends by.
    if says("too few RX queues") || kind == "veth" && device.native_xdp == Some(false) {
        let queues = link.rx_queues;
        let which = if kind == "veth" { "rx" } else { "combined" };
        let next = match device.most_rx_queues.filter(|most| *most > queues) {
            Some(most) => format!("sudo ethtool -L {name} {which} {most}"),
            None => format!("at its other end: ethtool -L INTERFACE tx {queues}"),
        };
        let what = format!("its RX queues ({queues}) are too few for native XDP");
        return Some((Code::TooFewQueues, what, next));
    }
    if device.native_xdp == Some(false) {
        let what = format!("its driver ({kind}) runs no XDP programs");
        return Some((
            Code::DriverWithoutXdp,
            what,
            format!("relay from the device below it, if there is one: ip -d link show {name}"),
        ));
    }
    if af_xdp::chunk_bytes(link.mtu).is_err() || says("MTU") {
        let what = format!("its MTU of {} is too large for native XDP", link.mtu);
        return Some((Code::MtuTooLarge, what, format!("sudo ip link set {name} mtu 1500")));
    }
    let what = format!("native XDP is refused there: {}", words?);
    Some((Code::XdpRefused, what, format!("ethtool -i {name}; see the daemon's log")))
}

fn offloads(seen: &Observations, name: &InterfaceName, device: &Device, outcome: &mut Outcome) {
    let Some(offloads) = device.offloads else { return };
    if offloads.lro {
        outcome.push(Finding::note(
            Code::Lro,
            of_interface(name),
            "it makes one frame of several (LRO): XDP switches that off, af-packet sees what is none of its datagrams",
            format!("sudo ethtool -K {name} lro off"),
        ));
    }
    if offloads.rxvlan
        && !device.vlans.is_empty()
        && seen.flows().filter(is_on(name)).any(|flow| by_xdp(&flow))
    {
        let vlans: Vec<_> = device.vlans.iter().map(InterfaceName::as_str).collect();
        outcome.push(Finding::note(
            Code::VlanTagsHidden,
            of_interface(name),
            format!("it takes VLAN tags out of frames before XDP sees them: rules of it also match what is for {}", vlans.join(", ")),
            format!("sudo ethtool -K {name} rxvlan off"),
        ));
    }
}

/// Whether several streams share one queue of several.
fn queues(seen: &Observations, name: &InterfaceName, outcome: &mut Outcome) {
    let streams = seen.flows().filter(is_on(name)).filter(|flow| by_xdp(flow) && flow.arrived() > 0).count();
    for (before, after) in seen.counters(name).into_iter().filter(|(_, after)| after.datapath == "af-xdp") {
        let former = |queue| {
            let queues = before.into_iter().flat_map(|before| &before.queues);
            queues.filter(|former| former.queue == queue).map(|former| former.steered).sum()
        };
        let came: Vec<_> = after
            .queues
            .iter()
            .map(|now| (now.queue, now.steered.saturating_sub(former(now.queue))))
            .collect();
        let total: u64 = came.iter().map(|(_, came)| came).sum();
        let Some((queue, _)) = came.iter().find(|(_, came)| *came == total) else { continue };
        if came.len() > 1 && streams > 1 && total >= TELLING {
            outcome.push(Finding::note(
                Code::OneQueue,
                of_interface(name),
                format!(
                    "all {} frames of {streams} streams came in on queue {queue} of {}: one worker has all the work",
                    count(total),
                    came.len()
                ),
                format!(
                    "sudo ethtool -N {name} rx-flow-hash udp4 sdfn && sudo ethtool -X {name} equal {}; of a veth, at its \
                     other end: ethtool -L INTERFACE tx {}",
                    came.len(),
                    came.len()
                ),
            ));
        }
    }
}

/// What keeps rules that workers serve from being sent on by the kernel itself.
fn kernel(seen: &Observations, outcome: &mut Outcome) {
    let mut reasons: BTreeMap<String, Vec<Flow<'_>>> = BTreeMap::new();
    for flow in seen.flows() {
        let info = &flow.rule.info;
        let by_auto = info.datapath_asked == "auto" && info.datapath.as_deref() == Some("af-xdp");
        let why = info.datapath_why.split_once("not redirect: ").filter(|_| by_auto);
        // What an output is to be like is no fault.
        let own_listeners = flow.rule.outputs.iter().any(|output| output.loop_back);
        if let Some((_, why)) = why.filter(|_| !own_listeners) {
            let why = why.strip_suffix(af_xdp::HOST_SEES).unwrap_or(why).trim_end_matches("; ");
            reasons.entry(why.to_owned()).or_default().push(flow);
        }
    }
    for (why, flows) in reasons {
        let first = &flows[0];
        let (subject, who) = match flows.len() {
            1 => (of_rule(first), "a worker relays it".to_owned()),
            many => (of_interface(&first.rule.input.interface), format!("workers relay {many} rules")),
        };
        let mut through = first.rule.outputs.iter().map(|output| &output.interface);
        let hooked = through
            .find(|name| seen.hooks.get(*name).is_some_and(|hook| hook.why.as_deref() == Some(why.as_str())));
        let what = format!("{who}, not the kernel by itself: {why}");
        outcome.push(match hooked {
            Some(name) => {
                let next = format!(
                    "nothing, if that is meant; else see nft list ruleset and tc qdisc show dev {name}"
                );
                Finding::note(Code::EgressHook, subject, what, next)
            }
            None if why.contains("(veth)") => {
                let next = "at its other end: ethtool -K INTERFACE gro on";
                Finding::note(Code::NotRedirected, subject, what, next)
            }
            None => {
                Finding::note(Code::NotRedirected, subject, what, format!("mcr rule show {}", first.name()))
            }
        });
    }
}

/// Whether workers share a CPU while others have none.
fn cpus(seen: &Observations, outcome: &mut Outcome) {
    let Some(told) = seen.told() else { return };
    let mut by_cpu: BTreeMap<u32, Vec<&str>> = BTreeMap::new();
    for worker in told.after.workers.iter().filter(|worker| worker.pid.is_some()) {
        if let Some(cpu) = worker.cpu {
            by_cpu.entry(cpu).or_default().push(&worker.id);
        }
    }
    let free = seen.host.cpus as usize > by_cpu.len();
    if let Some((cpu, workers)) = by_cpu.iter().find(|(_, workers)| workers.len() > 1 && free) {
        outcome.push(Finding::note(
            Code::WorkersShareCpu,
            "daemon",
            format!(
                "workers {} share CPU {cpu}, and {} others have none",
                workers.join(", "),
                seen.host.cpus as usize - by_cpu.len()
            ),
            format!("start it with mcr run --cpus 0-{}", seen.host.cpus - 1),
        ));
    }
}
