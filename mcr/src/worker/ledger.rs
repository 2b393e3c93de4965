//! The ledger: every datagram that a worker took in, and what became of it.
//!
//! It lies in a memfd that outlives the worker. The worker alone writes while it lives; the supervisor
//! maps the same memory, reads it at any time, and writes only what a dead worker can no longer say.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    sync::atomic::{AtomicU64, Ordering::Relaxed},
};

use memmap2::{MmapOptions, MmapRaw};
use nix::sys::memfd::{MFdFlags, memfd_create};
use serde::{Deserialize, Serialize};

use crate::rule::{OutputSlot, RuleSlot};

/// A counter with one writer: an addition is a load and a store, with no locked instruction.
#[repr(transparent)]
#[derive(Debug)]
pub struct Counter(AtomicU64);

impl Counter {
    #[inline]
    pub fn add(&self, n: u64) {
        self.set(self.get().wrapping_add(n));
    }

    #[inline]
    pub fn set(&self, value: u64) {
        self.0.store(value, Relaxed);
    }

    #[inline]
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// Why an output did not send a datagram.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DropReason {
    /// Larger than the egress MTU takes; mcr never fragments.
    TooBig,
    /// Arrived with a TTL that `ttl=dec` or `ttl=copy` leaves nothing of.
    TtlExpired,
    /// The egress interface is down, gone or without an address.
    Pending,
    /// The socket's send buffer is full: the egress device is slower than the stream.
    SendBufferFull,
    /// The egress queueing discipline refused it (ENOBUFS).
    QueueFull,
    /// No route, no answer to ARP, or the host refuses the port.
    Unreachable,
    /// A firewall on this host forbids it (EPERM).
    Filtered,
    /// Any other error of the send; the worker's log names it.
    SendFailed,
    /// Held by a worker that died.
    WorkerDied,
}

impl DropReason {
    pub const ALL: [Self; 9] = [
        Self::TooBig,
        Self::TtlExpired,
        Self::Pending,
        Self::SendBufferFull,
        Self::QueueFull,
        Self::Unreachable,
        Self::Filtered,
        Self::SendFailed,
        Self::WorkerDied,
    ];

    /// The name of what only the kernel drops, where it sends by itself: it passed an output over.
    pub const SKIPPED: &str = "skipped";

    /// The name in `stats`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::TooBig => "too_big",
            Self::TtlExpired => "ttl_expired",
            Self::Pending => "pending",
            Self::SendBufferFull => "send_buffer_full",
            Self::QueueFull => "queue_full",
            Self::Unreachable => "unreachable",
            Self::Filtered => "filtered",
            Self::SendFailed => "send_failed",
            Self::WorkerDied => "worker_died",
        }
    }
}

/// Counters of the worker as a whole.
#[repr(C)]
#[derive(Debug)]
pub struct WorkerLedger {
    /// Calls of `io_uring_enter`: all that relaying takes, but for frames longer than a ring's slot.
    pub enters: Counter,
}

/// Counters of one ingress socket. Unit: frames.
#[repr(C)]
#[derive(Debug)]
pub struct QueueLedger {
    /// Taken out of the socket.
    pub received: Counter,
    /// Datagrams beyond the first of each frame that held several (GSO).
    pub segments: Counter,
    /// Of the received: no rule wanted them any more.
    pub no_rule: Counter,
    /// Of the received: the parser refused them.
    pub refused: Counter,
    /// Of the received: longer than a ring's slot, and the socket had no room for the whole. In datagrams they
    /// are with their rules.
    pub cut: Counter,
    /// Of the received: in the hands of a worker that died, before any rule had counted them.
    pub held: Counter,
    /// The kernel's `XDP_STATISTICS` `rx_dropped`, which contains the next.
    pub rx_dropped: Counter,
    /// The kernel's `rx_fill_ring_empty_descs`.
    pub fill_ring_empty: Counter,
    /// The kernel's `rx_ring_full`.
    pub rx_ring_full: Counter,
    /// Steered to a worker that died before it took them.
    pub worker_died: Counter,
}

/// Counters of one rule in one worker.
#[repr(C)]
#[derive(Debug)]
pub struct RuleLedger {
    pub received: Counter,
    /// UDP payload bytes.
    pub received_bytes: Counter,
    /// Sent by this relay itself, where it is the worker that bars loops.
    pub looped: Counter,
    /// Of frames that were longer than a ring's slot, where the socket had no room for the whole.
    pub cut: Counter,
    /// When the last batch with a datagram of the rule came in: nanoseconds since 1970, 0 for never.
    pub last_seen_ns: Counter,
}

/// Counters of one output in one worker: `received = sent + dropped` between two batches.
#[repr(C)]
#[derive(Debug)]
pub struct OutputLedger {
    /// Datagrams that the rule handed to the output.
    pub received: Counter,
    /// Datagrams accepted by the kernel.
    pub sent: Counter,
    /// UDP payload bytes accepted by the kernel.
    pub sent_bytes: Counter,
    /// Sends repeated because an error of an earlier datagram was reported on them.
    pub retried: Counter,
    /// Datagrams of runs that were refused with an errno which does not say which of them left: counted as
    /// dropped, all of them.
    pub approximate: Counter,
    /// By [`DropReason`].
    pub dropped: [Counter; DropReason::ALL.len()],
}

impl OutputLedger {
    #[inline]
    pub fn drop(&self, reason: DropReason, datagrams: u64) {
        self.dropped[reason as usize].add(datagrams);
    }

    pub fn dropped_total(&self) -> u64 {
        self.dropped.iter().map(Counter::get).sum()
    }
}

/// How many of each a ledger has room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layout {
    pub queues: u32,
    pub rules: u32,
    pub outputs: u32,
}

impl Layout {
    const fn queues_offset() -> usize {
        size_of::<WorkerLedger>()
    }

    fn rules_offset(self) -> usize {
        Self::queues_offset() + self.queues as usize * size_of::<QueueLedger>()
    }

    fn outputs_offset(self) -> usize {
        self.rules_offset() + self.rules as usize * size_of::<RuleLedger>()
    }

    fn bytes(self) -> usize {
        self.outputs_offset() + self.outputs as usize * size_of::<OutputLedger>()
    }
}

/// A mapping of one worker's ledger.
#[derive(Debug)]
pub struct Ledger {
    map: MmapRaw,
    layout: Layout,
}

impl Ledger {
    /// Makes an empty ledger. Pages that no rule uses take no memory.
    pub fn create(layout: Layout) -> io::Result<(Self, OwnedFd)> {
        let fd = memfd_create(c"mcr-ledger", MFdFlags::MFD_CLOEXEC)?;
        nix::unistd::ftruncate(&fd, layout.bytes() as i64)?;
        Ok((Self::map(fd.as_fd(), layout)?, fd))
    }

    /// Maps a ledger that was made with this layout.
    pub fn map(fd: BorrowedFd<'_>, layout: Layout) -> io::Result<Self> {
        let size = nix::sys::stat::fstat(fd)?.st_size;
        if usize::try_from(size) != Ok(layout.bytes()) {
            return Err(io::Error::other(format!(
                "the ledger has {size} bytes instead of {}",
                layout.bytes()
            )));
        }
        let map = MmapOptions::new().len(layout.bytes()).map_raw(fd.as_raw_fd())?;
        Ok(Self { map, layout })
    }

    pub fn layout(&self) -> Layout {
        self.layout
    }

    pub fn worker(&self) -> &WorkerLedger {
        // SAFETY: the layout begins with these.
        unsafe { self.entry(0, 0) }
    }

    /// The queue's counters; `index` counts within the worker.
    pub fn queue(&self, index: usize) -> &QueueLedger {
        assert!(index < self.layout.queues as usize, "queue {index} has no ledger");
        // SAFETY: the layout has its queues at this offset, and the assertion keeps to their number.
        unsafe { self.entry(Layout::queues_offset(), index) }
    }

    pub fn rule(&self, slot: RuleSlot) -> &RuleLedger {
        assert!(slot.0 < self.layout.rules, "rule slot {} has no ledger", slot.0);
        // SAFETY: the layout has the rules at this offset, and the assertion keeps to their number.
        unsafe { self.entry(self.layout.rules_offset(), slot.0 as usize) }
    }

    pub fn output(&self, slot: OutputSlot) -> &OutputLedger {
        assert!(slot.0 < self.layout.outputs, "output slot {} has no ledger", slot.0);
        // SAFETY: the layout has the outputs at this offset, and the assertion keeps to their number.
        unsafe { self.entry(self.layout.outputs_offset(), slot.0 as usize) }
    }

    /// Entry `index` of the array at `offset`.
    ///
    /// # Safety
    ///
    /// The layout must have an array of `T` with this entry at this offset, and `T` must consist of
    /// counters alone.
    unsafe fn entry<T>(&self, offset: usize, index: usize) -> &T {
        // SAFETY: within the mapping and aligned, by the contract; counters are atomics, for which any
        // bits are a value and which other processes may change.
        unsafe { &*self.map.as_ptr().add(offset).cast::<T>().add(index) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_mappings_see_one_ledger() {
        let layout = Layout { queues: 1, rules: 2, outputs: 3 };
        let (written, fd) = Ledger::create(layout).unwrap();
        let read = Ledger::map(fd.as_fd(), layout).unwrap();
        written.queue(0).received.add(7);
        written.rule(RuleSlot(1)).received.add(5);
        written.output(OutputSlot(2)).drop(DropReason::TooBig, 3);
        assert_eq!(read.queue(0).received.get(), 7);
        assert_eq!(read.rule(RuleSlot(1)).received.get(), 5);
        assert_eq!(read.output(OutputSlot(2)).dropped_total(), 3);
        assert_eq!(read.output(OutputSlot(1)).dropped_total(), 0);
    }

    #[test]
    fn refuses_a_ledger_of_another_layout() {
        let (_ledger, fd) = Ledger::create(Layout { queues: 1, rules: 2, outputs: 3 }).unwrap();
        assert!(Ledger::map(fd.as_fd(), Layout { queues: 1, rules: 2, outputs: 4 }).is_err());
    }

    #[test]
    fn every_reason_has_its_own_counter() {
        for (index, reason) in DropReason::ALL.into_iter().enumerate() {
            assert_eq!(reason as usize, index, "{}", reason.name());
        }
    }
}
