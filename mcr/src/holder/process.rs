//! The holder's own life.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
};

use anyhow::{Context, bail};
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{SockFlag, accept4, getsockopt, setsockopt, sockopt},
    sys::time::{TimeVal, TimeValLike},
    unistd::{Uid, geteuid, setsid},
};

use super::{Answer, Ask, MAX_PACKET_BYTES, MEMBERSHIPS_AT_ONCE, Noted};
use crate::{
    sys::{channel, inherited, privileges, seccomp},
    worker::ignore_signals,
};

/// How long it waits for the daemon that started it.
const LONELY_MS: u16 = 10_000;

/// How long a daemon may leave unread what it asked for, in seconds.
const PATIENCE_S: i64 = 2;

#[derive(Default)]
struct Holder {
    sockets: BTreeMap<u32, OwnedFd>,
    memberships: BTreeSet<Noted>,
}

/// Holds what it is given until it is told to end, or holds nothing and no daemon is there. Its standard input is a
/// listening socket.
///
/// # Errors
///
/// What kept it from starting. Nothing a daemon says ends it but the word to.
pub fn run() -> anyhow::Result<()> {
    let _ = nix::sys::prctl::set_name(c"mcr-hold");
    inherited::close().context("the holder cannot close what it inherited")?;
    setsid().context("the holder cannot have a session of its own")?;
    ignore_signals()?;
    let owner = geteuid();
    if let Err(error) = privileges::drop_all() {
        bail!("the holder cannot give up its capabilities: {error}");
    }
    seccomp::confine(seccomp::HOLDER).context("the holder cannot confine itself (seccomp)")?;
    let listener = io::stdin();
    let mut holder = Holder::default();
    let mut buffer = vec![0; MAX_PACKET_BYTES];
    let mut daemon: Option<OwnedFd> = None;
    loop {
        let mut fds = vec![PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
        fds.extend(daemon.as_ref().map(|daemon| PollFd::new(daemon.as_fd(), PollFlags::POLLIN)));
        let lonely = daemon.is_none() && holder.sockets.is_empty();
        let timeout = if lonely { PollTimeout::from(LONELY_MS) } else { PollTimeout::NONE };
        match poll(&mut fds, timeout) {
            Ok(0) => return Ok(()),
            Err(Errno::EINTR) => continue,
            result => drop(result?),
        }
        let calls = fds[0].any().unwrap_or_default();
        let speaks = fds.get(1).is_some_and(|fd| fd.any().unwrap_or_default());
        if let Some(socket) = daemon.take_if(|_| speaks) {
            // All that a daemon has said counts, also when it is dead and the next one calls.
            match holder.serve(&socket, &mut buffer) {
                Ok(Next::Stay) => daemon = Some(socket),
                Ok(Next::Leave) if holder.sockets.is_empty() => return Ok(()),
                Ok(Next::End) => return Ok(()),
                // Gone, or not to be understood. What it held stays.
                Ok(Next::Leave) | Err(_) => {}
            }
        }
        if calls
            && !speaks
            && let Some(caller) = accept(listener.as_fd().as_raw_fd(), owner)
        {
            // There is one daemon: who called before is dead.
            daemon = Some(caller);
        }
    }
}

/// Takes a call, of the holder's own user or root.
fn accept(listener: i32, owner: Uid) -> Option<OwnedFd> {
    let fd = accept4(listener, SockFlag::SOCK_CLOEXEC).ok()?;
    // SAFETY: the kernel has just made this descriptor for this process; nothing else has it.
    let caller = unsafe { OwnedFd::from_raw_fd(fd) };
    let uid = Uid::from_raw(getsockopt(&caller, sockopt::PeerCredentials).ok()?.uid());
    setsockopt(&caller, sockopt::SendTimeout, &TimeVal::seconds(PATIENCE_S)).ok()?;
    (uid.is_root() || uid == owner).then_some(caller)
}

enum Next {
    Stay,
    Leave,
    End,
}

impl Holder {
    /// Does what the daemon says next.
    fn serve(&mut self, daemon: &OwnedFd, buffer: &mut [u8]) -> io::Result<Next> {
        let (len, fds) = channel::receive(daemon, buffer)?;
        if len == 0 {
            return Ok(Next::Leave);
        }
        match serde_json::from_slice(&buffer[..len])? {
            Ask::Open { socket } => self.sockets.extend(fds.into_iter().next().map(|fd| (socket, fd))),
            Ask::Close { socket } => drop(self.sockets.remove(&socket)),
            Ask::Add { memberships } => self.memberships.extend(memberships),
            Ask::Remove { membership } => drop(self.memberships.remove(&membership)),
            Ask::Give => self.give(daemon)?,
            Ask::End => return Ok(Next::End),
        }
        Ok(Next::Stay)
    }

    fn give(&self, daemon: &OwnedFd) -> io::Result<()> {
        let answer =
            |answer: &Answer, fds: &[&OwnedFd]| channel::send(daemon, &serde_json::to_vec(answer)?, fds);
        for (&socket, fd) in &self.sockets {
            answer(&Answer::Socket { socket }, &[fd])?;
        }
        let memberships: Vec<_> = self.memberships.iter().copied().collect();
        for some in memberships.chunks(MEMBERSHIPS_AT_ONCE) {
            answer(&Answer::Memberships { memberships: some.to_vec() }, &[])?;
        }
        answer(&Answer::All, &[])
    }
}
