use std::fmt::Write as _;

use proptest::{collection::vec, prelude::*};

use super::*;
use crate::rule::{DatapathChoice, OutputSlot};

const LONG: Duration = Duration::from_mins(1);
const SHORT: Duration = Duration::from_secs(1);

fn interface(name: &str) -> InterfaceName {
    name.parse().unwrap()
}

fn worker(name: &str, index: u32) -> WorkerId {
    WorkerId { interface: interface(name), datapath: Datapath::AfXdp, index }
}

fn packet_worker(name: &str, index: u32) -> WorkerId {
    WorkerId { datapath: Datapath::AfPacket, ..worker(name, index) }
}

fn limits(max_rules: u32, workers: Option<u32>, cpus: &[u32]) -> Limits {
    let host = HostLimits { locked_bytes: None, memory_bytes: 1 << 32, descriptors: 1024 };
    let cpus = cpus.to_vec();
    Limits {
        max_rules,
        workers,
        cpus,
        cpus_chosen: false,
        source_port: 4000,
        frames: 8192,
        max_run: 64,
        host,
        no_bpf: None,
    }
}

/// `ethN` with index `10 + N` and the address 10.0.N.1, one queue.
fn link(n: u8) -> (InterfaceName, Link) {
    let link = Link {
        index: IfIndex(10 + u32::from(n)),
        up: true,
        mtu: 1500,
        mac: Some([2, 0, 0, 0, 0, n]),
        ethernet: true,
        arp: true,
        addresses: vec![Ipv4Addr::new(10, 0, n, 1)],
        kind: "veth".to_owned(),
        rx_queues: 1,
        near_cpus: Vec::new(),
        xdp_program: None,
    };
    (interface(&format!("eth{n}")), link)
}

fn links(numbers: impl IntoIterator<Item = u8>) -> Links {
    numbers.into_iter().map(link).collect()
}

fn output(text: &str) -> Output {
    text.parse().unwrap()
}

fn rule(name: &str, input: &str, outputs: &[&str]) -> Rule {
    Rule {
        name: name.parse().unwrap(),
        input: input.parse().unwrap(),
        outputs: outputs.iter().map(|text| output(text)).collect(),
        datapath: DatapathChoice::default(),
        merge: false,
        link_local: false,
    }
}

fn cam() -> Rule {
    rule("cam", "239.1.1.1:5000@eth0", &["239.2.2.2:6000@eth1"])
}

/// An effect as a line: verb, place, what.
fn line(effect: &Effect) -> String {
    match effect {
        Effect::Prepare { interface } => format!("prepare {interface}"),
        Effect::Attach { interface } => format!("attach {interface}"),
        Effect::OpenFanout { interface, fanout } => format!("fanout {interface} x{}", fanout.sockets),
        Effect::Detach { interface } => format!("detach {interface}"),
        Effect::StartWorker { id, .. } => format!("start {id}"),
        Effect::Steer { id } => format!("steer {id}"),
        Effect::StopWorker { id } => format!("stop {id}"),
        Effect::RestartAfter { id, delay } => format!("restart {id} after {delay:?}"),
        Effect::OpenEgress { id, socket, key } => {
            let loop_back = if key.loop_back { " loop" } else { "" };
            format!("open {id} #{socket} {}%{}:{}{loop_back}", key.interface, key.index.0, key.source_port)
        }
        Effect::CloseEgress { id, socket } => format!("close {id} #{socket}"),
        Effect::UpsertRule { id, rule } => {
            let mut text = format!("upsert {id} rule {}", rule.slot);
            for output in &rule.outputs {
                let _ = match &output.route {
                    Ok(route) => write!(
                        text,
                        " {}>{}:{} by #{} from {}",
                        output.slot, route.destination, route.port, route.socket, route.source
                    ),
                    Err(reason) => write!(text, " {}>{}", output.slot, reason.name()),
                };
            }
            text
        }
        Effect::RemoveRule { id, slot } => format!("remove {id} rule {}", slot.0),
        Effect::SetOutputs { interface, rules } => {
            let rule = |(slot, outputs): &(RuleSlot, Vec<RedirectOutput>)| {
                let outputs: Vec<_> =
                    outputs.iter().map(|output| format!(" {}%{}", output.slot.0, output.egress.0)).collect();
                format!(" rule {}{}", slot.0, outputs.concat())
            };
            format!("outputs {interface}{}", rules.iter().map(rule).collect::<String>())
        }
        Effect::DropOutputs { interface, rules } => format!("drop outputs {interface} {rules:?}"),
        Effect::SetFlow { interface, key, value } => {
            let action = ["steer", "loop", "pass", "redirect"][value.action as usize - 1];
            format!("set {interface} {} {action} rule {}", flow(key), value.rule)
        }
        Effect::DeleteFlow { interface, key } => format!("delete {interface} {}", flow(key)),
        Effect::Barrier => "barrier".to_owned(),
        Effect::Join(joined) => format!("join {}", member(joined)),
        Effect::Leave(joined) => format!("leave {}", member(joined)),
    }
}

fn flow(key: &FlowKey4) -> String {
    let source = Ipv4Addr::from(key.source);
    let source = if source.is_unspecified() { "*".to_owned() } else { source.to_string() };
    format!("{source},{}:{}", Ipv4Addr::from(key.group), u16::from_be_bytes(key.port))
}

fn member(Joined { membership, outlives }: &Joined) -> String {
    let source = membership.source.map(|source| format!("{source},")).unwrap_or_default();
    let life = if *outlives { " to outlive" } else { "" };
    format!("{source}{}%{}{life}", membership.group, membership.interface.0)
}

/// A worker as it is, whatever the supervisor thinks.
#[derive(Clone, Debug, Default)]
struct Process {
    spec: Option<WorkerSpec>,
    rules: BTreeMap<u32, CompiledRule>,
    sockets: BTreeMap<u32, EgressKey>,
    steered: bool,
    /// Killed, because it did not obey.
    dead: bool,
}

/// What an interface has in the kernel.
#[derive(Clone, Debug)]
struct Kernel {
    index: IfIndex,
    xdp: bool,
    fanout: Option<Fanout>,
}

impl Kernel {
    fn serves(&self, datapath: Datapath) -> bool {
        if datapath == Datapath::AfPacket { self.fanout.is_some() } else { self.xdp }
    }
}

/// Kernel and workers. What no sound supervisor asks for panics.
#[derive(Clone, Debug, Default)]
struct World {
    links: Links,
    served: BTreeMap<InterfaceName, Kernel>,
    flows: BTreeMap<InterfaceName, BTreeMap<FlowKey4, FlowValue>>,
    /// What the kernel sends on by itself.
    outputs: BTreeMap<(InterfaceName, u32), Vec<RedirectOutput>>,
    memberships: BTreeSet<Joined>,
    processes: BTreeMap<WorkerId, Process>,
    /// Flows were deleted that a program may still act on.
    dirty: bool,
    /// The program that is attached is a former one.
    succeeding: bool,
}

impl World {
    #[expect(clippy::too_many_lines, reason = "an arm an effect")]
    fn execute(&mut self, effect: &Effect) {
        match effect {
            Effect::Prepare { interface } => {
                let index = self.links.get(interface).expect("prepared what is not there").index;
                let kernel = Kernel { index, xdp: false, fanout: None };
                assert!(self.served.insert(interface.clone(), kernel).is_none(), "prepared twice");
            }
            Effect::Attach { interface } => {
                let kernel = self.served.get_mut(interface).expect("attached before it was prepared");
                assert!(!kernel.xdp || std::mem::take(&mut self.succeeding), "attached twice");
                kernel.xdp = true;
            }
            Effect::OpenFanout { interface, fanout } => {
                let kernel = self.served.get_mut(interface).expect("opened before it was prepared");
                assert_eq!(kernel.fanout.replace(*fanout), None, "opened twice");
                let flows = self.flows.get(interface).into_iter().flatten();
                assert!(flows.into_iter().all(|(_, flow)| flow.action != action::PASS), "joined under load");
            }
            Effect::Detach { interface } => {
                assert!(!self.processes.keys().any(|id| id.interface == *interface), "workers outlive it");
                self.served.remove(interface).expect("detached what is not served");
                self.flows.remove(interface);
                self.outputs.retain(|(name, _), _| name != interface);
            }
            Effect::StartWorker { id, spec } => {
                let kernel =
                    self.served.get(&id.interface).expect("a worker of an interface that is not served");
                assert!(kernel.serves(id.datapath), "a worker without a program or a socket");
                let process = Process { spec: Some(spec.clone()), ..Process::default() };
                assert!(self.processes.insert(id.clone(), process).is_none(), "{id} started twice");
            }
            Effect::Steer { id } => self.process(id).steered = true,
            Effect::StopWorker { id } => {
                self.processes.remove(id).expect("stopped what does not run");
            }
            Effect::OpenEgress { id, socket, key } => {
                let index = self.links.get(&key.interface).map(|link| link.index);
                assert_eq!(index, Some(key.index), "a socket for an interface that is not there");
                assert!(self.process(id).sockets.insert(*socket, key.clone()).is_none(), "opened twice");
            }
            Effect::CloseEgress { id, socket } => {
                let process = self.process(id);
                process.sockets.remove(socket).expect("closed what is not open");
                assert!(!needed_sockets(&process.rules).contains(socket), "closed what a rule needs");
            }
            Effect::UpsertRule { id, rule } => {
                let process = self.process(id);
                process.rules.insert(rule.slot, rule.clone());
                let open: BTreeSet<_> = process.sockets.keys().copied().collect();
                assert!(needed_sockets(&process.rules).is_subset(&open), "a rule without its socket");
                let keys: BTreeSet<_> = process.rules.values().map(|rule| rule.key).collect();
                assert_eq!(keys.len(), process.rules.len(), "two rules of one flow");
            }
            Effect::RemoveRule { id, slot } => {
                assert!(!self.dirty, "removed before the barrier");
                let mut flows = self.flows.get(&id.interface).into_iter().flatten();
                let fed =
                    flows.any(|(_, flow)| (flow.rule, flow.action) == (slot.0, relaying_action(id.datapath)));
                assert!(!fed, "its flow stands");
                self.process(id).rules.remove(&slot.0).expect("removed what is not there");
            }
            Effect::SetOutputs { interface, rules } => {
                assert!(self.served.get(interface).is_some_and(|kernel| kernel.xdp), "no program");
                for (slot, outputs) in rules {
                    self.outputs.insert((interface.clone(), slot.0), outputs.clone());
                }
            }
            Effect::DropOutputs { interface, rules } => {
                assert!(!self.dirty, "dropped before the barrier");
                for slot in rules {
                    let mut flows = self.flows.get(interface).into_iter().flatten();
                    let fed = flows.any(|(_, flow)| (flow.rule, flow.action) == (slot.0, action::REDIRECT));
                    assert!(!fed, "its flow stands");
                    self.outputs.remove(&(interface.clone(), slot.0)).expect("dropped what is not there");
                }
            }
            Effect::SetFlow { interface, key, value } => {
                let kernel = self.served.get(interface).expect("a flow without a program");
                let served = [Datapath::AfXdp, Datapath::AfPacket, Datapath::Redirect]
                    .iter()
                    .any(|datapath| relaying_action(*datapath) == value.action && kernel.serves(*datapath));
                assert!(served || bars(value.action), "a flow that nobody takes");
                let held = |(id, process): (&WorkerId, &Process)| {
                    let holds = process.dead || process.rules.contains_key(&value.rule);
                    let its = id.interface == *interface && relaying_action(id.datapath) == value.action;
                    !its || holds
                };
                assert!(self.processes.iter().all(held), "given to a worker without the rule");
                let given = self.outputs.contains_key(&(interface.clone(), value.rule));
                assert!(given || value.action != action::REDIRECT, "sent on to nowhere");
                let former = self.flows.entry(interface.clone()).or_default().insert(*key, *value);
                self.dirty |= former.is_some_and(|former| former.action != value.action);
            }
            Effect::DeleteFlow { interface, key } => {
                self.flows.entry(interface.clone()).or_default().remove(key);
                self.dirty = true;
            }
            Effect::Barrier => self.dirty = false,
            Effect::Join(joined) => {
                assert!(self.memberships.insert(*joined), "joined twice");
            }
            Effect::Leave(joined) => {
                assert!(self.memberships.remove(joined), "left what is not joined");
            }
            Effect::RestartAfter { .. } => panic!("planned, though only an event brings it"),
        }
    }

    fn process(&mut self, id: &WorkerId) -> &mut Process {
        self.processes.get_mut(id).expect("no such worker")
    }
}

fn needed_sockets(rules: &BTreeMap<u32, CompiledRule>) -> BTreeSet<u32> {
    let outputs = rules.values().flat_map(|rule| &rule.outputs);
    outputs.filter_map(|output| Some(output.route.ok()?.socket)).collect()
}

/// State and world together, as the supervisor's loop does it.
struct Supervisor {
    state: State,
    world: World,
    /// Effects whose line starts with one of these fail.
    failing: Vec<String>,
}

impl Supervisor {
    fn new() -> Self {
        Self::with(limits(8, None, &[0]))
    }

    fn with(limits: Limits) -> Self {
        Self { state: State::new(limits), world: World::default(), failing: Vec::new() }
    }

    /// With `eth0` to `eth3` and these rules, settled.
    fn serving(rules: &[Rule]) -> Self {
        let mut supervisor = Self::new();
        supervisor.links(links(0..4));
        for rule in rules {
            supervisor.add(rule.clone());
        }
        supervisor
    }

    fn execute(&mut self, effect: &Effect) -> Result<(), Failure> {
        let text = line(effect);
        if !self.failing.iter().any(|prefix| text.starts_with(prefix)) {
            self.world.execute(effect);
            return Ok(());
        }
        let why = format!("cannot {text}");
        match effect {
            Effect::StartWorker { id, spec } => {
                let process = Process { spec: Some(spec.clone()), dead: true, ..Process::default() };
                self.world.processes.insert(id.clone(), process);
                Err(Failure::Worker { id: id.clone(), why })
            }
            Effect::Steer { id } | Effect::UpsertRule { id, .. } | Effect::RemoveRule { id, .. } => {
                self.world.process(id).dead = true;
                Err(Failure::Worker { id: id.clone(), why })
            }
            // Gone all the same.
            Effect::DeleteFlow { .. } | Effect::Leave(_) | Effect::Detach { .. } => {
                self.world.execute(effect);
                Err(Failure::Refused(why))
            }
            _ => Err(Failure::Refused(why)),
        }
    }

    /// Does what is planned until nothing is; answers what was tried.
    fn settle(&mut self) -> Vec<String> {
        let mut tried = Vec::new();
        loop {
            let plan = self.state.plan();
            if plan.is_empty() {
                return tried;
            }
            for effect in plan {
                assert!(tried.len() < 500, "it never settles: {:#?}", &tried[480..]);
                match self.execute(&effect) {
                    Ok(()) => {
                        tried.push(line(&effect));
                        self.state.done(&effect);
                    }
                    Err(failure) => {
                        tried.push(format!("! {}", line(&effect)));
                        self.state.failed(&effect, failure);
                        if !matches!(effect, Effect::Join(_)) {
                            break;
                        }
                    }
                }
            }
        }
    }

    fn add(&mut self, rule: Rule) -> Vec<String> {
        self.state.add(rule, Origin::Cli).unwrap();
        self.settle()
    }

    fn remove(&mut self, name: &str) -> Vec<String> {
        self.state.remove(name).unwrap();
        self.settle()
    }

    fn amend(&mut self, name: &str, add: &[&str], delete: &[&str]) -> Vec<String> {
        let outputs = |texts: &[&str]| texts.iter().map(|text| output(text)).collect();
        let amendment = Amendment { add: outputs(add), delete: outputs(delete), ..Amendment::default() };
        self.state.amend(name, amendment).unwrap();
        self.settle()
    }

    fn links(&mut self, links: Links) -> Vec<String> {
        self.world.links = links.clone();
        self.take(Event::Links(links))
    }

    /// The same interfaces, one of them changed.
    fn change(&mut self, name: &str, change: impl FnOnce(&mut Link)) -> Vec<String> {
        let mut links = self.world.links.clone();
        change(links.get_mut(&interface(name)).unwrap());
        self.links(links)
    }

    fn take(&mut self, event: Event) -> Vec<String> {
        let mut done: Vec<_> = self.state.apply(event).iter().map(line).collect();
        done.extend(self.settle());
        done
    }

    /// A worker's process ends.
    fn exit(&mut self, id: &WorkerId, lived: Duration) -> Vec<String> {
        self.world.processes.remove(id);
        self.take(Event::WorkerExited { id: id.clone(), why: "killed".to_owned(), lived })
    }

    fn restart(&mut self, id: &WorkerId) -> Vec<String> {
        self.take(Event::RestartDue { id: id.clone() })
    }

    /// What an output waits for on the datapaths of workers.
    fn pending(&self, output: &Output) -> Pending {
        self.state.output_pending(output, Datapath::AfXdp)
    }

    fn problem(&self, rule: &str) -> Option<(Problem, String)> {
        self.state.rule_problem(self.state.rules().get(rule).unwrap())
    }

    /// The world is as the rules and the interfaces want it. Asks the rule set and the interfaces only.
    fn check_settled(&mut self) {
        assert_eq!(self.state.plan(), []);
        let wanted: Vec<_> = self.state.rules().iter().cloned().collect();
        let there = |entry: &&Entry| self.world.links.contains_key(&entry.rule.input.interface);
        let served: Vec<_> = wanted.iter().filter(there).collect();
        for (name, kernel) in &self.world.served {
            assert_eq!(self.world.links.get(name).map(|link| link.index), Some(kernel.index), "{name}");
        }
        let mut memberships = BTreeSet::new();
        for entry in &served {
            let input = &entry.rule.input;
            let link = &self.world.links[&input.interface];
            let kernel = &self.world.served[&input.interface];
            assert!(kernel.serves(self.datapath(&entry.rule)), "{}", input.interface);
            if link.up {
                let (interface, group, source) = (link.index, input.group, input.source);
                let outlives = self.datapath(&entry.rule) == Datapath::Redirect;
                memberships.insert(Joined { membership: Membership { interface, group, source }, outlives });
            }
        }
        assert_eq!(self.world.memberships, memberships);
        for (name, link) in &self.world.links {
            let rules: Vec<_> = served.iter().filter(|entry| entry.rule.input.interface == *name).collect();
            self.check_flows(name, &rules);
            self.check_outputs(name, &rules);
            if let Some(kernel) = self.world.served.get(name) {
                self.check_workers(name, link, kernel, &rules);
            }
        }
        assert!(!self.world.dirty);
        let named = self.world.flows.iter().filter(|(_, flows)| !flows.is_empty()).map(|(name, _)| name);
        for name in named.chain(self.world.processes.keys().map(|id| &id.interface)) {
            assert!(self.world.served.contains_key(name), "{name} has no program");
        }
    }

    /// The datapath of a rule, as the kernel has it.
    fn datapath(&self, rule: &Rule) -> Datapath {
        let xdp = self.world.served.get(&rule.input.interface).is_some_and(|kernel| kernel.xdp);
        let by_kernel = || self.state.auto_redirect_objection(rule).is_none();
        rule.datapath.0.unwrap_or_else(|| match xdp {
            true if by_kernel() => Datapath::Redirect,
            true => Datapath::AfXdp,
            false => Datapath::AfPacket,
        })
    }

    /// The kernel has the outputs of the rules that it serves, those of them that can send, and no others.
    fn check_outputs(&self, name: &InterfaceName, rules: &[&&Entry]) {
        let its = self.world.outputs.iter().filter(|((interface, _), _)| interface == name);
        let outputs: BTreeMap<_, Vec<_>> = its
            .map(|((_, slot), outputs)| {
                (*slot, outputs.iter().map(|output| (output.slot, output.egress)).collect())
            })
            .collect();
        let by_kernel = rules.iter().filter(|entry| self.datapath(&entry.rule) == Datapath::Redirect);
        let expected: BTreeMap<_, Vec<_>> = by_kernel
            .map(|entry| {
                let sends = |output: &Output| {
                    let known = output.destination.is_multicast() || self.mac(output).is_some();
                    self.source(output).is_some() && known && !output.loop_back
                };
                let outputs = entry.outputs().filter(|(output, _)| sends(output));
                let index = |output: &Output| self.world.links[&output.interface].index;
                (entry.slot.0, outputs.map(|(output, slot)| (slot, index(output))).collect())
            })
            .collect();
        assert_eq!(outputs, expected, "{name}");
    }

    fn check_flows(&self, name: &InterfaceName, rules: &[&&Entry]) {
        let none = BTreeMap::new();
        let flows = self.world.flows.get(name).unwrap_or(&none);
        let mut expected: BTreeMap<_, _> = rules
            .iter()
            .map(|entry| {
                let action = relaying_action(self.datapath(&entry.rule));
                (ruleset::key(&entry.rule.input), (entry.slot.0, action))
            })
            .collect();
        for output in self.state.rules().iter().flat_map(|entry| &entry.rule.outputs) {
            let Some(source) = self.source(output) else { continue };
            let fed = |wanted: Option<Ipv4Addr>| {
                rules.iter().find(|entry| {
                    let input = &entry.rule.input;
                    (input.group, input.port, input.source) == (output.destination, output.port, wanted)
                })
            };
            if let Some(entry) = fed(Some(source)).or_else(|| fed(None)) {
                let port = output.port.to_be_bytes();
                let key = FlowKey4::source_group(source.octets(), output.destination.octets(), port);
                expected.insert(key, (entry.slot.0, action::LOOP));
            }
        }
        let flows: BTreeMap<_, _> =
            flows.iter().map(|(key, value)| (*key, (value.rule, value.action))).collect();
        assert_eq!(flows, expected, "{name}");
    }

    fn check_workers(&self, name: &InterfaceName, link: &Link, kernel: &Kernel, rules: &[&&Entry]) {
        let mut queues: Vec<u32> = Vec::new();
        let mut packet_workers = 0;
        for (id, process) in self.world.processes.iter().filter(|(id, _)| id.interface == *name) {
            let spec = process.spec.as_ref().unwrap();
            assert_eq!(spec.ifindex, link.index, "{id}");
            assert!(process.steered, "{id}");
            queues.extend(spec.source.queues());
            packet_workers += u32::from(spec.source == FrameSource::AfPacket);
            let rules: Vec<_> =
                rules.iter().filter(|entry| self.datapath(&entry.rule) == id.datapath).collect();
            let slots: Vec<_> = rules.iter().map(|entry| entry.slot.0).collect();
            assert!(slots.iter().collect::<BTreeSet<_>>().into_iter().eq(process.rules.keys()), "{id}");
            for entry in rules {
                self.check_rule(process, entry);
            }
            let open: BTreeSet<_> = process.sockets.keys().copied().collect();
            assert_eq!(open, needed_sockets(&process.rules), "{id}");
        }
        queues.sort_unstable();
        let by_worker =
            !queues.is_empty() || rules.iter().any(|entry| self.datapath(&entry.rule) == Datapath::AfXdp);
        let all = if kernel.xdp && by_worker { link.rx_queues } else { 0 };
        assert!(queues.iter().copied().eq(0..all), "{name}: {queues:?}");
        assert_eq!(packet_workers, kernel.fanout.map_or(0, |fanout| fanout.sockets), "{name}");
    }

    fn check_rule(&self, process: &Process, entry: &Entry) {
        let rule = &process.rules[&entry.slot.0];
        assert_eq!(rule.key, ruleset::key(&entry.rule.input));
        let slots: Vec<_> = rule.outputs.iter().map(|output| OutputSlot(output.slot)).collect();
        assert_eq!(slots, entry.output_slots);
        for (compiled, output) in rule.outputs.iter().zip(&entry.rule.outputs) {
            assert_eq!(compiled.route.ok().map(|route| route.source), self.source(output), "{output}");
            let pending = self.state.output_pending(output, Datapath::AfXdp);
            assert_eq!(pending.is_none(), compiled.route.is_ok(), "{output}");
            let Ok(route) = compiled.route else { continue };
            let link = &self.world.links[&output.interface];
            assert_eq!((route.ifindex, route.mtu), (link.index.0, link.mtu), "{output}");
            assert_eq!((route.destination, route.port), (output.destination, output.port), "{output}");
            let key = &process.sockets[&route.socket];
            assert_eq!((key.index, &key.interface), (link.index, &output.interface), "{output}");
            assert_eq!(key.loop_back, output.loop_back, "{output}");
        }
    }

    /// The source address of an output that can send.
    fn source(&self, output: &Output) -> Option<Ipv4Addr> {
        let source = self.address(output)?;
        let hop = self.hop(output);
        let lost = matches!(
            hop,
            Some(NextHop::NoRoute | NextHop::Broadcast | NextHop::Neighbour(Neighbour { failed: true, .. }))
        );
        (!lost).then_some(source)
    }

    /// The source address of an output whose interface is there.
    fn address(&self, output: &Output) -> Option<Ipv4Addr> {
        let link = self.world.links.get(&output.interface).filter(|link| link.up)?;
        let local = |from: &Ipv4Addr| self.world.links.values().any(|link| link.addresses.contains(from));
        match output.from {
            Some(from) => Some(from.address).filter(local),
            None => link.addresses.first().copied(),
        }
    }

    /// Where the kernel said that an output's host is.
    fn hop(&self, output: &Output) -> Option<&NextHop> {
        let interface = self.world.links.get(&output.interface)?.index;
        let host = Host { interface, source: self.address(output)?, address: output.destination };
        self.state.next_hops().get(&host)
    }

    /// The MAC of an output's neighbour.
    fn mac(&self, output: &Output) -> Option<[u8; 6]> {
        match self.hop(output) {
            Some(NextHop::Neighbour(neighbour)) => neighbour.mac,
            _ => None,
        }
    }

    /// Every interface takes redirected frames, and nothing is in place there.
    fn open_targets(&mut self) -> Vec<String> {
        let all = || (0..4).map(|n| (link(n).0, None)).collect();
        self.take(Event::Targets(Targets { refusals: all(), hooks: all(), ..Targets::default() }))
    }

    /// The hosts of all outputs are found there.
    fn find(&mut self, hop: NextHop) -> Vec<String> {
        let hops = self.state.hosts().into_iter().map(|host| (host, hop)).collect();
        self.take(Event::NextHops(hops))
    }
}

fn did(done: &[String], expected: &[&str]) {
    assert_eq!(done, expected);
}

#[test]
fn the_first_rule_of_an_interface_brings_everything_and_the_flow_last() {
    let mut supervisor = Supervisor::serving(&[]);
    did(
        &supervisor.add(cam()),
        &[
            "prepare eth0",
            "attach eth0",
            "start eth0/xdp0",
            "open eth0/xdp0 #0 eth1%11:4000",
            "upsert eth0/xdp0 rule 0 0>239.2.2.2:6000 by #0 from 10.0.1.1",
            "steer eth0/xdp0",
            "join 239.1.1.1%10",
            "set eth0 *,239.1.1.1:5000 steer rule 0",
        ],
    );
    supervisor.check_settled();
    assert_eq!(supervisor.problem("cam"), None);
    assert!(supervisor.state.serves(&interface("eth0"), Datapath::AfXdp));
    // The very same rule again is nothing to do.
    did(&supervisor.add(cam()), &[]);
}

#[test]
fn the_second_rule_of_an_interface_uses_what_stands() {
    let mut supervisor = Supervisor::serving(&[cam()]);
    did(
        &supervisor.add(rule("mic", "232.1.1.2:5000@eth0,source=192.0.2.7", &["239.2.2.2:7000@eth1"])),
        &[
            "upsert eth0/xdp0 rule 1 1>239.2.2.2:7000 by #0 from 10.0.1.1",
            "join 192.0.2.7,232.1.1.2%10",
            "set eth0 192.0.2.7,232.1.1.2:5000 steer rule 1",
        ],
    );
    // Another egress interface, another port and loopback are sockets of their own.
    did(
        &supervisor.add(rule(
            "all",
            "239.1.1.3:5000@eth0",
            &["239.2.2.3:1@eth2", "239.2.2.3:1@eth1,from=10.0.1.1:53", "239.2.2.4:1@eth1,loop=true"],
        )),
        &[
            "open eth0/xdp0 #1 eth2%12:4000",
            "open eth0/xdp0 #2 eth1%11:53",
            "open eth0/xdp0 #3 eth1%11:4000 loop",
            "upsert eth0/xdp0 rule 2 2>239.2.2.3:1 by #1 from 10.0.2.1 3>239.2.2.3:1 by #2 from 10.0.1.1 \
             4>239.2.2.4:1 by #3 from 10.0.1.1",
            "join 239.1.1.3%10",
            "set eth0 *,239.1.1.3:5000 steer rule 2",
        ],
    );
    supervisor.check_settled();
}

#[test]
fn loops_are_barred_before_anything_is_steered() {
    let mut supervisor = Supervisor::serving(&[cam()]);
    did(
        &supervisor.add(rule("back", "239.2.2.2:6000@eth1", &["239.1.1.1:5000@eth0"])),
        &[
            "prepare eth1",
            "attach eth1",
            "set eth0 10.0.0.1,239.1.1.1:5000 loop rule 0",
            "start eth1/xdp0",
            "open eth1/xdp0 #1 eth0%10:4000",
            "upsert eth1/xdp0 rule 1 1>239.1.1.1:5000 by #1 from 10.0.0.1",
            "steer eth1/xdp0",
            "set eth1 10.0.1.1,239.2.2.2:6000 loop rule 1",
            "join 239.2.2.2%11",
            "set eth1 *,239.2.2.2:6000 steer rule 1",
        ],
    );
    supervisor.check_settled();
    // And they stay barred until nothing can be sent.
    did(
        &supervisor.remove("back"),
        &[
            "delete eth1 *,239.2.2.2:6000",
            "barrier",
            "remove eth1/xdp0 rule 1",
            "leave 239.2.2.2%11",
            "close eth1/xdp0 #1",
            "delete eth0 10.0.0.1,239.1.1.1:5000",
            "delete eth1 10.0.1.1,239.2.2.2:6000",
            "barrier",
        ],
    );
    supervisor.check_settled();
}

#[test]
fn a_rule_goes_flow_first_and_its_sockets_last() {
    let mic = rule("mic", "239.1.1.2:5000@eth0", &["239.2.2.2:7000@eth2", "239.2.2.3:7000@eth1"]);
    let mut supervisor = Supervisor::serving(&[cam(), mic]);
    did(
        &supervisor.remove("mic"),
        &[
            "delete eth0 *,239.1.1.2:5000",
            "barrier",
            "remove eth0/xdp0 rule 1",
            "leave 239.1.1.2%10",
            "close eth0/xdp0 #1",
        ],
    );
    supervisor.check_settled();
    // Program and worker of the last rule stay.
    did(
        &supervisor.remove("cam"),
        &[
            "delete eth0 *,239.1.1.1:5000",
            "barrier",
            "remove eth0/xdp0 rule 0",
            "leave 239.1.1.1%10",
            "close eth0/xdp0 #0",
        ],
    );
    supervisor.check_settled();
    assert!(supervisor.state.serves(&interface("eth0"), Datapath::AfXdp));
    // So that the next one finds them.
    did(
        &supervisor.add(cam()),
        &[
            "open eth0/xdp0 #0 eth1%11:4000",
            "upsert eth0/xdp0 rule 0 0>239.2.2.2:6000 by #0 from 10.0.1.1",
            "join 239.1.1.1%10",
            "set eth0 *,239.1.1.1:5000 steer rule 0",
        ],
    );
}

#[test]
fn an_amended_rule_is_replaced_without_touching_its_flow() {
    let mut supervisor = Supervisor::serving(&[cam()]);
    did(
        &supervisor.amend("cam", &["239.2.2.3:6000@eth2"], &[]),
        &[
            "open eth0/xdp0 #1 eth2%12:4000",
            "upsert eth0/xdp0 rule 0 0>239.2.2.2:6000 by #0 from 10.0.1.1 1>239.2.2.3:6000 by #1 from 10.0.2.1",
        ],
    );
    did(
        &supervisor.amend("cam", &["239.2.2.3:6000@eth2,ttl=3"], &["239.2.2.2:6000@eth1"]),
        &["upsert eth0/xdp0 rule 0 1>239.2.2.3:6000 by #1 from 10.0.2.1", "close eth0/xdp0 #0"],
    );
    did(
        &supervisor.amend("cam", &["239.2.2.3:6000@eth2,loop=true"], &[]),
        &[
            "open eth0/xdp0 #2 eth2%12:4000 loop",
            "upsert eth0/xdp0 rule 0 1>239.2.2.3:6000 by #2 from 10.0.2.1",
            "close eth0/xdp0 #1",
        ],
    );
    did(&supervisor.amend("cam", &["239.2.2.3:6000@eth2,loop=true"], &[]), &[]);
    supervisor.check_settled();
}

#[test]
fn options_of_an_output_reach_the_worker() {
    fn check(output: &str, ttl: protocol::Ttl, dscp: Option<u8>, max_run: u16) {
        let supervisor = Supervisor::serving(&[rule("cam", "239.1.1.1:5000@eth0", &[output])]);
        let compiled = &supervisor.world.processes[&worker("eth0", 0)].rules[&0].outputs[0];
        assert_eq!((compiled.ttl, compiled.dscp, compiled.max_run), (ttl, dscp, max_run), "{output}");
    }
    check("239.2.2.2:6000@eth1", protocol::Ttl::Fixed(16), None, 64);
    check("239.2.2.2:6000@eth1,ttl=1,dscp=46", protocol::Ttl::Fixed(1), Some(46), 64);
    check("239.2.2.2:6000@eth1,ttl=copy,gso=false", protocol::Ttl::Copy, None, 1);
    check("239.2.2.2:6000@eth1,ttl=dec,dscp=0", protocol::Ttl::Decrement, Some(0), 64);
}

#[test]
fn a_group_is_left_with_its_last_rule_only() {
    let port =
        |n: u16| rule(&format!("p{n}"), &format!("239.1.1.1:{n}@eth0"), &[&format!("239.2.2.2:{n}@eth1")]);
    let mut supervisor = Supervisor::serving(&[port(1)]);
    let joins = |done: &[String]| -> Vec<String> {
        done.iter().filter(|line| line.starts_with("join") || line.starts_with("leave")).cloned().collect()
    };
    assert_eq!(joins(&supervisor.add(port(2))), [""; 0]);
    // A source of its own is a membership of its own.
    let one = rule("one", "239.1.1.1:1@eth0,source=192.0.2.7", &["239.2.2.2:9@eth1"]);
    assert_eq!(joins(&supervisor.add(one)), ["join 192.0.2.7,239.1.1.1%10"]);
    assert_eq!(joins(&supervisor.remove("p1")), [""; 0]);
    supervisor.check_settled();
    assert_eq!(joins(&supervisor.remove("p2")), ["leave 239.1.1.1%10"]);
    assert_eq!(joins(&supervisor.remove("one")), ["leave 192.0.2.7,239.1.1.1%10"]);
    supervisor.check_settled();
}

#[test]
fn of_a_group_the_sources_are_left_first() {
    let one = rule("one", "239.1.1.1:5000@eth0,source=192.0.2.7", &["239.2.2.2:7000@eth1"]);
    let mut supervisor = Supervisor::serving(&[cam(), one]);
    did(
        &supervisor.change("eth0", |link| link.up = false),
        &["leave 192.0.2.7,239.1.1.1%10", "leave 239.1.1.1%10"],
    );
    supervisor.check_settled();
}

#[test]
fn a_rule_waits_for_its_interface() {
    let mut supervisor = Supervisor::new();
    supervisor.links(links([1]));
    did(&supervisor.add(cam()), &[]);
    let missing = "interface eth0 does not exist".to_owned();
    assert_eq!(supervisor.problem("cam"), Some((Problem::Waits, missing)));
    let (name, eth0) = link(0);
    let mut down = links([1]);
    down.insert(name, Link { up: false, ..eth0 });
    did(
        &supervisor.links(down),
        &[
            "prepare eth0",
            "attach eth0",
            "start eth0/xdp0",
            "open eth0/xdp0 #0 eth1%11:4000",
            "upsert eth0/xdp0 rule 0 0>239.2.2.2:6000 by #0 from 10.0.1.1",
            "steer eth0/xdp0",
            "set eth0 *,239.1.1.1:5000 steer rule 0",
        ],
    );
    let down = "interface eth0 is down".to_owned();
    assert_eq!(supervisor.problem("cam"), Some((Problem::Waits, down)));
    // Groups are joined on an interface that is up.
    did(&supervisor.change("eth0", |link| link.up = true), &["join 239.1.1.1%10"]);
    assert_eq!(supervisor.problem("cam"), None);
    did(&supervisor.change("eth0", |link| link.up = false), &["leave 239.1.1.1%10"]);
    did(&supervisor.change("eth0", |link| link.up = true), &["join 239.1.1.1%10"]);
    supervisor.check_settled();
}

#[test]
fn an_interface_that_goes_takes_its_program_along_and_gets_another() {
    let mut supervisor = Supervisor::serving(&[cam()]);
    let gone =
        ["delete eth0 *,239.1.1.1:5000", "barrier", "stop eth0/xdp0", "detach eth0", "leave 239.1.1.1%10"];
    did(&supervisor.links(links(1..4)), &gone);
    supervisor.check_settled();
    let missing = "interface eth0 does not exist".to_owned();
    assert_eq!(supervisor.problem("cam"), Some((Problem::Waits, missing)));
    let again = [
        "prepare eth0",
        "attach eth0",
        "start eth0/xdp0",
        "open eth0/xdp0 #0 eth1%11:4000",
        "upsert eth0/xdp0 rule 0 0>239.2.2.2:6000 by #0 from 10.0.1.1",
        "steer eth0/xdp0",
        "join 239.1.1.1%20",
        "set eth0 *,239.1.1.1:5000 steer rule 0",
    ];
    let mut remade = links(0..4);
    remade.get_mut(&interface("eth0")).unwrap().index = IfIndex(20);
    did(&supervisor.links(remade.clone()), &again);
    supervisor.check_settled();
    // Deleted and made anew before anybody looked.
    remade.get_mut(&interface("eth0")).unwrap().index = IfIndex(30);
    let gone = gone.map(|line| line.replace("%10", "%20"));
    let again = again.map(|line| line.replace("%20", "%30"));
    assert_eq!(supervisor.links(remade), [&gone[..], &again[..]].concat());
    supervisor.check_settled();
    assert_eq!(supervisor.state.mishaps(&worker("eth0", 0)), Mishaps::default());
}

#[test]
fn an_interface_without_rules_goes_and_stays_away() {
    let mut supervisor = Supervisor::serving(&[cam()]);
    supervisor.remove("cam");
    let mut remade = links(0..4);
    remade.get_mut(&interface("eth0")).unwrap().index = IfIndex(20);
    did(&supervisor.links(remade), &["stop eth0/xdp0", "detach eth0"]);
    supervisor.check_settled();
}

fn neighbour(address: [u8; 4], mac: Option<[u8; 6]>, failed: bool) -> NextHop {
    NextHop::Neighbour(Neighbour { address: address.into(), mac, sought: mac.is_none(), failed })
}

#[test]
fn what_goes_to_a_host_waits_for_its_next_hop() {
    let outputs = ["10.0.1.9:6000@eth1", "10.9.9.9:6000@eth2", "239.2.2.2:6000@eth1"];
    let mut supervisor = Supervisor::serving(&[rule("hosts", "239.1.1.1:5000@eth0", &outputs)]);
    let host = |n, address| {
        let source = Ipv4Addr::new(10, 0, n, 1);
        Host { interface: IfIndex(10 + u32::from(n)), source, address }
    };
    let near = host(1, Ipv4Addr::new(10, 0, 1, 9));
    let far = host(2, Ipv4Addr::new(10, 9, 9, 9));
    assert_eq!(supervisor.state.hosts(), BTreeSet::from([near, far]), "a group has no neighbour");
    let neighbour = |n, failed| neighbour([10, 0, n, 9], None, failed);
    let mut tell = |hops: [NextHop; 2], pending: [Option<&str>; 2]| {
        let hops = [near, far].into_iter().zip(hops).collect();
        let did = supervisor.take(Event::NextHops(hops));
        for (text, pending) in outputs.iter().zip(pending.into_iter().chain([None])) {
            assert_eq!(supervisor.pending(&output(text)).as_deref(), pending, "{text}");
        }
        assert_eq!(supervisor.state.hosts().len(), 2, "it is still looked for");
        did
    };
    let group = "2>239.2.2.2:6000 by #2 from 10.0.1.1";
    did(&tell([neighbour(1, false), neighbour(2, false)], [None; 2]), &[]);
    let silent = "10.0.1.9 does not answer ARP on eth1";
    did(
        &tell([neighbour(1, true), NextHop::Direct], [Some(silent), None]),
        &[
            &format!("upsert eth0/xdp0 rule 0 0>unreachable 1>10.9.9.9:6000 by #1 from 10.0.2.1 {group}"),
            "close eth0/xdp0 #0",
        ],
    );
    // Of what lies behind a router it is the router that answers.
    did(
        &tell(
            [neighbour(1, true), neighbour(2, true)],
            [Some(silent), Some("10.0.2.9 does not answer ARP on eth2")],
        ),
        &[&format!("upsert eth0/xdp0 rule 0 0>unreachable 1>unreachable {group}"), "close eth0/xdp0 #1"],
    );
    did(
        &tell([neighbour(1, false), NextHop::NoRoute], [None, Some("no route to 10.9.9.9 by eth2")]),
        &[
            "open eth0/xdp0 #0 eth1%11:4000",
            &format!("upsert eth0/xdp0 rule 0 0>10.0.1.9:6000 by #0 from 10.0.1.1 1>unreachable {group}"),
        ],
    );
    // Where nobody is looked for, and where the interface is down, nobody can fail to answer.
    supervisor.change("eth2", |link| link.arp = false);
    assert_eq!(supervisor.pending(&output(outputs[1])), None);
    supervisor.change("eth1", |link| link.up = false);
    let waits = supervisor.pending(&output(outputs[0]));
    assert_eq!((waits.as_deref(), supervisor.state.hosts().len()), (Some("interface eth1 is down"), 0));
}

const MAC: [u8; 6] = [2, 0, 0, 0, 1, 9];

/// A rule with a host and a group on one interface.
fn mixed(datapath: &str) -> Rule {
    let outputs = ["10.0.1.9:6000@eth1", "239.2.2.2:6000@eth1"];
    Rule { datapath: datapath.parse().unwrap(), ..rule("mixed", "239.1.1.1:5000@eth0", &outputs) }
}

#[test]
fn the_kernel_sends_to_a_host_while_its_mac_is_known() {
    let mut supervisor = Supervisor::serving(&[]);
    supervisor.open_targets();
    supervisor.add(mixed("auto"));
    let of = |supervisor: &Supervisor| {
        let rule = supervisor.state.rules().get("mixed").unwrap().rule.clone();
        let why = supervisor.state.auto_redirect_objection(&rule);
        (supervisor.state.datapath_of(&rule), why)
    };
    let macs = |supervisor: &Supervisor| -> Vec<_> {
        let outputs = &supervisor.world.outputs[&(interface("eth0"), 0)];
        outputs.iter().map(|output| output.rewrite.destination_mac).collect()
    };
    let group = [1, 0, 0x5e, 2, 2, 2];
    let yet = || (Datapath::AfXdp, Some("10.0.1.9 has no neighbour yet on eth1".to_owned()));
    assert_eq!(of(&supervisor), yet());
    supervisor.find(neighbour([10, 0, 1, 9], None, false));
    assert_eq!(of(&supervisor), yet());
    // It answers: the kernel takes over from the worker, which lets go last.
    let flow = |action| format!("set eth0 *,239.1.1.1:5000 {action} rule 0");
    let moved = supervisor.find(neighbour([10, 0, 1, 9], Some(MAC), false));
    let outputs = "outputs eth0 rule 0 0%11 1%11";
    let place = |what: &str| moved.iter().position(|line| line == what).unwrap();
    assert!(place(outputs) < place(&flow("redirect")), "{moved:?}");
    assert!(place(&flow("redirect")) < place("remove eth0/xdp0 rule 0"), "{moved:?}");
    assert_eq!((of(&supervisor), macs(&supervisor)), ((Datapath::Redirect, None), vec![MAC, group]));
    supervisor.check_settled();
    // Another MAC is written into what is sent, and nothing else changes.
    let other = [2, 0, 0, 0, 1, 10];
    did(&supervisor.find(neighbour([10, 0, 1, 9], Some(other), false)), &[outputs]);
    assert_eq!(macs(&supervisor), [other, group]);
    // It is looked for again: it may be where it was.
    let sought = Neighbour { address: [10, 0, 1, 9].into(), mac: Some(other), sought: true, failed: false };
    did(&supervisor.find(NextHop::Neighbour(sought)), &[]);
    // It does not answer: the worker that still stands takes over.
    let silent = "10.0.1.9 does not answer ARP on eth1".to_owned();
    let moved = supervisor.find(neighbour([10, 0, 1, 9], None, true));
    assert!(moved.contains(&flow("steer")), "{moved:?}");
    assert_eq!(of(&supervisor), (Datapath::AfXdp, Some(silent)));
    supervisor.check_settled();
    supervisor.find(neighbour([10, 0, 1, 9], Some(MAC), false));
    assert_eq!((of(&supervisor), macs(&supervisor)), ((Datapath::Redirect, None), vec![MAC, group]));
    supervisor.check_settled();
    // With its interface down the output waits, as on any datapath.
    supervisor.change("eth1", |link| link.up = false);
    assert_eq!(of(&supervisor).0, Datapath::Redirect);
}

#[test]
fn what_the_kernel_itself_does_not_know_of_a_host_is_said() {
    let check = |hop: Option<NextHop>, arp: bool, refused: bool, why: &str| {
        let mut supervisor = Supervisor::serving(&[]);
        supervisor.open_targets();
        supervisor.change("eth1", |link| link.arp = arp);
        supervisor.add(mixed("redirect"));
        if let Some(hop) = hop {
            supervisor.find(hop);
        }
        let by_auto = supervisor.state.auto_redirect_objection(&mixed("auto"));
        assert_eq!(by_auto.as_deref(), Some(why));
        let problem =
            refused.then(|| (Problem::Failed, format!("the kernel cannot send it on by itself: {why}")));
        assert_eq!(supervisor.problem("mixed"), problem);
        // The group is served all the same, by name.
        let [host, group] = ["10.0.1.9:6000@eth1", "239.2.2.2:6000@eth1"].map(output);
        let pending = |output| supervisor.state.output_pending(output, Datapath::Redirect);
        assert_eq!((pending(&host).as_deref(), pending(&group)), (Some(why), None));
        assert_eq!(supervisor.state.redirect_withheld(&host), Some(DropReason::Unreachable));
        assert_eq!(supervisor.world.outputs[&(interface("eth0"), 0)].len(), 1);
        supervisor.check_settled();
    };
    let yet = "10.0.1.9 has no neighbour yet on eth1";
    check(None, true, false, yet);
    check(Some(neighbour([10, 0, 1, 9], None, false)), true, false, yet);
    let router = "10.0.1.254 has no neighbour yet on eth1";
    check(Some(neighbour([10, 0, 1, 254], None, false)), true, false, router);
    let silent = "10.0.1.9 does not answer ARP on eth1";
    check(Some(neighbour([10, 0, 1, 9], None, true)), true, false, silent);
    check(Some(NextHop::NoRoute), true, false, "no route to 10.0.1.9 by eth1");
    let broadcast = "10.0.1.9 is a broadcast address on eth1: name a group, or each host";
    check(Some(NextHop::Broadcast), true, true, broadcast);
    let direct = "10.0.1.9 has no neighbour on eth1: it is this host, or behind an IPv6 router";
    check(Some(NextHop::Direct), true, true, direct);
    check(None, false, true, "eth1 looks for no neighbours (ARP is off), so 10.0.1.9 has none");
}

#[test]
fn an_output_waits_for_its_interface_and_leaves_the_others_alone() {
    fn check(change: impl FnOnce(&mut Links), pending: &str) {
        let two = rule("two", "239.1.1.1:5000@eth0", &["239.2.2.2:6000@eth1", "239.2.2.3:6000@eth2"]);
        let mut supervisor = Supervisor::serving(&[two]);
        let mut changed = links(0..4);
        change(&mut changed);
        did(
            &supervisor.links(changed),
            &["upsert eth0/xdp0 rule 0 0>pending 1>239.2.2.3:6000 by #1 from 10.0.2.1", "close eth0/xdp0 #0"],
        );
        let first = output("239.2.2.2:6000@eth1");
        assert_eq!(supervisor.pending(&first).as_deref(), Some(pending));
        assert_eq!(supervisor.pending(&output("239.2.2.3:6000@eth2")), None);
        assert_eq!(supervisor.problem("two"), None);
        supervisor.check_settled();
        let back = supervisor.links(links(0..4));
        did(
            &back,
            &[
                "open eth0/xdp0 #0 eth1%11:4000",
                "upsert eth0/xdp0 rule 0 0>239.2.2.2:6000 by #0 from 10.0.1.1 1>239.2.2.3:6000 by #1 from 10.0.2.1",
            ],
        );
        assert_eq!(supervisor.pending(&first), None);
        supervisor.check_settled();
    }
    let eth1 = |links: &mut Links| links.get_mut(&interface("eth1")).cloned().unwrap();
    check(
        |links| {
            links.remove(&interface("eth1"));
        },
        "interface eth1 does not exist",
    );
    check(
        |links| {
            let eth1 = Link { up: false, ..eth1(links) };
            links.insert(interface("eth1"), eth1);
        },
        "interface eth1 is down",
    );
    check(
        |links| {
            let eth1 = Link { addresses: Vec::new(), ..eth1(links) };
            links.insert(interface("eth1"), eth1);
        },
        "interface eth1 has no IPv4 address",
    );
}

#[test]
fn what_changes_of_an_egress_interface_reaches_the_worker() {
    fn check(change: impl FnOnce(&mut Link), expected: &[&str]) {
        let mut supervisor = Supervisor::serving(&[cam()]);
        did(&supervisor.change("eth1", change), expected);
        supervisor.check_settled();
    }
    let moved = Ipv4Addr::new(10, 9, 9, 9);
    check(
        |link| link.addresses = vec![moved],
        &["upsert eth0/xdp0 rule 0 0>239.2.2.2:6000 by #0 from 10.9.9.9"],
    );
    check(
        |link| link.addresses.insert(0, moved),
        &["upsert eth0/xdp0 rule 0 0>239.2.2.2:6000 by #0 from 10.9.9.9"],
    );
    // A second address is none of its business.
    check(|link| link.addresses.push(moved), &[]);
    check(|link| link.mtu = 1400, &["upsert eth0/xdp0 rule 0 0>239.2.2.2:6000 by #0 from 10.0.1.1"]);
    check(
        |link| link.index = IfIndex(21),
        &[
            "open eth0/xdp0 #1 eth1%21:4000",
            "upsert eth0/xdp0 rule 0 0>239.2.2.2:6000 by #1 from 10.0.1.1",
            "close eth0/xdp0 #0",
        ],
    );
    check(|link| link.xdp_program = Some(7), &[]);
    check(|link| link.rx_queues = 4, &[]);
}

#[test]
fn a_source_that_an_output_names_must_be_an_address_of_the_host() {
    let named = rule("named", "239.1.1.1:5000@eth0", &["239.2.2.2:6000@eth1,from=10.0.3.1"]);
    let mut supervisor = Supervisor::serving(std::slice::from_ref(&named));
    assert_eq!(supervisor.pending(&named.outputs[0]), None);
    did(&supervisor.links(links(0..3)), &["upsert eth0/xdp0 rule 0 0>pending", "close eth0/xdp0 #0"]);
    let why = "10.0.3.1 is no address of this host";
    assert_eq!(supervisor.pending(&named.outputs[0]).as_deref(), Some(why));
    supervisor.check_settled();
}

#[test]
fn a_loop_follows_the_source_address() {
    let both = [cam(), rule("back", "239.2.2.2:6000@eth1", &["239.1.1.1:5000@eth0"])];
    let mut supervisor = Supervisor::serving(&both);
    did(
        &supervisor.change("eth1", |link| link.addresses = vec![Ipv4Addr::new(10, 9, 9, 9)]),
        &[
            "set eth1 10.9.9.9,239.2.2.2:6000 loop rule 1",
            "upsert eth0/xdp0 rule 0 0>239.2.2.2:6000 by #0 from 10.9.9.9",
            "delete eth1 10.0.1.1,239.2.2.2:6000",
            "barrier",
        ],
    );
    supervisor.check_settled();
}

#[test]
fn another_mtu_or_other_queues_make_other_workers() {
    let mut supervisor = Supervisor::with(limits(8, None, &[4, 5]));
    supervisor.links(links(0..4));
    supervisor.add(cam());
    let spec = |supervisor: &Supervisor, index| {
        let spec = supervisor.state.workers()[&worker("eth0", index)].spec.clone().unwrap();
        let FrameSource::AfXdp { queues, chunk_bytes } = spec.source else { panic!("no queues") };
        (queues, spec.cpu, chunk_bytes)
    };
    assert_eq!(spec(&supervisor, 0), (vec![0], Some(4), 2048));
    let replaced = [
        "stop eth0/xdp0",
        "start eth0/xdp0",
        "open eth0/xdp0 #0 eth1%11:4000",
        "upsert eth0/xdp0 rule 0 0>239.2.2.2:6000 by #0 from 10.0.1.1",
        "steer eth0/xdp0",
    ];
    did(&supervisor.change("eth0", |link| link.mtu = 3000), &replaced);
    assert_eq!(spec(&supervisor, 0), (vec![0], Some(4), 4096));
    supervisor.change("eth0", |link| link.rx_queues = 3);
    assert_eq!(spec(&supervisor, 0), (vec![0, 2], Some(4), 4096));
    assert_eq!(spec(&supervisor, 1), (vec![1], Some(5), 4096));
    supervisor.check_settled();
    // One queue is left, and one worker.
    let mut fewer = vec!["stop eth0/xdp1"];
    fewer.extend(replaced);
    let mut done = supervisor.change("eth0", |link| link.rx_queues = 1);
    done[..2].sort_by(|a, b| b.cmp(a));
    did(&done, &fewer);
    supervisor.check_settled();
}

#[test]
fn queues_are_shared_as_the_operator_said() {
    let mut supervisor = Supervisor::with(limits(8, Some(2), &[4]));
    supervisor.links(links(0..4));
    supervisor.change("eth0", |link| link.rx_queues = 5);
    did(
        &supervisor.add(cam()),
        &[
            "prepare eth0",
            "attach eth0",
            "start eth0/xdp0",
            "open eth0/xdp0 #0 eth1%11:4000",
            "upsert eth0/xdp0 rule 0 0>239.2.2.2:6000 by #0 from 10.0.1.1",
            "steer eth0/xdp0",
            "start eth0/xdp1",
            "open eth0/xdp1 #0 eth1%11:4000",
            "upsert eth0/xdp1 rule 0 0>239.2.2.2:6000 by #0 from 10.0.1.1",
            "steer eth0/xdp1",
            "join 239.1.1.1%10",
            "set eth0 *,239.1.1.1:5000 steer rule 0",
        ],
    );
    supervisor.check_settled();
}

#[test]
fn a_worker_that_died_gets_its_rules_before_anything_is_steered_to_it() {
    let mic = rule("mic", "239.1.1.2:5000@eth0", &["239.2.2.2:7000@eth2"]);
    let mut supervisor = Supervisor::serving(&[cam(), mic]);
    let id = worker("eth0", 0);
    did(&supervisor.exit(&id, LONG), &["restart eth0/xdp0 after 50ms"]);
    let why = "worker eth0/xdp0 is being restarted: killed".to_owned();
    assert_eq!(supervisor.problem("cam"), Some((Problem::Waits, why)));
    // Meanwhile rules come and go.
    did(&supervisor.remove("cam"), &["delete eth0 *,239.1.1.1:5000", "barrier", "leave 239.1.1.1%10"]);
    let tap = rule("tap", "239.1.1.3:5000@eth0", &["239.2.2.3:7000@eth1"]);
    did(&supervisor.add(tap), &["join 239.1.1.3%10", "set eth0 *,239.1.1.3:5000 steer rule 0"]);
    did(
        &supervisor.restart(&id),
        &[
            "start eth0/xdp0",
            "open eth0/xdp0 #0 eth1%11:4000",
            "open eth0/xdp0 #1 eth2%12:4000",
            "upsert eth0/xdp0 rule 1 1>239.2.2.2:7000 by #1 from 10.0.2.1",
            "upsert eth0/xdp0 rule 0 0>239.2.2.3:7000 by #0 from 10.0.1.1",
            "steer eth0/xdp0",
        ],
    );
    assert_eq!(supervisor.problem("mic"), None);
    let mishaps = supervisor.state.mishaps(&id);
    assert_eq!((mishaps.restarts, mishaps.last_exit.as_deref()), (1, Some("killed")));
    assert!(supervisor.state.worker_ids().contains(&id));
    supervisor.check_settled();
}

#[test]
fn the_pause_before_a_restart_doubles_and_ends_with_a_long_life() {
    let mut supervisor = Supervisor::serving(&[cam()]);
    let id = worker("eth0", 0);
    for (lived, pause) in [
        (SHORT, "50ms"),
        (SHORT, "100ms"),
        (SHORT, "200ms"),
        (SHORT, "400ms"),
        (Duration::from_millis(1_999), "800ms"),
        (Duration::ZERO, "1.6s"),
        (SHORT, "3.2s"),
        (SHORT, "6.4s"),
        (SHORT, "10s"),
        (SHORT, "10s"),
        (Duration::from_secs(2), "50ms"),
        (SHORT, "100ms"),
        (LONG, "50ms"),
        (LONG, "50ms"),
    ] {
        did(&supervisor.exit(&id, lived), &[&format!("restart eth0/xdp0 after {pause}")]);
        assert_eq!(supervisor.restart(&id)[0], "start eth0/xdp0");
        supervisor.check_settled();
    }
    assert_eq!(supervisor.state.mishaps(&id).restarts, 14);
}

#[test]
fn a_worker_dies_alone() {
    let mut supervisor = Supervisor::with(limits(8, Some(2), &[4]));
    supervisor.links(links(0..4));
    supervisor.change("eth0", |link| link.rx_queues = 2);
    supervisor.add(cam());
    did(&supervisor.exit(&worker("eth0", 1), SHORT), &["restart eth0/xdp1 after 50ms"]);
    assert!(supervisor.world.processes[&worker("eth0", 0)].steered);
    did(&supervisor.exit(&worker("eth0", 0), SHORT), &["restart eth0/xdp0 after 50ms"]);
    assert_eq!(supervisor.restart(&worker("eth0", 1))[0], "start eth0/xdp1");
    assert_eq!(supervisor.restart(&worker("eth0", 0))[0], "start eth0/xdp0");
    supervisor.check_settled();
}

#[test]
fn a_worker_whose_interface_went_is_started_when_it_is_back() {
    let mut supervisor = Supervisor::serving(&[cam()]);
    let id = worker("eth0", 0);
    supervisor.exit(&id, SHORT);
    did(
        &supervisor.links(links(1..4)),
        &["delete eth0 *,239.1.1.1:5000", "barrier", "detach eth0", "leave 239.1.1.1%10"],
    );
    did(&supervisor.restart(&id), &[]);
    supervisor.links(links(0..4));
    supervisor.check_settled();
    assert!(supervisor.state.workers().contains_key(&id));
}

#[test]
fn a_worker_that_failed_and_was_stopped_before_its_end_was_told_is_started_again() {
    let mut supervisor = Supervisor::serving(&[cam()]);
    supervisor.failing = vec!["upsert eth0/xdp0".to_owned()];
    supervisor.amend("cam", &["239.2.2.2:6000@eth1,ttl=3"], &[]);
    supervisor.failing.clear();
    // The supervisor does not hear of the end of a worker that it has stopped.
    assert_eq!(supervisor.links(links(1..4))[2], "stop eth0/xdp0");
    supervisor.links(links(0..4));
    supervisor.check_settled();
    assert!(supervisor.state.workers().contains_key(&worker("eth0", 0)));
}

/// `cam` by a datapath that is asked for by name.
fn cam_by(datapath: &str) -> Rule {
    Rule { datapath: datapath.parse().unwrap(), ..cam() }
}

#[test]
fn an_attachment_by_name_that_failed_is_tried_again_when_something_has_changed() {
    let mut supervisor = Supervisor::serving(&[]);
    supervisor.failing = vec!["attach eth0".to_owned()];
    did(&supervisor.add(cam_by("af-xdp")), &["prepare eth0", "! attach eth0"]);
    let why = "cannot attach eth0; --datapath auto takes af-packet there".to_owned();
    assert_eq!(supervisor.problem("cam"), Some((Problem::Failed, why)));
    // Not by itself, nor for what concerns others.
    did(&supervisor.settle(), &[]);
    did(&supervisor.change("eth3", |link| link.mtu = 1400), &[]);
    did(&supervisor.remove("cam"), &["detach eth0"]);
    // Not for a rule of another interface, which goes its way.
    let other = supervisor.add(rule("mic", "239.1.1.2:5000@eth1", &["239.2.2.2:7000@eth2"]));
    assert_eq!((other[1].as_str(), other.len()), ("attach eth1", 8));
    // When it is asked for again, when the interface has changed.
    did(&supervisor.add(cam_by("af-xdp")), &["prepare eth0", "! attach eth0"]);
    did(&supervisor.add(cam_by("af-xdp")), &["! attach eth0"]);
    did(&supervisor.change("eth0", |link| link.mtu = 1400), &["! attach eth0"]);
    supervisor.failing.clear();
    did(&supervisor.settle(), &[]);
    assert_eq!(supervisor.change("eth0", |link| link.addresses.clear()), [""; 0]);
    assert_eq!(supervisor.change("eth0", |link| link.mtu = 1500)[0], "attach eth0");
    assert_eq!(supervisor.problem("cam"), None);
    supervisor.check_settled();
}

/// What it takes to relay `cam` by packet sockets, once they are open.
const CAM_BY_PACKET: [&str; 6] = [
    "start eth0/packet0",
    "open eth0/packet0 #0 eth1%11:4000",
    "upsert eth0/packet0 rule 0 0>239.2.2.2:6000 by #0 from 10.0.1.1",
    "steer eth0/packet0",
    "join 239.1.1.1%10",
    "set eth0 *,239.1.1.1:5000 pass rule 0",
];

#[test]
fn auto_takes_af_packet_where_xdp_cannot_attach_and_says_why() {
    let mut supervisor = Supervisor::serving(&[]);
    supervisor.failing = vec!["attach eth0".to_owned()];
    let first = ["prepare eth0", "! attach eth0", "fanout eth0 x1"];
    assert_eq!(supervisor.add(cam()), [&first[..], &CAM_BY_PACKET].concat());
    assert_eq!(supervisor.problem("cam"), None);
    assert_eq!(supervisor.state.no_xdp(&interface("eth0")).as_deref(), Some("cannot attach eth0"));
    supervisor.check_settled();
    // It is not tried again for what XDP does not depend on, nor for each rule.
    did(&supervisor.change("eth0", |link| link.addresses.clear()), &[]);
    assert_eq!(
        supervisor.add(rule("mic", "239.1.1.2:5000@eth0", &["239.2.2.2:7000@eth1"]))[0],
        "upsert eth0/packet0 rule 1 1>239.2.2.2:7000 by #0 from 10.0.1.1"
    );
    // An attempt that fails again disturbs nothing.
    did(&supervisor.change("eth0", |link| link.xdp_program = Some(7)), &["! attach eth0"]);
    supervisor.check_settled();
    // A slot that comes free is taken, and the rules move when a worker relays there.
    supervisor.remove("mic");
    supervisor.failing.clear();
    did(
        &supervisor.change("eth0", |link| link.xdp_program = None),
        &[
            "attach eth0",
            "start eth0/xdp0",
            "steer eth0/xdp0",
            "open eth0/xdp0 #0 eth1%11:4000",
            "upsert eth0/xdp0 rule 0 0>239.2.2.2:6000 by #0 from 10.0.1.1",
            "set eth0 *,239.1.1.1:5000 steer rule 0",
            "barrier",
            "remove eth0/packet0 rule 0",
            "close eth0/packet0 #0",
        ],
    );
    supervisor.check_settled();
}

#[test]
fn a_rule_keeps_its_datapath_until_the_other_can_relay() {
    let mut supervisor = Supervisor::serving(&[]);
    supervisor.failing = vec!["attach eth0".to_owned()];
    supervisor.add(cam());
    supervisor.failing = vec!["start eth0/xdp0".to_owned()];
    supervisor.change("eth0", |link| link.mtu = 1400);
    assert_eq!(supervisor.world.flows[&interface("eth0")].values().next().unwrap().action, action::PASS);
    supervisor.failing.clear();
    supervisor.exit(&worker("eth0", 0), SHORT);
    supervisor.restart(&worker("eth0", 0));
    supervisor.check_settled();
    assert_eq!(supervisor.world.flows[&interface("eth0")].values().next().unwrap().action, action::STEER);
}

#[test]
fn a_rule_moves_only_to_workers_that_all_relay() {
    let mut supervisor = Supervisor::with(limits(8, Some(2), &[0, 1]));
    supervisor.links(links(0..4));
    supervisor.change("eth0", |link| link.rx_queues = 2);
    supervisor.add(cam_by("af-packet"));
    supervisor.add(rule("mic", "239.1.1.2:5000@eth0", &["239.2.2.2:7000@eth1"]));
    supervisor.exit(&worker("eth0", 1), SHORT);
    let amendment = Amendment { datapath: Some("af-xdp".parse().unwrap()), ..Amendment::default() };
    supervisor.state.amend("cam", amendment).unwrap();
    let done = supervisor.settle();
    assert!(done.iter().all(|line| !line.starts_with("set")), "{done:?}");
    let done = supervisor.restart(&worker("eth0", 1));
    assert!(done.contains(&"set eth0 *,239.1.1.1:5000 steer rule 0".to_owned()), "{done:?}");
    supervisor.check_settled();
}

#[test]
fn an_interface_without_ethernet_headers_is_refused() {
    let mut supervisor = Supervisor::serving(&[]);
    supervisor.change("eth0", |link| (link.ethernet, link.kind) = (false, "tun".to_owned()));
    did(&supervisor.add(cam()), &[]);
    let (problem, why) = supervisor.problem("cam").unwrap();
    assert!(problem == Problem::Failed && why.contains("eth0 (tun) have no Ethernet header"), "{why}");
}

#[test]
fn af_packet_by_name_leaves_xdp_alone() {
    let mut supervisor = Supervisor::serving(&[]);
    let first = ["prepare eth0", "fanout eth0 x1"];
    assert_eq!(supervisor.add(cam_by("af-packet")), [&first[..], &CAM_BY_PACKET].concat());
    supervisor.check_settled();
    // A rule of the other datapath on the same interface gets its own workers.
    did(
        &supervisor.add(rule("mic", "239.1.1.2:5000@eth0", &["239.2.2.2:7000@eth1"])),
        &[
            "attach eth0",
            "start eth0/xdp0",
            "open eth0/xdp0 #0 eth1%11:4000",
            "upsert eth0/xdp0 rule 1 1>239.2.2.2:7000 by #0 from 10.0.1.1",
            "steer eth0/xdp0",
            "join 239.1.1.2%10",
            "set eth0 *,239.1.1.2:5000 steer rule 1",
        ],
    );
    supervisor.check_settled();
    let amendment = Amendment { datapath: Some("af-xdp".parse().unwrap()), ..Amendment::default() };
    supervisor.state.amend("cam", amendment).unwrap();
    did(
        &supervisor.settle(),
        &[
            "upsert eth0/xdp0 rule 0 0>239.2.2.2:6000 by #0 from 10.0.1.1",
            "set eth0 *,239.1.1.1:5000 steer rule 0",
            "barrier",
            "remove eth0/packet0 rule 0",
            "close eth0/packet0 #0",
        ],
    );
    supervisor.check_settled();
}

#[test]
fn a_rule_that_moves_has_its_flow_and_its_membership_all_the_while() {
    let mut supervisor = Supervisor::serving(&[cam()]);
    let amendment = Amendment { datapath: Some("af-packet".parse().unwrap()), ..Amendment::default() };
    supervisor.state.amend("cam", amendment).unwrap();
    did(
        &supervisor.settle(),
        &[
            "fanout eth0 x1",
            "start eth0/packet0",
            "open eth0/packet0 #0 eth1%11:4000",
            "upsert eth0/packet0 rule 0 0>239.2.2.2:6000 by #0 from 10.0.1.1",
            "steer eth0/packet0",
            "set eth0 *,239.1.1.1:5000 pass rule 0",
            "barrier",
            "remove eth0/xdp0 rule 0",
            "close eth0/xdp0 #0",
        ],
    );
    supervisor.check_settled();
}

#[test]
fn packet_sockets_that_cannot_be_opened_are_a_failure() {
    let mut supervisor = Supervisor::serving(&[]);
    supervisor.failing = vec!["fanout eth0".to_owned()];
    did(&supervisor.add(cam_by("af-packet")), &["prepare eth0", "! fanout eth0 x1"]);
    assert_eq!(supervisor.problem("cam"), Some((Problem::Failed, "cannot fanout eth0 x1".to_owned())));
    did(&supervisor.settle(), &[]);
    supervisor.failing.clear();
    assert_eq!(supervisor.change("eth0", |link| link.mtu = 1400)[0], "fanout eth0 x1");
    supervisor.check_settled();
}

#[test]
fn packet_workers_are_as_many_as_their_sockets_whatever_the_queues_become() {
    let mut supervisor = Supervisor::with(limits(8, None, &[0, 1, 2, 3]));
    supervisor.links(links(0..4));
    supervisor.change("eth0", |link| link.rx_queues = 2);
    assert_eq!(supervisor.add(cam_by("af-packet"))[1], "fanout eth0 x2");
    assert_eq!(supervisor.world.processes.len(), 2);
    did(&supervisor.change("eth0", |link| (link.rx_queues, link.mtu) = (4, 9000)), &[]);
    supervisor.check_settled();
    // A dead worker's socket stays: its successor takes up what waits there.
    did(&supervisor.exit(&packet_worker("eth0", 1), SHORT), &["restart eth0/packet1 after 50ms"]);
    assert_eq!(supervisor.restart(&packet_worker("eth0", 1))[0], "start eth0/packet1");
    supervisor.check_settled();
}

#[test]
fn frames_that_do_not_fit_are_refused_with_the_sum() {
    let host = |locked_bytes, memory_bytes| HostLimits { locked_bytes, memory_bytes, descriptors: 1024 };
    let with = |host| {
        let mut supervisor = Supervisor::with(Limits { host, ..limits(8, None, &[0]) });
        supervisor.links(links(0..4));
        supervisor.change("eth1", |link| link.rx_queues = 2);
        supervisor
    };
    let mic = || rule("mic", "239.1.1.2:5000@eth1", &["239.2.2.2:7000@eth2"]);
    // One queue fits, two more do not.
    let mut supervisor = with(host(Some(32 << 20), 1 << 32));
    assert_eq!(supervisor.add(cam())[1], "attach eth0");
    assert_eq!(supervisor.add(mic())[..2], ["prepare eth1", "fanout eth1 x1"]);
    let why = supervisor.state.no_xdp(&interface("eth1")).unwrap();
    assert!(
        why.contains("2 RX queues x 8192 frames x 2048 bytes = 32.0 MiB, with 16.0 MiB already locked"),
        "{why}"
    );
    assert_eq!(supervisor.problem("mic"), None);
    let mut supervisor = with(host(None, 15 << 20));
    assert_eq!(supervisor.add(cam_by("af-packet"))[1], "fanout eth0 x1");
    did(&supervisor.add(mic()), &[]);
    let (problem, why) = supervisor.problem("mic").unwrap();
    assert!(problem == Problem::Failed && why.contains("were free at start"), "{why}");
}

#[test]
fn without_ebpf_workers_bar_loops_themselves() {
    let mut supervisor =
        Supervisor::with(Limits { no_bpf: Some("no eBPF".to_owned()), ..limits(8, None, &[0]) });
    supervisor.links(links(0..4));
    let there = rule("there", "239.1.1.1:5000@eth0", &["239.1.1.1:5000@eth1"]);
    let back = rule("back", "239.1.1.1:5000@eth1", &["239.1.1.1:5000@eth0"]);
    supervisor.add(there);
    supervisor.add(back);
    supervisor.check_settled();
    let rules: Vec<_> =
        supervisor.world.processes.values().flat_map(|process| process.rules.values()).collect();
    let own: Vec<_> = rules.iter().map(|rule| rule.own_sources.clone()).collect();
    assert_eq!(own, [[Ipv4Addr::new(10, 0, 0, 1), Ipv4Addr::new(10, 0, 1, 1)]; 2]);
    supervisor.add(Rule {
        name: "x".parse().unwrap(),
        input: "239.1.1.9:1@eth0".parse().unwrap(),
        ..cam_by("af-xdp")
    });
    assert!(supervisor.problem("x").unwrap().1.starts_with("no eBPF"));
}

#[test]
fn without_ebpf_a_worker_lets_go_of_its_rules_before_it_goes_with_its_interface() {
    let mut supervisor =
        Supervisor::with(Limits { no_bpf: Some("no eBPF".to_owned()), ..limits(8, None, &[0]) });
    supervisor.links(links(0..4));
    supervisor.add(cam());
    // Renamed, it receives all the same.
    did(
        &supervisor.links(links(1..4)),
        &[
            "delete eth0 *,239.1.1.1:5000",
            "barrier",
            "remove eth0/packet0 rule 0",
            "stop eth0/packet0",
            "detach eth0",
            "leave 239.1.1.1%10",
        ],
    );
    supervisor.check_settled();
    supervisor.links(links(0..4));
    supervisor.check_settled();
    // One that does not obey is ended all the same.
    supervisor.failing = vec!["remove".to_owned()];
    let done = supervisor.links(links(1..4));
    assert_eq!(done[2..5], ["! remove eth0/packet0 rule 0", "stop eth0/packet0", "detach eth0"]);
    supervisor.check_settled();
}

#[test]
fn a_rule_that_the_kernel_serves_stays_there_while_an_output_is_gone() {
    let open = |names: &[&str]| {
        let answers: BTreeMap<_, _> = names.iter().map(|name| (interface(name), None)).collect();
        Event::Targets(Targets { refusals: answers.clone(), hooks: answers, ..Targets::default() })
    };
    let mut supervisor = Supervisor::new();
    supervisor.links(links(0..3));
    supervisor.take(open(&["eth1", "eth2"]));
    supervisor.add(rule("cam", "239.1.1.1:5000@eth0", &["239.2.2.2:6000@eth1", "239.2.2.3:6000@eth2"]));
    let check = |supervisor: &mut Supervisor, expected| {
        let rule = supervisor.state.rules().get("cam").unwrap().rule.clone();
        assert_eq!(supervisor.state.datapath_of(&rule), expected);
        supervisor.check_settled();
    };
    check(&mut supervisor, Datapath::Redirect);
    // Of what is not there nothing is known.
    supervisor.links(links(0..2));
    supervisor.take(open(&["eth1"]));
    check(&mut supervisor, Datapath::Redirect);
    // Of what is there all is to be known.
    supervisor.links(links(0..3));
    check(&mut supervisor, Datapath::AfXdp);
    supervisor.take(open(&["eth1", "eth2"]));
    check(&mut supervisor, Datapath::Redirect);
}

#[test]
fn auto_redirects_no_more_outputs_than_a_burst_of_them_fits_the_devices_queue() {
    let mut supervisor = Supervisor::new();
    supervisor.links(links(0..3));
    let open = BTreeMap::from(["eth1", "eth2"].map(|name| (interface(name), None)));
    let mut targets = Targets { refusals: open.clone(), hooks: open, queues: BTreeMap::new() };
    supervisor.take(Event::Targets(targets.clone()));
    let to = |eth1: usize, eth2: usize| -> Vec<String> {
        let output = |(n, name): (usize, &str)| format!("239.2.2.{n}:6000@{name}");
        let names = [vec!["eth1"; eth1], vec!["eth2"; eth2]].concat();
        (1..).zip(names).map(output).collect()
    };
    let auto = |supervisor: &Supervisor, outputs: Vec<String>, datapath: &str| {
        let outputs: Vec<_> = outputs.iter().map(String::as_str).collect();
        let rule =
            Rule { datapath: datapath.parse().unwrap(), ..rule("cam", "239.1.1.1:5000@eth0", &outputs) };
        supervisor.state.datapath_of(&rule)
    };
    assert_eq!(auto(&supervisor, to(4, 4), "auto"), Datapath::Redirect);
    assert_eq!(auto(&supervisor, to(4, 5), "auto"), Datapath::AfXdp);
    assert_eq!(auto(&supervisor, to(4, 5), "redirect"), Datapath::Redirect);
    targets.queues = BTreeMap::from([(interface("eth2"), 512)]);
    supervisor.take(Event::Targets(targets));
    assert_eq!(auto(&supervisor, to(4, 8), "auto"), Datapath::Redirect);
    assert_eq!(auto(&supervisor, to(4, 9), "auto"), Datapath::AfXdp);
    // What is gone is no reason to move.
    supervisor.links(links(0..2));
    assert_eq!(auto(&supervisor, to(4, 9), "auto"), Datapath::Redirect);
}

#[test]
fn an_mtu_that_no_chunk_holds_is_af_packets_until_it_is_another() {
    let mut supervisor = Supervisor::new();
    supervisor.links(links(0..4));
    supervisor.change("eth0", |link| link.mtu = 9000);
    assert_eq!(supervisor.add(cam())[..2], ["prepare eth0", "fanout eth0 x1"]);
    let why = "eth0: the MTU 9000 is too large for one UMEM chunk (3822 at most)";
    assert_eq!(supervisor.state.no_xdp(&interface("eth0")).as_deref(), Some(why));
    assert_eq!(supervisor.problem("cam"), None);
    supervisor.check_settled();
    assert_eq!(supervisor.change("eth0", |link| link.mtu = 1500)[0], "attach eth0");
    supervisor.check_settled();
}

#[test]
fn a_group_that_cannot_be_joined_is_tried_again_when_its_interface_has_changed() {
    let mic = || rule("mic", "239.1.1.2:5000@eth0", &["239.2.2.2:7000@eth1"]);
    let mut supervisor = Supervisor::serving(&[mic()]);
    supervisor.failing = vec!["join 239.1.1.1".to_owned()];
    did(
        &supervisor.add(cam()),
        &[
            "upsert eth0/xdp0 rule 1 1>239.2.2.2:6000 by #0 from 10.0.1.1",
            "! join 239.1.1.1%10",
            "set eth0 *,239.1.1.1:5000 steer rule 1",
        ],
    );
    assert_eq!(supervisor.problem("cam"), Some((Problem::Failed, "cannot join 239.1.1.1%10".to_owned())));
    assert_eq!(supervisor.problem("mic"), None);
    did(&supervisor.settle(), &[]);
    did(&supervisor.change("eth0", |link| link.addresses.clear()), &["! join 239.1.1.1%10"]);
    did(&supervisor.add(cam()), &["! join 239.1.1.1%10"]);
    supervisor.failing.clear();
    did(
        &supervisor.change("eth0", |link| link.addresses.push(Ipv4Addr::new(10, 0, 0, 1))),
        &["join 239.1.1.1%10"],
    );
    assert_eq!(supervisor.problem("cam"), None);
    supervisor.check_settled();
}

#[test]
fn groups_that_cannot_be_joined_are_tried_again_in_time_and_keep_their_error_meanwhile() {
    let mic = || rule("mic", "239.1.1.2:5000@eth0,source=192.0.2.7", &["239.2.2.2:7000@eth1"]);
    let mut supervisor = Supervisor::serving(&[cam(), mic()]);
    supervisor.failing = vec!["join".to_owned()];
    supervisor.change("eth0", |link| link.up = false);
    assert!(!supervisor.state.awaits_joins());
    // One that fails keeps no other from being tried.
    let tried = ["! join 239.1.1.1%10", "! join 192.0.2.7,239.1.1.2%10"];
    did(&supervisor.change("eth0", |link| link.up = true), &tried);
    assert!(supervisor.state.awaits_joins());
    let membership = Membership { interface: IfIndex(10), group: Ipv4Addr::new(239, 1, 1, 1), source: None };
    let join = Effect::Join(Joined { membership, outlives: false });
    assert!(supervisor.state.knows_refusal(&join, "cannot join 239.1.1.1%10"));
    assert!(!supervisor.state.knows_refusal(&join, "another reason"));
    did(&supervisor.settle(), &[]);
    did(&supervisor.take(Event::JoinsDue), &tried);
    for (name, why) in [("cam", "cannot join 239.1.1.1%10"), ("mic", "cannot join 192.0.2.7,239.1.1.2%10")] {
        assert_eq!(supervisor.problem(name), Some((Problem::Failed, why.to_owned())));
    }
    supervisor.failing = vec!["join 239.1.1.1".to_owned()];
    did(&supervisor.take(Event::JoinsDue), &["! join 239.1.1.1%10", "join 192.0.2.7,239.1.1.2%10"]);
    assert_eq!(supervisor.problem("mic"), None);
    // What nobody wants any more is not tried.
    supervisor.remove("cam");
    assert!(!supervisor.state.awaits_joins());
    did(&supervisor.take(Event::JoinsDue), &[]);
    supervisor.failing.clear();
    supervisor.check_settled();
}

#[test]
fn a_flow_that_cannot_be_set_fails_its_rule_and_no_other() {
    let mic = || rule("mic", "239.1.1.2:5000@eth0", &["239.2.2.2:7000@eth1"]);
    let mut supervisor = Supervisor::serving(&[mic()]);
    supervisor.failing = vec!["set eth0 *,239.1.1.1".to_owned()];
    did(
        &supervisor.add(cam()),
        &[
            "upsert eth0/xdp0 rule 1 1>239.2.2.2:6000 by #0 from 10.0.1.1",
            "join 239.1.1.1%10",
            "! set eth0 *,239.1.1.1:5000 steer rule 1",
        ],
    );
    let why = "cannot set eth0 *,239.1.1.1:5000 steer rule 1".to_owned();
    assert_eq!(supervisor.problem("cam"), Some((Problem::Failed, why)));
    assert_eq!(supervisor.problem("mic"), None);
    // The other rule is looked after as before.
    did(
        &supervisor.amend("mic", &["239.2.2.2:7000@eth1,ttl=3"], &[]),
        &["upsert eth0/xdp0 rule 0 0>239.2.2.2:7000 by #0 from 10.0.1.1"],
    );
    // With the rule goes its failure.
    supervisor.remove("cam");
    assert_eq!(supervisor.problem("mic"), None);
    supervisor.failing.clear();
    assert_eq!(supervisor.add(cam()).last().unwrap(), "set eth0 *,239.1.1.1:5000 steer rule 1");
    assert_eq!(supervisor.problem("cam"), None);
    supervisor.check_settled();
}

#[test]
fn nothing_is_steered_where_a_loop_cannot_be_barred() {
    let mut supervisor = Supervisor::serving(&[cam()]);
    supervisor.failing = vec!["set eth0 10.0.0.1".to_owned()];
    supervisor.add(rule("back", "239.2.2.2:6000@eth1", &["239.1.1.1:5000@eth0"]));
    let why = "cannot set eth0 10.0.0.1,239.1.1.1:5000 loop rule 0".to_owned();
    assert_eq!(supervisor.problem("cam"), Some((Problem::Failed, why)));
    assert_eq!(supervisor.problem("back"), None);
    assert!(supervisor.world.flows[&interface("eth0")].is_empty());
    supervisor.failing.clear();
    supervisor.change("eth0", |link| link.mtu = 1400);
    assert_eq!(supervisor.problem("cam"), None);
    supervisor.check_settled();
}

#[test]
fn a_worker_that_does_not_obey_is_asked_nothing_more_and_restarted() {
    fn check(failing: &str, act: impl FnOnce(&mut Supervisor) -> Vec<String>, expected: &[&str]) {
        let mut supervisor = Supervisor::serving(&[cam()]);
        let id = worker("eth0", 0);
        supervisor.failing = vec![failing.to_owned()];
        did(&act(&mut supervisor), expected);
        assert!(supervisor.state.workers()[&id].failed);
        let rule = supervisor.state.rules().iter().next().cloned();
        if let Some(rule) = &rule {
            let (problem, why) = supervisor.state.rule_problem(rule).unwrap();
            assert_eq!(problem, Problem::Waits);
            let cause = format!("worker eth0/xdp0 is being restarted: cannot {failing}");
            assert!(why.starts_with(&cause), "{why}");
        }
        did(&supervisor.settle(), &[]);
        supervisor.failing.clear();
        did(&supervisor.exit(&id, SHORT), &["restart eth0/xdp0 after 50ms"]);
        assert_eq!(supervisor.restart(&id)[0], "start eth0/xdp0");
        supervisor.check_settled();
        assert_eq!(supervisor.state.mishaps(&id).restarts, 1);
    }
    check(
        "upsert eth0/xdp0",
        |supervisor| supervisor.amend("cam", &["239.2.2.2:6000@eth1,ttl=3"], &[]),
        &["! upsert eth0/xdp0 rule 0 0>239.2.2.2:6000 by #0 from 10.0.1.1"],
    );
    check(
        "remove eth0/xdp0",
        |supervisor| supervisor.remove("cam"),
        &["delete eth0 *,239.1.1.1:5000", "barrier", "! remove eth0/xdp0 rule 0", "leave 239.1.1.1%10"],
    );
    for failing in ["start eth0/xdp0", "steer eth0/xdp0"] {
        let mut supervisor = Supervisor::serving(&[]);
        supervisor.failing = vec![failing.to_owned()];
        let done = supervisor.add(cam());
        assert!(done.contains(&format!("! {failing}")), "{done:?}");
        did(&supervisor.settle(), &[]);
        // It fails and fails.
        for pause in ["50ms", "100ms", "200ms"] {
            let ended = supervisor.exit(&worker("eth0", 0), Duration::ZERO);
            did(&ended, &[&format!("restart eth0/xdp0 after {pause}")]);
            assert!(supervisor.restart(&worker("eth0", 0)).contains(&format!("! {failing}")));
        }
        supervisor.failing.clear();
        supervisor.exit(&worker("eth0", 0), Duration::ZERO);
        supervisor.restart(&worker("eth0", 0));
        supervisor.check_settled();
    }
}

#[test]
fn an_egress_socket_that_cannot_be_made_leaves_its_outputs_waiting_and_the_worker_alone() {
    let named = || {
        rule("named", "239.1.1.2:5000@eth0", &["239.2.2.2:7000@eth1,from=10.0.1.1:53", "239.2.2.3:7000@eth1"])
    };
    let mut supervisor = Supervisor::serving(&[cam()]);
    supervisor.failing = vec!["open eth0/xdp0 #1 eth1%11:53".to_owned()];
    did(
        &supervisor.add(named()),
        &[
            "! open eth0/xdp0 #1 eth1%11:53",
            "upsert eth0/xdp0 rule 1 1>pending 2>239.2.2.3:7000 by #0 from 10.0.1.1",
            "join 239.1.1.2%10",
            "set eth0 *,239.1.1.2:5000 steer rule 1",
        ],
    );
    let output = &named().outputs[0];
    assert_eq!(supervisor.pending(output).as_deref(), Some("cannot open eth0/xdp0 #1 eth1%11:53"));
    assert_eq!(supervisor.problem("named"), None);
    assert_eq!(supervisor.problem("cam"), None);
    assert!(!supervisor.state.workers()[&worker("eth0", 0)].failed);
    did(&supervisor.settle(), &[]);
    // Asked for again or changed, it is tried again.
    did(&supervisor.add(named()), &["! open eth0/xdp0 #1 eth1%11:53"]);
    did(
        &supervisor.amend("named", &["239.2.2.4:7000@eth1"], &[]),
        &[
            "! open eth0/xdp0 #1 eth1%11:53",
            "upsert eth0/xdp0 rule 1 1>pending 2>239.2.2.3:7000 by #0 from 10.0.1.1 \
             3>239.2.2.4:7000 by #0 from 10.0.1.1",
        ],
    );
    supervisor.failing.clear();
    supervisor.change("eth1", |link| link.mtu = 1400);
    assert_eq!(supervisor.pending(output), None);
    supervisor.check_settled();
}

#[test]
fn what_cannot_be_taken_back_counts_as_gone() {
    let mut supervisor = Supervisor::serving(&[cam()]);
    supervisor.failing = ["delete", "leave", "detach"].map(str::to_owned).to_vec();
    let done = supervisor.remove("cam");
    assert_eq!(done.iter().filter(|line| line.starts_with('!')).count(), 2, "{done:?}");
    did(&supervisor.take(Event::Stop { keep: false }), &["stop eth0/xdp0", "! detach eth0"]);
}

#[test]
fn the_end_comes_flows_first_and_programs_last() {
    let both = [cam(), rule("mic", "239.1.1.2:5000@eth1", &["239.2.2.2:7000@eth2"])];
    let mut supervisor = Supervisor::serving(&both);
    did(
        &supervisor.take(Event::Stop { keep: false }),
        &[
            "delete eth0 *,239.1.1.1:5000",
            "delete eth1 *,239.1.1.2:5000",
            "barrier",
            "remove eth0/xdp0 rule 0",
            "remove eth1/xdp0 rule 1",
            "leave 239.1.1.2%11",
            "leave 239.1.1.1%10",
            "stop eth0/xdp0",
            "stop eth1/xdp0",
            "detach eth0",
            "detach eth1",
        ],
    );
    // Nothing begins again.
    did(&supervisor.exit(&worker("eth0", 0), SHORT), &[]);
    did(&supervisor.restart(&worker("eth0", 0)), &[]);
    did(&supervisor.links(links(0..2)), &[]);
    did(&supervisor.settle(), &[]);
    assert_eq!(supervisor.world.memberships.len() + supervisor.world.processes.len(), 0);
    assert!(supervisor.world.served.is_empty());
}

#[test]
fn a_worker_that_failed_does_not_hold_up_the_end() {
    let mut supervisor = Supervisor::serving(&[cam()]);
    supervisor.failing = vec!["remove eth0/xdp0".to_owned()];
    did(
        &supervisor.take(Event::Stop { keep: false }),
        &[
            "delete eth0 *,239.1.1.1:5000",
            "barrier",
            "! remove eth0/xdp0 rule 0",
            "leave 239.1.1.1%10",
            "stop eth0/xdp0",
            "detach eth0",
        ],
    );
}

#[test]
fn the_fewest_workers_decide_the_cpu_and_it_is_kept() {
    let mut supervisor = Supervisor::with(limits(8, Some(2), &[4, 5, 6]));
    supervisor.links(links(0..4));
    supervisor.change("eth0", |link| link.rx_queues = 2);
    supervisor.change("eth1", |link| link.rx_queues = 2);
    supervisor.add(cam());
    supervisor.add(rule("mic", "239.1.1.2:5000@eth1", &["239.2.2.2:7000@eth2"]));
    let cpus = |supervisor: &Supervisor| -> Vec<Option<u32>> {
        supervisor.state.workers().values().map(|running| running.spec.as_ref().unwrap().cpu).collect()
    };
    assert_eq!(cpus(&supervisor), [Some(4), Some(5), Some(6), Some(4)]);
    supervisor.exit(&worker("eth0", 1), SHORT);
    supervisor.restart(&worker("eth0", 1));
    assert_eq!(cpus(&supervisor), [Some(4), Some(5), Some(6), Some(4)]);
}

#[test]
fn workers_are_near_their_device_unless_the_operator_chose() {
    for (chosen, expected) in
        [(false, vec![Some(2), Some(3)]), (true, vec![Some(0), Some(1), Some(2), Some(3)])]
    {
        let limits = Limits { cpus_chosen: chosen, ..limits(8, None, &[0, 1, 2, 3]) };
        let mut supervisor = Supervisor::with(limits);
        supervisor.links(links(0..4));
        supervisor.change("eth0", |link| (link.rx_queues, link.near_cpus) = (8, vec![2, 3, 9]));
        supervisor.add(cam());
        let cpus = supervisor.state.workers().values().map(|running| running.spec.as_ref().unwrap().cpu);
        assert_eq!(cpus.collect::<Vec<_>>(), expected);
    }
}

/// What may happen, in terms that fit any state.
#[derive(Clone, Debug)]
enum Step {
    Add {
        rule: u8,
        input: u8,
        outputs: Vec<u8>,
        merge: bool,
    },
    Remove {
        rule: u8,
    },
    Datapath {
        rule: u8,
        datapath: u8,
    },
    Amend {
        rule: u8,
        add: Vec<u8>,
        delete: Vec<u8>,
    },
    Toggle {
        n: u8,
    },
    Delete {
        n: u8,
    },
    Make {
        n: u8,
        index: u8,
        queues: u8,
        large: bool,
    },
    Address {
        n: u8,
        last: Option<u8>,
    },
    Exit {
        worker: u8,
    },
    Restart {
        worker: u8,
    },
    JoinsDue,
    /// Where the hosts of outputs are found, by turns.
    Hops(Vec<u8>),
    /// Whether each interface takes redirected frames, and whether nothing is in place there.
    Targets(Vec<(bool, bool)>),
    /// From now on this fails, or nothing does.
    Fail {
        what: Option<u8>,
    },
}

const INPUTS: [&str; 7] = [
    "239.1.1.1:5000@eth0",
    "239.1.1.1:5001@eth0",
    "239.1.1.1:5000@eth0,source=10.0.0.1",
    "239.1.1.1:5000@eth0,source=192.0.2.7",
    "239.1.1.1:5000@eth1",
    "239.1.1.2:5000@eth1",
    "239.1.1.2:5000@eth2,source=10.0.2.2",
];

const OUTPUTS: [&str; 10] = [
    "239.1.1.1:5000@eth0",
    "239.1.1.1:5000@eth1",
    "239.1.1.2:5000@eth1,loop=true",
    "239.1.1.2:5000@eth2",
    "239.1.1.1:5001@eth0,ttl=3",
    "239.1.1.1:5001@eth0,from=10.0.2.1",
    "239.9.9.9:7000@eth2,from=10.0.2.2:53",
    "239.9.9.9:7001@eth3",
    "192.0.2.9:7000@eth1",
    "10.0.2.9:7000@eth2",
];

const FAILING: [&str; 14] = [
    "attach eth0",
    "attach eth1",
    "fanout eth1",
    "start eth0/xdp0",
    "start eth1",
    "steer eth0/xdp0",
    "steer eth1",
    "open",
    "upsert eth0/xdp0",
    "upsert eth1",
    "remove",
    "join 239.1.1.1",
    "set eth0 *",
    "set eth1 10",
];

fn any_step() -> impl Strategy<Value = Step> {
    let outputs = || vec(0..OUTPUTS.len() as u8, 1..4);
    prop_oneof![
        6 => (0_u8..6, 0..INPUTS.len() as u8, outputs(), any::<bool>())
            .prop_map(|(rule, input, outputs, merge)| Step::Add { rule, input, outputs, merge }),
        3 => (0_u8..6).prop_map(|rule| Step::Remove { rule }),
        3 => (0_u8..6, 0_u8..4).prop_map(|(rule, datapath)| Step::Datapath { rule, datapath }),
        2 => vec((any::<bool>(), any::<bool>()), 4).prop_map(Step::Targets),
        2 => vec(0_u8..7, 1..4).prop_map(Step::Hops),
        3 => (0_u8..6, vec(0..OUTPUTS.len() as u8, 0..2), vec(0..OUTPUTS.len() as u8, 0..2))
            .prop_map(|(rule, add, delete)| Step::Amend { rule, add, delete }),
        2 => (0_u8..4).prop_map(|n| Step::Toggle { n }),
        1 => (0_u8..4).prop_map(|n| Step::Delete { n }),
        3 => (0_u8..4, 0_u8..3, 1_u8..5, any::<bool>())
            .prop_map(|(n, index, queues, large)| Step::Make { n, index, queues, large }),
        2 => (0_u8..4, proptest::option::weighted(0.8, 1_u8..4))
            .prop_map(|(n, last)| Step::Address { n, last }),
        2 => (0_u8..8).prop_map(|worker| Step::Exit { worker }),
        2 => (0_u8..8).prop_map(|worker| Step::Restart { worker }),
        1 => Just(Step::JoinsDue),
        2 => proptest::option::of(0..FAILING.len() as u8).prop_map(|what| Step::Fail { what }),
    ]
}

impl Supervisor {
    /// Takes a step; what is refused changes nothing.
    fn step(&mut self, step: Step, waiting: &mut Vec<WorkerId>) {
        let outputs = |numbers: &[u8]| numbers.iter().map(|&n| output(OUTPUTS[usize::from(n)])).collect();
        match step {
            Step::Add { rule: n, input, outputs, merge } => {
                let texts: Vec<_> = outputs.iter().map(|&n| OUTPUTS[usize::from(n)]).collect();
                let rule = rule(&format!("r{n}"), INPUTS[usize::from(input)], &texts);
                let _ = self.state.add(Rule { merge, ..rule }, Origin::Cli);
            }
            Step::Remove { rule } => {
                let _ = self.state.remove(&format!("r{rule}"));
            }
            Step::Datapath { rule, datapath } => {
                let named = [None, Some(Datapath::AfXdp), Some(Datapath::AfPacket), Some(Datapath::Redirect)];
                let named = named[usize::from(datapath)];
                let amendment = Amendment { datapath: Some(DatapathChoice(named)), ..Amendment::default() };
                let _ = self.state.amend(&format!("r{rule}"), amendment);
            }
            Step::Amend { rule, add, delete } => {
                let amendment =
                    Amendment { add: outputs(&add), delete: outputs(&delete), ..Amendment::default() };
                let _ = self.state.amend(&format!("r{rule}"), amendment);
            }
            Step::Toggle { n } => self.relink(n, |link| link.up = !link.up),
            Step::Delete { n } => {
                self.world.links.remove(&link(n).0);
                self.tell_links();
            }
            Step::Make { n, index, queues, large } => {
                let (name, made) = link(n);
                let index = IfIndex(made.index.0 + 10 * u32::from(index));
                let mtu = if large { 3000 } else { 1500 };
                self.world.links.insert(name, Link { index, mtu, rx_queues: queues.into(), ..made });
                self.tell_links();
            }
            Step::Address { n, last } => self.relink(n, |link| {
                link.addresses = last.map(|last| Ipv4Addr::new(10, 0, n, last)).into_iter().collect();
            }),
            Step::Exit { worker } => {
                let ended = self.world.processes.keys().nth(worker.into()).cloned();
                waiting.extend(ended.into_iter().inspect(|id| {
                    self.exit(id, SHORT);
                }));
            }
            Step::Restart { worker } => {
                if usize::from(worker) < waiting.len() {
                    let id = waiting.remove(worker.into());
                    self.state.apply(Event::RestartDue { id });
                }
            }
            Step::Targets(answers) => {
                let each = (0..).zip(answers);
                let of = |n: u8, what: Option<&str>| (link(n).0, what.map(str::to_owned));
                let (refusals, hooks) = each
                    .map(|(n, (takes, free))| {
                        (of(n, (!takes).then_some("takes none")), of(n, (!free).then_some("has a firewall")))
                    })
                    .unzip();
                self.state.apply(Event::Targets(Targets { refusals, hooks, ..Targets::default() }));
            }
            Step::Hops(kinds) => {
                let hop = |(host, kind)| match kind {
                    0 => None,
                    1 => Some((host, NextHop::Direct)),
                    2 => Some((host, NextHop::NoRoute)),
                    6 => Some((host, NextHop::Broadcast)),
                    3 => Some((host, neighbour([10, 0, 0, 254], None, true))),
                    4 => Some((host, neighbour([10, 0, 0, 254], None, false))),
                    _ => Some((host, neighbour([10, 0, 0, 254], Some([2, 0, 0, 0, 9, kind]), false))),
                };
                let hosts = self.state.hosts().into_iter();
                let hops = hosts.zip(kinds.into_iter().cycle()).filter_map(hop).collect();
                self.state.apply(Event::NextHops(hops));
            }
            Step::JoinsDue => drop(self.state.apply(Event::JoinsDue)),
            Step::Fail { what } => {
                self.failing = what.map(|what| FAILING[usize::from(what)].to_owned()).into_iter().collect();
            }
        }
        self.settle();
    }

    fn relink(&mut self, n: u8, change: impl FnOnce(&mut Link)) {
        if let Some(link) = self.world.links.get_mut(&link(n).0) {
            change(link);
            self.tell_links();
        }
    }

    fn tell_links(&mut self) {
        self.state.apply(Event::Links(self.world.links.clone()));
    }
}

/// Another daemon in the place of one that was killed, with these rules and what was left in the kernel.
fn succeed(former: &Supervisor, rules: &[Rule]) -> Supervisor {
    let mut world = World { processes: BTreeMap::new(), dirty: false, ..former.world.clone() };
    world.served.retain(|_, kernel| {
        kernel.fanout = None;
        kernel.xdp
    });
    world.memberships.retain(|joined| joined.outlives);
    let served = &world.served;
    world.flows.retain(|name, flows| {
        flows.retain(|_, flow| matches!(flow.action, action::REDIRECT | action::LOOP));
        served.contains_key(name)
    });
    let mut state = State::new(former.state.limits.clone());
    state.apply(Event::Links(world.links.clone()));
    state.apply(Event::Targets(former.state.targets.clone()));
    state.inherit_memberships(world.memberships.iter().map(|joined| joined.membership));
    for name in served.keys() {
        let flows = world.flows.get(name).into_iter().flatten().map(|(key, flow)| (*key, *flow)).collect();
        let sets = world.outputs.iter().filter(|((interface, _), _)| interface == name);
        let sets = sets.map(|((_, slot), outputs)| (RuleSlot(*slot), outputs.clone())).collect();
        assert!(state.inherit(name, &Inheritance { flows, sets, to_succeed: false }));
    }
    let mut next = Supervisor { state, world, failing: Vec::new() };
    for rule in rules {
        let _ = next.state.add(rule.clone(), Origin::Cli);
    }
    next
}

/// A rule that the kernel serves, and its supervisor.
fn redirecting() -> Supervisor {
    let mut supervisor = Supervisor::new();
    supervisor.links(links(0..4));
    let free = |n: u8| (link(n).0, None);
    let targets = Targets {
        refusals: (0..4).map(free).collect(),
        hooks: (0..4).map(free).collect(),
        ..Targets::default()
    };
    supervisor.state.apply(Event::Targets(targets));
    supervisor.add(cam());
    supervisor
}

#[test]
fn a_rule_that_was_served_before_takes_no_change() {
    let former = redirecting();
    let mut next = succeed(&former, &[cam()]);
    did(&next.settle(), &[]);
    next.check_settled();
    // Other outputs, no outputs: the difference alone.
    let mut next =
        succeed(&former, &[rule("cam", "239.1.1.1:5000@eth0", &["239.2.2.9:1@eth2", "239.2.2.2:6000@eth1"])]);
    did(&next.settle(), &["outputs eth0 rule 0 1%12 0%11"]);
    next.check_settled();
    let mut next = succeed(&former, &[]);
    did(
        &next.settle(),
        &[
            "delete eth0 *,239.1.1.1:5000",
            "barrier",
            "drop outputs eth0 [RuleSlot(0)]",
            "leave 239.1.1.1%10 to outlive",
        ],
    );
    // Another rule never gets slots that the kernel has still.
    let mut next = succeed(&former, &[rule("mic", "239.1.1.2:5000@eth0", &["239.2.2.9:1@eth2"]), cam()]);
    assert_eq!(next.state.rules().get("cam").unwrap().slot, RuleSlot(0));
    assert_eq!(next.state.rules().get("mic").unwrap().slot, RuleSlot(1));
    next.settle();
    next.check_settled();
}

#[test]
fn a_former_program_is_succeeded_when_all_is_there() {
    let former = redirecting();
    let mut next = succeed(&former, &[]);
    let name = interface("eth0");
    let inheritance = Inheritance {
        flows: former.world.flows[&name].iter().map(|(key, flow)| (*key, *flow)).collect(),
        sets: former.world.outputs.iter().map(|((_, slot), set)| (RuleSlot(*slot), set.clone())).collect(),
        to_succeed: true,
    };
    next.state = State::new(former.state.limits.clone());
    next.state.apply(Event::Links(next.world.links.clone()));
    next.state.apply(Event::Targets(former.state.targets.clone()));
    assert!(next.state.inherit(&name, &inheritance));
    assert!(!next.state.inherit(&interface("eth1"), &inheritance), "slots are had once");
    (next.world.flows, next.world.outputs) = Default::default();
    next.world.served.get_mut(&name).unwrap().xdp = true;
    next.world.memberships.clear();
    let mut failing = next.state.clone();
    next.world.succeeding = true;
    let done = next.add(cam());
    did(
        &done,
        &[
            "outputs eth0 rule 0 0%11",
            "join 239.1.1.1%10 to outlive",
            "set eth0 *,239.1.1.1:5000 redirect rule 0",
            "attach eth0",
        ],
    );
    next.check_settled();
    // Where that fails it is said, and nothing is thought to run.
    failing.add(cam(), Origin::Cli).unwrap();
    failing.failed(&Effect::Attach { interface: name.clone() }, Failure::Refused("no".to_owned()));
    assert!(!failing.serves(&name, Datapath::Redirect));
    assert_eq!(failing.no_xdp(&name).as_deref(), Some("no"));
}

#[test]
fn a_membership_that_changes_hands_is_joined_before_it_is_left() {
    let mut supervisor = redirecting();
    let to = |datapath| Amendment { datapath: Some(DatapathChoice(Some(datapath))), ..Amendment::default() };
    for (datapath, joined, left) in
        [(Datapath::AfXdp, "", " to outlive"), (Datapath::Redirect, " to outlive", "")]
    {
        supervisor.state.amend("cam", to(datapath)).unwrap();
        let done = supervisor.settle();
        let at = |text: String| done.iter().position(|line| *line == text);
        let (joined, left) =
            (at(format!("join 239.1.1.1%10{joined}")), at(format!("leave 239.1.1.1%10{left}")));
        assert!(joined.is_some() && joined < left, "{done:?}");
        supervisor.check_settled();
    }
}

#[test]
fn what_the_kernel_does_by_itself_is_kept_at_the_end() {
    let mut supervisor = redirecting();
    supervisor.add(Rule {
        datapath: DatapathChoice(Some(Datapath::AfXdp)),
        ..rule("mic", "239.1.1.2:5000@eth0", &["239.2.2.9:1@eth2"])
    });
    supervisor.add(rule("door", "239.1.1.3:5000@eth1", &["239.2.2.9:2@eth2,loop=true"]));
    let done = supervisor.take(Event::Stop { keep: true });
    assert!(
        done.contains(&"detach eth1".to_owned()) && !done.contains(&"detach eth0".to_owned()),
        "{done:?}"
    );
    assert_eq!(supervisor.state.plan(), []);
    let world = &supervisor.world;
    assert!(world.processes.is_empty());
    assert_eq!(world.served.keys().collect::<Vec<_>>(), [&interface("eth0")]);
    let kept: Vec<_> = world.flows[&interface("eth0")].values().map(|flow| flow.action).collect();
    assert_eq!(kept, [action::REDIRECT]);
    let joined: Vec<_> = world.memberships.iter().map(member).collect();
    assert_eq!(joined, ["239.1.1.1%10 to outlive"]);
}

proptest! {
    #[test]
    fn whatever_happens_it_settles_as_it_is_wanted(
        steps in vec(any_step(), 1..40),
        workers in proptest::option::of(1_u32..4),
    ) {
        let mut supervisor = Supervisor::with(limits(5, workers, &[0, 1]));
        supervisor.links(links(0..3));
        let mut waiting = Vec::new();
        for step in steps {
            supervisor.step(step, &mut waiting);
            prop_assert_eq!(supervisor.state.plan(), []);
        }
        // What failed fails no more, who is dead is buried, and all interfaces have changed.
        supervisor.failing.clear();
        let dead = |(id, process): (&WorkerId, &Process)| process.dead.then(|| id.clone());
        for id in supervisor.world.processes.iter().filter_map(dead).collect::<Vec<_>>() {
            supervisor.exit(&id, SHORT);
            waiting.push(id);
        }
        for id in waiting {
            supervisor.restart(&id);
        }
        for link in supervisor.world.links.values_mut() {
            link.mtu -= 1;
        }
        supervisor.tell_links();
        supervisor.settle();
        supervisor.check_settled();
        for entry in supervisor.state.rules().iter() {
            // One that is named is not served where it cannot be.
            if entry.rule.datapath == DatapathChoice(Some(Datapath::Redirect)) {
                continue;
            }
            let problem = supervisor.state.rule_problem(entry).map(|(problem, _)| problem);
            prop_assert_ne!(problem, Some(Problem::Failed));
        }
        // The next daemon has some of its rules, in another order.
        let mut rules: Vec<_> = supervisor.state.rules().iter().map(|entry| entry.rule.clone()).collect();
        rules.reverse();
        let goes_on: Vec<_> =
            supervisor.state.redirected().map(|entry| (entry.rule.clone(), entry.slot)).collect();
        let mut next = succeed(&supervisor, &rules[rules.len() / 3..]);
        for (rule, slot) in goes_on {
            let same = |entry: &&Entry| entry.rule == rule;
            prop_assert!(next.state.rules().iter().find(same).is_none_or(|entry| entry.slot == slot));
        }
        next.settle();
        next.check_settled();
        supervisor.take(Event::Stop { keep: false });
        prop_assert_eq!(supervisor.state.plan(), []);
        prop_assert!(supervisor.world.processes.is_empty() && supervisor.world.served.is_empty());
        prop_assert!(supervisor.world.memberships.is_empty());
    }
}
