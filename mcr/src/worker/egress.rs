//! Egress: runs become `SENDMSG` entries of the ring, and every datagram is counted when its send is done.
//!
//! The sockets are made by the supervisor, one per egress interface, source port and loopback setting.
//! A message carries what differs from run to run: interface and source address (`IP_PKTINFO`), TTL,
//! TOS, and the segment size of a run (`UDP_SEGMENT`).

use std::{
    collections::BTreeMap,
    io,
    mem::{size_of, zeroed},
    os::fd::{AsRawFd, OwnedFd, RawFd},
};

use tracing::warn;

use crate::{
    rule::OutputSlot,
    worker::{
        ledger::{DropReason, Ledger},
        relay::{Egress, Run},
        ring::{Completion, Ring, Sender, Target, Token},
    },
};

/// Sends that are prepared before they are handed to the kernel together.
const SENDS: usize = 256;

/// How often a send is repeated that reports an error of an earlier datagram.
const ATTEMPTS: u8 = 3;

/// Control messages of one send, laid out as the kernel reads them (`cmsg(3)`): every header is 16
/// bytes and every value starts at a multiple of 8.
#[repr(C, align(8))]
#[derive(Clone, Copy)]
struct Control {
    pktinfo_header: libc::cmsghdr,
    pktinfo: libc::in_pktinfo,
    _pad: u32,
    ttl_header: libc::cmsghdr,
    ttl: libc::c_int,
    _pad_ttl: u32,
    tos_header: libc::cmsghdr,
    tos: libc::c_int,
    _pad_tos: u32,
    segment_header: libc::cmsghdr,
    segment: u16,
    _pad_segment: [u16; 3],
}

const _: () = assert!(size_of::<Control>() == 32 + 3 * 24);

/// Length of the control messages of a single datagram: all but the last.
const CONTROL_SINGLE: usize = size_of::<Control>() - 24;

fn header(level: libc::c_int, kind: libc::c_int, value_bytes: usize) -> libc::cmsghdr {
    libc::cmsghdr { cmsg_len: size_of::<libc::cmsghdr>() + value_bytes, cmsg_level: level, cmsg_type: kind }
}

/// A prepared send.
#[derive(Clone, Copy)]
struct Send {
    message: libc::msghdr,
    address: libc::sockaddr_in,
    control: Control,
    target: Target,
    /// The same socket, for its error queue.
    socket: RawFd,
    output: OutputSlot,
    datagrams: u64,
    bytes: u64,
    attempts: u8,
    /// Errno of the last attempt; 0 while it has not failed.
    error: i32,
}

impl Send {
    fn empty() -> Self {
        // SAFETY: all are plain C structures, for which all zeroes is a value.
        let (message, address, mut control) =
            unsafe { (zeroed::<libc::msghdr>(), zeroed::<libc::sockaddr_in>(), zeroed::<Control>()) };
        control.pktinfo_header = header(libc::IPPROTO_IP, libc::IP_PKTINFO, size_of::<libc::in_pktinfo>());
        control.ttl_header = header(libc::IPPROTO_IP, libc::IP_TTL, size_of::<libc::c_int>());
        control.tos_header = header(libc::IPPROTO_IP, libc::IP_TOS, size_of::<libc::c_int>());
        control.segment_header = header(libc::SOL_UDP, libc::UDP_SEGMENT, size_of::<u16>());
        Self {
            message,
            address,
            control,
            target: Target::Plain(-1),
            socket: -1,
            output: OutputSlot(0),
            datagrams: 0,
            bytes: 0,
            attempts: 0,
            error: 0,
        }
    }

    fn fill(&mut self, sender: &Sender, run: &Run<'_>) {
        self.target = sender.target();
        self.socket = sender.as_raw_fd();
        self.output = run.output;
        self.datagrams = run.payloads.len() as u64;
        self.bytes = run.bytes;
        self.attempts = 0;
        self.error = 0;

        self.address.sin_family = libc::AF_INET as libc::sa_family_t;
        self.address.sin_port = run.route.port.to_be();
        self.address.sin_addr.s_addr = u32::from(run.route.destination).to_be();
        self.control.pktinfo.ipi_ifindex = run.route.ifindex as libc::c_int;
        self.control.pktinfo.ipi_spec_dst.s_addr = u32::from(run.route.source).to_be();
        self.control.ttl = run.ttl.into();
        self.control.tos = run.tos.into();
        let gso = run.payloads.len() > 1;
        self.control.segment = if gso { run.payloads[0].iov_len as u16 } else { 0 };

        self.message.msg_name = (&raw mut self.address).cast();
        self.message.msg_namelen = size_of::<libc::sockaddr_in>() as libc::socklen_t;
        self.message.msg_iov = run.payloads.as_ptr().cast_mut();
        self.message.msg_iovlen = run.payloads.len();
        self.message.msg_control = (&raw mut self.control).cast();
        self.message.msg_controllen = if gso { size_of::<Control>() } else { CONTROL_SINGLE };
    }

    /// Makes this the send of the one datagram in `place` of a run.
    ///
    /// # Safety
    ///
    /// The run's payloads must still be where they were.
    unsafe fn single_out(&mut self, run: &Send, place: usize) {
        *self = *run;
        // SAFETY: the run has more payloads than `place`, which the caller has kept.
        let payload = unsafe { run.message.msg_iov.add(place) };
        self.message.msg_iov = payload;
        self.message.msg_iovlen = 1;
        self.message.msg_controllen = CONTROL_SINGLE;
        self.datagrams = 1;
        // SAFETY: as above.
        self.bytes = unsafe { (*payload).iov_len } as u64;
        self.attempts = 0;
    }
}

/// What becomes of a send that has completed.
enum Settled {
    Counted,
    /// It met an error of an earlier datagram and carried nothing.
    Again,
    /// The device or the route takes no such run: its datagrams go one by one.
    Split,
}

/// The worker's ring with its egress sockets and prepared sends.
pub struct UringEgress {
    pub ring: Ring,
    sockets: BTreeMap<u32, Sender>,
    /// Never grows after it was made: the kernel holds pointers into it.
    sends: Box<[Send]>,
    used: usize,
    /// Runs of the flush that go one by one.
    split: Vec<Send>,
    /// Outputs that take no runs, for the event loop to take note of.
    without_gso: Vec<OutputSlot>,
    /// Completions that were none of a send, kept for the event loop.
    others: Vec<Completion>,
    /// Errnos already logged as `send_failed`, so that each is said once.
    logged: Vec<i32>,
}

impl UringEgress {
    pub fn new(ring: Ring) -> Self {
        Self {
            ring,
            sockets: BTreeMap::new(),
            sends: (0..SENDS).map(|_| Send::empty()).collect(),
            used: 0,
            split: Vec::with_capacity(SENDS),
            without_gso: Vec::new(),
            others: Vec::with_capacity(64),
            logged: Vec::new(),
        }
    }

    pub fn open(&mut self, id: u32, socket: OwnedFd) {
        let sender = self.ring.open(socket);
        if let Some(former) = self.sockets.insert(id, sender) {
            self.ring.close(former);
        }
    }

    pub fn close(&mut self, id: u32) {
        if let Some(sender) = self.sockets.remove(&id) {
            self.ring.close(sender);
        }
    }

    /// Completions of anything but sends.
    pub fn other_completions(&mut self) -> impl Iterator<Item = Completion> + '_ {
        while let Some(completion) = self.ring.completion() {
            self.others.push(completion);
        }
        self.others.drain(..)
    }

    /// Sends all that is prepared, and counts it. The payloads are free when it returns.
    pub fn flush(&mut self, ledger: &Ledger) -> io::Result<()> {
        self.send_all(ledger)?;
        // In the order in which they were refused. A single datagram is never refused as a run.
        for index in 0..self.split.len() {
            let run = self.split[index];
            self.used = run.message.msg_iovlen;
            for place in 0..self.used {
                // SAFETY: the payloads are the batch's, which outlives the flush.
                unsafe { self.sends[place].single_out(&run, place) };
            }
            self.send_all(ledger)?;
        }
        self.split.clear();
        Ok(())
    }

    /// Sends what is in the table, and again what has to go again.
    fn send_all(&mut self, ledger: &Ledger) -> io::Result<()> {
        let mut pending = 0..self.used;
        while !pending.is_empty() {
            self.submit(pending.clone())?;
            let mut again = 0;
            for index in pending {
                match self.settle(index, ledger) {
                    Settled::Counted => {}
                    Settled::Again => {
                        self.sends.swap(again, index);
                        again += 1;
                    }
                    Settled::Split => self.split.push(self.sends[index]),
                }
            }
            pending = 0..again;
        }
        self.used = 0;
        Ok(())
    }

    /// Outputs that were found to take no runs.
    pub fn without_gso(&mut self) -> impl Iterator<Item = OutputSlot> + '_ {
        self.without_gso.drain(..)
    }

    fn submit(&mut self, pending: std::ops::Range<usize>) -> io::Result<()> {
        for index in pending {
            let send = &mut self.sends[index];
            send.error = 0;
            send.attempts += 1;
            // A swap moved the structures that the message points to.
            send.message.msg_name = (&raw mut send.address).cast();
            send.message.msg_control = (&raw mut send.control).cast();
            // SAFETY: message, address and control stay in place and untouched until `flush` has
            // submitted and settled them; the payloads belong to the batch, which outlives the flush.
            unsafe { self.ring.push_send(index as u32, send.target, &raw const send.message)? };
        }
        self.ring.submit()?;
        while let Some(completion) = self.ring.completion() {
            match completion.token {
                Token::Send(index) => {
                    if let Some(send) = self.sends.get_mut(index as usize) {
                        send.error = -completion.result.min(0);
                    }
                }
                _ => self.others.push(completion),
            }
        }
        Ok(())
    }

    /// Counts a completed send, if that is all there is to do.
    fn settle(&mut self, index: usize, ledger: &Ledger) -> Settled {
        let send = &self.sends[index];
        let output = ledger.output(send.output);
        if send.error == 0 {
            output.sent.add(send.datagrams);
            output.sent_bytes.add(send.bytes);
            return Settled::Counted;
        }
        if send.datagrams > 1 && refuses_runs(send.error) {
            if send.error != libc::EMSGSIZE && !self.without_gso.contains(&send.output) {
                let destination = std::net::Ipv4Addr::from(u32::from_be(send.address.sin_addr.s_addr));
                warn!(%destination, errno = send.error, "the egress device takes no UDP_SEGMENT runs: sending one by one");
                self.without_gso.push(send.output);
            }
            return Settled::Split;
        }
        let reason = drop_reason(send.error);
        if reason == DropReason::Unreachable {
            drain_errors(send.socket);
            if send.attempts < ATTEMPTS {
                output.retried.add(1);
                return Settled::Again;
            }
        }
        output.drop(reason, send.datagrams);
        // Queues see a run's datagrams one by one; what refuses a run before refuses it whole.
        if send.datagrams > 1 && matches!(reason, DropReason::QueueFull | DropReason::SendFailed) {
            output.approximate.add(send.datagrams);
        }
        if reason == DropReason::SendFailed && !self.logged.contains(&send.error) {
            let error = io::Error::from_raw_os_error(send.error);
            warn!(%error, "sends fail and are counted as send_failed; this error is said once");
            self.logged.push(send.error);
        }
        Settled::Counted
    }
}

impl Egress for UringEgress {
    fn send(&mut self, ledger: &Ledger, run: Run<'_>) {
        // A send to a host may fail by an ICMP error of an earlier one: it is repeated before what follows it.
        let follows = !run.route.destination.is_multicast()
            && self.used > 0
            && self.sends[self.used - 1].output == run.output;
        if (follows || self.used == self.sends.len())
            && let Err(error) = self.flush(ledger)
        {
            // The ring itself failed: the worker ends at its next flush, and the ledger knows the rest.
            warn!(%error, "io_uring submission failed");
            return;
        }
        match self.sockets.get(&run.route.socket) {
            Some(sender) => {
                self.sends[self.used].fill(sender, &run);
                self.used += 1;
            }
            None => ledger.output(run.output).drop(DropReason::Pending, run.payloads.len() as u64),
        }
    }
}

/// Whether an errno says that a run cannot go as one, where its datagrams might.
fn refuses_runs(errno: i32) -> bool {
    matches!(errno, libc::EIO | libc::EINVAL | libc::EOPNOTSUPP | libc::EMSGSIZE)
}

fn drop_reason(errno: i32) -> DropReason {
    match errno {
        libc::EMSGSIZE => DropReason::TooBig,
        libc::EAGAIN => DropReason::SendBufferFull,
        libc::ENOBUFS => DropReason::QueueFull,
        libc::ECONNREFUSED | libc::EHOSTUNREACH | libc::ENETUNREACH | libc::EPROTO | libc::ENOPROTOOPT => {
            DropReason::Unreachable
        }
        libc::ENETDOWN | libc::ENODEV | libc::ENXIO => DropReason::Pending,
        libc::EPERM => DropReason::Filtered,
        _ => DropReason::SendFailed,
    }
}

/// Empties the socket's error queue, which `IP_RECVERR` fills with the ICMP errors of earlier datagrams.
fn drain_errors(socket: RawFd) {
    const MOST: usize = 64;
    for _ in 0..MOST {
        // SAFETY: an all-zero msghdr asks for no data at all; the call writes only into it.
        let received = unsafe {
            let mut message = zeroed::<libc::msghdr>();
            libc::recvmsg(socket, &raw mut message, libc::MSG_ERRQUEUE | libc::MSG_DONTWAIT)
        };
        if received < 0 {
            break;
        }
    }
}
