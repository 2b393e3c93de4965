//! Outputs: what they wait for, and what stands in their way out of this host.

use std::net::Ipv4Addr;

use super::{
    Code, Finding, Outcome,
    losses::{moved, so_many},
    of_rule,
};
use crate::{
    doctor::facts::{Flow, Hook, Observations},
    net::links::Link,
    rule::{InterfaceName, Output},
};

pub fn decide(seen: &Observations, outcome: &mut Outcome) {
    for flow in seen.flows() {
        for (output, info) in flow.rule.outputs.iter().zip(&flow.rule.info.outputs) {
            if let Some(why) = &info.reason {
                outcome.findings.extend(waits(seen, &flow, output, why));
            }
        }
        for (output, before, after) in flow.outputs() {
            let lost = |reason| moved(before.map(|before| &before.dropped), &after.dropped, reason);
            let (filtered, now) = lost("filtered");
            if filtered > 0 {
                let hook = seen.hooks.get(&output.interface).cloned().unwrap_or_default();
                let by = hook.why.as_deref().unwrap_or("a firewall, or a program that is not seen from here");
                let what = format!(
                    "{} datagrams to {} were forbidden by this host itself: {by}",
                    so_many(filtered, now),
                    after.to
                );
                let next = admit(output, &hook);
                outcome.push(Finding::problem(Code::Filtered, of_rule(&flow), what, next).only_if(now > 0));
            }
            let (silent, now) = lost("unreachable");
            let (name, to) = (&output.interface, output.destination);
            let pending =
                flow.rule.info.outputs.iter().any(|info| info.to == after.to && info.reason.is_some());
            if silent > 0 && !pending {
                let what = format!(
                    "{} datagrams to {to} were dropped while it could not be reached",
                    so_many(silent, now)
                );
                let next = format!("ip neigh show dev {name}; ip route get {to} oif {name}");
                outcome.push(Finding::problem(Code::HostSilent, of_rule(&flow), what, next).only_if(now > 0));
            }
            // What was sent again had met the word of an earlier datagram.
            let refused = after.retried.saturating_sub(before.map_or(0, |before| before.retried));
            if refused > 0 {
                let what = format!(
                    "{to} answers that nobody there receives on port {}, or that it may not be sent to",
                    output.port
                );
                let next = format!(
                    "on {to}: start what is to receive, or open its firewall for UDP port {}",
                    output.port
                );
                outcome.push(Finding::problem(Code::HostRefuses, of_rule(&flow), what, next));
            }
        }
    }
}

/// What an output waits for, unless its interface says so itself.
fn waits(seen: &Observations, flow: &Flow<'_>, output: &Output, why: &str) -> Option<Finding> {
    let (name, to) = (&output.interface, output.destination);
    if is_broken(seen, name, output.from.is_some()) {
        return None;
    }
    let finding = |code, what: String, next: String| Some(Finding::problem(code, of_rule(flow), what, next));
    if why.starts_with("no route to ") {
        let what = format!("the output to {to} waits: {why}; its datagrams are dropped");
        return finding(Code::NoRoute, what, format!("sudo ip route replace {to}/32 dev {name}"));
    }
    if let Some((silent, _)) =
        why.split_once(" does not answer ARP").or(why.split_once(" has no neighbour yet"))
    {
        let silent: Ipv4Addr = silent.parse().unwrap_or(to);
        let who = if silent == to { "the host" } else { "the router to it" };
        let what =
            format!("the output to {to} waits: {who} does not answer ({why}); its datagrams are dropped");
        let next = format!(
            "start {silent} or see its cable; where it cannot answer ARP: sudo ip neigh replace {silent} lladdr MAC dev {name}"
        );
        return finding(Code::HostSilent, what, next);
    }
    let next = match output.from {
        Some(from) if why.contains("is no address of this host") => {
            format!("sudo ip addr add {}/32 dev {name}", from.address)
        }
        _ => format!("mcr rule show {}", flow.name()),
    };
    finding(Code::OutputPending, format!("the output to {to} waits: {why}; its datagrams are dropped"), next)
}

fn is_broken(seen: &Observations, name: &InterfaceName, has_address: bool) -> bool {
    let broken = |link: &Link| !link.up || link.addresses.is_empty() && !has_address;
    seen.devices.get(name).is_none_or(|device| broken(&device.link))
}

/// Lets an output's datagrams pass what is in their way.
pub fn admit(output: &Output, hook: &Hook) -> String {
    let Output { destination, port, interface, .. } = output;
    let rules: Vec<_> = hook
        .chains
        .iter()
        .map(|chain| format!("sudo nft insert rule {chain} ip daddr {destination} udp dport {port} accept"))
        .collect();
    match hook.why.as_deref() {
        _ if !rules.is_empty() => rules.join(" && "),
        Some(why) if why.starts_with("iptables") => {
            format!(
                "sudo iptables-legacy -I OUTPUT -o {interface} -d {destination} -p udp --dport {port} -j ACCEPT"
            )
        }
        _ => format!(
            "see what does it: sudo nft list ruleset; tc filter show dev {interface} egress; bpftool net"
        ),
    }
}
