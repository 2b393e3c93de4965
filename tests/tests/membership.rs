//! What the relay joins, as the snooping bridge before it knows.

use std::net::Ipv4Addr;

use tests::{Relay, Site, wait_until};

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
    relay.remove("rest");
    relay.remove("one");
    segment.wait_until_left(GROUP);
    assert!(site.groups("in0").is_empty());
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
    wait_until("the bridge has them all", tests::wait::PATIENCE, || segment.joined().len() == 100);
    // Every second goes; the others stay.
    for i in (1..=100).step_by(2) {
        relay.remove(&format!("r{i}"));
    }
    let left: Vec<_> = groups.iter().copied().filter(|group| group.octets()[3] % 2 == 0).collect();
    assert_eq!(site.groups("in0"), left);
    wait_until("the bridge has half of them", tests::wait::PATIENCE, || segment.joined().len() == 50);
}

tests::on_every_ground!(
    a_group_is_joined_with_its_first_rule_and_left_with_its_last,
    a_rule_for_one_source_joins_that_source,
    a_hundred_groups_are_joined_and_left,
);

tests::without_bpf!(a_group_is_joined_with_its_first_rule_and_left_with_its_last);
