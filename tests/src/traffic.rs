//! `mcr gen` and `mcr recv`, run in a namespace.

use std::{collections::BTreeSet, net::SocketAddrV4, time::Duration};

use nix::sys::signal::Signal;
use serde_json::Value;

use crate::{Namespace, Process, relay::binary, wait::PATIENCE};

/// `mcr gen`.
#[derive(Debug)]
pub struct Generator {
    process: Process,
}

/// What a generator says that it sent.
#[derive(Clone, Debug)]
pub struct Sent {
    pub json: Value,
}

impl Generator {
    /// Starts `mcr gen ENDPOINT ARGS --json`.
    #[track_caller]
    pub fn start(namespace: &Namespace, endpoint: &str, args: &[&str]) -> Self {
        let mut command = namespace.command(binary());
        Self { process: Process::spawn(command.args(["gen", endpoint]).args(args).arg("--json")) }
    }

    pub fn ended(&mut self) -> bool {
        self.process.ended().is_some()
    }

    /// Waits for its end, which must be a good one.
    #[track_caller]
    pub fn finish(self) -> Sent {
        Sent { json: self.process.answer(Duration::from_mins(1)).json() }
    }
}

impl Sent {
    /// Datagrams sent, over all streams.
    #[track_caller]
    pub fn count(&self) -> u64 {
        number(&self.json, "/total/sent")
    }

    /// SHA-256 over the payloads of a stream, in the order of sending.
    #[track_caller]
    pub fn sha256(&self, stream: usize) -> String {
        text(&self.json, &format!("/streams/{stream}/sha256"))
    }
}

/// `mcr recv`.
#[derive(Debug)]
pub struct Receiver {
    process: Process,
}

/// What a receiver says that it received.
#[derive(Clone, Debug)]
pub struct Received {
    pub json: Value,
}

impl Receiver {
    /// Starts `mcr recv ENDPOINT ARGS --json` and waits until it listens.
    #[track_caller]
    pub fn start(namespace: &Namespace, endpoint: &str, args: &[&str]) -> Self {
        let mut command = namespace.command(binary());
        command.args(["recv", endpoint]).args(args).arg("--json");
        let mut process = Process::spawn(&mut command);
        process.wait_for_stderr("listening on", PATIENCE);
        Self { process }
    }

    /// Ends it by SIGINT and takes its summary.
    #[track_caller]
    pub fn stop(mut self) -> Received {
        if self.process.ended().is_none() {
            self.process.signal(Signal::SIGINT);
        }
        self.finish()
    }

    /// As [`Self::stop`], where it is to find fault: it ends with 1 and prints its summary all the same.
    #[track_caller]
    pub fn stop_faulted(self) -> Received {
        self.process.signal(Signal::SIGINT);
        let answer = self.process.answer(Duration::from_mins(1));
        assert_eq!(answer.status, 1, "{answer}");
        Received { json: serde_json::from_str(&answer.stdout).unwrap_or_else(|_| panic!("{answer}")) }
    }

    /// Waits for its own end, by `--count` or `--seconds`.
    #[track_caller]
    pub fn finish(self) -> Received {
        Received { json: self.process.answer(Duration::from_mins(1)).json() }
    }
}

/// Counts over all streams of a receiver.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub received: u64,
    pub lost: u64,
    pub duplicates: u64,
    pub reordered: u64,
    pub corrupt: u64,
}

impl Counts {
    /// Each of `n` datagrams once, in order and whole.
    pub fn exactly(n: u64) -> Self {
        Self { received: n, ..Self::default() }
    }
}

impl Received {
    #[track_caller]
    pub fn counts(&self) -> Counts {
        let total = |key: &str| number(&self.json, &format!("/total/{key}"));
        Counts {
            received: total("received"),
            lost: total("lost"),
            duplicates: total("duplicates"),
            reordered: total("reordered"),
            corrupt: total("corrupt"),
        }
    }

    /// Datagrams received of one stream.
    #[track_caller]
    pub fn of_stream(&self, stream: usize) -> u64 {
        number(&self.json, &format!("/streams/{stream}/received"))
    }

    /// SHA-256 over the payloads of a stream, in the order of arrival.
    #[track_caller]
    pub fn sha256(&self, stream: usize) -> String {
        text(&self.json, &format!("/streams/{stream}/sha256"))
    }

    /// Source addresses and ports seen.
    #[track_caller]
    pub fn sources(&self) -> BTreeSet<SocketAddrV4> {
        let sources = self.list("/total/sources");
        sources.iter().map(|source| source.as_str().expect("text").parse().expect("address:port")).collect()
    }

    #[track_caller]
    pub fn ttl(&self) -> BTreeSet<u64> {
        self.list("/total/ttl").iter().map(|ttl| ttl.as_u64().expect("a TTL")).collect()
    }

    #[track_caller]
    pub fn dscp(&self) -> BTreeSet<u64> {
        self.list("/total/dscp").iter().map(|dscp| dscp.as_u64().expect("a DSCP")).collect()
    }

    #[track_caller]
    fn list(&self, pointer: &str) -> Vec<Value> {
        let list = self.json.pointer(pointer).and_then(Value::as_array);
        list.unwrap_or_else(|| panic!("no list {pointer} in {}", self.json)).clone()
    }
}

#[track_caller]
fn number(json: &Value, pointer: &str) -> u64 {
    json.pointer(pointer).and_then(Value::as_u64).unwrap_or_else(|| panic!("no number {pointer} in {json}"))
}

#[track_caller]
fn text(json: &Value, pointer: &str) -> String {
    let text = json.pointer(pointer).and_then(Value::as_str);
    text.unwrap_or_else(|| panic!("no text {pointer} in {json}")).to_owned()
}
