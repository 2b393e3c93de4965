//! Each kind of drop, made on purpose: it is found under its name, exactly, the ledger's equations hold, and what
//! was sent is what arrived.
//!
//! | where | kinds |
//! |---|---|
//! | interface | `fill_ring_empty`, `rx_ring_full`, `packet_ring_full`, `worker_died`; verdict `fragment` |
//! | rule | `no_worker`, `loop`, `cut` |
//! | output | `too_big`, `ttl_expired`, `pending`, `send_buffer_full`, `queue_full`, `unreachable`, `filtered` |
//!
//! `worker_died` at an output and `discarded` need a worker that is killed in the midst of a batch: `worker_death`,
//! `worker_restart` and `worker_kills` do that.

#![expect(clippy::unwrap_used, reason = "where it fails, the test fails and says where")]

use std::net::{Ipv4Addr, SocketAddrV4};

use mcr::{
    api::wire::{Health, Outcome, RuleOutcome, RuleStats},
    datapath::af_packet,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tests::{
    Capture, Captured, Ground, RawSender, Relay, Site, Source, Udp,
    capture::assert_sequence,
    relay::lost,
    site::{ETH, Plan},
    source::Stream,
    wait::PATIENCE,
    wait_until,
};

const GROUP: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(239, 1, 1, 1), 5000);
const INPUT: &str = "239.1.1.1:5000@in0";
const TO: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(239, 2, 2, 2), 6000);
const OUTPUT: &str = "239.2.2.2:6000@out0";

/// Counts by name, as `mcr stats --json` has them.
type Counts = std::collections::BTreeMap<String, u64>;

fn counts<const N: usize>(counts: [(&str, u64); N]) -> Counts {
    counts.into_iter().map(|(name, count)| (name.to_owned(), count)).collect()
}

/// A relay with one rule that is at work, and what arrives at the first sink.
#[track_caller]
fn relaying<'a>(site: &'a Site, output: &str, args: &[&str]) -> (Relay<'a>, Capture) {
    let relay = Relay::start_with(site, args);
    relay.add("cam1", INPUT, &[output]);
    site.segments[0].wait_until_joined(*GROUP.ip());
    (relay, site.capture(0))
}

#[track_caller]
fn play(site: &Site, count: u64, rate: u64) {
    Source::play(site.source(), Stream { count, rate, ..Stream::to(GROUP) });
}

/// Checks that of `n` datagrams the rule's first output dropped `dropped`, and that the sink got all others.
#[track_caller]
fn check_output(relay: &Relay<'_>, sink: &mut Capture, n: u64, dropped: &Counts) -> RuleStats {
    let stats = relay.balanced("cam1", n);
    let output = &stats.outputs[0];
    assert_eq!((stats.received, output.received, &output.dropped), (n, n, dropped), "{stats:#?}");
    assert_eq!(output.sent, n - dropped.values().sum::<u64>(), "{stats:#?}");
    sink.exactly(TO, output.sent as usize);
    stats
}

fn worker(relay: &Relay<'_>) -> Pid {
    Pid::from_raw(relay.workers().remove(0).pid.unwrap().cast_signed())
}

/// Plays while the only worker stands still, for less than the four seconds after which it would be killed.
#[track_caller]
fn play_to_a_stopped_worker(site: &Site, relay: &Relay<'_>, count: u64, rate: u64) {
    let pid = worker(relay);
    kill(pid, Signal::SIGSTOP).unwrap();
    play(site, count, rate);
    kill(pid, Signal::SIGCONT).unwrap();
}

/// Checks that of `n` datagrams the interface lost all but `received` under one name, and that these were relayed.
#[track_caller]
fn check_interface(relay: &Relay<'_>, sink: &mut Capture, n: u64, received: u64, name: &str) {
    let stats = relay.balanced("cam1", n);
    let interface = relay.interface("in0");
    assert_eq!((interface.verdicts["steered"], interface.received), (n, received), "{interface:#?}");
    assert_eq!(interface.dropped, counts([(name, n - received)]), "{interface:#?}");
    assert_eq!((stats.received, stats.outputs[0].sent), (received, received), "{stats:#?}");
    // What had room is what came first.
    assert_sequence(&sink.exactly(TO, received as usize), 0..received);
    assert_eq!(relay.workers()[0].restarts, 0, "the worker was only stopped");
}

#[test]
fn more_frames_than_chunks_are_an_empty_fill_ring() {
    let site = Site::default();
    let (relay, mut sink) = relaying(&site, OUTPUT, &["--frames", "4096"]);
    play_to_a_stopped_worker(&site, &relay, 6_000, 10_000);
    check_interface(&relay, &mut sink, 6_000, 4_096, "fill_ring_empty");
}

#[test]
fn more_frames_than_places_are_a_full_rx_ring() {
    let site = Site::default();
    let (relay, mut sink) = relaying(&site, OUTPUT, &["--frames", "4096", "--rx-ring", "1024"]);
    play_to_a_stopped_worker(&site, &relay, 3_000, 10_000);
    check_interface(&relay, &mut sink, 3_000, 1_024, "rx_ring_full");
}

#[test]
fn more_frames_than_slots_are_a_full_packet_ring() {
    let site = Site::build(Plan { ground: Ground::PlainVeth, ..Plan::default() });
    let (relay, mut sink) = relaying(&site, OUTPUT, &[]);
    let slots = u64::from(af_packet::ring(1_500).slots());
    play_to_a_stopped_worker(&site, &relay, slots + 1_500, 10_000);
    check_interface(&relay, &mut sink, slots + 1_500, slots, "packet_ring_full");
}

#[test]
fn what_the_sockets_of_a_killed_worker_held_has_died_with_it() {
    let site = Site::default();
    let (relay, mut sink) = relaying(&site, OUTPUT, &[]);
    let pid = worker(&relay);
    kill(pid, Signal::SIGSTOP).unwrap();
    play(&site, 500, 5_000);
    kill(pid, Signal::SIGKILL).unwrap();
    wait_until("the worker is back", PATIENCE, || {
        let worker = relay.workers().remove(0);
        worker.state == "running" && worker.restarts == 1
    });
    relay.wait_until_active("cam1");
    play(&site, 500, 5_000);
    let stats = relay.balanced("cam1", 1_000);
    let interface = relay.interface("in0");
    assert_eq!((&interface.dropped, interface.received), (&counts([("worker_died", 500)]), 500));
    assert_eq!((stats.received, stats.outputs[0].sent), (500, 500), "{stats:#?}");
    assert_sequence(&sink.exactly(TO, 500), 0..500);
}

#[test]
fn the_packet_ring_of_a_killed_worker_is_relayed_by_the_next() {
    let site = Site::build(Plan { ground: Ground::PlainVeth, ..Plan::default() });
    let (relay, mut sink) = relaying(&site, OUTPUT, &[]);
    let pid = worker(&relay);
    kill(pid, Signal::SIGSTOP).unwrap();
    play(&site, 500, 5_000);
    kill(pid, Signal::SIGKILL).unwrap();
    check_output(&relay, &mut sink, 500, &counts([]));
    assert_eq!(lost(&relay.interface("in0")), 0);
}

#[test]
fn what_comes_while_there_is_no_worker_is_counted_so() {
    let site = Site::default();
    let (relay, mut sink) = relaying(&site, OUTPUT, &[]);
    // Each end that comes too soon doubles the pause before the next start: the sixth is 1.6 seconds long.
    for deaths in 1..=6 {
        let pid = worker(&relay);
        kill(pid, Signal::SIGKILL).unwrap();
        wait_until("the worker's end is known", PATIENCE, || {
            let worker = relay.workers().remove(0);
            worker.restarts == deaths && (deaths < 6 || worker.state == "restarting")
        });
        if deaths < 6 {
            wait_until("a worker runs", PATIENCE, || relay.workers()[0].state == "running");
        }
    }
    play(&site, 300, 3_000);
    let stats = relay.balanced("cam1", 300);
    assert_eq!(stats.dropped, counts([("no_worker", 300)]), "{stats:#?}");
    assert_eq!((stats.received, stats.outputs[0].received), (0, 0));
    let interface = relay.interface("in0");
    assert_eq!((interface.verdicts["no_worker"], interface.verdicts["steered"]), (300, 0), "{interface:#?}");
    relay.wait_until_active("cam1");
    play(&site, 300, 3_000);
    assert_eq!(relay.balanced("cam1", 600).outputs[0].sent, 300);
    sink.exactly(TO, 300);
}

/// Frames longer than a slot wait whole in the socket's queue, which has room for some thousand.
#[test]
fn long_frames_for_which_there_is_no_room_are_cut() {
    let site = Site::build(Plan { sinks: 1, ground: Ground::PlainVeth, ..Plan::default() });
    let (relay, mut sink) = relaying(&site, OUTPUT, &[]);
    let set = |name: &str| format!("link set {name} mtu 9000");
    let segment = &site.segments[0];
    segment.source.ip(&[&set(ETH)]);
    segment.bridge.ip(&[&set("src"), &set("relay"), &set("br0")]);
    site.relay.ip(&[&set("in0"), &set("out0")]);
    site.sinks[0].host.ip(&[&set(ETH)]);
    relay.wait_until_active("cam1");
    let pid = worker(&relay);
    kill(pid, Signal::SIGSTOP).unwrap();
    Source::play(site.source(), Stream { count: 8_000, rate: 8_000, size: 8_972, ..Stream::to(GROUP) });
    kill(pid, Signal::SIGCONT).unwrap();
    let stats = relay.balanced("cam1", 8_000);
    let interface = relay.interface("in0");
    let cut = stats.dropped["cut"];
    assert!(cut > 0 && stats.received > 0, "{stats:#?}");
    assert_eq!((stats.received + cut, stats.outputs[0].sent), (8_000, stats.received), "{stats:#?}");
    assert_eq!((interface.received, &interface.discarded), (8_000, &counts([("cut", cut)])));
    assert!(interface.dropped.is_empty(), "{interface:#?}");
    sink.exactly(TO, stats.received as usize);
}

fn fragments_are_not_relayed_but_counted() {
    let site = Site::default();
    let (relay, mut sink) = relaying(&site, OUTPUT, &[]);
    // 3,000 bytes leave the source as three fragments.
    Source::play(site.source(), Stream { count: 20, size: 3_000, rate: 500, ..Stream::to(GROUP) });
    play(&site, 20, 5_000);
    // A macvlan reassembles before anybody sees a frame; what then is too big for the output is dropped there.
    let (fragments, whole) = if site.ground == Ground::Macvlan { (0, 20) } else { (60, 0) };
    let output = relay.balanced("cam1", 20 + whole).outputs[0].clone();
    assert_eq!((output.sent, output.dropped.get("too_big").copied().unwrap_or(0)), (20, whole));
    assert_eq!(relay.interface("in0").verdicts["fragment"], fragments);
    assert_sequence(&sink.exactly(TO, 20), 0..20);
}

fn what_this_relay_sent_itself_is_a_loop() {
    let site = Site::default();
    let (relay, mut sink) = relaying(&site, OUTPUT, &[]);
    relay.add("back", "239.9.9.9:5000@in0", &[INPUT]);
    let own = SocketAddrV4::new(site.segments[0].relay_address, 40_000);
    let frames = |source| (0..100u64).map(move |n| Udp::new(source, GROUP).payload(&n.to_be_bytes()).frame());
    let sender = RawSender::new(site.source(), ETH);
    sender.play(frames(own), 5_000);
    sender.play(frames("10.77.0.2:40000".parse().unwrap()), 5_000);
    let stats = relay.balanced("cam1", 200);
    assert_eq!((&stats.dropped, stats.received), (&counts([("loop", 100)]), 100), "{stats:#?}");
    assert_eq!(stats.outputs[0].sent, 100);
    sink.exactly(TO, 100);
}

fn what_exceeds_the_egress_mtu_is_too_big() {
    let site = Site::default();
    site.relay.ip(&["link set out0 mtu 1000"]);
    let relay = Relay::start(&site);
    let add = ["rule", "add", "cam1", "--in", INPUT, "--out", OUTPUT, "--out", "239.2.2.3:6000@out1"];
    let outcome: RuleOutcome = relay.json(&add);
    assert_eq!(outcome.outcome, Outcome::Added);
    assert!(outcome.warnings.iter().any(|warning| warning.contains("out0")), "{:?}", outcome.warnings);
    relay.wait_until_active("cam1");
    site.segments[0].wait_until_joined(*GROUP.ip());
    let (mut sink0, mut sink1) = (site.capture(0), site.capture(1));
    // 1,000 bytes of MTU take 972 of payload.
    let udp = Udp::new("10.77.0.2:40000".parse().unwrap(), GROUP);
    let frames = [972usize, 973, 1316, 100].map(|len| udp.clone().payload(&vec![7; len]).frame());
    RawSender::new(site.source(), ETH).play(frames, 1_000);
    let stats = check_output(&relay, &mut sink0, 4, &counts([("too_big", 2)]));
    assert_eq!(stats.outputs[1].sent, 4);
    let lengths = |datagrams: Vec<Captured>| datagrams.iter().map(|d| d.payload.len()).collect::<Vec<_>>();
    assert_eq!(lengths(sink0.to(TO)), [972, 100]);
    assert_eq!(lengths(sink1.exactly("239.2.2.3:6000".parse().unwrap(), 4)), [972, 973, 1316, 100]);
}

fn a_ttl_that_is_used_up_has_expired() {
    let frame = Udp::new("10.77.0.2:40000".parse().unwrap(), GROUP).ttl(1).payload(b"last hop").frame();
    for (ttl, dropped) in [("dec", counts([("ttl_expired", 100)])), ("copy", counts([]))] {
        let site = Site::default();
        let (relay, mut sink) = relaying(&site, &format!("{OUTPUT},ttl={ttl}"), &[]);
        RawSender::new(site.source(), ETH).play((0..100).map(|_| frame.clone()), 5_000);
        check_output(&relay, &mut sink, 100, &dropped);
        assert!(sink.to(TO).iter().all(|datagram| datagram.ttl == 1));
    }
}

#[track_caller]
fn wait_until_pending(relay: &Relay<'_>, reason: &str) {
    wait_until(&format!("the output waits: {reason}"), PATIENCE, || {
        let output = relay.show("cam1").outputs.remove(0);
        output.health == Health::Pending && output.reason.as_deref() == Some(reason)
    });
}

fn what_comes_while_the_egress_is_down_is_pending() {
    let site = Site::default();
    let (relay, mut sink) = relaying(&site, OUTPUT, &[]);
    site.relay.ip(&["link set out0 down"]);
    wait_until_pending(&relay, "interface out0 is down");
    play(&site, 500, 5_000);
    check_output(&relay, &mut sink, 500, &counts([("pending", 500)]));
    site.relay.ip(&["link set out0 up"]);
    relay.wait_until_active("cam1");
    play(&site, 500, 5_000);
    check_output(&relay, &mut sink, 1_000, &counts([("pending", 500)]));
}

/// Makes `out0` a link of this many bits a second, with a queue of this many bytes.
fn throttle(site: &Site, rate: &str, queue: &str) {
    let qdisc =
        ["qdisc", "add", "dev", "out0", "root", "tbf", "rate", rate, "burst", "10000", "limit", queue];
    site.relay.output("tc", &qdisc);
}

fn what_finds_the_egress_queue_full_is_counted_one_by_one() {
    let site = Site::default();
    let (relay, mut sink) = relaying(&site, &format!("{OUTPUT},gso=false"), &[]);
    throttle(&site, "20mbit", "30000");
    play(&site, 5_000, 10_000);
    let full = relay.balanced("cam1", 5_000).outputs[0].dropped["queue_full"];
    assert!((1..5_000).contains(&full), "{full}");
    let stats = check_output(&relay, &mut sink, 5_000, &counts([("queue_full", full)]));
    assert_eq!(stats.outputs[0].approximate, 0);
}

fn a_queue_that_splits_no_runs_refuses_them_whole() {
    let site = Site::default();
    let (relay, mut sink) = relaying(&site, OUTPUT, &[]);
    let tc = |line: &str| drop(site.relay.output("tc", &line.split(' ').collect::<Vec<_>>()));
    tc("qdisc add dev out0 root handle 1: htb default 1");
    tc("class add dev out0 parent 1: classid 1:1 htb rate 20mbit");
    tc("qdisc add dev out0 parent 1:1 pfifo limit 10");
    play_to_a_stopped_worker(&site, &relay, 2_000, 10_000);
    let full = relay.balanced("cam1", 2_000).outputs[0].dropped["queue_full"];
    assert!((1..2_000).contains(&full), "{full}");
    let stats = check_output(&relay, &mut sink, 2_000, &counts([("queue_full", full)]));
    // mcr cannot know which kind of queue it is.
    assert!(stats.outputs[0].approximate > 0, "{stats:#?}");
}

/// What the kernel accepted as one run its queue may still refuse in part: the queue's own counter has that.
fn of_runs_that_find_the_egress_queue_full_the_queue_knows_more() {
    let site = Site::default();
    let (relay, mut sink) = relaying(&site, OUTPUT, &[]);
    throttle(&site, "20mbit", "30000");
    // In one batch, so that runs are long.
    play_to_a_stopped_worker(&site, &relay, 2_000, 10_000);
    let stats = relay.balanced("cam1", 2_000);
    let output = &stats.outputs[0];
    let full = output.dropped["queue_full"];
    assert_eq!(output.dropped, counts([("queue_full", full)]));
    assert_eq!(output.sent + full, 2_000, "{stats:#?}");
    assert!(output.approximate > 0 && output.approximate <= full, "{stats:#?}");
    let drained = || {
        let shown = site.relay.json("tc", &["-s", "-j", "qdisc", "show", "dev", "out0"]);
        let number = |key: &str| shown[0][key].as_u64().unwrap();
        (number("backlog") == 0).then(|| number("drops"))
    };
    let refused = tests::wait_for("the queue is empty", PATIENCE, drained);
    sink.exactly(TO, 2_000 - refused as usize);
    println!("{} sent, {full} queue_full, {refused} dropped by the queue", output.sent);
}

/// Behind a queue that takes everything it is the socket's own share that runs out.
fn what_finds_the_send_buffer_full_is_counted() {
    for gso in ["", ",gso=false"] {
        let site = Site::default();
        let (relay, mut sink) = relaying(&site, &format!("{OUTPUT}{gso}"), &[]);
        throttle(&site, "80mbit", "1000000000");
        play(&site, 20_000, 20_000);
        let full = relay.balanced("cam1", 20_000).outputs[0].dropped["send_buffer_full"];
        assert!((1..20_000).contains(&full), "{full}");
        let stats = check_output(&relay, &mut sink, 20_000, &counts([("send_buffer_full", full)]));
        assert_eq!(stats.outputs[0].approximate, 0);
    }
}

fn what_a_firewall_of_this_host_forbids_is_filtered() {
    let site = Site::default();
    let relay = Relay::start(&site);
    relay.add("cam1", INPUT, &[OUTPUT, "239.2.2.3:6000@out1"]);
    site.segments[0].wait_until_joined(*GROUP.ip());
    let (mut sink0, mut sink1) = (site.capture(0), site.capture(1));
    let nft = |line: &str| drop(site.relay.output("nft", &[line]));
    nft("add table ip forbid");
    nft("add chain ip forbid sent { type filter hook output priority 0; }");
    nft("add rule ip forbid sent ip daddr 239.2.2.2 drop");
    play(&site, 1_000, 10_000);
    let stats = check_output(&relay, &mut sink0, 1_000, &counts([("filtered", 1_000)]));
    // It forbids whole runs, before they are cut into datagrams.
    assert_eq!((stats.outputs[0].approximate, stats.outputs[1].sent), (0, 1_000), "{stats:#?}");
    assert_sequence(&sink1.exactly("239.2.2.3:6000".parse().unwrap(), 1_000), 0..1_000);
    nft("delete table ip forbid");
    play(&site, 1_000, 10_000);
    check_output(&relay, &mut sink0, 2_000, &counts([("filtered", 1_000)]));
}

fn what_goes_to_a_host_that_does_not_answer_is_unreachable() {
    let site = Site::default();
    let relay = Relay::start(&site);
    relay.add("cam1", INPUT, &["10.78.0.9:6000@out0", "239.2.2.3:6000@out1"]);
    site.segments[0].wait_until_joined(*GROUP.ip());
    let (mut sink0, mut sink1) = (site.capture(0), site.capture(1));
    // Nothing is sent to it before that is known: it is looked for when the rule comes.
    wait_until_pending(&relay, "10.78.0.9 does not answer ARP on out0");
    let to = "10.78.0.9:6000".parse().unwrap();
    let check = |n: u64, unreachable: u64, sink0: &mut Capture| {
        let stats = relay.balanced("cam1", n);
        let output = &stats.outputs[0];
        let dropped = if unreachable > 0 { counts([("unreachable", unreachable)]) } else { counts([]) };
        assert_eq!((output.sent, &output.dropped), (n - unreachable, &dropped), "{stats:#?}");
        assert_eq!(stats.outputs[1].sent, n);
        sink0.exactly(to, output.sent as usize);
    };
    play(&site, 500, 5_000);
    check(500, 500, &mut sink0);
    // While it is looked for again, all stays as it is.
    let incomplete = || {
        let entries = site.relay.json("ip", &["-j", "neigh", "show", "to", "10.78.0.9", "dev", "out0"]);
        entries[0]["state"].as_array().is_some_and(|state| state.contains(&"INCOMPLETE".into()))
    };
    wait_until("it is looked for again", PATIENCE, incomplete);
    play(&site, 500, 5_000);
    check(1_000, 1_000, &mut sink0);

    site.sinks[0].host.ip(&["addr add 10.78.0.9/24 dev eth0"]);
    relay.wait_until_active("cam1");
    play(&site, 500, 5_000);
    check(1_500, 1_000, &mut sink0);
    assert_sequence(&sink1.exactly("239.2.2.3:6000".parse().unwrap(), 1_500).split_off(1_000), 0..500);
    let log = relay.log();
    assert_eq!(log.matches("neighbour does not answer ARP").count(), 1, "said once:\n{log}");
    assert_eq!(log.matches("neighbour answers again").count(), 1, "said once:\n{log}");
}

/// Where much is sent to it the kernel looks for it again as soon as it has given up.
fn a_host_that_stops_answering_in_mid_stream_is_found_out() {
    let site = Site::default();
    let to: SocketAddrV4 = "10.78.0.2:6000".parse().unwrap();
    let (relay, mut sink) = relaying(&site, &format!("{to}@out0"), &[]);
    let source = Source::start(site.source(), Stream::to(GROUP));
    sink.at_least(to, 1_000);
    // Before the kernel forgets it, it calls it failed.
    site.relay.ip(&["neigh flush dev out0"]);
    source.wait_for_more(3_000);
    assert!(relay.rule("cam1").outputs[0].dropped.is_empty());
    site.sinks[0].host.ip(&["link set eth0 arp off"]);
    site.relay.ip(&["neigh flush dev out0"]);
    wait_until_pending(&relay, "10.78.0.2 does not answer ARP on out0");
    source.wait_for_more(1_000);
    let dropped = || relay.rule("cam1").outputs[0].dropped["unreachable"];
    let before = dropped();
    source.wait_for_more(1_000);
    assert!(dropped() > before);
    site.sinks[0].host.ip(&["link set eth0 arp on"]);
    relay.wait_until_active("cam1");
    let before = sink.count(to);
    sink.at_least(to, before + 1_000);
    let output = relay.balanced("cam1", source.stop()).outputs.remove(0);
    let unreachable = output.dropped["unreachable"];
    assert_eq!(output.dropped, counts([("unreachable", unreachable)]));
    // What came before it was known the kernel accepted.
    let arrived = sink.count(to) as u64;
    println!("{} sent, {arrived} arrived, {unreachable} unreachable", output.sent);
    assert!(arrived <= output.sent && output.sent + unreachable == output.received, "{arrived}: {output:?}");
}

fn a_router_that_does_not_answer_is_the_reason_for_what_lies_behind_it() {
    let site = Site::default();
    site.relay.ip(&["route add 10.99.0.0/16 via 10.78.0.9 dev out0"]);
    let (relay, _sink) = relaying(&site, "10.99.1.1:6000@out0", &[]);
    wait_until_pending(&relay, "10.78.0.9 does not answer ARP on out0");
    play(&site, 100, 5_000);
    let stats = relay.balanced("cam1", 100);
    assert_eq!(stats.outputs[0].dropped, counts([("unreachable", 100)]));
    // Another way to it is found by itself.
    site.relay.ip(&["route replace 10.99.0.0/16 via 10.78.0.2 dev out0"]);
    relay.wait_until_active("cam1");
    play(&site, 100, 5_000);
    assert_eq!(relay.balanced("cam1", 200).outputs[0].sent, 100);
    // A route without a router is to the host itself.
    site.relay.ip(&["route del 10.99.0.0/16"]);
    wait_until_pending(&relay, "10.99.1.1 does not answer ARP on out0");
}

fn a_networks_broadcast_address_is_sent_to_by_nobody() {
    let site = Site::default();
    let relay = Relay::start(&site);
    relay.cli(&["rule", "add", "cam1", "--in", INPUT, "--out", "10.78.0.255:6000@out0"]).ok();
    site.segments[0].wait_until_joined(*GROUP.ip());
    wait_until_pending(&relay, "10.78.0.255 is a broadcast address on out0: name a group, or each host");
    play(&site, 100, 5_000);
    let stats = relay.balanced("cam1", 100);
    assert_eq!(stats.outputs[0].dropped, counts([("unreachable", 100)]));
}

/// This kernel segments for every device; one that does not shows as `EIO`, which `mcr/tests/egress.rs` provokes.
fn a_device_that_neither_segments_nor_sums_loses_nothing() {
    let site = Site::default();
    let (relay, mut sink) = relaying(&site, OUTPUT, &[]);
    site.relay.output("ethtool", &["-K", "out0", "tx", "off", "sg", "off", "tx-udp-segmentation", "off"]);
    play_to_a_stopped_worker(&site, &relay, 2_000, 10_000);
    check_output(&relay, &mut sink, 2_000, &counts([]));
    let datagrams = sink.to(TO);
    assert!(datagrams.iter().all(|datagram| datagram.checksum_holds));
    assert_sequence(&datagrams, 0..2_000);
}

tests::on_every_ground!(
    fragments_are_not_relayed_but_counted,
    what_this_relay_sent_itself_is_a_loop,
    what_exceeds_the_egress_mtu_is_too_big,
    a_ttl_that_is_used_up_has_expired,
);

tests::by_the_kernel!(
    fragments_are_not_relayed_but_counted,
    what_this_relay_sent_itself_is_a_loop,
    what_exceeds_the_egress_mtu_is_too_big,
    a_ttl_that_is_used_up_has_expired,
);

/// What is lost on the way out does not depend on the ground, only on the worker.
mod egress {
    use super::*;

    tests::on_both_datapaths!(
        what_comes_while_the_egress_is_down_is_pending,
        what_finds_the_egress_queue_full_is_counted_one_by_one,
        a_queue_that_splits_no_runs_refuses_them_whole,
        of_runs_that_find_the_egress_queue_full_the_queue_knows_more,
        what_finds_the_send_buffer_full_is_counted,
        what_a_firewall_of_this_host_forbids_is_filtered,
        what_goes_to_a_host_that_does_not_answer_is_unreachable,
        a_host_that_stops_answering_in_mid_stream_is_found_out,
        a_router_that_does_not_answer_is_the_reason_for_what_lies_behind_it,
        a_networks_broadcast_address_is_sent_to_by_nobody,
        a_device_that_neither_segments_nor_sums_loses_nothing,
    );
}

/// A rule whose hosts are not known, or do not answer, is a worker's, and the kernel's when they do.
mod hosts {
    use super::*;

    tests::by_the_kernel!(
        what_goes_to_a_host_that_does_not_answer_is_unreachable,
        a_host_that_stops_answering_in_mid_stream_is_found_out,
        a_router_that_does_not_answer_is_the_reason_for_what_lies_behind_it,
        a_networks_broadcast_address_is_sent_to_by_nobody,
    );
}

tests::as_ordinary_user!(what_goes_to_a_host_that_does_not_answer_is_unreachable);
