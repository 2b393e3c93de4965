//! `mcr status`: is it working, what is wrong, what to type next.

use std::fmt::Write;

use super::{
    remote::Remote,
    text::{count, plural, rate, si, total},
};
use crate::api::wire::{Health, Request, Status};

/// One screen: is it working, what is wrong, what to type next
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    remote: Remote,
}

impl Args {
    pub fn run(self) -> anyhow::Result<()> {
        self.remote.ask(&Request::Status, |status, _| render(status))
    }
}

/// Problems that are listed before the screen is full.
const SHOWN: usize = 8;

fn render(status: &Status) -> String {
    let Status { rules, .. } = status;
    let mut lines = vec![
        format!("mcr {} {} (pid {}, since {})", status.version, verdict(status), status.pid, status.since),
        format!("rules      {}", count(rules.total.into())),
        format!(
            "workers    {} of {} running, {} restart{}",
            status.workers_running,
            status.workers_total,
            count(status.worker_restarts),
            plural(usize::try_from(status.worker_restarts).unwrap_or(usize::MAX)),
        ),
        format!("received   {}", rate(status.received_pps)),
        format!("sent       {}, {}", rate(status.sent_pps), si(status.sent_bps, "b/s")),
        format!("dropped    {}", count(total(&status.dropped))),
    ];
    if rules.total > 0 {
        let _ =
            write!(lines[1], ": {} active, {} pending, {} failed", rules.active, rules.pending, rules.failed);
    }
    let mut dropped: Vec<_> = status.dropped.iter().filter(|&(_, &number)| number > 0).collect();
    dropped.sort_by_key(|&(_, &number)| std::cmp::Reverse(number));
    for (index, (reason, &number)) in dropped.into_iter().enumerate() {
        let _ = write!(lines[5], "{} {} {reason}", if index == 0 { ":" } else { "," }, count(number));
    }
    lines.push(String::new());
    for problem in status.problems.iter().take(SHOWN) {
        lines.push(format!("! {}", problem.what));
        lines.push(format!("  next: {}", problem.next));
    }
    if let Some(more @ 1..) = status.problems.len().checked_sub(SHOWN) {
        lines.push(format!("! and {more} more: mcr status --json"));
    }
    if status.problems.is_empty() {
        lines.push(format!("next: {}", next(status)));
    }
    lines.join("\n") + "\n"
}

fn verdict(status: &Status) -> &'static str {
    match status.health {
        Health::Active if status.rules.total == 0 => "is ready and has no rules",
        Health::Active => "is working",
        Health::Pending => "is working in part: something is pending",
        Health::Failed => "is NOT working as it should: something failed",
    }
}

fn next(status: &Status) -> &'static str {
    if status.rules.total == 0 {
        "mcr rule add --in GROUP:PORT@INTERFACE --out GROUP:PORT@INTERFACE"
    } else {
        "mcr stats --watch"
    }
}
