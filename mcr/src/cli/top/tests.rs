use std::{collections::BTreeMap, time::Duration};

use ratatui::{
    Terminal,
    backend::TestBackend,
    crossterm::event::{KeyCode, KeyEvent, KeyModifiers},
};

use super::*;
use crate::api::wire::{
    Alarm, DeviceStats, Health, InterfaceStats, OutputInfo, OutputStats, RuleCounts, RuleInfo, RuleStats,
    Stats, Status, WorkerInfo,
};

fn counts(named: &[(&str, u64)]) -> BTreeMap<String, u64> {
    named.iter().map(|&(name, count)| (name.to_owned(), count)).collect()
}

fn rule(name: &str, pps: f64, queue_full: u64) -> RuleStats {
    RuleStats {
        name: name.to_owned(),
        origin: "cli".to_owned(),
        datapath: Some("af-xdp".to_owned()),
        input: format!("239.1.1.1:5000@in-{name}"),
        since: String::new(),
        matched: 0,
        received: 0,
        received_bytes: 0,
        received_pps: pps,
        last_seen: None,
        idle_seconds: None,
        stalled: name == "idle",
        dropped: counts(&[("loop", 7)]),
        outputs: vec![OutputStats {
            to: format!("239.2.2.2:6000@out-{name}"),
            received: 0,
            sent: 0,
            sent_bytes: 0,
            sent_pps: 2.0 * pps,
            retried: 0,
            approximate: 0,
            dropped: counts(&[("queue_full", queue_full)]),
        }],
    }
}

fn info(rule: &RuleStats) -> RuleInfo {
    let (health, reason) = match rule.name.as_str() {
        "waits" => (Health::Pending, Some("interface out0 is down".to_owned())),
        _ => (Health::Active, None),
    };
    RuleInfo {
        name: rule.name.clone(),
        origin: rule.origin.clone(),
        place: None,
        input: rule.input.clone(),
        outputs: vec![OutputInfo { to: rule.outputs[0].to.clone(), health, reason: reason.clone() }],
        datapath: rule.datapath.clone(),
        datapath_asked: "auto".to_owned(),
        datapath_why: String::new(),
        merge: false,
        link_local: false,
        health,
        reason,
    }
}

fn worker() -> WorkerInfo {
    WorkerInfo {
        id: "eth0/xdp0".to_owned(),
        interface: "eth0".to_owned(),
        datapath: "af-xdp".to_owned(),
        why: String::new(),
        queues: vec![0, 1],
        cpu: Some(2),
        pid: Some(100),
        state: "running".to_owned(),
        restarts: 1,
        last_exit: Some("killed by signal 9 (SIGKILL)".to_owned()),
        received: 0,
        system_calls: 0,
        received_pps: 12_345.0,
    }
}

/// A look so many seconds after the first; `busy` has lost 3 a second.
fn sample(start: Instant, seconds: u64) -> Sample {
    let rules = vec![
        rule("busy", 10_000.0, 100 + 3 * seconds),
        rule("idle", 0.0, 0),
        rule("steady", if seconds < 2 { 500.0 } else { 1_000.0 }, 900),
        rule("waits", 0.0, 0),
    ];
    let interface = InterfaceStats {
        name: "eth0".to_owned(),
        datapath: "af-xdp".to_owned(),
        verdicts: BTreeMap::new(),
        received: 0,
        dropped: counts(&[("rx_ring_full", 12)]),
        discarded: BTreeMap::new(),
        queues: Vec::new(),
    };
    let device = DeviceStats {
        name: "eth1".to_owned(),
        qdisc: counts(&[("tbf drops", 1_500)]),
        ..DeviceStats::default()
    };
    let time = |seconds: u64| format!("2025-06-01T12:{:02}:{:02}.000Z", seconds / 60, seconds % 60);
    Sample {
        at: start + Duration::from_secs(seconds),
        status: Status {
            schema: 1,
            time: time(600 + seconds),
            since: "2025-06-01T09:00:00.000Z".to_owned(),
            version: "0.1.0".to_owned(),
            pid: 77,
            health: Health::Pending,
            rules: RuleCounts { total: 4, active: 3, pending: 1, failed: 0, stalled: 1, unseen: 1 },
            workers_running: 1,
            workers_total: 1,
            worker_restarts: 1,
            received_pps: 10_500.0,
            sent_pps: 21_000.0,
            sent_bps: 221_088_000.0,
            device_lost: [].into(),
            dropped: BTreeMap::new(),
            problems: Vec::new(),
            alarms: Vec::new(),
        },
        rules: rules.iter().map(info).collect(),
        stats: Stats {
            schema: 1,
            time: time(600 + seconds),
            since: "2025-06-01T09:00:00.000Z".to_owned(),
            rules,
            interfaces: vec![interface],
            workers: vec![worker()],
            devices: vec![device],
            alarms: Vec::new(),
        },
        // A quarter of a CPU.
        cpu: [(100, Duration::from_millis(1_000 + 250 * seconds))].into(),
    }
}

/// What is known after so many looks.
fn model(looks: u64) -> Model {
    let start = Instant::now();
    let mut model = Model::new(Sort::Rate, Duration::from_secs(1));
    for seconds in 0..looks {
        model.take(sample(start, seconds));
    }
    model
}

fn screen(model: &Model, columns: u16, rows: u16) -> Vec<String> {
    let mut terminal = Terminal::new(TestBackend::new(columns, rows)).unwrap();
    terminal.draw(|frame| screen::draw(frame, model)).unwrap();
    let buffer = terminal.backend().buffer();
    let row = |y| (0..columns).map(|x| buffer[(x, y)].symbol()).collect::<String>();
    (0..rows).map(|y| row(y).trim_end().to_owned()).collect()
}

/// Presses keys, named as they are on a keyboard; whether the last ends it.
fn press(model: &mut Model, keys: &[&str]) -> bool {
    let mut ends = false;
    for key in keys {
        let code = match *key {
            "Esc" => KeyCode::Esc,
            "Enter" => KeyCode::Enter,
            "Backspace" => KeyCode::Backspace,
            "Up" => KeyCode::Up,
            "Down" => KeyCode::Down,
            "PageUp" => KeyCode::PageUp,
            "PageDown" => KeyCode::PageDown,
            "Home" => KeyCode::Home,
            "End" => KeyCode::End,
            "Ctrl-C" => KeyCode::Char('c'),
            letter => KeyCode::Char(letter.chars().next().unwrap()),
        };
        let modifiers = if *key == "Ctrl-C" { KeyModifiers::CONTROL } else { KeyModifiers::NONE };
        ends = model.press(KeyEvent::new(code, modifiers), 2);
    }
    ends
}

fn names(model: &Model) -> Vec<&str> {
    model.shown().iter().map(|row| row.name.as_str()).collect()
}

#[test]
fn a_screen_of_the_usual_size() {
    let expected = "\
mcr 0.1.0 is working in part: something is pending             up 3h 10m, pid 77
in 10.5 k/s 0 b/s  out 21.0 k/s 221.1 Mb/s  drops 3 /s
rules 4, 1 pending, 1 stalled  workers 1/1, 1 restart
RULE   STATE          IN       OUT LAST MINUTE            DROPS WORST
busy   active   10.0 k/s  20.0 k/s ██                      3 /s queue_full
steady active    1.0 k/s   2.0 k/s ▄█                      0 /s queue_full
idle   stalled      0 /s      0 /s                         0 /s loop
waits  pending      0 /s      0 /s                         0 /s loop





busy: 239.1.1.1:5000@in-busy -> 239.2.2.2:6000@out-busy by af-xdp
  queue_full              3 /s, 115 in all
  loop                    0 /s, 7 in all

WORKER                CPU  ON QUEUES          RATE RESTARTS
eth0/xdp0          25.0 %   2 0,1         12.3 k/s        1  last: killed by sig

INTERFACE  LOST
eth0       af-xdp: 12 rx_ring_full
eth1       qdisc: 1,500 tbf drops
q quit  / filter  r d n sort (by rate)";
    let seen = screen(&model(6), 80, 24).join("\n");
    assert_eq!(seen, expected, "\n{seen}");
}

#[test]
fn before_the_second_look_no_bits_are_known() {
    assert_eq!(screen(&model(1), 80, 24)[1], "in 10.5 k/s -  out 21.0 k/s 221.1 Mb/s  drops 0 /s");
}

#[test]
fn json_is_not_offered_by_the_screen() {
    let help = |name: &str| {
        let mut command = crate::cli::public();
        command.find_subcommand_mut(name).unwrap().render_long_help().to_string()
    };
    assert!(help("stats").contains("--json") && !help("top").contains("--json"));
}

#[test]
fn a_narrow_and_low_screen_has_what_matters_most() {
    let expected = [
        "mcr 0.1.0 is working in part: something",
        "in 10.5 k/s 0 b/s  out 21.0 k/s 221.1 Mb",
        "RULE          IN       OUT     DROPS",
        "busy    10.0 k/s  20.0 k/s      3 /s",
        "steady   1.0 k/s   2.0 k/s      0 /s",
        "idle        0 /s      0 /s      0 /s",
        "waits       0 /s      0 /s      0 /s",
        "",
        "",
        "q quit  / filter  r d n sort (by rate)",
    ];
    assert_eq!(screen(&model(6), 40, 10), expected);
}

#[test]
fn no_size_is_too_small_or_too_large() {
    let mut model = model(80);
    for columns in (0..50).chain([79, 132, 500]) {
        for rows in (0..30).chain([100]) {
            screen(&model, columns, rows);
        }
    }
    press(&mut model, &["/", "x", "y"]);
    model.lose("no daemon on /run/mcr/mcr.sock".to_owned());
    for columns in 0..90 {
        screen(&model, columns, 24);
        screen(&Model::new(Sort::Rate, Duration::from_secs(1)), columns, columns / 4);
    }
}

#[test]
fn rules_are_sorted_by_keys() {
    let mut model = model(3);
    assert_eq!(names(&model), ["busy", "steady", "idle", "waits"]);
    press(&mut model, &["n"]);
    assert_eq!(names(&model), ["busy", "idle", "steady", "waits"]);
    // By what is lost now, then by what was lost ever.
    press(&mut model, &["d"]);
    assert_eq!(names(&model), ["busy", "steady", "idle", "waits"]);
    assert!(screen(&model, 80, 24).last().unwrap().ends_with("sort (by drops)"));
    press(&mut model, &["r"]);
    assert_eq!(model.sort, Sort::Rate);
}

#[test]
fn rules_are_filtered_as_one_types() {
    let mut model = model(3);
    assert!(!press(&mut model, &["/", "d"]));
    assert!(model.editing && model.sort == Sort::Rate);
    assert_eq!(names(&model), ["steady", "idle"]);
    // Endpoints count too, and q is a letter here.
    press(&mut model, &["Backspace", "o", "u", "t", "-", "w"]);
    assert_eq!(names(&model), ["waits"]);
    assert_eq!(screen(&model, 80, 24).last().unwrap(), "/out-w_");
    assert!(!press(&mut model, &["q"]));
    assert!(names(&model).is_empty());
    assert!(screen(&model, 80, 24).contains(&"none of 4 rules has 'out-wq' in it".to_owned()));
    press(&mut model, &["Backspace", "Enter"]);
    assert_eq!((names(&model), model.editing), (vec!["waits"], false));
    assert!(screen(&model, 80, 24).last().unwrap().starts_with("only 'out-w', Esc shows all"));
    assert!(!press(&mut model, &["Esc"]));
    assert_eq!(names(&model).len(), 4);
    // Taking away more than there is leaves it.
    press(&mut model, &["/", "Backspace"]);
    assert!(!model.editing);
}

#[test]
fn it_ends_by_three_keys() {
    for key in ["q", "Esc", "Ctrl-C"] {
        assert!(press(&mut model(1), &[key]), "{key}");
    }
    assert!(press(&mut model(1), &["/", "x", "Ctrl-C"]));
    assert!(!press(&mut model(1), &["x", "Up", "Enter", "Backspace"]));
}

#[test]
fn the_rule_that_is_looked_at_stays_so_whatever_the_order() {
    let mut model = model(3);
    let at = |model: &Model| model.shown()[model.place(&model.shown())].name.clone();
    press(&mut model, &["Up"]);
    assert_eq!(at(&model), "busy");
    press(&mut model, &["Down"]);
    assert_eq!(at(&model), "steady");
    press(&mut model, &["n"]);
    assert_eq!(at(&model), "steady");
    press(&mut model, &["Down", "Down", "Down"]);
    assert_eq!(at(&model), "waits");
    press(&mut model, &["PageUp"]);
    assert_eq!(at(&model), "idle");
    press(&mut model, &["PageDown", "PageDown"]);
    assert_eq!(at(&model), "waits");
    press(&mut model, &["Home"]);
    assert_eq!(at(&model), "busy");
    press(&mut model, &["End"]);
    assert_eq!(at(&model), "waits");
    assert!(screen(&model, 100, 24).contains(&"  pending: interface out0 is down".to_owned()));
    // Filtered away, the first is looked at.
    press(&mut model, &["/", "b", "u", "s", "y"]);
    assert_eq!(at(&model), "busy");
}

#[test]
fn a_list_that_is_longer_than_the_screen_is_leafed_through() {
    let mut model = model(1);
    let mut sample = sample(Instant::now(), 1);
    sample.stats.rules = (0..100).map(|n| rule(&format!("r{n:02}"), 0.0, 0)).collect();
    model.take(sample);
    // Two lines of header, one of the columns, one at the foot.
    let rows = screen(&model, 80, 12);
    assert!(rows[3].starts_with("r00 ") && rows[10].starts_with("r07 "), "{rows:#?}");
    for _ in 0..8 {
        press(&mut model, &["Down"]);
    }
    let rows = screen(&model, 80, 12);
    assert!(rows[3].starts_with("r08 ") && rows[10].starts_with("r15 "), "{rows:#?}");
    press(&mut model, &["End"]);
    assert!(screen(&model, 80, 12).iter().any(|row| row.starts_with("r99 ")));
}

#[test]
fn what_is_not_known_is_not_guessed() {
    let start = Instant::now();
    // One look tells no rate of what is lost and no CPU.
    let first = screen(&model(1), 80, 24);
    assert!(first.iter().any(|row| row.starts_with("eth0/xdp0               -   2 0,1")), "{first:#?}");
    assert!(first[1].contains("drops 0 /s"), "{first:#?}");
    // Nor does a process that cannot be read.
    let mut model = model(2);
    let hidden = Sample { cpu: BTreeMap::new(), ..sample(start, 2) };
    model.take(hidden);
    assert_eq!(model.workers[0].cpu, None);
    // The counters of another daemon are not compared with those of the last.
    let mut other = sample(start, 3);
    other.stats.since = "2025-06-01T12:10:03.000Z".to_owned();
    other.stats.rules[0] = rule("busy", 10.0, 1_000_000);
    model.take(other);
    assert!(model.drop_rate().abs() < 0.1, "{}", model.drop_rate());
}

#[test]
fn a_worker_that_is_down_an_alarm_and_a_daemon_that_is_gone_stand_out() {
    let mut model = model(2);
    let mut sample = sample(Instant::now(), 2);
    sample.stats.workers[0] = WorkerInfo { pid: None, state: "restarting".to_owned(), ..worker() };
    let alarm = Alarm {
        what: "ledger: 5 unaccounted for".to_owned(),
        gap: 5,
        since: String::new(),
        next: "mcr stats".to_owned(),
    };
    sample.stats.alarms = vec![alarm.clone(), alarm];
    model.take(sample);
    let rows = screen(&model, 100, 24);
    assert_eq!(rows[3], "! ledger: 5 unaccounted for (and 1 more)");
    let down = rows.iter().find(|row| row.starts_with("eth0/xdp0")).unwrap();
    assert!(down.contains("1  restarting: killed by signal 9"), "{down}");
    model.lose("no daemon on /run/mcr/mcr.sock (there is no socket)".to_owned());
    let rows = screen(&model, 100, 24);
    assert!(rows[0].starts_with("mcr 0.1.0 is gone; looking for it"), "{}", rows[0]);
    assert_eq!(rows[3], "no daemon on /run/mcr/mcr.sock (there is no socket)");
    assert!(rows.iter().any(|row| row.starts_with("busy ")), "what was known is shown on");
}

#[test]
fn cpu_time_is_read_whatever_the_process_is_called() {
    for (stat, ticks) in [
        ("7 (mcr) S 1 7 7 0 -1 4194304 1 2 3 4 30 12 5 6 20 0 1 0 99", Some(42)),
        ("7 (a) b) S 1) S 1 7 7 0 -1 4194304 1 2 3 4 30 12 5 6 20 0", Some(42)),
        ("7 (mcr) S 1 7 7 0 -1 4194304 1 2 3 4 30", None),
        ("7 (mcr) S 1 7 7 0 -1 4194304 1 2 3 4 x 12 5", None),
        ("", None),
    ] {
        assert_eq!(cpu::ticks(stat), ticks, "{stat}");
    }
    assert!(cpu::used(std::process::id()).is_some());
    assert_eq!(cpu::used(u32::MAX), None);
}
