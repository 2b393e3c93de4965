//! Hosts that the kernel sends to by itself: known, not yet known, lost and found, with another MAC, behind a router.

#![expect(clippy::unwrap_used, reason = "where it fails, the test fails and says where")]

use std::{
    net::{Ipv4Addr, SocketAddrV4, UdpSocket},
    time::{Duration, Instant},
};

use mcr::api::wire::{Health, OutputStats};
use nix::sys::signal::Signal;
use tests::{
    Captured, Ground, Namespace, Relay, Site, Source,
    capture::assert_sequence,
    site::{ETH, Plan},
    source::Stream,
    wait::PATIENCE,
    wait_for, wait_until,
};

const GROUP: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(239, 1, 1, 1), 5000);
const INPUT: &str = "239.1.1.1:5000@in0";
const HOST: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(10, 78, 0, 2), 6000);
const TO_HOST: &str = "10.78.0.2:6000@out0";
const TO: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(239, 2, 2, 2), 6000);
const TO_GROUP: &str = "239.2.2.2:6000@out0";
/// Datagrams a second where a change is waited for: the capture has to hold what comes meanwhile.
const RATE: u64 = 2_000;
const BY_NAME: [&str; 2] = ["--datapath", "redirect"];
const SILENT: &str = "10.78.0.2 does not answer ARP on out0";

type Mac = [u8; 6];

/// A site whose sinks take redirected frames.
fn site() -> Site {
    Site::build(Plan { ground: Ground::Kernel, ..Plan::default() })
}

fn mac(namespace: &Namespace, interface: &str) -> Mac {
    let shown = namespace.json("ip", &["-j", "link", "show", interface]);
    let bytes: Vec<_> = shown[0]["address"].as_str().unwrap().split(':').collect();
    std::array::from_fn(|n| u8::from_str_radix(bytes[n], 16).unwrap())
}

/// The state of a neighbour in the relay host's table, or nothing.
fn state(site: &Site, address: &str, interface: &str) -> String {
    let shown = site.relay.json("ip", &["-j", "neigh", "show", "to", address, "dev", interface]);
    shown[0]["state"][0].as_str().unwrap_or_default().to_owned()
}

/// Has the relay host's kernel doubt a neighbour on `out0` after a second and a half at most, and ask it again after
/// another. Answers in which time the relay is to find out that it is not there any more: the four seconds after which it
/// is used again, three questions, and a second for a busy machine.
fn doubt_soon(site: &Site) -> Duration {
    site.relay.sysctl("ipv4/neigh/out0/base_reachable_time_ms", "1000");
    site.relay.sysctl("ipv4/neigh/out0/delay_first_probe_time", "1");
    Duration::from_millis(1_500 + 4_000 + 1_000 + 3_000 + 1_000)
}

/// A listener, so that the host refuses nothing.
fn listen(site: &Site, sink: usize, address: SocketAddrV4) -> UdpSocket {
    site.sinks[sink].host.run(|| UdpSocket::bind(address)).unwrap()
}

/// Has the relay host's kernel know the first sink.
fn greet(site: &Site) {
    let greeter = site.relay.run(|| UdpSocket::bind("10.78.0.1:0")).unwrap();
    greeter.send_to(b"hello", HOST).unwrap();
    wait_until("it is known", PATIENCE, || state(site, "10.78.0.2", "out0") == "REACHABLE");
}

fn play(site: &Site, count: u64) {
    Source::play(site.source(), Stream { count, rate: 10_000, ..Stream::to(GROUP) });
}

/// What a move between datapaths left between them.
fn lost_between(relay: &Relay<'_>) -> u64 {
    let interfaces = relay.stats().interfaces;
    let between = interfaces.iter().find(|row| row.datapath == "af-packet");
    let between = between.map_or(0, |row| row.verdicts["no_worker"] + row.verdicts["not_redirected"]);
    interfaces.iter().map(tests::relay::lost).sum::<u64>() + between
}

#[track_caller]
fn assert_none_twice(datagrams: &[Captured]) {
    let mut numbers: Vec<_> = datagrams.iter().map(Captured::sequence).collect();
    numbers.sort_unstable();
    assert!(numbers.windows(2).all(|pair| pair[0] < pair[1]), "a datagram came twice");
}

/// Of what an output got it sent all but what was `unreachable`; answers that.
#[track_caller]
fn unreachable(output: &OutputStats) -> u64 {
    let unreachable = output.dropped.get("unreachable").copied().unwrap_or(0);
    assert_eq!(output.dropped.values().sum::<u64>(), unreachable, "{output:?}");
    assert_eq!(output.received, output.sent + unreachable, "{output:?}");
    unreachable
}

#[test]
fn a_host_that_is_known_is_sent_to_without_a_worker_from_the_start() {
    let site = site();
    let _listener = listen(&site, 0, HOST);
    greet(&site);
    let relay = Relay::start(&site);
    for (args, redirected) in [(&BY_NAME[..], 20_000), (&[], 40_000)] {
        let rule = relay.add_with("cam1", INPUT, &[TO_HOST, TO_GROUP], args);
        assert_eq!(rule.datapath.as_deref(), Some("redirect"), "{rule:?}");
        site.segments[0].wait_until_joined(*GROUP.ip());
        let mut sink = site.capture(0);
        play(&site, 20_000);
        let stats = relay.balanced("cam1", 20_000);
        for output in &stats.outputs {
            assert_eq!((output.sent, output.sent_bytes), (20_000, 20_000 * 1316), "{output:?}");
            assert_eq!(unreachable(output), 0);
        }
        let seen = sink.exactly(HOST, 20_000);
        assert_sequence(&seen, 0..20_000);
        let sinks = mac(&site.sinks[0].host, ETH);
        assert!(seen.iter().all(|one| one.destination_mac == sinks && one.checksum_holds && one.ttl == 16));
        assert_sequence(&sink.exactly(TO, 20_000), 0..20_000);
        assert_eq!(relay.interface("in0").verdicts["redirected"], redirected);
        assert!(relay.workers().is_empty() && relay.stats().alarms.is_empty());
        relay.remove("cam1");
    }
}

#[test]
fn a_host_that_is_not_known_yet_is_sent_to_by_a_worker_until_it_is() {
    let site = site();
    site.sinks[0].host.ip(&["link set eth0 arp off"]);
    let relay = Relay::start(&site);
    let rule = relay.add("cam1", INPUT, &[TO_HOST, TO_GROUP]);
    let why = "not redirect: 10.78.0.2 has no neighbour yet on out0";
    assert_eq!(rule.datapath.as_deref(), Some("af-xdp"), "{rule:?}");
    assert!(rule.datapath_why.contains(why), "{rule:?}");
    let shown = relay.cli(&["rule", "show", "cam1"]).ok().to_owned();
    assert!(shown.split_whitespace().collect::<Vec<_>>().join(" ").contains(why), "{shown}");
    site.sinks[0].host.ip(&["link set eth0 arp on"]);
    relay.wait_until_by("cam1", "redirect");
    site.segments[0].wait_until_joined(*GROUP.ip());
    let _listener = listen(&site, 0, HOST);
    let mut sink = site.capture(0);
    play(&site, 10_000);
    let stats = relay.balanced("cam1", 10_000);
    assert!(stats.outputs.iter().all(|output| output.sent == 10_000), "{stats:?}");
    assert_sequence(&sink.exactly(HOST, 10_000), 0..10_000);
    assert_sequence(&sink.exactly(TO, 10_000), 0..10_000);
    assert_eq!(relay.interface("in0").verdicts["redirected"], 10_000);
}

#[test]
fn a_rule_that_begins_under_a_stream_moves_to_the_kernel_and_nothing_comes_twice() {
    let site = site();
    let _listener = listen(&site, 0, HOST);
    let relay = Relay::start(&site);
    let mut sink = site.capture(0);
    let source = Source::start(site.source(), Stream { rate: 10_000, ..Stream::to(GROUP) });
    relay.add("cam1", INPUT, &[TO_HOST, TO_GROUP]);
    relay.wait_until_by("cam1", "redirect");
    source.wait_for_more(5_000);
    source.stop();
    let matched = wait_for("the ledger balances", PATIENCE, || {
        let stats = relay.rule("cam1");
        let dropped = stats.dropped.values().sum::<u64>();
        (stats.matched == stats.received + dropped + lost_between(&relay)).then_some(stats.matched)
    });
    let stats = relay.balanced("cam1", matched);
    assert_eq!(lost_between(&relay), 0, "of {matched}");
    for (output, to) in stats.outputs.iter().zip([HOST, TO]) {
        assert_eq!((output.sent, unreachable(output)), (matched, 0));
        let seen = sink.exactly(to, matched as usize);
        assert_none_twice(&seen);
    }
}

/// A stream to a host and to a group on one interface. The host goes, is found out in time, and comes back: the group
/// misses nothing, and of the host's each is on the wire or is `unreachable`.
fn check_lost_and_found(args: &[&str], meanwhile: &str, most_between: u64) {
    let site = site();
    let _listener = listen(&site, 0, SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 6000));
    let patience = doubt_soon(&site);
    let relay = Relay::start(&site);
    relay.add_with("cam1", INPUT, &[TO_HOST, TO_GROUP], args);
    relay.wait_until_by("cam1", "redirect");
    site.segments[0].wait_until_joined(*GROUP.ip());
    let mut sink = site.capture(0);
    let source = Source::start(site.source(), Stream { rate: RATE, ..Stream::to(GROUP) });
    source.wait_for_more(1_000);
    site.sinks[0].host.ip(&["addr del 10.78.0.2/24 dev eth0"]);
    let gone = Instant::now();
    wait_until("it is found out", patience, || {
        sink.all();
        let output = relay.show("cam1").outputs.remove(0);
        output.health == Health::Pending && output.reason.as_deref() == Some(SILENT)
    });
    println!("found out after {:?} of at most {patience:?}", gone.elapsed());
    let rule = relay.wait_until_by("cam1", meanwhile);
    assert_eq!((rule.outputs[1].health, rule.health), (Health::Active, Health::Pending), "{rule:?}");
    let unreachable_now = || unreachable(&relay.rule("cam1").outputs[0]);
    let before = unreachable_now();
    source.wait_for_more(2_000);
    wait_until("what comes meanwhile is unreachable", PATIENCE, || unreachable_now() >= before + 2_000);
    site.sinks[0].host.ip(&["addr add 10.78.0.2/24 dev eth0"]);
    relay.wait_until_by("cam1", "redirect");
    relay.wait_until_active("cam1");
    source.wait_for_more(2_000);
    let sent = source.stop();
    let stats = relay.balanced("cam1", sent);
    let between = lost_between(&relay);
    assert!(between <= most_between, "{between} of {sent} between datapaths");
    let [host, group] = &stats.outputs[..] else { panic!("{stats:?}") };
    assert_eq!((group.sent, unreachable(group)), (sent - between, 0), "{stats:?}");
    let seen = sink.exactly(TO, group.sent as usize);
    assert_none_twice(&seen);
    assert!(host.sent > 3_000 && unreachable(host) >= 2_000, "{host:?}");
    // The frames to a host that has lost its address still reach its interface.
    assert_none_twice(&sink.exactly(HOST, host.sent as usize));
    assert!(relay.stats().alarms.is_empty());
    println!("{} sent, {} unreachable, {between} between datapaths", host.sent, unreachable(host));
}

#[test]
fn a_host_that_is_lost_under_a_stream_is_unreachable_by_name_until_it_is_found() {
    check_lost_and_found(&BY_NAME, "redirect", 0);
}

#[test]
fn a_rule_whose_host_is_lost_goes_to_a_worker_by_auto_and_comes_back() {
    check_lost_and_found(&[], "af-xdp", 20);
}

#[test]
fn a_host_whose_interface_is_down_is_found_out_and_found_again() {
    let site = site();
    let relay = Relay::start(&site);
    relay.add_with("cam1", INPUT, &[TO_HOST, "239.2.2.3:6000@out1"], &BY_NAME);
    relay.wait_until_active("cam1");
    site.segments[0].wait_until_joined(*GROUP.ip());
    let mut other = site.capture(1);
    play(&site, 1_000);
    relay.balanced("cam1", 1_000);
    site.sinks[0].host.ip(&["link set eth0 down"]);
    wait_until("the output waits", PATIENCE, || relay.show("cam1").outputs[0].health == Health::Pending);
    assert_eq!(relay.show("cam1").outputs[0].reason.as_deref(), Some("interface out0 is down"));
    play(&site, 1_000);
    // Its link is there again, and nobody answers yet.
    site.sinks[0].host.ip(&["link set eth0 arp off", "link set eth0 up"]);
    wait_until("its neighbour is asked for", PATIENCE, || {
        relay.show("cam1").outputs[0].reason.as_deref() == Some("10.78.0.2 has no neighbour yet on out0")
    });
    play(&site, 1_000);
    site.sinks[0].host.ip(&["link set eth0 arp on"]);
    relay.wait_until_active("cam1");
    let mut sink = site.capture(0);
    play(&site, 1_000);
    let stats = relay.balanced("cam1", 4_000);
    let expected = [("pending".to_owned(), 1_000), ("unreachable".to_owned(), 1_000)].into();
    assert_eq!((stats.outputs[0].sent, &stats.outputs[0].dropped), (2_000, &expected));
    assert_sequence(&sink.exactly(HOST, 1_000), 0..1_000);
    assert_eq!(other.exactly("239.2.2.3:6000".parse().unwrap(), 4_000).len() as u64, stats.outputs[1].sent);
}

#[test]
fn entries_that_are_flushed_or_grow_old_move_no_rule() {
    let site = site();
    let _listener = listen(&site, 0, HOST);
    doubt_soon(&site);
    // Set by hand for good, beside one that is learnt.
    site.relay.ip(&["neigh add 10.78.1.2 lladdr 02:00:00:00:00:77 dev out1 nud permanent"]);
    let relay = Relay::start(&site);
    relay.add_with("cam1", INPUT, &[TO_HOST, "10.78.1.2:6000@out1"], &BY_NAME);
    relay.wait_until_active("cam1");
    // From here on nobody named it: it would move.
    relay.set("cam1", &["--datapath", "auto"]);
    site.segments[0].wait_until_joined(*GROUP.ip());
    let mut sinks = [site.capture(0), site.capture(1)];
    let source = Source::start(site.source(), Stream { rate: RATE, ..Stream::to(GROUP) });
    let mut seen = Vec::new();
    wait_until("the kernel doubts and asks it, twice", Duration::from_secs(30), || {
        for sink in &mut sinks {
            sink.all();
        }
        let now = state(&site, "10.78.0.2", "out0");
        if seen.last() != Some(&now) {
            seen.push(now);
        }
        seen.iter().filter(|state| *state == "REACHABLE").count() >= 3
    });
    for _ in 0..3 {
        site.relay.ip(&["neigh flush dev out0"]);
        wait_until("it is known again", PATIENCE, || state(&site, "10.78.0.2", "out0") == "REACHABLE");
        source.wait_for_more(2_000);
    }
    let sent = source.stop();
    let stats = relay.balanced("cam1", sent);
    assert!(stats.outputs.iter().all(|output| output.sent == sent && output.dropped.is_empty()), "{stats:?}");
    assert_sequence(&sinks[0].exactly(HOST, sent as usize), 0..sent);
    let other = sinks[1].exactly("10.78.1.2:6000".parse().unwrap(), sent as usize);
    assert!(other.iter().all(|one| one.destination_mac == [2, 0, 0, 0, 0, 0x77]));
    assert_eq!(state(&site, "10.78.1.2", "out1"), "PERMANENT", "nobody has taken it for one that was learnt");
    assert!(relay.workers().is_empty(), "no worker was ever needed; the states were {seen:?}");
    println!("states: {seen:?}");
}

/// A host gets another MAC under a stream: the frames follow it, each datagram is on the wire once, and the ledger
/// balances. Answers how many still had the former.
fn check_other_mac(site: &Site, patience: Duration, most_between: u64) -> u64 {
    let _listener = listen(site, 0, HOST);
    let relay = Relay::start(site);
    relay.add("cam1", INPUT, &[TO_HOST, TO_GROUP]);
    relay.wait_until_by("cam1", "redirect");
    site.segments[0].wait_until_joined(*GROUP.ip());
    let former = mac(&site.sinks[0].host, ETH);
    let new: Mac = [2, 0, 0, 0, 0x78, 2];
    let mut sink = site.capture(0);
    let source = Source::start(site.source(), Stream { rate: RATE, ..Stream::to(GROUP) });
    source.wait_for_more(1_000);
    site.sinks[0].host.ip(&["link set eth0 address 02:00:00:00:78:02"]);
    let changed = source.sent();
    wait_until("frames follow the new MAC", patience, || {
        sink.to(HOST).last().is_some_and(|last| last.destination_mac == new)
    });
    relay.wait_until_by("cam1", "redirect");
    source.wait_for_more(2_000);
    let sent = source.stop();
    let stats = relay.balanced("cam1", sent);
    let between = lost_between(&relay);
    assert!(between <= most_between, "{between} of {sent} between datapaths");
    let [host, group] = &stats.outputs[..] else { panic!("{stats:?}") };
    assert_eq!((group.sent, unreachable(group)), (sent - between, 0), "{stats:?}");
    assert_eq!(host.sent + unreachable(host), sent - between, "{stats:?}");
    assert_none_twice(&sink.exactly(TO, group.sent as usize));
    let seen = sink.exactly(HOST, host.sent as usize);
    assert_none_twice(&seen);
    let turn = seen.iter().position(|one| one.destination_mac == new).unwrap();
    assert!(seen[..turn].iter().all(|one| one.destination_mac == former), "before it has the new one");
    assert!(seen[turn..].iter().all(|one| one.destination_mac == new), "and none after has the former");
    let late = seen[..turn].iter().filter(|one| one.sequence() >= changed).count() as u64;
    println!("{late} of {sent} to the former MAC, {} unreachable, {between} between", unreachable(host));
    if most_between == 0 {
        assert!(relay.workers().is_empty(), "no worker was ever needed");
        assert_eq!(unreachable(host), 0);
    }
    late
}

#[test]
fn frames_follow_a_mac_that_is_announced() {
    let site = site();
    site.sinks[0].host.sysctl("ipv4/conf/eth0/arp_notify", "1");
    greet(&site);
    // Looked at four times a second: no more than half a second's, on a busy machine too.
    let late = check_other_mac(&site, Duration::from_secs(2), 0);
    assert!(late <= RATE / 2, "{late}");
}

#[test]
fn frames_follow_a_mac_that_is_not_announced_once_the_former_no_longer_answers() {
    let site = site();
    let patience = doubt_soon(&site);
    // Found out, then looked for anew within a second.
    let late = check_other_mac(&site, patience + Duration::from_secs(1), 20);
    assert!(late <= RATE * patience.as_secs(), "{late}");
}

#[test]
fn a_host_behind_a_router_is_sent_to_by_the_routers_mac() {
    let site = site();
    site.relay.ip(&[
        "route add 10.99.0.0/16 via 10.78.0.2 dev out0",
        "neigh add 10.78.0.3 lladdr 02:00:00:00:78:03 dev out0 nud permanent",
    ]);
    let relay = Relay::start(&site);
    relay.add("cam1", INPUT, &["10.99.1.1:6000@out0,ttl=dec"]);
    relay.wait_until_by("cam1", "redirect");
    site.segments[0].wait_until_joined(*GROUP.ip());
    let to = "10.99.1.1:6000".parse().unwrap();
    let mut sink = site.capture(0);
    let source = Source::start(site.source(), Stream { rate: 10_000, ..Stream::to(GROUP) });
    source.wait_for_more(5_000);
    // Another router, which is known, takes over without a loss.
    site.relay.ip(&["route replace 10.99.0.0/16 via 10.78.0.3 dev out0"]);
    let last = |sink: &mut tests::Capture| sink.to(to).last().map(|one| one.destination_mac);
    wait_until("frames go to the other router", PATIENCE, || last(&mut sink) == Some([2, 0, 0, 0, 0x78, 3]));
    source.wait_for_more(2_000);
    let sent = source.stop();
    let stats = relay.balanced("cam1", sent);
    assert_eq!((stats.outputs[0].sent, unreachable(&stats.outputs[0])), (sent, 0));
    let seen = sink.exactly(to, sent as usize);
    assert_sequence(&seen, 0..sent);
    let first = seen[0].destination_mac;
    assert_eq!((first, seen[0].ttl), (mac(&site.sinks[0].host, ETH), 7));
    // A route that goes leaves the host itself to be asked for, which is not there.
    site.relay.ip(&["route del 10.99.0.0/16"]);
    wait_until("nobody answers", PATIENCE, || {
        let rule = relay.show("cam1");
        let why = "10.99.1.1 does not answer ARP on out0";
        rule.datapath.as_deref() == Some("af-xdp") && rule.outputs[0].reason.as_deref() == Some(why)
    });
}

#[test]
fn a_host_is_sent_to_while_there_is_no_daemon_and_by_the_next() {
    let site = site();
    let _listener = listen(&site, 0, HOST);
    greet(&site);
    let mut relay = Relay::start(&site);
    relay.add("cam1", INPUT, &[TO_HOST, TO_GROUP]);
    relay.wait_until_by("cam1", "redirect");
    site.segments[0].wait_until_joined(*GROUP.ip());
    let mut sink = site.capture(0);
    let source = Source::start(site.source(), Stream { rate: RATE, ..Stream::to(GROUP) });
    source.wait_for_more(1_000);
    relay.signal(Signal::SIGKILL);
    relay.wait(PATIENCE);
    source.wait_for_more(1_000);
    relay.start_again(&site);
    relay.wait_until_active("cam1");
    source.wait_for_more(1_000);
    let sent = source.stop();
    let stats = relay.balanced("cam1", sent);
    assert!(stats.outputs.iter().all(|output| output.sent == sent && output.dropped.is_empty()), "{stats:?}");
    assert_sequence(&sink.exactly(HOST, sent as usize), 0..sent);
    assert_sequence(&sink.exactly(TO, sent as usize), 0..sent);
    assert!(relay.workers().is_empty());
}

#[test]
fn hosts_and_groups_on_one_interface_each_get_their_own() {
    let site = site();
    site.sinks[0].host.ip(&["addr add 10.78.0.3/24 dev eth0"]);
    // `auto` would leave five outputs of one device to workers.
    let relay = Relay::start_with(&site, &["--datapath", "redirect"]);
    let outputs = [
        "10.78.0.2:6000@out0",
        "239.2.2.2:6000@out0,ttl=3",
        "10.78.0.3:6000@out0,dscp=46",
        "10.78.1.2:6000@out1",
        "10.78.0.2:6001@out0,from=10.78.0.1:7777",
        "239.2.2.3:6000@out1",
        "239.2.2.3:6000@out0",
    ];
    relay.add("cam1", INPUT, &outputs);
    relay.wait_until_by("cam1", "redirect");
    site.segments[0].wait_until_joined(*GROUP.ip());
    let mut sinks = [site.capture(0), site.capture(1)];
    play(&site, 5_000);
    let stats = relay.balanced("cam1", 5_000);
    for (output, counted) in outputs.iter().zip(&stats.outputs) {
        assert_eq!((counted.sent, unreachable(counted)), (5_000, 0), "{output}");
        let (to, rest) = output.split_once("@out").unwrap();
        let sink: usize = rest[..1].parse().unwrap();
        let seen = sinks[sink].exactly(to.parse().unwrap(), 5_000);
        assert_sequence(&seen, 0..5_000);
        let destination: SocketAddrV4 = to.parse().unwrap();
        let expected = if destination.ip().is_multicast() {
            tests::frame::multicast_mac(*destination.ip())
        } else {
            mac(&site.sinks[sink].host, ETH)
        };
        assert!(seen.iter().all(|one| one.destination_mac == expected && one.checksum_holds), "{output}");
    }
    assert_eq!(relay.interface("in0").verdicts["redirected"], 5_000);
}
