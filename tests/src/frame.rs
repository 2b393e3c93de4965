//! Frames made by hand, and a socket that puts them on a wire as they are.

use std::{
    net::{Ipv4Addr, SocketAddrV4},
    os::fd::AsRawFd,
    thread,
    time::{Duration, Instant},
};

use etherparse::{EtherType, Ethernet2Header, IpNumber, Ipv4Header, UdpHeader};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use crate::Namespace;

/// Where the headers of [`Udp::frame`] start.
pub const IP: usize = 14;
pub const UDP: usize = 34;
pub const PAYLOAD: usize = 42;

/// A UDP datagram over IPv4 over Ethernet.
#[derive(Clone, Debug)]
pub struct Udp {
    pub source: SocketAddrV4,
    pub destination: SocketAddrV4,
    pub ttl: u8,
    pub dscp: u8,
    pub ecn: u8,
    pub destination_mac: [u8; 6],
    pub payload: Vec<u8>,
}

impl Udp {
    pub fn new(source: SocketAddrV4, destination: SocketAddrV4) -> Self {
        Self {
            source,
            destination,
            ttl: 32,
            dscp: 0,
            ecn: 0,
            destination_mac: multicast_mac(*destination.ip()),
            payload: Vec::new(),
        }
    }

    #[must_use]
    pub fn payload(mut self, payload: &[u8]) -> Self {
        self.payload = payload.to_vec();
        self
    }

    #[must_use]
    pub fn ttl(mut self, ttl: u8) -> Self {
        self.ttl = ttl;
        self
    }

    #[must_use]
    pub fn dscp(mut self, dscp: u8, ecn: u8) -> Self {
        (self.dscp, self.ecn) = (dscp, ecn);
        self
    }

    /// The frame, with every length and checksum right.
    #[track_caller]
    pub fn frame(&self) -> Vec<u8> {
        let ethernet = Ethernet2Header {
            source: [2, 0, 0, 0, 0, 1],
            destination: self.destination_mac,
            ether_type: EtherType::IPV4,
        };
        let length = u16::try_from(UdpHeader::LEN + self.payload.len()).expect("a datagram's length");
        let mut ip = Ipv4Header::new(
            length,
            self.ttl,
            IpNumber::UDP,
            self.source.ip().octets(),
            self.destination.ip().octets(),
        )
        .expect("a datagram's length");
        ip.dscp = self.dscp.try_into().expect("a DSCP");
        ip.ecn = self.ecn.try_into().expect("an ECN");
        ip.header_checksum = ip.calc_header_checksum();
        let udp =
            UdpHeader::with_ipv4_checksum(self.source.port(), self.destination.port(), &ip, &self.payload)
                .expect("a datagram's length");
        let mut frame = Vec::with_capacity(PAYLOAD + self.payload.len());
        frame.extend(ethernet.to_bytes());
        frame.extend(ip.to_bytes());
        frame.extend(udp.to_bytes());
        frame.extend(&self.payload);
        frame
    }
}

/// RFC 1112, section 6.4: the low 23 bits of the group behind 01:00:5e.
pub fn multicast_mac(group: Ipv4Addr) -> [u8; 6] {
    let [_, b, c, d] = group.octets();
    [1, 0, 0x5e, b & 0x7f, c, d]
}

/// Writes the checksum of the 20 bytes of IPv4 header at [`IP`] anew.
pub fn fix_ip_checksum(frame: &mut [u8]) {
    frame[IP + 10..IP + 12].fill(0);
    let mut sum = frame[IP..IP + 20]
        .chunks_exact(2)
        .fold(0u32, |sum, word| sum + u32::from(u16::from_be_bytes([word[0], word[1]])));
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    frame[IP + 10..IP + 12].copy_from_slice(&(!(sum as u16)).to_be_bytes());
}

/// A packet socket on one interface of a namespace.
#[derive(Debug)]
pub struct RawSender {
    socket: Socket,
}

impl RawSender {
    #[track_caller]
    pub fn new(namespace: &Namespace, interface: &str) -> Self {
        // Protocol 0: it receives nothing.
        Self { socket: namespace.run(|| packet_socket(interface, 0)) }
    }

    /// Sends one frame, which starts at its Ethernet header.
    #[track_caller]
    pub fn send(&self, frame: &[u8]) {
        let sent = self.socket.send(frame).expect("send a frame");
        assert_eq!(sent, frame.len());
    }

    /// Sends frames at no more than `rate` a second, and answers how many.
    #[track_caller]
    pub fn play(&self, frames: impl IntoIterator<Item = Vec<u8>>, rate: u32) -> u64 {
        let start = Instant::now();
        let mut sent = 0;
        for frame in frames {
            let due = start + Duration::from_secs(1) * sent / rate;
            thread::sleep(due.saturating_duration_since(Instant::now()));
            self.send(&frame);
            sent += 1;
        }
        sent.into()
    }
}

/// A raw packet socket bound to an interface of the calling thread's namespace.
pub(crate) fn packet_socket(interface: &str, protocol: u16) -> Socket {
    let index = nix::net::if_::if_nametoindex(interface).expect("interface index");
    let socket = Socket::new(Domain::PACKET, Type::RAW, Some(Protocol::from(0))).expect("packet socket");
    // SAFETY: the closure writes a whole sockaddr_ll, which sockaddr_storage has room for, and its length.
    let ((), address) = unsafe {
        SockAddr::try_init(|storage, len| {
            let mut link: libc::sockaddr_ll = std::mem::zeroed();
            link.sll_family = libc::AF_PACKET as u16;
            link.sll_protocol = protocol.to_be();
            link.sll_ifindex = index.cast_signed();
            storage.cast::<libc::sockaddr_ll>().write(link);
            *len = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
            Ok(())
        })
    }
    .expect("link address");
    // Options go before: with protocol 0 nothing is received until the bind.
    set_packet_option(&socket, libc::PACKET_IGNORE_OUTGOING, 1);
    set_packet_option(&socket, libc::PACKET_VNET_HDR, i32::from(protocol != 0));
    socket.bind(&address).expect("bind a packet socket");
    socket
}

fn set_packet_option(socket: &Socket, option: i32, value: i32) {
    // SAFETY: the value is an int that lives through the call, and its size is what is said.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            option,
            (&raw const value).cast(),
            size_of::<i32>() as libc::socklen_t,
        )
    };
    assert_eq!(result, 0, "packet socket option {option}: {}", std::io::Error::last_os_error());
}
