//! What this relay sent is never relayed by it again.

#![expect(clippy::unwrap_used, reason = "where it fails, the test fails and says where")]

use std::net::{Ipv4Addr, SocketAddrV4};

use tests::{
    Capture, Ground, RawSender, Relay, Site, Source, Udp,
    capture::assert_sequence,
    site::{ETH, Plan},
    source::Stream,
};

const GROUP: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(239, 1, 1, 1), 5000);

fn a_group_is_relayed_both_ways_and_each_side_is_exact() {
    let site = Site::build(Plan { segments: 2, sinks: 0, ..Plan::default() });
    let relay = Relay::start(&site);
    relay.add("east", "239.1.1.1:5000@in0", &["239.1.1.1:5000@in1"]);
    relay.add("west", "239.1.1.1:5000@in1", &["239.1.1.1:5000@in0"]);
    let [west, east] = &site.segments[..] else { unreachable!() };
    let mut captures = Vec::new();
    let _memberships: Vec<_> = site
        .segments
        .iter()
        .map(|segment| {
            segment.wait_until_joined(*GROUP.ip());
            captures.push(Capture::start(&segment.source, ETH));
            segment.join_at_source(*GROUP.ip())
        })
        .collect();
    let there = Source::start(&west.source, Stream { count: 3_000, ..Stream::to(GROUP) });
    let back = Source::start(&east.source, Stream { count: 2_000, ..Stream::to(GROUP) });
    assert_eq!((there.finish(), back.finish()), (3_000, 2_000));
    assert_eq!(relay.balanced("east", 3_000).outputs[0].sent, 3_000);
    assert_eq!(relay.balanced("west", 2_000).outputs[0].sent, 2_000);
    let at_east = captures[1].exactly(GROUP, 3_000);
    let at_west = captures[0].exactly(GROUP, 2_000);
    assert_sequence(&at_east, 0..3_000);
    assert_sequence(&at_west, 0..2_000);
    assert!(at_east.iter().all(|datagram| *datagram.source.ip() == east.relay_address));
    assert!(at_west.iter().all(|datagram| *datagram.source.ip() == west.relay_address));

    // One of its own comes back to it.
    let own = Udp::new(at_east[0].source, GROUP).payload(&[0; 100]).frame();
    let sent = RawSender::new(&east.source, ETH).play((0..100).map(|_| own.clone()), 5_000);
    assert_eq!(sent, 100);
    let stats = relay.balanced("west", 2_100);
    assert_eq!(stats.dropped, [("loop".to_owned(), 100)].into());
    assert_eq!(stats.received, 2_000);
    assert_eq!(relay.interface("in1").verdicts["looped"], 100);
    assert_eq!(captures[0].count(GROUP), 2_000);
}

fn two_interfaces_on_one_segment_do_not_echo() {
    let site = Site::build(Plan { sinks: 0, ..Plan::default() });
    let segment = &site.segments[0];
    segment.bridge.ip(&[
        &format!("link add name second type veth peer name in9 netns {}", site.relay.name()),
        "link set second master br0 up",
    ]);
    segment.bridge.bridge(&["link set dev second mcast_flood off"]);
    if site.ground == Ground::Kernel {
        tests::site::take_redirected(&segment.bridge, "second");
    }
    site.relay.ip(&["addr add 10.77.0.3/24 dev in9", "link set in9 up"]);
    let relay = Relay::start(&site);
    relay.add("there", "239.1.1.1:5000@in0", &["239.1.1.1:5000@in9"]);
    relay.add("back", "239.1.1.1:5000@in9", &["239.1.1.1:5000@in0"]);
    segment.wait_until_joined(*GROUP.ip());
    segment.wait_until_port_joined("second", *GROUP.ip());
    Source::play(&segment.source, Stream { count: 500, rate: 1_000, ..Stream::to(GROUP) });
    // Each interface receives the stream and what the other one sent of it, and that is the end.
    for name in ["there", "back"] {
        let stats = relay.balanced(name, 1_000);
        assert_eq!((stats.received, stats.outputs[0].sent), (500, 500), "{name}");
        assert_eq!(stats.dropped, [("loop".to_owned(), 500)].into(), "{name}");
    }
}

fn a_source_with_an_address_of_ours_is_no_loop_where_we_send_nothing() {
    let site = Site::default();
    let relay = Relay::start(&site);
    relay.add("cam1", "239.1.1.1:5000@in0", &["239.2.2.2:6000@out0"]);
    site.segments[0].wait_until_joined(*GROUP.ip());
    let mut sink = site.capture(0);
    let own = Udp::new(SocketAddrV4::new(site.sinks[0].relay_address, 40_000), GROUP);
    let frames = (0..500u64).map(|n| own.clone().payload(&n.to_be_bytes()).frame());
    RawSender::new(site.source(), ETH).play(frames, 5_000);
    assert_eq!(relay.balanced("cam1", 500).received, 500);
    assert_sequence(&sink.exactly("239.2.2.2:6000".parse().unwrap(), 500), 0..500);
}

fn a_rule_may_leave_by_the_interface_it_came_in_on() {
    let site = Site::build(Plan { sinks: 0, ..Plan::default() });
    let relay = Relay::start(&site);
    relay.add("turn", "239.1.1.1:5000@in0", &["239.1.1.2:5000@in0"]);
    let segment = &site.segments[0];
    segment.wait_until_joined(*GROUP.ip());
    let to: SocketAddrV4 = "239.1.1.2:5000".parse().unwrap();
    let _membership = segment.join_at_source(*to.ip());
    let mut capture = Capture::start(&segment.source, ETH);
    Source::play(&segment.source, Stream { count: 1_000, ..Stream::to(GROUP) });
    assert_eq!(relay.balanced("turn", 1_000).outputs[0].sent, 1_000);
    assert_sequence(&capture.exactly(to, 1_000), 0..1_000);
}

tests::on_every_ground!(
    a_group_is_relayed_both_ways_and_each_side_is_exact,
    two_interfaces_on_one_segment_do_not_echo,
    a_source_with_an_address_of_ours_is_no_loop_where_we_send_nothing,
    a_rule_may_leave_by_the_interface_it_came_in_on,
);

tests::by_the_kernel!(
    a_group_is_relayed_both_ways_and_each_side_is_exact,
    two_interfaces_on_one_segment_do_not_echo,
    a_source_with_an_address_of_ours_is_no_loop_where_we_send_nothing,
    a_rule_may_leave_by_the_interface_it_came_in_on,
);
