//! `mcr status`: is it working, what is wrong, what to type next.

use std::{collections::BTreeMap, fmt::Write};

use super::{
    remote::Remote,
    text::{count, plural, rate, reasons, si, total},
};
use crate::api::wire::{Health, Request, RuleCounts, Status};

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
    let restarts = usize::try_from(status.worker_restarts).unwrap_or(usize::MAX);
    let mut lines = vec![
        format!("mcr {} {} (pid {}, since {})", status.version, verdict(status), status.pid, status.since),
        format!("rules      {}", rules(&status.rules)),
        format!(
            "workers    {} of {} running, {} restart{}",
            status.workers_running,
            status.workers_total,
            count(status.worker_restarts),
            plural(restarts),
        ),
        format!("received   {}", rate(status.received_pps)),
        format!("sent       {}, {}", rate(status.sent_pps), si(status.sent_bps, "b/s")),
        format!("dropped    {}", dropped(&status.dropped)),
    ];
    for (device, lost) in &status.device_lost {
        lines.push(format!("lost       {} that {device} was given to send: mcr stats", count(*lost)));
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

/// `3: 2 active, 1 pending, 0 failed`.
fn rules(rules: &RuleCounts) -> String {
    if rules.total == 0 {
        return "0".to_owned();
    }
    let [total, active, pending, failed] =
        [rules.total, rules.active, rules.pending, rules.failed].map(|number| count(number.into()));
    let mut text = format!("{total}: {active} active, {pending} pending, {failed} failed");
    for (number, what) in [(rules.stalled, "stalled"), (rules.unseen, "without a datagram so far")] {
        if number > 0 {
            let _ = write!(text, ", {} {what}", count(number.into()));
        }
    }
    text
}

/// `5: 3 loop, 2 queue_full`.
fn dropped(dropped: &BTreeMap<String, u64>) -> String {
    match total(dropped) {
        0 => "0".to_owned(),
        total => format!("{}: {}", count(total), reasons(dropped).replace('\n', ", ")),
    }
}

pub fn verdict(status: &Status) -> &'static str {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::wire::Problem;

    fn status() -> Status {
        Status {
            schema: 1,
            time: "2025-06-01T12:00:00Z".to_owned(),
            since: "2025-06-01T09:00:00Z".to_owned(),
            version: "0.1.0".to_owned(),
            pid: 77,
            health: Health::Active,
            rules: RuleCounts::default(),
            workers_running: 0,
            workers_total: 0,
            worker_restarts: 0,
            received_pps: 0.0,
            sent_pps: 0.0,
            sent_bps: 0.0,
            dropped: [].into(),
            device_lost: [].into(),
            problems: Vec::new(),
            alarms: Vec::new(),
        }
    }

    #[test]
    fn a_daemon_without_rules_says_how_to_add_one() {
        assert_eq!(
            render(&status()),
            "\
mcr 0.1.0 is ready and has no rules (pid 77, since 2025-06-01T09:00:00Z)
rules      0
workers    0 of 0 running, 0 restarts
received   0 /s
sent       0 /s, 0 b/s
dropped    0

next: mcr rule add --in GROUP:PORT@INTERFACE --out GROUP:PORT@INTERFACE
"
        );
    }

    #[test]
    fn problems_come_with_what_to_type_next() {
        let problem =
            Problem { what: "rule cam2: eth1 is down".to_owned(), next: "ip link set eth1 up".to_owned() };
        let status = Status {
            health: Health::Pending,
            rules: RuleCounts { total: 1200, active: 1199, pending: 1, failed: 0, stalled: 2, unseen: 1004 },
            workers_running: 2,
            workers_total: 3,
            worker_restarts: 1,
            received_pps: 12_345.6,
            sent_pps: 24_690.0,
            sent_bps: 259_012_345.0,
            dropped: [("queue_full".to_owned(), 2), ("loop".to_owned(), 1003)].into(),
            device_lost: [("eth2".to_owned(), 2345)].into(),
            problems: vec![problem],
            ..status()
        };
        assert_eq!(
            render(&status),
            "\
mcr 0.1.0 is working in part: something is pending (pid 77, since 2025-06-01T09:00:00Z)
rules      1,200: 1,199 active, 1 pending, 0 failed, 2 stalled, 1,004 without a datagram so far
workers    2 of 3 running, 1 restart
received   12.3 k/s
sent       24.7 k/s, 259.0 Mb/s
dropped    1,005: 1,003 loop, 2 queue_full
lost       2,345 that eth2 was given to send: mcr stats

! rule cam2: eth1 is down
  next: ip link set eth1 up
"
        );
    }

    #[test]
    fn a_thousand_problems_stay_one_screen() {
        let problem = Problem { what: "w".to_owned(), next: "n".to_owned() };
        let text = render(&Status { problems: vec![problem; 1000], ..status() });
        assert!(text.ends_with("! and 992 more: mcr status --json\n"), "{text}");
        assert!(text.lines().count() <= 24);
    }
}
