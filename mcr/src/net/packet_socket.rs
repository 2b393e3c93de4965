//! Packet sockets with their receive rings, one a worker, in one fanout group an interface.
//!
//! The supervisor makes and holds them. What a dead worker had not taken stays in its ring for the next
//! one, no other worker's flows move, and no socket ever joins a group whose flows are already relayed.

use std::{
    io,
    mem::zeroed,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

use socket2::{Domain, Protocol, Socket, Type};

use crate::{
    rule::IfIndex,
    sys::{multicast, socket_option},
    worker::protocol::PacketRing,
};

const TPACKET_V2: i32 = 1;
const FANOUT_HASH: u32 = libc::PACKET_FANOUT_HASH;
/// The kernel chooses an id that no group of the namespace has.
const FANOUT_UNIQUE_ID: u32 = 0x2000;
const SO_ATTACH_BPF: i32 = 50;

/// Room for frames longer than a slot.
const LONG_FRAMES_BYTES: i32 = 32 * 1024 * 1024;

/// Binds a packet socket to an interface: from now on it receives what its filter admits.
pub fn bind(socket: &impl AsRawFd, interface: IfIndex) -> io::Result<()> {
    // SAFETY: all zeroes is a sockaddr_ll.
    let mut address = unsafe { zeroed::<libc::sockaddr_ll>() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
    address.sll_ifindex = interface.0 as i32;
    let len = size_of_val(&address) as libc::socklen_t;
    // SAFETY: the kernel reads `len` bytes of the address.
    let bound = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), len) };
    if bound == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// What a socket's kernel side has counted since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PacketStatistics {
    /// Frames that the filter admitted, the dropped ones included.
    pub admitted: u64,
    /// Of these: the ring was full.
    pub dropped: u64,
}

/// One packet socket. It receives nothing until a filter that admits something is on it.
#[derive(Debug)]
pub struct PacketSocket {
    socket: Socket,
    statistics: PacketStatistics,
}

impl PacketSocket {
    /// The sockets of an interface, in the order of its workers.
    ///
    /// A bound socket receives everything until it is in its group: a filter that admits nothing keeps it
    /// empty. One socket needs no group, whose hash would be computed for nothing.
    pub fn open_group(interface: IfIndex, sockets: u32, ring: PacketRing) -> io::Result<Vec<Self>> {
        let group = (0..sockets).map(|_| Self::open(interface, ring)).collect::<io::Result<Vec<_>>>()?;
        if let [first, rest @ ..] = &group[..]
            && !rest.is_empty()
        {
            first.join(0, FANOUT_HASH | FANOUT_UNIQUE_ID)?;
            let joined = socket_option::get(&first.socket, libc::SOL_PACKET, libc::PACKET_FANOUT)?;
            let id = u32::from_ne_bytes(joined) & 0xffff;
            rest.iter().try_for_each(|member| member.join(id, FANOUT_HASH))?;
        }
        Ok(group)
    }

    fn open(interface: IfIndex, ring: PacketRing) -> io::Result<Self> {
        let socket = Socket::new(Domain::PACKET, Type::RAW.cloexec().nonblocking(), Some(Protocol::from(0)))?;
        multicast::receive_nothing(&socket)?;
        let set = |name, value: i32| socket_option::set(&socket, libc::SOL_PACKET, name, &value);
        set(libc::PACKET_VERSION, TPACKET_V2)?;
        set(libc::PACKET_VNET_HDR, 1)?;
        set(libc::PACKET_IGNORE_OUTGOING, 1)?;
        set(libc::PACKET_COPY_THRESH, 1)?;
        socket_option::set_buffer(&socket, libc::SO_RCVBUFFORCE, libc::SO_RCVBUF, LONG_FRAMES_BYTES)?;
        let request = libc::tpacket_req {
            tp_block_size: ring.block_bytes,
            tp_block_nr: ring.blocks,
            tp_frame_size: ring.slot_bytes,
            tp_frame_nr: ring.slots(),
        };
        socket_option::set(&socket, libc::SOL_PACKET, libc::PACKET_RX_RING, &request)?;
        bind(&socket, interface)?;
        Ok(Self { socket, statistics: PacketStatistics::default() })
    }

    fn join(&self, id: u32, mode: u32) -> io::Result<()> {
        socket_option::set(&self.socket, libc::SOL_PACKET, libc::PACKET_FANOUT, &(id | mode << 16))
    }

    /// Lets in what an eBPF filter admits.
    pub fn attach_filter(&self, filter: BorrowedFd<'_>) -> io::Result<()> {
        socket_option::set(&self.socket, libc::SOL_SOCKET, SO_ATTACH_BPF, &filter.as_raw_fd())
    }

    /// A second descriptor, to hand down.
    pub fn duplicate(&self) -> io::Result<OwnedFd> {
        self.socket.as_fd().try_clone_to_owned()
    }

    /// Takes off the error that its interface left when it went down: the socket receives again by itself when
    /// that is up, but until then the error would wake its worker again and again.
    pub fn clear_error(&self) {
        let _ = self.socket.take_error();
    }

    /// Reads what the kernel counted; reading sets its counters to zero.
    pub fn statistics(&mut self) -> PacketStatistics {
        if let Ok(counted) = socket_option::get::<8>(&self.socket, libc::SOL_PACKET, libc::PACKET_STATISTICS)
        {
            let [packets, drops] =
                [0, 4].map(|at| u32::from_ne_bytes(std::array::from_fn(|i| counted[at + i])));
            self.statistics.admitted += u64::from(packets);
            self.statistics.dropped += u64::from(drops);
        }
        self.statistics
    }
}
