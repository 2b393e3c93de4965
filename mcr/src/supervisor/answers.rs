//! What the daemon tells of itself: state and books in the shapes of the control protocol.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use crate::{
    api::wire::{
        self, Alarm, DeviceStats, Error, Health, INTERFACE_DISCARDS, InterfaceStats, OutputInfo, OutputStats,
        QueueStats, RULE_DROPS, RuleCounts, RuleInfo, RuleList, RuleShow, RuleSpec, RuleStats, SCHEMA, Stats,
        Status, WorkerInfo, WorkerList, timestamp,
    },
    datapath,
    ebpf::Steering,
    metrics::Survey,
    net::losses::Level,
    rule::{Datapath, DatapathChoice, InterfaceName, Origin, Output, OutputSlot, Rule},
    ruleset::Entry,
    supervisor::{books::QueueTotals, devices::Losses, event::WorkerId, run::Daemon, state::Problem},
    worker::ledger::DropReason,
};

/// The counters above zero, by name.
fn nonzero<'a>(counters: impl IntoIterator<Item = (&'a str, u64)>) -> BTreeMap<String, u64> {
    counters
        .into_iter()
        .filter(|(_, count)| *count > 0)
        .map(|(name, count)| (name.to_owned(), count))
        .collect()
}

impl Daemon {
    pub fn rule_list(&self) -> RuleList {
        RuleList {
            schema: SCHEMA,
            rules: self.state.rules().iter().map(|entry| self.rule_info(entry)).collect(),
        }
    }

    pub fn rule_show(&self, name: &str) -> Result<RuleShow, Error> {
        Ok(RuleShow { schema: SCHEMA, rule: self.rule_info(self.state.rules().get(name)?) })
    }

    pub fn rule_info(&self, entry: &Entry) -> RuleInfo {
        let rule = &entry.rule;
        let wanted = self.state.datapath_of(rule);
        let outputs = rule.outputs.iter().map(|output| self.output_info(output, wanted)).collect();
        let (health, reason) = self.rule_health(entry);
        let datapath = self.served_by(rule);
        let why = |served| self.rule_why(rule, served);
        RuleInfo {
            name: rule.name.to_string(),
            origin: entry.origin.to_string(),
            place: match &entry.origin {
                Origin::File(place) => Some(place.to_string()),
                Origin::Cli => None,
            },
            input: rule.input.to_string(),
            outputs,
            datapath: datapath.map(|served| served.to_string()),
            datapath_asked: rule.datapath.to_string(),
            datapath_why: datapath.map(why).unwrap_or_default(),
            merge: rule.merge,
            link_local: rule.link_local,
            health,
            reason,
        }
    }

    /// How a rule is, and what is wrong with it or else with the first of its outputs that waits.
    pub fn rule_health(&self, entry: &Entry) -> (Health, Option<String>) {
        let datapath = self.state.datapath_of(&entry.rule);
        let pending = |output| self.state.output_pending(output, datapath);
        match self.state.rule_problem(entry) {
            Some((Problem::Failed, why)) => (Health::Failed, Some(why)),
            Some((Problem::Waits, why)) => (Health::Pending, Some(why)),
            None => match entry.rule.outputs.iter().find_map(pending) {
                Some(why) => (Health::Pending, Some(why)),
                None => (Health::Active, None),
            },
        }
    }

    /// Why a datapath serves a rule.
    pub fn rule_why(&self, rule: &Rule, served: Datapath) -> String {
        self.explain(&rule.input.interface, served, rule.datapath, Some(rule))
    }

    /// Whether a rule had datagrams and has none any more.
    pub fn is_idle(&self, entry: &Entry) -> bool {
        let last_seen_ns = self.books.last_seen_ns(entry.slot);
        let last_seen = UNIX_EPOCH + Duration::from_nanos(last_seen_ns);
        // A clock that was set back makes nobody idle.
        let idle = SystemTime::now().duration_since(last_seen).unwrap_or_default();
        last_seen_ns > 0 && idle.as_secs() >= self.settings.stalled_after_s.into()
    }

    /// Why a datapath is in use on an interface, and what the host still sees.
    fn explain(
        &self,
        interface: &InterfaceName,
        datapath: Datapath,
        asked: DatapathChoice,
        rule: Option<&Rule>,
    ) -> String {
        let generic = self.programs.get(interface).is_some_and(Steering::is_generic);
        let no_faster = match datapath {
            Datapath::AfXdp | Datapath::Redirect => {
                rule.and_then(|rule| self.state.auto_redirect_objection(rule))
            }
            Datapath::AfPacket => self.state.no_xdp(interface),
        };
        datapath::explain(datapath, asked, generic, no_faster.as_deref())
    }

    /// The datapath that serves a rule, if one does.
    pub fn served_by(&self, rule: &Rule) -> Option<Datapath> {
        let datapath = self.state.datapath_of(rule);
        self.state.serves(&rule.input.interface, datapath).then_some(datapath)
    }

    fn output_info(&self, output: &Output, datapath: Datapath) -> OutputInfo {
        let reason = self.state.output_pending(output, datapath);
        let health = if reason.is_none() { Health::Active } else { Health::Pending };
        OutputInfo { to: output.to_string(), health, reason }
    }

    pub fn stats(&self, rule: Option<&str>) -> Result<Stats, Error> {
        match rule {
            Some(name) => Ok(self.stats_of(vec![self.rule_stats(self.state.rules().get(name)?)])),
            None => Ok(self.all_stats()),
        }
    }

    fn all_stats(&self) -> Stats {
        self.stats_of(self.state.rules().iter().map(|entry| self.rule_stats(entry)).collect())
    }

    fn stats_of(&self, rules: Vec<RuleStats>) -> Stats {
        Stats {
            schema: SCHEMA,
            time: timestamp(SystemTime::now()),
            since: timestamp(self.since),
            rules,
            interfaces: self.interface_list(),
            workers: self.worker_list().workers,
            devices: self.device_list(|lost| lost > 0),
            alarms: self.alarms.values().cloned().collect(),
        }
    }

    fn device_list(&self, shows: impl Fn(u64) -> bool) -> Vec<DeviceStats> {
        let stats = |(name, lost): (&InterfaceName, &Losses)| {
            let mut stats = DeviceStats { name: name.to_string(), ..DeviceStats::default() };
            for ((level, counter), count) in lost.iter().filter(|(_, count)| shows(**count)) {
                let named = match level {
                    Level::Link => &mut stats.link,
                    Level::Qdisc => &mut stats.qdisc,
                    Level::Driver => &mut stats.driver,
                };
                named.insert(counter.clone(), *count);
            }
            stats
        };
        self.devices.iter().map(stats).collect()
    }

    /// What egress interfaces did not send of what they were given.
    fn devices_that_lost(&self) -> BTreeMap<String, u64> {
        let lost = self.devices.iter().map(|(name, lost)| {
            let sent = lost
                .iter()
                .filter(|((level, counter), _)| matches!(level, Level::Link) && counter.starts_with("tx_"));
            (name.to_string(), sent.map(|(_, count)| *count).sum())
        });
        lost.filter(|(_, lost)| *lost > 0).collect()
    }

    /// Interfaces that are or were served, by datapath.
    fn interface_list(&self) -> Vec<InterfaceStats> {
        let both = [Datapath::AfXdp, Datapath::AfPacket];
        let serving = self.programs.keys().flat_map(|name| both.map(|datapath| (name.clone(), datapath)));
        let serving = serving.filter(|(name, datapath)| self.state.serves(name, *datapath));
        let all: BTreeSet<_> = serving.chain(self.books.interfaces()).collect();
        all.iter().map(|(name, datapath)| self.interface_stats(name, *datapath)).collect()
    }

    fn rule_stats(&self, entry: &Entry) -> RuleStats {
        let totals = self.books.rule(entry, &self.programs);
        let last_seen = UNIX_EPOCH + Duration::from_nanos(totals.last_seen_ns);
        // A clock that was set back makes nobody idle.
        let idle = || SystemTime::now().duration_since(last_seen).unwrap_or_default().as_secs();
        let idle_seconds = (totals.last_seen_ns > 0).then(idle);
        let rule = &entry.rule;
        RuleStats {
            name: rule.name.to_string(),
            origin: entry.origin.to_string(),
            datapath: self.served_by(rule).map(|datapath| datapath.to_string()),
            input: rule.input.to_string(),
            since: timestamp(self.books.rule_since(entry.slot).unwrap_or(self.since)),
            matched: totals.matched,
            received: totals.received,
            received_bytes: totals.received_bytes,
            received_pps: self.books.rule_rates.get(&entry.slot),
            last_seen: idle_seconds.map(|_| timestamp(last_seen)),
            idle_seconds,
            stalled: idle_seconds.is_some_and(|idle| idle >= self.settings.stalled_after_s.into()),
            dropped: nonzero(RULE_DROPS.into_iter().zip([
                totals.no_worker,
                totals.looped,
                totals.cut,
                totals.not_redirected,
            ])),
            outputs: entry.outputs().map(|(output, slot)| self.output_stats(output, slot)).collect(),
        }
    }

    fn output_stats(&self, output: &Output, slot: OutputSlot) -> OutputStats {
        let totals = self.books.output(slot);
        let reasons = DropReason::ALL.iter().map(|reason| reason.name());
        OutputStats {
            to: output.to_string(),
            received: totals.received,
            sent: totals.sent,
            sent_bytes: totals.sent_bytes,
            sent_pps: self.books.output_rates.get(&slot),
            retried: totals.retried,
            approximate: totals.approximate,
            dropped: nonzero(reasons.zip(totals.dropped).chain([(DropReason::SKIPPED, totals.skipped)])),
        }
    }

    fn interface_stats(&self, interface: &InterfaceName, datapath: Datapath) -> InterfaceStats {
        let totals = self.books.interface(interface, datapath, &self.programs);
        InterfaceStats {
            name: interface.to_string(),
            datapath: datapath.to_string(),
            verdicts: totals.verdicts.iter().map(|(name, count)| ((*name).to_owned(), *count)).collect(),
            received: totals.received,
            dropped: nonzero(totals.drops()),
            // In datagrams those that were cut are the rules' drops.
            discarded: nonzero(INTERFACE_DISCARDS.into_iter().zip([
                totals.no_rule,
                totals.refused,
                totals.cut,
                totals.held,
            ])),
            queues: self.queue_list(interface, datapath),
        }
    }

    fn queue_list(&self, interface: &InterfaceName, datapath: Datapath) -> Vec<QueueStats> {
        let queues = self.books.queues(interface, datapath, &self.programs).into_iter();
        let stats = |QueueTotals { queue, worker, steered, totals }| QueueStats {
            queue,
            worker: worker.to_string(),
            steered,
            received: totals.received,
            dropped: nonzero(totals.drops()),
        };
        queues.map(stats).collect()
    }

    pub fn worker_list(&self) -> WorkerList {
        WorkerList {
            schema: SCHEMA,
            workers: self.state.worker_ids().iter().map(|id| self.worker_info(id)).collect(),
        }
    }

    fn worker_info(&self, id: &WorkerId) -> WorkerInfo {
        let running = self.state.workers().get(id).filter(|running| !running.failed);
        let spec = running.and_then(|running| running.spec.clone());
        let mishaps = self.state.mishaps(id);
        WorkerInfo {
            id: id.to_string(),
            interface: id.interface.to_string(),
            datapath: id.datapath.to_string(),
            why: self.explain(&id.interface, id.datapath, self.asked_of(id), None),
            queues: spec.as_ref().map(|spec| spec.source.queues().to_vec()).unwrap_or_default(),
            cpu: spec.and_then(|spec| spec.cpu),
            pid: running.and_then(|_| self.workers.get(id)).map(|worker| worker.pid),
            state: if running.is_some() { "running" } else { "restarting" }.to_owned(),
            restarts: mishaps.restarts,
            last_exit: mishaps.last_exit,
            received: self.books.worker_received(id),
            system_calls: self.books.worker_enters(id),
            received_pps: self.books.worker_rates.get(id),
        }
    }

    /// Whether somebody asked for a worker's datapath by name, or `auto` chose it.
    fn asked_of(&self, id: &WorkerId) -> DatapathChoice {
        let rules = self.state.rules().iter().map(|entry| &entry.rule);
        let mut its = rules.filter(|rule| {
            rule.input.interface == id.interface && self.state.datapath_of(rule) == id.datapath
        });
        let named = |rule: &Rule| rule.datapath.0.is_some();
        // One whose rules have all moved on was not asked for any more.
        let by_name = its.next().is_some_and(named) && its.all(named);
        DatapathChoice(by_name.then_some(id.datapath))
    }

    pub fn status(&self) -> Status {
        let rules = self.rule_list().rules;
        let stats: Vec<_> = self.state.rules().iter().map(|entry| self.rule_stats(entry)).collect();
        let count = |health| rules.iter().filter(|rule| rule.health == health).count() as u32;
        let rule_counts = RuleCounts {
            total: rules.len() as u32,
            active: count(Health::Active),
            pending: count(Health::Pending),
            failed: count(Health::Failed),
            stalled: stalled(&rules, &stats).count() as u32,
            unseen: stats.iter().filter(|rule| rule.last_seen.is_none()).count() as u32,
        };
        let workers = self.worker_list().workers;
        let alarms: Vec<_> = self.alarms.values().cloned().collect();
        let mut problems = self.configuration_problems();
        problems.extend(self::problems(&alarms, &rules, &workers, &stats));
        let slots = || self.state.rules().iter().flat_map(|entry| entry.output_slots.iter());
        Status {
            schema: SCHEMA,
            time: timestamp(SystemTime::now()),
            since: timestamp(self.since),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            health: health(&rules, &alarms),
            rules: rule_counts,
            workers_running: workers.iter().filter(|worker| worker.pid.is_some()).count() as u32,
            workers_total: workers.len() as u32,
            worker_restarts: workers.iter().map(|worker| worker.restarts).sum(),
            received_pps: self.state.rules().iter().map(|entry| self.books.rule_rates.get(&entry.slot)).sum(),
            sent_pps: slots().map(|slot| self.books.output_rates.get(slot)).sum(),
            sent_bps: slots().map(|slot| 8.0 * self.books.output_byte_rates.get(slot)).sum(),
            dropped: self.all_drops(stats),
            device_lost: self.devices_that_lost(),
            problems,
            alarms,
        }
    }

    /// How things are, in a line for the service manager.
    pub fn status_line(&self) -> String {
        let healths: Vec<_> = self.state.rules().iter().map(|entry| self.rule_info(entry).health).collect();
        let count = |health| healths.iter().filter(|&&other| other == health).count();
        let of = |health, what| Some(count(health)).filter(|&n| n > 0).map(|n| format!(", {n} {what}"));
        let [pending, failed] =
            [(Health::Pending, "pending"), (Health::Failed, "failed")].map(|(health, what)| of(health, what));
        let received: f64 =
            self.state.rules().iter().map(|entry| self.books.rule_rates.get(&entry.slot)).sum();
        let refused =
            self.configuration.refused.as_ref().map(|why| format!("; the last reload was refused: {why}"));
        format!(
            "{} of {} rules active{}{}; {}/s received{}",
            count(Health::Active),
            healths.len(),
            pending.unwrap_or_default(),
            failed.unwrap_or_default(),
            wire::count(received.round() as u64),
            refused.unwrap_or_default().replace('\n', " "),
        )
    }

    /// What metrics are made of.
    pub fn survey(&self) -> Survey {
        let mut stats = self.all_stats();
        stats.devices = self.device_list(|_| true);
        let rules = self.rule_list().rules;
        let mut problems = self.configuration_problems();
        problems.extend(self::problems(&stats.alarms, &rules, &stats.workers, &stats.rules));
        let inputs = self.state.rules().iter().map(|entry| (entry.rule.input.interface.to_string(), 0));
        let mut memberships: BTreeMap<_, u64> = inputs.collect();
        for membership in self.state.memberships() {
            let link = self.state.links().iter().find(|(_, link)| link.index == membership.interface);
            *memberships.entry(link.map(|(name, _)| name.to_string()).unwrap_or_default()).or_default() += 1;
        }
        Survey { health: health(&rules, &stats.alarms), problems, rules, stats, memberships }
    }

    /// What is wrong with what is to outlive the daemon, or waits for the operator.
    fn configuration_problems(&self) -> Vec<wire::Problem> {
        let problem = |what: String, next: &str| wire::Problem { what, next: next.to_owned() };
        let waiting = self.check_confirmed().err().map(|why| problem(why.to_string(), "mcr config confirm"));
        let refused = self.configuration.refused.as_ref().map(|why| {
            let file = self.configuration.launch.file.as_deref().unwrap_or(Path::new("FILE")).display();
            problem(format!("the last reload was refused: {why}"), &format!("mcr config check {file}"))
        });
        let forgetful = self.journal_failure.as_ref().map(|why| problem(why.clone(), "mcr config save FILE"));
        let stray = self.stray().map(|why| problem(why, "mcr config diff FILE"));
        let parked = self.configuration.parked.iter().map(|(spec, why)| {
            let name = spec.name.as_deref().unwrap_or_default();
            let what = format!("rule {name}, added by command, cannot stand: {why}");
            problem(what, &format!("mcr rule remove {name}"))
        });
        waiting.into_iter().chain(refused).chain(stray).chain(forgetful).chain(parked).collect()
    }

    fn all_drops(&self, rules: Vec<RuleStats>) -> BTreeMap<String, u64> {
        let mut all: BTreeMap<String, u64> = BTreeMap::new();
        let mut add = |drops: BTreeMap<String, u64>| {
            for (reason, count) in drops {
                *all.entry(reason).or_default() += count;
            }
        };
        for rule in rules {
            add(rule.dropped);
            rule.outputs.into_iter().for_each(|output| add(output.dropped));
        }
        self.interface_list().into_iter().for_each(|interface| add(interface.dropped));
        all
    }
}

/// A rule that is kept and does not run.
pub fn unserved(spec: RuleSpec, why: String) -> RuleInfo {
    let output = |to| OutputInfo { to, health: Health::Failed, reason: None };
    RuleInfo {
        name: spec.name.unwrap_or_default(),
        origin: Origin::Cli.to_string(),
        place: None,
        input: spec.input,
        outputs: spec.outputs.into_iter().map(output).collect(),
        datapath: None,
        datapath_asked: spec.datapath.unwrap_or_default(),
        datapath_why: String::new(),
        merge: spec.merge,
        link_local: spec.link_local,
        health: Health::Failed,
        reason: Some(why),
    }
}

/// Whether all is at work that should be.
fn health(rules: &[RuleInfo], alarms: &[Alarm]) -> Health {
    let of_alarms = alarms.first().map(|_| Health::Failed);
    rules.iter().map(|rule| rule.health).chain(of_alarms).max().unwrap_or(Health::Active)
}

/// What is wrong, worst first, each with a command that shows or mends it.
fn problems(
    alarms: &[Alarm],
    rules: &[RuleInfo],
    workers: &[WorkerInfo],
    stats: &[RuleStats],
) -> Vec<wire::Problem> {
    let of_alarms =
        alarms.iter().map(|alarm| wire::Problem { what: alarm.what.clone(), next: alarm.next.clone() });
    let mut sick: Vec<_> = rules.iter().filter(|rule| rule.health != Health::Active).collect();
    sick.sort_by_key(|rule| std::cmp::Reverse(rule.health));
    let of_rules = sick.into_iter().map(|rule| wire::Problem {
        what: format!("rule {}: {}", rule.name, rule.reason.as_deref().unwrap_or("not active")),
        next: format!("mcr rule show {}", rule.name),
    });
    let of_workers = workers.iter().filter(|worker| worker.pid.is_none()).map(|worker| {
        let why = worker.last_exit.as_deref().unwrap_or("it has not started yet");
        wire::Problem { what: format!("worker {} is down: {why}", worker.id), next: "mcr workers".to_owned() }
    });
    let of_stalled = stalled(rules, stats).map(|rule| {
        let idle = rule.idle_seconds.unwrap_or_default();
        let last = rule.last_seen.as_deref().unwrap_or_default();
        wire::Problem {
            what: format!("rule {}: no datagram for {idle} s (the last at {last})", rule.name),
            next: format!("mcr stats {}", rule.name),
        }
    });
    of_alarms.chain(of_rules).chain(of_workers).chain(of_stalled).collect()
}

/// Rules that should have datagrams and have none any more.
fn stalled<'a>(rules: &'a [RuleInfo], stats: &'a [RuleStats]) -> impl Iterator<Item = &'a RuleStats> {
    let both = rules.iter().zip(stats);
    both.filter(|(rule, stats)| rule.health == Health::Active && stats.stalled).map(|(_, stats)| stats)
}
