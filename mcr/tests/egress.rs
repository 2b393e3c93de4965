//! Runs of datagrams and the real kernel: what it takes, what it refuses, and what is counted then.

mod support;

use std::net::{Ipv4Addr, UdpSocket};

use mcr::{
    rule::OutputSlot,
    worker::{ledger::DropReason, relay::BATCH},
};
use nix::sys::socket::{setsockopt, sockopt};
use support::{PORT, Worker, enter_empty_namespace, loopback_socket, run, to_loopback};

const SLOT: OutputSlot = OutputSlot(0);

fn receiver() -> UdpSocket {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, PORT)).expect("bind");
    setsockopt(&socket, sockopt::RcvBufForce, &(32 << 20)).expect("SO_RCVBUFFORCE");
    socket.set_nonblocking(true).expect("non-blocking");
    socket
}

/// Sizes of the datagrams that have arrived.
fn sizes(receiver: &UdpSocket) -> Vec<usize> {
    let mut buffer = vec![0; 1 << 16];
    std::iter::from_fn(|| receiver.recv(&mut buffer).ok()).collect()
}

#[test]
fn runs_reach_the_limits_of_the_kernel_and_keep_to_them() {
    enter_empty_namespace();
    let receiver = receiver();
    let mut worker = Worker::new([vec![to_loopback(0, 65_536)]], loopback_socket());
    // To a host each run goes by a call of its own.
    for (what, given, enters) in [
        ("a full batch of one size", vec![100; BATCH], BATCH as u64 / 64),
        ("runs of as many bytes as a datagram may have", vec![1316; 100], 3),
        ("the longest datagram", vec![65_507], 1),
        ("a last one that is shorter", vec![1000, 1000, 999, 1000], 2),
        ("one that is longer", vec![1000, 1001, 1000], 2),
        ("empty ones between", vec![0, 0, 5, 0, 5, 5], 5),
        ("runs of two and of one", (0..BATCH).map(|n| 1 + n % 2 * 9).collect(), 513),
    ] {
        let before = (worker.egress.ring.enters(), worker.ledger.output(SLOT).sent.get());
        worker.relay(given.iter().map(|&len| (0, len)));
        assert_eq!(worker.egress.ring.enters() - before.0, enters, "{what}: calls of the kernel");
        assert_eq!(worker.ledger.output(SLOT).sent.get() - before.1, given.len() as u64, "{what}");
        assert_eq!(sizes(&receiver), given, "{what}");
    }
    assert_eq!(worker.ledger.output(SLOT).dropped_total(), 0);
}

#[test]
fn what_a_device_refuses_as_a_run_goes_one_by_one_from_then_on() {
    enter_empty_namespace();
    let receiver = receiver();
    let socket = loopback_socket();
    // The kernel segments nothing for a socket that wants no checksums.
    mcr::sys::socket_option::set(&socket, libc::SOL_SOCKET, libc::SO_NO_CHECK, &1i32).expect("SO_NO_CHECK");
    let mut worker = Worker::new([vec![to_loopback(0, 65_536)]], socket);
    worker.relay((0..20).map(|n| (0, if n < 10 { 500 } else { 300 })));
    let outputs: Vec<_> = worker.egress.without_gso().collect();
    assert_eq!(outputs, [SLOT], "said once, though two runs were refused");
    let expected: Vec<_> = (0..20).map(|n| if n < 10 { 500 } else { 300 }).collect();
    assert_eq!(sizes(&receiver), expected, "each arrives, in order");
    worker.table.send_singly(SLOT);
    worker.relay((0..20).map(|_| (0, 400)));
    assert_eq!(worker.egress.without_gso().count(), 0, "no run is tried again");
    assert_eq!(sizes(&receiver), [400; 20]);
    let output = worker.ledger.output(SLOT);
    assert_eq!((output.sent.get(), output.dropped_total(), output.approximate.get()), (40, 0, 0));
}

#[test]
fn an_error_of_another_host_leaves_the_order_as_it_was() {
    enter_empty_namespace();
    let receiver = receiver();
    let mut deaf = to_loopback(0, 65_536);
    deaf.route.as_mut().expect("a route").port = PORT + 1;
    let mut worker = Worker::new([vec![deaf], vec![to_loopback(1, 65_536)]], loopback_socket());
    let runs: Vec<_> = (0..200).map(|n| 300 - n).collect();
    for _ in 0..20 {
        // The answer waits at the socket that both go by.
        worker.relay([(0, 10)]);
        worker.relay(runs.iter().map(|&len| (1, len)));
        assert_eq!(sizes(&receiver), runs);
    }
    let output = worker.ledger.output(OutputSlot(1));
    assert_eq!((output.sent.get(), output.dropped_total()), (4_000, 0));
    assert!(output.retried.get() >= 10, "no error was met: {output:?}");
}

#[test]
fn a_run_that_a_queue_refuses_is_counted_as_approximate() {
    enter_empty_namespace();
    let _receiver = receiver();
    run(
        "tc",
        &["qdisc", "add", "dev", "lo", "root", "tbf", "rate", "80kbit", "burst", "2000", "limit", "500"],
    );
    let mut worker = Worker::new([vec![to_loopback(0, 65_536)]], loopback_socket());
    worker.relay((0..40).map(|_| (0, 1000)));
    let output = worker.ledger.output(SLOT);
    let full = output.dropped[DropReason::QueueFull as usize].get();
    assert_eq!(output.sent.get() + full, 40, "{output:?}");
    assert_eq!((full, output.approximate.get()), (40, 40), "one run, one errno: {output:?}");
    // One by one the kernel says which.
    worker.table.send_singly(SLOT);
    worker.relay((0..40).map(|_| (0, 1000)));
    let output = worker.ledger.output(SLOT);
    assert_eq!(output.sent.get() + output.dropped_total(), 80, "{output:?}");
    assert_eq!(output.approximate.get(), 40, "{output:?}");
}
