//! Frames that are not one plain datagram of the interface's MTU: what is promised for each, on every
//! ground.

#![expect(clippy::unwrap_used, reason = "where it fails, the test fails and says where")]

use std::net::{Ipv4Addr, SocketAddrV4};

use tests::{
    Captured, Ground, RawSender, Relay, Site, Source, Udp,
    capture::assert_sequence,
    frame::{IP, fix_ip_checksum},
    site::{ETH, Plan},
    source::Stream,
};

const GROUP: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(239, 1, 1, 1), 5000);
const TO: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(239, 2, 2, 2), 6000);

/// A site whose every link takes frames of this MTU.
fn site_of_mtu(mtu: u32) -> Site {
    let site = Site::build(Plan { sinks: 1, ..Plan::default() });
    let segment = &site.segments[0];
    let set = |name: &str| format!("link set {name} mtu {mtu}");
    segment.source.ip(&[&set(ETH)]);
    segment.bridge.ip(&[&set("src"), &set("relay"), &set("br0")]);
    if site.ground == Ground::Bridge || site.ground == Ground::Macvlan {
        site.relay.ip(&[&set("low0")]);
    }
    site.relay.ip(&[&set("in0"), &set("out0")]);
    site.sinks[0].host.ip(&[&set(ETH)]);
    site
}

fn udp() -> Udp {
    Udp::new("10.77.0.2:40000".parse().unwrap(), GROUP)
}

fn jumbo_frames_are_relayed_whole() {
    let site = site_of_mtu(9000);
    let relay = Relay::start(&site);
    relay.cli(&["rule", "add", "cam1", "--in", "239.1.1.1:5000@in0", "--out", "239.2.2.2:6000@out0"]).ok();
    // On a veth too: no UMEM chunk holds such a frame, so that `auto` takes AF_PACKET.
    assert_eq!(relay.wait_until_active("cam1").datapath.as_deref(), Some("af-packet"));
    site.segments[0].wait_until_joined(*GROUP.ip());
    let mut sink = site.capture(0);
    Source::play(site.source(), Stream { count: 2_000, size: 8_972, ..Stream::to(GROUP) });
    assert_eq!(relay.balanced("cam1", 2_000).outputs[0].sent, 2_000);
    let seen = sink.exactly(TO, 2_000);
    assert_sequence(&seen, 0..2_000);
    assert!(seen.iter().all(|datagram| datagram.payload.len() == 8_972 && datagram.checksum_holds));
}

fn frames_beyond_the_mtu_that_the_rule_started_with_are_relayed_whole() {
    let site = Site::build(Plan { sinks: 1, ground: Ground::PlainVeth, ..Plan::default() });
    let relay = Relay::start(&site);
    relay.add("cam1", "239.1.1.1:5000@in0", &["239.2.2.2:6000@out0"]);
    site.segments[0].wait_until_joined(*GROUP.ip());
    // The ring's slots stay as they are.
    let set = |name: &str| format!("link set {name} mtu 9000");
    let segment = &site.segments[0];
    segment.source.ip(&[&set(ETH)]);
    segment.bridge.ip(&[&set("src"), &set("relay"), &set("br0")]);
    site.relay.ip(&[&set("in0"), &set("out0")]);
    site.sinks[0].host.ip(&[&set(ETH)]);
    let mut sink = site.capture(0);
    Source::play(site.source(), Stream { count: 500, size: 8_972, rate: 2_000, ..Stream::to(GROUP) });
    assert_eq!(relay.balanced("cam1", 500).outputs[0].sent, 500);
    assert_sequence(&sink.exactly(TO, 500), 0..500);
}

fn tagged_frames_are_counted_and_left_to_the_host() {
    let site = Site::build(Plan { sinks: 1, ..Plan::default() });
    let relay = Relay::start(&site);
    relay.add("cam1", "239.1.1.1:5000@in0", &["239.2.2.2:6000@out0"]);
    site.segments[0].wait_until_joined(*GROUP.ip());
    let mut sink = site.capture(0);
    // On the relay's cable itself: a bridge without VLAN filtering passes tags, but floods them by no group.
    let sender = RawSender::new(&site.segments[0].bridge, "relay");
    let before = relay.interface("in0").verdicts["vlan"];
    for n in 0..100u64 {
        let mut frame = udp().payload(&n.to_be_bytes()).frame();
        frame.splice(12..12, [0x81, 0x00, 0x00, 0x2a]);
        sender.send(&frame);
    }
    Source::play(site.source(), Stream { count: 200, ..Stream::to(GROUP) });
    relay.balanced("cam1", 200);
    assert_eq!(relay.interface("in0").verdicts["vlan"] - before, 100);
    assert_sequence(&sink.exactly(TO, 200), 0..200);
}

fn frames_with_ip_options_are_counted_and_left_to_the_host() {
    let site = Site::build(Plan { sinks: 1, ..Plan::default() });
    let relay = Relay::start(&site);
    relay.add("cam1", "239.1.1.1:5000@in0", &["239.2.2.2:6000@out0"]);
    site.segments[0].wait_until_joined(*GROUP.ip());
    let mut sink = site.capture(0);
    let sender = RawSender::new(site.source(), ETH);
    let before = relay.interface("in0").verdicts["ip_options"];
    for n in 0..100u64 {
        let plain = udp().payload(&n.to_be_bytes()).frame();
        let mut frame = plain.clone();
        // Three that do nothing and one that ends them: a header of 24 bytes.
        frame.splice(IP + 20..IP + 20, [1, 1, 1, 0]);
        frame[IP] = 0x46;
        frame[IP + 3] += 4;
        // The sum of the header's other words goes up by as much as these do.
        let sum = [frame[IP..IP + 10].to_vec(), frame[IP + 12..IP + 24].to_vec()].concat();
        let sum = sum
            .chunks_exact(2)
            .fold(0u32, |sum, word| sum + u32::from(u16::from_be_bytes([word[0], word[1]])));
        let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
        frame[IP + 10..IP + 12].copy_from_slice(&sum.to_be_bytes());
        sender.send(&frame);
        sender.send(&plain);
    }
    relay.balanced("cam1", 100);
    assert_eq!(relay.interface("in0").verdicts["ip_options"] - before, 100);
    assert_sequence(&sink.exactly(TO, 100), 0..100);
}

/// Sends `runs` runs of `segments` datagrams by `UDP_SEGMENT`, which leave a virtual sender as one frame
/// each, and plain datagrams between them.
fn play_super_packets(site: &Site, runs: u64, segments: u64, bytes: usize) -> u64 {
    let socket = site.source().run(|| {
        let socket = std::net::UdpSocket::bind("0.0.0.0:0").expect("bind");
        socket.connect(GROUP).expect("connect");
        socket
    });
    let segment = i32::try_from(bytes).expect("a size");
    let mut number = 0u64;
    let mut datagram = || {
        let mut payload = vec![0; bytes];
        payload[..8].copy_from_slice(&number.to_be_bytes());
        number += 1;
        payload
    };
    for _ in 0..runs {
        // SAFETY: the value is an int that lives through the call.
        let result = unsafe {
            libc::setsockopt(
                std::os::fd::AsRawFd::as_raw_fd(&socket),
                libc::SOL_UDP,
                libc::UDP_SEGMENT,
                (&raw const segment).cast(),
                size_of::<i32>() as libc::socklen_t,
            )
        };
        assert_eq!(result, 0, "UDP_SEGMENT");
        let run: Vec<u8> = (0..segments).flat_map(|_| datagram()).collect();
        socket.send(&run).expect("send a run");
        socket.send(&datagram()).expect("send a datagram");
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    number
}

fn super_packets_of_a_virtual_sender_are_relayed_as_the_datagrams_that_they_are() {
    let site = Site::build(Plan { sinks: 1, ..Plan::default() });
    let relay = Relay::start(&site);
    relay.add("cam1", "239.1.1.1:5000@in0", &["239.2.2.2:6000@out0"]);
    site.segments[0].wait_until_joined(*GROUP.ip());
    let mut sink = site.capture(0);
    // Longer than a slot, shorter than one, and more datagrams than a batch has room for.
    let mut sent = 0;
    for (runs, segments, size) in [(50, 40, 1316), (50, 3, 300), (50, 64, 20)] {
        let played = play_super_packets(&site, runs, segments, size);
        sent += played;
        let stats = relay.balanced("cam1", sent);
        assert_eq!((stats.received, stats.outputs[0].sent), (sent, sent), "{segments} of {size} bytes");
        let seen = sink.exactly(TO, sent as usize);
        let new: Vec<Captured> = seen[(sent - played) as usize..].to_vec();
        assert_sequence(&new, 0..played);
        assert!(new.iter().all(|datagram| datagram.payload.len() == size && datagram.checksum_holds));
    }
}

fn runts_and_lies_are_counted_and_left_to_the_host() {
    let site = Site::build(Plan { sinks: 1, ..Plan::default() });
    let relay = Relay::start(&site);
    relay.add("cam1", "239.1.1.1:5000@in0", &["239.2.2.2:6000@out0"]);
    site.segments[0].wait_until_joined(*GROUP.ip());
    let mut sink = site.capture(0);
    let before = relay.interface("in0").verdicts;
    let good = udp().payload(&[7; 100]).frame();
    // On the relay's cable itself: a snooping bridge lets no such frame through.
    let sender = RawSender::new(&site.segments[0].bridge, "relay");
    // An Ethernet header is the least that a packet socket sends.
    let cut = [34, 40, 41, 60, 141].map(|len| good[..len].to_vec());
    let mut lying = good.clone();
    lying[IP + 2..IP + 4].copy_from_slice(&[0xff, 0xff]);
    fix_ip_checksum(&mut lying);
    for frame in cut.iter().chain([&lying]) {
        sender.send(frame);
    }
    for n in 0..100u64 {
        sender.send(&udp().payload(&n.to_be_bytes()).frame());
    }
    relay.balanced("cam1", 100);
    assert_eq!(relay.interface("in0").verdicts["truncated"] - before["truncated"], 6);
    assert_sequence(&sink.exactly(TO, 100), 0..100);
}

#[test]
fn a_ring_outlives_the_mtu_that_it_was_made_for() {
    frames_beyond_the_mtu_that_the_rule_started_with_are_relayed_whole();
}

tests::on_every_ground!(
    jumbo_frames_are_relayed_whole,
    tagged_frames_are_counted_and_left_to_the_host,
    frames_with_ip_options_are_counted_and_left_to_the_host,
    super_packets_of_a_virtual_sender_are_relayed_as_the_datagrams_that_they_are,
    runts_and_lies_are_counted_and_left_to_the_host,
);

tests::by_the_kernel!(
    jumbo_frames_are_relayed_whole,
    tagged_frames_are_counted_and_left_to_the_host,
    frames_with_ip_options_are_counted_and_left_to_the_host,
    super_packets_of_a_virtual_sender_are_relayed_as_the_datagrams_that_they_are,
    runts_and_lies_are_counted_and_left_to_the_host,
);

tests::without_bpf!(
    jumbo_frames_are_relayed_whole,
    super_packets_of_a_virtual_sender_are_relayed_as_the_datagrams_that_they_are,
);
