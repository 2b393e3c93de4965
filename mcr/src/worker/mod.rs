//! The data plane process: pinned, one thread, one io_uring.
//!
//! It takes frames from its sockets, relays them by the rules that the supervisor sent, and counts. It
//! ends when its command socket closes, so that it never outlives its supervisor.

pub mod egress;
mod event_loop;
mod idling;
pub mod ingress;
pub mod ledger;
pub mod protocol;
pub mod relay;
pub mod ring;

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd, RawFd},
    time::Duration,
};

use anyhow::{Context, bail};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sched::{CpuSet, sched_setaffinity},
    sys::signal::{SigHandler, Signal, signal},
    unistd::Pid,
};
use tracing_subscriber::{EnvFilter, reload};

use crate::{
    rule::QueueId,
    sys::{channel, privileges, seccomp},
    worker::{
        egress::UringEgress,
        event_loop::EventLoop,
        ingress::{Ingress, af_packet::PacketQueue, af_xdp::AfXdpQueue},
        ledger::Ledger,
        protocol::{Command, MAX_PACKET_BYTES, Report},
        ring::Ring,
    },
};

/// Sets the filter of the worker's log.
type LogFilter = reload::Handle<EnvFilter, tracing_subscriber::Registry>;

/// What a worker relays with, wherever its frames come from.
pub(crate) struct Relaying {
    pub ledger: Ledger,
    pub busy_poll: Option<Duration>,
    pub log_filter: LogFilter,
}

/// The socket to the supervisor.
pub(crate) struct Supervisor {
    socket: OwnedFd,
    buffer: Box<[u8]>,
}

impl Supervisor {
    fn new(socket: OwnedFd) -> Self {
        Self { socket, buffer: vec![0; MAX_PACKET_BYTES].into_boxed_slice() }
    }

    pub(crate) fn fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }

    /// The next command, `None` if there is none now.
    ///
    /// # Errors
    ///
    /// `UnexpectedEof` if the supervisor is gone.
    pub(crate) fn receive(&mut self) -> io::Result<Option<(Command, Vec<OwnedFd>)>> {
        match channel::receive(&self.socket, &mut self.buffer) {
            Ok((0, _)) => Err(io::ErrorKind::UnexpectedEof.into()),
            Ok((len, fds)) => Ok(Some((serde_json::from_slice(&self.buffer[..len])?, fds))),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }

    pub(crate) fn report(&self, report: &Report, fds: &[&OwnedFd]) -> io::Result<()> {
        channel::send(&self.socket, &serde_json::to_vec(report)?, fds)
    }

    /// Waits for the next command.
    fn wait(&mut self) -> anyhow::Result<(Command, Vec<OwnedFd>)> {
        loop {
            if let Some(received) = self.receive()? {
                return Ok(received);
            }
            let fd = std::os::fd::AsFd::as_fd(&self.socket);
            poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], PollTimeout::NONE)?;
        }
    }
}

/// The worker's life. Its standard input is the socket to the supervisor.
///
/// # Errors
///
/// What kept the worker from starting or made it end; the supervisor has been told.
pub fn run() -> anyhow::Result<()> {
    // The name that `ps` and `top` show; without it the name of the link that was executed.
    let _ = nix::sys::prctl::set_name(c"mcr-worker");
    // Stopped or hung it would not see that its supervisor is gone, and hold on to its queues.
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
    let socket = std::os::fd::AsFd::as_fd(&io::stdin()).try_clone_to_owned()?;
    let log_filter = start_log();
    ignore_signals()?;
    let mut supervisor = Supervisor::new(socket);
    let result = start(&mut supervisor, log_filter);
    if let Err(error) = &result {
        let why = format!("{error:#}");
        // Without a supervisor there is nobody to tell.
        let _ = supervisor.report(&Report::Failed { why }, &[]);
    }
    result
}

/// Sets the worker up as the supervisor says, and relays until it says otherwise.
fn start(supervisor: &mut Supervisor, log_filter: LogFilter) -> anyhow::Result<()> {
    let (Command::Setup(setup), fds) = supervisor.wait()? else {
        bail!("the first command was not the set-up");
    };
    set_log_level(&log_filter, &setup.log_level);
    let mut fds = fds.into_iter();
    let memfd = fds.next().context("the set-up came without a ledger")?;
    let ledger =
        Ledger::map(std::os::fd::AsFd::as_fd(&memfd), setup.layout).context("the ledger cannot be mapped")?;
    if let Some(cpu) = setup.cpu {
        pin(cpu).with_context(|| format!("the worker cannot be pinned to CPU {cpu}"))?;
    }
    let busy_poll = setup.busy_poll_us.map(|us| Duration::from_micros(us.into()));
    let relaying = Relaying { ledger, busy_poll, log_filter };
    let ledger = &relaying.ledger;
    match setup.ingress {
        protocol::Ingress::AfXdp { interface, queues, umem } => {
            let open = |(index, queue): (usize, u32)| {
                AfXdpQueue::open(&interface, QueueId(queue), umem, ledger.queue(index))
            };
            let queues = queues.into_iter().enumerate().map(open).collect::<Result<Vec<_>, _>>()?;
            let sockets = queues.iter().map(duplicate).collect::<io::Result<Vec<_>>>()?;
            relay_from(queues, &sockets, relaying, supervisor)
        }
        protocol::Ingress::AfPacket { ring, taken, classic } => {
            let socket = fds.next().context("the set-up came without a packet socket")?;
            let queue = PacketQueue::adopt(socket, ring, taken, classic);
            let queue = queue.context("the packet socket's ring cannot be mapped")?;
            relay_from(vec![queue], &[], relaying, supervisor)
        }
    }
}

/// Relays from queues that stand; `sockets` are handed up.
fn relay_from<I: Ingress>(
    queues: Vec<I>,
    sockets: &[OwnedFd],
    relaying: Relaying,
    supervisor: &mut Supervisor,
) -> anyhow::Result<()> {
    let ring = Ring::new().context("io_uring cannot be set up")?;
    if let Err(error) = privileges::drop_all() {
        bail!("the worker cannot give up its capabilities: {error}");
    }
    seccomp::confine(seccomp::WORKER)
        .context("the worker cannot confine itself to its system calls (seccomp)")?;
    supervisor.report(&Report::Ready, &sockets.iter().collect::<Vec<_>>())?;
    EventLoop::new(queues, relaying, UringEgress::new(ring)).run(supervisor)
}

/// A second descriptor of the queue's socket, to hand up.
fn duplicate(queue: &AfXdpQueue) -> io::Result<OwnedFd> {
    // SAFETY: the queue keeps its descriptor open beyond this call.
    let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(queue.fd()) };
    fd.try_clone_to_owned()
}

fn pin(cpu: u32) -> nix::Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu as usize)?;
    sched_setaffinity(Pid::from_raw(0), &set)
}

/// The supervisor decides when its processes end, also where a terminal or a service manager signals all.
pub(crate) fn ignore_signals() -> nix::Result<()> {
    for ignored in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGUSR1] {
        // SAFETY: ignoring a signal runs no code of ours.
        unsafe { signal(ignored, SigHandler::SigIgn)? };
    }
    Ok(())
}

/// Logs to stderr, which the supervisor reads line by line: level first, neither time nor colour.
fn start_log() -> LogFilter {
    use tracing_subscriber::{fmt, layer::SubscriberExt, util::SubscriberInitExt};
    let (filter, handle) = reload::Layer::new(EnvFilter::new("info"));
    let lines = fmt::layer().without_time().with_target(false).with_ansi(false).with_writer(io::stderr);
    tracing_subscriber::registry().with(filter).with(lines).init();
    handle
}

pub(crate) fn set_log_level(filter: &LogFilter, level: &str) {
    // The level was checked by the supervisor; a filter that is gone has nobody to show lines to.
    let _ = filter.reload(EnvFilter::new(level));
}
