//! What the kernel sent on by itself: counted in its maps, looked up here before anybody asks.

use std::{
    collections::{BTreeSet, HashMap},
    time::SystemTime,
};

use mcr_common::counters::RuleCounters;

use super::Programs;
use crate::{
    ebpf::RedirectTotals,
    rule::{InterfaceName, OutputSlot, RuleSlot},
    ruleset::Entry,
    supervisor::state::State,
};

/// What an output has of the datagrams that the kernel sent on.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct OfOutput {
    /// Datagrams of its rule, whether or not it was among the outputs at the time.
    pub offered: u64,
    pub totals: RedirectTotals,
}

/// Rules that the kernel serves, or once served, and what it counted of them.
#[derive(Default)]
pub(super) struct Redirected {
    rules: BTreeSet<RuleSlot>,
    counted: HashMap<RuleSlot, RuleCounters>,
    /// Nanoseconds since 1970 at which a rule was seen to have gone on last.
    seen_ns: HashMap<RuleSlot, u64>,
    outputs: HashMap<OutputSlot, OfOutput>,
    /// What programs counted that are no longer attached, less what is not the output's own. It wraps.
    former: HashMap<OutputSlot, OfOutput>,
}

/// Datagrams of a rule that were the kernel's to send on.
pub(super) fn offered(counters: &RuleCounters) -> u64 {
    counters.redirected + counters.no_output
}

impl Redirected {
    /// The kernel serves a rule from now on.
    pub fn begin(&mut self, slot: RuleSlot) {
        self.rules.insert(slot);
    }

    pub fn output(&self, slot: OutputSlot) -> OfOutput {
        self.outputs.get(&slot).copied().unwrap_or_default()
    }

    /// What is to be added to what the maps show of an output. It wraps.
    pub fn former(&self, slot: OutputSlot) -> OfOutput {
        self.former.get(&slot).copied().unwrap_or_default()
    }

    pub fn set_former(&mut self, slot: OutputSlot, former: OfOutput) {
        self.former.insert(slot, former);
    }

    pub fn seen_ns(&self, slot: RuleSlot) -> u64 {
        self.seen_ns.get(&slot).copied().unwrap_or_default()
    }

    pub fn rule(&self, slot: RuleSlot) -> RuleCounters {
        self.counted.get(&slot).copied().unwrap_or_default()
    }

    /// Looks up what the kernel has counted. What became of datagrams is read before how many there were.
    pub fn follow(&mut self, state: &State, programs: &Programs) {
        if self.rules.is_empty() {
            return;
        }
        for entry in state.rules().iter() {
            if self.rules.contains(&entry.slot) {
                self.look_up(entry, programs);
            }
        }
    }

    /// Looks up what the kernel has counted of a rule.
    pub fn look_up(&mut self, entry: &Entry, programs: &Programs) {
        let Some(program) = programs.get(&entry.rule.input.interface) else { return };
        let outputs: Vec<_> = entry
            .output_slots
            .iter()
            .filter_map(|slot| Some((*slot, program.redirected(entry.slot, *slot).ok()?)))
            .collect();
        let Ok(counted) = program.rule(entry.slot) else { return };
        for (slot, totals) in outputs {
            self.outputs
                .insert(slot, sum(self.former(slot), OfOutput { offered: offered(&counted), totals }));
        }
        let before = self.counted.insert(entry.slot, counted);
        if before.is_some_and(|before| offered(&counted) > offered(&before)) {
            let now = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
            self.seen_ns.insert(entry.slot, now.as_nanos() as u64);
        }
    }

    /// Keeps what a program counted that is about to be detached.
    pub fn program_ends(&mut self, interface: &InterfaceName, state: &State, programs: &Programs) {
        self.follow(state, programs);
        for entry in state.rules().iter().filter(|entry| entry.rule.input.interface == *interface) {
            for slot in &entry.output_slots {
                if let Some(counted) = self.outputs.get(slot) {
                    self.former.insert(*slot, *counted);
                }
            }
            self.counted.remove(&entry.slot);
        }
    }
}

/// Offsets among them wrap.
pub(super) fn sum(mut one: OfOutput, other: OfOutput) -> OfOutput {
    let add = |sum: &mut u64, count: u64| *sum = sum.wrapping_add(count);
    add(&mut one.offered, other.offered);
    add(&mut one.totals.received, other.totals.received);
    let (sum, counters) = (&mut one.totals.counters, other.totals.counters);
    add(&mut sum.rewritten, counters.rewritten);
    add(&mut sum.rewritten_bytes, counters.rewritten_bytes);
    add(&mut sum.too_big, counters.too_big);
    add(&mut sum.ttl_expired, counters.ttl_expired);
    one
}
