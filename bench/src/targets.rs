//! What mcr promises of its speed, and whether this run found it so.

use serde::Serialize;

use crate::{
    figures::{Figures, Subject, Unit},
    report,
};

/// Where a figure stands: case, variant, system, metric.
type Place = (&'static str, &'static str, &'static str, &'static str);

/// What is read out of the figures.
#[derive(Clone, Copy)]
enum Reading {
    Figure(Place),
    Ratio(Place, Place),
    Difference(Place, Place),
}

#[derive(Clone, Copy)]
enum Bound {
    AtLeast(f64),
    AtMost(f64),
}

#[derive(Clone, Copy)]
struct Promise {
    reading: Reading,
    bound: Bound,
    /// What was to be offered for the reading to say anything, and at least how much of it.
    given: Option<(Place, f64)>,
}

/// A promise, and what is aimed for.
struct Target {
    what: &'static str,
    must: Option<Promise>,
    aim: Option<Promise>,
}

/// What a run found of a promise.
#[derive(Clone, Debug, Serialize)]
pub struct Finding {
    /// As it is read by people.
    pub promised: String,
    pub found: String,
    pub verdict: Verdict,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    Met,
    NotMet,
    /// The source did not offer what the promise is about.
    NotTried,
}

#[derive(Clone, Debug, Serialize)]
pub struct Judgement {
    pub what: &'static str,
    pub must: Option<Finding>,
    pub aim: Option<Finding>,
}

/// Every target whose figures this run has.
pub fn judge(figures: &Figures) -> Vec<Judgement> {
    targets()
        .into_iter()
        .filter_map(|Target { what, must, aim }| {
            let judge = |promise: Option<Promise>| promise.and_then(|promise| promise.judge(figures));
            let (must, aim) = (judge(must), judge(aim));
            (must.is_some() || aim.is_some()).then_some(Judgement { what, must, aim })
        })
        .collect()
}

fn targets() -> Vec<Target> {
    let mut targets = throughput();
    targets.extend(paced());
    targets.extend(upkeep());
    targets
}

const fn delivered(system: &'static str) -> Place {
    ("saturation", "1316 B", system, "delivered")
}

/// A ratio of two figures with a lower bound to meet and one to aim for.
fn at_least(what: &'static str, figure: Place, against: Place, must: f64, aim: f64) -> Target {
    let reading = Reading::Ratio(figure, against);
    Target {
        what,
        must: Some(Promise::of(reading, Bound::AtLeast(must))),
        aim: Some(Promise::of(reading, Bound::AtLeast(aim))),
    }
}

fn at_most(what: &'static str, figure: Place, must: f64, aim: Option<f64>) -> Target {
    let reading = Reading::Figure(figure);
    Target {
        what,
        must: Some(Promise::of(reading, Bound::AtMost(must))),
        aim: aim.map(|aim| Promise::of(reading, Bound::AtMost(aim))),
    }
}

fn throughput() -> Vec<Target> {
    let per_cpu_second = |system| ("saturation", "1316 B", system, "per CPU-second");
    let fanout = |system| ("fanout", "1:10", system, "delivered");
    let streams = |variant, system| ("streams", variant, system, "delivered");
    let rules = |variant, system| ("rules", variant, system, "delivered");
    vec![
        at_least("redirect 1:1 against the ceiling", delivered("redirect"), delivered("ceiling"), 0.75, 0.9),
        at_least(
            "redirect 1:4, outputs, against the ceiling's packets",
            ("fanout", "1:4", "redirect", "delivered"),
            delivered("ceiling"),
            1.0,
            1.3,
        ),
        at_least("af-xdp 1:1 against socat", delivered("af-xdp"), delivered("socat"), 6.5, 9.0),
        at_least(
            "af-xdp 1:1 against kernel routing",
            delivered("af-xdp"),
            delivered("kernel routing"),
            1.0,
            1.3,
        ),
        at_least("af-xdp 1:10, outputs against socat", fanout("af-xdp"), fanout("socat"), 8.0, 12.0),
        at_least("af-packet 1:1 against socat", delivered("af-packet"), delivered("socat"), 6.0, 8.0),
        at_least(
            "af-xdp per CPU-second against socat",
            per_cpu_second("af-xdp"),
            per_cpu_second("socat"),
            4.0,
            6.0,
        ),
        at_least(
            "af-packet per CPU-second against socat",
            per_cpu_second("af-packet"),
            per_cpu_second("socat"),
            4.0,
            6.0,
        ),
        at_least("af-xdp, 50 streams against 1", streams("50", "af-xdp"), streams("1", "af-xdp"), 0.75, 0.95),
        at_least(
            "af-packet, 50 streams against 1",
            streams("50", "af-packet"),
            streams("1", "af-packet"),
            0.75,
            0.95,
        ),
        at_least("af-xdp, 1,000 rules against 1", rules("1000", "af-xdp"), rules("1", "af-xdp"), 0.9, 0.97),
        at_least(
            "af-packet, 1,000 rules against 1",
            rules("1000", "af-packet"),
            rules("1", "af-packet"),
            0.9,
            0.97,
        ),
    ]
}

fn paced() -> Vec<Target> {
    let latency = |variant, system, metric| ("latency", variant, system, metric);
    let (slow, fast) = ("10 k/s", "150 k/s");
    let over_none = |metric, most| {
        let reading = Reading::Difference(latency(slow, "af-xdp", metric), latency(slow, "no relay", metric));
        Promise::of(reading, Bound::AtMost(most))
    };
    let below_socat = Promise::of(
        Reading::Ratio(latency(slow, "af-xdp", "p50"), latency(slow, "socat", "p50")),
        Bound::AtMost(1.0),
    );
    let to_routing = |metric, most| {
        let routing = latency(slow, "kernel routing", metric);
        Promise::of(Reading::Ratio(latency(slow, "redirect", metric), routing), Bound::AtMost(most))
    };
    // At rates that the source reached.
    let none_lost = |case, variant, rate: f64, system| Promise {
        given: Some(((case, variant, system, "sent"), 0.98 * rate)),
        ..Promise::of(Reading::Figure((case, variant, system, "lost")), Bound::AtMost(0.0))
    };
    vec![
        Target {
            what: "redirect p50 at 10 k/s, to kernel routing's",
            must: Some(to_routing("p50", 1.2)),
            aim: Some(to_routing("p50", 1.0)),
        },
        Target {
            what: "redirect p99 at 10 k/s, to kernel routing's",
            must: Some(to_routing("p99", 1.2)),
            aim: Some(to_routing("p99", 1.0)),
        },
        Target {
            what: "af-xdp p50 at 10 k/s, to socat's; aim: over no relay",
            must: Some(below_socat),
            aim: Some(over_none("p50", 6.0)),
        },
        Target { what: "af-xdp p99 at 10 k/s, over no relay", must: None, aim: Some(over_none("p99", 10.0)) },
        at_most("af-xdp p50 at 150 k/s", latency(fast, "af-xdp", "p50"), 30.0, Some(15.0)),
        at_most("af-xdp p99 at 150 k/s", latency(fast, "af-xdp", "p99"), 300.0, None),
        Target {
            what: "af-xdp loss at 250 k/s; aim: at 500 k/s",
            must: Some(none_lost("lossless", "250 k/s", 250e3, "af-xdp")),
            aim: Some(none_lost("lossless", "500 k/s", 500e3, "af-xdp")),
        },
        Target {
            what: "af-packet loss at 250 k/s",
            must: Some(none_lost("lossless", "250 k/s", 250e3, "af-packet")),
            aim: None,
        },
        Target {
            what: "af-xdp, 3 in a row at 150 k/s; aim: at 250 k/s",
            must: Some(none_lost("chain", fast, 150e3, "af-xdp")),
            aim: Some(none_lost("chain", "250 k/s", 250e3, "af-xdp")),
        },
        Target {
            what: "af-packet, 3 in a row at 150 k/s; aim: at 250 k/s",
            must: Some(none_lost("chain", fast, 150e3, "af-packet")),
            aim: Some(none_lost("chain", "250 k/s", 250e3, "af-packet")),
        },
    ]
}

fn upkeep() -> Vec<Target> {
    let overload = |system, metric| ("overload", "", system, metric);
    let of_the_best = |what, system| {
        let at_least = |least| Promise {
            given: Some((overload(system, "offered"), 3.8)),
            ..Promise::of(Reading::Figure(overload(system, "of the best")), Bound::AtLeast(least))
        };
        Target { what, must: Some(at_least(0.9)), aim: Some(at_least(1.0)) }
    };
    let idle = |system| ("idle", "100 rules", system, "of a core");
    let memory = |system| ("memory", "one rule", system, "resident");
    let rule_add = |system| ("rule-add", "one more", system, "p99");
    vec![
        of_the_best("af-xdp overloaded 4 x, against its best rate", "af-xdp"),
        of_the_best("af-packet overloaded 4 x, against its best rate", "af-packet"),
        at_most("af-xdp overloaded: lost and not in a ledger", overload("af-xdp", "unexplained"), 0.0, None),
        at_most(
            "af-packet overloaded: lost and not in a ledger",
            overload("af-packet", "unexplained"),
            0.0,
            None,
        ),
        at_most("af-xdp idle with 100 rules", idle("af-xdp"), 0.5, Some(0.1)),
        at_most("af-packet idle with 100 rules", idle("af-packet"), 0.5, Some(0.1)),
        at_most("af-xdp resident memory", memory("af-xdp"), 96.0, Some(64.0)),
        at_most("af-packet resident memory", memory("af-packet"), 96.0, Some(64.0)),
        at_most("af-xdp rule add to first datagram, p99", rule_add("af-xdp"), 25.0, Some(10.0)),
        at_most("af-packet rule add to first datagram, p99", rule_add("af-packet"), 25.0, Some(10.0)),
    ]
}

impl Promise {
    const fn of(reading: Reading, bound: Bound) -> Self {
        Self { reading, bound, given: None }
    }

    fn judge(self, figures: &Figures) -> Option<Finding> {
        let (value, unit) = self.reading.of(figures)?;
        let (met, sign, bound) = match self.bound {
            Bound::AtLeast(least) => (value >= least, ">=", least),
            Bound::AtMost(most) => (value <= most, "<=", most),
        };
        let offered = match self.given {
            Some((place, least)) => Reading::Figure(place).of(figures)?.0 >= least,
            None => true,
        };
        let verdict = match (offered, met) {
            (false, _) => Verdict::NotTried,
            (true, true) => Verdict::Met,
            (true, false) => Verdict::NotMet,
        };
        let promised = format!("{sign} {}", report::number(bound, unit));
        Some(Finding { promised, found: report::number(value, unit), verdict })
    }
}

impl Reading {
    fn of(self, figures: &Figures) -> Option<(f64, Unit)> {
        let figure = |(case, variant, system, metric)| figures.get(Subject { case, variant, system }, metric);
        match self {
            Self::Figure(place) => {
                let figure = figure(place)?;
                // A loss in one round of three is a loss.
                let value = if place.3 == "lost" { figure.max } else { figure.median };
                Some((value, figure.metric.unit))
            }
            Self::Ratio(of, to) => Some((figure(of)?.median / figure(to)?.median, Unit::Times)),
            Self::Difference(of, less) => {
                let of = figure(of)?;
                Some((of.median - figure(less)?.median, of.metric.unit))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::figures::{DELIVERED, LOST, SENT};

    fn found(samples: &[(Place, crate::figures::Metric, f64)]) -> Vec<Judgement> {
        let mut figures = Figures::default();
        for &((case, variant, system, _), metric, sample) in samples {
            figures.add(Subject { case, variant, system }, metric, sample);
        }
        judge(&figures)
    }

    #[test]
    fn a_target_is_judged_if_its_figures_are_there() {
        assert!(found(&[(delivered("af-xdp"), DELIVERED, 7.0)]).is_empty());
        let judged = found(&[(delivered("af-xdp"), DELIVERED, 7.0), (delivered("socat"), DELIVERED, 1.0)]);
        let [only] = &judged[..] else { panic!("{judged:?}") };
        let (must, aim) = (only.must.as_ref().expect("a promise"), only.aim.as_ref().expect("an aim"));
        assert_eq!((must.verdict, aim.verdict), (Verdict::Met, Verdict::NotMet));
        assert_eq!((must.promised.as_str(), must.found.as_str()), (">= 6.50 x", "7.00 x"));
    }

    #[test]
    fn a_loss_in_any_round_is_a_loss_if_the_rate_was_reached() {
        let place = ("chain", "150 k/s", "af-packet", "lost");
        for (sent, verdict) in [(149_000.0, Verdict::NotMet), (140_000.0, Verdict::NotTried)] {
            let sent = (place, SENT, sent);
            let judged = found(&[(place, LOST, 0.0), (place, LOST, 0.01), (place, LOST, 0.0), sent]);
            assert_eq!(judged[0].must.as_ref().expect("a promise").verdict, verdict);
            assert!(judged[0].aim.is_none());
        }
    }
}
