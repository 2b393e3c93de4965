//! Rules that come and go while traffic flows.

#![expect(clippy::unwrap_used, reason = "where it fails, the test fails and says where")]

use std::net::{Ipv4Addr, SocketAddrV4};

use mcr::api::wire::{Outcome, RuleList, RuleOutcome, RuleStats};
use tests::{
    Capture, Relay, Site, Source, capture::assert_sequence, site::Membership, source::Stream, wait::PATIENCE,
    wait_until,
};

const GROUP: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(239, 1, 1, 1), 5000);
const OUTPUT: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(239, 2, 2, 2), 6000);

fn rules_come_and_go_while_another_stream_loses_nothing() {
    let site = Site::default();
    let relay = Relay::start(&site);
    relay.add("steady", "239.1.1.1:5000@in0", &["239.2.2.2:6000@out0"]);
    site.segments[0].wait_until_joined(*GROUP.ip());
    let mut sink = site.capture(0);
    let source = Source::start(site.source(), Stream { rate: 10_000, ..Stream::to(GROUP) });
    for round in 0..3 {
        for i in 0..10 {
            // Now and then to the steady rule's own interface and group.
            let input = if i % 2 == 0 {
                format!("239.3.{round}.{i}:5000@in0")
            } else {
                format!("239.1.1.1:{}@in0", 5001 + i)
            };
            relay.add(&format!("churn{i}"), &input, &[&format!("239.4.{round}.{i}:6000@out{}", i % 3)]);
        }
        for i in 0..10 {
            relay.remove(&format!("churn{i}"));
        }
        source.wait_for_more(1_000);
    }
    let sent = source.stop();
    assert_eq!(relay.balanced("steady", sent).outputs[0].sent, sent);
    assert_sequence(&sink.exactly(OUTPUT, sent as usize), 0..sent);
    let rules = relay.json::<RuleList>(&["rule", "list"]).rules;
    assert_eq!(rules.iter().map(|rule| rule.name.as_str()).collect::<Vec<_>>(), ["steady"]);
}

fn nothing_leaves_after_a_removal_was_answered() {
    let site = Site::default();
    let relay = Relay::start(&site);
    // Keeps the group coming, so that it is not the bridge that ends it.
    let _membership = Membership::join(&site.relay, "in0", *GROUP.ip());
    site.segments[0].wait_until_joined(*GROUP.ip());
    let (mut sink, mut arriving) = (site.capture(0), Capture::start(&site.relay, "in0"));
    let source = Source::start(site.source(), Stream { rate: 10_000, ..Stream::to(GROUP) });
    let mut count = 0;
    for _ in 0..5 {
        relay.add("cam1", "239.1.1.1:5000@in0", &["239.2.2.2:6000@out0"]);
        sink.at_least(OUTPUT, count + 500);
        relay.remove("cam1");
        count = sink.count(OUTPUT);
        let arrived = arriving.count(GROUP);
        source.wait_for_more(1_000);
        assert_eq!(sink.count(OUTPUT), count, "datagrams left after the removal was answered");
        assert!(arriving.count(GROUP) > arrived, "the source plays on");
    }
    source.stop();
}

fn nothing_leaves_by_an_output_after_its_deletion_was_answered() {
    let site = Site::default();
    let relay = Relay::start(&site);
    let (gone, stays) = ("239.2.2.3:6000@out0", "239.2.2.2:6000@out0");
    relay.add("cam1", "239.1.1.1:5000@in0", &[gone, stays]);
    site.segments[0].wait_until_joined(*GROUP.ip());
    let to: SocketAddrV4 = "239.2.2.3:6000".parse().unwrap();
    let mut sink = site.capture(0);
    let source = Source::start(site.source(), Stream { rate: 10_000, ..Stream::to(GROUP) });
    for _ in 0..5 {
        let before = sink.count(to);
        sink.at_least(to, before + 500);
        relay.set("cam1", &["--del-out", gone]);
        let count = sink.count(to);
        source.wait_for_more(1_000);
        assert_eq!(sink.count(to), count, "datagrams left after the deletion was answered");
        relay.set("cam1", &["--add-out", gone]);
    }
    let sent = source.stop();
    relay.balanced("cam1", sent);
    assert_sequence(&sink.exactly(OUTPUT, sent as usize), 0..sent);
}

fn the_very_same_rule_again_is_unchanged() {
    let site = Site::default();
    let relay = Relay::start(&site);
    let add = ["rule", "add", "cam1", "--in", "239.1.1.1:5000@in0", "--out", "239.2.2.2:6000@out0"];
    assert_eq!(relay.json::<RuleOutcome>(&add).outcome, Outcome::Added);
    relay.wait_until_active("cam1");
    site.segments[0].wait_until_joined(*GROUP.ip());
    let mut sink = site.capture(0);
    let source = Source::start(site.source(), Stream::to(GROUP));
    source.wait_for_more(100);
    assert_eq!(relay.json::<RuleOutcome>(&add).outcome, Outcome::Unchanged);
    // Written differently, it is the same.
    let again =
        ["rule", "add", "cam1", "--in", "239.1.1.1:5000@in0", "--out", "239.2.2.2:6000@out0,ttl=16,gso=true"];
    assert_eq!(relay.json::<RuleOutcome>(&again).outcome, Outcome::Unchanged);
    source.wait_for_more(100);
    let sent = source.stop();
    relay.balanced("cam1", sent);
    assert_sequence(&sink.exactly(OUTPUT, sent as usize), 0..sent);
}

fn a_rule_without_a_name_is_given_one_that_is_stable() {
    let site = Site::default();
    let relay = Relay::start(&site);
    let add = ["rule", "add", "--in", "239.1.1.1:5000@in0", "--out", "239.2.2.2:6000@out0"];
    let first: RuleOutcome = relay.json(&add);
    assert_eq!(first.outcome, Outcome::Added);
    assert!(first.rule.name.starts_with(|c: char| c.is_ascii_alphabetic()), "{}", first.rule.name);
    let second: RuleOutcome = relay.json(&add);
    assert_eq!((second.outcome, &second.rule.name), (Outcome::Unchanged, &first.rule.name));
    relay.remove(&first.rule.name);
    let third: RuleOutcome = relay.json(&add);
    assert_eq!((third.outcome, third.rule.name), (Outcome::Added, first.rule.name));
}

fn several_rules_may_feed_one_output_if_each_says_so() {
    let site = Site::default();
    let relay = Relay::start(&site);
    let second: SocketAddrV4 = "239.1.1.2:5000".parse().unwrap();
    relay.add_with("a", "239.1.1.1:5000@in0", &["239.2.2.2:6000@out0"], &["--merge"]);
    relay.add_with("b", "239.1.1.2:5000@in0", &["239.2.2.2:6000@out0"], &["--merge"]);
    site.segments[0].wait_until_joined(*GROUP.ip());
    site.segments[0].wait_until_joined(*second.ip());
    let mut sink = site.capture(0);
    let a = Source::start(site.source(), Stream { count: 1_000, ..Stream::to(GROUP) });
    let b = Source::start(site.source(), Stream { count: 1_000, ..Stream::to(second) });
    assert_eq!((a.finish(), b.finish()), (1_000, 1_000));
    assert_eq!(relay.balanced("a", 1_000).outputs[0].sent, 1_000);
    assert_eq!(relay.balanced("b", 1_000).outputs[0].sent, 1_000);
    sink.exactly(OUTPUT, 2_000);
}

fn what_a_stream_is_doing_is_on_every_screen() {
    let site = Site::default();
    let relay = Relay::start(&site);
    relay.add("cam1", "239.1.1.1:5000@in0", &["239.2.2.2:6000@out0"]);
    site.segments[0].wait_until_joined(*GROUP.ip());
    Source::play(site.source(), Stream { count: 500, ..Stream::to(GROUP) });
    relay.balanced("cam1", 500);
    for (call, words) in [
        (&["status"][..], &["1"][..]),
        (&["stats"], &["cam1", "500"]),
        (&["stats", "cam1"], &["cam1", "500"]),
        (&["rule", "list"], &["cam1", "239.1.1.1:5000@in0", "239.2.2.2:6000@out0"]),
        (&["rule", "show", "cam1"], &["cam1", tests::Ground::current().datapath(), "239.2.2.2:6000@out0"]),
        (&["workers"], &["in0"]),
        (&["log-level", "get"], &["info"]),
    ] {
        let answer = relay.cli(call);
        for word in words {
            assert!(answer.ok().contains(word), "no '{word}' in {answer}");
        }
        assert_eq!(answer.stderr, "", "{answer}");
    }
    relay.cli(&["log-level", "set", "debug"]).ok();
    assert_eq!(relay.json::<mcr::api::wire::LogLevelInfo>(&["log-level", "get"]).level, "debug");
}

fn a_rule_for_any_source_comes_and_goes_beside_one_for_a_source() {
    let site = Site::default();
    let relay = Relay::start(&site);
    // Keeps the host joined to any source: when a host goes from one source to any, a Linux bridge forwards
    // nothing of that source until its timer next fires, which is not the relay's loss.
    let _membership = Membership::join(&site.relay, "in0", *GROUP.ip());
    relay.add("one", "239.1.1.1:5000@in0,source=10.77.0.2", &["239.2.2.2:6000@out0"]);
    site.segments[0].wait_until_joined(*GROUP.ip());
    let mut sink = site.capture(0);
    let source = Source::start(site.source(), Stream::to(GROUP));
    for _ in 0..3 {
        relay.add("rest", "239.1.1.1:5000@in0", &["239.2.2.3:6000@out1"]);
        source.wait_for_more(300);
        relay.remove("rest");
        source.wait_for_more(300);
    }
    let sent = source.stop();
    assert_eq!(relay.balanced("one", sent).outputs[0].sent, sent);
    assert_sequence(&sink.exactly(OUTPUT, sent as usize), 0..sent);
}

fn a_rule_for_a_source_takes_its_stream_over_without_loss() {
    let site = Site::default();
    let relay = Relay::start(&site);
    relay.add("rest", "239.1.1.1:5000@in0", &["239.2.2.2:6000@out0"]);
    site.segments[0].wait_until_joined(*GROUP.ip());
    let (mut sink0, mut sink1) = (site.capture(0), site.capture(1));
    let source = Source::start(site.source(), Stream { rate: 10_000, ..Stream::to(GROUP) });
    source.wait_for_more(1_000);
    relay.add("one", "239.1.1.1:5000@in0,source=10.77.0.2", &["239.2.2.3:6000@out1"]);
    source.wait_for_more(1_000);
    let sent = source.stop();
    // The XDP program and the worker each look a datagram up: one that is between them at the change may be
    // counted as matched by the one rule and received by the other.
    let sum = |count: fn(&RuleStats) -> u64| relay.stats().rules.iter().map(count).sum::<u64>();
    wait_until("every datagram has left", PATIENCE, || sum(|rule| rule.outputs[0].sent) == sent);
    assert_eq!((sum(|rule| rule.matched), sum(|rule| rule.received)), (sent, sent));
    let taken = relay.rule("rest").outputs[0].sent;
    assert_sequence(&sink0.exactly(OUTPUT, taken as usize), 0..taken);
    assert_sequence(&sink1.exactly("239.2.2.3:6000".parse().unwrap(), (sent - taken) as usize), taken..sent);
}

tests::on_every_ground!(
    rules_come_and_go_while_another_stream_loses_nothing,
    nothing_leaves_after_a_removal_was_answered,
    the_very_same_rule_again_is_unchanged,
    a_rule_without_a_name_is_given_one_that_is_stable,
    several_rules_may_feed_one_output_if_each_says_so,
    what_a_stream_is_doing_is_on_every_screen,
    a_rule_for_any_source_comes_and_goes_beside_one_for_a_source,
    a_rule_for_a_source_takes_its_stream_over_without_loss,
);

tests::by_the_kernel!(
    rules_come_and_go_while_another_stream_loses_nothing,
    nothing_leaves_after_a_removal_was_answered,
    nothing_leaves_by_an_output_after_its_deletion_was_answered,
    several_rules_may_feed_one_output_if_each_says_so,
    a_rule_for_any_source_comes_and_goes_beside_one_for_a_source,
    a_rule_for_a_source_takes_its_stream_over_without_loss,
);

tests::on_both_datapaths!(nothing_leaves_by_an_output_after_its_deletion_was_answered);

tests::without_bpf!(
    rules_come_and_go_while_another_stream_loses_nothing,
    nothing_leaves_after_a_removal_was_answered
);
