//! The data path allocates nothing once it is warm.

use std::{
    alloc::{GlobalAlloc, Layout as MemoryLayout, System},
    net::Ipv4Addr,
    sync::atomic::{AtomicU64, Ordering},
};

use libc::iovec;
use mcr::{
    net::egress_socket::{self, EgressKey},
    rule::{IfIndex, OutputSlot, RuleSlot},
    worker::{
        egress::UringEgress,
        ledger::{Layout, Ledger},
        protocol::{CompiledOutput, CompiledRule, Route, Ttl},
        relay::{BATCH, Batch, FlowTable, relay},
        ring::Ring,
    },
};
use mcr_common::{flow::FlowKey4, parse::Datagram};

/// Counts what the test's thread allocates.
struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

// SAFETY: hands everything on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: MemoryLayout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller keeps the contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: MemoryLayout) {
        // SAFETY: the caller keeps the contract.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

const RULES: u8 = 4;
const PORT: u16 = 6000;

/// A network namespace of this thread's own, with nothing but its loopback.
fn enter_empty_namespace() {
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("a network namespace: run this as root");
    let up = std::process::Command::new("ip").args(["link", "set", "lo", "up"]).status();
    assert!(up.expect("ip").success(), "lo cannot be set up");
}

fn rule(slot: u8, mtu: u32) -> CompiledRule {
    let output = |n: u32, mtu| CompiledOutput {
        slot: 2 * u32::from(slot) + n,
        route: Some(Route {
            socket: 0,
            ifindex: 1,
            source: Ipv4Addr::LOCALHOST,
            destination: Ipv4Addr::LOCALHOST,
            port: PORT,
            mtu,
        }),
        ttl: Ttl::Copy,
        dscp: None,
        max_run: 64,
    };
    CompiledRule {
        slot: slot.into(),
        key: FlowKey4::any_source([239, 1, 1, slot], [0x13, 0x88]),
        own_sources: Vec::new(),
        // The second takes no large datagram.
        outputs: vec![output(0, mtu), output(1, 500)],
    }
}

#[test]
fn relaying_allocates_nothing() {
    enter_empty_namespace();
    let _receiver = std::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, PORT)).expect("bind");
    let key = EgressKey {
        interface: "lo".parse().expect("an interface"),
        index: IfIndex(1),
        source_port: 40_000,
        loop_back: false,
        unicast: true,
    };
    let mut egress = UringEgress::new(Ring::new().expect("io_uring"));
    egress.open(0, egress_socket::open(&key).expect("an egress socket"));
    let mut table = FlowTable::default();
    (0..RULES).for_each(|slot| table.upsert(rule(slot, 65_536)));
    let (ledger, _memfd) = Ledger::create(Layout { queues: 1, rules: 8, outputs: 16 }).expect("a ledger");
    let mut batch = Batch::new(8);
    let payload = vec![7u8; 1400];

    let mut relay_batch = |round: usize| {
        batch.clear();
        for n in 0..BATCH {
            // Streams in a row and interleaved, runs and breaks, large and small.
            let group =
                if round.is_multiple_of(2) { n * usize::from(RULES) / BATCH } else { n % usize::from(RULES) };
            let len = [1316, 1316, 1316, 100, 100, 0][(n + round) / 5 % 6];
            let datagram = Datagram {
                source: [10, 0, 0, 1],
                group: [239, 1, 1, group as u8],
                port: [0x13, 0x88],
                ttl: 9,
                tos: 0,
                payload_len: len as u16,
            };
            let flow = table.find(&datagram).expect("a flow");
            batch.push(
                flow.slot,
                &datagram,
                iovec { iov_base: payload.as_ptr().cast_mut().cast(), iov_len: len },
            );
        }
        relay(&mut batch, &table, &ledger, 1, &mut egress);
        egress.flush(&ledger).expect("flush");
    };
    (0..4).for_each(&mut relay_batch);
    let before = ALLOCATIONS.load(Ordering::Relaxed);
    (0..200).for_each(&mut relay_batch);
    let allocated = ALLOCATIONS.load(Ordering::Relaxed) - before;

    let received: u64 = (0..RULES).map(|slot| ledger.rule(RuleSlot(slot.into())).received.get()).sum();
    assert_eq!(received, 204 * BATCH as u64);
    let sent: u64 = (0..8).map(|slot| ledger.output(OutputSlot(slot)).sent.get()).sum();
    assert!(sent > received, "every datagram leaves by one output, small ones by two: {sent} of {received}");
    assert_eq!(allocated, 0, "allocations in 200 batches");
}
