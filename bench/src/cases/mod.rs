//! What is measured: one file for each group of cases.

mod footprint;
mod overload;
mod paced;
mod rule_add;
mod saturation;

use anyhow::Result;
use clap::ValueEnum;

use crate::{bench::Bench, figures::Figures};

/// By the name that it is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Case {
    /// 1:1 as fast as it goes, by payload
    Saturation,
    /// 1:10 and 1:50
    Fanout,
    /// 1, 50 and 1,000 streams, each 1:1
    Streams,
    /// 1,000 rules of which one plays
    Rules,
    /// At 10 k/s and 150 k/s, and without a relay
    Latency,
    /// Loss at 250 k/s and 500 k/s, and the highest rate without
    Lossless,
    /// Three relays in a row at 150 k/s and 250 k/s
    Chain,
    /// Four times what goes: what arrives, and how soon all does afterwards
    Overload,
    /// CPU time with 100 rules and no traffic
    Idle,
    /// Resident in all
    Memory,
    /// From adding a rule to its first datagram
    RuleAdd,
}

impl Case {
    pub fn run(self, bench: &Bench, figures: &mut Figures) -> Result<()> {
        match self {
            Self::Saturation => saturation::saturation(bench, figures),
            Self::Fanout => saturation::fanout(bench, figures),
            Self::Streams => saturation::streams(bench, figures),
            Self::Rules => saturation::rules(bench, figures),
            Self::Latency => paced::latency(bench, figures),
            Self::Lossless => paced::lossless(bench, figures),
            Self::Chain => paced::chain(bench, figures),
            Self::Overload => overload::overload(bench, figures),
            Self::Idle => footprint::idle(bench, figures),
            Self::Memory => footprint::memory(bench, figures),
            Self::RuleAdd => rule_add::rule_add(bench, figures),
        }
    }
}
