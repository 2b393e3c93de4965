//! What is known of the daemon, and what the operator wants to see of it. Pure: no clock, no terminal.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, VecDeque},
    time::{Duration, Instant},
};

use crate::api::wire::{Health, RuleInfo, RuleStats, Stats, Status, WorkerInfo};

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Sort {
    /// The busiest rule first
    Rate,
    /// The rule that loses most first
    Drops,
    Name,
}

/// One look at the daemon.
#[derive(Clone, Debug)]
pub struct Sample {
    pub at: Instant,
    pub stats: Stats,
    pub status: Status,
    pub rules: Vec<RuleInfo>,
    /// CPU time that workers have used, by process id, where it can be known.
    pub cpu: BTreeMap<u32, Duration>,
}

/// How often something was lost.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Drops {
    pub total: u64,
    pub rate: f64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    Active,
    Stalled,
    Pending,
    Failed,
}

/// A rule as it is shown.
#[derive(Clone, Debug)]
pub struct Row {
    pub name: String,
    pub input: String,
    pub outputs: Vec<String>,
    pub datapath: Option<String>,
    pub state: State,
    pub reason: Option<String>,
    pub received_pps: f64,
    pub sent_pps: f64,
    /// By reason, before and at the outputs.
    pub drops: BTreeMap<String, Drops>,
    /// Datagrams a second that came, oldest first.
    pub history: VecDeque<f64>,
}

impl Row {
    pub fn dropped(&self) -> Drops {
        let sum = |sum: Drops, drops: &Drops| Drops {
            total: sum.total.saturating_add(drops.total),
            rate: sum.rate + drops.rate,
        };
        self.drops.values().fold(Drops::default(), sum)
    }

    /// The reasons, worst first.
    pub fn reasons(&self) -> Vec<(&str, Drops)> {
        let mut reasons: Vec<_> =
            self.drops.iter().map(|(reason, drops)| (reason.as_str(), *drops)).collect();
        reasons.sort_by(|(_, a), (_, b)| b.rate.total_cmp(&a.rate).then(b.total.cmp(&a.total)));
        reasons
    }

    fn is_about(&self, text: &str) -> bool {
        [&self.name, &self.input].into_iter().chain(&self.outputs).any(|its| its.contains(text))
    }
}

#[derive(Clone, Debug)]
pub struct Worker {
    pub info: WorkerInfo,
    /// Percent of one CPU, where it is known.
    pub cpu: Option<f64>,
}

#[derive(Clone, Debug)]
pub struct Model {
    pub sort: Sort,
    pub filter: String,
    /// The filter is being typed.
    pub editing: bool,
    /// The rule that is looked at, unless it is the first.
    pub selected: Option<String>,
    /// Why there is no daemon now.
    pub lost: Option<String>,
    pub last: Option<Sample>,
    pub rows: Vec<Row>,
    pub workers: Vec<Worker>,
    /// Not known before the second look.
    pub received_bps: Option<f64>,
    /// Looks in the last minute, which histories go back.
    pub minute: usize,
}

impl Model {
    /// Nothing is known yet; it is looked once in an `interval`.
    pub fn new(sort: Sort, interval: Duration) -> Self {
        Self {
            sort,
            filter: String::new(),
            editing: false,
            selected: None,
            lost: None,
            last: None,
            rows: Vec::new(),
            workers: Vec::new(),
            received_bps: None,
            minute: ((60.0 / interval.as_secs_f64()).ceil() as usize).clamp(1, 600),
        }
    }

    /// There is no daemon now: what was known is shown on.
    pub fn lose(&mut self, why: String) {
        self.lost = Some(why);
    }

    /// Takes another look in.
    pub fn take(&mut self, sample: Sample) {
        // The counters of another daemon begin anew.
        let before = self.last.take().filter(|last| last.stats.since == sample.stats.since);
        let seconds = before.as_ref().map(|last| (sample.at - last.at).as_secs_f64()).filter(|s| *s > 0.0);
        let former = |name: &str| {
            let rules = before.iter().flat_map(|last| &last.stats.rules);
            rules.into_iter().find(|rule| rule.name == name)
        };
        let mut histories: BTreeMap<_, _> = self.rows.drain(..).map(|row| (row.name, row.history)).collect();
        let mut received = 0;
        for rule in &sample.stats.rules {
            let before = former(&rule.name);
            let bytes = before.map_or(rule.received_bytes, |before| before.received_bytes);
            received += rule.received_bytes.saturating_sub(bytes);
            let mut history = histories.remove(&rule.name).unwrap_or_default();
            history.push_back(rule.received_pps);
            history.drain(..history.len().saturating_sub(self.minute));
            let info = sample.rules.iter().find(|info| info.name == rule.name);
            self.rows.push(row(rule, info, drops(rule, before, seconds), history));
        }
        self.received_bps = seconds.map(|seconds| 8.0 * float(received) / seconds);
        let used = |worker: &WorkerInfo| {
            let (now, last) = (sample.cpu.get(&worker.pid?)?, before.as_ref()?.cpu.get(&worker.pid?)?);
            Some(100.0 * now.saturating_sub(*last).as_secs_f64() / seconds?)
        };
        let workers = sample.stats.workers.iter();
        self.workers = workers.map(|info| Worker { info: info.clone(), cpu: used(info) }).collect();
        self.lost = None;
        self.last = Some(sample);
    }

    /// The rules that are to be seen, in their order.
    pub fn shown(&self) -> Vec<&Row> {
        let mut shown: Vec<_> = self.rows.iter().filter(|row| row.is_about(&self.filter)).collect();
        shown.sort_by(|a, b| {
            let order = match self.sort {
                Sort::Rate => b.received_pps.total_cmp(&a.received_pps),
                Sort::Drops => {
                    let (a, b) = (a.dropped(), b.dropped());
                    b.rate.total_cmp(&a.rate).then(Reverse(a.total).cmp(&Reverse(b.total)))
                }
                Sort::Name => std::cmp::Ordering::Equal,
            };
            order.then_with(|| a.name.cmp(&b.name))
        });
        shown
    }

    /// The place of the rule that is looked at.
    pub fn place(&self, shown: &[&Row]) -> usize {
        let place = self.selected.as_ref().and_then(|name| shown.iter().position(|row| row.name == *name));
        place.unwrap_or(0)
    }

    /// All drops a second, of rules and of interfaces.
    pub fn drop_rate(&self) -> f64 {
        self.rows.iter().map(|row| row.dropped().rate).sum()
    }
}

fn row(
    rule: &RuleStats,
    info: Option<&RuleInfo>,
    drops: BTreeMap<String, Drops>,
    history: VecDeque<f64>,
) -> Row {
    let state = match info.map(|info| info.health) {
        Some(Health::Failed) => State::Failed,
        Some(Health::Pending) => State::Pending,
        _ if rule.stalled => State::Stalled,
        _ => State::Active,
    };
    Row {
        name: rule.name.clone(),
        input: rule.input.clone(),
        outputs: rule.outputs.iter().map(|output| output.to.clone()).collect(),
        datapath: rule.datapath.clone(),
        state,
        reason: info.and_then(|info| info.reason.clone()),
        received_pps: rule.received_pps,
        sent_pps: rule.outputs.iter().map(|output| output.sent_pps).sum(),
        drops,
        history,
    }
}

/// Drops of a rule by reason, with what was added since the look before.
fn drops(rule: &RuleStats, before: Option<&RuleStats>, seconds: Option<f64>) -> BTreeMap<String, Drops> {
    let former = before.map(totals).unwrap_or_default();
    let drops = |(reason, total): (&str, u64)| {
        let gained = total.saturating_sub(former.get(reason).copied().unwrap_or(0));
        // Of a rule that was not there before nothing is known of when.
        let rate = seconds.filter(|_| before.is_some()).map_or(0.0, |seconds| float(gained) / seconds);
        (reason.to_owned(), Drops { total, rate })
    };
    totals(rule).into_iter().map(drops).collect()
}

fn totals(rule: &RuleStats) -> BTreeMap<&str, u64> {
    let mut totals = BTreeMap::new();
    for (reason, count) in rule.outputs.iter().flat_map(|output| &output.dropped).chain(&rule.dropped) {
        let total: &mut u64 = totals.entry(reason.as_str()).or_default();
        *total = total.saturating_add(*count);
    }
    totals
}

#[expect(clippy::cast_precision_loss, reason = "three digits of it are shown")]
fn float(number: u64) -> f64 {
    number as f64
}
