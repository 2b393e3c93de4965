//! Netlink by hand, for what no library of ours speaks or reads whole: dumps, and word of changes.

use std::{
    io::{self, Read, Write},
    os::fd::AsRawFd,
    time::Duration,
};

use nix::sys::socket::{NetlinkAddr, bind};
use rtnetlink::packet_core::{NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::unix::AsyncFd;

/// `nlmsghdr`.
const HEADER: usize = 16;
pub const ATTRIBUTE_HEADER: usize = 4;
/// Flags of an attribute's kind: nested, and in network order.
const ATTRIBUTE_KIND: u16 = 0x3fff;

/// A socket of a protocol (`NETLINK_...`), of which a question is answered within a second.
pub fn open(protocol: i32) -> io::Result<Socket> {
    let socket =
        Socket::new(Domain::from(libc::AF_NETLINK), Type::RAW.cloexec(), Some(Protocol::from(protocol)))?;
    socket.set_read_timeout(Some(Duration::from_secs(1)))?;
    Ok(socket)
}

/// A socket that does not block and is told what happens, by one of the first 32 multicast groups of the protocol.
/// Must be called within the runtime.
pub fn listen(protocol: i32, group: u32) -> io::Result<AsyncFd<Socket>> {
    let socket = open(protocol)?;
    // A socket that is not bound has the kernel's own address, and is told nothing of what comes from there.
    bind(socket.as_raw_fd(), &NetlinkAddr::new(0, 1 << (group - 1)))?;
    socket.set_nonblocking(true)?;
    // SAFETY: the descriptor is owned by the AsyncFd alone and always answers the same.
    unsafe { AsyncFd::register(socket) }.map_err(|error| error.into_parts().1)
}

/// Dumps all that the kernel has of a kind; `body` is what follows `nlmsghdr` in the question, `read` is given what
/// follows it in each answer. Returns when it has read so many of them, however many more there are.
pub fn dump<T>(
    protocol: i32,
    kind: u16,
    body: &[u8],
    enough: usize,
    mut read: impl FnMut(&[u8]) -> Option<T>,
) -> io::Result<Vec<T>> {
    const ATTEMPTS: usize = 10;
    let mut found = Vec::new();
    for _ in 0..ATTEMPTS {
        found.clear();
        let mut socket = open(protocol)?;
        question(&mut socket, kind, NLM_F_REQUEST | NLM_F_DUMP, body)?;
        if answers(&mut socket, |answer| {
            found.extend(read(answer));
            found.len() < enough
        })? {
            break;
        }
    }
    // Where it changes all the time the next change brings the next look.
    Ok(found)
}

/// Asks what has one answer; `body` is what follows `nlmsghdr` in the question, what follows it in the answer is returned.
pub fn ask(socket: &mut Socket, kind: u16, body: &[u8]) -> io::Result<Vec<u8>> {
    question(socket, kind, NLM_F_REQUEST, body)?;
    let mut found = Vec::new();
    answers(socket, |answer| {
        found = answer.to_vec();
        false
    })?;
    Ok(found)
}

fn question(socket: &mut Socket, kind: u16, flags: u16, body: &[u8]) -> io::Result<()> {
    let mut question = Vec::with_capacity(HEADER + body.len());
    question.extend(((HEADER + body.len()) as u32).to_ne_bytes());
    question.extend(kind.to_ne_bytes());
    question.extend(flags.to_ne_bytes());
    question.extend([0; 8]);
    question.extend(body);
    socket.write_all(&question)
}

/// Takes answers while more are wanted; whether nothing changed meanwhile: if something did, some may be
/// missing.
fn answers(socket: &mut Socket, mut take: impl FnMut(&[u8]) -> bool) -> io::Result<bool> {
    let mut packet = vec![0; 64 * 1024];
    let mut whole = true;
    loop {
        let read = socket.read(&mut packet)?;
        let mut rest = &packet[..read];
        if rest.is_empty() {
            return Err(malformed());
        }
        while !rest.is_empty() {
            let len = bytes(rest, 0).map(u32::from_ne_bytes).ok_or_else(malformed)? as usize;
            let body = rest.get(HEADER..len).ok_or_else(malformed)?;
            let [kind, flags] = [4, 6].map(|at| bytes(rest, at).map_or(0, u16::from_ne_bytes));
            whole &= flags & NLM_F_DUMP_INTR == 0;
            match kind {
                NLMSG_DONE | NLMSG_ERROR => {
                    let errno = bytes(body, 0).map_or(0, i32::from_ne_bytes).saturating_neg();
                    return if errno > 0 { Err(io::Error::from_raw_os_error(errno)) } else { Ok(whole) };
                }
                _ if !take(body) => return Ok(true),
                _ => {}
            }
            rest = rest.get(len.next_multiple_of(4)..).unwrap_or_default();
        }
    }
}

/// Attributes, as kinds and values.
pub fn attributes(mut bytes_of: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let len = usize::from(u16::from_ne_bytes(bytes(bytes_of, 0)?));
        let kind = u16::from_ne_bytes(bytes(bytes_of, 2)?) & ATTRIBUTE_KIND;
        let value = bytes_of.get(ATTRIBUTE_HEADER..len)?;
        bytes_of = bytes_of.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// The value of the first attribute of a kind; empty if there is none.
pub fn attribute(attributes_of: &[u8], kind: u16) -> &[u8] {
    attributes(attributes_of).find(|(found, _)| *found == kind).map_or(&[], |(_, value)| value)
}

/// The value of an attribute that is a string.
pub fn text(value: &[u8]) -> String {
    String::from_utf8_lossy(value.strip_suffix(&[0]).unwrap_or(value)).into_owned()
}

/// So many bytes at an offset.
pub fn bytes<const N: usize>(from: &[u8], at: usize) -> Option<[u8; N]> {
    from.get(at..at + N)?.try_into().ok()
}

/// What an answer that cannot be read is.
pub fn malformed() -> io::Error {
    io::Error::other("an answer of netlink that is none")
}
