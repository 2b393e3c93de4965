//! What is refused: by one line that says what, why and what to do, with the documented exit status,
//! and without a trace.

use mcr::api::wire::{Health, RuleList};
use tests::{
    Process, Relay, Scratch, Site,
    relay::{CALL, binary},
};

const INPUT: &str = "239.1.1.1:5000@in0";
const OUTPUT: &str = "239.2.2.2:6000@out0";

/// Checks that a call is refused with 1 and one line that contains `words`, and changes no rule.
#[track_caller]
fn check(relay: &Relay, call: &[&str], words: &[&str]) {
    let rules = || relay.json::<RuleList>(&["rule", "list"]).rules;
    let before = rules();
    let answer = relay.cli(call);
    let line = answer.refused(1);
    for word in words {
        assert!(line.contains(word), "no '{word}' in the line: {answer}");
    }
    assert_eq!(rules(), before, "{answer}");
}

/// As [`check`], of what is refused before a daemon is asked: there is none here.
#[track_caller]
fn check_alone(call: &[&str], words: &[&str]) {
    let mut command = std::process::Command::new(binary());
    let answer = Process::spawn(command.args(call).env("MCR_CONTROL", "/nonexistent/mcr.sock")).answer(CALL);
    let line = answer.refused(1);
    for word in words {
        assert!(line.contains(word), "no '{word}' in the line: {answer}");
    }
}

#[test]
fn what_is_no_input_is_refused_with_what_was_meant() {
    for (input, words) in [
        ("", &[][..]),
        ("udp://@239.1.1.1:5000", &["239.1.1.1:5000@INTERFACE"]),
        ("udp://239.1.1.1:5000@in0", &["239.1.1.1:5000@in0"]),
        ("rtp://@239.1.1.1:5000/", &["239.1.1.1:5000@INTERFACE"]),
        ("@239.1.1.1:5000", &["239.1.1.1:5000@INTERFACE"]),
        ("239.1.1.1:5000@in0@if12", &["239.1.1.1:5000@in0"]),
        ("in0@if12", &["in0@if12"]),
        ("in0:239.1.1.1:5000", &["239.1.1.1:5000@in0"]),
        ("239.1.1.1 5000 in0", &["239.1.1.1:5000@in0"]),
        ("239.1.1.1:5000", &["interface", "239.1.1.1:5000@INTERFACE"]),
        ("239.1.1.1@in0", &["port", "239.1.1.1:PORT@in0"]),
        ("239.1.1.1:@in0", &["port"]),
        ("239.1.1.1:0@in0", &["port 0"]),
        ("239.1.1.1:70000@in0", &["70000"]),
        ("239.1.1.1:-1@in0", &["-1"]),
        ("239.1.1.1:video@in0", &["video"]),
        ("239.1.1:5000@in0", &["239.1.1"]),
        ("239.1.1.256:5000@in0", &["239.1.1.256"]),
        ("cam1.example:5000@in0", &["cam1.example"]),
        ("10.0.0.1:5000@in0", &["10.0.0.1", "multicast"]),
        ("[ff3e::8000:1]:5000@in0", &["IPv6"]),
        ("ff3e::8000:1@in0", &["ff3e::8000:1"]),
        ("239.1.1.1:5000@", &["interface"]),
        ("239.1.1.1:5000@an-interface-too-long", &["an-interface-too-long"]),
        ("239.1.1.1:5000@in0,ttl=4", &["ttl"]),
        ("239.1.1.1:5000@in0,sauce=10.0.0.1", &["sauce"]),
        ("239.1.1.1:5000@in0,source", &["source"]),
        ("239.1.1.1:5000@in0,source=239.1.1.2", &["239.1.1.2"]),
        ("239.1.1.1:5000@in0,source=::1", &[]),
        ("239.1.1.1:5000@in0,source=10.0.0.1,source=10.0.0.2", &["source"]),
        ("239.1.1.1:5000@in0\nERROR all is lost", &[]),
    ] {
        check_alone(&["rule", "add", "cam1", "--in", input, "--out", OUTPUT], words);
    }
}

#[test]
fn what_is_no_output_is_refused_with_what_was_meant() {
    for (output, words) in [
        ("", &[][..]),
        ("udp://239.2.2.2:6000", &["239.2.2.2:6000@INTERFACE"]),
        ("239.2.2.2:6000", &["interface"]),
        ("239.2.2.2@out0", &["239.2.2.2:PORT@out0"]),
        ("239.2.2.2:0@out0", &["port 0"]),
        ("239.2.2.2:65536@out0", &["65536"]),
        ("0.0.0.0:6000@out0", &["0.0.0.0"]),
        ("255.255.255.255:6000@out0", &["255.255.255.255"]),
        ("[ff3e::8000:1]:6000@out0", &["IPv6"]),
        ("239.2.2.2:6000@out0,ttl=0", &["ttl"]),
        ("239.2.2.2:6000@out0,ttl=256", &["256"]),
        ("239.2.2.2:6000@out0,ttl=", &["ttl"]),
        ("239.2.2.2:6000@out0,dscp=64", &["64"]),
        ("239.2.2.2:6000@out0,dscp=ef", &["ef"]),
        ("239.2.2.2:6000@out0,from=239.1.1.1", &["from"]),
        ("239.2.2.2:6000@out0,from=10.0.0.1:0", &["port 0"]),
        ("239.2.2.2:6000@out0,gso=maybe", &["maybe"]),
        ("239.2.2.2:6000@out0,loop=1", &["loop"]),
        ("239.2.2.2:6000@out0,source=10.0.0.1", &["from"]),
        ("239.2.2.2:6000@out0,tll=4", &["tll"]),
        ("239.2.2.2:6000@out0,ttl=4,ttl=5", &["ttl"]),
    ] {
        check_alone(&["rule", "add", "cam1", "--in", INPUT, "--out", output], words);
        check_alone(&["rule", "add", "cam1", "--in", INPUT, "--out", OUTPUT, "--out", output], words);
        check_alone(&["rule", "set", "cam1", "--add-out", output], words);
    }
}

#[test]
fn what_is_no_name_is_refused() {
    for name in ["", "1cam", "-", "cam/1", "cam 1", "cäm", "../cam", &"c".repeat(64)] {
        check_alone(&["rule", "add", "--in", INPUT, "--out", OUTPUT, "--", name], &["name"]);
        check_alone(&["rule", "remove", "--", name], &["name"]);
    }
}

#[test]
fn rules_that_contradict_one_another_are_refused_with_the_first_ones_name() {
    let site = Site::default();
    let relay = Relay::start(&site);
    relay.add("first", INPUT, &[OUTPUT]);
    let other = "239.2.2.3:6000@out1";
    for (call, words) in [
        (&["rule", "add", "second", "--in", INPUT, "--out", other][..], &["first", "rule set"][..]),
        (&["rule", "add", "second", "--in", INPUT, "--out", OUTPUT], &["first"]),
        (&["rule", "add", "first", "--in", "239.1.1.2:5000@in0", "--out", other], &["first"]),
        (&["rule", "add", "first", "--in", INPUT, "--out", other], &["first"]),
        (&["rule", "add", "first", "--in", INPUT, "--out", OUTPUT, "--out", other], &["first"]),
        (&["rule", "add", "first", "--in", INPUT, "--out", "239.2.2.2:6000@out0,ttl=9"], &["first"]),
        (&["rule", "add", "third", "--in", "239.1.1.3:5000@in0", "--out", OUTPUT], &["first", "--merge"]),
        (
            &["rule", "add", "third", "--in", "239.1.1.3:5000@in0", "--out", "239.2.2.2:6000@out0,ttl=3"],
            &["first"],
        ),
        (
            &["rule", "add", "echo", "--in", "239.1.1.4:5000@in0", "--out", "239.1.1.4:5000@in0"],
            &["239.1.1.4:5000@in0"],
        ),
        (
            &["rule", "add", "twice", "--in", "239.1.1.5:5000@in0", "--out", other, "--out", other],
            &["239.2.2.3:6000@out1"],
        ),
        (&["rule", "set", "first", "--add-out", INPUT], &[INPUT]),
        (&["rule", "set", "first", "--del-out", other], &[other]),
        (&["rule", "set", "first", "--del-out", OUTPUT], &["first"]),
    ] {
        check(&relay, call, words);
    }
}

#[test]
fn what_is_not_there_is_refused_by_name() {
    let site = Site::default();
    let relay = Relay::start(&site);
    for (call, words) in [
        (&["rule", "remove", "nope"][..], &["nope", "rule list"][..]),
        (&["rule", "show", "nope"], &["nope", "rule list"]),
        (&["rule", "set", "nope", "--add-out", OUTPUT], &["nope", "rule list"]),
        (&["stats", "nope"], &["nope", "rule list"]),
    ] {
        check(&relay, call, words);
    }
}

#[test]
fn an_interface_that_is_not_there_is_waited_for_and_the_operator_is_told() {
    let site = Site::default();
    let relay = Relay::start(&site);
    let calls = [
        ["rule", "add", "a", "--in", "239.1.1.1:5000@nope0", "--out", OUTPUT],
        ["rule", "add", "b", "--in", "239.1.1.2:5000@in0", "--out", "239.2.2.2:6001@nope0"],
    ];
    for call in calls {
        let answer = relay.cli(&call);
        answer.ok();
        assert_eq!(answer.stderr.lines().count(), 1, "{answer}");
        assert!(answer.stderr.contains("nope0"), "{answer}");
    }
    let rule = relay.show("a");
    assert_eq!(rule.health, Health::Pending);
    assert!(rule.reason.as_ref().is_some_and(|reason| reason.contains("nope0")), "{rule:?}");
    let output = &relay.show("b").outputs[0];
    assert_eq!(output.health, Health::Pending);
    assert!(output.reason.as_ref().is_some_and(|reason| reason.contains("nope0")), "{output:?}");
    // The others go on, and what waits can be removed.
    relay.add("c", INPUT, &["239.2.2.9:6000@out1"]);
    relay.remove("a");
    relay.remove("b");
}

#[test]
fn link_local_groups_are_refused_unless_they_are_meant() {
    let site = Site::default();
    let relay = Relay::start(&site);
    let input = ["rule", "add", "a", "--in", "224.0.0.99:5000@in0", "--out", OUTPUT];
    let output = ["rule", "add", "b", "--in", INPUT, "--out", "224.0.0.99:6000@out0"];
    check(&relay, &input, &["--link-local", "224.0.0"]);
    check(&relay, &output, &["--link-local", "224.0.0"]);
    relay.cli(&[&input[..], &["--link-local"]].concat()).ok();
    relay.cli(&["rule", "add", "c", "--in", "224.0.1.1:5000@in0", "--out", "239.2.2.9:6000@out0"]).ok();
}

#[test]
fn an_interface_without_native_xdp_is_refused_where_af_xdp_was_asked_for() {
    let site = Site::default();
    site.relay.ip(&[
        "link add name br7 type bridge",
        "addr add 10.79.0.1/24 dev br7",
        "link set br7 up",
        "link add name mv7 link out2 type macvlan mode bridge",
        "addr add 10.79.1.1/24 dev mv7",
        "link set mv7 up",
    ]);
    let relay = Relay::start(&site);
    for interface in ["br7", "mv7"] {
        let input = format!("239.1.1.1:5000@{interface}");
        let call = ["rule", "add", "cam1", "--datapath", "af-xdp", "--in", &input, "--out", OUTPUT];
        check(&relay, &call, &[interface, "native XDP"]);
    }
    relay.add("cam1", INPUT, &[OUTPUT]);
}

#[test]
fn an_interface_without_ethernet_headers_is_refused() {
    let site = Site::default();
    site.relay.ip(&["tuntap add dev tun7 mode tun", "addr add 10.79.0.1/24 dev tun7", "link set tun7 up"]);
    let relay = Relay::start(&site);
    let call = ["rule", "add", "cam1", "--in", "239.1.1.1:5000@tun7", "--out", OUTPUT];
    check(&relay, &call, &["tun7", "Ethernet"]);
}

#[test]
fn wrong_usage_is_2() {
    for call in [
        &[][..],
        &["frobnicate"],
        &["rule"],
        &["rule", "add"],
        &["rule", "add", "cam1", "--in", INPUT],
        &["rule", "add", "cam1", "--out", OUTPUT],
        &["rule", "add", "cam1", "--in", INPUT, "--out", OUTPUT, "--datapath", "warp"],
        &["rule", "set", "cam1"],
        &["rule", "remove"],
        &["stats", "--frob"],
        &["log-level", "set", "loud"],
        &["run", "--workers", "0"],
        &["run", "--workers", "many"],
        &["gen"],
        &["gen", "239.1.1.1:5000@in0"],
        &["recv"],
    ] {
        let answer = Process::spawn(std::process::Command::new(binary()).args(call)).answer(CALL);
        assert_eq!((answer.status, answer.stdout.as_str()), (2, ""), "{answer}");
        assert!(!answer.stderr.is_empty(), "{answer}");
    }
}

#[test]
fn without_a_daemon_every_call_is_3() {
    let scratch = Scratch::make();
    let stale = scratch.dir().join("stale.sock");
    drop(std::os::unix::net::UnixListener::bind(&stale).unwrap());
    for control in [scratch.dir().join("none.sock"), stale] {
        for call in [
            &["ping"][..],
            &["status"],
            &["stats"],
            &["workers"],
            &["stop"],
            &["log-level", "get"],
            &["log-level", "set", "debug"],
            &["rule", "list"],
            &["rule", "show", "cam1"],
            &["rule", "remove", "cam1"],
            &["rule", "add", "cam1", "--in", INPUT, "--out", OUTPUT],
        ] {
            let mut command = std::process::Command::new(binary());
            let answer = Process::spawn(command.args(call).arg("--control").arg(&control)).answer(CALL);
            let line = answer.refused(3);
            assert!(line.contains(control.to_str().unwrap()), "{answer}");
        }
    }
}
