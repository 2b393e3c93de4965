//! `mcr gen`: paced test traffic.

use std::{
    hash::{BuildHasher, RandomState},
    process::ExitCode,
    time::{Duration, SystemTime},
};

use anyhow::{Context, bail, ensure};
use clap::value_parser;
use serde::Serialize;

use super::traffic::{self, Progress};
use crate::{
    api::wire::{SCHEMA, timestamp},
    rule::{Dscp, Output, Ttl},
    traffic::{
        clock,
        group::MAX_STREAMS,
        probe::{HEADER_BYTES, MAX_BYTES},
        sender::{SendEnd, SendPlan, Sender},
        socket::{self, SendOptions},
        stop::Stop,
    },
};

/// Send paced test traffic: UDP with sequence numbers and timestamps, for `mcr recv` to account for.
///
/// Without --count and --seconds it sends until SIGINT or SIGTERM. It ends with a summary; `sent` is what the kernel
/// accepted. Exit status: 0 all sent, 1 fewer than asked for.
#[derive(Debug, clap::Args)]
#[expect(clippy::struct_excessive_bools, reason = "switches of a command line")]
pub struct Args {
    /// Group or host: ADDRESS:PORT@INTERFACE[,ttl=N][,dscp=N][,from=ADDRESS[:PORT]][,loop=true].
    ///
    /// TTL 16, DSCP 0 and the interface's own address are the defaults; no route is needed.
    endpoint: String,
    /// Datagrams a second of each stream.
    #[arg(long, value_name = "PPS", value_parser = value_parser!(u64).range(1..=10_000_000))]
    rate: u64,
    /// UDP payload bytes of a datagram, 40 at the least.
    #[arg(long, value_name = "BYTES")]
    size: usize,
    /// Number of streams: stream i goes to the endpoint's address plus i, on the same port.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = value_parser!(u32).range(1..=i64::from(MAX_STREAMS)))]
    streams: u32,
    /// Datagrams to send on each stream.
    #[arg(long, value_name = "N", value_parser = value_parser!(u64).range(1..))]
    count: Option<u64>,
    /// Send for so long: rate times seconds datagrams on each stream.
    #[arg(long, value_name = "S", value_parser = traffic::seconds)]
    seconds: Option<Duration>,
    /// Hand runs of datagrams to the kernel by one call (UDP segmentation): cheaper, for rates that a core cannot
    /// reach otherwise. One stream only. On a virtual link whose other end takes large frames (`ethtool -k`,
    /// tx-udp-segmentation) they travel as one; switch that off where frames are counted.
    #[arg(long)]
    gso: bool,
    /// Send each datagram by itself and at its time to a microsecond, as latency is measured; keeps a CPU busy.
    /// Otherwise what is due within 100 microseconds leaves together.
    #[arg(long, conflicts_with = "gso")]
    even: bool,
    /// Print the SHA-256 of each stream's payloads, in order.
    #[arg(long)]
    sha256: bool,
    /// Print one JSON object instead of a table.
    #[arg(long)]
    json: bool,
}

/// The summary as JSON.
#[derive(Serialize)]
struct Report {
    schema: u32,
    tool: &'static str,
    /// RFC 3339, UTC.
    time: String,
    endpoint: String,
    /// The run's random number, as the receiver sees it.
    run: String,
    /// Per stream.
    rate: u64,
    size: usize,
    /// `done`, `deadline` or `signal`.
    ended: &'static str,
    seconds: f64,
    /// Datagrams asked for on all streams; null where the run has no end.
    asked: Option<u64>,
    total: Sent,
    sent_pps: u64,
    retries: Retries,
    /// The longest that a datagram left after its time.
    behind_max_ns: u64,
    streams: Vec<Stream>,
}

#[derive(Serialize)]
struct Sent {
    sent: u64,
    sent_bytes: u64,
}

/// Sends that were tried again, by what the kernel said.
#[derive(Serialize)]
struct Retries {
    no_buffer: u64,
    would_block: u64,
    other: u64,
}

#[derive(Serialize)]
struct Stream {
    #[serde(rename = "stream")]
    index: usize,
    to: String,
    #[serde(flatten)]
    sent: Sent,
    first_sequence: Option<u64>,
    last_sequence: Option<u64>,
    sha256: Option<String>,
}

pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let endpoint: Output = args.endpoint.parse()?;
    ensure!(
        (HEADER_BYTES..=MAX_BYTES).contains(&args.size),
        "--size {}: a datagram has a header of {HEADER_BYTES} bytes and at most {MAX_BYTES}: use a size between",
        args.size
    );
    ensure!(
        args.streams == 1 || !args.gso,
        "--gso: runs of datagrams are cut from one stream: leave it out, or start one gen for each stream"
    );
    let plan = SendPlan {
        destinations: traffic::streams(endpoint.destination, endpoint.port, args.streams)?,
        size: args.size,
        rate: args.rate,
        count: args.count,
        duration: args.seconds,
        sha256: args.sha256,
        segments: args.gso,
        even: args.even,
        // Fresh per process, and seeded by the kernel.
        run: RandomState::new().hash_one(clock::realtime_ns()),
    };
    let options = send_options(&endpoint, &plan)?;
    let advise = |error| traffic::advise(error, &endpoint.interface);
    let socket = socket::sender(&options)
        .map_err(|error| traffic::advise(error, &endpoint.interface).context(format!("gen {endpoint}")))?;
    let stop = Stop::on_signals().context("block SIGINT and SIGTERM")?;
    // Best effort: with the default slack a sleep is up to 50 microseconds longer.
    let _ = nix::sys::prctl::set_timerslack(1);

    let mut sender = Sender::new(plan, socket);
    let mut progress = Progress::new();
    let mut shown = 0;
    let outcome = sender.run(&stop, |sender| {
        progress.show(|since| {
            let sent = sender.sent() - shown;
            shown = sender.sent();
            format!("sent {shown}, {} a second", traffic::per_second(sent, since))
        });
    });
    progress.clear();
    let ended = match outcome {
        Ok(ended) => ended,
        Err(error) => {
            let sent = sender.sent();
            return Err(advise(error).context(format!("gen {endpoint}: after {sent} datagrams")));
        }
    };
    let report = report(args, &endpoint, &sender, ended);
    if args.json {
        traffic::print_json(&report)?;
    } else {
        print(&report, sender.elapsed())?;
    }
    match report.asked {
        Some(asked) if sender.sent() < asked => bail!(
            "gen {endpoint}: sent {} of {asked} datagrams: ended by {}: {}",
            sender.sent(),
            report.ended,
            if ended == SendEnd::Deadline { "lower --rate" } else { "let it run to its end" }
        ),
        _ => Ok(ExitCode::SUCCESS),
    }
}

fn send_options(endpoint: &Output, plan: &SendPlan) -> anyhow::Result<SendOptions> {
    let Ttl::Fixed(ttl) = endpoint.ttl else {
        bail!("gen {endpoint}: gen receives no datagram whose TTL it could take: write ttl=1 to ttl=255");
    };
    let dscp = match endpoint.dscp {
        Dscp::Fixed(dscp) => dscp,
        Dscp::Copy => 0,
    };
    Ok(SendOptions {
        interface: endpoint.interface.clone(),
        index: traffic::interface_index(&endpoint.interface)?,
        ttl,
        dscp,
        from: endpoint.from.map(|from| (from.address, from.port.unwrap_or(0))),
        loop_back: endpoint.loop_back,
        connect: if let [destination] = plan.destinations[..] { Some(destination) } else { None },
        segment: if plan.segments { u16::try_from(plan.size).ok() } else { None },
    })
}

fn report(args: &Args, endpoint: &Output, sender: &Sender, ended: SendEnd) -> Report {
    let plan = sender.plan();
    let sent = |datagrams| Sent { sent: datagrams, sent_bytes: datagrams * args.size as u64 };
    let streams = plan.destinations.iter().enumerate().map(|(stream, to)| Stream {
        index: stream,
        to: to.to_string(),
        sent: sent(sender.sent_of(stream)),
        first_sequence: (sender.sent_of(stream) > 0).then_some(0),
        last_sequence: sender.sent_of(stream).checked_sub(1),
        sha256: sender.sha256_of(stream),
    });
    let retries = sender.retries();
    Report {
        schema: SCHEMA,
        tool: "gen",
        time: timestamp(SystemTime::now()),
        endpoint: endpoint.to_string(),
        run: format!("{:016x}", plan.run),
        rate: args.rate,
        size: args.size,
        ended: match ended {
            SendEnd::Done => "done",
            SendEnd::Deadline => "deadline",
            SendEnd::Signal => "signal",
        },
        seconds: sender.elapsed().as_secs_f64(),
        asked: plan.datagrams_per_stream().map(|count| count.saturating_mul(args.streams.into())),
        total: sent(sender.sent()),
        sent_pps: traffic::per_second(sender.sent(), sender.elapsed()),
        retries: Retries {
            no_buffer: retries.no_buffer,
            would_block: retries.would_block,
            other: retries.other,
        },
        behind_max_ns: u64::try_from(sender.behind_max().as_nanos()).unwrap_or(u64::MAX),
        streams: streams.collect(),
    }
}

fn print(report: &Report, elapsed: Duration) -> anyhow::Result<()> {
    let Report { total, retries, .. } = report;
    let asked = report.asked.map(|asked| format!(" of {asked}")).unwrap_or_default();
    let summary = [
        format!("sent {}{asked} datagrams of {} bytes in {:.3} s", total.sent, report.size, report.seconds),
        format!(
            "{} datagrams/s, {}, at most {} behind time",
            report.sent_pps,
            traffic::readable_bits(total.sent_bytes, elapsed),
            traffic::readable_ns(report.behind_max_ns)
        ),
        format!(
            "sends tried again: {} queue full, {} send buffer full, {} other",
            retries.no_buffer, retries.would_block, retries.other
        ),
    ];
    let mut header = vec!["stream", "to", "sent", "bytes"];
    let mut rows: Vec<_> = report
        .streams
        .iter()
        .map(|s| {
            vec![s.index.to_string(), s.to.clone(), s.sent.sent.to_string(), s.sent.sent_bytes.to_string()]
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
