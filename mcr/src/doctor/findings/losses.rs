//! What was lost on the way through: in rings, devices, rules and outputs. What is lost now is a problem; what once was, a note.

use std::collections::BTreeMap;

use super::{Code, Finding, Outcome, egress::admit, of_interface, of_rule};
use crate::{
    api::wire::{DeviceStats, InterfaceStats, OutputStats, count},
    doctor::facts::{Flow, Hook, Observations, Seen},
    rule::{InterfaceName, Output},
};

pub type Counts = BTreeMap<String, u64>;

pub fn decide(seen: &Observations, outcome: &mut Outcome) {
    for name in seen.ingress() {
        for (before, after) in seen.counters(name) {
            rings(seen, name, before, after, outcome);
        }
    }
    devices(seen, outcome);
    for flow in seen.flows() {
        rule(&flow, outcome);
        for (output, before, after) in flow.outputs() {
            self::output(seen, &flow, output, before, after, outcome);
        }
    }
}

/// A counter's sum and what was added during the look.
pub fn moved(before: Option<&Counts>, after: &Counts, reason: &str) -> (u64, u64) {
    let of = |counts: &Counts| counts.get(reason).copied().unwrap_or(0);
    (of(after), of(after).saturating_sub(before.map_or(0, of)))
}

/// `12 (3 of them now)`.
pub fn so_many(total: u64, now: u64) -> String {
    match now {
        0 => format!("{} so far, none now,", count(total)),
        now => format!("{} so far, {} of them now,", count(total), count(now)),
    }
}

fn rings(
    seen: &Observations,
    name: &InterfaceName,
    before: Option<&InterfaceStats>,
    after: &InterfaceStats,
    outcome: &mut Outcome,
) {
    for reason in after.dropped.keys().filter(|reason| *reason != "worker_died") {
        let (total, now) = moved(before.map(|before| &before.dropped), &after.dropped, reason);
        let what = format!(
            "{} frames were lost before a worker took them ({reason}, {}): it was kept from its CPU, or they are too many \
             for it",
            so_many(total, now),
            after.datapath
        );
        let next = relief(seen, name, after);
        outcome.push(Finding::problem(Code::RingDrops, of_interface(name), what, next).only_if(now > 0));
    }
}

/// What gives an interface's workers more room.
fn relief(seen: &Observations, name: &InterfaceName, after: &InterfaceStats) -> String {
    let told = seen.told();
    let workers = told.map_or(0, |told| {
        let its = |id: &str, datapath: &str| id == after.name && datapath == after.datapath;
        told.after.workers.iter().filter(|worker| its(&worker.interface, &worker.datapath)).count() as u32
    });
    let device = seen.devices.get(name);
    let queues = device.map_or(1, |device| device.link.rx_queues);
    let most = device.and_then(|device| device.most_rx_queues).unwrap_or(queues);
    let cpus = seen.host.cpus;
    let by_packet = after.datapath == "af-packet";
    if workers < cpus && (by_packet || workers < queues) {
        return format!(
            "start it with mcr run --workers {}",
            if by_packet { cpus } else { queues.min(cpus) }
        );
    }
    if !by_packet && queues < most && queues < cpus {
        return format!("sudo ethtool -L {name} combined {}", most.min(cpus));
    }
    let frames = told.and_then(|told| told.settings.get("frames")?.as_integer()).unwrap_or(8192);
    if by_packet {
        "keep other work off the workers' CPUs: mcr run --cpus LIST".to_owned()
    } else {
        format!("start it with mcr run --frames {}", frames.saturating_mul(2))
    }
}

fn devices(seen: &Observations, outcome: &mut Outcome) {
    let Some(told) = seen.told() else { return };
    let (ingress, egress) = (seen.ingress(), seen.egress());
    for after in &told.after.devices {
        let Ok(name) = after.name.parse::<InterfaceName>() else { continue };
        let before = told.before.devices.iter().find(|before| before.name == after.name);
        if ingress.contains(&name) {
            received(seen, &name, before, after, outcome);
        }
        if egress.contains(&name) {
            sent(seen, &name, before, after, outcome);
        }
    }
}

fn received(
    seen: &Observations,
    name: &InterfaceName,
    before: Option<&DeviceStats>,
    after: &DeviceStats,
    outcome: &mut Outcome,
) {
    let sized = seen.devices.get(name).and_then(|device| device.rx_ring).filter(|(now, most)| now < most);
    let larger = match sized {
        Some((_, most)) => format!("sudo ethtool -G {name} rx {most}"),
        None => format!("spread them over more queues: ethtool -l {name}"),
    };
    let cable = format!("change its cable or transceiver: ethtool -S {name}");
    for (counter, why, next) in [
        ("rx_missed_errors", "its ring was full", &larger),
        ("rx_over_errors", "its ring was full", &larger),
        ("rx_fifo_errors", "its ring was full", &larger),
        ("rx_crc_errors", "they came damaged", &cable),
        ("rx_frame_errors", "they came damaged", &cable),
    ] {
        let (total, now) = moved(before.map(|before| &before.link), &after.link, counter);
        if total > 0 {
            let what = format!("the device lost {} frames, {why} ({counter})", so_many(total, now));
            outcome
                .push(Finding::problem(Code::DeviceRxLost, of_interface(name), what, next).only_if(now > 0));
        }
    }
}

fn sent(
    seen: &Observations,
    name: &InterfaceName,
    before: Option<&DeviceStats>,
    after: &DeviceStats,
    outcome: &mut Outcome,
) {
    let lost = |counter: &str, (total, now): (u64, u64), next: String| {
        let what =
            format!("{} frames were lost after the kernel had taken them ({counter})", so_many(total, now));
        Finding::problem(Code::DeviceTxLost, of_interface(name), what, next).only_if(now > 0)
    };
    for counter in after.qdisc.keys().filter(|counter| counter.ends_with(" drops")) {
        let counts = moved(before.map(|before| &before.qdisc), &after.qdisc, counter);
        outcome.push(lost(counter, counts, longer_queue(name)));
    }
    for counter in ["tx_dropped", "tx_errors", "tx_fifo_errors", "tx_carrier_errors"] {
        let counts = moved(before.map(|before| &before.link), &after.link, counter);
        if counts.0 > 0 {
            let looked = format!("see what it could not send: ip -s -s link show {name}; ethtool -S {name}");
            let crowding = crowding(seen, name).filter(|_| counter == "tx_dropped");
            outcome.push(lost(counter, counts, crowding.unwrap_or(looked)));
        }
    }
}

/// What relieves a device that the kernel gives several frames for each datagram, and all of a burst at one go.
fn crowding(seen: &Observations, name: &InterfaceName) -> Option<String> {
    let there = |rule: &Seen| rule.outputs.iter().filter(|output| output.interface == *name).count();
    let rules = seen.told()?.rules.iter().filter(|rule| rule.info.datapath.as_deref() == Some("redirect"));
    let rule = rules.max_by_key(|rule| there(rule)).filter(|rule| there(rule) > 1)?;
    Some(format!("mcr rule set {} --datapath af-xdp", rule.info.name))
}

fn longer_queue(name: &InterfaceName) -> String {
    format!("sudo tc qdisc replace dev {name} root pfifo limit 10000")
}

/// Who refuses what a device is to send, and what is to be done: a hook on egress before the queue, for they look alike.
fn refused(seen: &Observations, output: &Output) -> (String, String) {
    let name = &output.interface;
    let hook = seen.hooks.get(name).cloned().unwrap_or_default();
    let chains: Vec<_> = hook.chains.into_iter().filter(|chain| chain.starts_with("netdev ")).collect();
    if !chains.is_empty() {
        let why = format!(
            "were refused on their way out of {name}, by its nftables egress hook ({})",
            chains.join(", ")
        );
        return (why, admit(output, &Hook { chains, ..Hook::default() }));
    }
    let by = |next: String| {
        (format!("were refused on their way out: {}", hook.why.as_deref().unwrap_or_default()), next)
    };
    match hook.why.as_deref() {
        Some(why) if why.contains("tc egress filter") => by(format!("tc -s filter show dev {name} egress")),
        Some(why) if why.contains("(tcx)") => by(format!("sudo bpftool net show dev {name}")),
        _ => (
            format!(
                "were refused by the queueing discipline of {name}, whose queue is too short or whose shaping too narrow"
            ),
            longer_queue(name),
        ),
    }
}

fn rule(flow: &Flow<'_>, outcome: &mut Outcome) {
    let Some(after) = flow.after else { return };
    for reason in after.dropped.keys() {
        let (total, now) = moved(flow.before.map(|before| &before.dropped), &after.dropped, reason);
        let (why, next) = match reason.as_str() {
            "no_worker" => {
                ("came while no worker served their queue, and went to the host", "mcr workers".to_owned())
            }
            // That they are dropped is what keeps a loop from going on.
            "loop" if now == 0 => continue,
            "loop" => {
                ("were of this relay's own sending, and came back", format!("mcr rule show {}", flow.name()))
            }
            "cut" => (
                "were too long for their ring, and there was no room for the whole",
                "start it with mcr run --workers N".to_owned(),
            ),
            "not_redirected" => (
                "could not be tagged, since the driver leaves no room before a frame",
                format!("mcr rule set {} --datapath af-xdp", flow.name()),
            ),
            _ => ("were dropped", format!("mcr stats {}", flow.name())),
        };
        let what = format!("{} datagrams {why} ({reason})", so_many(total, now));
        let harmless = reason == "loop";
        outcome
            .push(Finding::problem(Code::RuleDrops, of_rule(flow), what, next).only_if(now > 0 && !harmless));
    }
}

fn output(
    seen: &Observations,
    flow: &Flow<'_>,
    output: &Output,
    before: Option<&OutputStats>,
    after: &OutputStats,
    outcome: &mut Outcome,
) {
    let (name, to) = (&output.interface, &after.to);
    for reason in after.dropped.keys() {
        let (total, now) = moved(before.map(|before| &before.dropped), &after.dropped, reason);
        let mtu = |name: &InterfaceName| seen.devices.get(name).map_or(0, |device| device.link.mtu);
        let (code, why, next) = match reason.as_str() {
            // Told elsewhere, with what is the case now.
            "ttl_expired" | "filtered" | "pending" | "unreachable" => continue,
            "too_big" if now == 0 && mtu(name) >= mtu(&flow.rule.input.interface).max(1) => (
                Code::TooBig,
                format!("were longer than the MTU of {name} took; it is {} now", mtu(name)),
                "nothing is to be done".to_owned(),
            ),
            "too_big" => (
                Code::TooBig,
                format!("are longer than the MTU of {name} ({}) takes", mtu(name)),
                format!("sudo ip link set {name} mtu {}", mtu(&flow.rule.input.interface)),
            ),
            "queue_full" => {
                let (why, next) = refused(seen, output);
                (Code::EgressFull, why, next)
            }
            "send_buffer_full" => (
                Code::EgressFull,
                format!("found the send buffer full: {name} is slower than the stream"),
                format!("send less, or by a faster interface: ethtool {name}; tc -s qdisc show dev {name}"),
            ),
            "skipped" => (
                Code::OutputDrops,
                format!("were passed over by the kernel on their way to {name}"),
                format!("mcr rule set {} --datapath af-xdp", flow.name()),
            ),
            "worker_died" => (
                Code::OutputDrops,
                "were in the hands of a worker that died".to_owned(),
                "mcr workers".to_owned(),
            ),
            _ => (
                Code::OutputDrops,
                "could not be sent; the daemon's log says why".to_owned(),
                format!("mcr stats {}", flow.name()),
            ),
        };
        let what = format!("{} datagrams to {to} {why} ({reason})", so_many(total, now));
        outcome.push(Finding::problem(code, of_rule(flow), what, next).only_if(now > 0));
    }
}
