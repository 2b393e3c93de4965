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
        &["INTERFACE", "STEERED", "RECEIVED", "DROPPED", "DISCARDED", "OTHER VERDICTS"],
        &[1, 2],
        rows,
    )
}
