//! Which datapath serves a rule, why, and what happens when it changes.

#![expect(clippy::unwrap_used, reason = "where it fails, the test fails and says where")]

use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};

use mcr::api::wire::{Health, RuleShow};
use tests::{
    Captured, Generator, Ground, RawSender, Receiver, Relay, Site, Source, Udp,
    bpf::ForeignXdp,
    capture::assert_sequence,
    site::{ETH, Membership, Plan},
    source::Stream,
    traffic::Counts,
    wait_until,
};

const GROUP: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(239, 1, 1, 1), 5000);
const TO: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(239, 2, 2, 2), 6000);
const ADD: [&str; 7] = ["rule", "add", "cam1", "--in", "239.1.1.1:5000@in0", "--out", "239.2.2.2:6000@out0"];

fn on(ground: Ground) -> Site {
    Site::build(Plan { ground, ..Plan::default() })
}

/// Relays 2,000 datagrams of the site's source by the rule `cam1`, exactly.
fn check_relays(site: &Site, relay: &Relay) {
    site.segments[0].wait_until_joined(*GROUP.ip());
    let before = relay.rule("cam1").matched;
    let mut sink = site.capture(0);
    Source::play(site.source(), Stream { count: 2_000, ..Stream::to(GROUP) });
    relay.balanced("cam1", before + 2_000);
    assert_sequence(&sink.exactly(TO, 2_000), 0..2_000);
}

/// `auto` serves `cam1` by AF_PACKET for a reason that names all of `words`, says it once, and AF_XDP by
/// name is refused for the same reason.
fn check_falls_back(site: &Site, relay: &Relay, words: &[&str]) {
    let named = relay.cli(&[&ADD[..], &["--datapath", "af-xdp"]].concat());
    for word in words {
        assert!(named.refused(1).contains(word), "no '{word}' in {named}");
    }
    assert!(relay.show_all().is_empty());
    relay.cli(&ADD).ok();
    let rule = relay.wait_until_active("cam1");
    assert_eq!((rule.datapath.as_deref(), rule.datapath_asked.as_str()), (Some("af-packet"), "auto"));
    relay.cli(&["rule", "add", "--in", "239.1.1.9:5000@in0", "--out", "239.2.2.9:6000@out0"]).ok();
    let worker = relay.workers().remove(0);
    let shown = relay.cli(&["rule", "show", "cam1"]).ok().to_owned() + relay.cli(&["workers"]).ok();
    for word in words {
        assert!(rule.datapath_why.contains(word), "no '{word}' in {rule:?}");
        assert!(worker.why.contains(word), "no '{word}' in {worker:?}");
        assert!(
            shown.split_whitespace().collect::<Vec<_>>().join(" ").contains(word),
            "no '{word}' in {shown}"
        );
    }
    assert!(rule.datapath_why.contains("see the rule's datagrams"), "{rule:?}");
    let log = relay.log();
    let warned = log.lines().filter(|line| line.contains("WARN") && line.contains("af-packet"));
    assert_eq!(warned.count(), 1, "one warning:\n{log}");
    check_relays(site, relay);
}

#[test]
fn auto_takes_af_packet_on_a_bridge() {
    let site = on(Ground::Bridge);
    check_falls_back(&site, &Relay::start(&site), &["in0 (bridge) has no native XDP"]);
}

#[test]
fn auto_takes_af_packet_on_a_macvlan() {
    let site = on(Ground::Macvlan);
    check_falls_back(&site, &Relay::start(&site), &["in0 (macvlan) has no native XDP"]);
}

#[test]
fn auto_takes_af_packet_where_the_slot_is_taken_and_af_xdp_when_it_is_free() {
    let site = on(Ground::Veth);
    let foreign = ForeignXdp::attach(&site.relay, "in0");
    let relay = Relay::start(&site);
    check_falls_back(
        &site,
        &relay,
        &["another XDP program", &format!("bpftool prog show id {}", foreign.id)],
    );
    drop(foreign);
    wait_until("the rule moves", tests::wait::PATIENCE, || {
        relay.show("cam1").datapath.as_deref() == Some("af-xdp")
    });
    relay.wait_until_active("cam1");
    check_relays(&site, &relay);
}

#[test]
fn auto_takes_af_packet_where_the_mtu_is_too_large() {
    let site = on(Ground::Veth);
    site.relay.ip(&["link set in0 mtu 9000"]);
    check_falls_back(&site, &Relay::start(&site), &["MTU 9000"]);
}

#[test]
fn auto_takes_af_packet_where_queues_are_too_few() {
    // A veth needs as many RX queues as its peer has TX queues.
    let site = Site::build(Plan { queues: 2, ..Plan::default() });
    site.relay.output("ethtool", &["-L", "in0", "rx", "1"]);
    check_falls_back(&site, &Relay::start(&site), &["RX queues"]);
}

#[test]
fn generic_xdp_is_taken_only_when_it_is_asked_for() {
    let site = on(Ground::Bridge);
    let relay = Relay::start_with(&site, &["--generic-xdp"]);
    relay.cli(&ADD).ok();
    let rule = relay.wait_until_active("cam1");
    assert_eq!(rule.datapath.as_deref(), Some("af-xdp"));
    assert!(rule.datapath_why.contains("generic XDP"), "{rule:?}");
    let shown = site.relay.json("ip", &["-j", "-d", "link", "show", "in0"]);
    assert_eq!(shown[0]["xdp"]["mode"], 2, "{shown}");
    check_relays(&site, &relay);
}

#[test]
fn rules_of_both_datapaths_on_one_interface_are_each_exact() {
    let site = on(Ground::Veth);
    let relay = Relay::start(&site);
    relay.add_with("fast", "239.1.1.1:5000@in0", &["239.2.2.1:6000@out0"], &["--datapath", "af-xdp"]);
    relay.add_with("plain", "239.1.1.2:5000@in0", &["239.2.2.2:6000@out0"], &["--datapath", "af-packet"]);
    let datapaths = ["fast", "plain"].map(|name| relay.show(name).datapath.unwrap());
    assert_eq!(datapaths, ["af-xdp", "af-packet"]);
    // A program of the host's own hears what AF_PACKET serves, and nothing of what AF_XDP does.
    let hosts: Vec<_> = ["239.1.1.1", "239.1.1.2"]
        .iter()
        .map(|group| {
            let socket = site.relay.run(|| UdpSocket::bind((*group, 5000))).expect("bind");
            socket.set_nonblocking(true).expect("non-blocking");
            (socket, Membership::join(&site.relay, "in0", group.parse().unwrap()))
        })
        .collect();
    for group in ["239.1.1.1", "239.1.1.2"] {
        site.segments[0].wait_until_joined(group.parse().unwrap());
    }
    let mut sink = site.capture(0);
    let args = ["--streams", "2", "--rate", "5000", "--size", "1316", "--count", "10000"];
    let sent = Generator::start(site.source(), &format!("239.1.1.1:5000@{ETH}"), &args).finish();
    assert_eq!(sent.count(), 20_000);
    for (name, to) in [("fast", "239.2.2.1:6000"), ("plain", "239.2.2.2:6000")] {
        let stats = relay.balanced(name, 10_000);
        assert_eq!((stats.received, stats.outputs[0].sent), (10_000, 10_000), "{stats:?}");
        sink.exactly(to.parse().unwrap(), 10_000);
    }
    // Each frame was taken in once, by the one or the other.
    let interfaces = relay.stats().interfaces;
    let received: Vec<_> = interfaces.iter().map(|i| (i.datapath.as_str(), i.received)).collect();
    assert_eq!(received, [("af-xdp", 10_000), ("af-packet", 10_000)]);
    assert_eq!(interfaces[0].verdicts["af_packet"], 10_000, "passed to the filter");
    let heard = |socket: &UdpSocket| std::iter::from_fn(|| socket.recv(&mut [0; 2048]).ok()).count();
    assert_eq!(heard(&hosts[0].0), 0);
    assert!(heard(&hosts[1].0) > 0);
}

#[test]
fn a_rule_moves_between_datapaths_and_nothing_comes_twice() {
    let site = on(Ground::Veth);
    let relay = Relay::start(&site);
    relay.add("cam1", "239.1.1.1:5000@in0", &["239.2.2.2:6000@out0"]);
    site.segments[0].wait_until_joined(*GROUP.ip());
    let mut sink = site.capture(0);
    let source = Source::start(site.source(), Stream { rate: 10_000, ..Stream::to(GROUP) });
    for datapath in ["af-packet", "af-xdp", "af-packet", "auto"] {
        source.wait_for_more(2_000);
        relay.set("cam1", &["--datapath", datapath]);
        let expected = if datapath == "auto" { "af-xdp" } else { datapath };
        assert_eq!(relay.wait_until_active("cam1").datapath.as_deref(), Some(expected));
    }
    source.wait_for_more(2_000);
    let sent = source.stop();
    // What was on its way to the workers of the old datapath when they had let go of the rule is counted.
    // One that was passed to the filter when its flow changed is neither's: the filter says so.
    let lost = || {
        let interfaces = relay.stats().interfaces;
        let between =
            interfaces.iter().find(|row| row.datapath == "af-packet").map(|row| row.verdicts["no_worker"]);
        interfaces.iter().map(tests::relay::lost).sum::<u64>() + between.unwrap_or(0)
    };
    wait_until("every datagram has arrived or is accounted for", tests::wait::PATIENCE, || {
        sink.count(TO) as u64 + lost() == sent
    });
    let mut numbers: Vec<_> = sink.to(TO).iter().map(Captured::sequence).collect();
    numbers.sort_unstable();
    assert!(numbers.windows(2).all(|pair| pair[0] < pair[1]), "a datagram came twice");
}

#[test]
fn a_datapath_that_is_named_is_taken_or_refused() {
    let site = on(Ground::Bridge);
    let relay = Relay::start_with(&site, &["--datapath", "af-xdp"]);
    let answer = relay.cli(&ADD);
    assert!(answer.refused(1).contains("no native XDP"), "{answer}");
    // What the daemon was told holds for rules that say nothing; a rule may say something else.
    relay.cli(&[&ADD[..], &["--datapath", "af-packet"]].concat()).ok();
    relay.wait_until_active("cam1");
    for (datapath, word) in [("redirect", "no native XDP"), ("af-xdp", "no native XDP")] {
        let answer = relay.cli(&["rule", "set", "cam1", "--datapath", datapath]);
        assert!(answer.refused(1).contains(word), "{answer}");
    }
    let rule = relay.json::<RuleShow>(&["rule", "show", "cam1"]).rule;
    assert_eq!((rule.datapath.as_deref(), rule.health), (Some("af-packet"), Health::Active));
    assert_eq!(rule.datapath_asked, "af-packet");
    check_relays(&site, &relay);
}

#[test]
fn another_number_of_queues_is_noticed() {
    let site = Site::build(Plan { queues: 4, ..Plan::default() });
    // The bridge's end sends by one queue, so that the relay's may have any number.
    site.segments[0].bridge.output("ethtool", &["-L", "relay", "tx", "1"]);
    site.relay.output("ethtool", &["-L", "in0", "rx", "2"]);
    let relay = Relay::start_with(&site, &["--workers", "2"]);
    relay.add("cam1", "239.1.1.1:5000@in0", &["239.2.2.2:6000@out0"]);
    let queues = || {
        let mut queues: Vec<_> = relay.workers().into_iter().flat_map(|worker| worker.queues).collect();
        queues.sort_unstable();
        queues
    };
    assert_eq!(queues(), [0, 1]);
    check_relays(&site, &relay);
    site.relay.output("ethtool", &["-L", "in0", "rx", "4"]);
    wait_until("the workers serve four queues", tests::wait::PATIENCE, || queues() == [0, 1, 2, 3]);
    relay.wait_until_active("cam1");
    check_relays(&site, &relay);
}

/// Datagrams of many kinds, relayed on a ground to outputs of many kinds: what arrives, by output.
fn on_the_wire(ground: Ground, outputs: &[&str]) -> Vec<Vec<Captured>> {
    let site = on(ground);
    let relay = Relay::start_with(&site, &["--source-port", "40404"]);
    relay.add("cam1", "239.1.1.1:5000@in0", outputs);
    site.segments[0].wait_until_joined(*GROUP.ip());
    let mut sinks: Vec<_> = (0..3).map(|sink| site.capture(sink)).collect();
    // While a host's address is being resolved, and where it refuses the port, datagrams may change places.
    let host = &site.sinks[2].host;
    let _listener = host.run(|| UdpSocket::bind("10.78.2.2:6005")).expect("bind");
    let mac = host.json("ip", &["-j", "link", "show", ETH])[0]["address"].clone();
    let mac = mac.as_str().expect("a MAC address");
    site.relay.ip(&[&format!("neigh replace 10.78.2.2 lladdr {mac} dev out2 nud permanent")]);
    let udp = Udp::new("10.77.0.2:40000".parse().unwrap(), GROUP);
    let sizes = [0usize, 1, 17, 100, 100, 100, 1316, 1316, 40, 1472, 1472, 3];
    let frames = (0..600u32).map(|n| {
        let payload = vec![n as u8; sizes[n as usize % sizes.len()]];
        udp.clone().ttl(2 + (n / 50) as u8).dscp((n / 100) as u8 * 8, n as u8 & 3).payload(&payload).frame()
    });
    relay.wait_until_by("cam1", ground.datapath());
    RawSender::new(site.source(), ETH).play(frames, 3_000);
    relay.balanced("cam1", 600);
    let seen = outputs.iter().map(|output| {
        let (to, rest) = output.split_once("@out").unwrap();
        let sink: usize = rest[..1].parse().unwrap();
        let seen = sinks[sink].exactly(to.parse().unwrap(), 600);
        // MAC addresses differ from run to run, and what never is a fragment may have any ID (RFC 6864).
        let same = |one| Captured { destination_mac: [0; 6], source_mac: [0; 6], id: 0, ..one };
        seen.into_iter().map(same).collect()
    });
    seen.collect()
}

#[test]
fn every_ground_puts_the_same_datagrams_on_the_wire() {
    let outputs = [
        "239.2.2.1:6001@out0",
        "239.2.2.2:6002@out0,ttl=copy,dscp=46",
        "239.2.2.3:6003@out1,ttl=dec,gso=false",
        "239.2.2.4:6004@out1,from=10.78.1.1:7777,dscp=copy",
        "10.78.2.2:6005@out2,ttl=3",
    ];
    let veth = on_the_wire(Ground::Veth, &outputs);
    for ground in [Ground::Kernel, Ground::PlainVeth, Ground::Bridge, Ground::Macvlan, Ground::WithoutBpf] {
        for (here, there) in on_the_wire(ground, &outputs).iter().zip(&veth) {
            let differs = here.iter().zip(there).position(|(here, there)| here != there);
            let differs = differs.map(|n| (n, &here[n], &there[n]));
            assert_eq!(differs, None, "{ground:?} against AF_XDP on a veth");
        }
    }
}

#[test]
fn a_fast_stream_by_af_packet_loses_nothing() {
    let site = on(Ground::PlainVeth);
    let relay = Relay::start(&site);
    relay.add("cam1", "239.1.1.1:5000@in0", &["239.2.2.2:6000@out0"]);
    site.segments[0].wait_until_joined(*GROUP.ip());
    let receiver = Receiver::start(&site.sinks[0].host, &format!("{TO}@{ETH}"), &[]);
    let args = ["--rate", "50000", "--size", "1316", "--count", "100000"];
    let sent = Generator::start(site.source(), &format!("{GROUP}@{ETH}"), &args).finish().count();
    let stats = relay.balanced("cam1", sent);
    assert_eq!((sent, stats.outputs[0].sent), (100_000, 100_000));
    assert_eq!(receiver.stop().counts(), Counts::exactly(100_000));
}
