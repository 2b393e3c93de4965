//! Redirected rules while there is no daemon, and what the next one makes of them.

#![expect(clippy::unwrap_used, reason = "where it fails, the test fails and says where")]

use std::{
    fs,
    net::{Ipv4Addr, SocketAddrV4},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use mcr::api::wire::{RuleStats, Stats};
use mcr_common::abi;
use nix::{sys::signal::Signal, unistd::Pid};
use serde_json::Value;
use tests::{
    Capture, Ground, Namespace, Process, Relay, Site, Source, bpf, capture::assert_sequence, site::Plan,
    source::Stream, wait::PATIENCE, wait_until,
};

const GROUP: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(239, 1, 1, 1), 5000);
const OTHER: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(239, 1, 1, 2), 5000);
const TO: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(239, 2, 2, 2), 6000);
const OTHER_TO: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(239, 2, 2, 3), 6000);
const TO_BOTH: [&str; 2] = ["239.2.2.2:6000@out0", "239.2.2.3:6000@out1"];

fn site() -> Site {
    Site::build(Plan { ground: Ground::Kernel, ..Plan::default() })
}

fn play(site: &Site, to: SocketAddrV4, rate: u64) -> Source {
    Source::start(site.source(), Stream { rate, size: 200, ..Stream::to(to) })
}

fn kill(relay: &mut Relay<'_>) {
    relay.signal(Signal::SIGKILL);
    relay.wait(PATIENCE);
}

#[track_caller]
fn add(relay: &Relay<'_>, site: &Site, name: &str, group: SocketAddrV4, outputs: &[&str]) {
    let rule = relay.add(name, &format!("{group}@in0"), outputs);
    assert_eq!(rule.datapath.as_deref(), Some("redirect"), "{rule:?}");
    site.segments[0].wait_until_joined(*group.ip());
}

/// Id of the XDP program on an interface of the relay host.
fn program(site: &Site, interface: &str) -> Option<u64> {
    let links = site.relay.json("ip", &["-j", "link", "show", "dev", interface]);
    links.pointer("/0/xdp/prog/id").and_then(Value::as_u64)
}

/// The holders in a namespace.
fn holders(namespace: &Namespace) -> Vec<u32> {
    let is_holder = |pid: &u32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.contains("(mcr-hold)") && !stat.contains(") Z ")
    };
    namespace.processes().into_iter().filter(is_holder).collect()
}

/// All of a stream went to an output, each datagram once and in order, and the ledger says so.
#[track_caller]
fn arrived(
    relay: &Relay<'_>,
    name: &str,
    captures: &mut [(&mut Capture, SocketAddrV4)],
    sent: u64,
) -> RuleStats {
    let stats = relay.balanced(name, sent);
    assert_eq!((stats.received, stats.received_bytes), (sent, sent * 200), "{stats:?}");
    for (capture, to) in captures {
        assert_sequence(&capture.exactly(*to, sent as usize), 0..sent);
    }
    for output in &stats.outputs {
        assert_eq!((output.received, output.sent, output.sent_bytes), (sent, sent, sent * 200), "{stats:?}");
        assert!(output.dropped.is_empty(), "{stats:?}");
    }
    assert!(relay.stats().alarms.is_empty(), "{:?}", relay.stats().alarms);
    stats
}

/// Nothing is left of a daemon.
#[track_caller]
fn all_is_gone(site: &Site, pins: &Path) {
    wait_until("the program is detached", PATIENCE, || program(site, "in0").is_none());
    wait_until("the holder has ended", PATIENCE, || holders(&site.relay).is_empty());
    assert!(!pins.exists(), "{} is left", pins.display());
    site.segments[0].wait_until_left(*GROUP.ip());
}

#[test]
fn a_daemon_that_is_killed_and_started_again_under_load_loses_nothing() {
    let site = site();
    let mut relay = Relay::start(&site);
    add(&relay, &site, "cam1", GROUP, &TO_BOTH);
    // Beside one that has workers, which die too.
    relay.add_with("mic", &format!("{OTHER}@in0"), &["239.2.2.4:6000@out2"], &["--datapath", "af-xdp"]);
    site.segments[0].wait_until_joined(*OTHER.ip());
    let mut captures = [site.capture(0), site.capture(1)];
    let source = play(&site, GROUP, 50_000);
    let other = play(&site, OTHER, 500);
    // A capture that nobody reads fills up.
    let play_on = |captures: &mut [Capture], n| {
        let target = source.sent() + n;
        wait_until("more is sent", PATIENCE, || {
            for capture in captures.iter_mut() {
                capture.all();
            }
            source.sent() >= target
        });
    };
    let since = relay.rule("cam1").since;
    for _ in 0..3 {
        play_on(&mut captures, 25_000);
        kill(&mut relay);
        play_on(&mut captures, 25_000);
        relay.start_again(&site);
        assert_eq!(relay.wait_until_active("cam1").datapath.as_deref(), Some("redirect"));
    }
    other.stop();
    let sent = source.stop();
    // It says from when on it counts: the rule with workers began anew.
    let stats: Stats = relay.json(&["stats"]);
    let of = |name: &str| stats.rules.iter().find(|rule| rule.name == name).map(|rule| &rule.since);
    assert_eq!(of("cam1"), Some(&since));
    assert!(stats.since > since && of("mic") >= Some(&stats.since), "{stats:#?}");
    let [first, second] = &mut captures;
    arrived(&relay, "cam1", &mut [(first, TO), (second, OTHER_TO)], sent);
    // It serves on as if nothing had been.
    let mut capture = site.capture(2);
    relay.wait_until_active("mic");
    Source::play(site.source(), Stream { count: 1_000, ..Stream::to(OTHER) });
    capture.exactly("239.2.2.4:6000".parse().unwrap(), 1_000);
    relay.balanced("cam1", sent);
    relay.remove("cam1");
    site.segments[0].wait_until_left(*GROUP.ip());
    let pins = relay.pins("in0");
    relay.cli(&["stop"]).ok();
    all_is_gone(&site, &pins);
}

#[test]
fn stop_keeps_what_it_is_told_to_keep_and_nothing_else() {
    let site = site();
    let mut relay = Relay::start(&site);
    let by_packet = ["--datapath", "af-packet"];
    relay.add_with("mic", &format!("{OTHER}@in0"), &["239.2.2.4:6000@out2"], &by_packet);
    // Nothing is kept where the kernel does nothing by itself.
    let pins = relay.pins("in0");
    assert_eq!(relay.json::<Value>(&["stop", "--keep"])["kept"], serde_json::json!([]));
    relay.wait(PATIENCE);
    all_is_gone(&site, &pins);

    relay.start_again(&site);
    add(&relay, &site, "cam1", GROUP, &TO_BOTH);
    let mut captures = [site.capture(0), site.capture(1), site.capture(2)];
    let source = play(&site, GROUP, 5_000);
    let other = play(&site, OTHER, 1_000);
    source.wait_for_more(1_000);
    let said = relay.cli(&["stop", "--keep"]);
    assert!(said.ok().ends_with("; these go on without it: cam1\n"), "{said}");
    relay.wait(PATIENCE);
    let stopped = relay.cli(&["stop"]);
    let hint = "mcr: what comes in on in0 is relayed on without a daemon: `mcr run` takes it over, and `mcr stop` ends it then\n";
    assert!(stopped.status == 3 && stopped.stderr.starts_with(hint), "{stopped}");
    let mic = captures[2].count("239.2.2.4:6000".parse().unwrap());
    site.segments[0].wait_until_left(*OTHER.ip());
    source.wait_for_more(2_000);
    assert_eq!(captures[2].count("239.2.2.4:6000".parse().unwrap()), mic, "what has a worker has ended");
    assert_eq!(site.groups("in0"), [*GROUP.ip()]);
    other.stop();
    relay.start_again(&site);
    source.wait_for_more(1_000);
    let sent = source.stop();
    let [first, second, _] = &mut captures;
    arrived(&relay, "cam1", &mut [(first, TO), (second, OTHER_TO)], sent);
    // What ends plainly takes everything with it.
    relay.signal(Signal::SIGTERM);
    relay.wait(PATIENCE);
    all_is_gone(&site, &pins);
    let stopped = relay.cli(&["stop"]);
    assert!(stopped.status == 3 && stopped.stderr.starts_with("mcr: no daemon on "), "{stopped}");
}

/// Writes the file of rules.
fn file(site: &Site, rules: &str) -> PathBuf {
    let path = site.scratch.dir().join("mcr.toml");
    fs::write(&path, rules).unwrap();
    path
}

fn rule(name: &str, group: SocketAddrV4, outputs: &[&str]) -> String {
    format!("[[rule]]\nname = \"{name}\"\nin = \"{group}@in0\"\nout = {outputs:?}\n\n")
}

#[test]
fn the_next_daemon_applies_the_difference_to_its_own_rules() {
    let site = site();
    let third = SocketAddrV4::new(Ipv4Addr::new(239, 1, 1, 3), 5000);
    let stays = rule("stays", GROUP, &TO_BOTH);
    let changes = |outputs: &[&str]| rule("changes", OTHER, outputs);
    let path = file(
        &site,
        &(stays.clone()
            + &changes(&["239.2.2.5:6000@out0"])
            + &rule("goes", third, &["239.2.2.6:6000@out0"])),
    );
    let config = ["--config", path.to_str().unwrap()];
    let mut relay = Relay::start_with(&site, &config);
    for group in [GROUP, OTHER, third] {
        site.segments[0].wait_until_joined(*group.ip());
    }
    let mut captures = [site.capture(0), site.capture(1)];
    let sources = [play(&site, GROUP, 5_000), play(&site, OTHER, 2_000), play(&site, third, 1_000)];
    sources[0].wait_for_more(2_000);
    kill(&mut relay);
    sources[0].wait_for_more(1_000);
    // Another output beside the first, another name for one, one gone, and one that is new.
    let fourth = SocketAddrV4::new(Ipv4Addr::new(239, 1, 1, 4), 5000);
    let new = rule("new", fourth, &["239.2.2.7:6000@out1"]);
    file(&site, &(stays + &changes(&["239.2.2.8:6000@out1", "239.2.2.5:6000@out0"]) + &new));
    relay.start_again_with(&site, &config);
    site.segments[0].wait_until_left(*third.ip());
    site.segments[0].wait_until_joined(*fourth.ip());
    let gone: SocketAddrV4 = "239.2.2.6:6000".parse().unwrap();
    let of_gone = captures[0].count(gone);
    Source::play(site.source(), Stream { count: 500, size: 200, ..Stream::to(fourth) });
    sources[0].wait_for_more(1_000);
    let [sent, of_changed, _] = sources.map(Source::stop);
    let [first, second] = &mut captures;
    arrived(&relay, "stays", &mut [(first, TO), (second, OTHER_TO)], sent);
    let counted = relay.balanced("changes", of_changed);
    assert_sequence(&first.exactly("239.2.2.5:6000".parse().unwrap(), of_changed as usize), 0..of_changed);
    let late = second.to("239.2.2.8:6000".parse().unwrap());
    assert_sequence(&late, of_changed - late.len() as u64..of_changed);
    let of = |endpoint: &str| counted.outputs.iter().find(|output| output.to.starts_with(endpoint)).unwrap();
    assert_eq!(of("239.2.2.5").sent, of_changed);
    // Known before it was one of the outputs.
    let (new, pending) =
        (of("239.2.2.8"), of("239.2.2.8").dropped.get("pending").copied().unwrap_or_default());
    assert_eq!((new.sent, new.received), (late.len() as u64, late.len() as u64 + pending));
    assert_eq!(relay.balanced("new", 500).received, 500);
    assert_eq!(first.count(gone), of_gone, "a rule that is gone relays no more");
}

#[test]
fn rules_that_come_under_another_name_go_on_too() {
    let site = site();
    let path = file(&site, &rule("cam1", GROUP, &TO_BOTH));
    let config = ["--config", path.to_str().unwrap()];
    let mut relay = Relay::start_with(&site, &config);
    site.segments[0].wait_until_joined(*GROUP.ip());
    let mut captures = [site.capture(0), site.capture(1)];
    let source = play(&site, GROUP, 5_000);
    source.wait_for_more(1_000);
    kill(&mut relay);
    // In another order, which is another set of outputs.
    file(&site, &rule("camera", GROUP, &["239.2.2.3:6000@out1", "239.2.2.2:6000@out0"]));
    relay.start_again_with(&site, &config);
    source.wait_for_more(1_000);
    let sent = source.stop();
    let [first, second] = &mut captures;
    arrived(&relay, "camera", &mut [(first, TO), (second, OTHER_TO)], sent);
}

#[test]
fn another_build_another_abi_and_other_sizes_take_over_without_a_gap() {
    let site = site();
    let mut relay = Relay::start(&site);
    add(&relay, &site, "cam1", GROUP, &TO_BOTH);
    let mut captures = [site.capture(0), site.capture(1)];
    let source = play(&site, GROUP, 5_000);
    let other = site.scratch.dir().join("other.o");
    fs::write(&other, bpf::object_of_another_build()).unwrap();
    let another_build = ["--bpf-object", other.to_str().unwrap()];
    let pins = relay.pins("in0");
    let older = || {
        let marks = pins.join("mcr_marks");
        let version = (abi::ABI_VERSION - 1).to_le_bytes().map(|byte| byte.to_string());
        let mut args =
            vec!["map", "update", "pinned", marks.to_str().unwrap(), "key", "0", "0", "0", "0", "value"];
        args.extend(version.iter().map(String::as_str));
        site.relay.output("bpftool", &args);
    };
    let as_it_was = || {};
    let rows: [(_, &[_], &dyn Fn()); 4] = [
        ("another build", &another_build, &as_it_was),
        ("the former build", &[], &as_it_was),
        ("an older ABI", &[], &older),
        ("room for fewer rules", &["--max-rules", "16"], &as_it_was),
    ];
    for (what, args, before) in rows {
        source.wait_for_more(1_000);
        let former = program(&site, "in0");
        kill(&mut relay);
        before();
        source.wait_for_more(500);
        relay.start_again_with(&site, args);
        wait_until("the program is another", PATIENCE, || {
            let now = program(&site, "in0");
            now.is_some() && now != former
        });
        assert_eq!(relay.wait_until_active("cam1").datapath.as_deref(), Some("redirect"), "{what}");
    }
    source.wait_for_more(1_000);
    let sent = source.stop();
    let [first, second] = &mut captures;
    arrived(&relay, "cam1", &mut [(first, TO), (second, OTHER_TO)], sent);
    relay.cli(&["stop"]).ok();
    all_is_gone(&site, &pins);
}

#[test]
fn a_daemon_that_dies_while_it_takes_over_leaves_all_to_the_next() {
    let site = site();
    let mut relay = Relay::start(&site);
    add(&relay, &site, "cam1", GROUP, &TO_BOTH);
    let mut captures = [site.capture(0), site.capture(1)];
    let source = play(&site, GROUP, 5_000);
    let since = relay.rule("cam1").since;
    // Each makes all its maps anew, for more rules or fewer, and is killed at some point of that.
    for (max_rules, after) in (10..).zip((0..160).step_by(8)) {
        kill(&mut relay);
        let args = ["--max-rules", &max_rules.to_string()];
        let mut short = Process::spawn(Relay::command(&site).args(args));
        std::thread::sleep(Duration::from_millis(after));
        short.signal(Signal::SIGKILL);
        short.wait(PATIENCE);
        relay.start_again(&site);
        assert!(!relay.log().contains("cleared what a daemon before left: /"), "{}", relay.log());
    }
    let sent = source.stop();
    wait_until("every datagram has come", PATIENCE, || captures[0].count(TO) as u64 == sent);
    let [first, second] = &mut captures;
    assert_sequence(&first.exactly(TO, sent as usize), 0..sent);
    assert_sequence(&second.exactly(OTHER_TO, sent as usize), 0..sent);
    assert_eq!(relay.balanced("cam1", sent).since, since);
    let left: Vec<_> = fs::read_dir(relay.pins("in0").parent().unwrap()).unwrap().flatten().collect();
    assert_eq!(left.len(), 1, "{left:?}");
}

#[test]
fn without_a_journal_counters_begin_anew_and_balance() {
    let site = site();
    let path = file(&site, &rule("cam1", GROUP, &TO_BOTH));
    let config = ["--config", path.to_str().unwrap()];
    let mut relay = Relay::start_with(&site, &config);
    site.segments[0].wait_until_joined(*GROUP.ip());
    let source = play(&site, GROUP, 20_000);
    for _ in 0..6 {
        source.wait_for_more(4_000);
        kill(&mut relay);
        fs::remove_file(site.scratch.dir().join("mcr.sock.journal")).unwrap();
        relay.start_again_with(&site, &config);
    }
    source.wait_for_more(4_000);
    source.stop();
    let stats = relay.balanced("cam1", relay.rule("cam1").matched);
    assert!(stats.outputs.iter().all(|output| output.sent == stats.received), "{stats:?}");
    assert!(relay.stats().alarms.is_empty(), "{:?}", relay.stats().alarms);
}

#[test]
fn what_cannot_be_taken_over_is_cleared_and_made_anew() {
    let site = site();
    let mut relay = Relay::start(&site);
    add(&relay, &site, "cam1", GROUP, &TO_BOTH);
    let pins = relay.pins("in0");
    let plays = |relay: &Relay<'_>| {
        site.segments[0].wait_until_joined(*GROUP.ip());
        relay.wait_until_active("cam1");
        let mut capture = site.capture(0);
        let before = relay.rule("cam1").matched;
        Source::play(site.source(), Stream { count: 500, ..Stream::to(GROUP) });
        assert_sequence(&capture.exactly(TO, 500), 0..500);
        relay.balanced("cam1", before + 500);
        assert!(relay.stats().alarms.is_empty());
    };
    plays(&relay);

    // A stranger's map in the place of ours.
    kill(&mut relay);
    fs::remove_file(pins.join("mcr_flows_v4")).unwrap();
    let path = pins.join("mcr_flows_v4");
    let make = ["type", "hash", "key", "12", "value", "8", "entries", "16", "name", "strange"];
    let args: Vec<_> = ["map", "create", path.to_str().unwrap()].into_iter().chain(make).collect();
    site.relay.output("bpftool", &args);
    relay.start_again(&site);
    assert!(relay.log().contains("cleared what a daemon before left"), "{}", relay.log());
    plays(&relay);

    // The interface has another name, and a directory is no interface's.
    kill(&mut relay);
    site.relay.ip(&["link set in0 down", "link set in0 name in9", "link set in9 up"]);
    fs::create_dir(pins.with_file_name("no:such/..".trim_end_matches("/.."))).unwrap();
    relay.start_again(&site);
    wait_until("the program is detached", PATIENCE, || program(&site, "in9").is_none());
    site.segments[0].wait_until_left(*GROUP.ip());
    assert!(!pins.exists());
    site.relay.ip(&["link set in9 down", "link set in9 name in0", "link set in0 up"]);
    plays(&relay);

    // It is gone, and was made anew.
    kill(&mut relay);
    site.segments[0].unplug(&site.relay);
    site.segments[0].plug(&site.relay);
    site.relay.ip(&["link set in0 up"]);
    relay.start_again(&site);
    plays(&relay);

    // Somebody else's program is on it.
    kill(&mut relay);
    ebpf_gone(&site, &pins);
    let stranger = bpf::ForeignXdp::attach(&site.relay, "in0");
    relay.start_again(&site);
    assert_eq!(program(&site, "in0"), Some(stranger.id.into()));
    assert_eq!(relay.wait_until_active("cam1").datapath.as_deref(), Some("af-packet"));
    drop(stranger);
}

/// Somebody detaches our program and leaves its pins.
fn ebpf_gone(site: &Site, pins: &Path) {
    fs::remove_file(pins.join("link")).unwrap();
    wait_until("the program is detached", PATIENCE, || program(site, "in0").is_none());
}

#[test]
fn a_start_that_is_refused_leaves_what_goes_on() {
    let site = site();
    let mut relay = Relay::start(&site);
    add(&relay, &site, "cam1", GROUP, &TO_BOTH);
    let mut captures = [site.capture(0), site.capture(1)];
    let source = play(&site, GROUP, 5_000);
    source.wait_for_more(500);
    kill(&mut relay);
    let path = file(
        &site,
        &(rule("one", OTHER, &["239.2.2.9:1@out0"]) + &rule("two", OTHER, &["239.2.2.9:2@out0"])),
    );
    for args in
        [&["--config", path.to_str().unwrap()][..], &["--cpus", "1023"], &["--group", "no-such-group"]]
    {
        Relay::refused(Relay::command(&site).args(args));
        source.wait_for_more(500);
    }
    relay.start_again(&site);
    let sent = source.stop();
    let [first, second] = &mut captures;
    arrived(&relay, "cam1", &mut [(first, TO), (second, OTHER_TO)], sent);
}

#[test]
fn memberships_change_hands_when_a_rule_changes_its_datapath() {
    let site = site();
    let relay = Relay::start(&site);
    add(&relay, &site, "cam1", GROUP, &TO_BOTH);
    wait_until("it is held", PATIENCE, || holders(&site.relay).len() == 1);
    let source = play(&site, GROUP, 5_000);
    for _ in 0..3 {
        source.wait_for_more(500);
        relay.set("cam1", &["--datapath", "af-xdp"]);
        wait_until("nothing is to be held any more", PATIENCE, || holders(&site.relay).is_empty());
        source.wait_for_more(500);
        relay.set("cam1", &["--datapath", "redirect"]);
        wait_until("it is held again", PATIENCE, || holders(&site.relay).len() == 1);
    }
    // Had the group been left in between the bridge had cut the stream.
    let sent = source.stop();
    wait_until("every datagram has come", PATIENCE, || relay.rule("cam1").matched == sent);
}

#[test]
fn a_holder_that_is_killed_is_missed_only_without_a_daemon() {
    let site = site();
    let mut relay = Relay::start(&site);
    add(&relay, &site, "cam1", GROUP, &TO_BOTH);
    let held = || holders(&site.relay).first().copied();
    wait_until("it is held", PATIENCE, || held().is_some());
    let kill_holder = || {
        let holder = held().unwrap();
        nix::sys::signal::kill(Pid::from_raw(holder.cast_signed()), Signal::SIGKILL).unwrap();
        holder
    };
    let mut captures = [site.capture(0), site.capture(1)];
    let source = play(&site, GROUP, 5_000);
    let former = kill_holder();
    wait_until("there is another", PATIENCE, || held().is_some_and(|holder| holder != former));
    source.wait_for_more(500);
    kill(&mut relay);
    source.wait_for_more(500);
    let (start, before) = (Instant::now(), source.sent());
    kill_holder();
    site.segments[0].wait_until_left(*GROUP.ip());
    let cut_after = start.elapsed();
    relay.start_again(&site);
    site.segments[0].wait_until_joined(*GROUP.ip());
    let outage = start.elapsed();
    let resumed = source.sent();
    source.wait_for_more(1_000);
    let sent = source.stop();
    let mut matched = 0;
    wait_until("the stream has ended", Duration::from_secs(5), || {
        let before = std::mem::replace(&mut matched, relay.rule("cam1").matched);
        std::thread::sleep(Duration::from_millis(50));
        before == matched && matched > 0
    });
    let lost = sent - matched;
    assert!((1..=resumed - before).contains(&lost), "{lost} lost of {} sent meanwhile", resumed - before);
    // Before and after the outage nothing is missing, and nothing comes twice.
    for (capture, to) in captures.iter_mut().zip([TO, OTHER_TO]) {
        let sequence: Vec<_> =
            capture.exactly(to, matched as usize).iter().map(tests::capture::Captured::sequence).collect();
        let gaps: Vec<_> = sequence.windows(2).filter(|pair| pair[1] != pair[0] + 1).collect();
        assert_eq!(gaps.len(), 1, "{gaps:?}");
        assert_eq!((sequence[0], gaps[0][1] - gaps[0][0] - 1, sequence.last()), (0, lost, Some(&(sent - 1))));
    }
    relay.balanced("cam1", matched);
    println!(
        "holder and daemon killed: the bridge cut the stream within {} ms, {} ms until the next daemon had joined, {lost} lost",
        cut_after.as_millis(),
        outage.as_millis()
    );
}
