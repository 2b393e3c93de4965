//! What outlives a daemon: redirecting by what is pinned, memberships by their holder. And what the next one makes of it. All
//! without a daemon.

#![expect(clippy::unwrap_used, reason = "the helpers of tests")]

use std::{
    env, fs,
    net::{Ipv4Addr, SocketAddrV4},
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::Duration,
};

use mcr::{
    datapath::redirect::{Egress, rewrite},
    ebpf::{
        self, Adopted, Former, Misfit, Object, Placement, Steering, Unfit,
        redirect::{RedirectOutput, RedirectTotals},
    },
    holder::client::Holder,
    net::membership::{Membership, Memberships, Stored},
    rule::{IfIndex, InterfaceName, Output, OutputSlot, RuleSlot},
};
use mcr_common::{
    abi,
    counters::OutputCounters,
    flow::{FlowKey4, FlowValue, action},
};
use nix::{sys::signal::Signal, unistd::Pid};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tests::{
    Capture, Namespace, Process, Site, Source, Usage,
    bpf::{self, ForeignXdp},
    capture::assert_sequence,
    deprive::{DOCUMENTED, keep_on_this_thread},
    relay::binary,
    site::{self, ETH, Plan},
    source::Stream,
    wait_until,
};

const PATIENCE: Duration = Duration::from_secs(10);
const PORT: u16 = 40_404;
const ONE: RuleSlot = RuleSlot(1);
const TWO: RuleSlot = RuleSlot(2);
const THREE: RuleSlot = RuleSlot(3);
const MAX_RULES: u32 = 64;

/// Where the daemons of these tests find what they are to do.
const TASK: &str = "MCR_TEST_TASK";

/// A set of outputs, each a slot and an endpoint.
type Typed = Vec<(u32, String)>;

/// What a daemon sets up, in the network namespace that it is in.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Task {
    pins: PathBuf,
    /// Rules: slot, group, and sets of outputs. The first is set.
    rules: Vec<(u32, SocketAddrV4, Vec<Typed>)>,
    /// Whether it sets all sets of all rules in turn until it dies.
    restless: bool,
    /// Groups to join, with the pin root of a holder.
    joins: Option<(PathBuf, Vec<Ipv4Addr>)>,
}

fn group(rule: RuleSlot) -> SocketAddrV4 {
    SocketAddrV4::new(Ipv4Addr::new(239, 1, 1, rule.0 as u8), 5000)
}

fn key(rule: RuleSlot) -> FlowKey4 {
    FlowKey4::any_source(group(rule).ip().octets(), group(rule).port().to_be_bytes())
}

fn index(interface: &str) -> IfIndex {
    IfIndex(nix::net::if_::if_nametoindex(interface).unwrap())
}

/// An interface of this thread's namespace.
fn link(interface: &str) -> Value {
    let output = Command::new("ip").args(["-j", "-d", "addr", "show", "dev", interface]).output().unwrap();
    serde_json::from_slice::<Value>(&output.stdout).unwrap()[0].take()
}

fn occupant(interface: &str) -> Option<u32> {
    link(interface).pointer("/xdp/prog/id").and_then(Value::as_u64).map(|id| id as u32)
}

fn placement<'a>(interface: &'a InterfaceName, pins: &Path) -> Placement<'a> {
    Placement {
        interface,
        index: index(interface.as_str()),
        kind: "veth".to_owned(),
        mtu: 1500,
        queues: 1,
        max_rules: MAX_RULES,
        pins: pins.to_owned(),
        occupant: occupant(interface.as_str()),
    }
}

/// An output as it is typed, in this thread's namespace.
fn output(slot: u32, endpoint: &str) -> RedirectOutput {
    let output: Output = endpoint.parse().unwrap();
    let link = link(output.interface.as_str());
    let mac = link["address"].as_str().unwrap().split(':');
    let mac: Vec<u8> = mac.map(|byte| u8::from_str_radix(byte, 16).unwrap()).collect();
    let egress = Egress {
        destination_mac: tests::frame::multicast_mac(output.destination),
        source_mac: mac.try_into().unwrap(),
        address: link["addr_info"][0]["local"].as_str().unwrap().parse().unwrap(),
        port: PORT,
        mtu: link["mtu"].as_u64().unwrap() as u32,
    };
    let index = IfIndex(link["ifindex"].as_u64().unwrap() as u32);
    RedirectOutput { slot: OutputSlot(slot), egress: index, rewrite: rewrite(&output, egress) }
}

fn outputs(set: &[(u32, String)]) -> Vec<RedirectOutput> {
    set.iter().map(|(slot, endpoint)| output(*slot, endpoint)).collect()
}

fn object() -> Object {
    Object::open(Some(&bpf::object_path())).unwrap()
}

/// Does a task by the documented capabilities alone; for the first interface.
fn set_up(task: &Task) -> Steering {
    let interface = "in0".parse().unwrap();
    let placement = placement(&interface, &task.pins);
    let mut steering = Steering::prepare(&object(), &placement).unwrap();
    steering.attach(&placement, false).unwrap();
    for (slot, _, sets) in &task.rules {
        let rule = RuleSlot(*slot);
        steering.set_outputs(&[(rule, outputs(&sets[0]))]).unwrap();
        steering.set_flow(&key(rule), FlowValue { rule: rule.0, action: action::REDIRECT }).unwrap();
    }
    steering
}

/// No test: what the tests here start in a process of its own, to kill it. Its end is never its own.
#[test]
fn a_daemon_that_is_killed() {
    let Some(task) = env::var_os(TASK) else { return };
    let task: Task = serde_json::from_str(task.to_str().unwrap()).unwrap();
    let sets: Vec<Vec<_>> =
        task.rules.iter().map(|(_, _, sets)| sets.iter().map(|set| outputs(set)).collect()).collect();
    keep_on_this_thread(DOCUMENTED);
    let mut steering = set_up(&task);
    let memberships = task.joins.map(|(pin_root, groups)| {
        let mut memberships = Memberships::kept(&pin_root, &binary(), Stored::default()).unwrap();
        for group in groups {
            memberships.join(on_in0(group)).unwrap();
        }
        memberships.tend().unwrap();
        memberships
    });
    println!("the daemon is ready");
    for turn in 1.. {
        if !task.restless {
            thread::park();
        }
        let next = |sets: &Vec<Vec<RedirectOutput>>| sets[turn % sets.len()].clone();
        let changes: Vec<_> =
            task.rules.iter().zip(&sets).map(|((slot, ..), sets)| (RuleSlot(*slot), next(sets))).collect();
        steering.set_outputs(&changes).unwrap();
    }
    drop(memberships);
}

fn on_in0(group: Ipv4Addr) -> Membership {
    Membership { interface: index("in0"), group, source: None }
}

fn start(site: &Site, task: &Task) -> Process {
    let mut command = site.relay.command(env::current_exe().unwrap());
    command.args(["--exact", "a_daemon_that_is_killed", "--nocapture"]);
    let mut daemon = Process::spawn(command.env(TASK, serde_json::to_string(task).unwrap()));
    wait_until("the daemon is ready", PATIENCE, || {
        assert!(daemon.ended().is_none(), "{}{}", daemon.stdout(), daemon.stderr());
        daemon.stdout().contains("the daemon is ready")
    });
    daemon
}

fn kill(mut daemon: Process) {
    daemon.signal(Signal::SIGKILL);
    daemon.wait(PATIENCE);
}

/// What the next daemon finds for `in0`.
fn adopt(site: &Site, pins: &Path) -> Result<Option<Adopted>, Box<Unfit>> {
    site.relay.run(|| {
        let interface = "in0".parse().unwrap();
        let placement = placement(&interface, pins);
        keep_on_this_thread(DOCUMENTED);
        Steering::adopt(&object(), &placement)
    })
}

#[track_caller]
fn adopted(site: &Site, pins: &Path) -> Adopted {
    match adopt(site, pins) {
        Ok(adopted) => adopted.expect("something is pinned"),
        Err(unfit) => panic!("{}", unfit.why),
    }
}

#[track_caller]
fn refused(site: &Site, pins: &Path) -> Unfit {
    match adopt(site, pins) {
        Ok(_) => panic!("it was adopted"),
        Err(unfit) => *unfit,
    }
}

/// A site whose sinks take redirected frames.
fn site_with_sinks(sinks: u8) -> (Site, Vec<ForeignXdp>) {
    let site = Site::build(Plan { sinks, ..Plan::default() });
    let receivers = site.sinks.iter().map(|sink| ForeignXdp::attach(&sink.host, ETH)).collect();
    (site, receivers)
}

fn join(site: &Site, rules: &[RuleSlot]) -> Vec<site::Membership> {
    let join = |rule: &RuleSlot| {
        let membership = site::Membership::join(&site.relay, "in0", *group(*rule).ip());
        site.segments[0].wait_until_joined(*group(*rule).ip());
        membership
    };
    rules.iter().map(join).collect()
}

fn sent(datagrams: u64, bytes: u64) -> RedirectTotals {
    let counters = OutputCounters {
        rewritten: datagrams,
        rewritten_bytes: datagrams * bytes,
        ..OutputCounters::default()
    };
    RedirectTotals { received: datagrams, counters }
}

/// Where the output of a slot sends.
fn to(slot: u32) -> SocketAddrV4 {
    SocketAddrV4::new(Ipv4Addr::new(239, 3, 0, slot as u8), 6000)
}

fn endpoint(slot: u32, sink: u32) -> (u32, String) {
    (slot, format!("{}@out{sink}", to(slot)))
}

fn play(site: &Site, rule: RuleSlot, rate: u64) -> Source {
    Source::start(site.source(), Stream { rate, size: 200, ..Stream::to(group(rule)) })
}

fn set(site: &Site, steering: &mut Steering, changes: &[(RuleSlot, Typed)]) {
    site.relay.run(|| {
        let changes: Vec<_> = changes.iter().map(|(rule, set)| (*rule, outputs(set))).collect();
        keep_on_this_thread(DOCUMENTED);
        steering.set_outputs(&changes).unwrap();
    });
}

fn count(capture: &mut Capture, to: SocketAddrV4) -> u64 {
    capture.all().iter().filter(|datagram| datagram.destination == to).count() as u64
}

#[test]
fn redirecting_outlives_the_daemon_and_the_next_one_goes_on() {
    let (site, _receivers) = site_with_sinks(2);
    let pins = site.scratch.pin_root().join("in0");
    let [one, two, three] =
        [vec![endpoint(0, 0), endpoint(1, 1)], vec![endpoint(2, 1)], vec![endpoint(3, 0)]];
    let rules = [(ONE, &one), (TWO, &two), (THREE, &three)];
    let task = Task {
        pins: pins.clone(),
        rules: rules.map(|(rule, set)| (rule.0, group(rule), vec![set.clone()])).to_vec(),
        restless: false,
        joins: None,
    };
    let daemon = start(&site, &task);
    let _memberships = join(&site, &[ONE, TWO, THREE]);
    let mut captures = [site.capture(0), site.capture(1)];
    let sources = [play(&site, ONE, 5_000), play(&site, TWO, 1_000), play(&site, THREE, 1_000)];
    sources[0].wait_for_more(2_000);
    kill(daemon);
    sources[0].wait_for_more(5_000);

    let Adopted { mut steering, flows, sets, former_rewrite } = adopted(&site, &pins);
    let mut slots: Vec<_> = flows.iter().map(|(key, value)| (*key, value.rule, value.action)).collect();
    slots.sort_unstable();
    assert_eq!(slots, [ONE, TWO, THREE].map(|rule| (key(rule), rule.0, action::REDIRECT)));
    let expected = site.relay.run(|| rules.map(|(rule, set)| (rule, outputs(set))));
    assert_eq!(sets.into_iter().collect::<Vec<_>>(), expected);
    assert!(!former_rewrite);
    assert!(steering.rule(ONE).unwrap().redirected >= 7_000, "the counters go on");
    steering.filter().unwrap();

    // Other outputs for one rule, none for another; the third is left alone.
    set(&site, &mut steering, &[(ONE, vec![endpoint(4, 0), endpoint(1, 1)])]);
    sources[0].wait_for_more(1_000);
    steering.delete_flow(&key(TWO)).unwrap();
    ebpf::barrier().unwrap();
    set(&site, &mut steering, &[(TWO, vec![])]);
    let removed = steering.redirected(TWO, OutputSlot(2)).unwrap();
    sources[0].wait_for_more(1_000);
    // On purpose this time, and by a daemon that had adopted before.
    steering.keep();
    sources[0].wait_for_more(1_000);
    let steering = adopted(&site, &pins).steering;
    sources[0].wait_for_more(1_000);

    let counts = sources.map(Source::stop);
    wait_until("all is redirected", PATIENCE, || {
        [ONE, THREE].map(|rule| steering.rule(rule).unwrap().redirected) == [counts[0], counts[2]]
    });
    assert_sequence(&captures[1].exactly(to(1), counts[0] as usize), 0..counts[0]);
    assert_sequence(&captures[0].exactly(to(3), counts[2] as usize), 0..counts[2]);
    assert_eq!(steering.redirected(ONE, OutputSlot(1)).unwrap(), sent(counts[0], 200));
    assert_eq!(steering.redirected(THREE, OutputSlot(3)).unwrap(), sent(counts[2], 200));
    let former = steering.redirected(ONE, OutputSlot(0)).unwrap();
    let first = former.received;
    assert_eq!(former, sent(first, 200));
    assert_eq!(steering.redirected(ONE, OutputSlot(4)).unwrap(), sent(counts[0] - first, 200));
    assert_sequence(&captures[0].exactly(to(0), first as usize), 0..first);
    assert_sequence(&captures[0].exactly(to(4), (counts[0] - first) as usize), first..counts[0]);
    assert_eq!(removed, sent(removed.received, 200));
    assert!((1..counts[1]).contains(&removed.received));
    assert_sequence(&captures[1].exactly(to(2), removed.received as usize), 0..removed.received);
    assert_eq!(steering.redirected(TWO, OutputSlot(2)).unwrap(), removed);

    drop(steering);
    assert!(!pins.exists(), "what is not kept is cleared");
    wait_until_detached(&site, "in0");
    assert!(matches!(adopt(&site, &pins), Ok(None)));
}

#[test]
fn a_daemon_that_dies_while_it_changes_outputs_loses_and_miscounts_nothing() {
    let (site, _receivers) = site_with_sinks(2);
    let pins = site.scratch.pin_root().join("in0");
    let sets = [
        vec![endpoint(0, 0), endpoint(1, 1), endpoint(2, 0)],
        vec![endpoint(3, 1), endpoint(1, 1), endpoint(0, 0)],
        vec![endpoint(2, 1), endpoint(4, 0), endpoint(1, 1)],
    ];
    let task = Task {
        pins: pins.clone(),
        rules: vec![(ONE.0, group(ONE), sets.to_vec())],
        restless: true,
        joins: None,
    };
    let known = site.relay.run(|| sets.clone().map(|set| outputs(&set)));
    let _memberships = join(&site, &[ONE]);
    for _ in 0..8 {
        let daemon = start(&site, &task);
        let mut captures = [site.capture(0), site.capture(1)];
        let source = play(&site, ONE, 2_000);
        source.wait_for_more(300);
        kill(daemon);
        source.wait_for_more(100);
        let Adopted { mut steering, sets, .. } = adopted(&site, &pins);
        assert!(known.contains(&sets[&ONE]), "{sets:?}");
        source.wait_for_more(100);
        set(&site, &mut steering, &[(ONE, vec![endpoint(1, 1), endpoint(2, 0)])]);
        source.wait_for_more(100);
        let sent_by_source = source.stop();
        wait_until("all is redirected", PATIENCE, || {
            steering.rule(ONE).unwrap().redirected == sent_by_source
        });
        // In every set.
        assert_sequence(&captures[1].exactly(to(1), sent_by_source as usize), 0..sent_by_source);
        wait_until("every clone has left", PATIENCE, || {
            (0..5).all(|slot| steering.redirected(ONE, OutputSlot(slot)).unwrap().skipped() == 0)
        });
        for slot in 0..5 {
            let seen: u64 = captures.iter_mut().map(|capture| count(capture, to(slot))).sum();
            assert_eq!(steering.redirected(ONE, OutputSlot(slot)).unwrap(), sent(seen, 200), "output {slot}");
        }
    }
}

/// One rule, redirected by nobody any more.
fn leave_pinned(site: &Site, pins: &Path) {
    let task = Task {
        pins: pins.to_owned(),
        rules: vec![(ONE.0, group(ONE), vec![vec![endpoint(0, 0), endpoint(1, 1)]])],
        restless: false,
        joins: None,
    };
    site.relay.run(|| set_up(&task).keep());
}

#[test]
fn another_build_and_another_abi_take_over_without_a_gap() {
    let (site, _receivers) = site_with_sinks(2);
    let pins = site.scratch.pin_root().join("in0");
    let other = site.scratch.dir().join("other.o");
    fs::write(&other, bpf::object_of_another_build()).unwrap();
    leave_pinned(&site, &pins);
    let _membership = join(&site, &[ONE]);
    let mut captures = [site.capture(0), site.capture(1)];
    let source = play(&site, ONE, 5_000);
    source.wait_for_more(500);

    // Other instructions, the same types: maps and counters go on as they are.
    let id = site.relay.run(|| occupant("in0"));
    let Adopted { mut steering, sets, former_rewrite, .. } = site.relay.run(|| {
        let interface = "in0".parse().unwrap();
        let placement = placement(&interface, &pins);
        keep_on_this_thread(DOCUMENTED);
        let found = Steering::adopt(&Object::open(Some(&other)).unwrap(), &placement);
        found.unwrap_or_else(|unfit| panic!("{}", unfit.why)).unwrap()
    });
    assert_ne!(site.relay.run(|| occupant("in0")), id, "the program is replaced");
    assert!(former_rewrite, "outputs have the former egress program");
    source.wait_for_more(500);
    site.relay.run(|| steering.renew_outputs(&sets)).unwrap();
    source.wait_for_more(500);
    steering.keep();
    // Back again, and the egress program is known to be another's.
    let adopted = adopted(&site, &pins);
    assert!(adopted.former_rewrite);
    let counted = adopted.steering.rule(ONE).unwrap().redirected;
    assert!(counted >= 1_500);
    adopted.steering.keep();

    // Another ABI: what was counted is carried, and its program runs until the new one has all that it needs.
    let marks = pins.join("mcr_marks");
    let set_abi = |version: u32| {
        let mut args = vec!["map", "update", "pinned", marks.to_str().unwrap(), "key", "0", "0", "0", "0"];
        let bytes = version.to_le_bytes().map(|byte| byte.to_string());
        args.push("value");
        args.extend(bytes.iter().map(String::as_str));
        site.relay.output("bpftool", &args);
    };
    set_abi(abi::ABI_VERSION - 1);
    let Unfit { why, carried, former } = refused(&site, &pins);
    assert!(matches!(why, Misfit::Abi { found, .. } if found == abi::ABI_VERSION - 1), "{why}");
    assert!(carried.rules[&ONE].redirected >= counted);
    assert_eq!(carried.flows, [(key(ONE), FlowValue { rule: ONE.0, action: action::REDIRECT })]);
    let carried: Vec<_> =
        carried.outputs.iter().map(|output| (output.rule, output.output, output.totals)).collect();
    assert_eq!(carried.iter().map(|(rule, output, _)| (*rule, *output)).collect::<Vec<_>>(), {
        sets[&ONE].iter().map(|output| (ONE, *output)).collect::<Vec<_>>()
    });
    assert!(carried.iter().all(|(_, _, totals)| totals.received >= counted));
    let mut steering = succeed(&site, &pins, &former.expect("a program of ours on its interface"));
    source.wait_for_more(500);
    set(&site, &mut steering, &[(TWO, vec![endpoint(2, 0), endpoint(3, 1)])]);
    steering.set_flow(&key(ONE), FlowValue { rule: TWO.0, action: action::REDIRECT }).unwrap();
    source.wait_for_more(500);
    assert_eq!(steering.rule(TWO).unwrap().matched, 0, "the former program runs");
    site.relay.run(|| {
        let interface = "in0".parse().unwrap();
        steering.attach(&placement(&interface, &pins), false).unwrap();
    });
    source.wait_for_more(500);

    let sent_by_source = source.stop();
    let late = || steering.rule(TWO).unwrap().redirected;
    wait_until("the new program has the last", PATIENCE, || {
        let early = count(&mut captures[0], to(0));
        early + late() == sent_by_source
    });
    let early = sent_by_source - late();
    for (sink, former, new) in [(0, 0, 2), (1, 1, 3)] {
        assert_sequence(&captures[sink].exactly(to(former), early as usize), 0..early);
        assert_sequence(&captures[sink].exactly(to(new), late() as usize), early..sent_by_source);
    }
    drop(steering);
    assert!(!pins.exists());
}

fn succeed(site: &Site, pins: &Path, former: &Former) -> Steering {
    site.relay.run(|| {
        let interface = "in0".parse().unwrap();
        let placement = placement(&interface, pins);
        keep_on_this_thread(DOCUMENTED);
        Steering::succeed(&object(), &placement, former).unwrap()
    })
}

/// A link whose last pin went is let go of a moment later.
#[track_caller]
fn wait_until_detached(site: &Site, interface: &str) {
    let detached = || site.relay.run(|| occupant(interface)).is_none();
    wait_until("the program is detached", PATIENCE, detached);
}

fn pin_again(site: &Site, pins: &Path, pin: &str, make: &[&str]) {
    fs::remove_file(pins.join(pin)).unwrap();
    let path = pins.join(pin);
    let args: Vec<_> =
        make.iter().map(|word| if *word == "PATH" { path.to_str().unwrap() } else { word }).collect();
    site.relay.output("bpftool", &args);
}

#[test]
fn what_does_not_fit_is_refused_with_its_reason_and_cleared_alone() {
    let (site, _receivers) = site_with_sinks(3);
    let pins = site.scratch.pin_root().join("in0");
    // What must not be harmed: another's program on an interface, and ours on one more.
    let stranger = ForeignXdp::attach(&site.relay, "out2");
    let ours = site.relay.run(|| {
        let interface = "out0".parse().unwrap();
        let placement = placement(&interface, &site.scratch.pin_root().join("out0"));
        let mut steering = Steering::prepare(&object(), &placement).unwrap();
        steering.attach(&placement, false).unwrap();
        steering
    });
    let id = stranger.id.to_string();
    let links = site.relay.json("bpftool", &["-j", "link", "show"]);
    let of_stranger = |link: &&Value| link["prog_id"] == stranger.id;
    let link = links.as_array().unwrap().iter().find(of_stranger).unwrap()["id"].to_string();
    let map = |kind, value, name| {
        vec!["map", "create", "PATH", "type", kind, "key", "4", "value", value, "entries", "64", "name", name]
    };
    let rows: [(&str, &str, Vec<&str>, &str); 6] = [
        (
            "a stranger's program",
            "program",
            vec!["prog", "pin", "id", &id, "PATH"],
            "it does not use mcr_flows_v4",
        ),
        ("a stranger's link", "link", vec!["link", "pin", "id", &link, "PATH"], "it runs program"),
        ("no program", "program", map("array", "8", "x"), "a bpf-map is pinned there"),
        (
            "another shape",
            "mcr_rules",
            map("percpu_array", "72", "mcr_rules"),
            "64 entries of 4 and 72 bytes",
        ),
        ("another kind", "mcr_rules", map("array", "64", "mcr_rules"), "(type 2, flags 0x0) instead of"),
        ("another map", "mcr_rules", map("percpu_array", "64", "mcr_rules"), "the programs use another"),
    ];
    let unharmed = |what: &str| {
        assert!(!pins.exists(), "{what} is left");
        assert_eq!(site.relay.run(|| occupant("out2")), Some(stranger.id), "{what}");
        assert!(site.relay.run(|| occupant("out0")).is_some(), "{what}");
    };
    for (what, pin, make, reason) in rows {
        leave_pinned(&site, &pins);
        pin_again(&site, &pins, pin, &make);
        let unfit = refused(&site, &pins);
        assert!(unfit.why.to_string().contains(reason), "{what}: {}", unfit.why);
        assert_eq!(unfit.former.is_some(), pin == "mcr_rules", "{what}");
        ebpf::clear_pins(&pins);
        wait_until_detached(&site, "in0");
        unharmed(what);
    }

    leave_pinned(&site, &pins);
    fs::remove_file(pins.join("mcr_chains")).unwrap();
    let unfit = refused(&site, &pins);
    assert!(matches!(&unfit.why, Misfit::Open { path, .. } if path.ends_with("mcr_chains")), "{}", unfit.why);
    ebpf::clear_pins(&pins);

    // Another number of rules: nothing of ours is lost.
    leave_pinned(&site, &pins);
    let unfit = site.relay.run(|| {
        let interface = "in0".parse().unwrap();
        let placement = Placement { max_rules: 2 * MAX_RULES, ..placement(&interface, &pins) };
        Steering::adopt(&object(), &placement).err().unwrap()
    });
    assert!(matches!(unfit.why, Misfit::Shape { map: "mcr_flows_v4", .. }), "{}", unfit.why);
    assert_eq!((unfit.former.is_some(), unfit.carried.outputs.len()), (true, 2));

    // Its interface has another name, and another one has its name.
    site.relay.ip(&["link set in0 down", "link set in0 name in9", "link add in0 type veth peer name in8"]);
    let unfit = refused(&site, &pins);
    assert!(matches!(unfit.why, Misfit::Elsewhere { .. }), "{}", unfit.why);
    assert!(unfit.former.is_none());
    ebpf::clear_pins(&pins);
    wait_until_detached(&site, "in9");
    unharmed("a renamed interface");
    site.relay.ip(&["link del in0", "link set in9 name in0", "link set in0 up"]);

    // It is another namespace's now, with the same index; here one has its name and index.
    leave_pinned(&site, &pins);
    let elsewhere = Namespace::new("other");
    let number = site.relay.run(|| index("in0")).0;
    site.relay.ip(&[
        &format!("link set in0 netns {}", elsewhere.name()),
        &format!("link add in0 index {number} type veth peer name in8"),
    ]);
    let unfit = refused(&site, &pins);
    assert!(matches!(unfit.why, Misfit::NotInPlace { .. }), "{}", unfit.why);
    ebpf::clear_pins(&pins);
    unharmed("an interface of another namespace");
    site.relay.ip(&["link del in0"]);
    elsewhere.ip(&["link del in0"]);

    // It is gone, and was made anew.
    site.segments[0].plug(&site.relay);
    leave_pinned(&site, &pins);
    site.segments[0].unplug(&site.relay);
    site.segments[0].plug(&site.relay);
    let unfit = refused(&site, &pins);
    assert!(matches!(unfit.why, Misfit::Gone), "{}", unfit.why);
    ebpf::clear_pins(&pins);
    unharmed("a deleted interface");
    drop(ours);
}

/// The holders in a namespace. One that has ended is none, though the test that started it has not reaped it.
fn holders(namespace: &Namespace) -> Vec<u32> {
    let is_holder = |pid: &u32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.contains("(mcr-hold)") && !stat.contains(") Z ")
    };
    namespace.processes().into_iter().filter(is_holder).collect()
}

fn descriptors(pid: u32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()
}

fn keep(site: &Site) -> Memberships {
    site.relay.run(|| Memberships::kept(site.scratch.pin_root(), &binary(), Stored::default())).unwrap()
}

fn kept_group(n: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(Ipv4Addr::new(239, 9, 0, 0).to_bits() + n)
}

#[test]
fn memberships_outlive_the_daemon_and_no_switch_sees_them_leave() {
    let (site, _receivers) = site_with_sinks(2);
    let pins = site.scratch.pin_root().join("in0");
    let task = Task {
        pins: pins.clone(),
        rules: vec![(ONE.0, group(ONE), vec![vec![endpoint(0, 0)]])],
        restless: false,
        joins: Some((site.scratch.pin_root().to_owned(), vec![*group(ONE).ip()])),
    };
    let segment = &site.segments[0];
    let joined = || segment.joined().iter().any(|(joined, _)| joined == group(ONE).ip());
    let daemon = start(&site, &task);
    segment.wait_until_joined(*group(ONE).ip());
    let mut capture = site.capture(0);
    let source = play(&site, ONE, 5_000);
    source.wait_for_more(1_000);
    kill(daemon);
    for _ in 0..20 {
        source.wait_for_more(250);
        assert!(joined());
    }
    let Adopted { steering, .. } = adopted(&site, &pins);
    let mut memberships = keep(&site);
    let membership = site.relay.run(|| on_in0(*group(ONE).ip()));
    assert_eq!(memberships.held().collect::<Vec<_>>(), [membership]);
    site.relay.run(|| memberships.join(membership)).unwrap();
    source.wait_for_more(500);
    // Its holder killed, the daemon has them and finds another.
    let [holder] = holders(&site.relay)[..] else { panic!("one holder") };
    nix::sys::signal::kill(Pid::from_raw(holder.cast_signed()), Signal::SIGKILL).unwrap();
    wait_until("the holder is gone", PATIENCE, || !holders(&site.relay).contains(&holder));
    site.relay.run(|| memberships.tend()).unwrap();
    source.wait_for_more(500);
    drop(memberships);
    source.wait_for_more(1_000);
    assert!(joined());
    let memberships = keep(&site);
    source.wait_for_more(500);

    let sent_by_source = source.stop();
    assert_sequence(&capture.exactly(to(0), sent_by_source as usize), 0..sent_by_source);
    assert_eq!(steering.rule(ONE).unwrap().matched, sent_by_source);
    memberships.release().unwrap();
    segment.wait_until_left(*group(ONE).ip());
    wait_until("the holder has ended", PATIENCE, || holders(&site.relay).is_empty());
}

#[test]
fn a_holder_gives_back_what_it_was_given() {
    const GROUPS: u32 = 100;
    let site = Site::build(Plan { sinks: 1, ..Plan::default() });
    let interface = site.relay.run(|| index("in0"));
    let any = |n| Membership { interface, group: kept_group(n), source: None };
    let one = |n| Membership { source: Some(Ipv4Addr::new(10, 77, 0, 200)), ..any(1_000 + n) };
    let mut memberships = keep(&site);
    assert_eq!(memberships.held().count(), 0);
    site.relay.run(|| {
        memberships.tend().unwrap();
        assert_eq!(holders(&site.relay), [0; 0], "nothing to hold, no holder");
        for n in 0..GROUPS {
            memberships.join(any(n)).unwrap();
            if n == 30 {
                memberships.tend().unwrap();
            }
            memberships.join(one(n)).unwrap();
        }
        memberships.tend().unwrap();
    });
    let [holder] = holders(&site.relay)[..] else { panic!("one holder") };
    let status = fs::read_to_string(format!("/proc/{holder}/status")).unwrap();
    for (field, value) in [
        ("CapEff", "0000000000000000"),
        ("CapPrm", "0000000000000000"),
        ("CapAmb", "0000000000000000"),
        ("NoNewPrivs", "1"),
        ("Seccomp", "2"),
        ("Threads", "1"),
    ] {
        assert!(status.contains(&format!("{field}:\t{value}")), "{field} is not {value}: {status}");
    }
    // Standard streams, the daemon, and sockets of 20 memberships each.
    let full = 4 + 2 * GROUPS as usize / 20;
    wait_until("the holder has them all", PATIENCE, || descriptors(holder) == full);

    for round in 0..3 {
        drop(memberships);
        assert_eq!(site.groups("in0").len(), 2 * GROUPS as usize);
        memberships = keep(&site);
        assert_eq!(holders(&site.relay), [holder], "round {round}");
        assert_eq!(memberships.held().count(), 2 * GROUPS as usize);
        site.relay.run(|| (0..GROUPS).for_each(|n| memberships.join(any(n)).unwrap()));
        wait_until("the holder has them all", PATIENCE, || descriptors(holder) == full);
    }
    // Nobody's signals are a word to end.
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        nix::sys::signal::kill(Pid::from_raw(holder.cast_signed()), signal).unwrap();
    }
    // Leaves work on what was adopted, and the holder closes what is empty.
    site.relay.run(|| (0..GROUPS).for_each(|n| memberships.leave(any(n)).unwrap()));
    wait_until("the holder has closed them", PATIENCE, || descriptors(holder) == 4 + GROUPS as usize / 20);
    let groups: Vec<_> = (0..GROUPS).map(|n| one(n).group).collect();
    assert_eq!(site.groups("in0"), groups);
    drop(memberships);
    let memberships = keep(&site);
    assert_eq!(memberships.held().collect::<Vec<_>>(), (0..GROUPS).map(one).collect::<Vec<_>>());
    // What the holder was told of and the kernel does not know is not taken for joined.
    drop(memberships);
    let (told, _) = site.relay.run(|| Holder::find(site.scratch.pin_root())).unwrap().unwrap();
    told.add(&[any(0), one(GROUPS)]).unwrap();
    drop(told);
    let mut memberships = keep(&site);
    assert_eq!(memberships.held().count(), GROUPS as usize);
    site.relay.run(|| memberships.join(any(0))).unwrap();
    assert!(site.groups("in0").contains(&any(0).group));
    site.relay.run(|| memberships.leave(any(0))).unwrap();
    // It does not grow.
    let memory = Usage::of(holder).private_kib;
    site.relay.run(|| {
        for n in 0..2_000 {
            memberships.join(any(n % 50)).unwrap();
            memberships.leave(any((n + 25) % 50)).unwrap();
        }
        (0..50).for_each(|n| memberships.leave(any(n)).unwrap());
    });
    wait_until("the holder has closed them", PATIENCE, || descriptors(holder) == 4 + GROUPS as usize / 20);
    let grown = Usage::of(holder).private_kib.saturating_sub(memory);
    assert!(grown < 200, "it has grown by {grown} KiB");
    site.relay.run(|| (0..GROUPS).for_each(|n| memberships.leave(one(n)).unwrap()));
    assert_eq!(site.groups("in0"), [Ipv4Addr::UNSPECIFIED; 0]);
    site.relay.run(|| memberships.tend()).unwrap();
    wait_until("nothing is left to hold, and no holder", PATIENCE, || holders(&site.relay).is_empty());
    memberships.release().unwrap();
}

#[test]
fn a_holder_that_does_not_answer_is_said_and_keeps_what_it_has() {
    let site = Site::build(Plan { sinks: 1, ..Plan::default() });
    let membership = site.relay.run(|| on_in0(kept_group(0)));
    let mut memberships = keep(&site);
    site.relay.run(|| {
        memberships.join(membership).unwrap();
        memberships.tend().unwrap();
    });
    drop(memberships);
    let [holder] = holders(&site.relay)[..] else { panic!("one holder") };
    let signal = |signal| nix::sys::signal::kill(Pid::from_raw(holder.cast_signed()), signal).unwrap();
    signal(Signal::SIGSTOP);
    let kept = || site.relay.run(|| Memberships::kept(site.scratch.pin_root(), &binary(), Stored::default()));
    let error = kept().unwrap_err();
    assert_eq!(error.to_string(), "the holder of memberships does not answer within 2 s");
    signal(Signal::SIGCONT);
    let memberships = kept().unwrap();
    assert_eq!(memberships.held().collect::<Vec<_>>(), [membership]);
    memberships.release().unwrap();
    wait_until("its group is left", PATIENCE, || site.groups("in0").is_empty());
}

#[test]
fn a_holder_that_is_left_with_nothing_ends_by_itself() {
    let site = Site::build(Plan { sinks: 1, ..Plan::default() });
    let membership = site.relay.run(|| on_in0(kept_group(0)));
    let mut memberships = keep(&site);
    site.relay.run(|| {
        memberships.join(membership).unwrap();
        memberships.tend().unwrap();
        memberships.leave(membership).unwrap();
    });
    assert_eq!(holders(&site.relay).len(), 1);
    drop(memberships);
    wait_until("the holder has ended", PATIENCE, || holders(&site.relay).is_empty());
    // Another comes and goes; nobody else's name is in the way.
    let mut memberships = keep(&site);
    site.relay.run(|| {
        memberships.join(membership).unwrap();
        memberships.tend().unwrap();
    });
    memberships.release().unwrap();
}
