//! Rules as text for people.

use std::fmt::Write;

use crate::{
    api::wire::{Health, Outcome, RuleInfo, RuleList, RuleOutcome, RuleShow},
    cli::text::{health, table},
};

/// Outputs that one cell or line names.
const SHOWN: usize = 4;

/// `added cam1: 239.1.1.1:5000@eth0 -> 239.2.2.2:6000@eth1`.
pub fn outcome(answer: &RuleOutcome) -> String {
    let rule = &answer.rule;
    let done = match answer.outcome {
        Outcome::Added => "added",
        Outcome::Changed => "changed",
        Outcome::Removed => "removed",
        Outcome::Unchanged => "unchanged",
    };
    let mut line = format!("{done} {}: {} -> {}", rule.name, rule.input, outputs(rule).join(", "));
    if rule.health != Health::Active && answer.outcome != Outcome::Removed {
        let _ = write!(line, " ({})", health(rule.health, rule.reason.as_deref()));
    }
    line.push('\n');
    line
}

/// The first outputs, and how many more there are.
fn outputs(rule: &RuleInfo) -> Vec<String> {
    let shown = if rule.outputs.len() <= SHOWN { SHOWN } else { SHOWN - 1 };
    let mut texts: Vec<_> = rule.outputs.iter().take(shown).map(|output| output.to.clone()).collect();
    if let Some(more @ 1..) = rule.outputs.len().checked_sub(shown) {
        texts.push(format!("and {more} more"));
    }
    texts
}

pub fn list(answer: &RuleList, width: u16) -> String {
    if answer.rules.is_empty() {
        return "no rules: add one with `mcr rule add --in GROUP:PORT@INTERFACE --out GROUP:PORT@INTERFACE`\n"
            .to_owned();
    }
    let rows = answer
        .rules
        .iter()
        .map(|rule| {
            vec![
                rule.name.clone(),
                rule.input.clone(),
                outputs(rule).join("\n"),
                rule.datapath.clone().unwrap_or_else(|| "-".to_owned()),
                health(rule.health, rule.reason.as_deref()),
            ]
        })
        .collect();
    table(width, &["RULE", "IN", "OUT", "DATAPATH", "STATE"], &[], rows)
}

pub fn show(answer: &RuleShow, width: u16) -> String {
    let rule = &answer.rule;
    let row = |key: &str, value: String| vec![key.to_owned(), value];
    let mut rows = vec![
        row("rule", rule.name.clone()),
        row("state", health(rule.health, rule.reason.as_deref())),
        row("in", rule.input.clone()),
    ];
    for (index, output) in rule.outputs.iter().enumerate() {
        let state = health(output.health, output.reason.as_deref());
        rows.push(row(if index == 0 { "out" } else { "" }, format!("{}  {state}", output.to)));
    }
    rows.push(row("datapath", datapath(rule)));
    rows.push(row("why", rule.datapath_why.clone()));
    rows.push(row("origin", rule.origin.clone()));
    for (set, option) in [(rule.merge, "merge"), (rule.link_local, "link-local")] {
        if set {
            rows.push(row(option, "yes".to_owned()));
        }
    }
    table(width, &[], &[], rows)
}

fn datapath(rule: &RuleInfo) -> String {
    match &rule.datapath {
        Some(datapath) if *datapath == rule.datapath_asked => datapath.clone(),
        Some(datapath) => format!("{datapath} (asked for: {})", rule.datapath_asked),
        None => format!("none yet (asked for: {})", rule.datapath_asked),
    }
}
