//! A service manager: hears what a daemon says of itself, and keeps descriptors for the next one.

use std::{
    io,
    os::{
        fd::{AsRawFd, OwnedFd, RawFd},
        linux::net::SocketAddrExt,
        unix::{
            net::{SocketAddr, UnixDatagram},
            process::CommandExt,
        },
    },
    path::Path,
    process::Command,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use mcr::sys::channel;

use crate::{Namespace, wait::wait_for};

/// From where on a child finds what is passed to it, before it is moved to where the next daemon looks.
const PASSED: RawFd = 100;

/// One message.
#[derive(Clone, Debug)]
pub struct Said {
    pub at: Instant,
    pub words: String,
}

impl Said {
    /// The value that is assigned to a name.
    pub fn value(&self, name: &str) -> Option<&str> {
        self.words.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='))
    }
}

#[derive(Debug, Default)]
struct Heard {
    said: Vec<Said>,
    store: Vec<(String, OwnedFd)>,
}

/// Listens until it is dropped.
#[derive(Debug)]
pub struct ServiceManager {
    address: String,
    heard: Arc<Mutex<Heard>>,
    end: Arc<AtomicBool>,
    listener: Option<JoinHandle<()>>,
}

impl ServiceManager {
    /// One whose socket is a file.
    #[track_caller]
    pub fn at(path: &Path) -> Self {
        Self::listen(UnixDatagram::bind(path).expect("a datagram socket"), path.display().to_string())
    }

    /// One whose socket is a file that anybody may write to.
    #[track_caller]
    pub fn for_all(path: &Path) -> Self {
        let manager = Self::at(path);
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o777);
        std::fs::set_permissions(path, mode).expect("open a socket to all");
        manager
    }

    /// One whose socket is an abstract name of a namespace.
    #[track_caller]
    pub fn abstract_in(namespace: &Namespace) -> Self {
        let name = "a service manager";
        let address = SocketAddr::from_abstract_name(name).expect("an abstract name");
        let socket = namespace.run(|| UnixDatagram::bind_addr(&address)).expect("a datagram socket");
        Self::listen(socket, format!("@{name}"))
    }

    fn listen(socket: UnixDatagram, address: String) -> Self {
        const LOOK: Duration = Duration::from_millis(50);
        socket.set_read_timeout(Some(LOOK)).expect("a timeout");
        let (heard, end) = (Arc::<Mutex<Heard>>::default(), Arc::<AtomicBool>::default());
        let (shared, ends) = (Arc::clone(&heard), Arc::clone(&end));
        let listener = thread::spawn(move || {
            let mut buffer = [0; 4096];
            while !ends.load(Ordering::Relaxed) {
                match channel::receive(&socket, &mut buffer) {
                    Ok((len, fds)) => {
                        let words = String::from_utf8_lossy(&buffer[..len]).into_owned();
                        shared.lock().expect("not poisoned").hear(Said { at: Instant::now(), words }, fds);
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(error) => panic!("the service manager's socket: {error}"),
                }
            }
        });
        Self { address, heard, end, listener: Some(listener) }
    }

    /// A daemon's command as the service manager starts it: told where to report to, and passed what is stored.
    pub fn start(&self, namespace: &Namespace, daemon: &Command, variables: &[(&str, &str)]) -> Command {
        let store = &self.heard.lock().expect("not poisoned").store;
        let passed: Vec<_> = store.iter().map(|(_, fd)| fd.as_raw_fd()).collect();
        let names: Vec<_> = store.iter().map(|(name, _)| name.as_str()).collect();
        let moves = (3..).zip(PASSED..).take(passed.len());
        let moves: Vec<_> = moves.map(|(to, from)| format!("exec {to}<&{from} {from}<&-; ")).collect();
        // Whose they are is known once the process is there, and stays over exec.
        let listen = if passed.is_empty() { "" } else { "export LISTEN_PID=$$; " };
        let mut command = namespace.command("bash");
        command.arg("-c").arg(format!("{}{listen}exec \"$0\" \"$@\"", moves.concat()));
        command.arg(daemon.get_program()).args(daemon.get_args());
        command.env("NOTIFY_SOCKET", &self.address);
        if !passed.is_empty() {
            command.env("LISTEN_FDS", passed.len().to_string()).env("LISTEN_FDNAMES", names.join(":"));
        }
        command.envs(variables.iter().copied());
        // SAFETY: between fork and exec the closure makes system calls only; what is stored stays open while this
        // service manager lives, and a number that is nothing's by then fails.
        unsafe {
            command.pre_exec(move || {
                for (to, fd) in (PASSED..).zip(&passed) {
                    if libc::dup2(*fd, to) < 0 {
                        return Err(io::Error::last_os_error());
                    }
                }
                Ok(())
            });
        }
        command
    }

    /// All that was said so far.
    pub fn said(&self) -> Vec<Said> {
        self.heard.lock().expect("not poisoned").said.clone()
    }

    /// How many messages there were so far: what comes later is what follows from what a test does now.
    pub fn mark(&self) -> usize {
        self.said().len()
    }

    /// The first message after `mark` that `is` holds for, and the mark behind it.
    #[track_caller]
    pub fn wait_for(
        &self,
        what: &str,
        mark: usize,
        patience: Duration,
        is: impl Fn(&Said) -> bool,
    ) -> (Said, usize) {
        wait_for(what, patience, || {
            let said = self.said();
            let at = said.iter().skip(mark).position(&is)? + mark;
            Some((said[at].clone(), at + 1))
        })
    }

    /// Names of the descriptors that are stored.
    pub fn stored(&self) -> Vec<String> {
        self.heard.lock().expect("not poisoned").store.iter().map(|(name, _)| name.clone()).collect()
    }
}

impl Heard {
    fn hear(&mut self, said: Said, fds: Vec<OwnedFd>) {
        let name = said.value("FDNAME").unwrap_or("stored").to_owned();
        if said.value("FDSTOREREMOVE") == Some("1") {
            self.store.retain(|(stored, _)| *stored != name);
        } else if said.value("FDSTORE") == Some("1") {
            self.store.extend(fds.into_iter().map(|fd| (name.clone(), fd)));
        }
        self.said.push(said);
    }
}

impl Drop for ServiceManager {
    fn drop(&mut self) {
        self.end.store(true, Ordering::Relaxed);
        let _its_panic_was_printed = self.listener.take().map(JoinHandle::join);
    }
}
