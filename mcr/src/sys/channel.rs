//! A pair of connected packet sockets that carry messages and file descriptors.

use std::{
    io::{self, IoSlice, IoSliceMut},
    os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
};

use nix::{
    cmsg_space,
    errno::Errno,
    sys::socket::{
        AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, sendmsg,
        socketpair,
    },
};

/// Most descriptors in one message: one a queue of a worker.
pub const MAX_FDS: usize = 64;

/// A connected pair of non-blocking `SOCK_SEQPACKET` sockets: messages keep their bounds, and a read
/// of nothing says that the other end is gone.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    Ok(socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)?)
}

/// Sends one message; `WouldBlock` if the other end is behind.
pub fn send(socket: impl AsFd, message: &[u8], fds: &[&OwnedFd]) -> io::Result<()> {
    let raw: Vec<_> = fds.iter().map(|fd| fd.as_raw_fd()).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control = if raw.is_empty() { &[][..] } else { &rights[..] };
    let (fd, parts) = (socket.as_fd().as_raw_fd(), [IoSlice::new(message)]);
    uninterrupted(|| sendmsg::<()>(fd, &parts, control, MsgFlags::MSG_NOSIGNAL, None))?;
    Ok(())
}

/// Calls again what a signal cut short: a call on a socket with a timeout is never resumed by itself.
pub fn uninterrupted<T>(mut call: impl FnMut() -> nix::Result<T>) -> nix::Result<T> {
    loop {
        match call() {
            Err(Errno::EINTR) => {}
            result => return result,
        }
    }
}

/// Receives one message; of length 0 if the other end is gone, `WouldBlock` if there is none.
pub fn receive(socket: impl AsFd, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut control = cmsg_space!([i32; MAX_FDS]);
    let mut parts = [IoSliceMut::new(buffer)];
    let fd = socket.as_fd().as_raw_fd();
    let message = loop {
        match recvmsg::<()>(fd, &mut parts, Some(&mut control), MsgFlags::MSG_CMSG_CLOEXEC) {
            Err(Errno::EINTR) => {}
            result => break result?,
        }
    };
    let mut fds = Vec::new();
    for part in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(raw) = part {
            // SAFETY: the kernel has just made these descriptors for this process; nothing else has them.
            fds.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    if message.flags.intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC) {
        return Err(io::Error::other("a message was longer than its buffer"));
    }
    Ok((message.bytes, fds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn carries_messages_and_descriptors() {
        let (a, b) = pair().unwrap();
        let (passed, _) = pair().unwrap();
        send(&a, b"hello", &[&passed]).unwrap();
        send(&a, b"again", &[]).unwrap();
        let mut buffer = [0; 64];
        let (len, fds) = receive(&b, &mut buffer).unwrap();
        assert_eq!((&buffer[..len], fds.len()), (&b"hello"[..], 1));
        let (len, fds) = receive(&b, &mut buffer).unwrap();
        assert_eq!((&buffer[..len], fds.len()), (&b"again"[..], 0));
        assert_eq!(receive(&b, &mut buffer).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        drop(a);
        assert_eq!(receive(&b, &mut buffer).unwrap().0, 0);
    }
}
