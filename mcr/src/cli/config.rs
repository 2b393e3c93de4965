//! `mcr config`: files to a daemon that runs, and what runs to files.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, bail};
use clap::Subcommand;
use serde::Serialize;

use super::{print, remote::Remote, text};
use crate::{
    api::wire::{
        ConfigLoad, ConfigOutcome, ConfigSaved, ConfigText, LoadOutcome, Request, RuleDifference, RuleSpec,
        SCHEMA, SettingDifference,
    },
    config::{self, HEAD, Mistake, Source, options::Options},
    rule::DatapathChoice,
    supervisor::first_mistake,
};

/// How long a load may take: thousands of rules are served before it is answered.
const PATIENCE: Duration = Duration::from_mins(2);

/// As many rules as a daemon can have.
const MOST_RULES: u32 = 65_536;

/// Check configuration files, load them into the daemon, and save what runs
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    remote: Remote,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Say everything that is wrong in a file and in rules.d/*.toml beside it; takes no daemon
    Check {
        /// The main file
        file: PathBuf,
    },
    /// Print what runs, as a file that gives it back
    Show,
    /// Make rules that were added by command permanent, in a fragment of mcr's own; or write all that runs to FILE
    Save {
        /// Where to write all that runs [default: only what was added by command, in rules.d/mcr-saved.toml]
        file: Option<PathBuf>,
        /// Replace FILE though mcr did not write it
        #[arg(long, requires = "file")]
        force: bool,
    },
    /// Put the rules of a file in the place of those that came from files, as a whole or not at all
    Load {
        /// The main file
        file: PathBuf,
        /// Take it back after so long unless `mcr config confirm` comes before
        #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..=86_400))]
        confirm: Option<u32>,
    },
    /// Tell what loading a file would change
    Diff {
        /// The main file
        file: PathBuf,
    },
    /// Keep a load that waits to be confirmed
    Confirm,
    /// Take back a load that waits to be confirmed, at once
    Rollback,
}

impl Args {
    pub fn run(self) -> anyhow::Result<()> {
        let remote = &self.remote;
        match self.command {
            Command::Check { file } => check(remote, &file),
            Command::Show => remote.ask(&Request::ConfigShow, |shown: &ConfigText, _| shown.toml.clone()),
            Command::Save { file: None, .. } => remote.ask(&Request::ConfigSave, saved),
            Command::Save { file: Some(file), force } => save(remote, &file, force),
            Command::Load { file, confirm } => load(remote, &file, confirm),
            Command::Diff { file } => {
                let load = ConfigLoad { sources: sources(&file)?, dry_run: true, confirm_within_s: None };
                let outcome: ConfigOutcome =
                    remote.connect()?.call_within(&Request::ConfigLoad(load), PATIENCE)?;
                remote.show(&outcome, |outcome, _| plan(outcome))
            }
            Command::Confirm => remote.ask(&Request::ConfigConfirm, |outcome, _| done(outcome)),
            Command::Rollback => remote.ask(&Request::ConfigRollback, |outcome, _| done(outcome)),
        }
    }
}

/// What `check --json` prints.
#[derive(Serialize)]
struct Checked {
    schema: u32,
    rules: usize,
    mistakes: Vec<Mistake>,
}

fn check(remote: &Remote, file: &Path) -> anyhow::Result<()> {
    let (rules, mistakes) = match config::read(&gather(file)?, &Options::default()) {
        Ok(config) => (config.rules.len(), Vec::new()),
        Err(mistakes) => (0, mistakes),
    };
    remote.show(&Checked { schema: SCHEMA, rules, mistakes: mistakes.clone() }, |_, _| {
        if mistakes.is_empty() {
            return format!("{} is right: {rules} rule{}\n", file.display(), text::plural(rules));
        }
        mistakes.iter().map(|mistake| mistake.excerpt() + "\n").collect()
    })?;
    match mistakes.len() {
        0 => Ok(()),
        wrong => bail!("{} has {wrong} mistake{}: mend them", file.display(), text::plural(wrong)),
    }
}

/// The file with its fragments. What a daemon is told of it holds wherever the daemon is.
fn gather(file: &Path) -> anyhow::Result<Vec<Source>> {
    let file = std::path::absolute(file).with_context(|| format!("{} is no path", file.display()))?;
    Ok(config::gather(&file)?)
}

/// Refuses what no daemon would take. How many rules there is room for, the daemon knows.
fn sources(file: &Path) -> anyhow::Result<Vec<Source>> {
    let sources = gather(file)?;
    match config::read(&sources, &Options::of_rules(MOST_RULES, DatapathChoice::default())) {
        Ok(_) => Ok(sources),
        Err(mistakes) => bail!(first_mistake(file, &mistakes)),
    }
}

fn load(remote: &Remote, file: &Path, confirm_within_s: Option<u32>) -> anyhow::Result<()> {
    let sources = sources(file)?;
    let mut client = remote.connect()?;
    let mut shown = None;
    if !remote.json() {
        let dry = ConfigLoad { sources: sources.clone(), dry_run: true, confirm_within_s };
        let planned: ConfigOutcome = client.call_within(&Request::ConfigLoad(dry), PATIENCE)?;
        let text = plan(&planned);
        print(&text)?;
        shown = Some(text);
    }
    let load = Request::ConfigLoad(ConfigLoad { sources, dry_run: false, confirm_within_s });
    let outcome: ConfigOutcome = client.call_within(&load, PATIENCE)?;
    if let Some(shown) = shown {
        if shown != plan(&outcome) {
            print(&format!("the rules have changed meanwhile; what was done:\n{}", plan(&outcome)))?;
        }
        remote.warn(&outcome.warnings);
    }
    remote.show(&outcome, |outcome, _| done(outcome))
}

fn save(remote: &Remote, file: &Path, force: bool) -> anyhow::Result<()> {
    match fs::metadata(file) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Ok(metadata) if !metadata.is_file() => {
            bail!("{} is no regular file: choose another name", file.display())
        }
        _ => {
            let text = fs::read(file).with_context(|| format!("{} cannot be read", file.display()))?;
            if !text.starts_with(HEAD.as_bytes()) && !force {
                bail!(
                    "{} is there and mcr did not write it: choose another name, or say --force",
                    file.display()
                );
            }
        }
    }
    let shown: ConfigText = remote.call(&Request::ConfigShow)?;
    crate::sys::whole_file::write(file, shown.toml.as_bytes())
        .with_context(|| format!("{} cannot be written", file.display()))?;
    let saved = ConfigSaved { schema: SCHEMA, file: file.display().to_string(), saved: Vec::new() };
    remote.show(&saved, |saved, _| format!("saved all that runs in {}\n", saved.file))
}

fn saved(saved: &ConfigSaved, _: u16) -> String {
    match saved.saved.len() {
        0 => "nothing to save: no rule was added by command\n".to_owned(),
        rules => format!("saved {rules} rule{} in {}\n", text::plural(rules), saved.file),
    }
}

/// One line for each difference, `+`, `-`, `~` or `=` first.
fn plan(outcome: &ConfigOutcome) -> String {
    let rule = |sign: char, rule: &RuleSpec| {
        let name = rule.name.as_deref().unwrap_or_default();
        format!("{sign} {name}: {} -> {}\n", rule.input, rule.outputs.join(", "))
    };
    let changed = |changed: &RuleDifference| format!("~ {}: {}\n", changed.name, changed.difference);
    let adopted = |name: &String| format!("= {name}: added by command, now from the file\n");
    let mut lines: Vec<_> = outcome.removed.iter().map(|removed| rule('-', removed)).collect();
    lines.extend(outcome.added.iter().map(|added| rule('+', added)));
    lines.extend(outcome.changed.iter().map(changed));
    lines.extend(outcome.adopted.iter().map(adopted));
    lines.extend(outcome.settings.iter().map(setting));
    let unchanged = text::count(outcome.unchanged.into());
    lines.push(format!("{unchanged} rule{} unchanged\n", text::plural(outcome.unchanged as usize)));
    text::harmless(&lines.concat())
}

fn setting(setting: &SettingDifference) -> String {
    let value = |value: &Option<String>| value.clone().unwrap_or_else(|| "the default".to_owned());
    let when = if setting.needs_restart { ", from the next start on" } else { "" };
    format!(
        "~ [daemon] {}: {} instead of {}{when}\n",
        setting.key,
        value(&setting.file),
        value(&setting.running)
    )
}

fn done(outcome: &ConfigOutcome) -> String {
    match (outcome.outcome, outcome.confirm_within_s) {
        (LoadOutcome::Planned, _) => "planned\n".to_owned(),
        (LoadOutcome::Applied, Some(seconds)) => {
            format!("applied, and taken back in {seconds} s unless you say: mcr config confirm\n")
        }
        (LoadOutcome::Applied, None) => "applied\n".to_owned(),
        (LoadOutcome::Unchanged, _) => "unchanged\n".to_owned(),
        (LoadOutcome::Confirmed, _) => "confirmed\n".to_owned(),
        (LoadOutcome::RolledBack, _) => "rolled back\n".to_owned(),
    }
}
