//! The worker's one loop: drain the queues, relay, send, give the frames back; asleep when idle.

use std::{io, ops::Range, time::Instant};

use libc::iovec;
use mcr_common::parse::{Datagram, PAYLOAD_OFFSET, parse};
use nix::time::{ClockId, clock_gettime};
use tracing::{debug, info};

use crate::{
    rule::RuleSlot,
    worker::{
        LogFilter, Relaying, Supervisor,
        egress::UringEgress,
        idling::Idling,
        ingress::{Frame, Ingress},
        ledger::Ledger,
        protocol::{Command, Report},
        relay::{Batch, Flow, FlowTable, relay},
        ring::{Completion, Token},
        set_log_level,
    },
};

/// How often the kernel's counters of the sockets are copied into the ledger.
const STATISTICS_PERIOD_MS: u32 = 250;

/// A queue with what the loop knows of it.
struct Queue<I> {
    socket: I,
    /// A poll of the socket is in the ring.
    polled: bool,
}

/// The state of a running worker.
pub(crate) struct EventLoop<I> {
    queues: Vec<Queue<I>>,
    table: FlowTable,
    batch: Batch,
    ledger: Ledger,
    egress: UringEgress,
    log_filter: LogFilter,
    command_waits: bool,
    /// The rules are complete: frames may be taken.
    begun: bool,
    /// Calls of `io_uring_enter` by former workers of this ledger.
    enters_before: u64,
    idling: Idling,
    draining: bool,
}

impl<I: Ingress> EventLoop<I> {
    pub(crate) fn new(queues: Vec<I>, relaying: Relaying, egress: UringEgress) -> Self {
        let Relaying { ledger, busy_poll, log_filter } = relaying;
        let queue = |socket| Queue { socket, polled: false };
        Self {
            queues: queues.into_iter().map(queue).collect(),
            table: FlowTable::default(),
            batch: Batch::new(ledger.layout().rules),
            enters_before: ledger.worker().enters.get(),
            ledger,
            egress,
            log_filter,
            command_waits: false,
            begun: false,
            idling: Idling::new(busy_poll),
            draining: false,
        }
    }

    /// Runs until the supervisor says so or is gone.
    pub(crate) fn run(&mut self, supervisor: &mut Supervisor) -> anyhow::Result<()> {
        debug!("relaying");
        self.egress.ring.push_poll(Token::Command, supervisor.fd())?;
        self.egress.ring.push_timer(STATISTICS_PERIOD_MS)?;
        loop {
            let mut busy = false;
            for index in 0..self.active() {
                let found = self.relay_queue(index)?;
                if found {
                    // A batch to many outputs takes its time: signs of life and commands do not wait for all queues.
                    self.count_enters();
                    self.complete()?;
                    if self.command_waits && !self.obey(supervisor)? {
                        return Ok(());
                    }
                }
                busy |= found;
            }
            if self.command_waits && !self.obey(supervisor)? {
                return Ok(());
            }
            if busy {
                self.idling.found();
            } else if self.draining {
                self.read_statistics()?;
                return Ok(());
            } else if self.idling.looks_on(Instant::now()) {
                // To whatever else has work on this CPU.
                std::thread::yield_now();
                self.complete()?;
            } else {
                self.sleep()?;
            }
        }
    }

    /// Relays one batch of a queue. False if none waited.
    fn relay_queue(&mut self, index: usize) -> io::Result<bool> {
        let Self { queues, table, batch, ledger, egress, .. } = self;
        let socket = &mut queues[index].socket;
        let counters = ledger.queue(index);
        let frames = socket.receive();
        if frames == 0 {
            return Ok(false);
        }
        counters.received.add(frames as u64);
        batch.clear();
        // Frames of one stream come in a row.
        let mut last: Option<(Datagram, Flow)> = None;
        for frame in (0..frames).map(|index| socket.frame(index)) {
            let Some((Frame { bytes, segment, .. }, datagram)) =
                frame.and_then(|frame| Some((frame, parse(&frame).ok()?)))
            else {
                counters.refused.add(1);
                continue;
            };
            let flow = match last {
                Some((like, flow)) if of_one_flow(&like, &datagram) => flow,
                _ => {
                    let Some(flow) = table.find(&datagram) else {
                        counters.no_rule.add(1);
                        continue;
                    };
                    last = Some((datagram, flow));
                    flow
                }
            };
            let payload_len = usize::from(datagram.payload_len);
            let datagrams = segments(payload_len, segment);
            counters.segments.add(datagrams.len() as u64 - 1);
            if flow.looped {
                ledger.rule(RuleSlot(flow.slot)).looped.add(datagrams.len() as u64);
                continue;
            }
            let Some(payload) = bytes.get(PAYLOAD_OFFSET..PAYLOAD_OFFSET + payload_len) else {
                counters.cut.add(1);
                ledger.rule(RuleSlot(flow.slot)).cut.add(datagrams.len() as u64);
                continue;
            };
            for part in datagrams {
                let part = &payload[part];
                let payload = iovec { iov_base: part.as_ptr().cast_mut().cast(), iov_len: part.len() };
                if batch.is_full() {
                    send(batch, table, ledger, egress)?;
                }
                batch.push(flow.slot, &datagram, payload);
            }
        }
        send(batch, table, ledger, egress)?;
        for output in egress.without_gso() {
            table.send_singly(output);
        }
        socket.recycle();
        Ok(true)
    }

    /// Waits for frames, a command or the timer.
    fn sleep(&mut self) -> io::Result<()> {
        for index in 0..self.active() {
            let queue = &mut self.queues[index];
            if !queue.polled {
                self.egress.ring.push_poll(Token::Queue(index as u32), queue.socket.fd())?;
                queue.polled = true;
            }
        }
        // Frames that came since the queues were drained complete the poll at once.
        self.egress.ring.wait()?;
        self.count_enters();
        self.complete()
    }

    fn count_enters(&self) {
        self.ledger.worker().enters.set(self.enters_before + self.egress.ring.enters());
    }

    /// Takes note of completions; those of sends are dealt with by the flush.
    fn complete(&mut self) -> io::Result<()> {
        if self.egress.ring.work_waits() {
            // Where nothing is sent nothing else enters the kernel.
            self.egress.ring.submit()?;
        }
        let mut timer = false;
        for Completion { token, .. } in self.egress.other_completions() {
            match token {
                Token::Queue(index) => {
                    if let Some(queue) = self.queues.get_mut(index as usize) {
                        queue.polled = false;
                    }
                }
                Token::Command => self.command_waits = true,
                Token::Timer => timer = true,
                Token::Send(_) => {}
            }
        }
        if timer {
            self.count_enters();
            self.read_statistics()?;
            self.egress.ring.push_timer(STATISTICS_PERIOD_MS)?;
        }
        Ok(())
    }

    fn read_statistics(&self) -> io::Result<()> {
        for (index, queue) in self.queues.iter().enumerate() {
            queue.socket.read_statistics(self.ledger.queue(index))?;
        }
        Ok(())
    }

    /// Queues that frames are taken from: none of them before the rules are complete.
    fn active(&self) -> usize {
        if self.begun { self.queues.len() } else { 0 }
    }

    fn follow_table(&mut self) -> io::Result<()> {
        if !self.begun {
            return Ok(());
        }
        self.queues.iter_mut().try_for_each(|queue| queue.socket.follow(&self.table))
    }

    /// Obeys all commands that wait. False if the supervisor is gone.
    fn obey(&mut self, supervisor: &mut Supervisor) -> anyhow::Result<bool> {
        loop {
            match supervisor.receive() {
                Ok(Some((command, fds))) => {
                    if let Some(sequence) = self.execute(command, fds)? {
                        supervisor.report(&Report::Applied { sequence }, &[])?;
                    }
                }
                Ok(None) => break,
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset
                    ) =>
                {
                    info!("the supervisor is gone");
                    return Ok(false);
                }
                Err(error) => return Err(error.into()),
            }
        }
        self.command_waits = false;
        self.egress.ring.push_poll(Token::Command, supervisor.fd())?;
        Ok(true)
    }

    /// Executes a command between two batches; answers its sequence number if it has one.
    fn execute(&mut self, command: Command, fds: Vec<std::os::fd::OwnedFd>) -> anyhow::Result<Option<u64>> {
        match command {
            Command::Setup(_) => anyhow::bail!("a second set-up"),
            Command::OpenEgress { id } => {
                let socket = fds.into_iter().next();
                self.egress.open(id, socket.ok_or_else(|| anyhow::anyhow!("an egress socket is missing"))?);
            }
            Command::CloseEgress { id } => self.egress.close(id),
            Command::Upsert { sequence, rule } => {
                self.table.upsert(rule);
                self.follow_table()?;
                return Ok(Some(sequence));
            }
            Command::Remove { sequence, slot } => {
                self.table.remove(slot);
                self.follow_table()?;
                return Ok(Some(sequence));
            }
            Command::Begin => {
                self.begun = true;
                self.follow_table()?;
            }
            Command::LogLevel { level } => set_log_level(&self.log_filter, &level),
            Command::Drain => self.draining = true,
        }
        Ok(None)
    }
}

fn of_one_flow(one: &Datagram, other: &Datagram) -> bool {
    (one.group, one.port, one.source) == (other.group, other.port, other.source)
}

/// Relays what is in the batch, and empties it.
fn send(batch: &mut Batch, table: &FlowTable, ledger: &Ledger, egress: &mut UringEgress) -> io::Result<()> {
    relay(batch, table, ledger, now_ns(), egress);
    // The kernel has copied the payloads when the sends are done: the frames are free.
    egress.flush(ledger)?;
    batch.clear();
    Ok(())
}

/// Where the payloads of a frame's datagrams lie, each `segment` bytes long but the last; 0 for one datagram.
fn segments(payload_len: usize, segment: usize) -> impl ExactSizeIterator<Item = Range<usize>> {
    let len = if segment == 0 { payload_len } else { segment }.max(1);
    let count = payload_len.div_ceil(len).max(1);
    (0..count).map(move |index| index * len..payload_len.min((index + 1) * len))
}

/// Wall clock of a batch, coarse: it costs no system call and is exact to a few milliseconds.
fn now_ns() -> u64 {
    clock_gettime(ClockId::CLOCK_REALTIME_COARSE)
        .map_or(0, |now| now.tv_sec() as u64 * 1_000_000_000 + now.tv_nsec() as u64)
}
