//! TOML to options and rules.

use std::ops::Range;

use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use super::{
    Config, Mistake, Source,
    mistake::line_at,
    options::{self, Options, Wrong},
};
use crate::{
    rule::{DatapathChoice, Origin, Place, Rule, RuleError, RuleName},
    ruleset::{Change, Refusal, RuleSet},
    supervisor::settings::Settings,
};

/// Reads a configuration: a file and its fragments, which hold rules alone.
///
/// # Errors
///
/// Every mistake, in the order of the files and of their lines.
///
/// `said` goes before what the files say of options.
pub fn read(sources: &[Source], said: &Options) -> Result<Config, Vec<Mistake>> {
    read_files(sources.iter().enumerate().map(|(index, source)| (source, index > 0)), said)
}

/// Reads a fragment by itself, for a daemon that runs with these options.
pub fn read_fragment(source: &Source, runs: &Options) -> Result<Config, Vec<Mistake>> {
    read_files(std::iter::once((source, true)), runs)
}

/// Reads files, of each of which is said whether it is a fragment.
fn read_files<'a>(
    sources: impl Iterator<Item = (&'a Source, bool)>,
    said: &Options,
) -> Result<Config, Vec<Mistake>> {
    let mut mistakes = Vec::new();
    let mut config = Config::default();
    let mut written = Vec::new();
    let mut first = None;
    for (source, is_fragment) in sources {
        let mut reader = Reader { source, is_fragment, arguments: Vec::new(), mistakes: Vec::new() };
        written.extend(reader.file().into_iter().map(|rule| (source, rule)));
        config.options = config.options.or(options::parse(&reader.arguments));
        first = first.or(Some(source));
        reader.mistakes.sort_by_key(|mistake| (mistake.line, mistake.column));
        mistakes.extend(reader.mistakes);
    }
    let settings = Settings::from(said.clone().or(config.options.clone()));
    if let (Some(source), Err(what)) = (first, settings.check()) {
        mistakes.push(Mistake::new(source, 0..0, what));
    }
    let mut set = RuleSet::new(settings.max_rules);
    for (source, Written { mut rule, datapath, span }) in written {
        rule.datapath = datapath.unwrap_or(settings.datapath);
        let place = Place { file: source.file.as_str().into(), line: line_at(&source.text, span.start).0 };
        match set.add(rule.clone(), Origin::File(place.clone())) {
            Ok(Change::Made) => config.rules.push((rule, place)),
            Ok(Change::None) => {}
            Err(refusal) => note(&mut mistakes, source, span, || refused(&rule, &refusal, &set)),
        }
    }
    if mistakes.is_empty() { Ok(config) } else { Err(mistakes) }
}

/// A refusal with the way out that a file has.
fn refused(rule: &Rule, refusal: &Refusal, set: &RuleSet) -> String {
    let place = |name: &RuleName| match set.get(name.as_str()).map(|entry| &entry.origin) {
        Ok(Origin::File(place)) => place.to_string(),
        _ => String::new(),
    };
    let name = &rule.name;
    match refusal {
        Refusal::NoOutput => format!("rule '{name}' has no output: give it one in 'out'"),
        Refusal::LinkLocal { group } => format!(
            "{group} is link-local (224.0.0.0/24), which routers never forward: say link_local = true if it is meant"
        ),
        Refusal::InputTaken { input, name: other } => {
            format!(
                "{input} is the input of rule '{other}' ({}) already: give that one the outputs",
                place(other)
            )
        }
        Refusal::NameTaken { difference, .. } => {
            format!(
                "rule '{name}' stands at {} and differs in {difference}: choose another name",
                place(name)
            )
        }
        Refusal::OutputTaken { output, name: other } => format!(
            "the output {output} is fed by rule '{other}' ({}) already: say merge = true if both streams shall mix there",
            place(other)
        ),
        Refusal::Full { what, limit } => {
            format!("there is room for {limit} {what} and not for these too: raise max_rules in [daemon]")
        }
        other => other.to_string(),
    }
}

/// A rule that is one by itself.
struct Written {
    rule: Rule,
    /// What it says of its datapath.
    datapath: Option<DatapathChoice>,
    /// Of its table's head.
    span: Range<usize>,
}

type Value<'a> = Spanned<DeValue<'a>>;

/// Mistakes that are told of one file: finding the places of a million takes minutes, and nobody reads them.
const MOST: usize = 100;

/// Notes a mistake, unless there are enough.
fn note(mistakes: &mut Vec<Mistake>, source: &Source, span: Range<usize>, what: impl FnOnce() -> String) {
    match mistakes.len() {
        ..MOST => mistakes.push(Mistake::new(source, span, what())),
        MOST => mistakes.push(Mistake::new(source, span, "and more from here on: mend those above first")),
        _ => {}
    }
}

/// Reads one file.
struct Reader<'a> {
    source: &'a Source,
    is_fragment: bool,
    arguments: Vec<String>,
    mistakes: Vec<Mistake>,
}

impl Reader<'_> {
    fn mistake(&mut self, span: Range<usize>, what: impl Into<String>) {
        note(&mut self.mistakes, self.source, span, || what.into());
    }

    fn file(&mut self) -> Vec<Written> {
        let (top, errors) = DeTable::parse_recoverable(&self.source.text);
        if !errors.is_empty() {
            for error in errors {
                self.mistake(error.span().unwrap_or_default(), error.message().replace('\n', "; "));
            }
            return Vec::new();
        }
        let mut rules = Vec::new();
        for (key, value) in top.get_ref() {
            match (key.get_ref().as_ref(), value.get_ref()) {
                ("daemon", _) if self.is_fragment => {
                    self.mistake(
                        key.span(),
                        "[daemon] does not belong in a fragment: put it into the main file",
                    );
                }
                ("daemon", DeValue::Table(table)) => self.daemon(table),
                ("daemon", _) => self.mistake(value.span(), "'daemon' is a table: write [daemon]"),
                ("rule", DeValue::Array(tables)) => {
                    rules.extend(tables.iter().filter_map(|table| self.rule(table)));
                }
                ("rule", _) => {
                    self.mistake(key.span(), "there may be several rules: write [[rule]], with two brackets");
                }
                (other, _) => {
                    let what = format!("'{other}' is no key of a file: there are [daemon] and [[rule]]");
                    self.mistake(key.span(), what);
                }
            }
        }
        rules
    }

    fn daemon(&mut self, table: &DeTable<'_>) {
        for (key, value) in table {
            match options::argument(key.get_ref(), value.get_ref()) {
                Ok(argument) => self.arguments.extend(argument),
                Err(Wrong::Key(what)) => self.mistake(key.span(), what),
                Err(Wrong::Value(what)) => self.mistake(value.span(), what),
            }
        }
    }

    /// A rule, unless something is wrong with it.
    fn rule(&mut self, table: &Value<'_>) -> Option<Written> {
        let DeValue::Table(keys) = table.get_ref() else {
            self.mistake(table.span(), "a rule is a table: write [[rule]]");
            return None;
        };
        let known = self.mistakes.len();
        let (mut name, mut input, mut outputs) = (None, None, None);
        let mut datapath = None;
        let (mut merge, mut link_local) = (false, false);
        for (key, value) in keys {
            match key.get_ref().as_ref() {
                "name" => name = self.parsed(value, "name"),
                "in" => input = self.parsed(value, "in"),
                "out" => outputs = Some(self.outputs(value)),
                "datapath" => datapath = self.parsed(value, "datapath"),
                "merge" => merge = self.flag(value, "merge"),
                "link_local" => link_local = self.flag(value, "link_local"),
                other => {
                    let keys = "name, in, out, datapath, merge, link_local";
                    self.mistake(key.span(), format!("'{other}' is no key of a rule: there are {keys}"));
                }
            }
        }
        for (key, like) in [("in", "\"239.1.1.1:5000@eth0\""), ("out", "[\"239.2.2.2:6000@eth1\"]")] {
            if !keys.contains_key(key) {
                self.mistake(table.span(), format!("the rule has no '{key}': write {key} = {like}"));
            }
        }
        if self.mistakes.len() > known {
            return None;
        }
        let input = input?;
        let name = name.unwrap_or_else(|| RuleName::derived(&input));
        let unsaid = DatapathChoice::default();
        let rule = Rule { name, input, outputs: outputs?, datapath: unsaid, merge, link_local };
        Some(Written { rule, datapath, span: table.span() })
    }

    /// One output, or a list of them.
    fn outputs<T: std::str::FromStr<Err = RuleError>>(&mut self, value: &Value<'_>) -> Vec<T> {
        match value.get_ref() {
            DeValue::Array(values) => values.iter().filter_map(|value| self.parsed(value, "out")).collect(),
            _ => self.parsed(value, "out").into_iter().collect(),
        }
    }

    fn parsed<T: std::str::FromStr<Err = RuleError>>(&mut self, value: &Value<'_>, key: &str) -> Option<T> {
        let DeValue::String(text) = value.get_ref() else {
            let what =
                format!("'{key}' takes a text in quotes, and this is {}", options::kind(value.get_ref()));
            self.mistake(value.span(), what);
            return None;
        };
        text.parse().map_err(|error: RuleError| self.mistake(value.span(), error.to_string())).ok()
    }

    fn flag(&mut self, value: &Value<'_>, key: &str) -> bool {
        let DeValue::Boolean(set) = value.get_ref() else {
            let what = format!("'{key}' takes true or false, and this is {}", options::kind(value.get_ref()));
            self.mistake(value.span(), what);
            return false;
        };
        *set
    }
}

#[cfg(test)]
#[path = "read_tests.rs"]
mod tests;
