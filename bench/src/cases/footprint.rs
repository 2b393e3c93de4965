//! What mcr takes while it does nothing, and how much memory.

use std::{
    fs,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};

use crate::{
    bench::Bench,
    cases::saturation::PAYLOAD,
    cpu,
    daemon::{Daemon, IN_PORT, group_in},
    figures::{Figures, Subject, Unit, metric},
    site::Site,
    systems::System,
    traffic::Stream,
};

const DATAPATHS: [System; 2] = [System::AfXdp, System::AfPacket];

/// CPU time of the daemon and its workers with 100 rules and no traffic.
pub fn idle(bench: &Bench, figures: &mut Figures) -> Result<()> {
    const RULES: u32 = 100;
    let time = Duration::from_secs(if bench.quick { 3 } else { 10 });
    for system in DATAPATHS {
        bench.doing(&format!("idle: {}", system.name()));
        let site = Site::build(1);
        let daemon = Daemon::start(bench, site.relay(), system.name())?;
        daemon.relay(bench, RULES, 1)?;
        bench.pause(bench.warm_up())?;
        let processes = daemon.processes()?;
        let ran = || processes.iter().map(|&pid| cpu::of_process(pid)).sum::<Result<Duration>>();
        let (start, before) = (Instant::now(), ran()?);
        bench.pause(time)?;
        let used = ran()?.saturating_sub(before).as_secs_f64() / start.elapsed().as_secs_f64();
        let subject = Subject { case: "idle", variant: "100 rules", system: system.name() };
        figures.add(subject, metric("of a core", Unit::Percent), used * 100.0);
    }
    Ok(())
}

/// Resident memory of the daemon and its one worker, after some traffic.
pub fn memory(bench: &Bench, figures: &mut Figures) -> Result<()> {
    for system in DATAPATHS {
        bench.doing(&format!("memory: {}", system.name()));
        let site = Site::build(1);
        let daemon = Daemon::start(bench, site.relay(), system.name())?;
        daemon.relay(bench, 1, 1)?;
        let stream = Stream { to: (group_in(0), IN_PORT), rate: 100_000, payload: PAYLOAD };
        stream.send(bench, &site, Duration::from_millis(500))?;
        let subject = Subject { case: "memory", variant: "one rule", system: system.name() };
        let (mut resident, mut shared_out) = (0, 0);
        for pid in daemon.processes()? {
            resident += rollup(pid, "Rss:")?;
            shared_out += rollup(pid, "Pss:")?;
        }
        figures.add(subject, metric("resident", Unit::Megabytes), megabytes(resident));
        // Pages of several processes are counted once here.
        figures.add(subject, metric("proportional", Unit::Megabytes), megabytes(shared_out));
    }
    Ok(())
}

/// A sum over a process's memory, in KiB.
fn rollup(pid: u32, name: &str) -> Result<u32> {
    let path = format!("/proc/{pid}/smaps_rollup");
    let text = fs::read_to_string(&path).with_context(|| path.clone())?;
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let number = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
    number.with_context(|| format!("no {name} in {path}"))
}

fn megabytes(kib: u32) -> f64 {
    f64::from(kib) * 1024.0 / 1e6
}
