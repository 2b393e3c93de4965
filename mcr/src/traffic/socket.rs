//! The sockets of generator and receiver, and their batched calls: the kernel's edge of this module.

use std::{
    io,
    mem::{self, MaybeUninit},
    net::{Ipv4Addr, SocketAddrV4},
    os::fd::{AsFd, AsRawFd},
    ptr, slice,
};

use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Protocol, Socket, Type};

use super::{account::Datagram, probe};
use crate::{
    net::membership::Membership,
    rule::{IfIndex, InterfaceName},
    sys::{multicast, socket_option},
};

/// Largest receive buffer that is asked for; many sockets share four times this.
const RECEIVE_BUFFER_BYTES: usize = 128 << 20;

const SEND_BUFFER_BYTES: usize = 8 << 20;

/// The index of an interface of this network namespace.
pub fn interface_index(name: &InterfaceName) -> nix::Result<IfIndex> {
    nix::net::if_::if_nametoindex(name.as_str()).map(IfIndex)
}

/// A system call that failed, by what it was for.
#[derive(Debug, thiserror::Error)]
#[error("{call}")]
pub struct SocketError {
    pub call: &'static str,
    #[source]
    pub error: io::Error,
}

trait During<T> {
    fn during(self, call: &'static str) -> Result<T, SocketError>;
}

impl<T, E: Into<io::Error>> During<T> for Result<T, E> {
    fn during(self, call: &'static str) -> Result<T, SocketError> {
        self.map_err(|error| SocketError { call, error: error.into() })
    }
}

/// How a generator's datagrams leave.
#[derive(Clone, Debug)]
pub struct SendOptions {
    pub interface: InterfaceName,
    pub index: IfIndex,
    pub ttl: u8,
    pub dscp: u8,
    pub from: Option<(Ipv4Addr, u16)>,
    pub loop_back: bool,
    /// The one destination, where there is only one: the kernel then looks a host's route up once. A group's it
    /// looks up for every datagram all the same.
    pub connect: Option<SocketAddrV4>,
    /// Datagrams of this many bytes leave several at a time by one `UDP_SEGMENT` send; needs `connect`.
    pub segment: Option<u16>,
}

/// How a [`SendBatch`] hands its payloads over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SendBy {
    /// One message for each, with its destination.
    Destination,
    /// One message for each, by a connected socket.
    Connection,
    /// All as one message, which the kernel cuts up, by a connected socket.
    Segments,
}

/// A socket that sends by one interface, with or without a route.
pub fn sender(options: &SendOptions) -> Result<Socket, SocketError> {
    let socket = udp()?;
    socket.bind_device(Some(options.interface.as_str().as_bytes())).during("SO_BINDTODEVICE")?;
    set_multicast_interface(&socket, options.index).during("IP_MULTICAST_IF")?;
    socket.set_multicast_loop_v4(options.loop_back).during("IP_MULTICAST_LOOP")?;
    socket.set_multicast_ttl_v4(options.ttl.into()).during("IP_MULTICAST_TTL")?;
    socket.set_ttl_v4(options.ttl.into()).during("IP_TTL")?;
    socket.set_tos_v4((options.dscp << 2).into()).during("IP_TOS")?;
    // Without it the kernel keeps to itself that a queue was full, and the datagram would pass for sent.
    setsockopt(&socket, sockopt::Ipv4RecvErr, &true).during("IP_RECVERR")?;
    // Too big for the MTU is an error then, and never a fragment.
    socket_option::set(&socket, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, &libc::IP_PMTUDISC_DO)
        .during("IP_MTU_DISCOVER")?;
    if setsockopt(&socket, sockopt::SndBufForce, &SEND_BUFFER_BYTES).is_err() {
        setsockopt(&socket, sockopt::SndBuf, &SEND_BUFFER_BYTES).during("SO_SNDBUF")?;
    }
    // Nothing is ever read from it: what is sent to its port should not pile up there.
    setsockopt(&socket, sockopt::RcvBuf, &0).during("SO_RCVBUF")?;
    if let Some((address, port)) = options.from {
        socket.bind(&SocketAddrV4::new(address, port).into()).during("bind")?;
    }
    if let Some(destination) = options.connect {
        socket.connect(&destination.into()).during("connect")?;
    }
    if let Some(bytes) = options.segment {
        setsockopt(&socket, sockopt::UdpGsoSegment, &bytes.into()).during("UDP_SEGMENT")?;
    }
    Ok(socket)
}

/// What a receiver's socket is for.
#[derive(Clone, Debug)]
pub struct ReceiveOptions {
    pub interface: InterfaceName,
    pub index: IfIndex,
    /// The one source that a group is joined for.
    pub source: Option<Ipv4Addr>,
    /// How many sockets there will be in all.
    pub sockets: u32,
}

/// A socket that receives what comes to `address` by one interface: joined if it is a group.
pub fn receiver(address: SocketAddrV4, options: &ReceiveOptions) -> Result<Socket, SocketError> {
    let socket = udp()?;
    let group = address.ip().is_multicast();
    if group {
        socket.set_reuse_address(true).during("SO_REUSEADDR")?;
        socket.set_multicast_all_v4(false).during("IP_MULTICAST_ALL")?;
    }
    socket.bind_device(Some(options.interface.as_str().as_bytes())).during("SO_BINDTODEVICE")?;
    let share = 4 * RECEIVE_BUFFER_BYTES / options.sockets.max(1) as usize;
    let buffer = share.clamp(1 << 20, RECEIVE_BUFFER_BYTES);
    if setsockopt(&socket, sockopt::RcvBufForce, &buffer).is_err() {
        setsockopt(&socket, sockopt::RcvBuf, &buffer).during("SO_RCVBUF")?;
    }
    setsockopt(&socket, sockopt::ReceiveTimestampns, &true).during("SO_TIMESTAMPNS")?;
    setsockopt(&socket, sockopt::Ipv4RecvTtl, &true).during("IP_RECVTTL")?;
    setsockopt(&socket, sockopt::IpRecvTos, &true).during("IP_RECVTOS")?;
    socket.bind(&address.into()).during("bind")?;
    if group {
        let membership =
            Membership { interface: options.index, group: *address.ip(), source: options.source };
        multicast::join(&socket, &membership).during("joining the group")?;
    }
    Ok(socket)
}

fn udp() -> Result<Socket, SocketError> {
    let socket = Socket::new(Domain::IPV4, Type::DGRAM, Some(Protocol::UDP)).during("socket")?;
    socket.set_nonblocking(true).during("O_NONBLOCK")?;
    Ok(socket)
}

/// By index: an interface without an address has no other name in this call.
fn set_multicast_interface(socket: &Socket, index: IfIndex) -> io::Result<()> {
    let any = libc::in_addr { s_addr: 0 };
    let request = libc::ip_mreqn { imr_multiaddr: any, imr_address: any, imr_ifindex: index.0.cast_signed() };
    socket_option::set(socket, libc::IPPROTO_IP, libc::IP_MULTICAST_IF, &request)
}

/// Datagrams that the kernel dropped at this socket for want of space in its buffer (or for a bad checksum).
///
/// It is the counter that `SO_RXQ_OVFL` attaches to datagrams; asked for, it also tells of drops after the last one.
pub fn dropped(socket: &Socket) -> io::Result<u64> {
    let meminfo: [u8; 36] = socket_option::get(socket, libc::SOL_SOCKET, libc::SO_MEMINFO)?;
    let drops = meminfo.as_chunks::<4>().0[libc::SK_MEMINFO_DROPS as usize];
    Ok(u32::from_ne_bytes(drops).into())
}

/// Payloads of one size to send.
pub struct SendBatch {
    by: SendBy,
    payloads: Vec<Vec<u8>>,
    destinations: Vec<libc::sockaddr_in>,
    filled: usize,
}

impl SendBatch {
    /// Space for `capacity` payloads, at most [`MAX_BATCH`], of `size` bytes each.
    pub fn new(capacity: usize, size: usize, by: SendBy) -> Self {
        Self {
            by,
            payloads: vec![vec![0; size]; capacity],
            destinations: vec![sockaddr(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0)); capacity],
            filled: 0,
        }
    }

    pub fn clear(&mut self) {
        self.filled = 0;
    }

    pub fn is_full(&self) -> bool {
        self.filled == self.payloads.len()
    }

    /// The next payload, to be written by the caller. The batch must not be full.
    pub fn push(&mut self, destination: SocketAddrV4) -> &mut [u8] {
        let at = self.filled;
        self.filled += 1;
        self.destinations[at] = sockaddr(destination);
        &mut self.payloads[at]
    }

    pub fn payload(&self, at: usize) -> &[u8] {
        &self.payloads[at]
    }

    /// Hands the payloads to the kernel; returns how many it took, the first ones, at least one if there are any.
    pub fn send(&mut self, socket: &Socket) -> io::Result<usize> {
        let count = self.filled.min(MAX_BATCH);
        let mut iovecs = [libc::iovec { iov_base: ptr::null_mut(), iov_len: 0 }; MAX_BATCH];
        for (iovec, payload) in iovecs.iter_mut().zip(&mut self.payloads[..count]) {
            *iovec = libc::iovec { iov_base: payload.as_mut_ptr().cast(), iov_len: payload.len() };
        }
        let per_message = if self.by == SendBy::Segments { count.max(1) } else { 1 };
        let mut messages = [MaybeUninit::<libc::mmsghdr>::uninit(); MAX_BATCH];
        let mut message_count = 0;
        for (i, parts) in iovecs[..count].chunks_mut(per_message).enumerate() {
            let name = (self.by == SendBy::Destination).then_some(&mut self.destinations[i]);
            messages[i].write(message(name, parts, &mut []));
            message_count += 1;
        }
        let flags = 0;
        // SAFETY: the first `message_count` messages are written; they point to payloads, destinations and iovecs that
        // live and stay where they are until the call returns, with their true lengths.
        let sent =
            unsafe { libc::sendmmsg(socket.as_raw_fd(), messages.as_mut_ptr().cast(), message_count, flags) };
        let sent = usize::try_from(sent).map_err(|_| io::Error::last_os_error())?;
        Ok((sent * per_message).min(count))
    }
}

/// Datagrams that one call sends or receives at most.
pub const MAX_BATCH: usize = 64;

/// Space for one datagram: any, and a stride that spreads the buffers over the cache's sets.
const RECEIVE_STRIDE: usize = 65_536 + 1_600;

/// Space for the control messages asked for in [`receiver`]: a timestamp, a TTL and a TOS, each with its header.
const CONTROL_WORDS: usize = 16;

/// Buffers for received datagrams.
pub struct ReceiveBatch {
    payloads: Vec<u8>,
    controls: Vec<[u64; CONTROL_WORDS]>,
    sources: Vec<libc::sockaddr_in>,
    iovecs: Vec<libc::iovec>,
    messages: Vec<libc::mmsghdr>,
}

impl Default for ReceiveBatch {
    fn default() -> Self {
        let nobody = sockaddr(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0));
        Self {
            payloads: vec![0; MAX_BATCH * RECEIVE_STRIDE],
            controls: vec![[0; CONTROL_WORDS]; MAX_BATCH],
            sources: vec![nobody; MAX_BATCH],
            iovecs: Vec::with_capacity(MAX_BATCH),
            messages: Vec::with_capacity(MAX_BATCH),
        }
    }
}

impl ReceiveBatch {
    /// Receives what is there and calls `each` for every datagram; returns how many there were, 0 if none was.
    pub fn receive(&mut self, socket: &Socket, mut each: impl FnMut(&Datagram)) -> io::Result<usize> {
        // The pointers are made anew for each call: nothing keeps one that could outlive a move of this struct.
        self.iovecs.clear();
        self.messages.clear();
        for payload in self.payloads.chunks_exact_mut(RECEIVE_STRIDE) {
            self.iovecs
                .push(libc::iovec { iov_base: payload.as_mut_ptr().cast(), iov_len: probe::MAX_BYTES });
        }
        for ((iovec, source), control) in
            self.iovecs.iter_mut().zip(&mut self.sources).zip(&mut self.controls)
        {
            self.messages.push(message(Some(source), slice::from_mut(iovec), control));
        }
        let (messages, count) = (self.messages.as_mut_ptr(), self.messages.len() as libc::c_uint);
        // SAFETY: `count` messages are written; they point to payloads, sources, iovecs and controls of this struct, with
        // their true lengths, which are neither moved nor looked at until the call returns.
        let received = unsafe { libc::recvmmsg(socket.as_raw_fd(), messages, count, 0, ptr::null_mut()) };
        let Ok(received) = usize::try_from(received) else {
            return match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
                error if error.kind() == io::ErrorKind::Interrupted => Ok(0),
                error => Err(error),
            };
        };
        let now_ns = super::clock::realtime_ns();
        for (i, message) in self.messages.iter().take(received).enumerate() {
            let begin = i * RECEIVE_STRIDE;
            let length = (message.msg_len as usize).min(probe::MAX_BYTES);
            let mut datagram = Datagram {
                payload: &self.payloads[begin..begin + length],
                source: address(&self.sources[i]),
                ttl: None,
                tos: None,
                received_ns: now_ns,
            };
            read_control(&message.msg_hdr, &mut datagram);
            each(&datagram);
        }
        Ok(received)
    }
}

/// Takes timestamp, TTL and TOS over into the datagram.
fn read_control(header: &libc::msghdr, datagram: &mut Datagram) {
    // SAFETY: the kernel has set msg_controllen to what it wrote into msg_control, which is aligned as cmsghdr is.
    let mut control = unsafe { libc::CMSG_FIRSTHDR(header) };
    while !control.is_null() {
        // SAFETY: not null, so CMSG_FIRSTHDR or CMSG_NXTHDR found a whole header within the control buffer.
        let cmsg = unsafe { &*control };
        // SAFETY: as above; the data begin right behind the header.
        let data = unsafe { libc::CMSG_DATA(control) };
        match (cmsg.cmsg_level, cmsg.cmsg_type) {
            (libc::SOL_SOCKET, libc::SCM_TIMESTAMPNS) => {
                // SAFETY: the data of this message are a timespec; they may be unaligned.
                let time = unsafe { data.cast::<libc::timespec>().read_unaligned() };
                datagram.received_ns =
                    time.tv_sec.cast_unsigned() * 1_000_000_000 + time.tv_nsec.cast_unsigned();
            }
            (libc::IPPROTO_IP, libc::IP_TTL) => {
                // SAFETY: the data of this message are an int.
                let ttl = unsafe { data.cast::<libc::c_int>().read_unaligned() };
                datagram.ttl = u8::try_from(ttl).ok();
            }
            (libc::IPPROTO_IP, libc::IP_TOS) => {
                // SAFETY: the data of this message are one byte.
                datagram.tos = Some(unsafe { data.read() });
            }
            _ => {}
        }
        // SAFETY: `control` is a header within the control buffer that `header` describes.
        control = unsafe { libc::CMSG_NXTHDR(header, control) };
    }
}

/// A message of these parts. `control` may be empty.
fn message(
    name: Option<&mut libc::sockaddr_in>,
    parts: &mut [libc::iovec],
    control: &mut [u64],
) -> libc::mmsghdr {
    // SAFETY: mmsghdr is integers and pointers, for which zero bytes are a value.
    let mut message: libc::mmsghdr = unsafe { mem::zeroed() };
    if let Some(name) = name {
        message.msg_hdr.msg_name = ptr::from_mut(name).cast();
        message.msg_hdr.msg_namelen = size_of::<libc::sockaddr_in>() as libc::socklen_t;
    }
    message.msg_hdr.msg_iov = parts.as_mut_ptr();
    message.msg_hdr.msg_iovlen = parts.len() as _;
    if !control.is_empty() {
        message.msg_hdr.msg_control = control.as_mut_ptr().cast();
        message.msg_hdr.msg_controllen = size_of_val(control) as _;
    }
    message
}

fn sockaddr(address: SocketAddrV4) -> libc::sockaddr_in {
    libc::sockaddr_in {
        sin_family: libc::AF_INET as libc::sa_family_t,
        sin_port: address.port().to_be(),
        sin_addr: libc::in_addr { s_addr: address.ip().to_bits().to_be() },
        sin_zero: [0; 8],
    }
}

fn address(name: &libc::sockaddr_in) -> SocketAddrV4 {
    SocketAddrV4::new(Ipv4Addr::from_bits(u32::from_be(name.sin_addr.s_addr)), u16::from_be(name.sin_port))
}

/// Waits until the socket takes more, at most `milliseconds`.
pub fn wait_writable(socket: &Socket, milliseconds: u8) {
    use nix::poll::{PollFd, PollFlags, poll};
    // An error or a signal ends the wait early, and the send that follows tells more.
    let _ = poll(&mut [PollFd::new(socket.as_fd(), PollFlags::POLLOUT)], milliseconds);
}
