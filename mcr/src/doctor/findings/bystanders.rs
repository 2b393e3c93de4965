//! What relaying does to others: listeners on this host that see nothing any more, and protocols that a relay breaks.

use std::net::Ipv4Addr;

use super::{Code, Finding, Outcome, of_rule};
use crate::doctor::facts::{Flow, Observations};

/// Event and general messages of IEEE 1588.
const PTP_PORTS: [u16; 2] = [319, 320];

/// Sources of one group that a socket may ask for by default (`net.ipv4.igmp_max_msf`).
const SOURCES_PER_SOCKET: usize = 10;

pub fn decide(seen: &Observations, outcome: &mut Outcome) {
    for flow in seen.flows() {
        let group = flow.rule.input.group;
        if is_ptp(group, flow.rule.input.port) {
            let what = format!(
                "{group} is PTP: its messages must not be relayed, since a relay adds delay that clocks take for distance"
            );
            let next = format!("mcr rule remove {}, and a boundary clock in its place", flow.name());
            outcome.push(Finding::problem(Code::Ptp, of_rule(&flow), what, next));
        } else if group.octets()[..3] == [224, 0, 0] {
            let what = format!(
                "{group} belongs to a protocol of one link ({}): beyond it others may take it for their own",
                named(group)
            );
            let next = format!("mcr rule remove {}, unless it is meant", flow.name());
            outcome.push(Finding::note(Code::LinkLocalControl, of_rule(&flow), what, next));
        }
        blind(seen, &flow, outcome);
    }
}

fn is_ptp(group: Ipv4Addr, port: u16) -> bool {
    let groups = matches!(group.octets(), [224, 0, 1, 129..=132] | [224, 0, 0, 107]);
    groups && PTP_PORTS.contains(&port)
}

fn named(group: Ipv4Addr) -> &'static str {
    match group.octets()[3] {
        1 | 2 | 22 => "IGMP",
        5 | 6 => "OSPF",
        9 => "RIP",
        13 => "PIM",
        18 => "VRRP",
        102 => "HSRP",
        107 => "PTP",
        251 => "mDNS",
        252 => "LLMNR",
        _ => "224.0.0.0/24",
    }
}

/// Sockets of this host that listen to what a rule takes off the wire.
fn blind(seen: &Observations, flow: &Flow<'_>, outcome: &mut Outcome) {
    let Some(datapath @ ("af-xdp" | "redirect")) = flow.rule.info.datapath.as_deref() else { return };
    let input = &flow.rule.input;
    let bound = |address: Ipv4Addr| address.is_unspecified() || address == input.group;
    let listens = seen.listeners.iter().any(|socket| socket.port() == input.port && bound(*socket.ip()));
    let joined = seen.groups.joined.get(&(input.interface.clone(), input.group));
    if listens && joined.is_some_and(|joined| joined.users > own_sockets(seen, flow)) {
        let what = format!(
            "another socket of this host listens to {}:{} on {} and sees nothing of it: {datapath} takes it off the wire before",
            input.group, input.port, input.interface
        );
        let next = format!("mcr rule set {} --datapath af-packet", flow.name());
        outcome.push(Finding::problem(Code::ListenerBlind, of_rule(flow), what, next));
    }
}

/// Sockets by which the daemon itself has joined a group on an interface, at the most.
fn own_sockets(seen: &Observations, flow: &Flow<'_>) -> u32 {
    let input = &flow.rule.input;
    let told = seen.told().into_iter().flat_map(|told| &told.rules);
    let its: Vec<_> = told
        .filter(|rule| rule.input.group == input.group && rule.input.interface == input.interface)
        .collect();
    let any = its.iter().filter(|rule| rule.input.source.is_none());
    // What outlives the daemon is joined by sockets of its own.
    let lives = |redirected: bool| {
        let its =
            any.clone().filter(|rule| (rule.info.datapath.as_deref() == Some("redirect")) == redirected);
        u32::from(its.count() > 0)
    };
    let sources = its.iter().filter(|rule| rule.input.source.is_some()).count();
    lives(false) + lives(true) + sources.div_ceil(SOURCES_PER_SOCKET) as u32
}
