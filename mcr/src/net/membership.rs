//! Group memberships, held by pooled sockets that receive nothing.
//!
//! A socket takes 20 memberships by default (`net.ipv4.igmp_max_memberships`), so that every socket of a
//! pool is used until the kernel says that it is full. Memberships of any source and of one source are
//! in separate pools: on one socket they would narrow or refuse one another.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::Ipv4Addr,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use socket2::{Domain, Protocol, Socket, Type};
use tracing::warn;

use super::joined;
use crate::{
    holder::{
        client::{Held, Holder},
        store::{self, Store},
    },
    rule::IfIndex,
    sys::{multicast, service_manager::ServiceManager},
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
    /// How these memberships are to outlive the daemon, if they are.
    keeping: Option<Keeping>,
}

#[derive(Debug)]
struct Keeping {
    pin_root: PathBuf,
    /// mcr.
    program: PathBuf,
    /// A store that is of use, or a holder once there are any memberships.
    keeper: Option<Keeper>,
}

/// Who has the sockets beside the daemon.
#[derive(Debug)]
enum Keeper {
    Holder(Holder),
    Store(Store),
}

/// The service manager's descriptor store.
#[derive(Debug, Default)]
pub struct Stored {
    /// Where descriptors may be stored: with whom, and how many.
    pub store: Option<(ServiceManager, usize)>,
    /// What the service manager has passed, by name.
    pub passed: Vec<(String, OwnedFd)>,
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

impl Keeper {
    fn open(&mut self, socket: u32, fd: BorrowedFd<'_>) -> io::Result<()> {
        match self {
            Self::Holder(holder) => holder.open(socket, fd),
            Self::Store(store) => store.open(socket, fd),
        }
    }

    fn close(&mut self, socket: u32) -> io::Result<()> {
        match self {
            Self::Holder(holder) => holder.close(socket),
            Self::Store(store) => store.close(socket),
        }
    }

    /// Before they are joined, so that none is ever unknown. Those of stored sockets the kernel knows.
    fn add(&self, memberships: &[Membership]) -> io::Result<()> {
        match self {
            Self::Holder(holder) => holder.add(memberships),
            Self::Store(_) => Ok(()),
        }
    }

    /// After it was left.
    fn remove(&self, membership: Membership) -> io::Result<()> {
        match self {
            Self::Holder(holder) => holder.remove(membership),
            Self::Store(_) => Ok(()),
        }
    }

    /// One that is of no use takes nothing with it.
    fn give_up(self, error: &io::Error) {
        match self {
            Self::Holder(mut deaf) => drop(deaf.bury()),
            Self::Store(_) => warn!(
                "the service manager's descriptor store is of no use, a process keeps memberships instead: {error}"
            ),
        }
    }
}

impl Memberships {
    /// Memberships that outlive the daemon, and those that the daemon before had: of these nothing was left in between, and
    /// they stay until they are left. To be called in the network namespace; `program` is mcr.
    ///
    /// # Errors
    ///
    /// Where there is a holder that cannot be taken over.
    pub fn kept(pin_root: &Path, program: &Path, Stored { store, passed }: Stored) -> io::Result<Self> {
        let keeping = Keeping { pin_root: pin_root.to_owned(), program: program.to_owned(), keeper: None };
        let mut memberships = Self { keeping: Some(keeping), ..Self::default() };
        let sockets = store::sockets(passed);
        let stored: Vec<_> = sockets.iter().map(|(number, _)| *number).collect();
        if !sockets.is_empty() {
            memberships.adopt_stored(sockets)?;
        }
        let found = Holder::find(pin_root)?;
        let before = found.as_ref().map(|(_, held)| Before::from(held)).unwrap_or_default();
        let holder = match found {
            Some((holder, held)) => {
                memberships.adopt(held)?;
                Some(holder)
            }
            None => None,
        };
        if let Some((manager, size)) = store {
            let store = Keeper::Store(Store::new(manager, size, stored.iter().copied()));
            let of_store = Before { sockets: stored.into_iter().collect(), memberships: Vec::new() };
            if memberships.hand_over(store, of_store).is_ok() {
                holder.map_or(Ok(()), Holder::end)?;
                return Ok(memberships);
            }
        }
        match holder {
            Some(holder) if holder.is_trusted() => memberships.hand_over(Keeper::Holder(holder), before)?,
            // The next one is this user's.
            Some(holder) => holder.end()?,
            None => {}
        }
        Ok(memberships)
    }

    /// Everything that is joined, in order.
    pub fn held(&self) -> impl Iterator<Item = Membership> {
        self.held.keys().copied()
    }

    /// Has a holder if and only if there is anything to hold and no store that does: starts one where there is none any more,
    /// and ends one that is needed no more. To be called after changes, and now and then.
    ///
    /// # Errors
    ///
    /// Where the memberships would end with the daemon. They hold as long as it lives.
    pub fn tend(&mut self) -> io::Result<()> {
        let Some(keeping) = &mut self.keeping else { return Ok(()) };
        match keeping.keeper.take() {
            Some(Keeper::Holder(mut dead)) if !dead.lives() => drop(dead.bury()),
            Some(Keeper::Holder(holder)) if self.held.is_empty() => return holder.end(),
            Some(keeper) => {
                keeping.keeper = Some(keeper);
                return Ok(());
            }
            None => {}
        }
        if self.held.is_empty() {
            return Ok(());
        }
        let (holder, before) = match Holder::find(&keeping.pin_root)? {
            // It was slow to listen.
            Some((holder, held)) => (holder, Before::from(&held)),
            None => (Holder::start(&keeping.pin_root, &keeping.program)?, Before::default()),
        };
        self.hand_over(Keeper::Holder(holder), before)
    }

    /// Leaves everything, and ends the holder. Without it, what is kept stays joined.
    pub fn release(self) -> io::Result<()> {
        match self.keeping.and_then(|keeping| keeping.keeper) {
            Some(Keeper::Holder(holder)) => holder.end(),
            Some(Keeper::Store(mut store)) => store.end(),
            None => Ok(()),
        }
    }

    /// Takes sockets of which only the kernel knows what they have joined.
    fn adopt_stored(&mut self, mut sockets: Vec<(u32, OwnedFd)>) -> io::Result<()> {
        let here = multicast::netns_cookie(&silent_socket()?)?;
        // One of another namespace has joined nothing in this one.
        sockets.retain(|(_, socket)| multicast::netns_cookie(socket).is_ok_and(|cookie| cookie == here));
        let groups = joined::groups()?;
        let mut memberships = Vec::new();
        for (_, socket) in &sockets {
            for (interface, group) in &groups {
                memberships.extend(multicast::held(socket, *interface, *group)?);
            }
        }
        self.adopt(Held { sockets, memberships })
    }

    /// Takes sockets with what they have joined, of which the kernel has the last word.
    fn adopt(&mut self, Held { sockets, memberships }: Held) -> io::Result<()> {
        let known = |membership: &Membership| self.held.contains_key(membership);
        let mut open: BTreeSet<_> = memberships.into_iter().filter(|new| !known(new)).collect();
        for (number, socket) in sockets {
            // A holder and a store may have given different sockets the same number.
            let taken = self.any_source.contains_key(&number) || self.one_source.contains_key(&number);
            let number = if taken { self.next } else { number };
            self.next = self.next.max(number.saturating_add(1));
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

    /// Gives a keeper all there is, and takes what it had before and is no more. One that fails is given up.
    fn hand_over(&mut self, mut keeper: Keeper, before: Before) -> io::Result<()> {
        match (self.hand_over_to(&mut keeper, before), &mut self.keeping) {
            (Ok(()), Some(keeping)) => keeping.keeper = Some(keeper),
            (Ok(()), None) => {}
            (Err(error), _) => {
                keeper.give_up(&error);
                return Err(error);
            }
        }
        Ok(())
    }

    fn hand_over_to(&self, keeper: &mut Keeper, before: Before) -> io::Result<()> {
        let held: Vec<_> = self.held().collect();
        keeper.add(&held)?;
        let mut gone = before.sockets;
        for (number, member) in self.any_source.iter().chain(&self.one_source) {
            keeper.open(*number, member.socket.as_fd())?;
            gone.remove(number);
        }
        gone.into_iter().try_for_each(|number| keeper.close(number))?;
        let left = before.memberships.into_iter().filter(|membership| !self.held.contains_key(membership));
        left.into_iter().try_for_each(|membership| keeper.remove(membership))
    }

    /// Tells the keeper, if there is one. One that does not listen is given up, and [`tend`](Self::tend) finds another.
    fn tell(&mut self, word: impl FnOnce(&mut Keeper) -> io::Result<()>) {
        let Some(keeping) = &mut self.keeping else { return };
        let Some(mut keeper) = keeping.keeper.take() else { return };
        match word(&mut keeper) {
            Ok(()) => keeping.keeper = Some(keeper),
            Err(error) => keeper.give_up(&error),
        }
    }

    /// Joins, unless it is joined.
    pub fn join(&mut self, membership: Membership) -> io::Result<()> {
        if self.held.contains_key(&membership) {
            return Ok(());
        }
        self.tell(|keeper| keeper.add(&[membership]));
        let joined = self.join_by_any(membership);
        match joined {
            Ok(number) => drop(self.held.insert(membership, number)),
            Err(_) => self.tell(|keeper| keeper.remove(membership)),
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
        self.tell(|keeper| keeper.open(number, socket.as_fd()));
        if let Err(error) = multicast::join(&socket, &membership) {
            self.tell(|keeper| keeper.close(number));
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
        self.tell(|keeper| {
            keeper.remove(membership)?;
            if closed { keeper.close(number) } else { Ok(()) }
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
