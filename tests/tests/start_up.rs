//! What the daemon needs of the machine: what is missing is one clear line.

use std::{
    fs, io,
    os::unix::{fs::PermissionsExt, process::CommandExt},
    process::Command,
};

use mcr_common::abi;
use nix::sys::signal::Signal;
use tests::{
    Process, Relay, Site, Source,
    bpf::{self, ForeignXdp},
    deprive::{
        CAP_BPF, CAP_IPC_LOCK, CAP_NET_ADMIN, CAP_NET_RAW, NO_BPF, with_limit, without_capabilities,
        without_syscall,
    },
    relay::{CALL, binary},
    source::Stream,
};

/// Checks that the daemon refuses to start with a line that contains `words`, and leaves no trace.
#[track_caller]
fn check(site: &Site, command: &mut Command, words: &[&str]) {
    let line = Relay::refused(command);
    for word in words {
        assert!(line.contains(word), "no '{word}' in: {line}");
    }
    assert!(!site.scratch.dir().join("mcr.sock").exists(), "a socket file is left");
    assert_eq!(site.relay.processes(), [0u32; 0]);
}

#[test]
fn what_these_tests_take_away_is_gone() {
    let site = Site::default();
    let mut command = site.relay.command("cat");
    command.arg("/proc/self/status");
    without_capabilities(&mut command, &[CAP_NET_ADMIN, CAP_BPF]);
    without_syscall(&mut command, libc::SYS_io_uring_setup, libc::EPERM);
    let answer = Process::spawn(&mut command).answer(CALL);
    let field = |name: &str| {
        let line = answer.ok().lines().find(|line| line.starts_with(name));
        line.and_then(|line| line.split_whitespace().nth(1)).unwrap_or_else(|| panic!("no {name}: {answer}"))
    };
    let effective = u64::from_str_radix(field("CapEff:"), 16).unwrap();
    assert_eq!(effective & (1 << CAP_NET_ADMIN | 1 << CAP_BPF), 0);
    assert_ne!(effective & 1 << CAP_NET_RAW, 0);
    assert_eq!(field("Seccomp:"), "2");
}

#[test]
fn a_missing_capability_is_named() {
    let site = Site::default();
    for (capabilities, name) in [(&[CAP_NET_ADMIN][..], "CAP_NET_ADMIN"), (&[CAP_NET_RAW], "CAP_NET_RAW")] {
        let mut command = Relay::command(&site);
        without_capabilities(&mut command, capabilities);
        check(&site, &mut command, &[name]);
    }
    for datapath in ["af-xdp", "redirect"] {
        let mut command = Relay::command(&site);
        without_capabilities(command.args(["--datapath", datapath]), NO_BPF);
        check(&site, &mut command, &["CAP_BPF", "--datapath af-packet"]);
    }
}

#[test]
fn frames_that_do_not_fit_are_refused_with_the_sum() {
    let site = Site::default();
    let tight = |datapath: &str, workers: &str| {
        let mut command = Relay::command(&site);
        command.args(["--datapath", datapath, "--workers", workers]);
        command
    };
    // One queue's UMEM takes 16 MiB of locked memory.
    let mut command = tight("af-xdp", "1");
    with_limit(&mut command, libc::RLIMIT_MEMLOCK, 4 << 20);
    without_capabilities(&mut command, &[CAP_IPC_LOCK]);
    let sum = "1 RX queues x 8192 frames x 2048 bytes = 16.0 MiB";
    check(&site, &mut command, &[sum, "the limit is 4.0 MiB", "CAP_IPC_LOCK", "LimitMEMLOCK"]);
    // Fewer frames fit.
    let mut command = tight("af-xdp", "1");
    with_limit(command.args(["--frames", "2048"]), libc::RLIMIT_MEMLOCK, 4 << 20);
    without_capabilities(&mut command, &[CAP_IPC_LOCK]);
    let mut relay = Relay::spawn(&site, &mut command);
    relay.signal(Signal::SIGTERM);
    assert!(relay.wait(CALL).success());
    let mut command = tight("af-xdp", "1");
    check(
        &site,
        command.args(["--frames", "2048", "--rx-ring", "4096"]),
        &["--rx-ring 4096", "--frames 2048"],
    );
    let mut command = tight("af-packet", "4");
    with_limit(&mut command, libc::RLIMIT_NOFILE, 200);
    check(&site, &mut command, &["= 305, and the limit is 200", "LimitNOFILE"]);
    // What was asked for by `auto` is served by what fits.
    let mut command = tight("auto", "1");
    with_limit(&mut command, libc::RLIMIT_MEMLOCK, 4 << 20);
    without_capabilities(&mut command, &[CAP_IPC_LOCK]);
    let relay = Relay::spawn(&site, &mut command);
    let rule =
        relay.add_with("cam1", "239.1.1.1:5000@in0", &["239.2.2.2:6000@out0"], &["--datapath", "auto"]);
    assert_eq!(rule.datapath.as_deref(), Some("af-packet"));
    assert!(rule.datapath_why.contains(sum), "{rule:?}");
    assert_eq!(relay.log().matches(sum).count(), 1, "one warning:\n{}", relay.log());
}

/// `CAP_PERFMON`, which is documented too, is among those taken away: without it the verifier is at its strictest.
#[test]
fn the_documented_capabilities_suffice() {
    const NEEDED: [libc::c_ulong; 4] = [CAP_NET_ADMIN, CAP_NET_RAW, CAP_IPC_LOCK, CAP_BPF];
    const LAST: libc::c_ulong = 40;
    const OTHERS: &[libc::c_ulong] = &{
        let mut others = [0; LAST as usize + 1 - NEEDED.len()];
        let (mut capability, mut place) = (0, 0);
        while capability <= LAST {
            if capability != NEEDED[0]
                && capability != NEEDED[1]
                && capability != NEEDED[2]
                && capability != NEEDED[3]
            {
                others[place] = capability;
                place += 1;
            }
            capability += 1;
        }
        others
    };
    let site = Site::default();
    let mut command = Relay::command(&site);
    without_capabilities(&mut command, OTHERS);
    let relay = Relay::spawn(&site, &mut command);
    relay.add("cam1", "239.1.1.1:5000@in0", &["239.2.2.2:6000@out0"]);
    site.segments[0].wait_until_joined("239.1.1.1".parse().unwrap());
    Source::play(site.source(), Stream { count: 1_000, ..Stream::to("239.1.1.1:5000".parse().unwrap()) });
    assert_eq!(relay.balanced("cam1", 1_000).outputs[0].sent, 1_000);
}

#[test]
fn io_uring_that_is_blocked_is_named() {
    let site = Site::default();
    for errno in [libc::EPERM, libc::ENOSYS] {
        let mut command = Relay::command(&site);
        without_syscall(&mut command, libc::SYS_io_uring_setup, errno);
        check(&site, &mut command, &["io_uring"]);
    }
}

#[test]
fn bpf_that_is_blocked_is_named() {
    let site = Site::default();
    for errno in [libc::EPERM, libc::ENOSYS] {
        let mut command = Relay::command(&site);
        without_syscall(command.args(["--datapath", "af-xdp"]), libc::SYS_bpf, errno);
        let line = Relay::refused(&mut command);
        assert!(line.to_lowercase().contains("bpf"), "{line}");
    }
}

#[test]
fn an_object_of_another_version_is_refused_with_both() {
    let site = Site::default();
    let file = site.scratch.dir().join("other.bpf.o");
    fs::write(&file, bpf::object_of_abi(77)).unwrap();
    let ours = abi::ABI_VERSION.to_string();
    check(&site, Relay::command(&site).arg("--bpf-object").arg(&file), &["77", &ours]);
}

#[test]
fn what_is_no_object_is_refused() {
    let site = Site::default();
    let file = site.scratch.dir().join("not.bpf.o");
    for content in [&b""[..], b"\x7fELF and then nothing", b"a text"] {
        fs::write(&file, content).unwrap();
        check(&site, Relay::command(&site).arg("--bpf-object").arg(&file), &["not.bpf.o"]);
    }
    let missing = site.scratch.dir().join("missing.bpf.o");
    check(&site, Relay::command(&site).arg("--bpf-object").arg(missing), &["missing.bpf.o"]);
}

#[test]
fn the_object_may_be_given_as_a_file() {
    let site = Site::default();
    let file = site.scratch.dir().join("same.bpf.o");
    fs::write(&file, bpf::object()).unwrap();
    let relay = Relay::start_with(&site, &["--bpf-object", file.to_str().unwrap()]);
    relay.add("cam1", "239.1.1.1:5000@in0", &["239.2.2.2:6000@out0"]);
}

#[test]
fn a_socket_path_that_is_too_long_is_refused() {
    let site = Site::default();
    // sun_path has 108 bytes.
    let long = site.scratch.dir().join("s".repeat(120));
    let mut command = site.relay.command(binary());
    command.args(["run", "--control"]).arg(&long).arg("--pin-root").arg(site.scratch.pin_root());
    let line = Relay::refused(&mut command);
    assert!(line.contains("107"), "{line}");
    let mut command = site.relay.command(binary());
    let answer = Process::spawn(command.args(["ping", "--control"]).arg(&long)).answer(CALL);
    assert!(answer.refused(1).contains("107"), "{answer}");
}

#[test]
fn without_permission_on_the_socket_a_call_is_1_and_says_so() {
    let site = Site::default();
    let relay = Relay::start(&site);
    // Where anyone can run it, wherever the workspace is.
    let program = site.scratch.dir().join("mcr");
    fs::copy(binary(), &program).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    fs::set_permissions(site.scratch.dir(), fs::Permissions::from_mode(0o755)).unwrap();
    let mut command = site.relay.command(&program);
    command.args(["ping", "--control"]).arg(relay.control());
    // SAFETY: between fork and exec the closure makes system calls only.
    unsafe {
        command.pre_exec(|| {
            let nobody = 65_534;
            if libc::setgroups(0, std::ptr::null()) != 0
                || libc::setgid(nobody) != 0
                || libc::setuid(nobody) != 0
            {
                return Err(io::Error::last_os_error());
            }
            Ok(())
        });
    }
    let answer = Process::spawn(&mut command).answer(CALL);
    assert!(answer.refused(1).to_lowercase().contains("permission"), "{answer}");
}

#[test]
fn a_strangers_program_in_the_slot_is_named_and_left_alone() {
    let site = Site::default();
    let foreign = ForeignXdp::attach(&site.relay, "in0");
    let relay = Relay::start(&site);
    let attached =
        || site.relay.json("ip", &["-j", "-d", "link", "show", "in0"])[0]["xdp"]["prog"]["id"].clone();
    let call = [
        "rule",
        "add",
        "cam1",
        "--datapath",
        "af-xdp",
        "--in",
        "239.1.1.1:5000@in0",
        "--out",
        "239.2.2.2:6000@out0",
    ];
    let answer = relay.cli(&call);
    let line = answer.refused(1);
    assert!(line.contains("in0"), "{answer}");
    assert!(line.contains(&format!("bpftool prog show id {}", foreign.id)), "{answer}");
    assert_eq!(attached(), foreign.id);
    // Once the slot is free, the same call is done.
    drop(foreign);
    relay.cli(&call).ok();
    relay.wait_until_active("cam1");
    assert!(!attached().is_null());
}

#[test]
fn a_strangers_program_on_another_interface_is_no_hindrance() {
    let site = Site::default();
    let foreign = ForeignXdp::attach(&site.relay, "out1");
    let relay = Relay::start(&site);
    relay.add("cam1", "239.1.1.1:5000@in0", &["239.2.2.2:6000@out0"]);
    relay.remove("cam1");
    drop(relay);
    let links = site.relay.json("ip", &["-j", "-d", "link", "show", "out1"]);
    assert_eq!(links[0]["xdp"]["prog"]["id"], foreign.id);
}
