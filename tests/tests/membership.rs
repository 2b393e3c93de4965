//! What the relay joins, as the snooping bridge before it knows.

use std::{
    collections::BTreeSet,
    net::{Ipv4Addr, SocketAddrV4},
    time::{Duration, Instant},
};

use mcr::{
    api::{
        client::Client,
        wire::{Health, Outcome, Request, RuleOutcome, RuleRemoval, Status},
    },
    net::membership::{Membership, Memberships},
    rule::IfIndex,
};
use nix::sys::signal::Signal;
use tests::{
    Ground, Namespace, RawSender, Relay, Site, Source, Udp, Usage,
    relay::spec,
    site::{ETH, Plan},
    source::Stream,
    wait::PATIENCE,
    wait_until,
};

const GROUP: Ipv4Addr = Ipv4Addr::new(239, 1, 1, 1);

fn a_group_is_joined_with_its_first_rule_and_left_with_its_last() {
    let site = Site::default();
    let segment = &site.segments[0];
    let relay = Relay::start(&site);
    assert!(segment.joined().is_empty());
    relay.add("first", "239.1.1.1:5000@in0", &["239.2.2.2:6000@out0"]);
    segment.wait_until_joined(GROUP);
    relay.add("second", "239.1.1.1:5001@in0", &["239.2.2.2:6001@out0"]);
    assert_eq!(site.groups("in0"), [GROUP]);
    relay.remove("first");
    assert_eq!(site.groups("in0"), [GROUP]);
    assert_eq!(segment.joined(), [(GROUP, None)]);
    relay.remove("second");
    segment.wait_until_left(GROUP);
    assert!(site.groups("in0").is_empty());
}

fn a_rule_for_one_source_joins_that_source() {
    let site = Site::default();
    let segment = &site.segments[0];
    let relay = Relay::start(&site);
    relay.add("one", "239.1.1.1:5000@in0,source=10.77.0.2", &["239.2.2.2:6000@out0"]);
    segment.wait_until_source_joined(GROUP, Ipv4Addr::new(10, 77, 0, 2));
    assert_eq!(segment.joined().len(), 1, "no other source is joined");
    relay.add("rest", "239.1.1.1:5000@in0", &["239.2.2.3:6000@out0"]);
    segment.wait_until_joined(GROUP);
    relay.remove("rest");
    // Of what a host changes within some 10 ms Linux reports the last: that it was joined to any source before
    // it was to none is not said then, and the bridge keeps the entry until it times out.
    wait_until("the bridge has the one source again", PATIENCE, || {
        segment.joined() == [(GROUP, Some(Ipv4Addr::new(10, 77, 0, 2)))]
    });
    relay.remove("one");
    segment.wait_until_left(GROUP);
    assert!(site.groups("in0").is_empty());
}

fn a_group_joined_for_any_source_and_for_one_is_left_at_the_end() {
    let site = Site::default();
    let segment = &site.segments[0];
    let mut relay = Relay::start(&site);
    relay.add("rest", "239.1.1.1:5000@in0", &["239.2.2.2:6000@out0"]);
    relay.add("one", "239.1.1.1:5000@in0,source=10.77.0.2", &["239.2.2.3:6000@out0"]);
    segment.wait_until_joined(GROUP);
    relay.signal(Signal::SIGTERM);
    assert!(relay.wait(PATIENCE).success());
    segment.wait_until_left(GROUP);
}

fn a_hundred_groups_are_joined_and_left() {
    let site = Site::default();
    let segment = &site.segments[0];
    let relay = Relay::start(&site);
    let groups: Vec<_> = (1..=100).map(|i| Ipv4Addr::new(239, 1, 7, i)).collect();
    for group in &groups {
        let name = format!("r{}", group.octets()[3]);
        relay
            .cli(&[
                "rule",
                "add",
                &name,
                "--in",
                &format!("{group}:5000@in0"),
                "--out",
                &format!("239.2.2.2:{}@out0", 6000 + u16::from(group.octets()[3])),
            ])
            .ok();
    }
    assert_eq!(site.groups("in0"), groups);
    wait_until("the bridge has them all", PATIENCE, || segment.joined().len() == 100);
    // Every second goes; the others stay.
    for i in (1..=100).step_by(2) {
        relay.remove(&format!("r{i}"));
    }
    let left: Vec<_> = groups.iter().copied().filter(|group| group.octets()[3] % 2 == 0).collect();
    assert_eq!(site.groups("in0"), left);
    wait_until("the bridge has half of them", PATIENCE, || segment.joined().len() == 50);
}

/// A rule with a group, perhaps for one source, and who sends to it.
struct Flow {
    name: String,
    group: Ipv4Addr,
    source: Option<Ipv4Addr>,
    sender: Ipv4Addr,
    to: SocketAddrV4,
}

/// The n-th address behind two bytes.
fn nth(first: u8, second: u8, n: u16) -> Ipv4Addr {
    let [third, fourth] = n.to_be_bytes();
    Ipv4Addr::new(first, second, third, fourth)
}

/// 1,000 groups of any source.
fn any_source() -> Vec<Flow> {
    let flow = |n| Flow {
        name: format!("any{n}"),
        group: nth(239, 1, n),
        source: None,
        sender: Ipv4Addr::new(10, 77, 0, 2),
        to: SocketAddrV4::new(nth(239, 101, n), 6000),
    };
    (0..1_000).map(flow).collect()
}

/// 1,000 of one source: 500 groups with two sources each, every other of which is one of any source too.
fn one_source() -> Vec<Flow> {
    let flow = |n: u16| {
        let source = Ipv4Addr::new(10, 77, 0, 11 + (n % 2) as u8);
        Flow {
            name: format!("one{n}"),
            group: if n % 4 < 2 { nth(239, 1, n / 2) } else { nth(232, 1, n / 2) },
            source: Some(source),
            sender: source,
            to: SocketAddrV4::new(nth(239, 102, n), 6000),
        }
    };
    (0..1_000).map(flow).collect()
}

/// Adds rules one after another, and says how that went.
fn add_all(client: &mut Client, flows: &[Flow]) {
    let mut took = Vec::new();
    for Flow { name, group, source, to, .. } in flows {
        let source = source.map(|source| format!(",source={source}")).unwrap_or_default();
        let rule = spec(name, &format!("{group}:5000@in0{source}"), &[&format!("{to}@out0")]);
        let start = Instant::now();
        let answer: RuleOutcome = client.call(&Request::RuleAdd(rule)).expect("the rule is taken");
        took.push(start.elapsed());
        assert_eq!(answer.outcome, Outcome::Added);
    }
    let mean = |times: &[Duration]| times.iter().sum::<Duration>() / times.len() as u32;
    let (first, last) = (mean(&took[..100]), mean(&took[took.len() - 100..]));
    println!(
        "rules added in {:?}: the first 100 in {first:?} each, the last in {last:?}",
        took.iter().sum::<Duration>()
    );
}

fn remove_all(client: &mut Client, flows: &[Flow]) {
    let start = Instant::now();
    for Flow { name, .. } in flows {
        let removal = Request::RuleRemove(RuleRemoval { name: name.clone(), save: false });
        assert_eq!(client.call::<RuleOutcome>(&removal).expect("a rule").outcome, Outcome::Removed);
    }
    println!("rules removed in {:?}", start.elapsed());
}

fn status(client: &mut Client) -> Status {
    client.call(&Request::Status).expect("the daemon answers")
}

/// Groups and sources of flows, as the host lists them.
fn groups(flows: &[&[Flow]]) -> Vec<Ipv4Addr> {
    flows
        .iter()
        .flat_map(|flows| flows.iter().map(|flow| flow.group))
        .collect::<BTreeSet<_>>()
        .into_iter()
        .collect()
}

fn check_thousands(ground: Ground) {
    let site = Site::build(Plan { ground, ..Plan::default() });
    let segment = &site.segments[0];
    let relay = Relay::start_with(&site, &["--log-level", "warn"]);
    // What an interface takes with its first rule it keeps.
    relay.add("first", "239.3.3.3:5000@in0", &["239.4.4.4:6000@out0"]);
    relay.remove("first");
    let mut client = relay.client();
    assert_eq!(status(&mut client).rules.total, 0);
    let idle = Usage::of(relay.pid()).descriptors;

    let (any, one) = (any_source(), one_source());
    add_all(&mut client, &any);
    add_all(&mut client, &one);
    wait_until("all rules are active", PATIENCE, || status(&mut client).rules.active == 2_000);
    assert_eq!(site.groups("in0"), groups(&[&any, &one]));
    let mut sources: Vec<_> = one.iter().filter_map(|flow| Some((flow.group, flow.source?))).collect();
    sources.sort_unstable();
    assert_eq!(site.sources("in0"), sources);
    println!("{} descriptors for the memberships", Usage::of(relay.pid()).descriptors - idle);
    // A host that is joined to any source asks for none besides.
    let of_any = any.iter().map(|flow| (flow.group, None));
    let of_one =
        one.iter().filter(|flow| flow.group.octets()[0] == 232).map(|flow| (flow.group, flow.source));
    let joined: BTreeSet<_> = of_any.chain(of_one).collect();
    wait_until("the bridge has them all", PATIENCE, || {
        segment.joined().into_iter().collect::<BTreeSet<_>>() == joined
    });

    let mut sink = site.capture(0);
    let frame = |flow: &Flow| {
        let (from, to) = (SocketAddrV4::new(flow.sender, 40_000), SocketAddrV4::new(flow.group, 5000));
        Udp::new(from, to).payload(flow.name.as_bytes()).frame()
    };
    let flows = || any.iter().chain(&one);
    assert_eq!(RawSender::new(site.source(), ETH).play(flows().map(frame), 5_000), 2_000);
    wait_until("every datagram has left", PATIENCE, || {
        relay.stats().rules.iter().map(|rule| rule.outputs[0].sent).sum::<u64>() == 2_000
    });
    for rule in relay.stats().rules {
        assert_eq!((rule.matched, rule.received, rule.outputs[0].sent), (1, 1, 1), "{rule:?}");
    }
    wait_until("every datagram has arrived", PATIENCE, || sink.all().len() >= 2_000);
    let mut seen: Vec<_> = sink.all().iter().map(|it| (it.destination, it.payload.clone())).collect();
    let mut expected: Vec<_> = flows().map(|flow| (flow.to, flow.name.clone().into_bytes())).collect();
    seen.sort_unstable();
    expected.sort_unstable();
    assert!(seen == expected, "each flow's datagram once, and nothing else");

    remove_all(&mut client, &one);
    assert_eq!((site.groups("in0"), site.sources("in0")), (groups(&[&any]), vec![]));
    remove_all(&mut client, &any);
    assert_eq!(site.groups("in0"), [] as [Ipv4Addr; 0]);
    assert!(site.sources("in0").is_empty());
    wait_until("the bridge has none", PATIENCE, || segment.joined().is_empty());
    wait_until("the emptied sockets are closed", PATIENCE, || Usage::of(relay.pid()).descriptors <= idle);
}

#[test]
fn a_thousand_groups_and_a_thousand_sources_are_joined_relayed_and_left_on_af_xdp() {
    check_thousands(Ground::Veth);
}

#[test]
fn a_thousand_groups_and_a_thousand_sources_are_joined_relayed_and_left_on_af_packet() {
    check_thousands(Ground::PlainVeth);
}

fn a_group_that_cannot_be_joined_is_its_rules_error_until_it_can_be() {
    let site = Site::default();
    let segment = &site.segments[0];
    let relay = Relay::start(&site);
    let (source, to) = (segment.source_address, SocketAddrV4::new(Ipv4Addr::new(239, 2, 2, 2), 6000));
    let rules = [("any", GROUP, None), ("one", Ipv4Addr::new(232, 1, 1, 1), Some(source))];
    relay.add("any", "239.1.1.1:5000@in0", &[&format!("{to}@out0")]);
    relay.add("one", &format!("232.1.1.1:5000@in0,source={source}"), &["239.2.2.3:6000@out0"]);
    let wait_until_joined = || {
        segment.wait_until_joined(GROUP);
        segment.wait_until_source_joined(Ipv4Addr::new(232, 1, 1, 1), source);
    };
    let down_and_up = || {
        site.relay.ip(&["link set in0 down"]);
        wait_until("what is down is left", PATIENCE, || site.groups("in0").is_empty());
        assert_eq!(relay.show("any").health, Health::Pending);
        site.relay.ip(&["link set in0 up"]);
    };
    wait_until_joined();
    down_and_up();
    wait_until_joined();

    site.relay.sysctl("ipv4/igmp_max_memberships", "0");
    let late = ["rule", "add", "late", "--in", "239.1.1.2:5000@in0", "--out", "239.2.2.4:6000@out0"];
    // They stand on sockets that are full now.
    let refused = relay.cli(&late);
    assert!(refused.refused(1).contains("the group 239.1.1.2 cannot be joined"), "{refused}");
    assert!(refused.refused(1).contains("igmp_max_memberships"), "{refused}");
    assert_eq!(relay.show_all().len(), 2);
    down_and_up();
    for (name, group, source) in rules {
        wait_until("the rule has failed", PATIENCE, || relay.show(name).health == Health::Failed);
        let of = source.map(|source| format!(" of source {source}")).unwrap_or_default();
        let why = format!("the group {group}{of} cannot be joined: ");
        let list = relay.show_all();
        let told = [relay.show(name), list.into_iter().find(|rule| rule.name == name).expect("the rule")];
        for rule in told {
            assert!(rule.reason.as_ref().is_some_and(|reason| reason.starts_with(&why)), "{rule:?}");
        }
        let status: Status = relay.json(&["status"]);
        assert_eq!((status.health, status.rules.failed), (Health::Failed, 2), "{status:?}");
        let problem =
            status.problems.iter().find(|problem| problem.what.starts_with(&format!("rule {name}: {why}")));
        assert_eq!(
            problem.map(|problem| &problem.next),
            Some(&format!("mcr rule show {name}")),
            "{status:?}"
        );
    }
    for screen in [&["rule", "list"][..], &["rule", "show", "any"], &["status"]] {
        let screen = relay.cli(screen);
        let words = screen.ok().split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(words.contains("failed") && words.contains("cannot be joined"), "{screen}");
    }
    assert!(site.groups("in0").is_empty());

    site.relay.sysctl("ipv4/igmp_max_memberships", "20");
    for (name, ..) in rules {
        relay.wait_until_active(name);
    }
    wait_until_joined();
    let status: Status = relay.json(&["status"]);
    assert_eq!((status.health, status.problems), (Health::Active, vec![]));
    let mut sink = site.capture(0);
    Source::play(site.source(), Stream { count: 500, ..Stream::to(SocketAddrV4::new(GROUP, 5000)) });
    relay.balanced("any", 500);
    sink.exactly(to, 500);
}

/// The kernel keeps the memberships of one source of an interface that is gone, at its number.
#[test]
fn what_was_joined_on_an_interface_that_went_hinders_none_that_gets_its_number() {
    let host = Namespace::new("host");
    let source = Some(Ipv4Addr::new(192, 0, 2, 7));
    let member = |index, group| Membership { interface: IfIndex(index), group, source };
    let (kept, gone) = (member(78, GROUP), member(77, GROUP));
    host.ip(&["link add name kept index 78 type bridge", "link add name gone index 77 type bridge"]);
    let mut memberships = Memberships::default();
    for round in 0..3 {
        for membership in [kept, gone] {
            let joined = host.run(|| memberships.join(membership));
            joined.unwrap_or_else(|error| panic!("round {round}, {membership:?}: {error}"));
        }
        host.ip(&["link delete gone"]);
        host.run(|| memberships.leave(gone)).expect("it is left all the same");
        host.ip(&["link add name gone index 77 type bridge"]);
    }
}

tests::on_every_ground!(
    a_group_that_cannot_be_joined_is_its_rules_error_until_it_can_be,
    a_group_is_joined_with_its_first_rule_and_left_with_its_last,
    a_rule_for_one_source_joins_that_source,
    a_group_joined_for_any_source_and_for_one_is_left_at_the_end,
    a_hundred_groups_are_joined_and_left,
);

tests::without_bpf!(a_group_is_joined_with_its_first_rule_and_left_with_its_last);
