//! Three relays in a row, each in a namespace of its own.

use tests::{Generator, Ground, Namespace, Receiver, Relay, Scratch, Site, site::ETH, traffic::Counts};

const RATE: u64 = 50_000;
const SECONDS: u64 = 5;

/// `source eth0 == in0 relay out0 == in0 relay out0 == in0 relay out0 == eth0 sink`
fn check(ground: Ground) {
    let source = Namespace::new("src");
    let sink = Namespace::new("sink");
    let hops: Vec<Site> = (0..3)
        .map(|_| Site {
            segments: Vec::new(),
            relay: Namespace::new("relay"),
            sinks: Vec::new(),
            scratch: Scratch::make(),
            ground,
        })
        .collect();
    let mut ends: Vec<(&Namespace, &str)> = vec![(&source, ETH)];
    for hop in &hops {
        ends.extend([(&hop.relay, "in0"), (&hop.relay, "out0")]);
    }
    ends.push((&sink, ETH));
    for (k, pair) in ends.chunks_exact(2).enumerate() {
        let [(left, left_name), (right, right_name)] = pair else { unreachable!() };
        left.ip(&[
            &format!("link add name {left_name} type veth peer name {right_name} netns {}", right.name()),
            &format!("addr add 10.77.{k}.1/24 dev {left_name}"),
            &format!("link set {left_name} up"),
        ]);
        right.ip(&[
            &format!("addr add 10.77.{k}.2/24 dev {right_name}"),
            &format!("link set {right_name} up"),
        ]);
    }
    for host in [&source, &sink] {
        host.ip(&[&format!("route add 224.0.0.0/4 dev {ETH}")]);
    }
    let relays: Vec<_> = hops.iter().map(Relay::start).collect();
    for (k, relay) in relays.iter().enumerate() {
        let input = format!("239.1.1.{k}:5000@in0");
        relay.add("hop", &input, &[&format!("239.1.1.{}:5000@out0", k + 1)]);
    }
    let receiver = Receiver::start(&sink, &format!("239.1.1.3:5000@{ETH}"), &[]);
    let (rate, count) = (RATE.to_string(), (RATE * SECONDS).to_string());
    let args = ["--rate", &rate, "--size", "1316", "--count", &count];
    let sent = Generator::start(&source, &format!("239.1.1.0:5000@{ETH}"), &args).finish().count();
    assert_eq!(sent, RATE * SECONDS);
    for relay in &relays {
        let hop = relay.balanced("hop", sent);
        assert_eq!((hop.received, hop.outputs[0].sent), (sent, sent), "{hop:?}");
    }
    assert_eq!(receiver.stop().counts(), Counts::exactly(sent));
}

#[test]
fn three_relays_by_af_xdp_lose_nothing() {
    check(Ground::Veth);
}

#[test]
fn three_relays_by_af_packet_lose_nothing() {
    check(Ground::PlainVeth);
}
