//! `docs/control-protocol.md` says what is so: its examples, in their order, against a daemon.

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    process::Command,
};

use mcr::api::{
    event::Event,
    wire::{
        ConfigOutcome, ConfigSaved, ConfigText, LogLevelInfo, Pong, RuleOutcome, Stats, Status, Stopping,
        Subscribed, WorkerList,
    },
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;
use tests::{Process, Relay, Site, relay::CALL, wait::PATIENCE};

const DOCUMENT: &str = include_str!("../../docs/control-protocol.md");
const WIRE: &str = include_str!("../../mcr/src/api/wire.rs");
const EVENTS: &str = include_str!("../../mcr/src/api/event.rs");

/// What the document shows of a call.
#[derive(Debug)]
struct Example {
    /// As it is written.
    request: String,
    /// The answer, and the notifications that follow.
    answers: Vec<Value>,
}

impl Example {
    fn method(&self) -> String {
        let request: Value = serde_json::from_str(&self.request).expect("a request is JSON");
        request["method"].as_str().expect("a method").to_owned()
    }
}

/// The blocks of the document in a language.
fn blocks(language: &str) -> Vec<String> {
    let parts: Vec<_> = DOCUMENT.split("\n```").collect();
    // Every second part is a block, from its language on.
    let blocks = parts.iter().skip(1).step_by(2).filter_map(|block| block.split_once('\n'));
    blocks.filter(|(its, _)| *its == language).map(|(_, text)| text.to_owned()).collect()
}

fn examples() -> Vec<Example> {
    let mut examples = Vec::new();
    for block in blocks("") {
        let Some(block) = block.strip_prefix("--> ") else { panic!("a block without a request: {block}") };
        let mut parts = block.split("\n<-- ");
        let request = parts.next().expect("a request").to_owned();
        let json = |text| serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"));
        examples.push(Example { request, answers: parts.map(json).collect() });
    }
    examples
}

/// Counters by name, of which an example shows some.
const MAPS: [&str; 6] = ["dropped", "discarded", "verdicts", "link", "qdisc", "driver"];

/// Checks that an answer has what the document shows, of the same kinds.
#[track_caller]
fn check(shown: &Value, real: &Value, path: &str) {
    match (shown, real) {
        (Value::Object(shown), Value::Object(real)) => {
            if MAPS.iter().any(|map| path.ends_with(map)) {
                return;
            }
            for (key, value) in shown {
                let there = real.get(key).unwrap_or_else(|| panic!("there is no {path}.{key} in {real:#?}"));
                check(value, there, &format!("{path}.{key}"));
            }
        }
        (Value::Array(shown), Value::Array(real)) => {
            if let (Some(shown), Some(real)) = (shown.first(), real.first()) {
                check(shown, real, &format!("{path}[]"));
            }
        }
        (Value::Null, _)
        | (_, Value::Null)
        | (Value::String(_), Value::String(_))
        | (Value::Number(_), Value::Number(_))
        | (Value::Bool(_), Value::Bool(_)) => {}
        _ => panic!("{path} is {real}, the document shows {shown}"),
    }
}

/// Checks that what the document shows is all that there is, and nothing else.
#[track_caller]
fn check_whole<T: Serialize + DeserializeOwned>(shown: &Value) {
    let typed: T = serde_json::from_value(shown.clone()).unwrap_or_else(|error| panic!("{error}: {shown:#}"));
    assert_eq!(serde_json::to_value(typed).expect("JSON"), *shown);
}

struct Connection(BufReader<UnixStream>);

impl Connection {
    fn new(relay: &Relay) -> Self {
        let stream = UnixStream::connect(relay.control()).expect("the daemon listens");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        Self(BufReader::new(stream))
    }

    fn send(&mut self, line: &str) {
        self.0.get_mut().write_all(format!("{line}\n").as_bytes()).expect("the daemon reads");
    }

    #[track_caller]
    fn receive(&mut self) -> Value {
        let mut line = String::new();
        self.0.read_line(&mut line).expect("a line");
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}"))
    }
}

#[test]
fn the_examples_are_answered_as_the_document_shows() {
    let site = Site::default();
    let etc = site.scratch.dir().join("etc");
    fs::create_dir_all(etc.join("rules.d")).expect("a directory of the test's");
    fs::write(etc.join("mcr.toml"), "").expect("a file of the test's");
    let file = etc.join("mcr.toml");
    let mut relay = Relay::start_with(&site, &["--config", file.to_str().expect("a plain path")]);
    let mut connection = Connection::new(&relay);
    for example in examples() {
        connection.send(&example.request);
        for (place, shown) in example.answers.iter().enumerate() {
            if place == 1 {
                // What the notification is of.
                relay.remove("cam4");
            }
            check(shown, &connection.receive(), &example.method());
        }
        if example.method() == "rule.add" {
            relay.wait_until_active("cam1");
        }
        if example.method() == "events.subscribe" {
            connection = Connection::new(&relay);
        }
    }
    assert!(relay.wait(PATIENCE).success());
}

#[test]
fn the_examples_show_every_field() {
    for example in examples() {
        let shown = &example.answers[0]["result"];
        match example.method().as_str() {
            "ping" => check_whole::<Pong>(shown),
            "status" => check_whole::<Status>(shown),
            "rule.add" => check_whole::<RuleOutcome>(shown),
            "stats" => check_whole::<Stats>(shown),
            "workers" => check_whole::<WorkerList>(shown),
            "config.show" => check_whole::<ConfigText>(shown),
            "config.load" => check_whole::<ConfigOutcome>(shown),
            "config.save" => check_whole::<ConfigSaved>(shown),
            "log_level.get" | "log_level.set" => check_whole::<LogLevelInfo>(shown),
            "stop" => check_whole::<Stopping>(shown),
            "events.subscribe" => {
                check_whole::<Subscribed>(shown);
                check_whole::<Event>(&example.answers[1]["params"]);
            }
            _ => {}
        }
    }
}

/// The names that an enum of the source gives its variants.
fn names<'a>(source: &'a str, head: &str) -> Vec<&'a str> {
    let (_, body) = source.split_once(head).expect("the enum is there");
    let (body, _) = body.split_once("\n}").expect("it ends");
    let lines = body.lines().filter_map(|line| line.strip_prefix("    #[serde(rename = \""));
    lines.filter_map(|line| line.split('"').next()).collect()
}

#[test]
fn every_method_event_and_code_is_in_the_document() {
    let methods = names(WIRE, "pub enum Request {");
    assert!(methods.len() >= 18, "{methods:?}");
    for method in methods {
        assert!(DOCUMENT.contains(&format!("\n### `{method}`\n")), "{method}");
        assert!(examples().iter().any(|example| example.method() == method), "{method} has no example");
    }
    let events = names(EVENTS, "pub enum Occurrence {");
    assert!(events.len() >= 20, "{events:?}");
    let rows: Vec<_> = DOCUMENT.lines().filter(|line| line.starts_with("| `")).collect();
    for event in events {
        let named =
            |row: &&&str| row.split(" | ").next().is_some_and(|cell| cell.contains(&format!("`{event}`")));
        assert!(rows.iter().find(named).is_some(), "{event}");
    }
    let codes =
        WIRE.lines().filter_map(|line| line.trim().strip_prefix("pub const ")?.split_once(": i32 = "));
    let codes: Vec<_> = codes.map(|(name, code)| (name, code.trim_end_matches(';'))).collect();
    assert_eq!(codes.len(), 8);
    for (name, code) in codes {
        assert!(DOCUMENT.contains(&format!("\n| {code} | ")), "{name}");
    }
}

#[test]
fn the_programs_of_the_document_run() {
    let site = Site::default();
    let relay = Relay::start(&site);
    relay.add("cam1", "239.1.1.1:5000@in0", &["239.2.2.2:6000@out0"]);
    let run = |program: &str, text: &str| {
        let text = text.replace("/run/mcr/mcr.sock", relay.control().to_str().expect("a plain path"));
        let answer = Process::spawn(Command::new(program).args(["-c", &text])).answer(CALL);
        answer.ok().to_owned()
    };
    let (shell, python) = (blocks("sh"), blocks("python"));
    assert_eq!((shell.len(), python.len()), (1, 1));
    let pong: Value = serde_json::from_str(&run("sh", &shell[0])).expect("an answer");
    assert_eq!(pong["result"]["pid"], relay.pid());
    assert_eq!(run("python3", &python[0]), "cam1 0.0 0.0\n");
}
