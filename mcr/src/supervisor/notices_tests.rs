use serde_json::{Value, json};

use super::*;
use crate::rule::{DatapathChoice, IfIndex, Origin, OutputSlot, Rule, RuleSlot};

fn interface_name(name: &str) -> InterfaceName {
    name.parse().unwrap()
}

fn seen(slot: u32, outputs: &[&str]) -> SeenRule {
    let rule = Rule {
        name: "cam1".parse().unwrap(),
        input: "239.1.1.1:5000@eth0".parse().unwrap(),
        outputs: outputs.iter().map(|text| text.parse().unwrap()).collect(),
        datapath: DatapathChoice::default(),
        merge: false,
        link_local: false,
    };
    let output_slots = (0..).map(OutputSlot).take(outputs.len()).collect();
    SeenRule {
        entry: Entry { rule, origin: Origin::Cli, slot: RuleSlot(slot), output_slots },
        health: Health::Active,
        reason: None,
        datapath: Some(Datapath::AfXdp),
        stalled: false,
        idle: false,
    }
}

const OUT: &str = "239.2.2.2:6000@eth1";

fn cam() -> SeenRule {
    seen(1, &[OUT])
}

fn pending(reason: &str) -> SeenRule {
    SeenRule { health: Health::Pending, reason: Some(reason.to_owned()), ..cam() }
}

fn look(rule: Option<SeenRule>) -> Look {
    let rules = rule.into_iter().map(|rule| (rule.entry.rule.name.clone(), rule)).collect();
    Look { rules, ..Look::default() }
}

fn workers(worker: Option<(Option<u32>, u64)>) -> Look {
    let id = WorkerId { interface: interface_name("eth0"), datapath: Datapath::AfXdp, index: 0 };
    let last_exit = |restarts| (restarts > 0).then(|| "killed by SIGKILL".to_owned());
    let workers = worker
        .into_iter()
        .map(|(pid, restarts)| (id.clone(), SeenWorker { pid, restarts, last_exit: last_exit(restarts) }));
    Look { workers: workers.collect(), ..Look::default() }
}

fn link() -> Link {
    Link {
        index: IfIndex(10),
        up: true,
        mtu: 1500,
        mac: None,
        ethernet: true,
        arp: true,
        addresses: vec![[10, 0, 0, 1].into()],
        kind: "veth".to_owned(),
        rx_queues: 1,
        near_cpus: Vec::new(),
        xdp_program: None,
    }
}

fn interfaces(link: Option<Link>) -> Look {
    Look { interfaces: [(interface_name("eth0"), link)].into(), ..Look::default() }
}

fn alarms(gap: Option<i64>) -> Look {
    let alarm = |gap| Alarm {
        what: format!("ledger: {gap} unaccounted for"),
        gap,
        since: "2025-06-01T12:00:00Z".to_owned(),
        next: "mcr stats".to_owned(),
    };
    let alarms = gap.into_iter().map(|gap| (Subject::Rules(interface_name("eth0")), alarm(gap)));
    Look { alarms: alarms.collect(), ..Look::default() }
}

/// What is told between two looks.
#[track_caller]
fn check(before: &Look, mut now: Look, expected: &Value) {
    now.follow(before);
    let told = now.since(before, |rule| format!("because of slot {}", rule.entry.slot.0));
    assert_eq!(serde_json::to_value(told).unwrap(), *expected);
}

#[test]
fn rules_come_change_and_go() {
    let added = json!([
        {"event": "rule.added", "rule": "cam1", "origin": "cli", "in": "239.1.1.1:5000@eth0", "out": [OUT]},
        {"event": "rule.active", "rule": "cam1", "datapath": "af-xdp"},
    ]);
    check(&look(None), look(Some(cam())), &added);
    check(&look(Some(cam())), look(Some(cam())), &json!([]));
    check(&look(Some(cam())), look(None), &json!([{"event": "rule.removed", "rule": "cam1"}]));
    // Another of its name.
    let mut anew = vec![json!({"event": "rule.removed", "rule": "cam1"})];
    anew.extend(added.as_array().unwrap().iter().cloned());
    check(&look(Some(seen(2, &[OUT]))), look(Some(cam())), &json!(anew));
    check(
        &look(Some(cam())),
        look(Some(seen(1, &[OUT, "239.2.2.3:6000@eth1"]))),
        &json!([{
            "event": "rule.changed",
            "rule": "cam1",
            "difference": format!("its outputs ({OUT} 239.2.2.3:6000@eth1 instead of {OUT})"),
        }]),
    );
    let mut merging = cam();
    merging.entry.rule.merge = true;
    let changed = json!([{"event": "rule.changed", "rule": "cam1", "difference": "--merge"}]);
    check(&look(Some(cam())), look(Some(merging.clone())), &changed);
    check(&look(Some(merging)), look(Some(cam())), &changed);
}

#[test]
fn rules_fare_well_and_badly() {
    let waits = json!([{"event": "rule.pending", "rule": "cam1", "reason": "eth1 is down"}]);
    check(&look(Some(cam())), look(Some(pending("eth1 is down"))), &waits);
    check(&look(Some(pending("eth1 is down"))), look(Some(pending("eth1 is down"))), &json!([]));
    check(&look(Some(pending("eth1 is gone"))), look(Some(pending("eth1 is down"))), &waits);
    let failed = SeenRule { health: Health::Failed, ..pending("it cannot be joined") };
    let fails = json!([{"event": "rule.failed", "rule": "cam1", "reason": "it cannot be joined"}]);
    check(&look(Some(cam())), look(Some(failed.clone())), &fails);
    let works = json!([{"event": "rule.active", "rule": "cam1", "datapath": "af-xdp"}]);
    check(&look(Some(failed)), look(Some(cam())), &works);
}

#[test]
fn a_rule_that_moves_says_from_where_also_over_a_gap() {
    let by = |datapath| SeenRule { datapath, ..cam() };
    let moved = json!([{
        "event": "rule.moved", "rule": "cam1", "from": "redirect", "to": "af-xdp", "why": "because of slot 1",
    }]);
    check(&look(Some(by(Some(Datapath::Redirect)))), look(Some(cam())), &moved);
    let mut gap = look(Some(by(None)));
    gap.follow(&look(Some(by(Some(Datapath::Redirect)))));
    check(&gap, look(Some(cam())), &moved);
    check(&look(Some(by(None))), look(Some(cam())), &json!([]));
}

#[test]
fn a_rule_stalls_once_and_resumes_with_a_datagram() {
    let still = |stalled, idle| look(Some(SeenRule { stalled, idle, ..cam() }));
    let waiting = || look(Some(SeenRule { stalled: false, idle: true, ..pending("eth1 is down") }));
    let stalled = json!([{"event": "rule.stalled", "rule": "cam1"}]);
    check(&still(false, false), still(true, true), &stalled);
    check(&still(true, true), still(true, true), &json!([]));
    check(&still(true, true), still(false, false), &json!([{"event": "rule.resumed", "rule": "cam1"}]));
    // One that waits has not resumed, and is not stalled for want of what it waits for.
    let waits = json!([{"event": "rule.pending", "rule": "cam1", "reason": "eth1 is down"}]);
    check(&still(true, true), waiting(), &waits);
    check(&still(false, false), waiting(), &waits);
}

#[test]
fn workers_start_end_and_are_restarted() {
    let started = json!({"event": "worker.started", "worker": "eth0/xdp0", "pid": 7});
    let ended = |reason| json!({"event": "worker.ended", "worker": "eth0/xdp0", "pid": 7, "reason": reason});
    let killed = "killed by SIGKILL";
    let restarting = json!({
        "event": "worker.restarting", "worker": "eth0/xdp0", "reason": killed, "restarts": 1,
    });
    check(&workers(None), workers(Some((Some(7), 0))), &json!([started]));
    check(&workers(Some((Some(7), 0))), workers(None), &json!([ended("no rule needs it any more")]));
    check(&workers(Some((Some(7), 0))), workers(Some((None, 1))), &json!([ended(killed), restarting]));
    check(&workers(Some((None, 1))), workers(Some((Some(7), 1))), &json!([started]));
    let again = json!({"event": "worker.started", "worker": "eth0/xdp0", "pid": 8});
    check(
        &workers(Some((Some(7), 0))),
        workers(Some((Some(8), 1))),
        &json!([ended(killed), restarting, again]),
    );
}

#[test]
fn interfaces_change() {
    let there = json!({
        "event": "interface.there", "interface": "eth0", "up": true, "mtu": 1500, "addresses": ["10.0.0.1"],
    });
    let gone = json!({"event": "interface.gone", "interface": "eth0"});
    check(&interfaces(None), interfaces(Some(link())), &json!([there]));
    check(&interfaces(Some(link())), interfaces(None), &json!([gone]));
    let anew = Link { index: IfIndex(11), ..link() };
    check(&interfaces(Some(link())), interfaces(Some(anew)), &json!([gone, there]));
    // What a rule names for the first time is no news.
    check(&Look::default(), interfaces(Some(link())), &json!([]));
    check(&interfaces(Some(link())), Look::default(), &json!([]));
    let down = || Link { up: false, ..link() };
    check(
        &interfaces(Some(link())),
        interfaces(Some(Link { mtu: 9000, addresses: Vec::new(), ..down() })),
        &json!([
            {"event": "interface.down", "interface": "eth0"},
            {"event": "interface.addresses", "interface": "eth0", "addresses": []},
            {"event": "interface.mtu", "interface": "eth0", "mtu": 9000},
        ]),
    );
    let up = json!([{"event": "interface.up", "interface": "eth0"}]);
    check(&interfaces(Some(down())), interfaces(Some(link())), &up);
}

#[test]
fn alarms_are_raised_and_cleared_not_restated() {
    let raised = json!([{
        "event": "alarm.raised",
        "what": "ledger: 5 unaccounted for",
        "gap": 5,
        "since": "2025-06-01T12:00:00Z",
        "next": "mcr stats",
    }]);
    check(&alarms(None), alarms(Some(5)), &raised);
    check(&alarms(Some(5)), alarms(Some(6)), &json!([]));
    let cleared = json!([{
        "event": "alarm.cleared", "what": "ledger: 6 unaccounted for", "since": "2025-06-01T12:00:00Z",
    }]);
    check(&alarms(Some(6)), alarms(None), &cleared);
}
