//! A worker process: spawn, hand descriptors over, talk to, end.

use std::{
    io,
    os::{fd::OwnedFd, unix::process::ExitStatusExt},
    process::{ExitStatus, Stdio},
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use thiserror::Error;
use tokio::{
    io::{AsyncBufReadExt, AsyncRead, BufReader, unix::AsyncFd},
    process::{Child, Command as Process},
    sync::{mpsc, watch},
    time::timeout,
};

use crate::{
    rule::QueueId,
    supervisor::event::WorkerId,
    sys::{channel, service_manager},
    worker::protocol::{Command, CompiledRule, MAX_PACKET_BYTES, Report, Setup},
};

/// How long a worker may take to start or to answer before it counts as hung.
const ANSWER_DEADLINE: Duration = Duration::from_secs(2);

/// How long a worker may take to relay what it holds and end.
const DRAIN_DEADLINE: Duration = Duration::from_secs(2);

#[derive(Debug, Error)]
pub enum WorkerError {
    #[error("a worker cannot be spawned")]
    Spawn(#[source] io::Error),
    #[error("{why}")]
    Failed { why: String },
    #[error("the worker has ended")]
    Gone,
    #[error("the worker did not answer within {} s", ANSWER_DEADLINE.as_secs())]
    Silent,
    #[error("the worker cannot be spoken to")]
    Channel(#[from] io::Error),
}

/// The end of a worker.
#[derive(Debug)]
pub struct End {
    pub id: WorkerId,
    /// Which of the workers that had the id; none if it could not even be spawned.
    pub pid: Option<u32>,
    pub why: String,
    pub lived: Duration,
}

/// A worker that was spawned. Its [`End`] is told.
pub struct WorkerProcess {
    pub pid: u32,
    socket: AsyncFd<OwnedFd>,
    buffer: Vec<u8>,
    sequence: u64,
    ended: watch::Receiver<bool>,
    /// The worker's AF_XDP sockets, until they are in the XSKMAP.
    sockets: Vec<(QueueId, OwnedFd)>,
    /// Calls of the kernel that it had made when it was looked at last, and at how many looks none was new.
    pulse: (u64, u32),
}

/// Looks in a row, a second apart, at which a worker has made no call of the kernel: its timer makes four a second.
const STILL: u32 = 4;

/// Why a worker was killed by [`WorkerProcess::hangs`].
pub const HUNG: &str = "it gave no sign of life for 4 seconds and was killed";

impl WorkerProcess {
    /// Spawns a worker. It exists from now on, though it may be of no use: [`set_up`](Self::set_up) tells.
    pub fn spawn(id: &WorkerId, ends: mpsc::UnboundedSender<End>) -> Result<Self, WorkerError> {
        let (ours, theirs) = channel::pair().map_err(WorkerError::Spawn)?;
        let mut command = Process::new("/proc/self/exe");
        service_manager::hide_from(command.as_std_mut());
        let mut child = command
            .arg0("mcr")
            .args(["worker", &id.to_string()])
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(WorkerError::Spawn)?;
        let pid = child.id().ok_or(WorkerError::Gone)?;
        if let Some(stderr) = child.stderr.take() {
            tokio::spawn(collect_log(id.clone(), stderr));
        }
        let (end, ended) = watch::channel(false);
        tokio::spawn(watch_end(id.clone(), child, end, ends));
        // SAFETY: the descriptor is owned by the AsyncFd alone and always answers the same.
        let socket =
            unsafe { AsyncFd::register(ours) }.map_err(|error| WorkerError::Spawn(error.into_parts().1))?;
        Ok(Self {
            pid,
            socket,
            buffer: vec![0; MAX_PACKET_BYTES],
            sequence: 0,
            ended,
            sockets: Vec::new(),
            pulse: (0, 0),
        })
    }

    /// Hands over what the worker is made of; answers its AF_XDP sockets, in the order of the queues.
    pub async fn set_up(&mut self, setup: Setup, fds: &[&OwnedFd]) -> Result<Vec<OwnedFd>, WorkerError> {
        self.send(&Command::Setup(setup), fds).await?;
        match self.answer().await? {
            (Report::Ready, sockets) => Ok(sockets),
            (report, _) => {
                Err(WorkerError::Failed { why: format!("the worker answered {report:?} to its set-up") })
            }
        }
    }

    pub fn hold(&mut self, sockets: Vec<(QueueId, OwnedFd)>) {
        self.sockets = sockets;
    }

    /// The sockets, once. The worker's own copies are then the only ones: they close with it.
    pub fn take_sockets(&mut self) -> Vec<(QueueId, OwnedFd)> {
        std::mem::take(&mut self.sockets)
    }

    pub async fn open_egress(&mut self, id: u32, socket: &OwnedFd) -> Result<(), WorkerError> {
        self.send(&Command::OpenEgress { id }, &[socket]).await
    }

    pub async fn close_egress(&mut self, id: u32) -> Result<(), WorkerError> {
        self.send(&Command::CloseEgress { id }, &[]).await
    }

    /// Gives the worker a rule; it relays by it when this returns.
    pub async fn upsert(&mut self, rule: CompiledRule) -> Result<(), WorkerError> {
        self.sequence += 1;
        self.send(&Command::Upsert { sequence: self.sequence, rule }, &[]).await?;
        self.applied().await
    }

    /// Takes a rule away; not one more of its datagrams leaves when this returns.
    pub async fn remove(&mut self, slot: u32) -> Result<(), WorkerError> {
        self.sequence += 1;
        self.send(&Command::Remove { sequence: self.sequence, slot }, &[]).await?;
        self.applied().await
    }

    /// Lets the worker take frames: it has its rules.
    pub async fn begin(&mut self) -> Result<(), WorkerError> {
        self.send(&Command::Begin, &[]).await
    }

    pub async fn set_log_level(&mut self, level: &str) -> Result<(), WorkerError> {
        self.send(&Command::LogLevel { level: level.to_owned() }, &[]).await
    }

    /// Lets the worker relay what it holds and end; ends it by force if it does not.
    pub async fn drain(&mut self) {
        let asked = self.send(&Command::Drain, &[]).await.is_ok();
        if asked && timeout(DRAIN_DEADLINE, self.ended.wait_for(|ended| *ended)).await.is_ok() {
            return;
        }
        self.kill();
        let _ = timeout(DRAIN_DEADLINE, self.ended.wait_for(|ended| *ended)).await;
    }

    pub fn kill(&self) {
        // Once it is reaped its number may be another's; the reaper notes the end before anything else runs.
        if *self.ended.borrow() {
            return;
        }
        let _ = kill(Pid::from_raw(self.pid as i32), Signal::SIGKILL);
    }

    /// Looks whether the worker moves, by the calls of the kernel that it has made. What keeps the supervisor
    /// itself from its CPU makes for fewer looks.
    pub fn hangs(&mut self, calls: u64) -> bool {
        let (before, still) = self.pulse;
        self.pulse = (calls, if calls == before { still + 1 } else { 0 });
        self.pulse.1 >= STILL
    }

    /// What the worker said of why it ended, if it could, or what is known of it.
    pub fn last_words(&mut self) -> Option<String> {
        if self.pulse.1 >= STILL {
            return Some(HUNG.to_owned());
        }
        while let Ok((len, _)) = channel::receive(self.socket.get_ref(), &mut self.buffer) {
            if len == 0 {
                break;
            }
            if let Ok(Report::Failed { why }) = serde_json::from_slice(&self.buffer[..len]) {
                return Some(why);
            }
        }
        None
    }

    async fn applied(&mut self) -> Result<(), WorkerError> {
        loop {
            if let (Report::Applied { sequence }, _) = self.answer().await?
                && sequence == self.sequence
            {
                return Ok(());
            }
        }
    }

    async fn send(&mut self, command: &Command, fds: &[&OwnedFd]) -> Result<(), WorkerError> {
        let message = serde_json::to_vec(command).map_err(io::Error::from)?;
        let sent = async {
            loop {
                let mut ready = self.socket.writable().await?;
                match ready.try_io(|socket| channel::send(socket.get_ref(), &message, fds)) {
                    Ok(result) => return result,
                    Err(_would_block) => {}
                }
            }
        };
        Ok(timeout(ANSWER_DEADLINE, sent).await.map_err(|_| WorkerError::Silent)??)
    }

    /// The worker's next report, a failure as an error.
    async fn answer(&mut self) -> Result<(Report, Vec<OwnedFd>), WorkerError> {
        let Self { socket, buffer, .. } = self;
        let received = async {
            loop {
                let mut ready = socket.readable().await?;
                match ready.try_io(|socket| channel::receive(socket.get_ref(), buffer)) {
                    Ok(result) => return result,
                    Err(_would_block) => {}
                }
            }
        };
        let (len, fds) = timeout(ANSWER_DEADLINE, received).await.map_err(|_| WorkerError::Silent)??;
        if len == 0 {
            return Err(WorkerError::Gone);
        }
        match serde_json::from_slice(&buffer[..len]).map_err(io::Error::from)? {
            Report::Failed { why } => Err(WorkerError::Failed { why }),
            report => Ok((report, fds)),
        }
    }
}

/// Tells the supervisor when the worker has ended, and reaps it.
async fn watch_end(
    id: WorkerId,
    mut child: Child,
    end: watch::Sender<bool>,
    ends: mpsc::UnboundedSender<End>,
) {
    let pid = child.id();
    let started = Instant::now();
    let why = match child.wait().await {
        Ok(status) => describe(status),
        Err(error) => format!("its end cannot be told: {error}"),
    };
    end.send_replace(true);
    // Without a receiver the daemon itself is ending.
    let _ = ends.send(End { id, pid, why, lived: started.elapsed() });
}

fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit status {code}"),
        (None, Some(signal)) => {
            let name = Signal::try_from(signal).map_or("unknown", Signal::as_str);
            format!("killed by signal {signal} ({name})")
        }
        (None, None) => "unknown".to_owned(),
    }
}

/// Passes a worker's log lines on, each with its level.
async fn collect_log(id: WorkerId, stderr: impl AsyncRead + Unpin) {
    let mut lines = BufReader::new(stderr).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        let (level, message) = line.trim_start().split_once(' ').unwrap_or(("INFO", &line));
        match level {
            "ERROR" => tracing::error!(worker = %id, "{message}"),
            "WARN" => tracing::warn!(worker = %id, "{message}"),
            "INFO" => tracing::info!(worker = %id, "{message}"),
            "DEBUG" => tracing::debug!(worker = %id, "{message}"),
            "TRACE" => tracing::trace!(worker = %id, "{message}"),
            // A panic or a library's own words.
            _ => tracing::error!(worker = %id, "{line}"),
        }
    }
}
