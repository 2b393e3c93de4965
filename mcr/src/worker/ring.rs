//! The worker's io_uring: sends, readiness, timer and commands are completions of this one ring.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd, RawFd},
};

use io_uring::{IoUring, cqueue, opcode, register::Restriction, squeue, types};

/// Entries of the submission queue. A full queue is submitted, never overrun.
const ENTRIES: u32 = 512;

/// Sockets that are registered with the ring: sends on these take no reference on a file each.
const FILES: u32 = 256;

/// `IORING_REGISTER_FILES_UPDATE`.
const REGISTER_FILES_UPDATE: u8 = 6;

/// What a completion belongs to; carried in `user_data`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Token {
    /// The send in this place of the egress table.
    Send(u32),
    /// Frames wait in the socket of this queue, counted within the worker.
    Queue(u32),
    /// The supervisor has sent a command, or is gone.
    Command,
    /// The timer ran out.
    Timer,
}

impl Token {
    fn encode(self) -> u64 {
        let (kind, index) = match self {
            Self::Send(index) => (0u64, index),
            Self::Queue(index) => (1, index),
            Self::Command => (2, 0),
            Self::Timer => (3, 0),
        };
        kind << 32 | u64::from(index)
    }

    fn decode(user_data: u64) -> Self {
        let index = user_data as u32;
        match user_data >> 32 {
            0 => Self::Send(index),
            1 => Self::Queue(index),
            2 => Self::Command,
            _ => Self::Timer,
        }
    }
}

/// A completion: what it belongs to, and the result (an errno if negative).
#[derive(Clone, Copy, Debug)]
pub struct Completion {
    pub token: Token,
    pub result: i32,
}

/// A socket that is sent through, registered with the ring if there was room.
#[derive(Debug)]
pub struct Sender {
    socket: OwnedFd,
    place: Option<u32>,
}

/// How a send names its socket.
#[derive(Clone, Copy, Debug)]
pub enum Target {
    Registered(u32),
    Plain(RawFd),
}

impl Sender {
    pub fn target(&self) -> Target {
        self.place.map_or(Target::Plain(self.socket.as_raw_fd()), Target::Registered)
    }
}

impl AsRawFd for Sender {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

/// An io_uring with one issuer.
pub struct Ring {
    uring: IoUring,
    /// Which places of the table of registered files are taken.
    files: [bool; FILES as usize],
    /// Calls of `io_uring_enter`.
    enters: u64,
    /// Read by the kernel when the timer is submitted.
    period: Box<types::Timespec>,
}

impl Ring {
    /// Sets the ring up, for what it is used for here and nothing else: any other operation is answered by
    /// EACCES.
    ///
    /// Needs Linux 6.1 (`IORING_SETUP_DEFER_TASKRUN`): older kernels answer EINVAL, kernels where
    /// io_uring is switched off or blocked EPERM or ENOSYS.
    pub fn new() -> io::Result<Self> {
        let uring = IoUring::builder()
            .setup_r_disabled()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_taskrun_flag()
            .setup_submit_all()
            .setup_cqsize(4 * ENTRIES)
            .build(ENTRIES)?;
        // A low limit of descriptors forbids the table, and sends do without.
        let no_table = uring.submitter().register_files_sparse(FILES).is_err();
        uring.submitter().register_restrictions(&mut [
            Restriction::sqe_op(opcode::SendMsg::CODE),
            Restriction::sqe_op(opcode::PollAdd::CODE),
            Restriction::sqe_op(opcode::Timeout::CODE),
            Restriction::sqe_flags_allowed((squeue::Flags::SKIP_SUCCESS | squeue::Flags::FIXED_FILE).bits()),
            Restriction::register_op(REGISTER_FILES_UPDATE),
        ])?;
        uring.submitter().register_enable_rings()?;
        let period = Box::new(types::Timespec::new());
        Ok(Self { uring, files: [no_table; FILES as usize], enters: 0, period })
    }

    /// Registers a socket to send through.
    pub fn open(&mut self, socket: OwnedFd) -> Sender {
        let free = self.files.iter().position(|taken| !taken);
        let place = free.map(|place| place as u32).filter(|&place| {
            self.uring.submitter().register_files_update(place, &[socket.as_raw_fd()]).is_ok()
        });
        if let Some(place) = place {
            self.files[place as usize] = true;
        }
        Sender { socket, place }
    }

    /// Closes a socket that was sent through.
    #[expect(clippy::needless_pass_by_value, reason = "a socket is closed once")]
    pub fn close(&mut self, sender: Sender) {
        if let Some(place) = sender.place {
            // A place that cannot be emptied keeps its socket open and is not used again.
            let emptied = self.uring.submitter().register_files_update(place, &[-1]).is_ok();
            self.files[place as usize] = !emptied;
        }
    }

    /// How often the kernel was entered so far.
    pub fn enters(&self) -> u64 {
        self.enters
    }

    /// Whether the kernel has put off work, completions perhaps, until it is entered.
    pub fn work_waits(&mut self) -> bool {
        self.uring.submission().taskrun()
    }

    /// Queues an entry, submitting first if the queue is full.
    ///
    /// # Safety
    ///
    /// What the entry points to must stay valid until it has completed.
    unsafe fn push(&mut self, entry: &squeue::Entry) -> io::Result<()> {
        if self.uring.submission().is_full() {
            self.submit()?;
        }
        // SAFETY: the caller keeps what the entry points to.
        unsafe { self.uring.submission().push(entry) }
            .map_err(|_| io::Error::other("the submission queue is full"))
    }

    /// Queues a send that does not wait. Only its failure makes a completion.
    ///
    /// # Safety
    ///
    /// `message` and all that it points to must stay valid and unchanged until the next
    /// [`submit`](Self::submit) has returned: a send with `MSG_DONTWAIT` is then complete.
    pub unsafe fn push_send(
        &mut self,
        index: u32,
        socket: Target,
        message: *const libc::msghdr,
    ) -> io::Result<()> {
        let send = match socket {
            Target::Registered(place) => opcode::SendMsg::new(types::Fixed(place), message),
            Target::Plain(fd) => opcode::SendMsg::new(types::Fd(fd), message),
        };
        let entry = send
            .flags(libc::MSG_DONTWAIT as u32)
            .build()
            .flags(squeue::Flags::SKIP_SUCCESS)
            .user_data(Token::Send(index).encode());
        // SAFETY: handed on to the caller.
        unsafe { self.push(&entry) }
    }

    /// Asks once for readiness to read.
    pub fn push_poll(&mut self, token: Token, fd: RawFd) -> io::Result<()> {
        let entry =
            opcode::PollAdd::new(types::Fd(fd), libc::POLLIN as u32).build().user_data(token.encode());
        // SAFETY: the entry points to nothing.
        unsafe { self.push(&entry) }
    }

    /// Asks once for a completion after this many milliseconds.
    pub fn push_timer(&mut self, milliseconds: u32) -> io::Result<()> {
        *self.period =
            types::Timespec::new().sec(u64::from(milliseconds / 1000)).nsec(milliseconds % 1000 * 1_000_000);
        let entry = opcode::Timeout::new(&raw const *self.period).build().user_data(Token::Timer.encode());
        // SAFETY: the period lives as long as the ring.
        unsafe { self.push(&entry) }
    }

    /// Hands the queued entries to the kernel and runs what work it deferred.
    pub fn submit(&mut self) -> io::Result<()> {
        self.enter(0)
    }

    /// As [`submit`](Self::submit), and sleeps until there is a completion.
    pub fn wait(&mut self) -> io::Result<()> {
        self.enter(1)
    }

    fn enter(&mut self, want: usize) -> io::Result<()> {
        // Whatever is not taken now would be sent later, from memory that is no longer the send's.
        const ATTEMPTS: usize = 16;
        for _ in 0..ATTEMPTS {
            self.enters += 1;
            match self.uring.submit_and_wait(want) {
                Ok(_) if self.uring.submission().is_empty() => return Ok(()),
                Ok(_) => {}
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
                Err(error) => return Err(error),
            }
        }
        Err(io::Error::other("io_uring does not take what is submitted"))
    }

    /// The next completion, if there is one.
    pub fn completion(&mut self) -> Option<Completion> {
        let completion: cqueue::Entry = self.uring.completion().next()?;
        Some(Completion { token: Token::decode(completion.user_data()), result: completion.result() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What becomes of an operation that is not among those of a worker.
    fn result_of(ring: &mut Ring, entry: &squeue::Entry) -> i32 {
        // SAFETY: what the entries of the tests point to is static.
        unsafe { ring.push(entry).unwrap() };
        ring.wait().unwrap();
        ring.completion().unwrap().result
    }

    #[test]
    fn takes_nothing_but_what_a_worker_does() {
        let mut ring = Ring::new().unwrap();
        let open = opcode::OpenAt::new(types::Fd(libc::AT_FDCWD), c"/etc/hostname".as_ptr()).build();
        assert_eq!(result_of(&mut ring, &open), -libc::EACCES);
        let socket = opcode::Socket::new(libc::AF_PACKET, libc::SOCK_RAW, 0).build();
        assert_eq!(result_of(&mut ring, &socket), -libc::EACCES);
        let linked = opcode::PollAdd::new(types::Fd(0), libc::POLLIN as u32).build();
        assert_eq!(result_of(&mut ring, &linked.flags(squeue::Flags::ASYNC)), -libc::EACCES);
        let refused = ring.uring.submitter().register_eventfd(0).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::EACCES));
        ring.push_timer(1).unwrap();
        ring.wait().unwrap();
        assert_eq!(ring.completion().unwrap().token, Token::Timer);
    }

    #[test]
    fn tokens_survive_the_ring() {
        for token in [Token::Send(7), Token::Queue(u32::MAX), Token::Command, Token::Timer] {
            assert_eq!(Token::decode(token.encode()), token);
        }
    }
}
