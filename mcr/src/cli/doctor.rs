//! `mcr doctor`: why nothing flows, and what mends it.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write,
    process::ExitCode,
    time::{Duration, SystemTime},
};

use serde::Serialize;

use super::{
    print,
    remote::Remote,
    text::{count, one_line, plural},
    traffic,
};
use crate::{
    api::wire::{SCHEMA, timestamp},
    doctor::{
        collect::collect,
        findings::{Check, Code, Finding, Outcome, Severity, decide},
        typed::Asking,
    },
};

/// Say why nothing flows, in plain words, each with the command that mends it
///
/// Looks at the daemon, its rules, their interfaces and the host, and for some seconds at the wire; it sends nothing, joins
/// nothing and changes nothing. Run it where the daemon runs, as root: what may not be read is said, not guessed.
/// docs/doctor.md lists all that it finds.
///
/// Exit status: 0 nothing is wrong (notes are no wrong), 1 problems were found, or it failed, 2 usage, 3 no daemon on the socket; the
/// host and its interfaces are looked at all the same.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// What to look at [default: everything]
    #[arg(value_name = "INTERFACE|RULE")]
    subject: Option<String>,
    /// How long to look at the wire. A switch's querier asks each 125 s: 130 finds out whether there is one
    #[arg(long, value_name = "S", default_value = "2", value_parser = at_most_an_hour)]
    seconds: Duration,
    #[command(flatten)]
    remote: Remote,
}

/// The report as JSON; stable.
#[derive(Serialize)]
struct Report<'a> {
    schema: u32,
    /// RFC 3339, UTC.
    time: String,
    looked_seconds: f64,
    findings: &'a [Finding],
    checked: &'a [Check],
}

/// Findings of one kind and subjects without a finding that are shown before it is no screen any more.
const SHOWN: usize = 8;

const HOUR: Duration = Duration::from_hours(1);

/// Exit status where there is no daemon, as of every command.
const NO_DAEMON: u8 = 3;

fn at_most_an_hour(text: &str) -> Result<Duration, String> {
    let seconds = traffic::seconds(text)?;
    if seconds <= HOUR { Ok(seconds) } else { Err("look for an hour (3600) at most".to_owned()) }
}

pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let seen = collect(args.remote.control(), args.subject.as_deref(), args.seconds)?;
    let mut outcome = decide(&seen);
    Asking::new(args.remote.control(), args.subject.as_deref()).write(&mut outcome);
    if args.remote.json() {
        let report = Report {
            schema: SCHEMA,
            time: timestamp(SystemTime::now()),
            looked_seconds: seen.look.lasted.as_secs_f64(),
            findings: &outcome.findings,
            checked: &outcome.checked,
        };
        print(&(serde_json::to_string(&report)? + "\n"))?;
    } else {
        print(&render(&outcome))?;
    }
    Ok(status(&outcome))
}

fn status(outcome: &Outcome) -> ExitCode {
    let mut problems = outcome.findings.iter().filter(|finding| finding.severity == Severity::Problem);
    match problems.next() {
        None => ExitCode::SUCCESS,
        Some(_) if outcome.findings.iter().any(|finding| finding.code == Code::NoDaemon) => {
            ExitCode::from(NO_DAEMON)
        }
        Some(_) => ExitCode::FAILURE,
    }
}

/// Subjects in the order in which they were come upon, those with problems first.
fn render(outcome: &Outcome) -> String {
    let mut text = String::new();
    let mut shown: BTreeMap<(Code, Severity), usize> = BTreeMap::new();
    let mut well = 0;
    for subject in subjects(outcome) {
        let of = |finding: &&Finding| finding.subject == subject;
        let findings: Vec<_> = outcome.findings.iter().filter(of).collect();
        if findings.is_empty() {
            well += 1;
            if well > SHOWN {
                continue;
            }
        }
        let mut lines = Vec::new();
        for finding in &findings {
            let so_far = shown.entry((finding.code, finding.severity)).or_default();
            *so_far += 1;
            if *so_far <= SHOWN {
                let mark = if finding.severity == Severity::Problem { "problem" } else { "note" };
                lines.push(format!("  {mark:7}  {}", one_line(&finding.what)));
                let next = if finding.run { "run: " } else { "next:" };
                lines.push(format!("           {next} {}", one_line(&finding.next)));
            }
        }
        let checked = outcome.checked.iter().filter(|check| check.subject == subject);
        lines.extend(checked.map(|check| format!("  {:7}  {}", "ok", one_line(&check.what))));
        if !lines.is_empty() {
            let _ = writeln!(text, "{subject}\n{}", lines.join("\n"));
        }
    }
    let more: usize = shown.values().map(|found| found.saturating_sub(SHOWN)).sum();
    if more + well.saturating_sub(SHOWN) > 0 {
        let well = well.saturating_sub(SHOWN);
        let _ = writeln!(
            text,
            "and {more} more finding{}, {well} more without any: --json has them all",
            plural(more)
        );
    }
    let number = |severity| outcome.findings.iter().filter(|finding| finding.severity == severity).count();
    let (problems, notes) = (number(Severity::Problem), number(Severity::Note));
    let found = |number: usize, what| format!("{} {what}{}", count(number as u64), plural(number));
    let _ = match problems {
        0 => writeln!(text, "\nnothing is wrong, {}", found(notes, "note")),
        _ => writeln!(text, "\n{}, {}", found(problems, "problem"), found(notes, "note")),
    };
    text
}

fn subjects(outcome: &Outcome) -> Vec<&str> {
    let found = |severity| {
        let its = outcome.findings.iter().filter(move |finding| finding.severity == severity);
        its.map(|finding| finding.subject.as_str())
    };
    let all = found(Severity::Problem).chain(found(Severity::Note));
    let all = all.chain(outcome.checked.iter().map(|check| check.subject.as_str()));
    let mut known = BTreeSet::new();
    all.filter(|subject| known.insert(*subject)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn well(subject: &str, what: &str) -> Check {
        Check { subject: subject.to_owned(), what: what.to_owned() }
    }

    #[test]
    fn what_is_well_is_short() {
        let checked = vec![well("daemon", "it answers"), well("rule cam1", "1,000 datagrams came")];
        assert_eq!(
            render(&Outcome { findings: Vec::new(), checked }),
            "\
daemon
  ok       it answers
rule cam1
  ok       1,000 datagrams came

nothing is wrong, 0 notes
"
        );
    }

    #[test]
    fn problems_come_first_with_what_mends_them() {
        let findings = vec![
            Finding::note(Code::BpfJitOff, "host", "slow", "sysctl"),
            Finding::note(Code::TooBig, "rule cam1", "once", "mtu"),
            Finding {
                run: true,
                ..Finding::problem(Code::NothingArrives, "rule cam1", "nothing\narrives", "mcr gen")
            },
        ];
        let outcome =
            Outcome { findings, checked: vec![well("daemon", "it answers"), well("host", "2 CPUs")] };
        assert_eq!(
            render(&outcome),
            "\
rule cam1
  note     once
           next: mtu
  problem  nothing arrives
           run:  mcr gen
host
  note     slow
           next: sysctl
  ok       2 CPUs
daemon
  ok       it answers

1 problem, 2 notes
"
        );
    }

    #[test]
    fn a_thousand_rules_stay_one_screen() {
        let of_rule = |n: usize| Finding::problem(Code::NothingArrives, format!("rule r{n}"), "w", "n");
        let checked = (0..1000).map(|n| well(&format!("rule s{n}"), "flows")).collect();
        let text = render(&Outcome { findings: (0..1000).map(of_rule).collect(), checked });
        assert!(
            text.contains("\nand 992 more findings, 992 more without any: --json has them all\n"),
            "{text}"
        );
        assert!(text.ends_with("\n1,000 problems, 0 notes\n"), "{text}");
        assert!(text.lines().count() < 50, "{text}");
    }

    #[test]
    fn the_exit_status_is_that_of_every_command() {
        let outcome = |findings: Vec<Finding>| Outcome { findings, checked: Vec::new() };
        let problem = |code| Finding::problem(code, "s", "w", "n");
        let note = Finding::note(Code::BpfJitOff, "s", "w", "n");
        for (findings, expected) in [
            (vec![], ExitCode::SUCCESS),
            (vec![note], ExitCode::SUCCESS),
            (vec![problem(Code::PermissionDenied)], ExitCode::FAILURE),
            (vec![problem(Code::NoCarrier)], ExitCode::FAILURE),
            (vec![problem(Code::NoDaemon), problem(Code::NoCarrier)], ExitCode::from(3)),
        ] {
            assert_eq!(format!("{:?}", status(&outcome(findings))), format!("{expected:?}"));
        }
    }
}
