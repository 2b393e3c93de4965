//! The daemon's beginnings and ends, good and bad.

use std::{net::SocketAddrV4, os::unix::net::UnixListener, path::Path, time::Duration};

use nix::sys::signal::Signal;
use tests::{
    Relay, Site, Source, capture::assert_sequence, relay::binary, source::Stream, wait::PATIENCE, wait_until,
};

fn at(address: &str) -> SocketAddrV4 {
    address.parse().expect("address:port")
}

/// Adds a rule and relays 2,000 datagrams of a group of its own.
#[track_caller]
fn relay_2000(site: &Site, relay: &Relay, name: &str, group: &str) {
    relay.add(name, &format!("{group}:5000@in0"), &[&format!("{group}:6000@out0")]);
    site.segments[0].wait_until_joined(group.parse().expect("a group"));
    let mut sink = site.capture(0);
    Source::play(site.source(), Stream { count: 2_000, ..Stream::to(at(&format!("{group}:5000"))) });
    assert_eq!(relay.balanced(name, 2_000).outputs[0].sent, 2_000);
    assert_sequence(&sink.exactly(at(&format!("{group}:6000")), 2_000), 0..2_000);
}

/// Every entry under a directory, at any depth, directories left out.
fn files_under(dir: &Path) -> Vec<std::path::PathBuf> {
    let Ok(entries) = std::fs::read_dir(dir) else { return Vec::new() };
    entries
        .flatten()
        .flat_map(|entry| if entry.path().is_dir() { files_under(&entry.path()) } else { vec![entry.path()] })
        .collect()
}

/// Checks that of a daemon that has ended nothing is left in its namespace and on the bpffs.
#[track_caller]
fn assert_nothing_left(site: &Site, control: &Path, pin_root: &Path) {
    assert_eq!(site.relay.processes(), [0u32; 0], "processes");
    for link in site.relay.json("ip", &["-j", "-d", "link", "show"]).as_array().expect("links") {
        assert!(link["xdp"].is_null(), "a program is attached: {link}");
    }
    let net = site.relay.json("bpftool", &["-j", "net"]);
    assert_eq!(net[0]["xdp"].as_array().map(Vec::len), Some(0), "{net}");
    assert!(files_under(pin_root).is_empty(), "pins: {:?}", files_under(pin_root));
    assert!(!control.exists(), "the control socket's file");
    assert!(site.groups("in0").is_empty(), "memberships: {:?}", site.groups("in0"));
    // The bridge hears of it by a report, which is on its way.
    wait_until("the bridge forgets the relay", PATIENCE, || site.segments[0].joined().is_empty());
}

/// Ends a daemon under load by `end`; it must go at once, with 0, and leave nothing.
fn check_end(end: impl FnOnce(&Relay)) {
    let site = Site::default();
    let mut relay = Relay::start(&site);
    relay.add("cam1", "239.1.1.1:5000@in0", &["239.2.2.2:6000@out0", "239.2.2.3:6000@out1"]);
    site.segments[0].wait_until_joined("239.1.1.1".parse().expect("a group"));
    assert!(!files_under(relay.pin_root()).is_empty());
    let mut sink = site.capture(0);
    let source = Source::start(site.source(), Stream { rate: 10_000, ..Stream::to(at("239.1.1.1:5000")) });
    sink.at_least(at("239.2.2.2:6000"), 1_000);
    end(&relay);
    let status = relay.wait(Duration::from_secs(5));
    assert_eq!(status.code(), Some(0));
    assert_nothing_left(&site, relay.control(), relay.pin_root());
    let relayed = sink.to(at("239.2.2.2:6000"));
    source.wait_for_more(500);
    assert_eq!(sink.count(at("239.2.2.2:6000")), relayed.len());
    assert_sequence(&relayed, 0..relayed.len() as u64);
    assert!(!relay.log().contains("panicked"), "{}", relay.log());
}

#[test]
fn sigterm_under_load_leaves_nothing() {
    check_end(|relay| relay.signal(Signal::SIGTERM));
}

#[test]
fn sigint_under_load_leaves_nothing() {
    check_end(|relay| relay.signal(Signal::SIGINT));
}

#[test]
fn mcr_stop_under_load_leaves_nothing() {
    check_end(|relay| drop(relay.cli(&["stop"]).ok().to_owned()));
}

#[test]
fn a_daemon_that_relayed_nothing_leaves_nothing() {
    let site = Site::default();
    let mut relay = Relay::start(&site);
    relay.signal(Signal::SIGTERM);
    assert_eq!(relay.wait(Duration::from_secs(5)).code(), Some(0));
    assert_nothing_left(&site, relay.control(), relay.pin_root());
}

#[test]
fn after_kill_9_the_next_daemon_starts_cleanly() {
    let site = Site::default();
    let mut relay = Relay::start(&site);
    relay_2000(&site, &relay, "before", "239.1.1.1");
    relay.signal(Signal::SIGKILL);
    relay.wait(PATIENCE);
    wait_until("the workers end with their daemon", PATIENCE, || site.relay.processes().is_empty());
    // The premise: there is something to clear.
    assert!(relay.control().exists());
    assert!(!files_under(relay.pin_root()).is_empty());
    relay.cli(&["ping"]).refused(3);

    relay.start_again(&site);
    relay_2000(&site, &relay, "after", "239.1.1.2");
    relay.signal(Signal::SIGTERM);
    assert_eq!(relay.wait(Duration::from_secs(5)).code(), Some(0));
    assert_nothing_left(&site, relay.control(), relay.pin_root());
}

#[test]
fn a_daemon_killed_under_load_can_be_followed_again_and_again() {
    let site = Site::default();
    let mut relay = Relay::start(&site);
    let source = Source::start(site.source(), Stream::to(at("239.1.1.1:5000")));
    let mut sink = site.capture(0);
    relay.add("cam1", "239.1.1.1:5000@in0", &["239.2.2.2:6000@out0"]);
    for _ in 0..3 {
        relay.wait_until_active("cam1");
        let seen = sink.count(at("239.2.2.2:6000"));
        sink.at_least(at("239.2.2.2:6000"), seen + 500);
        relay.signal(Signal::SIGKILL);
        relay.wait(PATIENCE);
        relay.start_again(&site);
    }
    source.stop();
}

#[test]
fn a_second_daemon_on_the_same_socket_is_refused() {
    let site = Site::default();
    let relay = Relay::start(&site);
    let line = Relay::refused(&mut Relay::command(&site));
    assert!(line.contains(&relay.pid().to_string()) || line.contains("mcr.sock"), "{line}");
    relay_2000(&site, &relay, "cam1", "239.1.1.1");
}

#[test]
fn a_second_daemon_on_the_same_pins_is_refused() {
    let site = Site::default();
    let relay = Relay::start(&site);
    let mut second = site.relay.command(binary());
    second.args(["run", "--control"]).arg(site.scratch.dir().join("other.sock"));
    second.arg("--pin-root").arg(relay.pin_root());
    Relay::refused(&mut second);
    relay_2000(&site, &relay, "cam1", "239.1.1.1");
}

#[test]
fn a_stale_socket_file_is_replaced_and_another_file_is_not() {
    let site = Site::default();
    let control = site.scratch.dir().join("mcr.sock");
    drop(UnixListener::bind(&control).unwrap());
    assert!(control.exists());
    let mut relay = Relay::start(&site);
    relay.signal(Signal::SIGTERM);
    relay.wait(PATIENCE);

    std::fs::write(&control, "someone's notes").unwrap();
    let line = Relay::refused(&mut Relay::command(&site));
    assert!(line.contains("mcr.sock"), "{line}");
    assert_eq!(std::fs::read_to_string(&control).unwrap(), "someone's notes");
}

#[test]
fn only_owner_and_group_may_connect() {
    use std::os::unix::fs::PermissionsExt;
    let site = Site::default();
    let relay = Relay::start(&site);
    let mode = std::fs::metadata(relay.control()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o660, "{mode:o}");
}
