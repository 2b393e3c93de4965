//! What relaying costs in calls of the kernel, and what else the loop promises.

#![expect(clippy::unwrap_used, reason = "where it fails, the test fails and says where")]

use std::net::SocketAddrV4;

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tests::{Relay, Site, Source, capture::assert_sequence, source::Stream, wait::PATIENCE, wait_until};

fn at(address: &str) -> SocketAddrV4 {
    address.parse().unwrap()
}

fn a_backlog_takes_a_few_calls_and_not_one_a_datagram() {
    let site = Site::default();
    let relay = Relay::start(&site);
    relay.add("cam1", "239.1.1.1:5000@in0", &["239.2.2.2:6000@out0", "239.2.2.3:6000@out1"]);
    site.segments[0].wait_until_joined("239.1.1.1".parse().unwrap());
    let (mut sink0, mut sink1) = (site.capture(0), site.capture(1));
    let worker = relay.workers().remove(0);
    let pid = Pid::from_raw(worker.pid.unwrap().cast_signed());
    // What comes meanwhile waits in its ring.
    kill(pid, Signal::SIGSTOP).unwrap();
    Source::play(site.source(), Stream { count: 1_500, rate: 10_000, ..Stream::to(at("239.1.1.1:5000")) });
    let before = relay.workers().remove(0).system_calls;
    kill(pid, Signal::SIGCONT).unwrap();
    let stats = relay.balanced("cam1", 1_500);
    assert!(stats.outputs.iter().all(|output| output.sent == 1_500), "{stats:?}");
    assert_sequence(&sink0.exactly(at("239.2.2.2:6000"), 1_500), 0..1_500);
    assert_sequence(&sink1.exactly(at("239.2.2.3:6000"), 1_500), 0..1_500);
    // Two batches, and what sleeping, waking and the timer took.
    let mut calls = 0;
    wait_until("the worker has counted them", PATIENCE, || {
        calls = relay.workers().remove(0).system_calls - before;
        calls >= 2
    });
    assert!(calls <= 20, "{calls} calls for 3,000 datagrams");
    println!("{calls} calls of io_uring_enter for 3,000 datagrams");
}

fn a_worker_that_polls_busily_relays_and_obeys() {
    let site = Site::default();
    let relay = Relay::start_with(&site, &["--busy-poll", "100000"]);
    relay.add("cam1", "239.1.1.1:5000@in0", &["239.2.2.2:6000@out0"]);
    site.segments[0].wait_until_joined("239.1.1.1".parse().unwrap());
    let mut sink = site.capture(0);
    let source = Source::start(site.source(), Stream { rate: 2_000, ..Stream::to(at("239.1.1.1:5000")) });
    // Commands are obeyed though it never sleeps.
    for _ in 0..3 {
        source.wait_for_more(200);
        relay.set("cam1", &["--add-out", "239.2.2.3:6000@out1"]);
        relay.set("cam1", &["--del-out", "239.2.2.3:6000@out1"]);
    }
    let sent = source.stop();
    assert_eq!(relay.balanced("cam1", sent).outputs[0].sent, sent);
    assert_sequence(&sink.exactly(at("239.2.2.2:6000"), sent as usize), 0..sent);
}

tests::on_every_ground!(
    a_backlog_takes_a_few_calls_and_not_one_a_datagram,
    a_worker_that_polls_busily_relays_and_obeys,
);
