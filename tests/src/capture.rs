//! Every UDP datagram that arrives at an interface, with its headers.
//!
//! A capture joins no group and needs no socket of the receiving host: what it counts is what was on
//! the wire. It asks the kernel whether it missed anything, so that its counts are exact.

use std::{io::Read, net::SocketAddrV4, os::fd::AsRawFd, time::Duration};

use etherparse::{NetSlice, SlicedPacket, TransportSlice};
use nix::sys::socket::{setsockopt, sockopt};
use sha2::{Digest, Sha256};
use socket2::Socket;

use crate::{Namespace, frame::packet_socket};

/// Room for every frame of a test: 10,000 of 1,500 bytes take about 25 MB of socket buffer.
const BUFFER_BYTES: usize = 128 << 20;
/// `struct virtio_net_hdr`, which stands before each frame.
const VNET_HEADER: usize = 10;
const VNET_NEEDS_CHECKSUM: u8 = 1;
const VNET_GSO_UDP_L4: u8 = 5;

/// A UDP datagram as it was on the wire.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Captured {
    pub source: SocketAddrV4,
    pub destination: SocketAddrV4,
    pub destination_mac: [u8; 6],
    pub source_mac: [u8; 6],
    pub ttl: u8,
    pub dscp: u8,
    pub ecn: u8,
    pub dont_fragment: bool,
    pub id: u16,
    pub fragment: bool,
    /// The IP checksum is right, and the UDP checksum is right or not there; or, between veths, unfinished, but right so
    /// far.
    pub checksum_holds: bool,
    pub payload: Vec<u8>,
}

impl Captured {
    /// The sequence number that a [`Source`](crate::Source) wrote.
    #[track_caller]
    pub fn sequence(&self) -> u64 {
        u64::from_be_bytes(self.payload[..8].try_into().expect("a payload of a Source"))
    }
}

/// Takes datagrams from its start on.
#[derive(Debug)]
pub struct Capture {
    socket: Socket,
    datagrams: Vec<Captured>,
    buffer: Vec<u8>,
}

impl Capture {
    #[track_caller]
    pub fn start(namespace: &Namespace, interface: &str) -> Self {
        let socket = namespace.run(|| packet_socket(interface, libc::ETH_P_IP as u16));
        socket.set_nonblocking(true).expect("non-blocking");
        setsockopt(&socket, sockopt::RcvBufForce, &BUFFER_BYTES).expect("SO_RCVBUFFORCE");
        Self { socket, datagrams: Vec::new(), buffer: vec![0; 1 << 17] }
    }

    /// Everything so far.
    #[track_caller]
    pub fn all(&mut self) -> &[Captured] {
        loop {
            match self.socket.read(&mut self.buffer) {
                Ok(len) => dissect(&self.buffer[..len], &mut self.datagrams),
                // Said once when the interface goes down; what came before is still there.
                Err(error) if error.raw_os_error() == Some(libc::ENETDOWN) => {}
                Err(_) => break,
            }
        }
        assert_eq!(missed(&self.socket), 0, "the capture itself lost frames");
        &self.datagrams
    }

    /// What went to one destination so far.
    #[track_caller]
    pub fn to(&mut self, destination: SocketAddrV4) -> Vec<Captured> {
        self.all().iter().filter(|datagram| datagram.destination == destination).cloned().collect()
    }

    #[track_caller]
    pub fn count(&mut self, destination: SocketAddrV4) -> usize {
        self.all().iter().filter(|datagram| datagram.destination == destination).count()
    }

    /// Waits until `n` have gone to a destination, and answers all that did. More than `n` fail.
    #[track_caller]
    pub fn exactly(&mut self, destination: SocketAddrV4, n: usize) -> Vec<Captured> {
        self.at_least(destination, n);
        let datagrams = self.to(destination);
        assert_eq!(datagrams.len(), n, "datagrams to {destination}");
        datagrams
    }

    /// Waits until `n` or more have gone to a destination.
    #[track_caller]
    pub fn at_least(&mut self, destination: SocketAddrV4, n: usize) {
        let mut seen = 0;
        let what = format!("{n} datagrams to {destination}");
        let start = std::time::Instant::now();
        while start.elapsed() < Duration::from_secs(5) && seen < n {
            seen = self.count(destination);
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(seen >= n, "{what}: {seen} came");
    }
}

/// Checks that the datagrams are those of one [`Source`](crate::Source), each once and in order.
#[track_caller]
pub fn assert_sequence(datagrams: &[Captured], expected: std::ops::Range<u64>) {
    let first_wrong = datagrams
        .iter()
        .zip(expected.clone())
        .find(|(datagram, sequence)| datagram.sequence() != *sequence)
        .map(|(datagram, sequence)| (sequence, datagram.sequence()));
    assert_eq!(first_wrong, None, "(expected, seen) sequence number of {} datagrams", datagrams.len());
    assert_eq!(datagrams.len() as u64, expected.end - expected.start);
}

/// SHA-256 over the payloads in the order of their arrival, in hexadecimal.
pub fn sha256<'a>(payloads: impl IntoIterator<Item = &'a [u8]>) -> String {
    use std::fmt::Write;
    let mut digest = Sha256::new();
    for payload in payloads {
        digest.update(payload);
    }
    digest.finalize().iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").expect("a String takes everything");
        text
    })
}

/// Appends the datagrams of one frame: several where the sender's stack left segmentation to the device.
fn dissect(bytes: &[u8], datagrams: &mut Vec<Captured>) {
    let Some((vnet, frame)) = bytes.split_at_checked(VNET_HEADER) else { return };
    let Ok(packet) = SlicedPacket::from_ethernet(frame) else { return };
    let (Some(NetSlice::Ipv4(ip)), Some(TransportSlice::Udp(udp))) = (&packet.net, &packet.transport) else {
        return;
    };
    let ip = ip.header();
    let unfinished = vnet[0] & VNET_NEEDS_CHECKSUM != 0;
    let checksum_holds = if unfinished {
        udp.checksum() == pseudo_header_sum(ip.source(), ip.destination(), udp.length())
    } else {
        let right = udp.to_header().calc_checksum_ipv4_raw(ip.source(), ip.destination(), udp.payload());
        udp.checksum() == 0 || right.is_ok_and(|right| right == udp.checksum())
    };
    let whole = Captured {
        source: SocketAddrV4::new(ip.source_addr(), udp.source_port()),
        destination: SocketAddrV4::new(ip.destination_addr(), udp.destination_port()),
        destination_mac: frame[..6].try_into().expect("six bytes"),
        source_mac: frame[6..12].try_into().expect("six bytes"),
        ttl: ip.ttl(),
        dscp: ip.dcp().value(),
        ecn: ip.ecn().value(),
        dont_fragment: ip.dont_fragment(),
        id: ip.identification(),
        fragment: ip.more_fragments() || ip.fragments_offset().value() != 0,
        checksum_holds: checksum_holds && ip.header_checksum() == ip.to_header().calc_header_checksum(),
        payload: Vec::new(),
    };
    let segment = match vnet[1] {
        VNET_GSO_UDP_L4 => usize::from(u16::from_le_bytes([vnet[4], vnet[5]])).max(1),
        _ => udp.payload().len().max(1),
    };
    if udp.payload().is_empty() {
        datagrams.push(whole);
        return;
    }
    datagrams.extend(
        udp.payload().chunks(segment).map(|payload| Captured { payload: payload.to_vec(), ..whole.clone() }),
    );
}

/// What the stack writes where it leaves the rest of a UDP checksum to the device.
fn pseudo_header_sum(source: [u8; 4], destination: [u8; 4], length: u16) -> u16 {
    let word = |bytes: [u8; 4], at: usize| u32::from(u16::from_be_bytes([bytes[at], bytes[at + 1]]));
    let mut sum = word(source, 0) + word(source, 2) + word(destination, 0) + word(destination, 2);
    sum += 17 + u32::from(length);
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// Frames that the socket had no room for since the last call.
fn missed(socket: &Socket) -> u32 {
    let mut statistics = [0u32; 2];
    let mut len = size_of_val(&statistics) as libc::socklen_t;
    // SAFETY: two u32, tpacket_stats' shape, live through the call, and their size is what is said.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            libc::PACKET_STATISTICS,
            statistics.as_mut_ptr().cast(),
            &raw mut len,
        )
    };
    assert_eq!(result, 0, "PACKET_STATISTICS: {}", std::io::Error::last_os_error());
    statistics[1]
}
