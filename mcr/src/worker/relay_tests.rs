use std::{net::Ipv4Addr, ptr};

use proptest::{collection::vec, prelude::*};

use super::*;
use crate::worker::ledger::Layout;

const NOW: u64 = 1_700_000_000_000_000_000;

/// A datagram as it comes in. Groups and sources are told apart by their last byte.
#[derive(Clone, Copy, Debug)]
struct Given {
    source: u8,
    group: u8,
    port: u16,
    size: usize,
    ttl: u8,
    tos: u8,
}

const GIVEN: Given = Given { source: 7, group: 1, port: 5000, size: 100, ttl: 9, tos: 0 };

fn of_size(size: usize) -> Given {
    Given { size, ..GIVEN }
}

/// A run as the kernel would have got it; datagrams are named by their place among the given ones.
#[derive(Debug, PartialEq, Eq)]
struct Sent {
    output: u32,
    datagrams: Vec<usize>,
    sizes: Vec<usize>,
    ttl: u8,
    tos: u8,
    bytes: u64,
    port: u16,
}

/// Stands in for the kernel: takes all.
#[derive(Default)]
struct Collected(Vec<Sent>);

impl Egress for Collected {
    fn send(&mut self, ledger: &Ledger, run: Run<'_>) {
        let counters = ledger.output(run.output);
        counters.sent.add(run.payloads.len() as u64);
        counters.sent_bytes.add(run.bytes);
        self.0.push(Sent {
            output: run.output.0,
            datagrams: run.payloads.iter().map(|payload| payload.iov_base.addr()).collect(),
            sizes: run.payloads.iter().map(|payload| payload.iov_len).collect(),
            ttl: run.ttl,
            tos: run.tos,
            bytes: run.bytes,
            port: run.route.port,
        });
    }
}

/// A worker without sockets.
struct Worker {
    table: FlowTable,
    batch: Batch,
    ledger: Ledger,
}

impl Worker {
    fn new(rules: impl IntoIterator<Item = CompiledRule>) -> Self {
        let mut table = FlowTable::default();
        rules.into_iter().for_each(|rule| table.upsert(rule));
        let (ledger, _) = Ledger::create(Layout { queues: 1, rules: 16, outputs: 64 }).unwrap();
        Self { table, batch: Batch::new(16), ledger }
    }

    /// Relays a batch; also answers which datagrams a rule wanted.
    fn relay(&mut self, given: &[Given], now_ns: u64) -> (Vec<Sent>, Vec<bool>) {
        self.batch.clear();
        let wanted = given
            .iter()
            .enumerate()
            .map(|(index, given)| {
                let datagram = Datagram {
                    source: [192, 0, 2, given.source],
                    group: [239, 1, 1, given.group],
                    port: given.port.to_be_bytes(),
                    ttl: given.ttl,
                    tos: given.tos,
                    payload_len: given.size as u16,
                    trailer_len: 0,
                };
                // The relay step never looks into a payload: its address may name the datagram.
                let payload = iovec { iov_base: ptr::without_provenance_mut(index), iov_len: given.size };
                let Some(flow) = self.table.find(&datagram) else { return false };
                if !flow.looped {
                    self.batch.push(flow.slot, &datagram, payload);
                }
                !flow.looped
            })
            .collect();
        let mut sent = Collected::default();
        relay(&mut self.batch, &self.table, &self.ledger, now_ns, &mut sent);
        (sent.0, wanted)
    }

    fn dropped(&self, output: u32, reason: DropReason) -> u64 {
        self.ledger.output(OutputSlot(output)).dropped[reason as usize].get()
    }
}

/// What one batch of these datagrams leaves as.
fn relayed(rules: impl IntoIterator<Item = CompiledRule>, given: &[Given]) -> Vec<Sent> {
    Worker::new(rules).relay(given, NOW).0
}

fn to_group(group: u8) -> FlowKey4 {
    FlowKey4::any_source([239, 1, 1, group], 5000_u16.to_be_bytes())
}

fn from_source(source: u8, group: u8) -> FlowKey4 {
    FlowKey4::source_group([192, 0, 2, source], [239, 1, 1, group], 5000_u16.to_be_bytes())
}

/// An output that copies TTL and DSCP, to an interface that takes the largest datagrams.
fn output(slot: u32) -> CompiledOutput {
    let route = Route {
        socket: 0,
        ifindex: 3,
        source: Ipv4Addr::new(192, 0, 2, 1),
        destination: Ipv4Addr::new(239, 9, 9, 9),
        port: 6000,
        mtu: 65_535,
    };
    CompiledOutput { slot, route: Ok(route), ttl: Ttl::Copy, dscp: None, max_run: 64 }
}

fn with_mtu(slot: u32, mtu: u32) -> CompiledOutput {
    let route = output(slot).route.map(|route| Route { mtu, ..route });
    CompiledOutput { route, ..output(slot) }
}

fn rule(slot: u32, key: FlowKey4, outputs: Vec<CompiledOutput>) -> CompiledRule {
    CompiledRule { slot, key, own_sources: Vec::new(), outputs }
}

/// Rule `n` takes group `n` to output `n`.
fn plain(group: u8) -> CompiledRule {
    rule(group.into(), to_group(group), vec![output(group.into())])
}

#[test]
fn a_batch_is_grouped_by_rule_and_keeps_each_rules_order() {
    fn check(groups: &[u8], expected: &[(u32, &[usize])]) {
        let given: Vec<_> = groups.iter().map(|&group| Given { group, ..GIVEN }).collect();
        let sent = relayed([plain(1), plain(2), plain(3)], &given);
        let runs: Vec<_> = sent.iter().map(|run| (run.output, &run.datagrams[..])).collect();
        assert_eq!(runs, expected, "{groups:?}");
    }
    check(&[], &[]);
    check(&[1], &[(1, &[0])]);
    check(&[1, 1, 1], &[(1, &[0, 1, 2])]);
    check(&[1, 2], &[(1, &[0]), (2, &[1])]);
    check(&[2, 1, 2, 1], &[(2, &[0, 2]), (1, &[1, 3])]);
    check(&[3, 3, 1, 2, 2, 3, 1], &[(3, &[0, 1, 5]), (1, &[2, 6]), (2, &[3, 4])]);
    // What no rule wants leaves no gap.
    check(&[9, 1, 9, 2, 1, 9], &[(1, &[1, 4]), (2, &[3])]);
    check(&[9, 9], &[]);
}

#[test]
fn datagrams_of_one_rule_never_mix_with_anothers_over_many_batches() {
    let mut worker = Worker::new([plain(1), plain(2)]);
    for groups in [[1, 2, 1, 2], [2, 2, 2, 2], [2, 1, 1, 2]] {
        let given = groups.map(|group| Given { group, ..GIVEN });
        let (sent, _) = worker.relay(&given, NOW);
        for run in &sent {
            assert!(run.datagrams.iter().all(|&index| u32::from(groups[index]) == run.output), "{groups:?}");
        }
        assert_eq!(sent.iter().map(|run| run.datagrams.len()).sum::<usize>(), 4, "{groups:?}");
    }
}

#[test]
fn the_rule_for_the_source_goes_before_the_one_for_any() {
    fn check(keys: &[FlowKey4], given: Given, expected: Option<u32>) {
        let rules =
            (0..).zip(keys).map(|(slot, &key)| rule(slot, key, vec![output(slot)])).collect::<Vec<_>>();
        let (sent, wanted) = Worker::new(rules).relay(&[given], NOW);
        assert_eq!(sent.first().map(|run| run.output), expected, "{keys:?} {given:?}");
        assert_eq!(wanted, [expected.is_some()], "{keys:?} {given:?}");
    }
    let other_source = Given { source: 8, ..GIVEN };
    check(&[to_group(1), from_source(7, 1)], GIVEN, Some(1));
    check(&[from_source(7, 1), to_group(1)], GIVEN, Some(0));
    check(&[to_group(1), from_source(7, 1)], other_source, Some(0));
    check(&[from_source(7, 1), from_source(8, 1)], other_source, Some(1));
    check(&[from_source(7, 1)], other_source, None);
    check(&[from_source(7, 1)], GIVEN, Some(0));
    check(&[to_group(1)], GIVEN, Some(0));
    // No rule: push answers false, and nothing leaves.
    check(&[], GIVEN, None);
    check(&[to_group(2)], GIVEN, None);
    check(&[to_group(1)], Given { port: 5001, ..GIVEN }, None);
    check(&[from_source(7, 1)], Given { port: 5001, ..GIVEN }, None);
    check(&[from_source(7, 2)], GIVEN, None);
}

#[test]
fn a_rule_replaces_the_one_in_its_slot_and_goes_when_removed() {
    let mut worker = Worker::new([plain(1), rule(4, from_source(7, 1), vec![output(4)])]);
    let outputs = |worker: &mut Worker, given| -> Vec<u32> {
        worker.relay(&[given], NOW).0.iter().map(|run| run.output).collect()
    };
    assert_eq!(outputs(&mut worker, GIVEN), [4]);
    // The same flow with another output.
    worker.table.upsert(rule(4, from_source(7, 1), vec![output(5), output(6)]));
    assert_eq!(outputs(&mut worker, GIVEN), [5, 6]);
    // The slot with another flow: the old one is gone.
    worker.table.upsert(rule(4, from_source(8, 1), vec![output(7)]));
    assert_eq!(outputs(&mut worker, GIVEN), [1]);
    assert_eq!(outputs(&mut worker, Given { source: 8, ..GIVEN }), [7]);
    // From a source to any, and back.
    worker.table.upsert(rule(4, to_group(2), vec![output(8)]));
    assert_eq!(outputs(&mut worker, Given { source: 8, ..GIVEN }), [1]);
    assert_eq!(outputs(&mut worker, Given { group: 2, ..GIVEN }), [8]);
    worker.table.upsert(rule(4, from_source(7, 1), vec![output(4)]));
    assert_eq!(outputs(&mut worker, GIVEN), [4]);
    worker.table.remove(4);
    assert_eq!(outputs(&mut worker, GIVEN), [1]);
    worker.table.remove(4);
    worker.table.remove(999);
    assert_eq!(outputs(&mut worker, GIVEN), [1]);
    worker.table.remove(1);
    assert_eq!(outputs(&mut worker, GIVEN), [0; 0]);
    worker.table.upsert(plain(1));
    assert_eq!(outputs(&mut worker, GIVEN), [1]);
}

#[test]
fn runs_hold_datagrams_of_one_size_and_a_shorter_one_at_the_end() {
    fn check(max_run: u16, sizes: &[usize], expected: &[&[usize]]) {
        let output = CompiledOutput { max_run, ..output(0) };
        let given: Vec<_> = sizes.iter().map(|&size| of_size(size)).collect();
        let sent = relayed([rule(0, to_group(1), vec![output])], &given);
        let runs: Vec<_> = sent.iter().map(|run| &run.sizes[..]).collect();
        assert_eq!(runs, expected, "{sizes:?}");
        for run in &sent {
            assert_eq!(run.bytes, run.sizes.iter().sum::<usize>() as u64, "{sizes:?}");
        }
    }
    check(64, &[100, 100, 100], &[&[100, 100, 100]]);
    // It grows.
    check(64, &[100, 101], &[&[100], &[101]]);
    check(64, &[100, 100, 200, 200], &[&[100, 100], &[200, 200]]);
    // It shrinks: the shorter one is the last of its run.
    check(64, &[100, 50], &[&[100, 50]]);
    check(64, &[100, 100, 50, 50], &[&[100, 100, 50], &[50]]);
    check(64, &[100, 50, 100], &[&[100, 50], &[100]]);
    check(64, &[100, 50, 25], &[&[100, 50], &[25]]);
    check(64, &[100, 1, 1], &[&[100, 1], &[1]]);
    // Without payload: alone, wherever it stands.
    check(64, &[0], &[&[0]]);
    check(64, &[0, 0, 0], &[&[0], &[0], &[0]]);
    check(64, &[0, 100], &[&[0], &[100]]);
    check(64, &[100, 0, 100], &[&[100], &[0], &[100]]);
    check(64, &[100, 100, 0], &[&[100, 100], &[0]]);
    // As many as one send may hold.
    check(1, &[100, 100, 50], &[&[100], &[100], &[50]]);
    check(2, &[100, 100, 100], &[&[100, 100], &[100]]);
    check(3, &[100, 100, 100], &[&[100, 100, 100]]);
    check(3, &[100, 100, 50, 100], &[&[100, 100, 50], &[100]]);
    // 65,507 bytes in all.
    check(64, &[30_000, 30_000, 30_000], &[&[30_000, 30_000], &[30_000]]);
    check(64, &[32_753, 32_753], &[&[32_753, 32_753]]);
    check(64, &[32_754, 32_754], &[&[32_754], &[32_754]]);
    check(64, &[65_507, 65_507], &[&[65_507], &[65_507]]);
    check(128, &[1000; 66], &[&[1000; 65], &[1000]]);
    check(64, &[1; 130], &[&[1; 64], &[1; 64], &[1; 2]]);
}

#[test]
fn runs_hold_datagrams_of_one_ttl_and_dscp() {
    fn check(ttl: Ttl, dscp: Option<u8>, marks: &[(u8, u8)], expected: &[(usize, u8, u8)]) {
        let output = CompiledOutput { ttl, dscp, ..output(0) };
        let given: Vec<_> = marks.iter().map(|&(ttl, tos)| Given { ttl, tos, ..GIVEN }).collect();
        let sent = relayed([rule(0, to_group(1), vec![output])], &given);
        let runs: Vec<_> = sent.iter().map(|run| (run.datagrams.len(), run.ttl, run.tos)).collect();
        assert_eq!(runs, expected, "{ttl:?} {dscp:?} {marks:?}");
    }
    // A fixed TTL and DSCP make one run of any.
    check(Ttl::Fixed(16), Some(46), &[(1, 0), (9, 0xff), (255, 8)], &[(3, 16, 46 << 2)]);
    check(Ttl::Fixed(1), Some(0), &[(0, 0xb8)], &[(1, 1, 0)]);
    check(Ttl::Fixed(255), Some(63), &[(4, 0)], &[(1, 255, 252)]);
    // Copied, they cut.
    check(Ttl::Copy, Some(0), &[(9, 0), (9, 4), (8, 0)], &[(2, 9, 0), (1, 8, 0)]);
    check(Ttl::Decrement, Some(0), &[(9, 0), (9, 4), (8, 0)], &[(2, 8, 0), (1, 7, 0)]);
    check(Ttl::Copy, Some(0), &[(9, 0), (8, 0), (9, 0)], &[(1, 9, 0), (1, 8, 0), (1, 9, 0)]);
    check(Ttl::Fixed(16), None, &[(9, 0), (8, 0xb8), (9, 0xb8)], &[(1, 16, 0), (2, 16, 0xb8)]);
    // ECN is cleared, so that it cuts no run.
    check(Ttl::Copy, None, &[(9, 0), (9, 1), (9, 2), (9, 3)], &[(4, 9, 0)]);
    check(Ttl::Copy, None, &[(9, 0xb9), (9, 0xbb), (9, 0xbc)], &[(2, 9, 0xb8), (1, 9, 0xbc)]);
    check(Ttl::Copy, None, &[(9, 0xff)], &[(1, 9, 0xfc)]);
    // An expired one between two: they are two runs.
    check(Ttl::Decrement, None, &[(9, 0), (1, 0), (9, 0)], &[(1, 8, 0), (1, 8, 0)]);
}

#[test]
fn what_cannot_leave_is_counted_by_reason() {
    use DropReason::{Pending, TooBig, TtlExpired};

    fn check(output: CompiledOutput, given: Given, expected: Result<u8, DropReason>) {
        let text = format!("{output:?} {given:?}");
        let mut worker = Worker::new([rule(0, to_group(1), vec![output])]);
        let (sent, wanted) = worker.relay(&[given], NOW);
        assert_eq!(wanted, [true], "{text}");
        assert_eq!(sent.first().map(|run| run.ttl), expected.ok(), "{text}");
        let counters = worker.ledger.output(OutputSlot(0));
        assert_eq!(counters.received.get(), 1, "{text}");
        for reason in DropReason::ALL {
            let one = u64::from(expected == Err(reason));
            assert_eq!(worker.dropped(0, reason), one, "{text}: {}", reason.name());
        }
    }
    let ttl = |ttl| CompiledOutput { ttl, ..output(0) };
    let arrived = |ttl| Given { ttl, ..GIVEN };
    // 28 bytes of headers and the payload are the MTU, and not one byte more.
    check(with_mtu(0, 1500), of_size(1471), Ok(9));
    check(with_mtu(0, 1500), of_size(1472), Ok(9));
    check(with_mtu(0, 1500), of_size(1473), Err(TooBig));
    check(with_mtu(0, 1280), of_size(1252), Ok(9));
    check(with_mtu(0, 1280), of_size(1253), Err(TooBig));
    check(with_mtu(0, 65_535), of_size(65_507), Ok(9));
    check(with_mtu(0, 65_535), of_size(65_508), Err(TooBig));
    check(with_mtu(0, 28), of_size(0), Ok(9));
    check(with_mtu(0, 28), of_size(1), Err(TooBig));
    check(with_mtu(0, 0), of_size(0), Err(TooBig));
    check(ttl(Ttl::Decrement), arrived(0), Err(TtlExpired));
    check(ttl(Ttl::Decrement), arrived(1), Err(TtlExpired));
    check(ttl(Ttl::Decrement), arrived(2), Ok(1));
    check(ttl(Ttl::Decrement), arrived(255), Ok(254));
    check(ttl(Ttl::Copy), arrived(0), Err(TtlExpired));
    check(ttl(Ttl::Copy), arrived(1), Ok(1));
    check(ttl(Ttl::Fixed(16)), arrived(0), Ok(16));
    check(ttl(Ttl::Fixed(16)), arrived(1), Ok(16));
    // One datagram has one reason.
    check(CompiledOutput { ttl: Ttl::Copy, ..with_mtu(0, 100) }, Given { ttl: 0, ..GIVEN }, Err(TooBig));
    for reason in [Pending, DropReason::Unreachable] {
        let withheld = CompiledOutput { route: Err(reason), ..output(0) };
        for given in [GIVEN, of_size(0), arrived(0)] {
            check(withheld.clone(), given, Err(reason));
        }
    }
}

#[test]
fn what_is_dropped_leaves_the_others_in_order() {
    let mut worker = Worker::new([rule(0, to_group(1), vec![with_mtu(0, 228)])]);
    let (sent, _) = worker.relay(&[100, 300, 100, 100, 201, 50].map(of_size), NOW);
    let runs: Vec<_> = sent.iter().map(|run| &run.datagrams[..]).collect();
    assert_eq!(runs, [&[0][..], &[2, 3], &[5]]);
    assert_eq!(worker.dropped(0, DropReason::TooBig), 2);
}

#[test]
fn several_outputs_get_the_same_datagrams_each_in_its_own_way() {
    let outputs = vec![
        output(0),
        CompiledOutput { max_run: 1, ttl: Ttl::Fixed(3), dscp: Some(1), ..output(1) },
        CompiledOutput { route: Err(DropReason::Pending), ..output(2) },
        with_mtu(3, 128),
        CompiledOutput { ttl: Ttl::Decrement, ..output(4) },
    ];
    let mut worker = Worker::new([rule(0, to_group(1), outputs)]);
    let given = [of_size(100), of_size(101), of_size(100), Given { ttl: 1, ..of_size(100) }];
    let (sent, _) = worker.relay(&given, NOW);
    let datagrams = |output| -> Vec<Vec<usize>> {
        sent.iter().filter(|run| run.output == output).map(|run| run.datagrams.clone()).collect()
    };
    assert_eq!(datagrams(0), [vec![0], vec![1, 2], vec![3]]);
    assert_eq!(datagrams(1), [[0], [1], [2], [3]]);
    assert_eq!(datagrams(2), [[0; 0]; 0]);
    assert_eq!(datagrams(3), [vec![0], vec![2], vec![3]]);
    assert_eq!(datagrams(4), [vec![0], vec![1, 2]]);
    assert!(sent.iter().filter(|run| run.output == 1).all(|run| (run.ttl, run.tos) == (3, 4)));
    for (slot, dropped) in [(0, 0), (1, 0), (2, 4), (3, 1), (4, 1)] {
        let counters = worker.ledger.output(OutputSlot(slot));
        assert_eq!(counters.received.get(), 4, "output {slot}");
        assert_eq!(counters.dropped_total(), dropped, "output {slot}");
        assert_eq!(counters.sent.get(), 4 - dropped, "output {slot}");
    }
    assert_eq!(worker.dropped(2, DropReason::Pending), 4);
    assert_eq!(worker.dropped(3, DropReason::TooBig), 1);
    assert_eq!(worker.dropped(4, DropReason::TtlExpired), 1);
}

#[test]
fn a_rule_counts_what_came_and_when() {
    let mut worker = Worker::new([plain(1), rule(2, to_group(2), Vec::new()), plain(3)]);
    let to = |group, size| Given { group, size, ..GIVEN };
    worker.relay(&[to(1, 10), to(2, 1000), to(1, 0), to(1, 7), to(9, 5)], NOW);
    worker.relay(&[to(1, 1)], NOW + 1);
    worker.relay(&[to(9, 1)], NOW + 2);
    worker.relay(&[], NOW + 3);
    for (slot, received, received_bytes, last_seen_ns) in
        [(1, 4, 18, NOW + 1), (2, 1, 1000, NOW), (3, 0, 0, 0), (9, 0, 0, 0)]
    {
        let counters = worker.ledger.rule(RuleSlot(slot));
        let counted = (counters.received.get(), counters.received_bytes.get(), counters.last_seen_ns.get());
        assert_eq!(counted, (received, received_bytes, last_seen_ns), "rule {slot}");
    }
    assert_eq!(worker.ledger.output(OutputSlot(1)).sent_bytes.get(), 18);
}

#[test]
fn a_run_takes_the_route_of_its_output() {
    let to_port = |slot, port| {
        let route = output(slot).route.map(|route| Route { port, ..route });
        CompiledOutput { route, ..output(slot) }
    };
    let sent = relayed([rule(0, to_group(1), vec![to_port(0, 1), to_port(1, 2)])], &[GIVEN]);
    assert_eq!(sent.iter().map(|run| run.port).collect::<Vec<_>>(), [1, 2]);
}

#[test]
fn an_output_that_is_to_send_singly_does_until_its_rule_comes_anew() {
    let rules = || [rule(0, to_group(1), vec![output(0), output(1)]), rule(1, to_group(2), vec![output(2)])];
    let mut worker = Worker::new(rules());
    worker.table.send_singly(OutputSlot(1));
    let given = [1, 2, 1, 2].map(|group| Given { group, ..GIVEN });
    let lens = |sent: Vec<Sent>| -> Vec<_> { sent.iter().map(|run| (run.output, run.sizes.len())).collect() };
    assert_eq!(lens(worker.relay(&given, NOW).0), [(0, 2), (1, 1), (1, 1), (2, 2)]);
    for rule in rules() {
        worker.table.upsert(rule);
    }
    assert_eq!(lens(worker.relay(&given, NOW).0), [(0, 2), (1, 2), (2, 2)]);
}

fn any_output() -> impl Strategy<Value = CompiledOutput> {
    let ttl = prop_oneof![Just(Ttl::Fixed(16)), Just(Ttl::Copy), Just(Ttl::Decrement)];
    let max_run = prop_oneof![Just(1), Just(2), Just(64), Just(128)];
    (ttl, proptest::option::of(0_u8..64), max_run, proptest::option::weighted(0.9, 28_u32..2000)).prop_map(
        |(ttl, dscp, max_run, mtu)| {
            let route = mtu.map_or(Err(DropReason::Pending), |mtu| with_mtu(0, mtu).route);
            CompiledOutput { slot: 0, route, ttl, dscp, max_run }
        },
    )
}

fn any_datagram() -> impl Strategy<Value = Given> {
    // Few sizes and marks, so that runs come about.
    let size = prop_oneof![4 => Just(700_usize), 1 => Just(0), 2 => 1_usize..1500, 1 => Just(1472)];
    let tos = prop_oneof![3 => Just(0_u8), 1 => Just(0xb8), 1 => any::<u8>()];
    (1_u8..6, 7_u8..9, size, prop_oneof![3 => Just(9_u8), 1 => 0_u8..4], tos)
        .prop_map(|(group, source, size, ttl, tos)| Given { source, group, size, ttl, tos, ..GIVEN })
}

/// TTL and TOS with which a datagram is to leave, or why it is not.
fn expected_marks(output: &CompiledOutput, given: &Given) -> Result<(u8, u8), DropReason> {
    let route = output.route?;
    if given.size + 28 > route.mtu as usize {
        return Err(DropReason::TooBig);
    }
    let ttl = match (output.ttl, given.ttl) {
        (Ttl::Copy, 0) | (Ttl::Decrement, 0 | 1) => return Err(DropReason::TtlExpired),
        (Ttl::Fixed(ttl), _) | (Ttl::Copy, ttl) => ttl,
        (Ttl::Decrement, ttl) => ttl - 1,
    };
    Ok((ttl, output.dscp.unwrap_or(given.tos >> 2) << 2))
}

fn check_limits(output: &CompiledOutput, run: &Sent) {
    let (last, others) = run.sizes.split_last().unwrap();
    assert!(run.sizes.len() <= output.max_run.into(), "{run:?}");
    assert!(others.iter().all(|size| *size == run.sizes[0]) && *last <= run.sizes[0], "{run:?}");
    assert!(*last > 0 || others.is_empty(), "{run:?}");
    assert!(run.sizes.iter().sum::<usize>() <= 65_507, "{run:?}");
    assert_eq!(run.bytes, run.sizes.iter().sum::<usize>() as u64, "{run:?}");
}

/// Whether a run could have held the first datagram of the next too.
fn could_go_on(output: &CompiledOutput, run: &Sent, next: &Sent) -> bool {
    let (first, last, size) = (run.sizes[0], run.sizes[run.sizes.len() - 1], next.sizes[0]);
    (run.ttl, run.tos) == (next.ttl, next.tos)
        && run.sizes.len() < output.max_run.into()
        && first == last
        && (1..=first).contains(&size)
        && run.bytes as usize + size <= 65_507
        // Room for one of full size is what counts.
        && (run.sizes.len() + 1) * first <= 65_507
}

proptest! {
    #[test]
    fn every_output_gets_or_counts_every_datagram_once_and_in_order(
        outputs in vec(vec(any_output(), 0..4), 4),
        given in vec(any_datagram(), 0..BATCH),
        specific in any::<bool>(),
    ) {
        // Groups 1 to 3 have a rule; with `specific`, one source of group 1 has its own.
        let mut rules: Vec<_> = (0_u32..).zip(outputs).map(|(slot, outputs)| {
            let outputs = (0..).zip(outputs).map(|(n, output)| CompiledOutput { slot: 4 * slot + n, ..output });
            let key = if slot == 0 { from_source(7, 1) } else { to_group(slot as u8) };
            rule(slot, key, outputs.collect())
        }).collect();
        if !specific {
            rules.remove(0);
        }
        let belongs = |given: &Given| match (given.group, given.source) {
            (1, 7) if specific => Some(0),
            (group @ 1..=3, _) => Some(u32::from(group)),
            _ => None,
        };
        let mut worker = Worker::new(rules.clone());
        let (sent, wanted) = worker.relay(&given, NOW);
        prop_assert_eq!(wanted, given.iter().map(|given| belongs(given).is_some()).collect::<Vec<_>>());

        for rule in &rules {
            let its: Vec<_> = (0..given.len()).filter(|&n| belongs(&given[n]) == Some(rule.slot)).collect();
            let counters = worker.ledger.rule(RuleSlot(rule.slot));
            prop_assert_eq!(counters.received.get(), its.len() as u64);
            prop_assert_eq!(counters.received_bytes.get(), its.iter().map(|&n| given[n].size as u64).sum::<u64>());
            for output in &rule.outputs {
                let runs: Vec<_> = sent.iter().filter(|run| run.output == output.slot).collect();
                let left: Vec<_> = runs
                    .iter()
                    .flat_map(|run| run.datagrams.iter().map(|&n| (n, Ok((run.ttl, run.tos)))))
                    .collect();
                let mut expected: Vec<_> = its.iter().map(|&n| (n, expected_marks(output, &given[n]))).collect();
                for reason in DropReason::ALL {
                    let dropped = expected.iter().filter(|(_, marks)| *marks == Err(reason)).count();
                    prop_assert_eq!(worker.dropped(output.slot, reason), dropped as u64);
                }
                expected.retain(|(_, marks)| marks.is_ok());
                prop_assert_eq!(left, expected);
                for run in &runs {
                    check_limits(output, run);
                }
                for pair in runs.windows(2) {
                    let last = pair[0].datagrams[pair[0].datagrams.len() - 1];
                    let adjacent = its.iter().position(|&n| n == last).map(|place| its[place + 1])
                        == Some(pair[1].datagrams[0]);
                    prop_assert!(!adjacent || !could_go_on(output, pair[0], pair[1]), "{:?}", pair);
                }
                let counters = worker.ledger.output(OutputSlot(output.slot));
                prop_assert_eq!(counters.received.get(), counters.sent.get() + counters.dropped_total());
            }
        }
        let outputs = rules.iter().flat_map(|rule| &rule.outputs).map(|output| output.slot).collect::<Vec<_>>();
        prop_assert!(sent.iter().all(|run| outputs.contains(&run.output)));
    }
}
