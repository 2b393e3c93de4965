//! What the kernel sent on by itself: counted in its maps, looked up here before anybody asks.

use std::{
    collections::{BTreeSet, HashMap},
    time::{Duration, Instant, SystemTime},
};

use mcr_common::counters::{OutputCounters, RuleCounters, add_words};

use super::Programs;
use crate::{
    ebpf::RedirectTotals,
    rule::{InterfaceName, OutputSlot, RuleSlot},
    ruleset::Entry,
    supervisor::state::State,
    worker::ledger::DropReason,
};

/// What an output has of the datagrams that the kernel sent on.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct OfOutput {
    /// Datagrams of its rule, whether or not it was among the outputs at the time.
    pub offered: u64,
    pub totals: RedirectTotals,
}

impl OfOutput {
    pub fn to_words(self) -> [u64; 6] {
        let OutputCounters { rewritten, rewritten_bytes, too_big, ttl_expired } = self.totals.counters;
        [self.offered, self.totals.received, rewritten, rewritten_bytes, too_big, ttl_expired]
    }

    pub fn from_words(
        [offered, received, rewritten, rewritten_bytes, too_big, ttl_expired]: [u64; 6],
    ) -> Self {
        let counters = OutputCounters { rewritten, rewritten_bytes, too_big, ttl_expired };
        Self { offered, totals: RedirectTotals { received, counters } }
    }

    /// The sum, counter by counter. It wraps.
    pub fn plus(self, other: Self) -> Self {
        Self::from_words(add_words(self.to_words(), other.to_words()))
    }

    /// The difference, counter by counter. It wraps.
    pub fn minus(self, other: Self) -> Self {
        self.plus(Self::from_words(other.to_words().map(u64::wrapping_neg)))
    }
}

/// What an output was passed over with, told from what is on its way. A look at the counters shows both together.
#[derive(Clone, Copy, Debug)]
struct Skips {
    /// Certain.
    skipped: u64,
    /// The least that was seen in a while, which began then.
    least: u64,
    began: Instant,
}

impl Skips {
    /// Nothing is on its way for so long.
    const WHILE: Duration = Duration::from_secs(1);

    fn look(&mut self, seen: u64, now: Instant) {
        self.least = self.least.min(seen);
        if now.duration_since(self.began) >= Self::WHILE {
            self.skipped = self.skipped.max(self.least);
            (self.least, self.began) = (seen, now);
        }
        // Under full load something is on its way at each look: what was less for once was not skipped.
        self.skipped = self.skipped.min(seen);
    }
}

/// What an output missed of its rule while it was none of the outputs.
#[derive(Clone, Copy, Debug, Default)]
struct Missed {
    /// Datagrams of the rule less those that it got, when that was last looked at. It wraps.
    all: u64,
    /// Those of them since it began for which there was no interface, and no neighbour.
    pending: u64,
    unreachable: u64,
    /// There is no neighbour for those to come.
    unreachable_now: bool,
}

impl Missed {
    /// What is on its way may make it seem less than it was.
    fn become_all(&mut self, all: u64) {
        let new = all.wrapping_sub(self.all);
        if new.cast_signed() > 0 {
            self.all = all;
            *(if self.unreachable_now { &mut self.unreachable } else { &mut self.pending }) += new;
        }
    }
}

/// Rules that the kernel serves, or once served, and what it counted of them.
#[derive(Default)]
pub(super) struct Redirected {
    rules: BTreeSet<RuleSlot>,
    counted: HashMap<RuleSlot, RuleCounters>,
    /// Nanoseconds since 1970 at which a rule was seen to have gone on last.
    seen_ns: HashMap<RuleSlot, u64>,
    outputs: HashMap<OutputSlot, OfOutput>,
    skips: HashMap<OutputSlot, Skips>,
    missed: HashMap<OutputSlot, Missed>,
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

    /// What a slot had counted before its rule goes on, unless that has been looked up.
    pub fn knows(&mut self, slot: RuleSlot, counted: RuleCounters) {
        self.counted.entry(slot).or_insert(counted);
    }

    pub fn output(&self, slot: OutputSlot) -> OfOutput {
        self.outputs.get(&slot).copied().unwrap_or_default()
    }

    /// Begins anew to ask why an output misses what it does.
    pub fn open(&mut self, slot: OutputSlot) {
        let OfOutput { offered, totals } = self.output(slot);
        let all = offered.wrapping_sub(totals.received);
        self.missed.insert(slot, Missed { all, ..Missed::default() });
    }

    /// What of an output's datagrams has neither left nor is certain to have been skipped.
    pub fn on_its_way(&self, slot: OutputSlot) -> u64 {
        let seen = self.output(slot).totals.skipped();
        self.skips.get(&slot).map_or(0, |skips| seen.saturating_sub(skips.skipped))
    }

    /// What an output missed: because its interface was not to be had, and because its neighbour was not.
    pub fn missed(&self, slot: OutputSlot) -> [u64; 2] {
        let missed = self.missed.get(&slot).copied().unwrap_or_default();
        [missed.pending, missed.unreachable]
    }

    /// Asks anew what an output has missed, of which all was pending.
    pub fn forget_missed(&mut self, slot: OutputSlot) {
        self.missed.remove(&slot);
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
                for (output, slot) in entry.outputs() {
                    // What one missed until it came back has the reason that it then had.
                    if let Some(reason) = state.redirect_withheld(output) {
                        let missed = self.missed.entry(slot).or_default();
                        missed.unreachable_now = reason == DropReason::Unreachable;
                    }
                }
                self.look_up(entry, programs);
            }
        }
    }

    /// Looks up what the kernel has counted of a rule.
    pub fn look_up(&mut self, entry: &Entry, programs: &Programs) {
        let Some(program) = programs.get(&entry.rule.input.interface) else { return };
        // Read once more after what outputs got: what is on its way between the two they have not missed.
        let Ok(earlier) = program.rule(entry.slot) else { return };
        let outputs: Vec<_> = entry
            .output_slots
            .iter()
            .filter_map(|slot| Some((*slot, program.redirected(entry.slot, *slot).ok()?)))
            .collect();
        let Ok(counted) = program.rule(entry.slot) else { return };
        for (slot, totals) in outputs {
            let former = self.former(slot);
            let now = former.plus(OfOutput { offered: offered(&counted), totals });
            self.outputs.insert(slot, now);
            let (seen, time) = (now.totals.skipped(), Instant::now());
            let skips = Skips { skipped: seen, least: seen, began: time };
            self.skips.entry(slot).or_insert(skips).look(seen, time);
            let all = former.offered.wrapping_add(offered(&earlier)).wrapping_sub(now.totals.received);
            self.missed.entry(slot).or_default().become_all(all);
        }
        let before = self.counted.insert(entry.slot, counted);
        if before.is_some_and(|before| offered(&counted) > offered(&before)) {
            self.saw(entry.slot);
        }
    }

    /// A rule has gone on; at the latest now.
    pub fn saw(&mut self, slot: RuleSlot) {
        let now = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
        self.seen_ns.insert(slot, now.as_nanos() as u64);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_on_its_way_was_not_skipped() {
        let start = Instant::now();
        let mut skips = Skips { skipped: 0, least: 0, began: start };
        let mut look = |ms, seen| {
            skips.look(seen, start + Duration::from_millis(ms));
            skips.skipped
        };
        // Seen now and then, gone in between.
        assert_eq!(
            [(100, 7), (900, 0), (1_000, 9), (1_500, 3), (2_100, 0)].map(|(ms, seen)| look(ms, seen)),
            [0; 5]
        );
        // Skipped, with more on its way at times.
        let seen = [(2_500, 5), (3_200, 6), (3_900, 5), (4_300, 8)];
        assert_eq!(seen.map(|(ms, seen)| look(ms, seen)), [0, 0, 0, 5]);
        // Nothing is taken back but what never was there.
        assert_eq!([(4_400, 5), (4_500, 4)].map(|(ms, seen)| look(ms, seen)), [5, 4]);
    }
}
