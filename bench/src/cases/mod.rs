//! What is measured: one file for each group of cases.

mod bursts;
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
    /// 1:4, 1:10 and 1:50
    Fanout,
    /// 1, 50 and 1,000 streams, each 1:1
    Streams,
    /// 1,000 rules of which one plays
    Rules,
    /// At 10 k/s and 150 k/s, and without a relay
    Latency,
    /// How evenly datagrams leave that came evenly
    Bursts,
    /// Loss at 250 k/s and 500 k/s, the highest rate without, and latency at 50 % and 90 % of it
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
    /// As it is typed.
    pub fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
    }

    /// How its figures came about, and with which sink.
    pub fn method(self) -> &'static str {
        match self {
            Self::Saturation | Self::Fanout | Self::Streams | Self::Rules => {
                "source: BPF, as fast as it goes; sink: an XDP program that counts and drops"
            }
            Self::Latency => "source: mcr gen --even; sink: mcr recv, by the kernel's receive stamp",
            Self::Bursts => {
                "source: mcr gen --even; sink: an XDP program that looks at the time between arrivals; a burst are \
                 datagrams that follow one another within half the time between two that are sent"
            }
            Self::Lossless => {
                "source: mcr gen, above 200 k/s with GSO, what is due within 100 us at once; sink: an XDP program that \
                 counts and drops, for latencies one that looks at the stamp"
            }
            Self::Chain => {
                "source: mcr gen, above 200 k/s with GSO; sink: an XDP program that counts and drops"
            }
            Self::Overload => "source: BPF, paced; sink: an XDP program that counts and drops",
            Self::Idle => "CPU time of the daemon and its worker, no traffic",
            Self::Memory => "RSS of the daemon and its worker together, and with shared pages counted once",
            Self::RuleAdd => {
                "from the call on the control socket to the sink, an XDP program; a stream of 20 k/s plays"
            }
        }
    }

    pub fn run(self, bench: &Bench, figures: &mut Figures) -> Result<()> {
        match self {
            Self::Saturation => saturation::saturation(bench, figures),
            Self::Fanout => saturation::fanout(bench, figures),
            Self::Streams => saturation::streams(bench, figures),
            Self::Rules => saturation::rules(bench, figures),
            Self::Latency => paced::latency(bench, figures),
            Self::Bursts => bursts::bursts(bench, figures),
            Self::Lossless => paced::lossless(bench, figures),
            Self::Chain => paced::chain(bench, figures),
            Self::Overload => overload::overload(bench, figures),
            Self::Idle => footprint::idle(bench, figures),
            Self::Memory => footprint::memory(bench, figures),
            Self::RuleAdd => rule_add::rule_add(bench, figures),
        }
    }
}
