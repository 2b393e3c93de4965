//! Facts and what follows from them: above all what no namespace of a test can have.

use std::{collections::BTreeMap, net::Ipv4Addr, time::Duration};

use clap::ValueEnum;
use serde_json::{Value, json};

use super::*;
use crate::{
    doctor::facts::{About, Device, Fate, Group, Groups, Hook, Host, Look, Process, Seen, Sighting, Told},
    net::links::Link,
    rule::IfIndex,
    sys::ethtool::Offloads,
};

const GROUP: [u8; 4] = [239, 1, 1, 1];
const TIME: &str = "2025-06-01T12:00:00Z";

fn name(text: &str) -> InterfaceName {
    text.parse().unwrap()
}

fn device(kind: &str) -> Device {
    let link = Link {
        index: IfIndex(2),
        up: true,
        mtu: 1500,
        mac: Some([2, 0, 0, 0, 0, 1]),
        addresses: vec![[10, 0, 0, 1].into()],
        ethernet: true,
        arp: true,
        kind: kind.to_owned(),
        rx_queues: 4,
        near_cpus: Vec::new(),
        xdp_program: Some(77),
    };
    Device {
        link,
        admin_up: true,
        carrier: true,
        xdp_name: None,
        generic_xdp: false,
        native_xdp: Some(true),
        most_rx_queues: Some(8),
        rx_ring: Some((512, 4096)),
        offloads: Some(Offloads::default()),
        vlans: Vec::new(),
        forced_igmp: Some(0),
        rp_filter: Some(1),
    }
}

fn rule(name: &str, input: &str, outputs: &[&str]) -> Seen {
    let shown: Vec<_> = outputs.iter().map(|to| json!({"to": to, "health": "active"})).collect();
    let info = json!({
        "name": name, "origin": "cli", "in": input, "out": shown, "datapath": "redirect", "datapath_asked": "auto",
        "datapath_why": "auto lets the kernel do it", "merge": false, "link_local": false, "health": "active",
    });
    Seen {
        info: serde_json::from_value(info).unwrap(),
        input: input.parse().unwrap(),
        outputs: outputs.iter().map(|to| to.parse().unwrap()).collect(),
    }
}

fn stats(matched: u64, more: &Value) -> crate::api::wire::Stats {
    let output = json!({"to": "239.2.2.2:6000@out0", "received": 0, "sent": 0, "sent_bytes": 0, "sent_pps": 0.0, "dropped": {}});
    let rule = json!({
        "name": "cam1", "origin": "cli", "datapath": "redirect", "in": "239.1.1.1:5000@in0", "matched": matched,
        "received": matched, "received_bytes": 0, "received_pps": 0.0, "last_seen": null, "dropped": {}, "outputs": [output],
    });
    let mut stats =
        json!({"schema": 1, "time": TIME, "since": TIME, "rules": [rule], "interfaces": [], "workers": []});
    for (key, value) in more.as_object().into_iter().flatten() {
        stats[key] = value.clone();
    }
    serde_json::from_value(stats).unwrap()
}

/// A daemon with one rule that flows.
fn healthy() -> Observations {
    let status = json!({
        "schema": 1, "time": TIME, "since": TIME, "version": "0.1.0", "pid": 77, "health": "active",
        "rules": {"total": 1, "active": 1, "pending": 0, "failed": 0}, "workers_running": 0, "workers_total": 0,
        "worker_restarts": 0, "received_pps": 0.0, "sent_pps": 0.0, "sent_bps": 0.0, "dropped": {}, "problems": [],
    });
    let told = Told {
        status: serde_json::from_value(status).unwrap(),
        rules: vec![rule("cam1", "239.1.1.1:5000@in0", &["239.2.2.2:6000@out0"])],
        before: stats(100, &Value::Null),
        after: stats(1_100, &Value::Null),
        settings: toml::Table::new(),
        process: Process { pid: 77, ..Process::default() },
    };
    let joined = Group { users: 1, ..Group::default() };
    Observations {
        about: About::All,
        daemon: Ok(told),
        devices: [(name("in0"), device("ice")), (name("out0"), device("ice"))].into(),
        groups: Groups {
            joined: [((name("in0"), GROUP.into()), joined)].into(),
            versions: [(name("in0"), 3)].into(),
        },
        listeners: Vec::new(),
        look: Look { lasted: Duration::from_secs(2), ..Look::default() },
        hooks: BTreeMap::new(),
        host: Host {
            cpus: 4,
            io_uring_disabled: Some(0),
            bpf_jit_enable: Some(1),
            optmem_max: Some(131_072),
            igmp_max_memberships: Some(20),
            bpffs: Some(true),
        },
    }
}

fn told(seen: &mut Observations) -> &mut Told {
    seen.daemon.as_mut().unwrap()
}

fn ingress(seen: &mut Observations) -> &mut Device {
    seen.devices.get_mut(&name("in0")).unwrap()
}

fn by_packet(seen: &mut Observations) {
    let info = &mut told(seen).rules[0].info;
    (info.datapath, info.datapath_asked) = (Some("af-packet".to_owned()), "af-packet".to_owned());
}

/// The findings by code and severity, as text.
fn found(seen: &Observations) -> Vec<String> {
    let text = |finding: &Finding| {
        let severity = if finding.severity == Severity::Problem { "problem" } else { "note" };
        format!("{severity} {}", finding.code.name())
    };
    decide(seen).findings.iter().map(text).collect()
}

#[track_caller]
fn check(change: impl FnOnce(&mut Observations), expected: &[&str]) {
    let mut seen = healthy();
    change(&mut seen);
    assert_eq!(found(&seen), expected, "{:#?}", decide(&seen).findings);
}

/// As [`check`], of one finding; what is to be done.
#[track_caller]
fn next(change: impl FnOnce(&mut Observations), expected: &str) -> String {
    let mut seen = healthy();
    change(&mut seen);
    assert_eq!(found(&seen), [expected], "{:#?}", decide(&seen).findings);
    decide(&seen).findings.remove(0).next
}

#[test]
fn what_is_well_has_no_findings() {
    check(|_| {}, &[]);
    let checked = decide(&healthy()).checked;
    let of_rule = checked.iter().find(|check| check.subject == "rule cam1").unwrap();
    assert_eq!(of_rule.what, "1,000 datagrams came in 2.0 s, by redirect to 1 output");
}

#[test]
fn what_a_host_forbids() {
    let none = |seen: &mut Observations| told(seen).status.workers_running = 0;
    let some = |seen: &mut Observations| told(seen).status.workers_running = 1;
    let forbidden = |level| move |seen: &mut Observations| seen.host.io_uring_disabled = Some(level);
    let next_of = next(
        |seen| {
            none(seen);
            forbidden(2)(seen);
        },
        "problem io_uring_disabled",
    );
    assert_eq!(next_of, "sudo sysctl -w kernel.io_uring_disabled=0");
    check(
        |seen| {
            some(seen);
            forbidden(1)(seen);
        },
        &["note io_uring_disabled"],
    );
    let next_of = next(|seen| seen.host.bpf_jit_enable = Some(0), "note bpf_jit_off");
    assert_eq!(next_of, "sudo sysctl -w net.core.bpf_jit_enable=1");
    check(|seen| seen.host.optmem_max = Some(1_000), &["note optmem_small"]);
    check(|seen| seen.host.igmp_max_memberships = Some(4), &["note igmp_limit"]);
    check(|seen| seen.host.bpffs = Some(false), &["note no_bpffs"]);
    // What could not be read is no fault.
    check(|seen| seen.host = Host { cpus: 1, ..Host::default() }, &[]);
}

#[test]
fn what_devices_do_to_frames() {
    let lro = |seen: &mut Observations| {
        ingress(seen).offloads = Some(Offloads { lro: true, rxvlan: false });
    };
    assert_eq!(next(lro, "note lro"), "sudo ethtool -K in0 lro off");
    let tags = |vlans: &[&str]| {
        let vlans = vlans.iter().map(|text| name(text)).collect();
        move |seen: &mut Observations| {
            let device = ingress(seen);
            (device.offloads, device.vlans) = (Some(Offloads { lro: false, rxvlan: true }), vlans);
        }
    };
    assert_eq!(next(tags(&["in0.42"]), "note vlan_tags_hidden"), "sudo ethtool -K in0 rxvlan off");
    check(tags(&[]), &[]);
    check(
        |seen| {
            tags(&["in0.42"])(seen);
            by_packet(seen);
        },
        &[],
    );
}

#[test]
fn what_devices_lost() {
    let lost = |side: &'static str, name: &'static str, counter: &'static str, before: u64, after: u64| {
        move |seen: &mut Observations| {
            let devices = |count: u64| {
                let mut device = json!({"name": name, "link": {}, "qdisc": {}, "driver": {}});
                device[side][counter] = count.into();
                json!({"devices": [device]})
            };
            told(seen).before = stats(100, &devices(before));
            told(seen).after = stats(1_100, &devices(after));
        }
    };
    let next_of = next(lost("link", "in0", "rx_missed_errors", 5, 9), "problem device_rx_lost");
    assert_eq!(next_of, "sudo ethtool -G in0 rx 4096");
    check(lost("link", "in0", "rx_missed_errors", 9, 9), &["note device_rx_lost"]);
    let next_of = next(lost("link", "in0", "rx_crc_errors", 0, 9), "problem device_rx_lost");
    assert!(next_of.contains("cable"), "{next_of}");
    let next_of = next(lost("link", "out0", "tx_dropped", 5, 9), "problem device_tx_lost");
    assert!(next_of.contains("ethtool -S out0"), "{next_of}");
    let crowded = |seen: &mut Observations| {
        lost("link", "out0", "tx_dropped", 5, 9)(seen);
        let outputs = ["239.2.2.2:6000@out0", "239.2.2.3:6000@out0"];
        told(seen).rules = vec![rule("cam1", "239.1.1.1:5000@in0", &outputs)];
    };
    assert_eq!(next(crowded, "problem device_tx_lost"), "mcr rule set cam1 --datapath af-xdp");
    check(lost("qdisc", "out0", "fq_codel drops", 9, 9), &["note device_tx_lost"]);
    check(lost("qdisc", "out0", "tbf overlimits", 5, 9), &[]);
    // What comes in is no matter of the egress interface's, nor the other way round.
    check(lost("link", "out0", "rx_missed_errors", 5, 9), &[]);
    check(lost("link", "in0", "tx_dropped", 5, 9), &[]);
}

/// An interface's rings, and who serves them.
fn rings(datapath: &str, reason: &str, lost: u64, workers: u32) -> Value {
    let worker = |n: u32| {
        json!({"id": format!("in0/w{n}"), "interface": "in0", "datapath": datapath, "why": "", "queues": [n], "cpu": n, "pid": 1,
               "state": "running", "restarts": 0, "received": 0, "received_pps": 0.0})
    };
    let mut interface = json!({"name": "in0", "datapath": datapath, "verdicts": {}, "received": 0, "dropped": {}, "discarded": {}});
    interface["dropped"][reason] = lost.into();
    json!({"interfaces": [interface], "workers": (0..workers).map(worker).collect::<Vec<_>>()})
}

#[test]
fn what_gives_rings_more_room() {
    for (datapath, reason, workers, queues, expected) in [
        // Fewer workers than queues, then fewer queues than CPUs, then frames.
        ("af-xdp", "rx_ring_full", 1, 4, "start it with mcr run --workers 4"),
        ("af-xdp", "fill_ring_empty", 2, 2, "sudo ethtool -L in0 combined 4"),
        ("af-xdp", "fill_ring_empty", 4, 4, "start it with mcr run --frames 32768"),
        ("af-packet", "packet_ring_full", 1, 1, "start it with mcr run --workers 4"),
        ("af-packet", "packet_ring_full", 4, 4, "keep other work off the workers' CPUs: mcr run --cpus LIST"),
    ] {
        let lose = |seen: &mut Observations| {
            ingress(seen).link.rx_queues = queues;
            told(seen).settings = "frames = 16384".parse().unwrap();
            told(seen).before = stats(100, &rings(datapath, reason, 5, workers));
            told(seen).after = stats(1_100, &rings(datapath, reason, 9, workers));
        };
        assert_eq!(next(lose, "problem ring_drops"), expected, "{workers} workers, {queues} queues");
    }
    // What a worker took with it when it died is no matter of room.
    check(|seen| told(seen).after = stats(1_100, &rings("af-xdp", "worker_died", 9, 1)), &[]);
}

#[test]
fn what_an_alarm_says_is_passed_on() {
    let alarm =
        json!({"what": "7 datagrams of cam1 are missing", "gap": 7, "since": TIME, "next": "mcr stats cam1"});
    let raise = |seen: &mut Observations| {
        let status = &mut told(seen).status;
        status.alarms = vec![serde_json::from_value(alarm).unwrap()];
        let problem = |what: &str, next: &str| crate::api::wire::Problem {
            what: what.to_owned(),
            next: next.to_owned(),
        };
        // Once is enough, and what is of rules and workers is found out here.
        status.problems = vec![
            problem("7 datagrams of cam1 are missing", "mcr stats cam1"),
            problem("rule cam1: it waits", "mcr rule show cam1"),
            problem("rule cam1: no datagram for 20 s", "mcr stats cam1"),
            problem("worker in0/xdp0 is down", "mcr workers"),
        ];
    };
    assert_eq!(next(raise, "problem ledger_alarm"), "mcr stats cam1");
}

#[test]
fn who_is_joined_and_asked() {
    let leave = |seen: &mut Observations| seen.groups = Groups::default();
    let next_of = next(leave, "problem not_joined");
    assert_eq!(
        next_of,
        "mcr rule remove cam1 && mcr rule add cam1 --in 239.1.1.1:5000@in0 --out 239.2.2.2:6000@out0"
    );
    let silent = |seen: &mut Observations| told(seen).after = stats(100, &Value::Null);
    let long = |seen: &mut Observations| seen.look.lasted = Duration::from_secs(130);
    check(silent, &["problem nothing_arrives", "note querier_unseen"]);
    check(
        |seen| {
            silent(seen);
            long(seen);
        },
        &["problem nothing_arrives", "problem no_querier"],
    );
    // A stream that flows may stop when the switch has forgotten.
    check(long, &["note no_querier"]);
    let heard = |seen: &mut Observations| {
        seen.look.queriers = [(name("in0"), Ipv4Addr::new(10, 0, 0, 254))].into();
    };
    check(
        |seen| {
            silent(seen);
            heard(seen);
        },
        &["problem nothing_arrives"],
    );
    check(
        |seen| {
            long(seen);
            heard(seen);
        },
        &[],
    );
    // Why it is not joined is why nothing comes.
    check(
        |seen| {
            leave(seen);
            silent(seen);
        },
        &["problem not_joined", "note querier_unseen"],
    );
    let refused = |seen: &mut Observations| {
        seen.look = Look { refused: Some("in0: not permitted".to_owned()), ..Look::default() };
    };
    check(
        |seen| {
            silent(seen);
            refused(seen);
        },
        &["note look_refused", "problem nothing_arrives"],
    );
}

#[test]
fn a_querier_of_an_old_version() {
    let one_source = |seen: &mut Observations| {
        told(seen).rules = vec![rule("cam1", "239.1.1.1:5000@in0,source=10.0.0.7", &["239.2.2.2:6000@out0"])];
        seen.groups.versions = [(name("in0"), 2)].into();
    };
    let next_of = next(one_source, "note igmp_version");
    assert!(next_of.contains("mcast_igmp_version 3"), "{next_of}");
    let none = |seen: &mut Observations| {
        one_source(seen);
        told(seen).after = stats(100, &Value::Null);
    };
    check(none, &["problem igmp_version", "note querier_unseen"]);
}

#[test]
fn what_comes_in_its_place_is_told_once_for_each_command() {
    let see = |interface: &'static str, source: [u8; 4], port, frames| {
        let fate = Fate::Datagram { port, ttl: 8 };
        let sighting =
            Sighting { interface: name(interface), group: GROUP.into(), source: source.into(), fate };
        (sighting, frames)
    };
    let instead = |seen: &mut Observations| {
        told(seen).after = stats(100, &Value::Null);
        told(seen).rules[0].info.datapath = Some("af-xdp".to_owned());
        seen.look.queriers = [(name("in0"), Ipv4Addr::new(10, 0, 0, 254))].into();
        seen.look.seen = [see("in0", [10, 0, 0, 7], 5001, 3), see("in0", [10, 0, 0, 8], 5001, 4)].into();
    };
    check(instead, &["problem other_port"]);
    // Another port on another interface is another stream.
    let elsewhere = |seen: &mut Observations| {
        instead(seen);
        seen.look.seen = [see("out0", [10, 0, 0, 7], 5001, 3)].into();
    };
    check(elsewhere, &["problem nothing_arrives"]);
    // Beside what flows, it is another's.
    check(
        |seen| {
            instead(seen);
            told(seen).after = stats(9_000, &Value::Null);
        },
        &[],
    );
}

#[test]
fn what_an_output_waits_for() {
    let waits = |why: &'static str| {
        move |seen: &mut Observations| {
            told(seen).rules = vec![rule("cam1", "239.1.1.1:5000@in0", &["10.9.9.9:6000@out0"])];
            let info = &mut told(seen).rules[0].info;
            info.outputs[0].reason = Some(why.to_owned());
            (info.health, info.reason) = (crate::api::wire::Health::Pending, Some(why.to_owned()));
        }
    };
    let next_of = next(waits("no route to 10.9.9.9 by out0"), "problem no_route");
    assert_eq!(next_of, "sudo ip route replace 10.9.9.9/32 dev out0");
    let next_of = next(waits("10.0.0.254 does not answer ARP on out0"), "problem host_silent");
    assert!(next_of.starts_with("start 10.0.0.254 or see its cable"), "{next_of}");
    assert_eq!(next(waits("something new"), "problem output_pending"), "mcr rule show cam1");
}

#[test]
fn what_a_firewall_is_told() {
    let filtered = |hook: Hook| {
        move |seen: &mut Observations| {
            seen.hooks = [(name("out0"), hook)].into();
            told(seen).after.rules[0].outputs[0].dropped = [("filtered".to_owned(), 3)].into();
        }
    };
    let hook = |why: &str, chains: &[&str]| Hook {
        why: Some(why.to_owned()),
        chains: chains.iter().map(|chain| (*chain).to_owned()).collect(),
    };
    let next_of = next(filtered(hook("nftables has rules", &["ip a b", "inet c d"])), "problem filtered");
    assert_eq!(
        next_of,
        "sudo nft insert rule ip a b ip daddr 239.2.2.2 udp dport 6000 accept && \
         sudo nft insert rule inet c d ip daddr 239.2.2.2 udp dport 6000 accept"
    );
    let next_of = next(
        filtered(hook("iptables (legacy) has rules in OUTPUT of its table filter", &[])),
        "problem filtered",
    );
    assert!(next_of.starts_with("sudo iptables-legacy -I OUTPUT -o out0 -d 239.2.2.2 "), "{next_of}");
    let next_of = next(filtered(Hook::default()), "problem filtered");
    assert!(next_of.contains("nft list ruleset"), "{next_of}");
}

#[test]
fn what_a_device_refuses_is_its_hooks_before_its_queues() {
    let refused = |hook: Option<Hook>| {
        move |seen: &mut Observations| {
            seen.hooks.extend(hook.map(|hook| (name("out0"), hook)));
            told(seen).after.rules[0].outputs[0].dropped = [("queue_full".to_owned(), 3)].into();
        }
    };
    let hook = |why: &str, chains: &[&str]| {
        Some(Hook {
            why: Some(why.to_owned()),
            chains: chains.iter().map(|chain| (*chain).to_owned()).collect(),
        })
    };
    for (hook, expected) in [
        (None, "sudo tc qdisc replace dev out0 root pfifo limit 10000"),
        (hook("out0 is shaped by tbf", &[]), "sudo tc qdisc replace dev out0 root pfifo limit 10000"),
        (
            hook("nftables has rules", &["ip a b", "netdev c d"]),
            "sudo nft insert rule netdev c d ip daddr 239.2.2.2 udp dport 6000 accept",
        ),
        // What it forbids is `filtered`.
        (hook("nftables has rules", &["ip a b"]), "sudo tc qdisc replace dev out0 root pfifo limit 10000"),
        (hook("out0 has a tc egress filter", &[]), "tc -s filter show dev out0 egress"),
        (hook("out0 has an eBPF program on egress (tcx)", &[]), "sudo bpftool net show dev out0"),
    ] {
        assert_eq!(next(refused(hook), "problem egress_full"), expected);
    }
}

#[test]
fn what_was_too_big_for_an_mtu_that_is_right_again() {
    let lost = |before: u64, mtu: u32| {
        move |seen: &mut Observations| {
            seen.devices.get_mut(&name("out0")).unwrap().link.mtu = mtu;
            let dropped = |count: u64| [("too_big".to_owned(), count)].into();
            told(seen).before.rules[0].outputs[0].dropped = dropped(before);
            told(seen).after.rules[0].outputs[0].dropped = dropped(9);
        }
    };
    assert_eq!(next(lost(5, 1000), "problem too_big"), "sudo ip link set out0 mtu 1500");
    assert_eq!(next(lost(9, 1000), "note too_big"), "sudo ip link set out0 mtu 1500");
    assert_eq!(next(lost(9, 1500), "note too_big"), "nothing is to be done");
}

#[test]
fn who_has_the_slot_for_xdp() {
    for (program, expected) in [
        (None, "program 77 of somebody else has its XDP slot, "),
        (Some("xdp_firewall"), "program 77 (xdp_firewall) of somebody else has its XDP slot, "),
        (Some("mcr_steer"), "another mcr has its XDP slot (program 77, mcr_steer): "),
    ] {
        let mut seen = healthy();
        ingress(&mut seen).xdp_name = program.map(str::to_owned);
        let info = &mut told(&mut seen).rules[0].info;
        info.datapath = Some("af-packet".to_owned());
        info.datapath_why = "another XDP program has in0".to_owned();
        let findings = decide(&seen).findings;
        assert_eq!((findings.len(), findings[0].code), (1, Code::XdpSlotTaken), "{findings:#?}");
        assert!(findings[0].what.starts_with(expected), "{findings:#?}");
        assert_eq!(findings[0].next, "sudo bpftool net show dev in0");
    }
}

#[test]
fn idle_rules_of_an_interface_are_one_finding_when_they_are_many() {
    let idle = |rules: usize| {
        move |seen: &mut Observations| {
            told(seen).after = stats(100, &Value::Null);
            seen.look.queriers = [(name("in0"), Ipv4Addr::new(10, 0, 0, 254))].into();
            told(seen).rules = (1..=rules)
                .map(|n| rule(&format!("cam{n}"), "239.1.1.1:5000@in0", &["239.2.2.2:6000@out0"]))
                .collect();
        }
    };
    check(idle(3), &["problem nothing_arrives"; 3]);
    let mut seen = healthy();
    idle(300)(&mut seen);
    let findings = decide(&seen).findings;
    assert_eq!((findings.len(), findings[0].subject.as_str()), (1, "interface in0"), "{findings:#?}");
    let words = "nothing arrives for 300 of its rules (cam1, cam2, cam3 and 297 more), and for 300 of them nothing ever came";
    assert!(findings[0].what.starts_with(words), "{findings:#?}");
}

#[test]
fn rules_of_one_group_and_listeners() {
    let listen = |users: u32| {
        move |seen: &mut Observations| {
            seen.listeners = vec!["0.0.0.0:5000".parse().unwrap()];
            seen.groups.joined.get_mut(&(name("in0"), GROUP.into())).unwrap().users = users;
        }
    };
    check(listen(1), &[]);
    check(listen(2), &["problem listener_blind"]);
    // The second is the daemon's own, of a rule for one source.
    let two = |seen: &mut Observations| {
        listen(2)(seen);
        let other = rule("cam2", "239.1.1.1:5001@in0,source=10.0.0.7", &["239.2.2.3:6000@out0"]);
        told(seen).rules.push(other);
        seen.about = About::Rule("cam1".to_owned());
    };
    check(two, &[]);
    // Who has another address or port listens to something else.
    check(
        |seen| {
            listen(2)(seen);
            seen.listeners = vec!["10.0.0.1:5000".parse().unwrap()];
        },
        &[],
    );
    check(
        |seen| {
            listen(2)(seen);
            by_packet(seen);
        },
        &[],
    );
}

#[test]
fn only_what_was_asked_about_is_told() {
    let broken = |about: About| {
        move |seen: &mut Observations| {
            told(seen).after = stats(100, &Value::Null);
            seen.look.queriers = [(name("in0"), Ipv4Addr::new(10, 0, 0, 254))].into();
            seen.devices.insert(name("eth9"), Device { carrier: false, ..device("ice") });
            seen.about = about;
        }
    };
    check(broken(About::All), &["problem nothing_arrives"]);
    check(broken(About::Rule("cam1".to_owned())), &["problem nothing_arrives"]);
    check(broken(About::Rule("cam2".to_owned())), &[]);
    check(broken(About::Interface(name("in0"))), &["problem nothing_arrives"]);
    check(broken(About::Interface(name("eth9"))), &["problem no_carrier"]);
}

/// The page that describes them, and no other.
#[test]
fn the_documentation_has_every_code() {
    let page = include_str!("../../../../docs/doctor.md");
    let documented: Vec<_> = page
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.split_once('`').map(|(code, _)| code.to_owned()))
        .collect();
    let codes: Vec<_> = Code::value_variants().iter().map(|code| code.name()).collect();
    assert_eq!(documented, codes, "docs/doctor.md lists the codes in their order");
    for code in Code::value_variants() {
        assert_eq!(serde_json::to_value(code).unwrap(), code.name().as_str());
    }
}
