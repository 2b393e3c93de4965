//! A stream from one input to one output or several: every datagram, in order, as the rule says.

use std::{collections::BTreeSet, net::SocketAddrV4};

use tests::{
    Capture, Captured, Generator, RawSender, Receiver, Relay, Site, Source, Udp,
    capture::{assert_sequence, sha256},
    frame::multicast_mac,
    site::ETH,
    source::Stream,
    traffic::Counts,
};

const INPUT: &str = "239.1.1.1:5000@in0";
const SIZE: u64 = 1316;
const N: u64 = 10_000;

fn at(address: &str) -> SocketAddrV4 {
    address.parse().expect("address:port")
}

fn group() -> SocketAddrV4 {
    at("239.1.1.1:5000")
}

fn digest(datagrams: &[Captured]) -> String {
    sha256(datagrams.iter().map(|datagram| &datagram.payload[..]))
}

/// 10,000 datagrams at 10,000 a second to `outputs`, one at each sink: by `mcr recv`, by a capture and
/// by the relay's own counters, each got exactly these.
fn check(outputs: &[&str]) {
    let site = Site::default();
    let relay = Relay::start(&site);
    let rule: Vec<_> = (0..).zip(outputs).map(|(sink, to)| format!("{to}@out{sink}")).collect();
    relay.add("cam1", INPUT, &rule.iter().map(String::as_str).collect::<Vec<_>>());
    // By the kernel itself once it knows its hosts.
    relay.wait_until_by("cam1", site.ground.datapath());
    site.segments[0].wait_until_joined(*group().ip());
    let mut captures: Vec<_> = (0..outputs.len()).map(|sink| site.capture(sink)).collect();
    let receivers: Vec<_> = site
        .sinks
        .iter()
        .zip(outputs)
        .map(|(sink, to)| Receiver::start(&sink.host, &format!("{to}@{ETH}"), &["--sha256"]))
        .collect();

    let args = ["--rate", "10000", "--size", "1316", "--count", "10000", "--sha256"];
    let sent = Generator::start(site.source(), &format!("239.1.1.1:5000@{ETH}"), &args).finish();
    assert_eq!(sent.count(), N);

    let stats = relay.balanced("cam1", N);
    assert_eq!((stats.received, stats.received_bytes), (N, N * SIZE));
    assert!(stats.dropped.is_empty() && stats.last_seen.is_some(), "{stats:?}");
    assert_eq!(stats.outputs.len(), outputs.len());
    for (output, to) in stats.outputs.iter().zip(&rule) {
        assert_eq!((&output.to, output.sent, output.sent_bytes), (to, N, N * SIZE));
        assert!(output.dropped.is_empty(), "{output:?}");
    }
    let interface = relay.interface("in0");
    if stats.datapath.as_deref() == Some("redirect") {
        assert_eq!((interface.verdicts["redirected"], interface.received), (N, 0));
    } else {
        assert_eq!((interface.verdicts["steered"], interface.received), (N, N));
    }
    for ((capture, receiver), to) in captures.iter_mut().zip(receivers).zip(outputs) {
        let datagrams = capture.exactly(at(to), N as usize);
        assert_eq!(digest(&datagrams), sent.sha256(0));
        let received = receiver.stop();
        assert_eq!(received.counts(), Counts::exactly(N));
        assert_eq!(received.sha256(0), sent.sha256(0));
        assert_eq!(received.ttl(), BTreeSet::from([16]));
    }
}

fn one_output_receives_all() {
    check(&["239.2.2.2:6000"]);
}

fn three_outputs_receive_all() {
    check(&["239.2.2.2:6000", "239.2.2.3:6001", "239.2.2.4:6002"]);
}

fn a_host_and_a_group_receive_all() {
    check(&["239.2.2.2:6000", "10.78.1.2:6001"]);
}

fn a_host_where_no_one_listens_disturbs_no_other_output() {
    let site = Site::default();
    let relay = Relay::start(&site);
    relay.add("cam1", INPUT, &["239.2.2.2:6000@out0", "10.78.1.2:6001@out1"]);
    relay.wait_until_by("cam1", site.ground.datapath());
    site.segments[0].wait_until_joined(*group().ip());
    let (mut sink0, mut sink1) = (site.capture(0), site.capture(1));
    Source::play(site.source(), Stream { count: 5_000, ..Stream::to(group()) });
    let stats = relay.balanced("cam1", 5_000);
    assert_eq!(stats.outputs.iter().map(|output| output.sent).collect::<Vec<_>>(), [5_000, 5_000]);
    assert_sequence(&sink0.exactly(at("239.2.2.2:6000"), 5_000), 0..5_000);
    assert_sequence(&sink1.exactly(at("10.78.1.2:6001"), 5_000), 0..5_000);
}

/// Relays 100 datagrams that arrive with TTL 9, DSCP 46 and ECN 1 to every output of `outputs`, and
/// answers one of each output, all of which must be alike but for their payload.
fn headers(outputs: &[&str]) -> Vec<Captured> {
    let site = Site::default();
    let relay = Relay::start(&site);
    relay.add("cam1", INPUT, outputs);
    site.segments[0].wait_until_joined(*group().ip());
    let mut sinks: Vec<_> = (0..3).map(|sink| site.capture(sink)).collect();
    let stream = Stream { count: 100, ttl: 9, tos: 46 << 2 | 1, ..Stream::to(group()) };
    Source::play(site.source(), stream);
    relay.balanced("cam1", 100);
    outputs
        .iter()
        .map(|output| {
            let (to, rest) = output.split_once("@out").expect("an output at outN");
            let sink: usize = rest[..1].parse().expect("the number of a sink");
            let datagrams = sinks[sink].exactly(at(to), 100);
            assert_sequence(&datagrams, 0..100);
            let one = Captured { payload: Vec::new(), ..datagrams[0].clone() };
            for datagram in datagrams {
                assert_eq!(Captured { payload: Vec::new(), ..datagram }, one);
            }
            assert!(one.checksum_holds && !one.fragment, "{output}: {one:?}");
            assert_eq!(one.ecn, 0, "{output}");
            one
        })
        .collect()
}

fn an_output_has_the_defaults_that_the_manual_states() {
    let seen = headers(&["239.2.2.2:6000@out0", "239.130.2.3:6001@out1"]);
    for (datagram, sink) in seen.iter().zip(["10.78.0.1", "10.78.1.1"]) {
        assert_eq!((datagram.ttl, datagram.dscp), (16, 46));
        assert_eq!(datagram.source.ip().to_string(), sink);
        assert_eq!(datagram.destination_mac, multicast_mac(*datagram.destination.ip()));
    }
    assert_eq!(seen[0].source.port(), seen[1].source.port());
    assert_ne!(seen[0].source.port(), 0);
}

fn an_output_has_the_ttl_and_dscp_of_its_options() {
    let seen = headers(&[
        "239.2.2.1:6000@out0,ttl=5",
        "239.2.2.2:6000@out0,ttl=255,dscp=0",
        "239.2.2.3:6000@out1,ttl=copy,dscp=10",
        "239.2.2.4:6000@out2,ttl=dec,dscp=copy",
        "239.2.2.5:6000@out2,ttl=1,dscp=63",
    ]);
    let fields: Vec<_> = seen.iter().map(|datagram| (datagram.ttl, datagram.dscp)).collect();
    assert_eq!(fields, [(5, 46), (255, 0), (9, 10), (8, 46), (1, 63)]);
}

fn an_output_has_the_source_of_its_options() {
    let seen = headers(&["239.2.2.1:6000@out0,from=10.78.0.1:7777", "239.2.2.2:6000@out1,from=10.78.1.1"]);
    assert_eq!(seen[0].source, at("10.78.0.1:7777"));
    assert_eq!(seen[1].source.ip().to_string(), "10.78.1.1");
    assert_ne!(seen[1].source.port(), 7777);
}

fn outputs_that_differ_in_port_or_interface_only_are_two() {
    let seen = headers(&[
        "239.2.2.1:6000@out0",
        "239.2.2.1:6001@out0,ttl=3",
        "239.2.2.1:6000@out1,ttl=4",
        "239.2.2.1:6002@out0,gso=false",
    ]);
    assert_eq!(seen.iter().map(|datagram| datagram.ttl).collect::<Vec<_>>(), [16, 3, 4, 16]);
}

fn payloads_of_every_size_arrive_whole() {
    let site = Site::default();
    let relay = Relay::start(&site);
    relay.add("cam1", INPUT, &["239.2.2.2:6000@out0"]);
    site.segments[0].wait_until_joined(*group().ip());
    let mut sink = site.capture(0);
    let payloads: Vec<Vec<u8>> = [0usize, 1, 2, 17, 18, 19, 100, 1471, 1472, 3, 1472, 0]
        .iter()
        .map(|len| vec![*len as u8; *len])
        .collect();
    let udp = Udp::new(at("10.77.0.2:40000"), group());
    let frames = payloads.iter().map(|payload| udp.clone().payload(payload).frame());
    RawSender::new(site.source(), ETH).play(frames, 1_000);
    relay.balanced("cam1", payloads.len() as u64);
    let seen = sink.exactly(at("239.2.2.2:6000"), payloads.len());
    assert!(seen.iter().all(|datagram| datagram.checksum_holds));
    assert_eq!(seen.into_iter().map(|datagram| datagram.payload).collect::<Vec<_>>(), payloads);
}

fn outputs_come_and_go_while_the_others_lose_nothing() {
    let site = Site::default();
    let relay = Relay::start(&site);
    relay.add("cam1", INPUT, &["239.2.2.2:6000@out0", "239.2.2.3:6000@out1"]);
    site.segments[0].wait_until_joined(*group().ip());
    let (to0, to1, to2) = (at("239.2.2.2:6000"), at("239.2.2.3:6000"), at("239.2.2.4:6000"));
    let mut sinks: [Capture; 3] = [site.capture(0), site.capture(1), site.capture(2)];
    let source = Source::start(site.source(), Stream { rate: 10_000, ..Stream::to(group()) });
    source.wait_for_more(1_000);

    relay.set("cam1", &["--add-out", "239.2.2.4:6000@out2"]);
    sinks[2].at_least(to2, 1);
    source.wait_for_more(1_000);

    relay.set("cam1", &["--del-out", "239.2.2.3:6000@out1"]);
    let gone = sinks[1].count(to1);
    source.wait_for_more(2_000);
    assert_eq!(sinks[1].count(to1), gone, "datagrams left by an output after its removal was answered");

    let sent = source.stop();
    let stats = relay.balanced("cam1", sent);
    assert_sequence(&sinks[0].exactly(to0, sent as usize), 0..sent);
    assert_sequence(&sinks[1].to(to1), 0..gone as u64);
    let late = sinks[2].to(to2);
    assert_sequence(&late, sent - late.len() as u64..sent);
    let shown: Vec<_> = stats.outputs.iter().map(|output| (output.to.as_str(), output.sent)).collect();
    assert_eq!(shown, [("239.2.2.2:6000@out0", sent), ("239.2.2.4:6000@out2", late.len() as u64)]);
}

tests::on_every_ground!(
    one_output_receives_all,
    three_outputs_receive_all,
    a_host_and_a_group_receive_all,
    a_host_where_no_one_listens_disturbs_no_other_output,
    an_output_has_the_defaults_that_the_manual_states,
    an_output_has_the_ttl_and_dscp_of_its_options,
    an_output_has_the_source_of_its_options,
    outputs_that_differ_in_port_or_interface_only_are_two,
    payloads_of_every_size_arrive_whole,
    outputs_come_and_go_while_the_others_lose_nothing,
);

tests::by_the_kernel!(
    one_output_receives_all,
    three_outputs_receive_all,
    a_host_and_a_group_receive_all,
    a_host_where_no_one_listens_disturbs_no_other_output,
    an_output_has_the_defaults_that_the_manual_states,
    an_output_has_the_ttl_and_dscp_of_its_options,
    an_output_has_the_source_of_its_options,
    outputs_that_differ_in_port_or_interface_only_are_two,
    payloads_of_every_size_arrive_whole,
    outputs_come_and_go_while_the_others_lose_nothing,
);

tests::without_bpf!(
    one_output_receives_all,
    three_outputs_receive_all,
    payloads_of_every_size_arrive_whole,
    outputs_come_and_go_while_the_others_lose_nothing
);

tests::as_ordinary_user!(
    one_output_receives_all,
    three_outputs_receive_all,
    a_host_and_a_group_receive_all,
    a_host_where_no_one_listens_disturbs_no_other_output,
    an_output_has_the_defaults_that_the_manual_states,
    an_output_has_the_ttl_and_dscp_of_its_options,
    an_output_has_the_source_of_its_options,
    outputs_that_differ_in_port_or_interface_only_are_two,
    payloads_of_every_size_arrive_whole,
    outputs_come_and_go_while_the_others_lose_nothing,
);
