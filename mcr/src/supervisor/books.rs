//! The daemon's books: counters of eBPF maps and workers' ledgers, added up into what `stats` shows.
//!
//! A slot is used by one rule after another, an interface's maps end with its program, a worker's sockets
//! end with it: the books keep what was counted before, so that what they show only goes on.

mod equations;
mod inherited;
mod redirected;

use std::{
    collections::{BTreeMap, HashMap},
    io,
    net::Ipv4Addr,
    os::fd::OwnedFd,
    time::{Instant, SystemTime},
};

use mcr_common::{abi::verdicts_of, counters::RuleCounters};

pub use self::{
    equations::InFlight,
    inherited::{Counted, Offsets},
};

use self::redirected::OfOutput;
use crate::{
    api::wire::INTERFACE_DROPS,
    ebpf::Steering,
    net::packet_socket::PacketStatistics,
    rule::{Datapath, InterfaceName, OutputSlot, QueueId, RuleSlot},
    ruleset::Entry,
    supervisor::{
        event::WorkerId,
        state::{Running, State},
    },
    worker::ledger::{DropReason, Layout, Ledger, QueueLedger},
};

/// What was counted of a rule, or is to be taken off.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RuleTotals {
    pub matched: u64,
    pub no_worker: u64,
    pub looped: u64,
    pub cut: u64,
    /// To be sent on by the kernel, whose driver had no room for it.
    pub not_redirected: u64,
    pub received: u64,
    pub received_bytes: u64,
    /// Nanoseconds since 1970, 0 for never.
    pub last_seen_ns: u64,
}

/// What was counted of an output.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OutputTotals {
    pub received: u64,
    pub sent: u64,
    pub sent_bytes: u64,
    pub retried: u64,
    pub approximate: u64,
    pub dropped: [u64; DropReason::ALL.len()],
    /// Passed over by the kernel in silence.
    pub skipped: u64,
    /// With the kernel: it will leave, or have been skipped.
    pub on_its_way: u64,
}

/// What was counted of an interface.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct InterfaceTotals {
    pub verdicts: BTreeMap<&'static str, u64>,
    pub received: u64,
    /// Datagrams beyond the first of each frame.
    pub segments: u64,
    pub rx_dropped: u64,
    pub fill_ring_empty: u64,
    pub rx_ring_full: u64,
    pub worker_died: u64,
    /// Admitted by the filter to a packet socket whose ring was full.
    pub packet_ring_full: u64,
    pub no_rule: u64,
    pub refused: u64,
    pub cut: u64,
    pub held: u64,
}

impl InterfaceTotals {
    pub fn steered(&self) -> u64 {
        self.verdicts.get("steered").copied().unwrap_or_default()
    }

    /// What the sockets lost, by name.
    pub fn drops(&self) -> [(&'static str, u64); 5] {
        let counts = [
            self.rx_ring_full,
            self.fill_ring_empty,
            // The kernel counts frames without a free chunk among these too.
            self.rx_dropped.saturating_sub(self.fill_ring_empty),
            self.worker_died,
            self.packet_ring_full,
        ];
        std::array::from_fn(|reason| (INTERFACE_DROPS[reason], counts[reason]))
    }

    /// Frames that the sockets lost.
    fn lost(&self) -> u64 {
        self.drops().iter().map(|(_, count)| count).sum()
    }

    /// Received, but of no rule any more.
    fn thrown_away(&self) -> u64 {
        self.no_rule + self.refused + self.held
    }

    /// Adds the counters of one socket. What a frame's end is counted by is read before its beginning.
    fn add(&mut self, queue: &QueueLedger) {
        self.no_rule += queue.no_rule.get();
        self.refused += queue.refused.get();
        self.cut += queue.cut.get();
        self.held += queue.held.get();
        self.segments += queue.segments.get();
        self.received += queue.received.get();
        // The first of these contains the second.
        let fill_ring_empty = queue.fill_ring_empty.get();
        self.rx_dropped += queue.rx_dropped.get();
        self.fill_ring_empty += fill_ring_empty;
        self.rx_ring_full += queue.rx_ring_full.get();
        self.worker_died += queue.worker_died.get();
    }
}

/// What was counted of one RX queue, or of one packet socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QueueTotals {
    pub queue: u32,
    pub worker: WorkerId,
    pub steered: u64,
    pub totals: InterfaceTotals,
}

/// The rule that had a slot last, also if it is gone.
#[derive(Clone, Debug)]
struct Tenant {
    interface: InterfaceName,
    group: (Ipv4Addr, u16),
    /// When the rule got the slot, perhaps of a daemon that is gone.
    since: SystemTime,
    /// What the slot had counted when the rule got it: by all, and by the kernel alone.
    base: RuleTotals,
    kernel_base: RuleCounters,
    /// Another rule has had the same group: a datagram that was between the XDP program and its worker when one
    /// of them came or went may be matched by one and received by the other.
    mixed: bool,
}

/// A counter's value a second ago, and how fast it went on since the one before.
#[derive(Clone, Copy, Debug, Default)]
struct Sample {
    value: u64,
    per_second: f64,
}

/// Rates of one kind of counter.
#[derive(Debug)]
pub struct Rates<K> {
    samples: HashMap<K, Sample>,
}

impl<K> Default for Rates<K> {
    fn default() -> Self {
        Self { samples: HashMap::new() }
    }
}

impl<K: std::hash::Hash + Eq> Rates<K> {
    fn sample(&mut self, key: K, value: u64, seconds: f64) {
        let sample = self.samples.entry(key).or_insert(Sample { value, per_second: 0.0 });
        #[expect(clippy::cast_precision_loss, reason = "a rate is shown with few digits")]
        let gained = value.saturating_sub(sample.value) as f64;
        *sample = Sample { value, per_second: gained / seconds };
    }

    /// Per second, over the last second.
    pub fn get(&self, key: &K) -> f64 {
        self.samples.get(key).map_or(0.0, |sample| sample.per_second)
    }
}

pub struct Books {
    layout: Layout,
    /// Nothing in the kernel counts rules: what a worker saw is all that is known.
    without_bpf: bool,
    ledgers: BTreeMap<WorkerId, (Ledger, OwnedFd)>,
    tenants: HashMap<RuleSlot, Tenant>,
    /// What rules were steered of each interface that are gone, and whose slots others have.
    former_tenants: HashMap<InterfaceName, u64>,
    /// What a slot had counted when its output got it.
    output_bases: HashMap<OutputSlot, OutputTotals>,
    /// The kernel's part of these.
    kernel_output_bases: HashMap<OutputSlot, OfOutput>,
    /// What programs counted that are no longer attached, less what is not the rule's own. It wraps.
    former_rules: HashMap<RuleSlot, RuleCounters>,
    former_verdicts: BTreeMap<(InterfaceName, Datapath), BTreeMap<&'static str, u64>>,
    former_steered: BTreeMap<(InterfaceName, QueueId), u64>,
    /// What programs had given to sockets when this daemon took them over.
    steered_bases: HashMap<(InterfaceName, Datapath), u64>,
    inherited: inherited::Inherited,
    /// Which worker serves a queue, or did last, and which of its own queues that is.
    served: BTreeMap<(InterfaceName, QueueId), (WorkerId, usize)>,
    /// What the kernel had counted of rules when they were looked at last, and the verdicts then.
    kernel: HashMap<RuleSlot, RuleCounters>,
    verdicts: HashMap<InterfaceName, equations::Mark>,
    /// What the kernel counted of each packet socket that there is, and of those that there were.
    packets: BTreeMap<WorkerId, PacketStatistics>,
    redirected: redirected::Redirected,
    former_packets: BTreeMap<WorkerId, PacketStatistics>,
    sampled: Instant,
    pub rule_rates: Rates<RuleSlot>,
    pub output_rates: Rates<OutputSlot>,
    pub output_byte_rates: Rates<OutputSlot>,
    pub worker_rates: Rates<WorkerId>,
}

/// Which program counts the frames of a datapath.
fn verdicts_of(datapath: Datapath) -> u32 {
    if datapath == Datapath::AfPacket { verdicts_of::FILTER } else { verdicts_of::XDP }
}

/// Datagrams of a rule that went on to its workers.
fn steered_of(counters: &RuleCounters) -> u64 {
    let RuleCounters { no_worker, looped, redirected, no_output, not_redirected, .. } = counters;
    counters.matched.saturating_sub(no_worker + looped + redirected + no_output + not_redirected)
}

/// The prepared interfaces.
pub type Programs = BTreeMap<InterfaceName, Steering>;

impl Books {
    pub fn new(layout: Layout, without_bpf: bool) -> Self {
        Self {
            layout,
            without_bpf,
            ledgers: BTreeMap::new(),
            tenants: HashMap::new(),
            former_tenants: HashMap::new(),
            output_bases: HashMap::new(),
            kernel_output_bases: HashMap::new(),
            steered_bases: HashMap::new(),
            inherited: inherited::Inherited::default(),
            former_rules: HashMap::new(),
            former_verdicts: BTreeMap::new(),
            former_steered: BTreeMap::new(),
            served: BTreeMap::new(),
            kernel: HashMap::new(),
            verdicts: HashMap::new(),
            packets: BTreeMap::new(),
            redirected: redirected::Redirected::default(),
            former_packets: BTreeMap::new(),
            sampled: Instant::now(),
            rule_rates: Rates::default(),
            output_rates: Rates::default(),
            output_byte_rates: Rates::default(),
            worker_rates: Rates::default(),
        }
    }

    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// The ledger of a worker, the same through all its lives.
    pub fn ledger(&mut self, id: &WorkerId) -> io::Result<&OwnedFd> {
        if !self.ledgers.contains_key(id) {
            self.ledgers.insert(id.clone(), Ledger::create(self.layout)?);
        }
        self.ledgers.get(id).map(|(_, fd)| fd).ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    /// Starts the counters of a new rule, and of outputs that are new in it, at zero.
    pub fn open(&mut self, entry: &Entry, new_rule: bool, new_outputs: &[OutputSlot], programs: &Programs) {
        self.redirected.look_up(entry, programs);
        if new_rule {
            self.let_slot(entry, programs);
            self.rule_rates.samples.remove(&entry.slot);
        }
        for slot in new_outputs {
            let (mut base, mut kernel_base) = Default::default();
            // Of one that goes on all that it missed under the daemon before was pending.
            if !self.inherited.outputs.remove(slot) {
                self.redirected.open(*slot);
                (base, kernel_base) = (self.raw_output(*slot), self.redirected.output(*slot));
            }
            self.output_bases.insert(*slot, base);
            self.kernel_output_bases.insert(*slot, kernel_base);
            self.output_rates.samples.remove(slot);
            self.output_byte_rates.samples.remove(slot);
        }
    }

    /// Gives a rule its slot, whose last tenant is gone for good.
    fn let_slot(&mut self, entry: &Entry, programs: &Programs) {
        let input = &entry.rule.input;
        if let Some(former) = self.tenants.remove(&entry.slot) {
            let kernel = self.kernel_rule(entry.slot, &former.interface, programs).unwrap_or_default();
            let steered = steered_of(&kernel).saturating_sub(steered_of(&former.kernel_base));
            *self.former_tenants.entry(former.interface).or_default() += steered;
        }
        let (mut base, mut kernel_base) = Default::default();
        let inherited = self.inherited.rules.remove(&entry.slot);
        if inherited.is_none() {
            kernel_base = self.kernel_rule(entry.slot, &input.interface, programs).unwrap_or_default();
            base = self.raw_rule(entry.slot, kernel_base);
        }
        let group = (input.group, input.port);
        let mut mixed = false;
        for other in self.tenants.values_mut() {
            if other.group == group && other.interface == input.interface {
                (other.mixed, mixed) = (true, true);
            }
        }
        let interface = input.interface.clone();
        let since = inherited.unwrap_or_else(SystemTime::now);
        self.tenants.insert(entry.slot, Tenant { interface, group, since, base, kernel_base, mixed });
        self.kernel.insert(entry.slot, kernel_base);
    }

    pub fn rule(&self, entry: &Entry, programs: &Programs) -> RuleTotals {
        let kernel = self.kernel_rule(entry.slot, &entry.rule.input.interface, programs);
        self.tenancy(entry.slot, kernel.unwrap_or_default())
    }

    /// When a rule had its last datagram; 0 if it had none.
    pub fn last_seen_ns(&self, slot: RuleSlot) -> u64 {
        let base = self.tenants.get(&slot).map(|tenant| tenant.base).unwrap_or_default();
        let seen = self.raw_rule(slot, RuleCounters::default()).last_seen_ns;
        if seen > base.last_seen_ns { seen } else { 0 }
    }

    /// When a rule got its slot, from when on its counters are its own.
    pub fn rule_since(&self, slot: RuleSlot) -> Option<SystemTime> {
        self.tenants.get(&slot).map(|tenant| tenant.since)
    }

    /// What a rule has counted since it has its slot, with what the kernel has counted of the slot.
    fn tenancy(&self, slot: RuleSlot, kernel: RuleCounters) -> RuleTotals {
        let raw = self.raw_rule(slot, kernel);
        let base = self.tenants.get(&slot).map(|tenant| tenant.base).unwrap_or_default();
        RuleTotals {
            matched: raw.matched - base.matched,
            no_worker: raw.no_worker - base.no_worker,
            looped: raw.looped - base.looped,
            cut: raw.cut - base.cut,
            not_redirected: raw.not_redirected - base.not_redirected,
            received: raw.received - base.received,
            received_bytes: raw.received_bytes - base.received_bytes,
            last_seen_ns: if raw.last_seen_ns > base.last_seen_ns { raw.last_seen_ns } else { 0 },
        }
    }

    /// What the kernel has counted of a slot on an interface; none if that cannot be read now.
    fn kernel_rule(
        &self,
        slot: RuleSlot,
        interface: &InterfaceName,
        programs: &Programs,
    ) -> Option<RuleCounters> {
        let mut totals = self.former_rules.get(&slot).copied().unwrap_or_default();
        if let Some(program) = programs.get(interface) {
            totals = totals.plus(program.rule(slot).ok()?);
        }
        Some(totals)
    }

    fn raw_rule(&self, slot: RuleSlot, kernel: RuleCounters) -> RuleTotals {
        let RuleCounters { matched, no_worker, looped, not_redirected, redirect_bytes, .. } = kernel;
        let mut totals = RuleTotals {
            matched,
            no_worker,
            looped,
            not_redirected,
            received: redirected::offered(&kernel),
            received_bytes: redirect_bytes,
            last_seen_ns: self.redirected.seen_ns(slot),
            ..RuleTotals::default()
        };
        for (ledger, _) in self.ledgers.values() {
            let counters = ledger.rule(slot);
            totals.received += counters.received.get();
            totals.received_bytes += counters.received_bytes.get();
            totals.looped += counters.looped.get();
            totals.cut += counters.cut.get();
            totals.last_seen_ns = totals.last_seen_ns.max(counters.last_seen_ns.get());
        }
        if self.without_bpf {
            totals.matched = totals.received + totals.looped + totals.cut;
        }
        totals
    }

    /// Counters of an output.
    pub fn output(&self, slot: OutputSlot) -> OutputTotals {
        let raw = self.raw_output(slot);
        let base = self.output_bases.get(&slot).copied().unwrap_or_default();
        let skipped = raw.skipped - base.skipped;
        let on_its_way = self.redirected.on_its_way(slot).min(skipped);
        OutputTotals {
            received: raw.received - base.received,
            sent: raw.sent - base.sent,
            sent_bytes: raw.sent_bytes - base.sent_bytes,
            retried: raw.retried - base.retried,
            approximate: raw.approximate - base.approximate,
            dropped: std::array::from_fn(|reason| raw.dropped[reason] - base.dropped[reason]),
            skipped: skipped - on_its_way,
            on_its_way,
        }
    }

    fn raw_output(&self, slot: OutputSlot) -> OutputTotals {
        let mut totals = self.sent_by_kernel(slot);
        for (ledger, _) in self.ledgers.values() {
            let counters = ledger.output(slot);
            totals.sent += counters.sent.get();
            totals.sent_bytes += counters.sent_bytes.get();
            totals.retried += counters.retried.get();
            totals.approximate += counters.approximate.get();
            for (total, counter) in totals.dropped.iter_mut().zip(&counters.dropped) {
                *total += counter.get();
            }
            // Last: what came since the others were read shows as in flight.
            totals.received += counters.received.get();
        }
        totals
    }

    /// What the kernel did for an output by itself. What came while it was none of the outputs was pending, or
    /// unreachable.
    fn sent_by_kernel(&self, slot: OutputSlot) -> OutputTotals {
        let OfOutput { totals, .. } = self.redirected.output(slot);
        let mut dropped = [0; DropReason::ALL.len()];
        let [pending, unreachable] = self.redirected.missed(slot);
        dropped[DropReason::Pending as usize] = pending;
        dropped[DropReason::Unreachable as usize] = unreachable;
        dropped[DropReason::TooBig as usize] = totals.counters.too_big;
        dropped[DropReason::TtlExpired as usize] = totals.counters.ttl_expired;
        OutputTotals {
            received: totals.received.wrapping_add(pending + unreachable),
            sent: totals.counters.rewritten,
            sent_bytes: totals.counters.rewritten_bytes,
            dropped,
            skipped: totals.skipped(),
            ..OutputTotals::default()
        }
    }

    /// The kernel serves a rule from now on.
    pub fn redirects(&mut self, slot: RuleSlot, program: Option<&Steering>) {
        self.redirected.begin(slot);
        if let Some(counted) = program.and_then(|program| program.rule(slot).ok()) {
            self.redirected.knows(slot, counted);
        }
    }

    /// Looks up what the kernel sent on by itself.
    pub fn follow_redirected(&mut self, state: &State, programs: &Programs) {
        self.redirected.follow(state, programs);
    }

    /// What a datapath made of an interface's frames.
    pub fn interface(
        &self,
        interface: &InterfaceName,
        datapath: Datapath,
        programs: &Programs,
    ) -> InterfaceTotals {
        let mut totals = self.taken_in(interface, datapath);
        self.count_steered(&mut totals, interface, datapath, programs);
        totals
    }

    /// What the workers of an interface took out of their sockets, or lost there.
    fn taken_in(&self, interface: &InterfaceName, datapath: Datapath) -> InterfaceTotals {
        let mut totals = InterfaceTotals::default();
        for (_, (ledger, _)) in self.ledgers.iter().filter(|(id, _)| id.is_of(interface, datapath)) {
            for index in 0..self.layout.queues as usize {
                totals.add(ledger.queue(index));
            }
        }
        totals
    }

    /// What the programs made of an interface's frames, and what its packet sockets lost.
    fn count_steered(
        &self,
        totals: &mut InterfaceTotals,
        interface: &InterfaceName,
        datapath: Datapath,
        programs: &Programs,
    ) {
        let former = self.former_verdicts.get(&(interface.clone(), datapath));
        totals.verdicts = former.cloned().unwrap_or_default();
        let counted_by = verdicts_of(datapath);
        if let Some(Ok(verdicts)) = programs.get(interface).map(|program| program.verdicts(counted_by)) {
            for (name, count) in verdicts {
                *totals.verdicts.entry(name).or_default() += count;
            }
        }
        if let Some(steered) = totals.verdicts.get_mut("steered") {
            *steered -= self.steered_bases.get(&(interface.clone(), datapath)).copied().unwrap_or_default();
        }
        let packets = self.packets.iter().chain(&self.former_packets);
        let its = packets.filter(|(id, _)| id.is_of(interface, datapath));
        let (admitted, dropped) = its.fold((0, 0), |(admitted, dropped), (_, counted)| {
            (admitted + counted.admitted, dropped + counted.dropped)
        });
        totals.packet_ring_full = dropped;
        if totals.verdicts.is_empty() {
            // Without eBPF this is all that the kernel tells.
            totals.verdicts.insert("steered", admitted);
        }
    }

    /// Takes note of the RX queues that a worker serves.
    pub fn serves(&mut self, id: &WorkerId, queues: &[u32]) {
        let queues = queues.iter().map(|&queue| (id.interface.clone(), QueueId(queue)));
        self.served.extend(queues.zip((0..).map(|index| (id.clone(), index))));
    }

    /// What was counted of each RX queue or packet socket of an interface.
    pub fn queues(
        &self,
        interface: &InterfaceName,
        datapath: Datapath,
        programs: &Programs,
    ) -> Vec<QueueTotals> {
        let count = |queue, worker: &WorkerId, index, steered, dropped| {
            let mut totals = InterfaceTotals { packet_ring_full: dropped, ..InterfaceTotals::default() };
            if let Some((ledger, _)) = self.ledgers.get(worker) {
                totals.add(ledger.queue(index));
            }
            QueueTotals { queue, worker: worker.clone(), steered, totals }
        };
        if datapath == Datapath::AfPacket {
            let its = self.ledgers.keys().filter(|id| id.is_of(interface, datapath));
            return its
                .map(|id| {
                    let counted = [&self.packets, &self.former_packets].map(|of| of.get(id).copied());
                    let counted = counted.into_iter().flatten();
                    let (admitted, dropped) =
                        counted.fold((0, 0), |sum, of| (sum.0 + of.admitted, sum.1 + of.dropped));
                    count(id.index, id, 0, admitted, dropped)
                })
                .collect();
        }
        let its = self.served.iter().filter(|((name, _), _)| name == interface);
        its.map(|((_, queue), (worker, index))| {
            count(queue.0, worker, *index, self.steered(interface, *queue, programs), 0)
        })
        .collect()
    }

    /// Interfaces of which something was counted, with their datapaths.
    pub fn interfaces(&self) -> impl Iterator<Item = (InterfaceName, Datapath)> + '_ {
        self.ledgers
            .keys()
            .map(|id| (id.interface.clone(), id.datapath))
            .chain(self.former_verdicts.keys().cloned())
    }

    /// Takes note of what the kernel counted of a packet socket.
    pub fn packets_counted(&mut self, id: &WorkerId, counted: PacketStatistics) {
        self.packets.insert(id.clone(), counted);
    }

    /// Keeps what the kernel counted of a packet socket that is about to be closed.
    pub fn packet_socket_ends(&mut self, id: &WorkerId) {
        let last = self.packets.remove(id).unwrap_or_default();
        let former = self.former_packets.entry(id.clone()).or_default();
        former.admitted += last.admitted;
        former.dropped += last.dropped;
    }

    /// Frames that a worker took out of its sockets.
    pub fn worker_received(&self, id: &WorkerId) -> u64 {
        let Some((ledger, _)) = self.ledgers.get(id) else { return 0 };
        (0..self.layout.queues as usize).map(|index| ledger.queue(index).received.get()).sum()
    }

    /// How often a worker entered the kernel.
    pub fn worker_enters(&self, id: &WorkerId) -> u64 {
        self.ledgers.get(id).map_or(0, |(ledger, _)| ledger.worker().enters.get())
    }

    /// Writes down what a dead worker can no longer say: the datagrams that it held.
    ///
    /// Called when its process has ended and nothing is steered to its sockets any more.
    pub fn worker_died(&mut self, id: &WorkerId, running: &Running, programs: &Programs) {
        let Some((ledger, _)) = self.ledgers.get(id) else { return };
        for output in running.rules.values().flat_map(|rule| &rule.outputs) {
            let counters = ledger.output(OutputSlot(output.slot));
            let accounted = counters.sent.get() + counters.dropped_total();
            counters.drop(DropReason::WorkerDied, counters.received.get().saturating_sub(accounted));
        }
        self.count_held(ledger);
        let queues = running.spec.as_ref().map_or(&[][..], |spec| spec.source.queues());
        for (index, &queue) in queues.iter().enumerate() {
            let steered = self.steered(&id.interface, QueueId(queue), programs);
            let counters = ledger.queue(index);
            let accounted = counters.received.get()
                + counters.rx_dropped.get()
                + counters.rx_ring_full.get()
                + counters.worker_died.get();
            counters.worker_died.add(steered.saturating_sub(accounted));
        }
    }

    /// Counts the datagrams that a dead worker had taken out of its sockets and no rule had counted yet.
    fn count_held(&self, ledger: &Ledger) {
        let counted_by_rules: u64 = (0..self.layout.rules)
            .map(|slot| ledger.rule(RuleSlot(slot)))
            .map(|rule| rule.received.get() + rule.looped.get() + rule.cut.get())
            .sum();
        let mut received = 0;
        for queue in (0..self.layout.queues as usize).map(|index| ledger.queue(index)) {
            let discarded = queue.no_rule.get() + queue.refused.get() + queue.held.get();
            received += (queue.received.get() + queue.segments.get()).saturating_sub(discarded);
        }
        ledger.queue(0).held.add(received.saturating_sub(counted_by_rules));
    }

    fn steered(&self, interface: &InterfaceName, queue: QueueId, programs: &Programs) -> u64 {
        let now = programs.get(interface).and_then(|program| program.steered(queue).ok()).unwrap_or_default();
        let former = self.former_steered.get(&(interface.clone(), queue)).copied().unwrap_or_default();
        now.wrapping_add(former)
    }

    /// Keeps what a program counted that is about to be detached.
    pub fn program_ends(&mut self, interface: &InterfaceName, state: &State, programs: &Programs) {
        self.verdicts.remove(interface);
        self.redirected.program_ends(interface, state, programs);
        let Some(program) = programs.get(interface) else { return };
        for (slot, _) in self.tenants.iter().filter(|(_, tenant)| tenant.interface == *interface) {
            if let Ok(counters) = program.rule(*slot) {
                let former = self.former_rules.entry(*slot).or_default();
                *former = former.plus(counters);
            }
        }
        for datapath in [Datapath::AfXdp, Datapath::AfPacket] {
            let served = self.ledgers.keys().any(|id| id.interface == *interface && id.datapath == datapath);
            let base = self.steered_bases.remove(&(interface.clone(), datapath)).unwrap_or_default();
            let Ok(verdicts) = program.verdicts(verdicts_of(datapath)) else { continue };
            if served {
                let former = self.former_verdicts.entry((interface.clone(), datapath)).or_default();
                for (name, count) in verdicts {
                    *former.entry(name).or_default() += count - if name == "steered" { base } else { 0 };
                }
            }
        }
        for queue in (0..self.layout.queues).map(QueueId) {
            if let Ok(steered) = program.steered(queue) {
                let former = self.former_steered.entry((interface.clone(), queue)).or_default();
                *former = former.wrapping_add(steered);
            }
        }
    }

    /// Takes the samples that rates are made of; once a second.
    pub fn sample(&mut self, state: &State) {
        let seconds = self.sampled.elapsed().as_secs_f64();
        self.sampled = Instant::now();
        for entry in state.rules().iter() {
            let by_workers: u64 =
                self.ledgers.values().map(|(ledger, _)| ledger.rule(entry.slot).received.get()).sum();
            let received = by_workers + redirected::offered(&self.redirected.rule(entry.slot));
            self.rule_rates.sample(entry.slot, received, seconds);
            for slot in &entry.output_slots {
                let totals = self.raw_output(*slot);
                self.output_rates.sample(*slot, totals.sent, seconds);
                self.output_byte_rates.sample(*slot, totals.sent_bytes, seconds);
            }
        }
        let received: Vec<_> = self.ledgers.keys().map(|id| (id.clone(), self.worker_received(id))).collect();
        for (id, received) in received {
            self.worker_rates.sample(id, received, seconds);
        }
    }
}
