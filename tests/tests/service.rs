//! The daemon as a service: what the service manager hears of it, what it keeps for it, and the unit that is shipped.

#![expect(clippy::unwrap_used, reason = "where it fails, the test fails and says where")]

use std::{
    collections::BTreeSet,
    fs,
    net::{Ipv4Addr, SocketAddrV4},
    os::{fd::AsRawFd, unix::net::UnixStream},
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use serde_json::Value;
use tests::{
    Capture, Ground, Namespace, Process, Relay, Scratch, ServiceManager, Site, Source, Unit,
    capture::assert_sequence, deprive::NOBODY, relay::binary, service_manager::Said, site::Plan,
    source::Stream, wait::PATIENCE, wait_until,
};

const GROUP: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(239, 1, 1, 1), 5000);
const TO: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(239, 2, 2, 2), 6000);
const OUT: &str = "239.2.2.2:6000@out0";
const STORE: (&str, &str) = ("FDSTORE", "64");

fn kernel_site() -> Site {
    Site::build(Plan { ground: Ground::Kernel, sinks: 1, ..Plan::default() })
}

fn manager(site: &Site) -> ServiceManager {
    ServiceManager::at(&site.scratch.dir().join("notify"))
}

/// Writes the file of rules, one for each input that is given.
fn file(site: &Site, inputs: &[&str]) -> PathBuf {
    let path = site.scratch.dir().join("mcr.toml");
    let rule = |(n, input): (usize, &&str)| {
        format!("[[rule]]\nname = \"cam{n}\"\nin = \"{input}\"\nout = [\"{OUT}\"]\nmerge = true\n")
    };
    fs::write(&path, inputs.iter().enumerate().map(rule).collect::<String>()).unwrap();
    path
}

/// `mcr run`, started by a service manager.
fn managed(site: &Site, manager: &ServiceManager, args: &[&str], variables: &[(&str, &str)]) -> Command {
    manager.start(&site.relay, Relay::command(site).args(args), variables)
}

fn is(name: &'static str, value: &'static str) -> impl Fn(&Said) -> bool {
    move |said| said.value(name) == Some(value)
}

fn kill(relay: &mut Relay<'_>) {
    relay.signal(Signal::SIGKILL);
    relay.wait(PATIENCE);
}

/// Processes of a namespace by the name that `ps` shows.
fn named(namespace: &Namespace, name: &str) -> Vec<u32> {
    let is = |pid: &u32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.contains(&format!("({name})")) && !stat.contains(") Z ")
    };
    namespace.processes().into_iter().filter(is).collect()
}

#[test]
fn ready_is_said_once_the_socket_answers_and_the_file_s_rules_are_at_work() {
    let site = Site::default();
    let path = file(&site, &["239.1.1.1:5000@in0", "239.1.1.2:5000@in0", "239.1.1.3:5000@gone0"]);
    for manager in [manager(&site), ServiceManager::abstract_in(&site.relay)] {
        let mut command = managed(&site, &manager, &["--config", path.to_str().unwrap()], &[]);
        let mut daemon = Process::spawn(&mut command);
        let (ready, mark) = manager.wait_for("READY", 0, PATIENCE, is("READY", "1"));
        assert_eq!(mark, 1, "{:?}", manager.said());
        let status = "2 of 3 rules active, 1 pending; 0/s received";
        assert_eq!(ready.value("STATUS"), Some(status));
        // One call, at once.
        let control = site.scratch.dir().join("mcr.sock");
        let mut list = site.relay.command(binary());
        list.args(["rule", "list", "--json", "--control"]).arg(control);
        let list: Value = Process::spawn(&mut list).answer(PATIENCE).json();
        let health: Vec<_> = list["rules"].as_array().unwrap().iter().map(|rule| &rule["health"]).collect();
        assert_eq!(health, ["active", "active", "pending"]);
        let mark = manager.mark();
        daemon.signal(Signal::SIGTERM);
        let (_, end) = manager.wait_for("STOPPING", mark, PATIENCE, is("STOPPING", "1"));
        assert!(daemon.wait(PATIENCE).success(), "{}", daemon.stderr());
        assert_eq!(manager.mark(), end, "something was said after the end: {:?}", manager.said());
        assert_eq!(manager.said().iter().filter(|said| said.value("READY").is_some()).count(), 1);
    }
}

#[test]
fn a_daemon_without_a_service_manager_that_listens_says_so_and_relays() {
    let site = Site::default();
    let gone = site.scratch.dir().join("gone");
    let relay = Relay::spawn(&site, Relay::command(&site).env("NOTIFY_SOCKET", &gone));
    relay.add("cam1", "239.1.1.1:5000@in0", &[OUT]);
    assert!(relay.log().contains("the service manager cannot be told READY=1"), "{}", relay.log());
    let refused = Relay::refused(Relay::command(&site).env("NOTIFY_SOCKET", "vsock:2:1234"));
    assert!(refused.contains("NOTIFY_SOCKET") && refused.contains("vsock:2:1234"), "{refused}");
}

/// What was said of a reload: that it began, when by the kernel's clock, and how it went.
#[track_caller]
fn reloaded(manager: &ServiceManager, mark: usize) -> (u128, String) {
    let (reloading, mark) = manager.wait_for("RELOADING", mark, PATIENCE, is("RELOADING", "1"));
    let (ready, mark) = manager.wait_for("READY", mark, PATIENCE, is("READY", "1"));
    let later: Vec<_> = manager.said().split_off(mark);
    assert!(later.iter().all(|said| said.value("READY").is_none()), "{later:?}");
    (reloading.value("MONOTONIC_USEC").unwrap().parse().unwrap(), ready.value("STATUS").unwrap().to_owned())
}

#[test]
fn a_reload_is_told_from_its_beginning_to_its_end_also_where_it_is_refused() {
    let clock =
        || Duration::from(nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).unwrap()).as_micros();
    let site = Site::default();
    let manager = manager(&site);
    let path = file(&site, &["239.1.1.1:5000@in0"]);
    let path = path.to_str().unwrap();
    let relay = Relay::spawn(&site, &mut managed(&site, &manager, &["--config", path], &[]));
    let by_signal = || relay.signal(Signal::SIGHUP);
    let by_command = || drop(relay.cli(&["config", "load", path]));
    for how in [&by_signal as &dyn Fn(), &by_command] {
        file(&site, &["239.1.1.1:5000@in0", "239.1.1.2:5000@in0"]);
        let (mark, before) = (manager.mark(), clock());
        how();
        let (at, status) = reloaded(&manager, mark);
        assert!((before..=clock()).contains(&at), "{at} is not between {before} and now");
        assert_eq!(status, "2 of 2 rules active; 0/s received");
        file(&site, &["239.1.1.1:5000@in0"]);
        let mark = manager.mark();
        how();
        assert_eq!(reloaded(&manager, mark).1, "1 of 1 rules active; 0/s received");
    }
    fs::write(path, "[[rule]]\nnonsense = true\n").unwrap();
    let mark = manager.mark();
    by_signal();
    let (_, status) = reloaded(&manager, mark);
    assert!(
        status.starts_with("1 of 1 rules active; 0/s received; the last reload was refused: "),
        "{status}"
    );
    assert!(status.contains("the rule has no 'in'"), "{status}");
    // What only asks what a load would do is none, and so is one that is refused when it is asked about.
    assert_eq!(relay.cli(&["config", "load", path]).status, 1);
    file(&site, &["239.1.1.1:5000@in0"]);
    let mark = manager.mark();
    relay.cli(&["config", "diff", path]).ok();
    assert!(manager.said()[mark..].iter().all(|said| said.value("RELOADING").is_none()));
    by_signal();
    assert_eq!(reloaded(&manager, mark).1, "1 of 1 rules active; 0/s received");
}

#[test]
fn the_status_follows_what_is_relayed_and_is_said_once_a_second_at_most() {
    let site = Site::default();
    let manager = manager(&site);
    let relay = Relay::spawn(&site, &mut managed(&site, &manager, &[], &[]));
    relay.add("cam1", "239.1.1.1:5000@in0", &[OUT]);
    let says = |mark: usize, what: &str| {
        let it = |said: &Said| said.value("STATUS").is_some_and(|status| status == what);
        manager.wait_for(what, mark, PATIENCE, it).1
    };
    let mark = says(0, "1 of 1 rules active; 0/s received");
    let stream = Stream { rate: 1_000, ..Stream::to(GROUP) };
    let source = Source::start(site.source(), stream);
    let relays = |said: &Said| {
        let rate = said.value("STATUS").and_then(|status| status.strip_prefix("1 of 1 rules active; "));
        let rate =
            rate.and_then(|rate| rate.strip_suffix("/s received")).unwrap_or_default().replace(',', "");
        rate.parse().is_ok_and(|rate: u32| (800..=1_200).contains(&rate))
    };
    manager.wait_for("1,000/s", mark, PATIENCE, relays);
    source.stop();
    let mark = says(mark, "1 of 1 rules active; 0/s received");
    site.relay.ip(&["link set in0 down"]);
    says(mark, "0 of 1 rules active, 1 pending; 0/s received");
    let said = manager.said();
    let statuses: Vec<_> = said.iter().filter(|said| said.words.starts_with("STATUS=")).collect();
    for two in statuses.windows(2) {
        assert_ne!(two[0].words, two[1].words);
        // A second, and as long as the first of the two was on its way.
        assert!(two[1].at - two[0].at > Duration::from_millis(700), "{two:?}");
    }
}

#[test]
fn a_loop_that_hangs_gives_no_sign_of_life() {
    const BEAT: Duration = Duration::from_millis(200);
    let site = Site::default();
    let manager = manager(&site);
    let within = ("WATCHDOG_USEC", "400000");
    let relay = Relay::spawn(&site, &mut managed(&site, &manager, &[], &[within]));
    let beats = || manager.said().iter().filter(|said| said.value("WATCHDOG") == Some("1")).count();
    let ten_more = || {
        let (start, before) = (Instant::now(), beats());
        wait_until("it shows that it lives", PATIENCE, || beats() >= before + 10);
        start.elapsed()
    };
    assert!(ten_more() >= BEAT * 8, "more often than at half the time");
    relay.signal(Signal::SIGSTOP);
    let quiet_since = |n| {
        let start = Instant::now();
        wait_until("a second without a word", PATIENCE, || beats() != n || start.elapsed() > BEAT * 5);
        beats() == n
    };
    // One may have been on its way.
    wait_until("it is silent", PATIENCE, || quiet_since(beats()));
    relay.signal(Signal::SIGCONT);
    ten_more();
    drop(relay);
    // Meant for another process.
    let mark = manager.mark();
    let other = Relay::spawn(&site, &mut managed(&site, &manager, &[], &[within, ("WATCHDOG_PID", "1")]));
    other.add("cam1", "239.1.1.1:5000@in0", &[OUT]);
    let with_rule = |said: &Said| said.value("STATUS").is_some_and(|status| status.starts_with("1 of 1"));
    manager.wait_for("a status, a second later", mark, PATIENCE, with_rule);
    assert!(manager.said()[mark..].iter().all(|said| said.value("WATCHDOG").is_none()));
}

#[test]
fn what_is_said_to_the_daemon_is_said_to_none_of_its_processes() {
    let site = kernel_site();
    let manager = manager(&site);
    let within = ("WATCHDOG_USEC", "60000000");
    let relay = Relay::spawn(&site, &mut managed(&site, &manager, &[], &[within]));
    relay.add("cam1", &format!("{GROUP}@in0"), &[OUT]);
    relay.add_with("cam2", "239.1.1.2:5000@in0", &["239.2.2.3:6000@out0"], &["--datapath", "af-xdp"]);
    // Without a store it is a process that keeps memberships, and that is said once.
    let [holder] = named(&site.relay, "mcr-hold")[..] else { panic!("one holder") };
    assert_eq!(relay.log().matches("FileDescriptorStoreMax=").count(), 1, "{}", relay.log());
    let workers: Vec<_> = relay.workers().into_iter().map(|worker| worker.pid.unwrap()).collect();
    assert!(!workers.is_empty());
    for pid in workers.into_iter().chain([holder]) {
        let environment = fs::read(format!("/proc/{pid}/environ")).unwrap();
        let environment = String::from_utf8_lossy(&environment).into_owned();
        for name in ["NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_", "FDSTORE"] {
            assert!(!environment.contains(name), "{pid} has {name}");
        }
    }
}

fn play(site: &Site, to: SocketAddrV4, rate: u64) -> Source {
    Source::start(site.source(), Stream { rate, size: 200, ..Stream::to(to) })
}

/// Plays on; a capture that nobody reads fills up.
#[track_caller]
fn play_on(source: &Source, capture: &mut Capture, n: u64) {
    let target = source.sent() + n;
    wait_until("more is sent", PATIENCE, || {
        capture.all();
        source.sent() >= target
    });
}

/// All of a stream arrived, each datagram once and in order, and the ledger says so.
#[track_caller]
fn arrived(relay: &Relay<'_>, capture: &mut Capture, sent: u64) {
    let stats = relay.balanced("cam1", sent);
    assert_eq!((stats.received, stats.outputs[0].sent), (sent, sent), "{stats:?}");
    assert_sequence(&capture.exactly(TO, sent as usize), 0..sent);
}

#[test]
fn stored_memberships_outlive_daemons_that_are_killed_and_restarted_under_load_without_loss() {
    let site = kernel_site();
    let manager = manager(&site);
    let mut relay = Relay::spawn(&site, &mut managed(&site, &manager, &[], &[STORE]));
    let rule = relay.add("cam1", &format!("{GROUP}@in0"), &[OUT]);
    assert_eq!(rule.datapath.as_deref(), Some("redirect"));
    site.segments[0].wait_until_joined(*GROUP.ip());
    let mut capture = site.capture(0);
    let source = play(&site, GROUP, 50_000);
    for signal in [Signal::SIGKILL, Signal::SIGUSR1, Signal::SIGKILL, Signal::SIGUSR1] {
        play_on(&source, &mut capture, 25_000);
        assert_eq!(manager.stored().len(), 1);
        assert_eq!(named(&site.relay, "mcr-hold"), [0; 0]);
        relay.signal(signal);
        relay.wait(PATIENCE);
        play_on(&source, &mut capture, 25_000);
        assert_eq!(site.groups("in0"), [*GROUP.ip()]);
        relay.start_again_by(&mut managed(&site, &manager, &[], &[STORE]));
        assert_eq!(relay.wait_until_active("cam1").datapath.as_deref(), Some("redirect"));
    }
    let sent = source.stop();
    arrived(&relay, &mut capture, sent);
    assert_eq!(named(&site.relay, "mcr-hold"), [0; 0]);
    // Taken over is taken over whole: to leave is to leave.
    relay.remove("cam1");
    site.segments[0].wait_until_left(*GROUP.ip());
    wait_until("nothing is stored", PATIENCE, || manager.stored().is_empty());
    relay.add("cam1", &format!("{GROUP}@in0"), &[OUT]);
    site.segments[0].wait_until_joined(*GROUP.ip());
    assert_eq!(manager.stored().len(), 1);
    // What ends plainly leaves nothing.
    relay.signal(Signal::SIGTERM);
    assert!(relay.wait(PATIENCE).success());
    site.segments[0].wait_until_left(*GROUP.ip());
    wait_until("nothing is stored", PATIENCE, || manager.stored().is_empty());
}

#[test]
fn stop_keep_leaves_the_store_what_it_has() {
    let site = kernel_site();
    let manager = manager(&site);
    let mut relay = Relay::spawn(&site, &mut managed(&site, &manager, &[], &[STORE]));
    relay.add("cam1", &format!("{GROUP}@in0"), &[OUT]);
    site.segments[0].wait_until_joined(*GROUP.ip());
    let mut capture = site.capture(0);
    let source = play(&site, GROUP, 5_000);
    source.wait_for_more(1_000);
    relay.cli(&["stop", "--keep"]).ok();
    relay.wait(PATIENCE);
    source.wait_for_more(2_000);
    relay.start_again_by(&mut managed(&site, &manager, &[], &[STORE]));
    source.wait_for_more(1_000);
    let sent = source.stop();
    arrived(&relay, &mut capture, sent);
}

type Joined = (Ipv4Addr, Option<Ipv4Addr>);

/// Inputs of 45 groups and 25 sources, each of which is another membership.
fn inputs() -> Vec<(String, Joined)> {
    let any = (1..=45).map(|n| {
        let group = Ipv4Addr::new(239, 1, 1, n);
        (format!("{group}:5000@in0"), (group, None))
    });
    let one = (1..=25).map(|n| {
        let (group, source) = (Ipv4Addr::new(232, 1, 1, 1 + n / 5), Ipv4Addr::new(10, 77, 0, 100 + n));
        (format!("{group}:5000@in0,source={source}"), (group, Some(source)))
    });
    any.chain(one).collect()
}

/// Waits until the switch has these memberships of the relay and no other. (Of sources the kernel does not list all.)
#[track_caller]
fn wait_until_joined(site: &Site, joined: impl Iterator<Item = Joined>) {
    let wanted: BTreeSet<_> = joined.collect();
    wait_until("the switch has all and no other", PATIENCE, || {
        site.segments[0].joined().into_iter().collect::<BTreeSet<_>>() == wanted
    });
}

#[test]
fn of_many_stored_memberships_none_is_lost_and_none_too_many_is_kept() {
    let site = kernel_site();
    let manager = manager(&site);
    let inputs = inputs();
    let texts: Vec<_> = inputs.iter().map(|(text, _)| text.as_str()).collect();
    let all = || inputs.iter().map(|(_, joined)| *joined);
    let path = file(&site, &texts);
    let args = ["--config", path.to_str().unwrap()];
    let mut relay = Relay::spawn(&site, &mut managed(&site, &manager, &args, &[STORE]));
    assert_eq!(relay.wait_until_active("cam69").datapath.as_deref(), Some("redirect"));
    wait_until_joined(&site, all());
    let (groups, stored) = (site.groups("in0"), manager.stored());
    // 20 groups in a socket: three of any source, and one of some.
    assert_eq!(stored.len(), 4, "{stored:?}");
    // As many as before come back, of each kind; what the file has lost meanwhile is left.
    kill(&mut relay);
    assert_eq!(site.groups("in0"), groups);
    relay.start_again_by(&mut managed(&site, &manager, &args, &[STORE]));
    relay.wait_until_active("cam69");
    wait_until_joined(&site, all());
    assert_eq!((site.groups("in0"), manager.stored()), (groups, stored));
    kill(&mut relay);
    file(&site, &[texts[0], texts[69]]);
    relay.start_again_by(&mut managed(&site, &manager, &args, &[STORE]));
    wait_until_joined(&site, [inputs[0].1, inputs[69].1].into_iter());
    wait_until("what is empty is not stored", PATIENCE, || manager.stored().len() == 2);
    assert_eq!(named(&site.relay, "mcr-hold"), [0; 0]);
    relay.signal(Signal::SIGTERM);
    relay.wait(PATIENCE);
    wait_until("nothing is stored", PATIENCE, || manager.stored().is_empty());
    assert_eq!(site.groups("in0"), [Ipv4Addr::UNSPECIFIED; 0]);
}

#[test]
fn where_the_store_is_full_a_process_keeps_memberships() {
    let site = kernel_site();
    let manager = manager(&site);
    let inputs = inputs();
    let some: Vec<_> = inputs[..30].iter().map(|(text, _)| text.as_str()).collect();
    let path = file(&site, &some);
    let args = ["--config", path.to_str().unwrap()];
    let small = ("FDSTORE", "1");
    let mut relay = Relay::spawn(&site, &mut managed(&site, &manager, &args, &[small]));
    wait_until("a process keeps them", PATIENCE, || named(&site.relay, "mcr-hold").len() == 1);
    wait_until("all is joined", PATIENCE, || site.groups("in0").len() == 30);
    let why = "descriptor store is of no use, a process keeps memberships instead: it takes 1 descriptors";
    assert_eq!(relay.log().matches(why).count(), 1, "{}", relay.log());
    kill(&mut relay);
    assert_eq!(site.groups("in0").len(), 30);
    // And a larger one takes them over from it.
    relay.start_again_by(&mut managed(&site, &manager, &args, &[STORE]));
    wait_until("no process keeps them", PATIENCE, || named(&site.relay, "mcr-hold").is_empty());
    assert_eq!((site.groups("in0").len(), manager.stored().len()), (30, 2));
    relay.signal(Signal::SIGTERM);
    relay.wait(PATIENCE);
    wait_until("nothing is stored", PATIENCE, || manager.stored().is_empty());
    assert_eq!(site.groups("in0"), [Ipv4Addr::UNSPECIFIED; 0]);
}

#[test]
fn descriptors_that_are_none_of_ours_or_not_there_are_passed_over() {
    let site = kernel_site();
    let manager = manager(&site);
    let rows: [&[(&str, &str)]; 4] = [
        // Not open, and of another process.
        &[("LISTEN_FDS", "3"), ("LISTEN_FDNAMES", "membership-0:membership-1:membership-4294967295")],
        &[("LISTEN_FDS", "99999999999"), ("LISTEN_FDNAMES", ":::")],
        &[("LISTEN_FDS", "-1"), ("FDSTORE", "-1"), ("WATCHDOG_USEC", "0")],
        &[("WATCHDOG_USEC", "18446744073709551615"), STORE],
    ];
    for variables in rows {
        let mut command = managed(&site, &manager, &[], variables);
        let script = "export LISTEN_PID=$$; exec \"$0\" \"$@\"".to_owned();
        let args: Vec<_> = command.get_args().skip(2).map(ToOwned::to_owned).collect();
        let environment: Vec<_> = command
            .get_envs()
            .filter_map(|(name, value)| Some((name.to_owned(), value?.to_owned())))
            .collect();
        command = site.relay.command("bash");
        command.arg("-c").arg(script).args(args).envs(environment);
        let mut relay = Relay::spawn(&site, &mut command);
        relay.add("cam1", &format!("{GROUP}@in0"), &[OUT]);
        relay.remove("cam1");
        relay.signal(Signal::SIGTERM);
        assert!(relay.wait(PATIENCE).success(), "{}", relay.log());
    }
}

#[test]
fn a_holder_s_memberships_move_into_the_store_without_loss() {
    let site = kernel_site();
    let manager = manager(&site);
    let mut relay = Relay::start(&site);
    relay.add("cam1", &format!("{GROUP}@in0"), &[OUT]);
    site.segments[0].wait_until_joined(*GROUP.ip());
    let mut capture = site.capture(0);
    let source = play(&site, GROUP, 5_000);
    source.wait_for_more(1_000);
    for managed_next in [true, false, true] {
        kill(&mut relay);
        source.wait_for_more(1_000);
        if managed_next {
            relay.start_again_by(&mut managed(&site, &manager, &[], &[STORE]));
            assert_eq!((manager.stored().len(), named(&site.relay, "mcr-hold").len()), (1, 0));
        } else {
            // Passed by a service manager that stores nothing any more.
            relay.start_again_by(&mut managed(&site, &manager, &[], &[]));
            wait_until("a process has it too", PATIENCE, || named(&site.relay, "mcr-hold").len() == 1);
        }
        source.wait_for_more(1_000);
    }
    let sent = source.stop();
    arrived(&relay, &mut capture, sent);
    relay.remove("cam1");
    site.segments[0].wait_until_left(*GROUP.ip());
}

#[test]
fn the_journal_gets_levels_and_neither_time_nor_colour() {
    let site = Site::default();
    let log = |format: &[&str], is_journal: bool| {
        let (stderr, ours) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let file = fs::metadata(format!("/proc/self/fd/{}", stderr.as_raw_fd())).unwrap();
        let (device, inode) =
            (std::os::unix::fs::MetadataExt::dev(&file), std::os::unix::fs::MetadataExt::ino(&file));
        let inode = if is_journal { inode } else { inode + 1 };
        let mut command = site.relay.command(binary());
        let args = Relay::command(&site);
        command.args(args.get_args()).args(format).env("JOURNAL_STREAM", format!("{device}:{inode}"));
        let mut daemon = command.stderr(std::os::fd::OwnedFd::from(stderr)).spawn().unwrap();
        drop(command);
        let control = site.scratch.dir().join("mcr.sock");
        let call = |args: &[&str]| {
            let mut command = site.relay.command(binary());
            Process::spawn(command.args(args).arg("--control").arg(&control)).answer(PATIENCE)
        };
        wait_until("the daemon answers", PATIENCE, || call(&["ping"]).status == 0);
        call(&["rule", "add", "cam1", "--in", "239.1.1.1:5000@in0", "--out", OUT]).ok();
        let workers: Value = call(&["workers", "--json"]).json();
        let worker = i32::try_from(workers["workers"][0]["pid"].as_i64().unwrap()).unwrap();
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(worker), Signal::SIGKILL).unwrap();
        let mut bytes = Vec::new();
        wait_until("the end of the worker is logged", PATIENCE, || {
            let _would_block = std::io::Read::read_to_end(&mut &ours, &mut bytes);
            String::from_utf8_lossy(&bytes).contains("worker ended")
        });
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(daemon.id().cast_signed()), Signal::SIGTERM)
            .unwrap();
        daemon.wait().unwrap();
        let _end = std::io::Read::read_to_end(&mut &ours, &mut bytes);
        String::from_utf8(bytes).unwrap()
    };
    let journal = log(&[], true);
    assert!(
        journal
            .lines()
            .all(|line| line.starts_with("<3>") || line.starts_with("<4>") || line.starts_with("<6>")),
        "{journal}"
    );
    assert!(!journal.contains('\u{1b}') && !journal.contains("INFO"), "{journal}");
    assert!(journal.contains("<6>ready version="), "{journal}");
    assert!(journal.contains("<3>worker ended; it is restarted"), "{journal}");
    let text = log(&[], false);
    assert!(text.lines().all(|line| line.starts_with("20") && !line.contains("<6>")), "{text}");
    let json = log(&["--log-format", "json"], true);
    assert!(json.lines().all(|line| serde_json::from_str::<Value>(line).is_ok()), "{json}");
}

/// What `systemd-analyze` says of a copy of the unit, whose program is there.
#[track_caller]
fn analyzed(site: &Path, args: &[&str]) -> String {
    let unit = fs::read_to_string(Unit::packaging().join("systemd/mcr.service")).unwrap();
    let copy = site.join("mcr.service");
    fs::write(&copy, unit.replace("/usr/bin/mcr", binary().to_str().unwrap())).unwrap();
    fs::copy(Unit::packaging().join("systemd/run-bpf-mcr.mount"), site.join("run-bpf-mcr.mount")).unwrap();
    let output = Command::new("systemd-analyze").args(args).arg(&copy).output();
    let output = output.expect("systemd-analyze (Debian package systemd)");
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{args:?}: {text}");
    text.into_owned()
}

#[test]
fn the_unit_is_exposed_as_little_as_is_documented() {
    let scratch = Scratch::make();
    let figure = |text: &str, before: &str| {
        let (_, rest) = text.split_once(before).unwrap_or_else(|| panic!("no '{before}' in {text}"));
        rest.split_whitespace().next().unwrap().parse::<f64>().unwrap()
    };
    let exposure = "Overall exposure level for mcr.service: ";
    let is = figure(&analyzed(scratch.dir(), &["security", "--offline=true"]), exposure);
    let service = fs::read_to_string(Unit::packaging().join("../docs/service.md")).unwrap();
    let documented = figure(&service, exposure);
    assert!(is <= documented, "{is} is more than the {documented} of docs/service.md");
}

#[test]
fn the_unit_is_what_systemd_takes() {
    let scratch = Scratch::make();
    let said = analyzed(scratch.dir(), &["verify", "--man=no"]);
    // What an older one does not know it does without.
    let known =
        |line: &&str| !line.contains("Unknown key") || !line.contains("'FileDescriptorStorePreserve'");
    assert_eq!(said.lines().filter(known).collect::<Vec<_>>(), [""; 0]);
    for (command, key) in [("systemd-sysusers", "sysusers.d"), ("systemd-tmpfiles", "tmpfiles.d")] {
        let root = scratch.dir().join(key);
        fs::create_dir_all(root.join("etc")).unwrap();
        let file = Unit::packaging().join(key).join("mcr.conf");
        let argument = if key == "tmpfiles.d" { vec!["--create"] } else { vec![] };
        if key == "tmpfiles.d" {
            // Its group is made before.
            fs::copy(scratch.dir().join("sysusers.d/etc/group"), root.join("etc/group")).unwrap();
            fs::copy(scratch.dir().join("sysusers.d/etc/passwd"), root.join("etc/passwd")).unwrap();
        }
        let mut command = Command::new(command);
        command.args(argument).arg("--root").arg(&root).arg(&file);
        let output = command.output().expect("Debian package systemd");
        assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
    let passwd = fs::read_to_string(scratch.dir().join("sysusers.d/etc/passwd")).unwrap();
    assert!(
        passwd.lines().any(|line| line.starts_with("mcr:") && line.contains(":/var/lib/mcr:")),
        "{passwd}"
    );
    let rules = fs::metadata(scratch.dir().join("tmpfiles.d/etc/mcr/rules.d")).unwrap();
    assert_eq!(std::os::unix::fs::MetadataExt::mode(&rules) & 0o7777, 0o775);
}

#[test]
fn the_unit_s_filters_refuse_what_they_leave_out() {
    let filters = Unit::shipped().filters();
    std::thread::spawn(move || {
        for filter in &filters {
            seccompiler::apply_filter(filter).unwrap();
        }
        // SAFETY: the calls take integers and null pointers, of which nothing is read.
        let errors = unsafe {
            let error =
                |result: libc::c_long| (result < 0).then(|| std::io::Error::last_os_error().raw_os_error());
            [
                error(libc::syscall(libc::SYS_socket, libc::AF_VSOCK, libc::SOCK_STREAM, 0)),
                error(libc::syscall(libc::SYS_mount, 0, 0, 0, 0, 0)),
                error(libc::syscall(libc::SYS_setuid, 0)),
                error(libc::syscall(libc::SYS_ptrace, 0, 0, 0, 0)),
                error(libc::syscall(libc::SYS_socket, libc::AF_XDP, libc::SOCK_RAW, 0)),
                error(libc::syscall(libc::SYS_getpid)),
            ]
        };
        let refused = Some(Some(libc::EPERM));
        assert_eq!(errors, [refused, refused, refused, refused, None, None]);
    })
    .join()
    .unwrap();
}

#[test]
fn the_unit_s_own_command_relays_on_each_datapath_in_its_sandbox_and_outlives_a_kill() {
    let site = kernel_site();
    let unit = Unit::shipped();
    let scratch = Scratch::of_user(NOBODY);
    let (config, control) = (scratch.dir().join("mcr.toml"), scratch.dir().join("mcr.sock"));
    let bpffs = scratch.pin_root().parent().unwrap();
    fs::write(&config, "").unwrap();
    let manager = ServiceManager::for_all(&scratch.dir().join("notify"));
    let program = scratch.dir().join("mcr");
    fs::copy(binary(), &program).unwrap();
    let places =
        [("/usr/bin/mcr", program.as_path()), ("/etc/mcr/mcr.toml", &config), ("/run/bpf/mcr", bpffs)];
    let mut environment = unit.environment();
    assert_eq!(environment.insert("MCR_CONTROL", control.to_str().unwrap()), Some("/run/mcr/mcr.sock"));
    assert_eq!(environment["FDSTORE"], unit.value("FileDescriptorStoreMax"));
    let variables: Vec<_> = environment.into_iter().collect();
    let command = |key: &str| {
        let words = unit.words(key, &places);
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]);
        let mut command = manager.start(&site.relay, &command, &variables);
        unit.confine(&mut command, scratch.dir());
        command
    };
    let mut relay = Relay::spawn_at(&site, &mut command("ExecStart"), control.clone());
    let status = fs::read_to_string(format!("/proc/{}/status", relay.pid())).unwrap();
    for field in [format!("Uid:\t{NOBODY}"), "Seccomp:\t2".to_owned(), "CapBnd:\t000000c000007000".to_owned()]
    {
        assert!(status.contains(&field), "{field} is not in {status}");
    }
    for (n, datapath) in ["af-xdp", "af-packet", "redirect"].into_iter().enumerate() {
        let group = SocketAddrV4::new(Ipv4Addr::new(239, 1, 2, n as u8), 5000);
        relay.add_with(datapath, &format!("{group}@in0"), &[OUT], &["--datapath", datapath, "--merge"]);
        site.segments[0].wait_until_joined(*group.ip());
        Source::play(site.source(), Stream { count: 1_000, ..Stream::to(group) });
        assert_eq!(relay.balanced(datapath, 1_000).outputs[0].sent, 1_000, "{datapath}");
        relay.remove(datapath);
    }
    // `systemctl reload`, and what it answers where the file is wrong.
    let by_name = "datapath = \"redirect\"";
    let rule = format!("[[rule]]\nname = \"cam1\"\nin = \"{GROUP}@in0\"\nout = [\"{OUT}\"]\n{by_name}\n");
    fs::write(&config, rule).unwrap();
    Process::spawn(&mut command("ExecReload")).answer(PATIENCE).ok();
    assert_eq!(relay.wait_until_active("cam1").datapath.as_deref(), Some("redirect"), "{}", relay.log());
    let good = fs::read(&config).unwrap();
    fs::write(&config, "nonsense").unwrap();
    let refused = Process::spawn(&mut command("ExecReload")).answer(PATIENCE);
    assert!(refused.status == 1 && refused.stderr.contains("mcr.toml"), "{refused}");
    fs::write(&config, good).unwrap();
    // What is pinned is on the host's mount: the mount namespace ends with the daemon, the pins do not.
    site.segments[0].wait_until_joined(*GROUP.ip());
    let mut capture = site.capture(0);
    let source = play(&site, GROUP, 5_000);
    assert_eq!(unit.value("RestartKillSignal"), "SIGUSR1");
    for signal in [Signal::SIGKILL, Signal::SIGUSR1] {
        source.wait_for_more(1_000);
        relay.signal(signal);
        relay.wait(PATIENCE);
        source.wait_for_more(1_000);
        relay.start_again_by(&mut command("ExecStart"));
        relay.wait_until_active("cam1");
    }
    source.wait_for_more(1_000);
    let sent = source.stop();
    arrived(&relay, &mut capture, sent);
    relay.signal(Signal::SIGTERM);
    assert!(relay.wait(PATIENCE).success(), "{}", relay.log());
    wait_until("nothing is stored", PATIENCE, || manager.stored().is_empty());
    // The kernel has two files of its own there.
    let places = fs::read_dir(bpffs).unwrap().flatten().filter(|entry| entry.path().is_dir());
    assert_eq!(places.count(), 0, "pins are left");
}
