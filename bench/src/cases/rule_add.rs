//! From asking for a rule to its first datagram at the sink.

use std::time::Duration;

use anyhow::{Context as _, Result};
use nix::time::{ClockId, clock_gettime};

use crate::{
    bench::Bench,
    cases::saturation::PAYLOAD,
    daemon::{Daemon, IN_PORT, group_in},
    figures::{Figures, Subject, Unit, metric},
    sink::Sink,
    site::Site,
    systems::System,
    traffic::Stream,
};

/// The rule that comes and goes; those before it may stay.
const RULE: u32 = 1;
/// Its stream, so fast that the first datagram comes soon.
const RATE: u32 = 20_000;

/// A rule beside another, and the first one of a daemon, which takes programs, sockets and a worker.
pub fn rule_add(bench: &Bench, figures: &mut Figures) -> Result<()> {
    let (adds, starts) = if bench.quick { (20, 3) } else { (100, 20) };
    for system in [System::AfXdp, System::AfPacket] {
        bench.doing(&format!("rule-add: {}", system.name()));
        let site = Site::build(1);
        let mut sink = Sink::attach(&site)?;
        let stream = Stream { to: (group_in(RULE), IN_PORT), rate: RATE, payload: PAYLOAD };
        let _playing = stream.start(bench, &site);

        let mut first = Vec::new();
        for _ in 0..starts {
            let daemon = Daemon::start(bench, site.relay(), system.name())?;
            first.push(add(bench, &daemon, &mut sink)?);
        }
        let daemon = Daemon::start(bench, site.relay(), system.name())?;
        daemon.relay(bench, RULE, 1)?;
        let more = (0..adds).map(|_| add(bench, &daemon, &mut sink)).collect::<Result<Vec<_>>>()?;

        for (variant, mut took) in [("one more", more), ("the first", first)] {
            took.sort_by(f64::total_cmp);
            let subject = Subject { case: "rule-add", variant, system: system.name() };
            for (name, part) in [("p50", 0.5), ("p99", 0.99)] {
                figures.add(subject, metric(name, Unit::Milliseconds), percentile(&took, part));
            }
        }
    }
    Ok(())
}

/// Milliseconds until its first datagram; the rule is gone again afterwards.
#[expect(clippy::cast_precision_loss, reason = "three digits of it are shown")]
fn add(bench: &Bench, daemon: &Daemon, sink: &mut Sink) -> Result<f64> {
    sink.clear()?;
    // The BPF programs' clock.
    let asked = Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC)?);
    daemon.add(RULE)?;
    bench.wait_until("the new rule's first datagram", || Ok(sink.first_ns()?.is_some()))?;
    let first_ns = sink.first_ns()?.context("just seen")?;
    daemon.remove(RULE)?;
    // What had left is in.
    bench.pause(Duration::from_millis(5))?;
    Ok((first_ns as f64 - asked.as_nanos() as f64) / 1e6)
}

/// The smallest that at least this part is not above.
#[expect(clippy::cast_precision_loss, reason = "a hundred samples")]
fn percentile(ascending: &[f64], part: f64) -> f64 {
    let rank = (ascending.len() as f64 * part).ceil() as usize;
    ascending[rank.clamp(1, ascending.len()) - 1]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_samples() {
        let hundred: Vec<f64> = (1..=100).map(f64::from).collect();
        for (part, expected) in [(0.5, 50.0), (0.99, 99.0), (1.0, 100.0)] {
            assert!((percentile(&hundred, part) - expected).abs() < 1e-9);
        }
        assert!((percentile(&[7.0], 0.99) - 7.0).abs() < 1e-9);
    }
}
