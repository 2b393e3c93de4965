//! What programs that listen are told: the differences between two looks at the daemon, in the events of the control
//! protocol. Pure: it knows neither of who listens nor of when.
//!
//! What comes and goes between two looks is not seen, but for workers that end, which leave a trace.

use std::collections::{BTreeMap, BTreeSet};

use crate::{
    api::{
        event::Occurrence,
        wire::{Alarm, Health},
    },
    net::links::Link,
    rule::{Datapath, InterfaceName, RuleName},
    ruleset::{Entry, difference},
    supervisor::{balance::Subject, event::WorkerId},
};

/// What there is at one moment.
#[derive(Clone, Debug, Default)]
pub struct Look {
    pub rules: BTreeMap<RuleName, SeenRule>,
    pub workers: BTreeMap<WorkerId, SeenWorker>,
    /// Those that rules name; none where there is none of the name.
    pub interfaces: BTreeMap<InterfaceName, Option<Link>>,
    pub alarms: BTreeMap<Subject, Alarm>,
}

#[derive(Clone, Debug)]
pub struct SeenRule {
    pub entry: Entry,
    pub health: Health,
    pub reason: Option<String>,
    /// The one in use, or the last that was.
    pub datapath: Option<Datapath>,
    /// It had datagrams, has none any more, and should have.
    pub stalled: bool,
    /// It has had none for as long.
    pub idle: bool,
}

#[derive(Clone, Debug, Default)]
pub struct SeenWorker {
    /// None while it is being restarted.
    pub pid: Option<u32>,
    pub restarts: u64,
    pub last_exit: Option<String>,
}

impl Look {
    /// Notes of what was before what is still true of it.
    pub fn follow(&mut self, before: &Self) {
        for (name, rule) in &mut self.rules {
            let Some(known) = before.rules.get(name).filter(|known| known.is_same(rule)) else { continue };
            rule.datapath = rule.datapath.or(known.datapath);
            rule.stalled |= rule.idle && known.stalled;
        }
    }

    /// What has happened since a look before; `why` explains the datapath of a rule.
    pub fn since(&self, before: &Self, why: impl Fn(&SeenRule) -> String) -> Vec<Occurrence> {
        let mut told = Vec::new();
        for (name, link) in &self.interfaces {
            // What no rule named before has not changed.
            if let Some(known) = before.interfaces.get(name) {
                interface(name, known.as_ref(), link.as_ref(), &mut told);
            }
        }
        let workers: BTreeSet<_> = before.workers.keys().chain(self.workers.keys()).collect();
        for id in workers {
            worker(id, before.workers.get(id), self.workers.get(id), &mut told);
        }
        let stands =
            |name: &RuleName, known: &SeenRule| self.rules.get(name).is_some_and(|rule| rule.is_same(known));
        let removed = before.rules.iter().filter(|(name, known)| !stands(name, known));
        told.extend(removed.map(|(name, _)| Occurrence::RuleRemoved { rule: name.to_string() }));
        for (name, rule) in &self.rules {
            let known = before.rules.get(name).filter(|known| known.is_same(rule));
            rule.since(known, &why, &mut told);
        }
        let raised = self.alarms.iter().filter(|(subject, _)| !before.alarms.contains_key(subject));
        told.extend(raised.map(|(_, Alarm { what, gap, since, next })| Occurrence::AlarmRaised {
            what: what.clone(),
            gap: *gap,
            since: since.clone(),
            next: next.clone(),
        }));
        let cleared = before.alarms.iter().filter(|(subject, _)| !self.alarms.contains_key(subject));
        told.extend(cleared.map(|(_, Alarm { what, since, .. })| Occurrence::AlarmCleared {
            what: what.clone(),
            since: since.clone(),
        }));
        told
    }
}

impl SeenRule {
    /// Whether it is this rule, not another of its name.
    fn is_same(&self, other: &Self) -> bool {
        self.entry.slot == other.entry.slot
    }

    fn since(&self, before: Option<&Self>, why: impl Fn(&Self) -> String, told: &mut Vec<Occurrence>) {
        let rule = self.entry.rule.name.to_string();
        let Some(before) = before else {
            told.push(Occurrence::RuleAdded {
                rule: rule.clone(),
                origin: self.entry.origin.to_string(),
                input: self.entry.rule.input.to_string(),
                outputs: self.entry.rule.outputs.iter().map(ToString::to_string).collect(),
            });
            return told.push(self.health(rule));
        };
        if let Some(difference) = self.difference(before) {
            told.push(Occurrence::RuleChanged { rule: rule.clone(), difference });
        }
        if let (Some(from), Some(to)) = (before.datapath, self.datapath)
            && from != to
        {
            let (from, to) = (from.to_string(), to.to_string());
            told.push(Occurrence::RuleMoved { rule: rule.clone(), from, to, why: why(self) });
        }
        if (self.health, &self.reason) != (before.health, &before.reason) {
            told.push(self.health(rule.clone()));
        }
        match (before.stalled, self.stalled) {
            (false, true) => told.push(Occurrence::RuleStalled { rule }),
            (true, false) => told.push(Occurrence::RuleResumed { rule }),
            _ => {}
        }
    }

    fn difference(&self, before: &Self) -> Option<String> {
        let (was, is) = (&before.entry.rule, &self.entry.rule);
        difference(is, was).or_else(|| difference(was, is)).or_else(|| {
            let [was, is] = [before, self].map(|rule| rule.entry.origin.to_string());
            (was != is).then(|| format!("its origin ({is} instead of {was})"))
        })
    }

    fn health(&self, rule: String) -> Occurrence {
        let reason = self.reason.clone().unwrap_or_default();
        match self.health {
            Health::Active => {
                Occurrence::RuleActive { rule, datapath: self.datapath.map(|served| served.to_string()) }
            }
            Health::Pending => Occurrence::RulePending { rule, reason },
            Health::Failed => Occurrence::RuleFailed { rule, reason },
        }
    }
}

fn worker(id: &WorkerId, before: Option<&SeenWorker>, now: Option<&SeenWorker>, told: &mut Vec<Occurrence>) {
    let worker = id.to_string();
    let pid_of = |seen: Option<&SeenWorker>| seen.and_then(|worker| worker.pid);
    let (was, is) = (pid_of(before), pid_of(now));
    let restarts = now.map_or(0, |now| now.restarts);
    let mishap = restarts > before.map_or(0, |before| before.restarts);
    let last_exit = || now.and_then(|now| now.last_exit.clone()).unwrap_or_default();
    if let Some(pid) = was.filter(|_| was != is) {
        let reason = if mishap { last_exit() } else { "no rule needs it any more".to_owned() };
        told.push(Occurrence::WorkerEnded { worker: worker.clone(), pid, reason });
    }
    if mishap {
        told.push(Occurrence::WorkerRestarting { worker: worker.clone(), reason: last_exit(), restarts });
    }
    if let Some(pid) = is.filter(|_| was != is) {
        told.push(Occurrence::WorkerStarted { worker, pid });
    }
}

fn interface(name: &InterfaceName, before: Option<&Link>, now: Option<&Link>, told: &mut Vec<Occurrence>) {
    let interface = name.to_string();
    let same = before.zip(now).filter(|(before, now)| before.index == now.index);
    let Some((before, now)) = same else {
        if before.is_some() {
            told.push(Occurrence::InterfaceGone { interface: interface.clone() });
        }
        if let Some(Link { up, mtu, addresses, .. }) = now {
            let (up, mtu, addresses) = (*up, *mtu, addresses.clone());
            told.push(Occurrence::InterfaceThere { interface, up, mtu, addresses });
        }
        return;
    };
    match (before.up, now.up) {
        (false, true) => told.push(Occurrence::InterfaceUp { interface: interface.clone() }),
        (true, false) => told.push(Occurrence::InterfaceDown { interface: interface.clone() }),
        _ => {}
    }
    if before.addresses != now.addresses {
        let addresses = now.addresses.clone();
        told.push(Occurrence::InterfaceAddresses { interface: interface.clone(), addresses });
    }
    if before.mtu != now.mtu {
        told.push(Occurrence::InterfaceMtu { interface, mtu: now.mtu });
    }
}

#[cfg(test)]
#[path = "notices_tests.rs"]
mod tests;
