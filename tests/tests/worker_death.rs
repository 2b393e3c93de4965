//! A worker that is killed.

use std::{
    net::SocketAddrV4,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tests::{
    Relay, Site, Source,
    capture::assert_sequence,
    relay::{lost, unaccounted},
    site::Plan,
    source::Stream,
    wait_until,
};

#[test]
fn a_killed_worker_is_back_within_a_second_and_the_others_notice_nothing() {
    let site = Site::build(Plan { segments: 2, sinks: 2, ..Plan::default() });
    let mut relay = Relay::start(&site);
    let (to0, to1): (SocketAddrV4, SocketAddrV4) =
        ("239.2.2.0:6000".parse().unwrap(), "239.2.2.1:6000".parse().unwrap());
    let group: SocketAddrV4 = "239.1.1.1:5000".parse().unwrap();
    relay.add("struck", "239.1.1.1:5000@in0", &["239.2.2.0:6000@out0"]);
    relay.add("spared", "239.1.1.1:5000@in1", &["239.2.2.1:6000@out1"]);
    for segment in &site.segments {
        segment.wait_until_joined(*group.ip());
    }
    let (mut sink0, mut sink1) = (site.capture(0), site.capture(1));
    let struck = Source::start(&site.segments[0].source, Stream::to(group));
    let spared = Source::start(&site.segments[1].source, Stream::to(group));
    sink0.at_least(to0, 1_000);
    let before = relay.rule("struck");
    let worker = relay.workers().into_iter().find(|worker| worker.interface == "in0").unwrap();
    let pid = worker.pid.unwrap();

    kill(Pid::from_raw(pid.cast_signed()), Signal::SIGKILL).unwrap();
    let killed = Instant::now();
    let first_unrelayed = struck.sent() + 100;
    wait_until("the stream goes on", Duration::from_secs(1), || {
        sink0.to(to0).last().is_some_and(|datagram| datagram.sequence() > first_unrelayed)
    });
    println!("relayed again after {:?}", killed.elapsed());

    let mut last = before;
    for _ in 0..20 {
        let now = relay.rule("struck");
        assert!(now.matched >= last.matched && now.received >= last.received, "{now:?} after {last:?}");
        assert!(now.outputs[0].sent >= last.outputs[0].sent, "{now:?} after {last:?}");
        last = now;
    }
    let renewed = relay.workers().into_iter().find(|worker| worker.interface == "in0").unwrap();
    assert_ne!(renewed.pid, Some(pid));
    assert_eq!((renewed.state.as_str(), renewed.restarts), ("running", 1));
    assert!(renewed.last_exit.is_some(), "{renewed:?}");
    assert!(relay.log().contains(&pid.to_string()), "the daemon says nothing of worker {pid}");

    let (sent0, sent1) = (struck.stop(), spared.stop());
    assert_eq!(relay.balanced("spared", sent1).outputs[0].sent, sent1);
    assert_sequence(&sink1.exactly(to1, sent1 as usize), 0..sent1);

    // Every datagram of the stream is in the ledger; what the dead worker held is counted as such, though
    // some of it may have left before it could say so.
    let stats = relay.balanced("struck", sent0);
    let interface = relay.interface("in0");
    assert_eq!(unaccounted(&stats), lost(&interface), "{stats:#?} {interface:#?}");
    let seen = sink0.to(to0);
    assert!(seen.windows(2).all(|pair| pair[0].sequence() < pair[1].sequence()), "reordered or doubled");
    assert_eq!(seen.last().unwrap().sequence(), sent0 - 1);
    let held = interface.dropped.get("worker_died").copied().unwrap_or(0);
    let sent = stats.outputs[0].sent;
    assert!((sent..=sent + held).contains(&(seen.len() as u64)), "{} of {sent} + {held}", seen.len());

    relay.signal(Signal::SIGTERM);
    assert!(relay.wait(Duration::from_secs(5)).success());
}

#[test]
fn a_worker_that_dies_again_and_again_comes_back_each_time() {
    let site = Site::default();
    let relay = Relay::start(&site);
    let group: SocketAddrV4 = "239.1.1.1:5000".parse().unwrap();
    let to: SocketAddrV4 = "239.2.2.2:6000".parse().unwrap();
    relay.add("cam1", "239.1.1.1:5000@in0", &["239.2.2.2:6000@out0"]);
    site.segments[0].wait_until_joined(*group.ip());
    for deaths in 1..=3 {
        let pid = relay.workers()[0].pid.unwrap();
        kill(Pid::from_raw(pid.cast_signed()), Signal::SIGKILL).unwrap();
        wait_until("a new worker runs", Duration::from_secs(15), || {
            let worker = &relay.workers()[0];
            worker.state == "running" && worker.pid.is_some_and(|new| new != pid) && worker.restarts == deaths
        });
    }
    let before = relay.rule("cam1").matched;
    let mut sink = site.capture(0);
    Source::play(site.source(), Stream { count: 2_000, ..Stream::to(group) });
    relay.balanced("cam1", before + 2_000);
    assert_sequence(&sink.exactly(to, 2_000), 0..2_000);
}
