//! Rules as text for people.

use std::fmt::Write;

use crate::{
    api::wire::{Health, Outcome, RuleInfo, RuleList, RuleOutcome, RuleShow},
    cli::text::{health, one_line, table},
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
                rule.origin.clone(),
                health(rule.health, rule.reason.as_deref()),
            ]
        })
        .collect();
    table(width, &["RULE", "IN", "OUT", "DATAPATH", "ORIGIN", "STATE"], &[], rows)
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
    if !rule.datapath_why.is_empty() {
        rows.push(row("why", rule.datapath_why.clone()));
    }
    rows.push(row("origin", one_line(rule.place.as_ref().unwrap_or(&rule.origin))));
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::wire::OutputInfo;

    fn rule(outputs: &[&str]) -> RuleInfo {
        let outputs = outputs.iter().map(|to| OutputInfo {
            to: (*to).to_owned(),
            health: Health::Active,
            reason: None,
        });
        RuleInfo {
            name: "cam1".to_owned(),
            origin: "cli".to_owned(),
            place: None,
            input: "239.1.1.1:5000@eth0".to_owned(),
            outputs: outputs.collect(),
            datapath: Some("af-xdp".to_owned()),
            datapath_asked: "auto".to_owned(),
            datapath_why: "eth0 has native XDP; the host itself sees nothing of it on ingress".to_owned(),
            merge: false,
            link_local: true,
            health: Health::Active,
            reason: None,
        }
    }

    #[test]
    fn an_outcome_is_a_line() {
        let one = rule(&["239.2.2.2:6000@eth1"]);
        let pending =
            RuleInfo { health: Health::Pending, reason: Some("eth1 is down".to_owned()), ..one.clone() };
        let many = rule(&["a", "b", "c", "d", "e"]);
        let place = "cam1: 239.1.1.1:5000@eth0 -> 239.2.2.2:6000@eth1";
        for (outcome, rule, line) in [
            (Outcome::Added, one.clone(), format!("added {place}\n")),
            (Outcome::Unchanged, one, format!("unchanged {place}\n")),
            (Outcome::Added, pending.clone(), format!("added {place} (pending: eth1 is down)\n")),
            (Outcome::Removed, pending, format!("removed {place}\n")),
            (Outcome::Changed, many, "changed cam1: 239.1.1.1:5000@eth0 -> a, b, c, and 2 more\n".to_owned()),
        ] {
            assert_eq!(super::outcome(&RuleOutcome { schema: 1, outcome, rule, warnings: Vec::new() }), line);
        }
    }

    #[test]
    fn rules_are_a_table() {
        let mut second = rule(&["a", "b", "c", "d"]);
        second.name = "cam2".to_owned();
        second.datapath = None;
        (second.health, second.reason) = (Health::Failed, Some("no memory".to_owned()));
        let rules = RuleList { schema: 1, rules: vec![rule(&["239.2.2.2:6000@eth1"]), second] };
        assert_eq!(
            list(&rules, 100),
            "\
RULE  IN                   OUT                  DATAPATH  ORIGIN  STATE
cam1  239.1.1.1:5000@eth0  239.2.2.2:6000@eth1  af-xdp    cli     active
cam2  239.1.1.1:5000@eth0  a                    -         cli     failed: no memory
                           b
                           c
                           d
"
        );
    }

    #[test]
    fn a_place_is_one_line() {
        let mut rule = rule(&["a"]);
        rule.place = Some("x\n\u{1b}[31m:3".to_owned());
        let text = show(&RuleShow { schema: 1, rule }, 60);
        assert!(text.contains("origin      x  [31m:3\n"), "{text}");
    }

    #[test]
    fn no_rules_say_how_to_add_one() {
        let text = list(&RuleList { schema: 1, rules: Vec::new() }, 100);
        assert!(text.starts_with("no rules: add one with `mcr rule add --in "), "{text}");
    }

    #[test]
    fn a_rule_shows_its_outputs_and_why_its_datapath() {
        let mut rule = rule(&["239.2.2.2:6000@eth1", "239.3.3.3:7000@eth2"]);
        (rule.outputs[1].health, rule.outputs[1].reason) =
            (Health::Pending, Some("eth2 has no address".to_owned()));
        assert_eq!(
            show(&RuleShow { schema: 1, rule }, 60),
            "\
rule        cam1
state       active
in          239.1.1.1:5000@eth0
out         239.2.2.2:6000@eth1  active
            239.3.3.3:7000@eth2  pending: eth2 has no
            address
datapath    af-xdp (asked for: auto)
why         eth0 has native XDP; the host itself sees
            nothing of it on ingress
origin      cli
link-local  yes
"
        );
    }
}
