//! `mcr gen` and `mcr recv`, over a wire without a relay: they count what happened.

use std::{collections::BTreeSet, net::SocketAddrV4};

use tests::{
    Capture, Captured, Generator, RawSender, Receiver, Site, Udp,
    capture::sha256,
    site::{ETH, Plan},
    traffic::{Counts, Received},
};

const ENDPOINT: &str = "239.5.5.1:7000";

fn at(address: &str) -> SocketAddrV4 {
    address.parse().expect("address:port")
}

fn wire() -> Site {
    Site::build(Plan { segments: 0, sinks: 1, ..Plan::default() })
}

#[test]
fn recv_counts_what_gen_sent() {
    let site = wire();
    let sink = &site.sinks[0];
    let mut capture = Capture::start(&site.relay, "out0");
    let receiver = Receiver::start(&site.relay, "239.5.5.1:7000@out0", &["--streams", "3", "--sha256"]);
    let args = ["--streams", "3", "--rate", "3000", "--size", "200", "--count", "3000", "--sha256"];
    let endpoint = format!("{ENDPOINT}@{ETH},ttl=3,dscp=46,from=10.78.0.2:4444");
    let sent = Generator::start(&sink.host, &endpoint, &args).finish();
    assert_eq!(sent.count(), 9_000);
    let tally = receiver.stop();
    assert_eq!(tally.counts(), Counts::exactly(9_000));
    assert_eq!((tally.ttl(), tally.dscp()), (BTreeSet::from([3]), BTreeSet::from([46])));
    assert_eq!(tally.sources(), BTreeSet::from([at("10.78.0.2:4444")]));
    for stream in 0..3 {
        let seen = capture.exactly(at(&format!("239.5.5.{}:7000", stream + 1)), 3_000);
        let digest = sha256(seen.iter().map(|datagram| &datagram.payload[..]));
        assert_eq!((sent.sha256(stream), tally.sha256(stream)), (digest.clone(), digest));
        assert_eq!(tally.of_stream(stream), 3_000);
        assert!(seen.iter().all(|datagram| datagram.payload.len() == 200 && datagram.checksum_holds));
    }
}

/// A hundred datagrams of a generator, as they were on the wire.
fn recording(site: &Site) -> Vec<Captured> {
    let mut capture = Capture::start(&site.relay, "out0");
    let args = ["--rate", "10000", "--size", "100", "--count", "100"];
    Generator::start(&site.sinks[0].host, &format!("{ENDPOINT}@{ETH}"), &args).finish();
    capture.exactly(at(ENDPOINT), 100)
}

/// What a receiver makes of a recording that is played with changes.
#[track_caller]
fn replayed(change: impl FnOnce(&mut Vec<Captured>), stop: fn(Receiver) -> Received) -> Received {
    let site = wire();
    let mut datagrams = recording(&site);
    change(&mut datagrams);
    let n = datagrams.len();
    let mut capture = Capture::start(&site.relay, "out0");
    let receiver = Receiver::start(&site.relay, "239.5.5.1:7000@out0", &[]);
    let frames = datagrams
        .into_iter()
        .map(|datagram| Udp::new(datagram.source, datagram.destination).payload(&datagram.payload).frame());
    RawSender::new(&site.sinks[0].host, ETH).play(frames, 10_000);
    capture.exactly(at(ENDPOINT), n);
    stop(receiver)
}

#[test]
fn recv_counts_loss() {
    let tally = replayed(|datagrams| drop(datagrams.drain(40..47)), Receiver::stop_faulted);
    assert_eq!(tally.counts(), Counts { lost: 7, ..Counts::exactly(93) });
}

#[test]
fn recv_counts_duplicates() {
    let tally = replayed(
        |datagrams| {
            let twice = datagrams[48..50].to_vec();
            drop(datagrams.splice(50..50, twice));
        },
        Receiver::stop_faulted,
    );
    assert_eq!(tally.counts(), Counts { duplicates: 2, ..Counts::exactly(102) });
}

#[test]
fn recv_counts_reordering() {
    let tally = replayed(|datagrams| datagrams.swap(20, 21), Receiver::stop);
    assert_eq!(tally.counts(), Counts { reordered: 1, ..Counts::exactly(100) });
}

#[test]
fn recv_counts_corruption() {
    let tally = replayed(
        |datagrams| *datagrams[30].payload.last_mut().expect("a payload") ^= 1,
        Receiver::stop_faulted,
    );
    assert_eq!(tally.counts(), Counts { corrupt: 1, ..Counts::exactly(100) });
}
