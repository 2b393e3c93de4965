//! The control socket under many calls and bad company.

use std::{
    fs,
    io::{Read, Write},
    net::SocketAddrV4,
    os::unix::net::UnixStream,
    time::{Duration, Instant},
};

use serde_json::Value;
use tests::{
    Process, Relay, Site, Source, capture::assert_sequence, relay::CALL, source::Stream, wait_until,
};

const INPUT: &str = "239.1.1.1:5000";
const OUTPUT: &str = "239.2.2.2:6000";

fn at(address: &str) -> SocketAddrV4 {
    address.parse().expect("address:port")
}

/// Open descriptors and threads of a process.
fn resources(pid: u32) -> (usize, usize) {
    let count = |dir: &str| fs::read_dir(format!("/proc/{pid}/{dir}")).expect("the daemon runs").count();
    (count("fd"), count("task"))
}

/// A relay of one stream, which must lose nothing while `disturb` does its worst.
fn undisturbed(disturb: impl FnOnce(&Relay)) {
    let site = Site::default();
    let relay = Relay::start(&site);
    relay.add("cam1", &format!("{INPUT}@in0"), &[&format!("{OUTPUT}@out0")]);
    site.segments[0].wait_until_joined(*at(INPUT).ip());
    let mut sink = site.capture(0);
    let before = resources(relay.pid());
    let source = Source::start(site.source(), Stream::to(at(INPUT)));
    disturb(&relay);
    source.wait_for_more(500);
    let sent = source.stop();
    assert_eq!(relay.balanced("cam1", sent).outputs[0].sent, sent);
    assert_sequence(&sink.exactly(at(OUTPUT), sent as usize), 0..sent);
    wait_until("the daemon has closed what its clients left", Duration::from_secs(5), || {
        let now = resources(relay.pid());
        now.0 <= before.0 && now.1 <= before.1
    });
    assert!(!relay.log().contains("panicked"), "{}", relay.log());
}

#[test]
fn a_thousand_calls_in_a_row_leave_the_daemon_well() {
    undisturbed(|relay| {
        for i in 0..1_000 {
            let answer = match i % 4 {
                0 => relay.cli(&["ping"]),
                1 => relay.cli(&["rule", "list", "--json"]),
                2 => relay.cli(&["stats", "--json"]),
                _ => relay.cli(&["status"]),
            };
            assert!(!answer.ok().is_empty(), "call {i}: {answer}");
        }
    });
}

#[test]
fn fifty_calls_at_once_are_all_answered() {
    undisturbed(|relay| {
        let calls: Vec<_> = (0..50)
            .map(|i| {
                let name = format!("rule{i}");
                let input = format!("239.7.0.{i}:5000@in0");
                let output = format!("239.8.0.{i}:6000@out1");
                let call = match i % 3 {
                    0 => vec!["rule", "add", &name, "--in", &input, "--out", &output],
                    1 => vec!["stats"],
                    _ => vec!["workers"],
                };
                Process::spawn(&mut relay.call(&[&call[..], &["--json"]].concat()))
            })
            .collect();
        for call in calls {
            call.answer(CALL).json::<Value>();
        }
        for i in (0..50).step_by(3) {
            relay.remove(&format!("rule{i}"));
        }
    });
}

#[test]
fn bad_clients_disturb_no_one() {
    undisturbed(|relay| {
        let says: [&[u8]; 6] = [
            b"",
            b"GET / HTTP/1.1\r\n\r\n\x00\xff\xfe garbage\n",
            br#"{"jsonrpc":"2.0","id":1,"method":"pi"#,
            b"{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"no.such\"}\n",
            b"[1,2,3]\n{}\nnull\n\"ping\"\n",
            &vec![b'x'; 1 << 20],
        ];
        let mut open = Vec::new();
        for words in says.iter().cycle().take(96) {
            let mut client = UnixStream::connect(relay.control()).expect("connect");
            client.set_write_timeout(Some(Duration::from_secs(2))).expect("a timeout");
            // A daemon that has heard enough may hang up.
            let _refused = client.write_all(words);
            open.push(client);
        }
        for _ in 0..20 {
            let start = Instant::now();
            relay.cli(&["ping"]).ok();
            assert!(start.elapsed() < Duration::from_secs(1), "ping took {:?}", start.elapsed());
        }
        relay.add("more", "239.1.1.7:5000@in0", &["239.2.2.7:6000@out1"]);
        relay.remove("more");
        drop(open);
    });
}

#[test]
fn garbage_is_answered_by_an_error_and_a_request_by_an_answer() {
    let site = Site::default();
    let relay = Relay::start(&site);
    let ask = |request: &str| -> Value {
        let mut client = UnixStream::connect(relay.control()).expect("connect");
        client.set_read_timeout(Some(Duration::from_secs(5))).expect("a timeout");
        client.write_all(request.as_bytes()).expect("write");
        let (mut line, mut byte) = (Vec::new(), [0]);
        while client.read(&mut byte).is_ok_and(|n| n == 1) && byte[0] != b'\n' {
            line.push(byte[0]);
        }
        serde_json::from_slice(&line)
            .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&line)))
    };
    let pong = ask("{\"jsonrpc\":\"2.0\",\"id\":7,\"method\":\"ping\"}\n");
    assert_eq!((&pong["jsonrpc"], &pong["id"]), (&"2.0".into(), &7.into()));
    assert_eq!(pong["result"]["pid"], relay.pid());
    for (request, code) in [
        ("not json\n", -32700),
        ("[]\n", -32600),
        ("{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"no.such\"}\n", -32601),
        ("{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"rule.show\",\"params\":{\"nam\":\"x\"}}\n", -32602),
        ("{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"rule.show\",\"params\":{\"name\":\"x\"}}\n", -32001),
    ] {
        assert_eq!(ask(request)["error"]["code"], code, "{request}");
    }
    for (sources, words) in [
        ("[]", "sources is empty"),
        (r#"[{"file":"x\n\u001b[31m","text":""}]"#, "sources[0].file has a control character"),
    ] {
        let load = r#"{"jsonrpc":"2.0","id":1,"method":"config.load","params":{"sources":"#;
        let answer = ask(&format!("{load}{sources}}}}}\n"));
        let message = answer["error"]["message"].as_str().expect("it is refused");
        assert!(message.contains(words) && message.lines().count() == 1, "{message}");
    }
}

#[test]
fn a_client_that_hangs_up_before_its_answer_disturbs_no_one() {
    undisturbed(|relay| {
        for _ in 0..200 {
            let mut client = UnixStream::connect(relay.control()).expect("connect");
            // Beyond the connections that the daemon serves at once, it hangs up first.
            let _refused = client.write_all(b"{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"stats\"}\n");
        }
        wait_until("a call is answered", Duration::from_secs(1), || relay.cli(&["ping"]).status == 0);
    });
}
