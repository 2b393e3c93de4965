//! A worker that runs no more, and does not end either: it is found out and replaced.

#![expect(clippy::unwrap_used, reason = "where it fails, the test fails and says where")]

use std::net::SocketAddrV4;

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tests::{
    Relay, Site, Source, capture::assert_sequence, site::Plan, source::Stream, wait::PATIENCE, wait_until,
};

fn at(address: &str) -> SocketAddrV4 {
    address.parse().unwrap()
}

/// Stops the worker of an interface where it is.
#[track_caller]
fn stop(relay: &Relay<'_>, interface: &str) -> u32 {
    let worker = relay.workers().into_iter().find(|worker| worker.interface == interface).unwrap();
    let pid = worker.pid.unwrap();
    kill(Pid::from_raw(pid.cast_signed()), Signal::SIGSTOP).unwrap();
    pid
}

#[track_caller]
fn wait_until_replaced(relay: &Relay<'_>, interface: &str, former: u32) {
    wait_until("the worker is replaced", PATIENCE, || {
        let workers = relay.workers();
        let worker = workers.iter().find(|worker| worker.interface == interface).unwrap();
        worker.state == "running" && worker.pid.is_some_and(|pid| pid != former)
    });
}

fn a_worker_that_is_stopped_is_replaced_and_others_lose_nothing() {
    let site = Site::build(Plan { segments: 2, ..Plan::default() });
    let relay = Relay::start(&site);
    relay.add("cam1", "239.1.1.1:5000@in0", &["239.2.2.2:6000@out0"]);
    relay.add("cam2", "239.1.1.2:5000@in1", &["239.2.2.3:6000@out1"]);
    site.segments[0].wait_until_joined("239.1.1.1".parse().unwrap());
    site.segments[1].wait_until_joined("239.1.1.2".parse().unwrap());
    let mut other = site.capture(1);
    let stopped = Source::start(site.source(), Stream { rate: 1_000, ..Stream::to(at("239.1.1.1:5000")) });
    let plays =
        Source::start(&site.segments[1].source, Stream { rate: 2_000, ..Stream::to(at("239.1.1.2:5000")) });
    plays.wait_for_more(100);
    let former = stop(&relay, "in0");
    wait_until_replaced(&relay, "in0", former);
    let worker = relay.workers().into_iter().find(|worker| worker.interface == "in0").unwrap();
    let why = worker.last_exit.unwrap();
    assert!(worker.restarts == 1 && why.contains("no sign of life"), "{} {why}", worker.restarts);
    // It relays again.
    let sent = relay.rule("cam1").outputs[0].sent;
    wait_until("the stream goes on", PATIENCE, || relay.rule("cam1").outputs[0].sent > sent);
    let _ = stopped.stop();
    let sent = plays.stop();
    assert_eq!(relay.balanced("cam2", sent).outputs[0].sent, sent);
    assert_sequence(&other.exactly(at("239.2.2.3:6000"), sent as usize), 0..sent);
    let other = relay.workers().into_iter().find(|worker| worker.interface == "in1").unwrap();
    assert_eq!(other.restarts, 0, "{other:?}");
}

fn a_command_to_a_worker_that_is_stopped_is_carried_out_by_the_next() {
    let site = Site::default();
    let relay = Relay::start(&site);
    relay.add("cam1", "239.1.1.1:5000@in0", &["239.2.2.2:6000@out0"]);
    let former = stop(&relay, "in0");
    relay.add("cam2", "239.1.1.2:5000@in0", &["239.2.2.3:6000@out1"]);
    wait_until_replaced(&relay, "in0", former);
    let worker = relay.workers().remove(0);
    let why = worker.last_exit.unwrap();
    assert!(why.contains("did not answer") || why.contains("no sign of life"), "{why}");
    site.segments[0].wait_until_joined("239.1.1.2".parse().unwrap());
    Source::play(site.source(), Stream { count: 500, ..Stream::to(at("239.1.1.2:5000")) });
    assert_eq!(relay.balanced("cam2", 500).outputs[0].sent, 500);
}

tests::on_every_ground!(
    a_worker_that_is_stopped_is_replaced_and_others_lose_nothing,
    a_command_to_a_worker_that_is_stopped_is_carried_out_by_the_next,
);
