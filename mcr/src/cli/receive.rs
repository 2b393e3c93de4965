//! `mcr recv`: accounts for the test traffic of `mcr gen`.

use std::{
    collections::BTreeSet,
    net::Ipv4Addr,
    process::ExitCode,
    time::{Duration, SystemTime},
};

use anyhow::{Context, bail};
use clap::value_parser;
use serde::Serialize;

use super::traffic::{self, Progress};
use crate::{
    api::wire::{SCHEMA, timestamp},
    rule::{Dscp, Input, InterfaceName, Output, Ttl},
    traffic::{
        account::{Counts, MAX_SOURCES, StreamAccount},
        group::MAX_STREAMS,
        receiver::{ReceiveEnd, ReceivePlan, Receiver},
        sequence::SequenceCounts,
        socket::ReceiveOptions,
        stop::Stop,
    },
};

/// With --count alone: the first datagram is awaited for so long.
const FIRST_WITHIN: Duration = Duration::from_mins(1);

/// With --count alone: it ends so long after the last datagram.
const COUNT_IDLE: Duration = Duration::from_secs(10);

/// Receive the test traffic of `mcr gen`: join, verify, and count loss, duplicates, reordering and latency.
///
/// `listening on ...` on stderr says that all groups are joined. It ends with --count, --seconds or --idle, whichever is
/// first, or by SIGINT or SIGTERM, and always with a summary. Exit status: 0 nothing lost, duplicated or corrupt; 1
/// otherwise, and if fewer than --count came.
///
/// `lost` are the sequence numbers missing between the first and the last seen, and with --count all that are missing of
/// it. A datagram more than 65,536 numbers behind the highest is `late`: neither lost nor a duplicate can be told. Latency
/// is from the generator's stamp, made just before up to 16 datagrams are handed to the kernel, to the kernel's
/// receive stamp, both in real time.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Group, GROUP:PORT@INTERFACE[,source=ADDRESS], or an address of the interface, ADDRESS:PORT@INTERFACE.
    endpoint: String,
    /// Number of streams: stream i is received on the endpoint's address plus i, on the same port.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = value_parser!(u32).range(1..=i64::from(MAX_STREAMS)))]
    streams: u32,
    /// End when each stream has received so many datagrams, duplicates not counted. Without --seconds and
    /// --idle it gives up 10 s after the last datagram, or after 60 s without a first one.
    #[arg(long, value_name = "N", value_parser = value_parser!(u64).range(1..))]
    count: Option<u64>,
    /// End after so long.
    #[arg(long, value_name = "S", value_parser = traffic::seconds)]
    seconds: Option<Duration>,
    /// End so long after the last datagram, once one has come.
    #[arg(long, value_name = "S", value_parser = traffic::seconds)]
    idle: Option<Duration>,
    /// Print the SHA-256 of each stream's payloads, in order of arrival.
    #[arg(long)]
    sha256: bool,
    /// Print one JSON object instead of a table.
    #[arg(long)]
    json: bool,
}

/// Where to receive, a group or a host.
struct Endpoint {
    address: Ipv4Addr,
    port: u16,
    interface: InterfaceName,
    source: Option<Ipv4Addr>,
}

/// The summary as JSON.
#[derive(Serialize)]
struct Report {
    schema: u32,
    tool: &'static str,
    /// RFC 3339, UTC.
    time: String,
    endpoint: String,
    /// `count`, `seconds`, `idle` or `signal`.
    ended: &'static str,
    seconds: f64,
    /// From the first datagram to the last.
    receiving_seconds: f64,
    received_pps: u64,
    /// Datagrams asked for on all streams; null without --count.
    expected: Option<u64>,
    total: Tally,
    latency: Option<Percentiles>,
    streams: Vec<Stream>,
}

/// `received = unique + duplicates + late + surplus +` those corrupt in the header.
#[derive(Default, Serialize)]
struct Tally {
    received: u64,
    received_bytes: u64,
    unique: u64,
    lost: u64,
    duplicates: u64,
    reordered: u64,
    late: u64,
    corrupt: u64,
    foreign: u64,
    /// New ones after all had come.
    surplus: u64,
    /// Dropped at this process's own sockets: part of what is lost.
    receiver_dropped: u64,
    /// Runs of generators.
    runs: u64,
    sources: BTreeSet<String>,
    more_sources: bool,
    ttl: BTreeSet<u8>,
    dscp: BTreeSet<u8>,
    ecn: BTreeSet<u8>,
}

#[derive(Serialize)]
struct Stream {
    #[serde(rename = "stream")]
    index: usize,
    on: String,
    #[serde(flatten)]
    tally: Tally,
    /// Lowest and highest of the latest run.
    first_sequence: Option<u64>,
    last_sequence: Option<u64>,
    latency: Option<Latency>,
    sha256: Option<String>,
    flows: Vec<Flow>,
}

/// One stream of one run.
#[derive(Serialize)]
struct Flow {
    run: String,
    stream: u32,
    unique: u64,
    lost: u64,
    duplicates: u64,
    reordered: u64,
    late: u64,
    first_sequence: u64,
    last_sequence: u64,
}

#[derive(Serialize)]
#[expect(clippy::struct_field_names, reason = "the unit is in the name")]
struct Latency {
    min_ns: u64,
    mean_ns: u64,
    max_ns: u64,
}

#[derive(Serialize)]
struct Percentiles {
    clock: &'static str,
    datagrams: u64,
    min_ns: u64,
    mean_ns: u64,
    p50_ns: u64,
    p90_ns: u64,
    p99_ns: u64,
    p999_ns: u64,
    max_ns: u64,
    /// Datagrams that came before they were sent, by clocks that disagree; their latency counts as 0.
    clock_backwards: u64,
}

pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let endpoint = Endpoint::parse(&args.endpoint)?;
    let options = ReceiveOptions {
        index: traffic::interface_index(&endpoint.interface)?,
        interface: endpoint.interface.clone(),
        source: endpoint.source,
        sockets: args.streams,
    };
    let by_count_alone = args.count.is_some() && args.seconds.is_none() && args.idle.is_none();
    let plan = ReceivePlan {
        addresses: traffic::streams(endpoint.address, endpoint.port, args.streams)?,
        count: args.count,
        duration: args.seconds,
        idle: args.idle.or(by_count_alone.then_some(COUNT_IDLE)),
        first_within: by_count_alone.then_some(FIRST_WITHIN),
        sha256: args.sha256,
    };
    let failed =
        |error| traffic::advise(error, &endpoint.interface).context(format!("recv {}", args.endpoint));
    let stop = Stop::on_signals().context("block SIGINT and SIGTERM")?;
    let mut receiver = Receiver::new(plan, &options).map_err(failed)?;
    let streams = if args.streams == 1 { String::new() } else { format!(", {} streams", args.streams) };
    eprintln!("listening on {}{streams}", args.endpoint);

    let mut progress = Progress::new();
    let mut shown = 0;
    let outcome = receiver.run(&stop, |receiver| {
        progress.show(|since| {
            let total = receiver.total();
            let rate = traffic::per_second(total.received - shown, since);
            shown = total.received;
            format!("received {shown}, {rate} a second, lost {}", lost_so_far(receiver))
        });
    });
    progress.clear();
    let report = report(args, &receiver, outcome.map_err(failed)?);
    if args.json {
        traffic::print_json(&report)?;
    } else {
        print(&report, receiver.receiving())?;
    }
    verdict(args, &report.total)
}

impl Endpoint {
    fn parse(text: &str) -> anyhow::Result<Self> {
        if let Ok(host) = text.parse::<Output>()
            && !host.destination.is_multicast()
        {
            let plain = Output {
                ttl: Ttl::Fixed(crate::rule::DEFAULT_TTL),
                dscp: Dscp::Copy,
                from: None,
                gso: true,
                loop_back: false,
                ..host.clone()
            };
            if host != plain {
                bail!(
                    "'{text}' is no endpoint to receive on: its options belong to an output: write {plain}"
                );
            }
            let Output { destination, port, interface, .. } = host;
            return Ok(Self { address: destination, port, interface, source: None });
        }
        let Input { group, port, interface, source } = text.parse()?;
        Ok(Self { address: group, port, interface, source })
    }
}

/// 0 if everything came as it was sent, otherwise an error that says what did not.
fn verdict(args: &Args, total: &Tally) -> anyhow::Result<ExitCode> {
    let Tally { lost, duplicates, corrupt, late, .. } = total;
    if lost + duplicates + corrupt + late == 0 {
        return Ok(ExitCode::SUCCESS);
    }
    let advice = if total.receiver_dropped > 0 {
        format!(": {} of them in this receiver's own buffer: lower the rate", total.receiver_dropped)
    } else if total.received == 0 {
        ": nothing came: is the generator running, and the interface the right one?".to_owned()
    } else {
        String::new()
    };
    bail!(
        "recv {}: {lost} lost, {duplicates} duplicated, {corrupt} corrupt, {late} late of {} received{advice}",
        args.endpoint,
        total.received
    )
}

/// Gaps: what is still to come is not lost yet.
fn lost_so_far(receiver: &Receiver) -> u64 {
    (0..receiver.plan().addresses.len()).map(|i| receiver.account(i).counts().sequence.lost).sum()
}

fn report(args: &Args, receiver: &Receiver, ended: ReceiveEnd) -> Report {
    let plan = receiver.plan();
    let streams: Vec<_> =
        plan.addresses.iter().enumerate().map(|(i, on)| stream(receiver, i, on.to_string())).collect();
    let mut total = Tally::new(receiver.total(), streams.iter().map(|s| s.tally.receiver_dropped).sum());
    let mut runs = BTreeSet::new();
    for (i, stream) in streams.iter().enumerate() {
        let account = receiver.account(i);
        runs.extend(account.flows().iter().map(|flow| flow.run));
        total.runs += account.flows_closed();
        total.more_sources |= stream.tally.more_sources;
        total.sources.extend(stream.tally.sources.iter().cloned());
        total.ttl.extend(&stream.tally.ttl);
        total.dscp.extend(&stream.tally.dscp);
        total.ecn.extend(&stream.tally.ecn);
    }
    total.runs += runs.len() as u64;
    total.more_sources |= total.sources.len() > MAX_SOURCES;
    total.sources = total.sources.into_iter().take(MAX_SOURCES).collect();
    Report {
        schema: SCHEMA,
        tool: "recv",
        time: timestamp(SystemTime::now()),
        endpoint: args.endpoint.clone(),
        ended: match ended {
            ReceiveEnd::Count => "count",
            ReceiveEnd::Duration => "seconds",
            ReceiveEnd::Idle => "idle",
            ReceiveEnd::Signal => "signal",
        },
        seconds: receiver.elapsed().as_secs_f64(),
        receiving_seconds: receiver.receiving().as_secs_f64(),
        received_pps: traffic::per_second(total.received, receiver.receiving()),
        expected: plan.count.map(|count| count.saturating_mul(args.streams.into())),
        latency: percentiles(receiver),
        total,
        streams,
    }
}

fn stream(receiver: &Receiver, i: usize, on: String) -> Stream {
    let account = receiver.account(i);
    let latency = receiver.latency(i);
    let latest = account.flows().last();
    let flows = account.flows().iter().map(|flow| {
        let SequenceCounts { unique, lost, duplicates, reordered, late } = flow.ledger.counts();
        Flow {
            run: format!("{:016x}", flow.run),
            stream: flow.stream,
            unique,
            lost,
            duplicates,
            reordered,
            late,
            first_sequence: flow.ledger.lowest(),
            last_sequence: flow.ledger.highest(),
        }
    });
    Stream {
        index: i,
        on,
        tally: Tally::new(receiver.counts(i), receiver.dropped(i)).with_headers(account),
        first_sequence: latest.map(|flow| flow.ledger.lowest()),
        last_sequence: latest.map(|flow| flow.ledger.highest()),
        latency: (latency.datagrams > 0).then(|| Latency {
            min_ns: latency.min_ns,
            mean_ns: latency.mean_ns(),
            max_ns: latency.max_ns,
        }),
        sha256: account.sha256(),
        flows: flows.collect(),
    }
}

impl Tally {
    fn new(counts: Counts, receiver_dropped: u64) -> Self {
        let SequenceCounts { unique, lost, duplicates, reordered, late } = counts.sequence;
        Self {
            received: counts.received,
            received_bytes: counts.received_bytes,
            unique,
            lost,
            duplicates,
            reordered,
            late,
            corrupt: counts.corrupt,
            foreign: counts.foreign,
            surplus: counts.surplus,
            receiver_dropped,
            ..Self::default()
        }
    }

    /// Adds what was seen in the headers of one stream's datagrams.
    fn with_headers(mut self, account: &StreamAccount) -> Self {
        let runs: BTreeSet<_> = account.flows().iter().map(|flow| flow.run).collect();
        self.runs = runs.len() as u64 + account.flows_closed();
        self.sources = account.sources.iter().map(ToString::to_string).collect();
        self.more_sources = account.more_sources;
        self.ttl.clone_from(&account.ttl);
        self.dscp.clone_from(&account.dscp);
        self.ecn.clone_from(&account.ecn);
        self
    }
}

#[expect(clippy::cast_sign_loss, reason = "latencies are not negative")]
fn percentiles(receiver: &Receiver) -> Option<Percentiles> {
    let histogram = receiver.histogram();
    (!histogram.is_empty()).then(|| Percentiles {
        clock: "CLOCK_REALTIME",
        datagrams: histogram.len(),
        min_ns: histogram.min(),
        mean_ns: histogram.mean() as u64,
        p50_ns: histogram.value_at_quantile(0.5),
        p90_ns: histogram.value_at_quantile(0.9),
        p99_ns: histogram.value_at_quantile(0.99),
        p999_ns: histogram.value_at_quantile(0.999),
        max_ns: histogram.max(),
        clock_backwards: receiver.clock_backwards(),
    })
}

fn print(report: &Report, receiving: Duration) -> anyhow::Result<()> {
    let Report { total, .. } = report;
    let expected = report.expected.map(|expected| format!(" of {expected}")).unwrap_or_default();
    let mut summary = vec![
        format!(
            "received {}{expected} datagrams in {:.3} s: {} datagrams/s, {}",
            total.received,
            report.receiving_seconds,
            report.received_pps,
            traffic::readable_bits(total.received_bytes, receiving)
        ),
        format!(
            "lost {} ({} in this receiver's own buffer), duplicates {}, reordered {}, late {}, corrupt {}, foreign {}",
            total.lost,
            total.receiver_dropped,
            total.duplicates,
            total.reordered,
            total.late,
            total.corrupt,
            total.foreign
        ),
    ];
    if let Some(latency) = &report.latency {
        let [p50, p90, p99, p999, max] =
            [latency.p50_ns, latency.p90_ns, latency.p99_ns, latency.p999_ns, latency.max_ns]
                .map(traffic::readable_ns);
        summary.push(format!("latency p50 {p50}, p90 {p90}, p99 {p99}, p99.9 {p999}, max {max}"));
    }
    if total.received > 0 {
        let list = |values: &BTreeSet<u8>| values.iter().map(u8::to_string).collect::<Vec<_>>().join(" ");
        let sources = total.sources.iter().map(String::as_str).collect::<Vec<_>>().join(" ");
        let more = if total.more_sources { " and more" } else { "" };
        summary.push(format!("from {sources}{more}; ttl {}; dscp {}", list(&total.ttl), list(&total.dscp)));
    }
    let mut header = vec![
        "stream",
        "on",
        "received",
        "lost",
        "duplicates",
        "reordered",
        "corrupt",
        "first",
        "last",
        "max latency",
    ];
    let number = |number: Option<u64>| number.map_or_else(|| "-".to_owned(), |number| number.to_string());
    let mut rows: Vec<_> = report
        .streams
        .iter()
        .map(|s| {
            let latency = s.latency.as_ref().map_or("-".to_owned(), |l| traffic::readable_ns(l.max_ns));
            let Tally { received, lost, duplicates, reordered, corrupt, .. } = &s.tally;
            let counts = [received, lost, duplicates, reordered, corrupt].map(u64::to_string);
            let places = [number(s.first_sequence), number(s.last_sequence), latency];
            [s.index.to_string(), s.on.clone()].into_iter().chain(counts).chain(places).collect::<Vec<_>>()
        })
        .collect();
    if report.streams.iter().any(|stream| stream.sha256.is_some()) {
        header.push("sha256");
        for (row, stream) in rows.iter_mut().zip(&report.streams) {
            row.push(stream.sha256.clone().unwrap_or_default());
        }
    }
    traffic::print_table(&summary, &header, &rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_groups_and_hosts() {
        let check = |text: &str, expected: Result<&str, &str>| {
            let found = Endpoint::parse(text)
                .map(|e| format!("{} {} {} {:?}", e.address, e.port, e.interface, e.source));
            match (found, expected) {
                (Ok(found), Ok(expected)) => assert_eq!(found, expected, "{text}"),
                (Err(error), Err(part)) => assert!(error.to_string().contains(part), "{text}: {error}"),
                (found, expected) => panic!("{text}: {found:?} and not {expected:?}"),
            }
        };
        check("239.1.1.1:5000@eth0", Ok("239.1.1.1 5000 eth0 None"));
        check("239.1.1.1:5000@eth0,source=192.0.2.7", Ok("239.1.1.1 5000 eth0 Some(192.0.2.7)"));
        check("10.0.0.5:6000@eth0", Ok("10.0.0.5 6000 eth0 None"));
        check("10.0.0.5:6000@eth0,ttl=3", Err("write 10.0.0.5:6000@eth0"));
        check("239.1.1.1:5000@eth0,ttl=3", Err("belongs to an output"));
        check("239.1.1.1:5000", Err("names no interface"));
        check("udp://@239.1.1.1:5000", Err("URL"));
    }
}
