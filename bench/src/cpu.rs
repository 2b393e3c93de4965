//! Which CPU does what, and how much of it was used.

use std::{
    fs, thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use nix::{
    sched::{CpuSet, sched_setaffinity},
    unistd::{Pid, SysconfVar, sysconf},
};
use serde::Serialize;

/// Generators and receivers; with them what the kernel does on arrival at the relay.
pub const SOURCE_CPU: usize = 0;
/// The relay, whichever it is.
pub const RELAY_CPU: usize = 1;

pub fn ensure_enough() -> Result<()> {
    let cpus = thread::available_parallelism().context("number of CPUs")?.get();
    ensure!(cpus >= 2, "two CPUs are needed, one for the source and one for the relay: there is {cpus}");
    Ok(())
}

/// Keeps the calling thread on one CPU.
pub fn pin(cpu: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu).context("a CPU's number")?;
    sched_setaffinity(Pid::from_raw(0), &set).with_context(|| format!("pin to CPU {cpu}"))
}

/// How a CPU stood still for a thread that had it for itself: its machine's other guests, or its firmware.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Stalls {
    /// Stalls longer than a tenth of a millisecond, of the time that was looked at.
    pub percent: f64,
    pub longest_us: u128,
}

/// Watches the clock on the relay's CPU.
pub fn stalls(time: Duration) -> Result<Stalls> {
    const STALL: Duration = Duration::from_micros(100);
    let watch = thread::spawn(move || {
        pin(RELAY_CPU)?;
        let start = Instant::now();
        let (mut last, mut stalled, mut longest) = (start, Duration::ZERO, Duration::ZERO);
        while last - start < time {
            let now = Instant::now();
            let gap = now - last;
            longest = longest.max(gap);
            if gap > STALL {
                stalled += gap;
            }
            last = now;
        }
        let percent = stalled.as_secs_f64() / (last - start).as_secs_f64() * 100.0;
        Ok(Stalls { percent, longest_us: longest.as_micros() })
    });
    watch.join().expect("the watch does not panic")
}

/// Time that both CPUs together were busy since the machine started.
pub fn busy() -> Result<Duration> {
    let text = fs::read_to_string("/proc/stat").context("/proc/stat")?;
    let ticks = text
        .lines()
        .filter_map(|line| {
            let (name, times) = line.split_once(' ')?;
            let cpu: usize = name.strip_prefix("cpu")?.parse().ok()?;
            [SOURCE_CPU, RELAY_CPU].contains(&cpu).then_some(times)
        })
        .map(busy_ticks)
        .sum::<u64>();
    let per_second = sysconf(SysconfVar::CLK_TCK)?.context("ticks a second")?;
    Ok(Duration::from_secs(ticks) / u32::try_from(per_second)?)
}

/// All but idle and iowait; what guests used is in user time.
fn busy_ticks(times: &str) -> u64 {
    let times = times.split_whitespace().take(8).enumerate();
    times.filter(|(at, _)| ![3, 4].contains(at)).filter_map(|(_, ticks)| ticks.parse::<u64>().ok()).sum()
}

/// Time that a process's threads ran.
pub fn of_process(pid: u32) -> Result<Duration> {
    let folder = format!("/proc/{pid}/task");
    let mut ran_ns = 0;
    for thread in fs::read_dir(&folder).with_context(|| folder.clone())? {
        let path = thread?.path().join("schedstat");
        let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        let first = text.split_whitespace().next().context("schedstat is empty")?;
        ran_ns += first.parse::<u64>().context("schedstat has no number")?;
    }
    Ok(Duration::from_nanos(ran_ns))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idle_iowait_and_guest_time_are_not_busy() {
        assert_eq!(busy_ticks(" 1 20 300 4000 50000 600000 7000000 80000000 9 9"), 87_600_321);
    }
}
