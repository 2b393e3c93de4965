//! Who sends: sources that the relay host has no route to, and rules for one source of a group.

#![expect(clippy::unwrap_used, reason = "where it fails, the test fails and says where")]

use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};

use tests::{
    Capture, Generator, RawSender, Receiver, Relay, Site, Source, Udp,
    site::{ETH, Membership, Plan},
    source::Stream,
    traffic::Counts,
};

const GROUP: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(239, 1, 1, 1), 5000);

/// 10,000 datagrams from a source with this address, which strict reverse-path filtering keeps from the
/// relay host's own sockets, are relayed all the same.
fn check_relayed_from(address: &str) {
    let plan = Plan { source_address: Some(address.parse().expect("an address")), ..Plan::default() };
    let site = Site::build(plan);
    let relay = Relay::start(&site);

    // The premise: a listener on the relay host receives none of it.
    let host = site.relay.run(|| UdpSocket::bind(GROUP)).expect("bind the group");
    host.set_nonblocking(true).expect("non-blocking");
    let membership = Membership::join(&site.relay, "in0", *GROUP.ip());
    site.segments[0].wait_until_joined(*GROUP.ip());
    let mut arriving = Capture::start(&site.relay, "in0");
    Source::play(site.source(), Stream { count: 100, ..Stream::to(GROUP) });
    arriving.exactly(GROUP, 100);
    assert!(host.recv(&mut [0; 2048]).is_err(), "the host's own stack took it: this source has a route");
    drop((host, membership, arriving));

    relay.add("cam1", "239.1.1.1:5000@in0", &["239.2.2.2:6000@out0"]);
    site.segments[0].wait_until_joined(*GROUP.ip());
    let mut sink = site.capture(0);
    let receiver = Receiver::start(&site.sinks[0].host, &format!("239.2.2.2:6000@{ETH}"), &["--sha256"]);
    let args = ["--rate", "10000", "--size", "1316", "--count", "10000", "--sha256"];
    let sent = Generator::start(site.source(), &format!("239.1.1.1:5000@{ETH}"), &args).finish();
    assert_eq!(relay.balanced("cam1", 10_000).outputs[0].sent, 10_000);
    let seen = sink.exactly("239.2.2.2:6000".parse().expect("address:port"), 10_000);
    assert!(seen.iter().all(|datagram| *datagram.source.ip() == site.sinks[0].relay_address));
    let tally = receiver.stop();
    assert_eq!(tally.counts(), Counts::exactly(10_000));
    assert_eq!(tally.sha256(0), sent.sha256(0));
}

fn a_source_without_a_route_is_relayed() {
    check_relayed_from("198.51.100.7");
}

fn a_source_with_an_address_of_the_relay_is_relayed() {
    // That of out1, on another interface than the stream's.
    check_relayed_from("10.78.1.1");
}

fn a_rule_for_one_source_takes_it_from_the_rule_for_any() {
    let site = Site::default();
    let relay = Relay::start(&site);
    let sources = ["10.77.0.11", "10.77.0.12", "198.51.100.13"];
    // First, since a host that goes from one source to any is not served by a Linux bridge for a moment.
    relay.add("rest", "239.1.1.1:5000@in0", &["239.2.2.3:6000@out2"]);
    relay.add("first", "239.1.1.1:5000@in0,source=10.77.0.11", &["239.2.2.1:6000@out0"]);
    relay.add("second", "239.1.1.1:5000@in0,source=10.77.0.12", &["239.2.2.2:6000@out1"]);
    site.segments[0].wait_until_joined(*GROUP.ip());
    let mut sinks = [site.capture(0), site.capture(1), site.capture(2)];

    let datagram = |n: u64| {
        let source: Ipv4Addr = sources[n as usize % 3].parse().expect("an address");
        Udp::new(SocketAddrV4::new(source, 40_000), GROUP).payload(&n.to_be_bytes()).frame()
    };
    assert_eq!(RawSender::new(site.source(), ETH).play((0..6_000).map(datagram), 10_000), 6_000);

    for (n, (name, to)) in
        [("first", "239.2.2.1:6000"), ("second", "239.2.2.2:6000"), ("rest", "239.2.2.3:6000")]
            .iter()
            .enumerate()
    {
        assert_eq!(relay.balanced(name, 2_000).outputs[0].sent, 2_000);
        let seen = sinks[n].exactly(to.parse().expect("address:port"), 2_000);
        assert_eq!(sinks[n].all().len(), 2_000, "{name}: and nothing else");
        let numbers: Vec<_> = seen.iter().map(tests::Captured::sequence).collect();
        assert!(numbers.into_iter().eq((n as u64..6_000).step_by(3)), "{name}: each in order");
    }
}

fn taking_a_source_from_a_rule_is_said_and_giving_it_back_works() {
    let site = Site::default();
    let relay = Relay::start(&site);
    relay.add("rest", "239.1.1.1:5000@in0", &["239.2.2.3:6000@out2"]);
    let add =
        ["rule", "add", "one", "--in", "239.1.1.1:5000@in0,source=10.77.0.2", "--out", "239.2.2.1:6000@out0"];
    let outcome: mcr::api::wire::RuleOutcome = relay.json(&add);
    assert!(outcome.warnings.iter().any(|line| line.contains("rest")), "{:?}", outcome.warnings);
    relay.wait_until_active("one");
    site.segments[0].wait_until_joined(*GROUP.ip());
    let (mut one, mut rest) = (site.capture(0), site.capture(2));
    Source::play(site.source(), Stream { count: 500, ..Stream::to(GROUP) });
    relay.balanced("one", 500);
    relay.remove("one");
    Source::play(site.source(), Stream { count: 700, ..Stream::to(GROUP) });
    relay.balanced("rest", 700);
    one.exactly("239.2.2.1:6000".parse().unwrap(), 500);
    rest.exactly("239.2.2.3:6000".parse().unwrap(), 700);
}

tests::on_every_ground!(
    a_source_without_a_route_is_relayed,
    a_source_with_an_address_of_the_relay_is_relayed,
    a_rule_for_one_source_takes_it_from_the_rule_for_any,
    taking_a_source_from_a_rule_is_said_and_giving_it_back_works,
);

tests::by_the_kernel!(
    a_source_without_a_route_is_relayed,
    a_source_with_an_address_of_the_relay_is_relayed,
    a_rule_for_one_source_takes_it_from_the_rule_for_any,
    taking_a_source_from_a_rule_is_said_and_giving_it_back_works,
);

tests::without_bpf!(
    a_source_without_a_route_is_relayed,
    a_rule_for_one_source_takes_it_from_the_rule_for_any
);
