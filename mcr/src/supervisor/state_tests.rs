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
    WorkerId { interface: interface(name), index }
}

/// `ethN` with index `10 + N` and the address 10.0.N.1, one queue.
fn link(n: u8) -> (InterfaceName, Link) {
    let link = Link {
        index: IfIndex(10 + u32::from(n)),
        up: true,
        mtu: 1500,
        addresses: vec![Ipv4Addr::new(10, 0, n, 1)],
        kind: "veth".to_owned(),
        rx_queues: 1,
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
        Effect::Attach { interface } => format!("attach {interface}"),
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
                    Some(route) => write!(
                        text,
                        " {}>{}:{} by #{} from {}",
                        output.slot, route.destination, route.port, route.socket, route.source
                    ),
                    None => write!(text, " {}>pending", output.slot),
                };
            }
            text
        }
        Effect::RemoveRule { id, slot } => format!("remove {id} rule {}", slot.0),
        Effect::SetFlow { interface, key, value } => {
            let action = if value.action == action::LOOP { "loop" } else { "steer" };
            format!("set {interface} {} {action} rule {}", flow(key), value.rule)
        }
        Effect::DeleteFlow { interface, key } => format!("delete {interface} {}", flow(key)),
        Effect::Barrier => "barrier".to_owned(),
        Effect::Join(membership) => format!("join {}", member(membership)),
        Effect::Leave(membership) => format!("leave {}", member(membership)),
    }
}

fn flow(key: &FlowKey4) -> String {
    let source = Ipv4Addr::from(key.source);
    let source = if source.is_unspecified() { "*".to_owned() } else { source.to_string() };
    format!("{source},{}:{}", Ipv4Addr::from(key.group), u16::from_be_bytes(key.port))
}

fn member(membership: &Membership) -> String {
    let source = membership.source.map(|source| format!("{source},")).unwrap_or_default();
    format!("{source}{}%{}", membership.group, membership.interface.0)
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

/// Kernel and workers. What no sound supervisor asks for panics.
#[derive(Clone, Debug, Default)]
struct World {
    links: Links,
    attached: BTreeMap<InterfaceName, IfIndex>,
    flows: BTreeMap<InterfaceName, BTreeMap<FlowKey4, FlowValue>>,
    memberships: BTreeSet<Membership>,
    processes: BTreeMap<WorkerId, Process>,
    /// Flows were deleted that a program may still act on.
    dirty: bool,
}

impl World {
    fn execute(&mut self, effect: &Effect) {
        match effect {
            Effect::Attach { interface } => {
                let index = self.links.get(interface).expect("attached to nothing").index;
                assert_eq!(self.attached.insert(interface.clone(), index), None, "attached twice");
            }
            Effect::Detach { interface } => {
                assert!(!self.processes.keys().any(|id| id.interface == *interface), "workers outlive it");
                self.attached.remove(interface).expect("detached what is not attached");
                self.flows.remove(interface);
            }
            Effect::StartWorker { id, spec } => {
                assert!(self.attached.contains_key(&id.interface), "a worker without a program");
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
                let steered = flows.any(|(_, flow)| (flow.rule, flow.action) == (slot.0, action::STEER));
                assert!(!steered, "its flow stands");
                self.process(id).rules.remove(&slot.0).expect("removed what is not there");
            }
            Effect::SetFlow { interface, key, value } => {
                assert!(self.attached.contains_key(interface), "a flow without a program");
                let held = |(id, process): (&WorkerId, &Process)| {
                    let holds = process.dead || process.rules.contains_key(&value.rule);
                    id.interface != *interface || holds
                };
                let steers = value.action == action::STEER;
                assert!(!steers || self.processes.iter().all(held), "steered to a worker without the rule");
                self.flows.entry(interface.clone()).or_default().insert(*key, *value);
            }
            Effect::DeleteFlow { interface, key } => {
                self.flows.entry(interface.clone()).or_default().remove(key);
                self.dirty = true;
            }
            Effect::Barrier => self.dirty = false,
            Effect::Join(membership) => {
                assert!(self.memberships.insert(*membership), "joined twice");
            }
            Effect::Leave(membership) => {
                assert!(self.memberships.remove(membership), "left what is not joined");
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
    outputs.filter_map(|output| output.route.map(|route| route.socket)).collect()
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
        Self::with(Limits { max_rules: 8, workers: None, cpus: vec![0], source_port: 4000 })
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
                        break;
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

    fn problem(&self, rule: &str) -> Option<(Problem, String)> {
        self.state.rule_problem(self.state.rules().get(rule).unwrap())
    }

    /// The world is as the rules and the interfaces want it. Asks the rule set and the interfaces only.
    fn check_settled(&mut self) {
        assert_eq!(self.state.plan(), []);
        let wanted: Vec<_> = self.state.rules().iter().cloned().collect();
        let there = |entry: &&Entry| self.world.links.contains_key(&entry.rule.input.interface);
        let served: Vec<_> = wanted.iter().filter(there).collect();
        for (name, index) in &self.world.attached {
            assert_eq!(self.world.links.get(name).map(|link| link.index), Some(*index), "{name}");
        }
        let mut memberships = BTreeSet::new();
        for entry in &served {
            let input = &entry.rule.input;
            let link = &self.world.links[&input.interface];
            assert!(self.world.attached.contains_key(&input.interface), "{}", input.interface);
            if link.up {
                memberships.insert(Membership {
                    interface: link.index,
                    group: input.group,
                    source: input.source,
                });
            }
        }
        assert_eq!(self.world.memberships, memberships);
        for (name, link) in &self.world.links {
            let rules: Vec<_> = served.iter().filter(|entry| entry.rule.input.interface == *name).collect();
            self.check_flows(name, &rules);
            if self.world.attached.contains_key(name) {
                self.check_workers(name, link, &rules);
            }
        }
        assert!(!self.world.dirty);
        let named = self.world.flows.iter().filter(|(_, flows)| !flows.is_empty()).map(|(name, _)| name);
        for name in named.chain(self.world.processes.keys().map(|id| &id.interface)) {
            assert!(self.world.attached.contains_key(name), "{name} has no program");
        }
    }

    fn check_flows(&self, name: &InterfaceName, rules: &[&&Entry]) {
        let none = BTreeMap::new();
        let flows = self.world.flows.get(name).unwrap_or(&none);
        let mut expected: BTreeMap<_, _> = rules
            .iter()
            .map(|entry| (ruleset::key(&entry.rule.input), (entry.slot.0, action::STEER)))
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

    fn check_workers(&self, name: &InterfaceName, link: &Link, rules: &[&&Entry]) {
        let mut queues: Vec<u32> = Vec::new();
        for (id, process) in self.world.processes.iter().filter(|(id, _)| id.interface == *name) {
            let spec = process.spec.as_ref().unwrap();
            assert_eq!(spec.ifindex, link.index, "{id}");
            assert!(process.steered, "{id}");
            queues.extend(&spec.queues);
            let slots: Vec<_> = rules.iter().map(|entry| entry.slot.0).collect();
            assert!(slots.iter().collect::<BTreeSet<_>>().into_iter().eq(process.rules.keys()), "{id}");
            for entry in rules {
                self.check_rule(process, entry);
            }
            let open: BTreeSet<_> = process.sockets.keys().copied().collect();
            assert_eq!(open, needed_sockets(&process.rules), "{id}");
        }
        queues.sort_unstable();
        assert!(queues.iter().copied().eq(0..link.rx_queues), "{name}: {queues:?}");
    }

    fn check_rule(&self, process: &Process, entry: &Entry) {
        let rule = &process.rules[&entry.slot.0];
        assert_eq!(rule.key, ruleset::key(&entry.rule.input));
        let slots: Vec<_> = rule.outputs.iter().map(|output| OutputSlot(output.slot)).collect();
        assert_eq!(slots, entry.output_slots);
        for (compiled, output) in rule.outputs.iter().zip(&entry.rule.outputs) {
            assert_eq!(compiled.route.map(|route| route.source), self.source(output), "{output}");
            assert_eq!(self.state.output_pending(output).is_none(), compiled.route.is_some(), "{output}");
            let Some(route) = compiled.route else { continue };
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
        let link = self.world.links.get(&output.interface).filter(|link| link.up)?;
        let local = |from: &Ipv4Addr| self.world.links.values().any(|link| link.addresses.contains(from));
        match output.from {
            Some(from) => Some(from.address).filter(local),
            None => link.addresses.first().copied(),
        }
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
            "attach eth0",
            "start eth0/0",
            "open eth0/0 #0 eth1%11:4000",
            "upsert eth0/0 rule 0 0>239.2.2.2:6000 by #0 from 10.0.1.1",
            "steer eth0/0",
            "join 239.1.1.1%10",
            "set eth0 *,239.1.1.1:5000 steer rule 0",
        ],
    );
    supervisor.check_settled();
    assert_eq!(supervisor.problem("cam"), None);
    assert!(supervisor.state.is_attached(&interface("eth0")));
    // The very same rule again is nothing to do.
    did(&supervisor.add(cam()), &[]);
}

#[test]
fn the_second_rule_of_an_interface_uses_what_stands() {
    let mut supervisor = Supervisor::serving(&[cam()]);
    did(
        &supervisor.add(rule("mic", "232.1.1.2:5000@eth0,source=192.0.2.7", &["239.2.2.2:7000@eth1"])),
        &[
            "upsert eth0/0 rule 1 1>239.2.2.2:7000 by #0 from 10.0.1.1",
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
            "open eth0/0 #1 eth2%12:4000",
            "open eth0/0 #2 eth1%11:53",
            "open eth0/0 #3 eth1%11:4000 loop",
            "upsert eth0/0 rule 2 2>239.2.2.3:1 by #1 from 10.0.2.1 3>239.2.2.3:1 by #2 from 10.0.1.1 \
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
            "attach eth1",
            "set eth0 10.0.0.1,239.1.1.1:5000 loop rule 0",
            "start eth1/0",
            "open eth1/0 #1 eth0%10:4000",
            "upsert eth1/0 rule 1 1>239.1.1.1:5000 by #1 from 10.0.0.1",
            "steer eth1/0",
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
            "remove eth1/0 rule 1",
            "leave 239.2.2.2%11",
            "close eth1/0 #1",
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
            "remove eth0/0 rule 1",
            "leave 239.1.1.2%10",
            "close eth0/0 #1",
        ],
    );
    supervisor.check_settled();
    // Program and worker of the last rule stay.
    did(
        &supervisor.remove("cam"),
        &[
            "delete eth0 *,239.1.1.1:5000",
            "barrier",
            "remove eth0/0 rule 0",
            "leave 239.1.1.1%10",
            "close eth0/0 #0",
        ],
    );
    supervisor.check_settled();
    assert!(supervisor.state.is_attached(&interface("eth0")));
    // So that the next one finds them.
    did(
        &supervisor.add(cam()),
        &[
            "open eth0/0 #0 eth1%11:4000",
            "upsert eth0/0 rule 0 0>239.2.2.2:6000 by #0 from 10.0.1.1",
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
            "open eth0/0 #1 eth2%12:4000",
            "upsert eth0/0 rule 0 0>239.2.2.2:6000 by #0 from 10.0.1.1 1>239.2.2.3:6000 by #1 from 10.0.2.1",
        ],
    );
    did(
        &supervisor.amend("cam", &["239.2.2.3:6000@eth2,ttl=3"], &["239.2.2.2:6000@eth1"]),
        &["upsert eth0/0 rule 0 1>239.2.2.3:6000 by #1 from 10.0.2.1", "close eth0/0 #0"],
    );
    did(
        &supervisor.amend("cam", &["239.2.2.3:6000@eth2,loop=true"], &[]),
        &[
            "open eth0/0 #2 eth2%12:4000 loop",
            "upsert eth0/0 rule 0 1>239.2.2.3:6000 by #2 from 10.0.2.1",
            "close eth0/0 #1",
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
            "attach eth0",
            "start eth0/0",
            "open eth0/0 #0 eth1%11:4000",
            "upsert eth0/0 rule 0 0>239.2.2.2:6000 by #0 from 10.0.1.1",
            "steer eth0/0",
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
    let gone = ["stop eth0/0", "detach eth0", "leave 239.1.1.1%10"];
    did(&supervisor.links(links(1..4)), &gone);
    supervisor.check_settled();
    let missing = "interface eth0 does not exist".to_owned();
    assert_eq!(supervisor.problem("cam"), Some((Problem::Waits, missing)));
    let again = [
        "attach eth0",
        "start eth0/0",
        "open eth0/0 #0 eth1%11:4000",
        "upsert eth0/0 rule 0 0>239.2.2.2:6000 by #0 from 10.0.1.1",
        "steer eth0/0",
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
    did(&supervisor.links(remade), &["stop eth0/0", "detach eth0"]);
    supervisor.check_settled();
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
            &["upsert eth0/0 rule 0 0>pending 1>239.2.2.3:6000 by #1 from 10.0.2.1", "close eth0/0 #0"],
        );
        let first = output("239.2.2.2:6000@eth1");
        assert_eq!(supervisor.state.output_pending(&first).as_deref(), Some(pending));
        assert_eq!(supervisor.state.output_pending(&output("239.2.2.3:6000@eth2")), None);
        assert_eq!(supervisor.problem("two"), None);
        supervisor.check_settled();
        let back = supervisor.links(links(0..4));
        did(
            &back,
            &[
                "open eth0/0 #0 eth1%11:4000",
                "upsert eth0/0 rule 0 0>239.2.2.2:6000 by #0 from 10.0.1.1 1>239.2.2.3:6000 by #1 from 10.0.2.1",
            ],
        );
        assert_eq!(supervisor.state.output_pending(&first), None);
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
        &["upsert eth0/0 rule 0 0>239.2.2.2:6000 by #0 from 10.9.9.9"],
    );
    check(
        |link| link.addresses.insert(0, moved),
        &["upsert eth0/0 rule 0 0>239.2.2.2:6000 by #0 from 10.9.9.9"],
    );
    // A second address is none of its business.
    check(|link| link.addresses.push(moved), &[]);
    check(|link| link.mtu = 1400, &["upsert eth0/0 rule 0 0>239.2.2.2:6000 by #0 from 10.0.1.1"]);
    check(
        |link| link.index = IfIndex(21),
        &[
            "open eth0/0 #1 eth1%21:4000",
            "upsert eth0/0 rule 0 0>239.2.2.2:6000 by #1 from 10.0.1.1",
            "close eth0/0 #0",
        ],
    );
    check(|link| link.xdp_program = Some(7), &[]);
    check(|link| link.rx_queues = 4, &[]);
}

#[test]
fn a_source_that_an_output_names_must_be_an_address_of_the_host() {
    let named = rule("named", "239.1.1.1:5000@eth0", &["239.2.2.2:6000@eth1,from=10.0.3.1"]);
    let mut supervisor = Supervisor::serving(std::slice::from_ref(&named));
    assert_eq!(supervisor.state.output_pending(&named.outputs[0]), None);
    did(&supervisor.links(links(0..3)), &["upsert eth0/0 rule 0 0>pending", "close eth0/0 #0"]);
    let why = "10.0.3.1 is no address of this host";
    assert_eq!(supervisor.state.output_pending(&named.outputs[0]).as_deref(), Some(why));
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
            "upsert eth0/0 rule 0 0>239.2.2.2:6000 by #0 from 10.9.9.9",
            "delete eth1 10.0.1.1,239.2.2.2:6000",
            "barrier",
        ],
    );
    supervisor.check_settled();
}

#[test]
fn another_mtu_or_other_queues_make_other_workers() {
    let limits = Limits { max_rules: 8, workers: None, cpus: vec![4, 5], source_port: 4000 };
    let mut supervisor = Supervisor::with(limits);
    supervisor.links(links(0..4));
    supervisor.add(cam());
    let spec = |supervisor: &Supervisor, index| {
        let spec = supervisor.state.workers()[&worker("eth0", index)].spec.clone().unwrap();
        (spec.queues, spec.cpu, spec.chunk_bytes)
    };
    assert_eq!(spec(&supervisor, 0), (vec![0], Some(4), 2048));
    let replaced = [
        "stop eth0/0",
        "start eth0/0",
        "open eth0/0 #0 eth1%11:4000",
        "upsert eth0/0 rule 0 0>239.2.2.2:6000 by #0 from 10.0.1.1",
        "steer eth0/0",
    ];
    did(&supervisor.change("eth0", |link| link.mtu = 3000), &replaced);
    assert_eq!(spec(&supervisor, 0), (vec![0], Some(4), 4096));
    supervisor.change("eth0", |link| link.rx_queues = 3);
    assert_eq!(spec(&supervisor, 0), (vec![0, 2], Some(4), 4096));
    assert_eq!(spec(&supervisor, 1), (vec![1], Some(5), 4096));
    supervisor.check_settled();
    // One queue is left, and one worker.
    let mut fewer = vec!["stop eth0/1"];
    fewer.extend(replaced);
    let mut done = supervisor.change("eth0", |link| link.rx_queues = 1);
    done[..2].sort_by(|a, b| b.cmp(a));
    did(&done, &fewer);
    supervisor.check_settled();
}

#[test]
fn queues_are_shared_as_the_operator_said() {
    let limits = Limits { max_rules: 8, workers: Some(2), cpus: vec![4], source_port: 4000 };
    let mut supervisor = Supervisor::with(limits);
    supervisor.links(links(0..4));
    supervisor.change("eth0", |link| link.rx_queues = 5);
    did(
        &supervisor.add(cam()),
        &[
            "attach eth0",
            "start eth0/0",
            "open eth0/0 #0 eth1%11:4000",
            "upsert eth0/0 rule 0 0>239.2.2.2:6000 by #0 from 10.0.1.1",
            "steer eth0/0",
            "start eth0/1",
            "open eth0/1 #0 eth1%11:4000",
            "upsert eth0/1 rule 0 0>239.2.2.2:6000 by #0 from 10.0.1.1",
            "steer eth0/1",
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
    did(&supervisor.exit(&id, LONG), &["restart eth0/0 after 50ms"]);
    let why = "worker eth0/0 is being restarted: killed".to_owned();
    assert_eq!(supervisor.problem("cam"), Some((Problem::Waits, why)));
    // Meanwhile rules come and go.
    did(&supervisor.remove("cam"), &["delete eth0 *,239.1.1.1:5000", "barrier", "leave 239.1.1.1%10"]);
    let tap = rule("tap", "239.1.1.3:5000@eth0", &["239.2.2.3:7000@eth1"]);
    did(&supervisor.add(tap), &["join 239.1.1.3%10", "set eth0 *,239.1.1.3:5000 steer rule 0"]);
    did(
        &supervisor.restart(&id),
        &[
            "start eth0/0",
            "open eth0/0 #0 eth1%11:4000",
            "open eth0/0 #1 eth2%12:4000",
            "upsert eth0/0 rule 1 1>239.2.2.2:7000 by #1 from 10.0.2.1",
            "upsert eth0/0 rule 0 0>239.2.2.3:7000 by #0 from 10.0.1.1",
            "steer eth0/0",
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
        (Duration::from_millis(29_999), "800ms"),
        (Duration::ZERO, "1.6s"),
        (SHORT, "3.2s"),
        (SHORT, "6.4s"),
        (SHORT, "10s"),
        (SHORT, "10s"),
        (Duration::from_secs(30), "50ms"),
        (SHORT, "100ms"),
        (LONG, "50ms"),
        (LONG, "50ms"),
    ] {
        did(&supervisor.exit(&id, lived), &[&format!("restart eth0/0 after {pause}")]);
        assert_eq!(supervisor.restart(&id)[0], "start eth0/0");
        supervisor.check_settled();
    }
    assert_eq!(supervisor.state.mishaps(&id).restarts, 14);
}

#[test]
fn a_worker_dies_alone() {
    let limits = Limits { max_rules: 8, workers: Some(2), cpus: vec![4], source_port: 4000 };
    let mut supervisor = Supervisor::with(limits);
    supervisor.links(links(0..4));
    supervisor.change("eth0", |link| link.rx_queues = 2);
    supervisor.add(cam());
    did(&supervisor.exit(&worker("eth0", 1), SHORT), &["restart eth0/1 after 50ms"]);
    assert!(supervisor.world.processes[&worker("eth0", 0)].steered);
    did(&supervisor.exit(&worker("eth0", 0), SHORT), &["restart eth0/0 after 50ms"]);
    assert_eq!(supervisor.restart(&worker("eth0", 1))[0], "start eth0/1");
    assert_eq!(supervisor.restart(&worker("eth0", 0))[0], "start eth0/0");
    supervisor.check_settled();
}

#[test]
fn a_worker_whose_interface_went_is_started_when_it_is_back() {
    let mut supervisor = Supervisor::serving(&[cam()]);
    let id = worker("eth0", 0);
    supervisor.exit(&id, SHORT);
    did(&supervisor.links(links(1..4)), &["detach eth0", "leave 239.1.1.1%10"]);
    did(&supervisor.restart(&id), &[]);
    supervisor.links(links(0..4));
    supervisor.check_settled();
    assert!(supervisor.state.workers().contains_key(&id));
}

#[test]
fn a_worker_that_failed_and_was_stopped_before_its_end_was_told_is_started_again() {
    let mut supervisor = Supervisor::serving(&[cam()]);
    supervisor.failing = vec!["upsert eth0/0".to_owned()];
    supervisor.amend("cam", &["239.2.2.2:6000@eth1,ttl=3"], &[]);
    supervisor.failing.clear();
    // The supervisor does not hear of the end of a worker that it has stopped.
    assert_eq!(supervisor.links(links(1..4))[0], "stop eth0/0");
    supervisor.links(links(0..4));
    supervisor.check_settled();
    assert!(supervisor.state.workers().contains_key(&worker("eth0", 0)));
}

#[test]
fn an_attachment_that_failed_is_tried_again_when_something_has_changed() {
    let mut supervisor = Supervisor::serving(&[]);
    supervisor.failing = vec!["attach eth0".to_owned()];
    did(&supervisor.add(cam()), &["! attach eth0"]);
    let problem = Some((Problem::Failed, "cannot attach eth0".to_owned()));
    assert_eq!(supervisor.problem("cam"), problem);
    assert_eq!(supervisor.state.interface_problem(&interface("eth0")), problem);
    // Not by itself, nor for what concerns others.
    did(&supervisor.settle(), &[]);
    did(&supervisor.change("eth3", |link| link.mtu = 1400), &[]);
    did(&supervisor.remove("cam"), &[]);
    // Not for a rule of another interface, which goes its way.
    let other = supervisor.add(rule("mic", "239.1.1.2:5000@eth1", &["239.2.2.2:7000@eth2"]));
    assert_eq!((other[0].as_str(), other.len()), ("attach eth1", 7));
    // When it is asked for again, when the interface has changed.
    did(&supervisor.add(cam()), &["! attach eth0"]);
    did(&supervisor.add(cam()), &["! attach eth0"]);
    did(&supervisor.change("eth0", |link| link.mtu = 1400), &["! attach eth0"]);
    supervisor.failing.clear();
    did(&supervisor.settle(), &[]);
    assert_eq!(supervisor.change("eth0", |link| link.xdp_program = None), [""; 0]);
    assert_eq!(supervisor.change("eth0", |link| link.mtu = 1500)[0], "attach eth0");
    assert_eq!(supervisor.problem("cam"), None);
    supervisor.check_settled();
}

#[test]
fn an_mtu_that_no_chunk_holds_is_a_failure_until_it_is_another() {
    let mut supervisor = Supervisor::new();
    supervisor.links(links(0..4));
    supervisor.change("eth0", |link| link.mtu = 9000);
    did(&supervisor.add(cam()), &[]);
    let why = "eth0: the MTU 9000 is too large for one UMEM chunk (3822 at most)".to_owned();
    assert_eq!(supervisor.problem("cam"), Some((Problem::Failed, why)));
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
            "upsert eth0/0 rule 1 1>239.2.2.2:6000 by #0 from 10.0.1.1",
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
fn a_flow_that_cannot_be_set_fails_its_rule_and_no_other() {
    let mic = || rule("mic", "239.1.1.2:5000@eth0", &["239.2.2.2:7000@eth1"]);
    let mut supervisor = Supervisor::serving(&[mic()]);
    supervisor.failing = vec!["set eth0 *,239.1.1.1".to_owned()];
    did(
        &supervisor.add(cam()),
        &[
            "upsert eth0/0 rule 1 1>239.2.2.2:6000 by #0 from 10.0.1.1",
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
        &["upsert eth0/0 rule 0 0>239.2.2.2:7000 by #0 from 10.0.1.1"],
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
            let cause = format!("worker eth0/0 is being restarted: cannot {failing}");
            assert!(why.starts_with(&cause), "{why}");
        }
        did(&supervisor.settle(), &[]);
        supervisor.failing.clear();
        did(&supervisor.exit(&id, SHORT), &["restart eth0/0 after 50ms"]);
        assert_eq!(supervisor.restart(&id)[0], "start eth0/0");
        supervisor.check_settled();
        assert_eq!(supervisor.state.mishaps(&id).restarts, 1);
    }
    check(
        "upsert eth0/0",
        |supervisor| supervisor.amend("cam", &["239.2.2.2:6000@eth1,ttl=3"], &[]),
        &["! upsert eth0/0 rule 0 0>239.2.2.2:6000 by #0 from 10.0.1.1"],
    );
    check(
        "remove eth0/0",
        |supervisor| supervisor.remove("cam"),
        &["delete eth0 *,239.1.1.1:5000", "barrier", "! remove eth0/0 rule 0", "leave 239.1.1.1%10"],
    );
    for failing in ["start eth0/0", "steer eth0/0"] {
        let mut supervisor = Supervisor::serving(&[]);
        supervisor.failing = vec![failing.to_owned()];
        let done = supervisor.add(cam());
        assert!(done.contains(&format!("! {failing}")), "{done:?}");
        did(&supervisor.settle(), &[]);
        // It fails and fails.
        for pause in ["50ms", "100ms", "200ms"] {
            let ended = supervisor.exit(&worker("eth0", 0), Duration::ZERO);
            did(&ended, &[&format!("restart eth0/0 after {pause}")]);
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
    supervisor.failing = vec!["open eth0/0 #1 eth1%11:53".to_owned()];
    did(
        &supervisor.add(named()),
        &[
            "! open eth0/0 #1 eth1%11:53",
            "upsert eth0/0 rule 1 1>pending 2>239.2.2.3:7000 by #0 from 10.0.1.1",
            "join 239.1.1.2%10",
            "set eth0 *,239.1.1.2:5000 steer rule 1",
        ],
    );
    let output = &named().outputs[0];
    assert_eq!(supervisor.state.output_pending(output).as_deref(), Some("cannot open eth0/0 #1 eth1%11:53"));
    assert_eq!(supervisor.problem("named"), None);
    assert_eq!(supervisor.problem("cam"), None);
    assert!(!supervisor.state.workers()[&worker("eth0", 0)].failed);
    did(&supervisor.settle(), &[]);
    // Asked for again or changed, it is tried again.
    did(&supervisor.add(named()), &["! open eth0/0 #1 eth1%11:53"]);
    did(
        &supervisor.amend("named", &["239.2.2.4:7000@eth1"], &[]),
        &[
            "! open eth0/0 #1 eth1%11:53",
            "upsert eth0/0 rule 1 1>pending 2>239.2.2.3:7000 by #0 from 10.0.1.1 \
             3>239.2.2.4:7000 by #0 from 10.0.1.1",
        ],
    );
    supervisor.failing.clear();
    supervisor.change("eth1", |link| link.mtu = 1400);
    assert_eq!(supervisor.state.output_pending(output), None);
    supervisor.check_settled();
}

#[test]
fn what_cannot_be_taken_back_counts_as_gone() {
    let mut supervisor = Supervisor::serving(&[cam()]);
    supervisor.failing = ["delete", "leave", "detach"].map(str::to_owned).to_vec();
    let done = supervisor.remove("cam");
    assert_eq!(done.iter().filter(|line| line.starts_with('!')).count(), 2, "{done:?}");
    did(&supervisor.take(Event::Stop), &["stop eth0/0", "! detach eth0"]);
}

#[test]
fn the_end_comes_flows_first_and_programs_last() {
    let both = [cam(), rule("mic", "239.1.1.2:5000@eth1", &["239.2.2.2:7000@eth2"])];
    let mut supervisor = Supervisor::serving(&both);
    did(
        &supervisor.take(Event::Stop),
        &[
            "delete eth0 *,239.1.1.1:5000",
            "delete eth1 *,239.1.1.2:5000",
            "barrier",
            "remove eth0/0 rule 0",
            "remove eth1/0 rule 1",
            "leave 239.1.1.1%10",
            "leave 239.1.1.2%11",
            "stop eth0/0",
            "stop eth1/0",
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
    assert!(supervisor.world.attached.is_empty());
}

#[test]
fn a_worker_that_failed_does_not_hold_up_the_end() {
    let mut supervisor = Supervisor::serving(&[cam()]);
    supervisor.failing = vec!["remove eth0/0".to_owned()];
    did(
        &supervisor.take(Event::Stop),
        &[
            "delete eth0 *,239.1.1.1:5000",
            "barrier",
            "! remove eth0/0 rule 0",
            "leave 239.1.1.1%10",
            "stop eth0/0",
            "detach eth0",
        ],
    );
}

#[test]
fn the_fewest_workers_decide_the_cpu_and_it_is_kept() {
    let limits = Limits { max_rules: 8, workers: Some(2), cpus: vec![4, 5, 6], source_port: 4000 };
    let mut supervisor = Supervisor::with(limits);
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

const OUTPUTS: [&str; 9] = [
    "239.1.1.1:5000@eth0",
    "239.1.1.1:5000@eth1",
    "239.1.1.2:5000@eth1,loop=true",
    "239.1.1.2:5000@eth2",
    "239.1.1.1:5001@eth0,ttl=3",
    "239.1.1.1:5001@eth0,from=10.0.2.1",
    "239.9.9.9:7000@eth2,from=10.0.2.2:53",
    "239.9.9.9:7001@eth3",
    "192.0.2.9:7000@eth1",
];

const FAILING: [&str; 13] = [
    "attach eth0",
    "attach eth1",
    "start eth0/0",
    "start eth1",
    "steer eth0/0",
    "steer eth1",
    "open",
    "upsert eth0/0",
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

proptest! {
    #[test]
    fn whatever_happens_it_settles_as_it_is_wanted(
        steps in vec(any_step(), 1..40),
        workers in proptest::option::of(1_u32..4),
    ) {
        let limits = Limits { max_rules: 5, workers, cpus: vec![0, 1], source_port: 4000 };
        let mut supervisor = Supervisor::with(limits);
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
            let problem = supervisor.state.rule_problem(entry).map(|(problem, _)| problem);
            prop_assert_ne!(problem, Some(Problem::Failed));
        }
        supervisor.take(Event::Stop);
        prop_assert_eq!(supervisor.state.plan(), []);
        prop_assert!(supervisor.world.processes.is_empty() && supervisor.world.attached.is_empty());
        prop_assert!(supervisor.world.memberships.is_empty());
    }
}
