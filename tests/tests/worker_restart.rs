//! A worker that dies while its packet socket stays.

#![expect(clippy::unwrap_used, reason = "where it fails, the test fails and says where")]

use std::net::{Ipv4Addr, SocketAddrV4};

use mcr::traffic::probe::Payload;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tests::{
    Capture, Generator, Ground, Relay, Site, Source,
    relay::{lost, unaccounted},
    site::{ETH, Plan},
    source::Stream,
    wait::PATIENCE,
    wait_until,
};

const STREAMS: u8 = 20;
/// Datagrams of each stream, at 500 a second.
const EACH: u64 = 2_000;

/// Twenty streams through two workers, one of which is killed twice meanwhile: never a datagram twice or
/// out of its order, and what is missing is what the ledger says.
fn check_killed_under_load(ground: Ground) {
    let site = Site::build(Plan { ground, ..Plan::default() });
    let relay = Relay::start_with(&site, &["--workers", "2"]);
    let outputs: Vec<_> =
        (0..STREAMS).map(|i| SocketAddrV4::new(Ipv4Addr::new(239, 20, 0, i), 6000)).collect();
    for (i, to) in outputs.iter().enumerate() {
        relay.add(&format!("s{i}"), &format!("239.10.0.{i}:5000@in0"), &[&format!("{to}@out0")]);
    }
    for i in 0..STREAMS {
        site.segments[0].wait_until_joined(Ipv4Addr::new(239, 10, 0, i));
    }
    let mut sink = site.capture(0);
    let (streams, each) = (STREAMS.to_string(), EACH.to_string());
    let args = ["--streams", &streams, "--rate", "500", "--size", "1316", "--count", &each];
    let generator = Generator::start(site.source(), &format!("239.10.0.0:5000@{ETH}"), &args);
    let received = || relay.workers().iter().map(|worker| worker.received).sum::<u64>();
    for deaths in 1..=2 {
        let before = received();
        wait_until("the streams play", PATIENCE, || received() > before + 3_000);
        let victim = relay.workers().into_iter().find(|worker| worker.id == "in0/packet1").unwrap();
        kill(Pid::from_raw(victim.pid.unwrap().cast_signed()), Signal::SIGKILL).unwrap();
        wait_until("the worker is back", PATIENCE, || {
            let workers = relay.workers();
            let back = workers.iter().find(|worker| worker.id == victim.id).unwrap();
            back.restarts == deaths && back.state == "running" && back.pid != victim.pid
        });
    }
    let total = u64::from(STREAMS) * EACH;
    assert_eq!(generator.finish().count(), total);

    wait_until("all is relayed or accounted for", PATIENCE, || {
        let stats = relay.stats();
        let missing: u64 = stats.rules.iter().map(unaccounted).sum();
        let matched: u64 = stats.rules.iter().map(|rule| rule.matched).sum();
        // Without eBPF a rule matches what its worker counts.
        let held = if ground == Ground::WithoutBpf { lost(&stats.interfaces[0]) } else { 0 };
        matched + held == total && missing + held == lost(&stats.interfaces[0])
    });
    let stats = relay.stats();
    assert!(stats.interfaces[0].dropped.is_empty(), "nothing is lost in the ring: {:?}", stats.interfaces);
    let mut unsaid = 0;
    for rule in &stats.rules {
        assert!(rule.matched == EACH || ground == Ground::WithoutBpf, "{rule:?}");
        let to: SocketAddrV4 = rule.outputs[0].to.split('@').next().unwrap().parse().unwrap();
        let numbers: Vec<_> = sink.to(to).iter().map(|datagram| sequence(&datagram.payload)).collect();
        assert!(numbers.windows(2).all(|pair| pair[0] < pair[1]), "{}: doubled or out of order", rule.name);
        // What a worker had in its hands may have left before it could say so.
        let held = rule.outputs[0].dropped.get("worker_died").copied().unwrap_or(0);
        let sent = rule.outputs[0].sent;
        assert!(
            (sent..=sent + held).contains(&(numbers.len() as u64)),
            "{} of {sent} + {held}",
            numbers.len()
        );
        unsaid += held + unaccounted(rule);
    }
    // Two batches of 256.
    assert!(unsaid <= 512, "{unsaid} datagrams are only accounted for: {stats:?}");
    println!("two kills cost at most {unsaid} of {total} datagrams");
}

/// The sequence number in a probe of `mcr gen`.
fn sequence(payload: &[u8]) -> u64 {
    match Payload::read(payload) {
        Payload::Intact(probe) => probe.sequence,
        other => panic!("no probe of mcr gen: {other:?}"),
    }
}

#[test]
fn a_killed_worker_of_a_fanout_group_costs_what_it_held_and_nothing_comes_twice() {
    check_killed_under_load(Ground::Bridge);
}

#[test]
fn without_ebpf_too() {
    check_killed_under_load(Ground::WithoutBpf);
}

const GROUP: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(239, 1, 1, 1), 5000);
const TO: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(239, 2, 2, 2), 6000);

/// A relay with one rule that is at work, and what its output sends.
fn relaying(site: &Site) -> (Relay<'_>, Capture) {
    let relay = Relay::start(site);
    relay.add("cam1", &format!("{GROUP}@in0"), &[&format!("{TO}@out0")]);
    site.segments[0].wait_until_joined(*GROUP.ip());
    (relay, site.capture(0))
}

#[test]
fn a_stream_waits_for_its_only_worker_and_loses_what_that_held() {
    let site = Site::build(Plan { ground: Ground::PlainVeth, ..Plan::default() });
    let (relay, mut sink) = relaying(&site);
    let source = Source::start(site.source(), Stream::to(GROUP));
    for _ in 0..3 {
        source.wait_for_more(1_000);
        let worker = relay.workers().remove(0);
        kill(Pid::from_raw(worker.pid.unwrap().cast_signed()), Signal::SIGKILL).unwrap();
        wait_until("the worker is back", PATIENCE, || {
            let workers = relay.workers();
            workers[0].state == "running" && workers[0].pid != worker.pid
        });
    }
    source.wait_for_more(1_000);
    let sent = source.stop();
    let stats = relay.balanced("cam1", sent);
    let interface = relay.interface("in0");
    assert!(interface.dropped.is_empty(), "{interface:?}");
    assert_eq!(unaccounted(&stats), lost(&interface), "{stats:?} {interface:?}");
    let numbers: Vec<_> = sink.to(TO).iter().map(tests::Captured::sequence).collect();
    assert!(numbers.windows(2).all(|pair| pair[0] < pair[1]), "doubled or out of order");
    let gone = stats.outputs[0].dropped.get("worker_died").copied().unwrap_or(0) + lost(&interface);
    assert!(sent - numbers.len() as u64 <= gone, "{} of {sent}, {gone} accounted for", numbers.len());
}

#[test]
fn a_ring_that_filled_while_its_worker_was_away_is_relayed_and_the_rest_counted() {
    let site = Site::build(Plan { ground: Ground::PlainVeth, ..Plan::default() });
    let (relay, mut sink) = relaying(&site);
    // A few, so that the ring's start is no slot 0.
    Source::play(site.source(), Stream { count: 700, ..Stream::to(GROUP) });
    relay.balanced("cam1", 700);
    sink.exactly(TO, 700);
    let worker = relay.workers().remove(0);
    let pid = Pid::from_raw(worker.pid.unwrap().cast_signed());
    // Its ring holds some 8,200 frames; the worker holds none.
    kill(pid, Signal::SIGSTOP).unwrap();
    Source::play(site.source(), Stream { count: 10_000, rate: 20_000, size: 100, ..Stream::to(GROUP) });
    kill(pid, Signal::SIGKILL).unwrap();
    let stats = relay.balanced("cam1", 10_700);
    let interface = relay.interface("in0");
    let full = interface.dropped.get("packet_ring_full").copied().unwrap_or(0);
    assert!(full > 0 && interface.discarded.is_empty(), "{interface:?}");
    assert_eq!(stats.received + full, 10_700, "{stats:?} {interface:?}");
    // The first that came are the ones that had room, and it goes on at once.
    Source::play(site.source(), Stream { count: 500, ..Stream::to(GROUP) });
    relay.balanced("cam1", 11_200);
    let numbers: Vec<_> = sink.to(TO).iter().map(tests::Captured::sequence).collect();
    let waited = stats.received - 700;
    assert!(numbers.iter().copied().eq((0..700).chain(0..waited).chain(0..500)), "out of order or missing");
}
