//! The control socket's place in the file system: its lock, its mode, its removal.
//!
//! The lock stands beside the socket and is held for the daemon's life. Whoever holds it may remove a
//! socket that a killed daemon left, because nobody can listen there.

use std::{
    ffi::OsStr,
    fs::{self, DirBuilder, File, OpenOptions, Permissions},
    io::{self, Read, Write},
    os::unix::{
        ffi::OsStrExt,
        fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt},
        net::UnixListener as StdListener,
    },
    path::{Path, PathBuf},
};

use nix::{
    fcntl::{Flock, FlockArg},
    unistd::Gid,
};
use socket2::{Domain, SockAddr, Socket, Type};
use thiserror::Error;

use crate::{
    supervisor::{journal, settings::DEFAULT_CONTROL},
    sys::privileges::{self, Account},
};

/// Longest path of a Unix socket: `sun_path` less its NUL.
pub const MAX_PATH_BYTES: usize = 107;

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 256;

/// Why the control socket cannot be had. The text is one line: what, why, what to do.
#[derive(Debug, Error)]
pub enum BindError {
    #[error(transparent)]
    PathTooLong(#[from] PathTooLong),
    #[error("{path} is no path of a socket: name a file, like /run/mcr/mcr.sock")]
    NoFileName { path: PathBuf },
    #[error("{path} is there and is no socket: remove it, or choose another path with --control")]
    NotASocket { path: PathBuf },
    #[error("a daemon is running on {socket}{}: stop it with `mcr stop`, or choose another --control", pid_text(*.pid))]
    Running { socket: PathBuf, pid: Option<u32> },
    #[error("cannot {what} {path}")]
    Io { what: &'static str, path: PathBuf, source: io::Error },
}

/// A path that `connect` and `bind` would cut or refuse.
#[derive(Debug, Error)]
#[error(
    "the socket path {path} is too long ({} bytes, the kernel takes {MAX_PATH_BYTES}): choose another with --control",
    .path.as_os_str().len()
)]
pub struct PathTooLong {
    pub path: PathBuf,
}

/// Refuses a path that does not fit a socket address.
pub fn check_length(path: &Path) -> Result<(), PathTooLong> {
    if path.as_os_str().as_bytes().len() <= MAX_PATH_BYTES {
        Ok(())
    } else {
        Err(PathTooLong { path: path.to_owned() })
    }
}

fn pid_text(pid: Option<u32>) -> String {
    pid.map(|pid| format!(" (pid {pid})")).unwrap_or_default()
}

/// The right to serve a control socket: at most one process has it. Dropping it removes the socket and
/// the lock file.
#[derive(Debug)]
pub struct ControlLock {
    socket: PathBuf,
    lock: PathBuf,
    /// The directory is mcr's: made for this socket, or the usual one.
    own_directory: bool,
    /// Held open: the lock ends with it.
    file: Flock<File>,
}

impl ControlLock {
    /// Takes the lock beside `socket`; makes the socket's directory if it is not there.
    pub fn acquire(socket: &Path) -> Result<Self, BindError> {
        check_length(socket)?;
        if socket.file_name().is_none() {
            return Err(BindError::NoFileName { path: socket.to_owned() });
        }
        let made = make_parent(socket)?;
        let lock = beside(socket, ".lock");
        let file = lock_file(&lock, socket)?;
        let usual = socket.parent() == Path::new(DEFAULT_CONTROL).parent();
        let own_directory = made || usual || holds_nothing_but_ours(socket);
        Ok(Self { socket: socket.to_owned(), lock, own_directory, file })
    }

    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Where what is to outlive the daemon is written down.
    pub fn journal(&self) -> PathBuf {
        journal(&self.socket)
    }

    /// Makes the lock an account's, and mcr's own directory with it: the account is to put its socket there.
    pub fn give_to(&self, account: &Account) -> Result<(), BindError> {
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| BindError::Io { what: "hand over", path, source }
        };
        if is_socket(&self.socket) {
            // A killed daemon's, perhaps of another user.
            fs::remove_file(&self.socket).map_err(failed(&self.socket))?;
        }
        std::os::unix::fs::fchown(&*self.file, Some(account.uid.as_raw()), Some(account.gid.as_raw()))
            .map_err(failed(&self.lock))?;
        let journal = self.journal();
        if fs::symlink_metadata(&journal).is_ok_and(|metadata| journal::ours(&journal, &metadata)) {
            give_file(&journal, account).map_err(failed(&journal))?;
        }
        let parent = self.socket.parent().filter(|_| self.own_directory);
        parent.map_or(Ok(()), |parent| privileges::give(parent, account).map_err(failed(parent)))
    }
}

impl Drop for ControlLock {
    /// While the lock is still held: another daemon that has the old file open finds, once it gets the
    /// lock, that the file is no longer the one at the path, and starts over.
    fn drop(&mut self) {
        if is_socket(&self.socket) {
            let _ = fs::remove_file(&self.socket);
        }
        let _ = fs::remove_file(&self.lock);
    }
}

/// As [`ControlLock::journal`], of a daemon that may be gone.
pub fn journal(socket: &Path) -> PathBuf {
    beside(socket, ".journal")
}

/// The path of a file of ours that stands beside the socket.
fn beside(socket: &Path, what: &str) -> PathBuf {
    let mut name = socket.file_name().unwrap_or_default().to_owned();
    name.push(what);
    socket.with_file_name(name)
}

/// Makes a file an account's if it is there: never what a link leads to, or what has another name as well.
fn give_file(path: &Path, account: &Account) -> io::Result<()> {
    let file =
        match OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path) {
            Ok(file) => file,
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ELOOP)) => return Ok(()),
            Err(error) => return Err(error),
        };
    let metadata = file.metadata()?;
    if !metadata.is_file() || metadata.nlink() > 1 {
        return Ok(());
    }
    std::os::unix::fs::fchown(&file, Some(account.uid.as_raw()), Some(account.gid.as_raw()))
}

/// Makes the directory of a socket. False if it was there.
fn make_parent(socket: &Path) -> Result<bool, BindError> {
    let Some(parent) = socket.parent().filter(|parent| !parent.as_os_str().is_empty()) else {
        return Ok(false);
    };
    if parent.is_dir() {
        return Ok(false);
    }
    DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(parent)
        // A strict umask would lock out the group that the socket is for.
        .and_then(|()| fs::set_permissions(parent, Permissions::from_mode(0o755)))
        .map(|()| true)
        .map_err(|source| BindError::Io { what: "make the directory", path: parent.to_owned(), source })
}

/// Opens and locks the file that is at `path` when the lock is had.
fn lock_file(path: &Path, socket: &Path) -> Result<Flock<File>, BindError> {
    let failed = |what| move |source| BindError::Io { what, path: path.to_owned(), source };
    loop {
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o644)
            .custom_flags(libc::O_NOFOLLOW)
            .open(path)
            .map_err(failed("open the lock file"))?;
        let mut locked = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(locked) => locked,
            Err((taken, nix::errno::Errno::EWOULDBLOCK)) => {
                file = taken;
                let mut pid = String::new();
                let _ = file.read_to_string(&mut pid);
                return Err(BindError::Running { socket: socket.to_owned(), pid: pid.trim().parse().ok() });
            }
            Err((_, errno)) => return Err(failed("lock")(errno.into())),
        };
        let held = locked.metadata().map_err(failed("read"))?;
        if !held.is_file() || held.nlink() > 1 {
            // Somebody else's file, which is not to be written to.
            return Err(failed("use as a lock")(io::ErrorKind::AlreadyExists.into()));
        }
        match fs::symlink_metadata(path) {
            Ok(there) if (there.dev(), there.ino()) == (held.dev(), held.ino()) => {
                locked
                    .set_len(0)
                    .and_then(|()| writeln!(locked, "{}", std::process::id()))
                    .map_err(failed("write the lock file"))?;
                return Ok(locked);
            }
            // A daemon that ended took the file away between open and lock.
            _ => {}
        }
    }
}

/// Whether the directory of a socket holds nothing but what a daemon puts beside it, and is not for all to write to,
/// as `/tmp` is.
fn holds_nothing_but_ours(socket: &Path) -> bool {
    let parent = socket.parent().filter(|parent| !parent.as_os_str().is_empty());
    let (Some(parent), Some(name)) = (parent, socket.file_name()) else { return false };
    let ours = |file: &OsStr| file.as_bytes().starts_with(name.as_bytes());
    let for_all = fs::metadata(parent).is_ok_and(|metadata| metadata.mode() & 0o002 != 0);
    !for_all && fs::read_dir(parent).is_ok_and(|files| files.flatten().all(|file| ours(&file.file_name())))
}

pub fn is_socket(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket())
}

/// Listens on the lock's socket, mode 0660 and of this group, in place of one that a killed daemon left. The
/// listener does not block, as tokio wants it.
pub fn bind(lock: &ControlLock, group: Option<Gid>) -> Result<StdListener, BindError> {
    let path = lock.socket();
    let failed = |what| move |source| BindError::Io { what, path: path.to_owned(), source };
    match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.file_type().is_socket() => {
            fs::remove_file(path).map_err(failed("remove the stale socket"))?;
        }
        Ok(_) => return Err(BindError::NotASocket { path: path.to_owned() }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed("look at")(error)),
    }
    listen(path, group).map_err(failed("listen on"))
}

/// Listens on a path where nothing is, mode 0660 and of this group, without blocking.
pub fn listen(path: &Path, group: Option<Gid>) -> io::Result<StdListener> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.bind(&SockAddr::unix(path)?)?;
    // Nobody can connect before `listen`, so there is no moment in which the mode is wider.
    std::os::unix::fs::lchown(path, None, group.map(Gid::as_raw))?;
    fs::set_permissions(path, Permissions::from_mode(0o660))?;
    socket.listen(BACKLOG)?;
    socket.set_nonblocking(true)?;
    Ok(StdListener::from(socket))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::scratch::Scratch;
    use std::os::unix::net::UnixStream;

    #[test]
    fn makes_directory_and_socket_and_leaves_nothing() {
        let dir = Scratch::new();
        let path = dir.path().join("a/b/mcr.sock");
        let lock = ControlLock::acquire(&path).unwrap();
        let listener = bind(&lock, None).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o660);
        assert_eq!(fs::metadata(path.parent().unwrap()).unwrap().mode() & 0o7777, 0o755);
        assert_eq!(
            fs::read_to_string(dir.path().join("a/b/mcr.sock.lock")).unwrap(),
            format!("{}\n", std::process::id())
        );
        UnixStream::connect(&path).unwrap();
        drop(listener);
        drop(lock);
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 0);
    }

    #[test]
    fn a_second_daemon_is_refused_and_disturbs_nothing() {
        let dir = Scratch::new();
        let path = dir.path().join("mcr.sock");
        let lock = ControlLock::acquire(&path).unwrap();
        let _listener = bind(&lock, None).unwrap();
        let error = ControlLock::acquire(&path).unwrap_err().to_string();
        let pid = std::process::id();
        assert!(error.starts_with("a daemon is running on "), "{error}");
        assert!(error.contains(&format!("(pid {pid}): stop it with `mcr stop`")), "{error}");
        UnixStream::connect(&path).unwrap();
        drop(lock);
        ControlLock::acquire(&path).unwrap();
    }

    #[test]
    fn a_killed_daemons_socket_and_lock_file_are_taken_over() {
        let dir = Scratch::new();
        let path = dir.path().join("mcr.sock");
        drop(StdListener::bind(&path).unwrap());
        fs::write(dir.path().join("mcr.sock.lock"), "99999999\nmore than a pid\n").unwrap();
        let lock = ControlLock::acquire(&path).unwrap();
        let _listener = bind(&lock, None).unwrap();
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn what_is_no_socket_stays() {
        let dir = Scratch::new();
        let path = dir.path().join("mcr.sock");
        fs::write(&path, "precious").unwrap();
        let lock = ControlLock::acquire(&path).unwrap();
        assert!(matches!(bind(&lock, None), Err(BindError::NotASocket { .. })));
        drop(lock);
        assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
    }

    #[test]
    fn an_empty_directory_is_its_own_unless_all_may_write_there() {
        for (mode, own) in [(0o755, true), (0o1777, false)] {
            let dir = Scratch::new();
            fs::set_permissions(dir.path(), Permissions::from_mode(mode)).unwrap();
            assert_eq!(ControlLock::acquire(&dir.path().join("mcr.sock")).unwrap().own_directory, own);
        }
        let dir = Scratch::new();
        fs::write(dir.path().join("other"), "").unwrap();
        assert!(!ControlLock::acquire(&dir.path().join("mcr.sock")).unwrap().own_directory);
    }

    #[test]
    fn a_path_too_long_is_refused_in_one_line() {
        let dir = Scratch::new();
        let fits = dir.path().join("x".repeat(MAX_PATH_BYTES - dir.path().as_os_str().len() - 1));
        let _listener = bind(&ControlLock::acquire(&fits).unwrap(), None).unwrap();
        let long = dir.path().join("x".repeat(MAX_PATH_BYTES - dir.path().as_os_str().len()));
        let error = ControlLock::acquire(&long).unwrap_err().to_string();
        assert!(error.contains("is too long (108 bytes, the kernel takes 107): choose another"), "{error}");
    }

    #[test]
    fn of_many_that_start_and_end_at_once_one_at_a_time_has_the_lock() {
        use std::sync::atomic::{AtomicU32, Ordering};
        let dir = Scratch::new();
        let path = dir.path().join("mcr.sock");
        let (holders, taken) = (AtomicU32::new(0), AtomicU32::new(0));
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    while taken.load(Ordering::SeqCst) < 500 {
                        let Ok(lock) = ControlLock::acquire(&path) else { continue };
                        assert_eq!(holders.fetch_add(1, Ordering::SeqCst), 0);
                        taken.fetch_add(1, Ordering::SeqCst);
                        assert_eq!(holders.fetch_sub(1, Ordering::SeqCst), 1);
                        drop(lock);
                    }
                });
            }
        });
    }
}
