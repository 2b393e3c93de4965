//! Many streams at once.

use std::{collections::BTreeSet, net::Ipv4Addr, net::SocketAddrV4};

use mcr::api::wire::WorkerInfo;
use tests::{
    Generator, Ground, Receiver, Relay, Site,
    capture::Captured,
    site::{ETH, Plan},
    traffic::Counts,
};

/// What all streams together send.
#[derive(Clone, Copy)]
struct Load {
    datagrams: u64,
    per_second: u64,
}

const ONE_SECOND: Load = Load { datagrams: 10_000, per_second: 10_000 };
const TEN_SECONDS: Load = Load { datagrams: 50_000, per_second: 5_000 };

/// Relays `streams` streams of a site's source to one sink and checks that each arrives whole and in order.
fn check(site: &Site, args: &[&str], streams: u8, load: Load) -> Vec<WorkerInfo> {
    let total = load.datagrams;
    let relay = Relay::start_with(site, args);
    for i in 0..streams {
        let output = format!("239.20.0.{i}:6000@out0");
        relay.add(&format!("s{i}"), &format!("239.10.0.{i}:5000@in0"), &[&output]);
    }
    for i in 0..streams {
        site.segments[0].wait_until_joined(Ipv4Addr::new(239, 10, 0, i));
    }
    let each = total / u64::from(streams);
    let (streams_arg, each_arg) = (streams.to_string(), each.to_string());
    let rate_arg = (load.per_second / u64::from(streams)).to_string();
    let mut sink = site.capture(0);
    let receiver = Receiver::start(
        &site.sinks[0].host,
        &format!("239.20.0.0:6000@{ETH}"),
        &["--streams", &streams_arg, "--sha256"],
    );
    let sent = Generator::start(
        site.source(),
        &format!("239.10.0.0:5000@{ETH}"),
        &["--streams", &streams_arg, "--rate", &rate_arg, "--size", "1316", "--count", &each_arg, "--sha256"],
    )
    .finish();
    assert_eq!(sent.count(), total);
    for i in 0..streams {
        let stats = relay.balanced(&format!("s{i}"), each);
        assert_eq!((stats.received, stats.outputs[0].sent), (each, each), "stream {i}");
    }
    let interface = relay.interface("in0");
    assert_eq!((interface.verdicts["steered"], interface.received), (total, total));
    assert!(interface.dropped.is_empty() && interface.discarded.is_empty(), "{interface:?}");
    for i in 0..streams {
        let to = SocketAddrV4::new(Ipv4Addr::new(239, 20, 0, i), 6000);
        let seen: Vec<Captured> = sink.exactly(to, each as usize);
        let digest = tests::capture::sha256(seen.iter().map(|datagram| &datagram.payload[..]));
        assert_eq!(digest, sent.sha256(usize::from(i)), "stream {i}");
    }
    let tally = receiver.stop();
    assert_eq!(tally.counts(), Counts::exactly(total));
    for i in 0..usize::from(streams) {
        assert_eq!((tally.of_stream(i), tally.sha256(i)), (each, sent.sha256(i)), "stream {i}");
    }
    let workers = relay.workers();
    assert_eq!(workers.iter().map(|worker| worker.received).sum::<u64>(), total);
    workers
}

fn one_stream_loses_nothing() {
    drop(check(&Site::default(), &[], 1, ONE_SECOND));
}

fn two_streams_lose_nothing() {
    drop(check(&Site::default(), &[], 2, ONE_SECOND));
}

fn five_streams_lose_nothing() {
    drop(check(&Site::default(), &[], 5, ONE_SECOND));
}

fn ten_streams_lose_nothing() {
    drop(check(&Site::default(), &[], 10, ONE_SECOND));
}

fn fifty_streams_lose_nothing() {
    drop(check(&Site::default(), &[], 50, ONE_SECOND));
}

/// Two workers, each of which gets a part.
fn check_shared(workers: &[WorkerInfo]) {
    let pids: BTreeSet<_> = workers.iter().map(|worker| worker.pid).collect();
    assert_eq!((workers.len(), pids.len()), (2, 2), "{workers:?}");
    assert!(workers.iter().all(|worker| worker.received > 0), "{workers:?}");
}

#[test]
fn two_queues_and_two_workers_lose_nothing_and_copy_nothing() {
    let site = Site::build(Plan { queues: 2, ..Plan::default() });
    let workers = check(&site, &["--workers", "2"], 50, TEN_SECONDS);
    check_shared(&workers);
    let queues: Vec<_> = workers.iter().flat_map(|worker| worker.queues.clone()).collect();
    assert_eq!((queues.len(), BTreeSet::from_iter(queues)), (2, BTreeSet::from([0, 1])));
}

#[test]
fn one_worker_serves_two_queues() {
    let site = Site::build(Plan { queues: 2, ..Plan::default() });
    let workers = check(&site, &["--workers", "1"], 50, TEN_SECONDS);
    assert_eq!(workers.len(), 1, "{workers:?}");
    assert_eq!(workers[0].queues.iter().copied().collect::<BTreeSet<_>>(), BTreeSet::from([0, 1]));
}

#[test]
fn two_workers_of_one_fanout_group_lose_nothing_and_copy_nothing() {
    let site = Site::build(Plan { ground: Ground::Bridge, ..Plan::default() });
    check_shared(&check(&site, &["--workers", "2"], 50, TEN_SECONDS));
}

tests::on_every_ground!(
    one_stream_loses_nothing,
    two_streams_lose_nothing,
    five_streams_lose_nothing,
    ten_streams_lose_nothing,
    fifty_streams_lose_nothing,
);

tests::without_bpf!(fifty_streams_lose_nothing);
