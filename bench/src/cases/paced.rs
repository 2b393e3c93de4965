//! Traffic at an even rate: how late it arrives, and whether all of it does.

use std::time::Duration;

use anyhow::Result;
use aya::{
    Ebpf,
    maps::{MapData, PerCpuArray},
};
use hdrhistogram::Histogram;
use nix::time::{ClockId, clock_gettime};

use crate::{
    bench::Bench,
    buckets::{self, Buckets, at},
    cases::saturation::PAYLOAD,
    cpu::{RELAY_CPU, SOURCE_CPU},
    daemon::{Daemon, IN_PORT, OUT_PORT, group_in, group_out},
    figures::{Figures, LOST, SENT, Subject, Unit, metric},
    programs,
    sink::Sink,
    site::{SINK, Site},
    systems::{System, Work},
    traffic::Stream,
};

/// What datagrams that are sent one by one go through, and what they are like without.
pub const ONE_BY_ONE: [System; 6] = [
    System::NoRelay,
    System::Redirect,
    System::AfXdp,
    System::AfPacket,
    System::Socat,
    System::KernelRouting,
];

/// From sender to a UDP socket's arrival; source and receiver share a CPU.
pub fn latency(bench: &Bench, figures: &mut Figures) -> Result<()> {
    for round in 1..=bench.rounds() {
        for rate in [10_000, 150_000] {
            for system in ONE_BY_ONE {
                let variant = per_second(rate);
                let subject = Subject { case: "latency", variant: &variant, system: system.name() };
                bench.doing(&format!("latency {variant}, round {round}: {}", system.name()));
                let site = Site::build(system.relays());
                let _running = system.start(bench, &site, Work::ONE)?;
                // Sockets, routes and caches are ready when it counts.
                stream(1000).exchange(bench, &site, system.destination(), Duration::from_millis(100))?;
                let heard = stream(rate).exchange(bench, &site, system.destination(), trial(bench))?;
                figures.add(subject, metric("p50", Unit::Microseconds), heard.p50_us);
                figures.add(subject, metric("p99", Unit::Microseconds), heard.p99_us);
                figures.add(subject, LOST, percent_lost(heard.sent, heard.received));
            }
        }
    }
    Ok(())
}

/// Loss at fixed rates, the highest rate without loss, found as RFC 2544 does, and how late datagrams are below it.
pub fn lossless(bench: &Bench, figures: &mut Figures) -> Result<()> {
    const SYSTEMS: [System; 4] = [System::AfXdp, System::AfPacket, System::Socat, System::KernelRouting];
    for round in 1..=bench.rounds() {
        for system in SYSTEMS {
            let site = Site::build(1);
            let sink = Sink::attach(&site)?;
            let _running = system.start(bench, &site, Work::ONE)?;
            for rate in [250_000, 500_000] {
                let variant = per_second(rate);
                let subject = Subject { case: "lossless", variant: &variant, system: system.name() };
                bench.doing(&format!("lossless {variant}, round {round}: {}", system.name()));
                let trial = Trial::run(bench, &site, &sink, rate)?;
                figures.add(subject, SENT, trial.sent_per_second(bench));
                figures.add(subject, LOST, percent_lost(trial.sent, trial.delivered));
            }
            let subject = Subject { case: "lossless", variant: "search", system: system.name() };
            let highest = highest_lossless(bench, |rate| {
                bench.doing(&format!("lossless {}, round {round}: {}", per_second(rate), system.name()));
                Trial::run(bench, &site, &sink, rate)
            })?;
            figures.add(subject, metric("highest lossless", Unit::PerSecond), highest);
            drop(sink);
            for percent in [50, 90] {
                let variant = format!("at {percent} %");
                let subject = Subject { variant: &variant, ..subject };
                bench.doing(&format!("lossless {variant}, round {round}: {}", system.name()));
                let sink = DelaySink::attach(&site)?;
                let rate = (highest * f64::from(percent) / 100.0) as u32;
                stream(rate.max(1000)).send(bench, &site, trial(bench))?;
                let delays = sink.read()?;
                figures.add(subject, metric("p50", Unit::Microseconds), at(&delays, 0.5) / 1e3);
                figures.add(subject, metric("p99", Unit::Microseconds), at(&delays, 0.99) / 1e3);
            }
        }
    }
    Ok(())
}

/// A sink that looks at how long ago a datagram was sent.
struct DelaySink {
    delays: PerCpuArray<MapData, Buckets>,
    _attached: Ebpf,
}

impl DelaySink {
    fn attach(site: &Site) -> Result<Self> {
        // The clock of the stamps is none that BPF knows, but differs from one by whole seconds.
        let [tai, real] = [ClockId::CLOCK_TAI, ClockId::CLOCK_REALTIME].map(clock_gettime);
        let offset = Duration::from(tai?).as_secs_f64() - Duration::from(real?).as_secs_f64();
        let globals = [("tai_offset_seconds", offset.round() as u32)];
        let mut ebpf = programs::attach("delay", &globals, &site.sink, SINK)?;
        Ok(Self { delays: programs::per_cpu_array(&mut ebpf, "delays")?, _attached: ebpf })
    }

    fn read(&self) -> Result<Histogram<u64>> {
        buckets::histogram(self.delays.get(&0, 0)?.iter())
    }
}

/// Three relays in a row, on either CPU in turn.
pub fn chain(bench: &Bench, figures: &mut Figures) -> Result<()> {
    const RELAYS: u8 = 3;
    const CPUS: [usize; 2] = [RELAY_CPU, SOURCE_CPU];
    let ends = [(group_in(0), IN_PORT), (group_out(0, 0, 1), OUT_PORT)];
    for round in 1..=bench.rounds() {
        for rate in [150_000, 250_000] {
            for system in [System::AfXdp, System::AfPacket] {
                let variant = per_second(rate);
                let subject = Subject { case: "chain", variant: &variant, system: system.name() };
                bench.doing(&format!("chain {variant}, round {round}: {}", system.name()));
                let site = Site::build(RELAYS);
                let sink = Sink::attach(&site)?;
                let mut daemons = Vec::new();
                for (k, relay) in site.relays.iter().enumerate() {
                    let daemon = Daemon::start_on(bench, relay, system.name(), CPUS[k % 2])?;
                    // To and fro between two groups.
                    daemon.relay_one(bench, ends[k % 2], ends[(k + 1) % 2])?;
                    daemons.push(daemon);
                }
                let trial = Trial::run(bench, &site, &sink, rate)?;
                figures.add(subject, SENT, trial.sent_per_second(bench));
                figures.add(subject, LOST, percent_lost(trial.sent, trial.delivered));
            }
        }
    }
    Ok(())
}

/// To the group that every system relays.
pub fn stream(rate: u32) -> Stream {
    Stream { to: (group_in(0), IN_PORT), rate, payload: PAYLOAD }
}

pub fn trial(bench: &Bench) -> Duration {
    Duration::from_millis(if bench.quick { 700 } else { 2000 })
}

/// A stream of so long to the sink that counts.
#[derive(Clone, Copy, Debug)]
struct Trial {
    sent: u64,
    delivered: u64,
}

impl Trial {
    fn run(bench: &Bench, site: &Site, sink: &Sink, rate: u32) -> Result<Self> {
        let before = sink.datagrams()?;
        let sent = stream(rate).send(bench, site, trial(bench))?;
        Ok(Self { sent, delivered: sink.settled()? - before })
    }

    #[expect(clippy::cast_precision_loss, reason = "counts are far below 2^52")]
    fn sent_per_second(self, bench: &Bench) -> f64 {
        self.sent as f64 / trial(bench).as_secs_f64()
    }
}

/// Halves the range between a rate without loss and one with it, until it is narrow. A rate that the source
/// does not reach counts as one with loss.
fn highest_lossless(bench: &Bench, mut run: impl FnMut(u32) -> Result<Trial>) -> Result<f64> {
    const FASTEST: u32 = 1_280_000;
    const NARROW: u32 = 20_000;
    let (mut without, mut with) = (0, FASTEST);
    let mut highest = 0.0;
    while with - without > NARROW {
        let rate = without.midpoint(with);
        let trial = run(rate)?;
        let sent = trial.sent_per_second(bench);
        if trial.sent == trial.delivered && sent > 0.98 * f64::from(rate) {
            (without, highest) = (rate, sent);
        } else {
            with = rate;
        }
    }
    Ok(highest)
}

#[expect(clippy::cast_precision_loss, reason = "counts are far below 2^52")]
fn percent_lost(sent: u64, received: u64) -> f64 {
    if sent == 0 { 100.0 } else { sent.saturating_sub(received) as f64 / sent as f64 * 100.0 }
}

pub fn per_second(rate: u32) -> String {
    format!("{} k/s", rate / 1000)
}
