//! A sink that costs next to nothing: an XDP program that counts datagrams and drops them.

use std::{thread, time::Duration};

use anyhow::{Context as _, Result};
use aya::{
    Ebpf,
    maps::{MapData, PerCpuArray, PerCpuValues},
    util::nr_cpus,
};

use crate::{
    programs,
    site::{SINK, Site},
};

/// Counts until it is dropped.
pub struct Sink {
    /// `struct arrivals`: datagrams, bytes, time of the first since it was set to 0.
    arrived: PerCpuArray<MapData, [u64; 3]>,
    _attached: Ebpf,
}

impl Sink {
    pub fn attach(site: &Site) -> Result<Self> {
        let mut ebpf = programs::attach("count", &[], &site.sink, SINK)?;
        Ok(Self { arrived: programs::per_cpu_array(&mut ebpf, "arrived")?, _attached: ebpf })
    }

    /// Datagrams so far.
    pub fn datagrams(&self) -> Result<u64> {
        Ok(self.arrivals()?.iter().map(|[datagrams, ..]| datagrams).sum())
    }

    /// `CLOCK_MONOTONIC` of the first datagram since [`Self::clear`].
    pub fn first_ns(&self) -> Result<Option<u64>> {
        Ok(self.arrivals()?.iter().map(|[.., first]| *first).filter(|&first| first > 0).min())
    }

    /// Forgets everything. Nothing must be arriving.
    pub fn clear(&mut self) -> Result<()> {
        let cpus = nr_cpus().map_err(|(_, error)| error).context("number of CPUs")?;
        let nothing = PerCpuValues::try_from(vec![[0; 3]; cpus])?;
        self.arrived.set(0, nothing, 0).context("the sink's counters")
    }

    /// Waits until nothing has arrived for a while; datagrams so far.
    pub fn settled(&self) -> Result<u64> {
        const QUIET: Duration = Duration::from_millis(150);
        const ROUNDS: u32 = 40;
        let mut datagrams = self.datagrams()?;
        for _ in 0..ROUNDS {
            thread::sleep(QUIET);
            let now = self.datagrams()?;
            if now == datagrams {
                break;
            }
            datagrams = now;
        }
        Ok(datagrams)
    }

    fn arrivals(&self) -> Result<PerCpuValues<[u64; 3]>> {
        self.arrived.get(&0, 0).context("the sink's counters")
    }
}
