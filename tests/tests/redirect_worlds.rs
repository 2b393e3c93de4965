//! Rules that the kernel serves by itself, through the daemon, while the world around them changes: what leaves is exact
//! and bears the right headers, what does not is counted under its name, and nothing is doubled.

#![expect(clippy::unwrap_used, reason = "where it fails, the test fails and says where")]

use std::{
    fs::File,
    io::Read,
    net::{Ipv4Addr, SocketAddrV4, UdpSocket},
    ops::Range,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    time::Duration,
};

use mcr::api::wire::{Health, OutputStats, RuleInfo, RuleShow, RuleStats, count};
use nix::sys::socket::{setsockopt, sockopt};
use tests::{
    Capture, Captured, Ground, RawSender, Relay, Site, Source, Udp,
    bpf::ForeignXdp,
    capture::{assert_sequence, sha256},
    frame::multicast_mac,
    site::{ETH, Plan, take_redirected},
    source::Stream,
    traffic::Generator,
    wait::PATIENCE,
    wait_for, wait_until,
};

const GROUP: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(239, 1, 1, 1), 5000);
const OTHER: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(239, 1, 1, 2), 5000);
const PORT: u16 = 40_404;
const SIZE: usize = 700;

/// A site whose sinks take redirected frames.
fn site() -> Site {
    Site::build(Plan { ground: Ground::Kernel, ..Plan::default() })
}

fn at(address: &str) -> SocketAddrV4 {
    address.parse().unwrap()
}

fn mac(host: &tests::Namespace, interface: &str) -> [u8; 6] {
    let link = host.json("ip", &["-j", "link", "show", interface]);
    let bytes: Vec<_> = link[0]["address"]
        .as_str()
        .unwrap()
        .split(':')
        .map(|byte| u8::from_str_radix(byte, 16).unwrap())
        .collect();
    bytes.try_into().unwrap()
}

/// What a [`Source`] sends as its datagram of this number.
fn payload(sequence: u64) -> Vec<u8> {
    let mut payload = vec![0xa5; SIZE];
    payload[..8].copy_from_slice(&sequence.to_be_bytes());
    payload[SIZE - 1] = sequence as u8;
    payload
}

/// The sum of what a source sent.
fn sent_sha256(count: u64) -> String {
    let payloads: Vec<_> = (0..count).map(payload).collect();
    sha256(payloads.iter().map(|payload| &payload[..]))
}

/// A socket of a sink that is joined to a group: the kernel gives it what has no fault alone.
fn strict_receiver(site: &Site, sink: usize, to: SocketAddrV4) -> UdpSocket {
    let socket = site.sinks[sink].host.run(|| {
        let socket = UdpSocket::bind(SocketAddrV4::new(*to.ip(), to.port())).unwrap();
        socket.join_multicast_v4(to.ip(), &site.sinks[sink].address).unwrap();
        socket
    });
    setsockopt(&socket, sockopt::RcvBufForce, &(16 << 20)).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    socket
}

/// What an output says of its datagrams: its options, and the TTL and DSCP that one of TTL 8 and DSCP 46 leaves with. A source
/// of its own is 10.78.K.1:7000.
const OPTIONS: [(&str, u8, u8); 7] = [
    ("", 16, 46),
    (",ttl=dec", 7, 46),
    (",ttl=copy,dscp=10", 8, 10),
    (",ttl=200,dscp=0", 200, 0),
    (",from=", 16, 46),
    (",dscp=copy,gso=false", 16, 46),
    (",ttl=1,dscp=63,from=", 1, 63),
];

#[test]
fn outputs_in_every_order_get_every_datagram_with_headers_of_their_own() {
    const PLAYED: u64 = 500;
    // Of another sender, with their checksums finished, and without.
    const MADE: u64 = 60;
    const ALL: u64 = PLAYED + 2 * MADE;
    let site = site();
    // `auto` would leave ten outputs of one device to workers.
    let relay = Relay::start_with(&site, &["--source-port", "40404", "--datapath", "redirect"]);
    let macs: Vec<_> = site.sinks.iter().map(|sink| mac(&site.relay, &sink.interface)).collect();
    for (row, order) in [
        &[0][..],
        &[0, 0, 1],
        &[0, 0, 0, 0],
        &[0, 1, 2, 0],
        &[0, 1, 0, 0, 1],
        &[0; 10],
        &[0, 1, 2, 2, 1, 0, 0, 1, 2, 0],
    ]
    .into_iter()
    .enumerate()
    {
        let name = format!("row{row}");
        let to = |index: usize| SocketAddrV4::new(Ipv4Addr::new(239, 2, row as u8, index as u8), 6000);
        let endpoint = |(index, sink): (usize, &usize)| {
            let options = OPTIONS[(row + index) % OPTIONS.len()].0;
            let own = if options.ends_with('=') { format!("10.78.{sink}.1:7000") } else { String::new() };
            format!("{}@out{sink}{options}{own}", to(index))
        };
        let outputs: Vec<_> = order.iter().enumerate().map(endpoint).collect();
        let rule =
            relay.add(&name, "239.1.1.1:5000@in0", &outputs.iter().map(String::as_str).collect::<Vec<_>>());
        assert_eq!(rule.datapath.as_deref(), Some("redirect"));
        site.segments[0].wait_until_joined(*GROUP.ip());
        let mut captures: Vec<_> = (0..3).map(|sink| site.capture(sink)).collect();
        let last = order.len() - 1;
        let strict = strict_receiver(&site, order[last], to(last));

        // A burst to ten outputs of one device is to fit into its ring.
        let stream = Stream {
            count: PLAYED,
            rate: 2_000,
            size: SIZE,
            tos: 46 << 2 | 1,
            burst: 12,
            ..Stream::to(GROUP)
        };
        Source::play(site.source(), stream);
        let udp = Udp::new(SocketAddrV4::new(site.segments[0].source_address, 999), GROUP).ttl(8).dscp(46, 1);
        let frames = (PLAYED..ALL).map(|sequence| {
            let mut frame = udp.clone().payload(&payload(sequence)).frame();
            if sequence % 2 == 0 {
                frame[tests::frame::UDP + 6..tests::frame::UDP + 8].fill(0);
            }
            frame
        });
        RawSender::new(site.source(), ETH).play(frames, 1_000);

        for (index, sink) in order.iter().enumerate() {
            let what = format!("{order:?}, output {}", outputs[index]);
            let datagrams = captures[*sink].exactly(to(index), ALL as usize);
            assert_sequence(&datagrams, 0..ALL);
            assert_eq!(sha256(datagrams.iter().map(|one| &one.payload[..])), sent_sha256(ALL), "{what}");
            let (options, ttl, dscp) = OPTIONS[(row + index) % OPTIONS.len()];
            let port = if options.ends_with('=') { 7000 } else { PORT };
            let expected = Captured {
                source: SocketAddrV4::new(site.sinks[*sink].relay_address, port),
                destination: to(index),
                destination_mac: multicast_mac(*to(index).ip()),
                source_mac: macs[*sink],
                ttl,
                dscp,
                ecn: 0,
                dont_fragment: true,
                id: 0,
                fragment: false,
                checksum_holds: true,
                payload: Vec::new(),
            };
            for datagram in datagrams {
                assert_eq!(Captured { payload: Vec::new(), ..datagram }, expected, "{what}");
            }
        }
        for (sink, capture) in captures.iter_mut().enumerate() {
            let expected = order.iter().filter(|to| **to == sink).count() * ALL as usize;
            assert_eq!(capture.all().len(), expected, "{order:?}: at sink {sink}");
        }
        let mut buffer = [0; 2048];
        for sequence in 0..ALL {
            let len = strict.recv(&mut buffer).unwrap();
            assert_eq!(buffer[..len], payload(sequence), "{order:?}: to a socket");
        }
        let stats = relay.balanced(&name, ALL);
        assert_eq!((stats.received, stats.received_bytes), (ALL, ALL * SIZE as u64));
        for (output, endpoint) in stats.outputs.iter().zip(&outputs) {
            let counted = (output.received, output.sent, output.sent_bytes);
            assert_eq!(counted, (ALL, ALL, ALL * SIZE as u64), "{endpoint}");
            assert!(output.dropped.is_empty(), "{output:?}");
        }
        relay.remove(&name);
        site.segments[0].wait_until_left(*GROUP.ip());
    }
    assert!(relay.workers().is_empty() && relay.stats().alarms.is_empty());
}

/// Two outputs on `out0` and one on `out1` of the rule under test, and a rule with one on `out2`, which nothing is to disturb.
const FIRST: &str = "239.2.2.1:6000@out0";
const SECOND: &str = "239.2.2.2:6000@out0,ttl=dec";
const THIRD: &str = "239.2.2.3:6000@out1,from=10.78.1.1:7000";
const SPARED: &str = "239.2.2.4:6000@out2";

/// What is at `@` of an output.
fn destination(output: &str) -> SocketAddrV4 {
    at(output.split('@').next().unwrap())
}

/// Both rules under way, by the kernel.
struct World<'a> {
    relay: &'a Relay<'a>,
    struck: Source,
    spared: Source,
    sinks: [Capture; 3],
}

impl<'a> World<'a> {
    #[track_caller]
    fn start(site: &Site, relay: &'a Relay<'a>, outputs: &[&str]) -> Self {
        let by_kernel = |rule: RuleInfo| assert_eq!(rule.datapath.as_deref(), Some("redirect"), "{rule:?}");
        by_kernel(relay.add("struck", &format!("{GROUP}@in0"), outputs));
        by_kernel(relay.add("spared", &format!("{OTHER}@in0"), &[SPARED]));
        for group in [GROUP, OTHER] {
            site.segments[0].wait_until_joined(*group.ip());
        }
        let mut sinks = [0, 1, 2].map(|sink| site.capture(sink));
        let [struck, spared] =
            [GROUP, OTHER].map(|to| Source::start(site.source(), Stream { size: SIZE, ..Stream::to(to) }));
        sinks[2].at_least(destination(SPARED), 500);
        Self { relay, struck, spared, sinks }
    }

    fn output(&self, index: usize) -> OutputStats {
        self.relay.rule("struck").outputs.remove(index)
    }

    /// Takes what has arrived, so that the captures have room.
    fn drain(&mut self) {
        for sink in &mut self.sinks {
            let _ = sink.all();
        }
    }

    /// Waits until the rule goes by a datapath for a reason that has these words on every screen, and goes on.
    #[track_caller]
    fn moves_to(&mut self, what: &str, datapath: &str, words: &str) {
        wait_until(&format!("{what}: the rule goes by {datapath}"), PATIENCE, || {
            let rule = self.relay.show("struck");
            rule.datapath.as_deref() == Some(datapath) && rule.health == Health::Active
        });
        let rule = self.relay.json::<RuleShow>(&["rule", "show", "struck"]).rule;
        assert!(rule.datapath_why.contains(words), "{what}: no '{words}' in {rule:?}");
        let screen = self.relay.cli(&["rule", "show", "struck"]);
        let said = screen.ok().split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(said.contains(words), "{what}: no '{words}' in {screen}");
        let of_rule = |line: &&str| line.contains("rule moved: ") && line.contains("rule=struck");
        let log = self.relay.log();
        let last = log.lines().rfind(of_rule);
        let to = format!("to={datapath}");
        assert!(last.is_some_and(|line| line.contains(words) && line.ends_with(&to)), "{what}: {log}");
        let listed = self.relay.show_all();
        assert!(listed.iter().all(|rule| rule.health == Health::Active), "{what}: {listed:?}");
        // Neither rules nor outputs of other interfaces have anything to do with it.
        assert_eq!(self.relay.show("spared").datapath.as_deref(), Some("redirect"), "{what}");
        self.drain();
        let before = [0, 1, 2].map(|index| self.output(index).sent);
        self.struck.wait_for_more(1_000);
        wait_until(&format!("{what}: every output goes on"), PATIENCE, || {
            (0..3).all(|index| self.output(index).sent >= before[index] + 900)
        });
    }

    /// Ends the streams. The rule beside has lost nothing; of the one under test all that was sent is in the ledger, under these
    /// names at each output, and each output's sink has each datagram that it says it sent, once.
    #[track_caller]
    fn finish(self, names: [&[&str]; 3]) -> (RuleStats, [Vec<Captured>; 3]) {
        self.finish_but(names, &[])
    }

    /// As [`Self::finish`], where the kernel may have lost what it took while these were sent.
    #[track_caller]
    fn finish_but(self, names: [&[&str]; 3], gone: &[Range<u64>]) -> (RuleStats, [Vec<Captured>; 3]) {
        let Self { relay, struck, spared, sinks: mut captures } = self;
        let (sent, spared) = (struck.stop(), spared.stop());
        assert_eq!(relay.balanced("spared", spared).outputs[0].sent, spared);
        assert_sequence(&captures[2].exactly(destination(SPARED), spared as usize), 0..spared);
        let stats = relay.balanced("struck", sent);
        let between = stats.dropped.values().sum::<u64>();
        let lost = tests::relay::lost(&relay.interface("in0"));
        println!("of {sent}, {between} between two datapaths, {lost} on the interface; {:?}", stats.outputs);
        let mut seen = [Vec::new(), Vec::new(), Vec::new()];
        for (index, output) in stats.outputs.iter().enumerate() {
            assert_eq!(output.received, stats.received, "{output:?}");
            let names = names[index];
            assert!(
                output.dropped.keys().all(|name| names.contains(&name.as_str())),
                "{names:?}: {output:?}"
            );
            let sink = usize::from(output.to.contains("@out1"));
            let to = destination(&output.to);
            let is_last = |one: &Captured| one.destination == to && one.sequence() == sent - 1;
            wait_until("the last has arrived", PATIENCE, || captures[sink].all().iter().rev().any(is_last));
            if gone.is_empty() {
                captures[sink].exactly(to, output.sent as usize);
            }
            seen[index] = captures[sink].to(to);
            let mut numbers: Vec<_> = seen[index].iter().map(Captured::sequence).collect();
            numbers.sort_unstable();
            let lost = output.sent - numbers.len() as u64;
            let missing = (0..sent).filter(|number| numbers.binary_search(number).is_err());
            let missing = missing.filter(|number| gone.iter().any(|range| range.contains(number)));
            assert!(lost <= missing.count() as u64, "{lost} of {output:?} have not arrived");
            assert!(numbers.windows(2).all(|pair| pair[0] < pair[1]), "{}: doubled", output.to);
            assert!(seen[index].iter().all(|datagram| datagram.checksum_holds));
        }
        assert_eq!(relay.stats().alarms, []);
        assert!(!relay.log().contains("ledger:") && !relay.log().contains("panicked"), "{}", relay.log());
        (stats, seen)
    }
}

#[test]
fn another_mac_or_address_of_an_egress_interface_is_in_the_headers_and_nothing_is_lost() {
    const MAC: [u8; 6] = [2, 0, 0, 0, 0xaa, 0xbb];
    let site = site();
    let relay = Relay::start_with(&site, &["--source-port", "40404"]);
    site.relay.ip(&["addr add 10.79.0.7/24 dev out0"]);
    let own = "239.2.2.2:6000@out0,ttl=dec,from=10.79.0.7:7000";
    let mut world = World::start(&site, &relay, &[FIRST, own, THIRD]);
    let former = mac(&site.relay, "out0");
    let last_of = |world: &mut World<'_>, to: SocketAddrV4| world.sinks[0].to(to).pop();
    for (line, address, mac) in [
        ("link set out0 address 02:00:00:00:aa:bb", "10.78.0.1", MAC),
        // The one that goes had a successor.
        ("addr del 10.78.0.1/24 dev out0", "10.79.0.7", MAC),
        ("addr add 10.78.0.9/24 dev out0", "10.79.0.7", MAC),
    ] {
        world.struck.wait_for_more(500);
        site.relay.ip(&[line]);
        wait_until(line, Duration::from_secs(1), || {
            last_of(&mut world, destination(FIRST))
                .is_some_and(|last| last.source_mac == mac && last.source.ip().to_string() == address)
        });
    }
    assert_eq!(relay.show("struck").datapath.as_deref(), Some("redirect"));
    // An address of its own that the host no longer has.
    site.relay.ip(&["addr del 10.79.0.7/24 dev out0"]);
    let why = "10.79.0.7 is no address of this host";
    wait_until(why, PATIENCE, || relay.show("struck").outputs[1].reason.as_deref() == Some(why));
    let before = world.output(1);
    world.struck.wait_for_more(500);
    wait_until("it is counted as pending", PATIENCE, || {
        let now = world.output(1);
        assert_eq!(now.sent, before.sent);
        now.dropped.get("pending").is_some_and(|count| *count >= 500)
    });
    site.relay.ip(&["addr add 10.79.0.7/24 dev out1"]);
    relay.wait_until_active("struck");
    world.struck.wait_for_more(500);
    assert!(relay.workers().is_empty());
    let (stats, seen) = world.finish([&[], &["pending"], &[]]);
    let sent = stats.matched;
    assert_sequence(&seen[0], 0..sent);
    assert_sequence(&seen[2], 0..sent);
    let mut headers: Vec<_> = seen[0].iter().map(|one| (one.source_mac, one.source)).collect();
    headers.dedup();
    let source = |address: &str| SocketAddrV4::new(address.parse().unwrap(), PORT);
    let expected = [(former, "10.78.0.1"), (MAC, "10.78.0.1"), (MAC, "10.79.0.7"), (MAC, "10.78.0.9")]
        .map(|(mac, address)| (mac, source(address)));
    assert_eq!(headers, expected);
    assert!(seen[1].iter().all(|one| one.source == at("10.79.0.7:7000") && one.ttl == 7));
}

#[test]
fn an_mtu_that_shrinks_and_grows_drops_what_is_too_big_for_its_outputs_alone() {
    let site = site();
    let relay = Relay::start(&site);
    let world = World::start(&site, &relay, &[FIRST, SECOND, THIRD]);
    // Beside the stream of 700 bytes one that fits always, told apart by its port.
    let small = Stream { size: 100, port: 40_100, ..Stream::to(GROUP) };
    let small = Source::start(site.source(), small);
    for mtu in [600, 1500, 728, 727, 1500] {
        let fits = mtu >= SIZE as u32 + 28;
        site.relay.ip(&[&format!("link set out0 mtu {mtu}")]);
        wait_until("it is noticed", PATIENCE, || relay.log().contains(&format!("mtu={mtu}")));
        let count = |output: &OutputStats| output.dropped.get("too_big").copied().unwrap_or(0);
        let before = [0, 1].map(|index| world.output(index));
        world.struck.wait_for_more(500);
        if fits {
            wait_until("they leave again", PATIENCE, || world.output(1).sent >= before[1].sent + 500);
        } else {
            wait_until("they are too big", PATIENCE, || {
                [0, 1].iter().all(|&index| count(&world.output(index)) >= count(&before[index]) + 500)
            });
        }
    }
    assert!(relay.workers().is_empty());
    let (sent, small) = (world.struck.sent(), small.stop());
    assert!(sent > 0);
    // The rule has both streams.
    let World { struck, spared, sinks: mut captures, .. } = world;
    let (sent, spared) = (struck.stop(), spared.stop());
    assert_eq!(relay.balanced("spared", spared).outputs[0].sent, spared);
    let stats = relay.balanced("struck", sent + small);
    for (index, sink) in [(0, 0), (1, 0), (2, 1)] {
        let output = &stats.outputs[index];
        let seen = captures[sink].exactly(destination(&output.to), output.sent as usize);
        let (short, long): (Vec<_>, Vec<_>) = seen.into_iter().partition(|one| one.payload.len() == 100);
        assert_sequence(&short, 0..small);
        assert!(
            long.windows(2).all(|pair| pair[0].sequence() < pair[1].sequence()),
            "doubled or out of order"
        );
        let missing = sent - long.len() as u64;
        assert_eq!(missing, output.dropped.values().sum::<u64>(), "{output:?}");
        // Until the relay hears of a smaller one, the kernel skips in silence.
        let known = |name: &String| sink == 0 && ["too_big", "skipped"].contains(&name.as_str());
        assert!(output.dropped.keys().all(known), "{output:?}");
        println!("{}: {missing} of {sent} missing, {:?}", output.to, output.dropped);
    }
    assert_eq!(relay.stats().alarms, []);
}

#[test]
fn a_rule_goes_by_workers_while_a_device_takes_no_redirected_frames() {
    let site = site();
    let relay = Relay::start(&site);
    let mut world = World::start(&site, &relay, &[FIRST, SECOND, THIRD]);
    let host = &site.sinks[0].host;
    let objection = "out0 (veth) takes no redirected frames: its other end needs an XDP program or GRO, `ethtool -K \
                     INTERFACE gro on` there";
    for _ in 0..2 {
        host.output("ethtool", &["-K", ETH, "gro", "off"]);
        world.moves_to("GRO off", "af-xdp", objection);
        // As it says.
        take_redirected(host, ETH);
        world.moves_to("GRO on", "redirect", "auto lets the kernel do it");
    }
    host.output("ethtool", &["-K", ETH, "gro", "off"]);
    world.moves_to("GRO off", "af-xdp", objection);
    let receiver = ForeignXdp::attach(host, ETH);
    world.moves_to("a program at the other end", "redirect", "auto lets the kernel do it");
    drop(receiver);
    world.moves_to("without the program", "af-xdp", objection);
    // The kernel says nothing until it is asked.
    world.finish([&["skipped"], &["skipped"], &[]]);
}

/// Datagrams that come in bursts, which by ten outputs do not fit the device's queue.
#[test]
fn auto_leaves_what_a_burst_would_overflow_to_workers_and_loses_nothing() {
    const COUNT: u64 = 600;
    let site = site();
    let relay = Relay::start(&site);
    let outputs: Vec<_> = (0..10).map(|n| format!("239.2.2.{n}:6000@out0")).collect();
    let outputs: Vec<_> = outputs.iter().map(String::as_str).collect();
    site.source().output("ethtool", &["-K", ETH, "tx-udp-segmentation", "off"]);
    let play = || {
        let args = ["--rate", "400000", "--size", "700", "--gso", "--count", &COUNT.to_string()];
        let sent = Generator::start(site.source(), "239.1.1.1:5000@eth0", &args).finish();
        assert_eq!(sent.count(), COUNT);
        relay.balanced("cam1", COUNT);
    };
    let lost_in_device = || {
        let devices = relay.stats().devices;
        let device = devices.iter().find(|device| device.name == "out0");
        device.and_then(|device| device.link.get("tx_dropped").copied()).unwrap_or(0)
    };

    relay.add("cam1", "239.1.1.1:5000@in0", &outputs[..4]);
    assert_eq!(relay.show("cam1").datapath.as_deref(), Some("redirect"));
    relay.remove("cam1");
    let rule = relay.add_with("cam1", "239.1.1.1:5000@in0", &outputs, &["--datapath", "auto"]);
    assert_eq!(rule.datapath.as_deref(), Some("af-xdp"));
    let why = "a burst of 64 datagrams would be 640 frames by its 10 outputs on out0, whose queue takes 256";
    assert!(rule.datapath_why.contains(why), "{rule:?}");
    site.segments[0].wait_until_joined(*GROUP.ip());
    let mut capture = site.capture(0);
    play();
    for output in &outputs {
        capture.exactly(destination(output), COUNT as usize);
    }
    assert_eq!(lost_in_device(), 0);
    relay.remove("cam1");

    // By name it is taken, and what that costs is said.
    let rule = relay.add_with("cam1", "239.1.1.1:5000@in0", &outputs, &["--datapath", "redirect"]);
    let why = format!("asked for by name, which auto would not: {why}");
    assert!(rule.datapath_why.starts_with(&why), "{rule:?}");
    site.segments[0].wait_until_joined(*GROUP.ip());
    let mut capture = site.capture(0);
    play();
    wait_until("what the device took has arrived", PATIENCE, || {
        capture.all().len() as u64 + lost_in_device() == 10 * COUNT
    });
    assert!(lost_in_device() > 0);
    let screen = relay.cli(&["status"]).stdout;
    assert!(screen.contains(&format!("{} that out0 was given to send", count(lost_in_device()))), "{screen}");
    let diagnosis = relay.cli(&["doctor", "out0"]).stdout;
    assert!(diagnosis.contains(" set cam1 --datapath af-xdp"), "{diagnosis}");
    let stats = relay.rule("cam1");
    assert!(
        stats.outputs.iter().all(|output| output.sent == COUNT && output.dropped.is_empty()),
        "{stats:?}"
    );
}

/// A veth does not hear that its other end loses GRO while that is down: it is given frames that it then refuses.
#[test]
fn what_a_device_refuses_though_it_said_it_would_take_it_is_a_row_of_the_device() {
    let site = site();
    let relay = Relay::start(&site);
    let mut world = World::start(&site, &relay, &[FIRST, SECOND, THIRD]);
    let host = &site.sinks[0].host;
    host.ip(&[&format!("link set {ETH} down")]);
    host.output("ethtool", &["-K", ETH, "gro", "off"]);
    host.ip(&[&format!("link set {ETH} up")]);
    relay.wait_until_active("struck");
    let refused = || {
        let devices = relay.stats().devices;
        let device = devices.iter().find(|device| device.name == "out0").unwrap();
        device.link.get("tx_dropped").copied().unwrap_or(0)
    };
    let before = refused();
    world.struck.wait_for_more(500);
    wait_until("the device has refused them", PATIENCE, || refused() >= before + 1_000);
    assert_eq!(relay.show("struck").datapath.as_deref(), Some("redirect"));
    take_redirected(host, ETH);
    let arrived = world.sinks[0].count(destination(FIRST));
    world.sinks[0].at_least(destination(FIRST), arrived + 500);
    let World { struck, spared, sinks: [mut struck_sink, mut third, mut last], .. } = world;
    let (sent, spared) = (struck.stop(), spared.stop());
    assert_eq!(relay.balanced("spared", spared).outputs[0].sent, spared);
    assert_sequence(&last.exactly(destination(SPARED), spared as usize), 0..spared);
    let outputs = relay.balanced("struck", sent).outputs;
    assert_sequence(&third.exactly(destination(THIRD), sent as usize), 0..sent);
    wait_until("each datagram has arrived or was refused", PATIENCE, || {
        let arrived = [FIRST, SECOND].map(|to| struck_sink.count(destination(to)) as u64);
        arrived.iter().sum::<u64>() + refused() == outputs[0].sent + outputs[1].sent
    });
    for output in &outputs {
        let known = |name: &String| ["pending", "skipped"].contains(&name.as_str());
        assert!(output.dropped.keys().all(known), "{output:?}");
    }
    assert_eq!(relay.stats().alarms, []);
}

#[test]
fn a_rule_by_name_stays_says_what_is_in_its_way_and_resumes() {
    let site = site();
    let relay = Relay::start_with(&site, &["--datapath", "redirect"]);
    let world = World::start(&site, &relay, &[FIRST, SECOND, THIRD]);
    let host = &site.sinks[0].host;
    for _ in 0..2 {
        host.output("ethtool", &["-K", ETH, "gro", "off"]);
        wait_until("it says so", PATIENCE, || relay.show("struck").health == Health::Failed);
        let rule = relay.show("struck");
        let why = "the kernel cannot send it on by itself: out0 (veth) takes no redirected frames";
        assert!(rule.reason.as_ref().is_some_and(|reason| reason.contains(why)), "{rule:?}");
        assert_eq!(rule.datapath.as_deref(), Some("redirect"));
        let skipped = |index| world.output(index).dropped.get("skipped").copied().unwrap_or(0);
        let before = [0, 1].map(skipped);
        world.struck.wait_for_more(500);
        wait_until("it is counted", PATIENCE, || (0..2).all(|index| skipped(index) >= before[index] + 500));
        take_redirected(host, ETH);
        relay.wait_until_active("struck");
        let before = world.output(0).sent;
        wait_until("it resumes", PATIENCE, || world.output(0).sent >= before + 500);
    }
    // What is named passes by a firewall: that is what was asked for.
    site.relay.output(
        "nft",
        &["table ip guard { chain way-out { type filter hook output priority 0; counter; }; }"],
    );
    world.struck.wait_for_more(2_500);
    assert_eq!(relay.show("struck").datapath.as_deref(), Some("redirect"));
    assert!(relay.workers().is_empty());
    world.finish([&["skipped"], &["skipped"], &[]]);
}

#[test]
fn a_rule_goes_by_workers_while_a_firewall_or_shaping_is_in_place() {
    let site = site();
    let relay = Relay::start(&site);
    let mut world = World::start(&site, &relay, &[FIRST, SECOND, THIRD]);
    let run = |program: &str, line: &str| {
        let args = if program == "nft" { vec![line] } else { line.split(' ').collect() };
        site.relay.output(program, &args);
    };
    let netdev =
        "table netdev guard { chain way-out { type filter hook egress device out1 priority 0; counter; }; }";
    let [tbf0, tbf1] =
        [0, 1].map(|k| format!("qdisc add dev out{k} root tbf rate 1gbit burst 1mb limit 1mb"));
    let rows = [
        (
            "nft",
            netdev,
            "delete table netdev guard",
            "not redirect: nftables has rules in its egress chain 'way-out' (table netdev guard)",
        ),
        ("tc", &tbf0, "qdisc del dev out0 root", "not redirect: out0 is shaped by tbf"),
        ("tc", &tbf1, "qdisc del dev out1 root", "not redirect: out1 is shaped by tbf"),
    ];
    let mut gone = Vec::new();
    for (program, put, take, why) in rows {
        run(program, put);
        world.moves_to(why, "af-xdp", why);
        let before = world.struck.sent().saturating_sub(32);
        run(program, take);
        // While a qdisc goes, the kernel drops what it is given, and counts it nowhere.
        gone.extend((program == "tc").then(|| before..world.struck.sent() + 1));
        world.moves_to("nothing in the way", "redirect", "auto lets the kernel do it");
    }
    world.finish_but([&[], &[], &[]], &gone);
    // A chain for all interfaces is in the way of both rules.
    run("nft", "table ip guard { chain way-out { type filter hook output priority 0; oif out0 counter; }; }");
    let both = ["struck", "spared"];
    let why = "not redirect: nftables has rules in its output chain 'way-out' (table ip guard)";
    let go_by =
        |datapath: &str| both.iter().all(|name| relay.show(name).datapath.as_deref() == Some(datapath));
    wait_until("both move", PATIENCE, || go_by("af-xdp"));
    assert!(both.iter().all(|name| relay.show(name).datapath_why.contains(why)), "{:?}", relay.show_all());
    run("nft", "delete table ip guard");
    wait_until("both are back", PATIENCE, || go_by("redirect"));
}

/// Keeps what comes out of a tap.
struct Tap {
    file: File,
    seen: Vec<Vec<u8>>,
}

impl Tap {
    /// A tap of the relay host, with an address, up.
    fn make(site: &Site, name: &str) -> Self {
        #[repr(C)]
        struct Request {
            name: [u8; 16],
            flags: i16,
            rest: [u8; 22],
        }
        const TUNSETIFF: libc::Ioctl = 0x4004_54ca;
        let file = site.relay.run(|| {
            // SAFETY: the path is a string that ends with 0.
            let fd = unsafe {
                libc::open(c"/dev/net/tun".as_ptr(), libc::O_RDWR | libc::O_NONBLOCK | libc::O_CLOEXEC)
            };
            assert!(fd >= 0, "/dev/net/tun: {}", std::io::Error::last_os_error());
            // SAFETY: the kernel just made this descriptor for the caller alone.
            let fd = unsafe { OwnedFd::from_raw_fd(fd) };
            let mut request =
                Request { name: [0; 16], flags: (libc::IFF_TAP | libc::IFF_NO_PI) as i16, rest: [0; 22] };
            request.name[..name.len()].copy_from_slice(name.as_bytes());
            // SAFETY: a whole ifreq lives through the call.
            let result = unsafe { libc::ioctl(fd.as_raw_fd(), TUNSETIFF, &raw mut request) };
            assert_eq!(result, 0, "TUNSETIFF: {}", std::io::Error::last_os_error());
            File::from(fd)
        });
        site.relay.ip(&[&format!("addr add 10.80.0.1/24 dev {name}"), &format!("link set {name} up")]);
        Self { file, seen: Vec::new() }
    }

    /// Payloads of the datagrams to a destination so far, whose headers are as expected.
    fn payloads(&mut self, to: SocketAddrV4) -> Vec<Vec<u8>> {
        let mut buffer = [0; 2048];
        while let Ok(len) = self.file.read(&mut buffer) {
            self.seen.push(buffer[..len].to_vec());
        }
        let expected = [&multicast_mac(*to.ip())[..], &[8, 0], &[10, 80, 0, 1], &to.ip().octets()].concat();
        let its = |frame: &&Vec<u8>| {
            let has = [&frame[..6], &frame[12..14], &frame[26..34]].concat();
            has == expected && frame[36..38] == to.port().to_be_bytes()
        };
        let long = self.seen.iter().filter(|frame| frame.len() > tests::frame::PAYLOAD);
        long.filter(its).map(|frame| frame[tests::frame::PAYLOAD..].to_vec()).collect()
    }
}

#[test]
fn a_tap_takes_redirected_frames_as_it_is() {
    const COUNT: u64 = 2_000;
    let site = site();
    let relay = Relay::start(&site);
    let mut tap = Tap::make(&site, "tap0");
    let outputs = ["239.2.2.1:6000@tap0", "239.2.2.7:6000@out0", "239.2.2.2:6000@tap0,ttl=3"];
    let rule = relay.add("cam1", "239.1.1.1:5000@in0", &outputs);
    assert_eq!(rule.datapath.as_deref(), Some("redirect"), "{rule:?}");
    site.segments[0].wait_until_joined(*GROUP.ip());
    let source = Source::start(site.source(), Stream { count: COUNT, size: SIZE, ..Stream::to(GROUP) });
    for to in [outputs[0], outputs[2]].map(destination) {
        let payloads = wait_for("all came out of the tap", PATIENCE, || {
            Some(tap.payloads(to)).filter(|payloads| payloads.len() as u64 >= COUNT)
        });
        assert_eq!(payloads.len() as u64, COUNT);
        assert_eq!(sha256(payloads.iter().map(|payload| &payload[..])), sent_sha256(COUNT));
    }
    assert_eq!(source.finish(), COUNT);
    let stats = relay.balanced("cam1", COUNT);
    assert!(
        stats.outputs.iter().all(|output| output.sent == COUNT && output.dropped.is_empty()),
        "{stats:?}"
    );
    // The device ends with whoever held it.
    drop(tap);
    let why = "interface tap0 does not exist";
    wait_until(why, PATIENCE, || relay.show("cam1").outputs[0].reason.as_deref() == Some(why));
    assert_eq!(relay.show("cam1").datapath.as_deref(), Some("redirect"));
    Source::play(site.source(), Stream { count: 500, size: SIZE, ..Stream::to(GROUP) });
    let stats = relay.balanced("cam1", COUNT + 500);
    let dropped = [("pending".to_owned(), 500)].into();
    assert_eq!([0, 1, 2].map(|index| stats.outputs[index].sent), [COUNT, COUNT + 500, COUNT], "{stats:?}");
    assert!([0, 2].iter().all(|&index| stats.outputs[index].dropped == dropped), "{stats:?}");
    assert!(relay.workers().is_empty() && relay.stats().alarms.is_empty());
}

#[test]
fn devices_that_never_take_redirected_frames_are_said_and_served_by_workers() {
    let site = site();
    let relay = Relay::start(&site);
    let mut sink = site.capture(0);
    for (kind, make) in [
        ("bridge", &["link add br9 type bridge mcast_snooping 0", "link set out1 master br9"][..]),
        ("macvlan", &["link add link out2 name mv9 type macvlan mode bridge"]),
        ("ifb", &["link add if9 type ifb"]),
    ] {
        let name = make[0].split(' ').find(|word| word.ends_with('9')).unwrap();
        site.relay.ip(make);
        site.relay.ip(&[&format!("addr add 10.81.0.1/24 dev {name}"), &format!("link set {name} up")]);
        let refused = relay.cli(&[
            "rule",
            "add",
            "cam1",
            "--in",
            "239.1.1.1:5000@in0",
            "--out",
            FIRST,
            "--out",
            &format!("239.2.2.9:6000@{name}"),
            "--datapath",
            "redirect",
        ]);
        let why = format!("{name} ({kind}) takes no redirected frames");
        assert!(refused.refused(1).contains(&why), "{refused}");
        relay
            .cli(&[
                "rule",
                "add",
                "cam1",
                "--in",
                "239.1.1.1:5000@in0",
                "--out",
                FIRST,
                "--out",
                &format!("239.2.2.9:6000@{name}"),
            ])
            .ok();
        let rule = relay.wait_until_active("cam1");
        assert_eq!(rule.datapath.as_deref(), Some("af-xdp"), "{rule:?}");
        assert!(rule.datapath_why.contains(&format!("not redirect: {why}")), "{rule:?}");
        site.segments[0].wait_until_joined(*GROUP.ip());
        let before = sink.count(destination(FIRST));
        Source::play(site.source(), Stream { count: 200, size: SIZE, ..Stream::to(GROUP) });
        relay.balanced("cam1", 200);
        sink.exactly(destination(FIRST), before + 200);
        relay.remove("cam1");
        site.segments[0].wait_until_left(*GROUP.ip());
        site.relay.ip(&[&format!("link del {name}")]);
    }
}

#[test]
fn rules_that_come_go_change_and_move_leave_the_kernels_others_alone() {
    let site = site();
    let relay = Relay::start(&site);
    let mut world = World::start(&site, &relay, &[FIRST, SECOND, THIRD]);
    for round in 0..3 {
        for k in 0..4 {
            let input = format!("239.3.{round}.{k}:5000@in0");
            let [one, two] = [0, 1].map(|sink| format!("239.4.{round}.{k}:600{sink}@out{sink}"));
            relay.add(&format!("churn{k}"), &input, &[&one, &two]);
        }
        for (name, change) in [
            ("churn0", ["--add-out", "239.4.9.9:6000@out2"]),
            ("churn0", ["--del-out", "239.4.9.9:6000@out2"]),
            ("churn1", ["--datapath", "af-xdp"]),
            ("churn2", ["--datapath", "af-packet"]),
            ("churn1", ["--datapath", "redirect"]),
            ("churn3", ["--add-out", "10.78.2.2:6000@out2"]),
            ("churn2", ["--datapath", "auto"]),
            ("churn3", ["--del-out", "10.78.2.2:6000@out2"]),
        ] {
            relay.set(name, &change);
            relay.wait_until_active(name);
        }
        for k in 0..4 {
            relay.remove(&format!("churn{k}"));
        }
        world.drain();
        world.struck.wait_for_more(500);
    }
    let (stats, seen) = world.finish([&[], &[], &[]]);
    assert!(stats.dropped.is_empty());
    for datagrams in seen {
        assert_sequence(&datagrams, 0..stats.matched);
    }
}
