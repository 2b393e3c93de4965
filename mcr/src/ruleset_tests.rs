use super::*;
use crate::rule::{Datapath, Place};

fn interface(name: &str) -> InterfaceName {
    name.parse().unwrap()
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

fn file_at(line: u32) -> Origin {
    Origin::File(Place { file: "/etc/mcr/mcr.toml".into(), line })
}

fn merging(rule: Rule) -> Rule {
    Rule { merge: true, ..rule }
}

fn link_local(rule: Rule) -> Rule {
    Rule { link_local: true, ..rule }
}

fn set_of(rules: &[Rule]) -> RuleSet {
    let mut set = RuleSet::new(8);
    for rule in rules {
        assert_eq!(set.add(rule.clone(), Origin::Cli), Ok(Change::Made), "{}", rule.name);
    }
    set
}

/// The rules with their slots, one a line.
fn shown(set: &RuleSet) -> Vec<String> {
    set.iter()
        .map(|entry| {
            let outputs: Vec<_> =
                entry.outputs().map(|(output, slot)| format!("{}={output}", slot.0)).collect();
            format!("{} {}={} -> {}", entry.rule.name, entry.slot.0, entry.rule.input, outputs.join(" "))
        })
        .collect()
}

fn add_outputs(outputs: &[&str]) -> Amendment {
    Amendment { add: outputs.iter().map(|text| output(text)).collect(), ..Amendment::default() }
}

fn delete_outputs(outputs: &[&str]) -> Amendment {
    Amendment { delete: outputs.iter().map(|text| output(text)).collect(), ..Amendment::default() }
}

/// The outputs of a rule that has too many.
fn many_outputs(count: u16) -> Vec<String> {
    (0..count).map(|n| format!("239.2.2.2:{}@eth1", 6000 + n)).collect()
}

#[test]
fn what_cannot_stand_is_refused_with_the_way_out() {
    fn check(standing: &[Rule], new: Rule, expected: &str) {
        let mut set = set_of(standing);
        let before = shown(&set);
        let refusal = set.add(new, Origin::Cli).unwrap_err();
        assert_eq!(refusal.to_string(), expected);
        assert_eq!(shown(&set), before, "{expected}");
    }
    let cam = || rule("cam", "239.1.1.1:5000@eth0", &["239.2.2.2:6000@eth1"]);

    check(&[], rule("a", "239.1.1.1:5000@eth0", &[]), "a rule needs an output: give it --out ENDPOINT");
    let many = many_outputs(257);
    check(
        &[],
        rule("a", "239.1.1.1:5000@eth0", &many.iter().map(String::as_str).collect::<Vec<_>>()),
        "a rule has 256 outputs at most, this one would have 257: spread them over several rules",
    );
    check(
        &[],
        rule("a", "239.1.1.1:5000@eth0", &["239.2.2.2:6000@eth1", "239.2.2.2:6000@eth1"]),
        "the output 239.2.2.2:6000@eth1 stands twice: leave one out",
    );
    // Options do not make another output of it.
    check(
        &[],
        rule("a", "239.1.1.1:5000@eth0", &["239.2.2.2:6000@eth1", "239.2.2.2:6000@eth1,ttl=8"]),
        "the output 239.2.2.2:6000@eth1,ttl=8 stands twice: leave one out",
    );
    check(
        &[],
        rule("a", "239.1.1.1:5000@eth0", &["239.1.1.1:5000@eth0"]),
        "the output 239.1.1.1:5000@eth0 is the input itself: choose another group, port or interface",
    );
    check(
        &[],
        rule(
            "a",
            "232.1.1.1:5000@eth0,source=192.0.2.7",
            &["239.2.2.2:1@eth1", "232.1.1.1:5000@eth0,ttl=dec"],
        ),
        "the output 232.1.1.1:5000@eth0,ttl=dec is the input itself: choose another group, port or interface",
    );
    check(
        &[],
        rule("a", "224.0.0.251:5353@eth0", &["239.2.2.2:6000@eth1"]),
        "224.0.0.251 is link-local (224.0.0.0/24), which routers never forward: say --link-local if it is meant",
    );
    check(
        &[],
        rule("a", "239.1.1.1:5000@eth0", &["239.2.2.2:6000@eth1", "224.0.0.1:6000@eth1"]),
        "224.0.0.1 is link-local (224.0.0.0/24), which routers never forward: say --link-local if it is meant",
    );
    check(
        &[cam()],
        rule("b", "239.1.1.1:5000@eth0", &["239.3.3.3:6000@eth1"]),
        "239.1.1.1:5000@eth0 is the input of rule 'cam' already: \
         `mcr rule set cam --add-out ENDPOINT` gives it another output",
    );
    check(
        &[rule("ssm", "232.1.1.1:5000@eth0,source=192.0.2.7", &["239.2.2.2:6000@eth1"])],
        rule("b", "232.1.1.1:5000@eth0,source=192.0.2.7", &["239.3.3.3:6000@eth1"]),
        "232.1.1.1:5000@eth0,source=192.0.2.7 is the input of rule 'ssm' already: \
         `mcr rule set ssm --add-out ENDPOINT` gives it another output",
    );
    check(
        &[cam()],
        rule("b", "239.1.1.9:5000@eth0", &["239.3.3.3:6000@eth1", "239.2.2.2:6000@eth1,ttl=3"]),
        "the output 239.2.2.2:6000@eth1,ttl=3 is fed by rule 'cam' already: \
         say --merge if both streams shall mix there",
    );
}

#[test]
fn a_name_that_is_taken_is_refused_with_the_difference() {
    fn check(new: Rule, expected: Option<&str>) {
        let standing =
            rule("cam", "239.1.1.1:5000@eth0", &["239.2.2.2:6000@eth1", "239.3.3.3:7000@eth2,ttl=8"]);
        let mut set = set_of(&[standing]);
        let before = shown(&set);
        let change = set.add(new, file_at(1));
        let expected = expected.map(|difference| {
            format!(
                "rule 'cam' exists and differs in {difference}: \
                 change it with `mcr rule set`, or choose another name"
            )
        });
        assert_eq!(change.as_ref().err().map(ToString::to_string), expected);
        assert!(change != Ok(Change::Made));
        assert_eq!(shown(&set), before);
        assert_eq!(set.get("cam").unwrap().origin, Origin::Cli);
    }
    let outputs = ["239.2.2.2:6000@eth1", "239.3.3.3:7000@eth2,ttl=8"];
    let same = || rule("cam", "239.1.1.1:5000@eth0", &outputs);

    check(same(), None);
    // Order is no difference, nor are defaults that are written out.
    check(rule("cam", "239.1.1.1:5000@eth0", &[outputs[1], "239.2.2.2:6000@eth1,ttl=16,gso=true"]), None);
    check(
        rule("cam", "239.1.1.1:5001@eth0", &outputs),
        Some("its input (239.1.1.1:5000@eth0 instead of 239.1.1.1:5001@eth0)"),
    );
    check(
        rule("cam", "239.1.1.1:5000@eth0,source=192.0.2.7", &outputs),
        Some("its input (239.1.1.1:5000@eth0 instead of 239.1.1.1:5000@eth0,source=192.0.2.7)"),
    );
    check(
        rule("cam", "239.1.1.1:5000@eth0", &["239.3.3.3:7000@eth2"]),
        Some("its outputs (239.2.2.2:6000@eth1 239.3.3.3:7000@eth2,ttl=8 instead of 239.3.3.3:7000@eth2)"),
    );
    check(
        Rule { datapath: DatapathChoice(Some(Datapath::AfXdp)), ..same() },
        Some("its datapath (auto instead of af-xdp)"),
    );
    check(
        Rule {
            datapath: DatapathChoice(Some(Datapath::AfPacket)),
            ..rule("cam", "239.1.1.9:5000@eth0", &outputs[..1])
        },
        Some(
            "its input (239.1.1.1:5000@eth0 instead of 239.1.1.9:5000@eth0) and \
             its outputs (239.2.2.2:6000@eth1 239.3.3.3:7000@eth2,ttl=8 instead of 239.2.2.2:6000@eth1) and \
             its datapath (auto instead of af-packet)",
        ),
    );
}

#[test]
fn what_may_stand_beside_another_rule_is_taken() {
    fn check(standing: &[Rule], new: Rule) {
        let mut set = set_of(standing);
        let expected = new.clone();
        assert_eq!(set.add(new, Origin::Cli), Ok(Change::Made), "{expected:?}");
        assert_eq!(set.get(expected.name.as_str()).unwrap().rule, expected);
    }
    let forth = || rule("forth", "239.1.1.1:5000@eth0", &["239.1.1.1:5000@eth1"]);
    // The same group both ways.
    check(&[forth()], rule("back", "239.1.1.1:5000@eth1", &["239.1.1.1:5000@eth0"]));
    // In and out by one interface, if group or port differ.
    check(&[], rule("hairpin", "239.1.1.1:5000@eth0", &["239.1.1.1:5001@eth0"]));
    check(&[], rule("hairpin", "239.1.1.1:5000@eth0", &["239.1.1.2:5000@eth0"]));
    // One source and any.
    check(&[forth()], rule("one", "239.1.1.1:5000@eth0,source=192.0.2.7", &["239.1.1.2:5000@eth1"]));
    check(&[forth()], rule("port", "239.1.1.1:5001@eth0", &["239.1.1.1:5001@eth1"]));
    // Two streams into one output, if either of them says so.
    let other = || rule("other", "239.1.1.9:5000@eth0", &["239.1.1.1:5000@eth1"]);
    check(&[forth()], merging(other()));
    check(&[merging(forth())], other());
    // Link-local, if it is meant.
    check(&[], link_local(rule("mdns", "224.0.0.251:5353@eth0", &["224.0.0.251:5353@eth1"])));
    check(&[], rule("beyond", "224.0.1.0:5000@eth0", &["224.0.1.1:5000@eth1"]));
    // As many outputs as a rule may have.
    let many = many_outputs(256);
    let many: Vec<_> = many.iter().map(String::as_str).collect();
    let mut set = RuleSet::new(64);
    assert_eq!(set.add(rule("many", "239.1.1.1:5000@eth0", &many), Origin::Cli), Ok(Change::Made));
}

#[test]
fn a_rule_is_found_by_name_and_by_input() {
    let set = set_of(&[rule("cam", "239.1.1.1:5000@eth0", &["239.2.2.2:6000@eth1"])]);
    assert_eq!(set.get("cam").unwrap().rule.name.as_str(), "cam");
    for unknown in ["cam1", "CAM", "", "no name at all"] {
        assert_eq!(
            set.get(unknown).unwrap_err().to_string(),
            format!("there is no rule '{unknown}': see `mcr rule list`")
        );
    }
    let found = |input: &str| set.by_input(&input.parse().unwrap()).map(|entry| entry.rule.name.to_string());
    assert_eq!(found("239.1.1.1:5000@eth0").as_deref(), Some("cam"));
    for other in ["239.1.1.1:5001@eth0", "239.1.1.1:5000@eth1", "239.1.1.1:5000@eth0,source=192.0.2.7"] {
        assert_eq!(found(other), None, "{other}");
    }
}

#[test]
fn an_amendment_changes_what_it_names_and_leaves_the_other_slots() {
    fn check(amendment: Amendment, change: Change, expected: &str) {
        let standing = rule("cam", "239.1.1.1:5000@eth0", &["239.2.2.2:1@eth1", "239.2.2.2:2@eth1,ttl=8"]);
        let mut set = set_of(&[standing]);
        let asked = format!("{amendment:?}");
        assert_eq!(set.amend("cam", amendment), Ok(change), "{asked}");
        assert_eq!(shown(&set), [format!("cam 0=239.1.1.1:5000@eth0 -> {expected}")], "{asked}");
    }
    let (first, second) = ("0=239.2.2.2:1@eth1", "1=239.2.2.2:2@eth1,ttl=8");
    let both = format!("{first} {second}");

    check(Amendment::default(), Change::None, &both);
    check(add_outputs(&["239.2.2.2:3@eth1"]), Change::Made, &format!("{both} 2=239.2.2.2:3@eth1"));
    check(
        add_outputs(&["239.2.2.2:3@eth1", "239.2.2.2:4@eth2"]),
        Change::Made,
        &format!("{both} 2=239.2.2.2:3@eth1 3=239.2.2.2:4@eth2"),
    );
    check(delete_outputs(&["239.2.2.2:1@eth1"]), Change::Made, second);
    check(delete_outputs(&["239.2.2.2:2@eth1"]), Change::Made, first);
    // Options are no part of what is deleted.
    check(delete_outputs(&["239.2.2.2:2@eth1,ttl=77,loop=true"]), Change::Made, first);
    // An output that is there takes the new options and keeps its slot.
    check(add_outputs(&["239.2.2.2:2@eth1"]), Change::Made, "0=239.2.2.2:1@eth1 1=239.2.2.2:2@eth1");
    check(
        add_outputs(&["239.2.2.2:1@eth1,dscp=46,gso=false"]),
        Change::Made,
        &format!("0=239.2.2.2:1@eth1,dscp=46,gso=false {second}"),
    );
    check(add_outputs(&["239.2.2.2:2@eth1,ttl=8"]), Change::None, &both);
    // Deleted and added: it is the same output in another place.
    check(
        Amendment { delete: vec![output("239.2.2.2:1@eth1")], ..add_outputs(&["239.2.2.2:1@eth1,ttl=2"]) },
        Change::Made,
        &format!("{second} 0=239.2.2.2:1@eth1,ttl=2"),
    );
    // One goes and one comes.
    check(
        Amendment { delete: vec![output("239.2.2.2:1@eth1")], ..add_outputs(&["239.2.2.2:3@eth1"]) },
        Change::Made,
        &format!("{second} 2=239.2.2.2:3@eth1"),
    );
    check(
        Amendment {
            delete: vec![output("239.2.2.2:1@eth1"), output("239.2.2.2:2@eth1")],
            ..add_outputs(&["239.2.2.2:3@eth1"])
        },
        Change::Made,
        "2=239.2.2.2:3@eth1",
    );
    check(
        Amendment { datapath: Some(DatapathChoice(Some(Datapath::AfXdp))), ..Amendment::default() },
        Change::Made,
        &both,
    );
    check(Amendment { datapath: Some(DatapathChoice(None)), ..Amendment::default() }, Change::None, &both);
}

#[test]
fn an_amendment_that_cannot_stand_is_refused_and_changes_nothing() {
    fn check(name: &str, amendment: Amendment, expected: &str) {
        let mut set = set_of(&[
            rule("cam", "239.1.1.1:5000@eth0", &["239.2.2.2:1@eth1", "239.2.2.2:2@eth1"]),
            rule("mic", "239.1.1.2:5000@eth0", &["239.2.2.2:9@eth1"]),
        ]);
        let before = shown(&set);
        assert_eq!(set.amend(name, amendment).unwrap_err().to_string(), expected);
        assert_eq!(shown(&set), before, "{expected}");
    }
    check("tram", add_outputs(&["239.2.2.2:3@eth1"]), "there is no rule 'tram': see `mcr rule list`");
    check(
        "cam",
        delete_outputs(&["239.2.2.2:3@eth1"]),
        "rule 'cam' has no output 239.2.2.2:3@eth1: see `mcr rule show cam`",
    );
    check(
        "cam",
        delete_outputs(&["239.2.2.2:1@eth2"]),
        "rule 'cam' has no output 239.2.2.2:1@eth2: see `mcr rule show cam`",
    );
    check(
        "cam",
        delete_outputs(&["239.2.2.2:1@eth1", "239.2.2.2:1@eth1"]),
        "rule 'cam' has no output 239.2.2.2:1@eth1: see `mcr rule show cam`",
    );
    check(
        "mic",
        delete_outputs(&["239.2.2.2:9@eth1"]),
        "rule 'mic' would be left without an output: remove it with `mcr rule remove mic`",
    );
    check(
        "cam",
        add_outputs(&["239.1.1.1:5000@eth0"]),
        "the output 239.1.1.1:5000@eth0 is the input itself: choose another group, port or interface",
    );
    check(
        "cam",
        add_outputs(&["224.0.0.9:520@eth1"]),
        "224.0.0.9 is link-local (224.0.0.0/24), which routers never forward: say --link-local if it is meant",
    );
    check(
        "cam",
        add_outputs(&["239.2.2.2:9@eth1,ttl=4"]),
        "the output 239.2.2.2:9@eth1,ttl=4 is fed by rule 'mic' already: \
         say --merge if both streams shall mix there",
    );
    let many = many_outputs(255);
    check(
        "cam",
        add_outputs(&many.iter().map(String::as_str).collect::<Vec<_>>()),
        "a rule has 256 outputs at most, this one would have 257: spread them over several rules",
    );
}

#[test]
fn an_amendment_may_say_merge_and_link_local() {
    let mut set = set_of(&[
        rule("cam", "239.1.1.1:5000@eth0", &["239.2.2.2:1@eth1"]),
        rule("mic", "239.1.1.2:5000@eth0", &["239.2.2.2:9@eth1"]),
    ]);
    let amendment = Amendment { merge: true, ..add_outputs(&["239.2.2.2:9@eth1"]) };
    assert_eq!(set.amend("cam", amendment), Ok(Change::Made));
    let amendment = Amendment { link_local: true, ..add_outputs(&["224.0.0.9:520@eth1"]) };
    assert_eq!(set.amend("cam", amendment), Ok(Change::Made));
    // It was said once for the rule.
    assert_eq!(set.amend("cam", add_outputs(&["224.0.0.10:520@eth1"])), Ok(Change::Made));
    assert_eq!(set.get("cam").unwrap().output_slots.len(), 4);
}

#[test]
fn slots_that_were_given_back_are_used_again_lowest_first() {
    let simple =
        |n: u8| rule(&format!("r{n}"), &format!("239.1.1.{n}:5000@eth0"), &[&format!("239.2.2.{n}:1@eth1")]);
    let mut set = set_of(&[simple(0), simple(1), simple(2), simple(3)]);
    let slots = |set: &RuleSet| -> Vec<(u32, Vec<u32>)> {
        set.iter()
            .map(|entry| (entry.slot.0, entry.output_slots.iter().map(|slot| slot.0).collect()))
            .collect()
    };
    assert_eq!(slots(&set), [(0, vec![0]), (1, vec![1]), (2, vec![2]), (3, vec![3])]);
    assert_eq!(set.remove("r2").unwrap().slot, RuleSlot(2));
    set.remove("r0").unwrap();
    assert_eq!(slots(&set), [(1, vec![1]), (3, vec![3])]);
    set.add(simple(9), Origin::Cli).unwrap();
    assert_eq!(set.get("r9").unwrap().slot, RuleSlot(4), "what something may still bear rests");
    set.remove("r9").unwrap();
    set.release_slots();
    set.add(
        rule("s", "239.9.9.9:1@eth0", &["239.8.8.8:1@eth1", "239.8.8.8:2@eth1", "239.8.8.8:3@eth1"]),
        Origin::Cli,
    )
    .unwrap();
    assert_eq!(slots(&set), [(1, vec![1]), (3, vec![3]), (0, vec![0, 2, 4])]);
    set.amend("s", delete_outputs(&["239.8.8.8:2@eth1"])).unwrap();
    set.release_slots();
    set.add(simple(7), Origin::Cli).unwrap();
    assert_eq!(set.get("r7").unwrap().slot, RuleSlot(2));
    assert_eq!(set.get("r7").unwrap().output_slots, [OutputSlot(2)]);
    assert_eq!(set.remove("r0").unwrap_err().to_string(), "there is no rule 'r0': see `mcr rule list`");
    for name in ["r1", "r3", "r7", "s"] {
        set.remove(name).unwrap();
    }
    assert!(set.iter().next().is_none());
    set.release_slots();
    set.add(simple(5), Origin::Cli).unwrap();
    assert_eq!(slots(&set), [(0, vec![0])]);
}

#[test]
fn a_full_set_refuses_and_loses_no_slot_by_it() {
    let full_rules =
        "there is room for 2 rules and not for these too: start the daemon with a larger --max-rules";
    let full_outputs =
        "there is room for 8 outputs and not for these too: start the daemon with a larger --max-rules";
    let mut set = RuleSet::new(2);
    let some = |name: &str, group: u8, outputs: u8| {
        let outputs: Vec<_> = (1..=outputs).map(|n| format!("239.2.{group}.{n}:1@eth1")).collect();
        let outputs: Vec<_> = outputs.iter().map(String::as_str).collect();
        rule(name, &format!("239.1.1.{group}:1@eth0"), &outputs)
    };
    set.add(some("a", 1, 5), Origin::Cli).unwrap();
    assert_eq!(set.add(some("b", 2, 4), Origin::Cli).unwrap_err().to_string(), full_outputs);
    assert_eq!(set.add(some("b", 2, 9), Origin::Cli).unwrap_err().to_string(), full_outputs);
    set.add(some("b", 2, 3), Origin::Cli).unwrap();
    assert_eq!(set.add(some("c", 3, 1), Origin::Cli).unwrap_err().to_string(), full_rules);
    assert_eq!(set.amend("a", add_outputs(&["239.3.3.3:1@eth1"])).unwrap_err().to_string(), full_outputs);
    // What it has may be changed all the same.
    assert_eq!(set.amend("a", add_outputs(&["239.2.1.1:1@eth1,ttl=3"])), Ok(Change::Made));
    assert_eq!(set.amend("a", delete_outputs(&["239.2.1.2:1@eth1"])), Ok(Change::Made));
    assert_eq!(set.amend("a", add_outputs(&["239.3.3.3:1@eth1"])), Ok(Change::Made));
    assert_eq!(set.get("a").unwrap().output_slots, [0, 2, 3, 4, 1].map(OutputSlot));
    set.remove("b").unwrap();
    set.add(some("c", 3, 3), Origin::Cli).unwrap();
    assert_eq!(set.get("c").unwrap().slot, RuleSlot(1));
    assert_eq!(set.get("c").unwrap().output_slots, [5, 6, 7].map(OutputSlot));
}

#[test]
fn one_source_and_any_overlap_in_one_place_only() {
    let set = set_of(&[
        rule("any", "239.1.1.1:5000@eth0", &["239.2.2.2:1@eth1"]),
        rule("one", "239.1.1.1:5000@eth0,source=192.0.2.7", &["239.2.2.2:2@eth1"]),
        rule("two", "239.1.1.1:5000@eth0,source=192.0.2.8", &["239.2.2.2:3@eth1"]),
        rule("port", "239.1.1.1:5001@eth0", &["239.2.2.2:4@eth1"]),
    ]);
    for (input, expected) in [
        ("239.1.1.1:5000@eth0", &["one", "two"][..]),
        ("239.1.1.1:5000@eth0,source=192.0.2.9", &["any"]),
        ("239.1.1.1:5001@eth0", &[]),
        ("239.1.1.1:5001@eth0,source=192.0.2.9", &["port"]),
        ("239.1.1.1:5000@eth1", &[]),
        ("239.1.1.2:5000@eth0,source=192.0.2.9", &[]),
    ] {
        let found: Vec<_> =
            set.overlapping(&input.parse().unwrap()).iter().map(|entry| entry.rule.name.as_str()).collect();
        assert_eq!(found, expected, "{input}");
    }
}

/// The flows of eth0 as text; `eth1` sends from 10.0.1.1, `eth0` from 10.0.0.1, and `eth9` has no address.
fn flows_of_eth0(rules: &[Rule]) -> Vec<String> {
    let source = |output: &Output| match (output.interface.as_str(), output.from) {
        ("eth9", _) => None,
        (_, Some(from)) => Some(from.address),
        ("eth0", None) => Some(Ipv4Addr::new(10, 0, 0, 1)),
        _ => Some(Ipv4Addr::new(10, 0, 1, 1)),
    };
    let set = set_of(rules);
    set.flows(&interface("eth0"), |_| Some(action::STEER), source)
        .into_iter()
        .map(|(key, value)| {
            let name = |slot| set.iter().find(|entry| entry.slot.0 == slot).unwrap().rule.name.clone();
            let action = match value.action {
                action::STEER => "steer",
                action::LOOP => "loop",
                other => panic!("action {other}"),
            };
            let source = Ipv4Addr::from(key.source);
            let source = if source.is_unspecified() { "*".to_owned() } else { source.to_string() };
            let (group, port) = (Ipv4Addr::from(key.group), u16::from_be_bytes(key.port));
            format!("{source},{group}:{port} {action} {}", name(value.rule))
        })
        .collect()
}

#[test]
fn an_interface_has_a_flow_for_each_of_its_inputs() {
    fn check(rules: &[Rule], expected: &[&str]) {
        assert_eq!(flows_of_eth0(rules), expected);
    }
    check(&[], &[]);
    check(&[rule("a", "239.1.1.1:5000@eth1", &["239.2.2.2:1@eth0"])], &[]);
    check(
        &[
            rule("a", "239.1.1.1:5000@eth0", &["239.2.2.2:1@eth1"]),
            rule("b", "239.1.1.1:5000@eth0,source=192.0.2.7", &["239.2.2.2:2@eth1"]),
            rule("c", "239.1.1.1:5001@eth0", &["239.2.2.2:3@eth1"]),
            rule("d", "239.1.1.1:5000@eth1", &["239.2.2.2:4@eth0"]),
        ],
        &["*,239.1.1.1:5000 steer a", "*,239.1.1.1:5001 steer c", "192.0.2.7,239.1.1.1:5000 steer b"],
    );
}

#[test]
fn what_the_relay_sends_to_an_input_is_a_loop() {
    fn check(rules: &[Rule], expected: &[&str]) {
        assert_eq!(flows_of_eth0(rules), expected);
    }
    let forth = || rule("forth", "239.1.1.1:5000@eth0", &["239.1.1.1:5000@eth1"]);
    // Both ways: what `back` sends by eth0 is not taken by `forth`, nor what `forth` sends by eth1.
    check(
        &[forth(), rule("back", "239.1.1.1:5000@eth1", &["239.1.1.1:5000@eth0"])],
        &[
            "*,239.1.1.1:5000 steer forth",
            "10.0.0.1,239.1.1.1:5000 loop forth",
            "10.0.1.1,239.1.1.1:5000 loop forth",
        ],
    );
    // Chained on one interface.
    check(
        &[
            rule("a", "239.1.1.1:5000@eth0", &["239.1.1.2:5000@eth0"]),
            rule("b", "239.1.1.2:5000@eth0", &["239.1.1.3:5000@eth0"]),
        ],
        &["*,239.1.1.1:5000 steer a", "*,239.1.1.2:5000 steer b", "10.0.0.1,239.1.1.2:5000 loop b"],
    );
    // Another group, another port: no loop.
    check(
        &[forth(), rule("back", "239.9.9.9:5000@eth1", &["239.1.1.1:5001@eth0", "239.1.1.2:5000@eth0"])],
        &["*,239.1.1.1:5000 steer forth", "10.0.1.1,239.1.1.1:5000 loop forth"],
    );
    // `from` is the source that counts.
    check(
        &[
            rule("a", "239.1.1.1:5000@eth0", &["239.3.3.3:1@eth1"]),
            rule("b", "239.9.9.9:5000@eth1", &["239.1.1.1:5000@eth0,from=10.7.7.7"]),
        ],
        &["*,239.1.1.1:5000 steer a", "10.7.7.7,239.1.1.1:5000 loop a"],
    );
    // An output that cannot send makes no loop.
    check(
        &[
            rule("a", "239.1.1.1:5000@eth0", &["239.3.3.3:1@eth1"]),
            rule("b", "239.9.9.9:5000@eth1", &["239.1.1.1:5000@eth9"]),
        ],
        &["*,239.1.1.1:5000 steer a"],
    );
}

#[test]
fn a_loop_counts_for_the_rule_that_would_have_taken_it() {
    fn check(rules: &[Rule], expected: &[&str]) {
        assert_eq!(flows_of_eth0(rules), expected);
    }
    let feeder = || rule("feeder", "239.9.9.9:5000@eth1", &["239.1.1.1:5000@eth0"]);
    // A rule for another source takes nothing of ours.
    check(
        &[rule("other", "239.1.1.1:5000@eth0,source=192.0.2.7", &["239.3.3.3:1@eth1"]), feeder()],
        &["192.0.2.7,239.1.1.1:5000 steer other"],
    );
    // A rule for our own address as its source takes nothing else.
    check(
        &[rule("own", "239.1.1.1:5000@eth0,source=10.0.0.1", &["239.3.3.3:1@eth1"]), feeder()],
        &["10.0.0.1,239.1.1.1:5000 loop own"],
    );
    check(
        &[
            rule("any", "239.1.1.1:5000@eth0", &["239.3.3.3:1@eth1"]),
            rule("other", "239.1.1.1:5000@eth0,source=192.0.2.7", &["239.3.3.3:2@eth1"]),
            feeder(),
        ],
        &[
            "*,239.1.1.1:5000 steer any",
            "10.0.0.1,239.1.1.1:5000 loop any",
            "192.0.2.7,239.1.1.1:5000 steer other",
        ],
    );
    // (S,G) before (*,G), whichever came first.
    for reversed in [false, true] {
        let mut rules = [
            rule("any", "239.1.1.1:5000@eth0", &["239.3.3.3:1@eth1"]),
            rule("own", "239.1.1.1:5000@eth0,source=10.0.0.1", &["239.3.3.3:2@eth1"]),
            feeder(),
        ];
        if reversed {
            rules.reverse();
        }
        check(&rules, &["*,239.1.1.1:5000 steer any", "10.0.0.1,239.1.1.1:5000 loop own"]);
    }
}

#[test]
fn the_key_of_an_input_is_in_network_order() {
    let key_of = |input: &str| key(&input.parse().unwrap());
    assert_eq!(key_of("239.1.2.3:5000@eth0"), FlowKey4::any_source([239, 1, 2, 3], [0x13, 0x88]));
    assert_eq!(
        key_of("239.1.2.3:5000@eth0,source=192.0.2.7"),
        FlowKey4::source_group([192, 0, 2, 7], [239, 1, 2, 3], [0x13, 0x88])
    );
}
