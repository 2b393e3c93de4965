//! The operator's calls: what each asks of the state, and what is answered.

use std::slice;

use serde::Serialize;
use serde_json::Value;

use crate::{
    api::{
        server::Call,
        wire::{
            self, Error, LogLevel, LogLevelInfo, Outcome, Pong, Request, RuleChange, RuleOutcome,
            RuleRemoval, RuleSpec, SCHEMA, Stop, Stopping,
        },
    },
    rule::{DatapathChoice, Input, Origin, Output, OutputSlot, Rule, RuleName},
    ruleset::{Amendment, Change, Entry, Refusal},
    supervisor::{audit::Asked, run::Daemon, settings, state::Problem},
};

pub type Answer = Result<Value, Error>;

impl From<Refusal> for Error {
    fn from(refusal: Refusal) -> Self {
        let unknown = matches!(refusal, Refusal::UnknownRule { .. });
        let code = if unknown { wire::code::UNKNOWN_RULE } else { wire::code::REFUSED };
        Error { code, message: refusal.to_string() }
    }
}

pub fn refused(error: impl std::fmt::Display) -> Error {
    Error::refused(error.to_string())
}

pub fn json(answer: &impl Serialize) -> Answer {
    serde_json::to_value(answer).map_err(|error| Error {
        code: wire::code::INTERNAL,
        message: format!("the answer cannot be written: {error}"),
    })
}

impl Daemon {
    /// Does what a call asks and replies.
    pub async fn answer(&mut self, call: Call) {
        let asked = Asked::of(&call.request);
        let level = self.settings.log_level;
        let stops = match &call.request {
            Request::Stop(Stop { keep }) => Some(*keep),
            _ => None,
        };
        let answer = match call.request {
            Request::EventsSubscribe => self.subscribe(call.subscriber),
            request => self.perform(request).await,
        };
        if let Some(asked) = asked {
            // What makes the log say less is still said.
            let now = self.settings.log_level;
            if level > now {
                self.log.set_level(level);
            }
            asked.log(call.peer, &answer);
            if level > now {
                self.log.set_level(now);
            }
        }
        let done = answer.is_ok();
        // A client that has gone misses its answer, nothing else.
        let _ = call.reply.send(answer);
        if let Some(keep) = stops.filter(|_| done) {
            self.keeps = keep;
            self.stop.notify_one();
        }
    }

    async fn perform(&mut self, request: Request) -> Answer {
        if matches!(request, Request::Stats(_) | Request::Status) {
            self.read_packet_statistics();
            self.books.follow_redirected(&self.state, &self.programs);
        }
        match request {
            Request::Ping => json(&Pong {
                schema: SCHEMA,
                version: env!("CARGO_PKG_VERSION").to_owned(),
                pid: std::process::id(),
            }),
            Request::Status => json(&self.status()),
            Request::Stop(stop) => self.stopping(&stop),
            Request::RuleAdd(spec) => self.add_rule(&spec).await,
            Request::RuleSet(change) => self.set_rule(&change).await,
            Request::RuleRemove(removal) => self.remove_rule(&removal).await,
            Request::RuleList => json(&self.rule_list()),
            Request::RuleShow(rule) => json(&self.rule_show(&rule.name)?),
            Request::Stats(query) => json(&self.stats(query.rule.as_deref())?),
            Request::Workers => json(&self.worker_list()),
            Request::ConfigShow => self.show_config(),
            Request::ConfigLoad(load) => self.load_config(load).await,
            Request::ConfigConfirm => self.confirm(),
            Request::ConfigRollback => self.roll_back().await,
            Request::ConfigSave => self.save_all(),
            // It comes with its subscriber.
            Request::EventsSubscribe => self.subscribe(None),
            Request::LogLevelGet => json(&self.log_level()),
            Request::LogLevelSet(level) => self.set_log_level(&level).await,
        }
    }

    /// Answers before the daemon ends.
    fn stopping(&mut self, Stop { keep }: &Stop) -> Answer {
        let mut kept = Vec::new();
        if *keep {
            self.tend_memberships().map_err(|why| {
                Error::refused(format!(
                    "what is relayed would not be joined any more: {why}; stop it without --keep"
                ))
            })?;
            kept.extend(self.state.redirected().map(|entry| entry.rule.name.to_string()));
        }
        json(&Stopping { schema: SCHEMA, pid: std::process::id(), kept })
    }

    async fn add_rule(&mut self, spec: &RuleSpec) -> Answer {
        self.check_confirmed()?;
        let rule = self.read_rule(spec)?;
        let name = rule.name.clone();
        if spec.save {
            self.check_saving(Some(name.as_str()))?;
        }
        let change = self.state.add(rule, Origin::Cli).map_err(|refusal| self.refusal(refusal))?;
        let outcome = if change == Change::Made { Outcome::Added } else { Outcome::Unchanged };
        if change == Change::Made {
            let entry = self.state.rules().get(name.as_str())?.clone();
            self.books.open(&entry, true, &entry.output_slots, &self.programs);
        }
        self.settle().await;
        let problem = self.state.rule_problem(self.state.rules().get(name.as_str())?);
        let failed = match problem {
            Some((Problem::Failed, why)) if change == Change::Made => Err(Error::refused(why)),
            // What cannot be permanent as it was to be is not there at all.
            _ if spec.save => self.save(slice::from_ref(&name)).map(drop),
            _ => Ok(()),
        };
        if let Err(why) = failed {
            if change == Change::Made {
                self.state.remove(name.as_str())?;
                self.settle().await;
                self.remember();
            }
            return Err(why);
        }
        let mut warnings = Vec::from_iter(self.remember());
        let entry = self.state.rules().get(name.as_str())?;
        warnings.extend(self.warnings(entry));
        outcome_of(outcome, self.rule_info(entry), warnings)
    }

    /// A refusal, with the place of a file's rule that stands in the way.
    pub fn refusal(&self, refusal: Refusal) -> Error {
        let rules = self.state.rules();
        match refusal.other().and_then(|name| rules.get(name.as_str()).ok()) {
            Some(Entry { rule, origin: Origin::File(_), .. }) => {
                Error::refused(format!("{refusal} ({})", rules.whence(&rule.name)))
            }
            _ => refusal.into(),
        }
    }

    /// Makes a change outlive the daemon: the journal keeps it, or the file where it is to be permanent. Answers what
    /// keeps the journal from it.
    fn keep_change(&mut self, name: &RuleName, save: bool) -> Result<Vec<String>, Error> {
        let saved = save.then(|| self.save(slice::from_ref(name))).transpose();
        let warnings = self.remember();
        saved.map_err(|why| Error::refused(format!("rule '{name}' was changed, but not saved: {why}")))?;
        Ok(Vec::from_iter(warnings))
    }

    /// The rule that a specification means; one without a name has that of its twin, or a derived one.
    pub fn read_rule(&self, spec: &RuleSpec) -> Result<Rule, Error> {
        let input: Input = spec.input.parse().map_err(refused)?;
        let outputs = parse_outputs(&spec.outputs)?;
        let name = match (&spec.name, self.state.rules().by_input(&input)) {
            (Some(name), _) => name.parse().map_err(refused)?,
            (None, Some(twin)) if twin.rule.outputs == outputs => twin.rule.name.clone(),
            (None, _) => RuleName::derived(&input),
        };
        let datapath = match &spec.datapath {
            Some(asked) => asked.parse().map_err(refused)?,
            None => self.settings.datapath,
        };
        Ok(Rule { name, input, outputs, datapath, merge: spec.merge, link_local: spec.link_local })
    }

    async fn set_rule(&mut self, change: &RuleChange) -> Answer {
        let amendment = Amendment {
            add: parse_outputs(&change.add_out)?,
            delete: parse_outputs(&change.del_out)?,
            datapath: change.datapath.as_deref().map(|asked| asked.parse().map_err(refused)).transpose()?,
            merge: change.merge,
            link_local: change.link_local,
        };
        self.check_confirmed()?;
        let before = self.state.rules().get(&change.name)?.rule.clone();
        if change.save {
            self.check_saving(Some(&change.name))?;
        }
        // What is refused is refused before anything has changed.
        let mut rules = self.state.rules().clone();
        rules.amend(&change.name, amendment.clone()).map_err(|refusal| self.refusal(refusal))?;
        let amended = &rules.get(&change.name)?.rule;
        if let Some((_, why)) = self.redirect_refusal([amended].into_iter().filter(|rule| **rule != before)) {
            return Err(Error::refused(why));
        }
        if let Some(datapath) = amendment.datapath {
            self.change_datapath(&change.name, datapath).await?;
        }
        let known = self.state.rules().get(&change.name)?.output_slots.clone();
        self.state.amend(&change.name, amendment)?;
        let entry = self.state.rules().get(&change.name)?.clone();
        let new: Vec<OutputSlot> =
            entry.output_slots.iter().copied().filter(|slot| !known.contains(slot)).collect();
        self.books.open(&entry, false, &new, &self.programs);
        self.settle().await;
        let outcome = if entry.rule == before { Outcome::Unchanged } else { Outcome::Changed };
        let mut warnings = self.keep_change(&entry.rule.name, change.save)?;
        if !change.save {
            warnings.extend(Self::reload_warning(&entry, "it is as written there again"));
        }
        warnings.extend(self.warnings(&entry));
        let entry = self.state.rules().get(&change.name)?;
        outcome_of(outcome, self.rule_info(entry), warnings)
    }

    /// Moves a rule to another datapath, or leaves it where it is if it cannot be served there.
    async fn change_datapath(&mut self, name: &str, datapath: DatapathChoice) -> Result<(), Error> {
        let to = |datapath| Amendment { datapath: Some(datapath), ..Amendment::default() };
        let former = self.state.rules().get(name)?.rule.datapath;
        self.state.amend(name, to(datapath))?;
        self.settle().await;
        let entry = self.state.rules().get(name)?;
        if let Some((Problem::Failed, why)) = self.state.rule_problem(entry) {
            self.state.amend(name, to(former))?;
            self.settle().await;
            return Err(Error::refused(why));
        }
        Ok(())
    }

    /// Answered when not one more datagram of the rule leaves.
    async fn remove_rule(&mut self, removal: &RuleRemoval) -> Answer {
        self.check_confirmed()?;
        if removal.save {
            self.check_saving(Some(&removal.name))?;
        }
        if let Some(parked) = self.take_parked(&removal.name) {
            let warnings = Vec::from_iter(self.remember());
            return outcome_of(Outcome::Removed, parked, warnings);
        }
        if let Some(saved) = self.take_saved(removal)? {
            return outcome_of(Outcome::Removed, saved, Vec::new());
        }
        let entry = self.state.remove(&removal.name)?;
        self.settle().await;
        let mut warnings = self.keep_change(&entry.rule.name, removal.save)?;
        if !removal.save {
            warnings.extend(Self::reload_warning(&entry, "it comes back"));
        }
        outcome_of(Outcome::Removed, self.rule_info(&entry), warnings)
    }

    /// What the operator should know of a rule that stands.
    fn warnings(&self, entry: &Entry) -> Vec<String> {
        let rule = &entry.rule;
        let mut warnings = Vec::new();
        if let Some((_, why)) = self.state.rule_problem(entry) {
            warnings.push(format!("rule '{}' waits: {why}", rule.name));
        }
        let datapath = self.state.datapath_of(rule);
        for output in &rule.outputs {
            if let Some(why) = self.state.output_pending(output, datapath) {
                warnings.push(format!("the output {output} waits: {why}"));
            }
        }
        warnings.extend(self.mtu_warnings(rule));
        for other in self.state.rules().overlapping(&rule.input) {
            let (specific, any) = if rule.input.source.is_some() { (entry, other) } else { (other, entry) };
            warnings.push(format!(
                "rule '{}' takes the datagrams of its source out of rule '{}'",
                specific.rule.name, any.rule.name
            ));
        }
        warnings
    }

    fn mtu_warnings<'a>(&'a self, rule: &'a Rule) -> impl Iterator<Item = String> + 'a {
        let links = self.state.links();
        let ingress = links.get(&rule.input.interface).map_or(0, |link| link.mtu);
        rule.outputs.iter().filter_map(move |output| {
            let egress = links.get(&output.interface)?.mtu;
            let (from, to) = (&rule.input.interface, &output.interface);
            (egress < ingress).then(|| {
                format!(
                    "the MTU of {to} ({egress}) is below that of {from} ({ingress}): \
                     payloads over {} bytes are dropped as too_big",
                    egress.saturating_sub(28)
                )
            })
        })
    }

    fn log_level(&self) -> LogLevelInfo {
        LogLevelInfo { schema: SCHEMA, level: self.settings.log_level.as_str().to_owned() }
    }

    /// Logs so much from now on, the workers too.
    pub async fn change_log_level(&mut self, level: settings::LogLevel) {
        self.settings.log_level = level;
        self.log.set_level(level);
        for worker in self.workers.values_mut() {
            // A worker that cannot be told is about to be restarted, with the new level.
            let _ = worker.set_log_level(level.as_str()).await;
        }
    }

    async fn set_log_level(&mut self, asked: &LogLevel) -> Answer {
        let level: settings::LogLevel = clap::ValueEnum::from_str(&asked.level, false).map_err(|_| {
            Error::refused(format!(
                "'{}' is no log level: use error, warn, info, debug or trace",
                asked.level
            ))
        })?;
        self.change_log_level(level).await;
        json(&self.log_level())
    }
}

fn outcome_of(outcome: Outcome, rule: wire::RuleInfo, warnings: Vec<String>) -> Answer {
    json(&RuleOutcome { schema: SCHEMA, outcome, rule, warnings })
}

fn parse_outputs(texts: &[String]) -> Result<Vec<Output>, Error> {
    texts.iter().map(|text| text.parse().map_err(refused)).collect()
}
