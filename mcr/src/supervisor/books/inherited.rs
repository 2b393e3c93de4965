//! Counters that go on from one daemon to the next: what the kernel sends on by itself it counts in its own maps, which
//! outlive the daemon.
//!
//! A slot's counters are those of all rules that had it. What of them is the rule's own is told by an *offset*, which is
//! added to what the map shows; it is written down for the next daemon. Offsets wrap.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use mcr_common::counters::RuleCounters;
use serde::{Deserialize, Serialize};

use super::{
    Books, Programs,
    redirected::{OfOutput, offered},
    steered_of, verdicts_of,
};
use crate::{
    ebpf::{RedirectTotals, Steering},
    rule::{Datapath, InterfaceName, OutputSlot, QueueId, RuleSlot},
    ruleset::Entry,
    supervisor::event::Inheritance,
};

/// The offsets of a rule and of its outputs, by their slots.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Offsets {
    slot: u32,
    /// Which interface's maps it is that show the rest; 0 where that was not written down.
    #[serde(default)]
    maps: u32,
    /// When the rule got the slot, in milliseconds since 1970.
    #[serde(default)]
    since_ms: u64,
    rule: [u64; RuleCounters::COUNT],
    outputs: Vec<(u32, [u64; 6])>,
}

/// What a daemon that is gone had counted of a rule, when this one came.
#[derive(Clone, Debug)]
pub struct Counted {
    pub slot: RuleSlot,
    /// [Identity](Steering::identity) of the maps that showed it.
    pub maps: u32,
    pub rule: RuleCounters,
    pub outputs: Vec<(OutputSlot, RedirectTotals)>,
}

/// The slots whose next tenant had them before, under a daemon that is gone.
#[derive(Default)]
pub(super) struct Inherited {
    /// With the time since when they had them.
    pub rules: BTreeMap<RuleSlot, SystemTime>,
    pub outputs: BTreeSet<OutputSlot>,
}

impl Counted {
    /// What the maps of a rule that is sent on show now. Of several looks the one at which the least was on its way:
    /// what is taken for a beginning must not have what is counted a moment later.
    pub fn read(steering: &Steering, inheritance: &Inheritance, slot: RuleSlot) -> Option<Self> {
        const LOOKS: usize = 16;
        let mut best: Option<(u64, Self)> = None;
        for _ in 0..LOOKS {
            let look = Self::look(steering, inheritance, slot)?;
            if best.as_ref().is_none_or(|(least, _)| look.0 < *least) {
                best = Some(look);
            }
            if matches!(best, Some((0, _))) {
                break;
            }
        }
        best.map(|(_, counted)| counted)
    }

    /// One look, with how many datagrams came in between or are not accounted for.
    fn look(steering: &Steering, inheritance: &Inheritance, slot: RuleSlot) -> Option<(u64, Self)> {
        let before = steering.rule(slot).ok()?;
        let outputs = inheritance.sets.get(&slot).into_iter().flatten();
        let outputs: Vec<_> = outputs
            .map(|output| Some((output.slot, steering.redirected(slot, output.slot).ok()?)))
            .collect::<Option<_>>()?;
        let rule = steering.rule(slot).ok()?;
        let skipped: u64 = outputs.iter().map(|(_, totals)| totals.skipped()).sum();
        let came = offered(&rule) - offered(&before);
        Some((came + skipped + steered_of(&rule), Self { slot, maps: steering.identity(), rule, outputs }))
    }
}

impl Offsets {
    /// Whether they are of maps with this [identity](Steering::identity).
    pub fn is_of(&self, maps: u32) -> bool {
        self.maps == maps
    }

    /// Those for maps that began with nothing when these offsets' own had counted this, and no more.
    pub fn continued(&self, counted: &Counted, maps: u32) -> Option<Self> {
        if (self.slot, self.maps) != (counted.slot.0, counted.maps) {
            return None;
        }
        let rule = RuleCounters::from_words(self.rule).plus(counted.rule).to_words();
        let output = |(slot, words): &(u32, [u64; 6])| {
            let its = counted.outputs.iter().find(|(counted, _)| counted.0 == *slot);
            let totals = its.map(|(_, totals)| *totals).unwrap_or_default();
            let counted = OfOutput { offered: offered(&counted.rule), totals };
            (*slot, OfOutput::from_words(*words).plus(counted).to_words())
        };
        let outputs = self.outputs.iter().map(output).collect();
        Some(Self { slot: self.slot, maps, since_ms: self.since_ms, rule, outputs })
    }
}

impl Books {
    /// Goes on with the counters of rules that are sent on. Of maps that are `ours` now only what comes is added; the
    /// others are gone, and what they showed last stands for them.
    pub fn inherit(&mut self, counted: &[Counted], offsets: &[Offsets], ours: bool) {
        let offsets: HashMap<_, _> =
            offsets.iter().map(|offsets| ((RuleSlot(offsets.slot), offsets.maps), offsets)).collect();
        for Counted { slot, maps, rule, outputs } in counted {
            let known = offsets.get(&(*slot, *maps)).or_else(|| offsets.get(&(*slot, 0)));
            let anew = RuleCounters::default().minus(*rule);
            let mut offset = known.map_or(anew, |known| RuleCounters::from_words(known.rule));
            let shown = offset.plus(*rule);
            // What went to workers was in their ledgers, and is gone with them.
            offset.matched = offset.matched.wrapping_sub(steered_of(&shown));
            if !ours {
                offset = offset.plus(*rule);
            }
            self.former_rules.insert(*slot, offset);
            self.redirected.begin(*slot);
            if offered(&shown) > 0 {
                self.redirected.saw(*slot);
            }
            let since = known.map(|known| known.since_ms).filter(|since| *since > 0);
            let since = since.map(|since| UNIX_EPOCH + Duration::from_millis(since));
            self.inherited.rules.insert(*slot, since.unwrap_or_else(SystemTime::now));
            for (output, totals) in outputs {
                let now = OfOutput { offered: offered(rule), totals: *totals };
                let known = known.and_then(|known| known.outputs.iter().find(|(slot, _)| *slot == output.0));
                let anew = OfOutput::default().minus(now);
                let mut offset = known.map_or(anew, |(_, words)| OfOutput::from_words(*words));
                if !ours {
                    offset = offset.plus(now);
                }
                self.redirected.set_former(*output, offset);
                self.inherited.outputs.insert(*output);
            }
        }
    }

    /// Adds what rules were counted between two looks, in maps that are not ours.
    pub fn carry(&mut self, before: &[Counted], now: &[Counted]) {
        for Counted { slot, rule, outputs, .. } in now {
            let Some(known) = before.iter().find(|known| known.slot == *slot) else { continue };
            let gained = rule.minus(known.rule);
            let former = self.former_rules.entry(*slot).or_default();
            *former = former.plus(gained);
            for (output, totals) in outputs {
                let before = known.outputs.iter().find(|(slot, _)| slot == output);
                let before = before.map(|(_, totals)| *totals).unwrap_or_default();
                let gained = OfOutput { offered: offered(&gained), totals: *totals }
                    .minus(OfOutput { offered: 0, totals: before });
                self.redirected.set_former(*output, self.redirected.former(*output).plus(gained));
                // The look before may have met datagrams on their way.
                self.redirected.forget_missed(*output);
            }
        }
    }

    /// Takes off what the sockets of a daemon that is gone were given: nothing tells any more what became of it.
    pub fn begin_sockets(&mut self, interface: &InterfaceName, steering: &Steering) {
        for datapath in [Datapath::AfXdp, Datapath::AfPacket] {
            let verdicts = steering.verdicts(verdicts_of(datapath)).unwrap_or_default();
            let steered = verdicts.iter().find(|(name, _)| *name == "steered").map_or(0, |(_, count)| *count);
            self.steered_bases.insert((interface.clone(), datapath), steered);
        }
        for queue in (0..self.layout.queues).map(QueueId) {
            if let Ok(steered) = steering.steered(queue) {
                self.former_steered.insert((interface.clone(), queue), steered.wrapping_neg());
            }
        }
    }

    /// Slots that no rule has claimed are anybody's.
    pub fn end_inheritance(&mut self) {
        self.inherited = Inherited::default();
    }

    /// The offsets of rules that the kernel sends on.
    pub fn offsets<'a>(
        &self,
        redirected: impl Iterator<Item = &'a Entry>,
        programs: &Programs,
    ) -> Vec<Offsets> {
        let of = |entry: &Entry| {
            let tenant = self.tenants.get(&entry.slot)?;
            let former = self.former_rules.get(&entry.slot).copied().unwrap_or_default();
            let output = |slot: &OutputSlot| {
                let base = self.kernel_output_bases.get(slot).copied().unwrap_or_default();
                (slot.0, self.redirected.former(*slot).minus(base).to_words())
            };
            let rule = former.minus(tenant.kernel_base).to_words();
            Some(Offsets {
                slot: entry.slot.0,
                maps: programs.get(&entry.rule.input.interface).map_or(0, Steering::identity),
                since_ms: tenant.since.duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as u64,
                rule,
                outputs: entry.output_slots.iter().map(output).collect(),
            })
        };
        redirected.filter_map(of).collect()
    }
}
