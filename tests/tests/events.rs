//! What subscribers are told, in which order, and what becomes of those that do not listen.

use std::{
    fs,
    io::Write,
    os::unix::net::UnixStream,
    process::Stdio,
    sync::mpsc::{self, Receiver},
    thread,
    time::{Duration, Instant},
};

use mcr::api::{
    client::{Client, ClientError},
    event::Event,
    wire::{Request, Subscribed, code},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};
use tests::{Relay, Site, Source, relay::CALL, source::Stream, wait::PATIENCE, wait_until};

const IN: &str = "239.1.1.1:5000@in0";
const OUT: &str = "239.2.2.2:6000@out0";

/// A subscription, read by a thread that ends with it.
struct Listener {
    seq: u64,
    events: Receiver<Result<Event, ClientError>>,
}

impl Listener {
    #[track_caller]
    fn start(relay: &Relay) -> Self {
        let mut client = relay.client();
        let Subscribed { seq, .. } = client.call(&Request::EventsSubscribe).expect("a subscription");
        let (told, events) = mpsc::channel();
        thread::spawn(move || {
            loop {
                let event = client.next_event();
                let ended = event.is_err();
                if told.send(event).is_err() || ended {
                    return;
                }
            }
        });
        Self { seq, events }
    }

    /// The next event, of whose number none may be missing. An error when there are no more.
    #[track_caller]
    fn next(&mut self) -> Result<Value, ClientError> {
        let event = self.events.recv_timeout(PATIENCE).expect("an event, or the end")?;
        self.seq += 1;
        assert_eq!((event.schema, event.seq), (1, self.seq), "{event:?}");
        assert!(event.time.ends_with('Z'), "{event:?}");
        Ok(serde_json::to_value(event.occurrence).expect("JSON"))
    }

    /// Everything up to and with the next event of this name.
    #[track_caller]
    fn until(&mut self, name: &str) -> Vec<Value> {
        let mut told = Vec::new();
        loop {
            let event = self.next().unwrap_or_else(|error| panic!("{name}: {error} after {told:#?}"));
            let found = event["event"] == name;
            told.push(event);
            if found {
                return told;
            }
        }
    }

    /// Skips to the next event of this name.
    #[track_caller]
    fn find(&mut self, name: &str) -> Value {
        self.until(name).pop().expect("it is there")
    }
}

#[test]
fn events_that_nobody_reads_any_more_end_at_once() {
    let site = Site::default();
    let relay = Relay::start(&site);
    let mut events = relay.call(&["events"]).stdout(Stdio::piped()).spawn().expect("mcr events");
    let stdout = events.stdout.take();
    wait_until("it has subscribed", PATIENCE, || relay.log().contains("asked=events.subscribe"));
    drop(stdout);
    let mut status = None;
    wait_until("it ends without an event", PATIENCE, || {
        status = events.try_wait().expect("its status");
        status.is_some()
    });
    assert_eq!(status.and_then(|status| status.code()), Some(0));
}

#[test]
fn a_rule_is_told_of_from_its_beginning_to_its_end() {
    let site = Site::default();
    let relay = Relay::start(&site);
    let mut listener = Listener::start(&relay);
    relay.add_with("cam1", IN, &[OUT], &["--datapath", "af-xdp"]);
    let told = listener.until("rule.active");
    let added = json!({"event": "rule.added", "rule": "cam1", "origin": "cli", "in": IN, "out": [OUT]});
    assert!(told.contains(&added), "{told:#?}");
    assert_eq!(told.last(), Some(&json!({"event": "rule.active", "rule": "cam1", "datapath": "af-xdp"})));
    let worker = relay.workers().remove(0);
    let started = json!({"event": "worker.started", "worker": worker.id, "pid": worker.pid});
    assert!(told.contains(&started), "{told:#?}");

    relay.set("cam1", &["--add-out", "239.2.2.3:6000@out1"]);
    let difference = format!("its outputs ({OUT} 239.2.2.3:6000@out1 instead of {OUT})");
    let changed = json!({"event": "rule.changed", "rule": "cam1", "difference": difference});
    assert_eq!(listener.next().expect("an event"), changed);

    relay.set("cam1", &["--datapath", "af-packet"]);
    let moved = listener.find("rule.moved");
    assert_eq!((&moved["from"], &moved["to"]), (&"af-xdp".into(), &"af-packet".into()));
    assert!(moved["why"].as_str().expect("words").contains("asked for"), "{moved}");

    relay.remove("cam1");
    assert_eq!(listener.find("rule.removed"), json!({"event": "rule.removed", "rule": "cam1"}));
    // Its workers go with it, now or then.
    drop(listener);
    relay.cli(&["ping"]).ok();
}

#[test]
fn a_worker_that_is_killed_is_told_of_with_its_reason() {
    let site = Site::default();
    let relay = Relay::start(&site);
    relay.add_with("cam1", IN, &[OUT], &["--datapath", "af-xdp"]);
    let worker = relay.workers().remove(0);
    let pid = worker.pid.expect("it runs");
    let mut listener = Listener::start(&relay);
    kill(Pid::from_raw(pid.cast_signed()), Signal::SIGKILL).expect("kill a worker");
    let mut told = listener.until("worker.started");
    if told.iter().all(|event| event["event"] != "rule.active") {
        told.extend(listener.until("rule.active"));
    }
    let of = |name: &str| {
        told.iter().find(|event| event["event"] == name).unwrap_or_else(|| panic!("{name}: {told:#?}"))
    };
    let ended = of("worker.ended");
    assert_eq!((&ended["worker"], &ended["pid"]), (&worker.id.clone().into(), &pid.into()));
    let reason = ended["reason"].as_str().expect("a reason");
    assert!(reason.contains("signal 9") || reason.contains("SIGKILL"), "{reason}");
    let restarting = of("worker.restarting");
    assert_eq!((&restarting["reason"], &restarting["restarts"]), (&ended["reason"], &1.into()));
    assert_ne!(of("worker.started")["pid"], pid);
    let pending = of("rule.pending");
    assert!(pending["reason"].as_str().is_some_and(|why| !why.is_empty()), "{pending}");
}

#[test]
fn interfaces_and_the_rules_that_wait_for_them_are_told_of() {
    let site = Site::default();
    let relay = Relay::start(&site);
    relay.add("cam1", IN, &[OUT]);
    let mut listener = Listener::start(&relay);
    site.relay.ip(&["link set out0 down"]);
    assert_eq!(listener.find("interface.down"), json!({"event": "interface.down", "interface": "out0"}));
    let pending = listener.find("rule.pending");
    assert_eq!((&pending["rule"], &pending["reason"]), (&"cam1".into(), &"interface out0 is down".into()));
    site.relay.ip(&["link set out0 up"]);
    assert_eq!(listener.find("interface.up"), json!({"event": "interface.up", "interface": "out0"}));
    assert_eq!(listener.find("rule.active")["rule"], "cam1");
    site.relay.ip(&["link set out0 mtu 1400"]);
    assert_eq!(
        listener.find("interface.mtu"),
        json!({"event": "interface.mtu", "interface": "out0", "mtu": 1400})
    );
    site.relay.ip(&["addr add 10.99.0.1/24 dev out0"]);
    let addresses = listener.find("interface.addresses");
    assert_eq!(addresses["addresses"].as_array().map(Vec::len), Some(2), "{addresses}");
    site.sinks[0].unplug(&site.relay);
    assert_eq!(listener.find("interface.gone"), json!({"event": "interface.gone", "interface": "out0"}));
    site.sinks[0].plug(&site.relay);
    assert_eq!(listener.find("interface.there")["interface"], "out0");
}

#[test]
fn a_rule_that_stalls_and_resumes_is_told_of() {
    let site = Site::default();
    let relay = Relay::start_with(&site, &["--stalled-after", "1"]);
    relay.add("cam1", IN, &[OUT]);
    site.segments[0].wait_until_joined([239, 1, 1, 1].into());
    let mut listener = Listener::start(&relay);
    let play = || {
        let to = "239.1.1.1:5000".parse().expect("an address");
        Source::play(site.source(), Stream { count: 100, ..Stream::to(to) });
    };
    play();
    assert_eq!(listener.next().expect("an event"), json!({"event": "rule.stalled", "rule": "cam1"}));
    play();
    assert_eq!(listener.next().expect("an event"), json!({"event": "rule.resumed", "rule": "cam1"}));
}

#[test]
fn what_becomes_of_a_configuration_is_told() {
    let site = Site::default();
    let file = site.scratch.dir().join("mcr.toml");
    let write = |rules: &str| fs::write(&file, rules).expect("a file of the test's");
    let rule = |n: u32| {
        format!(
            "[[rule]]\nname = \"s{n}\"\nin = \"239.1.1.{n}:5000@in0\"\nout = [\"239.2.2.{n}:6000@out0\"]\n"
        )
    };
    let path = file.to_str().expect("a plain path");
    write(&rule(1));
    let relay = Relay::start_with(&site, &["--config", path]);
    let mut listener = Listener::start(&relay);
    write(&(rule(1) + &rule(2)));
    relay.cli(&["config", "load", path]).ok();
    let loaded = |added, removed, unchanged| json!({"event": "configuration.loaded", "added": added, "removed": removed, "changed": 0, "unchanged": unchanged});
    assert_eq!(listener.next().expect("an event"), loaded(1, 0, 1));
    assert_eq!(listener.find("rule.added")["origin"], "file");
    write(&rule(1));
    relay.cli(&["config", "load", path, "--confirm", "60"]).ok();
    let mut waiting = loaded(0, 1, 1);
    waiting["confirm_within_s"] = 60.into();
    assert_eq!(listener.find("configuration.loaded"), waiting);
    relay.cli(&["config", "rollback"]).ok();
    listener.find("configuration.rolled_back");
    relay.cli(&["config", "load", path, "--confirm", "60"]).ok();
    relay.cli(&["config", "confirm"]).ok();
    listener.find("configuration.confirmed");
    write("[[rule]]\n");
    relay.signal(Signal::SIGHUP);
    let refused = listener.find("configuration.refused");
    assert!(refused["reason"].as_str().expect("words").contains("mcr.toml"), "{refused}");
}

#[test]
fn mcr_events_prints_a_line_each_and_ends_with_the_daemon() {
    let site = Site::default();
    let mut relay = Relay::start(&site);
    let listening = relay.events();
    relay.add("cam1", IN, &[OUT]);
    let pid = relay.pid();
    relay.cli(&["stop"]).ok();
    let answer = listening.answer(CALL);
    assert_eq!(answer.stderr, "");
    let lines: Vec<Value> =
        answer.ok().lines().map(|line| serde_json::from_str(line).expect("a line of JSON")).collect();
    let names: Vec<_> = lines.iter().map(|line| line["event"].as_str().expect("a name")).collect();
    assert!(names.contains(&"rule.added") && names.contains(&"rule.active"), "{names:?}");
    let last = lines.last().expect("a line");
    assert_eq!(
        (&last["event"], &last["pid"], &last["keep"]),
        (&"daemon.stopping".into(), &pid.into(), &false.into())
    );
    relay.wait(PATIENCE);
    let line = relay.cli(&["events"]).refused(3).to_owned();
    assert!(line.contains("no daemon on"), "{line}");
}

#[test]
fn mcr_events_says_that_a_daemon_was_killed() {
    let site = Site::default();
    let mut relay = Relay::start(&site);
    let listening = relay.events();
    relay.signal(Signal::SIGKILL);
    relay.wait(PATIENCE);
    let answer = listening.answer(CALL);
    assert!(answer.refused(1).contains("the daemon was killed"), "{answer}");
}

#[test]
fn a_reader_that_stops_reading_is_dropped_and_nobody_waits_for_it() {
    const RULES: u32 = 4_000;
    let site = Site::default();
    let relay = Relay::start(&site);
    let slow = relay.events();
    let mut prompt = Listener::start(&relay);
    slow.signal(Signal::SIGSTOP);
    let path = site.scratch.dir().join("many.toml");
    let file = path.to_str().expect("a plain path");
    let dropped = || relay.log().contains("did not read fast enough");
    let end = Instant::now() + Duration::from_mins(1);
    for round in (0..2).cycle() {
        if dropped() {
            break;
        }
        assert!(Instant::now() < end, "it is still told");
        // On interfaces that are not there nothing has to be done for them.
        let rule = |n: u32| {
            let (high, low) = (n / 250, n % 250);
            format!(
                "[[rule]]\nname = \"r{round}-{n}\"\nin = \"239.1.{high}.{low}:5000@no0\"\nout = [\"239.2.{high}.{low}:6000@no1\"]\n"
            )
        };
        fs::write(&path, (0..RULES).map(rule).collect::<String>()).expect("a file of the test's");
        relay.cli(&["config", "load", file, "--json"]).ok();
        let start = Instant::now();
        relay.cli(&["ping"]).ok();
        assert!(start.elapsed() < Duration::from_secs(2), "ping took {:?}", start.elapsed());
        // Whoever reads is told of all of it.
        let told = prompt.until("configuration.loaded");
        assert!(told.len() <= 2 * RULES as usize + 1, "{}", told.len());
        for _ in 0..RULES {
            prompt.find("rule.added");
        }
    }
    slow.signal(Signal::SIGCONT);
    let answer = slow.answer(CALL);
    assert_eq!(answer.status, 1, "{}", answer.stderr);
    assert!(answer.stderr.contains("too slow") && answer.stderr.lines().count() == 1, "{}", answer.stderr);
}

#[test]
fn subscribers_are_bounded_and_leave_nothing() {
    let site = Site::default();
    let relay = Relay::start(&site);
    let fds = || fs::read_dir(format!("/proc/{}/fd", relay.pid())).expect("the daemon runs").count();
    let before = fds();
    let subscribe = || {
        let mut client = Client::connect(relay.control()).expect("the daemon listens");
        client.call::<Subscribed>(&Request::EventsSubscribe).map(|_| client)
    };
    let all: Vec<_> = (0..16).map(|_| subscribe().expect("a subscription")).collect();
    let error = subscribe().map(drop).expect_err("one too many");
    assert!(matches!(&error, ClientError::Refused(error) if error.code == code::BUSY), "{error}");
    assert!(error.to_string().contains("16 programs are subscribed already"), "{error}");
    drop(all);
    // One that says more than it may, and one that does not wait for its answer.
    let mut stream = UnixStream::connect(relay.control()).expect("the daemon listens");
    let request = b"{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"events.subscribe\"}\n";
    stream.write_all(&request.repeat(2)).expect("two requests");
    drop(UnixStream::connect(relay.control()).map(|mut stream| stream.write_all(request)));
    drop(stream);
    wait_until("their descriptors are closed", PATIENCE, || fds() <= before);
    drop(subscribe().expect("there is room again"));
    assert!(!relay.log().contains("panicked"), "{}", relay.log());
}
