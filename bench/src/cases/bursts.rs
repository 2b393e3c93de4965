//! How evenly a relay lets datagrams go that came evenly: time between arrivals, and the lengths of bursts.

use anyhow::Result;
use aya::{
    Ebpf,
    maps::{MapData, PerCpuArray},
};
use hdrhistogram::Histogram;

use crate::{
    bench::Bench,
    buckets::{self, Buckets, at},
    cases::paced::{ONE_BY_ONE, per_second, stream, trial},
    figures::{Figures, Subject, Unit, metric},
    programs,
    site::{SINK, Site},
    systems::Work,
};

/// As in `bpf/bench.bpf.c`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Spacing {
    last_ns: u64,
    /// Length of the burst that is going on.
    burst: u64,
    gaps: Buckets,
    bursts: Buckets,
}

// SAFETY: numbers alone, without padding.
unsafe impl aya::Pod for Spacing {}

/// What came in is what arrives without a relay.
pub fn bursts(bench: &Bench, figures: &mut Figures) -> Result<()> {
    for round in 1..=bench.rounds() {
        for rate in [10_000, 150_000] {
            for system in ONE_BY_ONE {
                let variant = per_second(rate);
                let subject = Subject { case: "bursts", variant: &variant, system: system.name() };
                bench.doing(&format!("bursts {variant}, round {round}: {}", system.name()));
                let site = Site::build(system.relays());
                let interval_ns = 1_000_000_000 / rate;
                let sink = SpacingSink::attach(&site, interval_ns / 2)?;
                let _running = system.start(bench, &site, Work::ONE)?;
                stream(rate).send_evenly(bench, &site, trial(bench))?;
                let (gaps, bursts) = sink.read()?;
                for (name, quantile) in [("gap p1", 0.01), ("gap p50", 0.5), ("gap p99", 0.99)] {
                    figures.add(subject, metric(name, Unit::Microseconds), at(&gaps, quantile) / 1e3);
                }
                for (name, quantile) in [("burst p50", 0.5), ("burst p99", 0.99), ("longest", 1.0)] {
                    figures.add(subject, metric(name, Unit::Datagrams), at(&bursts, quantile));
                }
            }
        }
    }
    Ok(())
}

struct SpacingSink {
    spacings: PerCpuArray<MapData, Spacing>,
    _attached: Ebpf,
}

impl SpacingSink {
    fn attach(site: &Site, burst_gap_ns: u32) -> Result<Self> {
        let mut ebpf = programs::attach("space", &[("burst_gap_ns", burst_gap_ns)], &site.sink, SINK)?;
        Ok(Self { spacings: programs::per_cpu_array(&mut ebpf, "spacings")?, _attached: ebpf })
    }

    /// Gaps between two arrivals, in ns, and lengths of bursts.
    fn read(&self) -> Result<(Histogram<u64>, Histogram<u64>)> {
        let spacings = self.spacings.get(&0, 0)?;
        let gaps = buckets::histogram(spacings.iter().map(|spacing| &spacing.gaps))?;
        let bursts = buckets::histogram(spacings.iter().map(|spacing| &spacing.bursts))?;
        Ok((gaps, bursts))
    }
}
