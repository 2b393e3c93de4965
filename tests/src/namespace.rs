//! A network namespace with a name, entered by `setns` alone.
//!
//! `ip netns exec` is never used: it gives its child a private mount namespace, in which pins die with
//! the last process.

use std::{
    fs::{self, File},
    io::Write,
    os::{fd::AsRawFd, linux::fs::MetadataExt, unix::process::CommandExt},
    panic,
    path::{Path, PathBuf},
    process::{self, Command, Stdio},
    thread,
};

use nix::{
    sched::{CloneFlags, setns},
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::scratch::{self, NETNS_DIR};

/// Removed on drop, with every process in it.
#[derive(Debug)]
pub struct Namespace {
    name: String,
    file: File,
}

impl Namespace {
    /// A namespace with loopback up and IPv6 off.
    #[track_caller]
    pub fn new(role: &str) -> Self {
        scratch::sweep();
        let name = scratch::namespace_name(role);
        let made = Command::new("ip").args(["netns", "add", &name]).output().expect("ip (iproute2)");
        assert!(
            made.status.success(),
            "cannot make a network namespace (root needed): {}",
            String::from_utf8_lossy(&made.stderr)
        );
        let file = File::open(Path::new(NETNS_DIR).join(&name)).expect("the namespace just made");
        let namespace = Self { name, file };
        namespace.sysctl("ipv6/conf/all/disable_ipv6", "1");
        namespace.sysctl("ipv6/conf/default/disable_ipv6", "1");
        namespace.ip(&["link set lo up"]);
        namespace
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn path(&self) -> PathBuf {
        Path::new(NETNS_DIR).join(&self.name)
    }

    /// Runs `job` on a thread inside the namespace. Sockets made there stay there.
    #[track_caller]
    pub fn run<T: Send>(&self, job: impl FnOnce() -> T + Send) -> T {
        let result = thread::scope(|scope| {
            scope
                .spawn(|| {
                    setns(&self.file, CloneFlags::CLONE_NEWNET).expect("enter the namespace");
                    job()
                })
                .join()
        });
        result.unwrap_or_else(|panic| panic::resume_unwind(panic))
    }

    /// A command that will run inside the namespace, and dies with the thread that spawns it.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new(program);
        let netns = self.file.as_raw_fd();
        let parent = process::id();
        // SAFETY: between fork and exec the closure only makes system calls, which are async-signal-safe;
        // the descriptor is open as long as `self` is, and spawning without it fails rather than escapes.
        unsafe {
            command.pre_exec(move || {
                if libc::setns(netns, libc::CLONE_NEWNET) != 0
                    || libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0
                {
                    return Err(std::io::Error::last_os_error());
                }
                if libc::getppid().cast_unsigned() != parent {
                    return Err(std::io::Error::other("the test is gone"));
                }
                Ok(())
            });
        }
        command
    }

    /// Runs lines of `ip -batch`.
    #[track_caller]
    pub fn ip(&self, lines: &[&str]) {
        self.batch("ip", lines);
    }

    /// Runs lines of `bridge -batch`.
    #[track_caller]
    pub fn bridge(&self, lines: &[&str]) {
        self.batch("bridge", lines);
    }

    #[track_caller]
    fn batch(&self, program: &str, lines: &[&str]) {
        let mut child = self
            .command(program)
            .args(["-batch", "-"])
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap_or_else(|error| panic!("{program}: {error}"));
        let mut stdin = child.stdin.take().expect("piped");
        stdin.write_all(lines.join("\n").as_bytes()).expect("write to ip's stdin");
        drop(stdin);
        let output = child.wait_with_output().expect("wait for ip");
        assert!(
            output.status.success(),
            "{program} in {}: {lines:#?}: {}",
            self.name,
            String::from_utf8_lossy(&output.stderr)
        );
    }

    /// Output of a command run inside, which must succeed.
    #[track_caller]
    pub fn output(&self, program: &str, args: &[&str]) -> String {
        let output =
            self.command(program).args(args).output().unwrap_or_else(|error| panic!("{program}: {error}"));
        assert!(
            output.status.success(),
            "{program} {args:?} in {}: {}",
            self.name,
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8(output.stdout).expect("UTF-8")
    }

    /// What a command with a `-j` switch prints.
    #[track_caller]
    pub fn json(&self, program: &str, args: &[&str]) -> serde_json::Value {
        let text = self.output(program, args);
        if text.trim().is_empty() {
            return serde_json::Value::Null;
        }
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{program} {args:?}: {error}: {text}"))
    }

    /// Writes `/proc/sys/net/KEY`.
    #[track_caller]
    pub fn sysctl(&self, key: &str, value: &str) {
        let path = format!("/proc/sys/net/{key}");
        // The file shows the namespace of the task that opens it.
        let written = self.run(|| fs::write(&path, value));
        written.unwrap_or_else(|error| panic!("{path} = {value}: {error}"));
    }

    /// Writes `/proc/sys/net/KEY` where the kernel has it.
    #[track_caller]
    pub fn sysctl_if_there(&self, key: &str, value: &str) {
        if self.run(|| fs::exists(format!("/proc/sys/net/{key}"))).unwrap_or(false) {
            self.sysctl(key, value);
        }
    }

    /// Reads a file of `/proc/net` as this namespace sees it.
    #[track_caller]
    pub fn proc_net(&self, file: &str) -> String {
        let path = format!("/proc/thread-self/net/{file}");
        self.run(|| fs::read_to_string(&path)).unwrap_or_else(|error| panic!("{path}: {error}"))
    }

    /// The processes inside.
    pub fn processes(&self) -> Vec<u32> {
        let Ok(own) = self.file.metadata() else { return Vec::new() };
        let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
        entries
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .filter(|pid| {
                fs::metadata(format!("/proc/{pid}/ns/net"))
                    .is_ok_and(|other| other.st_ino() == own.st_ino() && other.st_dev() == own.st_dev())
            })
            .collect()
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        for pid in self.processes() {
            let _gone_already = kill(Pid::from_raw(pid.cast_signed()), Signal::SIGKILL);
        }
        remove(&self.name);
    }
}

/// Removes a namespace's name; the namespace goes with its last user.
pub(crate) fn remove(name: &str) {
    let _gone_already = Command::new("ip").args(["netns", "del", name]).output();
}
