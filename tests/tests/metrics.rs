//! Metrics, liveness and readiness by HTTP: exact, and no way to disturb the daemon. What is shipped for Prometheus
//! and Grafana is checked by Prometheus' own tools.

#![expect(clippy::unwrap_used, reason = "where it fails, the test fails and says where")]
#![expect(clippy::float_cmp, reason = "a count is a whole number, exact as a float")]

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    fs,
    io::{Read, Write},
    net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream},
    os::unix::{
        fs::MetadataExt,
        net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use mcr::api::wire::{ConfigOutcome, Pong, Request, Status};
use nix::{
    sys::{
        ptrace,
        signal::{Signal, kill},
        wait::waitpid,
    },
    unistd::Pid,
};
use tests::{
    Ground, Namespace, Process, Relay, Site, Source,
    relay::{interface_balances, lost, outputs_balance, unaccounted},
    site::Plan,
    source::Stream,
    wait::PATIENCE,
    wait_for, wait_until,
};

const GROUP: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(239, 1, 1, 1), 5000);
const PORT: u16 = 9464;
const PORT_TEXT: &str = "9464";

fn here() -> SocketAddr {
    (Ipv4Addr::LOCALHOST, PORT).into()
}

/// An answer by HTTP.
#[derive(Debug)]
struct Reply {
    status: u16,
    head: String,
    body: String,
}

impl Reply {
    #[track_caller]
    fn read(mut stream: impl Read) -> Self {
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).unwrap();
        let text = String::from_utf8(bytes).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no answer: {text:?}"));
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
        Self { status: status.unwrap(), head: head.to_owned(), body: body.to_owned() }
    }
}

fn connect(from: &Namespace, to: SocketAddr) -> std::io::Result<TcpStream> {
    let stream = from.run(|| TcpStream::connect_timeout(&to, Duration::from_secs(5)))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    Ok(stream)
}

#[track_caller]
fn ask(from: &Namespace, to: SocketAddr, request: &str) -> Reply {
    let mut stream = connect(from, to).unwrap();
    stream.write_all(request.as_bytes()).unwrap();
    Reply::read(stream)
}

#[track_caller]
fn get(site: &Site, path: &str) -> Reply {
    ask(&site.relay, here(), &format!("GET {path} HTTP/1.1\r\nHost: mcr\r\n\r\n"))
}

/// The samples of a page, by what stands before the value.
struct Scrape {
    page: String,
    samples: BTreeMap<String, f64>,
}

impl Scrape {
    #[track_caller]
    fn of(site: &Site) -> Self {
        let reply = get(site, "/metrics");
        assert_eq!(reply.status, 200, "{reply:?}");
        let mut samples = BTreeMap::new();
        for line in reply.body.lines().filter(|line| !line.starts_with('#')) {
            let (series, value) = line.rsplit_once(' ').unwrap();
            let former = samples.insert(series.to_owned(), value.parse().unwrap());
            assert_eq!(former, None, "{series} is there twice");
        }
        Self { page: reply.body, samples }
    }

    #[track_caller]
    fn get(&self, series: &str) -> f64 {
        *self.samples.get(series).unwrap_or_else(|| panic!("no {series} in\n{}", self.page))
    }

    /// A count.
    #[track_caller]
    #[expect(clippy::cast_sign_loss, clippy::cast_possible_truncation, reason = "counts of a test are small")]
    fn count(&self, series: &str) -> u64 {
        self.get(series) as u64
    }

    /// The series of a metric, with their values.
    fn all(&self, metric: &str) -> impl Iterator<Item = (&str, f64)> {
        let its = self.samples.iter().filter(move |(series, _)| name_of(series) == metric);
        its.map(|(series, value)| (series.as_str(), *value))
    }

    fn names(&self) -> BTreeSet<&str> {
        self.samples.keys().map(|series| name_of(series)).collect()
    }
}

fn name_of(series: &str) -> &str {
    series.split('{').next().unwrap_or(series)
}

fn series(metric: &str, labels: &[(&str, &str)]) -> String {
    let labels: Vec<_> = labels.iter().map(|(label, value)| format!("{label}=\"{value}\"")).collect();
    format!("{metric}{{{}}}", labels.join(","))
}

fn start(site: &Site) -> Relay<'_> {
    Relay::start_with(site, &["--metrics", PORT_TEXT])
}

#[expect(clippy::cast_precision_loss, reason = "counts of a test are small")]
fn as_value(count: u64) -> f64 {
    count as f64
}

const SENT: &str = "239.2.2.2:6000@out0";
const DROPPED: &str = "239.2.2.3:6000@out1,ttl=dec";

/// 1,000 datagrams to two outputs, of which one drops all but ten: their TTL is over.
fn a_scrape_counts_exactly_what_came_and_went() {
    let site = Site::default();
    let relay = start(&site);
    relay.add("cam1", "239.1.1.1:5000@in0", &[SENT, DROPPED]);
    site.segments[0].wait_until_joined(*GROUP.ip());
    let fresh = Scrape::of(&site);
    // All that can be dropped is there before anything is.
    let reasons = |scrape: &Scrape| {
        let drops = scrape.all("mcr_drops_total").chain(scrape.all("mcr_interface_drops_total"));
        drops.map(|(series, count)| (series.to_owned(), count)).collect::<BTreeMap<_, _>>()
    };
    assert!(reasons(&fresh).values().all(|count| *count == 0.0), "{}", fresh.page);
    assert_eq!(fresh.all("mcr_drops_total").count(), 4 + 2 * 10);
    assert_eq!(fresh.all("mcr_rule_last_packet_timestamp_seconds").count(), 0);
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64();
    let before = now();
    Source::play(site.source(), Stream { count: 990, ttl: 1, size: 500, ..Stream::to(GROUP) });
    Source::play(site.source(), Stream { count: 10, ttl: 2, size: 100, ..Stream::to(GROUP) });
    relay.balanced("cam1", 1_000);
    let after = now();

    let expired =
        series("mcr_drops_total", &[("rule", "cam1"), ("output", DROPPED), ("reason", "ttl_expired")]);
    let scrape = wait_for("the page tells of the last datagram", PATIENCE, || {
        Some(Scrape::of(&site)).filter(|scrape| scrape.get(&expired) == 990.0)
    });
    let rule = [("rule", "cam1")];
    let of_rule = |metric: &str| scrape.count(&series(metric, &rule));
    let of = |metric: &str, output| scrape.count(&series(metric, &[("rule", "cam1"), ("output", output)]));
    let bytes = 990 * 500 + 10 * 100;
    assert_eq!(of_rule("mcr_rule_matched_packets_total"), 1_000);
    assert_eq!(of_rule("mcr_rule_received_packets_total"), 1_000);
    assert_eq!(of_rule("mcr_rule_received_bytes_total"), bytes);
    assert_eq!(of("mcr_output_received_packets_total", SENT), 1_000);
    assert_eq!(of("mcr_output_sent_packets_total", SENT), 1_000);
    assert_eq!(of("mcr_output_sent_bytes_total", SENT), bytes);
    assert_eq!(of("mcr_output_received_packets_total", DROPPED), 1_000);
    assert_eq!(of("mcr_output_sent_packets_total", DROPPED), 10);
    assert_eq!(of("mcr_output_sent_bytes_total", DROPPED), 1_000);
    assert_eq!((of("mcr_output_up", SENT), of("mcr_output_up", DROPPED)), (1, 1));
    let last = scrape.get(&series("mcr_rule_last_packet_timestamp_seconds", &rule));
    // The kernel's own is as exact as it is looked up.
    assert!((before - 0.1..=after + 1.0).contains(&last), "{before} {last} {after}");
    // The same that were there before, and nothing else was dropped.
    let mut expected = reasons(&fresh);
    expected.insert(expired, 990.0);
    assert_eq!(reasons(&scrape), expected);

    let datapath = Ground::current().datapath();
    let info = series(
        "mcr_rule_info",
        &[("rule", "cam1"), ("datapath", datapath), ("origin", "cli"), ("input", "239.1.1.1:5000@in0")],
    );
    assert_eq!(scrape.count(&info), 1);
    for (state, is) in [("active", 1), ("pending", 0), ("failed", 0)] {
        assert_eq!(scrape.count(&series("mcr_rule_state", &[("rule", "cam1"), ("state", state)])), is);
        assert_eq!(scrape.count(&series("mcr_health", &[("state", state)])), is);
    }
    assert_eq!((of_rule("mcr_rule_stalled"), scrape.count("mcr_ledger_alarms")), (0, 0));
    assert_eq!(scrape.count("mcr_memberships{interface=\"in0\"}"), 1);
    if datapath != "redirect" {
        let of_interface =
            |metric: &str| scrape.count(&series(metric, &[("interface", "in0"), ("datapath", datapath)]));
        assert_eq!(of_interface("mcr_interface_steered_frames_total"), 1_000);
        assert_eq!(of_interface("mcr_interface_received_frames_total"), 1_000);
        let worker = &relay.workers()[0].id;
        let of_worker = |metric: &str| scrape.count(&series(metric, &[("worker", worker)]));
        assert_eq!(of_worker("mcr_worker_received_frames_total"), 1_000);
        assert_eq!((of_worker("mcr_worker_up"), of_worker("mcr_worker_restarts_total")), (1, 0));
    }
}

fn counters_only_go_on_when_a_worker_is_killed() {
    let site = Site::default();
    let relay = start(&site);
    relay.add("cam1", "239.1.1.1:5000@in0", &[SENT]);
    site.segments[0].wait_until_joined(*GROUP.ip());
    let source = Source::start(site.source(), Stream { rate: 5_000, ..Stream::to(GROUP) });
    source.wait_for_more(1_000);
    let mut before = Scrape::of(&site);
    let mut look = || {
        let now = Scrape::of(&site);
        for (series, value) in before.samples.iter().filter(|(series, _)| name_of(series).ends_with("_total"))
        {
            let later = now.get(series);
            assert!(later >= *value, "{series} went from {value} to {later}");
        }
        before = now;
        before.all("mcr_worker_restarts_total").map(|(_, count)| count).sum::<f64>()
    };
    let up = |scrape: &Scrape| scrape.all("mcr_worker_up").all(|(_, up)| up == 1.0);
    for deaths in [1.0, 2.0] {
        kill(Pid::from_raw(relay.workers()[0].pid.unwrap().cast_signed()), Signal::SIGKILL).unwrap();
        wait_until("the restart is counted", PATIENCE, || look() == deaths);
        wait_until("the worker is up", PATIENCE, || {
            look();
            up(&Scrape::of(&site))
        });
        source.wait_for_more(1_000);
    }
    assert!(source.stop() > 0);
    wait_until("all that came is accounted for", PATIENCE, || {
        look();
        let (rule, interface) = (relay.rule("cam1"), relay.interface("in0"));
        let shown = series("mcr_rule_received_packets_total", &[("rule", "cam1")]);
        outputs_balance(&rule)
            && interface_balances(&interface)
            && unaccounted(&rule) <= lost(&interface)
            && Scrape::of(&site).get(&shown) == as_value(rule.received)
    });
}

#[test]
fn a_port_alone_is_served_to_this_host_alone() {
    let site = Site::default();
    let at = |site: &Site, k: usize| SocketAddr::from((site.sinks[k].relay_address, PORT));
    let relay = start(&site);
    assert_eq!(get(&site, "/healthz").status, 200);
    assert!(relay.log().contains("metrics=127.0.0.1:9464"), "{}", relay.log());
    for (from, to) in [(&site.sinks[0].host, at(&site, 0)), (&site.relay, at(&site, 0))] {
        let error = connect(from, to).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused);
    }
    drop(relay);
    let relay = Relay::start_with(&site, &["--metrics", "0.0.0.0:9464"]);
    let reply = ask(&site.sinks[0].host, at(&site, 0), "GET /readyz HTTP/1.1\r\n\r\n");
    assert_eq!((reply.status, &reply.body[..]), (200, "ready\n"));
    drop(relay);
    site.relay.sysctl("ipv6/conf/lo/disable_ipv6", "0");
    let relay = Relay::start_with(&site, &["--metrics", "[::1]:9464"]);
    let reply = ask(&site.relay, "[::1]:9464".parse().unwrap(), "GET /healthz HTTP/1.1\r\n\r\n");
    assert_eq!((reply.status, &reply.body[..]), (200, "alive\n"));
    drop(relay);
    // By default nothing listens.
    let _relay = Relay::start(&site);
    assert_eq!(site.relay.output("ss", &["-Hltn"]), "");
}

#[test]
fn a_unix_socket_is_served_and_goes_with_the_daemon() {
    let site = Site::default();
    let path = site.scratch.dir().join("metrics.sock");
    let address = format!("unix:{}", path.display());
    let ask = || {
        let mut stream = UnixStream::connect(&path).unwrap();
        stream.write_all(b"GET /metrics HTTP/1.1\r\n\r\n").unwrap();
        Reply::read(stream)
    };
    let mut relay = Relay::start_with(&site, &["--metrics", &address]);
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o660);
    let reply = ask();
    assert!(reply.status == 200 && reply.body.contains("mcr_build_info"), "{reply:?}");
    // What a killed one left is in nobody's way.
    relay.signal(Signal::SIGKILL);
    relay.wait(PATIENCE);
    assert!(path.exists());
    relay.start_again_with(&site, &["--metrics", path.to_str().unwrap()]);
    assert_eq!(ask().status, 200);
    relay.cli(&["stop"]).ok();
    assert!(relay.wait(PATIENCE).success());
    assert!(!path.exists());
}

#[test]
fn an_address_that_cannot_be_had_is_refused_at_start() {
    let site = Site::default();
    let dir = site.scratch.dir();
    let taken = site.relay.run(|| TcpListener::bind(here())).unwrap();
    let socket = dir.join("taken.sock");
    let listening = UnixListener::bind(&socket).unwrap();
    let file = dir.join("precious");
    fs::write(&file, "precious").unwrap();
    for (address, why) in [
        (PORT_TEXT.to_owned(), "127.0.0.1:9464: another program listens there"),
        ("192.0.2.1:9464".to_owned(), "192.0.2.1:9464: it is no address of this host"),
        (
            "127.0.0.1:80".to_owned(),
            "Permission denied (os error 13) (a port from 1024 on takes no privilege)",
        ),
        (format!("unix:{}", socket.display()), "another program listens there"),
        (format!("unix:{}", file.display()), "there is something else than a socket"),
        ("/no/such/directory/metrics.sock".to_owned(), "No such file or directory"),
    ] {
        let line = Relay::refused(Relay::command(&site).args(["--metrics", &address]));
        assert!(line.starts_with("mcr: metrics cannot be served on "), "{line}");
        assert!(line.contains(why) && line.ends_with("; choose another --metrics"), "{line}");
    }
    assert_eq!(fs::read_to_string(&file).unwrap(), "precious");
    drop((taken, listening));
    let answer = Process::spawn(Relay::command(&site).args(["--metrics", "::1:9464"])).answer(PATIENCE);
    assert!(answer.status == 2 && answer.stderr.contains("write a port"), "{answer}");
    let _relay = start(&site);
    assert_eq!(get(&site, "/healthz").status, 200);
}

#[test]
fn a_file_says_where_and_a_load_says_that_it_takes_a_restart() {
    let site = Site::default();
    let file = site.scratch.dir().join("mcr.toml");
    let path = file.to_str().unwrap();
    fs::write(&file, "[daemon]\nmetrics = \":9464\"\n").unwrap();
    let relay = Relay::start_with(&site, &["--config", path]);
    assert_eq!(get(&site, "/healthz").status, 200);
    assert!(relay.json::<ConfigOutcome>(&["config", "diff", path]).settings.is_empty());
    fs::write(&file, "[daemon]\nmetrics = \"unix:/run/mcr/metrics.sock\"\n").unwrap();
    let words = "~ [daemon] metrics: \"unix:/run/mcr/metrics.sock\" instead of \"127.0.0.1:9464\", from the next \
                 start on";
    let said = relay.cli(&["config", "diff", path]);
    assert!(said.ok().contains(words), "{said}");
    relay.cli(&["config", "load", path]).ok();
    assert_eq!(get(&site, "/healthz").status, 200);
    fs::write(&file, "[daemon]\nmetrics = \"here\"\n").unwrap();
    let said = relay.cli(&["config", "check", path]);
    assert!(said.stdout.contains("'metrics' cannot be 'here': write a port"), "{said}");
}

#[test]
fn other_requests_are_answered_by_what_is_wrong_with_them() {
    let site = Site::default();
    let _relay = start(&site);
    let long = format!("GET /metrics HTTP/1.1\r\nX-Long: {}\r\n\r\n", "x".repeat(1 << 20));
    for (request, status) in [
        ("GET /metrics HTTP/1.0\r\n\r\n", 200),
        ("GET /metrics?name=x HTTP/1.1\r\nConnection: keep-alive\r\n\r\n", 200),
        ("GET / HTTP/1.1\r\n\r\n", 404),
        ("GET /metrics/../etc/passwd HTTP/1.1\r\n\r\n", 404),
        ("POST /metrics HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello", 405),
        ("DELETE /readyz HTTP/1.1\r\n\r\n", 405),
        ("{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"stop\"}\n", 400),
        ("\x16\x03\x01\x02\x01\x01", 400),
        (&long, 431),
    ] {
        let mut stream = connect(&site.relay, here()).unwrap();
        // A server that has heard enough hangs up.
        let _refused = stream.write_all(request.as_bytes());
        assert_eq!(Reply::read(stream).status, status, "{}", request.chars().take(80).collect::<String>());
    }
    let head = ask(&site.relay, here(), "HEAD /healthz HTTP/1.1\r\n\r\n");
    assert!(head.status == 200 && head.body.is_empty(), "{head:?}");
    assert!(head.head.contains("Content-Length: 6"), "{head:?}");
    let open = "GET /metrics HTTP/1.1\r\nAccept: application/openmetrics-text; version=1.0.0\r\n\r\n";
    let open = ask(&site.relay, here(), open);
    assert!(open.head.contains("Content-Type: application/openmetrics-text; version=1.0.0"), "{}", open.head);
    assert!(open.body.contains("# TYPE mcr_build info\nmcr_build_info{"), "{}", open.body);
    assert!(open.body.ends_with("# EOF\n"), "{}", open.body);
    let plain = get(&site, "/metrics");
    assert!(plain.head.contains("Content-Type: text/plain; version=0.0.4"), "{}", plain.head);
    assert!(plain.body.contains("# TYPE mcr_build_info gauge\n"), "{}", plain.body);
}

#[test]
fn idle_and_slow_clients_disturb_no_one() {
    let site = Site::default();
    let relay = start(&site);
    relay.add("cam1", "239.1.1.1:5000@in0", &[SENT]);
    site.segments[0].wait_until_joined(*GROUP.ip());
    let descriptors = || fs::read_dir(format!("/proc/{}/fd", relay.pid())).unwrap().count();
    let before = descriptors();
    let source = Source::start(site.source(), Stream { rate: 2_000, ..Stream::to(GROUP) });
    let mut clients = Vec::new();
    for n in 0..200 {
        let mut client = connect(&site.relay, here()).unwrap();
        if n % 2 == 0 {
            // The daemon may have no room for it any more.
            let _refused = client.write_all(b"GET /metrics HTTP/1.1\r\nX-Slow: ");
        }
        clients.push(client);
    }
    let took = |what: &dyn Fn()| {
        let start = Instant::now();
        what();
        start.elapsed()
    };
    for _ in 0..20 {
        let page = took(&|| assert_eq!(get(&site, "/metrics").status, 200));
        let ping = took(&|| assert!(relay.cli(&["ping"]).status == 0));
        assert!(page < Duration::from_secs(1) && ping < Duration::from_secs(1), "{page:?} {ping:?}");
    }
    assert!(descriptors() <= before + 17, "{before} descriptors, and then {}", descriptors());
    // Who has sent half a request is not waited for.
    wait_until("all are hung up on", PATIENCE, || descriptors() <= before);
    drop(clients);
    let sent = source.stop();
    assert_eq!(relay.balanced("cam1", sent).outputs[0].sent, sent);
    assert!(!relay.log().contains("panicked"), "{}", relay.log());
}

#[test]
fn readiness_is_what_status_says() {
    let site = Site::default();
    let relay = start(&site);
    assert_eq!(get(&site, "/readyz").status, 200);
    relay.add("cam1", "239.1.1.1:5000@in0", &[SENT]);
    let ready = |status: u16| {
        let what = format!("/readyz answers {status}");
        wait_for(&what, PATIENCE, || Some(get(&site, "/readyz")).filter(|reply| reply.status == status)).body
    };
    assert_eq!(ready(200), "ready\n");
    site.relay.ip(&["link set in0 down"]);
    let body = ready(503);
    let status: Status = relay.json(&["status"]);
    let said = status.problems.iter().flat_map(|its| [&its.what, "\n  next: ", &its.next, "\n"]);
    assert_eq!(body, said.collect::<String>());
    assert!(body.contains("in0 is down") && body.contains("next: mcr rule show cam1"), "{body}");
    assert_eq!(get(&site, "/healthz").status, 200);
    site.relay.ip(&["link set in0 up"]);
    assert_eq!(ready(200), "ready\n");
    // An output that waits is said, too.
    site.relay.ip(&["link set out0 down"]);
    assert!(ready(503).contains("out0 is down"));
    let up = series("mcr_output_up", &[("rule", "cam1"), ("output", SENT)]);
    wait_until("the output is not up", PATIENCE, || Scrape::of(&site).get(&up) == 0.0);
    site.relay.ip(&["link set out0 up"]);
    ready(200);
}

#[test]
fn a_supervisor_that_is_held_up_is_told_of() {
    let site = Site::default();
    let relay = start(&site);
    assert_eq!(get(&site, "/healthz").body, "alive\n");
    // Of the daemon's threads only this one is stopped.
    let supervisor = Pid::from_raw(relay.pid().cast_signed());
    ptrace::attach(supervisor).unwrap();
    waitpid(supervisor, None).unwrap();
    for path in ["/healthz", "/readyz", "/metrics"] {
        let start = Instant::now();
        let reply = get(&site, path);
        assert_eq!((reply.status, &reply.body[..]), (503, "the supervisor does not answer\n"), "{path}");
        assert!(start.elapsed() < Duration::from_secs(4), "{path} took {:?}", start.elapsed());
    }
    ptrace::detach(supervisor, None).unwrap();
    for path in ["/healthz", "/readyz", "/metrics"] {
        assert_eq!(get(&site, path).status, 200, "{path}");
    }
}

#[test]
fn the_thread_that_serves_has_no_capability() {
    let site = Site::default();
    let relay = start(&site);
    assert_eq!(get(&site, "/metrics").status, 200);
    let tasks = fs::read_dir(format!("/proc/{}/task", relay.pid())).unwrap();
    let mut statuses = tasks.map(|task| fs::read_to_string(task.unwrap().path().join("status")).unwrap());
    let status = statuses.find(|status| status.starts_with("Name:\tmcr-metrics\n")).unwrap();
    for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
        assert!(status.contains(&format!("{set}:\t0000000000000000\n")), "{status}");
    }
    assert!(status.contains("NoNewPrivs:\t1\n"), "{status}");
}

/// A daemon of which a scrape has something of every metric.
fn with_all(site: &Site, check: impl FnOnce(&Relay<'_>, &Scrape)) {
    let relay = start(site);
    relay.add("cam1", "239.1.1.1:5000@in0", &[SENT, DROPPED]);
    // An interface may have such a name.
    relay.cli(&["rule", "add", "odd", "--in", r#"239.1.1.9:5000@a"b\c"#, "--out", SENT, "--merge"]).ok();
    site.segments[0].wait_until_joined(*GROUP.ip());
    Source::play(site.source(), Stream { count: 100, ..Stream::to(GROUP) });
    relay.balanced("cam1", 100);
    let last = series("mcr_rule_last_packet_timestamp_seconds", &[("rule", "cam1")]);
    let scrape = wait_for("the page tells of the datagrams", PATIENCE, || {
        Some(Scrape::of(site)).filter(|scrape| scrape.samples.contains_key(&last))
    });
    check(&relay, &scrape);
}

fn project() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

fn packaging(file: &str) -> PathBuf {
    project().join("packaging").join(file)
}

#[test]
fn the_list_in_the_docs_is_what_a_scrape_has() {
    let site = Site::default();
    with_all(&site, |_, scrape| {
        let mut had = BTreeMap::new();
        for line in scrape.page.lines().filter_map(|line| line.strip_prefix("# TYPE ")) {
            let (name, kind) = line.split_once(' ').unwrap();
            // Prometheus' own format has no such type.
            let kind = if name.ends_with("_info") { "info" } else { kind };
            let sample = scrape.samples.keys().find(|series| name_of(series) == name);
            let sample = sample.unwrap_or_else(|| panic!("no sample of {name}"));
            // Label names stand before `="`, each after a brace or a comma.
            let labels = sample.split("=\"").filter_map(|part| part.rsplit(['{', ',']).next());
            let count = sample.matches("=\"").count();
            let labels: Vec<_> = labels.take(count).map(|label| format!("`{label}`")).collect();
            had.insert(format!("`{name}`"), (kind.to_owned(), labels.join(", ")));
        }
        let docs = fs::read_to_string(project().join("docs/metrics.md")).unwrap();
        let mut listed = BTreeMap::new();
        for line in docs.lines().filter(|line| line.starts_with("| `mcr_")) {
            let cells: Vec<_> = line.split('|').map(str::trim).collect();
            assert!(!cells[4].is_empty(), "{line}");
            listed.insert(cells[1].to_owned(), (cells[2].to_owned(), cells[3].to_owned()));
        }
        assert_eq!(listed, had);
        assert!(scrape.page.contains(r#"input="239.1.1.9:5000@a\"b\\c""#), "{}", scrape.page);
    });
}

/// A program of Prometheus, which `cargo xtask setup` has put there, or the system has.
fn of_prometheus(program: &str) -> PathBuf {
    let fetched = project().join("target/prometheus/usr/bin").join(program);
    if fetched.exists() { fetched } else { program.into() }
}

#[track_caller]
fn promtool_says(args: &[&str], input: &str) -> String {
    let mut command = Command::new(of_prometheus("promtool"));
    command.args(args).stdin(std::process::Stdio::piped());
    command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
    let missing = "promtool is missing: `cargo xtask setup` fetches it";
    let mut child = command.spawn().unwrap_or_else(|error| panic!("{missing} ({error})"));
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success(), "promtool {args:?}: {said}");
    said
}

/// Words of a text that are names of metrics.
fn metrics_in(text: &str) -> BTreeSet<&str> {
    let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    words.filter(|word| word.starts_with("mcr_")).collect()
}

#[test]
fn a_scrape_the_alerts_and_the_dashboard_pass_the_tools_of_prometheus() {
    let site = Site::default();
    with_all(&site, |_, scrape| {
        assert_eq!(promtool_says(&["check", "metrics"], &scrape.page), "");
        let [rules, tests] = ["prometheus/mcr.rules.yml", "prometheus/mcr.rules.test.yml"].map(packaging);
        let [rules_path, tests_path] = [&rules, &tests].map(|path| path.to_str().unwrap());
        promtool_says(&["check", "rules", rules_path], "");
        promtool_says(&["test", "rules", tests_path], "");
        let (rules, tests) = (fs::read_to_string(&rules).unwrap(), fs::read_to_string(&tests).unwrap());
        for alert in rules.lines().filter_map(|line| line.trim().strip_prefix("- alert: ")) {
            // Each is tried where it is raised, not only where it is not.
            assert!(
                tests.contains(&format!("alertname: {alert}\n        exp_alerts:")),
                "{alert} has no test"
            );
        }

        let dashboard = fs::read_to_string(packaging("grafana/mcr-dashboard.json")).unwrap();
        let dashboard: serde_json::Value = serde_json::from_str(&dashboard).unwrap();
        let mut expressions = String::from("groups:\n- name: dashboard\n  rules:\n");
        for panel in dashboard["panels"].as_array().unwrap() {
            for target in panel["targets"].as_array().unwrap() {
                let expression = target["expr"].as_str().unwrap().replace("$__rate_interval", "1m");
                let expression = serde_json::to_string(&expression).unwrap();
                writeln!(expressions, "  - record: panel{}\n    expr: {expression}", panel["id"]).unwrap();
            }
        }
        let file = site.scratch.dir().join("dashboard.yml");
        fs::write(&file, &expressions).unwrap();
        promtool_says(&["check", "rules", file.to_str().unwrap()], "");
        let variables = dashboard["templating"].to_string();
        for text in [&rules, &tests, &expressions, &variables] {
            let unknown: Vec<_> = metrics_in(text).difference(&scrape.names()).copied().collect();
            assert!(unknown.is_empty(), "no scrape has {unknown:?}");
        }
        assert_eq!(metrics_in(&expressions).len(), 15, "{expressions}");
    });
}

#[test]
fn prometheus_itself_takes_the_pages_and_the_alerts() {
    const AT: &str = "127.0.0.1:9090";
    let site = Site::default();
    with_all(&site, |_, scrape| {
        let (dir, rules) = (site.scratch.dir(), packaging("prometheus/mcr.rules.yml"));
        let configuration = format!(
            "global: {{scrape_interval: 1s, evaluation_interval: 1s}}\nrule_files: [{}]\nscrape_configs:\n\
             - job_name: mcr\n  static_configs: [{{targets: [\"{}\"]}}]\n",
            rules.display(),
            here()
        );
        let file = dir.join("prometheus.yml");
        fs::write(&file, configuration).unwrap();
        let mut command = site.relay.command(of_prometheus("prometheus"));
        command.arg(format!("--config.file={}", file.display()));
        command.arg(format!("--storage.tsdb.path={}", dir.join("data").display()));
        command.arg(format!("--web.listen-address={AT}"));
        let server = Process::spawn(&mut command);
        let query = |expression: &str| -> Option<serde_json::Value> {
            let mut stream = connect(&site.relay, AT.parse().unwrap()).ok()?;
            // By this version the answer comes whole.
            write!(stream, "GET /api/v1/query?query={expression} HTTP/1.0\r\n\r\n").ok()?;
            let reply = Reply::read(stream);
            (reply.status == 200).then(|| serde_json::from_str(&reply.body).unwrap())
        };
        // It asks for OpenMetrics, and refuses a page whole that is not.
        let wait_for_value = |expression: &str, expected: &str| {
            let what = format!("{expression} is {expected}: {}", server.stderr());
            wait_until(&what, PATIENCE, || {
                query(expression).is_some_and(|answer| answer["data"]["result"][0]["value"][1] == expected)
            });
        };
        wait_for_value("up", "1");
        let samples = scrape.samples.len();
        wait_for_value("scrape_samples_scraped", &samples.to_string());
        wait_for_value("ALERTS{alertname=\"McrRulePending\",rule=\"odd\"}", "1");
        let odd = query("mcr_rule_info{rule=\"odd\"}").unwrap();
        assert_eq!(odd["data"]["result"][0]["metric"]["input"], r#"239.1.1.9:5000@a"b\c"#);
    });
}

/// A thousand rules with four outputs each, one of which plays.
#[test]
fn a_thousand_rules_are_scraped_without_holding_up_anyone() {
    let site = Site::build(Plan { sinks: 4, ..Plan::default() });
    let mut rules = format!("[daemon]\nmetrics = \"{PORT}\"\n");
    for n in 0..1_000 {
        let (high, low) = (n / 250 + 1, n % 250 + 1);
        let outputs: Vec<_> =
            (0..4).map(|k| format!("\"239.{}.{high}.{low}:6000@out{k}\"", 10 + k)).collect();
        writeln!(
            rules,
            "[[rule]]\nname = \"stream-{n}\"\nin = \"239.1.{high}.{low}:5000@in0\"\nout = [{}]",
            outputs.join(", ")
        )
        .unwrap();
    }
    let file = site.scratch.dir().join("mcr.toml");
    fs::write(&file, rules).unwrap();
    let relay = Relay::start_with(&site, &["--config", file.to_str().unwrap()]);
    wait_until("every rule is active", Duration::from_mins(1), || get(&site, "/readyz").status == 200);
    site.segments[0].wait_until_joined(*GROUP.ip());
    let source = Source::start(site.source(), Stream { rate: 5_000, ..Stream::to(GROUP) });
    let mut client = relay.client();
    let (mut scrapes, mut pings) = (Vec::new(), Vec::new());
    let mut bytes = 0;
    for _ in 0..10 {
        // A survey serves for a tenth of a second: this is another one.
        let former = Instant::now();
        wait_until("the last survey is old", PATIENCE, || former.elapsed() > Duration::from_millis(150));
        std::thread::scope(|scope| {
            let start = Instant::now();
            let scrape = scope.spawn(|| Scrape::of(&site));
            while !scrape.is_finished() {
                let start = Instant::now();
                client.call::<Pong>(&Request::Ping).unwrap();
                pings.push(start.elapsed());
            }
            let scrape = scrape.join().unwrap();
            scrapes.push(start.elapsed());
            assert_eq!(scrape.all("mcr_drops_total").count(), 1_000 * (4 + 4 * 10));
            bytes = scrape.page.len();
        });
    }
    scrapes.sort();
    pings.sort();
    let (median, worst) = (scrapes[5], *pings.last().unwrap());
    println!("{bytes} bytes in {median:?}, at most {:?}; a ping meanwhile at most {worst:?}", scrapes[9]);
    assert!(median < Duration::from_secs(2), "{scrapes:?}");
    assert!(worst < Duration::from_millis(500), "{worst:?}");
    let sent = source.stop();
    let name =
        relay.stats().rules.into_iter().find(|rule| rule.input.starts_with("239.1.1.1:")).unwrap().name;
    let rule = relay.balanced(&name, sent);
    assert!(rule.outputs.iter().all(|output| output.sent == sent), "{rule:?}");
}

tests::on_both_datapaths!(
    a_scrape_counts_exactly_what_came_and_went,
    counters_only_go_on_when_a_worker_is_killed,
);

tests::by_the_kernel!(a_scrape_counts_exactly_what_came_and_went);

tests::without_bpf!(a_scrape_counts_exactly_what_came_and_went);

tests::as_ordinary_user!(a_scrape_counts_exactly_what_came_and_went);
