//! The harness itself: what the other tests take for granted.

use std::{
    net::{Ipv4Addr, SocketAddrV4},
    panic,
    path::Path,
    process::Command,
    time::Duration,
};

use tests::{
    Capture, Namespace, Process, RawSender, Scratch, Site, Source, Udp,
    bpf::{self, ForeignXdp},
    capture::{assert_sequence, sha256},
    site::{ETH, Membership},
    source::Stream,
    wait_until,
};

const GROUP: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(239, 1, 1, 1), 5000);

#[test]
fn the_bridge_sends_a_group_to_the_relay_while_it_is_joined() {
    let site = Site::default();
    let segment = &site.segments[0];
    let mut capture = Capture::start(&site.relay, &segment.interface);
    Source::play(&segment.source, Stream { count: 500, ..Stream::to(GROUP) });
    let membership = Membership::join(&site.relay, &segment.interface, *GROUP.ip());
    segment.wait_until_joined(*GROUP.ip());
    Source::play(&segment.source, Stream { count: 2_000, ..Stream::to(GROUP) });
    assert_sequence(&capture.exactly(GROUP, 2_000), 0..2_000);
    drop(membership);
    segment.wait_until_left(*GROUP.ip());
    Source::play(&segment.source, Stream { count: 500, ..Stream::to(GROUP) });
    assert_eq!(capture.count(GROUP), 2_000);
}

#[test]
fn the_bridge_knows_the_source_that_the_relay_joined() {
    let site = Site::default();
    let segment = &site.segments[0];
    let (address, group) = (segment.relay_address, *GROUP.ip());
    let source = |host| Ipv4Addr::new(10, 77, 0, host);
    let first = Membership::join_source(&site.relay, address, group, source(2));
    let second = Membership::join_source(&site.relay, address, group, source(3));
    let joined = |host| segment.joined().contains(&(group, Some(source(host))));
    wait_until("the bridge knows both", Duration::from_secs(5), || joined(2) && joined(3));
    assert_eq!(segment.joined().len(), 2);
    assert_eq!(site.groups("in0"), [group]);
    drop(first);
    wait_until("the bridge forgets the first", Duration::from_secs(5), || !joined(2));
    assert!(joined(3));
    let any = Membership::join(&site.relay, "in0", group);
    segment.wait_until_joined(group);
    drop((second, any));
    segment.wait_until_left(group);
    assert!(site.groups("in0").is_empty());
}

#[test]
fn a_source_stops_when_told_and_knows_what_it_sent() {
    let site = Site::default();
    let sink = &site.sinks[1];
    let mut capture = Capture::start(&site.relay, &sink.interface);
    let source = Source::start(&sink.host, Stream { rate: 10_000, ..Stream::to(GROUP) });
    source.wait_for_more(1_000);
    let sent = source.stop();
    assert_sequence(&capture.exactly(GROUP, usize::try_from(sent).unwrap()), 0..sent);
}

#[test]
fn a_capture_reads_the_headers_that_were_sent() {
    let site = Site::default();
    let sink = &site.sinks[0];
    let from = "198.51.100.7:1234".parse().unwrap();
    let udp = Udp::new(from, GROUP).ttl(3).dscp(46, 1).payload(b"some payload");
    let mut capture = Capture::start(&site.relay, &sink.interface);
    RawSender::new(&sink.host, ETH).send(&udp.frame());
    let [seen] = &capture.exactly(GROUP, 1)[..] else { unreachable!() };
    assert_eq!(
        (seen.source, seen.ttl, seen.dscp, seen.ecn, seen.checksum_holds, seen.fragment),
        (from, 3, 46, 1, true, false)
    );
    assert_eq!(seen.payload, b"some payload");
    assert_eq!(seen.destination_mac, udp.destination_mac);

    let mut frame = udp.frame();
    *frame.last_mut().unwrap() ^= 1;
    RawSender::new(&sink.host, ETH).send(&frame);
    assert!(!capture.exactly(GROUP, 2)[1].checksum_holds);
}

#[test]
fn a_capture_splits_what_the_sender_left_to_the_device() {
    let site = Site::default();
    let sink = &site.sinks[0];
    let mut capture = Capture::start(&site.relay, &sink.interface);
    let payload: Vec<u8> = (0..2_500u32).map(|i| i as u8).collect();
    let socket = sink.host.run(|| std::net::UdpSocket::bind("0.0.0.0:0")).unwrap();
    nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::UdpGsoSegment, &1_000).unwrap();
    sink.host.run(|| socket.send_to(&payload, GROUP)).unwrap();
    let seen = capture.exactly(GROUP, 3);
    assert_eq!(seen.iter().map(|datagram| datagram.payload.len()).collect::<Vec<_>>(), [1_000, 1_000, 500]);
    assert_eq!(sha256(seen.iter().map(|datagram| &datagram.payload[..])), sha256([&payload[..]]));
}

#[test]
fn the_digest_is_sha256() {
    // FIPS 180-2, appendix B.1.
    assert_eq!(
        sha256([&b"a"[..], b"bc"]),
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    );
}

#[test]
fn what_a_failing_test_made_is_gone() {
    let (mut names, mut dir) = (Vec::new(), None);
    let failed = panic::catch_unwind(panic::AssertUnwindSafe(|| {
        let site = Site::default();
        dir = Some(site.scratch.dir().to_owned());
        names.extend([site.relay.path(), site.source().path(), site.sinks[2].host.path()]);
        assert!(names.iter().all(|name| name.exists()));
        let _process = Process::spawn(site.relay.command("sleep").arg("60"));
        assert_eq!(site.relay.processes().len(), 1);
        panic::resume_unwind(Box::new("a failing test"));
    }));
    assert!(failed.is_err());
    assert!(names.iter().all(|name| !name.exists()), "{names:?}");
    assert!(!dir.unwrap().exists());
}

#[test]
fn what_a_killed_run_left_is_swept() {
    // The pid of a process that is gone.
    let mut gone = Command::new("true").spawn().unwrap();
    let pid = gone.id();
    gone.wait().unwrap();
    let name = format!("mcrt-{pid}-0-relay");
    assert!(Command::new("ip").args(["netns", "add", &name]).status().unwrap().success());
    let dir = std::env::temp_dir().join(format!("mcrt-{pid}-0"));
    std::fs::create_dir(&dir).unwrap();
    let mine = Scratch::make();
    tests::scratch::sweep_now();
    assert!(!Path::new("/run/netns").join(name).exists());
    assert!(!dir.exists());
    assert!(mine.dir().exists());
}

#[test]
fn a_process_ends_with_its_value() {
    let namespace = Namespace::new("lone");
    let process = Process::spawn(namespace.command("sleep").arg("60"));
    let pid = process.pid();
    wait_until("the process is in the namespace", Duration::from_secs(5), || namespace.processes() == [pid]);
    drop(process);
    assert_eq!(namespace.processes(), [0u32; 0]);
}

#[test]
fn a_stranger_can_hold_the_xdp_slot() {
    let site = Site::default();
    let foreign = ForeignXdp::attach(&site.relay, "in0");
    let links = site.relay.json("ip", &["-j", "-d", "link", "show", "in0"]);
    assert_eq!(links[0]["xdp"]["prog"]["id"], foreign.id);
    let net = site.relay.json("bpftool", &["-j", "net"]);
    assert_eq!(
        (&net[0]["xdp"][0]["devname"], &net[0]["xdp"][0]["mode"], &net[0]["xdp"][0]["id"]),
        (&"in0".into(), &"driver".into(), &foreign.id.into())
    );
    let program = site.relay.json("bpftool", &["-j", "prog", "show", "id", &foreign.id.to_string()]);
    assert_eq!(program["name"], bpf::FOREIGN_NAME);
    drop(foreign);
    let net = site.relay.json("bpftool", &["-j", "net"]);
    assert_eq!(net[0]["xdp"], serde_json::json!([]));
    let links = site.relay.json("ip", &["-j", "-d", "link", "show", "in0"]);
    assert!(links[0]["xdp"].is_null());
}

#[test]
fn the_object_can_be_given_another_abi_version() {
    let changed = bpf::object_of_abi(77);
    let original = bpf::object();
    let differing = original.iter().zip(&changed).filter(|(a, b)| a != b).count();
    assert_eq!((original.len(), differing), (changed.len(), 1));
}
