//! What the supervisor wants and what it has: the difference is what it does next. Pure: no file
//! descriptor, no clock.
//!
//! Commands and [`Event`]s change what is wanted, or tell what has changed. [`State::plan`] compares,
//! [`State::done`] and [`State::failed`] take note. Whatever fails is remembered with its reason and
//! tried again when the interface it concerns has changed.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
    time::Duration,
};

use mcr_common::flow::{FlowKey4, FlowValue, action};

use crate::{
    datapath::{self, af_xdp},
    net::{
        egress_socket::EgressKey,
        links::{Link, Links},
        membership::Membership,
    },
    rule::{Datapath, Dscp, IfIndex, InterfaceName, Origin, Output, Rule, RuleSlot, Ttl},
    ruleset::{self, Amendment, Change, Entry, Refusal, RuleSet},
    supervisor::event::{Effect, Event, Failure, WorkerId, WorkerSpec},
    worker::protocol::{self, CompiledOutput, CompiledRule, Route},
};

/// The pause before a worker's first restart; it doubles with each that follows too soon.
const FIRST_PAUSE: Duration = Duration::from_millis(50);

/// The longest pause before a restart.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// A worker that lived this long starts anew with the first pause.
const SETTLED: Duration = Duration::from_secs(30);

/// Datagrams in one `UDP_SEGMENT` send; kernels before 6.9 take no more.
const MAX_RUN: u16 = 64;

/// What the daemon was started with, as far as it bears on decisions.
#[derive(Clone, Debug)]
pub struct Limits {
    pub max_rules: u32,
    /// Workers of each interface, if the operator said so.
    pub workers: Option<u32>,
    /// CPUs that workers are pinned to, in turn.
    pub cpus: Vec<u32>,
    pub source_port: u16,
}

/// A worker that runs, and what it was given.
#[derive(Clone, Debug, Default)]
pub struct Running {
    pub spec: Option<WorkerSpec>,
    pub rules: BTreeMap<RuleSlot, CompiledRule>,
    pub egress: BTreeSet<u32>,
    /// Its sockets are in the XSKMAP.
    pub steered: bool,
    /// It failed and is being ended: nothing more is asked of it.
    pub failed: bool,
}

/// How often a worker has ended, and why last.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mishaps {
    pub restarts: u64,
    pub last_exit: Option<String>,
    /// The pause that was taken last.
    pause: Option<Duration>,
    /// The pause is not over.
    waiting: bool,
}

/// Flow tables by interface.
type Flows = BTreeMap<InterfaceName, BTreeMap<FlowKey4, FlowValue>>;

/// What there is in the kernel and in the workers.
#[derive(Clone, Debug, Default)]
struct Actual {
    attached: BTreeMap<InterfaceName, IfIndex>,
    flows: Flows,
    memberships: BTreeSet<Membership>,
    workers: BTreeMap<WorkerId, Running>,
    /// A flow was deleted, and nobody has waited yet for the programs that may still act on it.
    barrier_due: bool,
}

/// What is wrong with an output now, if anything.
pub type Pending = Option<String>;

#[derive(Clone, Debug)]
pub struct State {
    limits: Limits,
    rules: RuleSet,
    links: Links,
    actual: Actual,
    /// Interfaces on which something failed, and why; cleared when they change.
    interface_failures: BTreeMap<InterfaceName, String>,
    flow_failures: BTreeMap<InterfaceName, BTreeMap<FlowKey4, String>>,
    join_failures: BTreeMap<Membership, String>,
    egress_failures: BTreeMap<EgressKey, String>,
    mishaps: BTreeMap<WorkerId, Mishaps>,
    /// Ids of egress sockets, the same in every worker, never used for another.
    egress_ids: BTreeMap<EgressKey, u32>,
    next_egress_id: u32,
    /// CPU of each worker, kept across restarts.
    cpus: BTreeMap<WorkerId, u32>,
    stopping: bool,
}

impl State {
    pub fn new(limits: Limits) -> Self {
        Self {
            rules: RuleSet::new(limits.max_rules),
            limits,
            links: Links::new(),
            actual: Actual::default(),
            interface_failures: BTreeMap::new(),
            flow_failures: BTreeMap::new(),
            join_failures: BTreeMap::new(),
            egress_failures: BTreeMap::new(),
            mishaps: BTreeMap::new(),
            egress_ids: BTreeMap::new(),
            next_egress_id: 0,
            cpus: BTreeMap::new(),
            stopping: false,
        }
    }

    pub fn rules(&self) -> &RuleSet {
        &self.rules
    }

    pub fn links(&self) -> &Links {
        &self.links
    }

    pub fn workers(&self) -> &BTreeMap<WorkerId, Running> {
        &self.actual.workers
    }

    pub fn mishaps(&self, id: &WorkerId) -> Mishaps {
        self.mishaps.get(id).cloned().unwrap_or_default()
    }

    /// Every worker that runs or is to run again.
    pub fn worker_ids(&self) -> BTreeSet<WorkerId> {
        self.actual.workers.keys().chain(self.mishaps.keys()).cloned().collect()
    }

    pub fn is_attached(&self, interface: &InterfaceName) -> bool {
        self.actual.attached.contains_key(interface)
    }

    /// Adds a rule. What it takes is in the next plan.
    pub fn add(&mut self, rule: Rule, origin: Origin) -> Result<Change, Refusal> {
        // Somebody who asks again wants it tried again.
        self.forget_failures(&rule.input.interface.clone());
        self.rules.add(rule, origin)
    }

    pub fn amend(&mut self, name: &str, amendment: Amendment) -> Result<Change, Refusal> {
        self.egress_failures.clear();
        self.rules.amend(name, amendment)
    }

    pub fn remove(&mut self, name: &str) -> Result<Entry, Refusal> {
        let entry = self.rules.remove(name)?;
        // There is room for another flow.
        self.flow_failures.remove(&entry.rule.input.interface);
        Ok(entry)
    }

    /// Takes note of an event; what follows from it is in the next plan, but for what is answered here.
    pub fn apply(&mut self, event: Event) -> Vec<Effect> {
        match event {
            Event::Links(links) => {
                let old = std::mem::replace(&mut self.links, links);
                self.interface_failures.retain(|name, _| old.get(name) == self.links.get(name));
                self.flow_failures.retain(|name, _| old.get(name) == self.links.get(name));
                self.join_failures.clear();
                self.egress_failures.clear();
            }
            Event::WorkerExited { id, why, lived } => return self.worker_exited(id, why, lived),
            Event::RestartDue { id } => {
                if let Some(mishaps) = self.mishaps.get_mut(&id) {
                    mishaps.waiting = false;
                }
            }
            Event::Stop => self.stopping = true,
        }
        Vec::new()
    }

    fn worker_exited(&mut self, id: WorkerId, why: String, lived: Duration) -> Vec<Effect> {
        self.actual.workers.remove(&id);
        if self.stopping {
            return Vec::new();
        }
        let mishaps = self.mishaps.entry(id.clone()).or_default();
        let pause = match mishaps.pause {
            Some(last) if lived < SETTLED => (2 * last).min(LONGEST_PAUSE),
            _ => FIRST_PAUSE,
        };
        *mishaps = Mishaps {
            restarts: mishaps.restarts + 1,
            last_exit: Some(why),
            pause: Some(pause),
            waiting: true,
        };
        vec![Effect::RestartAfter { id, delay: pause }]
    }

    fn forget_failures(&mut self, interface: &InterfaceName) {
        self.interface_failures.remove(interface);
        self.flow_failures.remove(interface);
        self.join_failures.clear();
        self.egress_failures.clear();
    }

    /// What to do next, in this order. Empty when all is as it is wanted.
    ///
    /// Flows that steer go first and come last: a frame is steered only while everything behind it
    /// stands. Flows that bar a loop come first and go last: it is barred as long as it could be sent.
    pub fn plan(&mut self) -> Vec<Effect> {
        let mut effects = Vec::new();
        self.plan_lost_interfaces(&mut effects);
        if !effects.is_empty() {
            // Flows and workers go with them: the rest is planned without.
            return effects;
        }
        let wanted = self.wanted_flows();
        self.plan_flow_removals(&wanted, action::STEER, &mut effects);
        self.plan_rule_removals(&mut effects);
        self.plan_leaves(&mut effects);
        if self.stopping {
            self.plan_flow_removals(&wanted, action::LOOP, &mut effects);
            self.plan_end(&mut effects);
            return effects;
        }
        self.plan_attachments(&mut effects);
        self.plan_flows(&wanted, action::LOOP, &mut effects);
        self.plan_workers(&mut effects);
        self.plan_joins(&mut effects);
        self.plan_flows(&wanted, action::STEER, &mut effects);
        self.plan_flow_removals(&wanted, action::LOOP, &mut effects);
        effects
    }

    /// Programs and workers of interfaces that are gone or were made anew.
    fn plan_lost_interfaces(&self, effects: &mut Vec<Effect>) {
        for (interface, index) in &self.actual.attached {
            if self.links.get(interface).is_some_and(|link| link.index == *index) {
                continue;
            }
            effects.extend(self.workers_of(interface).map(|id| Effect::StopWorker { id: id.clone() }));
            effects.push(Effect::Detach { interface: interface.clone() });
        }
    }

    fn workers_of<'a>(&'a self, interface: &'a InterfaceName) -> impl Iterator<Item = &'a WorkerId> {
        self.actual.workers.keys().filter(move |id| id.interface == *interface)
    }

    /// Takes out the flows of an action.
    fn plan_flow_removals(&self, wanted: &Flows, action: u32, effects: &mut Vec<Effect>) {
        let before = effects.len();
        for (interface, flows) in &self.actual.flows {
            let stays = |key: &FlowKey4| wanted.get(interface).is_some_and(|wanted| wanted.contains_key(key));
            for (&key, value) in flows {
                if value.action == action && !stays(&key) {
                    effects.push(Effect::DeleteFlow { interface: interface.clone(), key });
                }
            }
        }
        if effects.len() > before || self.actual.barrier_due {
            effects.push(Effect::Barrier);
        }
    }

    /// The flows of every interface that serves rules.
    fn wanted_flows(&self) -> Flows {
        let interfaces = self.rules.iter().map(|entry| &entry.rule.input.interface);
        let serving: BTreeSet<_> = interfaces.filter(|name| !self.stopping && self.serves(name)).collect();
        serving.into_iter().map(|name| (name.clone(), self.flows_of(name))).collect()
    }

    fn flows_of(&self, interface: &InterfaceName) -> BTreeMap<FlowKey4, FlowValue> {
        let mut flows = self.all_flows(interface);
        if let Some(failures) = self.flow_failures.get(interface) {
            // A rule whose loops cannot be barred gets nothing either.
            let failed: BTreeSet<_> =
                failures.keys().filter_map(|key| flows.get(key)).map(|flow| flow.rule).collect();
            let steered = |flow: &FlowValue| flow.action == action::STEER && failed.contains(&flow.rule);
            flows.retain(|key, flow| !failures.contains_key(key) && !steered(flow));
        }
        flows
    }

    /// The flows of an interface if none had failed.
    fn all_flows(&self, interface: &InterfaceName) -> BTreeMap<FlowKey4, FlowValue> {
        let source = |output: &Output| self.route(output).ok().map(|(route, _)| route.source);
        self.rules.flows(interface, source)
    }

    /// Whether the interface's program is attached to the interface that there is now.
    fn serves(&self, interface: &InterfaceName) -> bool {
        let index = self.links.get(interface).map(|link| link.index);
        index.is_some() && index == self.actual.attached.get(interface).copied()
    }

    fn plan_rule_removals(&self, effects: &mut Vec<Effect>) {
        let wanted: BTreeMap<_, _> = self.rules.iter().map(|entry| (entry.slot, &entry.rule.input)).collect();
        for (id, running) in self.actual.workers.iter().filter(|(_, running)| !running.failed) {
            for (slot, rule) in &running.rules {
                let stays = wanted
                    .get(slot)
                    .is_some_and(|input| input.interface == id.interface && ruleset::key(input) == rule.key);
                if !stays || self.stopping {
                    effects.push(Effect::RemoveRule { id: id.clone(), slot: *slot });
                }
            }
        }
    }

    fn plan_leaves(&self, effects: &mut Vec<Effect>) {
        let wanted = self.wanted_memberships();
        effects
            .extend(self.actual.memberships.difference(&wanted).map(|membership| Effect::Leave(*membership)));
    }

    fn plan_joins(&self, effects: &mut Vec<Effect>) {
        let wanted = self.wanted_memberships();
        let missing = wanted.difference(&self.actual.memberships);
        effects.extend(
            missing
                .filter(|membership| !self.join_failures.contains_key(membership))
                .map(|&membership| Effect::Join(membership)),
        );
    }

    fn wanted_memberships(&self) -> BTreeSet<Membership> {
        let wanted = |entry: &Entry| self.membership(entry);
        if self.stopping { BTreeSet::new() } else { self.rules.iter().filter_map(wanted).collect() }
    }

    fn membership(&self, entry: &Entry) -> Option<Membership> {
        let input = &entry.rule.input;
        let link = self.links.get(&input.interface)?;
        let ready = self.serves(&input.interface) && link.up;
        ready.then_some(Membership { interface: link.index, group: input.group, source: input.source })
    }

    fn plan_end(&self, effects: &mut Vec<Effect>) {
        effects.extend(self.actual.workers.keys().map(|id| Effect::StopWorker { id: id.clone() }));
        effects.extend(
            self.actual.attached.keys().map(|interface| Effect::Detach { interface: interface.clone() }),
        );
    }

    /// Interfaces that rules come in on or came in on, that exist, and on which nothing has failed.
    fn wanted_interfaces(&self) -> BTreeMap<&InterfaceName, &Link> {
        self.rules
            .iter()
            .map(|entry| &entry.rule.input.interface)
            .chain(self.actual.attached.keys())
            .filter(|interface| !self.interface_failures.contains_key(*interface))
            .filter_map(|interface| Some((interface, self.links.get(interface)?)))
            .collect()
    }

    fn plan_attachments(&mut self, effects: &mut Vec<Effect>) {
        let mut failures = Vec::new();
        for (interface, link) in self.wanted_interfaces() {
            if self.actual.attached.contains_key(interface) {
                continue;
            }
            match af_xdp::chunk_bytes(link.mtu) {
                Ok(_) => effects.push(Effect::Attach { interface: interface.clone() }),
                Err(error) => failures.push((interface.clone(), format!("{interface}: {error}"))),
            }
        }
        self.interface_failures.extend(failures);
    }

    fn plan_workers(&mut self, effects: &mut Vec<Effect>) {
        let wanted: Vec<_> = self
            .wanted_interfaces()
            .into_iter()
            .map(|(interface, link)| (interface.clone(), link.clone()))
            .collect();
        for (interface, link) in wanted {
            let workers = self.wanted_workers(&interface, &link);
            if !workers.is_empty() {
                let surplus = self.workers_of(&interface).filter(|id| id.index as usize >= workers.len());
                effects.extend(surplus.map(|id| Effect::StopWorker { id: id.clone() }));
            }
            for (id, spec) in workers {
                match self.actual.workers.get(&id) {
                    None if !self.mishaps(&id).waiting => {
                        effects.push(Effect::StartWorker { id: id.clone(), spec });
                        self.plan_rules(&id, &Running::default(), effects);
                    }
                    None => {}
                    Some(running) if running.failed => {}
                    // Other queues, another CPU or another chunk: a worker is made for them.
                    Some(running) if running.spec.as_ref() != Some(&spec) => {
                        effects.push(Effect::StopWorker { id: id.clone() });
                    }
                    Some(running) => self.plan_rules(&id, &running.clone(), effects),
                }
            }
        }
    }

    fn wanted_workers(&mut self, interface: &InterfaceName, link: &Link) -> Vec<(WorkerId, WorkerSpec)> {
        let Ok(chunk_bytes) = af_xdp::chunk_bytes(link.mtu) else { return Vec::new() };
        let default = af_xdp::default_workers(link.rx_queues, self.limits.cpus.len() as u32);
        let shares = af_xdp::share_queues(link.rx_queues, self.limits.workers.unwrap_or(default));
        let spec = |(index, queues)| {
            let id = WorkerId { interface: interface.clone(), index };
            let cpu = self.cpu_of(&id);
            (id, WorkerSpec { ifindex: link.index, queues, cpu, chunk_bytes })
        };
        (0..).zip(shares).map(spec).collect()
    }

    /// The CPU of a worker: the one with the fewest workers so far.
    fn cpu_of(&mut self, id: &WorkerId) -> Option<u32> {
        if let Some(cpu) = self.cpus.get(id) {
            return Some(*cpu);
        }
        let load = |cpu: &u32| self.cpus.values().filter(|taken| *taken == cpu).count();
        let cpu = self.limits.cpus.iter().copied().min_by_key(load)?;
        self.cpus.insert(id.clone(), cpu);
        Some(cpu)
    }

    /// Brings a worker's rules and egress sockets to what they should be, then steers frames to it.
    fn plan_rules(&mut self, id: &WorkerId, running: &Running, effects: &mut Vec<Effect>) {
        let entries: Vec<_> =
            self.rules.iter().filter(|entry| entry.rule.input.interface == id.interface).cloned().collect();
        let mut needed = BTreeMap::new();
        let mut upserts = Vec::new();
        for entry in &entries {
            let rule = self.compile(entry, &mut needed);
            if running.rules.get(&entry.slot) != Some(&rule) {
                upserts.push(Effect::UpsertRule { id: id.clone(), rule });
            }
        }
        for (socket, key) in &needed {
            if !running.egress.contains(socket) {
                effects.push(Effect::OpenEgress { id: id.clone(), socket: *socket, key: key.clone() });
            }
        }
        effects.extend(upserts);
        if !running.steered {
            effects.push(Effect::Steer { id: id.clone() });
        }
        let unneeded = running.egress.iter().filter(|socket| !needed.contains_key(socket));
        effects.extend(unneeded.map(|&socket| Effect::CloseEgress { id: id.clone(), socket }));
    }

    /// The worker's form of a rule; the egress sockets that it needs are added to `needed`.
    fn compile(&mut self, entry: &Entry, needed: &mut BTreeMap<u32, EgressKey>) -> CompiledRule {
        let mut outputs = Vec::with_capacity(entry.rule.outputs.len());
        for (output, slot) in entry.outputs() {
            let route = self.route(output).ok().map(|(mut route, key)| {
                route.socket = self.egress_id(&key);
                needed.insert(route.socket, key);
                route
            });
            outputs.push(CompiledOutput {
                slot: slot.0,
                route,
                ttl: match output.ttl {
                    Ttl::Fixed(ttl) => protocol::Ttl::Fixed(ttl),
                    Ttl::Copy => protocol::Ttl::Copy,
                    Ttl::Decrement => protocol::Ttl::Decrement,
                },
                dscp: match output.dscp {
                    Dscp::Fixed(dscp) => Some(dscp),
                    Dscp::Copy => None,
                },
                max_run: if output.gso { MAX_RUN } else { 1 },
            });
        }
        CompiledRule { slot: entry.slot.0, key: ruleset::key(&entry.rule.input), outputs }
    }

    fn egress_id(&mut self, key: &EgressKey) -> u32 {
        if let Some(id) = self.egress_ids.get(key) {
            return *id;
        }
        let id = self.next_egress_id;
        self.next_egress_id += 1;
        self.egress_ids.insert(key.clone(), id);
        id
    }

    /// Where an output's datagrams leave, and through which kind of socket, or what it waits for.
    fn route(&self, output: &Output) -> Result<(Route, EgressKey), String> {
        let interface = &output.interface;
        let link =
            self.links.get(interface).ok_or_else(|| format!("interface {interface} does not exist"))?;
        if !link.up {
            return Err(format!("interface {interface} is down"));
        }
        let source = match output.from {
            Some(from) if self.is_local(from.address) => from.address,
            Some(from) => return Err(format!("{} is no address of this host", from.address)),
            None => {
                *link.addresses.first().ok_or_else(|| format!("interface {interface} has no IPv4 address"))?
            }
        };
        let key = EgressKey {
            interface: interface.clone(),
            index: link.index,
            source_port: output.from.and_then(|from| from.port).unwrap_or(self.limits.source_port),
            loop_back: output.loop_back,
            unicast: !output.destination.is_multicast(),
        };
        if let Some(why) = self.egress_failures.get(&key) {
            return Err(why.clone());
        }
        let route = Route {
            socket: 0,
            ifindex: link.index.0,
            source,
            destination: output.destination,
            port: output.port,
            mtu: link.mtu,
        };
        Ok((route, key))
    }

    fn is_local(&self, address: Ipv4Addr) -> bool {
        self.links.values().any(|link| link.addresses.contains(&address))
    }

    /// Sets the flows of an action.
    fn plan_flows(&self, wanted: &Flows, action: u32, effects: &mut Vec<Effect>) {
        for (interface, flows) in wanted {
            let there = |key: &FlowKey4| self.actual.flows.get(interface).and_then(|flows| flows.get(key));
            for (&key, &value) in flows {
                if value.action == action && there(&key) != Some(&value) {
                    effects.push(Effect::SetFlow { interface: interface.clone(), key, value });
                }
            }
        }
    }

    /// Takes note of what has been done.
    pub fn done(&mut self, effect: &Effect) {
        let actual = &mut self.actual;
        match effect {
            Effect::Attach { interface } => {
                if let Some(link) = self.links.get(interface) {
                    actual.attached.insert(interface.clone(), link.index);
                }
            }
            Effect::Detach { interface } => {
                actual.attached.remove(interface);
                actual.flows.remove(interface);
            }
            Effect::StartWorker { id, spec } => {
                actual.workers.insert(id.clone(), Running { spec: Some(spec.clone()), ..Running::default() });
            }
            Effect::Steer { id } => {
                actual.workers.entry(id.clone()).or_default().steered = true;
            }
            Effect::StopWorker { id } => {
                actual.workers.remove(id);
                // The end of a worker that was to end is told to nobody: no restart is on its way.
                if let Some(mishaps) = self.mishaps.get_mut(id) {
                    mishaps.waiting = false;
                }
            }
            Effect::OpenEgress { id, socket, .. } => {
                actual.workers.entry(id.clone()).or_default().egress.insert(*socket);
            }
            Effect::CloseEgress { id, socket } => {
                actual.workers.entry(id.clone()).or_default().egress.remove(socket);
            }
            Effect::UpsertRule { id, rule } => {
                actual.workers.entry(id.clone()).or_default().rules.insert(RuleSlot(rule.slot), rule.clone());
            }
            Effect::RemoveRule { id, slot } => {
                actual.workers.entry(id.clone()).or_default().rules.remove(slot);
            }
            Effect::SetFlow { interface, key, value } => {
                actual.flows.entry(interface.clone()).or_default().insert(*key, *value);
            }
            Effect::DeleteFlow { interface, key } => {
                actual.flows.entry(interface.clone()).or_default().remove(key);
                actual.barrier_due = true;
            }
            Effect::Join(membership) => {
                actual.memberships.insert(*membership);
            }
            Effect::Leave(membership) => {
                actual.memberships.remove(membership);
            }
            Effect::Barrier => actual.barrier_due = false,
            Effect::RestartAfter { .. } => {}
        }
    }

    /// Takes note of what could not be done, so that it is not tried again before something changes.
    ///
    /// A worker that failed is counted when its process has ended.
    pub fn failed(&mut self, effect: &Effect, failure: Failure) {
        match (effect, failure) {
            (_, Failure::Worker { id, why }) => {
                self.actual.workers.entry(id.clone()).or_default().failed = true;
                let mishaps = self.mishaps.entry(id).or_default();
                mishaps.waiting = true;
                mishaps.last_exit = Some(why);
            }
            (Effect::Attach { interface }, Failure::Refused(why)) => {
                self.interface_failures.insert(interface.clone(), why);
            }
            (Effect::SetFlow { interface, key, .. }, Failure::Refused(why)) => {
                self.flow_failures.entry(interface.clone()).or_default().insert(*key, why);
            }
            (Effect::Join(membership), Failure::Refused(why)) => {
                self.join_failures.insert(*membership, why);
            }
            (Effect::OpenEgress { key, .. }, Failure::Refused(why)) => {
                self.egress_failures.insert(key.clone(), why);
            }
            // What cannot be taken back is gone with its interface or its process.
            (undone, Failure::Refused(_)) => self.done(undone),
        }
    }

    /// Why an interface cannot relay now, if it cannot.
    pub fn interface_problem(&self, interface: &InterfaceName) -> Option<(Problem, String)> {
        let Some(link) = self.links.get(interface) else {
            return Some((Problem::Waits, format!("interface {interface} does not exist")));
        };
        if let Some(why) = self.interface_failures.get(interface) {
            return Some((Problem::Failed, why.clone()));
        }
        if !link.up {
            return Some((Problem::Waits, format!("interface {interface} is down")));
        }
        if let Err(error) = af_xdp::chunk_bytes(link.mtu) {
            return Some((Problem::Failed, format!("{interface}: {error}")));
        }
        let restarting =
            self.mishaps.iter().find(|(id, mishaps)| id.interface == *interface && mishaps.waiting);
        let restarting = restarting.map(|(id, mishaps)| {
            let why = mishaps.last_exit.clone().unwrap_or_default();
            (Problem::Waits, format!("worker {id} is being restarted: {why}"))
        });
        restarting.or_else(|| {
            let relays = |id: &WorkerId| self.actual.workers[id].steered && !self.actual.workers[id].failed;
            let waits = !self.workers_of(interface).any(relays);
            waits.then(|| (Problem::Waits, format!("no worker relays from {interface} yet")))
        })
    }

    /// Why a rule cannot relay now, if it cannot.
    pub fn rule_problem(&self, entry: &Entry) -> Option<(Problem, String)> {
        let failure = || self.join_failure(entry).or_else(|| self.flow_failure(entry));
        self.interface_problem(&entry.rule.input.interface)
            .or_else(|| failure().map(|why| (Problem::Failed, why.clone())))
    }

    fn join_failure(&self, entry: &Entry) -> Option<&String> {
        self.join_failures.get(&self.membership(entry)?)
    }

    fn flow_failure(&self, entry: &Entry) -> Option<&String> {
        let interface = &entry.rule.input.interface;
        let failures = self.flow_failures.get(interface)?;
        let flows = self.all_flows(interface);
        let its = |key: &FlowKey4| flows.get(key).is_some_and(|flow| flow.rule == entry.slot.0);
        failures.iter().find(|(key, _)| its(key)).map(|(_, why)| why)
    }

    /// What an output waits for, if it waits.
    pub fn output_pending(&self, output: &Output) -> Pending {
        self.route(output).err()
    }

    /// The datapath of a rule and why; `None` if it is none of this version's.
    pub fn datapath(&self, entry: &Entry) -> Option<(Datapath, String)> {
        let decision = datapath::choose(entry.rule.datapath).ok()?;
        Some((decision.datapath, decision.why))
    }
}

/// How bad a problem is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Problem {
    /// Resumes by itself when the cause has gone.
    Waits,
    /// Somebody has to do something.
    Failed,
}

#[cfg(test)]
#[path = "state_tests.rs"]
mod tests;
