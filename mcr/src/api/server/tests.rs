//! The server against clients that behave and clients that do not, over real sockets.

use std::{
    io::{BufRead, BufReader as StdBufReader, ErrorKind, Read, Write},
    net::Shutdown,
    os::unix::net::UnixStream as Stream,
    path::PathBuf,
    thread::JoinHandle,
    time::Instant,
};

use serde_json::json;

use super::*;
use crate::api::{
    client::{Client, ClientError},
    scratch::Scratch,
    socket::{ControlLock, bind},
    wire::{LogLevel, LogLevelInfo, Pong, RuleList, RuleRef, Stop},
};
use crate::ruleset::Refusal;

/// A server whose supervisor answers every call with what it was asked.
struct Server {
    path: PathBuf,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<Vec<Request>>>,
    _dir: Scratch,
}

const QUICK: Duration = Duration::from_millis(100);
const PING: &[u8] = b"{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"ping\"}\n";

impl Server {
    fn start(limits: Limits) -> Self {
        let dir = Scratch::new();
        let path = dir.path().join("mcr.sock");
        let lock = ControlLock::acquire(&path).unwrap();
        let listener = bind(&lock, None).unwrap();
        let (stop, stopped) = oneshot::channel();
        let thread = std::thread::spawn(move || {
            let _lock = lock;
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let (calls, mut asked) = mpsc::channel(16);
                let listener = UnixListener::from_std(listener).unwrap();
                let shutdown = async { drop(stopped.await) };
                let supervisor = async {
                    let mut seen = Vec::new();
                    while let Some(call) = asked.recv().await {
                        answer(call, &mut seen);
                    }
                    seen
                };
                tokio::join!(serve(listener, calls, shutdown, limits), supervisor).1
            })
        });
        Self { path, stop: Some(stop), thread: Some(thread), _dir: dir }
    }

    fn with_quick_limits() -> Self {
        Self::start(Limits { idle: QUICK, write: QUICK, ..Limits::default() })
    }

    fn connect(&self) -> Stream {
        let stream = Stream::connect(&self.path).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream.set_write_timeout(Some(Duration::from_secs(20))).unwrap();
        stream
    }

    fn assert_well(&self) {
        Client::connect(&self.path).unwrap().call::<Pong>(&Request::Ping).unwrap();
    }

    /// Ends the server; what it was asked, in order.
    fn end(mut self) -> Vec<Request> {
        self.stop.take().unwrap().send(()).unwrap();
        self.thread.take().unwrap().join().unwrap()
    }
}

fn unknown_rule(name: &str) -> Error {
    Refusal::UnknownRule { name: name.to_owned() }.into()
}

/// Tells more than a socket buffers and the backlog of a test holds, then no more.
fn tell_much(subscriber: &Subscriber) {
    let mut batch = b"x".repeat(1 << 20);
    batch.push(b'\n');
    let (batch, farewell) = (batch.into(), b"too slow\n"[..].into());
    while subscriber.tell(&batch, &farewell) {}
}

fn answer(call: Call, seen: &mut Vec<Request>) {
    assert_eq!(call.peer.pid, i32::try_from(std::process::id()).ok());
    assert_eq!(call.peer.uid, nix::unistd::getuid().as_raw());
    let answer = match &call.request {
        Request::Ping => Ok(json!(Pong { schema: 1, version: "test".into(), pid: std::process::id() })),
        Request::LogLevelSet(LogLevel { level }) => {
            Ok(json!(LogLevelInfo { schema: 1, level: level.clone() }))
        }
        Request::RuleShow(RuleRef { name }) => Err(unknown_rule(name)),
        // Far more than a socket buffers.
        Request::Stats(_) => Ok(json!("x".repeat(4 << 20))),
        Request::RuleList => return seen.push(call.request),
        Request::EventsSubscribe => {
            let subscriber = call.subscriber;
            seen.push(call.request);
            let _ = call.reply.send(Ok(Value::Null));
            match seen.len() {
                1 => tell_much(&subscriber.unwrap()),
                // It is told nothing for as long as the server lives.
                _ => std::mem::forget(subscriber),
            }
            return;
        }
        _ => Ok(Value::Null),
    };
    seen.push(call.request);
    let _ = call.reply.send(answer);
}

/// The one line that a server says before it closes.
fn last_words(stream: Stream) -> Value {
    let mut text = String::new();
    match StdBufReader::new(stream).read_to_string(&mut text) {
        Err(error) if error.kind() != ErrorKind::ConnectionReset => panic!("{error}"),
        _ => {}
    }
    assert_eq!(text.lines().count(), 1, "{text}");
    serde_json::from_str(&text).unwrap()
}

fn read_response(reader: &mut impl BufRead) -> Value {
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    serde_json::from_str(&line).unwrap()
}

#[test]
fn a_silent_client_is_closed_and_disturbs_no_one() {
    let server = Server::with_quick_limits();
    let mut silent = server.connect();
    server.assert_well();
    assert_eq!(silent.read(&mut [0; 16]).unwrap(), 0);
    server.assert_well();
}

#[test]
fn half_a_request_is_answered_and_closed() {
    let server = Server::with_quick_limits();
    let mut waiting = server.connect();
    waiting.write_all(&PING[..20]).unwrap();
    server.assert_well();
    assert_eq!(last_words(waiting)["error"]["code"], code::PARSE);
    let mut closing = server.connect();
    closing.write_all(&PING[..20]).unwrap();
    closing.shutdown(Shutdown::Write).unwrap();
    assert_eq!(last_words(closing)["error"]["code"], code::PARSE);
    server.assert_well();
}

#[test]
fn a_byte_now_and_then_does_not_hold_a_connection() {
    let server = Server::with_quick_limits();
    let mut slow = server.connect();
    slow.set_read_timeout(Some(QUICK / 4)).unwrap();
    let start = Instant::now();
    let mut first = [0; 1];
    loop {
        let _ = slow.write_all(b" ");
        match slow.read(&mut first) {
            Ok(_) => break,
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
        }
        assert!(start.elapsed() < 50 * QUICK);
    }
    assert_eq!(&first, b"{");
}

#[test]
fn garbage_is_answered_and_the_connection_goes_on() {
    let server = Server::start(Limits::default());
    let mut stream = server.connect();
    stream.write_all(b"GET / HTTP/1.1\r\n\xff\xfe\x00\n[1]\n\n").unwrap();
    stream.write_all(PING).unwrap();
    let mut reader = StdBufReader::new(stream);
    for expected in [code::PARSE, code::PARSE, code::INVALID_REQUEST, code::PARSE] {
        assert_eq!(read_response(&mut reader)["error"]["code"], expected);
    }
    assert_eq!(read_response(&mut reader)["result"]["version"], "test");
}

#[test]
fn what_is_longer_than_a_request_is_refused_and_closed() {
    let server = Server::start(Limits::default());
    let mut stream = server.connect();
    if let Err(error) = stream.write_all(&vec![b'x'; 2 * wire::MAX_REQUEST_BYTES]) {
        assert!(matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset));
    }
    assert_eq!(last_words(stream)["error"]["message"], "a request has at most 8388608 bytes");
    server.assert_well();
}

#[test]
fn the_longest_request_is_served_and_one_byte_more_is_not() {
    let server = Server::start(Limits::default());
    let request = |bytes: usize| {
        let mut line = PING[..PING.len() - 1].to_vec();
        line.resize(bytes - 1, b' ');
        line.push(b'\n');
        line
    };
    let mut stream = server.connect();
    stream.write_all(&request(wire::MAX_REQUEST_BYTES)).unwrap();
    let mut reader = StdBufReader::new(stream.try_clone().unwrap());
    assert_eq!(read_response(&mut reader)["result"]["version"], "test");
    let _ = stream.write_all(&request(wire::MAX_REQUEST_BYTES + 1));
    assert_eq!(read_response(&mut reader)["error"]["code"], code::INVALID_REQUEST);
}

#[test]
fn fifty_at_once_are_all_served() {
    let server = Server::start(Limits::default());
    std::thread::scope(|scope| {
        for number in 0..50 {
            let server = &server;
            scope.spawn(move || {
                let mut client = Client::connect(&server.path).unwrap();
                for round in 0..20 {
                    let level = format!("{number}/{round}");
                    let request = Request::LogLevelSet(LogLevel { level: level.clone() });
                    assert_eq!(client.call::<LogLevelInfo>(&request).unwrap().level, level);
                }
            });
        }
    });
    assert_eq!(server.end().len(), 1000);
}

#[test]
fn a_thousand_connections_in_a_row_are_all_served() {
    let server = Server::start(Limits::default());
    for _ in 0..1000 {
        server.assert_well();
    }
}

#[test]
fn many_requests_in_one_write_are_answered_in_order() {
    let server = Server::start(Limits::default());
    let mut stream = server.connect();
    let mut lines = Vec::new();
    for id in 0..500 {
        let request = Request::LogLevelSet(LogLevel { level: id.to_string() });
        lines.extend(rpc::request_line(id, &request).unwrap());
    }
    stream.write_all(&lines).unwrap();
    let mut reader = StdBufReader::new(stream);
    for id in 0..500 {
        let response = read_response(&mut reader);
        assert_eq!((&response["id"], &response["result"]["level"]), (&json!(id), &json!(id.to_string())));
    }
}

#[test]
fn a_notification_is_carried_out_and_not_answered() {
    let server = Server::start(Limits::default());
    let mut stream = server.connect();
    stream.write_all(b"{\"jsonrpc\":\"2.0\",\"method\":\"stop\"}\n").unwrap();
    stream.write_all(PING).unwrap();
    assert_eq!(read_response(&mut StdBufReader::new(stream))["id"], 1);
    assert_eq!(server.end(), [Request::Stop(Stop::default()), Request::Ping]);
}

#[test]
fn a_client_that_never_reads_is_cut_and_holds_no_one() {
    let server = Server::with_quick_limits();
    let mut deaf = server.connect();
    deaf.write_all(b"{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"stats\"}\n").unwrap();
    server.assert_well();
    // The server gives up: what it had written is all there is, and no newline ends it.
    let start = Instant::now();
    while deaf.write_all(b" ").is_ok() {
        assert!(start.elapsed() < 50 * QUICK, "the server still holds the connection");
        server.assert_well();
    }
    let mut text = Vec::new();
    let _ = deaf.read_to_end(&mut text);
    assert!(text.len() < 4 << 20 && !text.ends_with(b"\n"));
}

#[test]
fn the_newest_of_too_many_is_turned_away() {
    let patience = Duration::from_mins(1);
    let server = Server::start(Limits { connections: 3, patience, ..Limits::default() });
    let mut clients: Vec<_> = (0..3).map(|_| Client::connect(&server.path).unwrap()).collect();
    for client in &mut clients {
        client.call::<Pong>(&Request::Ping).unwrap();
    }
    let refused = last_words(server.connect());
    assert_eq!(refused["error"]["code"], code::BUSY);
    assert_eq!(refused["error"]["message"], "the daemon serves 3 connections already: try again");
    clients[0].call::<Pong>(&Request::Ping).unwrap();
    drop(clients);
    // A client tries again until there is room.
    server.assert_well();
}

#[test]
fn the_longest_silent_gives_way_to_the_newest() {
    let server = Server::start(Limits { connections: 3, patience: QUICK, ..Limits::default() });
    let silent: Vec<_> = (0..3).map(|_| server.connect()).collect();
    server.assert_well();
    // The oldest was closed, without a word.
    let mut text = Vec::new();
    (&silent[0]).read_to_end(&mut text).unwrap();
    assert_eq!(text, b"");
    (&silent[2]).write_all(PING).unwrap();
    assert_eq!(read_response(&mut StdBufReader::new(&silent[2]))["result"]["version"], "test");
}

#[test]
fn errors_of_the_supervisor_arrive_with_their_code() {
    let server = Server::start(Limits::default());
    let request = Request::RuleShow(RuleRef { name: "cam9".to_owned() });
    match Client::connect(&server.path).unwrap().call::<Value>(&request).unwrap_err() {
        ClientError::Refused(error) => assert_eq!(error, unknown_rule("cam9")),
        other => panic!("{other}"),
    }
}

#[test]
fn a_dropped_call_is_answered() {
    let server = Server::start(Limits::default());
    let error = Client::connect(&server.path).unwrap().call::<RuleList>(&Request::RuleList).unwrap_err();
    assert_eq!(error.to_string(), "the daemon is ending");
}

#[test]
fn the_end_closes_connections_and_leaves_nothing() {
    let server = Server::start(Limits::default());
    let mut idle = server.connect();
    server.assert_well();
    let path = server.path.clone();
    let start = Instant::now();
    server.end();
    assert!(start.elapsed() < Limits::default().grace);
    assert_eq!(idle.read(&mut [0; 16]).unwrap(), 0);
    assert!(!path.exists());
}

const SUBSCRIBE: &[u8] = b"{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"events.subscribe\"}\n";

fn lines_of(stream: &Stream) -> impl Iterator<Item = String> + use<> {
    StdBufReader::new(stream.try_clone().unwrap()).lines().map_while(Result::ok)
}

#[test]
fn a_subscriber_that_is_behind_gets_what_was_told_and_then_the_last_line() {
    let server = Server::start(Limits { backlog_bytes: 4 << 20, ..Limits::default() });
    let mut stream = server.connect();
    stream.write_all(SUBSCRIBE).unwrap();
    server.assert_well();
    let lines: Vec<_> = lines_of(&stream).collect();
    assert!(lines[0].contains("\"result\":null"), "{}", lines[0]);
    assert!(lines.len() > 3, "{}", lines.len());
    assert_eq!(lines.last().unwrap(), "too slow");
    assert!(lines[1..lines.len() - 1].iter().all(|line| line.len() == 1 << 20));
}

#[test]
fn a_subscriber_that_reads_nothing_is_cut_off() {
    let server = Server::start(Limits { backlog_bytes: 4 << 20, write: QUICK, ..Limits::default() });
    let mut stream = server.connect();
    stream.write_all(SUBSCRIBE).unwrap();
    // Whatever it says then meets a closed door.
    let end = Instant::now() + Duration::from_secs(10);
    while stream.write_all(b" ").is_ok() {
        assert!(Instant::now() < end, "the connection is still open");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_subscription_outlives_silence_and_ends_with_a_word_or_the_client() {
    let server =
        Server::start(Limits { idle: QUICK, connections: 2, patience: Duration::ZERO, ..Limits::default() });
    let subscribe = || {
        let mut stream = server.connect();
        stream.write_all(SUBSCRIBE).unwrap();
        stream
    };
    // The first has all that the test supervisor tells.
    assert!(lines_of(&subscribe()).count() > 1);
    let mut stream = subscribe();
    let mut lines = lines_of(&stream);
    assert!(lines.next().unwrap().contains("result"));
    std::thread::sleep(3 * QUICK);
    // Others come and go, and do not push it out.
    for _ in 0..5 {
        server.assert_well();
    }
    stream.write_all(PING).unwrap();
    assert!(lines.next().unwrap().contains("takes no more requests"));
    assert_eq!(lines.next(), None);
    let seen = server.end();
    assert_eq!(seen.iter().filter(|request| **request == Request::EventsSubscribe).count(), 2);
}
