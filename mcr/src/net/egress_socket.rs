//! The sockets that workers send through: made here, because making them takes privileges that a worker
//! has given up, and all from one uid, which sharing a port needs.

use std::{
    io,
    net::{Ipv4Addr, SocketAddrV4},
    os::fd::OwnedFd,
};

use socket2::{Domain, Protocol, Socket, Type};

use crate::{
    rule::{IfIndex, InterfaceName},
    sys::{multicast, socket_option},
};

/// Room for what a slow device has not taken yet, per socket.
const SEND_BUFFER_BYTES: i32 = 4 * 1024 * 1024;

/// What tells egress sockets apart.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct EgressKey {
    pub interface: InterfaceName,
    /// A socket stays bound to the interface that it was made for.
    pub index: IfIndex,
    pub source_port: u16,
    /// Whether this host's own listeners receive what is sent.
    pub loop_back: bool,
    /// Whether hosts are sent to, and not groups: their ICMP errors would be told to the groups' sends.
    pub unicast: bool,
}

/// Makes the socket of a worker. TTL, TOS, source address and segment size come with every message.
pub fn open(key: &EgressKey) -> io::Result<OwnedFd> {
    let socket = Socket::new(Domain::IPV4, Type::DGRAM.cloexec().nonblocking(), Some(Protocol::UDP))?;
    multicast::receive_nothing(&socket)?;
    socket.set_reuse_port(true)?;
    socket.set_multicast_all_v4(false)?;
    socket.set_multicast_loop_v4(key.loop_back)?;
    socket.bind_device(Some(key.interface.as_str().as_bytes()))?;
    socket.bind(&SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, key.source_port).into())?;
    // Errors of the queueing discipline are told only to a socket that asks for them.
    socket_option::set(&socket, libc::IPPROTO_IP, libc::IP_RECVERR, &1)?;
    socket_option::set(&socket, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, &libc::IP_PMTUDISC_PROBE)?;
    socket_option::set_buffer(&socket, libc::SO_SNDBUFFORCE, libc::SO_SNDBUF, SEND_BUFFER_BYTES)?;
    Ok(socket.into())
}

/// Chooses the daemon's source port, or takes the one asked for, and holds it as long as it lives.
#[derive(Debug)]
pub struct SourcePort {
    port: u16,
    _held: Socket,
}

impl SourcePort {
    /// # Errors
    ///
    /// `AddrInUse` if another program has the port.
    pub fn hold(asked: Option<u16>) -> io::Result<Self> {
        let socket = Socket::new(Domain::IPV4, Type::DGRAM.cloexec(), Some(Protocol::UDP))?;
        multicast::receive_nothing(&socket)?;
        if asked.is_some() {
            // Before it can be shared it must be free of programs that would share it with us.
            let probe = Socket::new(Domain::IPV4, Type::DGRAM.cloexec(), Some(Protocol::UDP))?;
            probe.bind(&SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, asked.unwrap_or(0)).into())?;
        }
        socket.set_reuse_port(true)?;
        socket.set_multicast_all_v4(false)?;
        socket.bind(&SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, asked.unwrap_or(0)).into())?;
        let bound =
            socket.local_addr()?.as_socket_ipv4().ok_or_else(|| io::Error::other("not an IPv4 socket"))?;
        Ok(Self { port: bound.port(), _held: socket })
    }

    pub fn get(&self) -> u16 {
        self.port
    }
}
