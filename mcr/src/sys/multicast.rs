//! Joining and leaving by interface index (RFC 3678), and filters on sockets that only send.

use std::{io, mem::zeroed, net::Ipv4Addr, os::fd::AsRawFd};

use crate::{net::membership::Membership, rule::IfIndex, sys::socket_option};

pub fn join(socket: &impl AsRawFd, membership: &Membership) -> io::Result<()> {
    change(socket, membership, libc::MCAST_JOIN_GROUP, libc::MCAST_JOIN_SOURCE_GROUP)
}

/// RFC 1112, section 6.4: the low 23 bits of the group behind 01:00:5e.
pub fn multicast_mac(group: Ipv4Addr) -> [u8; 6] {
    let [_, b, c, d] = group.octets();
    [1, 0, 0x5e, b & 0x7f, c, d]
}

pub fn leave(socket: &impl AsRawFd, membership: &Membership) -> io::Result<()> {
    change(socket, membership, libc::MCAST_LEAVE_GROUP, libc::MCAST_LEAVE_SOURCE_GROUP)
}

/// What a socket has joined of a group on an interface.
pub fn held(socket: &impl AsRawFd, interface: IfIndex, group: Ipv4Addr) -> io::Result<Vec<Membership>> {
    const MCAST_MSFILTER: i32 = 48;
    let mut filter = GroupFilter {
        interface: interface.0,
        group: storage(group),
        mode: 0,
        count: MOST_SOURCES as u32,
        sources: [storage(Ipv4Addr::UNSPECIFIED); MOST_SOURCES],
    };
    match socket_option::complete(socket, libc::IPPROTO_IP, MCAST_MSFILTER, &mut filter) {
        Ok(()) => {}
        Err(error) if error.raw_os_error() == Some(libc::EADDRNOTAVAIL) => return Ok(Vec::new()),
        Err(error) => return Err(error),
    }
    let of = |source| Membership { interface, group, source };
    if filter.mode == libc::MCAST_EXCLUDE as u32 {
        return Ok(vec![of(None)]);
    }
    let sources = filter.sources.iter().take(filter.count as usize);
    Ok(sources.map(|source| of(Some(address(source)))).collect())
}

/// Whether a socket has a membership.
pub fn holds(socket: &impl AsRawFd, membership: &Membership) -> io::Result<bool> {
    Ok(held(socket, membership.interface, membership.group)?.contains(membership))
}

/// Sources of one group that a socket is asked for; it may have 10 by default (`net.ipv4.igmp_max_msf`).
const MOST_SOURCES: usize = 64;

/// `struct group_filter`.
#[repr(C)]
#[derive(Clone, Copy)]
struct GroupFilter {
    interface: u32,
    group: libc::sockaddr_storage,
    mode: u32,
    count: u32,
    sources: [libc::sockaddr_storage; MOST_SOURCES],
}

fn change(
    socket: &impl AsRawFd,
    membership: &Membership,
    any_source: i32,
    one_source: i32,
) -> io::Result<()> {
    let interface = membership.interface.0;
    let group = storage(membership.group);
    match membership.source {
        None => {
            let request = libc::group_req { gr_interface: interface, gr_group: group };
            socket_option::set(socket, libc::IPPROTO_IP, any_source, &request)
        }
        Some(source) => {
            let request = libc::group_source_req {
                gsr_interface: interface,
                gsr_group: group,
                gsr_source: storage(source),
            };
            socket_option::set(socket, libc::IPPROTO_IP, one_source, &request)
        }
    }
}

/// Lets nothing be received: the socket's queue stays empty whatever is sent to its port.
pub fn receive_nothing(socket: &impl AsRawFd) -> io::Result<()> {
    // BPF_RET | BPF_K with 0 bytes to keep.
    socket_option::attach_filter(socket, &mut [libc::sock_filter { code: 0x06, jt: 0, jf: 0, k: 0 }])
}

/// The number of the socket's network namespace, never used again while the machine runs.
pub fn netns_cookie(socket: &impl AsRawFd) -> io::Result<u64> {
    const SO_NETNS_COOKIE: i32 = 71;
    Ok(u64::from_ne_bytes(socket_option::get(socket, libc::SOL_SOCKET, SO_NETNS_COOKIE)?))
}

fn address(storage: &libc::sockaddr_storage) -> Ipv4Addr {
    // SAFETY: a sockaddr_storage is larger than and aligned for a sockaddr_in, of which any bit pattern is a value.
    let address = unsafe { std::ptr::from_ref(storage).cast::<libc::sockaddr_in>().read() };
    Ipv4Addr::from_bits(u32::from_be(address.sin_addr.s_addr))
}

fn storage(address: Ipv4Addr) -> libc::sockaddr_storage {
    let address = libc::sockaddr_in {
        sin_family: libc::AF_INET as libc::sa_family_t,
        sin_port: 0,
        sin_addr: libc::in_addr { s_addr: u32::from(address).to_be() },
        sin_zero: [0; 8],
    };
    // SAFETY: all zeroes is a sockaddr_storage, and it is larger than and aligned for a sockaddr_in.
    unsafe {
        let mut storage = zeroed::<libc::sockaddr_storage>();
        (&raw mut storage).cast::<libc::sockaddr_in>().write(address);
        storage
    }
}
