//! Interfaces that go and come, change their name, address, MTU or queues while traffic flows: what they touch
//! waits and says so, resumes by itself within a second, and no other stream loses anything.

#![expect(clippy::unwrap_used, reason = "where it fails, the test fails and says where")]

use std::{
    fs,
    net::{Ipv4Addr, SocketAddrV4},
    ops::Range,
    time::{Duration, Instant},
};

use mcr::api::wire::{Health, OutputStats, RuleStats, Status};
use tests::{
    Capture, Captured, Ground, Relay, Site, Source,
    capture::assert_sequence,
    relay::{interface_balances, lost, outputs_balance, unaccounted},
    site::{ETH, Plan, Segment},
    source::Stream,
    wait::PATIENCE,
    wait_until,
};

const GROUP: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(239, 1, 1, 1), 5000);
/// What the interface under test is in the way of, and what it is not.
const STRUCK: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(239, 2, 2, 0), 6000);
const SPARED: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(239, 2, 2, 1), 6000);

/// Within which a stream is back once nothing is in its way any more: a fraction of a second, where the machine has no
/// other work.
const SOON: Duration = Duration::from_secs(5);

/// Two segments and two sinks: one of each for the stream that is struck, one for the stream that is spared.
fn two_by_two() -> Site {
    Site::build(Plan { segments: 2, sinks: 2, ..Plan::default() })
}

/// Stretches in which one sequence number follows the other.
fn stretches(datagrams: &[Captured]) -> Vec<Range<u64>> {
    let mut stretches: Vec<Range<u64>> = Vec::new();
    for sequence in datagrams.iter().map(Captured::sequence) {
        match stretches.last_mut().filter(|last| last.end == sequence) {
            Some(last) => last.end += 1,
            None => stretches.push(sequence..sequence + 1),
        }
    }
    stretches
}

/// Waits until a rule waits for a reason, and checks that every screen says so: of the rule, and of its outputs
/// that those which wait have the reason, and no other has.
#[track_caller]
fn wait_until_pending(relay: &Relay, name: &str, why: &str, outputs: &[bool]) {
    wait_until(&format!("{name} waits: {why}"), PATIENCE, || relay.show(name).reason.as_deref() == Some(why));
    let listed = relay.show_all();
    let rule = listed.iter().find(|rule| rule.name == name).unwrap();
    assert_eq!((rule.health, rule.reason.as_deref()), (Health::Pending, Some(why)));
    for (output, waits) in rule.outputs.iter().zip(outputs) {
        let expected = if *waits { (Health::Pending, Some(why)) } else { (Health::Active, None) };
        assert_eq!((output.health, output.reason.as_deref()), expected, "{output:?}");
    }
    assert!(listed.iter().all(|rule| rule.name == name || rule.health == Health::Active), "{listed:?}");
    let status: Status = relay.json(&["status"]);
    assert_eq!((status.health, status.rules.pending, status.rules.failed), (Health::Pending, 1, 0));
    let problems: Vec<_> = status.problems.iter().map(|problem| problem.what.as_str()).collect();
    assert_eq!(problems, [format!("rule {name}: {why}")]);
    // In a list the reason may go over several lines of its column.
    for (call, said) in
        [(&["rule", "show", name][..], why), (&["status"], why), (&["rule", "list"], "pending")]
    {
        let screen = relay.cli(call);
        let words = screen.ok().split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(words.contains(said), "no '{said}' in {screen}");
    }
}

/// What a daemon holds for its interfaces: descriptors, sockets that send or watch, and pins.
#[derive(Debug, PartialEq, Eq)]
struct Holdings {
    descriptors: usize,
    /// Sockets of the relay host bound to a UDP port, those of io_uring included.
    udp: usize,
    packet: usize,
    pins: Vec<String>,
}

/// What is held when no call's connection is open any more.
#[track_caller]
fn holdings(site: &Site, relay: &Relay) -> Holdings {
    let mut last = held_now(site, relay);
    wait_until("nothing is under way", PATIENCE, || {
        let before = std::mem::replace(&mut last, held_now(site, relay));
        before == last
    });
    last
}

fn held_now(site: &Site, relay: &Relay) -> Holdings {
    let lines = |file| site.relay.proc_net(file).lines().count() - 1;
    let pins = fs::read_dir(relay.pins("in0").parent().unwrap()).into_iter().flatten();
    let mut pins: Vec<_> = pins.map(|pin| pin.unwrap().file_name().into_string().unwrap()).collect();
    pins.sort_unstable();
    Holdings {
        descriptors: fs::read_dir(format!("/proc/{}/fd", relay.pid())).unwrap().count(),
        udp: lines("udp"),
        packet: lines("packet"),
        pins,
    }
}

/// Waits until the daemon holds just this.
#[track_caller]
fn wait_until_holding(site: &Site, relay: &Relay, expected: &Holdings) {
    let start = Instant::now();
    let mut held = holdings(site, relay);
    while held != *expected && start.elapsed() < PATIENCE {
        held = holdings(site, relay);
    }
    assert_eq!(held, *expected);
}

fn index(site: &Site, interface: &str) -> u32 {
    site.relay.run(|| nix::net::if_::if_nametoindex(interface)).unwrap()
}

/// Two streams under way: `struck` comes in on `in0`, `spared` on `in1`.
struct Play<'a> {
    site: &'a Site,
    relay: &'a Relay<'a>,
    struck: Source,
    spared: Source,
    sinks: [Capture; 2],
}

impl<'a> Play<'a> {
    /// Starts both sources and waits until `spared` is relayed.
    #[track_caller]
    fn start(site: &'a Site, relay: &'a Relay<'a>) -> Self {
        relay.add("spared", &format!("{GROUP}@in1"), &[&format!("{SPARED}@out1")]);
        site.segments[1].wait_until_joined(*GROUP.ip());
        let mut sinks = [site.capture(0), site.capture(1)];
        let [struck, spared] =
            [0, 1].map(|segment: usize| Source::start(&site.segments[segment].source, Stream::to(GROUP)));
        sinks[1].at_least(SPARED, 100);
        Self { site, relay, struck, spared, sinks }
    }

    /// As [`Self::start`], and `struck` is relayed as well.
    #[track_caller]
    fn start_both(site: &'a Site, relay: &'a Relay<'a>) -> Self {
        relay.add("struck", &format!("{GROUP}@in0"), &[&format!("{STRUCK}@out0")]);
        site.segments[0].wait_until_joined(*GROUP.ip());
        let mut play = Self::start(site, relay);
        play.sinks[0].at_least(STRUCK, 500);
        play
    }

    fn segment(&self) -> &Segment {
        &self.site.segments[0]
    }

    fn ip(&self, lines: &[&str]) {
        self.site.relay.ip(lines);
    }

    /// Does `mend`, after which nothing is in the way of `struck`, and checks that the bridge sees the relay
    /// join and that the stream is back in time.
    #[track_caller]
    fn resumes_when(&mut self, what: &str, mend: impl FnOnce(&Self)) {
        let before = self.sinks[0].count(STRUCK);
        assert!(self.segment().joined().is_empty(), "{what}: the bridge has forgotten the relay");
        let mended = Instant::now();
        mend(self);
        self.is_back(what, mended, before);
        self.segment().wait_until_joined(*GROUP.ip());
        self.relay.wait_until_active("struck");
    }

    #[track_caller]
    fn is_back(&mut self, what: &str, mended: Instant, before: usize) {
        let sink = &mut self.sinks[0];
        wait_until(&format!("{what}: the stream is back"), PATIENCE, || sink.count(STRUCK) > before);
        let took = mended.elapsed();
        println!("{what}, {:?}: back after {took:?}", self.site.ground);
        assert!(took < SOON, "{what}: back after {took:?} only");
        sink.at_least(STRUCK, before + 500);
    }

    /// The bridge forgets a host when the port to it goes down. Where the port stays up, that would take the
    /// membership's time.
    #[track_caller]
    fn is_forgotten(&self) {
        if matches!(self.site.ground, Ground::Bridge | Ground::Macvlan) && !self.segment().joined().is_empty()
        {
            self.segment().bridge.bridge(&[&format!("mdb del dev br0 port relay grp {}", GROUP.ip())]);
        }
        self.segment().wait_until_left(*GROUP.ip());
    }

    /// Ends both streams. `spared` has lost nothing; every datagram of `struck` that the relay saw is in the
    /// ledger, and what was sent has arrived: in these stretches, to the last one.
    #[track_caller]
    fn end(self) -> (RuleStats, u64, Vec<Range<u64>>) {
        let Self { relay, struck, spared, sinks: [mut sink, mut spared_sink], .. } = self;
        let (sent, spared) = (struck.stop(), spared.stop());
        assert_eq!(relay.balanced("spared", spared).outputs[0].sent, spared);
        assert_sequence(&spared_sink.exactly(SPARED, spared as usize), 0..spared);
        wait_until("the ledger balances", PATIENCE, || {
            let stats = relay.stats();
            let its: Vec<_> = stats.interfaces.iter().filter(|interface| interface.name == "in0").collect();
            let rule = stats.rules.iter().find(|rule| rule.name == "struck").unwrap();
            unaccounted(rule) <= its.iter().map(|interface| lost(interface)).sum()
                && outputs_balance(rule)
                && its.iter().all(|interface| interface_balances(interface))
        });
        let stats = relay.rule("struck");
        let stretches = stretches(&sink.exactly(STRUCK, stats.outputs[0].sent as usize));
        assert_eq!(stretches.last().unwrap().end, sent, "{stretches:?}");
        assert!(!relay.log().contains("panicked"), "{}", relay.log());
        (stats, sent, stretches)
    }

    /// As [`Self::end`], in so many stretches: nothing is missing but between them.
    #[track_caller]
    fn finish(self, expected: usize) -> (RuleStats, u64) {
        let (stats, sent, stretches) = self.end();
        assert_eq!(stretches.len(), expected, "{stretches:?}");
        (stats, sent)
    }
}

fn an_ingress_interface_that_is_deleted_and_made_anew_relays_again() {
    let site = two_by_two();
    let relay = Relay::start(&site);
    let mut play = Play::start_both(&site, &relay);
    let (busy, pins) = (holdings(&site, &relay), relay.pins("in0"));
    assert_eq!(pins.exists(), site.ground != Ground::WithoutBpf);
    for _ in 0..2 {
        let former = index(&site, "in0");
        play.segment().unplug(&site.relay);
        wait_until_pending(&relay, "struck", "interface in0 does not exist", &[false]);
        assert!(!pins.exists(), "pins are left");
        assert!(site.groups("in0").is_empty());
        assert!(relay.workers().iter().all(|worker| worker.interface != "in0"), "its workers are gone");
        // The io_uring of a process that has ended may hold its sockets open a while longer.
        let by_kernel = site.ground == Ground::Kernel;
        wait_until("sockets are closed", PATIENCE, || (held_now(&site, &relay).udp == busy.udp) == by_kernel);
        let left = holdings(&site, &relay);
        assert!(left.descriptors < busy.descriptors && left.udp <= busy.udp, "{left:?} of {busy:?}");
        play.is_forgotten();
        play.segment().plug(&site.relay);
        assert_ne!(index(&site, "in0"), former);
        play.resumes_when("ingress made anew", |play| play.ip(&["link set in0 up"]));
        assert_eq!(site.groups("in0"), [*GROUP.ip()]);
        wait_until_holding(&site, &relay, &busy);
    }
    play.finish(3);
}

fn a_rule_waits_for_an_interface_that_appears_later() {
    let site = two_by_two();
    let relay = Relay::start(&site);
    site.segments[0].unplug(&site.relay);
    let add = ["rule", "add", "struck", "--in", &format!("{GROUP}@in0"), "--out", &format!("{STRUCK}@out0")];
    let added = relay.cli(&add);
    assert!(added.ok().contains("interface in0 does not exist"), "{added}");
    let mut play = Play::start(&site, &relay);
    wait_until_pending(&relay, "struck", "interface in0 does not exist", &[false]);
    assert_eq!(relay.show("struck").datapath, None);
    play.segment().plug(&site.relay);
    wait_until_pending(&relay, "struck", "interface in0 is down", &[false]);
    play.resumes_when("ingress appears", |play| play.ip(&["link set in0 up"]));
    let rule = relay.show("struck");
    assert_eq!(rule.datapath.as_deref(), Some(site.ground.datapath()));
    play.finish(1);
}

/// Renames an interface that is up; before Linux 6.2 it has to be down for it, and is left so.
fn rename(site: &Site, from: &str, to: &str) {
    let live = site.relay.command("ip").args(["link", "set", from, "name", to]).output().unwrap();
    if !live.status.success() {
        site.relay.ip(&[&format!("link set {from} down"), &format!("link set {from} name {to}")]);
    }
}

fn an_ingress_interface_is_renamed_away_and_back() {
    let site = two_by_two();
    let relay = Relay::start(&site);
    let mut play = Play::start_both(&site, &relay);
    let (busy, former) = (holdings(&site, &relay), index(&site, "in0"));
    rename(&site, "in0", "away");
    wait_until_pending(&relay, "struck", "interface in0 does not exist", &[false]);
    play.ip(&["link set away up"]);
    assert!(!relay.pins("in0").exists(), "pins are left");
    assert!(site.groups("away").is_empty(), "it is joined under its new name");
    play.is_forgotten();
    play.resumes_when("ingress renamed back", |play| {
        rename(play.site, "away", "in0");
        play.ip(&["link set in0 up"]);
    });
    assert_eq!(index(&site, "in0"), former);
    wait_until_holding(&site, &relay, &busy);
    play.finish(2);
}

fn an_ingress_link_goes_down_and_up() {
    let site = two_by_two();
    let relay = Relay::start(&site);
    let mut play = Play::start_both(&site, &relay);
    let worker = || relay.workers().into_iter().find(|worker| worker.interface == "in0");
    let (busy, pid) = (holdings(&site, &relay), worker().map(|worker| worker.pid));
    assert_eq!(pid.is_none(), site.ground == Ground::Kernel);
    // The interface itself, then its carrier.
    for (what, host, interface) in
        [("ingress up", &site.relay, "in0"), ("ingress carrier back", &site.segments[0].bridge, "relay")]
    {
        host.ip(&[&format!("link set {interface} down")]);
        wait_until_pending(&relay, "struck", "interface in0 is down", &[false]);
        assert!(site.groups("in0").is_empty());
        play.is_forgotten();
        // Its worker waits for frames, and not for an error over and over.
        let calls = || worker().map_or(0, |worker| worker.system_calls);
        let before = calls();
        play.spared.wait_for_more(2_500);
        let calls = calls() - before;
        assert!(calls < 50, "{calls} calls of the kernel in half a second");
        play.resumes_when(what, |_| host.ip(&[&format!("link set {interface} up")]));
    }
    assert_eq!(worker().map(|worker| worker.pid), pid, "the worker went on");
    wait_until_holding(&site, &relay, &busy);
    play.finish(3);
}

fn an_ingress_interface_that_changes_its_address_loses_nothing() {
    let site = two_by_two();
    let relay = Relay::start(&site);
    let play = Play::start_both(&site, &relay);
    play.ip(&["addr del 10.77.0.1/24 dev in0"]);
    play.struck.wait_for_more(2_000);
    assert_eq!(relay.show("struck").health, Health::Active);
    play.ip(&["addr add 10.77.0.9/24 dev in0"]);
    play.struck.wait_for_more(2_000);
    let (stats, sent) = play.finish(1);
    assert_eq!((stats.matched, stats.outputs[0].sent), (sent, sent));
}

/// By AF_XDP frames of another length need other chunks, and so another worker; else nothing changes.
fn another_mtu_of_an_ingress_interface_is_taken_up() {
    let site = two_by_two();
    let relay = Relay::start(&site);
    let mut play = Play::start_both(&site, &relay);
    let by_xdp = site.ground == Ground::Veth;
    let worker = || relay.workers().into_iter().find(|worker| worker.interface == "in0");
    let pid = || worker().map(|worker| worker.pid);
    // A macvlan has no larger one than the veth below it.
    let other = if site.ground == Ground::Macvlan { 1400 } else { 2000 };
    for mtu in [other, 1500] {
        let former = pid();
        let changed = Instant::now();
        play.ip(&[&format!("link set in0 mtu {mtu}")]);
        if by_xdp {
            wait_until("another worker relays", PATIENCE, || {
                worker().is_some_and(|worker| worker.state == "running") && pid() != former
            });
            let before = play.sinks[0].count(STRUCK);
            play.is_back(&format!("MTU {mtu}"), changed, before);
        } else {
            wait_until("it is noticed", PATIENCE, || relay.log().contains(&format!("mtu={mtu}")));
            play.struck.wait_for_more(1_000);
            assert_eq!(pid(), former);
        }
    }
    let (stats, sent) = play.finish(if by_xdp { 3 } else { 1 });
    let gone = stats.dropped.get("no_worker").copied().unwrap_or(0);
    assert_eq!((stats.matched, stats.received + gone), (sent, sent), "{stats:?}");
    assert_eq!(gone > 0, by_xdp, "{stats:?}");
}

tests::on_every_ground!(
    an_ingress_interface_that_is_deleted_and_made_anew_relays_again,
    a_rule_waits_for_an_interface_that_appears_later,
    an_ingress_interface_is_renamed_away_and_back,
    an_ingress_link_goes_down_and_up,
    an_ingress_interface_that_changes_its_address_loses_nothing,
    another_mtu_of_an_ingress_interface_is_taken_up,
);

tests::without_bpf!(
    an_ingress_interface_that_is_deleted_and_made_anew_relays_again,
    an_ingress_interface_is_renamed_away_and_back,
    an_ingress_link_goes_down_and_up,
);

#[test]
fn an_mtu_too_large_for_af_xdp_moves_a_rule_of_auto_and_a_smaller_one_moves_it_back() {
    let site = two_by_two();
    let relay = Relay::start(&site);
    let mut play = Play::start_both(&site, &relay);
    for (mtu, datapath) in [(9000, "af-packet"), (1500, "af-xdp")] {
        let changed = Instant::now();
        play.ip(&[&format!("link set in0 mtu {mtu}")]);
        wait_until("the rule moves", PATIENCE, || relay.show("struck").datapath.as_deref() == Some(datapath));
        let before = play.sinks[0].count(STRUCK);
        play.is_back(&format!("MTU {mtu}"), changed, before);
        relay.wait_until_active("struck");
    }
    play.end();
}

/// A veth's queues decide on AF_XDP workers alone.
#[test]
fn another_number_of_rx_queues_is_taken_up_within_a_second() {
    let site = Site::build(Plan { segments: 2, sinks: 2, queues: 4, ..Plan::default() });
    // The bridge's end sends by one queue, so that the relay's may have any number.
    site.segments[0].bridge.output("ethtool", &["-L", "relay", "tx", "1"]);
    site.relay.output("ethtool", &["-L", "in0", "rx", "1"]);
    let relay = Relay::start_with(&site, &["--workers", "1"]);
    let mut play = Play::start_both(&site, &relay);
    let queues = || relay.workers().into_iter().find(|worker| worker.interface == "in0").unwrap().queues;
    assert_eq!(queues(), [0]);
    // The kernel refuses to take queues away that AF_XDP sockets are bound to.
    for (count, expected) in [("2", &[0, 1][..]), ("4", &[0, 1, 2, 3])] {
        let changed = Instant::now();
        site.relay.output("ethtool", &["-L", "in0", "rx", count]);
        wait_until("its worker serves them", PATIENCE, || queues() == expected);
        let before = play.sinks[0].count(STRUCK);
        play.is_back(&format!("{count} RX queues"), changed, before);
    }
    play.end();
}

/// What is joined for one source is let go of with its interface, too: a socket takes three here.
#[test]
fn memberships_of_interfaces_that_are_gone_take_no_room() {
    let site = two_by_two();
    site.relay.sysctl("ipv4/igmp_max_memberships", "3");
    let relay = Relay::start(&site);
    for k in 0..2 {
        let from = site.segments[k].source_address;
        relay.add(
            &format!("one{k}"),
            &format!("{GROUP}@in{k},source={from}"),
            &[&format!("239.2.2.{k}:6000@out{k}")],
        );
        relay.add(
            &format!("any{k}"),
            &format!("239.1.1.2:5000@in{k}"),
            &[&format!("239.2.2.{k}:6001@out{k}")],
        );
    }
    let held = holdings(&site, &relay);
    for _ in 0..4 {
        site.segments[0].unplug(&site.relay);
        wait_until("it is gone", PATIENCE, || relay.workers().iter().all(|worker| worker.interface != "in0"));
        site.segments[0].plug(&site.relay);
        site.relay.ip(&["link set in0 up"]);
        for name in ["one0", "any0"] {
            relay.wait_until_active(name);
        }
        assert_eq!(site.groups("in0").len(), 2);
        wait_until_holding(&site, &relay, &held);
    }
}

/// One rule with two outputs, of which one is struck, and a rule with a third, all under way.
struct FanOut<'a> {
    site: &'a Site,
    relay: &'a Relay<'a>,
    source: Source,
    other: Source,
    struck: Capture,
    spared: Capture,
    third: Capture,
    /// Datagrams that the struck sink saw on interfaces that it had before.
    seen: usize,
}

const OTHER: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(239, 1, 1, 2), 5000);
const THIRD: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(239, 2, 2, 2), 6000);

impl<'a> FanOut<'a> {
    #[track_caller]
    fn start(site: &'a Site, relay: &'a Relay<'a>) -> Self {
        relay.add("cam1", &format!("{GROUP}@in0"), &[&format!("{STRUCK}@out0"), &format!("{SPARED}@out1")]);
        relay.add("other", &format!("{OTHER}@in0"), &[&format!("{THIRD}@out2"), "239.2.2.9:6000@out2"]);
        // What a first change of outputs makes is held from then on.
        relay.set("other", &["--del-out", "239.2.2.9:6000@out2"]);
        for group in [GROUP, OTHER] {
            site.segments[0].wait_until_joined(*group.ip());
        }
        let [mut struck, spared, third] = [0, 1, 2].map(|sink| site.capture(sink));
        let [source, other] = [GROUP, OTHER].map(|group| Source::start(site.source(), Stream::to(group)));
        struck.at_least(STRUCK, 500);
        Self { site, relay, source, other, struck, spared, third, seen: 0 }
    }

    fn ip(&self, lines: &[&str]) {
        self.site.relay.ip(lines);
    }

    /// Waits until the struck output waits for a reason, and checks that what comes for it is counted as pending
    /// and none of it leaves.
    #[track_caller]
    fn waits(&self, why: &str) {
        wait_until_pending(self.relay, "cam1", why, &[true, false]);
        let output = || self.relay.rule("cam1").outputs.remove(0);
        let before = output();
        let pending = |output: &OutputStats| output.dropped.get("pending").copied().unwrap_or(0);
        self.source.wait_for_more(500);
        wait_until("it is counted", PATIENCE, || pending(&output()) >= pending(&before) + 500);
        let after = output();
        assert_eq!(after.sent, before.sent);
        assert_eq!(
            after.received - before.received,
            pending(&after) - pending(&before),
            "{before:?} {after:?}"
        );
    }

    /// Does `mend`, after which nothing is in the way of the struck output, and checks that it is back in time.
    #[track_caller]
    fn resumes_when(&mut self, what: &str, mend: impl FnOnce(&Self)) {
        let before = self.struck.count(STRUCK);
        let mended = Instant::now();
        mend(self);
        let sink = &mut self.struck;
        wait_until(&format!("{what}: the output is back"), PATIENCE, || sink.count(STRUCK) > before);
        let took = mended.elapsed();
        println!("{what}, {:?}: back after {took:?}", self.site.ground);
        assert!(took < SOON, "{what}: back after {took:?} only");
        sink.at_least(STRUCK, before + 500);
        self.relay.wait_until_active("cam1");
    }

    /// Ends the streams: nothing but the struck output has lost anything, and what that lost is counted by this
    /// reason. Answers what it sent and what of it arrived.
    #[track_caller]
    fn finish(self, reason: &str) -> (u64, usize) {
        let Self { site, relay, source, other, mut struck, mut spared, mut third, seen } = self;
        let (sent, other) = (source.stop(), other.stop());
        let stats = relay.balanced("cam1", sent);
        assert_eq!((stats.received, stats.outputs[1].sent), (sent, sent));
        assert_sequence(&spared.exactly(SPARED, sent as usize), 0..sent);
        assert_eq!(relay.balanced("other", other).outputs[0].sent, other);
        assert_sequence(&third.exactly(THIRD, other as usize), 0..other);
        let output = &stats.outputs[0];
        assert_eq!(output.received, sent);
        // Until the relay hears of it, the kernel refuses by names of its own, or in silence.
        let refused = ["unreachable", "queue_full", "send_failed", "skipped"];
        let known = |name: &String| name == reason || refused.contains(&name.as_str());
        assert!(output.dropped.contains_key(reason) && output.dropped.keys().all(known), "{output:?}");
        let early: u64 = refused.iter().filter_map(|reason| output.dropped.get(*reason)).sum();
        assert!(early < 500, "a tenth of a second of datagrams: {output:?}");
        println!("dropped, {:?}: {:?}", site.ground, output.dropped);
        let last = struck.to(STRUCK);
        assert_eq!(last.last().unwrap().sequence(), sent - 1);
        assert!(
            last.windows(2).all(|pair| pair[0].sequence() < pair[1].sequence()),
            "doubled or out of order"
        );
        assert!(!relay.log().contains("panicked"), "{}", relay.log());
        (output.sent, seen + last.len())
    }
}

fn an_egress_interface_that_is_deleted_and_made_anew_sends_again() {
    let site = Site::default();
    let relay = Relay::start(&site);
    let mut fan_out = FanOut::start(&site, &relay);
    let busy = holdings(&site, &relay);
    for _ in 0..2 {
        let former = index(&site, "out0");
        site.sinks[0].unplug(&site.relay);
        fan_out.waits("interface out0 does not exist");
        let egress = usize::from(site.ground != Ground::Kernel);
        let left = Holdings { udp: busy.udp - egress, pins: busy.pins.clone(), ..busy };
        wait_until_holding(&site, &relay, &left);
        site.sinks[0].plug(&site.relay);
        assert_ne!(index(&site, "out0"), former);
        fan_out.seen += std::mem::replace(&mut fan_out.struck, site.capture(0)).count(STRUCK);
        fan_out.waits("interface out0 is down");
        fan_out.resumes_when("egress made anew", |fan_out| fan_out.ip(&["link set out0 up"]));
        wait_until_holding(&site, &relay, &busy);
    }
    let (sent, arrived) = fan_out.finish("pending");
    // What lay between the ends of the veth when it was deleted is gone with it.
    assert!(arrived as u64 <= sent, "{arrived} of {sent}");
}

fn an_output_waits_for_an_egress_interface_that_appears_later() {
    let site = Site::default();
    let relay = Relay::start(&site);
    site.sinks[0].unplug(&site.relay);
    let input = format!("{GROUP}@in0");
    let (to, spared) = (format!("{STRUCK}@out0"), format!("{SPARED}@out1"));
    let added = relay.cli(&["rule", "add", "cam1", "--in", &input, "--out", &to, "--out", &spared]);
    assert!(added.ok().contains("interface out0 does not exist"), "{added}");
    wait_until_pending(&relay, "cam1", "interface out0 does not exist", &[true, false]);
    site.segments[0].wait_until_joined(*GROUP.ip());
    site.sinks[0].plug(&site.relay);
    let (mut sink, mut spared) = (site.capture(0), site.capture(1));
    let source = Source::start(site.source(), Stream::to(GROUP));
    spared.at_least(SPARED, 500);
    let mended = Instant::now();
    site.relay.ip(&["link set out0 up"]);
    wait_until("the output is there", SOON, || sink.count(STRUCK) > 0);
    println!("egress appears, {:?}: there after {:?}", site.ground, mended.elapsed());
    sink.at_least(STRUCK, 500);
    let sent = source.stop();
    let stats = relay.balanced("cam1", sent);
    assert_sequence(&spared.exactly(SPARED, sent as usize), 0..sent);
    let output = &stats.outputs[0];
    assert_eq!(output.dropped, [("pending".to_owned(), sent - output.sent)].into());
    assert_sequence(&sink.exactly(STRUCK, output.sent as usize), sent - output.sent..sent);
}

fn an_egress_interface_that_loses_its_address_sends_from_the_next() {
    let site = Site::default();
    let relay = Relay::start(&site);
    let mut fan_out = FanOut::start(&site, &relay);
    fan_out.ip(&["addr del 10.78.0.1/24 dev out0"]);
    fan_out.waits("interface out0 has no IPv4 address");
    fan_out.resumes_when("egress address", |fan_out| fan_out.ip(&["addr add 10.78.0.9/24 dev out0"]));
    // One goes while there is another.
    fan_out.ip(&["addr add 10.79.0.1/24 dev out0"]);
    fan_out.source.wait_for_more(500);
    fan_out.ip(&["addr del 10.78.0.9/24 dev out0"]);
    let moved: Ipv4Addr = "10.79.0.1".parse().unwrap();
    let sink = &mut fan_out.struck;
    wait_until("it sends from the other", SOON, || {
        sink.all()
            .iter()
            .rfind(|datagram| datagram.destination == STRUCK)
            .is_some_and(|last| *last.source.ip() == moved)
    });
    let mut sources: Vec<_> = sink.to(STRUCK).iter().map(|datagram| datagram.source).collect();
    sources.dedup();
    let port = sources[0].port();
    let expected = ["10.78.0.1", "10.78.0.9", "10.79.0.1"];
    assert_eq!(sources, expected.map(|address| SocketAddrV4::new(address.parse().unwrap(), port)));
    let (sent, arrived) = fan_out.finish("pending");
    assert_eq!(arrived as u64, sent);
}

fn an_egress_link_goes_down_and_up() {
    let site = Site::default();
    let relay = Relay::start(&site);
    let mut fan_out = FanOut::start(&site, &relay);
    let busy = holdings(&site, &relay);
    for (what, host, interface) in
        [("egress up", &site.relay, "out0"), ("egress carrier back", &site.sinks[0].host, ETH)]
    {
        host.ip(&[&format!("link set {interface} down")]);
        fan_out.waits("interface out0 is down");
        fan_out.resumes_when(what, |_| host.ip(&[&format!("link set {interface} up")]));
        wait_until_holding(&site, &relay, &busy);
    }
    let (sent, arrived) = fan_out.finish("pending");
    assert!(arrived as u64 <= sent, "{arrived} of {sent}");
}

fn an_egress_interface_is_renamed_away_and_back() {
    let site = Site::default();
    let relay = Relay::start(&site);
    let mut fan_out = FanOut::start(&site, &relay);
    let busy = holdings(&site, &relay);
    rename(&site, "out0", "away");
    fan_out.waits("interface out0 does not exist");
    fan_out.ip(&["link set away up"]);
    fan_out.resumes_when("egress renamed back", |fan_out| {
        rename(fan_out.site, "away", "out0");
        fan_out.ip(&["link set out0 up"]);
    });
    wait_until_holding(&site, &relay, &busy);
    let (sent, arrived) = fan_out.finish("pending");
    assert_eq!(arrived as u64, sent);
}

fn another_mtu_of_an_egress_interface_is_taken_up() {
    let site = Site::default();
    let relay = Relay::start(&site);
    let mut fan_out = FanOut::start(&site, &relay);
    fan_out.ip(&["link set out0 mtu 1000"]);
    wait_until("what is too big is counted", PATIENCE, || {
        relay.rule("cam1").outputs[0].dropped.get("too_big").is_some_and(|count| *count > 500)
    });
    fan_out.resumes_when("egress MTU", |fan_out| fan_out.ip(&["link set out0 mtu 1500"]));
    let (sent, arrived) = fan_out.finish("too_big");
    assert_eq!(arrived as u64, sent);
}

tests::on_both_datapaths!(
    another_mtu_of_an_egress_interface_is_taken_up,
    an_egress_interface_that_is_deleted_and_made_anew_sends_again,
    an_output_waits_for_an_egress_interface_that_appears_later,
    an_egress_interface_that_loses_its_address_sends_from_the_next,
    an_egress_link_goes_down_and_up,
    an_egress_interface_is_renamed_away_and_back,
);

tests::by_the_kernel!(
    an_ingress_interface_that_is_deleted_and_made_anew_relays_again,
    a_rule_waits_for_an_interface_that_appears_later,
    an_ingress_interface_is_renamed_away_and_back,
    an_ingress_link_goes_down_and_up,
    an_ingress_interface_that_changes_its_address_loses_nothing,
    another_mtu_of_an_ingress_interface_is_taken_up,
    another_mtu_of_an_egress_interface_is_taken_up,
    an_egress_interface_that_is_deleted_and_made_anew_sends_again,
    an_output_waits_for_an_egress_interface_that_appears_later,
    an_egress_interface_that_loses_its_address_sends_from_the_next,
    an_egress_link_goes_down_and_up,
    an_egress_interface_is_renamed_away_and_back,
);
