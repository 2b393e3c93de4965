//! The set of rules: what may stand beside what, and what it compiles to. Pure.

mod reload;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::Ipv4Addr,
};

use mcr_common::flow::{FlowKey4, FlowValue, action};
use thiserror::Error;

pub use reload::{Conflict, Plan, Reload};

use crate::rule::{
    DatapathChoice, Input, InterfaceName, MAX_OUTPUTS, Origin, Output, OutputSlot, Rule, RuleName, RuleSlot,
};

/// A rule with what the set gave it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub rule: Rule,
    pub origin: Origin,
    pub slot: RuleSlot,
    /// One an output, in the order of the rule's outputs.
    pub output_slots: Vec<OutputSlot>,
}

impl Entry {
    /// The outputs with their slots.
    pub fn outputs(&self) -> impl Iterator<Item = (&Output, OutputSlot)> {
        self.rule.outputs.iter().zip(self.output_slots.iter().copied())
    }
}

/// Why a rule or a change was refused. One line: what, why, what to do.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Refusal {
    #[error("a rule needs an output: give it --out ENDPOINT")]
    NoOutput,
    #[error(
        "a rule has {MAX_OUTPUTS} outputs at most, this one would have {outputs}: spread them over several rules"
    )]
    TooManyOutputs { outputs: usize },
    #[error("the output {output} stands twice: leave one out")]
    OutputTwice { output: String },
    #[error("the output {output} is the input itself: choose another group, port or interface")]
    OutputIsInput { output: String },
    #[error(
        "{group} is link-local (224.0.0.0/24), which routers never forward: say --link-local if it is meant"
    )]
    LinkLocal { group: Ipv4Addr },
    #[error(
        "{input} is the input of rule '{name}' already: `mcr rule set {name} --add-out ENDPOINT` gives it another output"
    )]
    InputTaken { input: String, name: RuleName },
    #[error(
        "rule '{name}' exists and differs in {difference}: change it with `mcr rule set`, or choose another name"
    )]
    NameTaken { name: RuleName, difference: String },
    #[error(
        "the output {output} is fed by rule '{name}' already: say --merge if both streams shall mix there"
    )]
    OutputTaken { output: String, name: RuleName },
    #[error("there is no rule '{name}': see `mcr rule list`")]
    UnknownRule { name: String },
    #[error("rule '{name}' has no output {output}: see `mcr rule show {name}`")]
    UnknownOutput { name: RuleName, output: String },
    #[error("rule '{name}' would be left without an output: remove it with `mcr rule remove {name}`")]
    LastOutput { name: RuleName },
    #[error(
        "there is room for {limit} {what} and not for these too: start the daemon with a larger --max-rules"
    )]
    Full { what: &'static str, limit: u32 },
}

impl Refusal {
    /// The rule that stands in the way, if one does.
    pub fn other(&self) -> Option<&RuleName> {
        match self {
            Self::InputTaken { name, .. } | Self::NameTaken { name, .. } | Self::OutputTaken { name, .. } => {
                Some(name)
            }
            _ => None,
        }
    }
}

/// What adding or changing did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    Made,
    /// It was so already.
    None,
}

/// A change of a rule's outputs or datapath.
#[derive(Clone, Debug, Default)]
pub struct Amendment {
    pub add: Vec<Output>,
    /// Matched by destination, port and interface.
    pub delete: Vec<Output>,
    pub datapath: Option<DatapathChoice>,
    pub merge: bool,
    pub link_local: bool,
}

/// Numbers up to a limit; the lowest free one is next.
///
/// What is given back rests until nothing in the kernel or in a worker bears it any more.
#[derive(Clone, Debug)]
struct Slots {
    limit: u32,
    /// From here on none was ever taken.
    unused: u32,
    free: BTreeSet<u32>,
    resting: BTreeSet<u32>,
}

impl Slots {
    fn new(limit: u32) -> Self {
        Self { limit, unused: 0, free: BTreeSet::new(), resting: BTreeSet::new() }
    }

    /// This many, or none if there are too few. Those that rest come last.
    fn take(&mut self, count: usize) -> Option<Vec<u32>> {
        let all =
            self.free.iter().copied().chain(self.unused..self.limit).chain(self.resting.iter().copied());
        let taken: Vec<_> = all.take(count).collect();
        if taken.len() < count {
            return None;
        }
        for slot in &taken {
            self.free.remove(slot);
            self.resting.remove(slot);
            self.unused = self.unused.max(slot + 1);
        }
        Some(taken)
    }

    fn give_back(&mut self, slot: u32) {
        self.resting.insert(slot);
    }

    /// Has a slot rest that was never taken here, if it is one.
    fn reserve(&mut self, slot: u32) -> bool {
        let unknown = slot < self.limit && (slot >= self.unused || self.free.contains(&slot));
        if unknown {
            self.free.extend(self.unused..slot);
            self.free.remove(&slot);
            self.unused = self.unused.max(slot + 1);
            self.resting.insert(slot);
        }
        unknown
    }

    /// Takes a slot that rests.
    fn claim(&mut self, slot: u32) -> bool {
        self.resting.remove(&slot)
    }

    fn release(&mut self) {
        self.free.append(&mut self.resting);
    }
}

/// What tells outputs apart, whatever rule they are of.
type OutputIdentity = (Ipv4Addr, u16, InterfaceName);

fn identity(output: &Output) -> OutputIdentity {
    (output.destination, output.port, output.interface.clone())
}

/// The slots that a rule had under a daemon that is gone.
#[derive(Clone, Debug)]
struct Inherited {
    slot: RuleSlot,
    outputs: Vec<(OutputIdentity, OutputSlot)>,
}

/// All rules of a daemon.
#[derive(Clone, Debug)]
pub struct RuleSet {
    entries: BTreeMap<RuleName, Entry>,
    /// Who has an input.
    inputs: HashMap<Input, RuleName>,
    /// Who feeds an output.
    fed: HashMap<OutputIdentity, BTreeSet<RuleName>>,
    rule_slots: Slots,
    output_slots: Slots,
    /// What rules that are added shall have, by ingress interface and flow, until slots are released.
    inherited: HashMap<(InterfaceName, FlowKey4), Inherited>,
}

/// Outputs of all rules together, for each rule that there may be.
pub const OUTPUTS_PER_RULE: u32 = 4;

impl RuleSet {
    pub fn new(max_rules: u32) -> Self {
        Self {
            entries: BTreeMap::new(),
            inputs: HashMap::new(),
            fed: HashMap::new(),
            rule_slots: Slots::new(max_rules),
            output_slots: Slots::new(max_rules * OUTPUTS_PER_RULE),
            inherited: HashMap::new(),
        }
    }

    pub fn get(&self, name: &str) -> Result<&Entry, Refusal> {
        let unknown = || Refusal::UnknownRule { name: name.to_owned() };
        self.entries.get(&name.parse::<RuleName>().map_err(|_| unknown())?).ok_or_else(unknown)
    }

    /// Where a rule comes from, in words.
    pub fn whence(&self, name: &RuleName) -> String {
        match self.entries.get(name).map(|entry| &entry.origin) {
            Some(Origin::File(place)) => format!("rule '{name}' stands at {place}"),
            _ => format!("rule '{name}' was added by command"),
        }
    }

    /// The slots of what was removed may be taken again: nothing bears them any more.
    pub fn release_slots(&mut self) {
        self.inherited.clear();
        self.rule_slots.release();
        self.output_slots.release();
    }

    /// Keeps slots for the rule that has this flow, if it comes before slots are released: what the kernel still has for
    /// it, and has counted, is by them. False if they are not to be had.
    pub fn inherit(
        &mut self,
        interface: InterfaceName,
        flow: FlowKey4,
        slot: RuleSlot,
        outputs: Vec<((Ipv4Addr, u16, InterfaceName), OutputSlot)>,
    ) -> bool {
        let free = self.rule_slots.reserve(slot.0)
            && outputs.iter().all(|(_, slot)| self.output_slots.reserve(slot.0));
        if free {
            self.inherited.insert((interface, flow), Inherited { slot, outputs });
        }
        free
    }

    /// Says where a rule comes from now.
    pub fn set_origin(&mut self, name: &RuleName, origin: Origin) {
        if let Some(entry) = self.entries.get_mut(name) {
            entry.origin = origin;
        }
    }

    pub fn iter(&self) -> impl Iterator<Item = &Entry> {
        self.entries.values()
    }

    /// The interfaces that rules name, ingress and egress.
    pub fn interfaces(&self) -> BTreeSet<&InterfaceName> {
        let rules = self.iter().map(|entry| &entry.rule);
        rules
            .flat_map(|rule| {
                rule.outputs.iter().map(|output| &output.interface).chain([&rule.input.interface])
            })
            .collect()
    }

    /// The rule that has an input.
    pub fn by_input(&self, input: &Input) -> Option<&Entry> {
        self.entries.get(self.inputs.get(input)?)
    }

    /// Takes an entry in, in the place of what has its name.
    fn put_in(&mut self, entry: Entry) {
        self.take_out(&entry.rule.name);
        self.inputs.insert(entry.rule.input.clone(), entry.rule.name.clone());
        for output in &entry.rule.outputs {
            self.fed.entry(identity(output)).or_default().insert(entry.rule.name.clone());
        }
        self.entries.insert(entry.rule.name.clone(), entry);
    }

    /// Takes an entry out; its slots are still taken.
    fn take_out(&mut self, name: &RuleName) -> Option<Entry> {
        let entry = self.entries.remove(name)?;
        self.inputs.remove(&entry.rule.input);
        for output in &entry.rule.outputs {
            let identity = identity(output);
            if let Some(names) = self.fed.get_mut(&identity) {
                names.remove(name);
                if names.is_empty() {
                    self.fed.remove(&identity);
                }
            }
        }
        Some(entry)
    }

    /// Adds a rule; the very same rule again is no change.
    pub fn add(&mut self, rule: Rule, origin: Origin) -> Result<Change, Refusal> {
        check_alone(&rule)?;
        if let Some(known) = self.entries.get(&rule.name) {
            return match difference(&known.rule, &rule) {
                None => Ok(Change::None),
                Some(difference) => Err(Refusal::NameTaken { name: rule.name, difference }),
            };
        }
        if let Some(first) = self.by_input(&rule.input) {
            return Err(Refusal::InputTaken { input: rule.input.to_string(), name: first.rule.name.clone() });
        }
        self.check_outputs(&rule)?;
        let entry = self.give_slots(rule, origin)?;
        self.put_in(entry);
        Ok(Change::Made)
    }

    /// Changes a rule's outputs or datapath. Outputs that stay keep their slots, and so their counters.
    pub fn amend(&mut self, name: &str, amendment: Amendment) -> Result<Change, Refusal> {
        let entry = self.get(name)?;
        let mut rule = entry.rule.clone();
        for output in &amendment.delete {
            let known = rule.outputs.iter().position(|known| known.identity() == output.identity());
            let unknown = || Refusal::UnknownOutput { name: rule.name.clone(), output: output.to_string() };
            rule.outputs.remove(known.ok_or_else(unknown)?);
        }
        for output in amendment.add {
            match rule.outputs.iter_mut().find(|known| known.identity() == output.identity()) {
                Some(known) => *known = output,
                None => rule.outputs.push(output),
            }
        }
        rule.datapath = amendment.datapath.unwrap_or(rule.datapath);
        rule.merge |= amendment.merge;
        rule.link_local |= amendment.link_local;
        if rule.outputs.is_empty() {
            return Err(Refusal::LastOutput { name: rule.name });
        }
        if rule == entry.rule {
            return Ok(Change::None);
        }
        let old = entry.clone();
        check_alone(&rule)?;
        self.check_outputs(&rule)?;
        self.replace(rule, old)?;
        Ok(Change::Made)
    }

    /// Takes a rule out.
    pub fn remove(&mut self, name: &str) -> Result<Entry, Refusal> {
        let name = self.get(name)?.rule.name.clone();
        let entry = self.take_out(&name).ok_or(Refusal::UnknownRule { name: name.to_string() })?;
        self.give_back(&entry);
        Ok(entry)
    }

    fn give_back(&mut self, entry: &Entry) {
        self.rule_slots.give_back(entry.slot.0);
        for slot in &entry.output_slots {
            self.output_slots.give_back(slot.0);
        }
    }

    fn give_slots(&mut self, rule: Rule, origin: Origin) -> Result<Entry, Refusal> {
        let full = Refusal::Full { what: "rules", limit: self.rule_slots.limit };
        let flow = (rule.input.interface.clone(), key(&rule.input));
        let inherited = self.inherited.remove(&flow).filter(|had| self.rule_slots.claim(had.slot.0));
        let (slot, had) = match inherited {
            Some(Inherited { slot, outputs }) => (slot, outputs),
            None => (RuleSlot(self.rule_slots.take(1).ok_or(full)?[0]), Vec::new()),
        };
        match self.give_output_slots(&rule, &had) {
            Ok(output_slots) => Ok(Entry { rule, origin, slot, output_slots }),
            Err(full) => {
                self.rule_slots.give_back(slot.0);
                Err(full)
            }
        }
    }

    /// The slots that outputs had, and new ones for the others.
    fn give_output_slots(
        &mut self,
        rule: &Rule,
        had: &[(OutputIdentity, OutputSlot)],
    ) -> Result<Vec<OutputSlot>, Refusal> {
        let mut slots: Vec<_> = rule
            .outputs
            .iter()
            .map(|output| had.iter().find(|(known, _)| *known == identity(output)).map(|(_, slot)| *slot))
            .map(|slot| slot.filter(|slot| self.output_slots.claim(slot.0)))
            .collect();
        let new = slots.iter().filter(|slot| slot.is_none()).count();
        match self.take_output_slots(new) {
            Ok(fresh) => {
                let mut fresh = fresh.into_iter();
                Ok(slots.into_iter().filter_map(|slot| slot.or_else(|| fresh.next())).collect())
            }
            Err(full) => {
                slots.drain(..).flatten().for_each(|slot| self.output_slots.give_back(slot.0));
                Err(full)
            }
        }
    }

    fn take_output_slots(&mut self, count: usize) -> Result<Vec<OutputSlot>, Refusal> {
        let full = Refusal::Full { what: "outputs", limit: self.output_slots.limit };
        Ok(self.output_slots.take(count).ok_or(full)?.into_iter().map(OutputSlot).collect())
    }

    /// Puts a changed rule in the place of the one with its name, which had the same input.
    fn replace(&mut self, rule: Rule, old: Entry) -> Result<(), Refusal> {
        let known = |output: &Output| {
            old.outputs().find(|(known, _)| known.identity() == output.identity()).map(|(_, slot)| slot)
        };
        let new = rule.outputs.iter().filter(|output| known(output).is_none()).count();
        let mut fresh = self.take_output_slots(new)?.into_iter();
        let output_slots: Vec<_> =
            rule.outputs.iter().filter_map(|output| known(output).or_else(|| fresh.next())).collect();
        for slot in old.output_slots.iter().filter(|slot| !output_slots.contains(slot)) {
            self.output_slots.give_back(slot.0);
        }
        self.put_in(Entry { rule, output_slots, ..old });
        Ok(())
    }

    /// No other rule may feed an output, unless one of the two says that it is meant.
    fn check_outputs(&self, rule: &Rule) -> Result<(), Refusal> {
        for output in &rule.outputs {
            let feeding = self.fed.get(&identity(output)).into_iter().flatten();
            let mut others = feeding.filter_map(|name| self.entries.get(name));
            let meant = |other: &Entry| rule.merge || other.rule.merge || other.rule.name == rule.name;
            if let Some(other) = others.find(|other| !meant(other)) {
                let name = other.rule.name.clone();
                return Err(Refusal::OutputTaken { output: output.to_string(), name });
            }
        }
        Ok(())
    }

    /// The rule for any source that loses datagrams to a rule for one of them, or the other way round.
    pub fn overlapping(&self, input: &Input) -> Vec<&Entry> {
        let same_place = |other: &Input| {
            (other.group, other.port, &other.interface) == (input.group, input.port, &input.interface)
        };
        self.iter()
            .filter(|entry| same_place(&entry.rule.input))
            .filter(|entry| entry.rule.input.source.is_some() != input.source.is_some())
            .collect()
    }

    /// The flow table of an interface: its rules' inputs, and for each the datagrams that this relay
    /// itself sends to them, which are never relayed again.
    ///
    /// `relaying` answers the action that relays a rule's datagrams, if any does now; `source` the source
    /// address of an output, if it has one now.
    pub fn flows(
        &self,
        interface: &InterfaceName,
        relaying: impl Fn(&Entry) -> Option<u32>,
        source: impl Fn(&Output) -> Option<Ipv4Addr>,
    ) -> BTreeMap<FlowKey4, FlowValue> {
        let ours = self.iter().filter(|entry| entry.rule.input.interface == *interface);
        let flow = |entry: &Entry| {
            let value = FlowValue { rule: entry.slot.0, action: relaying(entry)? };
            Some((key(&entry.rule.input), value))
        };
        let mut flows: BTreeMap<_, _> = ours.filter_map(flow).collect();
        for output in self.iter().flat_map(|entry| &entry.rule.outputs) {
            let Some(source) = source(output) else { continue };
            let (group, port) = (output.destination.octets(), output.port.to_be_bytes());
            let own = FlowKey4::source_group(source.octets(), group, port);
            // The rule for the source goes before the one for any source, here as in the data path.
            let fed = flows.get(&own).or_else(|| flows.get(&FlowKey4::any_source(group, port)));
            if let Some(&FlowValue { rule, .. }) = fed {
                flows.insert(own, FlowValue { rule, action: action::LOOP });
            }
        }
        flows
    }
}

/// The flow key of an input.
pub fn key(input: &Input) -> FlowKey4 {
    let source = input.source.unwrap_or(Ipv4Addr::UNSPECIFIED);
    FlowKey4::source_group(source.octets(), input.group.octets(), input.port.to_be_bytes())
}

/// What can be said of a rule without the others.
fn check_alone(rule: &Rule) -> Result<(), Refusal> {
    if rule.outputs.is_empty() {
        return Err(Refusal::NoOutput);
    }
    if rule.outputs.len() > MAX_OUTPUTS {
        return Err(Refusal::TooManyOutputs { outputs: rule.outputs.len() });
    }
    let groups = rule.outputs.iter().map(|output| output.destination).chain([rule.input.group]);
    if let Some(group) = groups.into_iter().find(|group| is_link_local(*group) && !rule.link_local) {
        return Err(Refusal::LinkLocal { group });
    }
    for (index, output) in rule.outputs.iter().enumerate() {
        if output.identity() == (rule.input.group, rule.input.port, &rule.input.interface) {
            return Err(Refusal::OutputIsInput { output: output.to_string() });
        }
        if rule.outputs[..index].iter().any(|earlier| earlier.identity() == output.identity()) {
            return Err(Refusal::OutputTwice { output: output.to_string() });
        }
    }
    Ok(())
}

fn is_link_local(group: Ipv4Addr) -> bool {
    group.octets()[..3] == [224, 0, 0]
}

/// In what two rules of one name differ, or `None` if in nothing.
pub fn difference(known: &Rule, new: &Rule) -> Option<String> {
    let mut parts = Vec::new();
    if known.input != new.input {
        parts.push(format!("its input ({} instead of {})", known.input, new.input));
    }
    let list = |outputs: &[Output]| outputs.iter().map(ToString::to_string).collect::<Vec<_>>();
    let (mut known_outputs, mut new_outputs) = (list(&known.outputs), list(&new.outputs));
    known_outputs.sort();
    new_outputs.sort();
    if known_outputs != new_outputs {
        parts.push(format!("its outputs ({} instead of {})", known_outputs.join(" "), new_outputs.join(" ")));
    }
    if known.datapath != new.datapath {
        parts.push(format!("its datapath ({} instead of {})", known.datapath, new.datapath));
    }
    if new.merge && !known.merge {
        parts.push("--merge".to_owned());
    }
    if new.link_local && !known.link_local {
        parts.push("--link-local".to_owned());
    }
    (!parts.is_empty()).then(|| parts.join(" and "))
}

#[cfg(test)]
#[path = "ruleset_tests.rs"]
mod tests;
