//! What comes in: whether a rule's group is joined, asked for and arrives, and what arrives in its place.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
    time::Duration,
};

use super::{
    Code, Finding, Outcome,
    losses::{moved, so_many},
    moved as moved_to, of_interface, of_rule,
};
use crate::{
    api::wire::{Health, count},
    doctor::facts::{Fate, Flow, Observations, Sighting},
    rule::{DEFAULT_TTL, Input, InterfaceName, Output, Ttl},
};

/// Queriers ask each 125 s unless they are told otherwise (RFC 3376, section 8.2).
const QUERY_INTERVAL: Duration = Duration::from_secs(130);

/// Idle rules of an interface that are told one by one.
const MOST_IDLE: usize = 3;

pub fn decide(seen: &Observations, outcome: &mut Outcome) {
    if let Some(why) = &seen.look.refused {
        outcome.push(Finding::note(
            Code::LookRefused,
            "host",
            format!("the wire could not be looked at ({why}): what arrives in a rule's place is not known"),
            "sudo mcr doctor",
        ));
    }
    let mut silent: BTreeSet<&InterfaceName> = BTreeSet::new();
    let mut spoilt: BTreeSet<&InterfaceName> = BTreeSet::new();
    let mut idle: BTreeMap<&InterfaceName, Vec<Flow<'_>>> = BTreeMap::new();
    for flow in seen.flows() {
        let interface = &flow.rule.input.interface;
        let Some(device) = seen.devices.get(interface).filter(|device| device.link.up) else { continue };
        let before = outcome.findings.len();
        membership(seen, &flow, device.forced_igmp, outcome);
        ttl(seen, &flow, outcome);
        let of_group = spoilt_frames(seen, &flow);
        if !of_group.is_empty() {
            spoilt.insert(interface);
        }
        outcome.findings.extend(of_group);
        let arrived = flow.arrived();
        if arrived > 0 {
            let datapath = flow.rule.info.datapath.as_deref().unwrap_or("no datapath");
            let s = if flow.rule.outputs.len() == 1 { "" } else { "s" };
            let text = format!(
                "{} datagrams came in {:.1} s, by {datapath} to {} output{s}",
                count(arrived),
                seen.look.lasted.as_secs_f64(),
                flow.rule.outputs.len()
            );
            outcome.well(of_rule(&flow), text);
        } else if flow.rule.info.health != Health::Failed {
            silent.insert(interface);
            let instead = instead(seen, &flow);
            outcome.findings.extend(instead);
            // What is known to be wrong is why nothing comes.
            if outcome.findings.len() == before {
                idle.entry(interface).or_default().push(flow);
            }
        }
    }
    for (interface, flows) in &idle {
        if flows.len() > MOST_IDLE {
            outcome.push(nothing_of_many(interface, flows));
        } else {
            outcome.findings.extend(flows.iter().map(|flow| nothing(seen, flow)));
        }
    }
    for interface in seen.ingress() {
        querier(seen, interface, silent.contains(interface), outcome);
        if !spoilt.contains(interface) {
            verdicts(seen, interface, outcome);
        }
    }
}

fn membership(seen: &Observations, flow: &Flow<'_>, forced: Option<u32>, outcome: &mut Outcome) {
    let Input { interface, group, source, .. } = &flow.rule.input;
    let joined = seen.groups.joined.get(&(interface.clone(), *group));
    let holds = joined.is_some_and(|joined| {
        source.is_none_or(|source| joined.sources.contains(&source) || joined.sources.is_empty())
    });
    if !holds && flow.rule.info.health == Health::Active {
        let what = format!(
            "the host is not joined to {group} on {interface}, so that a switch does not send it there"
        );
        outcome.push(Finding::problem(
            Code::NotJoined,
            of_rule(flow),
            what,
            moved_to(flow.rule, &flow.rule.input),
        ));
    }
    let version = forced.filter(|forced| *forced > 0).or(seen.groups.versions.get(interface).copied());
    if let Some(version @ ..3) = version.filter(|_| source.is_some()) {
        let (why, next) = match forced {
            Some(1..) => (
                "force_igmp_version says so",
                format!("sudo sysctl -w net.ipv4.conf.all.force_igmp_version=0 net.ipv4.conf.{interface}.force_igmp_version=0"),
            ),
            _ => ("the querier there does", "on the querier: IGMP version 3; a Linux bridge: ip link set BRIDGE type bridge mcast_igmp_version 3".to_owned()),
        };
        let what = format!(
            "{interface} speaks IGMPv{version} ({why}), which cannot ask for one source: all sources of {group} come, or none"
        );
        outcome.push(
            Finding::problem(Code::IgmpVersion, of_rule(flow), what, next).only_if(flow.arrived() == 0),
        );
    }
}

/// Datagrams that end here, by their TTL.
fn ttl(seen: &Observations, flow: &Flow<'_>, outcome: &mut Outcome) {
    let at_its_end = |sighting: &Sighting| {
        sighting.interface == flow.rule.input.interface
            && matches!(sighting.fate, Fate::Datagram { port, ttl: 0..=1 } if port == flow.rule.input.port)
    };
    let arrives_with_one = seen.sightings(flow.rule.input.group).any(|(sighting, _)| at_its_end(sighting));
    for (output, before, after) in flow.outputs().filter(|(output, ..)| !matches!(output.ttl, Ttl::Fixed(_)))
    {
        let (total, now) = moved(before.map(|before| &before.dropped), &after.dropped, "ttl_expired");
        if total > 0 || arrives_with_one && output.ttl == Ttl::Decrement {
            let what = format!(
                "{} datagrams to {} arrived with a TTL that leaves nothing (ttl_expired): their source sends them with \
                 TTL 1, or a router before this host has used it up",
                so_many(total, now),
                after.to
            );
            let fixed = Output { ttl: Ttl::Fixed(DEFAULT_TTL), ..output.clone() };
            let next = format!("mcr rule set {} --del-out {output} --add-out {fixed}", flow.name());
            let finding = Finding::problem(Code::TtlExpired, of_rule(flow), what, next);
            outcome.push(finding.only_if(now > 0 || arrives_with_one));
        }
    }
}

/// Frames of a rule's group that cannot be relayed as they are.
fn spoilt_frames(seen: &Observations, flow: &Flow<'_>) -> Vec<Finding> {
    let input = &flow.rule.input;
    let here = |sighting: &Sighting| {
        sighting.interface == input.interface && input.source.is_none_or(|source| source == sighting.source)
    };
    let spoilt = seen.sightings(input.group).filter(|(sighting, _)| here(sighting));
    let finding = |(sighting, frames): (&Sighting, u64)| {
        let (code, what, next) = spoilt_by(sighting.fate, &input.interface, seen)?;
        let what = format!("{} frames of {} from {} {what}", count(frames), input.group, sighting.source);
        Some(Finding::problem(code, of_rule(flow), what, next))
    };
    spoilt.filter_map(finding).collect()
}

fn spoilt_by(fate: Fate, interface: &InterfaceName, seen: &Observations) -> Option<(Code, String, String)> {
    let payload = seen.devices.get(interface).map_or(1500, |device| device.link.mtu).saturating_sub(28);
    Some(match fate {
        Fate::Datagram { .. } => return None,
        Fate::Vlan(vlan) => (
            Code::VlanTagged,
            format!("are tagged for VLAN {vlan}: {interface} relays what is not tagged"),
            format!(
                "sudo ip link add link {interface} name {interface}.{vlan} type vlan id {vlan} && sudo ip link set \
                 {interface}.{vlan} up, and the rule's input there"
            ),
        ),
        Fate::Fragment => (
            Code::Fragments,
            "are fragments, which are not relayed: the source sends more than its MTU takes".to_owned(),
            format!("at the source: send at most {payload} bytes, or ip link set INTERFACE mtu 9000 on the whole way"),
        ),
        Fate::Options => (
            Code::IpOptions,
            "have IP options, and are not relayed".to_owned(),
            "at the source: send without IP options (router alert, record route)".to_owned(),
        ),
        Fate::BadChecksum => (
            Code::BadChecksum,
            "have a wrong IPv4 header checksum, and are not relayed: they were damaged on the way, or never finished".to_owned(),
            "at the source: ethtool -K INTERFACE tx off; else change the cable".to_owned(),
        ),
        Fate::Damaged => (
            Code::Damaged,
            "end early or lie about their length, and are not relayed".to_owned(),
            "at the source: see what makes such frames: tcpdump -evvi INTERFACE".to_owned(),
        ),
    })
}

/// Frames of an interface that cannot be relayed, by what was counted where nothing was seen of a rule's own.
fn verdicts(seen: &Observations, interface: &InterfaceName, outcome: &mut Outcome) {
    let kinds = [
        ("fragment", Fate::Fragment),
        ("vlan", Fate::Vlan(0)),
        ("ip_options", Fate::Options),
        ("bad_checksum", Fate::BadChecksum),
        ("truncated", Fate::Damaged),
        ("malformed", Fate::Damaged),
    ];
    for (before, after) in seen.counters(interface) {
        for (verdict, fate) in kinds {
            let (_, now) = moved(before.map(|before| &before.verdicts), &after.verdicts, verdict);
            let Some((code, what, next)) = spoilt_by(fate, interface, seen).filter(|_| now > 0) else {
                continue;
            };
            let (what, next) = match fate {
                Fate::Vlan(_) => (
                    "are tagged for a VLAN: only what is not tagged is relayed".to_owned(),
                    format!(
                        "relay from the VLAN's own interface: sudo ip link add link {interface} name {interface}.VLAN type vlan id VLAN"
                    ),
                ),
                _ => (what, next),
            };
            let what = format!("{} multicast frames {what} ({verdict})", count(now));
            outcome.push(Finding::note(code, of_interface(interface), what, next));
        }
    }
}

/// What comes in the place of what a rule wants.
fn instead(seen: &Observations, flow: &Flow<'_>) -> Vec<Finding> {
    let input = &flow.rule.input;
    let wanted = |source| input.source.is_none_or(|wanted| wanted == source);
    let mut found = Vec::new();
    for (Sighting { interface, source, fate, .. }, frames) in seen.sightings(input.group) {
        let Fate::Datagram { port, .. } = *fate else { continue };
        let here = *interface == input.interface;
        let (code, what, other) = match (here, port == input.port, wanted(*source)) {
            (true, true, false) => (
                Code::OtherSource,
                format!("from {source}, and the rule wants {} alone", input.source.unwrap_or(*source)),
                Input { source: Some(*source), ..input.clone() },
            ),
            (true, false, true) => (
                Code::OtherPort,
                format!("to port {port}, not {}", input.port),
                Input { port, ..input.clone() },
            ),
            (false, true, true) => (
                Code::OtherInterface,
                format!("on {interface}, not on {}", input.interface),
                Input { interface: interface.clone(), ..input.clone() },
            ),
            _ => continue,
        };
        let what = format!("{} datagrams of {} come {what}", count(frames), input.group);
        found.push(Finding::problem(code, of_rule(flow), what, moved_to(flow.rule, &other)));
    }
    // Several sources send to one port that is not the rule's: one command mends it.
    found.dedup_by(|a, b| (a.code, &a.next) == (b.code, &b.next));
    found
}

fn nothing(seen: &Observations, flow: &Flow<'_>) -> Finding {
    let Input { group, port, interface, source } = &flow.rule.input;
    let from = source.map(|source| format!(" from {source}")).unwrap_or_default();
    let since = match flow.after.and_then(|stats| stats.idle_seconds) {
        Some(idle) => format!("the last came {} s ago", count(idle)),
        None => "none ever came".to_owned(),
    };
    let asked = match seen.look.queriers.get(interface) {
        Some(querier) => format!("; it is joined, and {} asks for memberships", who(*querier)),
        None => "; it is joined".to_owned(),
    };
    let what = format!(
        "nothing of {group}:{port}{from} arrives on {interface} ({since}){asked}: does it send, and by a TTL that reaches here?"
    );
    Finding::problem(Code::NothingArrives, of_rule(flow), what, try_the_way(flow))
}

fn nothing_of_many(interface: &InterfaceName, flows: &[Flow<'_>]) -> Finding {
    let names: Vec<_> = flows.iter().take(MOST_IDLE).map(Flow::name).collect();
    let ever = |flow: &&Flow<'_>| flow.after.is_some_and(|stats| stats.idle_seconds.is_some());
    let never = flows.len() - flows.iter().filter(ever).count();
    let what = format!(
        "nothing arrives for {} of its rules ({} and {} more), and for {} of them nothing ever came; they are joined: do their \
         sources send, and by a TTL that reaches here?",
        count(flows.len() as u64),
        names.join(", "),
        count((flows.len() - MOST_IDLE) as u64),
        count(never as u64)
    );
    Finding::problem(Code::NothingArrives, of_interface(interface), what, try_the_way(&flows[0]))
}

fn try_the_way(flow: &Flow<'_>) -> String {
    let Input { group, port, .. } = &flow.rule.input;
    format!(
        "at the source, to try the way: mcr gen {group}:{port}@INTERFACE --rate 10 --size 100 --seconds 10"
    )
}

/// A bridge asks without an address of its own, unless it is told to have one.
fn who(querier: Ipv4Addr) -> String {
    if querier.is_unspecified() { "a switch".to_owned() } else { querier.to_string() }
}

fn querier(seen: &Observations, interface: &InterfaceName, silent: bool, outcome: &mut Outcome) {
    let up = seen.devices.get(interface).is_some_and(|device| device.link.up);
    let looked = seen.look.refused.is_none() && !seen.look.lasted.is_zero() && up;
    match seen.look.queriers.get(interface) {
        Some(querier) => {
            outcome.well(
                of_interface(interface),
                format!("{} asks for memberships (IGMP querier)", who(*querier)),
            );
        }
        None if looked && seen.look.lasted >= QUERY_INTERVAL => {
            let what = "nobody asks for memberships there: a switch that snoops forgets them after some minutes, and the streams stop";
            let next = "on its switch or router: an IGMP querier; a Linux bridge: ip link set BRIDGE type bridge mcast_querier 1";
            outcome
                .push(Finding::problem(Code::NoQuerier, of_interface(interface), what, next).only_if(silent));
        }
        None if looked && silent => {
            let what = format!(
                "nobody asked for memberships in {:.1} s; that is usual, for a querier asks each 125 s",
                seen.look.lasted.as_secs_f64()
            );
            let next = format!("mcr doctor {interface} --seconds {}", QUERY_INTERVAL.as_secs());
            outcome.push(Finding::note(Code::QuerierUnseen, of_interface(interface), what, next));
        }
        None => {}
    }
}
