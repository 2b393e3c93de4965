//! Workers that are killed again and again under load: in turn, and one in a loop.

#![expect(clippy::unwrap_used, reason = "where it fails, the test fails and says where")]

use std::{
    fs,
    net::SocketAddrV4,
    ops::Range,
    time::{Duration, Instant},
};

use mcr::api::{
    client::Client,
    wire::{Health, Request, Status, WorkerInfo, WorkerList},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tests::{
    Capture, Ground, Relay, Site, Source, Usage,
    capture::assert_sequence,
    relay::{lost, unaccounted},
    site::Plan,
    source::Stream,
    wait::PATIENCE,
    wait_for, wait_until,
};

const WORKERS: u8 = 4;
const ROUNDS: u64 = 5;

/// A worker that lived this long is restarted with the shortest pause.
const SETTLED: Duration = Duration::from_secs(2);

/// What a process may gain, which an allocator's and a page table's moods explain.
const SLACK_KIB: u64 = 1024;

fn kill_worker(worker: &WorkerInfo) -> u32 {
    let pid = worker.pid.expect("a worker that runs");
    kill(Pid::from_raw(pid.cast_signed()), Signal::SIGKILL).unwrap();
    pid
}

/// The one worker of an interface.
fn worker_of(client: &mut Client, interface: &str) -> WorkerInfo {
    let list: WorkerList = client.call(&Request::Workers).unwrap();
    let mut its = list.workers.into_iter().filter(|worker| worker.interface == interface);
    let worker = its.next().expect("a worker of the interface");
    assert!(its.next().is_none(), "one worker an interface");
    worker
}

/// Waits until an interface has a worker that runs and is another than it was.
fn successor(client: &mut Client, interface: &str, former: u32) -> WorkerInfo {
    wait_for("another worker runs", PATIENCE, || {
        let worker = worker_of(client, interface);
        (worker.state == "running" && worker.pid != Some(former)).then_some(worker)
    })
}

/// Sockets of a protocol in a namespace, as `/proc/net/protocols` counts them.
fn sockets(site: &Site, protocol: &str) -> u32 {
    let protocols = site.relay.proc_net("protocols");
    let mut line = protocols.lines().map(str::split_whitespace);
    let mut line = line.find_map(|mut words| (words.next() == Some(protocol)).then_some(words));
    line.as_mut().and_then(|words| words.nth(1)?.parse().ok()).expect("a protocol of this kernel")
}

/// What must not grow however many workers die: the daemon's and the workers' memory and descriptors, the
/// processes, and the sockets that hold frames.
#[derive(Debug)]
struct Holdings {
    daemon: Usage,
    workers: Vec<Usage>,
    processes: usize,
    frame_sockets: [u32; 2],
}

impl Holdings {
    fn of(site: &Site, relay: &Relay, client: &mut Client) -> Self {
        let list: WorkerList = client.call(&Request::Workers).unwrap();
        Self {
            daemon: Usage::of(relay.pid()),
            workers: list.workers.iter().map(|worker| Usage::of(worker.pid.unwrap())).collect(),
            processes: site.relay.processes().len(),
            frame_sockets: ["XDP", "PACKET"].map(|protocol| sockets(site, protocol)),
        }
    }

    fn assert_not_grown_from(&self, warm: &Self) {
        assert_eq!((self.processes, self.frame_sockets), (warm.processes, warm.frame_sockets));
        assert_eq!(self.daemon.descriptors, warm.daemon.descriptors);
        assert!(self.daemon.resident_kib <= warm.daemon.resident_kib + SLACK_KIB, "{self:?} after {warm:?}");
        for (now, then) in self.workers.iter().zip(&warm.workers) {
            assert_eq!(now.descriptors, then.descriptors);
            assert!(now.private_kib <= then.private_kib + SLACK_KIB, "{self:?} after {warm:?}");
        }
    }
}

/// A stream through a worker of its own.
struct Played {
    rule: String,
    interface: String,
    to: SocketAddrV4,
    source: Source,
    sink: Capture,
    /// Since when its worker is the one that it is.
    since: Instant,
    /// Datagrams captured before each kill and after the return from it.
    kills: Vec<Range<usize>>,
}

impl Played {
    fn start(site: &Site, relay: &Relay, k: u8, rate: u64) -> Self {
        let group = format!("239.1.1.{k}:5000").parse::<SocketAddrV4>().unwrap();
        let to = format!("239.2.2.{k}:6000").parse().unwrap();
        let (rule, interface) = (format!("cam{k}"), format!("in{k}"));
        relay.add(&rule, &format!("{group}@{interface}"), &[&format!("{to}@out{k}")]);
        let segment = &site.segments[usize::from(k)];
        segment.wait_until_joined(*group.ip());
        let sink = site.capture(k.into());
        let source = Source::start(&segment.source, Stream { rate, size: 200, ..Stream::to(group) });
        Self { rule, interface, to, source, sink, since: Instant::now(), kills: Vec::new() }
    }

    /// Kills the worker and waits until it is replaced; how long nothing was relayed, to some 2 ms.
    fn strike(&mut self, client: &mut Client) -> Duration {
        let worker = worker_of(client, &self.interface);
        let before = self.sink.count(self.to);
        let struck = Instant::now();
        let pid = kill_worker(&worker);
        wait_until("the worker is dead", PATIENCE, || fs::metadata(format!("/proc/{pid}")).is_err());
        let last = self.sink.count(self.to);
        wait_until("it relays again", PATIENCE, || self.sink.count(self.to) > last);
        let gap = struck.elapsed();
        self.kills.push(before..self.sink.count(self.to));
        let worker = successor(client, &self.interface, pid);
        self.since = Instant::now();
        assert_eq!(worker.restarts, self.kills.len() as u64, "{worker:?}");
        assert!(worker.last_exit.as_ref().unwrap().contains("SIGKILL"), "{worker:?}");
        gap
    }

    /// Nothing is missing but at the kills of this stream's own worker, and that is in the ledger.
    fn check(mut self, relay: &Relay) {
        let sent = self.source.stop();
        let stats = relay.balanced(&self.rule, sent);
        let interface = relay.interface(&self.interface);
        assert_eq!(unaccounted(&stats), lost(&interface), "{stats:?} {interface:?}");
        let numbers: Vec<_> = self.sink.to(self.to).iter().map(tests::Captured::sequence).collect();
        assert!(numbers.windows(2).all(|pair| pair[0] < pair[1]), "doubled or out of order");
        assert_eq!((numbers.first(), numbers.last()), (Some(&0), Some(&(sent - 1))));
        let holes: Vec<_> = (1..numbers.len()).filter(|&at| numbers[at] != numbers[at - 1] + 1).collect();
        let at_kill = |hole: &usize| self.kills.iter().any(|kill| kill.contains(hole));
        assert!(holes.iter().all(at_kill), "holes at {holes:?}, kills at {:?}", self.kills);
        assert!(holes.len() <= self.kills.len(), "holes at {holes:?}, kills at {:?}", self.kills);
        // What a worker had in its hands may have left before it could say so.
        let held = stats.outputs[0].dropped.get("worker_died").copied().unwrap_or(0) + lost(&interface);
        let (relayed, seen) = (stats.outputs[0].sent, numbers.len() as u64);
        assert!((relayed..=relayed + held).contains(&seen), "{seen} of {relayed} + {held}");
    }
}

fn check_killed_in_turn(ground: Ground) {
    let site = Site::build(Plan { segments: WORKERS, sinks: WORKERS, ground, ..Plan::default() });
    let relay = Relay::start(&site);
    let mut client = relay.client();
    let mut streams: Vec<_> = (0..WORKERS).map(|k| Played::start(&site, &relay, k, 2_000)).collect();
    let mut gaps = Vec::new();
    let mut warm = None;
    for round in 0..ROUNDS {
        for stream in &mut streams {
            wait_until("the worker is settled", PATIENCE, || stream.since.elapsed() > SETTLED);
            gaps.push(stream.strike(&mut client));
        }
        if round == 0 {
            warm = Some(Holdings::of(&site, &relay, &mut client));
        }
    }
    for stream in &streams {
        stream.source.wait_for_more(1_000);
    }
    Holdings::of(&site, &relay, &mut client).assert_not_grown_from(&warm.unwrap());
    let list: WorkerList = client.call(&Request::Workers).unwrap();
    for worker in &list.workers {
        assert_eq!((worker.state.as_str(), worker.restarts), ("running", ROUNDS), "{worker:?}");
    }
    assert_eq!(client.call::<Status>(&Request::Status).unwrap().worker_restarts, gaps.len() as u64);
    for stream in streams {
        stream.check(&relay);
    }

    gaps.sort_unstable();
    let (median, longest) = (gaps[gaps.len() / 2], gaps[gaps.len() - 1]);
    println!(
        "{} kills on {}: gaps of {median:?} (median), {longest:?} (longest)",
        gaps.len(),
        ground.datapath()
    );
    assert!(longest < Duration::from_secs(1), "{gaps:?}");
}

#[test]
fn af_xdp_workers_killed_in_turn_cost_the_others_nothing_and_leave_nothing() {
    check_killed_in_turn(Ground::Veth);
}

#[test]
fn af_packet_workers_killed_in_turn_cost_the_others_nothing_and_leave_nothing() {
    check_killed_in_turn(Ground::PlainVeth);
}

/// A worker dies six times, each time as soon as it is there.
fn check_crash_loop(ground: Ground) {
    const DEATHS: u64 = 6;
    let site = Site::build(Plan { segments: 2, sinks: 2, ground, ..Plan::default() });
    let relay = Relay::start(&site);
    let mut client = relay.client();
    let mut struck = Played::start(&site, &relay, 0, 2_000);
    let mut spared = Played::start(&site, &relay, 1, 5_000);
    let bystander = worker_of(&mut client, "in1");
    let mut pid = kill_worker(&worker_of(&mut client, "in0"));
    for _ in 1..DEATHS {
        pid = kill_worker(&successor(&mut client, "in0", pid));
    }
    // The pause is the sixth by now, and longer than it takes to look.
    let worker = wait_for("the last death is noticed", PATIENCE, || {
        let worker = worker_of(&mut client, "in0");
        (worker.restarts == DEATHS).then_some(worker)
    });
    assert_eq!((worker.state.as_str(), worker.pid), ("restarting", None), "{worker:?}");
    assert!(worker.last_exit.as_ref().unwrap().contains("SIGKILL"), "{worker:?}");
    let status: Status = client.call(&Request::Status).unwrap();
    assert_eq!((status.health, status.worker_restarts), (Health::Pending, DEATHS), "{status:?}");
    let down = format!("worker {} is down: {}", worker.id, worker.last_exit.unwrap());
    assert!(status.problems.iter().any(|problem| problem.what == down), "{down}: {status:?}");
    let table = relay.cli(&["workers"]);
    assert!(table.ok().contains("SIGKILL"), "{table}");

    successor(&mut client, "in0", pid);
    relay.wait_until_active("cam0");
    let seen = struck.sink.count(struck.to);
    struck.sink.at_least(struck.to, seen + 500);
    let sent = struck.source.stop();
    let rule = relay.balanced("cam0", sent);
    assert_eq!(unaccounted(&rule), lost(&relay.interface("in0")), "{rule:?}");

    let sent = spared.source.stop();
    assert_eq!(relay.balanced("cam1", sent).outputs[0].sent, sent);
    assert_sequence(&spared.sink.exactly(spared.to, sent as usize), 0..sent);
    let after = worker_of(&mut client, "in1");
    assert_eq!((after.pid, after.restarts, after.last_exit), (bystander.pid, 0, None));
}

#[test]
fn a_crash_loop_on_one_interface_leaves_the_others_alone_on_af_xdp() {
    check_crash_loop(Ground::Veth);
}

#[test]
fn a_crash_loop_on_one_interface_leaves_the_others_alone_on_af_packet() {
    check_crash_loop(Ground::PlainVeth);
}
