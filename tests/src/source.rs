//! A paced UDP sender inside the test process: runs until it is told to stop, and knows what it sent.

use std::{
    net::{Ipv4Addr, SocketAddrV4},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use socket2::{Domain, Protocol, Socket, Type};

use crate::{
    Namespace,
    site::ETH,
    wait::{PATIENCE, wait_until},
};

/// Most datagrams in one go, unless a stream says another. A sender that was kept from the CPU falls behind its rate
/// rather than overrun the 256 frames of a veth's ring.
const BURST: u64 = 32;

/// What is sent, to where. Payloads start with the sequence number, eight bytes, big endian.
#[derive(Clone, Copy, Debug)]
pub struct Stream {
    pub to: SocketAddrV4,
    /// Datagrams a second.
    pub rate: u64,
    /// Payload bytes, at least eight.
    pub size: usize,
    pub ttl: u8,
    /// DSCP and ECN.
    pub tos: u8,
    /// Datagrams after which it ends by itself.
    pub count: u64,
    /// Source port; any if 0.
    pub port: u16,
    /// Most datagrams in one go.
    pub burst: u64,
}

impl Stream {
    pub fn to(to: SocketAddrV4) -> Self {
        Self { to, rate: 5_000, size: 1316, ttl: 8, tos: 0, count: u64::MAX, port: 0, burst: BURST }
    }
}

/// Stopped on drop.
#[derive(Debug)]
pub struct Source {
    stop: Arc<AtomicBool>,
    sent: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl Source {
    /// Starts to send from a namespace's `eth0`.
    #[track_caller]
    pub fn start(namespace: &Namespace, stream: Stream) -> Self {
        let socket = namespace.run(|| socket(stream));
        let (stop, sent) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let thread = thread::spawn({
            let (stop, sent) = (Arc::clone(&stop), Arc::clone(&sent));
            move || pace(&socket, stream, &stop, &sent)
        });
        Self { stop, sent, thread: Some(thread) }
    }

    /// Sends `stream.count` datagrams and returns when the last is out.
    #[track_caller]
    pub fn play(namespace: &Namespace, stream: Stream) {
        assert_eq!(Self::start(namespace, stream).finish(), stream.count);
    }

    /// Datagrams sent so far.
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Acquire)
    }

    /// Returns when `n` more have been sent than now.
    #[track_caller]
    pub fn wait_for_more(&self, n: u64) {
        let target = self.sent() + n;
        wait_until(&format!("{n} more datagrams sent"), PATIENCE, || self.sent() >= target);
    }

    /// Stops, and answers how many were sent.
    #[track_caller]
    pub fn stop(self) -> u64 {
        self.stop.store(true, Ordering::Release);
        self.finish()
    }

    /// Waits for its own end, and answers how many were sent.
    #[track_caller]
    pub fn finish(mut self) -> u64 {
        let thread = self.thread.take().expect("joined once");
        thread.join().expect("the source could send");
        self.sent()
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            let _failed_already = thread.join();
        }
    }
}

fn socket(stream: Stream) -> Socket {
    let socket = Socket::new(Domain::IPV4, Type::DGRAM, Some(Protocol::UDP)).expect("UDP socket");
    socket.bind_device(Some(ETH.as_bytes())).expect("SO_BINDTODEVICE");
    socket.set_multicast_ttl_v4(u32::from(stream.ttl)).expect("IP_MULTICAST_TTL");
    socket.set_tos_v4(u32::from(stream.tos)).expect("IP_TOS");
    socket.bind(&SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, stream.port).into()).expect("bind");
    socket
}

fn pace(socket: &Socket, stream: Stream, stop: &AtomicBool, sent: &AtomicU64) {
    let to = stream.to.into();
    let mut payload = vec![0xa5; stream.size.max(8)];
    let start = Instant::now();
    let mut sequence = 0;
    while sequence < stream.count && !stop.load(Ordering::Acquire) {
        let due = (start.elapsed().as_micros() * u128::from(stream.rate) / 1_000_000) as u64;
        for _ in 0..due.saturating_sub(sequence).min(stream.burst).min(stream.count - sequence) {
            payload[..8].copy_from_slice(&sequence.to_be_bytes());
            // A byte that differs from datagram to datagram, far from the sequence number.
            if let Some(last) = payload[8..].last_mut() {
                *last = sequence as u8;
            }
            socket.send_to(&payload, &to).expect("send");
            sequence += 1;
            sent.store(sequence, Ordering::Release);
        }
        thread::sleep(Duration::from_micros(500));
    }
}
