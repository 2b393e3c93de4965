//! The generator's loop: what is due is built, stamped and handed to the kernel, stream by stream in turn.

use std::{io, net::SocketAddrV4, time::Duration};

use nix::errno::Errno;
use sha2::{Digest, Sha256};
use socket2::Socket;

use super::{
    account::hex,
    clock,
    pacing::{Pacer, Step},
    probe::{MAX_BYTES, Probe},
    socket::{self, MAX_BATCH, SendBatch, SendBy},
    stop::Stop,
};

/// Datagrams stamped and sent by one call: few enough that the last one's stamp is still true to some 20 microseconds.
const BATCH: usize = 16;

/// After `seconds` are over: how long what was due within them may still be sent.
const GRACE_NS: u64 = 1_000_000_000;

/// Longest sleep, so that a signal is answered soon.
const NAP_NS: u64 = 50_000_000;

/// The interface takes nothing for so long: give up.
const STALLED_NS: u64 = 10_000_000_000;

/// A send that fails so often in a row fails for good; before that it may be an ICMP error of an earlier datagram.
const MAX_FAILURES: u32 = 16;

/// What to send.
#[derive(Clone, Debug)]
pub struct SendPlan {
    /// One stream each; at least one.
    pub destinations: Vec<SocketAddrV4>,
    /// Payload bytes of a datagram, [`super::probe::HEADER_BYTES`] to [`super::probe::MAX_BYTES`].
    pub size: usize,
    /// Datagrams a second of each stream, at least 1.
    pub rate: u64,
    /// Datagrams of each stream.
    pub count: Option<u64>,
    pub duration: Option<Duration>,
    pub sha256: bool,
    /// Whether what is due leaves by one `UDP_SEGMENT` send; for one destination only.
    pub segments: bool,
    /// Whether each datagram leaves by itself, at its time and with its own stamp.
    pub even: bool,
    pub run: u64,
}

impl SendPlan {
    /// Datagrams of each stream, where `count` or `duration` gives the run an end.
    pub fn datagrams_per_stream(&self) -> Option<u64> {
        let within = self.duration.map(|duration| {
            (duration.as_nanos() * u128::from(self.rate) / 1_000_000_000).try_into().unwrap_or(u64::MAX)
        });
        [self.count, within].into_iter().flatten().min()
    }
}

/// Why a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SendEnd {
    /// All was sent.
    Done,
    /// The time was over before all was sent.
    Deadline,
    Signal,
}

/// Sends that were tried again, by what the kernel said.
#[derive(Clone, Copy, Debug, Default)]
pub struct Retries {
    /// ENOBUFS: a queue of the interface was full.
    pub no_buffer: u64,
    /// EAGAIN: the socket's send buffer was full.
    pub would_block: u64,
    /// Other errors, mostly ICMP answers to earlier datagrams.
    pub other: u64,
}

/// A run in progress, then its result.
pub struct Sender {
    plan: SendPlan,
    socket: Socket,
    pacer: Pacer,
    batch: SendBatch,
    digests: Vec<Sha256>,
    /// Datagrams of all streams that the kernel accepted.
    sent: u64,
    retries: Retries,
    failures: u32,
    start_ns: u64,
    progress_ns: u64,
    end_ns: u64,
}

#[derive(Debug, thiserror::Error)]
pub enum SendError {
    #[error("send to {destination}")]
    Send {
        destination: SocketAddrV4,
        #[source]
        error: io::Error,
    },
    #[error("the interface took nothing for {} s", STALLED_NS / 1_000_000_000)]
    Stalled,
}

impl Sender {
    /// The run starts now. The socket is connected if there is one destination only, and cuts segments if the plan
    /// says so.
    pub fn new(plan: SendPlan, socket: Socket) -> Self {
        let streams = plan.destinations.len() as u64;
        let (by, capacity) = match plan.destinations[..] {
            [_] if plan.even => (SendBy::Connection, 1),
            _ if plan.even => (SendBy::Destination, 1),
            [_] if plan.segments => (SendBy::Segments, MAX_BATCH.min(MAX_BYTES / plan.size)),
            [_] => (SendBy::Connection, BATCH),
            _ => (SendBy::Destination, BATCH),
        };
        let start_ns = clock::monotonic_ns();
        let total = plan.datagrams_per_stream().map(|count| count.saturating_mul(streams));
        let pacer = Pacer::new(plan.rate.saturating_mul(streams), total, start_ns);
        Self {
            socket,
            pacer: if plan.even { pacer.even() } else { pacer },
            batch: SendBatch::new(capacity, plan.size, by),
            digests: if plan.sha256 { vec![Sha256::new(); plan.destinations.len()] } else { Vec::new() },
            sent: 0,
            retries: Retries::default(),
            failures: 0,
            start_ns,
            progress_ns: start_ns,
            end_ns: start_ns,
            plan,
        }
    }

    /// Sends until the plan is fulfilled or a signal comes; `watch` is called between sends.
    pub fn run(&mut self, stop: &Stop, mut watch: impl FnMut(&Self)) -> Result<SendEnd, SendError> {
        let duration_ns = self.plan.duration.map(|d| u64::try_from(d.as_nanos()).unwrap_or(u64::MAX));
        let deadline_ns =
            duration_ns.map_or(u64::MAX, |ns| self.start_ns.saturating_add(ns).saturating_add(GRACE_NS));
        loop {
            self.end_ns = clock::monotonic_ns();
            if stop.requested() {
                return Ok(SendEnd::Signal);
            }
            if self.end_ns >= deadline_ns {
                return Ok(SendEnd::Deadline);
            }
            match self.pacer.step(self.end_ns) {
                Step::Done => return Ok(SendEnd::Done),
                Step::SleepUntil(until_ns) => {
                    let until_ns = until_ns.min(self.end_ns + NAP_NS);
                    if self.plan.even { clock::spin_until(until_ns) } else { clock::sleep_until(until_ns) }
                }
                Step::Send(count) => {
                    let sent = self.send(count)?;
                    self.pacer.sent(sent, self.end_ns);
                    if sent > 0 {
                        self.progress_ns = self.end_ns;
                    } else if self.end_ns - self.progress_ns > STALLED_NS {
                        return Err(SendError::Stalled);
                    }
                }
            }
            watch(self);
        }
    }

    /// Sends up to `count` datagrams; fewer if the kernel takes no more for now.
    fn send(&mut self, count: u64) -> Result<u64, SendError> {
        let end = self.sent + count;
        let begin = self.sent;
        while self.sent < end {
            self.build(end);
            match self.batch.send(&self.socket) {
                Ok(accepted) => self.accept(accepted),
                Err(error) => {
                    self.retry(error)?;
                    break;
                }
            }
        }
        Ok(self.sent - begin)
    }

    /// Fills the batch with the datagrams from `self.sent` on, before `end`, all with the stamp of now.
    fn build(&mut self, end: u64) {
        let streams = self.plan.destinations.len() as u64;
        let sent_ns = clock::realtime_ns();
        self.batch.clear();
        for k in self.sent..end {
            if self.batch.is_full() {
                break;
            }
            let (sequence, stream) = (k / streams, k % streams);
            let probe = Probe { run: self.plan.run, stream: stream as u32, sequence, sent_ns };
            probe.write(self.batch.push(self.plan.destinations[stream as usize]));
        }
    }

    fn accept(&mut self, accepted: usize) {
        self.failures = 0;
        if !self.digests.is_empty() {
            for i in 0..accepted {
                let stream = (self.sent as usize + i) % self.digests.len();
                self.digests[stream].update(self.batch.payload(i));
            }
        }
        self.sent += accepted as u64;
    }

    /// Counts the error of a send and waits a moment, or says that it is final.
    fn retry(&mut self, error: io::Error) -> Result<(), SendError> {
        match error.raw_os_error().map(Errno::from_raw) {
            Some(Errno::EAGAIN) => {
                self.retries.would_block += 1;
                socket::wait_writable(&self.socket, 10);
            }
            Some(Errno::ENOBUFS | Errno::ENOMEM) => {
                self.retries.no_buffer += 1;
                clock::sleep_until(clock::monotonic_ns() + 50_000);
            }
            Some(Errno::EINTR) => {}
            errno => {
                self.failures += 1;
                if self.failures == MAX_FAILURES || errno == Some(Errno::EMSGSIZE) {
                    let stream = self.sent as usize % self.plan.destinations.len();
                    return Err(SendError::Send { destination: self.plan.destinations[stream], error });
                }
                self.retries.other += 1;
            }
        }
        Ok(())
    }

    pub fn plan(&self) -> &SendPlan {
        &self.plan
    }

    /// Datagrams of all streams that the kernel accepted.
    pub fn sent(&self) -> u64 {
        self.sent
    }

    /// Datagrams of one stream that the kernel accepted.
    pub fn sent_of(&self, stream: usize) -> u64 {
        let streams = self.plan.destinations.len() as u64;
        let stream = stream as u64;
        (self.sent + streams - 1).saturating_sub(stream) / streams
    }

    /// SHA-256 over one stream's payloads in order, if the plan asks for it.
    pub fn sha256_of(&self, stream: usize) -> Option<String> {
        self.digests.get(stream).map(|digest| hex(&digest.clone().finalize()))
    }

    pub fn retries(&self) -> Retries {
        self.retries
    }

    pub fn elapsed(&self) -> Duration {
        Duration::from_nanos(self.end_ns - self.start_ns)
    }

    pub fn behind_max(&self) -> Duration {
        Duration::from_nanos(self.pacer.behind_max_ns())
    }
}
