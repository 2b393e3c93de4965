//! What `gen` and `recv` share on the command line: streams, durations, progress and what to do about errors.

use std::{
    io::{self, IsTerminal, Write},
    net::{Ipv4Addr, SocketAddrV4},
    time::{Duration, Instant},
};

use anyhow::{Context, anyhow, ensure};
use comfy_table::{CellAlignment, Table, presets};
use indicatif::{ProgressBar, ProgressStyle};
use nix::errno::Errno;
use serde::Serialize;

use crate::{
    rule::{IfIndex, InterfaceName},
    traffic::{group, socket},
};

/// Streams that a table lists; `--json` has them all.
const MAX_ROWS: usize = 16;

const REFRESH: Duration = Duration::from_millis(250);

/// Parses a duration in seconds, fractions allowed.
pub fn seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.parse::<f64>().ok().filter(|seconds| *seconds > 0.0);
    seconds
        .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
        .ok_or_else(|| "write a number of seconds greater than 0, like 10 or 0.5".to_owned())
}

/// The socket addresses of all streams.
pub fn streams(first: Ipv4Addr, port: u16, streams: u32) -> anyhow::Result<Vec<SocketAddrV4>> {
    let addresses = group::addresses(first, streams).with_context(|| {
        format!("{streams} streams from {first} on: the addresses do not suffice: begin lower or take fewer")
    })?;
    Ok(addresses.into_iter().map(|address| SocketAddrV4::new(address, port)).collect())
}

pub fn interface_index(name: &InterfaceName) -> anyhow::Result<IfIndex> {
    socket::interface_index(name)
        .map_err(|_| anyhow!("interface {name}: there is none of this name here: see `ip -br link`"))
}

/// The error with what to do about it, where that is known.
pub fn advise(
    error: impl std::error::Error + Send + Sync + 'static,
    interface: &InterfaceName,
) -> anyhow::Error {
    let advice = errno(&error).and_then(|errno| advice(errno, interface));
    let error = anyhow::Error::new(error);
    match advice {
        Some(advice) => anyhow!("{error:#}: {advice}"),
        None => error,
    }
}

fn errno(error: &(dyn std::error::Error + 'static)) -> Option<Errno> {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(code) = error.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error) {
            return Some(Errno::from_raw(code));
        }
        cause = error.source();
    }
    None
}

fn advice(errno: Errno, interface: &InterfaceName) -> Option<String> {
    Some(match errno {
        Errno::EADDRNOTAVAIL => {
            format!("give the address to this host: `ip address add ADDRESS/32 dev {interface}`")
        }
        Errno::EADDRINUSE => "another process has this address and port: see `ss -ulnp`".to_owned(),
        Errno::EMSGSIZE => {
            format!("the MTU is smaller: a smaller --size, or `ip link set {interface} mtu N`")
        }
        Errno::EINVAL => {
            format!("without --gso if it was given; else see `ip -details link show {interface}`")
        }
        Errno::ENETDOWN | Errno::ENETUNREACH => {
            format!("is the interface up? `ip link set {interface} up`")
        }
        Errno::EPERM | Errno::EACCES => {
            "a firewall or missing rights: try as root, see `nft list ruleset`".to_owned()
        }
        Errno::EMFILE => "too many open files: `ulimit -n 8192`, or fewer streams".to_owned(),
        Errno::ENOBUFS => "too many memberships: see `sysctl net.ipv4.igmp_max_memberships`".to_owned(),
        _ => return None,
    })
}

/// A line on the terminal that says how the run goes; nothing where stderr is no terminal.
pub struct Progress {
    bar: Option<ProgressBar>,
    shown: Instant,
}

impl Progress {
    pub fn new() -> Self {
        let bar = io::stderr().is_terminal().then(|| {
            let style =
                ProgressStyle::with_template("{spinner} {elapsed} {msg}").expect("the template is valid");
            ProgressBar::new_spinner().with_style(style)
        });
        Self { bar, shown: Instant::now() }
    }

    /// Shows what `message` says of the time since it was shown last, if it is time for it.
    pub fn show(&mut self, message: impl FnOnce(Duration) -> String) {
        let Some(bar) = &self.bar else { return };
        let since = self.shown.elapsed();
        if since >= REFRESH {
            self.shown = Instant::now();
            bar.set_message(message(since));
            bar.tick();
        }
    }

    pub fn clear(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// Prints one JSON object on one line.
pub fn print_json(report: &impl Serialize) -> anyhow::Result<()> {
    let mut line = serde_json::to_string(report)?;
    line.push('\n');
    io::stdout().write_all(line.as_bytes()).context("write to stdout")
}

/// Prints the summary lines, then one row for each stream.
pub fn print_table(summary: &[String], header: &[&str], rows: &[Vec<String>]) -> anyhow::Result<()> {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(header);
    for row in rows.iter().take(MAX_ROWS) {
        ensure!(row.len() == header.len(), "a row of {} cells under {} headings", row.len(), header.len());
        table.add_row(row);
    }
    for (i, column) in table.column_iter_mut().enumerate() {
        column.set_cell_alignment(if i < 2 { CellAlignment::Left } else { CellAlignment::Right });
    }
    let mut text = format!("{}\n\n{}\n", summary.join("\n"), table.trim_fmt());
    if rows.len() > MAX_ROWS {
        text = format!("{text} ... and {} more streams: see --json\n", rows.len() - MAX_ROWS);
    }
    io::stdout().write_all(text.as_bytes()).context("write to stdout")
}

/// `count` per `time`, as a whole number.
#[expect(clippy::cast_precision_loss, clippy::cast_sign_loss, reason = "a rate for reading")]
pub fn per_second(count: u64, time: Duration) -> u64 {
    if time.is_zero() { 0 } else { (count as f64 / time.as_secs_f64()).round() as u64 }
}

/// Nanoseconds as a person reads them.
#[expect(clippy::cast_precision_loss, reason = "a time for reading")]
pub fn readable_ns(ns: u64) -> String {
    match ns {
        0..1_000 => format!("{ns} ns"),
        1_000..1_000_000 => format!("{:.1} us", ns as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} ms", ns as f64 / 1e6),
        _ => format!("{:.2} s", ns as f64 / 1e9),
    }
}

/// Bits a second as a person reads them.
#[expect(clippy::cast_precision_loss, reason = "a rate for reading")]
pub fn readable_bits(bytes: u64, time: Duration) -> String {
    match per_second(bytes * 8, time) {
        bits @ 0..1_000_000 => format!("{:.1} kbit/s", bits as f64 / 1e3),
        bits @ 1_000_000..1_000_000_000 => format!("{:.1} Mbit/s", bits as f64 / 1e6),
        bits => format!("{:.2} Gbit/s", bits as f64 / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_seconds() {
        let check = |text, expected: Option<u64>| {
            assert_eq!(seconds(text).ok(), expected.map(Duration::from_millis), "{text}");
        };
        check("10", Some(10_000));
        check("0.5", Some(500));
        for text in ["0", "-1", "nan", "inf", "1e300", "ten", ""] {
            check(text, None);
        }
    }

    #[test]
    fn finds_the_system_error_under_the_causes() {
        let error = socket::SocketError { call: "bind", error: Errno::EADDRNOTAVAIL.into() };
        let interface = "eth0".parse().expect("a name");
        let text = format!("{:#}", advise(error, &interface));
        assert!(text.starts_with("bind: "), "{text}");
        assert!(text.ends_with("`ip address add ADDRESS/32 dev eth0`"), "{text}");
    }
}
