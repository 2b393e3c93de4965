//! Configuration files and a daemon that runs: loading them as a whole or not at all, taking a load back, and
//! making rules permanent in mcr's own fragment.

use std::{
    path::{Path, PathBuf},
    slice,
    time::Duration,
};

use nix::unistd::{AccessFlags, access, geteuid};
use tokio::time::Instant;
use tracing::{error, info, warn};

use super::{Launch, commands::Answer, journal::Memory, run::Daemon, settings::Settings, state::Problem};
use crate::{
    api::event::Occurrence,
    api::wire::{
        ConfigLoad, ConfigOutcome, ConfigSaved, ConfigText, Error, LoadOutcome, RuleDifference, RuleInfo,
        RuleRemoval, RuleSpec, SCHEMA, SettingDifference,
    },
    config::{self, Config, Mistake, Source, options::Options},
    rule::{Origin, Rule, RuleName},
    ruleset::{Entry, Plan, RuleSet},
    supervisor::{
        answers::unserved,
        commands::{json, refused},
        run::one_line,
    },
    sys::whole_file,
};

/// A load that is taken back unless it is confirmed.
pub struct Unconfirmed {
    pub until: Instant,
    /// What ran before.
    rules: RuleSet,
    settings: Settings,
    /// The daemon's own files as they were loaded, if it was these.
    own: Option<Vec<Source>>,
}

/// What configuration the daemon has, and what it is about to do with it.
#[derive(Default)]
pub struct Configuration {
    pub launch: Launch,
    pub unconfirmed: Option<Unconfirmed>,
    /// Why the last reload came to nothing, if it did.
    pub refused: Option<String>,
    /// The daemon's own files as they were loaded and confirmed last.
    confirmed: Vec<Source>,
    /// What stands in those files now was never confirmed.
    pub stray: bool,
    /// What became of loads since subscribers were told last.
    pub news: Vec<Occurrence>,
    /// Rules that were added by command and cannot stand any more, with the reason.
    pub parked: Vec<(RuleSpec, String)>,
}

impl Configuration {
    pub fn new(launch: Launch) -> Self {
        Self { confirmed: launch.sources.clone(), launch, ..Self::default() }
    }

    /// What was loaded is confirmed: the daemon's own files, if it was these.
    fn confirm(&mut self, own: Option<Vec<Source>>) {
        if let Some(own) = own {
            self.confirmed = own;
            self.stray = false;
        }
    }
}

/// A rule as it is said to the daemon.
pub fn spec(rule: &Rule) -> RuleSpec {
    RuleSpec {
        name: Some(rule.name.to_string()),
        input: rule.input.to_string(),
        outputs: rule.outputs.iter().map(ToString::to_string).collect(),
        datapath: Some(rule.datapath.to_string()),
        merge: rule.merge,
        link_local: rule.link_local,
        save: false,
    }
}

/// The first mistake of a file and its fragments, and how to see the others if there are more.
pub fn first_mistake(file: &Path, mistakes: &[Mistake]) -> String {
    match mistakes {
        [] => String::new(),
        [only] => only.to_string(),
        [first, more @ ..] => {
            format!("{first}; and {} more: see `mcr config check {}`", more.len(), file.display())
        }
    }
}

/// Refuses what no file was read for, and names of files that are no line of text.
fn check_sources(sources: &[Source]) -> Result<(), Error> {
    if sources.is_empty() {
        return Err(Error::refused(
            "sources is empty, which would remove every rule of a file: to mean that, load a file without rules",
        ));
    }
    match sources.iter().position(|source| source.file.contains(char::is_control)) {
        Some(at) => Err(Error::refused(format!(
            "sources[{at}].file has a control character in it: give the file another name"
        ))),
        None => Ok(()),
    }
}

impl Daemon {
    /// Takes in the rules that the daemon is started with. What cannot be served waits or has failed, and says so.
    ///
    /// `confirmed` is what to start from if nobody confirmed what the files hold now.
    pub fn load_first(&mut self, config: Config, confirmed: Option<Vec<Source>>) -> anyhow::Result<()> {
        let mut rules = config.rules;
        let file = self.configuration.launch.file.clone();
        if let (Some(confirmed), Some(file)) = (confirmed, file)
            && confirmed != self.configuration.launch.sources
            && let Ok(config) = config::read(&confirmed, &self.runs())
        {
            warn!(
                "{} holds a load that nobody confirmed: started from what was confirmed last",
                file.display()
            );
            rules = config.rules;
            self.configuration.confirmed = confirmed;
            self.configuration.stray = true;
        }
        self.adopt(self.state.rules().reload(rules)?.rules);
        Ok(())
    }

    /// The options that bear on what rules may stand.
    fn runs(&self) -> Options {
        Options::of_rules(self.settings.max_rules, self.settings.datapath)
    }

    /// Puts other rules in the place of those that there are, and opens the books of what is new in them.
    fn adopt(&mut self, rules: RuleSet) {
        let before = self.state.rules().clone();
        self.state.replace_rules(rules);
        for entry in self.state.rules().iter() {
            let known = before.get(entry.rule.name.as_str()).ok().filter(|known| known.slot == entry.slot);
            let known_outputs = known.map_or(&[][..], |known| &known.output_slots);
            let new: Vec<_> =
                entry.output_slots.iter().copied().filter(|slot| !known_outputs.contains(slot)).collect();
            if known.is_none() || !new.is_empty() {
                self.books.open(entry, known.is_none(), &new, &self.programs);
            }
        }
    }

    pub fn show_config(&self) -> Answer {
        let mut settings = self.settings.clone();
        settings.source_port = Some(self.source_port);
        json(&ConfigText { schema: SCHEMA, toml: config::document(&settings, self.state.rules().iter()) })
    }

    pub async fn load_config(&mut self, load: ConfigLoad) -> Answer {
        check_sources(&load.sources)?;
        if load.dry_run {
            return json(&self.load(&load.sources, true, None).await?);
        }
        self.service.reloading();
        let outcome = self.load(&load.sources, false, load.confirm_within_s).await;
        self.service.ready(self.status_line());
        json(&outcome?)
    }

    /// Reads the daemon's own files again, as on SIGHUP.
    pub async fn reload(&mut self) {
        let Some(file) = self.configuration.launch.file.clone() else {
            warn!("asked to reload, but the daemon was started without --config: nothing to do");
            return;
        };
        self.service.reloading();
        let sources = config::gather(&file).map_err(|error| refused(one_line(&error)));
        let outcome = match sources {
            Ok(sources) => self.load(&sources, false, None).await,
            Err(error) => Err(error),
        };
        self.configuration.refused = None;
        if let Err(why) = outcome {
            error!("the configuration was not reloaded, all goes on as it was: {why}");
            self.configuration.news.push(Occurrence::ConfigurationRefused { reason: why.to_string() });
            self.configuration.refused = Some(why.to_string());
        }
        self.service.ready(self.status_line());
    }

    /// Loads files as a whole or not at all.
    async fn load(
        &mut self,
        sources: &[Source],
        dry_run: bool,
        confirm_within_s: Option<u32>,
    ) -> Result<ConfigOutcome, Error> {
        let main = Path::new(sources.first().map_or("", |source| &source.file));
        let said = self.configuration.launch.options.clone();
        let config = config::read(sources, &said.clone().with_max_rules(self.settings.max_rules))
            .map_err(|mistakes| Error::refused(first_mistake(main, &mistakes)))?;
        let settings = Settings::from(said.or(config.options));
        let reload = self.state.rules().reload(config.rules).map_err(refused)?;
        let mut outcome = self.planned(&reload.plan, &reload.rules, &settings);
        if dry_run {
            return Ok(outcome);
        }
        self.check_confirmed()?;
        let wanted = reload.plan.names().filter_map(|name| reload.rules.get(name.as_str()).ok());
        if let Some((name, why)) = self.redirect_refusal(wanted.map(|entry| &entry.rule)) {
            return Err(Error::refused(format!("{}: {why}; nothing was changed", reload.rules.whence(name))));
        }
        let before = (self.state.rules().clone(), self.settings.clone());
        self.adopt(reload.overlap);
        self.settle().await;
        if let Some(why) = self.failed_of(&reload.plan) {
            self.adopt(before.0);
            self.settle().await;
            return Err(Error::refused(format!("{why}; nothing was changed")));
        }
        self.adopt(reload.rules);
        self.settle().await;
        self.apply_settings(&settings).await;
        let nothing = reload.plan.is_empty() && outcome.settings.iter().all(|setting| setting.needs_restart);
        outcome.outcome = if nothing { LoadOutcome::Unchanged } else { LoadOutcome::Applied };
        let own = sources.first().is_some_and(|source| self.is_own_file(Path::new(&source.file)));
        let own = own.then(|| sources.to_vec());
        if let Some(seconds) = confirm_within_s.filter(|_| !nothing) {
            let until = Instant::now() + Duration::from_secs(seconds.into());
            let (rules, settings) = before;
            self.configuration.stray |= own.is_some();
            self.configuration.unconfirmed = Some(Unconfirmed { until, rules, settings, own });
            outcome.confirm_within_s = Some(seconds);
        } else {
            self.configuration.confirm(own);
        }
        self.configuration.refused = None;
        self.configuration.news.push(Occurrence::ConfigurationLoaded {
            added: outcome.added.len() as u32,
            removed: outcome.removed.len() as u32,
            changed: outcome.changed.len() as u32,
            unchanged: outcome.unchanged,
            confirm_within_s: outcome.confirm_within_s,
        });
        say(&reload.plan);
        self.park().await;
        outcome.warnings.extend(self.remember());
        let waiting = self.waiting_of(&reload.plan);
        if waiting > 0 {
            outcome.warnings.push(format!("{waiting} of these rules wait for something: see `mcr status`"));
        }
        Ok(outcome)
    }

    /// What a load would do.
    fn planned(&self, plan: &Plan, rules: &RuleSet, settings: &Settings) -> ConfigOutcome {
        let specs = |names: &[RuleName], set: &RuleSet| {
            let entry = |name: &RuleName| set.get(name.as_str()).ok();
            names.iter().filter_map(entry).map(|entry| spec(&entry.rule)).collect()
        };
        let changed = plan.changed.iter().map(|(name, difference)| RuleDifference {
            name: name.to_string(),
            difference: difference.clone(),
        });
        let running = self.settings.named().into_iter().zip(settings.named());
        let differing = running.filter(|((_, running), (_, file))| running != file);
        ConfigOutcome {
            schema: SCHEMA,
            outcome: LoadOutcome::Planned,
            added: specs(&plan.added, rules),
            removed: specs(&plan.removed, self.state.rules()),
            changed: changed.collect(),
            adopted: plan.adopted.iter().map(ToString::to_string).collect(),
            unchanged: plan.unchanged as u32,
            settings: differing
                .map(|((key, running), (_, file))| SettingDifference {
                    key: key.to_owned(),
                    running,
                    file,
                    needs_restart: !matches!(key, "datapath" | "log_level"),
                })
                .collect(),
            confirm_within_s: None,
            warnings: Vec::from_iter(self.other_source(rules)),
        }
    }

    /// Says that what is loaded is not what the next start reads.
    fn other_source(&self, rules: &RuleSet) -> Option<String> {
        let mut places = rules.iter().filter_map(|entry| match &entry.origin {
            Origin::File(place) => Some(Path::new(&*place.file)),
            Origin::Cli => None,
        });
        let Some(file) = self.configuration.launch.file.as_deref() else {
            let why = "the daemon was started without --config: the next start knows nothing of these rules";
            return places.next().map(|_| why.to_owned());
        };
        let directory = config::own_fragment(file).parent().map(Path::to_owned).unwrap_or_default();
        let own = |place: &Path| place.starts_with(&directory) || self.is_own_file(place);
        let foreign = places.find(|place| !own(place))?;
        Some(format!(
            "these rules are of {}, and the next start or SIGHUP reads {}",
            foreign.display(),
            file.display()
        ))
    }

    /// Takes over what can be changed while the daemon runs.
    async fn apply_settings(&mut self, settings: &Settings) {
        self.settings.datapath = settings.datapath;
        if self.settings.log_level != settings.log_level {
            self.change_log_level(settings.log_level).await;
        }
    }

    fn is_own_file(&self, file: &Path) -> bool {
        let real = |path: &Path| std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        self.configuration.launch.file.as_deref().is_some_and(|own| real(own) == real(file))
    }

    /// Tries once more what could not stand.
    async fn park(&mut self) {
        let parked = std::mem::take(&mut self.configuration.parked);
        let specs: Vec<_> = parked.into_iter().map(|(spec, _)| spec).collect();
        if self.recall(specs) > 0 {
            self.settle().await;
        }
    }

    /// Why a rule that a plan adds or changes cannot be served, if one cannot.
    fn failed_of(&self, plan: &Plan) -> Option<String> {
        self.problems_of(plan)
            .find(|(_, problem, _)| *problem == Problem::Failed)
            .map(|(entry, _, why)| format!("{}: {why}", self.state.rules().whence(&entry.rule.name)))
    }

    fn waiting_of(&self, plan: &Plan) -> usize {
        self.problems_of(plan).count()
    }

    fn problems_of<'a>(&'a self, plan: &'a Plan) -> impl Iterator<Item = (&'a Entry, Problem, String)> {
        let entries = plan.names().filter_map(|name| self.state.rules().get(name.as_str()).ok());
        entries.filter_map(|entry| self.state.rule_problem(entry).map(|(problem, why)| (entry, problem, why)))
    }

    /// While a load waits to be confirmed nothing else is changed: what it is taken back to is what ran.
    pub fn check_confirmed(&self) -> Result<(), Error> {
        let Some(unconfirmed) = &self.configuration.unconfirmed else { return Ok(()) };
        let left = unconfirmed.until.saturating_duration_since(Instant::now()).as_secs();
        Err(Error::refused(format!(
            "a load waits {left} s more to be confirmed: say `mcr config confirm` or `mcr config rollback` first"
        )))
    }

    pub fn confirm(&mut self) -> Answer {
        let Some(load) = self.configuration.unconfirmed.take() else {
            return Err(Error::refused("no load waits to be confirmed: it has been, or its time is over"));
        };
        info!("the load is confirmed");
        self.configuration.news.push(Occurrence::ConfigurationConfirmed);
        self.configuration.confirm(load.own);
        self.configuration.refused = None;
        let warnings = Vec::from_iter(self.remember());
        self.ended(LoadOutcome::Confirmed, warnings)
    }

    pub async fn roll_back(&mut self) -> Answer {
        let Some(unconfirmed) = self.configuration.unconfirmed.take() else {
            return Err(Error::refused("no load waits to be confirmed: there is nothing to take back"));
        };
        self.adopt(unconfirmed.rules);
        self.settle().await;
        self.apply_settings(&unconfirmed.settings).await;
        self.configuration.refused = None;
        warn!("the load is taken back: what ran before runs again");
        self.configuration.news.push(Occurrence::ConfigurationRolledBack);
        let warnings = self.remember().into_iter().chain(self.stray());
        self.ended(LoadOutcome::RolledBack, warnings.collect())
    }

    /// What to say while the daemon's own files hold what was never confirmed.
    pub fn stray(&self) -> Option<String> {
        let file = self.configuration.launch.file.as_deref().filter(|_| self.configuration.stray)?;
        let what = "holds a load that nobody confirmed: SIGHUP would apply it, a start would not";
        Some(format!("{} {what}", file.display()))
    }

    fn ended(&self, outcome: LoadOutcome, warnings: Vec<String>) -> Answer {
        let rules = self.state.rules();
        json(&ConfigOutcome { outcome, warnings, ..self.planned(&Plan::default(), rules, &self.settings) })
    }

    /// Writes the rules that were added by command into the journal; answers what keeps it from that.
    ///
    /// A load that waits to be confirmed is not written down: a daemon that dies then has what ran before.
    pub fn remember(&mut self) -> Option<String> {
        let unconfirmed = self.configuration.unconfirmed.as_ref();
        let rules = unconfirmed.map_or(self.state.rules(), |unconfirmed| &unconfirmed.rules);
        let by_command =
            rules.iter().filter(|entry| entry.origin == Origin::Cli).map(|entry| spec(&entry.rule));
        let parked = self.configuration.parked.iter().map(|(spec, _)| spec.clone());
        let mut offsets = self.books.offsets(self.state.redirected(), &self.programs);
        // Who is killed while a program is replaced leaves the former maps or the new ones.
        offsets.extend(self.formers.values().flat_map(|former| former.offsets.iter().cloned()));
        let memory = Memory {
            source_port: self.settings.source_port.is_none().then_some(self.source_port),
            rules: by_command.chain(parked).collect(),
            confirmed: self.configuration.stray.then(|| self.configuration.confirmed.clone()),
            pins: Some(self.pins.clone()),
            offsets,
        };
        self.journal_is_old = false;
        let failure = self.journal.keep(&memory).err().map(|error| {
            let path = self.journal.path().display();
            format!("rules that are added by command would not survive the daemon: {path} cannot be written: {error}")
        });
        if let Some(failure) = failure.as_ref().filter(|_| failure != self.journal_failure) {
            warn!("{failure}");
        }
        self.journal_failure.clone_from(&failure);
        failure
    }

    /// Takes in rules that a daemon before was given by command, and answers how many. What cannot stand is kept.
    pub fn recall(&mut self, rules: Vec<RuleSpec>) -> usize {
        let mut taken = 0;
        for spec in rules {
            let added = self.read_rule(&spec).and_then(|rule| {
                let name = rule.name.clone();
                self.state.add(rule, Origin::Cli).map_err(|refusal| self.refusal(refusal))?;
                Ok(self.state.rules().get(name.as_str())?.clone())
            });
            match added {
                Ok(entry) => {
                    self.books.open(&entry, true, &entry.output_slots, &self.programs);
                    taken += 1;
                }
                Err(why) => {
                    let name = spec.name.as_deref().unwrap_or_default();
                    warn!("rule '{name}', which was added by command, cannot stand now: {why}");
                    self.configuration.parked.push((spec, why.to_string()));
                }
            }
        }
        if taken > 0 {
            info!(rules = taken, "rules that were added by command are taken over");
        }
        taken
    }

    /// The file that rules are saved in.
    fn fragment(&self) -> Result<PathBuf, Error> {
        let none =
            "the daemon runs without --config and has no place for that: name a file, `mcr config save FILE`";
        let file = self.configuration.launch.file.as_deref();
        Ok(config::own_fragment(file.ok_or_else(|| Error::refused(none))?))
    }

    /// Whether a rule stands in a file that is not mcr's to write.
    fn check_ours(&self, name: &str) -> Result<(), Error> {
        let fragment = self.fragment()?;
        match self.state.rules().get(name).map(|entry| &entry.origin) {
            Ok(Origin::File(place)) if Path::new(&*place.file) != fragment => Err(Error::refused(format!(
                "rule '{name}' stands at {place}, which mcr does not write: change it there, then `mcr config load` it"
            ))),
            _ => Ok(()),
        }
    }

    /// Refuses what could not be saved, before anything is changed.
    pub fn check_saving(&self, name: Option<&str>) -> Result<(), Error> {
        let fragment = self.fragment()?;
        if let Some(name) = name {
            self.check_ours(name)?;
        }
        self.saved_rules(&fragment)?;
        let directory = fragment.parent().unwrap_or(Path::new("/"));
        let there = directory.ancestors().find(|path| path.exists()).unwrap_or(directory);
        access(there, AccessFlags::W_OK | AccessFlags::X_OK).map_err(|errno| {
            let (directory, user) = (directory.display(), geteuid());
            Error::refused(format!(
                "{directory} cannot be written by user {user} ({errno}): give it to them (chown)"
            ))
        })
    }

    /// Writes a change of rules into mcr's own fragment: those that stand as they are, others out of it.
    pub fn save(&mut self, names: &[RuleName]) -> Result<PathBuf, Error> {
        let fragment = self.fragment()?;
        let mut saved = self.saved_rules(&fragment)?;
        for name in names {
            saved.retain(|rule| rule.name != *name);
            if let Ok(entry) = self.state.rules().get(name.as_str()) {
                saved.push(entry.rule.clone());
            }
        }
        saved.sort_by(|one, other| one.name.cmp(&other.name));
        let text = config::fragment(saved.iter(), self.settings.datapath);
        let failed = |error: std::io::Error| {
            Error::refused(format!("{} cannot be written: {error}", fragment.display()))
        };
        if let Some(directory) = fragment.parent() {
            std::fs::create_dir_all(directory).map_err(failed)?;
        }
        whole_file::write(&fragment, text.as_bytes()).map_err(failed)?;
        let source = Source { file: fragment.display().to_string(), text };
        // What was read and written here is read again for its lines alone.
        let places =
            config::read_fragment(&source, &self.runs()).map(|config| config.rules).unwrap_or_default();
        for (rule, place) in places {
            let runs = self.state.rules().get(rule.name.as_str()).is_ok_and(|entry| entry.rule == rule);
            if runs {
                self.state.set_origin(&rule.name, Origin::File(place));
            }
        }
        info!(file = %fragment.display(), rules = saved.len(), "saved");
        Ok(fragment)
    }

    /// The rules that mcr's own fragment holds.
    fn saved_rules(&self, fragment: &Path) -> Result<Vec<Rule>, Error> {
        let source = config::fragment_there(fragment).map_err(|error| refused(one_line(&error)))?;
        let Some(source) = source else { return Ok(Vec::new()) };
        let config = config::read_fragment(&source, &self.runs());
        let main = self.configuration.launch.file.as_deref().unwrap_or(fragment);
        let config = config.map_err(|mistakes| Error::refused(first_mistake(main, &mistakes)))?;
        Ok(config.rules.into_iter().map(|(rule, _)| rule).collect())
    }

    pub fn save_all(&mut self) -> Answer {
        self.check_confirmed()?;
        self.check_saving(None)?;
        let by_command = self.state.rules().iter().filter(|entry| entry.origin == Origin::Cli);
        let names: Vec<_> = by_command.map(|entry| entry.rule.name.clone()).collect();
        let file = if names.is_empty() { self.fragment()? } else { self.save(&names)? };
        let file = file.display().to_string();
        self.remember();
        json(&ConfigSaved { schema: SCHEMA, file, saved: names.iter().map(ToString::to_string).collect() })
    }

    /// Forgets a rule that cannot stand and is kept nevertheless, also one that cannot even be read.
    pub fn take_parked(&mut self, name: &str) -> Option<RuleInfo> {
        let at = self.configuration.parked.iter().position(|(spec, _)| spec.name.as_deref() == Some(name))?;
        let (spec, why) = self.configuration.parked.remove(at);
        Some(unserved(spec, why))
    }

    /// Takes a rule that does not run out of what was saved, if it stands there.
    pub fn take_saved(&mut self, removal: &RuleRemoval) -> Result<Option<RuleInfo>, Error> {
        if !removal.save || self.state.rules().get(&removal.name).is_ok() {
            return Ok(None);
        }
        let saved = self.saved_rules(&self.fragment()?)?;
        let Some(rule) = saved.into_iter().find(|rule| rule.name.as_str() == removal.name) else {
            return Ok(None);
        };
        self.save(slice::from_ref(&rule.name))?;
        Ok(Some(unserved(spec(&rule), "it was saved and did not run".to_owned())))
    }

    /// What an operator who changes a rule from a file should know.
    pub fn reload_warning(entry: &Entry, what: &str) -> Option<String> {
        let Origin::File(place) = &entry.origin else { return None };
        Some(format!("rule '{}' stands at {place}: {what} at the next reload or start", entry.rule.name))
    }
}

fn say(plan: &Plan) {
    for name in &plan.added {
        info!(rule = %name, "rule added by configuration");
    }
    for (name, difference) in &plan.changed {
        info!(rule = %name, difference, "rule changed by configuration");
    }
    for name in &plan.removed {
        info!(rule = %name, "rule removed by configuration");
    }
    info!(
        added = plan.added.len(),
        changed = plan.changed.len(),
        removed = plan.removed.len(),
        adopted = plan.adopted.len(),
        unchanged = plan.unchanged,
        "configuration loaded"
    );
}

/// When a load that waits to be confirmed is taken back.
pub async fn overdue(unconfirmed: Option<Instant>) {
    match unconfirmed {
        Some(until) => tokio::time::sleep_until(until).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(file: &str) -> Source {
        Source { file: file.to_owned(), text: "a\nb\nc\n".to_owned() }
    }

    #[test]
    fn sources_are_files_with_names() {
        for (files, refused) in [
            (&["/etc/mcr/mcr.toml", "x é"][..], None),
            (&[], Some("sources is empty")),
            (&["a", "x\n\u{1b}[31m"], Some("sources[1].file has a control character")),
            (&["\u{9b}31m"], Some("sources[0].file has a control character")),
        ] {
            let sources: Vec<_> = files.iter().map(|file| source(file)).collect();
            match (check_sources(&sources), refused) {
                (Ok(()), None) => {}
                (Err(error), Some(words)) if error.message.starts_with(words) => {}
                (checked, _) => panic!("{files:?}: {checked:?}"),
            }
        }
    }

    #[test]
    fn more_mistakes_are_shown_by_a_command_that_can_be_typed() {
        let source = source("/etc/mcr/rules.d/a.toml");
        let mistakes = [Mistake::new(&source, 0..1, "x"), Mistake::new(&source, 2..3, "y")];
        let main = Path::new("/etc/mcr/mcr.toml");
        assert_eq!(first_mistake(main, &mistakes[..1]), "/etc/mcr/rules.d/a.toml:1:1: x");
        assert_eq!(
            first_mistake(main, &mistakes),
            "/etc/mcr/rules.d/a.toml:1:1: x; and 1 more: see `mcr config check /etc/mcr/mcr.toml`"
        );
    }
}
