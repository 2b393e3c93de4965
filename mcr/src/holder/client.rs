//! The daemon's end of the holder.

use std::{
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::process::CommandExt,
    },
    path::Path,
    process::{Child, Command, Stdio},
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        socket::{
            AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, getsockopt, listen,
            setsockopt, socket, sockopt,
        },
        time::{TimeVal, TimeValLike},
    },
    unistd::{Uid, geteuid},
};

use super::{Answer, Ask, MAX_PACKET_BYTES, MEMBERSHIPS_AT_ONCE};
use crate::{
    net::membership::Membership,
    sys::{channel, service_manager},
};

/// How long the holder may take to answer or to take what it is told, in seconds.
const PATIENCE_S: i64 = 2;

/// A holder that this daemon talks to. Dropping it leaves the holder with what it has.
#[derive(Debug)]
pub struct Holder {
    socket: OwnedFd,
    /// If this daemon started it.
    child: Option<Child>,
    /// It is this user's, or root's.
    trusted: bool,
}

/// What a holder had when a daemon came.
#[derive(Debug, Default)]
pub struct Held {
    /// By the numbers that the daemon before gave them.
    pub sockets: Vec<(u32, OwnedFd)>,
    /// What the sockets may have joined: all that they have, and no more than one that they do not have any more or not yet.
    pub memberships: Vec<Membership>,
}

impl Holder {
    /// The holder of this network namespace and pin root, if there is one, and all that it holds.
    ///
    /// # Errors
    ///
    /// `PermissionDenied` if the socket is another user's, `TimedOut` if the holder does not answer.
    pub fn find(pin_root: &Path) -> io::Result<Option<(Self, Held)>> {
        let socket = seqpacket()?;
        let address = address(pin_root)?;
        match channel::uninterrupted(|| connect(socket.as_raw_fd(), &address)) {
            Ok(()) => {}
            Err(Errno::ECONNREFUSED) => return Ok(None),
            Err(error) => return Err(error.into()),
        }
        let uid = Uid::from_raw(getsockopt(&socket, sockopt::PeerCredentials)?.uid());
        if !uid.is_root() && !geteuid().is_root() && uid != geteuid() {
            let why = format!("the holder's socket is user {uid}'s");
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, why));
        }
        let trusted = uid.is_root() || uid == geteuid();
        let holder = Self { socket, child: None, trusted };
        match holder.take() {
            Ok(held) => Ok(Some((holder, held))),
            // It held nothing any more, and has ended.
            Err(error) if is_end(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Starts a holder in this network namespace. `program` is mcr.
    ///
    /// # Errors
    ///
    /// `AddrInUse` if there is one.
    pub fn start(pin_root: &Path, program: &Path) -> io::Result<Self> {
        let listener = seqpacket()?;
        bind(listener.as_raw_fd(), &address(pin_root)?)?;
        listen(&listener, Backlog::new(1)?)?;
        let mut command = Command::new(program);
        service_manager::hide_from(&mut command);
        let child = command
            .arg0("mcr")
            .arg("hold")
            .arg(pin_root)
            .current_dir("/")
            .stdin(Stdio::from(listener))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        let mut holder = Self { socket: seqpacket()?, child: Some(child), trusted: true };
        let address = address(pin_root)?;
        let connected = channel::uninterrupted(|| connect(holder.socket.as_raw_fd(), &address));
        let connected = connected.map_err(io::Error::from);
        // It answers once it has confined itself.
        if let Err(error) = connected.and_then(|()| holder.take()) {
            let _ = holder.bury();
            return Err(error);
        }
        Ok(holder)
    }

    /// Whether it may be given anything: one of another user is good for what it gives.
    pub fn is_trusted(&self) -> bool {
        self.trusted
    }

    /// Hands a socket over.
    pub fn open(&self, socket: u32, fd: BorrowedFd<'_>) -> io::Result<()> {
        // A second descriptor, for as long as it takes to send it.
        self.ask(&Ask::Open { socket }, &[&fd.try_clone_to_owned()?])
    }

    pub fn close(&self, socket: u32) -> io::Result<()> {
        self.ask(&Ask::Close { socket }, &[])
    }

    /// Notes memberships; before they are joined, so that none is ever unknown.
    pub fn add(&self, memberships: &[Membership]) -> io::Result<()> {
        let mut some = memberships.chunks(MEMBERSHIPS_AT_ONCE);
        some.try_for_each(|some| {
            let memberships = some.iter().copied().map(Into::into).collect();
            self.ask(&Ask::Add { memberships }, &[])
        })
    }

    /// Forgets a membership, after it was left.
    pub fn remove(&self, membership: Membership) -> io::Result<()> {
        self.ask(&Ask::Remove { membership: membership.into() }, &[])
    }

    /// Whether it is still there: it says nothing unasked but that it is gone.
    pub fn lives(&self) -> bool {
        let mut fds = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
        matches!(channel::uninterrupted(|| poll(&mut fds, PollTimeout::ZERO)), Ok(0))
    }

    /// Has it drop everything and end, and waits until it has.
    pub fn end(mut self) -> io::Result<()> {
        self.ask(&Ask::End, &[])?;
        let mut buffer = [0; 1];
        let (_, _) = channel::receive(&self.socket, &mut buffer)?;
        self.bury()
    }

    /// Reaps one that is gone, if it was ours.
    pub fn bury(&mut self) -> io::Result<()> {
        let Some(mut child) = self.child.take() else { return Ok(()) };
        // One that lives and does not listen is of no use, and in the way of the next.
        child.kill()?;
        child.wait()?;
        Ok(())
    }

    fn take(&self) -> io::Result<Held> {
        self.ask(&Ask::Give, &[])?;
        let mut held = Held::default();
        let mut buffer = vec![0; MAX_PACKET_BYTES];
        loop {
            let (len, fds) = channel::receive(&self.socket, &mut buffer).map_err(silent)?;
            if len == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            match serde_json::from_slice(&buffer[..len])? {
                Answer::Socket { socket } => held.sockets.extend(fds.into_iter().map(|fd| (socket, fd))),
                Answer::Memberships { memberships } => {
                    held.memberships.extend(memberships.into_iter().map(Membership::from));
                }
                Answer::All => return Ok(held),
            }
        }
    }

    fn ask(&self, ask: &Ask, fds: &[&OwnedFd]) -> io::Result<()> {
        channel::send(&self.socket, &serde_json::to_vec(ask)?, fds)
    }
}

/// Whether the other end is gone.
fn is_end(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    matches!(error.kind(), BrokenPipe | ConnectionReset | UnexpectedEof)
}

/// Says what no answer means.
fn silent(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::WouldBlock => io::Error::new(
            io::ErrorKind::TimedOut,
            format!("the holder of memberships does not answer within {PATIENCE_S} s"),
        ),
        _ => error,
    }
}

/// A socket that waits no longer than it should.
fn seqpacket() -> io::Result<OwnedFd> {
    let socket = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
    let patience = TimeVal::seconds(PATIENCE_S);
    setsockopt(&socket, sockopt::SendTimeout, &patience)?;
    setsockopt(&socket, sockopt::ReceiveTimeout, &patience)?;
    Ok(socket)
}

/// An abstract name, and so one of this network namespace.
fn address(pin_root: &Path) -> io::Result<UnixAddr> {
    Ok(UnixAddr::new_abstract(format!("mcr-hold{}", pin_root.display()).as_bytes())?)
}
