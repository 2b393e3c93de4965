//! The daemon checks its own ledger: it balances, and where it does not, that is an alarm.

#![expect(clippy::unwrap_used, reason = "where it fails, the test fails and says where")]

use std::{
    fs::{self, File},
    net::{Ipv4Addr, SocketAddrV4},
    os::fd::AsFd,
    time::Duration,
};

use mcr::{
    api::{
        event::{Event, Occurrence},
        wire::{Alarm, DeviceStats, Health, RuleStats, Status},
    },
    datapath::af_xdp,
    rule::{OutputSlot, RuleSlot},
    ruleset::OUTPUTS_PER_RULE,
    worker::ledger::{Layout, Ledger},
};
use mcr_common::abi::DEFAULT_MAX_RULES;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tests::{
    RawSender, Relay, Site, Source,
    relay::{interface_balances, lost, outputs_balance, unaccounted},
    site::{ETH, Plan},
    source::Stream,
    wait::PATIENCE,
    wait_for, wait_until,
};

const GROUP: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(239, 1, 1, 1), 5000);

/// Longer than traffic must rest before what is missing is an alarm, with the look that follows.
const AT_REST: u64 = 5;

/// A relay with the rule `cam1`, which is at work.
fn relaying(site: &Site) -> Relay<'_> {
    let relay = Relay::start(site);
    relay.add("cam1", "239.1.1.1:5000@in0", &["239.2.2.2:6000@out0", "239.2.2.3:6000@out1"]);
    site.segments[0].wait_until_joined(*GROUP.ip());
    relay
}

fn status(relay: &Relay<'_>) -> Status {
    relay.json(&["status"])
}

/// Waits until the rule has had no datagram for so long that every gap would have been seen.
fn wait_until_rested(relay: &Relay<'_>) {
    wait_until("the traffic has rested", PATIENCE, || {
        relay.rule("cam1").idle_seconds.is_some_and(|idle| idle >= AT_REST)
    });
}

#[track_caller]
fn assert_no_alarm(relay: &Relay<'_>) {
    let stats = relay.stats();
    assert_eq!(stats.alarms, [], "{stats:#?}");
    assert!(!relay.log().contains("ledger:"), "{}", relay.log());
}

fn worker(relay: &Relay<'_>) -> Pid {
    Pid::from_raw(relay.workers()[0].pid.unwrap().cast_signed())
}

fn the_ledger_balances_while_traffic_plays_and_when_it_rests() {
    let site = Site::default();
    let relay = relaying(&site);
    // One beside it that goes: what it counted stays in the sum of its interface.
    relay.add("brief", "239.1.1.2:5000@in0", &["239.2.2.4:6000@out2"]);
    let brief = SocketAddrV4::new(Ipv4Addr::new(239, 1, 1, 2), 5000);
    site.segments[0].wait_until_joined(*brief.ip());
    let other = Source::start(site.source(), Stream { rate: 500, ..Stream::to(brief) });
    let source = Source::start(site.source(), Stream { rate: 10_000, ..Stream::to(GROUP) });
    other.wait_for_more(300);
    relay.remove("brief");
    relay.add("later", "239.1.1.3:5000@in0", &["239.2.2.5:6000@out2"]);
    for _ in 0..8 {
        source.wait_for_more(5_000);
        assert_eq!(relay.stats().alarms, []);
    }
    let _ = other.stop();
    let sent = source.stop();
    relay.balanced("cam1", sent);
    wait_until_rested(&relay);
    assert_no_alarm(&relay);
    let status = status(&relay);
    assert_eq!((status.health, status.rules.unseen, status.rules.stalled), (Health::Active, 1, 0));
    if tests::Ground::current() == tests::Ground::Kernel {
        assert!(relay.workers().is_empty());
        return;
    }
    // The queue has all that the interface has.
    let interface = relay.interface("in0");
    let [queue] = &interface.queues[..] else { panic!("{interface:?}") };
    assert_eq!((queue.steered, queue.received), (interface.verdicts["steered"], interface.received));
    assert_eq!((&queue.worker, queue.dropped.len()), (&relay.workers()[0].id, 0));
}

fn the_ledger_balances_after_a_worker_was_killed() {
    let site = Site::default();
    let relay = relaying(&site);
    let source = Source::start(site.source(), Stream { rate: 10_000, ..Stream::to(GROUP) });
    for _ in 0..2 {
        source.wait_for_more(5_000);
        let former = worker(&relay);
        kill(former, Signal::SIGKILL).unwrap();
        wait_until("the worker is back", PATIENCE, || {
            let worker = &relay.workers()[0];
            worker.state == "running" && worker.pid.is_some_and(|pid| pid != former.as_raw().cast_unsigned())
        });
    }
    source.wait_for_more(20_000);
    let sent = source.stop();
    wait_until("every datagram is accounted for", PATIENCE, || {
        let (rule, interface) = (relay.rule("cam1"), relay.interface("in0"));
        outputs_balance(&rule) && interface_balances(&interface) && unaccounted(&rule) <= lost(&interface)
    });
    wait_until_rested(&relay);
    assert_no_alarm(&relay);
    let matched = relay.rule("cam1").matched;
    assert!(matched == sent || relay.stats().rules[0].datapath.as_deref() == Some("af-packet"), "{matched}");
}

fn two_queues_have_a_row_each() {
    let site = Site::build(Plan { queues: 2, ..Plan::default() });
    let relay = Relay::start_with(&site, &["--workers", "2"]);
    relay.add("cam1", "239.1.1.1:5000@in0", &["239.2.2.2:6000@out0"]);
    site.segments[0].wait_until_joined(*GROUP.ip());
    for port in 0..20 {
        let stream = Stream { count: 100, port: 40_000 + port, rate: 20_000, ..Stream::to(GROUP) };
        Source::play(site.source(), stream);
    }
    relay.balanced("cam1", 2_000);
    let interface = relay.interface("in0");
    let received: Vec<_> = interface.queues.iter().map(|queue| queue.received).collect();
    assert_eq!((received.len(), received.iter().sum::<u64>()), (2, 2_000), "{interface:?}");
    assert_eq!(interface.queues.iter().map(|queue| queue.steered).sum::<u64>(), 2_000, "{interface:?}");
    let workers: Vec<_> = relay.workers().into_iter().map(|worker| (worker.id, worker.received)).collect();
    let of_queues: Vec<_> =
        interface.queues.iter().map(|queue| (queue.worker.clone(), queue.received)).collect();
    assert_eq!(of_queues, workers);
}

/// The ledger of the daemon's only worker.
fn ledger(relay: &Relay<'_>) -> Ledger {
    let folder = format!("/proc/{}/fd", relay.pid());
    let mut paths = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let is_ledger = |path: &std::path::PathBuf| {
        fs::read_link(path).is_ok_and(|to| to.to_string_lossy().contains("mcr-ledger"))
    };
    let file = File::options().read(true).write(true).open(paths.find(is_ledger).unwrap()).unwrap();
    let layout = Layout {
        queues: af_xdp::MAX_QUEUES,
        rules: DEFAULT_MAX_RULES,
        outputs: DEFAULT_MAX_RULES * OUTPUTS_PER_RULE,
    };
    Ledger::map(file.as_fd(), layout).unwrap()
}

fn alarms(relay: &Relay<'_>, number: usize) -> Vec<Alarm> {
    wait_for(&format!("{number} alarms"), PATIENCE, || {
        let alarms = relay.stats().alarms;
        (alarms.len() == number).then_some(alarms)
    })
}

fn a_gap_at_rest_is_an_alarm_until_it_is_gone() {
    let site = Site::default();
    let relay = relaying(&site);
    Source::play(site.source(), Stream { count: 1_000, ..Stream::to(GROUP) });
    relay.balanced("cam1", 1_000);
    let ledger = ledger(&relay);
    let output = ledger.output(OutputSlot(0));
    assert_eq!((output.received.get(), output.sent.get()), (1_000, 1_000));
    let mut events = relay.events();

    output.received.add(5);
    let [alarm] = &alarms(&relay, 1)[..] else { unreachable!() };
    let words = "ledger: output 239.2.2.2:6000@out0 of rule cam1: received 1,005 is 1,000 sent, 0 dropped and 5 \
                 unaccounted for";
    assert_eq!((&alarm.what[..], alarm.gap, &alarm.next[..]), (words, 5, "mcr stats cam1"));
    let now = status(&relay);
    assert_eq!((now.health, &now.alarms[..]), (Health::Failed, std::slice::from_ref(alarm)));
    assert_eq!((&now.problems[0].what[..], &now.problems[0].next[..]), (words, "mcr stats cam1"));
    assert!(relay.cli(&["status"]).ok().contains(&format!("! {words}\n  next: mcr stats cam1\n")));
    let screen = relay.cli(&["stats"]).ok().split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(screen.contains(&format!("! {words}")), "{screen}");
    let said = |relay: &Relay<'_>| relay.log().lines().filter(|line| line.contains(words)).count();
    assert!(relay.log().lines().any(|line| line.contains("ERROR") && line.contains(words)));
    assert_eq!(said(&relay), 1);

    output.received.set(1_000);
    alarms(&relay, 0);
    assert_eq!(status(&relay).health, Health::Active);
    assert!(relay.log().contains("it balances again"));
    wait_until("both are told", PATIENCE, || events.stdout().contains("alarm.cleared"));
    let told: Vec<Event> = events.stdout().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let told = told.into_iter().map(|event| event.occurrence);
    let told: Vec<_> = told.filter(|told| !matches!(told, Occurrence::RuleStalled { .. })).collect();
    let since = alarm.since.clone();
    let cleared = Occurrence::AlarmCleared { what: words.to_owned(), since: since.clone() };
    let raised = Occurrence::AlarmRaised { what: words.to_owned(), gap: 5, since, next: alarm.next.clone() };
    assert_eq!(told, [raised, cleared]);
    assert!(events.ended().is_none());
    assert_eq!(said(&relay), 2);
}

fn every_equality_is_watched() {
    let site = Site::default();
    let relay = relaying(&site);
    Source::play(site.source(), Stream { count: 1_000, ..Stream::to(GROUP) });
    relay.balanced("cam1", 1_000);
    let (ledger, datapath) = (ledger(&relay), tests::Ground::current().datapath());
    let said = |alarms: &[Alarm]| alarms.iter().map(|alarm| alarm.what.clone()).collect::<Vec<_>>();

    ledger.queue(0).received.add(3);
    let expected = [
        format!(
            "ledger: in0 by {datapath}: steered 1,000 is 1,003 received and 0 dropped, which is 3 too many"
        ),
        format!(
            "ledger: workers of in0 by {datapath}: received 1,003 is 1,000 of rules, 0 discarded and 3 unaccounted for"
        ),
    ];
    assert_eq!(said(&alarms(&relay, 2)), expected);
    ledger.queue(0).received.set(1_000);
    alarms(&relay, 0);

    ledger.rule(RuleSlot(0)).received.add(2);
    let expected = [
        format!(
            "ledger: workers of in0 by {datapath}: received 1,000 is 1,002 of rules and 0 discarded, which is 2 too many"
        ),
        "ledger: all rules of in0: matched for workers 1,000 is 1,002 received, looped or cut and 0 lost by the \
         interface, which is 2 too many"
            .to_owned(),
        "ledger: rule cam1: matched 1,000 is 1,002 received and 0 dropped, which is 2 too many".to_owned(),
    ];
    assert_eq!(said(&alarms(&relay, 3)), expected);
    ledger.rule(RuleSlot(0)).received.set(1_000);
    alarms(&relay, 0);
}

fn more_than_can_be_in_flight_is_an_alarm_while_it_plays() {
    let site = Site::default();
    let relay = relaying(&site);
    let source = Source::start(site.source(), Stream { rate: 2_000, ..Stream::to(GROUP) });
    source.wait_for_more(500);
    let ledger = ledger(&relay);
    // The worker alone writes while it runs.
    let pid = worker(&relay);
    kill(pid, Signal::SIGSTOP).unwrap();
    ledger.output(OutputSlot(1)).received.add(10_000);
    kill(pid, Signal::SIGCONT).unwrap();
    let [alarm] = &alarms(&relay, 1)[..] else { unreachable!() };
    assert!(
        alarm.gap >= 10_000 && alarm.what.contains("output 239.2.2.3:6000@out1 of rule cam1"),
        "{alarm:?}"
    );
    let sent = source.stop();
    relay.remove("cam1");
    alarms(&relay, 0);
    assert!(sent > 0 && relay.log().contains("what an alarm was about is gone"), "{}", relay.log());
}

#[test]
fn a_rule_that_stalls_is_said() {
    let site = Site::default();
    let relay = relaying(&site);
    relay.add("idle", "239.1.1.2:5000@in0", &["239.2.2.4:6000@out2"]);
    Source::play(site.source(), Stream { count: 100, ..Stream::to(GROUP) });
    let first = relay.balanced("cam1", 100);
    assert!(!first.stalled && first.last_seen.is_some());
    let stalled = wait_for("the rule is stalled", Duration::from_secs(20), || {
        Some(relay.rule("cam1")).filter(|rule: &RuleStats| rule.stalled)
    });
    assert!(stalled.idle_seconds.unwrap() >= 10, "{stalled:?}");
    let now = status(&relay);
    assert_eq!((now.health, now.rules.stalled, now.rules.unseen), (Health::Active, 1, 1));
    let [problem] = &now.problems[..] else { panic!("{now:?}") };
    let last = stalled.last_seen.unwrap();
    assert!(problem.what.starts_with("rule cam1: no datagram for 1"), "{problem:?}");
    assert!(problem.what.ends_with(&format!(" s (the last at {last})")), "{problem:?}");
    assert_eq!(problem.next, "mcr stats cam1");
    let screen = relay.cli(&["stats"]);
    assert!(screen.ok().contains("none for 1"), "{screen}");
    let idle = relay.rule("idle");
    assert_eq!((idle.stalled, idle.last_seen, idle.idle_seconds), (false, None, None));

    Source::play(site.source(), Stream { count: 100, ..Stream::to(GROUP) });
    assert!(!relay.balanced("cam1", 200).stalled);
    assert_eq!(status(&relay).problems, []);
}

fn device(relay: &Relay<'_>, name: &str) -> DeviceStats {
    let devices = relay.stats().devices;
    devices.into_iter().find(|device| device.name == name).unwrap_or_else(|| panic!("no device {name}"))
}

#[test]
fn what_a_qdisc_drops_is_a_row_of_its_device() {
    let site = Site::default();
    let relay = relaying(&site);
    site.relay.output(
        "tc",
        &["qdisc", "add", "dev", "out0", "root", "tbf", "rate", "1mbit", "burst", "3000", "limit", "9000"],
    );
    Source::play(site.source(), Stream { count: 500, rate: 2_000, ..Stream::to(GROUP) });
    relay.balanced("cam1", 500);
    let shown = || {
        let shown = site.relay.json("tc", &["-s", "-j", "qdisc", "show", "dev", "out0"]);
        ["drops", "overlimits"].map(|key| shown[0][key].as_u64().unwrap())
    };
    let [drops, overlimits] = wait_for("the qdisc has sent what it held", PATIENCE, || {
        let before = shown();
        let found = device(&relay, "out0");
        let here = ["tbf drops", "tbf overlimits"].map(|name| found.qdisc.get(name).copied().unwrap_or(0));
        (before == here && shown() == here).then_some(here)
    });
    assert!(drops > 0 && overlimits > 0);
    assert_eq!(device(&relay, "out1").qdisc, [].into());
    let screen = relay.cli(&["stats"]);
    assert!(screen.ok().contains("tbf drops"), "{screen}");

    // It goes on where another takes its place, and where the device is made anew.
    site.relay.output(
        "tc",
        &[
            "qdisc", "replace", "dev", "out0", "root", "handle", "7:", "tbf", "rate", "2mbit", "burst",
            "3000", "limit", "9000",
        ],
    );
    assert_eq!(device(&relay, "out0").qdisc["tbf drops"], drops);
    site.sinks[0].unplug(&site.relay);
    wait_until("the device is gone", PATIENCE, || relay.show("cam1").outputs[0].health == Health::Pending);
    site.sinks[0].plug(&site.relay);
    site.relay.ip(&["link set out0 up"]);
    relay.wait_until_active("cam1");
    assert_eq!(device(&relay, "out0").qdisc["tbf drops"], drops);
    assert_no_alarm(&relay);
}

#[test]
fn what_the_kernel_and_the_driver_drop_on_ingress_are_rows_of_the_device() {
    let site = Site::build(Plan { queues: 2, ..Plan::default() });
    let relay = Relay::start_with(&site, &["--workers", "1"]);
    relay.add("cam1", "239.1.1.1:5000@in0", &["239.2.2.2:6000@out0"]);
    site.segments[0].wait_until_joined(*GROUP.ip());
    let shown = || {
        let shown = site.relay.json("ip", &["-j", "-s", "-s", "link", "show", "dev", "in0"]);
        shown[0]["stats64"]["rx"]["dropped"].as_u64().unwrap()
    };
    let (before, first) = (shown(), device(&relay, "in0"));
    let had = |of: &DeviceStats| of.link.get("rx_dropped").copied().unwrap_or(0);

    // A protocol that nobody serves.
    let mut frame = vec![0; 60];
    frame[..6].fill(0xff);
    frame[6] = 2;
    frame[12..14].copy_from_slice(&0x88b5_u16.to_be_bytes());
    let sender = RawSender::new(site.source(), ETH);
    for _ in 0..100 {
        sender.send(&frame);
    }
    wait_until("the kernel has dropped them", PATIENCE, || shown() >= before + 100);
    let second = device(&relay, "in0");
    assert_eq!(had(&second) - had(&first), shown() - before);

    // A worker that takes nothing: its RX ring fills, which the driver counts too.
    let pid = worker(&relay);
    kill(pid, Signal::SIGSTOP).unwrap();
    Source::play(site.source(), Stream { count: 9_000, rate: 20_000, size: 100, ..Stream::to(GROUP) });
    kill(pid, Signal::SIGCONT).unwrap();
    relay.balanced("cam1", 9_000);
    let stats = relay.stats();
    let interface = stats.interfaces.iter().find(|interface| interface.name == "in0").unwrap();
    let full: u64 = interface.dropped.values().sum();
    assert!(full >= 9_000 - u64::from(af_xdp::FRAMES), "{interface:?}");
    let lossy: Vec<_> = interface.queues.iter().filter(|queue| !queue.dropped.is_empty()).collect();
    let [queue] = &lossy[..] else { panic!("{interface:?}") };
    assert_eq!(queue.dropped, interface.dropped);
    let driver = &stats.devices.iter().find(|device| device.name == "in0").unwrap().driver;
    assert_eq!(driver[&format!("rx_queue_{}_drops", queue.queue)], full, "{driver:?}");
    let screen = relay.cli(&["stats"]);
    assert!(screen.ok().contains(&format!("queue {}", queue.queue)), "{screen}");
    assert!(screen.ok().lines().all(|line| line.chars().count() <= 100), "{screen}");
    assert_no_alarm(&relay);
}

#[test]
fn the_table_fits_a_hundred_columns() {
    let site = Site::default();
    let relay = Relay::start(&site);
    let name = "x".repeat(63);
    let outputs = ["239.222.222.222:60000@out0,ttl=copy,dscp=46,from=10.78.0.1:60001", "239.2.2.3:6000@out1"];
    relay.add(&name, "239.1.1.1:5000@in0,source=10.77.0.2", &outputs);
    let screen = relay.cli(&["stats"]);
    assert!(screen.ok().lines().all(|line| line.chars().count() <= 100), "{screen}");
    assert!(screen.ok().contains("xxxx"), "{screen}");
}

tests::on_every_ground!(the_ledger_balances_while_traffic_plays_and_when_it_rests);

tests::by_the_kernel!(the_ledger_balances_while_traffic_plays_and_when_it_rests);

tests::on_both_datapaths!(
    the_ledger_balances_after_a_worker_was_killed,
    two_queues_have_a_row_each,
    a_gap_at_rest_is_an_alarm_until_it_is_gone,
    every_equality_is_watched,
    more_than_can_be_in_flight_is_an_alarm_while_it_plays,
);

tests::without_bpf!(
    the_ledger_balances_while_traffic_plays_and_when_it_rests,
    the_ledger_balances_after_a_worker_was_killed,
);
