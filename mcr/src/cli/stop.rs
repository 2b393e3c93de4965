//! `mcr stop`: ends the daemon, and returns when it has ended.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use anyhow::bail;

use super::remote::Remote;
use crate::{
    api::{
        client::ClientError,
        socket,
        wire::{Request, Stop, Stopping},
    },
    ebpf,
    supervisor::journal,
};

/// How long a daemon may take to end.
const DEADLINE: Duration = Duration::from_secs(30);

/// End the daemon and wait until it has ended
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Let rules on the datapath redirect go on without it, until the next `mcr run`
    #[arg(long)]
    keep: bool,
    #[command(flatten)]
    remote: Remote,
}

impl Args {
    pub fn run(self) -> anyhow::Result<()> {
        let mut client = self.remote.connect().inspect_err(|error| {
            if matches!(error, ClientError::NoDaemon { .. }) {
                hint(self.remote.control());
            }
        })?;
        let daemon = Daemon { socket: identity(self.remote.control()), pid: client.daemon_pid() };
        let stopping: Stopping = client.call(&Request::Stop(Stop { keep: self.keep }))?;
        let deadline = Instant::now() + DEADLINE;
        while daemon.is_there(self.remote.control()) {
            if Instant::now() > deadline {
                bail!(
                    "the daemon (pid {}) still runs {} s after it was told to stop: see its log",
                    stopping.pid,
                    DEADLINE.as_secs()
                );
            }
            thread::sleep(Duration::from_millis(10));
        }
        self.remote.show(&stopping, |stopping, _| {
            let kept = match (self.keep, stopping.kept.is_empty()) {
                (false, _) => String::new(),
                (true, true) => "; no rule goes on: none is on the datapath redirect".to_owned(),
                (true, false) => format!("; these go on without it: {}", stopping.kept.join(", ")),
            };
            format!("stopped (pid {}){kept}\n", stopping.pid)
        })
    }
}

/// Without a daemon there may be what one left.
fn hint(control: &Path) {
    let Some(pins) = journal::pins_left(&socket::journal(control)) else { return };
    let places = ebpf::linked(&pins);
    let names: Vec<_> = places.iter().filter_map(|place| place.file_name()?.to_str()).collect();
    if !names.is_empty() {
        eprintln!(
            "mcr: what comes in on {} is relayed on without a daemon: `mcr run` takes it over, and `mcr stop` ends it then",
            names.join(", ")
        );
    }
}

/// What must be gone.
struct Daemon {
    /// A service manager may have started the next daemon before we look: then the path has another socket.
    socket: Option<(u64, u64)>,
    /// Absent where the daemon lives in a PID namespace that is hidden from us.
    pid: Option<i32>,
}

impl Daemon {
    fn is_there(&self, control: &Path) -> bool {
        let socket = identity(control);
        (socket.is_some() && socket == self.socket) || self.pid.is_some_and(runs)
    }
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    fs::metadata(path).ok().map(|metadata| (metadata.dev(), metadata.ino()))
}

/// Whether the process has not ended yet; one that its parent has not waited for has.
fn runs(pid: i32) -> bool {
    let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else { return false };
    // The state comes after the command's name, which may contain anything.
    let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
    !matches!(state, Some('Z' | 'X'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    #[test]
    fn a_process_that_ended_does_not_run() {
        let mut child = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        assert!(runs(pid));
        drop(child.stdin.take());
        let deadline = Instant::now() + Duration::from_secs(10);
        while runs(pid) {
            assert!(Instant::now() < deadline, "a process that nobody waited for counts as running");
            thread::yield_now();
        }
        child.wait().unwrap();
        assert!(!runs(pid));
    }
}
