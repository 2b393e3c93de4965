//! The client of the control protocol: blocking, single-threaded, with a deadline on everything.

use std::{
    fs,
    io::{self, Read, Write},
    os::fd::{AsFd, BorrowedFd},
    os::unix::{
        fs::{FileTypeExt, MetadataExt},
        net::UnixStream,
    },
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use nix::{
    sys::socket::{getsockopt, sockopt::PeerCredentials},
    unistd::{Gid, Group, Uid, User},
};
use serde::de::DeserializeOwned;
use socket2::{Domain, SockAddr, Socket, Type};
use thiserror::Error;

use super::{
    event::Event,
    rpc::{self, Notification, Response},
    socket::{PathTooLong, check_length},
    wire::{self, Request, code},
};

/// How long to try again while the daemon has no room for another client.
const BUSY_PATIENCE: Duration = Duration::from_secs(3);

/// The pause before a busy daemon is asked again.
const BUSY_PAUSE: Duration = Duration::from_millis(20);

/// How long a call may take, from its first byte to the answer's last.
pub const TIMEOUT: Duration = Duration::from_secs(15);

/// Longest response line that is read, in bytes.
const MAX_RESPONSE_BYTES: usize = 256 * 1024 * 1024;

/// Why a call has no result. The text is one line: what, why, what to do.
#[derive(Debug, Error)]
pub enum ClientError {
    #[error(
        "no daemon on {path} ({why}): start one with `mcr run`, or name its socket with --control or MCR_CONTROL"
    )]
    NoDaemon { path: PathBuf, why: &'static str },
    #[error("{path} is no socket: name the daemon's with --control or MCR_CONTROL")]
    NotASocket { path: PathBuf },
    #[error(
        "permission denied on {place}: it belongs to user {user} and group {group} (mode {mode:04o}); \
         use sudo, or become one of them"
    )]
    PermissionDenied { place: PathBuf, user: String, group: String, mode: u32 },
    #[error(transparent)]
    PathTooLong(#[from] PathTooLong),
    #[error("the daemon on {path} did not answer within {} s: see its log", .limit.as_secs_f64())]
    Timeout { path: PathBuf, limit: Duration },
    #[error(
        "the request has {bytes} bytes, the daemon takes {}: ask for less at once",
        wire::MAX_REQUEST_BYTES
    )]
    RequestTooLong { bytes: usize },
    #[error("the answer of {path} is longer than {MAX_RESPONSE_BYTES} bytes: is it mcr that listens there?")]
    ResponseTooLong { path: PathBuf },
    #[error("the daemon on {path} closed the connection without an answer: it may be ending; see its log")]
    Closed { path: PathBuf },
    #[error("{path} sends half a line: the daemon may have been killed; see its log")]
    HalfALine { path: PathBuf },
    #[error(
        "what {path} answers is not mcr's control protocol ({why}): are client and daemon of one version?"
    )]
    Protocol { path: PathBuf, why: String },
    /// The daemon's own words.
    #[error(transparent)]
    Refused(#[from] wire::Error),
    #[error("cannot talk to the daemon on {path}")]
    Io { path: PathBuf, source: io::Error },
}

/// A connection to the daemon.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
    path: PathBuf,
    timeout: Duration,
    last_id: u64,
    /// What came after the last line that was read.
    unread: Vec<u8>,
}

impl Client {
    pub fn connect(path: &Path) -> Result<Self, ClientError> {
        Self::connect_within(path, TIMEOUT)
    }

    /// Connects; `timeout` holds for the connection and for each call.
    pub fn connect_within(path: &Path, timeout: Duration) -> Result<Self, ClientError> {
        check_length(path)?;
        let stream = || {
            let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
            // A full backlog blocks `connect` for as long as this.
            socket.set_write_timeout(Some(timeout))?;
            socket.connect(&SockAddr::unix(path)?)?;
            Ok(UnixStream::from(socket))
        };
        let stream = stream().map_err(|error| connect_error(path, timeout, error))?;
        Ok(Self { stream, path: path.to_owned(), timeout, last_id: 0, unread: Vec::new() })
    }

    /// Process id of the daemon as this process's PID namespace knows it.
    pub fn daemon_pid(&self) -> Option<i32> {
        getsockopt(&self.stream, PeerCredentials).ok().map(|peer| peer.pid()).filter(|&pid| pid > 0)
    }

    /// Sends one request and reads its response.
    pub fn call<T: DeserializeOwned>(&mut self, request: &Request) -> Result<T, ClientError> {
        self.call_within(request, self.timeout)
    }

    /// As [`Self::call`], within another time.
    pub fn call_within<T: DeserializeOwned>(
        &mut self,
        request: &Request,
        limit: Duration,
    ) -> Result<T, ClientError> {
        self.last_id += 1;
        let line = rpc::request_line(self.last_id, request)
            .map_err(|error| self.protocol(format!("the request cannot be written: {error}")))?;
        if line.len() > wire::MAX_REQUEST_BYTES {
            return Err(ClientError::RequestTooLong { bytes: line.len() });
        }
        let deadline = Instant::now() + limit;
        let patience = Instant::now() + BUSY_PATIENCE;
        loop {
            self.send(&line)?;
            let response = self.receive(Some(deadline))?;
            match self.result(&response) {
                // Too many clients at once: it was not begun, and room comes soon.
                Err(ClientError::Refused(error)) if error.code == code::BUSY && Instant::now() < patience => {
                    thread::sleep(BUSY_PAUSE);
                    self.unread.clear();
                    self.stream = Self::connect_within(&self.path, self.timeout)?.stream;
                }
                result => return result,
            }
        }
    }

    /// What there is to wait for until the next notification comes; nothing if it is here already.
    pub fn awaited(&self) -> Option<BorrowedFd<'_>> {
        (!self.unread.contains(&b'\n')).then(|| self.stream.as_fd())
    }

    /// Waits for the next notification, for as long as it takes.
    pub fn next_event(&mut self) -> Result<Event, ClientError> {
        let line = self.receive(None)?;
        let notification: Notification<Event> =
            serde_json::from_slice(&line).map_err(|error| self.protocol(error.to_string()))?;
        Ok(notification.params)
    }

    fn send(&mut self, line: &[u8]) -> Result<(), ClientError> {
        match self.stream.set_write_timeout(Some(self.timeout)).and_then(|()| self.stream.write_all(line)) {
            // A server that closes has said why before: the answer is there to be read.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            other => other.map_err(|error| self.io(error)),
        }
    }

    /// Reads up to the newline, which is not part of what it returns.
    fn receive(&mut self, deadline: Option<Instant>) -> Result<Vec<u8>, ClientError> {
        let mut line = std::mem::take(&mut self.unread);
        let mut chunk = vec![0; 64 * 1024];
        let mut searched = 0;
        loop {
            if let Some(end) = line[searched..].iter().position(|&byte| byte == b'\n') {
                self.unread = line.split_off(searched + end + 1);
                line.pop();
                return Ok(line);
            }
            searched = line.len();
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return Err(self.io(io::ErrorKind::TimedOut.into()));
            }
            self.stream.set_read_timeout(left).map_err(|error| self.io(error))?;
            let got = match self.stream.read(&mut chunk) {
                Ok(got) => got,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(self.io(error)),
            };
            match got {
                0 if line.is_empty() => return Err(ClientError::Closed { path: self.path.clone() }),
                0 => return Err(ClientError::HalfALine { path: self.path.clone() }),
                _ if line.len() + got > MAX_RESPONSE_BYTES => {
                    return Err(ClientError::ResponseTooLong { path: self.path.clone() });
                }
                _ => line.extend_from_slice(&chunk[..got]),
            }
        }
    }

    fn result<T: DeserializeOwned>(&self, line: &[u8]) -> Result<T, ClientError> {
        let response: Response<T> =
            serde_json::from_slice(line).map_err(|error| self.protocol(error.to_string()))?;
        match response {
            // Refusals of what the server could not read, or would not, bear no id.
            Response { id, error: Some(error), .. } if id.is_none_or(|id| id == self.last_id) => {
                Err(error.into())
            }
            Response { id, .. } if id != Some(self.last_id) => {
                Err(self.protocol("an answer to another request".to_owned()))
            }
            Response { result: Some(result), .. } => Ok(result),
            _ => Err(self.protocol("neither result nor error".to_owned())),
        }
    }

    fn protocol(&self, why: String) -> ClientError {
        ClientError::Protocol { path: self.path.clone(), why }
    }

    fn io(&self, source: io::Error) -> ClientError {
        let path = self.path.clone();
        match source.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
                ClientError::Timeout { path, limit: self.timeout }
            }
            io::ErrorKind::ConnectionReset => ClientError::Closed { path },
            _ => ClientError::Io { path, source },
        }
    }
}

fn connect_error(path: &Path, limit: Duration, source: io::Error) -> ClientError {
    let path = path.to_owned();
    match source.kind() {
        io::ErrorKind::NotFound => ClientError::NoDaemon { path, why: "there is no socket" },
        io::ErrorKind::ConnectionRefused if is_socket(&path) => {
            ClientError::NoDaemon { path, why: "nothing listens on the socket" }
        }
        io::ErrorKind::ConnectionRefused | io::ErrorKind::NotADirectory => ClientError::NotASocket { path },
        io::ErrorKind::PermissionDenied => permission_denied(&path),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => ClientError::Timeout { path, limit },
        _ => ClientError::Io { path, source },
    }
}

fn is_socket(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket())
}

/// Names what stands in the way: the socket, or the first directory above it that can be looked at.
fn permission_denied(path: &Path) -> ClientError {
    for place in path.ancestors() {
        if let Ok(metadata) = fs::metadata(place) {
            let (uid, gid) = (metadata.uid(), metadata.gid());
            return ClientError::PermissionDenied {
                place: place.to_owned(),
                user: User::from_uid(Uid::from_raw(uid))
                    .ok()
                    .flatten()
                    .map_or_else(|| uid.to_string(), |u| u.name),
                group: Group::from_gid(Gid::from_raw(gid))
                    .ok()
                    .flatten()
                    .map_or_else(|| gid.to_string(), |g| g.name),
                mode: metadata.mode() & 0o7777,
            };
        }
    }
    ClientError::Io { path: path.to_owned(), source: io::ErrorKind::PermissionDenied.into() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::{scratch::Scratch, wire::Pong};
    use std::os::unix::net::UnixListener;

    /// What a ping gets from a peer that sends these bytes and closes.
    fn ping_answered_with(answer: &[u8]) -> Result<Pong, ClientError> {
        let dir = Scratch::new();
        let path = dir.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        thread::scope(|scope| {
            scope.spawn(|| {
                let (mut peer, _) = listener.accept().unwrap();
                let mut request = [0; 1024];
                let _ = peer.read(&mut request).unwrap();
                peer.write_all(answer).unwrap();
            });
            Client::connect(&path)?.call(&Request::Ping)
        })
    }

    #[test]
    fn no_daemon_is_told_from_the_other_failures() {
        let dir = Scratch::new();
        let absent = dir.path().join("absent");
        let error = Client::connect(&absent).unwrap_err();
        assert!(matches!(error, ClientError::NoDaemon { why: "there is no socket", .. }), "{error}");
        let stale = dir.path().join("stale");
        drop(UnixListener::bind(&stale).unwrap());
        let error = Client::connect(&stale).unwrap_err();
        assert!(
            matches!(error, ClientError::NoDaemon { why: "nothing listens on the socket", .. }),
            "{error}"
        );
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        assert!(matches!(Client::connect(&file), Err(ClientError::NotASocket { .. })));
        let long = dir.path().join("x".repeat(108));
        assert!(matches!(Client::connect(&long), Err(ClientError::PathTooLong(_))));
    }

    #[test]
    fn permission_denied_names_the_owners() {
        let error = permission_denied(Path::new("/proc/1/no-such-entry")).to_string();
        assert!(
            error.starts_with(
                "permission denied on /proc/1: it belongs to user root and group root (mode 0555)"
            ),
            "{error}"
        );
    }

    #[test]
    fn a_result_is_typed() {
        let answer =
            b"{\"jsonrpc\":\"2.0\",\"id\":1,\"result\":{\"schema\":1,\"version\":\"0.1.0\",\"pid\":7}}\n";
        assert_eq!(ping_answered_with(answer).unwrap(), Pong { schema: 1, version: "0.1.0".into(), pid: 7 });
    }

    #[test]
    fn the_daemons_own_words_come_through() {
        for id in ["1", "null"] {
            let answer = format!(
                "{{\"jsonrpc\":\"2.0\",\"id\":{id},\"error\":{{\"code\":-32000,\"message\":\"no\"}}}}\n"
            );
            let error = ping_answered_with(answer.as_bytes()).unwrap_err();
            assert_eq!(error.to_string(), "no");
        }
    }

    #[test]
    fn garbage_is_named_as_such() {
        for answer in [
            &b"SSH-2.0-OpenSSH_9.2\r\n"[..],
            b"{}\n",
            b"{\"jsonrpc\":\"2.0\",\"id\":1}\n",
            b"{\"jsonrpc\":\"2.0\",\"id\":9,\"result\":{\"schema\":1,\"version\":\"\",\"pid\":7}}\n",
            b"{\"jsonrpc\":\"2.0\",\"id\":1,\"result\":{\"schema\":\"x\"}}\n",
        ] {
            let error = ping_answered_with(answer).unwrap_err();
            assert!(matches!(error, ClientError::Protocol { .. }), "{error}");
            assert_eq!(error.to_string().lines().count(), 1);
        }
        assert!(matches!(ping_answered_with(b""), Err(ClientError::Closed { .. })));
        let half = b"{\"jsonrpc\":\"2.0\"";
        assert!(matches!(ping_answered_with(half), Err(ClientError::HalfALine { .. })));
    }

    #[test]
    fn a_daemon_that_says_nothing_is_given_up_on() {
        let dir = Scratch::new();
        let path = dir.path().join("s");
        let _listener = UnixListener::bind(&path).unwrap();
        let mut client = Client::connect_within(&path, Duration::from_millis(50)).unwrap();
        let error = client.call::<Pong>(&Request::Ping).unwrap_err();
        assert!(matches!(error, ClientError::Timeout { .. }), "{error}");
        assert!(error.to_string().contains("did not answer within 0.05 s"), "{error}");
    }
}
