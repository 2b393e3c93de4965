//! Redirecting by the kernel alone, without a daemon: what is broadcast, rewritten and counted, and how sets of outputs
//! change under load.

#![expect(clippy::unwrap_used, reason = "the helpers of tests")]

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{Ipv4Addr, SocketAddrV4},
    time::Duration,
};

use mcr::{
    datapath::redirect::{Egress, rewrite},
    ebpf::{
        Object, Placement, Steering,
        redirect::{RedirectError, RedirectOutput, RedirectTotals},
    },
    net::redirect_target::{NoTarget, takes_redirects},
    rule::{IfIndex, InterfaceName, Output, OutputSlot, RuleSlot},
};
use mcr_common::{
    counters::{OutputCounters, RuleCounters},
    flow::{FlowKey4, FlowValue, action},
};
use serde_json::json;
use tests::{
    Captured, RawSender, Site, Source, Udp,
    bpf::{self, ForeignXdp},
    capture::assert_sequence,
    deprive::{DOCUMENTED, keep_on_this_thread},
    site::{ETH, Membership, Plan, Sink},
    source::Stream,
    wait_until,
};

/// The daemon's source port, if there were one.
const PORT: u16 = 40_404;
const ONE: RuleSlot = RuleSlot(1);
const TWO: RuleSlot = RuleSlot(2);
const GROUP_ONE: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(239, 1, 1, 1), 5000);
const GROUP_TWO: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(239, 1, 1, 2), 5000);

fn name(interface: &str) -> InterfaceName {
    interface.parse().unwrap()
}

fn receive_by_gro(sink: &Sink) {
    sink.host.output("ethtool", &["-K", ETH, "gro", "on"]);
}

/// A site whose sinks take redirected frames, with the program on its ingress interface. All is done with the documented
/// capabilities alone.
struct Kernel {
    steering: Steering,
    memberships: Vec<Membership>,
    _receivers: Vec<ForeignXdp>,
    site: Site,
}

impl Kernel {
    fn start(sinks: u8) -> Self {
        let site = Site::build(Plan { sinks, ..Plan::default() });
        // A veth takes them when its other end runs a program, or has GRO on.
        let (by_program, by_gro): (Vec<_>, Vec<_>) =
            site.sinks.iter().partition(|sink| sink.interface != "out1");
        let receivers = by_program.iter().map(|sink| ForeignXdp::attach(&sink.host, ETH)).collect();
        by_gro.into_iter().for_each(receive_by_gro);
        let object = Object::open(Some(&bpf::object_path())).unwrap();
        let interface = name("in0");
        let steering = site.relay.run(|| {
            keep_on_this_thread(DOCUMENTED);
            let placement = Placement {
                interface: &interface,
                index: IfIndex(nix::net::if_::if_nametoindex("in0").unwrap()),
                kind: "veth".to_owned(),
                mtu: 1500,
                queues: 1,
                max_rules: 64,
                pins: site.scratch.pin_root().join("in0"),
                occupant: None,
            };
            let mut steering = Steering::prepare(&object, &placement).unwrap();
            steering.attach(&placement, false).unwrap();
            steering
        });
        Self { steering, memberships: Vec::new(), _receivers: receivers, site }
    }

    /// Redirects a group by a rule, whose outputs are there or will be.
    fn add(&mut self, rule: RuleSlot, group: SocketAddrV4) {
        let key = FlowKey4::any_source(group.ip().octets(), group.port().to_be_bytes());
        self.steering.set_flow(&key, FlowValue { rule: rule.0, action: action::REDIRECT }).unwrap();
        self.memberships.push(Membership::join(&self.site.relay, "in0", *group.ip()));
        self.site.segments[0].wait_until_joined(*group.ip());
    }

    /// An output as it is typed, `@outK`.
    fn output(&self, slot: u32, endpoint: &str) -> RedirectOutput {
        let output: Output = endpoint.parse().unwrap();
        let links = self.site.relay.json("ip", &["-j", "addr", "show", "dev", output.interface.as_str()]);
        let link = &links[0];
        let mac: Vec<u8> = link["address"]
            .as_str()
            .unwrap()
            .split(':')
            .map(|byte| u8::from_str_radix(byte, 16).unwrap())
            .collect();
        let egress = Egress {
            destination_mac: tests::frame::multicast_mac(output.destination),
            source_mac: mac.try_into().unwrap(),
            address: link["addr_info"][0]["local"].as_str().unwrap().parse().unwrap(),
            port: PORT,
            mtu: link["mtu"].as_u64().unwrap() as u32,
        };
        RedirectOutput {
            slot: OutputSlot(slot),
            egress: IfIndex(link["ifindex"].as_u64().unwrap() as u32),
            rewrite: rewrite(&output, egress),
        }
    }

    fn set(&mut self, rule: RuleSlot, outputs: &[RedirectOutput]) {
        let Self { steering, site, .. } = self;
        let set = || {
            keep_on_this_thread(DOCUMENTED);
            steering.set_outputs(&[(rule, outputs.to_vec())])
        };
        site.relay.run(set).unwrap();
    }

    fn totals(&self, rule: RuleSlot, slot: u32) -> RedirectTotals {
        self.steering.redirected(rule, OutputSlot(slot)).unwrap()
    }

    fn rule(&self, rule: RuleSlot) -> RuleCounters {
        self.steering.rule(rule).unwrap()
    }
}

fn address(text: &str) -> SocketAddrV4 {
    text.parse().unwrap()
}

/// Sent on whole: received and rewritten.
fn sent(datagrams: u64, bytes: u64) -> RedirectTotals {
    let counters = OutputCounters {
        rewritten: datagrams,
        rewritten_bytes: datagrams * bytes,
        ..OutputCounters::default()
    };
    RedirectTotals { received: datagrams, counters }
}

/// Checks what every receiver would, and what the outputs of these tests share.
#[track_caller]
fn check_headers(datagrams: &[Captured], source: Ipv4Addr, ttl: u8) {
    for datagram in datagrams {
        assert!(datagram.checksum_holds, "{datagram:?}");
        assert_eq!(datagram.source, SocketAddrV4::new(source, PORT));
        assert_eq!((datagram.ttl, datagram.dont_fragment, datagram.fragment), (ttl, true, false));
        assert_eq!(datagram.destination_mac, tests::frame::multicast_mac(*datagram.destination.ip()));
    }
}

#[test]
fn every_output_gets_every_datagram_once_in_order() {
    const COUNT: u64 = 500;
    let mut kernel = Kernel::start(3);
    kernel.add(ONE, GROUP_ONE);
    let mut first = 0;
    for order in [
        &[0][..],
        &[0, 1, 2, 0],
        &[0, 0, 1],
        &[0, 1, 0, 0, 1],
        &[1, 0, 0, 1, 2, 1, 0, 2],
        &[0; 10],
        &[0, 1, 2, 2, 1, 0, 0, 1, 2, 0],
    ] {
        let endpoint = |index: usize| format!("239.2.{first}.{index}:6000@out{}", order[index]);
        let outputs: Vec<_> = (0..order.len())
            .map(|index| kernel.output((first + index) as u32, &format!("{},dscp=copy", endpoint(index))))
            .collect();
        kernel.set(ONE, &outputs);
        let mut captures: Vec<_> = (0..3).map(|sink| kernel.site.capture(sink)).collect();
        let stream =
            Stream { count: COUNT, rate: 2_000, size: 700, tos: 46 << 2 | 1, ..Stream::to(GROUP_ONE) };
        Source::play(kernel.site.source(), stream);
        for (index, sink) in order.iter().enumerate() {
            let to = address(endpoint(index).split('@').next().unwrap());
            let datagrams = captures[*sink].exactly(to, COUNT as usize);
            assert_sequence(&datagrams, 0..COUNT);
            check_headers(&datagrams, kernel.site.sinks[*sink].relay_address, 16);
            assert!(datagrams.iter().all(|datagram| (datagram.dscp, datagram.ecn) == (46, 0)));
            assert!(datagrams.iter().all(|datagram| datagram.payload[8..699] == [0xa5; 691]));
            assert_eq!(
                kernel.totals(ONE, (first + index) as u32),
                sent(COUNT, 700),
                "{order:?}, output {index}"
            );
        }
        for (sink, capture) in captures.iter_mut().enumerate() {
            let expected = order.iter().filter(|to| **to == sink).count() * COUNT as usize;
            assert_eq!(capture.all().len(), expected, "{order:?}: at sink {sink}");
        }
        first += order.len();
    }
    let rule = kernel.rule(ONE);
    assert_eq!((rule.matched, rule.redirected), (7 * COUNT, 7 * COUNT));
    assert_eq!((rule.no_output, rule.not_redirected), (0, 0));
}

#[test]
fn a_batch_of_several_rules_is_told_apart() {
    const ROUNDS: u32 = 5;
    const EACH: u32 = 20;
    let mut kernel = Kernel::start(2);
    let groups = [GROUP_ONE, GROUP_TWO, SocketAddrV4::new(Ipv4Addr::new(239, 1, 1, 3), 5000)];
    let orders: [&[u8]; 3] = [&[0, 0, 1], &[0, 1, 0, 0, 1], &[1, 0]];
    let to =
        |rule: usize, index: usize| SocketAddrV4::new(Ipv4Addr::new(239, 5, rule as u8, index as u8), 6000);
    for (rule, (group, order)) in groups.into_iter().zip(orders).enumerate() {
        let slot = RuleSlot(rule as u32);
        let outputs: Vec<_> = order
            .iter()
            .enumerate()
            .map(|(index, sink)| {
                kernel.output((10 * rule + index) as u32, &format!("{}@out{sink}", to(rule, index)))
            })
            .collect();
        kernel.set(slot, &outputs);
        kernel.add(slot, group);
    }
    // Frames wait in a bucket filter that lets next to nothing through, and leave together when it opens.
    let bucket = |verb, rate, burst| {
        let args =
            ["qdisc", verb, "dev", ETH, "root", "tbf", "rate", rate, "burst", burst, "limit", "1000000"];
        kernel.site.source().output("tc", &args);
    };
    let mut captures = [0, 1].map(|sink| kernel.site.capture(sink));
    let sender = RawSender::new(kernel.site.source(), ETH);
    let source = SocketAddrV4::new(kernel.site.segments[0].source_address, 999);
    for round in 0..ROUNDS {
        bucket("replace", "8kbit", "1600");
        for sequence in round * EACH..(round + 1) * EACH {
            for (rule, group) in groups.into_iter().enumerate() {
                if sequence == (round + 1) * EACH - 1 && rule == 2 {
                    bucket("change", "8gbit", "1000000");
                }
                let payload = [&u64::from(sequence).to_be_bytes()[..], &[rule as u8; 500]].concat();
                sender.send(&Udp::new(source, group).payload(&payload).frame());
            }
        }
        for (rule, order) in orders.iter().enumerate() {
            for (index, sink) in order.iter().enumerate() {
                let count = (round + 1) * EACH;
                let datagrams = captures[usize::from(*sink)].exactly(to(rule, index), count as usize);
                assert_sequence(&datagrams, 0..count.into());
                assert!(datagrams.iter().all(|datagram| datagram.payload[8..] == [rule as u8; 500]));
                let slot = (10 * rule + index) as u32;
                assert_eq!(
                    kernel.totals(RuleSlot(rule as u32), slot),
                    sent(count.into(), 508),
                    "output {slot}"
                );
            }
        }
    }
}

/// TTL, DSCP and payload of datagrams, whose checksums hold.
#[track_caller]
fn check_marks(datagrams: &[Captured], expected: &[(u8, u8, &[u8])]) {
    let marks = |datagram: &Captured| (datagram.ttl, datagram.dscp, datagram.payload.clone());
    let expected: Vec<_> =
        expected.iter().map(|(ttl, dscp, payload)| (*ttl, *dscp, payload.to_vec())).collect();
    assert_eq!(datagrams.iter().map(marks).collect::<Vec<_>>(), expected);
    assert!(datagrams.iter().all(|datagram| datagram.checksum_holds && datagram.ecn == 0), "{datagrams:?}");
}

#[test]
fn frames_with_whole_checksums_padding_and_other_marks_leave_as_they_should() {
    let mut kernel = Kernel::start(2);
    kernel.add(ONE, GROUP_ONE);
    let outputs = [
        kernel.output(0, "239.2.2.1:6000@out0,ttl=dec"),
        kernel.output(1, "239.2.2.2:6001@out0,ttl=copy,dscp=10"),
        kernel.output(2, "239.2.2.3:6002@out1,from=192.0.2.77:7777,ttl=200"),
    ];
    kernel.set(ONE, &outputs);
    let [mut near, mut far] = [0, 1].map(|sink| kernel.site.capture(sink));
    let sender = RawSender::new(kernel.site.source(), ETH);
    let datagram = |payload: &[u8]| {
        Udp::new(SocketAddrV4::new(kernel.site.segments[0].source_address, 999), GROUP_ONE).payload(payload)
    };
    let mut padded = datagram(b"short").ttl(9).dscp(46, 1).frame();
    padded.resize(60, 0xee);
    sender.send(&padded);
    sender.send(&datagram(&[7; 1472]).ttl(1).frame());
    check_marks(&near.exactly(address("239.2.2.1:6000"), 1), &[(8, 46, b"short")]);
    check_marks(&far.exactly(address("239.2.2.3:6002"), 2), &[(200, 46, b"short"), (200, 0, &[7; 1472])]);
    check_marks(&near.exactly(address("239.2.2.2:6001"), 2), &[(9, 10, b"short"), (1, 10, &[7; 1472])]);
    let from = far.exactly(address("239.2.2.3:6002"), 2);
    assert!(from.iter().all(|datagram| datagram.source == address("192.0.2.77:7777")));
    let expired = kernel.totals(ONE, 0);
    assert_eq!((expired.received, expired.counters.rewritten, expired.counters.ttl_expired), (2, 1, 1));
    assert_eq!(expired.skipped(), 0);
    assert_eq!(kernel.totals(ONE, 1).counters.rewritten_bytes, 1477);
}

#[test]
fn what_does_not_leave_is_counted_for_its_reason() {
    let mut kernel = Kernel::start(2);
    kernel.add(ONE, GROUP_ONE);
    kernel.site.relay.ip(&["link set out0 mtu 1000"]);
    let outputs = [
        kernel.output(0, "239.2.2.1:6000@out0"),
        kernel.output(1, "239.2.2.2:6000@out1"),
        kernel.output(2, "239.2.2.3:6000@out0"),
    ];
    kernel.set(ONE, &outputs);
    let mut capture = kernel.site.capture(1);
    let sender = RawSender::new(kernel.site.source(), ETH);
    let source = SocketAddrV4::new(kernel.site.segments[0].source_address, 999);
    // 1,000 is all that fits; up to 1,004 the kernel gives to the device, beyond it does not.
    for payload in [972, 973, 976, 977, 1472] {
        sender.send(&Udp::new(source, GROUP_ONE).payload(&vec![0; payload]).frame());
    }
    capture.exactly(address("239.2.2.2:6000"), 5);
    for slot in [0, 2] {
        let totals = kernel.totals(ONE, slot);
        assert_eq!((totals.received, totals.counters.rewritten, totals.counters.too_big), (5, 1, 4));
        assert_eq!(totals.skipped(), 0);
    }
    // In silence, but not unseen.
    kernel.site.relay.ip(&["link set out0 down"]);
    for _ in 0..3 {
        sender.send(&Udp::new(source, GROUP_ONE).payload(&[1; 8]).frame());
    }
    capture.exactly(address("239.2.2.2:6000"), 8);
    assert_eq!([0, 1, 2].map(|slot| kernel.totals(ONE, slot).skipped()), [3, 0, 3]);
    // Without outputs it is dropped; by whom nobody wants it, it is passed.
    kernel.set(ONE, &[]);
    sender.send(&Udp::new(source, GROUP_ONE).payload(&[1; 8]).frame());
    wait_until("the datagram without outputs is counted", Duration::from_secs(5), || {
        kernel.rule(ONE).no_output == 1
    });
    let rule = kernel.rule(ONE);
    assert_eq!((rule.matched, rule.redirected), (9, 8));
    assert_eq!([0, 1, 2].map(|slot| kernel.totals(ONE, slot).received), [8, 8, 8]);
    // And again with one, whose counters go on.
    kernel.set(ONE, &outputs[1..2]);
    sender.send(&Udp::new(source, GROUP_ONE).payload(&[1; 8]).frame());
    capture.exactly(address("239.2.2.2:6000"), 9);
    assert_eq!([0, 1, 2].map(|slot| kernel.totals(ONE, slot).received), [8, 9, 8]);
}

/// The outputs of a datagram of rule one: all of one set, or all of the other.
fn check_whole(datagrams: &BTreeMap<u64, Vec<SocketAddrV4>>, sets: &[BTreeSet<SocketAddrV4>]) -> [u64; 2] {
    let mut by_set = [0; 2];
    for (sequence, outputs) in datagrams {
        let seen: BTreeSet<_> = outputs.iter().copied().collect();
        assert_eq!(seen.len(), outputs.len(), "datagram {sequence} left twice: {outputs:?}");
        let set = sets.iter().position(|set| *set == seen);
        by_set[set.unwrap_or_else(|| panic!("datagram {sequence} left by {outputs:?}"))] += 1;
    }
    by_set
}

#[test]
fn outputs_change_under_load_and_no_datagram_is_lost_or_mixed_up() {
    let mut kernel = Kernel::start(2);
    kernel.add(ONE, GROUP_ONE);
    kernel.add(TWO, GROUP_TWO);
    // Every output has a source port of its own, so that another's headers would show.
    let endpoint =
        |slot: u32, sink: u32| format!("239.3.0.{slot}:6000@out{sink},from=10.78.{sink}.1:{}", 30_000 + slot);
    let output = |kernel: &Kernel, slot, sink| kernel.output(slot, &endpoint(slot, sink));
    let sets = [
        vec![output(&kernel, 0, 0), output(&kernel, 1, 0), output(&kernel, 2, 1)],
        vec![output(&kernel, 3, 1), output(&kernel, 4, 0), output(&kernel, 5, 1), output(&kernel, 1, 0)],
    ];
    let steady = [output(&kernel, 6, 1), output(&kernel, 7, 0), output(&kernel, 8, 1)];
    kernel.set(ONE, &sets[0]);
    kernel.set(TWO, &steady);
    let mut captures = [kernel.site.capture(0), kernel.site.capture(1)];
    let stream = |to| Stream { rate: 2_000, size: 200, ..Stream::to(to) };
    let sources = [GROUP_ONE, GROUP_TWO].map(|group| Source::start(kernel.site.source(), stream(group)));
    for round in 1..60 {
        sources[0].wait_for_more(50);
        kernel.set(ONE, &sets[round % 2]);
    }
    let counts = sources.map(Source::stop);

    // What the source's own cable may lose on a machine that is kept from its work is no loss of the relay's.
    wait_until("every datagram has reached the relay", Duration::from_secs(5), || {
        [ONE, TWO].map(|rule| kernel.rule(rule).redirected) == counts
    });
    let to = |slot: u32| SocketAddrV4::new(Ipv4Addr::new(239, 3, 0, slot as u8), 6000);
    captures[0].at_least(to(7), counts[1] as usize);
    for (slot, sink) in [(6, 1), (7, 0), (8, 1)] {
        assert_sequence(&captures[sink].exactly(to(slot), counts[1] as usize), 0..counts[1]);
        assert_eq!(kernel.totals(TWO, slot), sent(counts[1], 200));
    }
    wait_until("every clone has left", Duration::from_secs(5), || {
        (0..6).all(|slot| kernel.totals(ONE, slot).skipped() == 0)
    });
    let mut datagrams: BTreeMap<u64, Vec<SocketAddrV4>> = BTreeMap::new();
    let mut by_output: BTreeMap<SocketAddrV4, u64> = BTreeMap::new();
    for capture in &mut captures {
        for datagram in capture.all() {
            let [.., slot] = datagram.destination.ip().octets();
            assert_eq!(datagram.source.port(), 30_000 + u16::from(slot), "{datagram:?}");
            assert!(datagram.checksum_holds);
            if slot < 6 {
                datagrams.entry(datagram.sequence()).or_default().push(datagram.destination);
                *by_output.entry(datagram.destination).or_default() += 1;
            }
        }
    }
    assert_eq!(datagrams.len() as u64, counts[0]);
    let expected = sets.map(|set| set.iter().map(|output| to(output.slot.0)).collect());
    let by_set = check_whole(&datagrams, &expected);
    assert!(by_set.iter().all(|count| *count > 0), "{by_set:?}");
    for slot in 0..6 {
        assert_eq!(kernel.totals(ONE, slot), sent(by_output[&to(slot)], 200), "output {slot}");
    }
}

#[test]
fn an_interface_says_whether_it_takes_redirected_frames() {
    let site = Site::build(Plan { sinks: 1, ..Plan::default() });
    let ask = |interface: &str, kind: &str| {
        site.relay.run(|| {
            let index = IfIndex(nix::net::if_::if_nametoindex(interface).unwrap());
            takes_redirects(&name(interface), index, kind)
        })
    };
    let refusal = ask("out0", "veth").unwrap_err();
    assert!(matches!(refusal, NoTarget::Peer { .. }), "{refusal}");
    let receiver = ForeignXdp::attach(&site.sinks[0].host, ETH);
    ask("out0", "veth").unwrap();
    drop(receiver);
    wait_until("the other end's program is gone", Duration::from_secs(5), || ask("out0", "veth").is_err());
    receive_by_gro(&site.sinks[0]);
    ask("out0", "veth").unwrap();
    assert!(matches!(ask("lo", "device"), Err(NoTarget::Never { .. })));
    let gone = site.relay.run(|| takes_redirects(&name("out9"), IfIndex(9999), "veth"));
    assert!(gone.is_err_and(|refusal| refusal.is_gone()));
}

#[test]
fn an_egress_interface_that_is_gone_is_named_and_nothing_changes() {
    let mut kernel = Kernel::start(1);
    kernel.add(ONE, GROUP_ONE);
    let good = kernel.output(0, "239.2.2.1:6000@out0");
    kernel.set(ONE, &[good]);
    let gone = RedirectOutput { slot: OutputSlot(2), egress: IfIndex(9999), ..good };
    let other = RedirectOutput { slot: OutputSlot(3), ..good };
    let Kernel { steering, site, .. } = &mut kernel;
    let mut set = |outputs: [Vec<_>; 2]| {
        let [one, two] = outputs;
        site.relay.run(|| steering.set_outputs(&[(ONE, one), (TWO, two)]))
    };
    let refused = set([vec![], vec![other, gone]]).unwrap_err();
    assert!(matches!(refused, RedirectError::Gone { rule: TWO, egress: IfIndex(9999) }), "{refused}");
    assert_eq!(refused.to_string(), "the egress interface with index 9999 is gone");
    let refused = set([vec![good, other], vec![gone]]).unwrap_err();
    assert!(matches!(refused, RedirectError::Gone { rule: TWO, .. }), "{refused}");
    let mut capture = kernel.site.capture(0);
    let stream = Stream { count: 10, size: 100, ..Stream::to(GROUP_ONE) };
    Source::play(kernel.site.source(), stream);
    assert_sequence(&capture.exactly(address("239.2.2.1:6000"), 10), 0..10);
    assert_eq!(kernel.totals(ONE, 0), sent(10, 100));
    assert_eq!(kernel.totals(ONE, 3), RedirectTotals::default());
}

#[test]
fn the_outputs_of_many_rules_change_together() {
    const RULES: u32 = 60;
    let mut kernel = Kernel::start(2);
    let group = |rule: u32| SocketAddrV4::new(Ipv4Addr::new(239, 1, 2, rule as u8), 5000);
    let outputs: Vec<_> =
        [0, 1].iter().map(|sink| kernel.output(0, &format!("239.4.4.4:6000@out{sink}"))).collect();
    let changes = |turn: u32| -> Vec<(RuleSlot, Vec<RedirectOutput>)> {
        let output = |rule, k: u32| RedirectOutput {
            slot: OutputSlot(2 * rule + k),
            ..outputs[((rule + k + turn) % 2) as usize]
        };
        (0..RULES).map(|rule| (RuleSlot(rule), vec![output(rule, 0), output(rule, 1)])).collect()
    };
    for rule in 0..RULES {
        kernel.add(RuleSlot(rule), group(rule));
    }
    let sender = RawSender::new(kernel.site.source(), ETH);
    let source = SocketAddrV4::new(kernel.site.segments[0].source_address, 999);
    for turn in 1..4 {
        let Kernel { steering, site, .. } = &mut kernel;
        site.relay.run(|| steering.set_outputs(&changes(turn))).unwrap();
        let mut captures = [0, 1].map(|sink| kernel.site.capture(sink));
        for rule in 0..RULES {
            sender.send(&Udp::new(source, group(rule)).payload(&[turn as u8; 20]).frame());
        }
        for capture in &mut captures {
            capture.exactly(address("239.4.4.4:6000"), RULES as usize);
        }
        for slot in 0..2 * RULES {
            assert_eq!(kernel.totals(RuleSlot(slot / 2), slot), sent(turn.into(), 20), "output {slot}");
        }
    }
}

#[test]
fn bpftool_shows_outputs_and_counters_by_name() {
    let mut kernel = Kernel::start(1);
    kernel.add(ONE, GROUP_ONE);
    let output = kernel.output(3, "239.2.2.1:6000@out0");
    kernel.set(ONE, &[output]);
    let mut capture = kernel.site.capture(0);
    Source::play(kernel.site.source(), Stream { count: 100, size: 100, ..Stream::to(GROUP_ONE) });
    capture.exactly(address("239.2.2.1:6000"), 100);
    let pins = kernel.site.scratch.pin_root().join("in0");
    let dump = |map: &str| {
        let path = pins.join(map);
        kernel.site.relay.json("bpftool", &["-j", "map", "dump", "pinned", path.to_str().unwrap()])
    };
    let outputs = dump("mcr_low_outputs");
    assert_eq!(outputs[3]["formatted"]["key"], json!(3));
    let cpus = outputs[3]["formatted"]["values"].as_array().unwrap();
    let sum = |field: &str| cpus.iter().map(|cpu| cpu["value"][field].as_u64().unwrap()).sum::<u64>();
    assert_eq!((sum("rewritten"), sum("rewritten_bytes"), sum("too_big")), (100, 10_000, 0));
    let records = dump("mcr_records");
    let record = &records[6]["formatted"]["value"];
    assert_eq!(record["rewrite"]["destination"], json!([239, 2, 2, 1]));
    assert_eq!((&record["rewrite"]["ttl"], &record["output"]), (&json!(16), &json!(3)));
    let fans = dump("mcr_fans");
    let fan = &fans[2]["formatted"]["values"][0]["value"];
    assert_eq!((&fan["outputs"], &fan["device"]), (&json!(1), &json!(output.egress.0)));
    assert_eq!(dump("mcr_banks")[1]["formatted"]["value"], json!(1));
}
