//! Far more is offered than can be relayed, and then less again.

use std::time::{Duration, Instant};

use anyhow::Result;

use crate::{
    bench::Bench,
    cases::saturation::{PAYLOAD, Window, load},
    figures::{Figures, Subject, Unit, metric},
    generator::{self, Offered},
    losses::Account,
    sink::Sink,
    site::Site,
    systems::{System, Work},
};

/// Rates to look for the best at, as parts of what is delivered under a flood.
const PARTS: [f64; 6] = [0.8, 0.9, 1.0, 1.1, 1.25, 1.5];
/// Of the best rate: the most that is offered.
const OVERLOAD: f64 = 4.0;

pub fn overload(bench: &Bench, figures: &mut Figures) -> Result<()> {
    for round in 1..=bench.rounds() {
        for system in [System::AfXdp, System::AfPacket] {
            let subject = Subject { case: "overload", variant: "", system: system.name() };
            bench.doing(&format!("overload, round {round}: {}", system.name()));
            let site = Site::build(1);
            let sink = Sink::attach(&site)?;
            let running = system.start(bench, &site, Work::ONE)?;
            let (found, sent) = generator::send_while(&site, &load(PAYLOAD, 0, 1), |offered| {
                Found::find(bench, &sink, offered)
            })?;
            let account = Account::draw_up(&site, &running, sent, sink.settled()?, 1)?;
            figures.add(subject, metric("best rate", Unit::PerSecond), found.best);
            figures.add(subject, metric("overloaded", Unit::PerSecond), found.overloaded);
            figures.add(subject, metric("of the best", Unit::Times), found.overloaded / found.best);
            figures.add(subject, metric("offered", Unit::Times), found.offered / found.best);
            if let Some(recovery) = found.recovery {
                let milliseconds = recovery.as_secs_f64() * 1e3;
                figures.add(subject, metric("recovery", Unit::Milliseconds), milliseconds);
            }
            figures.add_account(subject, account);
        }
    }
    Ok(())
}

/// Rates a second.
struct Found {
    best: f64,
    offered: f64,
    overloaded: f64,
    /// From the end of the overload until all that is offered has arrived for a slice, if it came to that.
    recovery: Option<Duration>,
}

impl Found {
    fn find(bench: &Bench, sink: &Sink, offered: &Offered) -> Result<Self> {
        let at = |rate| {
            offered.set_rate(rate)?;
            bench.pause(bench.warm_up() / 2)?;
            Window::measure(bench, sink, offered)
        };
        let flooded = at(None)?.delivered;
        let mut best = flooded;
        for part in PARTS {
            best = best.max(at(Some(flooded * part))?.delivered);
        }
        let overloaded = at(Some(best * OVERLOAD))?;
        offered.set_rate(Some(best / 2.0))?;
        let recovery = recovery(bench, sink, offered)?;
        Ok(Self { best, offered: overloaded.offered, overloaded: overloaded.delivered, recovery })
    }
}

/// Time until what arrives is what is offered, looked at in slices.
#[expect(clippy::cast_precision_loss, reason = "counts are far below 2^52")]
fn recovery(bench: &Bench, sink: &Sink, offered: &Offered) -> Result<Option<Duration>> {
    const SLICE: Duration = Duration::from_millis(10);
    const LIMIT: Duration = Duration::from_secs(3);
    const ALL: f64 = 0.98;
    let start = Instant::now();
    let mut before = (offered.frames()?, sink.datagrams()?);
    loop {
        bench.pause(SLICE)?;
        let elapsed = start.elapsed();
        let now = (offered.frames()?, sink.datagrams()?);
        let (sent, delivered) = (now.0 - before.0, now.1 - before.1);
        if sent > 0 && delivered as f64 >= ALL * sent as f64 {
            return Ok(Some(elapsed));
        }
        if elapsed > LIMIT {
            return Ok(None);
        }
        before = now;
    }
}
