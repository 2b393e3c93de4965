//! The relay step: a batch of datagrams in, runs to send out. Pure: no clock, no file descriptor.
//!
//! A batch is grouped by rule, keeping the order within each; every output of a rule then gets the
//! rule's datagrams cut into runs of one size, TTL and DSCP, which leave in one send each.

use libc::iovec;
use mcr_common::{flow::FlowKey4, parse::Datagram};
use rustc_hash::FxHashMap;

use crate::{
    rule::{OutputSlot, RuleSlot},
    worker::{
        ledger::{DropReason, Ledger},
        protocol::{CompiledOutput, CompiledRule, Route, Ttl},
    },
};

/// Datagrams taken from one queue at a time. The more of them, the longer the runs where many streams play.
pub const BATCH: usize = 1024;

/// IPv4 and UDP headers, without options.
const HEADERS: u32 = 28;

/// Most payload that one `UDP_SEGMENT` send takes.
const MAX_RUN_BYTES: usize = 65_507;

/// What a worker does with a flow's datagrams.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    /// Slot of the rule.
    pub slot: u32,
    /// Sent by this relay itself: not relayed again.
    pub looped: bool,
}

/// The rules of one worker, by flow and by slot.
#[derive(Debug, Default)]
pub struct FlowTable {
    flows: FxHashMap<u128, Flow>,
    rules: Vec<Option<CompiledRule>>,
    /// Flows that name a source: without any, one lookup does.
    specific: usize,
}

impl FlowTable {
    /// Takes a rule in, in place of what has its slot.
    pub fn upsert(&mut self, rule: CompiledRule) {
        let slot = rule.slot as usize;
        self.remove(rule.slot);
        if self.rules.len() <= slot {
            self.rules.resize_with(slot + 1, || None);
        }
        for (key, looped) in flows_of(&rule) {
            let former = self.flows.insert(packed(&key), Flow { slot: rule.slot, looped });
            self.specific += usize::from(former.is_none() && names_source(&key));
        }
        self.rules[slot] = Some(rule);
    }

    pub fn remove(&mut self, slot: u32) {
        let Some(rule) = self.rules.get_mut(slot as usize).and_then(Option::take) else { return };
        for (key, _) in flows_of(&rule) {
            // Another rule may have taken the flow over.
            if self.flows.get(&packed(&key)).is_some_and(|flow| flow.slot == slot) {
                self.flows.remove(&packed(&key));
                self.specific -= usize::from(names_source(&key));
            }
        }
    }

    /// Group and port of every flow, network order.
    pub fn destinations(&self) -> impl Iterator<Item = ([u8; 4], [u8; 2])> + '_ {
        self.rules.iter().flatten().map(|rule| (rule.key.group, rule.key.port))
    }

    /// Sends an output's datagrams one by one from now on.
    pub fn send_singly(&mut self, slot: OutputSlot) {
        let outputs = self.rules.iter_mut().flatten().flat_map(|rule| &mut rule.outputs);
        for output in outputs.filter(|output| output.slot == slot.0) {
            output.max_run = 1;
        }
    }

    /// The flow of a datagram: its source's before any source's.
    #[inline]
    pub fn find(&self, datagram: &Datagram) -> Option<Flow> {
        let specific = FlowKey4::source_group(datagram.source, datagram.group, datagram.port);
        let any = FlowKey4::any_source(datagram.group, datagram.port);
        (self.specific > 0)
            .then(|| self.flows.get(&packed(&specific)))
            .flatten()
            .or_else(|| self.flows.get(&packed(&any)))
            .copied()
    }

    fn rule(&self, slot: u32) -> Option<&CompiledRule> {
        self.rules.get(slot as usize)?.as_ref()
    }
}

/// The key as a number: the table hashes one faster than an array of bytes.
#[inline]
fn packed(key: &FlowKey4) -> u128 {
    let [source, group] = [key.source, key.group].map(u32::from_ne_bytes);
    u128::from(source) << 64 | u128::from(group) << 32 | u128::from(u16::from_ne_bytes(key.port))
}

fn names_source(key: &FlowKey4) -> bool {
    key.source != [0; 4]
}

/// A rule's flows, and which of them are loops. A loop goes before the rule's own flow of the same key.
fn flows_of(rule: &CompiledRule) -> impl Iterator<Item = (FlowKey4, bool)> + '_ {
    let FlowKey4 { group, port, .. } = rule.key;
    let own = rule.own_sources.iter().map(move |source| FlowKey4::source_group(source.octets(), group, port));
    [(rule.key, false)].into_iter().chain(own.map(|key| (key, true)))
}

/// A datagram of a batch.
#[derive(Clone, Copy)]
struct Arrival {
    slot: u32,
    payload: iovec,
    ttl: u8,
    tos: u8,
}

/// The datagrams of one batch, as they came and grouped by rule. Its memory is used again and again.
pub struct Batch {
    arrivals: Vec<Arrival>,
    /// Arrivals of one rule after another, each rule's in order.
    grouped: Vec<Arrival>,
    /// Payloads of `grouped`, in the shape in which the kernel takes them.
    payloads: Vec<iovec>,
    /// Per rule of the batch: slot, number of its datagrams, and where they start in `grouped`.
    groups: Vec<Group>,
    /// By rule slot: where its group is, if the number of the batch is this one's.
    places: Vec<(u64, u32)>,
    number: u64,
}

#[derive(Clone, Copy)]
struct Group {
    slot: u32,
    datagrams: usize,
    start: usize,
}

impl Batch {
    /// For rules with slots below this number.
    pub fn new(rules: u32) -> Self {
        Self {
            arrivals: Vec::with_capacity(BATCH),
            grouped: Vec::with_capacity(BATCH),
            payloads: Vec::with_capacity(BATCH),
            groups: Vec::with_capacity(BATCH),
            places: vec![(0, 0); rules as usize],
            number: 1,
        }
    }

    pub fn clear(&mut self) {
        self.arrivals.clear();
        self.groups.clear();
        self.number += 1;
    }

    /// Whether [`BATCH`] datagrams are in it.
    pub fn is_full(&self) -> bool {
        self.arrivals.len() == BATCH
    }

    /// Adds a datagram of a rule, whose payload lies at `payload` until the batch is cleared.
    pub fn push(&mut self, slot: u32, datagram: &Datagram, payload: iovec) {
        let Some(place) = self.places.get_mut(slot as usize) else { return };
        if place.0 != self.number {
            *place = (self.number, self.groups.len() as u32);
            self.groups.push(Group { slot, datagrams: 0, start: 0 });
        }
        self.groups[place.1 as usize].datagrams += 1;
        self.arrivals.push(Arrival { slot, payload, ttl: datagram.ttl, tos: datagram.tos });
    }

    /// Sorts by rule, keeping the order within each.
    fn group(&mut self) {
        let mut start = 0;
        for group in &mut self.groups {
            group.start = start;
            start += group.datagrams;
        }
        self.grouped.clear();
        self.grouped.extend_from_slice(&self.arrivals);
        if self.groups.len() > 1 {
            for arrival in &self.arrivals {
                let group = &mut self.groups[self.places[arrival.slot as usize].1 as usize];
                self.grouped[group.start] = *arrival;
                group.start += 1;
            }
            for group in &mut self.groups {
                group.start -= group.datagrams;
            }
        }
        self.payloads.clear();
        self.payloads.extend(self.grouped.iter().map(|arrival| arrival.payload));
    }
}

/// Datagrams that leave in one send.
pub struct Run<'a> {
    pub output: OutputSlot,
    pub route: &'a Route,
    /// One payload a datagram; all of one length, but the last may be shorter.
    pub payloads: &'a [iovec],
    pub ttl: u8,
    /// DSCP in the upper six bits, ECN cleared.
    pub tos: u8,
    pub bytes: u64,
}

/// Where runs go. What is handed over is sent, or counted as dropped, before the batch is cleared.
pub trait Egress {
    fn send(&mut self, ledger: &Ledger, run: Run<'_>);
}

/// Relays a batch: every datagram is counted as received by its rule, and for each of the rule's
/// outputs is handed to `egress` or counted as dropped.
pub fn relay(batch: &mut Batch, table: &FlowTable, ledger: &Ledger, now_ns: u64, egress: &mut impl Egress) {
    batch.group();
    for group in &batch.groups {
        let Some(rule) = table.rule(group.slot) else { continue };
        let range = group.start..group.start + group.datagrams;
        let arrivals = &batch.grouped[range.clone()];
        let payloads = &batch.payloads[range];

        let counters = ledger.rule(RuleSlot(group.slot));
        counters.received.add(arrivals.len() as u64);
        counters.received_bytes.add(bytes(payloads));
        counters.last_seen_ns.set(now_ns);

        for output in &rule.outputs {
            ledger.output(OutputSlot(output.slot)).received.add(arrivals.len() as u64);
        }
        for output in &rule.outputs {
            fan_out(output, arrivals, payloads, ledger, egress);
        }
    }
}

fn bytes(payloads: &[iovec]) -> u64 {
    payloads.iter().map(|payload| payload.iov_len as u64).sum()
}

/// Cuts one rule's datagrams into the runs of one output.
fn fan_out(
    output: &CompiledOutput,
    arrivals: &[Arrival],
    payloads: &[iovec],
    ledger: &Ledger,
    egress: &mut impl Egress,
) {
    let slot = OutputSlot(output.slot);
    let route = match &output.route {
        Ok(route) => route,
        Err(reason) => return ledger.output(slot).drop(*reason, arrivals.len() as u64),
    };
    let mut start = 0;
    while start < arrivals.len() {
        let (ttl, tos) = match admit(output, route, &arrivals[start]) {
            Ok(marks) => marks,
            Err(reason) => {
                ledger.output(slot).drop(reason, 1);
                start += 1;
                continue;
            }
        };
        let len = run_len(output, route, &arrivals[start..], (ttl, tos));
        let payloads = &payloads[start..start + len];
        egress.send(ledger, Run { output: slot, route, payloads, ttl, tos, bytes: bytes(payloads) });
        start += len;
    }
}

/// TTL and TOS of a datagram at an output, or why it cannot leave there.
fn admit(output: &CompiledOutput, route: &Route, arrival: &Arrival) -> Result<(u8, u8), DropReason> {
    if arrival.payload.iov_len + HEADERS as usize > route.mtu as usize {
        return Err(DropReason::TooBig);
    }
    let ttl = match output.ttl {
        Ttl::Fixed(ttl) => ttl,
        Ttl::Copy => arrival.ttl,
        Ttl::Decrement => arrival.ttl.saturating_sub(1),
    };
    if ttl == 0 {
        return Err(DropReason::TtlExpired);
    }
    Ok((ttl, output.dscp.map_or(arrival.tos & !3, |dscp| dscp << 2)))
}

/// How many datagrams from the first on may leave in one send with it.
fn run_len(output: &CompiledOutput, route: &Route, arrivals: &[Arrival], marks: (u8, u8)) -> usize {
    let segment = arrivals[0].payload.iov_len;
    if segment == 0 {
        return 1;
    }
    let most = (MAX_RUN_BYTES / segment).min(output.max_run.into()).max(1);
    let mut len = 1;
    for arrival in arrivals.iter().take(most).skip(1) {
        let size = arrival.payload.iov_len;
        if size == 0 || size > segment || admit(output, route, arrival) != Ok(marks) {
            break;
        }
        len += 1;
        if size < segment {
            break;
        }
    }
    len
}

#[cfg(test)]
#[path = "relay_tests.rs"]
mod tests;
