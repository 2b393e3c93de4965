//! What the daemon and its workers may do, and what they can no longer do.

#![expect(clippy::unwrap_used, reason = "where it fails, the test fails and says where")]

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt},
    process::Command,
};

use nix::{
    sys::{ptrace, signal::Signal, wait::waitpid},
    unistd::Pid,
};
use tests::{
    Ground, Process, Relay, Site, Source,
    deprive::{
        CAP_BPF, CAP_IPC_LOCK, CAP_NET_ADMIN, CAP_NET_RAW, CAP_PERFMON, NOBODY, as_ordinary_user, with_limit,
        without_capabilities,
    },
    relay::{CALL, binary},
    site::Plan,
    source::Stream,
    wait::PATIENCE,
};

/// What is documented.
const ALL: u64 = 1 << CAP_NET_ADMIN | 1 << CAP_NET_RAW | 1 << CAP_IPC_LOCK | 1 << CAP_BPF | 1 << CAP_PERFMON;

/// `/proc/PID/status`.
#[track_caller]
fn status(pid: u32) -> BTreeMap<String, String> {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let fields = text.lines().filter_map(|line| line.split_once(':'));
    fields.map(|(name, value)| (name.to_owned(), value.trim().to_owned())).collect()
}

#[track_caller]
fn capabilities(pid: u32, set: &str) -> u64 {
    u64::from_str_radix(&status(pid)[set], 16).unwrap()
}

#[track_caller]
fn relays_1000(relay: &Relay<'_>, site: &Site, datapath: &str) {
    relay.add_with("cam1", "239.1.1.1:5000@in0", &["239.2.2.2:6000@out0"], &["--datapath", datapath]);
    site.segments[0].wait_until_joined("239.1.1.1".parse().unwrap());
    Source::play(site.source(), Stream { count: 1_000, ..Stream::to("239.1.1.1:5000".parse().unwrap()) });
    assert_eq!(relay.balanced("cam1", 1_000).outputs[0].sent, 1_000);
}

/// Checks that a worker has given up all, and that its daemon has kept what is documented of what it had.
#[track_caller]
fn check_given_up(relay: &Relay<'_>, uid: u32, kept: u64) {
    let daemon = status(relay.pid());
    for set in ["CapEff", "CapPrm"] {
        assert_eq!(capabilities(relay.pid(), set), kept, "the daemon's {set}");
    }
    assert_eq!(daemon["NoNewPrivs"], "1");
    let workers = relay.workers();
    assert!(!workers.is_empty());
    for worker in workers {
        let pid = worker.pid.unwrap();
        for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
            assert_eq!(capabilities(pid, set), 0, "the worker's {set}");
        }
        let worker = status(pid);
        assert_eq!((worker["NoNewPrivs"].as_str(), worker["Seccomp"].as_str()), ("1", "2"));
        for pid in [pid, relay.pid()] {
            let ids: Vec<u32> = status(pid)["Uid"].split_whitespace().map(|id| id.parse().unwrap()).collect();
            assert_eq!(ids, [uid; 4], "users of {pid}");
        }
    }
}

fn what_is_not_used_is_given_up() {
    let site = Site::default();
    let relay = Relay::start(&site);
    relays_1000(&relay, &site, site.ground.datapath());
    match site.ground {
        // What it is given is all but that.
        Ground::OrdinaryUser => check_given_up(&relay, NOBODY, ALL & !(1 << CAP_PERFMON)),
        _ => check_given_up(&relay, 0, ALL),
    }
}

tests::on_every_ground!(what_is_not_used_is_given_up);
tests::as_ordinary_user!(what_is_not_used_is_given_up);

#[test]
fn root_becomes_the_user_that_is_named() {
    let site = Site::build(Plan { ground: Ground::OrdinaryUser, ..Plan::default() });
    let nobody = nix::unistd::User::from_uid(NOBODY.into()).unwrap().unwrap();
    let control = site.scratch.dir().join("own/mcr.sock");
    for datapath in ["af-xdp", "af-packet"] {
        let mut command = site.relay.command(binary());
        command.args(["run", "--user", &nobody.name, "--group", "daemon", "--control"]).arg(&control);
        command.arg("--pin-root").arg(site.scratch.pin_root());
        let mut relay = Relay::spawn_at(&site, &mut command, control.clone());
        relays_1000(&relay, &site, datapath);
        check_given_up(&relay, NOBODY, ALL);
        let socket = fs::metadata(&control).unwrap();
        let daemon = nix::unistd::Group::from_name("daemon").unwrap().unwrap();
        assert_eq!((socket.uid(), socket.gid()), (NOBODY, daemon.gid.as_raw()));
        assert_eq!(socket.permissions().mode() & 0o7777, 0o660);
        relay.remove("cam1");
        relay.signal(Signal::SIGTERM);
        assert!(relay.wait(PATIENCE).success(), "{}", relay.log());
        assert!(!control.exists() && !site.scratch.pin_root().exists(), "something is left");
    }
}

#[test]
fn with_cap_perfmon_the_programs_are_not_fenced_against_speculation() {
    let site = Site::default();
    let bytes = |command: &mut Command| {
        let relay = Relay::spawn(&site, command);
        relay.add_with("cam1", "239.1.1.1:5000@in0", &["239.2.2.2:6000@out0"], &["--datapath", "af-xdp"]);
        let program = relay.pins("in0").join("program");
        let shown = site.relay.json("bpftool", &["-j", "prog", "show", "pinned", program.to_str().unwrap()]);
        relay.remove("cam1");
        shown["bytes_xlated"].as_u64().unwrap()
    };
    let mut fenced = Relay::command(&site);
    without_capabilities(&mut fenced, &[CAP_PERFMON]);
    let (fenced, plain) = (bytes(&mut fenced), bytes(&mut Relay::command(&site)));
    let mitigated = !fs::read_to_string("/proc/cmdline").unwrap().contains("mitigations=off");
    assert_eq!(plain < fenced, mitigated, "{plain} bytes with, {fenced} without");
}

#[test]
fn another_user_takes_over_what_a_stopped_or_killed_daemon_left() {
    let site = Site::build(Plan { ground: Ground::OrdinaryUser, ..Plan::default() });
    let control = site.scratch.dir().join("own/mcr.sock");
    let start = |user: Option<&str>| {
        let mut command = site.relay.command(binary());
        command.args(["run", "--control"]).arg(&control).arg("--pin-root").arg(site.scratch.pin_root());
        if let Some(user) = user {
            command.args(["--user", user]);
        }
        Relay::spawn_at(&site, &mut command, control.clone())
    };
    let mut users = [Some("nobody"), None, Some("daemon"), None, Some("nobody")].into_iter();
    for end in [Signal::SIGTERM, Signal::SIGKILL].into_iter().cycle().take(5) {
        let mut relay = start(users.next().unwrap());
        if relay.show_all().iter().any(|rule| rule.name == "cam1") {
            // What another user's daemon wrote down is believed.
            relay.wait_until_active("cam1");
            relay.remove("cam1");
        }
        relays_1000(&relay, &site, "af-xdp");
        relay.signal(end);
        relay.wait(PATIENCE);
    }
    for user in [Some("daemon"), None] {
        start(user).signal(Signal::SIGKILL);
    }
}

#[test]
fn what_a_link_among_the_pins_leads_to_is_left_alone() {
    let site = Site::build(Plan { ground: Ground::OrdinaryUser, ..Plan::default() });
    let victim = site.scratch.dir().join("victim/jobs");
    fs::create_dir_all(&victim).unwrap();
    fs::write(victim.join("job"), "not mcr's").unwrap();
    fs::create_dir(site.scratch.pin_root()).unwrap();
    let pins = site.scratch.pin_root().join(tests::relay::netns_cookie(&site.relay).to_string());
    std::os::unix::fs::symlink(victim.parent().unwrap(), pins).unwrap();
    let mut command = Relay::bare_command(&site);
    drop(Relay::spawn(&site, command.args(["--user", "nobody"])));
    assert_eq!(fs::read_to_string(victim.join("job")).unwrap(), "not mcr's");
    assert_eq!(fs::metadata(victim).unwrap().uid(), 0);
}

#[test]
fn a_stopped_worker_does_not_outlive_its_daemon() {
    let site = Site::default();
    let mut relay = Relay::start(&site);
    relay.add("cam1", "239.1.1.1:5000@in0", &["239.2.2.2:6000@out0"]);
    let worker = relay.workers()[0].pid.unwrap();
    nix::sys::signal::kill(Pid::from_raw(worker.cast_signed()), Signal::SIGSTOP).unwrap();
    relay.signal(Signal::SIGKILL);
    relay.wait(PATIENCE);
    tests::wait_until("the worker is gone", PATIENCE, || !site.relay.processes().contains(&worker));
    relay.start_again(&site);
    relay.remove("cam1");
    relays_1000(&relay, &site, "af-xdp");
}

#[test]
fn users_and_groups_that_there_are_not_are_named() {
    let site = Site::default();
    for (option, what) in [("--user", "there is no user"), ("--group", "there is no group")] {
        let line = Relay::refused(Relay::command(&site).args([option, "mcr-nobody-knows"]));
        assert!(line.contains(what) && line.contains("mcr-nobody-knows"), "{line}");
    }
    let site = Site::build(Plan { ground: Ground::OrdinaryUser, ..Plan::default() });
    let line = Relay::refused(Relay::command(&site).args(["--user", "nobody"]));
    assert!(line.contains("--user is for root") && line.contains(&NOBODY.to_string()), "{line}");
}

/// A daemon of an ordinary user, with these capabilities.
fn with_only(site: &Site, capabilities: &'static [libc::c_ulong]) -> Command {
    let mut command = Relay::bare_command(site);
    as_ordinary_user(&mut command, capabilities);
    command
}

#[test]
fn what_an_ordinary_user_lacks_is_named_with_how_to_give_it() {
    let site = Site::build(Plan { ground: Ground::OrdinaryUser, ..Plan::default() });
    for (given, lacking) in [
        (&[CAP_NET_RAW, CAP_IPC_LOCK, CAP_BPF][..], "mcr run needs CAP_NET_ADMIN:"),
        (&[CAP_NET_ADMIN, CAP_IPC_LOCK, CAP_BPF], "mcr run needs CAP_NET_RAW:"),
        (&[], "mcr run needs CAP_NET_ADMIN and CAP_NET_RAW:"),
    ] {
        let line = Relay::refused(&mut with_only(&site, given));
        for word in
            [lacking, "AmbientCapabilities=", "--ambient-caps", "CAP_BPF", "CAP_IPC_LOCK", "CAP_PERFMON"]
        {
            assert!(line.contains(word), "no '{word}' in: {line}");
        }
    }
    let line = Relay::refused(
        with_only(&site, &[CAP_NET_ADMIN, CAP_NET_RAW, CAP_IPC_LOCK]).args(["--datapath", "af-xdp"]),
    );
    assert!(line.contains("CAP_BPF") && line.contains("--datapath af-packet"), "{line}");
    let mut command = with_only(&site, &[CAP_NET_ADMIN, CAP_NET_RAW, CAP_BPF]);
    with_limit(&mut command, libc::RLIMIT_MEMLOCK, 1 << 20);
    let line = Relay::refused(command.args(["--datapath", "af-xdp"]));
    assert!(line.contains("CAP_IPC_LOCK") && line.contains("LimitMEMLOCK"), "{line}");
}

#[test]
fn a_place_for_pins_that_is_closed_is_named() {
    let site = Site::build(Plan { ground: Ground::OrdinaryUser, ..Plan::default() });
    let bpffs = site.scratch.pin_root().parent().unwrap();
    fs::set_permissions(bpffs, fs::Permissions::from_mode(0o755)).unwrap();
    std::os::unix::fs::chown(bpffs, Some(0), Some(0)).unwrap();
    let line = Relay::refused(&mut Relay::command(&site));
    assert!(line.contains("--pin-root") && line.contains(&format!("user {NOBODY}")), "{line}");
}

#[test]
fn who_changed_something_is_logged() {
    let site = Site::default();
    let relay = Relay::start(&site);
    relay.add("cam1", "239.1.1.1:5000@in0", &["239.2.2.2:6000@out0"]);
    relay.set("cam1", &["--add-out", "239.2.2.3:6000@out0"]);
    relay.remove("cam1");
    relay.cli(&["rule", "remove", "cam1"]).refused(1);
    relay.cli(&["log-level", "set", "error"]).ok();
    let asked: Vec<_> =
        relay.log().lines().filter(|line| line.contains("asked=")).map(str::to_owned).collect();
    let expected = [
        r#"asked=rule.add rule=cam1 what="239.1.1.1:5000@in0 -> 239.2.2.2:6000@out0" outcome=added"#,
        r#"asked=rule.set rule=cam1 what="add_out 239.2.2.3:6000@out0" outcome=changed"#,
        "asked=rule.remove rule=cam1 outcome=removed",
        "asked=rule.remove rule=cam1 outcome=refused why=",
        r#"asked=log_level.set what="error" outcome=done"#,
    ];
    assert_eq!(asked.len(), expected.len(), "what changes nothing is not logged: {asked:?}");
    for (line, expected) in asked.iter().zip(expected) {
        assert!(line.contains(expected) && line.contains("uid=0") && line.contains("pid="), "{line}");
    }
}

#[test]
fn others_than_user_and_group_are_turned_away() {
    let site = Site::default();
    let relay = Relay::start(&site);
    let mut call = relay.call(&["status"]);
    as_ordinary_user(&mut call, &[]);
    let answer = Process::spawn(&mut call).answer(CALL);
    assert_eq!(answer.status, 1, "{answer}");
    assert!(answer.stderr.contains("ermission"), "{answer}");
}

/// Makes a worker, wherever it is, make a system call; what the kernel answered it.
#[cfg(target_arch = "x86_64")]
fn make_call(pid: Pid, number: libc::c_long, arguments: [u64; 3]) -> i64 {
    const SYSCALL: i64 = 0x050f;
    ptrace::attach(pid).unwrap();
    waitpid(pid, None).unwrap();
    let before = ptrace::getregs(pid).unwrap();
    let at = before.rip as ptrace::AddressType;
    let code = ptrace::read(pid, at).unwrap();
    ptrace::write(pid, at, (code & !0xffff) | SYSCALL).unwrap();
    let mut registers = before;
    registers.rax = number.cast_unsigned();
    // Not in a call: it is not to be begun again.
    registers.orig_rax = u64::MAX;
    [registers.rdi, registers.rsi, registers.rdx] = arguments;
    ptrace::setregs(pid, registers).unwrap();
    ptrace::step(pid, None).unwrap();
    waitpid(pid, None).unwrap();
    let answer = ptrace::getregs(pid).unwrap().rax.cast_signed();
    ptrace::write(pid, at, code).unwrap();
    ptrace::setregs(pid, before).unwrap();
    ptrace::detach(pid, None).unwrap();
    answer
}

/// That its ring takes no other operation than its own is tested beside the ring.
#[cfg(target_arch = "x86_64")]
fn a_worker_can_neither_open_nor_connect_nor_execute() {
    let site = Site::default();
    let relay = Relay::start(&site);
    relay.add("cam1", "239.1.1.1:5000@in0", &["239.2.2.2:6000@out0"]);
    let pid = Pid::from_raw(relay.workers()[0].pid.unwrap().cast_signed());
    let refused = -i64::from(libc::EPERM);
    let here = u64::from(libc::AT_FDCWD.cast_unsigned());
    let [packet, raw, inet] = [libc::AF_PACKET, libc::SOCK_RAW, libc::AF_INET].map(i32::cast_unsigned);
    let executable = u64::from((libc::PROT_READ | libc::PROT_EXEC).cast_unsigned());
    for (what, number, arguments) in [
        ("openat", libc::SYS_openat, [here, 0, 0]),
        ("open", libc::SYS_open, [0, 0, 0]),
        ("a packet socket", libc::SYS_socket, [packet.into(), raw.into(), 0]),
        ("a raw socket", libc::SYS_socket, [inet.into(), raw.into(), 1]),
        ("another ring", libc::SYS_io_uring_setup, [8, 0, 0]),
        ("execve", libc::SYS_execve, [0, 0, 0]),
        ("a program", libc::SYS_bpf, [0, 0, 0]),
        ("executable memory", libc::SYS_mmap, [0, 4096, executable]),
        ("kill", libc::SYS_kill, [1, 0, 0]),
    ] {
        assert_eq!(make_call(pid, number, arguments), refused, "{what}");
    }
    // The test itself would see what is allowed.
    assert_eq!(make_call(pid, libc::SYS_getpid, [0; 3]), i64::from(pid.as_raw()));
    // It relays on.
    site.segments[0].wait_until_joined("239.1.1.1".parse().unwrap());
    Source::play(site.source(), Stream { count: 1_000, ..Stream::to("239.1.1.1:5000".parse().unwrap()) });
    assert_eq!(relay.balanced("cam1", 1_000).outputs[0].sent, 1_000);
    assert_eq!(relay.workers()[0].restarts, 0);
}

#[cfg(target_arch = "x86_64")]
mod by_datapath {
    use super::{Ground, a_worker_can_neither_open_nor_connect_nor_execute as check};

    #[test]
    fn an_af_xdp_worker_is_confined() {
        Ground::Veth.run(check);
    }

    #[test]
    fn an_af_packet_worker_is_confined() {
        Ground::PlainVeth.run(check);
    }

    #[test]
    fn a_worker_without_ebpf_is_confined() {
        Ground::WithoutBpf.run(check);
    }
}
