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

use mcr_common::{
    flow::{FlowKey4, FlowValue, action},
    redirect::Rewrite,
};

use crate::{
    datapath::{
        self, af_packet, af_xdp,
        budget::{self, HostLimits, Shortfall},
    },
    ebpf::{RedirectOutput, Sets},
    net::{
        egress_socket::EgressKey,
        links::{Link, Links},
        membership::Membership,
        neighbours::{Host, Neighbour, NextHop, NextHops},
    },
    rule::{
        Datapath, DatapathChoice, Dscp, IfIndex, InterfaceName, Origin, Output, OutputSlot, Rule, RuleName,
        RuleSlot, Ttl,
    },
    ruleset::{self, Amendment, Change, Entry, Refusal, RuleSet},
    supervisor::event::{
        Effect, Event, Failure, Fanout, FrameSource, Inheritance, Joined, Targets, WorkerId, WorkerSpec,
    },
    sys::multicast::multicast_mac,
    worker::{
        ledger::DropReason,
        protocol::{self, CompiledOutput, CompiledRule, Route},
    },
};

/// The pause before a worker's first restart; it doubles with each that follows too soon.
const FIRST_PAUSE: Duration = Duration::from_millis(50);

/// The longest pause before a restart.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// A worker that lived this long starts anew with the first pause: what it costs to start one is little beside
/// that, and to wait longer would only lose more.
const SETTLED: Duration = Duration::from_secs(2);

/// What the daemon was started with, as far as it bears on decisions.
#[derive(Clone, Debug)]
pub struct Limits {
    pub max_rules: u32,
    /// Workers of each interface, if the operator said so.
    pub workers: Option<u32>,
    /// CPUs that workers are pinned to, in turn.
    pub cpus: Vec<u32>,
    /// The operator chose them: they are used whichever device is near.
    pub cpus_chosen: bool,
    pub source_port: u16,
    /// Chunks of each RX queue's UMEM.
    pub frames: u32,
    /// Datagrams that this kernel takes in one `UDP_SEGMENT` send.
    pub max_run: u16,
    pub host: HostLimits,
    /// Why no eBPF can be had here, if it cannot: AF_PACKET works without.
    pub no_bpf: Option<String>,
}

/// A worker that runs, and what it was given.
#[derive(Clone, Debug, Default)]
pub struct Running {
    pub spec: Option<WorkerSpec>,
    pub rules: BTreeMap<RuleSlot, CompiledRule>,
    pub egress: BTreeSet<u32>,
    /// It has its rules, and frames come to it.
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

/// What an interface has in the kernel.
#[derive(Clone, Debug)]
struct Served {
    index: IfIndex,
    /// The XDP program is attached.
    xdp: bool,
    /// It is a former one, which ours succeeds once it has all that it needs.
    former: bool,
    fanout: Option<Fanout>,
}

/// Why XDP cannot be had on an interface.
#[derive(Clone, Debug)]
struct XdpRefusal {
    why: String,
    /// What it may depend on has changed since.
    stale: bool,
}

/// Why a group cannot be joined.
#[derive(Clone, Debug)]
struct JoinRefusal {
    why: String,
    /// It is time to try again.
    stale: bool,
}

/// What there is in the kernel and in the workers.
#[derive(Clone, Debug, Default)]
struct Actual {
    served: BTreeMap<InterfaceName, Served>,
    flows: Flows,
    memberships: BTreeSet<Joined>,
    workers: BTreeMap<WorkerId, Running>,
    /// Outputs that the kernel itself sends on to.
    outputs: BTreeMap<InterfaceName, Sets>,
    /// A flow was deleted or moved, and nobody has waited yet for the programs that may still act on it.
    barrier_due: bool,
}

/// Ids of egress sockets, the same in every worker, never used for another.
#[derive(Clone, Debug, Default)]
struct EgressIds {
    ids: BTreeMap<EgressKey, u32>,
    next: u32,
}

impl EgressIds {
    fn of(&mut self, key: &EgressKey) -> u32 {
        if let Some(id) = self.ids.get(key) {
            return *id;
        }
        let id = self.next;
        self.next += 1;
        self.ids.insert(key.clone(), id);
        id
    }
}

/// Why an output sends nothing now, and under which reason its datagrams are dropped.
struct Withheld {
    why: String,
    reason: DropReason,
}

/// What is wrong with an output now, if anything.
pub type Pending = Option<String>;

#[derive(Clone, Debug)]
pub struct State {
    limits: Limits,
    rules: RuleSet,
    links: Links,
    next_hops: NextHops,
    actual: Actual,
    /// Interfaces on which something failed, and why; cleared when they change.
    interface_failures: BTreeMap<InterfaceName, String>,
    fanout_failures: BTreeMap<InterfaceName, String>,
    xdp_refusals: BTreeMap<InterfaceName, XdpRefusal>,
    targets: Targets,
    /// Why the kernel cannot send on what comes in on an interface.
    output_failures: BTreeMap<InterfaceName, String>,
    flow_failures: BTreeMap<InterfaceName, BTreeMap<FlowKey4, String>>,
    join_refusals: BTreeMap<Joined, JoinRefusal>,
    egress_failures: BTreeMap<EgressKey, String>,
    mishaps: BTreeMap<WorkerId, Mishaps>,
    egress_ids: EgressIds,
    /// CPU of each worker, kept across restarts.
    cpus: BTreeMap<WorkerId, u32>,
    stopping: bool,
    /// What the kernel does by itself goes on when the daemon ends.
    keeps: bool,
}

fn is_broadcast(address: Ipv4Addr, interface: &InterfaceName) -> String {
    format!("{address} is a broadcast address on {interface}: name a group, or each host")
}

fn cannot_redirect(why: &str) -> String {
    format!("the kernel cannot send it on by itself: {why}")
}

impl State {
    pub fn new(limits: Limits) -> Self {
        Self {
            rules: RuleSet::new(limits.max_rules),
            limits,
            links: Links::new(),
            next_hops: NextHops::new(),
            actual: Actual::default(),
            interface_failures: BTreeMap::new(),
            fanout_failures: BTreeMap::new(),
            xdp_refusals: BTreeMap::new(),
            targets: Targets::default(),
            output_failures: BTreeMap::new(),
            flow_failures: BTreeMap::new(),
            join_refusals: BTreeMap::new(),
            egress_failures: BTreeMap::new(),
            mishaps: BTreeMap::new(),
            egress_ids: EgressIds::default(),
            cpus: BTreeMap::new(),
            stopping: false,
            keeps: false,
        }
    }

    /// Takes over what the kernel has on an interface of a daemon that is gone; before there are rules. False if it does not
    /// go together with what was taken over before.
    pub fn inherit(&mut self, interface: &InterfaceName, found: &Inheritance) -> bool {
        let Some(index) = self.links.get(interface).map(|link| link.index) else { return false };
        let name = |index| self.links.iter().find(|(_, link)| link.index == index).map(|(name, _)| name);
        for (key, flow) in found.flows.iter().filter(|(_, flow)| relays(flow.action)) {
            let slot = RuleSlot(flow.rule);
            let outputs = found.sets.get(&slot).into_iter().flatten().filter_map(|output| {
                let Rewrite { destination, destination_port, .. } = output.rewrite;
                let port = u16::from_be_bytes(destination_port);
                Some(((destination.into(), port, name(output.egress)?.clone()), output.slot))
            });
            if !self.rules.inherit(interface.clone(), *key, slot, outputs.collect()) {
                return false;
            }
        }
        let served = Served { index, xdp: true, former: found.to_succeed, fanout: None };
        self.actual.served.insert(interface.clone(), served);
        if !found.to_succeed {
            self.actual.flows.insert(interface.clone(), found.flows.iter().copied().collect());
            self.actual.outputs.insert(interface.clone(), found.sets.clone());
        }
        true
    }

    /// Takes over what is joined already.
    pub fn inherit_memberships(&mut self, held: impl Iterator<Item = Membership>) {
        let joined = held.map(|membership| Joined { membership, outlives: true });
        self.actual.memberships.extend(joined);
    }

    /// The rules whose datagrams the kernel sends on by itself.
    pub fn redirected(&self) -> impl Iterator<Item = &Entry> {
        self.rules.iter().filter(|entry| {
            let flows = self.actual.flows.get(&entry.rule.input.interface);
            let flow = flows.and_then(|flows| flows.get(&ruleset::key(&entry.rule.input)));
            flow.is_some_and(|flow| flow.action == action::REDIRECT)
        })
    }

    pub fn rules(&self) -> &RuleSet {
        &self.rules
    }

    pub fn links(&self) -> &Links {
        &self.links
    }

    /// What is joined.
    pub fn memberships(&self) -> impl Iterator<Item = &Membership> {
        self.actual.memberships.iter().map(|joined| &joined.membership)
    }

    pub fn next_hops(&self) -> &NextHops {
        &self.next_hops
    }

    pub fn workers(&self) -> &BTreeMap<WorkerId, Running> {
        &self.actual.workers
    }

    /// Whether every worker of an interface that is to run relays.
    pub fn is_steady(&self, interface: &InterfaceName) -> bool {
        let waits = self.mishaps.iter().any(|(id, mishaps)| id.interface == *interface && mishaps.waiting);
        let mut its = self.actual.workers.iter().filter(|(id, _)| id.interface == *interface);
        !waits && its.all(|(_, running)| running.steered && !running.failed)
    }

    pub fn mishaps(&self, id: &WorkerId) -> Mishaps {
        self.mishaps.get(id).cloned().unwrap_or_default()
    }

    /// Every worker that runs or is to run again.
    pub fn worker_ids(&self) -> BTreeSet<WorkerId> {
        self.actual.workers.keys().chain(self.mishaps.keys()).cloned().collect()
    }

    /// Whether rules of a datapath can be served on the interface that there is now.
    pub fn serves(&self, interface: &InterfaceName, datapath: Datapath) -> bool {
        let index = self.links.get(interface).map(|link| link.index);
        let served = self.actual.served.get(interface).filter(|served| Some(served.index) == index);
        served.is_some_and(|served| match datapath {
            Datapath::AfPacket => served.fanout.is_some(),
            _ => served.xdp,
        })
    }

    /// Why XDP cannot be had on an interface, if that is known: what the kernel said goes before what may change.
    pub fn no_xdp(&self, interface: &InterfaceName) -> Option<String> {
        let refusal = self.xdp_refusals.get(interface).map(|refusal| refusal.why.clone());
        refusal.or_else(|| self.xdp_objection(interface))
    }

    /// What speaks against XDP before the kernel is asked.
    fn xdp_objection(&self, interface: &InterfaceName) -> Option<String> {
        if let Some(why) = &self.limits.no_bpf {
            return Some(why.clone());
        }
        let link = self.links.get(interface)?;
        let chunk_bytes = match af_xdp::chunk_bytes(link.mtu) {
            Ok(chunk_bytes) => chunk_bytes,
            Err(error) => return Some(format!("{interface}: {error}")),
        };
        let demand = budget::umems(link.rx_queues, self.limits.frames, chunk_bytes);
        let shortfall = self.check_budget(interface, Datapath::AfXdp, &demand).err();
        shortfall.map(|shortfall| format!("{interface}: {shortfall}"))
    }

    /// Whether groups wait to be joined, and nothing tells when they can be.
    pub fn awaits_joins(&self) -> bool {
        !self.join_refusals.is_empty()
    }

    /// Whether it is known already that a group cannot be joined, and why.
    pub fn knows_refusal(&self, effect: &Effect, why: &str) -> bool {
        let Effect::Join(joined) = effect else { return false };
        self.join_refusals.get(joined).is_some_and(|refusal| refusal.why == why)
    }

    /// Whether XDP waits for somebody else's program to go, which nothing tells.
    pub fn awaits_slot(&self) -> bool {
        let occupied =
            |name: &InterfaceName| self.links.get(name).is_some_and(|link| link.xdp_program.is_some());
        self.xdp_refusals.keys().any(occupied)
    }

    pub fn has_bpf(&self) -> bool {
        self.limits.no_bpf.is_none()
    }

    /// Whether there is room for an interface's frames beside those of all else.
    fn check_budget(
        &self,
        interface: &InterfaceName,
        datapath: Datapath,
        demand: &budget::Demand,
    ) -> Result<(), Shortfall> {
        let (mut locked, mut held) = (0, 0);
        for (id, running) in &self.actual.workers {
            match running.spec.as_ref().map(|spec| &spec.source) {
                _ if id.interface == *interface && id.datapath == datapath => {}
                Some(FrameSource::AfXdp { queues, chunk_bytes }) => {
                    let queues = queues.len() as u32;
                    locked += budget::umems(queues, self.limits.frames, *chunk_bytes).bytes;
                }
                _ => {}
            }
        }
        for (other, served) in &self.actual.served {
            let counted = other != interface || datapath != Datapath::AfPacket;
            held += served
                .fanout
                .filter(|_| counted)
                .map_or(0, |fanout| budget::rings(fanout.sockets, fanout.ring).bytes);
        }
        self.limits.host.check(demand, locked, locked + held)
    }

    /// Whether `auto` takes XDP on an interface. Rules that packet sockets serve stay there until it is attached.
    fn prefers_xdp(&self, interface: &InterfaceName) -> bool {
        let served_by_packet = || {
            let Some(flows) = self.actual.flows.get(interface) else { return false };
            let passed = |entry: &Entry| {
                let flow = flows.get(&ruleset::key(&entry.rule.input));
                flow.is_some_and(|flow| flow.action == action::PASS)
            };
            let mut rules = self.rules.iter().filter(|entry| entry.rule.input.interface == *interface);
            rules.any(|entry| entry.rule.datapath == DatapathChoice(None) && passed(entry))
        };
        self.no_xdp(interface).is_none() && (self.serves(interface, Datapath::AfXdp) || !served_by_packet())
    }

    /// The datapath that serves a rule.
    pub fn datapath_of(&self, rule: &Rule) -> Datapath {
        self.choose(rule, self.prefers_xdp(&rule.input.interface))
    }

    /// The datapath of a rule; `xdp` is whether `auto` takes XDP on its interface.
    fn choose(&self, rule: &Rule, xdp: bool) -> Datapath {
        datapath::choose(rule.datapath, xdp, || self.auto_redirect_objection(rule).is_none())
    }

    /// Why `auto` does not have the kernel send a rule's datagrams on, if it does not.
    pub fn auto_redirect_objection(&self, rule: &Rule) -> Option<String> {
        let unreachable = |output| {
            let withheld = self.redirect_route(output).err();
            withheld
                .filter(|withheld| withheld.reason == DropReason::Unreachable)
                .map(|withheld| withheld.why)
        };
        let hook = |interface| match self.targets.hooks.get(interface) {
            _ if !self.links.contains_key(interface) => None,
            Some(hook) => hook.clone(),
            None => Some(format!("it is not known what {interface} sends through")),
        };
        self.redirect_objection(rule)
            .or_else(|| rule.outputs.iter().find_map(unreachable))
            .or_else(|| rule.outputs.iter().map(|output| &output.interface).find_map(hook))
            .or_else(|| self.narrow_queue(rule))
    }

    /// Which device's queue is too short for what the kernel would put into it at one go: what does not fit is lost, where
    /// workers wait for their turn.
    fn narrow_queue(&self, rule: &Rule) -> Option<String> {
        rule.outputs.iter().find_map(|output| {
            let interface = &output.interface;
            let outputs = rule.outputs.iter().filter(|output| output.interface == *interface).count() as u32;
            let queue = self.targets.queues.get(interface).copied().unwrap_or(datapath::redirect::UNTOLD_QUEUE);
            let frames = outputs * datapath::redirect::BURST;
            let there = self.links.contains_key(interface);
            (there && frames > queue).then(|| {
                format!(
                    "a burst of {} datagrams would be {frames} frames by its {outputs} outputs on {interface}, whose queue takes \
                     {queue}",
                    datapath::redirect::BURST
                )
            })
        })
    }

    /// Why the kernel cannot send a rule's datagrams on by itself, if it cannot. An output that waits for its
    /// interface or for its neighbour is no objection.
    fn redirect_objection(&self, rule: &Rule) -> Option<String> {
        self.redirect_objection_by(rule, &self.targets)
    }

    /// Why the kernel could not send a rule on by itself, by what has been asked of its interfaces, before it is to.
    pub fn redirect_refusal(&self, rule: &Rule, targets: &Targets) -> Option<String> {
        let of_interface = self.interface_problem(&rule.input.interface, Datapath::Redirect);
        let of_interface = of_interface.filter(|(problem, _)| *problem == Problem::Failed);
        let of_outputs = || self.redirect_objection_by(rule, targets).map(|why| cannot_redirect(&why));
        of_interface.map(|(_, why)| why).or_else(of_outputs)
    }

    fn redirect_objection_by(&self, rule: &Rule, targets: &Targets) -> Option<String> {
        if let Some(why) = self.output_failures.get(&rule.input.interface) {
            return Some(why.clone());
        }
        rule.outputs.iter().find_map(|output| {
            let interface = &output.interface;
            if let Some(why) = datapath::redirect::needs_host(output) {
                return Some(format!("{output}: {why}"));
            }
            let link = self.links.get(interface)?;
            match targets.refusals.get(interface) {
                _ if link.mac.is_none() => Some(format!("{interface} has no Ethernet address")),
                Some(None) => self.no_neighbour(output),
                Some(refusal) => refusal.clone(),
                None => Some(format!("it is not known whether {interface} takes redirected frames")),
            }
        })
    }

    /// Why no neighbour can be had for an output, whoever answers.
    fn no_neighbour(&self, output: &Output) -> Option<String> {
        let (route, key) = self.way(output).ok().filter(|(_, key)| key.unicast)?;
        let (host, interface) = (route.destination, &key.interface);
        match self.host(&route, &key).map(|host| self.next_hops.get(&host)) {
            None => Some(format!("{interface} looks for no neighbours (ARP is off), so {host} has none")),
            Some(Some(NextHop::Broadcast)) => Some(is_broadcast(host, interface)),
            Some(Some(NextHop::Direct)) => Some(format!(
                "{host} has no neighbour on {interface}: it is this host, or behind an IPv6 router"
            )),
            _ => None,
        }
    }

    /// The interfaces that rules send from which may be redirected.
    pub fn egress_interfaces(&self) -> BTreeSet<&InterfaceName> {
        let may = |rule: &&Rule| matches!(rule.datapath.0, None | Some(Datapath::Redirect));
        let rules = self.rules.iter().map(|entry| &entry.rule).filter(may);
        rules.flat_map(|rule| &rule.outputs).map(|output| &output.interface).collect()
    }

    pub fn targets(&self) -> &Targets {
        &self.targets
    }

    /// Adds a rule. What it takes is in the next plan.
    pub fn add(&mut self, rule: Rule, origin: Origin) -> Result<Change, Refusal> {
        // Somebody who asks again wants it tried again.
        self.forget_failures(&rule.input.interface.clone());
        if rule.datapath.0 == Some(Datapath::AfXdp)
            && let Some(refusal) = self.xdp_refusals.get_mut(&rule.input.interface)
        {
            refusal.stale = true;
        }
        self.rules.add(rule, origin)
    }

    pub fn amend(&mut self, name: &str, amendment: Amendment) -> Result<Change, Refusal> {
        self.egress_failures.clear();
        self.rules.amend(name, amendment)
    }

    pub fn remove(&mut self, name: &str) -> Result<Entry, Refusal> {
        let entry = self.rules.remove(name)?;
        if !self.join_refusals.is_empty() {
            let wanted = self.wanted_memberships();
            self.join_refusals.retain(|joined, _| wanted.contains(joined));
        }
        // There is room for another flow.
        self.flow_failures.remove(&entry.rule.input.interface);
        Ok(entry)
    }

    /// Puts other rules in the place of those that there are. What it takes is in the next plan.
    pub fn replace_rules(&mut self, rules: RuleSet) {
        let before = std::mem::replace(&mut self.rules, rules);
        let same = |entry: &&Entry| self.rules.get(entry.rule.name.as_str()).is_ok_and(|now| now == *entry);
        let mut touched: BTreeSet<_> = before
            .iter()
            .filter(|entry| !same(entry))
            .map(|entry| entry.rule.input.interface.clone())
            .collect();
        let new = |entry: &&Entry| before.get(entry.rule.name.as_str()).is_err();
        touched.extend(self.rules.iter().filter(new).map(|entry| entry.rule.input.interface.clone()));
        for interface in &touched {
            self.forget_failures(interface);
            if let Some(refusal) = self.xdp_refusals.get_mut(interface) {
                refusal.stale = true;
            }
        }
    }

    /// Says where a rule comes from now.
    pub fn set_origin(&mut self, name: &RuleName, origin: Origin) {
        self.rules.set_origin(name, origin);
    }

    /// Takes note of an event; what follows from it is in the next plan, but for what is answered here.
    pub fn apply(&mut self, event: Event) -> Vec<Effect> {
        match event {
            Event::Links(links) => self.links_changed(links),
            Event::NextHops(next_hops) => self.next_hops = next_hops,
            Event::WorkerExited { id, why, lived } => return self.worker_exited(id, why, lived),
            Event::RestartDue { id } => {
                if let Some(mishaps) = self.mishaps.get_mut(&id) {
                    mishaps.waiting = false;
                }
            }
            Event::Targets(targets) => self.targets = targets,
            Event::JoinsDue => self.join_refusals.values_mut().for_each(|refusal| refusal.stale = true),
            Event::Stop { keep } => (self.stopping, self.keeps) = (true, keep),
        }
        Vec::new()
    }

    fn links_changed(&mut self, links: Links) {
        let old = std::mem::replace(&mut self.links, links);
        let same = |name: &InterfaceName| old.get(name) == self.links.get(name);
        self.interface_failures.retain(|name, _| same(name));
        self.fanout_failures.retain(|name, _| same(name));
        self.output_failures.clear();
        self.flow_failures.retain(|name, _| same(name));
        self.xdp_refusals.retain(|name, refusal| {
            let (Some(old), Some(new)) = (old.get(name), self.links.get(name)) else { return false };
            let matters = |link: &Link| (link.mtu, link.rx_queues, link.xdp_program);
            refusal.stale |= matters(old) != matters(new);
            old.index == new.index
        });
        self.join_refusals.clear();
        self.egress_failures.clear();
    }

    fn worker_exited(&mut self, id: WorkerId, why: String, lived: Duration) -> Vec<Effect> {
        let running = self.actual.workers.remove(&id).unwrap_or_default();
        if self.stopping {
            return Vec::new();
        }
        let mishaps = self.mishaps.entry(id.clone()).or_default();
        let pause = match mishaps.pause {
            Some(last) if lived < SETTLED || !running.steered => (2 * last).min(LONGEST_PAUSE),
            _ => FIRST_PAUSE,
        };
        // Why a worker was ended says more than how.
        let known = mishaps.last_exit.take().filter(|_| running.failed);
        *mishaps = Mishaps {
            restarts: mishaps.restarts + 1,
            last_exit: known.or(Some(why)),
            pause: Some(pause),
            waiting: true,
        };
        vec![Effect::RestartAfter { id, delay: pause }]
    }

    fn forget_failures(&mut self, interface: &InterfaceName) {
        self.interface_failures.remove(interface);
        self.fanout_failures.remove(interface);
        self.output_failures.remove(interface);
        self.flow_failures.remove(interface);
        self.join_refusals.clear();
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
        self.plan_flow_removals(&wanted, relays, &mut effects);
        self.plan_rule_removals(&mut effects);
        self.plan_output_removals(&mut effects);
        let memberships = self.wanted_memberships();
        self.plan_leaves(&memberships, &mut effects);
        if self.stopping {
            self.plan_flow_removals(&wanted, bars, &mut effects);
            self.plan_end(&mut effects);
            return effects;
        }
        self.plan_interfaces(&mut effects);
        self.plan_flows(&wanted, bars, &mut effects);
        self.plan_workers(&mut effects);
        self.plan_outputs(&mut effects);
        self.plan_joins(&memberships, &mut effects);
        self.plan_flows(&wanted, relays, &mut effects);
        self.plan_flow_removals(&wanted, bars, &mut effects);
        self.plan_successions(&mut effects);
        if effects.is_empty() {
            self.rules.release_slots();
        }
        effects
    }

    /// Programs, sockets and workers of interfaces that are gone or were made anew, and what was prepared for
    /// rules that were refused. One that was only renamed still receives: its flows go first.
    fn plan_lost_interfaces(&self, effects: &mut Vec<Effect>) {
        let lost = |(interface, served): &(&InterfaceName, &Served)| {
            let same = self.links.get(*interface).is_some_and(|link| link.index == served.index);
            let used = served.xdp
                || served.fanout.is_some()
                || self.rules.iter().any(|entry| entry.rule.input.interface == **interface);
            !(same && used)
        };
        let lost: Vec<_> = self.actual.served.iter().filter(lost).map(|(interface, _)| interface).collect();
        for &interface in &lost {
            let flows = self.actual.flows.get(interface).into_iter().flatten();
            let relayed = flows.filter(|(_, flow)| relays(flow.action));
            effects.extend(relayed.map(|(&key, _)| Effect::DeleteFlow { interface: interface.clone(), key }));
        }
        if !effects.is_empty() || self.actual.barrier_due && !lost.is_empty() {
            effects.push(Effect::Barrier);
        }
        for interface in lost {
            for id in self.workers_of(interface) {
                let running = &self.actual.workers[id];
                if !self.has_bpf() && !running.failed {
                    // What brings it its frames is its own filter, which follows its rules.
                    let rules = running.rules.keys();
                    effects.extend(rules.map(|&slot| Effect::RemoveRule { id: id.clone(), slot }));
                }
                effects.push(Effect::StopWorker { id: id.clone() });
            }
            effects.push(Effect::Detach { interface: interface.clone() });
        }
    }

    fn workers_of<'a>(&'a self, interface: &'a InterfaceName) -> impl Iterator<Item = &'a WorkerId> {
        self.actual.workers.keys().filter(move |id| id.interface == *interface)
    }

    /// Takes out the flows of some action.
    fn plan_flow_removals(&self, wanted: &Flows, action: fn(u32) -> bool, effects: &mut Vec<Effect>) {
        let before = effects.len();
        for (interface, flows) in &self.actual.flows {
            let stays = |key: &FlowKey4| wanted.get(interface).is_some_and(|wanted| wanted.contains_key(key));
            for (&key, value) in flows {
                if action(value.action) && !stays(&key) {
                    effects.push(Effect::DeleteFlow { interface: interface.clone(), key });
                }
            }
        }
        let due = self.actual.barrier_due && !effects.contains(&Effect::Barrier);
        if effects.len() > before || due {
            effects.push(Effect::Barrier);
        }
    }

    /// The flows of every interface that serves rules.
    fn wanted_flows(&self) -> Flows {
        if self.stopping {
            return self.kept_flows();
        }
        self.actual.served.keys().map(|name| (name.clone(), self.flows_of(name))).collect()
    }

    /// The slots of rules that go on when the daemon ends.
    fn kept_slots(&self) -> BTreeSet<RuleSlot> {
        if !self.keeps {
            return BTreeSet::new();
        }
        self.redirected().map(|entry| entry.slot).collect()
    }

    /// The flows that stay when the daemon ends: those of rules that go on, and what bars their loops.
    fn kept_flows(&self) -> Flows {
        let slots = self.kept_slots();
        let stays = |flow: &FlowValue| {
            slots.contains(&RuleSlot(flow.rule)) && matches!(flow.action, action::REDIRECT | action::LOOP)
        };
        let kept = |flows: &BTreeMap<FlowKey4, FlowValue>| {
            flows.iter().filter(|(_, flow)| stays(flow)).map(|(key, flow)| (*key, *flow)).collect()
        };
        self.actual.flows.iter().map(|(name, flows)| (name.clone(), kept(flows))).collect()
    }

    fn flows_of(&self, interface: &InterfaceName) -> BTreeMap<FlowKey4, FlowValue> {
        let mut flows = self.all_flows(interface);
        if let Some(failures) = self.flow_failures.get(interface) {
            // A rule whose loops cannot be barred gets nothing either.
            let failed: BTreeSet<_> =
                failures.keys().filter_map(|key| flows.get(key)).map(|flow| flow.rule).collect();
            let relayed = |flow: &FlowValue| relays(flow.action) && failed.contains(&flow.rule);
            flows.retain(|key, flow| !failures.contains_key(key) && !relayed(flow));
        }
        flows
    }

    /// The flows of an interface if none had failed.
    fn all_flows(&self, interface: &InterfaceName) -> BTreeMap<FlowKey4, FlowValue> {
        let xdp = self.prefers_xdp(interface);
        let relaying = |entry: &Entry| self.relaying(entry, xdp);
        self.rules.flows(interface, relaying, |output| self.source(output))
    }

    /// The action of a rule's own flow, if it has one now; `xdp` is whether `auto` takes XDP.
    fn relaying(&self, entry: &Entry, xdp: bool) -> Option<u32> {
        let input = &entry.rule.input;
        let datapath = self.choose(&entry.rule, xdp);
        if self.serves(&input.interface, datapath) {
            return Some(relaying_action(datapath));
        }
        // A rule that moves stays where it is until the other datapath serves the interface.
        let there = self.actual.flows.get(&input.interface)?.get(&ruleset::key(input))?;
        relays(there.action).then_some(there.action)
    }

    /// The source address of an output, if it can send now.
    fn source(&self, output: &Output) -> Option<Ipv4Addr> {
        self.route(output).ok().map(|(route, _)| route.source)
    }

    /// The sources that this relay itself sends from to its rules' inputs, where no eBPF bars them.
    fn own_sources(&self, interface: &InterfaceName) -> BTreeMap<RuleSlot, Vec<Ipv4Addr>> {
        let mut sources: BTreeMap<_, Vec<_>> = BTreeMap::new();
        if !self.has_bpf() {
            let flows = self.rules.flows(interface, |_| Some(action::PASS), |output| self.source(output));
            for (key, flow) in flows.into_iter().filter(|(_, flow)| bars(flow.action)) {
                sources.entry(RuleSlot(flow.rule)).or_default().push(Ipv4Addr::from(key.source));
            }
        }
        sources
    }

    /// Takes from each worker the rules that are no longer its own, once no flow brings it their frames.
    fn plan_rule_removals(&self, effects: &mut Vec<Effect>) {
        let rules: BTreeMap<_, _> = self.rules.iter().map(|entry| (entry.slot, &entry.rule)).collect();
        let prefer_xdp = self.interfaces_for_xdp();
        for (id, running) in self.actual.workers.iter().filter(|(_, running)| !running.failed) {
            let flows = self.actual.flows.get(&id.interface);
            for (slot, compiled) in &running.rules {
                let stays = rules.get(slot).is_some_and(|rule| {
                    let xdp = prefer_xdp.contains(&rule.input.interface);
                    let flow = flows.and_then(|flows| flows.get(&compiled.key));
                    let fed = flow.is_some_and(|flow| flow.action == relaying_action(id.datapath));
                    rule.input.interface == id.interface
                        && ruleset::key(&rule.input) == compiled.key
                        && (fed || self.choose(rule, xdp) == id.datapath)
                });
                if !stays || self.stopping {
                    effects.push(Effect::RemoveRule { id: id.clone(), slot: *slot });
                }
            }
        }
    }

    /// Chunks of each UMEM.
    pub fn frames(&self) -> u32 {
        self.limits.frames
    }

    /// What the kernel is to send on by itself of what comes in on an interface.
    fn wanted_outputs(&self, interface: &InterfaceName) -> Sets {
        let xdp = self.prefers_xdp(interface);
        let its = |entry: &&Entry| {
            entry.rule.input.interface == *interface && self.choose(&entry.rule, xdp) == Datapath::Redirect
        };
        let outputs = |entry: &Entry| {
            let served = entry.outputs().filter_map(|(output, slot)| self.redirect_output(output, slot));
            (entry.slot, served.collect())
        };
        self.rules.iter().filter(its).map(outputs).collect()
    }

    /// An output as the kernel is to serve it, unless it waits for something.
    fn redirect_output(&self, output: &Output, slot: OutputSlot) -> Option<RedirectOutput> {
        let (route, key, destination_mac) =
            self.redirect_route(output).ok().filter(|_| datapath::redirect::needs_host(output).is_none())?;
        let egress = datapath::redirect::Egress {
            destination_mac,
            source_mac: self.links.get(&output.interface)?.mac?,
            address: route.source,
            port: key.source_port,
            mtu: route.mtu,
        };
        let rewrite = datapath::redirect::rewrite(output, egress);
        Some(RedirectOutput { slot, egress: IfIndex(route.ifindex), rewrite })
    }

    /// Gives rules the outputs that the kernel is to serve.
    fn plan_outputs(&self, effects: &mut Vec<Effect>) {
        for interface in self.rules.interfaces() {
            let attach = Effect::Attach { interface: interface.clone() };
            if !self.serves(interface, Datapath::Redirect) && !effects.contains(&attach) {
                continue;
            }
            let actual = self.actual.outputs.get(interface);
            let mut wanted = self.wanted_outputs(interface);
            wanted.retain(|slot, outputs| actual.and_then(|actual| actual.get(slot)) != Some(outputs));
            if !wanted.is_empty() {
                let rules = wanted.into_iter().collect();
                effects.push(Effect::SetOutputs { interface: interface.clone(), rules });
            }
        }
    }

    /// Takes outputs from the kernel whose rules are gone or elsewhere, once no flow feeds them.
    fn plan_output_removals(&self, effects: &mut Vec<Effect>) {
        let kept = self.kept_slots();
        for (interface, outputs) in &self.actual.outputs {
            let wanted: BTreeSet<_> = if self.stopping {
                kept.clone()
            } else {
                self.wanted_outputs(interface).into_keys().collect()
            };
            let its = self.rules.iter().filter(|entry| entry.rule.input.interface == *interface);
            let stand: BTreeSet<_> = its.map(|entry| entry.slot).collect();
            let flows = self.actual.flows.get(interface).into_iter().flat_map(|flows| flows.values());
            let redirected = flows.filter(|flow| flow.action == action::REDIRECT);
            let redirected: BTreeSet<_> = redirected.map(|flow| RuleSlot(flow.rule)).collect();
            let fed = |slot: &RuleSlot| stand.contains(slot) && redirected.contains(slot);
            let unused =
                outputs.keys().filter(|slot| !wanted.contains(slot) && (self.stopping || !fed(slot)));
            let rules: Vec<_> = unused.copied().collect();
            if !rules.is_empty() {
                effects.push(Effect::DropOutputs { interface: interface.clone(), rules });
            }
        }
    }

    /// The interfaces of rules on which `auto` takes XDP.
    fn interfaces_for_xdp(&self) -> BTreeSet<&InterfaceName> {
        let interfaces: BTreeSet<_> = self.rules.iter().map(|entry| &entry.rule.input.interface).collect();
        interfaces.into_iter().filter(|interface| self.prefers_xdp(interface)).collect()
    }

    /// Leaves a group's sources before the group. Of changes within some milliseconds Linux reports the last: that a
    /// host had been joined to any source would not be taken back, and the group would go on coming. What is to be joined
    /// for another life is left after that: in between nobody would be joined.
    fn plan_leaves(&self, wanted: &BTreeSet<Joined>, effects: &mut Vec<Effect>) {
        let awaited = |joined: &Joined| {
            let other = Joined { outlives: !joined.outlives, ..*joined };
            wanted.contains(&other) && !self.actual.memberships.contains(&other)
        };
        let left = self.actual.memberships.iter().rev();
        let left = left.filter(|joined| !wanted.contains(joined) && !awaited(joined));
        effects.extend(left.copied().map(Effect::Leave));
    }

    fn plan_joins(&self, wanted: &BTreeSet<Joined>, effects: &mut Vec<Effect>) {
        let missing = wanted.difference(&self.actual.memberships);
        effects.extend(
            missing
                .filter(|joined| self.join_refusals.get(joined).is_none_or(|refusal| refusal.stale))
                .map(|&joined| Effect::Join(joined)),
        );
    }

    fn wanted_memberships(&self) -> BTreeSet<Joined> {
        let kept = self.kept_slots();
        let prefer_xdp = self.interfaces_for_xdp();
        let wanted = |entry: &Entry| self.membership(entry, prefer_xdp.contains(&entry.rule.input.interface));
        let stays = |entry: &&Entry| !self.stopping || kept.contains(&entry.slot);
        self.rules.iter().filter(stays).filter_map(wanted).collect()
    }

    /// What a rule has joined if it is relayed; `xdp` is whether `auto` takes XDP.
    fn membership(&self, entry: &Entry, xdp: bool) -> Option<Joined> {
        let input = &entry.rule.input;
        let link = self.links.get(&input.interface).filter(|link| link.up)?;
        let outlives = self.relaying(entry, xdp)? == action::REDIRECT;
        let membership = Membership { interface: link.index, group: input.group, source: input.source };
        Some(Joined { membership, outlives })
    }

    fn plan_end(&self, effects: &mut Vec<Effect>) {
        effects.extend(self.actual.workers.keys().map(|id| Effect::StopWorker { id: id.clone() }));
        let kept = self.kept_flows();
        let ends = |interface: &&InterfaceName| kept.get(*interface).is_none_or(BTreeMap::is_empty);
        let ending = self.actual.served.keys().filter(ends);
        effects.extend(ending.map(|interface| Effect::Detach { interface: interface.clone() }));
    }

    /// Puts our program in the place of a former one, once all that it is to have is planned.
    fn plan_successions(&self, effects: &mut Vec<Effect>) {
        let former = self.actual.served.iter().filter(|(_, served)| served.former);
        effects.extend(former.map(|(interface, _)| Effect::Attach { interface: interface.clone() }));
    }

    /// Interfaces that rules come in on or came in on, that exist, and on which nothing has failed; with the
    /// datapaths that they are to serve.
    fn demands(&self) -> Vec<(InterfaceName, Link, Vec<Datapath>)> {
        let mut asked: BTreeMap<&InterfaceName, Vec<&Rule>> = BTreeMap::new();
        for entry in self.rules.iter() {
            asked.entry(&entry.rule.input.interface).or_default().push(&entry.rule);
        }
        for interface in self.actual.served.keys() {
            asked.entry(interface).or_default();
        }
        let demand = |(interface, rules): (&InterfaceName, Vec<&Rule>)| {
            let usable = |link: &&Link| link.ethernet && !self.interface_failures.contains_key(interface);
            let link = self.links.get(interface).filter(usable)?;
            let xdp = self.prefers_xdp(interface);
            let mut datapaths: BTreeSet<_> = rules.iter().map(|rule| self.choose(rule, xdp)).collect();
            // What an interface serves it goes on to serve.
            let has_workers = || self.worker_ids().iter().any(|id| id.is_of(interface, Datapath::AfXdp));
            if self.serves(interface, Datapath::AfXdp) && has_workers() {
                datapaths.insert(Datapath::AfXdp);
            }
            if self.serves(interface, Datapath::AfPacket) {
                datapaths.insert(Datapath::AfPacket);
            }
            let by_auto = rules.iter().filter(|rule| rule.datapath == DatapathChoice(None));
            if self.may_attach(interface) {
                datapaths.extend(by_auto.map(|rule| self.choose(rule, true)));
            }
            Some((interface.clone(), link.clone(), datapaths.into_iter().collect()))
        };
        asked.into_iter().filter_map(demand).collect()
    }

    fn plan_interfaces(&mut self, effects: &mut Vec<Effect>) {
        for (interface, link, datapaths) in self.demands() {
            let mut opened = Vec::new();
            for datapath in datapaths {
                if self.serves(&interface, datapath) {
                    continue;
                }
                if datapath == Datapath::AfPacket {
                    let Some(fanout) = self.wanted_fanout(&interface, &link) else { continue };
                    let demand = budget::rings(fanout.sockets, fanout.ring);
                    match self.check_budget(&interface, datapath, &demand) {
                        Ok(()) => opened.push(Effect::OpenFanout { interface: interface.clone(), fanout }),
                        Err(shortfall) => {
                            self.fanout_failures
                                .insert(interface.clone(), format!("{interface}: {shortfall}"));
                        }
                    }
                } else if self.may_attach(&interface) {
                    let attach = Effect::Attach { interface: interface.clone() };
                    if !opened.contains(&attach) {
                        opened.push(attach);
                    }
                }
            }
            if !opened.is_empty() && !self.actual.served.contains_key(&interface) {
                effects.push(Effect::Prepare { interface: interface.clone() });
            }
            effects.extend(opened);
        }
    }

    /// Whether nothing speaks against attaching the XDP program.
    fn may_attach(&self, interface: &InterfaceName) -> bool {
        let refused = self.xdp_refusals.get(interface).is_some_and(|refusal| !refusal.stale);
        !refused && self.xdp_objection(interface).is_none()
    }

    /// The packet sockets of an interface: those that there are, or those that there are to be.
    fn wanted_fanout(&self, interface: &InterfaceName, link: &Link) -> Option<Fanout> {
        if let Some(fanout) = self.actual.served.get(interface).and_then(|served| served.fanout) {
            return Some(fanout);
        }
        if self.fanout_failures.contains_key(interface) {
            return None;
        }
        Some(Fanout { sockets: self.workers_for(link), ring: af_packet::ring(link.mtu) })
    }

    fn workers_for(&self, link: &Link) -> u32 {
        let default = af_xdp::default_workers(link.rx_queues, self.cpus_for(link).len() as u32);
        self.limits.workers.unwrap_or(default)
    }

    fn plan_workers(&mut self, effects: &mut Vec<Effect>) {
        let mut egress_ids = std::mem::take(&mut self.egress_ids);
        for (interface, link, datapaths) in self.demands() {
            let own_sources = self.own_sources(&interface);
            for datapath in datapaths.into_iter().filter(|datapath| *datapath != Datapath::Redirect) {
                let workers = self.wanted_workers(&interface, &link, datapath);
                if !workers.is_empty() {
                    let surplus = self
                        .workers_of(&interface)
                        .filter(|id| id.datapath == datapath && id.index as usize >= workers.len());
                    effects.extend(surplus.map(|id| Effect::StopWorker { id: id.clone() }));
                }
                for (id, spec) in workers {
                    match self.actual.workers.get(&id) {
                        None if !self.mishaps(&id).waiting => {
                            effects.push(Effect::StartWorker { id: id.clone(), spec });
                            let new = Running::default();
                            self.plan_rules(&id, &new, &own_sources, &mut egress_ids, effects);
                        }
                        None => {}
                        Some(running) if running.failed => {}
                        // Other queues, another CPU or another chunk: a worker is made for them.
                        Some(running) if running.spec.as_ref() != Some(&spec) => {
                            effects.push(Effect::StopWorker { id: id.clone() });
                        }
                        Some(running) => {
                            self.plan_rules(&id, running, &own_sources, &mut egress_ids, effects);
                        }
                    }
                }
            }
        }
        self.egress_ids = egress_ids;
    }

    fn wanted_workers(
        &mut self,
        interface: &InterfaceName,
        link: &Link,
        datapath: Datapath,
    ) -> Vec<(WorkerId, WorkerSpec)> {
        let sources: Vec<_> = if datapath == Datapath::AfPacket {
            let fanout = self.wanted_fanout(interface, link);
            (0..fanout.map_or(0, |fanout| fanout.sockets)).map(|_| FrameSource::AfPacket).collect()
        } else {
            let attached = self.serves(interface, datapath) || self.may_attach(interface);
            let Some(chunk_bytes) = af_xdp::chunk_bytes(link.mtu).ok().filter(|_| attached) else {
                return Vec::new();
            };
            let shares = af_xdp::share_queues(link.rx_queues, self.workers_for(link));
            shares.into_iter().map(|queues| FrameSource::AfXdp { queues, chunk_bytes }).collect()
        };
        let cpus = self.cpus_for(link);
        let spec = |(index, source)| {
            let id = WorkerId { interface: interface.clone(), datapath, index };
            let cpu = self.cpu_of(&id, &cpus);
            (id, WorkerSpec { ifindex: link.index, cpu, source })
        };
        (0..).zip(sources).map(spec).collect()
    }

    /// The CPUs for an interface's workers: those near its device, if there are any and nobody chose others.
    fn cpus_for(&self, link: &Link) -> Vec<u32> {
        let all = &self.limits.cpus;
        let near: Vec<_> = all.iter().copied().filter(|cpu| link.near_cpus.contains(cpu)).collect();
        if near.is_empty() || self.limits.cpus_chosen { all.clone() } else { near }
    }

    /// The CPU of a worker: the one of these with the fewest workers so far.
    fn cpu_of(&mut self, id: &WorkerId, cpus: &[u32]) -> Option<u32> {
        if let Some(cpu) = self.cpus.get(id) {
            return Some(*cpu);
        }
        let load = |cpu: &u32| self.cpus.values().filter(|taken| *taken == cpu).count();
        let cpu = cpus.iter().copied().min_by_key(load)?;
        self.cpus.insert(id.clone(), cpu);
        Some(cpu)
    }

    /// Brings a worker's rules and egress sockets to what they should be, then steers frames to it.
    fn plan_rules(
        &self,
        id: &WorkerId,
        running: &Running,
        own_sources: &BTreeMap<RuleSlot, Vec<Ipv4Addr>>,
        egress_ids: &mut EgressIds,
        effects: &mut Vec<Effect>,
    ) {
        let xdp = self.prefers_xdp(&id.interface);
        let its = |rule: &Rule| rule.input.interface == id.interface && self.choose(rule, xdp) == id.datapath;
        let mut slots = BTreeSet::new();
        let mut needed = BTreeMap::new();
        let mut upserts = Vec::new();
        for entry in self.rules.iter().filter(|entry| its(&entry.rule)) {
            slots.insert(entry.slot);
            let mut rule = self.compile(entry, egress_ids, &mut needed);
            rule.own_sources = own_sources.get(&entry.slot).cloned().unwrap_or_default();
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
        let removed = effects.iter().filter_map(|effect| match effect {
            Effect::RemoveRule { id: of, slot } if of == id => Some(*slot),
            _ => None,
        });
        let removed: BTreeSet<_> = removed.collect();
        // A rule that moves to another datapath is still relayed by this one.
        let moving = |slot: &RuleSlot| !slots.contains(slot) && !removed.contains(slot);
        let outputs =
            running.rules.iter().filter(|(slot, _)| moving(slot)).flat_map(|(_, rule)| &rule.outputs);
        let kept: BTreeSet<_> = outputs.filter_map(|output| Some(output.route.ok()?.socket)).collect();
        let unneeded =
            running.egress.iter().filter(|socket| !needed.contains_key(socket) && !kept.contains(socket));
        effects.extend(unneeded.map(|&socket| Effect::CloseEgress { id: id.clone(), socket }));
    }

    /// The worker's form of a rule; the egress sockets that it needs are added to `needed`.
    fn compile(
        &self,
        entry: &Entry,
        egress_ids: &mut EgressIds,
        needed: &mut BTreeMap<u32, EgressKey>,
    ) -> CompiledRule {
        let mut outputs = Vec::with_capacity(entry.rule.outputs.len());
        for (output, slot) in entry.outputs() {
            let route = self.route(output).map_err(|withheld| withheld.reason).map(|(mut route, key)| {
                route.socket = egress_ids.of(&key);
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
                max_run: if output.gso { self.limits.max_run } else { 1 },
            });
        }
        let key = ruleset::key(&entry.rule.input);
        CompiledRule { slot: entry.slot.0, key, own_sources: Vec::new(), outputs }
    }

    /// Where an output's datagrams leave, and through which kind of socket, or what it waits for.
    fn route(&self, output: &Output) -> Result<(Route, EgressKey), Withheld> {
        let (route, key) = self.way(output).map_err(|why| Withheld { why, reason: DropReason::Pending })?;
        let why = match self.host(&route, &key).and_then(|host| self.next_hops.get(&host)) {
            Some(NextHop::NoRoute) => format!("no route to {} by {}", route.destination, key.interface),
            Some(NextHop::Broadcast) => is_broadcast(route.destination, &key.interface),
            Some(NextHop::Neighbour(Neighbour { address, failed: true, .. })) => {
                format!("{address} does not answer ARP on {}", key.interface)
            }
            _ => return Ok((route, key)),
        };
        Err(Withheld { why, reason: DropReason::Unreachable })
    }

    /// As [`Self::route`], of what the kernel sends on by itself: down to the MAC address, which nobody looks up
    /// for it.
    fn redirect_route(&self, output: &Output) -> Result<(Route, EgressKey, [u8; 6]), Withheld> {
        let (route, key) = self.route(output)?;
        if !key.unicast {
            return Ok((route, key, multicast_mac(output.destination)));
        }
        let address = match self.host(&route, &key).and_then(|host| self.next_hops.get(&host)) {
            Some(NextHop::Neighbour(Neighbour { mac: Some(mac), .. })) => return Ok((route, key, *mac)),
            Some(NextHop::Neighbour(Neighbour { address, .. })) => *address,
            _ => route.destination,
        };
        let yet = || format!("{address} has no neighbour yet on {}", key.interface);
        let why = self.no_neighbour(output).unwrap_or_else(yet);
        Err(Withheld { why, reason: DropReason::Unreachable })
    }

    /// The host that a route leads to, if neighbours are looked for there.
    fn host(&self, route: &Route, key: &EgressKey) -> Option<Host> {
        let arp = key.unicast && self.links.get(&key.interface).is_some_and(|link| link.arp);
        let Route { source, destination: address, .. } = *route;
        arp.then_some(Host { interface: key.index, source, address })
    }

    /// The hosts that outputs send to from what there is of this host: where they are found is to be looked up.
    pub fn hosts(&self) -> BTreeSet<Host> {
        let outputs = self.rules.iter().flat_map(|entry| &entry.rule.outputs);
        let unicast = outputs.filter(|output| !output.destination.is_multicast());
        unicast
            .filter_map(|output| self.way(output).ok().and_then(|(route, key)| self.host(&route, &key)))
            .collect()
    }

    /// The way out of this host, wherever it leads.
    fn way(&self, output: &Output) -> Result<(Route, EgressKey), String> {
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

    /// Sets the flows of some action. A flow that is relayed moves to another datapath only when workers
    /// relay there.
    fn plan_flows(&self, wanted: &Flows, action: fn(u32) -> bool, effects: &mut Vec<Effect>) {
        for (interface, flows) in wanted {
            let there = |key: &FlowKey4| self.actual.flows.get(interface).and_then(|flows| flows.get(key));
            for (&key, &value) in flows.iter().filter(|(_, value)| action(value.action)) {
                let former = there(&key);
                let moves = former
                    .is_some_and(|former| relays(former.action) && former.action != value.action)
                    && relays(value.action);
                let ready = || self.all_relay(interface, value.action, RuleSlot(value.rule));
                if former != Some(&value) && (!moves || ready()) {
                    effects.push(Effect::SetFlow { interface: interface.clone(), key, value });
                }
            }
        }
    }

    /// Whether every worker that gets flows of this action relays a rule.
    fn all_relay(&self, interface: &InterfaceName, action: u32, slot: RuleSlot) -> bool {
        if action == action::REDIRECT {
            return self.actual.outputs.get(interface).is_some_and(|outputs| outputs.contains_key(&slot));
        }
        let its = |id: &&WorkerId| id.interface == *interface && relaying_action(id.datapath) == action;
        let waits = self.mishaps.iter().any(|(id, mishaps)| its(&id) && mishaps.waiting);
        let relays = |id: &WorkerId| {
            let running = &self.actual.workers[id];
            running.steered && !running.failed && running.rules.contains_key(&slot)
        };
        let mut workers = self.actual.workers.keys().filter(its).peekable();
        workers.peek().is_some() && !waits && workers.all(relays)
    }

    /// Takes note of what has been done.
    pub fn done(&mut self, effect: &Effect) {
        let actual = &mut self.actual;
        match effect {
            Effect::Prepare { interface } => {
                if let Some(link) = self.links.get(interface) {
                    let served = Served { index: link.index, xdp: false, former: false, fanout: None };
                    actual.served.insert(interface.clone(), served);
                }
            }
            Effect::Attach { interface } => {
                self.xdp_refusals.remove(interface);
                if let Some(served) = actual.served.get_mut(interface) {
                    (served.xdp, served.former) = (true, false);
                }
            }
            Effect::OpenFanout { interface, fanout } => {
                if let Some(served) = actual.served.get_mut(interface) {
                    served.fanout = Some(*fanout);
                }
            }
            Effect::Detach { interface } => {
                actual.served.remove(interface);
                actual.flows.remove(interface);
                actual.outputs.remove(interface);
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
            Effect::SetOutputs { interface, rules } => {
                actual.outputs.entry(interface.clone()).or_default().extend(rules.iter().cloned());
            }
            Effect::DropOutputs { interface, rules } => {
                actual.outputs.entry(interface.clone()).or_default().retain(|slot, _| !rules.contains(slot));
            }
            Effect::SetFlow { interface, key, value } => {
                let former = actual.flows.entry(interface.clone()).or_default().insert(*key, *value);
                actual.barrier_due |= former.is_some_and(|former| former.action != value.action);
            }
            Effect::DeleteFlow { interface, key } => {
                actual.flows.entry(interface.clone()).or_default().remove(key);
                actual.barrier_due = true;
            }
            Effect::Join(joined) => {
                self.join_refusals.remove(joined);
                actual.memberships.insert(*joined);
            }
            Effect::Leave(joined) => {
                actual.memberships.remove(joined);
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
            (Effect::Prepare { interface }, Failure::Refused(why)) => {
                self.interface_failures.insert(interface.clone(), why);
            }
            (Effect::Attach { interface }, Failure::Refused(why)) => {
                self.xdp_refusals.insert(interface.clone(), XdpRefusal { why, stale: false });
                if let Some(served) = self.actual.served.get_mut(interface) {
                    (served.xdp, served.former) = (false, false);
                }
            }
            (Effect::OpenFanout { interface, .. }, Failure::Refused(why)) => {
                self.fanout_failures.insert(interface.clone(), why);
            }
            (Effect::SetOutputs { interface, .. }, Failure::Refused(why)) => {
                self.output_failures.insert(interface.clone(), why);
            }
            (Effect::SetFlow { interface, key, .. }, Failure::Refused(why)) => {
                self.flow_failures.entry(interface.clone()).or_default().insert(*key, why);
            }
            (Effect::Join(joined), Failure::Refused(why)) => {
                self.join_refusals.insert(*joined, JoinRefusal { why, stale: false });
            }
            (Effect::OpenEgress { key, .. }, Failure::Refused(why)) => {
                self.egress_failures.insert(key.clone(), why);
            }
            // What cannot be taken back is gone with its interface or its process.
            (undone, Failure::Refused(_)) => self.done(undone),
        }
    }

    /// Why an interface cannot relay by a datapath now, if it cannot.
    fn interface_problem(&self, interface: &InterfaceName, datapath: Datapath) -> Option<(Problem, String)> {
        let Some(link) = self.links.get(interface) else {
            return Some((Problem::Waits, format!("interface {interface} does not exist")));
        };
        if !link.ethernet {
            let why = format!(
                "the frames of {interface} ({}) have no Ethernet header: relay from another interface",
                link.kind
            );
            return Some((Problem::Failed, why));
        }
        let failed = self.interface_failures.get(interface).cloned().or_else(|| match datapath {
            Datapath::AfPacket => self.fanout_failures.get(interface).cloned(),
            _ => self.no_xdp(interface).map(|why| format!("{why}; --datapath auto takes af-packet there")),
        });
        if let Some(why) = failed {
            return Some((Problem::Failed, why));
        }
        if !link.up {
            return Some((Problem::Waits, format!("interface {interface} is down")));
        }
        if datapath == Datapath::Redirect {
            let attached = self.serves(interface, datapath);
            return (!attached)
                .then(|| (Problem::Waits, format!("no program is attached to {interface} yet")));
        }
        let its = |id: &&WorkerId| id.interface == *interface && id.datapath == datapath;
        let restarting = self.mishaps.iter().find(|(id, mishaps)| its(id) && mishaps.waiting);
        let restarting = restarting.map(|(id, mishaps)| {
            let why = mishaps.last_exit.clone().unwrap_or_default();
            (Problem::Waits, format!("worker {id} is being restarted: {why}"))
        });
        restarting.or_else(|| {
            let relays = |id: &WorkerId| self.actual.workers[id].steered && !self.actual.workers[id].failed;
            let waits = !self.actual.workers.keys().filter(its).any(relays);
            waits.then(|| (Problem::Waits, format!("no worker relays from {interface} yet")))
        })
    }

    /// Why a rule cannot relay now, if it cannot.
    pub fn rule_problem(&self, entry: &Entry) -> Option<(Problem, String)> {
        let failure = || self.join_refusal(entry).or_else(|| self.flow_failure(entry));
        let datapath = self.datapath_of(&entry.rule);
        let objection = || {
            let why = self.redirect_objection(&entry.rule).filter(|_| datapath == Datapath::Redirect)?;
            Some((Problem::Failed, cannot_redirect(&why)))
        };
        self.interface_problem(&entry.rule.input.interface, datapath)
            .or_else(objection)
            .or_else(|| failure().map(|why| (Problem::Failed, why.clone())))
    }

    fn join_refusal(&self, entry: &Entry) -> Option<&String> {
        if self.join_refusals.is_empty() {
            return None;
        }
        let xdp = self.prefers_xdp(&entry.rule.input.interface);
        self.join_refusals.get(&self.membership(entry, xdp)?).map(|refusal| &refusal.why)
    }

    fn flow_failure(&self, entry: &Entry) -> Option<&String> {
        let interface = &entry.rule.input.interface;
        let failures = self.flow_failures.get(interface)?;
        let flows = self.all_flows(interface);
        let its = |key: &FlowKey4| flows.get(key).is_some_and(|flow| flow.rule == entry.slot.0);
        failures.iter().find(|(key, _)| its(key)).map(|(_, why)| why)
    }

    /// What an output waits for, if it waits, on the datapath of its rule.
    pub fn output_pending(&self, output: &Output, datapath: Datapath) -> Pending {
        let withheld = match datapath {
            Datapath::Redirect => self.redirect_route(output).err(),
            _ => self.route(output).err(),
        };
        withheld.map(|withheld| withheld.why)
    }

    /// Under which reason an output gets nothing of what the kernel sends on by itself, if it gets nothing now.
    pub fn redirect_withheld(&self, output: &Output) -> Option<DropReason> {
        self.redirect_route(output).err().map(|withheld| withheld.reason)
    }
}

/// Whether a flow's datagrams are relayed.
fn relays(flow_action: u32) -> bool {
    !bars(flow_action)
}

/// Whether a flow bars a loop.
fn bars(flow_action: u32) -> bool {
    flow_action == action::LOOP
}

/// The action by which a datapath's workers get a flow.
fn relaying_action(datapath: Datapath) -> u32 {
    match datapath {
        Datapath::AfPacket => action::PASS,
        Datapath::AfXdp => action::STEER,
        Datapath::Redirect => action::REDIRECT,
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
