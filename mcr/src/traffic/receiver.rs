//! The receiver's loop: one thread, one socket for each stream, epoll over all of them.

use std::{io, net::SocketAddrV4, time::Duration};

use hdrhistogram::Histogram;
use nix::{
    errno::Errno,
    sys::{
        epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
        resource::{Resource, getrlimit, setrlimit},
    },
};
use socket2::Socket;

use super::{
    account::{Counts, Entry, StreamAccount},
    clock,
    socket::{self, MAX_BATCH, ReceiveBatch, ReceiveOptions, SocketError},
    stop::Stop,
};

/// After all have come: how long duplicates may still show up.
pub const LINGER: Duration = Duration::from_millis(100);

/// Longest latency that is told apart from longer ones.
const MAX_LATENCY_NS: u64 = 60_000_000_000;

/// Batches that one socket may take before the others have their turn.
const TURN: usize = 8;

/// Rest after a turn that emptied the sockets: at high rates the next takes in many datagrams, and the sender's CPU
/// need not wake this thread for each. Arrival times are the kernel's, so that latency does not see it.
const REST_NS: u64 = 500_000;

/// Longest wait, so that progress is shown while nothing comes.
const NAP_NS: u64 = 250_000_000;

/// Longest that datagrams which are there at the end are still taken in.
const DRAIN_NS: u64 = 1_000_000_000;

const STOP_TOKEN: u64 = u64::MAX;

/// What to receive, and when to end.
#[derive(Clone, Debug)]
pub struct ReceivePlan {
    /// One stream each; at least one.
    pub addresses: Vec<SocketAddrV4>,
    /// Datagrams of each stream, duplicates not counted.
    pub count: Option<u64>,
    pub duration: Option<Duration>,
    /// End so long after the last datagram, once one has come.
    pub idle: Option<Duration>,
    /// End after so long if none has come.
    pub first_within: Option<Duration>,
    pub sha256: bool,
}

/// Why a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReceiveEnd {
    /// All have come.
    Count,
    /// The time was over.
    Duration,
    /// None came any more, or none at all.
    Idle,
    Signal,
}

/// Latency of one stream in nanoseconds.
#[derive(Clone, Copy, Debug, Default)]
pub struct Latency {
    pub datagrams: u64,
    pub min_ns: u64,
    pub max_ns: u64,
    pub sum_ns: u64,
}

impl Latency {
    fn enter(&mut self, ns: u64) {
        self.min_ns = if self.datagrams == 0 { ns } else { self.min_ns.min(ns) };
        self.max_ns = self.max_ns.max(ns);
        self.sum_ns = self.sum_ns.saturating_add(ns);
        self.datagrams += 1;
    }

    pub fn mean_ns(&self) -> u64 {
        self.sum_ns.checked_div(self.datagrams).unwrap_or(0)
    }
}

/// What is kept of one stream.
struct Stream {
    socket: Socket,
    account: StreamAccount,
    latency: Latency,
    complete: bool,
}

/// A run in progress, then its result.
pub struct Receiver {
    plan: ReceivePlan,
    epoll: Epoll,
    streams: Vec<Stream>,
    intake: Intake,
    start_ns: u64,
    end_ns: u64,
}

/// What all streams share while datagrams come in.
struct Intake {
    histogram: Histogram<u64>,
    /// Datagrams that arrived before they were sent, by the clocks; their latency counts as 0.
    clock_backwards: u64,
    /// Streams of which datagrams are still awaited; `None` without a count.
    incomplete: Option<usize>,
    /// First and last arrival in the kernel, real time.
    arrivals_ns: Option<(u64, u64)>,
    /// When datagrams were taken in last, monotonic.
    last_ns: Option<u64>,
}

#[derive(Debug, thiserror::Error)]
pub enum ReceiveError {
    #[error("open a socket for {address}")]
    Open {
        address: SocketAddrV4,
        #[source]
        error: SocketError,
    },
    #[error("epoll")]
    Epoll(#[from] Errno),
    #[error("receive for {address}")]
    Receive {
        address: SocketAddrV4,
        #[source]
        error: io::Error,
    },
}

impl Receiver {
    /// Opens and joins everything; from here on nothing is missed. The run starts now.
    pub fn new(plan: ReceivePlan, options: &ReceiveOptions) -> Result<Self, ReceiveError> {
        raise_file_limit(plan.addresses.len() as u64 + 64);
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let mut streams = Vec::with_capacity(plan.addresses.len());
        for (&address, token) in plan.addresses.iter().zip(0..) {
            let socket =
                socket::receiver(address, options).map_err(|error| ReceiveError::Open { address, error })?;
            epoll.add(&socket, EpollEvent::new(EpollFlags::EPOLLIN, token))?;
            let account = StreamAccount::new(plan.sha256);
            streams.push(Stream { socket, account, latency: Latency::default(), complete: false });
        }
        let intake = Intake {
            histogram: Histogram::new_with_max(MAX_LATENCY_NS, 3).expect("bounds and digits are valid"),
            clock_backwards: 0,
            incomplete: plan.count.map(|_| streams.len()),
            arrivals_ns: None,
            last_ns: None,
        };
        let start_ns = clock::monotonic_ns();
        Ok(Self { plan, epoll, streams, intake, start_ns, end_ns: start_ns })
    }

    /// Receives until the plan is fulfilled or a signal comes; `watch` is called between datagrams.
    pub fn run(&mut self, stop: &Stop, mut watch: impl FnMut(&Self)) -> Result<ReceiveEnd, ReceiveError> {
        self.epoll.add(stop, EpollEvent::new(EpollFlags::EPOLLIN, STOP_TOKEN))?;
        let mut batch = ReceiveBatch::default();
        let mut events = [EpollEvent::empty(); 64];
        let mut all_came_ns = None;
        loop {
            self.end_ns = clock::monotonic_ns();
            if all_came_ns.is_none() && self.intake.incomplete == Some(0) {
                all_came_ns = Some(self.end_ns);
            }
            let (deadline_ns, end) = self.deadline(all_came_ns);
            if self.end_ns >= deadline_ns {
                self.drain(&mut batch)?;
                return Ok(if self.intake.incomplete == Some(0) { ReceiveEnd::Count } else { end });
            }
            let wait_ns = (deadline_ns - self.end_ns).min(NAP_NS);
            let timeout = EpollTimeout::try_from(Duration::from_nanos(wait_ns).as_millis() + 1);
            let ready = match self.epoll.wait(&mut events, timeout.unwrap_or(EpollTimeout::ZERO)) {
                Ok(ready) => ready,
                Err(Errno::EINTR) => 0,
                Err(errno) => return Err(errno.into()),
            };
            let mut drained = true;
            for event in &events[..ready] {
                if event.data() == STOP_TOKEN {
                    self.drain(&mut batch)?;
                    return Ok(ReceiveEnd::Signal);
                }
                drained &= self.receive(event.data() as usize, TURN, &mut batch)?;
            }
            watch(self);
            if ready > 0 && drained {
                clock::sleep_until(clock::monotonic_ns() + REST_NS);
            }
        }
    }

    /// When the run ends if nothing more comes, and what the reason is then.
    fn deadline(&self, all_came_ns: Option<u64>) -> (u64, ReceiveEnd) {
        let after = |from_ns: Option<u64>, span: Option<Duration>| {
            let span_ns = u64::try_from(span?.as_nanos()).unwrap_or(u64::MAX);
            Some(from_ns?.saturating_add(span_ns))
        };
        let start_ns = Some(self.start_ns);
        let before_first = if self.intake.last_ns.is_none() { start_ns } else { None };
        [
            (after(all_came_ns, Some(LINGER)), ReceiveEnd::Count),
            (after(start_ns, self.plan.duration), ReceiveEnd::Duration),
            (after(self.intake.last_ns, self.plan.idle), ReceiveEnd::Idle),
            (after(before_first, self.plan.first_within), ReceiveEnd::Idle),
        ]
        .into_iter()
        .filter_map(|(ns, end)| Some((ns?, end)))
        .min_by_key(|(ns, _)| *ns)
        .unwrap_or((u64::MAX, ReceiveEnd::Signal))
    }

    /// Takes in up to `turns` batches of one stream; says whether it is empty then.
    fn receive(&mut self, at: usize, turns: usize, batch: &mut ReceiveBatch) -> Result<bool, ReceiveError> {
        let stream = &mut self.streams[at];
        for _ in 0..turns {
            let Stream { socket, account, latency, complete } = stream;
            let received = batch.receive(socket, |datagram| {
                let entry = account.enter(datagram, self.intake.incomplete == Some(0));
                self.intake.enter(entry, latency, datagram.received_ns);
                if !*complete && self.plan.count.is_some_and(|count| account.unique() >= count) {
                    *complete = true;
                    self.intake.incomplete = self.intake.incomplete.map(|incomplete| incomplete - 1);
                }
            });
            let received = received
                .map_err(|error| ReceiveError::Receive { address: self.plan.addresses[at], error })?;
            if received > 0 {
                self.intake.last_ns = Some(clock::monotonic_ns());
            }
            if received < MAX_BATCH {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Takes in what came before the end.
    fn drain(&mut self, batch: &mut ReceiveBatch) -> Result<(), ReceiveError> {
        let until_ns = clock::monotonic_ns() + DRAIN_NS;
        for at in 0..self.streams.len() {
            while !self.receive(at, 1, batch)? && clock::monotonic_ns() < until_ns {}
        }
        Ok(())
    }

    pub fn plan(&self) -> &ReceivePlan {
        &self.plan
    }

    pub fn account(&self, stream: usize) -> &StreamAccount {
        &self.streams[stream].account
    }

    pub fn latency(&self, stream: usize) -> Latency {
        self.streams[stream].latency
    }

    /// Datagrams that the kernel dropped at the stream's socket because this process was too slow.
    pub fn dropped(&self, stream: usize) -> u64 {
        socket::dropped(&self.streams[stream].socket).unwrap_or(0)
    }

    /// One stream's counts; what is missing of the plan's count is lost.
    pub fn counts(&self, stream: usize) -> Counts {
        let counts = self.streams[stream].account.counts();
        self.plan.count.map_or(counts, |count| counts.with_expected(count))
    }

    pub fn total(&self) -> Counts {
        let mut total = Counts::default();
        for stream in 0..self.streams.len() {
            total += self.counts(stream);
        }
        total
    }

    /// Latencies of all streams in nanoseconds.
    pub fn histogram(&self) -> &Histogram<u64> {
        &self.intake.histogram
    }

    /// Datagrams that arrived before they were sent, as far as the clocks can tell.
    pub fn clock_backwards(&self) -> u64 {
        self.intake.clock_backwards
    }

    pub fn elapsed(&self) -> Duration {
        Duration::from_nanos(self.end_ns - self.start_ns)
    }

    /// From the first datagram to the last.
    pub fn receiving(&self) -> Duration {
        let (first_ns, last_ns) = self.intake.arrivals_ns.unwrap_or_default();
        Duration::from_nanos(last_ns - first_ns)
    }
}

impl Intake {
    fn enter(&mut self, entry: Entry, latency: &mut Latency, received_ns: u64) {
        let (first_ns, last_ns) = self.arrivals_ns.unwrap_or((received_ns, received_ns));
        self.arrivals_ns = Some((first_ns.min(received_ns), last_ns.max(received_ns)));
        if let Entry::Probe { latency_ns } = entry {
            self.clock_backwards += u64::from(latency_ns < 0);
            let ns = latency_ns.max(0).cast_unsigned();
            latency.enter(ns);
            self.histogram.saturating_record(ns);
        }
    }
}

/// Allows so many open files, or as many as the hard limit has; the socket that is too many tells more.
fn raise_file_limit(files: u64) {
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < files
    {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, files.min(hard), hard);
    }
}
