//! A child process whose output is kept, and which does not outlive its value.

use std::{
    fs::File,
    os::unix::{fs::FileExt, process::ExitStatusExt},
    process::{Child, Command, ExitStatus, Stdio},
    time::Duration,
};

use nix::{
    sys::{
        memfd::{MFdFlags, memfd_create},
        signal::{Signal, kill},
    },
    unistd::Pid,
};

use crate::wait::wait_for;

/// Killed on drop.
#[derive(Debug)]
pub struct Process {
    child: Child,
    stdout: File,
    stderr: File,
    what: String,
}

impl Process {
    #[track_caller]
    pub fn spawn(command: &mut Command) -> Self {
        let what = format!("{command:?}");
        let (stdout, stderr) = (memory_file(), memory_file());
        let child = command
            .stdin(Stdio::null())
            .stdout(stdout.try_clone().expect("duplicate a memfd"))
            .stderr(stderr.try_clone().expect("duplicate a memfd"))
            .spawn()
            .unwrap_or_else(|error| panic!("{what}: {error}"));
        Self { child, stdout, stderr, what }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it has written so far.
    pub fn stdout(&self) -> String {
        contents(&self.stdout)
    }

    /// What it has written so far.
    pub fn stderr(&self) -> String {
        contents(&self.stderr)
    }

    #[track_caller]
    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id().cast_signed()), signal).expect("signal a child");
    }

    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("wait for a child")
    }

    /// Waits for its end. Panics with its output if that takes longer than `patience`.
    #[track_caller]
    pub fn wait(&mut self, patience: Duration) -> ExitStatus {
        let start = std::time::Instant::now();
        while start.elapsed() < patience {
            if let Some(status) = self.ended() {
                return status;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        panic!("still running after {patience:?}: {}\n{}{}", self.what, self.stdout(), self.stderr());
    }

    /// Waits for its end and takes its output.
    #[track_caller]
    pub fn answer(mut self, patience: Duration) -> Answer {
        let status = self.wait(patience);
        Answer {
            what: std::mem::take(&mut self.what),
            // As a shell has it: a signal is 128 and its number.
            status: status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0)),
            stdout: self.stdout(),
            stderr: self.stderr(),
        }
    }

    /// Waits for a line on its stderr that contains `text`.
    #[track_caller]
    pub fn wait_for_stderr(&mut self, text: &str, patience: Duration) -> String {
        let what = format!("'{text}' on stderr of {}", self.what);
        wait_for(&what, patience, || {
            let stderr = self.stderr();
            let line = stderr.lines().find(|line| line.contains(text)).map(str::to_owned);
            if line.is_none() {
                assert!(self.ended().is_none(), "{} ended:\n{}{stderr}", self.what, self.stdout());
            }
            line
        })
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ended_already = self.child.kill();
        let _reaped_already = self.child.wait();
    }
}

/// What a command that has ended left.
#[derive(Clone, Debug)]
pub struct Answer {
    pub what: String,
    pub status: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Answer {
    /// The command's output, if it ended with 0.
    #[track_caller]
    pub fn ok(&self) -> &str {
        assert_eq!(self.status, 0, "{self}");
        &self.stdout
    }

    /// As [`Self::ok`], parsed.
    #[track_caller]
    pub fn json<T: serde::de::DeserializeOwned>(&self) -> T {
        serde_json::from_str(self.ok()).unwrap_or_else(|error| panic!("{error}: {self}"))
    }

    /// The one line on stderr of a command that ended with `status` and printed nothing else.
    #[track_caller]
    pub fn refused(&self, status: i32) -> &str {
        assert_eq!(self.status, status, "{self}");
        assert_eq!(self.stdout, "", "{self}");
        let mut lines = self.stderr.lines().filter(|line| !line.trim().is_empty());
        let line = lines.next().unwrap_or_else(|| panic!("no word on stderr: {self}"));
        assert_eq!(lines.next(), None, "more than one line on stderr: {self}");
        line
    }
}

impl std::fmt::Display for Answer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{}\nexit status {}\nstdout: {}\nstderr: {}",
            self.what, self.status, self.stdout, self.stderr
        )
    }
}

fn memory_file() -> File {
    memfd_create(c"output", MFdFlags::MFD_CLOEXEC).expect("memfd_create").into()
}

/// Reads from the start, leaving the offset that the child writes at alone.
fn contents(file: &File) -> String {
    let len = file.metadata().map_or(0, |metadata| metadata.len());
    let mut bytes = vec![0; usize::try_from(len).expect("output fits memory")];
    file.read_exact_at(&mut bytes, 0).expect("read a memfd");
    String::from_utf8_lossy(&bytes).into_owned()
}
