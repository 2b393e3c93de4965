//! Group memberships, held by pooled sockets that receive nothing.
//!
//! A socket takes 20 memberships by default (`net.ipv4.igmp_max_memberships`), so that every socket of a
//! pool is used until the kernel says that it is full. Memberships of any source and of one source are
//! in separate pools: on one socket they would narrow or refuse one another.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::Ipv4Addr,
    os::fd::AsFd,
    path::{Path, PathBuf},
};

use socket2::{Domain, Protocol, Socket, Type};

use crate::{
    holder::client::{Held, Holder},
    rule::IfIndex,
    sys::multicast,
};

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
type Pool = BTreeMap<u32, Member>;

/// The pooled sockets and what each holds.
#[derive(Debug, Default)]
pub struct Memberships {
    any_source: Pool,
    one_source: Pool,
    /// Number of the socket.
    held: BTreeMap<Membership, u32>,
    /// The number of the next socket.
    next: u32,
    /// Where these memberships are to outlive the daemon, and the process that sees to it, once there are any.
    keeping: Option<Keeping>,
}

#[derive(Debug)]
struct Keeping {
    pin_root: PathBuf,
    /// mcr.
    program: PathBuf,
    holder: Option<Holder>,
}

/// What a holder had when it was found.
#[derive(Default)]
struct Before {
    sockets: BTreeSet<u32>,
    memberships: Vec<Membership>,
}

impl From<&Held> for Before {
    fn from(held: &Held) -> Self {
        let sockets = held.sockets.iter().map(|(number, _)| *number).collect();
        Self { sockets, memberships: held.memberships.clone() }
    }
}

impl Memberships {
    /// Memberships that outlive the daemon, and those that the daemon before had: of these nothing was left in between, and
    /// they stay until they are left. To be called in the network namespace; `program` is mcr.
    ///
    /// # Errors
    ///
    /// Where there is a holder that cannot be taken over.
    pub fn kept(pin_root: &Path, program: &Path) -> io::Result<Self> {
        let keeping = Keeping { pin_root: pin_root.to_owned(), program: program.to_owned(), holder: None };
        let mut memberships = Self { keeping: Some(keeping), ..Self::default() };
        if let Some((holder, held)) = Holder::find(pin_root)? {
            let before = Before::from(&held);
            memberships.adopt(held)?;
            if holder.is_trusted() {
                memberships.hand_over(holder, before)?;
            } else {
                // The next one is this user's.
                holder.end()?;
            }
        }
        Ok(memberships)
    }

    /// Everything that is joined, in order.
    pub fn held(&self) -> impl Iterator<Item = Membership> {
        self.held.keys().copied()
    }

    /// Has a holder if and only if there is anything to hold: starts one where there is none any more, and ends one that is
    /// needed no more. To be called after changes, and now and then.
    ///
    /// # Errors
    ///
    /// Where the memberships would end with the daemon. They hold as long as it lives.
    pub fn tend(&mut self) -> io::Result<()> {
        let Some(keeping) = &mut self.keeping else { return Ok(()) };
        if let Some(mut dead) = keeping.holder.take_if(|holder| !holder.lives()) {
            let _ = dead.bury();
        }
        match keeping.holder.take() {
            Some(holder) if self.held.is_empty() => holder.end(),
            None if !self.held.is_empty() => {
                let found = Holder::find(&keeping.pin_root)?;
                let (holder, before) = match found {
                    // It was slow to listen.
                    Some((holder, held)) => (holder, Before::from(&held)),
                    None => (Holder::start(&keeping.pin_root, &keeping.program)?, Before::default()),
                };
                self.hand_over(holder, before)
            }
            holder => {
                keeping.holder = holder;
                Ok(())
            }
        }
    }

    /// Leaves everything, and ends the holder. Without it, what is kept stays joined.
    pub fn release(self) -> io::Result<()> {
        let holder = self.keeping.and_then(|keeping| keeping.holder);
        holder.map_or(Ok(()), Holder::end)
    }

    /// Takes sockets with what they have joined, of which the kernel has the last word.
    fn adopt(&mut self, Held { sockets, memberships }: Held) -> io::Result<()> {
        let mut open: BTreeSet<_> = memberships.into_iter().collect();
        for (number, socket) in sockets {
            self.next = self.next.max(number + 1);
            let socket = Socket::from(socket);
            let mut has = Vec::new();
            for membership in &open {
                if multicast::holds(&socket, membership)? {
                    has.push(*membership);
                }
            }
            let Some(first) = has.first() else { continue };
            self.pool(*first).insert(number, Member { socket, held: has.len() });
            for membership in has {
                open.remove(&membership);
                self.held.insert(membership, number);
            }
        }
        Ok(())
    }

    /// Gives a holder all there is, and takes what it had before and is no more.
    fn hand_over(&mut self, holder: Holder, before: Before) -> io::Result<()> {
        let held: Vec<_> = self.held().collect();
        holder.add(&held)?;
        let mut gone = before.sockets;
        for (number, member) in self.any_source.iter().chain(&self.one_source) {
            holder.open(*number, member.socket.as_fd())?;
            gone.remove(number);
        }
        gone.into_iter().try_for_each(|number| holder.close(number))?;
        let left = before.memberships.into_iter().filter(|membership| !self.held.contains_key(membership));
        left.into_iter().try_for_each(|membership| holder.remove(membership))?;
        if let Some(keeping) = &mut self.keeping {
            keeping.holder = Some(holder);
        }
        Ok(())
    }

    /// Tells the holder, if there is one. One that does not listen is given up, and [`tend`](Self::tend) says so.
    fn tell(&mut self, word: impl FnOnce(&Holder) -> io::Result<()>) {
        let Some(keeping) = &mut self.keeping else { return };
        if let Some(mut deaf) = keeping.holder.take_if(|holder| word(holder).is_err()) {
            let _ = deaf.bury();
        }
    }

    /// Joins, unless it is joined.
    pub fn join(&mut self, membership: Membership) -> io::Result<()> {
        if self.held.contains_key(&membership) {
            return Ok(());
        }
        // Before it is joined, so that none is ever unknown.
        self.tell(|holder| holder.add(&[membership]));
        let joined = self.join_by_any(membership);
        match joined {
            Ok(number) => drop(self.held.insert(membership, number)),
            Err(_) => self.tell(|holder| holder.remove(membership)),
        }
        joined.map(|_| ())
    }

    /// Joins by a socket that has room, or a new one; its number.
    fn join_by_any(&mut self, membership: Membership) -> io::Result<u32> {
        for (&number, member) in self.pool(membership).iter_mut() {
            match multicast::join(&member.socket, &membership) {
                Ok(()) => {
                    member.held += 1;
                    return Ok(number);
                }
                // Full; the next socket has room or is new.
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {}
                // This socket holds as many sources of the group as one may.
                Err(error) if error.raw_os_error() == Some(libc::EADDRINUSE) => {}
                Err(error) => return Err(error),
            }
        }
        let socket = silent_socket()?;
        let number = self.next;
        self.tell(|holder| holder.open(number, socket.as_fd()));
        if let Err(error) = multicast::join(&socket, &membership) {
            self.tell(|holder| holder.close(number));
            return Err(error);
        }
        self.next += 1;
        self.pool(membership).insert(number, Member { socket, held: 1 });
        Ok(number)
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
        let closed = member.held == 0;
        if closed {
            pool.remove(&number);
        }
        self.tell(|holder| {
            holder.remove(membership)?;
            if closed { holder.close(number) } else { Ok(()) }
        });
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
