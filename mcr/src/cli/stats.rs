//! `mcr stats`: what came, what went, what was dropped and why.

use std::{
    cmp::Reverse,
    fmt::Write,
    thread,
    time::{Duration, Instant},
};

use super::{
    print,
    remote::Remote,
    text::{self, bytes, count, rate, reasons, table, total},
};
use crate::{
    api::wire::{Alarm, DeviceStats, InterfaceStats, Request, RuleStats, Stats, StatsQuery},
    rule::RuleName,
};

/// Show what came, what went, what was dropped and why
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Only this rule
    rule: Option<String>,
    /// Every second, until interrupted: in place on a terminal, else one block or JSON line each
    #[arg(long)]
    watch: bool,
    #[command(flatten)]
    remote: Remote,
}

impl Args {
    pub fn run(self) -> anyhow::Result<()> {
        let rule = self.rule.map(|name| name.parse::<RuleName>()).transpose()?;
        let request = Request::Stats(StatsQuery { rule: rule.map(|name| name.to_string()) });
        if self.watch { watch(&self.remote, &request) } else { self.remote.ask(&request, render) }
    }
}

fn watch(remote: &Remote, request: &Request) -> anyhow::Result<()> {
    let terminal = console::Term::stdout();
    let in_place = terminal.is_term() && !remote.json();
    let mut client = remote.connect()?;
    let mut next = Instant::now();
    loop {
        let stats: Stats = client.call(request)?;
        if in_place {
            let shown = text::harmless(&render(&stats, text::width()));
            print(&frame(&shown, terminal.size().0))?;
        } else {
            remote.show(&stats, render)?;
            if !remote.json() {
                print("\n")?;
            }
        }
        next += Duration::from_secs(1);
        thread::sleep(next.saturating_duration_since(Instant::now()));
    }
}

/// Text over what the terminal shows: cursor home, each line to its end, the rest of the screen cleared.
fn frame(text: &str, rows: u16) -> String {
    let lines: Vec<_> = text.lines().collect();
    let room = usize::from(rows).saturating_sub(1).max(1);
    let shown = if lines.len() > room { room - 1 } else { lines.len() };
    let mut frame = String::from("\x1b[H");
    for line in &lines[..shown] {
        frame.push_str(line);
        frame.push_str("\x1b[K\n");
    }
    if shown < lines.len() {
        let _ = writeln!(frame, "... and {} more lines\x1b[K", lines.len() - shown);
    }
    frame + "\x1b[J"
}

fn render(stats: &Stats, width: u16) -> String {
    let mut text = format!("{}, counted since {}", stats.time, stats.since);
    let earliest = stats.rules.iter().map(|rule| &rule.since).filter(|since| !since.is_empty()).min();
    if let Some(earliest) = earliest.filter(|earliest| **earliest < stats.since) {
        let _ =
            write!(text, ",\nand since {earliest} what the kernel went on with while there was no daemon");
    }
    text.push_str("\n\n");
    if !stats.alarms.is_empty() {
        text.push_str(&alarms(&stats.alarms, width));
        text.push('\n');
    }
    if stats.rules.is_empty() {
        text.push_str("no rules: add one with `mcr rule add`\n");
    } else {
        text.push_str(&rules(&stats.rules, width));
    }
    if !stats.interfaces.is_empty() {
        text.push('\n');
        text.push_str(&interfaces(&stats.interfaces, width));
    }
    if stats.devices.iter().any(|device| lost(device) > 0) {
        text.push('\n');
        text.push_str(&devices(&stats.devices, width));
    }
    text
}

fn alarms(alarms: &[Alarm], width: u16) -> String {
    let row = |alarm: &Alarm| vec!["!".to_owned(), format!("{}, since {}", alarm.what, alarm.since)];
    table(width, &[], &[], alarms.iter().map(row).collect())
}

/// Drops of a rule, before and at its outputs.
fn dropped(rule: &RuleStats) -> u64 {
    rule.outputs.iter().map(|output| total(&output.dropped)).fold(total(&rule.dropped), u64::saturating_add)
}

fn rules(rules: &[RuleStats], width: u16) -> String {
    let mut worst_first: Vec<_> = rules.iter().collect();
    worst_first.sort_by_key(|rule| (Reverse((dropped(rule), rule.stalled)), &rule.name));
    let mut rows = Vec::new();
    for rule in worst_first {
        rows.push(vec![
            rule.name.clone(),
            rule.input.clone(),
            count(rule.received),
            bytes(rule.received_bytes),
            if rule.stalled {
                format!("none for {} s", rule.idle_seconds.unwrap_or_default())
            } else {
                rate(rule.received_pps)
            },
            reasons(&rule.dropped),
        ]);
        for output in &rule.outputs {
            rows.push(vec![
                String::new(),
                format!("-> {}", output.to),
                count(output.sent),
                bytes(output.sent_bytes),
                rate(output.sent_pps),
                reasons(&output.dropped),
            ]);
        }
    }
    table(width, &["RULE", "RECEIVED -> SENT", "DATAGRAMS", "BYTES", "RATE", "DROPPED"], &[2, 3, 4], rows)
}

fn interfaces(interfaces: &[InterfaceStats], width: u16) -> String {
    let mut worst_first: Vec<_> = interfaces.iter().collect();
    worst_first.sort_by_key(|interface| (Reverse(total(&interface.dropped)), &interface.name));
    let mut rows = Vec::new();
    for interface in worst_first {
        let mut verdicts = interface.verdicts.clone();
        let steered = verdicts.remove("steered").unwrap_or(0);
        rows.push(vec![
            interface.name.clone(),
            interface.datapath.clone(),
            count(steered),
            count(interface.received),
            reasons(&interface.dropped),
            reasons(&interface.discarded),
            reasons(&verdicts),
        ]);
        // Of the only queue that there is it has all been said.
        let queues = interface.queues.iter().filter(|_| interface.queues.len() > 1);
        let mut queues: Vec<_> = queues.filter(|queue| total(&queue.dropped) > 0).collect();
        queues.sort_by_key(|queue| (Reverse(total(&queue.dropped)), queue.queue));
        rows.extend(queues.into_iter().map(|queue| {
            vec![
                format!("  queue {}", queue.queue),
                queue.worker.clone(),
                count(queue.steered),
                count(queue.received),
                reasons(&queue.dropped),
                String::new(),
                String::new(),
            ]
        }));
    }
    table(
        width,
        &["INTERFACE", "DATAPATH", "STEERED", "RECEIVED", "DROPPED", "DISCARDED", "OTHER VERDICTS"],
        &[2, 3],
        rows,
    )
}

/// What a device lost. A queueing discipline is over its limit also where it only delays.
fn lost(device: &DeviceStats) -> u64 {
    let counters = [&device.link, &device.qdisc, &device.driver].into_iter().flatten();
    let losses = counters.filter(|(name, _)| !name.ends_with("overlimits"));
    losses.fold(0, |sum, (_, count)| sum.saturating_add(*count))
}

fn devices(devices: &[DeviceStats], width: u16) -> String {
    let mut worst_first: Vec<_> = devices.iter().filter(|device| lost(device) > 0).collect();
    worst_first.sort_by_key(|device| (Reverse(lost(device)), &device.name));
    let row = |device: &DeviceStats| {
        vec![device.name.clone(), reasons(&device.link), reasons(&device.qdisc), reasons(&device.driver)]
    };
    let rows = worst_first.into_iter().map(row).collect();
    table(width, &["DEVICE LOST", "LINK", "QDISC", "DRIVER"], &[], rows)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::wire::{OutputStats, QueueStats};

    fn rule(name: &str, dropped: &[(&str, u64)]) -> RuleStats {
        let output = OutputStats {
            to: "239.2.2.2:6000@eth1,ttl=8".to_owned(),
            received: 10_000,
            sent: 9_000,
            sent_bytes: 11_844_000,
            sent_pps: 1_000.0,
            retried: 0,
            approximate: 0,
            dropped: dropped.iter().map(|&(reason, count)| (reason.to_owned(), count)).collect(),
        };
        RuleStats {
            name: name.to_owned(),
            origin: "cli".to_owned(),
            datapath: Some("af-xdp".to_owned()),
            input: "239.1.1.1:5000@eth0".to_owned(),
            since: "2025-06-01T09:30:00Z".to_owned(),
            matched: 10_000,
            received: 10_000,
            received_bytes: 13_160_000,
            received_pps: 1_000.0,
            last_seen: None,
            idle_seconds: None,
            stalled: false,
            dropped: [].into(),
            outputs: vec![output],
        }
    }

    fn stats(rules: Vec<RuleStats>, interfaces: Vec<InterfaceStats>) -> Stats {
        Stats {
            schema: 1,
            time: "2025-06-01T12:00:00Z".to_owned(),
            since: "2025-06-01T09:00:00Z".to_owned(),
            rules,
            interfaces,
            workers: Vec::new(),
            devices: Vec::new(),
            alarms: Vec::new(),
        }
    }

    fn counts(named: &[(&str, u64)]) -> std::collections::BTreeMap<String, u64> {
        named.iter().map(|&(name, count)| (name.to_owned(), count)).collect()
    }

    fn queue(queue: u32, dropped: &[(&str, u64)]) -> QueueStats {
        let worker = format!("eth0/xdp{queue}");
        QueueStats { queue, worker, steered: 10_005, received: 10_000, dropped: counts(dropped) }
    }

    #[test]
    fn what_outlived_a_daemon_says_since_when_it_is_counted() {
        let former = RuleStats { since: "2025-05-31T09:00:00Z".to_owned(), ..rule("cam2", &[]) };
        let text = render(&stats(vec![rule("cam1", &[]), former], vec![]), 100);
        let head = "2025-06-01T12:00:00Z, counted since 2025-06-01T09:00:00Z,\n\
                    and since 2025-05-31T09:00:00Z what the kernel went on with while there was no daemon\n\n";
        assert!(text.starts_with(head), "{text}");
    }

    #[test]
    fn the_worst_rule_stands_first() {
        let interface = InterfaceStats {
            name: "eth0".to_owned(),
            datapath: "af-xdp".to_owned(),
            verdicts: [("steered".to_owned(), 20_010), ("fragment".to_owned(), 3)].into(),
            received: 20_000,
            dropped: [("rx_ring_full".to_owned(), 10)].into(),
            discarded: [].into(),
            queues: vec![queue(0, &[("rx_ring_full", 10)])],
        };
        let rules = vec![rule("cam1", &[]), rule("cam2", &[("too_big", 7), ("queue_full", 993)])];
        assert_eq!(
            render(&stats(rules, vec![interface]), 100),
            "\
2025-06-01T12:00:00Z, counted since 2025-06-01T09:00:00Z

RULE  RECEIVED -> SENT              DATAGRAMS    BYTES     RATE  DROPPED
cam2  239.1.1.1:5000@eth0              10,000  13.2 MB  1.0 k/s  0
      -> 239.2.2.2:6000@eth1,ttl=8      9,000  11.8 MB  1.0 k/s  993 queue_full
                                                                 7 too_big
cam1  239.1.1.1:5000@eth0              10,000  13.2 MB  1.0 k/s  0
      -> 239.2.2.2:6000@eth1,ttl=8      9,000  11.8 MB  1.0 k/s  0

INTERFACE  DATAPATH  STEERED  RECEIVED  DROPPED          DISCARDED  OTHER VERDICTS
eth0       af-xdp     20,010    20,000  10 rx_ring_full  0          3 fragment
"
        );
    }

    #[test]
    fn alarms_stand_on_top_and_what_lost_something_is_shown() {
        let of_rule = RuleStats { idle_seconds: Some(14), stalled: true, ..rule("cam1", &[]) };
        let interface = InterfaceStats {
            name: "eth0".to_owned(),
            datapath: "af-xdp".to_owned(),
            verdicts: counts(&[("steered", 30_015)]),
            received: 30_005,
            dropped: counts(&[("rx_ring_full", 10)]),
            discarded: [].into(),
            queues: vec![queue(0, &[("rx_ring_full", 3)]), queue(1, &[]), queue(2, &[("rx_ring_full", 7)])],
        };
        let device = |name: &str, link: &[(&str, u64)], qdisc: &[(&str, u64)]| DeviceStats {
            name: name.to_owned(),
            link: counts(link),
            qdisc: counts(qdisc),
            ..DeviceStats::default()
        };
        let alarm = Alarm {
            what: "ledger: output 239.2.2.2:6000@eth1 of rule cam1: received 10,000 is 9,995 sent, 0 dropped and 5 \
                   unaccounted for"
                .to_owned(),
            gap: 5,
            since: "2025-06-01T11:59:00Z".to_owned(),
            next: "mcr stats cam1".to_owned(),
        };
        let stats = Stats {
            devices: vec![
                device("eth0", &[("rx_dropped", 2)], &[]),
                device("eth1", &[], &[("tbf drops", 187), ("tbf overlimits", 200)]),
                device("eth2", &[], &[("tbf overlimits", 9)]),
            ],
            alarms: vec![alarm],
            ..stats(vec![rule("cam2", &[]), of_rule], vec![interface])
        };
        assert_eq!(
            render(&stats, 100),
            "\
2025-06-01T12:00:00Z, counted since 2025-06-01T09:00:00Z

!  ledger: output 239.2.2.2:6000@eth1 of rule cam1: received 10,000 is 9,995 sent, 0 dropped and 5
   unaccounted for, since 2025-06-01T11:59:00Z

RULE  RECEIVED -> SENT              DATAGRAMS    BYTES           RATE  DROPPED
cam1  239.1.1.1:5000@eth0              10,000  13.2 MB  none for 14 s  0
      -> 239.2.2.2:6000@eth1,ttl=8      9,000  11.8 MB        1.0 k/s  0
cam2  239.1.1.1:5000@eth0              10,000  13.2 MB        1.0 k/s  0
      -> 239.2.2.2:6000@eth1,ttl=8      9,000  11.8 MB        1.0 k/s  0

INTERFACE  DATAPATH   STEERED  RECEIVED  DROPPED          DISCARDED  OTHER VERDICTS
eth0       af-xdp      30,015    30,005  10 rx_ring_full  0          0
  queue 2  eth0/xdp2   10,005    10,000  7 rx_ring_full
  queue 0  eth0/xdp0   10,005    10,000  3 rx_ring_full

DEVICE LOST  LINK          QDISC               DRIVER
eth1         0             200 tbf overlimits  0
                           187 tbf drops
eth0         2 rx_dropped  0                   0
"
        );
    }

    #[test]
    fn no_rules_are_said_so() {
        assert!(
            render(&stats(Vec::new(), Vec::new()), 100).contains("no rules: add one with `mcr rule add`\n")
        );
    }

    #[test]
    fn lines_fit_whatever_the_names() {
        let mut wide = rule(&"x".repeat(63), &[("a_reason_that_is_long", u64::MAX)]);
        wide.input = "239.255.255.255:65535@abcdefghijklmno,source=192.168.100.200".to_owned();
        wide.stalled = true;
        wide.idle_seconds = Some(u64::MAX);
        let long = "abcdefghijklmno";
        let lost = counts(&[("rx_missed_errors", u64::MAX), ("a_statistic_of_some_driver_31_chars", 7)]);
        let interface = InterfaceStats {
            name: long.to_owned(),
            datapath: "af-packet".to_owned(),
            verdicts: counts(&[("steered", u64::MAX), ("not_multicast", u64::MAX)]),
            received: u64::MAX,
            dropped: lost.clone(),
            discarded: lost.clone(),
            queues: (0..3).map(|of| queue(of, &[("fill_ring_empty", u64::MAX)])).collect(),
        };
        let device = DeviceStats {
            name: long.to_owned(),
            link: lost.clone(),
            qdisc: counts(&[("fq_codel drops", u64::MAX)]),
            driver: lost,
        };
        let alarm = Alarm {
            what: format!("ledger: output {}@{long} of rule {}: 1 is 2", wide.input, wide.name),
            gap: -1,
            since: "2025-06-01T12:00:00Z".to_owned(),
            next: "mcr stats".to_owned(),
        };
        for width in [40, 80, 100] {
            let stats = Stats {
                devices: vec![device.clone()],
                alarms: vec![alarm.clone()],
                ..stats(vec![wide.clone()], vec![interface.clone()])
            };
            let text = render(&stats, width);
            let table = text.lines().skip(2);
            assert!(table.map(|line| line.chars().count()).max() <= Some(width.into()), "{text}");
        }
    }

    #[test]
    fn a_frame_never_scrolls() {
        assert_eq!(frame("a\nb\n", 24), "\x1b[Ha\x1b[K\nb\x1b[K\n\x1b[J");
        assert_eq!(frame("a\nb\nc\nd\n", 4), "\x1b[Ha\x1b[K\nb\x1b[K\n... and 2 more lines\x1b[K\n\x1b[J");
        assert_eq!(frame("a\nb\nc\n", 4), "\x1b[Ha\x1b[K\nb\x1b[K\nc\x1b[K\n\x1b[J");
        assert_eq!(frame("a\nb\n", 0), "\x1b[H... and 2 more lines\x1b[K\n\x1b[J");
    }
}
