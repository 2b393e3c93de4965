//! Rules that the kernel serves by itself: added, changed, moved and counted by the daemon.

#![expect(clippy::unwrap_used, reason = "where it fails, the test fails and says where")]

use std::net::{Ipv4Addr, SocketAddrV4};

use mcr::api::wire::Health;
use tests::{
    Ground, Relay, Site, Source,
    capture::assert_sequence,
    site::{ETH, Plan},
    source::Stream,
    wait::PATIENCE,
    wait_until,
};

const GROUP: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(239, 1, 1, 1), 5000);
const TO: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(239, 2, 2, 2), 6000);

/// A site whose sinks take redirected frames.
fn site() -> Site {
    Site::build(Plan { ground: Ground::Kernel, ..Plan::default() })
}

/// A veth takes redirected frames while its other end has GRO.
fn gro(site: &Site, interface: &str, on: &str) {
    let sink = site.sinks.iter().find(|sink| sink.interface == interface).unwrap();
    sink.host.output("ethtool", &["-K", ETH, "gro", on]);
}

const BY_NAME: [&str; 2] = ["--datapath", "redirect"];

#[test]
fn a_rule_is_served_without_a_worker_and_counted() {
    let site = site();
    let relay = Relay::start(&site);
    let outputs = ["239.2.2.2:6000@out0", "239.2.2.3:6000@out1,ttl=dec", "239.2.2.4:6000@out0,dscp=46"];
    let rule = relay.add_with("cam1", "239.1.1.1:5000@in0", &outputs, &BY_NAME);
    assert_eq!(rule.datapath.as_deref(), Some("redirect"), "{rule:?}");
    assert!(relay.workers().is_empty(), "nobody has to do it");
    site.segments[0].wait_until_joined(*GROUP.ip());
    let mut sinks = [site.capture(0), site.capture(1)];
    Source::play(site.source(), Stream { count: 20_000, rate: 10_000, ..Stream::to(GROUP) });
    for (sink, to) in [(0, "239.2.2.2:6000"), (1, "239.2.2.3:6000"), (0, "239.2.2.4:6000")] {
        assert_sequence(&sinks[sink].exactly(to.parse().unwrap(), 20_000), 0..20_000);
    }
    let stats = relay.balanced("cam1", 20_000);
    assert_eq!((stats.received, stats.received_bytes), (20_000, 20_000 * 1316));
    assert!(stats.last_seen.is_some() && stats.dropped.is_empty(), "{stats:?}");
    for output in &stats.outputs {
        assert_eq!((output.received, output.sent, output.sent_bytes), (20_000, 20_000, 20_000 * 1316));
        assert!(output.dropped.is_empty(), "{output:?}");
    }
    assert!(relay.stats().alarms.is_empty());
    relay.remove("cam1");
    site.segments[0].wait_until_left(*GROUP.ip());
}

#[test]
fn a_rule_moves_between_all_datapaths_and_nothing_comes_twice() {
    let site = site();
    let relay = Relay::start(&site);
    relay.add("cam1", "239.1.1.1:5000@in0", &["239.2.2.2:6000@out0"]);
    site.segments[0].wait_until_joined(*GROUP.ip());
    let mut sink = site.capture(0);
    let source = Source::start(site.source(), Stream { rate: 10_000, ..Stream::to(GROUP) });
    for datapath in ["redirect", "af-xdp", "redirect", "af-packet", "redirect", "af-xdp"] {
        source.wait_for_more(2_000);
        relay.set("cam1", &["--datapath", datapath]);
        assert_eq!(relay.wait_until_active("cam1").datapath.as_deref(), Some(datapath));
    }
    source.wait_for_more(2_000);
    let sent = source.stop();
    let lost = || {
        let interfaces = relay.stats().interfaces;
        let between = interfaces
            .iter()
            .find(|row| row.datapath == "af-packet")
            .map(|row| row.verdicts["no_worker"] + row.verdicts["not_redirected"]);
        interfaces.iter().map(tests::relay::lost).sum::<u64>() + between.unwrap_or(0)
    };
    wait_until("every datagram has arrived or is accounted for", PATIENCE, || {
        sink.count(TO) as u64 + lost() == sent
    });
    let mut numbers: Vec<_> = sink.to(TO).iter().map(tests::Captured::sequence).collect();
    numbers.sort_unstable();
    assert!(numbers.windows(2).all(|pair| pair[0] < pair[1]), "a datagram came twice");
    println!("of {sent}, {} between two datapaths", lost());
}

#[test]
fn what_the_kernel_cannot_do_by_itself_is_refused_by_name() {
    let site = site();
    let relay = Relay::start(&site);
    gro(&site, "out1", "off");
    for (output, why) in [
        ("10.78.0.1:6000@out0", "10.78.0.1 has no neighbour on out0: it is this host"),
        ("10.78.0.255:6000@out0", "10.78.0.255 is a broadcast address on out0"),
        ("239.2.2.2:6000@out0,loop=true", "loop=true"),
        ("239.2.2.2:6000@out1", "out1 (veth) takes no redirected frames"),
    ] {
        let call = ["rule", "add", "cam1", "--in", "239.1.1.1:5000@in0", "--out", output];
        let answer = relay.cli(&[&call[..], &BY_NAME].concat());
        assert!(answer.refused(1).contains(why), "{answer}");
    }
    assert!(relay.show_all().is_empty());
}

#[test]
fn a_move_that_is_refused_costs_the_stream_nothing() {
    let site = site();
    let relay = Relay::start(&site);
    for sink in ["out0", "out1"] {
        gro(&site, sink, "off");
    }
    relay.add_with("cam1", "239.1.1.1:5000@in0", &["239.2.2.2:6000@out0"], &["--datapath", "af-xdp"]);
    site.segments[0].wait_until_joined(*GROUP.ip());
    let mut sink = site.capture(0);
    let source = Source::start(site.source(), Stream { rate: 5_000, ..Stream::to(GROUP) });
    for outputs in [&[][..], &["--add-out", "239.2.2.3:6000@out1,loop=true"]] {
        source.wait_for_more(500);
        let answer = relay.cli(&[&["rule", "set", "cam1"][..], outputs, &BY_NAME].concat());
        assert!(answer.refused(1).contains("the kernel cannot send it on by itself"), "{answer}");
    }
    source.wait_for_more(500);
    let sent = source.stop();
    assert_eq!(relay.show("cam1").datapath.as_deref(), Some("af-xdp"));
    assert_eq!(relay.balanced("cam1", sent).outputs[0].sent, sent);
    assert_sequence(&sink.exactly(TO, sent as usize), 0..sent);
}

#[test]
fn an_output_that_is_pending_is_counted_so_and_comes_back() {
    let site = site();
    let relay = Relay::start(&site);
    relay.add_with("cam1", "239.1.1.1:5000@in0", &["239.2.2.2:6000@out0", "239.2.2.3:6000@out1"], &BY_NAME);
    site.segments[0].wait_until_joined(*GROUP.ip());
    let (mut sink, mut other) = (site.capture(0), site.capture(1));
    let play = |count| Source::play(site.source(), Stream { count, ..Stream::to(GROUP) });
    play(100);
    relay.balanced("cam1", 100);
    site.relay.ip(&["link set out1 down"]);
    wait_until("the output waits", PATIENCE, || relay.show("cam1").outputs[1].health == Health::Pending);
    play(200);
    let stats = relay.balanced("cam1", 300);
    assert_eq!((stats.outputs[0].sent, stats.outputs[1].sent), (300, 100), "{stats:?}");
    assert_eq!(stats.outputs[1].dropped, [("pending".to_owned(), 200)].into());
    site.relay.ip(&["link set out1 up"]);
    relay.wait_until_active("cam1");
    play(300);
    let stats = relay.balanced("cam1", 600);
    assert_eq!((stats.outputs[0].sent, stats.outputs[1].sent), (600, 400), "{stats:?}");
    sink.exactly(TO, 600);
    other.exactly("239.2.2.3:6000".parse().unwrap(), 400);
    // An address and a MTU that change are written into what is sent.
    site.relay.ip(&["addr flush dev out0", "addr add 10.78.0.77/24 dev out0"]);
    wait_until("the new address is used", PATIENCE, || {
        play(1);
        let seen = sink.to(TO);
        seen.last().is_some_and(|last| *last.source.ip() == Ipv4Addr::new(10, 78, 0, 77))
    });
}

#[test]
fn rules_and_outputs_that_change_leave_the_others_alone() {
    let site = site();
    let relay = Relay::start_with(&site, &BY_NAME);
    relay.add_with("steady", "239.1.1.1:5000@in0", &["239.2.2.2:6000@out0"], &BY_NAME);
    site.segments[0].wait_until_joined(*GROUP.ip());
    let mut sink = site.capture(0);
    let source = Source::start(site.source(), Stream { rate: 10_000, ..Stream::to(GROUP) });
    for round in 0..5 {
        relay.add_with("churn", &format!("239.3.1.{round}:5000@in0"), &["239.4.1.1:6000@out1"], &BY_NAME);
        relay.set("churn", &["--add-out", "239.4.1.2:6000@out0"]);
        relay.set("churn", &["--del-out", "239.4.1.1:6000@out1"]);
        relay.set("steady", &["--add-out", "239.2.2.9:6000@out1"]);
        relay.set("steady", &["--del-out", "239.2.2.9:6000@out1"]);
        relay.remove("churn");
        source.wait_for_more(500);
    }
    let sent = source.stop();
    assert_eq!(relay.balanced("steady", sent).outputs[0].sent, sent);
    assert_sequence(&sink.exactly(TO, sent as usize), 0..sent);
    assert!(relay.workers().is_empty());
}
