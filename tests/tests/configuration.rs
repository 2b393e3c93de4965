//! Configuration files: loaded while traffic flows, as a whole or not at all, taken back, saved; and the
//! rules that were added by command, which survive the daemon.

#![expect(clippy::unwrap_used, reason = "where it fails, the test fails and says where")]

use std::{
    fs,
    net::{Ipv4Addr, SocketAddrV4, UdpSocket},
    os::unix::fs::PermissionsExt,
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use mcr::api::wire::{
    ConfigOutcome, ConfigSaved, ConfigText, LoadOutcome, Outcome, RuleInfo, RuleOutcome, Status,
};
use nix::sys::signal::Signal;
use sha2::{Digest, Sha256};
use tests::{
    Generator, Ground, Receiver, Relay, Site, Source,
    capture::assert_sequence,
    site::{ETH, Plan},
    source::Stream,
    traffic::Counts,
    wait::PATIENCE,
    wait_for, wait_until,
};

/// Files of a configuration in the test's own directory.
struct Files(PathBuf);

impl Files {
    fn of(site: &Site, main: &str) -> Self {
        let files = Self(site.scratch.dir().join("etc"));
        fs::create_dir_all(files.0.join("rules.d")).unwrap();
        files.write("mcr.toml", main);
        files
    }

    fn path(&self, name: &str) -> String {
        self.0.join(name).display().to_string()
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.0.join(name), text).unwrap();
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.0.join(name)).unwrap()
    }

    /// A daemon that was started with these.
    fn start<'a>(&self, site: &'a Site) -> Relay<'a> {
        Relay::start_with(site, &["--config", &self.path("mcr.toml")])
    }
}

/// A rule of a file: group 239.1.1.N to 239.2.2.N on `out0`.
fn rule(name: &str, n: u32) -> String {
    rule_to(name, n, &format!("239.2.2.{n}:6000@out0"))
}

fn rule_to(name: &str, n: u32, output: &str) -> String {
    format!("[[rule]]\nname = \"{name}\"\nin = \"239.1.1.{n}:5000@in0\"\nout = [\"{output}\"]\n")
}

fn names(rules: &[RuleInfo]) -> Vec<&str> {
    rules.iter().map(|rule| rule.name.as_str()).collect()
}

fn load(relay: &Relay, file: &str, args: &[&str]) -> ConfigOutcome {
    relay.json(&[&["config", "load", file], args].concat())
}

#[track_caller]
fn refused(relay: &Relay, args: &[&str], words: &[&str]) {
    // Without it `config load` shows what it is about to do.
    let answer = relay.cli(&[args, &["--json"]].concat());
    let line = answer.refused(1);
    assert!(words.iter().all(|word| line.contains(word)), "{words:?} in {line}");
}

/// Eight streams to 239.1.1.1 to 8, and at the end each exact at the sink and in the ledger.
struct Streams(Vec<Source>);

impl Streams {
    const RATE: u64 = 400;

    fn start(site: &Site) -> Self {
        let stream =
            |n: u8| Stream { rate: Self::RATE, ..Stream::to(SocketAddrV4::new([239, 1, 1, n].into(), 5000)) };
        Self((1..=8).map(|n| Source::start(site.source(), stream(n))).collect())
    }

    fn play_on(&self) {
        for source in &self.0 {
            source.wait_for_more(200);
        }
    }

    fn assert_exact(self, relay: &Relay, sink: &mut tests::Capture) {
        for (n, source) in (1u8..).zip(self.0) {
            let sent = source.stop();
            let rule = relay.balanced(&format!("s{n}"), sent);
            assert_eq!(rule.outputs[0].sent, sent, "{rule:?}");
            let to = SocketAddrV4::new([239, 2, 2, n].into(), 6000);
            assert_sequence(&sink.exactly(to, sent as usize), 0..sent);
        }
    }
}

fn eight() -> String {
    (1..=8).map(|n| rule(&format!("s{n}"), n)).collect()
}

fn wait_until_all_joined(site: &Site) {
    for n in 1..=8 {
        site.segments[0].wait_until_joined([239, 1, 1, n].into());
    }
}

fn reloads_under_eight_streams_lose_nothing() {
    const EACH: u64 = 12_000;
    let site = Site::default();
    let files = Files::of(&site, &eight());
    let relay = files.start(&site);
    wait_until_all_joined(&site);
    relay.wait_until_active("s8");
    let receiver = Receiver::start(
        &site.sinks[0].host,
        &format!("239.2.2.1:6000@{ETH}"),
        &["--streams", "8", "--sha256"],
    );
    let args =
        ["--streams", "8", "--rate", "2000", "--size", "1316", "--count", &EACH.to_string(), "--sha256"];
    let mut generator = Generator::start(site.source(), &format!("239.1.1.1:5000@{ETH}"), &args);
    let mut round = 0;
    while !generator.ended() {
        // Rules come, go, change and move, by SIGHUP and by command in turn.
        let group = |n| format!("239.3.{}.{n}", round % 256);
        let other =
            |n: u32| rule_to(&format!("x{n}"), 20 + n + round % 2, &format!("{}:6000@out1", group(n)));
        files.write("mcr.toml", &(eight() + &(0..20).map(other).collect::<String>()));
        if round % 2 == 0 {
            relay.signal(Signal::SIGHUP);
            let last = format!("{}:", group(19));
            wait_until("the rules are loaded", PATIENCE, || {
                relay.show_all().iter().any(|rule| rule.outputs[0].to.starts_with(&last))
            });
        } else {
            let outcome = load(&relay, &files.path("mcr.toml"), &[]);
            assert_eq!((outcome.outcome, outcome.unchanged), (LoadOutcome::Applied, 8));
        }
        round += 1;
    }
    assert!(round > 3, "only {round} reloads while the streams played");
    files.write("mcr.toml", &eight());
    let outcome = load(&relay, &files.path("mcr.toml"), &[]);
    assert_eq!((outcome.removed.len(), outcome.unchanged), (20, 8));
    let sent = generator.finish();
    for n in 0..8 {
        let stats = relay.balanced(&format!("s{}", n + 1), EACH);
        assert_eq!((stats.received, stats.outputs[0].sent), (EACH, EACH), "{stats:?}");
    }
    let tally = receiver.stop();
    assert_eq!(tally.counts(), Counts::exactly(8 * EACH));
    for n in 0..8 {
        assert_eq!((tally.of_stream(n), tally.sha256(n)), (EACH, sent.sha256(n)), "stream {n}");
    }
    assert_eq!(load(&relay, &files.path("mcr.toml"), &[]).outcome, LoadOutcome::Unchanged);
}

fn a_load_that_fails_half_way_leaves_exactly_what_was() {
    // A bridge has no native XDP: what asks for it by name cannot be served.
    let site = Site::build(Plan { ground: Ground::Bridge, ..Plan::default() });
    let files = Files::of(&site, &(eight() + &rule("goes", 9)));
    let relay = files.start(&site);
    relay.cli(&["rule", "add", "mine", "--in", "239.1.1.50:5000@in0", "--out", "239.2.2.50:6000@out1"]).ok();
    wait_until_all_joined(&site);
    let before = relay.show_all();
    let mut sink = site.capture(0);
    let streams = Streams::start(&site);
    streams.play_on();
    let broken = eight()
        + &rule_to("goes", 10, "239.2.2.9:6000@out0")
        + &rule("new", 11)
        + &rule("cannot", 12)
        + "datapath = \"af-xdp\"\n";
    files.write("new.toml", &broken);
    for _ in 0..3 {
        let file = files.path("new.toml");
        refused(
            &relay,
            &["config", "load", &file],
            &["cannot", "new.toml:", "native XDP", "nothing was changed"],
        );
        assert_eq!(relay.show_all(), before);
        streams.play_on();
    }
    // What the files themselves or the rules added by command speak against.
    for (text, words) in [
        (eight() + "outt = 1\n", &["new.toml:33:1", "'outt' is no key of a rule"][..]),
        (
            eight() + &rule("mine", 51),
            &["rule 'mine'", "new.toml:33", "was added by command", "its input"][..],
        ),
        (
            eight() + &rule("other", 50),
            &["rule 'other'", "new.toml:33", "the input of rule 'mine'", "was added by command"][..],
        ),
        (
            eight() + &rule_to("other", 52, "239.2.2.50:6000@out1"),
            &["new.toml:33", "fed by rule 'mine'", "by command"][..],
        ),
    ] {
        files.write("new.toml", &text);
        refused(&relay, &["config", "load", &files.path("new.toml")], words);
        assert_eq!(relay.show_all(), before);
    }
    streams.assert_exact(&relay, &mut sink);
}

#[test]
fn a_load_that_fails_half_way_on_a_bridge() {
    Ground::Bridge.run(a_load_that_fails_half_way_leaves_exactly_what_was);
}

#[test]
fn a_rule_under_another_name_or_with_another_input_is_moved() {
    let site = Site::default();
    let files = Files::of(&site, &(rule("a", 1) + &rule("b", 2)));
    let relay = files.start(&site);
    // `a` gives its input to `c` and its output to `b`.
    files.write(
        "mcr.toml",
        &(rule_to("c", 1, "239.2.2.2:6000@out0") + &rule_to("b", 2, "239.2.2.1:6000@out0")),
    );
    let diff = relay.cli(&["config", "diff", &files.path("mcr.toml")]);
    assert_eq!(
        diff.ok(),
        "- a: 239.1.1.1:5000@in0 -> 239.2.2.1:6000@out0\n\
         + c: 239.1.1.1:5000@in0 -> 239.2.2.2:6000@out0\n\
         ~ b: its outputs (239.2.2.1:6000@out0 instead of 239.2.2.2:6000@out0)\n\
         0 rules unchanged\n"
    );
    assert_eq!(names(&relay.show_all()), ["a", "b"], "a look changes nothing");
    load(&relay, &files.path("mcr.toml"), &[]);
    for (name, input, output) in [("b", 2, 1), ("c", 1, 2)] {
        relay.wait_until_active(name);
        site.segments[0].wait_until_joined([239, 1, 1, input].into());
        let mut sink = site.capture(0);
        Source::play(
            site.source(),
            Stream { count: 1000, ..Stream::to(SocketAddrV4::new([239, 1, 1, input].into(), 5000)) },
        );
        assert_eq!(relay.balanced(name, 1000).outputs[0].sent, 1000);
        sink.exactly(SocketAddrV4::new([239, 2, 2, output].into(), 6000), 1000);
    }
}

fn saving_and_loading_gives_back_exactly_what_ran() {
    let site = Site::default();
    let mut relay = Relay::start_with(&site, &["--workers", "1", "--busy-poll", "50", "--max-rules", "64"]);
    for (name, input, outputs, args) in [
        ("plain", "239.1.1.1:5000@in0", &["239.2.2.1:6000@out0"][..], &[][..]),
        (
            "ssm",
            "232.1.1.2:5000@in0,source=10.77.0.2",
            &["239.2.2.2:6000@out0,ttl=dec,dscp=46", "10.78.1.2:7000@out1,from=10.78.1.1:4000"],
            &[],
        ),
        ("merging", "239.1.1.3:5000@in0", &["239.2.2.1:6000@out0,gso=false,loop=true"], &["--merge"]),
        ("local", "224.0.0.9:5000@in0", &["239.2.2.4:6000@out2,ttl=copy"], &["--link-local"]),
        ("waits", "239.1.1.5:5000@not-there", &["239.2.2.5:6000@out1"], &["--datapath", "af-packet"]),
    ] {
        let mut call = vec!["rule", "add", name, "--in", input];
        for output in outputs {
            call.extend(["--out", output]);
        }
        call.extend(args);
        relay.cli(&call).ok();
    }
    let strip = |rules: Vec<RuleInfo>| -> Vec<RuleInfo> {
        rules.into_iter().map(|rule| RuleInfo { origin: String::new(), place: None, ..rule }).collect()
    };
    let settled =
        |relay: &Relay| ["plain", "ssm", "merging", "local"].map(|name| relay.wait_until_active(name));
    settled(&relay);
    let before = strip(relay.show_all());
    let files = Files::of(&site, "# by hand\n");
    refused(&relay, &["config", "save"], &["runs without --config", "config save FILE"]);
    refused(&relay, &["config", "save", &files.path("mcr.toml")], &["mcr did not write it", "--force"]);
    let saved = files.path("saved.toml");
    assert_eq!(relay.json::<ConfigSaved>(&["config", "save", &saved]).file, saved);
    let shown: ConfigText = relay.json(&["config", "show"]);
    assert_eq!(shown.toml, files.read("saved.toml"));
    relay.cli(&["config", "check", &saved]).ok();
    // The same daemon makes them its file rules, and loses none.
    let outcome = load(&relay, &saved, &[]);
    assert_eq!((outcome.adopted.len(), outcome.added.len()), (5, 0), "{outcome:?}");
    assert_eq!(strip(relay.show_all()), before);
    assert!(relay.show_all().iter().all(|rule| rule.origin == "file" && rule.place.is_some()));
    relay.cli(&["stop"]).ok();
    relay.wait(PATIENCE);
    relay.start_again_with(&site, &["--config", &saved]);
    settled(&relay);
    assert_eq!(strip(relay.show_all()), before);
    assert_eq!(relay.json::<ConfigText>(&["config", "show"]).toml, shown.toml);
}

#[test]
fn a_load_is_taken_back_unless_it_is_confirmed() {
    let site = Site::default();
    let files = Files::of(&site, &(eight() + &rule("goes", 9)));
    let relay = files.start(&site);
    relay.add("mine", "239.1.1.50:5000@in0", &["239.2.2.50:6000@out1"]);
    wait_until_all_joined(&site);
    let before = relay.show_all();
    let mut sink = site.capture(0);
    let streams = Streams::start(&site);
    let new = files.path("new.toml");
    files.write("new.toml", &(eight() + &rule("comes", 9) + &rule("mine", 50).replace("out0", "out1")));

    let outcome = load(&relay, &new, &["--confirm", "1"]);
    assert_eq!((outcome.outcome, outcome.confirm_within_s), (LoadOutcome::Applied, Some(1)));
    assert!(relay.show_all().iter().any(|rule| rule.name == "comes"));
    wait_until("the load is taken back", PATIENCE, || relay.show_all() == before);
    refused(&relay, &["config", "confirm"], &["no load waits to be confirmed"]);
    streams.play_on();

    load(&relay, &new, &["--confirm", "3600"]);
    for change in [
        &["rule", "add", "late", "--in", "239.1.1.60:5000@in0", "--out", "239.2.2.60:6000@out1"][..],
        &["rule", "set", "s1", "--add-out", "239.2.2.60:6000@out1"],
        &["rule", "remove", "s1"],
        &["config", "load", &new],
        &["config", "save"],
    ] {
        refused(&relay, change, &["waits", "mcr config confirm"]);
    }
    let status: Status = relay.json(&["status"]);
    assert!(status.problems.iter().any(|problem| problem.next == "mcr config confirm"), "{status:?}");
    assert_eq!(relay.json::<ConfigOutcome>(&["config", "rollback"]).outcome, LoadOutcome::RolledBack);
    assert_eq!(relay.show_all(), before);
    streams.play_on();

    load(&relay, &new, &["--confirm", "3600"]);
    assert_eq!(relay.json::<ConfigOutcome>(&["config", "confirm"]).outcome, LoadOutcome::Confirmed);
    let after = relay.show_all();
    assert_eq!(names(&after), ["comes", "mine", "s1", "s2", "s3", "s4", "s5", "s6", "s7", "s8"]);
    assert!(after.iter().all(|rule| rule.origin == "file"));
    streams.play_on();
    streams.assert_exact(&relay, &mut sink);
}

#[test]
fn rules_are_saved_in_a_fragment_of_mcrs_own_and_no_other_file_is_written() {
    let site = Site::default();
    let by_hand = format!("# mine\n{}", rule("hand", 1));
    let files = Files::of(&site, &by_hand);
    files.write("rules.d/10-team.toml", &rule("team", 2));
    files.write("rules.d/ignored.txt", "no TOML at all [");
    let mut relay = files.start(&site);
    assert_eq!(names(&relay.show_all()), ["hand", "team"]);
    let saved = "rules.d/mcr-saved.toml";
    let info = relay.add_with("kept", "239.1.1.3:5000@in0", &["239.2.2.3:6000@out0"], &["--save"]);
    assert_eq!(info.place, Some(files.path(saved) + ":4"));
    relay.add("passing", "239.1.1.4:5000@in0", &["239.2.2.4:6000@out0"]);
    relay.cli(&["rule", "set", "kept", "--add-out", "239.2.2.3:6001@out0", "--save"]).ok();
    assert!(files.read(saved).contains("239.2.2.3:6001@out0"));
    // What stands in a person's file is theirs to change; for the moment it can be changed all the same.
    refused(&relay, &["rule", "remove", "hand", "--save"], &["mcr.toml:2", "which mcr does not write"]);
    refused(&relay, &["rule", "set", "team", "--add-out", "239.2.2.9:1@out0", "--save"], &["10-team.toml:1"]);
    let removed: RuleOutcome = relay.json(&["rule", "remove", "team"]);
    assert!(removed.warnings[0].contains("10-team.toml:1: it comes back at the next reload"), "{removed:?}");
    refused(
        &relay,
        &["rule", "add", "again", "--in", "239.1.1.1:5000@in0", "--out", "239.2.2.7:1@out0"],
        &["rule 'hand'", "mcr.toml:2"],
    );
    relay.signal(Signal::SIGHUP);
    wait_until("the removed rule is back", PATIENCE, || {
        names(&relay.show_all()) == ["hand", "kept", "passing", "team"]
    });
    let origin = |relay: &Relay, name: &str| relay.show(name).origin;
    assert_eq!(
        ["hand", "kept", "passing", "team"].map(|name| origin(&relay, name)),
        ["file", "file", "cli", "file"]
    );
    let all: ConfigSaved = relay.json(&["config", "save"]);
    assert_eq!((all.file, all.saved), (files.path(saved), vec!["passing".to_owned()]));
    relay.cli(&["rule", "remove", "kept", "--save"]).ok();
    let before = relay.show_all();
    relay.cli(&["stop"]).ok();
    relay.wait(PATIENCE);
    // Nothing but files is left to know of them.
    fs::remove_file(site.scratch.dir().join("mcr.sock.journal")).unwrap();
    relay.start_again_with(&site, &["--config", &files.path("mcr.toml")]);
    for rule in &before {
        relay.wait_until_active(&rule.name);
    }
    assert_eq!(relay.show_all(), before);
    assert_eq!((files.read("mcr.toml"), files.read("rules.d/10-team.toml")), (by_hand, rule("team", 2)));
    // What cannot be read is not written over.
    files.write(saved, "[[rule\n");
    refused(
        &relay,
        &["rule", "add", "n", "--in", "239.1.1.8:1@in0", "--out", "239.2.2.8:1@out0", "--save"],
        &["mcr-saved.toml:1"],
    );
    assert_eq!((files.read(saved).as_str(), names(&relay.show_all())), ("[[rule\n", names(&before)));
}

fn rules_added_by_command_survive_the_daemon() {
    let site = Site::default();
    let files = Files::of(&site, &rule("file", 1));
    let args = ["--config".to_owned(), files.path("mcr.toml")];
    let args: Vec<_> = args.iter().map(String::as_str).collect();
    let mut relay = Relay::start_with(&site, &args);
    relay.add("cli", "239.1.1.2:5000@in0", &["239.2.2.2:6000@out0,ttl=9", "239.2.2.3:6000@out1"]);
    relay.add("gone", "239.1.1.3:5000@in0", &["239.2.2.4:6000@out0"]);
    relay.remove("gone");
    let before = relay.show_all();
    for kill in [true, true, false] {
        if kill {
            relay.signal(Signal::SIGKILL);
        } else {
            relay.signal(Signal::SIGTERM);
        }
        relay.wait(PATIENCE);
        relay.start_again_with(&site, &args);
        relay.wait_until_active("cli");
        relay.wait_until_active("file");
        assert_eq!(relay.show_all(), before);
        site.segments[0].wait_until_joined([239, 1, 1, 2].into());
        let mut sink = site.capture(0);
        Source::play(site.source(), Stream { count: 200, ..Stream::to("239.1.1.2:5000".parse().unwrap()) });
        relay.balanced("cli", 200);
        sink.exactly("239.2.2.2:6000".parse().unwrap(), 200);
    }
    // A file rule that has come since goes before: the other is told of in full.
    relay.signal(Signal::SIGKILL);
    relay.wait(PATIENCE);
    files.write("mcr.toml", &(rule("file", 1) + &rule("newer", 2)));
    relay.start_again_with(&site, &args);
    assert_eq!(names(&relay.show_all()), ["file", "newer"]);
    let told = |relay: &Relay| {
        let status: Status = relay.json(&["status"]);
        status.problems.into_iter().find(|problem| problem.what.starts_with("rule cli, added by command"))
    };
    let problem = told(&relay).unwrap();
    assert!(problem.what.contains("mcr.toml:5") && problem.next == "mcr rule remove cli", "{problem:?}");
    // It is kept, over another death too, until it can stand or is let go.
    relay.signal(Signal::SIGKILL);
    relay.wait(PATIENCE);
    relay.start_again_with(&site, &args);
    assert!(told(&relay).is_some());
    files.write("mcr.toml", &rule("file", 1));
    load(&relay, &files.path("mcr.toml"), &[]);
    assert_eq!(relay.wait_until_active("cli").origin, "cli");
    assert!(told(&relay).is_none());
}

#[test]
fn the_source_port_is_the_same_after_a_restart() {
    let site = Site::default();
    let mut relay = Relay::start(&site);
    relay.add("cam", "239.1.1.1:5000@in0", &["239.2.2.2:6000@out0"]);
    let mut ports = Vec::new();
    for _ in 0..3 {
        site.segments[0].wait_until_joined([239, 1, 1, 1].into());
        relay.wait_until_active("cam");
        let mut sink = site.capture(0);
        Source::play(site.source(), Stream { count: 1, ..Stream::to("239.1.1.1:5000".parse().unwrap()) });
        ports.push(sink.exactly("239.2.2.2:6000".parse().unwrap(), 1)[0].source.port());
        relay.signal(Signal::SIGKILL);
        relay.wait(PATIENCE);
        relay.start_again(&site);
    }
    assert!(ports.iter().all(|port| *port == ports[0]), "{ports:?}");
}

#[test]
fn a_source_port_that_is_held_a_moment_longer_is_waited_for() {
    let site = Site::default();
    let mut relay = Relay::start(&site);
    relay.add("cam", "239.1.1.1:5000@in0", &["239.2.2.2:6000@out0"]);
    let port = |relay: &Relay| {
        let log = relay.log();
        log.split("source_port=").nth(1).unwrap().lines().next().unwrap().parse::<u16>().unwrap()
    };
    let before = port(&relay);
    relay.cli(&["stop"]).ok();
    relay.wait(PATIENCE);
    // As sockets do that an io_uring of the daemon before still holds.
    let held = wait_for("the port is free", PATIENCE, || {
        site.relay.run(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, before))).ok()
    });
    thread::scope(|scope| {
        scope.spawn(|| {
            let place = site.scratch.pin_root().to_str().unwrap();
            wait_until("a daemon has its place", PATIENCE, || site.relay.proc_net("unix").contains(place));
            drop(held);
        });
        relay.start_again(&site);
    });
    assert_eq!(port(&relay), before, "{}", relay.log());
}

#[test]
fn a_torn_journal_is_set_aside_and_said() {
    let site = Site::default();
    let mut relay = Relay::start(&site);
    relay.add("cam", "239.1.1.1:5000@in0", &["239.2.2.2:6000@out0"]);
    let journal = site.scratch.dir().join("mcr.sock.journal");
    let whole = fs::read(&journal).unwrap();
    let mut flipped = whole.clone();
    flipped[whole.len() / 2] ^= 1;
    let zeros = [&whole[..40], &vec![0; whole.len() - 40][..]].concat();
    for torn in [&[][..], &whole[..whole.len() / 2], &whole[..whole.len() - 1], &flipped, &zeros, b"\xff\xfe"]
    {
        relay.signal(Signal::SIGKILL);
        relay.wait(PATIENCE);
        fs::write(&journal, torn).unwrap();
        // What a process that was killed while it wrote leaves behind.
        fs::write(site.scratch.dir().join("mcr.sock.journal.mcr-1"), "half").unwrap();
        relay.start_again(&site);
        assert_eq!(names(&relay.show_all()), [""; 0]);
        let log = relay.log();
        assert!(log.contains("it is not whole; it is kept as"), "{log}");
        assert_eq!(fs::read(site.scratch.dir().join("mcr.sock.journal.torn")).unwrap(), torn);
    }
    // A whole one is believed, one of another start of the machine is not.
    relay.signal(Signal::SIGKILL);
    relay.wait(PATIENCE);
    fs::write(&journal, &whole).unwrap();
    relay.start_again(&site);
    assert_eq!(names(&relay.show_all()), ["cam"]);
}

#[test]
fn a_journal_that_cannot_be_written_is_said_and_the_rule_stands() {
    let site = Site::default();
    let relay = Relay::start(&site);
    // A directory in the place of the journal: not even root puts a file there.
    let journal = site.scratch.dir().join("mcr.sock.journal");
    fs::remove_file(&journal).unwrap();
    fs::create_dir_all(journal.join("x")).unwrap();
    let outcome: RuleOutcome =
        relay.json(&["rule", "add", "cam", "--in", "239.1.1.1:5000@in0", "--out", "239.2.2.2:6000@out0"]);
    assert!(
        outcome.warnings.iter().any(|warning| warning.contains("would not survive the daemon")),
        "{outcome:?}"
    );
    assert!(
        relay
            .json::<Status>(&["status"])
            .problems
            .iter()
            .any(|problem| problem.what.contains("would not survive"))
    );
    fs::remove_dir_all(&journal).unwrap();
    // It is tried again by itself.
    wait_until("the journal is written", PATIENCE, || relay.json::<Status>(&["status"]).problems.is_empty());
    assert!(fs::read_to_string(&journal).unwrap().contains("cam"));
}

#[test]
fn a_reload_that_is_refused_changes_nothing_and_is_on_the_screen() {
    let site = Site::default();
    let files = Files::of(&site, &rule("a", 1));
    let relay = files.start(&site);
    relay.wait_until_active("a");
    files.write("mcr.toml", "[[rule]]\nname = \"a\"\nin = 7\n");
    relay.signal(Signal::SIGHUP);
    let problem = || {
        relay.json::<Status>(&["status"]).problems.into_iter().find(|problem| problem.what.contains("reload"))
    };
    wait_until("the refusal is on the screen", PATIENCE, || problem().is_some());
    let problem = problem().unwrap();
    assert!(problem.what.contains("mcr.toml:1:1: the rule has no 'out'"), "{problem:?}");
    assert_eq!(problem.next, format!("mcr config check {}", files.path("mcr.toml")));
    assert_eq!(names(&relay.show_all()), ["a"]);
    let check = relay.cli(&["config", "check", &files.path("mcr.toml")]);
    assert!(check.stdout.contains("3 | in = 7\n  |      ^\n"), "{check}");
    assert!(check.stdout.contains("the rule has no 'out'"), "{check}");
    assert!(check.status == 1 && check.stderr.contains("has 2 mistakes"), "{check}");
    files.write("mcr.toml", &rule("b", 2));
    relay.signal(Signal::SIGHUP);
    wait_until("the new rule is there", PATIENCE, || names(&relay.show_all()) == ["b"]);
    assert!(relay.json::<Status>(&["status"]).problems.is_empty());
}

#[test]
fn a_file_that_cannot_be_used_keeps_the_daemon_from_starting() {
    let site = Site::default();
    let files = Files::of(&site, "[daemon]\nworkerz = 1\n[[rule]]\n");
    let file = files.path("mcr.toml");
    for (file, words) in [
        (file.as_str(), &["mcr.toml:2:1", "'workerz' is no key", "and 2 more"][..]),
        ("/nowhere/mcr.toml", &["/nowhere/mcr.toml cannot be read"][..]),
    ] {
        let line = Relay::refused(Relay::command(&site).args(["--config", file]));
        assert!(words.iter().all(|word| line.contains(word)), "{words:?} in {line}");
    }
    // What is said on the command line goes before the file.
    files.write(
        "mcr.toml",
        &format!("[daemon]\nlog_level = \"error\"\nworkers = 3\nmax_rules = 9\n{}", rule("a", 1)),
    );
    let relay = Relay::start_with(&site, &["--config", &file, "--workers", "1"]);
    let shown = relay.json::<ConfigText>(&["config", "show"]).toml;
    for line in ["workers = 1", "max_rules = 9", "log_level = \"error\""] {
        assert!(shown.lines().any(|shown| shown == line), "{line} in {shown}");
    }
    files.write("mcr.toml", &format!("[daemon]\nlog_level = \"debug\"\nmax_rules = 10\n{}", rule("a", 1)));
    let outcome = load(&relay, &file, &[]);
    let told: Vec<_> =
        outcome.settings.iter().map(|setting| (setting.key.as_str(), setting.needs_restart)).collect();
    assert_eq!(told, [("max_rules", true), ("log_level", false)]);
    assert_eq!(relay.cli(&["log-level", "get"]).ok().trim(), "debug");
}

fn a_thousand_rules_are_loaded_from_a_file() {
    const RULES: u32 = 1000;
    let site = Site::default();
    let rule = |n: u32| {
        let (high, low) = (n / 200, n % 200);
        format!(
            "[[rule]]\nname = \"r{n}\"\nin = \"239.1.{high}.{low}:5000@in0\"\nout = [\"239.2.{high}.{low}:6000@out0\"]\n"
        )
    };
    let files = Files::of(&site, "");
    let relay = files.start(&site);
    files.write("mcr.toml", &(0..RULES).map(rule).collect::<String>());
    let start = Instant::now();
    assert_eq!(load(&relay, &files.path("mcr.toml"), &[]).added.len(), RULES as usize);
    println!("{RULES} rules loaded in {:?} ({})", start.elapsed(), Ground::current().datapath());
    let start = Instant::now();
    assert_eq!(load(&relay, &files.path("mcr.toml"), &[]).outcome, LoadOutcome::Unchanged);
    println!("loaded again, unchanged, in {:?}", start.elapsed());
    relay.wait_until_active("r999");
    let mut sink = site.capture(0);
    for n in [0, 500, 999] {
        let (high, low) = ((n / 200) as u8, (n % 200) as u8);
        site.segments[0].wait_until_joined([239, 1, high, low].into());
        Source::play(
            site.source(),
            Stream { count: 100, ..Stream::to(SocketAddrV4::new([239, 1, high, low].into(), 5000)) },
        );
        sink.exactly(SocketAddrV4::new([239, 2, high, low].into(), 6000), 100);
        relay.balanced(&format!("r{n}"), 100);
    }
    files.write("mcr.toml", "");
    assert_eq!(load(&relay, &files.path("mcr.toml"), &[]).removed.len(), RULES as usize);
    wait_until("every group is left", Duration::from_secs(20), || site.segments[0].joined().is_empty());
}

#[test]
fn a_load_that_was_not_confirmed_does_not_come_back_with_the_next_daemon() {
    let site = Site::default();
    let files = Files::of(&site, &rule("good", 1));
    let file = files.path("mcr.toml");
    let args = ["--config", file.as_str()];
    let mut relay = files.start(&site);
    relay.add("mine", "239.1.1.50:5000@in0", &["239.2.2.50:6000@out1"]);
    files.write("mcr.toml", &rule("bad", 2));
    let stray = |relay: &Relay| {
        let status: Status = relay.json(&["status"]);
        status.problems.iter().any(|problem| problem.what.contains("holds a load that nobody confirmed"))
    };
    // Killed while it waits, and killed after it was taken back.
    for roll_back in [false, true] {
        load(&relay, &file, &["--confirm", "600"]);
        if roll_back {
            let outcome: ConfigOutcome = relay.json(&["config", "rollback"]);
            assert!(outcome.warnings[0].contains("holds a load that nobody confirmed"), "{outcome:?}");
            assert!(stray(&relay));
        }
        relay.signal(Signal::SIGKILL);
        relay.wait(PATIENCE);
        relay.start_again_with(&site, &args);
        assert_eq!(names(&relay.show_all()), ["good", "mine"]);
        assert!(stray(&relay));
    }
    load(&relay, &file, &["--confirm", "600"]);
    relay.cli(&["config", "confirm"]).ok();
    assert!(!stray(&relay));
    relay.signal(Signal::SIGKILL);
    relay.wait(PATIENCE);
    relay.start_again_with(&site, &args);
    assert_eq!(names(&relay.show_all()), ["bad", "mine"]);
    assert!(!stray(&relay));
}

#[test]
fn what_is_written_keeps_to_what_is_there() {
    let site = Site::default();
    let files = Files::of(&site, "");
    let relay = files.start(&site);
    relay.add("mine", "239.1.1.50:5000@in0", &["239.2.2.50:6000@out1"]);
    let file = |name: &str| files.0.join(name);
    // Not text, not regular, and a name that is somebody's.
    fs::write(file("latin.toml"), b"# caf\xe9\n").unwrap();
    refused(&relay, &["config", "save", &files.path("latin.toml")], &["mcr did not write it"]);
    assert_eq!(fs::read(file("latin.toml")).unwrap(), b"# caf\xe9\n");
    refused(&relay, &["config", "save", "/dev/null", "--force"], &["/dev/null is no regular file"]);
    files.write("own.toml.new", "precious");
    relay.cli(&["config", "save", &files.path("own.toml")]).ok();
    assert_eq!(files.read("own.toml.new"), "precious");
    // A link leads to its file, which keeps its mode.
    let kept = file("kept.toml");
    fs::write(&kept, "# Written by mcr\n").unwrap();
    fs::set_permissions(&kept, PermissionsExt::from_mode(0o600)).unwrap();
    std::os::unix::fs::symlink(&kept, file("rules.d/mcr-saved.toml")).unwrap();
    relay.cli(&["config", "save"]).ok();
    assert!(files.read("kept.toml").contains("name = \"mine\""));
    assert_eq!(fs::metadata(&kept).unwrap().permissions().mode() & 0o777, 0o600);
    assert!(fs::symlink_metadata(file("rules.d/mcr-saved.toml")).unwrap().is_symlink());
    let left = |name: &str| name.contains(".mcr-");
    let names = fs::read_dir(&files.0).unwrap().map(|entry| entry.unwrap().file_name());
    assert!(!names.into_iter().any(|name| left(&name.to_string_lossy())));
}

#[test]
fn odd_files_are_told_or_passed_over_and_never_waited_for() {
    let site = Site::default();
    let files = Files::of(&site, &rule("a", 1));
    // A relative path is the same file from anywhere.
    let mut command = Relay::command(&site);
    command.current_dir(&files.0).args(["--config", "mcr.toml"]);
    let relay = Relay::spawn(&site, &mut command);
    assert_eq!(relay.show("a").place, Some(files.path("mcr.toml") + ":1"));
    assert!(load(&relay, &files.path("mcr.toml"), &[]).warnings.is_empty());
    relay.add_with("saved", "239.1.1.9:5000@in0", &["239.2.2.9:6000@out0"], &["--save"]);
    // What an editor keeps there is none of ours.
    std::os::unix::fs::symlink("nobody@nowhere.1", files.0.join("rules.d/.#x.toml")).unwrap();
    load(&relay, &files.path("mcr.toml"), &[]);
    nix::unistd::mkfifo(&files.0.join("rules.d/p.toml"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    relay.signal(Signal::SIGHUP);
    let told = |words: &str| {
        relay.json::<Status>(&["status"]).problems.iter().any(|problem| problem.what.contains(words))
    };
    wait_until("the FIFO is told", PATIENCE, || told("p.toml cannot be read: it is no regular file"));
    fs::remove_file(files.0.join("rules.d/p.toml")).unwrap();
    // A pipe is read once, and has no fragments.
    let before = relay.show_all();
    let script = format!("cat {} | \"$0\" config load /dev/stdin --json", files.path("mcr.toml"));
    let mut piped = relay.call(&[]);
    let binary = piped.get_program().to_owned();
    piped = site.relay.command("sh");
    piped.env("MCR_CONTROL", relay.control()).arg("-c").arg(script).arg(binary);
    let outcome: ConfigOutcome = tests::Process::spawn(&mut piped).answer(tests::relay::CALL).json();
    let removed: Vec<_> = outcome.removed.iter().map(|rule| rule.name.as_deref()).collect();
    assert_eq!((removed, outcome.unchanged), (vec![Some("saved")], 1), "{before:?}");
}

#[test]
fn a_fifo_in_the_place_of_what_was_saved_is_told_and_not_waited_for() {
    let site = Site::default();
    let files = Files::of(&site, "");
    let relay = files.start(&site);
    relay.add("mine", "239.1.1.50:5000@in0", &["239.2.2.50:6000@out1"]);
    nix::unistd::mkfifo(&files.0.join("rules.d/mcr-saved.toml"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    for change in [
        &["rule", "add", "new", "--in", "239.1.1.1:5000@in0", "--out", "239.2.2.1:6000@out1", "--save"][..],
        &["rule", "set", "mine", "--add-out", "239.2.2.1:6000@out1", "--save"],
        &["rule", "remove", "mine", "--save"],
        &["config", "save"],
    ] {
        refused(&relay, change, &["mcr-saved.toml cannot be read: it is no regular file"]);
    }
    assert_eq!(names(&relay.show_all()), ["mine"]);
}

#[test]
fn a_rule_that_was_to_be_saved_and_cannot_be_is_not_added() {
    let site = Site::default();
    let files = Files::of(&site, "");
    let relay = files.start(&site);
    // A link that leads nowhere: nothing is there to be read, and nothing can be written.
    let saved = files.0.join("rules.d/mcr-saved.toml");
    std::os::unix::fs::symlink("/nowhere/saved.toml", &saved).unwrap();
    let add = ["rule", "add", "cam", "--in", "239.1.1.1:5000@in0", "--out", "239.2.2.2:6000@out0"];
    let save = [&add[..], &["--save"]].concat();
    refused(&relay, &save, &["mcr: ", "mcr-saved.toml cannot be written: No such file"]);
    assert!(relay.show_all().is_empty());
    let journal = || fs::read_to_string(site.scratch.dir().join("mcr.sock.journal")).unwrap();
    assert!(!journal().contains("cam"));
    // One that was there stays.
    relay.cli(&add).ok();
    refused(&relay, &save, &["mcr-saved.toml cannot be written"]);
    refused(
        &relay,
        &["rule", "set", "cam", "--add-out", "239.2.2.3:6000@out0", "--save"],
        &["rule 'cam' was changed, but not saved: ", "mcr-saved.toml cannot be written"],
    );
    assert_eq!((relay.show("cam").outputs.len(), relay.show("cam").origin.as_str()), (2, "cli"));
    assert!(journal().contains("239.2.2.3"));
    fs::remove_file(saved).unwrap();
    relay.cli(&["config", "save"]).ok();
    assert_eq!(relay.show("cam").origin, "file");
}

#[test]
fn a_rule_of_the_journal_that_cannot_be_read_can_be_let_go() {
    let site = Site::default();
    let mut relay = Relay::start(&site);
    relay.add_with("cam", "239.1.1.1:5000@in0", &["239.2.2.2:6000@out0"], &["--datapath", "auto"]);
    relay.signal(Signal::SIGKILL);
    relay.wait(PATIENCE);
    // As a later mcr may have written it.
    let journal = site.scratch.dir().join("mcr.sock.journal");
    let text = fs::read_to_string(&journal).unwrap().replace("\"auto\"", "\"teleport\"");
    let [magic, _, body] = text.splitn(3, ' ').collect::<Vec<_>>()[..] else { panic!("{text}") };
    let sum = Sha256::digest(body).iter().fold(String::new(), |sum, byte| sum + &format!("{byte:02x}"));
    fs::write(&journal, format!("{magic} {sum} {body}")).unwrap();
    relay.start_again(&site);
    let problems = |relay: &Relay| relay.json::<Status>(&["status"]).problems;
    let [problem] = &problems(&relay)[..] else { panic!("{:?}", problems(&relay)) };
    assert!(problem.what.contains("rule cam") && problem.what.contains("teleport"), "{problem:?}");
    assert_eq!(problem.next, "mcr rule remove cam");
    let removed: RuleOutcome = relay.json(&["rule", "remove", "cam"]);
    assert_eq!((removed.outcome, removed.rule.name.as_str()), (Outcome::Removed, "cam"));
    assert_eq!(removed.rule.outputs[0].to, "239.2.2.2:6000@out0");
    assert_eq!(problems(&relay), []);
    assert!(!fs::read_to_string(&journal).unwrap().contains("cam"));
}

#[test]
fn a_strangers_journal_where_all_may_write_is_not_believed() {
    let site = Site::default();
    let mut relay = Relay::start(&site);
    relay.add("cam", "239.1.1.1:5000@in0", &["239.2.2.2:6000@out0"]);
    relay.cli(&["stop"]).ok();
    relay.wait(PATIENCE);
    let (dir, journal) = (site.scratch.dir(), site.scratch.dir().join("mcr.sock.journal"));
    std::os::unix::fs::chown(&journal, Some(12_345), None).unwrap();
    fs::set_permissions(dir, PermissionsExt::from_mode(0o1777)).unwrap();
    relay.start_again(&site);
    assert!(relay.show_all().is_empty());
    assert!(
        relay.log().contains("it is user 12345's, in a directory where all may write"),
        "{}",
        relay.log()
    );
}

#[test]
fn the_command_line_bears_on_what_a_file_may_hold() {
    let site = Site::default();
    let files = Files::of(&site, &(rule("a", 1) + &rule("b", 2)));
    let file = files.path("mcr.toml");
    let line = Relay::refused(Relay::command(&site).args(["--config", &file, "--max-rules", "1"]));
    assert!(line.contains("mcr.toml:5") && line.contains("room for 1 rules"), "{line}");
    files.write(
        "mcr.toml",
        &format!(
            "[daemon]\nmax_rules = 1\ndatapath = \"af-packet\"\n{}{}datapath = \"auto\"\n",
            rule("a", 1),
            rule("b", 2)
        ),
    );
    let relay = Relay::start_with(&site, &["--config", &file, "--max-rules", "2"]);
    let asked = |name: &str| relay.show(name).datapath_asked;
    assert_eq!((asked("a"), asked("b")), ("af-packet".to_owned(), "auto".to_owned()));
    relay.cli(&["rule", "set", "a", "--datapath", "auto"]).ok();
    assert_eq!(asked("a"), "auto");
    // A file written of it says so.
    relay.cli(&["config", "save", &files.path("saved.toml")]).ok();
    assert_eq!(files.read("saved.toml").matches("datapath = \"auto\"").count(), 2);
}

tests::on_both_datapaths!(
    reloads_under_eight_streams_lose_nothing,
    saving_and_loading_gives_back_exactly_what_ran,
    rules_added_by_command_survive_the_daemon,
    a_thousand_rules_are_loaded_from_a_file,
);
