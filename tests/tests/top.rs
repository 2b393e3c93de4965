//! `mcr top` on a terminal, beside a daemon that relays.

use std::{fs, net::SocketAddrV4, path::Path};

use mcr::api::client::Client;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tests::{Relay, Site, Source, Terminal, relay::spec, source::Stream, wait::PATIENCE};

const ROWS: u16 = 24;
const COLUMNS: u16 = 100;

/// The line of a rule, a worker or the like.
fn line<'a>(screen: &'a str, start: &str) -> &'a str {
    screen.lines().find(|line| line.starts_with(start)).unwrap_or_default()
}

/// Cells of a line.
fn cells(line: &str) -> Vec<&str> {
    line.split_whitespace().collect()
}

fn bars(line: &str) -> usize {
    line.chars().filter(|letter| ('▁'..='█').contains(letter)).count()
}

/// Rules in the order of the screen.
fn order(screen: &str) -> Vec<&str> {
    let rules = screen.lines().skip_while(|line| !line.starts_with("RULE")).skip(1);
    rules.map_while(|line| line.split_whitespace().next()).collect()
}

/// `cam1` has a stream of 2,000/s, `beta` one of 500/s, `alfa` none.
fn relaying(site: &Site) -> (Relay<'_>, [Source; 2]) {
    let relay = Relay::start(site);
    relay.add_with("cam1", "239.1.1.1:5000@in0", &["239.2.2.2:6000@out0"], &["--datapath", "af-xdp"]);
    relay.add_with("beta", "239.1.1.2:5000@in0", &["239.2.2.3:6000@out0"], &["--datapath", "af-xdp"]);
    relay.add_with("alfa", "239.1.1.3:5000@in0", &["239.2.2.4:6000@out1"], &["--datapath", "af-xdp"]);
    site.segments[0].wait_until_joined([239, 1, 1, 1].into());
    site.segments[0].wait_until_joined([239, 1, 1, 2].into());
    let sources = [play(site, 1, 2_000), play(site, 2, 500)];
    (relay, sources)
}

/// A stream to 239.1.1.`n`.
fn play(site: &Site, n: u8, rate: u64) -> Source {
    let to = SocketAddrV4::new([239, 1, 1, n].into(), 5000);
    Source::start(site.source(), Stream { rate, ..Stream::to(to) })
}

fn top(relay: &Relay, args: &[&str]) -> Terminal {
    let mut terminal = Terminal::start(&mut relay.call(&[&["top"], args].concat()), ROWS, COLUMNS);
    terminal.wait_until_taken();
    terminal
}

/// Ends it by `end`; nothing of it is left on the terminal.
#[track_caller]
fn check_end(relay: &Relay, end: impl FnOnce(&mut Terminal)) {
    let mut idle = Terminal::start(&mut relay.call(&["ping"]), ROWS, COLUMNS);
    idle.wait();
    let modes = idle.modes();
    let mut terminal = top(relay, &[]);
    assert_ne!(terminal.modes(), modes, "keys come one by one");
    terminal.until_text("RULE");
    end(&mut terminal);
    assert_eq!(terminal.wait().code(), Some(0));
    assert!(!terminal.is_taken() && !terminal.hides_cursor());
    assert_eq!(terminal.modes(), modes);
    assert_eq!(terminal.text().trim(), "", "what was there before is there again, and nothing else");
}

#[test]
fn rates_workers_and_drops_are_seen() {
    let site = Site::default();
    let (relay, sources) = relaying(&site);
    let mut terminal = top(&relay, &["--interval", "0.5"]);
    // By rate, and as much goes out as comes in.
    let screen = terminal.until("the rates of both streams", |screen| {
        let (cam1, beta) = (cells(line(screen, "cam1 ")).join(" "), cells(line(screen, "beta ")).join(" "));
        let near = |line: &str, low: f64, high: f64| {
            let words: Vec<_> = line.split(' ').collect();
            let rate = |at: usize| {
                let number: f64 = words.get(at)?.parse().ok()?;
                Some(if *words.get(at + 1)? == "k/s" { 1000.0 * number } else { number })
            };
            [2, 4].iter().all(|at| rate(*at).is_some_and(|rate| (low..high).contains(&rate)))
        };
        near(&cam1, 1_800.0, 2_200.0)
            && near(&beta, 400.0, 600.0)
            && order(screen) == ["cam1", "beta", "alfa"]
    });
    assert!(line(&screen, "mcr ").contains("is working"), "{screen}");
    assert!(
        line(&screen, "cam1: ").contains("239.1.1.1:5000@in0 -> 239.2.2.2:6000@out0 by af-xdp"),
        "{screen}"
    );
    terminal.until("a sparkline and the worker's CPU", |screen| {
        bars(line(screen, "cam1 ")) >= 2 && cells(line(screen, "in0/xdp0")).get(2) == Some(&"%")
    });
    // What is lost has its rate and its reason.
    site.relay.ip(&["link set out0 down"]);
    terminal.until("drops by reason", |screen| {
        let cam1 = line(screen, "cam1 ");
        cam1.contains("pending") && cam1.trim_end().ends_with("pending") && !cam1.contains(" 0 /s pending")
    });
    terminal.until_text("  pending: interface out0 is down");
    site.relay.ip(&["link set out0 up"]);
    terminal.until("it is active again", |screen| line(screen, "cam1 ").contains("active"));
    // A picture, for whoever asks for one.
    if let Some(path) = std::env::var_os("MCR_TOP_PICTURE") {
        drop(sources);
        for rate in [2_000, 3_500, 1_200, 2_800, 3_100].iter().cycle() {
            let _playing = [play(&site, 1, *rate), play(&site, 2, rate / 3)];
            let seen = bars(line(&terminal.text(), "cam1 "));
            if seen >= 30 {
                terminal.until_text("drops 0 /s");
                fs::write(Path::new(&path), terminal.svg()).expect("the picture can be written");
                break;
            }
            terminal.until("two more bars", |screen| bars(line(screen, "cam1 ")) >= seen + 2);
        }
    }
}

#[test]
fn keys_sort_filter_and_choose() {
    let site = Site::default();
    let (relay, _sources) = relaying(&site);
    let mut terminal = top(&relay, &["--sort", "name"]);
    terminal.until("by name", |screen| order(screen) == ["alfa", "beta", "cam1"]);
    terminal.press("r");
    terminal.until("by rate", |screen| order(screen) == ["cam1", "beta", "alfa"]);
    terminal.press("/be");
    terminal.until("what has be in it", |screen| order(screen) == ["beta"] && screen.contains("/be_"));
    terminal.press("\r");
    terminal.until_text("only 'be', Esc shows all");
    terminal.press("\x1b");
    terminal.until("all", |screen| order(screen).len() == 3);
    terminal.press("n\x1b[B\x1b[B");
    terminal.until("the third is looked at", |screen| !line(screen, "cam1: ").is_empty());
    // Smaller and larger screens.
    terminal.resize(10, 40);
    terminal.until("a small screen", |screen| {
        screen.contains("cam1")
            && !screen.contains("WORKER")
            && screen.lines().all(|line| line.chars().count() <= 40)
    });
    terminal.resize(5, 12);
    terminal.until("a tiny screen", |screen| screen.contains("q quit"));
    terminal.resize(ROWS, COLUMNS);
    terminal.until("all of it", |screen| screen.contains("WORKER") && order(screen).len() == 3);
    terminal.press("q");
    assert!(terminal.wait().success());
}

#[test]
fn a_worker_that_is_killed_is_seen() {
    let site = Site::default();
    let (relay, _sources) = relaying(&site);
    let mut terminal = top(&relay, &["--interval", "0.2"]);
    terminal.until("a worker", |screen| line(screen, "in0/xdp0").contains('%'));
    let pid = relay.workers()[0].pid.expect("it runs");
    kill(Pid::from_raw(pid.cast_signed()), Signal::SIGKILL).expect("kill a worker");
    terminal.until("its restart and its reason", |screen| {
        line(screen, "in0/xdp0").contains(" 1  last: killed by signal 9")
    });
}

#[test]
fn the_terminal_is_as_it_was_however_it_ends() {
    let site = Site::default();
    let relay = Relay::start(&site);
    for keys in ["q", "\x1b", "\x03"] {
        check_end(&relay, |terminal| terminal.press(keys));
    }
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        check_end(&relay, |terminal| terminal.signal(signal));
    }
}

#[test]
fn a_daemon_that_goes_and_comes_back_is_followed() {
    let site = Site::default();
    let mut relay = Relay::start(&site);
    relay.add("cam1", "239.1.1.1:5000@in0", &["239.2.2.2:6000@out0"]);
    let mut terminal = top(&relay, &["--interval", "0.2"]);
    terminal.until_text("cam1");
    let first = format!("pid {}", relay.pid());
    terminal.until_text(&first);
    relay.cli(&["stop"]).ok();
    assert!(relay.wait(PATIENCE).success());
    let screen = terminal.until("what it looks for", |screen| screen.contains("no daemon on"));
    assert!(screen.contains("is gone; looking for it") && screen.contains("cam1"), "{screen}");
    relay.start_again(&site);
    let second = format!("pid {}", relay.pid());
    let screen = terminal.until_text(&second);
    assert!(!screen.contains("is gone"), "{screen}");
    // Also when there is none any more.
    relay.cli(&["stop"]).ok();
    assert!(relay.wait(PATIENCE).success());
    terminal.until_text("is gone; looking for it");
    terminal.press("q");
    assert_eq!(terminal.wait().code(), Some(0));
    assert_eq!(terminal.text().trim(), "");
}

#[test]
fn without_a_terminal_or_a_daemon_it_says_so() {
    let site = Site::default();
    let mut relay = Relay::start(&site);
    for args in [&["top"][..], &["top", "--json"]] {
        let answer = relay.cli(args);
        assert!(answer.refused(1).contains("top needs a terminal"), "{answer}");
    }
    assert_eq!(relay.cli(&["top", "--interval", "0"]).status, 2);
    assert_eq!(relay.cli(&["top", "--sort", "colour"]).status, 2);
    relay.cli(&["stop"]).ok();
    assert!(relay.wait(PATIENCE).success());
    let mut terminal = Terminal::start(&mut relay.call(&["top"]), ROWS, COLUMNS);
    assert_eq!(terminal.wait().code(), Some(3));
    assert!(terminal.text().contains("no daemon on"), "{}", terminal.text());
    assert!(!terminal.is_taken());
}

#[test]
fn a_thousand_rules_are_no_burden() {
    let site = Site::default();
    let relay = Relay::start(&site);
    let mut client: Client = relay.client();
    for n in 0..1_000 {
        let (high, low) = (n / 250, n % 250);
        let input = format!("239.1.{high}.{low}:5000@no0");
        let rule = spec(&format!("r{n:03}"), &input, &[&format!("239.2.{high}.{low}:6000@no1")]);
        client.call::<serde_json::Value>(&mcr::api::wire::Request::RuleAdd(rule)).expect("a rule that waits");
    }
    let mut terminal = top(&relay, &["--sort", "name"]);
    terminal.until_text("r000");
    terminal.press("\x1b[F");
    terminal.until_text("r999");
    terminal.press("/r5\r");
    terminal.until("those with r5", |screen| order(screen).first() == Some(&"r500"));
    terminal.press("\x03");
    assert!(terminal.wait().success());
}
