//! `mcr doctor`: each fault is made, found under its code with the words that matter, and mended by the command that it names,
//! where one can mend it; then the finding is gone.
//!
//! What this kernel or a namespace of it cannot have (a device with LRO, a VLAN interface, a host without JIT ...) is
//! a row of the tables in `mcr/src/doctor/findings/tests.rs`; `docs/doctor.md` says which.

#![expect(clippy::unwrap_used, reason = "where it fails, the test fails and says where")]

use std::{
    fs,
    net::{Ipv4Addr, SocketAddrV4},
    os::unix::{net::UnixListener, process::CommandExt},
    process::Command,
    thread,
};

use mcr::{
    api::wire::Health,
    doctor::findings::{
        Check, Code, Finding,
        Severity::{self, Note, Problem},
    },
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde::Deserialize;
use tests::{
    Answer, Generator, Ground, Namespace, Process, RawSender, Relay, Site, Source, Udp,
    bpf::ForeignXdp,
    deprive::{self, CAP_IPC_LOCK, CAP_NET_RAW, with_limit, without_capabilities},
    frame::{IP, fix_ip_checksum},
    relay::{CALL, binary},
    site::{ETH, Membership, Plan},
    source::Stream,
    wait::PATIENCE,
    wait_for, wait_until,
};

const GROUP: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(239, 1, 1, 1), 5000);
const INPUT: &str = "239.1.1.1:5000@in0";
const OUTPUT: &str = "239.2.2.2:6000@out0";

/// Long enough for some hundred datagrams.
const LOOK: &str = "--seconds=0.4";

#[derive(Debug, Deserialize)]
struct Report {
    schema: u32,
    findings: Vec<Finding>,
    checked: Vec<Check>,
}

/// What the doctor said, and how it ended.
#[derive(Debug)]
struct Diagnosis {
    status: i32,
    report: Report,
}

impl Diagnosis {
    #[track_caller]
    fn read(answer: &Answer) -> Self {
        let report: Report =
            serde_json::from_str(&answer.stdout).unwrap_or_else(|error| panic!("{error}: {answer}"));
        assert_eq!((report.schema, answer.stderr.as_str()), (1, ""), "{answer}");
        let problems = report.findings.iter().any(|finding| finding.severity == Problem);
        assert_eq!(answer.status != 0, problems, "problems and notes have their own exit status: {answer}");
        Self { status: answer.status, report }
    }

    fn find(&self, code: Code) -> Option<&Finding> {
        self.report.findings.iter().find(|finding| finding.code == code)
    }

    /// The finding of this code, which says these words; what is to be done about it.
    #[track_caller]
    fn says(&self, code: Code, severity: Severity, subject: &str, words: &[&str]) -> String {
        let finding = self.find(code).unwrap_or_else(|| panic!("no {}: {self:#?}", code.name()));
        assert_eq!((finding.severity, finding.subject.as_str()), (severity, subject), "{self:#?}");
        for word in words {
            assert!(finding.what.contains(word), "{word}: {finding:#?}");
        }
        finding.next.clone()
    }

    #[track_caller]
    fn is_without(&self, code: Code) {
        assert!(self.find(code).is_none(), "{self:#?}");
    }

    #[track_caller]
    fn found_well(&self, subject: &str, words: &str) {
        let mut its = self.report.checked.iter().filter(|check| check.subject == subject);
        assert!(its.any(|check| check.what.contains(words)), "{subject}: {words}: {self:#?}");
    }
}

#[track_caller]
fn ask(relay: &Relay<'_>, args: &[&str]) -> Diagnosis {
    Diagnosis::read(&relay.cli(&[&["doctor", "--json", LOOK], args].concat()))
}

/// Asks until a finding is gone.
#[track_caller]
fn ask_until_without(relay: &Relay<'_>, code: Code) -> Diagnosis {
    wait_for(&format!("{} is mended", code.name()), PATIENCE, || {
        Some(ask(relay, &[])).filter(|diagnosis| diagnosis.find(code).is_none())
    })
}

/// Does what a finding says is to be done, as root, in a namespace; `filled` is what only the operator knows.
#[track_caller]
fn mend(relay: &Relay<'_>, namespace: &Namespace, next: &str, filled: &[(&str, &str)]) {
    let mut commands = next.replace("sudo ", "");
    for (place, value) in filled {
        assert!(commands.contains(place), "{place}: {next}");
        commands = commands.replace(place, value);
    }
    let path = format!("{}:{}", binary().parent().unwrap().display(), std::env::var("PATH").unwrap());
    let mut shell = namespace.command("sh");
    shell.args(["-e", "-c", &commands]).env("PATH", path).env("MCR_CONTROL", relay.control());
    Process::spawn(&mut shell).answer(CALL).ok();
}

/// What follows the last colon of advice that is more than a command.
fn command(next: &str) -> &str {
    next.rsplit_once(": ").unwrap().1
}

/// As it is typed for a relay on the usual socket.
fn usual(relay: &Relay<'_>, next: &str) -> String {
    next.replace(&format!(" --control {}", relay.control().display()), "")
}

fn playing(site: &Site, to: SocketAddrV4) -> Source {
    Source::start(site.source(), Stream { rate: 2_000, size: 200, ..Stream::to(to) })
}

/// A relay with one rule that is at work.
#[track_caller]
fn relaying<'a>(site: &'a Site, input: &str, outputs: &[&str]) -> Relay<'a> {
    let relay = Relay::start(site);
    relay.add("cam1", input, outputs);
    relay
}

#[test]
fn a_healthy_relay_has_nothing_wrong() {
    let site = Site::build(Plan { ground: Ground::Kernel, sinks: 1, ..Plan::default() });
    let relay = relaying(&site, INPUT, &[OUTPUT]);
    let _source = playing(&site, GROUP);
    for subject in [&[][..], &["cam1"], &["in0"], &["out0"]] {
        let diagnosis = ask(&relay, subject);
        assert_eq!((diagnosis.status, &diagnosis.report.findings[..]), (0, &[][..]));
        diagnosis.found_well("rule cam1", "datagrams came in 0.4 s, by redirect to 1 output");
        diagnosis.found_well("daemon", "1 of 1 rules active");
    }
    let diagnosis = ask(&relay, &["in0"]);
    diagnosis.found_well(
        "interface in0",
        "native XDP; its reverse-path filter is strict, which mcr does not mind",
    );
    diagnosis.found_well("host", "io_uring, eBPF and memberships are allowed");
    let text = relay.cli(&["doctor", LOOK]).ok().to_owned();
    assert!(text.ends_with("\nnothing is wrong, 0 notes\n"), "{text}");
    assert!(text.contains("rule cam1\n  ok       "), "{text}");
    assert!(text.lines().count() < 20, "{text}");
}

#[test]
fn without_a_daemon_the_interface_and_the_host_are_looked_at() {
    let site = Site::default();
    let call = |args: &[&str]| {
        let mut command = site.relay.command(binary());
        command.args(["doctor", LOOK, "--control"]).arg(site.scratch.dir().join("mcr.sock")).args(args);
        Process::spawn(&mut command).answer(CALL)
    };
    let ask = |args: &[&str]| Diagnosis::read(&call(&[args, &["--json"]].concat()));
    let diagnosis = ask(&[]);
    assert_eq!(diagnosis.status, 3);
    // Root needs no sudo, and the daemon is to be where it was asked for.
    let run = format!("mcr run --control {}", site.scratch.dir().join("mcr.sock").display());
    assert_eq!(diagnosis.says(Code::NoDaemon, Problem, "daemon", &["there is no socket"]), run);
    assert!(diagnosis.find(Code::NoDaemon).unwrap().run, "{diagnosis:#?}");
    diagnosis.found_well("interface in0", "native XDP");
    site.relay.ip(&["link set in0 down"]);
    let diagnosis = ask(&["in0"]);
    assert_eq!(diagnosis.status, 3);
    diagnosis.says(Code::InterfaceDown, Problem, "interface in0", &["switched off"]);
    let text = call(&["in0"]);
    assert_eq!((text.status, text.stderr.as_str()), (3, ""), "{text}");
    assert!(text.stdout.starts_with("daemon\n  problem  no daemon on "), "{text}");
    assert!(text.stdout.contains("\n           run:  ip link set in0 up\n"), "{text}");
    // It may be a rule's name.
    assert_eq!(ask(&["cam1"]).status, 3);

    let relay = Relay::start(&site);
    let line = relay.cli(&["doctor", "cam9"]).refused(1).to_owned();
    assert_eq!(
        line,
        "mcr: 'cam9' is neither a rule nor an interface here: see mcr rule list and ip -br link show"
    );
    relay.cli(&["doctor", "a", "b"]).refused_usage();
    for seconds in ["0", "-1", "x", "3601", "1e300", "nan"] {
        relay.cli(&["doctor", &format!("--seconds={seconds}")]).refused_usage();
    }
}

trait Usage {
    fn refused_usage(&self);
}

impl Usage for Answer {
    #[track_caller]
    fn refused_usage(&self) {
        assert_eq!((self.status, self.stdout.as_str()), (2, ""), "{self}");
    }
}

#[test]
fn a_daemon_that_is_not_for_us_does_not_answer_or_is_elsewhere() {
    let site = Site::default();
    let mut command = site.relay.command(binary());
    let silent = site.scratch.dir().join("silent.sock");
    let listener = UnixListener::bind(&silent).unwrap();
    let closing = thread::spawn(move || drop(listener.accept().unwrap()));
    command.args(["doctor", LOOK, "--json", "--control"]).arg(&silent);
    let diagnosis = Diagnosis::read(&Process::spawn(&mut command).answer(CALL));
    closing.join().unwrap();
    let next = diagnosis.says(Code::DaemonSilent, Problem, "daemon", &["closed the connection"]);
    assert!(next.starts_with("see its log"), "{next}");
    assert!(!diagnosis.find(Code::DaemonSilent).unwrap().run, "{diagnosis:#?}");

    let relay = relaying(&site, INPUT, &[OUTPUT]);
    let mut command = site.sinks[0].host.command(binary());
    command.args(["doctor", LOOK, "--json"]).env("MCR_CONTROL", relay.control());
    let diagnosis = Diagnosis::read(&Process::spawn(&mut command).answer(CALL));
    let next = diagnosis.says(Code::OtherNamespace, Problem, "daemon", &["another network namespace"]);
    // From there it looks where the daemon is, and finds what is the case there.
    let mut shell = site.sinks[0].host.command("sh");
    let here = format!("{} {LOOK} --json", next.replace(" mcr ", &format!(" {} ", binary().display())));
    shell.args(["-c", &here]).env_remove("MCR_CONTROL");
    let diagnosis = Diagnosis::read(&Process::spawn(&mut shell).answer(CALL));
    diagnosis.is_without(Code::OtherNamespace);
    diagnosis.says(Code::NothingArrives, Problem, "rule cam1", &[]);

    let program = site.scratch.dir().join("mcr");
    fs::copy(binary(), &program).unwrap();
    fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    fs::set_permissions(site.scratch.dir(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let mut command = site.relay.command(&program);
    command.args(["doctor", "in0", LOOK, "--json", "--control"]).arg(relay.control());
    deprive::as_ordinary_user(&mut command, &[]);
    let diagnosis = Diagnosis::read(&Process::spawn(&mut command).answer(CALL));
    assert_eq!(diagnosis.status, 1);
    assert_eq!(
        diagnosis.says(Code::PermissionDenied, Problem, "daemon", &["permission denied"]),
        format!("sudo mcr doctor in0 --control {}", relay.control().display())
    );
    // What he may not do is said too.
    diagnosis.says(Code::LookRefused, Note, "host", &["in0", "not permitted"]);
}

#[test]
fn interfaces_that_cannot_carry_anything() {
    let site = Site::default();
    let relay = relaying(&site, INPUT, &[OUTPUT]);
    let _source = playing(&site, GROUP);
    let (host, bridge) = (&site.relay, &site.segments[0].bridge);
    let check = |code, interface: &str, words: &[&str]| {
        let diagnosis = ask(&relay, &[]);
        let next = diagnosis.says(code, Problem, interface, words);
        // What an interface says is not said again for its rules.
        for again in [Code::RulePending, Code::OutputPending, Code::NothingArrives] {
            diagnosis.is_without(again);
        }
        next
    };
    host.ip(&["link set in0 down"]);
    wait_until("the rule waits", PATIENCE, || relay.show("cam1").health == Health::Pending);
    let next = check(Code::InterfaceDown, "interface in0", &["switched off"]);
    mend(&relay, host, &next, &[]);
    ask_until_without(&relay, Code::InterfaceDown);

    bridge.ip(&["link set relay down"]);
    wait_until("the rule waits", PATIENCE, || relay.show("cam1").health == Health::Pending);
    let next = check(Code::NoCarrier, "interface in0", &["no carrier"]);
    mend(&relay, bridge, command(&next), &[("INTERFACE", "relay")]);
    ask_until_without(&relay, Code::NoCarrier);

    host.ip(&["addr flush dev out0"]);
    wait_until("the output waits", PATIENCE, || relay.show("cam1").health == Health::Pending);
    let next = check(Code::NoAddress, "interface out0", &["no IPv4 address"]);
    mend(&relay, host, &next, &[("ADDRESS", "10.78.0.1")]);
    ask_until_without(&relay, Code::NoAddress);

    site.sinks[0].unplug(host);
    wait_until("the output waits", PATIENCE, || relay.show("cam1").health == Health::Pending);
    check(Code::InterfaceMissing, "interface out0", &["no such interface", "in0, out1, out2"]);
    site.sinks[0].plug(host);
    host.ip(&["link set out0 up"]);
    ask_until_without(&relay, Code::InterfaceMissing);

    host.ip(&["tuntap add dev tun0 mode tun", "link set tun0 up"]);
    let diagnosis = ask(&relay, &["tun0"]);
    diagnosis.says(Code::NotEthernet, Problem, "interface tun0", &["no Ethernet header"]);
}

#[test]
fn a_group_that_does_not_arrive_is_tried_from_its_source() {
    let site = Site::default();
    let relay = relaying(&site, INPUT, &[OUTPUT]);
    let bridge = &site.segments[0].bridge;
    bridge.ip(&["link set br0 type bridge mcast_querier 0"]);
    let diagnosis = ask(&relay, &["cam1"]);
    let next = diagnosis.says(
        Code::NothingArrives,
        Problem,
        "rule cam1",
        &["239.1.1.1:5000", "in0", "none ever came"],
    );
    let longer = diagnosis.says(
        Code::QuerierUnseen,
        Note,
        "interface in0",
        &["nobody asked for memberships in 0.4 s"],
    );
    assert_eq!(usual(&relay, &longer), "mcr doctor in0 --seconds 130");
    // A querier that asks is heard, and the way is tried as it says.
    bridge.ip(&[
        "link set br0 type bridge mcast_query_interval 100 mcast_startup_query_interval 100",
        "link set br0 type bridge mcast_querier 1",
    ]);
    let heard = ask_until_without(&relay, Code::QuerierUnseen);
    heard.found_well("interface in0", "a switch asks for memberships");
    let endpoint = command(&next).strip_prefix("mcr gen ").unwrap().replace("INTERFACE", ETH);
    let (endpoint, args) = endpoint.split_once(' ').unwrap();
    let _generator = Generator::start(site.source(), endpoint, &args.split(' ').collect::<Vec<_>>());
    ask_until_without(&relay, Code::NothingArrives).found_well("rule cam1", "datagrams came");
}

#[test]
fn what_arrives_in_the_place_of_what_is_wanted() {
    let site = Site::build(Plan { segments: 2, sinks: 1, ..Plan::default() });
    let relay = Relay::start(&site);
    let check = |name: &str, code, words: &[&str]| {
        let subject = format!("rule {name}");
        let diagnosis = ask(&relay, &[name]);
        let next = diagnosis.says(code, Problem, &subject, words);
        diagnosis.is_without(Code::NothingArrives);
        mend(&relay, &site.relay, &next, &[]);
        relay.wait_until_active(name);
        wait_until("it is relayed", PATIENCE, || {
            let diagnosis = ask(&relay, &[name]);
            let well = diagnosis.report.checked.iter().any(|check| check.subject == subject);
            well && diagnosis.find(code).is_none()
        });
    };
    // To another port; the outputs, their options and the datapath stay.
    relay.add_with(
        "cam1",
        INPUT,
        &["239.2.2.2:6000@out0,ttl=3", "239.2.2.3:6000@out0"],
        &["--datapath", "af-packet"],
    );
    site.segments[0].wait_until_joined(*GROUP.ip());
    let source = playing(&site, SocketAddrV4::new(*GROUP.ip(), 5001));
    check("cam1", Code::OtherPort, &["239.1.1.1", "to port 5001, not 5000"]);
    let rule = relay.show("cam1");
    assert_eq!((rule.input.as_str(), rule.datapath_asked.as_str()), ("239.1.1.1:5001@in0", "af-packet"));
    assert_eq!(rule.outputs[0].to, "239.2.2.2:6000@out0,ttl=3");
    assert_eq!(rule.outputs.len(), 2);
    source.stop();
    relay.remove("cam1");
    // From another source.
    let _joined = Membership::join(&site.relay, "in0", *GROUP.ip());
    site.segments[0].wait_until_joined(*GROUP.ip());
    relay.add("cam2", "239.1.1.1:5000@in0,source=10.77.0.9", &["239.2.2.4:6000@out0"]);
    let source = playing(&site, GROUP);
    check("cam2", Code::OtherSource, &["from 10.77.0.2", "wants 10.77.0.9 alone"]);
    assert_eq!(relay.show("cam2").input, "239.1.1.1:5000@in0,source=10.77.0.2");
    source.stop();
    // On another interface.
    let group = SocketAddrV4::new([239, 1, 1, 3].into(), 5000);
    let _joined = Membership::join(&site.relay, "in1", *group.ip());
    site.segments[1].wait_until_joined(*group.ip());
    relay.add("cam3", "239.1.1.3:5000@in0", &["239.2.2.5:6000@out0"]);
    let _source =
        Source::start(&site.segments[1].source, Stream { rate: 2_000, size: 200, ..Stream::to(group) });
    check("cam3", Code::OtherInterface, &["239.1.1.3", "on in1, not on in0"]);
    assert_eq!(relay.show("cam3").input, "239.1.1.3:5000@in1");
}

/// Sends frames for as long as a diagnosis takes.
#[track_caller]
fn ask_under(relay: &Relay<'_>, sender: &RawSender, frames: &[Vec<u8>]) -> Diagnosis {
    let mut call = relay.call(&["doctor", "--json", "--seconds=0.6"]);
    let mut process = Process::spawn(&mut call);
    wait_until("the doctor is done", CALL, || {
        for frame in frames {
            sender.send(frame);
        }
        process.ended().is_some()
    });
    Diagnosis::read(&process.answer(CALL))
}

#[test]
fn frames_that_cannot_be_relayed_as_they_are() {
    let site = Site::build(Plan { sinks: 1, ..Plan::default() });
    let relay = relaying(&site, INPUT, &[OUTPUT]);
    site.segments[0].wait_until_joined(*GROUP.ip());
    // On the relay's cable itself: a snooping bridge lets not all of them through.
    let sender = RawSender::new(&site.segments[0].bridge, "relay");
    let plain = Udp::new("10.77.0.2:40000".parse().unwrap(), GROUP).payload(&[7; 100]).frame();
    let mut tagged = plain.clone();
    tagged.splice(12..12, [0x81, 0x00, 0x00, 0x2a]);
    let mut options = plain.clone();
    options.splice(IP + 20..IP + 20, [1, 1, 1, 0]);
    options[IP] = 0x46;
    options[IP + 3] += 4;
    let mut wrong = plain.clone();
    wrong[IP + 10] ^= 1;
    let mut fragment = plain.clone();
    fragment[IP + 6] = 0x20;
    fix_ip_checksum(&mut fragment);
    let mut cut = plain.clone();
    cut.truncate(90);
    for (frame, code, words) in [
        (tagged, Code::VlanTagged, "tagged for VLAN 42"),
        (options, Code::IpOptions, "IP options"),
        (wrong, Code::BadChecksum, "wrong IPv4 header checksum"),
        (fragment, Code::Fragments, "are fragments"),
        (cut, Code::Damaged, "end early"),
    ] {
        let diagnosis = ask_under(&relay, &sender, &[frame]);
        diagnosis.says(code, Problem, "rule cam1", &["239.1.1.1", words]);
        diagnosis.is_without(Code::NothingArrives);
    }
    // What is of no rule is a note of its interface, by its counter.
    let mut other = Udp::new("10.77.0.2:40000".parse().unwrap(), "239.9.9.9:9".parse().unwrap()).frame();
    other[IP + 6] = 0x20;
    fix_ip_checksum(&mut other);
    let diagnosis = ask_under(&relay, &sender, &[other, plain]);
    diagnosis.says(Code::Fragments, Note, "interface in0", &["fragment"]);
    assert_eq!(diagnosis.status, 0);
    // And what a source sends that heeds the advice is relayed.
    let large = Source::start(site.source(), Stream { rate: 500, size: 3_000, ..Stream::to(GROUP) });
    let next = ask(&relay, &[]).says(Code::Fragments, Problem, "rule cam1", &["more than its MTU takes"]);
    assert!(next.contains("send at most 1472 bytes"), "{next}");
    large.stop();
    let _small = Source::start(site.source(), Stream { rate: 500, size: 1_472, ..Stream::to(GROUP) });
    ask_until_without(&relay, Code::Fragments).found_well("rule cam1", "datagrams came");
}

#[test]
fn outputs_that_drop_what_comes() {
    let site = Site::build(Plan { sinks: 1, ..Plan::default() });
    let output = "239.2.2.2:6000@out0,ttl=dec";
    let relay = relaying(&site, INPUT, &[output]);
    site.segments[0].wait_until_joined(*GROUP.ip());
    let source = Source::start(site.source(), Stream { rate: 2_000, ttl: 1, ..Stream::to(GROUP) });
    let next =
        ask(&relay, &[]).says(Code::TtlExpired, Problem, "rule cam1", &["ttl_expired", output, "TTL 1"]);
    mend(&relay, &site.relay, &next, &[]);
    ask_until_without(&relay, Code::TtlExpired);

    site.relay.ip(&["link set out0 mtu 1000"]);
    let next = wait_for("it is too big", PATIENCE, || {
        let diagnosis = ask(&relay, &[]);
        diagnosis.find(Code::TooBig)?;
        Some(diagnosis.says(Code::TooBig, Problem, "rule cam1", &["too_big", "MTU of out0 (1000)"]))
    });
    assert_eq!(next, "ip link set out0 mtu 1500");
    mend(&relay, &site.relay, &next, &[]);
    // What was lost stays known.
    let past = |code| {
        wait_until("nothing more is lost", PATIENCE, || {
            ask(&relay, &[]).find(code).is_some_and(|finding| finding.severity == Note)
        });
        ask(&relay, &[]).says(code, Note, "rule cam1", &["none now"]);
    };
    past(Code::TooBig);
    let next = ask(&relay, &[]).says(Code::TooBig, Note, "rule cam1", &["it is 1500 now"]);
    assert_eq!(next, "nothing is to be done");

    let nft = |line: &str| drop(site.relay.output("nft", &[line]));
    nft("add table ip forbid");
    nft("add chain ip forbid sent { type filter hook output priority 0; }");
    nft("add rule ip forbid sent ip daddr 239.2.2.2 drop");
    let diagnosis = ask(&relay, &[]);
    let next = diagnosis.says(
        Code::Filtered,
        Problem,
        "rule cam1",
        &["forbidden by this host", "output chain 'sent'"],
    );
    assert_eq!(next, "nft insert rule ip forbid sent ip daddr 239.2.2.2 udp dport 6000 accept");
    mend(&relay, &site.relay, &next, &[]);
    past(Code::Filtered);

    let tbf = "qdisc add dev out0 root tbf rate 1mbit burst 10000 limit 20000";
    site.relay.output("tc", &tbf.split(' ').collect::<Vec<_>>());
    let diagnosis = ask(&relay, &[]);
    let next = diagnosis.says(Code::EgressFull, Problem, "rule cam1", &["queue_full", "out0"]);
    diagnosis.says(Code::DeviceTxLost, Problem, "interface out0", &["tbf drops"]);
    mend(&relay, &site.relay, &next, &[]);
    past(Code::EgressFull);

    // A hook that drops looks to who sends as a queue that is full.
    nft("add table netdev guard");
    nft("add chain netdev guard out { type filter hook egress device out0 priority 0; }");
    nft("add rule netdev guard out udp dport 6000 drop");
    let diagnosis = ask(&relay, &[]);
    let next = diagnosis.says(Code::EgressFull, Problem, "rule cam1", &["queue_full", "netdev guard out"]);
    assert_eq!(next, "nft insert rule netdev guard out ip daddr 239.2.2.2 udp dport 6000 accept");
    mend(&relay, &site.relay, &next, &[]);
    past(Code::EgressFull);
    drop(source);
}

#[test]
fn hosts_that_cannot_be_reached() {
    let site = Site::build(Plan { sinks: 1, ..Plan::default() });
    let relay = Relay::start(&site);
    let add = |name: &str, group: &str, output: &str| {
        relay.cli(&["rule", "add", name, "--in", &format!("{group}:5000@in0"), "--out", output]).ok();
        wait_until("the output waits", PATIENCE, || relay.show(name).health == Health::Pending);
    };
    add("silent", "239.1.1.1", "10.78.0.9:6000@out0");
    let next = ask(&relay, &[]).says(
        Code::HostSilent,
        Problem,
        "rule silent",
        &["the host does not answer", "10.78.0.9"],
    );
    mend(&relay, &site.relay, command(&next), &[("MAC", "02:00:00:00:00:09")]);
    ask_until_without(&relay, Code::HostSilent);

    add("foreign", "239.1.1.2", "239.2.2.2:6000@out0,from=10.9.9.9");
    let next = ask(&relay, &[]).says(
        Code::OutputPending,
        Problem,
        "rule foreign",
        &["10.9.9.9 is no address of this host"],
    );
    mend(&relay, &site.relay, &next, &[]);
    ask_until_without(&relay, Code::OutputPending);

    // A host that refuses the port. The kernel tells its answer to any socket of the source port on the interface: to that
    // of groups as well, if there is one.
    relay.remove("foreign");
    relay.add("refused", "239.1.1.3:5000@in0", &["10.78.0.2:6000@out0"]);
    site.segments[0].wait_until_joined([239, 1, 1, 3].into());
    let _source = playing(&site, SocketAddrV4::new([239, 1, 1, 3].into(), 5000));
    // Linux answers so once a second at most.
    let ask = || Diagnosis::read(&relay.cli(&["doctor", "refused", "--json", "--seconds=2.5"]));
    let refuses = |diagnosis: &Diagnosis| diagnosis.find(Code::HostRefuses).is_some();
    let diagnosis = wait_for("a refusal is seen", PATIENCE, || Some(ask()).filter(refuses));
    let next = diagnosis.says(Code::HostRefuses, Problem, "rule refused", &["10.78.0.2", "port 6000"]);
    assert_eq!(next, "on 10.78.0.2: start what is to receive, or open its firewall for UDP port 6000");
    let _receiver = tests::Receiver::start(&site.sinks[0].host, "10.78.0.2:6000@eth0", &[]);
    ask().is_without(Code::HostRefuses);
}

#[test]
fn what_keeps_native_xdp_from_an_interface() {
    let site = Site::build(Plan { sinks: 1, queues: 2, ..Plan::default() });
    let host = &site.relay;
    let foreign = ForeignXdp::attach(host, "in0");
    let relay = Relay::start(&site);
    relay.cli(&["rule", "add", "cam1", "--in", INPUT, "--out", OUTPUT]).ok();
    relay.wait_until_by("cam1", "af-packet");
    let next = ask(&relay, &[]).says(
        Code::XdpSlotTaken,
        Note,
        "interface in0",
        &["somebody else", &foreign.id.to_string()],
    );
    assert_eq!(next, "bpftool net show dev in0");
    drop(foreign);
    ask_until_without(&relay, Code::XdpSlotTaken);
    relay.wait_until_by("cam1", "af-xdp");

    let set = |mtu: u32| host.ip(&[&format!("link set in0 mtu {mtu}")]);
    set(9_000);
    relay.wait_until_by("cam1", "af-packet");
    let next = ask(&relay, &[]).says(Code::MtuTooLarge, Note, "interface in0", &["MTU of 9000", "af-packet"]);
    mend(&relay, host, &next, &[]);
    ask_until_without(&relay, Code::MtuTooLarge);
    // Asked for by name it is a problem.
    relay.wait_until_by("cam1", "af-xdp");
    relay.set("cam1", &["--datapath", "af-xdp"]);
    set(9_000);
    wait_until("the rule fails", PATIENCE, || relay.show("cam1").health == Health::Failed);
    let diagnosis = ask(&relay, &[]);
    diagnosis.says(Code::RuleFailed, Problem, "rule cam1", &["MTU"]);
    let next = diagnosis.says(Code::MtuTooLarge, Problem, "interface in0", &["MTU of 9000", "by name"]);
    mend(&relay, host, &next, &[]);
    ask_until_without(&relay, Code::RuleFailed).is_without(Code::MtuTooLarge);
}

#[test]
fn too_few_queues_for_native_xdp() {
    let site = Site::build(Plan { sinks: 1, queues: 2, ..Plan::default() });
    site.relay.output("ethtool", &["-L", "in0", "rx", "1"]);
    let relay = Relay::start(&site);
    relay.cli(&["rule", "add", "cam1", "--in", INPUT, "--out", OUTPUT]).ok();
    relay.wait_until_by("cam1", "af-packet");
    let next = ask(&relay, &[]).says(Code::TooFewQueues, Note, "interface in0", &["RX queues (1)"]);
    assert_eq!(next, "ethtool -L in0 rx 2");
    mend(&relay, &site.relay, &next, &[]);
    ask_until_without(&relay, Code::TooFewQueues);
}

#[test]
fn drivers_without_xdp_and_generic_xdp() {
    let site = Site::build(Plan { sinks: 1, ground: Ground::Bridge, ..Plan::default() });
    let mut relay = relaying(&site, INPUT, &[OUTPUT]);
    let next = ask(&relay, &[]).says(Code::DriverWithoutXdp, Note, "interface in0", &["bridge", "af-packet"]);
    assert!(next.ends_with(": ip -d link show in0"), "{next}");
    relay.signal(Signal::SIGTERM);
    relay.wait(PATIENCE);
    relay.start_again_with(&site, &["--generic-xdp"]);
    relay.wait_until_by("cam1", "af-xdp");
    let diagnosis = ask(&relay, &[]);
    diagnosis.is_without(Code::DriverWithoutXdp);
    let next = diagnosis.says(Code::GenericXdp, Note, "interface in0", &["generic XDP"]);
    mend(&relay, &site.relay, &next, &[]);
    ask_until_without(&relay, Code::GenericXdp);
}

#[test]
fn what_keeps_the_kernel_from_sending_on_by_itself() {
    let site = Site::build(Plan { sinks: 1, ..Plan::default() });
    let relay = relaying(&site, INPUT, &[OUTPUT]);
    let next = ask(&relay, &[]).says(Code::NotRedirected, Note, "rule cam1", &["out0", "its other end"]);
    mend(&relay, &site.sinks[0].host, command(&next), &[("INTERFACE", ETH)]);
    ask_until_without(&relay, Code::NotRedirected);
    relay.wait_until_by("cam1", "redirect");
    let nft = |line: &str| drop(site.relay.output("nft", &[line]));
    nft("add table inet mangles");
    nft("add chain inet mangles sent { type filter hook postrouting priority 0; }");
    nft("add rule inet mangles sent counter");
    relay.wait_until_by("cam1", "af-xdp");
    let next = ask(&relay, &[]).says(
        Code::EgressHook,
        Note,
        "rule cam1",
        &["inet mangles", "postrouting chain 'sent'"],
    );
    assert!(next.starts_with("nothing, if that is meant"), "{next}");
    nft("delete table inet mangles");
    ask_until_without(&relay, Code::EgressHook);
}

#[test]
fn many_streams_on_one_queue_and_many_workers_on_one_cpu() {
    let site = Site::build(Plan { sinks: 1, queues: 2, ..Plan::default() });
    site.segments[0].bridge.output("ethtool", &["-L", "relay", "tx", "1"]);
    let relay = Relay::start_with(&site, &["--workers", "2", "--cpus", "0"]);
    relay.add("cam1", INPUT, &[OUTPUT]);
    relay.add("cam2", "239.1.1.2:5000@in0", &["239.2.2.3:6000@out0"]);
    site.segments[0].wait_until_joined([239, 1, 1, 2].into());
    let _sources = [playing(&site, GROUP), playing(&site, SocketAddrV4::new([239, 1, 1, 2].into(), 5000))];
    let diagnosis = ask(&relay, &[]);
    let next = diagnosis.says(Code::OneQueue, Note, "interface in0", &["2 streams", "on queue 0 of 2"]);
    let cpus = thread::available_parallelism().unwrap().get();
    if cpus > 1 {
        let next = diagnosis.says(Code::WorkersShareCpu, Note, "daemon", &["in0/xdp0, in0/xdp1", "CPU 0"]);
        assert_eq!(usual(&relay, &next), format!("start it with mcr run --cpus 0-{}", cpus - 1));
    } else {
        println!("one CPU: workers have no other to share");
    }
    mend(&relay, &site.segments[0].bridge, command(&next), &[("INTERFACE", "relay")]);
    // One of two streams goes by each queue sooner or later: the kernel's hash knows nothing of fairness.
    let other =
        Source::start(site.source(), Stream { rate: 2_000, size: 200, port: 7_777, ..Stream::to(GROUP) });
    wait_until("frames come by both queues", PATIENCE, || {
        let sources: Vec<_> = (1..12)
            .map(|port| {
                Source::start(site.source(), Stream { rate: 500, port: 9_000 + port, ..Stream::to(GROUP) })
            })
            .collect();
        let found = ask(&relay, &[]).find(Code::OneQueue).is_some();
        drop(sources);
        !found
    });
    drop(other);
}

#[test]
fn what_is_lost_in_rings_and_for_want_of_workers() {
    let site = Site::build(Plan { sinks: 1, ..Plan::default() });
    let relay = Relay::start_with(&site, &["--frames", "4096", "--rx-ring", "1024"]);
    relay.add("cam1", INPUT, &[OUTPUT]);
    site.segments[0].wait_until_joined(*GROUP.ip());
    let worker = || Pid::from_raw(relay.workers()[0].pid.unwrap().cast_signed());
    let stopped = worker();
    kill(stopped, Signal::SIGSTOP).unwrap();
    Source::play(site.source(), Stream { count: 3_000, rate: 10_000, ..Stream::to(GROUP) });
    kill(stopped, Signal::SIGCONT).unwrap();
    relay.balanced("cam1", 3_000);
    let next =
        ask(&relay, &[]).says(Code::RingDrops, Note, "interface in0", &["1,976 so far", "rx_ring_full"]);
    assert_eq!(usual(&relay, &next), "start it with mcr run --frames 8192");

    // Each end that comes too soon doubles the pause before the next start.
    for deaths in 1..=6 {
        kill(worker(), Signal::SIGKILL).unwrap();
        wait_until("the worker's end is known", PATIENCE, || {
            let worker = relay.workers().remove(0);
            worker.restarts == deaths && (deaths < 6 || worker.state == "restarting")
        });
        if deaths < 6 {
            wait_until("a worker runs", PATIENCE, || relay.workers()[0].state == "running");
        }
    }
    let _source = playing(&site, GROUP);
    let diagnosis = ask(&relay, &[]);
    let next = diagnosis.says(Code::WorkerDown, Problem, "daemon", &["in0/xdp0", "signal 9"]);
    assert_eq!(next, format!("mcr workers --control {}", relay.control().display()));
    diagnosis.says(Code::RulePending, Problem, "rule cam1", &["is being restarted"]);
    diagnosis.says(Code::RuleDrops, Problem, "rule cam1", &["no_worker"]);
    relay.wait_until_active("cam1");
    ask_until_without(&relay, Code::WorkerDown).is_without(Code::RulePending);
}

#[test]
fn listeners_of_this_host_that_see_nothing_any_more() {
    let site = Site::build(Plan { sinks: 1, ..Plan::default() });
    let relay = relaying(&site, INPUT, &[OUTPUT]);
    let _source = playing(&site, GROUP);
    ask(&relay, &[]).is_without(Code::ListenerBlind);
    let listener = tests::Receiver::start(&site.relay, INPUT, &[]);
    let next =
        ask(&relay, &[]).says(Code::ListenerBlind, Problem, "rule cam1", &["239.1.1.1:5000", "af-xdp"]);
    mend(&relay, &site.relay, &next, &[]);
    relay.wait_until_by("cam1", "af-packet");
    ask_until_without(&relay, Code::ListenerBlind);
    // Datagrams that are none of `mcr gen`'s.
    assert_ne!(listener.stop().json["total"]["foreign"], 0, "it hears them now");
}

#[test]
fn protocols_that_a_relay_breaks() {
    let site = Site::build(Plan { sinks: 1, ..Plan::default() });
    let relay = Relay::start(&site);
    relay.add("clock", "224.0.1.129:319@in0", &["239.2.2.2:6000@out0"]);
    relay.add_with("names", "224.0.0.251:5353@in0", &["239.2.2.3:6000@out0"], &["--link-local"]);
    relay.add("fine", "224.0.1.129:5000@in0", &["239.2.2.4:6000@out0"]);
    let diagnosis = ask(&relay, &[]);
    let next = diagnosis.says(Code::Ptp, Problem, "rule clock", &["PTP", "224.0.1.129"]);
    assert_eq!(diagnosis.report.findings.iter().filter(|finding| finding.code == Code::Ptp).count(), 1);
    mend(&relay, &site.relay, next.split(", ").next().unwrap(), &[]);
    let next = diagnosis.says(Code::LinkLocalControl, Note, "rule names", &["mDNS"]);
    mend(&relay, &site.relay, next.split(", ").next().unwrap(), &[]);
    let diagnosis = ask(&relay, &[]);
    diagnosis.is_without(Code::Ptp);
    diagnosis.is_without(Code::LinkLocalControl);
}

#[test]
fn memberships_that_the_host_limits() {
    let site = Site::build(Plan { sinks: 1, ..Plan::default() });
    let relay = relaying(&site, INPUT, &[OUTPUT]);
    site.relay.sysctl("ipv4/igmp_max_memberships", "0");
    relay.cli(&["config", "show"]).ok();
    let next = ask(&relay, &[]).says(Code::IgmpLimit, Problem, "host", &["igmp_max_memberships=0"]);
    mend(&relay, &site.relay, &next, &[]);
    ask_until_without(&relay, Code::IgmpLimit);

    relay.add("one", "239.1.1.9:5000@in0,source=10.77.0.2", &["239.2.2.3:6000@out0"]);
    ask(&relay, &["one"]).is_without(Code::IgmpVersion);
    site.relay.sysctl("ipv4/conf/in0/force_igmp_version", "2");
    let next =
        ask(&relay, &["one"]).says(Code::IgmpVersion, Problem, "rule one", &["IGMPv2", "force_igmp_version"]);
    mend(&relay, &site.relay, &next, &[]);
    ask(&relay, &["one"]).is_without(Code::IgmpVersion);

    if site.relay.run(|| fs::exists("/proc/sys/net/core/optmem_max")).unwrap() {
        site.relay.sysctl("core/optmem_max", "2000");
        let next = ask(&relay, &[]).says(Code::OptmemSmall, Note, "host", &["2000 bytes"]);
        mend(&relay, &site.relay, &next, &[]);
        ask(&relay, &[]).is_without(Code::OptmemSmall);
    } else {
        println!("net.core.optmem_max is no namespace's own on this kernel: the table has it");
    }
}

/// A daemon made so, whose diagnosis is asked for.
#[track_caller]
fn with_daemon(site: &Site, prepare: impl FnOnce(&mut Command), check: impl FnOnce(&Relay<'_>, Diagnosis)) {
    let mut command = Relay::bare_command(site);
    prepare(&mut command);
    let relay = Relay::spawn(site, &mut command);
    relay.cli(&["rule", "add", "cam1", "--in", INPUT, "--out", OUTPUT]).ok();
    relay.wait_until_active("cam1");
    let diagnosis = ask(&relay, &[]);
    check(&relay, diagnosis);
}

#[test]
fn what_the_daemon_lacks() {
    let site = Site::build(Plan { sinks: 1, ..Plan::default() });
    with_daemon(
        &site,
        |command| without_capabilities(command, deprive::NO_BPF),
        |_, diagnosis| {
            let next = diagnosis.says(Code::MissingCapability, Note, "daemon", &["CAP_BPF", "af-packet"]);
            assert!(next.contains("--ambient-caps +bpf mcr run"), "{next}");
            diagnosis.says(Code::XdpRefused, Note, "interface in0", &["native XDP is refused"]);
        },
    );
    let small = |command: &mut Command| {
        without_capabilities(command, &[CAP_IPC_LOCK]);
        with_limit(command, libc::RLIMIT_MEMLOCK, 8 << 20);
    };
    with_daemon(&site, small, |_, diagnosis| {
        diagnosis.says(Code::MissingCapability, Note, "daemon", &["CAP_IPC_LOCK"]);
        let next = diagnosis.says(Code::LockedMemory, Note, "daemon", &["8 MiB"]);
        assert!(next.contains("LimitMEMLOCK=infinity"), "{next}");
        diagnosis.says(Code::XdpRefused, Note, "interface in0", &["8.0 MiB"]);
    });
    let apart = |command: &mut Command| {
        // SAFETY: between fork and exec the closure makes a system call only.
        unsafe { command.pre_exec(|| check_call(libc::unshare(libc::CLONE_NEWNS))) };
    };
    with_daemon(&site, apart, |_, diagnosis| {
        let next = diagnosis.says(Code::PrivateMounts, Note, "daemon", &["mount namespace of its own"]);
        assert!(next.starts_with("start it with nsenter --net="), "{next}");
    });
    // With all that root has none of this is said.
    with_daemon(
        &site,
        |_| {},
        |relay, diagnosis| {
            for code in [
                Code::MissingCapability,
                Code::LockedMemory,
                Code::PrivateMounts,
                Code::XdpRefused,
                Code::LookRefused,
                Code::NoBpffs,
            ] {
                diagnosis.is_without(code);
            }
            // What the doctor itself may not do, or does not see.
            let mut call = relay.call(&["doctor", "--json", LOOK]);
            without_capabilities(&mut call, &[CAP_NET_RAW]);
            let diagnosis = Diagnosis::read(&Process::spawn(&mut call).answer(CALL));
            let next = diagnosis.says(Code::LookRefused, Note, "host", &["not permitted"]);
            assert_eq!(usual(relay, &next), "mcr doctor");
            let mut call = relay.call(&["doctor", "--json", LOOK]);
            // SAFETY: between fork and exec the closure makes system calls only.
            unsafe {
                call.pre_exec(|| {
                    check_call(libc::unshare(libc::CLONE_NEWNS))?;
                    let (none, root) = (std::ptr::null(), c"/".as_ptr());
                    check_call(libc::mount(none, root, none, libc::MS_REC | libc::MS_PRIVATE, none.cast()))?;
                    check_call(libc::umount2(c"/sys/fs/bpf".as_ptr(), libc::MNT_DETACH))
                });
            }
            let diagnosis = Diagnosis::read(&Process::spawn(&mut call).answer(CALL));
            let next = diagnosis.says(Code::NoBpffs, Note, "host", &["no bpffs"]);
            assert_eq!(next, "mount -t bpf bpf /sys/fs/bpf");
        },
    );
}

fn check_call(result: i32) -> std::io::Result<()> {
    if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

#[test]
fn what_waits_for_the_operator() {
    let site = Site::build(Plan { sinks: 1, ..Plan::default() });
    let relay = Relay::start(&site);
    let file = site.scratch.dir().join("mcr.toml");
    fs::write(&file, format!("[[rule]]\nname = \"cam1\"\nin = \"{INPUT}\"\nout = [\"{OUTPUT}\"]\n")).unwrap();
    relay.cli(&["config", "load", file.to_str().unwrap(), "--confirm", "60"]).ok();
    relay.wait_until_active("cam1");
    site.segments[0].wait_until_joined(*GROUP.ip());
    let _source = playing(&site, SocketAddrV4::new(*GROUP.ip(), 5001));
    let diagnosis = ask(&relay, &[]);
    // A file's rule is for its file to change.
    let next = diagnosis.says(Code::OtherPort, Problem, "rule cam1", &["to port 5001"]);
    let place = format!("{}:1", file.display());
    assert_eq!(
        usual(&relay, &next),
        format!("write in = \"239.1.1.1:5001@in0\" at {place}, then mcr config load {}", file.display())
    );
    let next = diagnosis.says(Code::DaemonProblem, Problem, "daemon", &["confirm"]);
    mend(&relay, &site.relay, &next, &[]);
    ask(&relay, &[]).is_without(Code::DaemonProblem);
}
