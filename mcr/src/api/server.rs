//! The server of the control protocol: connections to calls, for a supervisor that answers them one at a
//! time. It knows nothing of what a call means, and no client can make another one wait for it.

use std::{
    collections::VecDeque,
    future::Future,
    io,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use serde_json::Value;
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    net::{
        UnixListener, UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::{mpsc, oneshot, watch},
    task::{AbortHandle, JoinSet},
    time::{sleep, timeout},
};
use tracing::{debug, warn};

use super::{
    rpc::{self, Incoming},
    subscription::{self, Subscriber, Subscription},
    wire::{self, Error, Request, code},
};

/// A request for the supervisor. Dropping `reply` answers that the daemon is ending.
#[derive(Debug)]
pub struct Call {
    pub request: Request,
    pub peer: Peer,
    /// Who is to be told, of a call that subscribes.
    pub subscriber: Option<Subscriber>,
    pub reply: oneshot::Sender<Result<Value, Error>>,
}

/// Who is at the other end, by `SO_PEERCRED`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Absent where the peer's PID namespace is not ours.
    pub pid: Option<i32>,
    pub uid: u32,
    pub gid: u32,
}

/// What a client may take of the server.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub connections: usize,
    pub request_bytes: usize,
    /// For one whole request line to arrive.
    pub idle: Duration,
    /// For one whole response line to be read.
    pub write: Duration,
    /// For calls that are being answered when the server ends.
    pub grace: Duration,
    /// Bytes that may wait for a subscriber to read.
    pub backlog_bytes: u32,
    /// How long a client may be silent that stands in the way of a new one.
    pub patience: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 128,
            request_bytes: wire::MAX_REQUEST_BYTES,
            idle: Duration::from_secs(30),
            write: Duration::from_secs(10),
            grace: Duration::from_secs(2),
            backlog_bytes: subscription::BACKLOG_BYTES,
            patience: Duration::from_secs(1),
        }
    }
}

/// Serves `listener` until `shutdown` is ready; then calls that are under way get their answers, and
/// connections are closed. The supervisor must go on answering (or dropping) calls until this returns.
pub async fn serve(
    listener: UnixListener,
    calls: mpsc::Sender<Call>,
    shutdown: impl Future<Output = ()>,
    limits: Limits,
) {
    let (ending, end) = watch::channel(false);
    let mut connections = JoinSet::new();
    let mut clients = Clients::default();
    tokio::pin!(shutdown);
    loop {
        tokio::select! {
            () = &mut shutdown => break,
            Some(_) = connections.join_next() => {}
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) if connections.len() >= limits.connections && !clients.evict(limits.patience) => {
                    turn_away(&stream, limits);
                }
                Ok((stream, _)) => {
                    let silence = Silence::default();
                    let run = Connection::run(stream, calls.clone(), end.clone(), limits, silence.clone());
                    clients.admit(connections.spawn(run), silence);
                }
                Err(error) => {
                    // Out of file descriptors, most likely: it passes, and spinning would not help it.
                    warn!(%error, "cannot accept a control connection");
                    sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }
    drop(listener);
    ending.send_replace(true);
    let all = async { while connections.join_next().await.is_some() {} };
    if timeout(limits.grace, all).await.is_err() {
        debug!("control connections were cut at the end");
    }
}

/// Since when a client has been waited for; `None` while it is being answered.
type Silence = Arc<Mutex<Option<Instant>>>;

/// The connections, oldest first.
#[derive(Default)]
struct Clients(VecDeque<(AbortHandle, Silence)>);

impl Clients {
    fn admit(&mut self, connection: AbortHandle, silence: Silence) {
        self.0.retain(|(connection, _)| !connection.is_finished());
        self.0.push_back((connection, silence));
    }

    /// Ends the oldest connection whose client has been silent for long. False if there is none.
    fn evict(&mut self, patience: Duration) -> bool {
        self.0.retain(|(connection, _)| !connection.is_finished());
        let silent = |silence: &Silence| {
            silence.lock().is_ok_and(|since| since.is_some_and(|since| since.elapsed() > patience))
        };
        let Some(place) = self.0.iter().position(|(_, silence)| silent(silence)) else { return false };
        if let Some((connection, _)) = self.0.remove(place) {
            connection.abort();
        }
        true
    }
}

/// Says that there are too many connections, to the newest, without waiting for it.
fn turn_away(stream: &UnixStream, limits: Limits) {
    let message = format!("the daemon serves {} connections already: try again", limits.connections);
    let line = rpc::response_line(&Value::Null, Err(Error { code: code::BUSY, message }));
    let _ = stream.try_write(&line);
}

struct Connection {
    reader: BufReader<OwnedReadHalf>,
    writer: OwnedWriteHalf,
    peer: Peer,
    calls: mpsc::Sender<Call>,
    limits: Limits,
    silence: Silence,
}

/// What came of waiting for a request line.
enum Line {
    Request(Vec<u8>),
    TooLong,
    /// Half a request, then silence or the end of the stream.
    Unfinished,
    /// Nothing at all.
    Quiet,
}

impl Connection {
    async fn run(
        stream: UnixStream,
        calls: mpsc::Sender<Call>,
        mut end: watch::Receiver<bool>,
        limits: Limits,
        silence: Silence,
    ) {
        let peer = match stream.peer_cred() {
            Ok(cred) => Peer { pid: cred.pid(), uid: cred.uid(), gid: cred.gid() },
            Err(error) => return debug!(%error, "a control connection without credentials"),
        };
        let (reader, writer) = stream.into_split();
        let mut connection = Self { reader: BufReader::new(reader), writer, peer, calls, limits, silence };
        if let Err(error) = connection.serve(&mut end).await {
            debug!(%error, ?peer, "a control connection ended");
        }
    }

    async fn serve(&mut self, end: &mut watch::Receiver<bool>) -> io::Result<()> {
        loop {
            self.note(Some(Instant::now()));
            let line = tokio::select! {
                biased;
                _ = end.wait_for(|&ending| ending) => return Ok(()),
                line = self.line() => line?,
            };
            self.note(None);
            match line {
                Line::Request(line) => {
                    if let Some(subscription) = self.answer(&line).await? {
                        return self.follow(subscription).await;
                    }
                }
                Line::Quiet => return Ok(()),
                Line::TooLong => {
                    let message = format!("a request has at most {} bytes", self.limits.request_bytes);
                    return self.refuse(code::INVALID_REQUEST, message).await;
                }
                Line::Unfinished => {
                    let message = "half a request: a request is one line, with a newline at its end";
                    return self.refuse(code::PARSE, message.to_owned()).await;
                }
            }
        }
    }

    /// Notes since when the client is waited for.
    fn note(&self, since: Option<Instant>) {
        if let Ok(mut silence) = self.silence.lock() {
            *silence = since;
        }
    }

    async fn line(&mut self) -> io::Result<Line> {
        let mut line = Vec::new();
        let limits = self.limits;
        match timeout(limits.idle, read_line(&mut self.reader, &mut line, limits.request_bytes)).await {
            Ok(Ok(())) if line.ends_with(b"\n") => Ok(Line::Request(line)),
            Ok(Ok(())) if line.len() >= limits.request_bytes => Ok(Line::TooLong),
            Ok(Err(error)) => Err(error),
            Ok(Ok(())) | Err(_) if line.is_empty() => Ok(Line::Quiet),
            Ok(Ok(())) | Err(_) => Ok(Line::Unfinished),
        }
    }

    /// Answers a request, with the subscription that begins then, if one does.
    async fn answer(&mut self, line: &[u8]) -> io::Result<Option<Subscription>> {
        match rpc::parse(line) {
            Incoming::Call { id, request } => {
                let subscribes = request == Request::EventsSubscribe;
                let pair = subscribes.then(|| subscription::pair(self.limits.backlog_bytes));
                let (teller, subscription) = pair.unzip();
                let outcome = self.call(request, teller).await;
                let subscription = subscription.filter(|_| outcome.is_ok());
                self.write(&rpc::response_line(&id, outcome)).await?;
                return Ok(subscription);
            }
            Incoming::Refused { id, error } => self.write(&rpc::response_line(&id, Err(error))).await?,
            Incoming::Notification(request) => {
                if let Err(error) = self.call(request, None).await {
                    debug!(%error, "a notification was refused");
                }
            }
            Incoming::Ignored(error) => debug!(%error, "a notification was not understood"),
        }
        Ok(None)
    }

    /// Writes what a subscriber is told until there is no more, or nobody that reads it.
    async fn follow(&mut self, mut subscription: Subscription) -> io::Result<()> {
        while !subscription.is_over() {
            tokio::select! {
                biased;
                told = subscription.next() => match told {
                    Some(told) => self.write(&told.lines).await?,
                    None => return Ok(()),
                },
                heard = self.reader.fill_buf() => {
                    if heard?.is_empty() {
                        return Ok(());
                    }
                    let message = "a connection that subscribed takes no more requests: call on another";
                    return self.refuse(code::INVALID_REQUEST, message.to_owned()).await;
                }
            }
        }
        let rest = async {
            while let Some(told) = subscription.next().await {
                self.writer.write_all(&told.lines).await?;
            }
            Ok(())
        };
        timeout(self.limits.write, rest).await?
    }

    async fn call(&self, request: Request, subscriber: Option<Subscriber>) -> Result<Value, Error> {
        let ending = || Error { code: code::INTERNAL, message: "the daemon is ending".to_owned() };
        let (reply, outcome) = oneshot::channel();
        let call = Call { request, peer: self.peer, subscriber, reply };
        self.calls.send(call).await.map_err(|_| ending())?;
        outcome.await.unwrap_or_else(|_| Err(ending()))
    }

    async fn refuse(&mut self, code: i32, message: String) -> io::Result<()> {
        self.write(&rpc::response_line(&Value::Null, Err(Error { code, message }))).await
    }

    async fn write(&mut self, line: &[u8]) -> io::Result<()> {
        timeout(self.limits.write, self.writer.write_all(line)).await?
    }
}

/// Appends to `line` up to and with the newline, at most `limit` bytes. What was read stays in `line` when
/// this is cancelled.
async fn read_line(
    reader: &mut BufReader<OwnedReadHalf>,
    line: &mut Vec<u8>,
    limit: usize,
) -> io::Result<()> {
    loop {
        let available = reader.fill_buf().await?;
        let room = &available[..available.len().min(limit - line.len())];
        let newline = room.iter().position(|&byte| byte == b'\n');
        let take = newline.map_or(room.len(), |at| at + 1);
        line.extend_from_slice(&room[..take]);
        reader.consume(take);
        if newline.is_some() || take == 0 || line.len() == limit {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests;
