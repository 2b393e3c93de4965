//! What the log says of those who change something: who asked for what, and what came of it.

use tracing::info;

use super::commands::Answer;
use crate::{
    api::{
        server::Peer,
        wire::{ConfigLoad, LogLevel, Request, RuleChange, RuleRemoval, RuleSpec, Stop},
    },
    rule::RuleName,
};

/// Characters of a text of the client's, or of an answer to it, that are logged.
const LONGEST: usize = 500;

/// A call that is logged.
#[derive(Debug, PartialEq, Eq)]
pub struct Asked {
    method: &'static str,
    /// As the client has it.
    rule: Option<String>,
    /// The rest of what it asks for.
    what: Option<String>,
}

impl Asked {
    /// None of what changes nothing.
    pub fn of(request: &Request) -> Option<Self> {
        let (method, rule, what) = match request {
            Request::RuleAdd(spec) => ("rule.add", spec.name.as_ref(), added(spec)),
            Request::RuleSet(change) => ("rule.set", Some(&change.name), changed(change)),
            Request::RuleRemove(RuleRemoval { name, save }) => {
                ("rule.remove", Some(name), Vec::from_iter(word("save", *save)))
            }
            Request::ConfigLoad(load) => ("config.load", None, loaded(load)),
            Request::ConfigConfirm => ("config.confirm", None, Vec::new()),
            Request::ConfigRollback => ("config.rollback", None, Vec::new()),
            Request::ConfigSave => ("config.save", None, Vec::new()),
            Request::LogLevelSet(LogLevel { level }) => ("log_level.set", None, vec![level.clone()]),
            Request::EventsSubscribe => ("events.subscribe", None, Vec::new()),
            Request::Stop(Stop { keep }) => ("stop", None, Vec::from_iter(word("keep", *keep))),
            Request::Ping
            | Request::Status
            | Request::RuleList
            | Request::RuleShow(_)
            | Request::Stats(_)
            | Request::Workers
            | Request::ConfigShow
            | Request::LogLevelGet => return None,
        };
        let what = Some(what.join(" ")).filter(|what| !what.is_empty()).map(|what| cut(&what));
        Some(Self { method, rule: rule.cloned(), what })
    }

    /// Logs it with what was answered. Texts of the client's stand in quotation marks, or are names.
    pub fn log(&self, peer: Peer, answer: &Answer) {
        let (outcome, why) = outcome(answer);
        info!(
            uid = peer.uid,
            pid = peer.pid,
            asked = %self.method,
            rule = self.name(answer).map(tracing::field::display),
            what = self.what,
            outcome = %outcome,
            why,
        );
    }

    /// The rule's name; that of one that was given none is in the answer.
    fn name(&self, answer: &Answer) -> Option<RuleName> {
        let given = || answer.as_ref().ok()?.pointer("/rule/name")?.as_str();
        self.rule.as_deref().or_else(given)?.parse().ok()
    }
}

fn outcome(answer: &Answer) -> (&str, Option<String>) {
    match answer {
        Ok(answer) => (answer.get("outcome").and_then(|outcome| outcome.as_str()).unwrap_or("done"), None),
        Err(error) => ("refused", Some(cut(&error.message))),
    }
}

fn cut(text: &str) -> String {
    text.chars().take(LONGEST).collect()
}

fn word(word: &str, is_said: bool) -> Option<String> {
    is_said.then(|| word.to_owned())
}

fn added(spec: &RuleSpec) -> Vec<String> {
    let mut words = vec![format!("{} -> {}", spec.input, spec.outputs.join(", "))];
    words.extend(spec.datapath.as_ref().map(|datapath| format!("datapath={datapath}")));
    words.extend(consent(spec.merge, spec.link_local, spec.save));
    words
}

fn changed(change: &RuleChange) -> Vec<String> {
    let outputs =
        |key, outputs: &[String]| (!outputs.is_empty()).then(|| format!("{key} {}", outputs.join(", ")));
    let mut words = Vec::from_iter(outputs("add_out", &change.add_out));
    words.extend(outputs("del_out", &change.del_out));
    words.extend(change.datapath.as_ref().map(|datapath| format!("datapath={datapath}")));
    words.extend(consent(change.merge, change.link_local, change.save));
    words
}

fn consent(merge: bool, link_local: bool, save: bool) -> impl Iterator<Item = String> {
    [word("merge", merge), word("link_local", link_local), word("save", save)].into_iter().flatten()
}

fn loaded(load: &ConfigLoad) -> Vec<String> {
    let files: Vec<_> = load.sources.iter().map(|source| source.file.as_str()).collect();
    let mut words = vec![files.join(", ")];
    words.extend(word("dry_run", load.dry_run));
    words.extend(load.confirm_within_s.map(|seconds| format!("confirm_within_s={seconds}")));
    words
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::{api::wire::Error, config::Source};

    #[test]
    fn what_changes_something_is_told_in_words() {
        let spec = RuleSpec {
            name: Some("x".to_owned()),
            input: "239.1.1.1:5000@in0".to_owned(),
            outputs: vec!["239.2.2.2:6000@out0".to_owned(), "10.0.0.7:7000@out1".to_owned()],
            datapath: Some("af-xdp".to_owned()),
            merge: true,
            link_local: true,
            save: true,
        };
        let change = RuleChange {
            name: "x".to_owned(),
            add_out: vec!["a".to_owned(), "b".to_owned()],
            del_out: vec!["c".to_owned()],
            ..RuleChange::default()
        };
        let source = Source { file: "/etc/mcr/mcr.toml".to_owned(), text: String::new() };
        let load = ConfigLoad { sources: vec![source], dry_run: true, confirm_within_s: Some(9) };
        let long = LogLevel { level: "é".repeat(2 * LONGEST) };
        for (request, method, rule, what) in [
            (
                Request::RuleAdd(spec),
                "rule.add",
                Some("x"),
                "239.1.1.1:5000@in0 -> 239.2.2.2:6000@out0, 10.0.0.7:7000@out1 datapath=af-xdp merge \
                 link_local save",
            ),
            (Request::RuleSet(change), "rule.set", Some("x"), "add_out a, b del_out c"),
            (
                Request::RuleRemove(RuleRemoval { name: "x".to_owned(), save: true }),
                "rule.remove",
                Some("x"),
                "save",
            ),
            (Request::ConfigLoad(load), "config.load", None, "/etc/mcr/mcr.toml dry_run confirm_within_s=9"),
            (Request::Stop(Stop { keep: false }), "stop", None, ""),
            (Request::LogLevelSet(long), "log_level.set", None, &"é".repeat(LONGEST)),
        ] {
            let what = Some(what.to_owned()).filter(|what| !what.is_empty());
            let expected = Asked { method, rule: rule.map(str::to_owned), what };
            assert_eq!(Asked::of(&request), Some(expected));
        }
        assert_eq!(Asked::of(&Request::Status), None);
    }

    #[test]
    fn what_came_of_it_is_told_and_of_which_rule() {
        let asked =
            |rule: Option<&str>| Asked { method: "rule.add", rule: rule.map(str::to_owned), what: None };
        let added = Ok(json!({"outcome": "added", "rule": {"name": "derived"}}));
        let refused = Err(Error::refused("no"));
        for (rule, answer, expected, name) in [
            (None, &added, ("added", None), Some("derived")),
            (Some("x"), &refused, ("refused", Some("no".to_owned())), Some("x")),
            (Some("x outcome=added"), &refused, ("refused", Some("no".to_owned())), None),
            (None, &Ok(json!({"schema": 1})), ("done", None), None),
        ] {
            assert_eq!(outcome(answer), expected);
            assert_eq!(asked(rule).name(answer).map(|name| name.to_string()).as_deref(), name);
        }
    }
}
