//! Options and rules to TOML, in the form in which they are read.

use std::fmt::Write;

use toml::Value;

use crate::{
    rule::{DatapathChoice, Rule},
    ruleset::Entry,
    supervisor::settings::Settings,
};

/// What a file that mcr wrote begins with; it may write such a one again.
pub const HEAD: &str = "# Written by mcr";

/// What runs: all settings that say something, and all rules.
pub fn document<'a>(settings: &Settings, rules: impl Iterator<Item = &'a Entry>) -> String {
    let mut text = format!("{HEAD}: what ran.\n\n[daemon]\n");
    for (key, value) in settings.named() {
        if let Some(value) = value {
            let _ = writeln!(text, "{key} = {value}");
        }
    }
    rules.for_each(|entry| rule(&mut text, &entry.rule, settings.datapath));
    text
}

/// mcr's own fragment, for a daemon whose own datapath this is: rules that were added by command and saved.
pub fn fragment<'a>(rules: impl Iterator<Item = &'a Rule>, datapath: DatapathChoice) -> String {
    let mut text = format!(
        "{HEAD}: the rules that `--save` and `mcr config save` made permanent. Change them by command: what is\n\
         # written here by hand goes at the next one.\n"
    );
    rules.for_each(|entry| rule(&mut text, entry, datapath));
    text
}

/// Writes a rule for a daemon whose own datapath this is.
fn rule(text: &mut String, rule: &Rule, datapath: DatapathChoice) {
    let quoted = |text: String| Value::String(text).to_string();
    let _ = write!(text, "\n[[rule]]\nname = {}\n", quoted(rule.name.to_string()));
    let _ = writeln!(text, "in = {}", quoted(rule.input.to_string()));
    let outputs: Vec<_> = rule.outputs.iter().map(|output| quoted(output.to_string())).collect();
    let _ = match &outputs[..] {
        [one] => writeln!(text, "out = [{one}]"),
        many => writeln!(text, "out = [\n    {},\n]", many.join(",\n    ")),
    };
    if rule.datapath != datapath {
        let _ = writeln!(text, "datapath = {}", quoted(rule.datapath.to_string()));
    }
    for (set, key) in [(rule.merge, "merge"), (rule.link_local, "link_local")] {
        if set {
            let _ = writeln!(text, "{key} = true");
        }
    }
}
