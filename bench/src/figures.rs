//! The figures of one run: taken sample by sample, looked up by targets, tables and plots.

use serde::Serialize;

use crate::losses::Account;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Unit {
    PerSecond,
    Microseconds,
    Milliseconds,
    Percent,
    Megabytes,
    Datagrams,
    Times,
}

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Metric {
    pub name: &'static str,
    pub unit: Unit,
}

pub const fn metric(name: &'static str, unit: Unit) -> Metric {
    Metric { name, unit }
}

pub const DELIVERED: Metric = metric("delivered", Unit::PerSecond);
pub const OFFERED: Metric = metric("offered", Unit::PerSecond);
pub const PER_CPU_SECOND: Metric = metric("per CPU-second", Unit::PerSecond);
pub const SENT: Metric = metric("sent", Unit::PerSecond);
pub const LOST: Metric = metric("lost", Unit::Percent);
pub const UNEXPLAINED: Metric = metric("unexplained", Unit::Datagrams);

/// One metric of one system in one variant of a case.
#[derive(Clone, Debug, Serialize)]
pub struct Figure {
    pub case: &'static str,
    pub variant: String,
    pub system: &'static str,
    pub metric: Metric,
    pub median: f64,
    pub min: f64,
    pub max: f64,
    pub samples: Vec<f64>,
}

/// Where the datagrams of one measurement went.
#[derive(Clone, Debug, Serialize)]
pub struct Loss {
    pub case: &'static str,
    pub variant: String,
    pub system: &'static str,
    #[serde(flatten)]
    pub account: Account,
}

/// Everything that a run found.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Figures {
    pub figures: Vec<Figure>,
    pub losses: Vec<Loss>,
}

/// Whose figure, in which circumstances.
#[derive(Clone, Copy, Debug)]
pub struct Subject<'a> {
    pub case: &'static str,
    pub variant: &'a str,
    pub system: &'static str,
}

impl Figures {
    pub fn add(&mut self, subject: Subject<'_>, metric: Metric, sample: f64) {
        let Subject { case, variant, system } = subject;
        let place = self.figures.iter_mut().find(|figure| figure.is(subject, metric.name));
        if let Some(figure) = place {
            figure.samples.push(sample);
            figure.sum_up();
            return;
        }
        let mut figure = Figure {
            case,
            variant: variant.to_owned(),
            system,
            metric,
            median: sample,
            min: sample,
            max: sample,
            samples: vec![sample],
        };
        figure.sum_up();
        self.figures.push(figure);
    }

    /// Where the datagrams went, and as a figure how many went nowhere that is known.
    #[expect(clippy::cast_precision_loss, reason = "counts are far below 2^52")]
    pub fn add_account(&mut self, subject: Subject<'_>, account: Account) {
        self.add(subject, UNEXPLAINED, account.unexplained as f64);
        let Subject { case, variant, system } = subject;
        self.losses.push(Loss { case, variant: variant.to_owned(), system, account });
    }

    pub fn get(&self, subject: Subject<'_>, metric: &str) -> Option<&Figure> {
        self.figures.iter().find(|figure| figure.is(subject, metric))
    }
}

impl Figure {
    fn is(&self, Subject { case, variant, system }: Subject<'_>, metric: &str) -> bool {
        self.case == case && self.variant == variant && self.system == system && self.metric.name == metric
    }

    fn sum_up(&mut self) {
        let mut sorted = self.samples.clone();
        sorted.sort_by(f64::total_cmp);
        self.median = median(&sorted);
        (self.min, self.max) = (sorted[0], sorted[sorted.len() - 1]);
    }
}

/// Of ascending samples, at least one.
fn median(sorted: &[f64]) -> f64 {
    let middle = sorted.len() / 2;
    if sorted.len().is_multiple_of(2) {
        f64::midpoint(sorted[middle - 1], sorted[middle])
    } else {
        sorted[middle]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_of_one_subject_are_summed_up() {
        let subject = Subject { case: "saturation", variant: "64 B", system: "socat" };
        let mut figures = Figures::default();
        for sample in [3.0, 1.0, 10.0, 2.0] {
            figures.add(subject, DELIVERED, sample);
        }
        figures.add(Subject { system: "ceiling", ..subject }, DELIVERED, 7.0);
        let figure = figures.get(subject, DELIVERED.name).expect("just added");
        assert!((figure.median - 2.5).abs() < 1e-9);
        assert!((figure.min - 1.0).abs() < 1e-9 && (figure.max - 10.0).abs() < 1e-9);
        assert_eq!(figures.figures.len(), 2);
    }
}
