//! Many streams at once.

use std::{collections::BTreeSet, net::Ipv4Addr, net::SocketAddrV4};

use tests::{
    Generator, Receiver, Relay, Site,
    capture::Captured,
    site::{ETH, Plan},
    traffic::Counts,
};

/// Datagrams of all streams together, and of all streams a second.
const TOTAL: u64 = 10_000;

/// Relays `streams` streams of a site's source to one sink and checks that each arrives whole.
fn check(site: &Site, args: &[&str], streams: u8) -> Vec<mcr::api::wire::WorkerInfo> {
    let relay = Relay::start_with(site, args);
    for i in 0..streams {
        let output = format!("239.20.0.{i}:6000@out0");
        relay.add(&format!("s{i}"), &format!("239.10.0.{i}:5000@in0"), &[&output]);
    }
    for i in 0..streams {
        site.segments[0].wait_until_joined(Ipv4Addr::new(239, 10, 0, i));
    }
    let each = TOTAL / u64::from(streams);
    let (streams_arg, each_arg) = (streams.to_string(), each.to_string());
    let mut sink = site.capture(0);
    let receiver = Receiver::start(
        &site.sinks[0].host,
        &format!("239.20.0.0:6000@{ETH}"),
        &["--streams", &streams_arg, "--sha256"],
    );
    let sent = Generator::start(
        site.source(),
        &format!("239.10.0.0:5000@{ETH}"),
        &["--streams", &streams_arg, "--rate", &each_arg, "--size", "1316", "--count", &each_arg, "--sha256"],
    )
    .finish();
    assert_eq!(sent.count(), TOTAL);
    for i in 0..streams {
        let stats = relay.balanced(&format!("s{i}"), each);
        assert_eq!((stats.received, stats.outputs[0].sent), (each, each), "stream {i}");
    }
    let interface = relay.interface("in0");
    assert_eq!((interface.verdicts["steered"], interface.received), (TOTAL, TOTAL));
    assert!(interface.dropped.is_empty() && interface.discarded.is_empty(), "{interface:?}");
    for i in 0..streams {
        let to = SocketAddrV4::new(Ipv4Addr::new(239, 20, 0, i), 6000);
        let seen: Vec<Captured> = sink.exactly(to, each as usize);
        let digest = tests::capture::sha256(seen.iter().map(|datagram| &datagram.payload[..]));
        assert_eq!(digest, sent.sha256(usize::from(i)), "stream {i}");
    }
    let tally = receiver.stop();
    assert_eq!(tally.counts(), Counts::exactly(TOTAL));
    for i in 0..usize::from(streams) {
        assert_eq!((tally.of_stream(i), tally.sha256(i)), (each, sent.sha256(i)), "stream {i}");
    }
    let workers = relay.workers();
    assert_eq!(workers.iter().map(|worker| worker.received).sum::<u64>(), TOTAL);
    workers
}

fn one_stream_loses_nothing() {
    check(&Site::default(), &[], 1);
}

fn two_streams_lose_nothing() {
    check(&Site::default(), &[], 2);
}

fn five_streams_lose_nothing() {
    check(&Site::default(), &[], 5);
}

fn ten_streams_lose_nothing() {
    check(&Site::default(), &[], 10);
}

fn fifty_streams_lose_nothing() {
    check(&Site::default(), &[], 50);
}

#[test]
fn two_queues_and_two_workers_lose_nothing_and_copy_nothing() {
    let site = Site::build(Plan { queues: 2, ..Plan::default() });
    let workers = check(&site, &["--workers", "2"], 10);
    let queues: Vec<_> = workers.iter().flat_map(|worker| worker.queues.clone()).collect();
    assert_eq!((workers.len(), queues.len()), (2, 2), "{workers:?}");
    assert_eq!(BTreeSet::from_iter(queues), BTreeSet::from([0, 1]));
    let pids: BTreeSet<_> = workers.iter().map(|worker| worker.pid).collect();
    assert_eq!(pids.len(), 2, "{workers:?}");
}

#[test]
fn one_worker_serves_two_queues() {
    let site = Site::build(Plan { queues: 2, ..Plan::default() });
    let workers = check(&site, &["--workers", "1"], 10);
    assert_eq!(workers.len(), 1, "{workers:?}");
    assert_eq!(workers[0].queues.iter().copied().collect::<BTreeSet<_>>(), BTreeSet::from([0, 1]));
}

tests::on_every_ground!(
    one_stream_loses_nothing,
    two_streams_lose_nothing,
    five_streams_lose_nothing,
    ten_streams_lose_nothing,
    fifty_streams_lose_nothing,
);
