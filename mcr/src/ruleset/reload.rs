//! Other file rules in the place of those that stand: what differs, and what comes of it. Rules that were added
//! by command stay as they are.

use std::collections::{BTreeMap, BTreeSet};

use thiserror::Error;

use super::{Entry, Refusal, RuleSet, check_alone, difference};
use crate::rule::{Origin, Place, Rule, RuleName};

/// What another set of file rules makes of all rules.
#[derive(Clone, Debug)]
pub struct Reload {
    /// All that shall stand, and of what shall go what can stand beside it.
    pub overlap: RuleSet,
    pub rules: RuleSet,
    pub plan: Plan,
}

/// What differs, by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    pub added: Vec<RuleName>,
    /// With what differs.
    pub changed: Vec<(RuleName, String)>,
    pub removed: Vec<RuleName>,
    /// Added by command, and now in a file too.
    pub adopted: Vec<RuleName>,
    pub unchanged: usize,
}

impl Plan {
    pub fn is_empty(&self) -> bool {
        self.added.is_empty() && self.changed.is_empty() && self.removed.is_empty() && self.adopted.is_empty()
    }

    /// Of the rules that are added or changed.
    pub fn names(&self) -> impl Iterator<Item = &RuleName> {
        self.added.iter().chain(self.changed.iter().map(|(name, _)| name))
    }
}

/// Why a file's rule cannot stand beside the others.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{place}: rule '{rule}' cannot stand: {why}")]
pub struct Conflict {
    place: Place,
    rule: RuleName,
    /// The refusal, with the place of the other rule.
    why: String,
}

impl RuleSet {
    /// Puts file rules in the place of those that there are. Rules that differ in anything but their input keep
    /// their slots, and so their counters.
    pub fn reload(&self, wanted: Vec<(Rule, Place)>) -> Result<Reload, Conflict> {
        let mut rules = self.clone();
        let mut plan = Plan::default();
        let names: BTreeSet<_> = wanted.iter().map(|(rule, _)| rule.name.clone()).collect();
        let from_file = |entry: &&Entry| matches!(entry.origin, Origin::File(_));
        let gone: Vec<_> =
            self.iter().filter(from_file).filter(|entry| !names.contains(&entry.rule.name)).collect();
        for entry in &gone {
            rules.take_out(&entry.rule.name);
            rules.give_back(entry);
            plan.removed.push(entry.rule.name.clone());
        }
        let mut former = BTreeMap::new();
        let mut new = Vec::new();
        for (rule, place) in wanted {
            let name = rule.name.clone();
            let Some(known) = self.entries.get(&name) else {
                plan.added.push(name);
                new.push((rule, place));
                continue;
            };
            let differs = difference(&rule, &known.rule).or_else(|| difference(&known.rule, &rule));
            match (differs, &known.origin) {
                (None, origin) => {
                    if *origin == Origin::Cli {
                        plan.adopted.push(name.clone());
                    } else {
                        plan.unchanged += 1;
                    }
                    rules.set_origin(&name, Origin::File(place));
                }
                (Some(difference), Origin::Cli) => {
                    let refusal = Refusal::NameTaken { name: name.clone(), difference };
                    return Err(self.conflict(place, name, &refusal));
                }
                (Some(difference), Origin::File(_)) => {
                    rules.take_out(&name);
                    former.insert(name.clone(), known);
                    plan.changed.push((name, difference));
                    new.push((rule, place));
                }
            }
        }
        for (rule, place) in new {
            let (name, known) = (rule.name.clone(), former.remove(&rule.name));
            let stands = rules.put(rule, Origin::File(place.clone()), known);
            stands.map_err(|refusal| rules.conflict(place, name, &refusal))?;
        }
        let mut overlap = rules.clone();
        for entry in gone {
            overlap.linger(entry);
        }
        Ok(Reload { overlap, rules, plan })
    }

    fn conflict(&self, place: Place, rule: RuleName, refusal: &Refusal) -> Conflict {
        let whence = refusal.other().map(|name| format!(" ({})", self.whence(name))).unwrap_or_default();
        Conflict { place, rule, why: format!("{refusal}{whence}") }
    }

    /// Puts a rule in; one that had its name and is out already leaves it its slots.
    fn put(&mut self, rule: Rule, origin: Origin, former: Option<&Entry>) -> Result<(), Refusal> {
        check_alone(&rule)?;
        if let Some(first) = self.by_input(&rule.input) {
            return Err(Refusal::InputTaken { input: rule.input.to_string(), name: first.rule.name.clone() });
        }
        self.check_outputs(&rule)?;
        match former {
            Some(former) if former.rule.input == rule.input => {
                self.replace(rule, Entry { origin, ..former.clone() })
            }
            former => {
                if let Some(former) = former {
                    self.give_back(former);
                }
                let entry = self.give_slots(rule, origin)?;
                self.put_in(entry);
                Ok(())
            }
        }
    }

    /// Keeps a rule that is to go, if it can stand beside the others and has its slots still.
    fn linger(&mut self, entry: &Entry) {
        let slots_rest = self.rule_slots.resting.contains(&entry.slot.0)
            && entry.output_slots.iter().all(|slot| self.output_slots.resting.contains(&slot.0));
        let fits = self.by_input(&entry.rule.input).is_none() && self.check_outputs(&entry.rule).is_ok();
        if slots_rest && fits {
            self.put_in(entry.clone());
        }
    }
}
