//! Rules that come and go for a minute, or for as long as `MCR_SOAK_SECONDS` says, while streams play: nothing
//! is lost, nothing is restarted, nothing grows. `cargo xtask soak` is the long form.

#![expect(clippy::unwrap_used, reason = "where it fails, the test fails and says where")]

use std::{
    env,
    net::{Ipv4Addr, SocketAddrV4},
    time::{Duration, Instant},
};

use mcr::api::{
    client::Client,
    wire::{Outcome, Request, RuleOutcome, RuleRemoval, RuleSpec, WorkerList},
};
use tests::{
    Generator, Ground, Receiver, Relay, Site, Usage,
    relay::{outputs_balance, spec},
    site::{ETH, Plan},
    traffic::Counts,
    wait::PATIENCE,
    wait_until,
};

const STREAMS: u8 = 8;
/// Datagrams a second of each stream.
const RATE: u32 = 1_000;
/// Seconds for which the streams play beyond the churn.
const MARGIN: u32 = 10;

/// Adds a second, and as many removals.
const CHURN: u32 = 50;
/// Rules of the churn that stand at a time.
const STANDING: u32 = 25;
/// Seconds of churn before which memory and descriptors are not compared.
const WARM_UP: u32 = 10;

/// What a process may gain, which an allocator's and a page table's moods explain.
const SLACK_KIB: u64 = 1024;

/// A stream's group and what it becomes.
fn stream(i: u8) -> (Ipv4Addr, SocketAddrV4) {
    (Ipv4Addr::new(239, 10, 0, i), SocketAddrV4::new(Ipv4Addr::new(239, 20, 0, i), 6000))
}

/// The n-th rule of the churn: groups of their own, of one source, of a stream on another port, two outputs,
/// and an egress socket of its own.
fn churn(n: u32) -> RuleSpec {
    let [.., c, d] = n.to_be_bytes();
    let (group, name) = (format!("239.50.{c}.{d}"), churn_name(n));
    let to = format!("239.60.{c}.{d}:6000");
    match n % 5 {
        0 => spec(&name, &format!("{group}:5000@in0"), &[&format!("{to}@out0")]),
        1 => spec(&name, &format!("232.50.{c}.{d}:5000@in0,source=10.77.0.2"), &[&format!("{to}@out1")]),
        2 => {
            let (group, _) = stream((n % u32::from(STREAMS)) as u8);
            spec(&name, &format!("{group}:{}@in0", 10_000 + n % 1_000), &[&format!("{to}@out2")])
        }
        3 => spec(&name, &format!("{group}:5000@in0"), &[&format!("{to}@out1,ttl=3"), &format!("{to}@out2")]),
        _ => {
            let port = 7_000 + n % 100;
            spec(&name, &format!("{group}:5000@in0"), &[&format!("{to}@out0,from=10.78.0.1:{port}")])
        }
    }
}

fn churn_name(n: u32) -> String {
    format!("churn{n}")
}

fn add(client: &mut Client, n: u32) {
    let answer: RuleOutcome = client.call(&Request::RuleAdd(churn(n))).unwrap();
    assert_eq!((answer.outcome, answer.warnings), (Outcome::Added, vec![]), "rule {n}");
}

fn remove(client: &mut Client, n: u32) {
    let answer: RuleOutcome =
        client.call(&Request::RuleRemove(RuleRemoval { name: churn_name(n), save: false })).unwrap();
    assert_eq!(answer.outcome, Outcome::Removed, "rule {n}");
}

/// The daemon first, then its workers, none of which has been restarted.
fn processes(relay: &Relay, client: &mut Client) -> Vec<u32> {
    let list: WorkerList = client.call(&Request::Workers).unwrap();
    assert!(list.workers.iter().all(|worker| worker.restarts == 0), "{:?}", list.workers);
    let workers = list.workers.iter().map(|worker| worker.pid.expect("a worker that runs"));
    [relay.pid()].into_iter().chain(workers).collect()
}

fn usages(pids: &[u32]) -> Vec<Usage> {
    pids.iter().map(|&pid| Usage::of(pid)).collect()
}

fn check(ground: Ground) {
    let seconds = env::var("MCR_SOAK_SECONDS").map_or(60, |text| text.parse().expect("a number of seconds"));
    assert!(seconds > WARM_UP, "MCR_SOAK_SECONDS must be more than the {WARM_UP} s that it takes to warm up");
    let site = Site::build(Plan { ground, ..Plan::default() });
    let relay = Relay::start_with(&site, &["--log-level", "warn"]);
    for i in 0..STREAMS {
        let (group, to) = stream(i);
        relay.add(&format!("s{i}"), &format!("{group}:5000@in0"), &[&format!("{to}@out0")]);
    }
    for i in 0..STREAMS {
        site.segments[0].wait_until_joined(stream(i).0);
    }
    let (streams, rate) = (STREAMS.to_string(), RATE.to_string());
    let each = u64::from(RATE) * u64::from(seconds + MARGIN);
    let receiver =
        Receiver::start(&site.sinks[0].host, &format!("{}@{ETH}", stream(0).1), &["--streams", &streams]);
    let mut generator = Generator::start(
        site.source(),
        &format!("{}:5000@{ETH}", stream(0).0),
        &["--streams", &streams, "--rate", &rate, "--size", "1316", "--count", &each.to_string()],
    );

    let mut client = relay.client();
    let pids = processes(&relay, &mut client);
    let mut warm = Vec::new();
    let begun = Instant::now();
    for n in 0..CHURN * seconds {
        wait_until("the next rule is due", PATIENCE, || {
            begun.elapsed() >= Duration::from_secs(1) * n / CHURN
        });
        add(&mut client, n);
        if n >= STANDING {
            remove(&mut client, n - STANDING);
        }
        if n + 1 == CHURN * WARM_UP {
            warm = usages(&pids);
        }
        if (n + 1) % (10 * CHURN) == 0 {
            println!("{} s: {} added, {:?}", (n + 1) / CHURN, n + 1, usages(&pids));
        }
    }
    assert!(!generator.ended(), "the churn was too slow: {:?}", begun.elapsed());
    assert_eq!(processes(&relay, &mut client), pids);
    let end = usages(&pids);
    println!("{seconds} s on {}: {warm:?} after {WARM_UP} s, {end:?} at the end", ground.datapath());
    for ((warm, end), &pid) in warm.iter().zip(&end).zip(&pids) {
        // A worker closes sockets some moments after its last rule needed them.
        wait_until("no more descriptors than then", PATIENCE, || {
            Usage::of(pid).descriptors <= warm.descriptors
        });
        assert!(end.resident_kib <= warm.resident_kib + SLACK_KIB, "{end:?} after {warm:?}");
    }
    for n in CHURN * seconds - STANDING..CHURN * seconds {
        remove(&mut client, n);
    }

    assert_eq!(generator.finish().count(), u64::from(STREAMS) * each);
    for i in 0..STREAMS {
        let stats = relay.balanced(&format!("s{i}"), each);
        assert_eq!((stats.received, stats.outputs[0].sent), (each, each), "{stats:?}");
        assert!(outputs_balance(&stats) && stats.dropped.is_empty(), "{stats:?}");
    }
    let tally = receiver.stop();
    assert_eq!(tally.counts(), Counts::exactly(u64::from(STREAMS) * each));
    for i in 0..usize::from(STREAMS) {
        assert_eq!(tally.of_stream(i), each, "stream {i}");
    }
    assert_eq!(processes(&relay, &mut client), pids);
    let groups: Vec<_> = (0..STREAMS).map(|i| stream(i).0).collect();
    assert_eq!((site.groups("in0"), site.sources("in0")), (groups, vec![]));
}

#[test]
fn rules_that_come_and_go_cost_no_stream_of_af_xdp_anything() {
    check(Ground::Veth);
}

#[test]
fn rules_that_come_and_go_cost_no_stream_of_af_packet_anything() {
    check(Ground::PlainVeth);
}
