//! When to send how many datagrams: the k-th is due at `start + k / rate`, whatever happened before, so that a
//! run never drifts. Pure: the clock is the caller's.

/// Datagrams due within this time of one another leave by one wake-up.
const TICK_NS: u64 = 100_000;

const SECOND_NS: u128 = 1_000_000_000;

/// What to do now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Send this many, one or more; then tell [`Pacer::sent`].
    Send(u64),
    /// Nothing is due before this time.
    SleepUntil(u64),
    /// All are sent.
    Done,
}

/// The schedule of a run. Times are nanoseconds of one monotonic clock.
#[derive(Clone, Debug)]
pub struct Pacer {
    /// Datagrams a second.
    rate: u64,
    total: Option<u64>,
    start_ns: u64,
    sent: u64,
    /// Datagrams that a wake-up waits for.
    per_tick: u64,
    /// Most that leave at once: 1 ms worth.
    per_burst: u64,
    /// When behind: not before this, so that what was missed is made up for at twice the rate and not in one burst.
    not_before_ns: u64,
    behind_max_ns: u64,
}

impl Pacer {
    /// `rate` is at least 1 a second; without `total` the run has no end.
    pub fn new(rate: u64, total: Option<u64>, start_ns: u64) -> Self {
        Self {
            rate,
            total,
            start_ns,
            sent: 0,
            per_tick: (rate / (1_000_000_000 / TICK_NS)).max(1),
            per_burst: (rate / 1_000).max(1),
            not_before_ns: start_ns,
            behind_max_ns: 0,
        }
    }

    /// As it is, but each datagram has a wake-up of its own.
    #[must_use]
    pub fn even(self) -> Self {
        Self { per_tick: 1, ..self }
    }

    pub fn step(&self, now_ns: u64) -> Step {
        if self.left() == 0 {
            return Step::Done;
        }
        if now_ns < self.not_before_ns {
            return Step::SleepUntil(self.not_before_ns);
        }
        let due = self.due(now_ns).saturating_sub(self.sent).min(self.left());
        let wanted = self.per_tick.min(self.left());
        if due < wanted {
            return Step::SleepUntil(self.deadline_ns(self.sent + wanted - 1));
        }
        Step::Send(due.min(self.per_burst))
    }

    /// `count` datagrams left; the first of them was begun at `begun_ns`.
    pub fn sent(&mut self, count: u64, begun_ns: u64) {
        if count == 0 {
            return;
        }
        self.behind_max_ns = self.behind_max_ns.max(begun_ns.saturating_sub(self.deadline_ns(self.sent)));
        self.sent += count;
        self.not_before_ns = begun_ns + self.span_ns(count) / 2;
    }

    /// The longest time that a datagram left after its deadline.
    pub fn behind_max_ns(&self) -> u64 {
        self.behind_max_ns
    }

    fn left(&self) -> u64 {
        self.total.map_or(u64::MAX, |total| total - self.sent)
    }

    /// How many have a deadline of `now_ns` or before.
    fn due(&self, now_ns: u64) -> u64 {
        match now_ns.checked_sub(self.start_ns) {
            Some(elapsed) => (u128::from(elapsed) * u128::from(self.rate) / SECOND_NS) as u64 + 1,
            None => 0,
        }
    }

    /// When the k-th is due: the first moment at which [`Self::due`] is more than k.
    fn deadline_ns(&self, k: u64) -> u64 {
        self.start_ns + self.span_ns(k)
    }

    fn span_ns(&self, count: u64) -> u64 {
        (u128::from(count) * SECOND_NS).div_ceil(u128::from(self.rate)) as u64
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const START: u64 = 5_000_000_000;

    /// Runs the schedule with a clock that oversleeps by `late_ns`; returns bursts as (time since start, count).
    fn run(rate: u64, total: u64, late_ns: impl FnMut() -> u64) -> (Pacer, Vec<(u64, u64)>) {
        drive(Pacer::new(rate, Some(total), START), late_ns)
    }

    fn drive(mut pacer: Pacer, mut late_ns: impl FnMut() -> u64) -> (Pacer, Vec<(u64, u64)>) {
        let mut now = START;
        let mut bursts = Vec::new();
        loop {
            match pacer.step(now) {
                Step::Send(count) => {
                    bursts.push((now - START, count));
                    pacer.sent(count, now);
                }
                Step::SleepUntil(until) => {
                    assert!(until > now, "a sleep that does not sleep");
                    now = until + late_ns();
                }
                Step::Done => return (pacer, bursts),
            }
        }
    }

    #[test]
    fn sends_each_at_its_time_at_low_rates() {
        let (pacer, bursts) = run(1, 3, || 0);
        assert_eq!(bursts, [(0, 1), (1_000_000_000, 1), (2_000_000_000, 1)]);
        assert_eq!(pacer.behind_max_ns(), 0);
        let (_, bursts) = run(3, 4, || 0);
        assert_eq!(bursts, [(0, 1), (333_333_334, 1), (666_666_667, 1), (1_000_000_000, 1)]);
    }

    #[test]
    fn gathers_a_tick_at_high_rates() {
        let (pacer, bursts) = run(300_000, 300_000, || 0);
        assert!(bursts.iter().all(|&(_, count)| count <= 30), "{bursts:?}");
        assert!(bursts.len() <= 10_002, "{} wake-ups", bursts.len());
        assert!(pacer.behind_max_ns() <= TICK_NS);
    }

    #[test]
    fn even_is_one_at_a_time_at_every_rate() {
        let pacer = Pacer::new(300_000, Some(1_000), START).even();
        let (_, bursts) = drive(pacer, || 0);
        assert!(bursts.iter().all(|&(_, count)| count == 1), "{bursts:?}");
        assert_eq!(bursts.len(), 1_000);
    }

    #[test]
    fn does_not_drift_when_every_sleep_is_late() {
        for rate in [1, 7, 1_000, 9_999, 10_000, 50_000, 300_000, 1_000_000] {
            let total = rate * 2;
            let (_, bursts) = run(rate, total, || 60_000);
            let (end, _) = bursts[bursts.len() - 1];
            assert_eq!(bursts.iter().map(|(_, count)| count).sum::<u64>(), total);
            assert!(end <= 2_000_200_000, "{rate}/s ends at {end}");
        }
    }

    #[test]
    fn makes_up_for_a_stall_at_twice_the_rate() {
        let mut stall = Some(50_000_000);
        let (pacer, bursts) = run(100_000, 100_000, || stall.take().unwrap_or(0));
        assert!(pacer.behind_max_ns() >= 49_000_000);
        assert!(bursts.iter().all(|&(_, count)| count <= 100), "a burst of more than 1 ms worth");
        // In no 10 ms more than twice the rate, a burst at each end allowed for.
        for (i, &(begin, _)) in bursts.iter().enumerate() {
            let within = bursts[i..].iter().take_while(|(at, _)| *at < begin + 10_000_000);
            assert!(within.map(|(_, count)| count).sum::<u64>() <= 2_100, "from {begin}");
        }
        assert!(bursts[bursts.len() - 1].0 <= 1_000_000_000);
    }

    proptest! {
        #[test]
        fn sends_all_and_none_too_early(
            rate in 1..2_000_000u64,
            total in 0..3_000u64,
            late in prop::collection::vec(0..3_000_000u64, 1..20),
        ) {
            let mut late = late.into_iter().cycle();
            let (_, bursts) = run(rate, total, || late.next().unwrap_or(0));
            let mut sent = 0;
            for (at, count) in bursts {
                sent += count;
                let due = u128::from(at) * u128::from(rate) / 1_000_000_000 + 1;
                prop_assert!(u128::from(sent) <= due);
            }
            prop_assert_eq!(sent, total);
        }
    }
}
