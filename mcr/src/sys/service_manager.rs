//! The service manager that started this process, if one did: `sd_notify(3)`, `sd_listen_fds(3)`,
//! `sd_watchdog_enabled(3)`.

use std::{
    env, fs, io,
    os::{
        fd::{FromRawFd, OwnedFd, RawFd},
        linux::net::SocketAddrExt,
        unix::{
            fs::MetadataExt,
            net::{SocketAddr, UnixDatagram},
        },
    },
    process::Command,
    time::Duration,
};

use super::channel;

/// What is said to this process alone, by name of its environment.
const OURS: [&str; 7] = [
    "NOTIFY_SOCKET",
    "WATCHDOG_USEC",
    "WATCHDOG_PID",
    "LISTEN_PID",
    "LISTEN_FDS",
    "LISTEN_FDNAMES",
    "FDSTORE",
];

/// How long the service manager may leave unread what it must hear.
const PATIENCE: Duration = Duration::from_secs(5);

/// Where the service manager listens.
#[derive(Clone, Debug)]
pub struct ServiceManager(SocketAddr);

impl ServiceManager {
    /// The one that this process has to report to, if there is one.
    ///
    /// # Errors
    ///
    /// Where `NOTIFY_SOCKET` is no address of a Unix socket.
    pub fn of_environment() -> io::Result<Option<Self>> {
        let Ok(address) = env::var("NOTIFY_SOCKET") else { return Ok(None) };
        let address = match address.strip_prefix('@') {
            Some(name) => SocketAddr::from_abstract_name(name),
            None if address.starts_with('/') => SocketAddr::from_pathname(&address),
            None => Err(io::Error::other(format!("{address} is neither a path nor an abstract name"))),
        };
        Ok(Some(Self(address?)))
    }

    /// Tells what must be heard: assignments, one a line.
    pub fn tell(&self, words: &str, fds: &[&OwnedFd]) -> io::Result<()> {
        let socket = UnixDatagram::unbound()?;
        socket.set_write_timeout(Some(PATIENCE))?;
        socket.connect_addr(&self.0)?;
        channel::send(&socket, words.as_bytes(), fds)
    }

    /// Tells what will be told again: it waits for nothing.
    pub fn mention(&self, words: &str) -> io::Result<()> {
        let socket = UnixDatagram::unbound()?;
        socket.set_nonblocking(true)?;
        socket.connect_addr(&self.0)?;
        channel::send(&socket, words.as_bytes(), &[])
    }
}

/// Keeps from a command what is said to this process.
pub fn hide_from(command: &mut Command) {
    for name in OURS {
        command.env_remove(name);
    }
}

/// The time within which the service manager wants a sign of life, if it does.
pub fn watchdog() -> Option<Duration> {
    let ours = number::<u32>("WATCHDOG_PID").is_none_or(|pid| pid == std::process::id());
    number("WATCHDOG_USEC").filter(|&us| ours && us > 0).map(Duration::from_micros)
}

/// Descriptors that the service manager keeps for this service.
pub fn store_size() -> usize {
    number("FDSTORE").unwrap_or(0)
}

/// Takes the descriptors that the service manager has passed, each with its name. To be called once, before this process
/// has opened any that stays open.
pub fn take_descriptors() -> Vec<(String, OwnedFd)> {
    const FIRST: RawFd = 3;
    if number::<u32>("LISTEN_PID") != Some(std::process::id()) {
        return Vec::new();
    }
    let count = number::<u16>("LISTEN_FDS").unwrap_or(0);
    let names = env::var("LISTEN_FDNAMES").unwrap_or_default();
    let names = names.split(':').map(str::to_owned).chain(std::iter::repeat(String::new()));
    let take = |(fd, name): (RawFd, String)| {
        // SAFETY: the call takes integers; of a number that is no descriptor's it says so.
        let open = unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } == 0;
        // SAFETY: it is open, and was passed to this process, of which nothing else has it.
        open.then(|| (name, unsafe { OwnedFd::from_raw_fd(fd) }))
    };
    (FIRST..FIRST + RawFd::from(count)).zip(names).filter_map(take).collect()
}

/// Whether stderr goes to the journal, which knows of the time and tells levels by their number.
pub fn stderr_is_journal() -> bool {
    let stderr = fs::metadata("/proc/self/fd/2").map(|file| format!("{}:{}", file.dev(), file.ino()));
    stderr.is_ok_and(|stderr| env::var("JOURNAL_STREAM").is_ok_and(|journal| journal == stderr))
}

fn number<T: std::str::FromStr>(name: &str) -> Option<T> {
    env::var(name).ok()?.parse().ok()
}
