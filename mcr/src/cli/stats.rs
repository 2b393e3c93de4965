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
    text::{bytes, count, rate, reasons, table, total},
};
use crate::{
    api::wire::{InterfaceStats, Request, RuleStats, Stats, StatsQuery},
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
            remote.show(&stats, |stats, width| frame(&render(stats, width), terminal.size().0))?;
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
    let mut text = format!("{}, counted since {}\n\n", stats.time, stats.since);
    if stats.rules.is_empty() {
        text.push_str("no rules: add one with `mcr rule add`\n");
    } else {
        text.push_str(&rules(&stats.rules, width));
    }
    if !stats.interfaces.is_empty() {
        text.push('\n');
        text.push_str(&interfaces(&stats.interfaces, width));
    }
    text
}

/// Drops of a rule, before and at its outputs.
fn dropped(rule: &RuleStats) -> u64 {
    rule.outputs.iter().map(|output| total(&output.dropped)).fold(total(&rule.dropped), u64::saturating_add)
}

fn rules(rules: &[RuleStats], width: u16) -> String {
    let mut worst_first: Vec<_> = rules.iter().collect();
    worst_first.sort_by_key(|rule| (Reverse(dropped(rule)), &rule.name));
    let mut rows = Vec::new();
    for rule in worst_first {
        rows.push(vec![
            rule.name.clone(),
            rule.input.clone(),
            count(rule.received),
            bytes(rule.received_bytes),
            rate(rule.received_pps),
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
    let rows = worst_first
        .into_iter()
        .map(|interface| {
            let mut verdicts = interface.verdicts.clone();
            let steered = verdicts.remove("steered").unwrap_or(0);
            vec![
                interface.name.clone(),
                interface.datapath.clone(),
                count(steered),
                count(interface.received),
                reasons(&interface.dropped),
                reasons(&interface.discarded),
                reasons(&verdicts),
            ]
        })
        .collect();
    table(
        width,
        &["INTERFACE", "DATAPATH", "STEERED", "RECEIVED", "DROPPED", "DISCARDED", "OTHER VERDICTS"],
        &[2, 3],
        rows,
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::wire::OutputStats;

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
            matched: 10_000,
            received: 10_000,
            received_bytes: 13_160_000,
            received_pps: 1_000.0,
            last_seen: None,
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
        }
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
    fn no_rules_are_said_so() {
        assert!(
            render(&stats(Vec::new(), Vec::new()), 100).contains("no rules: add one with `mcr rule add`\n")
        );
    }

    #[test]
    fn lines_fit_whatever_the_names() {
        let mut wide = rule(&"x".repeat(63), &[("a_reason_that_is_long", u64::MAX)]);
        wide.input = "239.255.255.255:65535@abcdefghijklmno,source=192.168.100.200".to_owned();
        for width in [40, 80, 100] {
            let text = render(&stats(vec![wide.clone()], Vec::new()), width);
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
