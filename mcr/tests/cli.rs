//! The binary as a script sees it: exit status, one line on stderr, what is on stdout. No daemon runs.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::{
    fs::{self, File, Permissions},
    io::{BufRead, BufReader, Write},
    os::fd::AsRawFd,
    os::unix::{fs::PermissionsExt, net::UnixListener, process::CommandExt},
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    thread,
};

/// A directory of the test's own.
struct Dir(PathBuf);

impl Dir {
    fn new(test: &str) -> Self {
        let path = std::env::temp_dir().join(format!("mcr-cli-{test}-{}", std::process::id()));
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    fn socket(&self) -> PathBuf {
        self.0.join("mcr.sock")
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn mcr(control: &Path, arguments: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mcr"));
    command.args(arguments.split_whitespace()).env("MCR_CONTROL", control).stdin(Stdio::null());
    command
}

/// Runs a command that must fail: with this status, nothing on stdout and one line on stderr.
fn refused(command: &mut Command, status: i32) -> String {
    let Output { status: got, stdout, stderr } = command.output().unwrap();
    let stderr = String::from_utf8(stderr).unwrap();
    assert_eq!((got.code(), stdout.len()), (Some(status), 0), "{stderr}");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    stderr.strip_prefix("mcr: ").unwrap().trim_end().to_owned()
}

/// Answers one request on the socket with this result, and returns the request.
fn answer(listener: UnixListener, result: &'static str) -> thread::JoinHandle<String> {
    thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut request = String::new();
        BufReader::new(stream.try_clone().unwrap()).read_line(&mut request).unwrap();
        writeln!(stream, "{{\"jsonrpc\":\"2.0\",\"id\":1,\"result\":{result}}}").unwrap();
        request
    })
}

const ADDED: &str = r#"{"schema":1,"outcome":"added","rule":{"name":"cam1","origin":"cli","in":"239.1.1.1:5000@eth0","out":[{"to":"239.2.2.2:6000@eth1","health":"active"}],"datapath":"af-xdp","datapath_asked":"auto","datapath_why":"","merge":false,"link_local":false,"health":"active"},"warnings":["mind the MTU"]}"#;

#[test]
fn no_daemon_is_status_3_for_every_command_that_needs_one() {
    let dir = Dir::new("absent");
    for arguments in [
        "ping",
        "ping --json",
        "status",
        "stats",
        "stats --watch",
        "stats cam1",
        "workers",
        "events",
        "rule list",
        "rule show cam1",
        "rule remove cam1",
        "rule add --in 239.1.1.1:5000@eth0 --out 239.2.2.2:6000@eth1",
        "rule set cam1 --add-out 239.2.2.2:6000@eth1",
        "log-level get",
        "log-level set debug",
        "stop",
    ] {
        let line = refused(&mut mcr(&dir.socket(), arguments), 3);
        assert!(line.starts_with(&format!("no daemon on {} (", dir.socket().display())), "{line}");
    }
}

#[test]
fn bad_input_is_answered_without_a_daemon() {
    let dir = Dir::new("bad");
    for (arguments, line) in [
        (
            "rule add --in udp://@239.1.1.1:5000 --out 239.2.2.2:6000@eth1",
            "'udp://@239.1.1.1:5000' is no endpoint: it is a URL (udp); write 239.1.1.1:5000@INTERFACE",
        ),
        (
            "rule set cam1 --add-out 239.2.2.2:6000@eth1@if12",
            "'239.2.2.2:6000@eth1@if12' is no endpoint: 'eth1@if12' is how `ip link` shows eth1 and its peer; \
             write 239.2.2.2:6000@eth1",
        ),
        (
            "rule show 1cam",
            "'1cam' is no rule name: start with a letter, go on with letters, digits, '-', '_' or '.', at most 63",
        ),
    ] {
        assert_eq!(refused(&mut mcr(&dir.socket(), arguments), 1), line);
    }
}

#[test]
fn usage_is_status_2() {
    let dir = Dir::new("usage");
    for arguments in [
        "",
        "fly",
        "rule",
        "rule add --in 239.1.1.1:5000@eth0",
        "rule set cam1",
        "rule show",
        "rule set cam1 --datapath fast",
        "log-level set loud",
        "top --sort colour",
        "top --interval 0",
        "run --workers 0",
    ] {
        assert_eq!(mcr(&dir.socket(), arguments).output().unwrap().status.code(), Some(2), "{arguments}");
    }
}

#[test]
fn a_socket_path_too_long_is_refused() {
    let line = refused(&mut mcr(Path::new(&format!("/tmp/{}", "x".repeat(103))), "ping"), 1);
    assert!(
        line.contains("is too long (108 bytes, the kernel takes 107): choose another with --control"),
        "{line}"
    );
}

#[test]
fn a_socket_that_is_not_ours_is_refused_and_named() {
    let dir = Dir::new("denied");
    fs::set_permissions(&dir.0, Permissions::from_mode(0o755)).unwrap();
    let _listener = UnixListener::bind(dir.socket()).unwrap();
    fs::set_permissions(dir.socket(), Permissions::from_mode(0o000)).unwrap();
    let binary = File::open(env!("CARGO_BIN_EXE_mcr")).unwrap();
    let mut command = mcr(&dir.socket(), "ping");
    if nix::unistd::geteuid().is_root() {
        // Root may do anything: be someone else, who may not be able to walk to the build directory.
        command = Command::new(format!("/proc/self/fd/{}", binary.as_raw_fd()));
        command.arg("ping").env("MCR_CONTROL", dir.socket()).uid(65534).gid(65534);
    }
    let line = refused(&mut command, 1);
    let start = format!("permission denied on {}: it belongs to user ", dir.socket().display());
    assert!(line.starts_with(&start), "{line}");
    assert!(line.ends_with("(mode 0000); use sudo, or become one of them"), "{line}");
}

#[test]
fn an_answer_is_text_or_the_daemons_own_json() {
    let dir = Dir::new("answer");
    for (json, stdout, stderr) in [
        ("", "added cam1: 239.1.1.1:5000@eth0 -> 239.2.2.2:6000@eth1\n", "warning: mind the MTU\n"),
        ("--json", &format!("{ADDED}\n"), ""),
    ] {
        let daemon = answer(UnixListener::bind(dir.socket()).unwrap(), ADDED);
        let arguments =
            format!("rule add cam1 --in 239.1.1.1:05000@eth0 --out 239.2.2.2:6000@eth1,ttl=16 {json}");
        let output = mcr(&dir.socket(), &arguments).output().unwrap();
        assert_eq!(output.status.code(), Some(0));
        assert_eq!(String::from_utf8(output.stdout).unwrap(), stdout);
        assert_eq!(String::from_utf8(output.stderr).unwrap(), stderr);
        assert_eq!(
            daemon.join().unwrap(),
            "{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"rule.add\",\"params\":{\"name\":\"cam1\",\
             \"in\":\"239.1.1.1:5000@eth0\",\"out\":[\"239.2.2.2:6000@eth1\"],\
             \"merge\":false,\"link_local\":false}}\n"
        );
        fs::remove_file(dir.socket()).unwrap();
    }
}

#[test]
fn a_reader_that_is_gone_is_no_failure() {
    let dir = Dir::new("pipe");
    let daemon = answer(UnixListener::bind(dir.socket()).unwrap(), ADDED);
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut command = mcr(&dir.socket(), "rule remove cam1 --json");
    let output = command.stdout(writer).stderr(Stdio::piped()).spawn().unwrap().wait_with_output().unwrap();
    assert_eq!((output.status.code(), output.stderr.len()), (Some(0), 0));
    daemon.join().unwrap();
}
