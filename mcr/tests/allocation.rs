//! The data path allocates nothing once it is warm.

mod support;

use std::{
    alloc::{GlobalAlloc, Layout, System},
    net::{Ipv4Addr, UdpSocket},
    sync::atomic::{AtomicU64, Ordering},
};

use mcr::{
    rule::{OutputSlot, RuleSlot},
    worker::relay::BATCH,
};
use support::{PORT, Worker, enter_empty_namespace, loopback_socket, to_loopback};

/// Counts what this process allocates.
struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

// SAFETY: hands everything on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller keeps the contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps the contract.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

const RULES: usize = 4;

/// Group and size of a batch's datagrams: streams in a row or interleaved, runs and breaks.
fn datagrams(round: usize) -> impl Iterator<Item = (u8, usize)> {
    (0..BATCH).map(move |n| {
        let group = if round.is_multiple_of(2) { n * RULES / BATCH } else { n % RULES };
        (group as u8, [1316, 1316, 1316, 100, 100, 0][(n + round) / 5 % 6])
    })
}

#[test]
fn relaying_allocates_nothing() {
    enter_empty_namespace();
    let _receiver = UdpSocket::bind((Ipv4Addr::LOCALHOST, PORT)).expect("bind");
    // The second output of each rule takes no large datagram.
    let outputs = |rule: u32| vec![to_loopback(2 * rule, 65_536), to_loopback(2 * rule + 1, 500)];
    let mut worker = Worker::new((0..RULES as u32).map(outputs), loopback_socket());
    (0..4).for_each(|round| worker.relay(datagrams(round)));
    let before = ALLOCATIONS.load(Ordering::Relaxed);
    (0..200).for_each(|round| worker.relay(datagrams(round)));
    let allocated = ALLOCATIONS.load(Ordering::Relaxed) - before;

    let received: u64 = (0..RULES as u32).map(|slot| worker.ledger.rule(RuleSlot(slot)).received.get()).sum();
    assert_eq!(received, 204 * BATCH as u64);
    let sent: u64 = (0..8).map(|slot| worker.ledger.output(OutputSlot(slot)).sent.get()).sum();
    assert!(sent > received, "every datagram leaves by one output, small ones by two: {sent} of {received}");
    assert_eq!(allocated, 0, "allocations in 200 batches");
}
