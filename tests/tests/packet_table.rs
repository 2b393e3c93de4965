//! What becomes of a frame: one table, run through the XDP program and the packet sockets' filter in the
//! kernel (`BPF_PROG_TEST_RUN`) and through the same parser in user space.

#[path = "packet_table/rewriting.rs"]
mod rewriting;

use std::{
    net::SocketAddrV4,
    os::fd::{AsRawFd, OwnedFd},
};

use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, ArrayOfMaps, HashMap, Map, MapData, PerCpuArray, XskMap, xdp::DevMap},
    programs::{SocketFilter, TestRun, TestRunOptions, Xdp},
};
use etherparse::{NetSlice, SlicedPacket, TransportSlice};
use mcr_common::{
    abi::{self, map, verdicts_of},
    counters::{RuleCounters, Verdicts},
    flow::{FlowKey4, FlowTable, FlowValue, action},
    parse::{PAYLOAD_OFFSET, Reject, parse},
    redirect::{self, Fan, TAG_LEN, Tag},
};
use proptest::{prelude::*, test_runner::TestRunner};
use tests::{
    Namespace, Udp, bpf,
    frame::{IP, PAYLOAD, UDP, fix_ip_checksum},
};

const XDP_DROP: u32 = 1;
const XDP_PASS: u32 = 2;
const XDP_REDIRECT: u32 = 4;

const BPF_MAP_TYPE_DEVMAP: u32 = 14;

const PORT: u16 = 5000;
/// A group with a rule for any source, one for [`WANTED`], and the relay itself among the senders.
const GROUP: &str = "239.1.1.1";
/// A group that an `AF_PACKET` socket takes.
const PACKET_GROUP: &str = "239.1.1.2";
/// A group that the kernel itself sends on.
const REDIRECT_GROUP: &str = "239.1.1.3";
/// A group that it would, but there are no outputs.
const STRANDED_GROUP: &str = "239.1.1.4";
/// A group with a rule for [`WANTED`] only.
const SSM_GROUP: &str = "232.1.1.1";

const SENDER: &str = "198.51.100.9";
const WANTED: &str = "192.0.2.7";
const RELAY: &str = "10.0.0.1";

/// Slots of the rules; 0 is left unused, so that a slot that was never set shows.
const ANY_SOURCE: u32 = 1;
const ONE_SOURCE: u32 = 2;
const LOOP: u32 = 3;
const PACKET: u32 = 4;
const SSM: u32 = 5;
const REDIRECT: u32 = 6;
const STRANDED: u32 = 7;
const SLOTS: u32 = 8;
/// Of the two fans of [`REDIRECT`] the second is in use.
const BANK: u32 = 2;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// Belongs to this rule, which steers; with the UDP payload's length.
    Steer(u32, u64),
    Loop(u32, u64),
    AfPacket(u32, u64),
    Redirect(u32, u64),
    NoOutput(u32, u64),
    NoRule,
    Rejected(Reject),
}

struct Row {
    name: String,
    frame: Vec<u8>,
    fate: Fate,
}

fn at(address: &str, port: u16) -> SocketAddrV4 {
    SocketAddrV4::new(address.parse().expect("an address"), port)
}

fn udp(source: &str, group: &str) -> Udp {
    Udp::new(at(source, 40_000), at(group, PORT)).payload(&[0x5a; 100])
}

/// A datagram that the rule for any source steers.
fn good() -> Vec<u8> {
    udp(SENDER, GROUP).frame()
}

/// [`good`], changed, with a right IP header checksum.
fn with(change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut frame = good();
    change(&mut frame);
    fix_ip_checksum(&mut frame);
    frame
}

/// [`good`], changed, with the checksum that it had.
fn broken(change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut frame = good();
    change(&mut frame);
    frame
}

fn put(frame: &mut [u8], offset: usize, value: u16) {
    frame[offset..offset + 2].copy_from_slice(&value.to_be_bytes());
}

/// Inserts tags between the addresses and the Ethernet type.
fn tagged(ethertypes: &[u16]) -> Vec<u8> {
    broken(|frame| {
        let tags = ethertypes.iter().flat_map(|ethertype| {
            let [high, low] = ethertype.to_be_bytes();
            [high, low, 0, 42]
        });
        frame.splice(12..12, tags);
    })
}

fn accepted_rows() -> Vec<Row> {
    let row = |name: &str, frame: Vec<u8>, fate| Row { name: name.to_owned(), frame, fate };
    let steer = Fate::Steer(ANY_SOURCE, 100);
    vec![
        row("a datagram of the group", good(), steer),
        row("the rule for its source goes first", udp(WANTED, GROUP).frame(), Fate::Steer(ONE_SOURCE, 100)),
        row("a source of an SSM rule", udp(WANTED, SSM_GROUP).frame(), Fate::Steer(SSM, 100)),
        row("another source of an SSM group", udp(SENDER, SSM_GROUP).frame(), Fate::NoRule),
        row("what the relay sent itself", udp(RELAY, GROUP).frame(), Fate::Loop(LOOP, 100)),
        row("a rule of AF_PACKET", udp(SENDER, PACKET_GROUP).frame(), Fate::AfPacket(PACKET, 100)),
        row("no payload", udp(SENDER, GROUP).payload(&[]).frame(), Fate::Steer(ANY_SOURCE, 0)),
        row("one byte", udp(SENDER, GROUP).payload(&[1]).frame(), Fate::Steer(ANY_SOURCE, 1)),
        row("a full MTU", udp(SENDER, GROUP).payload(&[1; 1472]).frame(), Fate::Steer(ANY_SOURCE, 1472)),
        row(
            "Ethernet padding is no payload",
            {
                let mut frame = udp(SENDER, GROUP).payload(&[1, 2]).frame();
                frame.resize(60, 0xff);
                frame
            },
            Fate::Steer(ANY_SOURCE, 2),
        ),
        row("UDP ends before IP does", with(|f| put(f, UDP + 4, 8 + 50)), Fate::Steer(ANY_SOURCE, 50)),
        row("no UDP checksum", broken(|f| put(f, UDP + 6, 0)), steer),
        row("an unfinished or wrong UDP checksum", broken(|f| put(f, UDP + 6, 0x1234)), steer),
        row("TTL 1", udp(SENDER, GROUP).ttl(1).frame(), steer),
        row("TTL 0", udp(SENDER, GROUP).ttl(0).frame(), steer),
        row("every DSCP and ECN bit", udp(SENDER, GROUP).dscp(63, 3).frame(), steer),
        row("don't fragment", with(|f| f[IP + 6] |= 0x40), steer),
        row("the reserved flag", with(|f| f[IP + 6] |= 0x80), steer),
        row("another MAC address", broken(|f| f[..6].copy_from_slice(&[2, 0, 0, 0, 0, 9])), steer),
        row("another port", with(|f| put(f, UDP + 2, PORT + 1)), Fate::NoRule),
        row("the port's bytes swapped", with(|f| put(f, UDP + 2, PORT.swap_bytes())), Fate::NoRule),
        row("the port as source port only", with(|f| put(f, UDP, PORT)), steer),
        row("another group", udp(SENDER, "239.1.1.9").frame(), Fate::NoRule),
        row("the group's bytes swapped", udp(SENDER, "225.1.1.239").frame(), Fate::NoRule),
        row("the lowest group", udp(SENDER, "224.0.0.0").frame(), Fate::NoRule),
        row("the highest group", udp(SENDER, "239.255.255.255").frame(), Fate::NoRule),
    ]
}

fn rejected_rows() -> Vec<Row> {
    let mut rows = Vec::new();
    let mut row = |name: &str, frame: Vec<u8>, reject| {
        rows.push(Row { name: name.to_owned(), frame, fate: Fate::Rejected(reject) });
    };
    // An Ethernet header is the least that the kernel runs a program on.
    for len in 14..good().len() {
        row(&format!("cut to {len} bytes"), good()[..len].to_vec(), Reject::Truncated);
    }
    row("IP length one beyond the frame", with(|f| put(f, IP + 2, 129)), Reject::Truncated);
    row("IP length far beyond the frame", with(|f| put(f, IP + 2, 65_535)), Reject::Truncated);
    row("UDP header behind the IP length", with(|f| put(f, IP + 2, 27)), Reject::Malformed);
    row("no room for UDP in the IP length", with(|f| put(f, IP + 2, 20)), Reject::Malformed);
    row("IP length below its header", with(|f| put(f, IP + 2, 19)), Reject::Malformed);
    row("IP length 0", with(|f| put(f, IP + 2, 0)), Reject::Malformed);
    row("UDP length 7", with(|f| put(f, UDP + 4, 7)), Reject::Malformed);
    row("UDP length 0", with(|f| put(f, UDP + 4, 0)), Reject::Malformed);
    row("UDP length one beyond IP", with(|f| put(f, UDP + 4, 109)), Reject::Malformed);
    row("UDP length far beyond IP", with(|f| put(f, UDP + 4, 65_535)), Reject::Malformed);
    row("UDP length in the padding", with(|f| put(f, IP + 2, 100)), Reject::Malformed);
    for version in [0u8, 5, 6, 15] {
        row(&format!("IP version {version}"), with(|f| f[IP] = version << 4 | 5), Reject::Malformed);
    }
    for words in 0u8..5 {
        row(&format!("IP header of {words} words"), with(|f| f[IP] = 0x40 | words), Reject::Malformed);
    }
    for words in 6u8..16 {
        row(&format!("IP header of {words} words"), with(|f| f[IP] = 0x40 | words), Reject::IpOptions);
    }
    row(
        "a router alert option",
        with(|f| {
            f[IP] = 0x46;
            f.splice(UDP..UDP, [0x94, 4, 0, 0]);
            put(f, IP + 2, 132);
        }),
        Reject::IpOptions,
    );
    row("a bit of the IP checksum", broken(|f| f[IP + 11] ^= 1), Reject::BadChecksum);
    row("a bit of the source address", broken(|f| f[IP + 15] ^= 1), Reject::BadChecksum);
    row("IP checksum 0", broken(|f| put(f, IP + 10, 0)), Reject::BadChecksum);
    for (name, field) in [
        ("the first fragment", 0x2000),
        ("a first fragment that must not be one", 0x6000),
        ("a middle fragment", 0x2001),
        ("the last fragment", 0x0001),
        ("a fragment at the highest offset", 0x1fff),
    ] {
        row(name, with(|f| put(f, IP + 6, field)), Reject::Fragment);
    }
    row("a bad checksum goes before a fragment", broken(|f| put(f, IP + 6, 0x2000)), Reject::BadChecksum);
    row("802.1Q", tagged(&[0x8100]), Reject::Vlan);
    row("802.1ad", tagged(&[0x88a8]), Reject::Vlan);
    row("802.1Q in 802.1ad", tagged(&[0x88a8, 0x8100]), Reject::Vlan);
    row(
        "a priority tag without a VLAN",
        broken(|f| drop(f.splice(12..12, [0x81, 0, 0xe0, 0]))),
        Reject::Vlan,
    );
    row("ARP", broken(|f| put(f, 12, 0x0806)), Reject::NotIpv4);
    row("IPv6", broken(|f| put(f, 12, 0x86dd)), Reject::NotIpv4);
    row("an 802.3 length", broken(|f| put(f, 12, 100)), Reject::NotIpv4);
    row("Ethernet type with swapped bytes", broken(|f| put(f, 12, 0x0008)), Reject::NotIpv4);
    row("TCP to the group", with(|f| f[IP + 9] = 6), Reject::NotUdp);
    row("ICMP to the group", with(|f| f[IP + 9] = 1), Reject::NotUdp);
    row("UDP-Lite to the group", with(|f| f[IP + 9] = 136), Reject::NotUdp);
    row(
        "IGMP with its router alert",
        with(|f| {
            f[IP] = 0x46;
            f[IP + 9] = 2;
        }),
        Reject::NotUdp,
    );
    for address in ["10.0.0.2", "0.0.0.0", "127.0.0.1", "223.255.255.255", "240.0.0.1", "255.255.255.255"] {
        row(&format!("to {address}"), udp(SENDER, address).frame(), Reject::NotMulticast);
    }
    row(
        "a unicast fragment with options and a bad checksum",
        broken(|f| {
            f[IP] = 0x46;
            f[IP + 16] = 10;
            put(f, IP + 6, 0x2000);
        }),
        Reject::NotMulticast,
    );
    rows
}

/// The same frame to another group, its checksum as right or wrong as before.
fn to_group(mut frame: Vec<u8>, group: &str) -> Vec<u8> {
    let octets = |address: &str| address.parse::<std::net::Ipv4Addr>().expect("an address").octets();
    let Some(at) = frame.windows(4).position(|bytes| bytes == octets(GROUP)) else { return frame };
    let word = |frame: &[u8], at: usize| u32::from(u16::from_be_bytes([frame[at], frame[at + 1]]));
    let sum = |frame: &[u8]| word(frame, at) + word(frame, at + 2);
    let former = sum(&frame);
    frame[at..at + 4].copy_from_slice(&octets(group));
    // RFC 1624.
    let mut checksum = (0xffff ^ word(&frame, at - 6)) + 2 * 0xffff - former + sum(&frame);
    while checksum > 0xffff {
        checksum = (checksum & 0xffff) + (checksum >> 16);
    }
    put(&mut frame, at - 6, !(checksum as u16));
    frame
}

/// Whatever is steered or refused, to groups that the kernel itself sends on.
fn redirected_rows() -> Vec<Row> {
    let mut rows = Vec::new();
    for (group, redirected) in [
        (REDIRECT_GROUP, (|bytes| Fate::Redirect(REDIRECT, bytes)) as fn(u64) -> Fate),
        (STRANDED_GROUP, |bytes| Fate::NoOutput(STRANDED, bytes)),
    ] {
        for row in accepted_rows().into_iter().chain(rejected_rows()) {
            let fate = match row.fate {
                Fate::Steer(ANY_SOURCE, bytes) => redirected(bytes),
                Fate::Rejected(reject) => Fate::Rejected(reject),
                _ => continue,
            };
            rows.push(Row {
                name: format!("{}, to {group}", row.name),
                frame: to_group(row.frame, group),
                fate,
            });
        }
    }
    rows
}

fn rows() -> Vec<Row> {
    accepted_rows().into_iter().chain(rejected_rows()).chain(redirected_rows()).collect()
}

/// The rules of the table, as the daemon compiles them.
fn flows() -> [(FlowKey4, FlowValue); 7] {
    let octets = |address: &str| address.parse::<std::net::Ipv4Addr>().expect("an address").octets();
    let port = PORT.to_be_bytes();
    let from = |source, group| FlowKey4::source_group(octets(source), octets(group), port);
    let any = |group| FlowKey4::any_source(octets(group), port);
    [
        (any(GROUP), FlowValue { rule: ANY_SOURCE, action: action::STEER }),
        (from(WANTED, GROUP), FlowValue { rule: ONE_SOURCE, action: action::STEER }),
        (from(RELAY, GROUP), FlowValue { rule: LOOP, action: action::LOOP }),
        (any(PACKET_GROUP), FlowValue { rule: PACKET, action: action::PASS }),
        (from(WANTED, SSM_GROUP), FlowValue { rule: SSM, action: action::STEER }),
        (any(REDIRECT_GROUP), FlowValue { rule: REDIRECT, action: action::REDIRECT }),
        (any(STRANDED_GROUP), FlowValue { rule: STRANDED, action: action::REDIRECT }),
    ]
}

/// The fate that user space gives a frame: its parser, and a lookup in the table's rules.
fn fate_in_user_space(frame: &[u8]) -> Fate {
    let datagram = match parse(&frame) {
        Ok(datagram) => datagram,
        Err(reject) => return Fate::Rejected(reject),
    };
    let find = |source| {
        let key = FlowKey4::source_group(source, datagram.group, datagram.port);
        flows().into_iter().find_map(|(flow, value)| (flow == key).then_some(value))
    };
    let len = u64::from(datagram.payload_len);
    match find(datagram.source).or_else(|| find([0; 4])) {
        None => Fate::NoRule,
        Some(FlowValue { rule, action: action::LOOP }) => Fate::Loop(rule, len),
        Some(FlowValue { rule, action: action::PASS }) => Fate::AfPacket(rule, len),
        Some(FlowValue { rule: STRANDED, .. }) => Fate::NoOutput(STRANDED, len),
        Some(FlowValue { rule, action: action::REDIRECT }) => Fate::Redirect(rule, len),
        Some(FlowValue { rule, .. }) => Fate::Steer(rule, len),
    }
}

/// Which program runs, and in what circumstances.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// The XDP program, with a socket in slot 0 of the XSKMAP.
    Steering,
    /// The XDP program, without one.
    Workerless,
    Filter,
}

/// What the filter answers for a frame that it admits: as many bytes as there are.
const ADMITTED: u32 = u32::MAX;

/// A program, loaded but attached to nothing.
struct Program {
    kind: Kind,
    ebpf: Ebpf,
    /// Stands in slot 0 of the XSKMAP as long as it is open.
    _socket: Option<OwnedFd>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Counters {
    verdicts: Vec<(&'static str, u64)>,
    rules: Vec<RuleCounters>,
}

impl Program {
    fn load(kind: Kind) -> Self {
        let mut ebpf = EbpfLoader::new().load(&bpf::object()).expect("load the object");
        let mut map: HashMap<_, FlowKey4, FlowValue> =
            ebpf.map_mut(map::FLOWS_V4).expect("the flows' map").try_into().expect("a hash map");
        for (key, value) in flows() {
            map.insert(key, value, 0).expect("insert a flow");
        }
        let mut table: Array<_, FlowTable> =
            ebpf.map_mut(map::FLOW_TABLE).expect("their table").try_into().expect("an array");
        let for_one_source = flows().iter().filter(|(key, _)| key.source != [0; 4]).count() as u32;
        table.set(0, FlowTable { for_one_source, generation: 1 }, 0).expect("tell their number");
        set_up_redirect(&mut ebpf);
        let socket = (kind == Kind::Steering).then(af_xdp_socket);
        if let Some(socket) = &socket {
            let mut sockets: XskMap<_> =
                ebpf.map_mut(map::SOCKETS).expect("the sockets' map").try_into().expect("an XSKMAP");
            sockets.set(0, socket.as_raw_fd(), 0).expect("insert an AF_XDP socket");
        }
        if kind == Kind::Filter {
            let filter = ebpf.program_mut(abi::FILTER).expect("the filter");
            let filter: &mut SocketFilter = filter.try_into().expect("a socket filter");
            filter.load().expect("the verifier takes the filter");
        } else {
            let program: &mut Xdp =
                ebpf.program_mut(abi::PROGRAM).expect("the program").try_into().expect("XDP");
            program.load().expect("the verifier takes the program");
        }
        Self { kind, ebpf, _socket: socket }
    }

    /// Runs one frame and answers the program's verdict.
    fn run(&self, frame: &[u8], context: Option<&[u8]>) -> u32 {
        if self.kind == Kind::Filter {
            let filter = self.ebpf.program(abi::FILTER).expect("the filter");
            let filter: &SocketFilter = filter.try_into().expect("a socket filter");
            // The kernel takes an Ethernet header off, which a packet socket's filter sees.
            let framed = [&[0; 14][..], frame].concat();
            let options = TestRunOptions { data_in: Some(&framed), ctx_in: context, ..TestRunOptions::new() };
            return filter.test_run(options).expect("BPF_PROG_TEST_RUN").return_value;
        }
        let program: &Xdp = self.ebpf.program(abi::PROGRAM).expect("the program").try_into().expect("XDP");
        let options = TestRunOptions { data_in: Some(frame), ctx_in: context, ..TestRunOptions::new() };
        program.test_run(options).expect("BPF_PROG_TEST_RUN").return_value
    }

    /// The counters, summed over the CPUs.
    fn counters(&self) -> Counters {
        let verdicts: PerCpuArray<_, Verdicts> =
            self.ebpf.map(map::VERDICTS).expect("the verdicts' map").try_into().expect("a per-CPU array");
        let mut sums = Verdicts::default().named();
        let of = if self.kind == Kind::Filter { verdicts_of::FILTER } else { verdicts_of::XDP };
        for cpu in verdicts.get(&of, 0).expect("the verdicts").iter() {
            for (sum, (_, count)) in sums.iter_mut().zip(cpu.named()) {
                sum.1 += count;
            }
        }
        let rules: PerCpuArray<_, RuleCounters> =
            self.ebpf.map(map::RULES).expect("the rules' map").try_into().expect("a per-CPU array");
        let sum = |a: RuleCounters, b: &RuleCounters| a.plus(*b);
        let rules = (0..SLOTS)
            .map(|slot| rules.get(&slot, 0).expect("a rule").iter().fold(RuleCounters::default(), sum))
            .collect();
        Counters { verdicts: sums.to_vec(), rules }
    }

    /// Runs a frame and checks the action, and that exactly the counters of its fate moved.
    fn check(&self, name: &str, frame: &[u8], fate: Fate) {
        let mut expected = self.counters();
        let action = self.run(frame, None);
        let (expected_action, verdict, rule) = consequence(fate, self.kind);
        for (counter, count) in &mut expected.verdicts {
            *count += u64::from(*counter == verdict);
        }
        if let Some((slot, moved)) = rule {
            let counters = &mut expected.rules[slot as usize];
            counters.matched += moved.matched;
            counters.matched_bytes += moved.matched_bytes;
            counters.no_worker += moved.no_worker;
            counters.looped += moved.looped;
            counters.redirected += moved.redirected;
            counters.no_output += moved.no_output;
            counters.redirect_bytes += moved.redirect_bytes;
        }
        assert_eq!(action, expected_action, "{:?}: {name}", self.kind);
        assert_eq!(self.counters(), expected, "{name}");
    }
}

/// What a program answers to a fate, the verdict that counts it, and what moves in which rule's counters.
fn consequence(fate: Fate, kind: Kind) -> (u32, &'static str, Option<(u32, RuleCounters)>) {
    let (pass, drop) = if kind == Kind::Filter { (0, 0) } else { (XDP_PASS, XDP_DROP) };
    let matched = |bytes| RuleCounters { matched: 1, matched_bytes: bytes, ..RuleCounters::default() };
    match (fate, kind) {
        (Fate::Steer(rule, bytes), Kind::Steering) => (XDP_REDIRECT, "steered", Some((rule, matched(bytes)))),
        (Fate::Steer(rule, bytes), Kind::Workerless) => {
            (XDP_PASS, "no_worker", Some((rule, RuleCounters { no_worker: 1, ..matched(bytes) })))
        }
        // The XDP program has counted it.
        (Fate::Steer(..), Kind::Filter) => (0, "no_worker", None),
        (Fate::Loop(rule, bytes), _) => {
            (drop, "looped", Some((rule, RuleCounters { looped: 1, ..matched(bytes) })))
        }
        (Fate::Redirect(..) | Fate::NoOutput(..), Kind::Filter) => (0, "not_redirected", None),
        (Fate::Redirect(rule, bytes), _) => (
            XDP_REDIRECT,
            "redirected",
            Some((rule, RuleCounters { redirected: 1, redirect_bytes: bytes, ..matched(bytes) })),
        ),
        (Fate::NoOutput(rule, bytes), _) => (
            XDP_DROP,
            "no_output",
            Some((rule, RuleCounters { no_output: 1, redirect_bytes: bytes, ..matched(bytes) })),
        ),
        (Fate::AfPacket(rule, bytes), Kind::Filter) => (ADMITTED, "steered", Some((rule, matched(bytes)))),
        // The filter will count it.
        (Fate::AfPacket(..), _) => (XDP_PASS, "af_packet", None),
        (Fate::NoRule, _) => (pass, "no_rule", None),
        (Fate::Rejected(reject), _) => {
            let verdict = match reject {
                Reject::NotMulticast => "not_multicast",
                Reject::NotUdp => "not_udp",
                Reject::NotIpv4 => "not_ipv4",
                Reject::Vlan => "vlan",
                Reject::Fragment => "fragment",
                Reject::IpOptions => "ip_options",
                Reject::Truncated => "truncated",
                Reject::Malformed => "malformed",
                Reject::BadChecksum => "bad_checksum",
            };
            (pass, verdict, None)
        }
    }
}

/// A fan without devices for the rule that has outputs.
fn set_up_redirect(ebpf: &mut Ebpf) {
    let mut banks: Array<_, u32> = ebpf.map_mut(map::BANKS).expect("map").try_into().expect("an array");
    banks.set(REDIRECT, BANK, 0).expect("choose a fan");
    let mut fans: ArrayOfMaps<_, DevMap<MapData>> =
        ebpf.map_mut(map::DEVICES).expect("map").try_into().expect("an array of maps");
    let shape = aya_obj::Map::new_from_params(BPF_MAP_TYPE_DEVMAP, 4, 8, 1, 0);
    let devices = MapData::create(shape, "fan", None).expect("make a device map");
    let devices = Map::from_map_data(devices).expect("map").try_into().expect("a device map");
    fans.set(redirect::fan(REDIRECT, BANK), &devices, 0).expect("set the fan's devices");
    let mut fans: PerCpuArray<_, Fan> =
        ebpf.map_mut(map::FANS).expect("map").try_into().expect("a per-CPU array");
    let index = redirect::fan(REDIRECT, BANK);
    let cpus = fans.get(&index, 0).expect("the fan");
    let cpus: Vec<_> = cpus.iter().map(|cpu| Fan { mtu: 65_535, ..*cpu }).collect();
    fans.set(index, cpus.try_into().expect("a value for each CPU"), 0).expect("set the fan");
}

fn af_xdp_socket() -> OwnedFd {
    socket2::Socket::new(libc::AF_XDP.into(), socket2::Type::RAW, None).expect("AF_XDP socket").into()
}

fn check_table(kind: Kind) {
    let program = Program::load(kind);
    for row in rows() {
        program.check(&row.name, &row.frame, row.fate);
    }
}

#[test]
fn the_kernel_gives_each_frame_its_fate() {
    check_table(Kind::Steering);
}

#[test]
fn without_a_worker_what_matches_is_passed_and_counted() {
    check_table(Kind::Workerless);
}

#[test]
fn the_filter_admits_what_af_packet_serves_and_nothing_else() {
    check_table(Kind::Filter);
    // What the kernel never shows an XDP program.
    let program = Program::load(Kind::Filter);
    for len in 1..14 {
        program.check(&format!("cut to {len} bytes"), &good()[..len], Fate::Rejected(Reject::Truncated));
    }
}

#[test]
fn the_filter_counts_every_datagram_of_a_super_packet() {
    const GSO_SIZE: usize = 176;
    let program = Program::load(Kind::Filter);
    for (payload, segment, datagrams) in [(100, 0, 1), (100, 100, 1), (100, 50, 2), (100, 33, 4), (1, 1, 1)] {
        let frame = udp(SENDER, PACKET_GROUP).payload(&vec![1; payload]).frame();
        // struct __sk_buff, all zero but for the segments' size.
        let mut context = [0u8; 192];
        context[GSO_SIZE..GSO_SIZE + 4].copy_from_slice(&u32::to_ne_bytes(segment));
        let before = program.counters().rules[PACKET as usize];
        assert_eq!(program.run(&frame, Some(&context)), ADMITTED);
        let after = program.counters().rules[PACKET as usize];
        let counted = (after.matched - before.matched, after.matched_bytes - before.matched_bytes);
        assert_eq!(counted, (datagrams, payload as u64), "{payload} bytes by {segment}");
    }
}

#[test]
fn user_space_gives_each_frame_the_same_fate() {
    for row in rows() {
        assert_eq!(fate_in_user_space(&row.frame), row.fate, "{}", row.name);
    }
    // What the kernel never shows a program.
    for len in 0..14 {
        assert_eq!(fate_in_user_space(&good()[..len]), Fate::Rejected(Reject::Truncated), "{len} bytes");
    }
}

#[test]
fn a_datagram_is_parsed_to_what_was_sent() {
    let sent = Udp::new(at(WANTED, 1), at("239.255.0.1", 0xfedc)).ttl(7).dscp(46, 2).payload(&[9; 321]);
    let seen = parse(&&sent.frame()[..]).unwrap();
    assert_eq!((seen.source, seen.group), ([192, 0, 2, 7], [239, 255, 0, 1]));
    assert_eq!((seen.port, seen.ttl, seen.tos), ([0xfe, 0xdc], 7, 46 << 2 | 2));
    assert_eq!((PAYLOAD_OFFSET, seen.payload_len), (PAYLOAD, 321));
}

/// A tag as it stands at the beginning of a frame.
fn bytes_of(tag: Tag) -> Vec<u8> {
    tag.to_words().iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// Keeps this thread on one CPU, which counts for itself.
fn stay_on_one_cpu() {
    let mut set = nix::sched::CpuSet::new();
    set.set(nix::sched::sched_getcpu().expect("a CPU")).expect("a CPU");
    nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &set).expect("stay on one CPU");
}

#[test]
fn a_redirected_frame_is_numbered_and_ends_with_its_datagram() {
    let program = Program::load(Kind::Steering);
    let xdp: &Xdp = program.ebpf.program(abi::PROGRAM).expect("the program").try_into().expect("XDP");
    let mut padded = udp(SENDER, REDIRECT_GROUP).payload(&[1, 2]).frame();
    padded.resize(60, 0xff);
    let mut short = udp(SENDER, REDIRECT_GROUP).payload(&[3; 100]).frame();
    put(&mut short, UDP + 4, 8 + 50);
    let whole = udp(SENDER, REDIRECT_GROUP).payload(&[4; 1472]).frame();
    stay_on_one_cpu();
    for (sequence, (frame, len)) in (1..).zip([(&padded, 44), (&short, 92), (&whole, 1514), (&padded, 44)]) {
        let mut out = [0; 2048];
        let options =
            TestRunOptions { data_in: Some(frame), data_out: Some(&mut out), ..TestRunOptions::new() };
        let result = xdp.test_run(options).expect("BPF_PROG_TEST_RUN");
        assert_eq!(result.return_value, XDP_REDIRECT);
        let (tag, sent) = out[..result.data_size_out as usize].split_at(TAG_LEN);
        assert_eq!(tag, bytes_of(Tag { sequence, fan: redirect::fan(REDIRECT, BANK) }));
        assert_eq!(sent, &frame[TAG_LEN..len]);
    }
}

#[test]
fn what_was_found_for_a_datagram_is_forgotten_when_flows_change() {
    stay_on_one_cpu();
    let mut program = Program::load(Kind::Steering);
    let mut generation = 1;
    let mut change = |program: &mut Program, key: FlowKey4, value: Option<FlowValue>| {
        let mut flows: HashMap<_, FlowKey4, FlowValue> =
            program.ebpf.map_mut(map::FLOWS_V4).expect("the flows' map").try_into().expect("a hash map");
        match value {
            Some(value) => flows.insert(key, value, 0).expect("insert a flow"),
            None => flows.remove(&key).expect("remove a flow"),
        }
        let mut table: Array<_, FlowTable> =
            program.ebpf.map_mut(map::FLOW_TABLE).expect("their table").try_into().expect("an array");
        generation += 1;
        table.set(0, FlowTable { for_one_source: 1, generation }, 0).expect("tell of the change");
    };
    let port = PORT.to_be_bytes();
    let any_source = FlowKey4::any_source([239, 1, 1, 1], port);
    let from_sender = FlowKey4::source_group([198, 51, 100, 9], [239, 1, 1, 1], port);
    let steer = |rule| FlowValue { rule, action: action::STEER };
    let bytes = 100;
    // Another stream that is remembered in the same place.
    let other = udp(SENDER, "239.1.1.65").frame();
    for _ in 0..2 {
        program.check("found", &good(), Fate::Steer(ANY_SOURCE, bytes));
        program.check("found again", &good(), Fate::Steer(ANY_SOURCE, bytes));
        program.check("none found", &other, Fate::NoRule);
        program.check("none found again", &other, Fate::NoRule);
    }
    change(&mut program, from_sender, Some(steer(SSM)));
    program.check("its source has a rule now", &good(), Fate::Steer(SSM, bytes));
    change(&mut program, any_source, None);
    program.check("another flow is gone", &good(), Fate::Steer(SSM, bytes));
    change(&mut program, from_sender, None);
    program.check("its flow is gone", &good(), Fate::NoRule);
    change(&mut program, any_source, Some(FlowValue { rule: PACKET, action: action::PASS }));
    program.check("it has another one", &good(), Fate::AfPacket(PACKET, bytes));
}

#[test]
fn a_frame_goes_to_the_socket_of_its_own_queue() {
    let namespace = Namespace::new("queues");
    namespace.ip(&[
        "link add name veth0 numrxqueues 2 numtxqueues 2 type veth peer name veth1 numrxqueues 2 numtxqueues 2",
        "link set veth0 up",
        "link set veth1 up",
    ]);
    let program = Program::load(Kind::Steering);
    let actions = namespace.run(|| {
        let index = nix::net::if_::if_nametoindex("veth0").expect("interface index");
        [0u32, 1].map(|queue| {
            // struct xdp_md: data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress_ifindex.
            let context = [0, good().len() as u32, 0, index, queue, 0];
            let context: Vec<u8> = context.iter().flat_map(|word| word.to_ne_bytes()).collect();
            program.run(&good(), Some(&context))
        })
    });
    assert_eq!(actions, [XDP_REDIRECT, XDP_PASS]);
    let counters = program.counters();
    let rule = counters.rules[ANY_SOURCE as usize];
    assert_eq!((rule.matched, rule.no_worker), (2, 1));
}

/// Any frame of the table, with bytes overwritten and the end cut or grown; half of them with the
/// IP checksum put right, so that what is behind it is reached.
fn mutated_frame() -> impl Strategy<Value = Vec<u8>> {
    let rows: Vec<Vec<u8>> = rows().into_iter().map(|row| row.frame).collect();
    let edits = proptest::collection::vec((0..64usize, any::<u8>()), 0..4);
    (proptest::sample::select(rows), edits, 14..200usize, any::<bool>(), any::<bool>()).prop_map(
        |(mut frame, edits, len, resize, fix)| {
            for (at, byte) in edits {
                if let Some(target) = frame.get_mut(at) {
                    *target = byte;
                }
            }
            if resize {
                frame.resize(len, 0);
            }
            if fix && frame.len() >= UDP {
                fix_ip_checksum(&mut frame);
            }
            frame
        },
    )
}

/// The parser neither panics nor accepts a payload outside the frame, nor one that etherparse reads
/// differently.
fn check_parsed(frame: &[u8]) -> Result<(), TestCaseError> {
    let Ok(datagram) = parse(&frame) else { return Ok(()) };
    let end = PAYLOAD_OFFSET + usize::from(datagram.payload_len);
    prop_assert!(end <= frame.len());
    let packet = SlicedPacket::from_ethernet(frame)
        .map_err(|error| TestCaseError::fail(format!("accepted, but {error}")))?;
    let (Some(NetSlice::Ipv4(ip)), Some(TransportSlice::Udp(udp))) = (&packet.net, &packet.transport) else {
        return Err(TestCaseError::fail("accepted, but no UDP over IPv4"));
    };
    prop_assert_eq!(ip.header().source(), datagram.source);
    prop_assert_eq!(ip.header().destination(), datagram.group);
    prop_assert_eq!(udp.destination_port().to_be_bytes(), datagram.port);
    prop_assert_eq!(udp.payload(), &frame[PAYLOAD_OFFSET..end]);
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(20_000) })]

    #[test]
    fn random_bytes_are_parsed_safely(frame in proptest::collection::vec(any::<u8>(), 0..256)) {
        check_parsed(&frame)?;
    }

    #[test]
    fn mutated_frames_are_parsed_safely(frame in mutated_frame()) {
        check_parsed(&frame)?;
    }
}

#[test]
fn kernel_and_user_space_agree_on_mutated_frames() {
    for kind in [Kind::Steering, Kind::Filter] {
        let program = Program::load(kind);
        let config = ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(5_000) };
        let agree = TestRunner::new(config).run(&mutated_frame(), |frame| {
            program.check("a mutated frame", &frame, fate_in_user_space(&frame));
            Ok(())
        });
        agree.unwrap();
    }
}
