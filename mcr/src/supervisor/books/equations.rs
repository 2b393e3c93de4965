//! The equalities of the ledger, filled in with what the books say.

use std::collections::{BTreeMap, BTreeSet};

use mcr_common::{abi::verdicts_of, counters::RuleCounters};

use super::{Books, InterfaceTotals, Programs, RuleTotals, redirected::offered, steered_of};
use crate::{
    rule::{Datapath, InterfaceName, RuleSlot},
    supervisor::{
        balance::{Subject, Sums},
        state::State,
    },
};

/// What the two programs did with frames that rules want: if none of it moves, no rule's counters in the kernel do.
pub(super) type Mark = [[u64; 6]; 2];

/// How many frames or datagrams can be on their way on an interface by one datapath.
#[derive(Clone, Copy, Debug, Default)]
pub struct InFlight {
    /// Chunks of the UMEMs, or slots of the packet rings.
    pub sockets: u64,
    /// Datagrams in the hands of workers.
    pub batches: u64,
}

/// One half of a look: what is accounted for. It is read before what came.
pub struct Accounted {
    rules: Vec<RuleTotals>,
    interfaces: Vec<Interface>,
}

struct Interface {
    name: InterfaceName,
    datapath: Datapath,
    /// Without what the kernel counts.
    totals: InterfaceTotals,
    /// Datagrams that rules counted in its workers.
    of_rules: u64,
}

impl Books {
    /// The first half of a look.
    pub fn accounted(&self, state: &State) -> Accounted {
        let rules =
            state.rules().iter().map(|entry| self.raw_rule(entry.slot, RuleCounters::default())).collect();
        let all: BTreeSet<_> = self.interfaces().collect();
        let interfaces = all.into_iter().map(|(name, datapath)| {
            let of_rules = self.of_rules(&name, datapath);
            Interface { totals: self.taken_in(&name, datapath), name, datapath, of_rules }
        });
        Accounted { rules, interfaces: interfaces.collect() }
    }

    /// Datagrams that rules, also those that are gone, counted in an interface's workers.
    fn of_rules(&self, interface: &InterfaceName, datapath: Datapath) -> u64 {
        let slots = self.tenants.keys().map(|slot| slot.0 + 1).max().unwrap_or_default();
        let its = self.ledgers.iter().filter(|(id, _)| id.is_of(interface, datapath));
        let rules = its.flat_map(|(_, (ledger, _))| (0..slots).map(|slot| ledger.rule(RuleSlot(slot))));
        rules.map(|rule| rule.received.get() + rule.looped.get() + rule.cut.get()).sum()
    }

    /// The second half: what came, and the equalities. Those of an interface whose workers are not all at
    /// work are left out: what waits for them would look lost.
    pub fn equations(
        &mut self,
        accounted: Accounted,
        state: &State,
        programs: &Programs,
        in_flight: impl Fn(&InterfaceName, Datapath) -> InFlight,
    ) -> Vec<(Subject, Sums)> {
        let Accounted { rules, mut interfaces } = accounted;
        interfaces.retain(|interface| state.is_steady(&interface.name));
        let mut found = Vec::new();
        for Interface { name, datapath, totals, of_rules } in &mut interfaces {
            self.count_steered(totals, name, *datapath, programs);
            let InFlight { sockets, batches } = in_flight(name, *datapath);
            found.push((
                Subject::Frames(name.clone(), *datapath),
                sums(totals.steered(), [totals.received, totals.lost()], 0, sockets),
            ));
            found.push((
                Subject::Datagrams(name.clone(), *datapath),
                sums(totals.received + totals.segments, [*of_rules, totals.thrown_away()], 0, batches),
            ));
        }
        for (name, its) in by_name(&interfaces) {
            // Without eBPF a rule matches what its workers count.
            if !self.without_bpf && self.follow_kernel(name, programs) {
                self.equations_of_rules(name, its, (state, &rules), &in_flight, &mut found);
            }
        }
        let mut batches: BTreeMap<&InterfaceName, u64> = BTreeMap::new();
        for entry in state.rules().iter() {
            let name = &entry.rule.input.interface;
            let batches = *batches.entry(name).or_insert_with(|| {
                [Datapath::AfXdp, Datapath::AfPacket]
                    .map(|datapath| in_flight(name, datapath).batches)
                    .iter()
                    .sum()
            });
            for slot in &entry.output_slots {
                let totals = self.output(*slot);
                let dropped = totals.dropped.iter().sum::<u64>() + totals.skipped + totals.on_its_way;
                let sums = sums(totals.received, [totals.sent, dropped], 0, batches);
                found.push((Subject::Output(*slot), sums));
            }
        }
        found
    }

    /// Those of the rules of one interface.
    fn equations_of_rules(
        &self,
        name: &InterfaceName,
        its: &[Interface],
        (state, rules): (&State, &[RuleTotals]),
        in_flight: &impl Fn(&InterfaceName, Datapath) -> InFlight,
        found: &mut Vec<(Subject, Sums)>,
    ) {
        let lost: u64 = its.iter().map(|its| its.totals.lost() + its.totals.thrown_away()).sum();
        // A frame that a packet socket took may have been several datagrams of its rule.
        let by_packet = its.iter().filter(|its| its.datapath == Datapath::AfPacket);
        let uncertain = by_packet.map(|its| its.totals.lost() + its.totals.thrown_away()).sum::<u64>() > 0;
        let reach: u64 = its
            .iter()
            .map(|its| in_flight(name, its.datapath))
            .map(|InFlight { sockets, batches }| sockets + batches)
            .sum();
        let tenants = self.tenants.iter().filter(|(_, tenant)| tenant.interface == *name);
        let now: u64 = tenants
            .map(|(slot, tenant)| {
                let kernel = self.kernel.get(slot).copied().unwrap_or_default();
                steered_of(&kernel).saturating_sub(steered_of(&tenant.kernel_base))
            })
            .sum();
        let before = self.former_tenants.get(name).copied().unwrap_or_default();
        let of_rules = its.iter().map(|its| its.of_rules).sum();
        let elsewhere = if uncertain { u64::MAX } else { 0 };
        found.push((Subject::Rules(name.clone()), sums(now + before, [of_rules, lost], elsewhere, reach)));

        let entries =
            state.rules().iter().zip(rules).filter(|(entry, _)| entry.rule.input.interface == *name);
        for (entry, raw) in entries {
            let Some(tenant) = self.tenants.get(&entry.slot).filter(|tenant| !tenant.mixed) else { continue };
            let kernel = self.kernel.get(&entry.slot).copied().unwrap_or_default();
            let base = tenant.base;
            let dropped = (raw.looped + kernel.looped - base.looped)
                + (kernel.no_worker - base.no_worker)
                + (raw.cut - base.cut)
                + (kernel.not_redirected - base.not_redirected);
            let elsewhere = if uncertain { u64::MAX } else { lost };
            let accounted = [raw.received + offered(&kernel) - base.received, dropped];
            let sums = sums(kernel.matched - base.matched, accounted, elsewhere, reach);
            found.push((Subject::Rule(entry.slot), sums));
        }
    }

    /// Reads what the kernel has counted of an interface's rules, if that can have moved. False if it cannot be
    /// read.
    fn follow_kernel(&mut self, name: &InterfaceName, programs: &Programs) -> bool {
        let mut mark = None;
        if let Some(program) = programs.get(name) {
            // Steered, without a worker, looped, and what was to be redirected.
            let of =
                |of| program.verdicts(of).map(|counted| std::array::from_fn(|verdict| counted[verdict].1));
            let (Ok(xdp), Ok(filter)) = (of(verdicts_of::XDP), of(verdicts_of::FILTER)) else {
                return false;
            };
            mark = Some([xdp, filter]);
            if self.verdicts.get(name) == mark.as_ref() {
                return true;
            }
        }
        let its = self.tenants.iter().filter(|(_, tenant)| tenant.interface == *name);
        let slots: Vec<_> = its.map(|(slot, _)| *slot).collect();
        for slot in slots {
            let Some(counted) = self.kernel_rule(slot, name, programs) else { return false };
            self.kernel.insert(slot, counted);
        }
        if let Some(mark) = mark {
            self.verdicts.insert(name.clone(), mark);
        }
        true
    }
}

fn sums(came: u64, accounted: [u64; 2], elsewhere: u64, in_flight: u64) -> Sums {
    Sums { came, accounted, elsewhere, in_flight }
}

/// The datapaths of each interface, which lie side by side.
fn by_name(interfaces: &[Interface]) -> impl Iterator<Item = (&InterfaceName, &[Interface])> {
    interfaces.chunk_by(|one, other| one.name == other.name).map(|its| (&its[0].name, its))
}
