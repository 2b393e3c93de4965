//! More is offered than can be relayed: what arrives, what it costs, and where the rest went.

use std::time::Instant;

use anyhow::{Result, ensure};

use crate::{
    bench::Bench,
    cpu,
    daemon::{IN_PORT, group_in},
    figures::{DELIVERED, Figures, OFFERED, PER_CPU_SECOND, Subject},
    generator::{self, Load, Offered},
    losses::Account,
    sink::Sink,
    site::Site,
    systems::{System, Work},
};

/// The payload where one must do: seven packets of an MPEG transport stream.
pub const PAYLOAD: u16 = 1316;

pub fn saturation(bench: &Bench, figures: &mut Figures) -> Result<()> {
    let payloads: &[u16] = if bench.quick { &[64, PAYLOAD] } else { &[64, 512, PAYLOAD, 1472] };
    let variants: Vec<_> = payloads
        .iter()
        .map(|&payload| Variant {
            name: format!("{payload} B"),
            load: load(payload, 0, 1),
            work: Work::ONE,
            systems: &[
                System::Redirect,
                System::AfXdp,
                System::AfPacket,
                System::Socat,
                System::KernelRouting,
                System::Ceiling,
            ],
        })
        .collect();
    compare(bench, "saturation", &variants, figures)
}

/// One input, many outputs: counted are the datagrams that leave.
pub fn fanout(bench: &Bench, figures: &mut Figures) -> Result<()> {
    let variants = [4, 10, 50].map(|outputs| Variant {
        name: format!("1:{outputs}"),
        load: load(PAYLOAD, 0, 1),
        work: Work { rules: 1, outputs },
        // A process for each of fifty outputs is nothing that one would run.
        systems: match outputs {
            4 => &[System::Redirect, System::AfXdp, System::Ceiling],
            10 => &[System::Redirect, System::AfXdp, System::AfPacket, System::Socat, System::Ceiling],
            _ => &[System::Redirect, System::AfXdp, System::AfPacket, System::Ceiling],
        },
    });
    compare(bench, "fanout", &variants, figures)
}

/// Many streams at once, round robin, each 1:1.
pub fn streams(bench: &Bench, figures: &mut Figures) -> Result<()> {
    let variants = [1, 50, 1000].map(|streams| Variant {
        name: streams.to_string(),
        load: load(PAYLOAD, 0, streams),
        work: Work { rules: streams, outputs: 1 },
        systems: &[System::Redirect, System::AfXdp, System::AfPacket, System::KernelRouting, System::Ceiling],
    });
    compare(bench, "streams", &variants, figures)
}

/// Many rules of which one plays, the last.
pub fn rules(bench: &Bench, figures: &mut Figures) -> Result<()> {
    let variants = [1, 1000].map(|rules| Variant {
        name: rules.to_string(),
        load: load(PAYLOAD, rules - 1, 1),
        work: Work { rules, outputs: 1 },
        systems: &[System::Redirect, System::AfXdp, System::AfPacket],
    });
    compare(bench, "rules", &variants, figures)
}

struct Variant {
    name: String,
    load: Load,
    work: Work,
    systems: &'static [System],
}

/// As fast as it goes, to a number of groups from a rule's on.
pub fn load(payload: u16, first: u32, streams: u32) -> Load {
    Load { payload, first: group_in(first), streams, port: IN_PORT, rate: None }
}

/// Systems take turns, so that what else the machine does meets all of them.
fn compare(bench: &Bench, case: &'static str, variants: &[Variant], figures: &mut Figures) -> Result<()> {
    for round in 1..=bench.rounds() {
        for variant in variants {
            for &system in variant.systems {
                let subject = Subject { case, variant: &variant.name, system: system.name() };
                bench.doing(&format!("{case} {}, round {round}: {}", variant.name, system.name()));
                measure(bench, subject, system, variant, figures)?;
            }
        }
    }
    Ok(())
}

fn measure(
    bench: &Bench,
    subject: Subject<'_>,
    system: System,
    variant: &Variant,
    figures: &mut Figures,
) -> Result<()> {
    let site = Site::build(1);
    let sink = Sink::attach(&site)?;
    let running = system.start(bench, &site, variant.work)?;
    let (window, sent) = generator::send_while(&site, &variant.load, |offered| {
        bench.pause(bench.warm_up())?;
        Window::measure(bench, &sink, offered)
    })?;
    let account = Account::draw_up(&site, &running, sent, sink.settled()?, variant.work.outputs)?;
    ensure!(account.delivered > 0, "{} delivered nothing of {sent}", system.name());
    figures.add(subject, DELIVERED, window.delivered);
    figures.add(subject, OFFERED, window.offered);
    figures.add(subject, PER_CPU_SECOND, window.delivered / window.busy_cpus);
    figures.add_account(subject, account);
    Ok(())
}

/// What happened in a stretch of time, a second.
pub struct Window {
    pub delivered: f64,
    pub offered: f64,
    /// CPUs that were busy, of two.
    pub busy_cpus: f64,
}

impl Window {
    #[expect(clippy::cast_precision_loss, reason = "counts are far below 2^52")]
    pub fn measure(bench: &Bench, sink: &Sink, offered: &Offered) -> Result<Self> {
        let read =
            || Ok::<_, anyhow::Error>((Instant::now(), sink.datagrams()?, offered.frames()?, cpu::busy()?));
        let (start, delivered, sent, busy) = read()?;
        bench.pause(bench.window())?;
        let (end, delivered_then, sent_then, busy_then) = read()?;
        let seconds = (end - start).as_secs_f64();
        Ok(Self {
            delivered: (delivered_then - delivered) as f64 / seconds,
            offered: (sent_then - sent) as f64 / seconds,
            busy_cpus: busy_then.saturating_sub(busy).as_secs_f64() / seconds,
        })
    }
}
