//! Group memberships, held by pooled sockets that receive nothing.
//!
//! A socket takes 20 memberships by default (`net.ipv4.igmp_max_memberships`), so that every socket of a
//! pool is used until the kernel says that it is full. Memberships of any source and of one source are
//! in separate pools: on one socket they would narrow or refuse one another.

use std::{collections::BTreeMap, io, net::Ipv4Addr};

use socket2::{Domain, Protocol, Socket, Type};

use crate::{rule::IfIndex, sys::multicast};

/// What is joined on an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Membership {
    pub interface: IfIndex,
    pub group: Ipv4Addr,
    /// The one source of an (S,G) membership.
    pub source: Option<Ipv4Addr>,
}

#[derive(Debug)]
struct Member {
    socket: Socket,
    held: usize,
}

/// Sockets by number. One that holds nothing any more is closed.
type Pool = BTreeMap<usize, Member>;

/// The pooled sockets and what each holds.
#[derive(Debug, Default)]
pub struct Memberships {
    any_source: Pool,
    one_source: Pool,
    /// Number of the socket in its pool.
    held: BTreeMap<Membership, usize>,
}

impl Memberships {
    /// Joins, unless it is joined.
    pub fn join(&mut self, membership: Membership) -> io::Result<()> {
        if self.held.contains_key(&membership) {
            return Ok(());
        }
        let pool = self.pool(membership);
        for (&number, member) in pool.iter_mut() {
            match multicast::join(&member.socket, &membership) {
                Ok(()) => {
                    member.held += 1;
                    self.held.insert(membership, number);
                    return Ok(());
                }
                // Full; the next socket has room or is new.
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {}
                // This socket holds as many sources of the group as one may.
                Err(error) if error.raw_os_error() == Some(libc::EADDRINUSE) => {}
                Err(error) => return Err(error),
            }
        }
        let socket = silent_socket()?;
        multicast::join(&socket, &membership)?;
        let number = pool.last_key_value().map_or(0, |(last, _)| last + 1);
        pool.insert(number, Member { socket, held: 1 });
        self.held.insert(membership, number);
        Ok(())
    }

    /// Leaves, if it is joined. A membership of an interface that is gone is dropped all the same.
    pub fn leave(&mut self, membership: Membership) -> io::Result<()> {
        let Some(number) = self.held.remove(&membership) else { return Ok(()) };
        let pool = self.pool(membership);
        let Some(member) = pool.get_mut(&number) else { return Ok(()) };
        let mut left = multicast::leave(&member.socket, &membership);
        if membership.source.is_some() && left.as_ref().is_err_and(is_gone) {
            // Of a device that is gone the kernel lets go of whole groups only.
            left = multicast::leave(&member.socket, &Membership { source: None, ..membership });
        }
        member.held -= 1;
        if member.held == 0 {
            pool.remove(&number);
        }
        left.or_else(|error| if is_gone(&error) { Ok(()) } else { Err(error) })
    }

    fn pool(&mut self, membership: Membership) -> &mut Pool {
        match membership.source {
            None => &mut self.any_source,
            Some(_) => &mut self.one_source,
        }
    }
}

/// Whether an error says that there is no such interface, or no such membership any more.
fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENODEV | libc::EADDRNOTAVAIL))
}

/// A UDP socket that is bound to nothing and takes no group's datagrams.
fn silent_socket() -> io::Result<Socket> {
    let socket = Socket::new(Domain::IPV4, Type::DGRAM.cloexec(), Some(Protocol::UDP))?;
    socket.set_multicast_all_v4(false)?;
    Ok(socket)
}
