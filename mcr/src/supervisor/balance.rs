//! Whether the ledger balances: its equalities, judged look by look, a second apart. Pure.

use std::collections::BTreeMap;

use crate::rule::{Datapath, InterfaceName, OutputSlot, RuleSlot};

/// Looks in a row at which more is missing than can be in flight before that is an alarm.
const EXCESSIVE: u32 = 3;

/// Looks in a row at which nothing has moved before traffic rests: two seconds.
const RESTING: u32 = 2;

/// What an equality is of.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Subject {
    /// Frames, from the XDP program or the filter to the workers' hands.
    Frames(InterfaceName, Datapath),
    /// Datagrams, from the workers' hands to the rules.
    Datagrams(InterfaceName, Datapath),
    /// Datagrams of all rules that an interface has had, from the wire to the workers.
    Rules(InterfaceName),
    Rule(RuleSlot),
    Output(OutputSlot),
}

/// The counters of an equality, `came` = the sum of `accounted`.
///
/// What is accounted for was read first: what seems to be missing may be in flight, but what seems to be
/// there twice was counted twice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sums {
    pub came: u64,
    /// What went on, and what was dropped.
    pub accounted: [u64; 2],
    /// What may be missing here, since another equality accounts for it.
    pub elsewhere: u64,
    /// The most that can be between the two sides.
    pub in_flight: u64,
}

impl Sums {
    /// What is missing; below zero what was counted twice.
    pub fn gap(&self) -> i64 {
        self.gap_of(self.came)
    }

    fn gap_of(&self, came: u64) -> i64 {
        let accounted: u64 = self.accounted.iter().sum();
        let gap = i128::from(came) - i128::from(accounted);
        let gap = if gap < 0 { gap } else { (gap - i128::from(self.elsewhere)).max(0) };
        gap.clamp(i64::MIN.into(), i64::MAX.into()) as i64
    }

    fn moved_since(&self, before: &Self) -> bool {
        (self.came, self.accounted, self.elsewhere) != (before.came, before.accounted, before.elsewhere)
    }
}

/// What a look at an equality brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Judgement {
    /// Nothing new.
    Quiet,
    /// It does not hold.
    Raised,
    /// It still does not, by another gap.
    Restated,
    /// It holds again.
    Gone,
}

/// An equality, and what was seen of it.
#[derive(Clone, Debug, Default)]
struct Watch {
    last: Sums,
    /// Looks in a row at which nothing had moved.
    still: u32,
    /// Which way it was off by more than can be in flight, and at how many looks in a row.
    off: i64,
    looks_off: u32,
    /// The gap that the alarm states.
    alarm: Option<i64>,
}

impl Watch {
    fn judge(&mut self, now: Sums) -> Judgement {
        let before = std::mem::replace(&mut self.last, now);
        self.still = if now.moved_since(&before) { 0 } else { self.still + 1 };
        let (gap, rests) = (now.gap(), self.still >= RESTING);
        // What came since the last look may be unaccounted for because its counter is written down now and then.
        let missing = now.gap_of(before.came.min(now.came));
        let excessive = u64::try_from(missing).is_ok_and(|missing| missing > now.in_flight);
        let off = if gap < 0 { -1 } else { i64::from(excessive) };
        self.looks_off = if off == 0 || off != self.off { u32::from(off != 0) } else { self.looks_off + 1 };
        self.off = off;
        match self.alarm {
            None if self.looks_off >= EXCESSIVE || (rests && gap != 0) => {
                self.alarm = Some(gap);
                Judgement::Raised
            }
            // What is in flight may hide that something was counted twice, but nothing hides what is missing.
            Some(stated) if gap == 0 && (rests || stated > 0) => {
                self.alarm = None;
                Judgement::Gone
            }
            Some(stated) if rests && gap != stated => {
                self.alarm = Some(gap);
                Judgement::Restated
            }
            _ => Judgement::Quiet,
        }
    }
}

/// All equalities that were looked at.
#[derive(Debug, Default)]
pub struct Balance {
    watches: BTreeMap<Subject, Watch>,
}

impl Balance {
    /// Judges an equality by its counters of now.
    pub fn look(&mut self, subject: &Subject, now: Sums) -> Judgement {
        if let Some(watch) = self.watches.get_mut(subject) {
            return watch.judge(now);
        }
        self.watches.insert(subject.clone(), Watch { last: now, ..Watch::default() });
        Judgement::Quiet
    }

    /// How many equalities were looked at.
    pub fn len(&self) -> usize {
        self.watches.len()
    }

    /// Forgets what there is no more.
    pub fn retain(&mut self, is_there: impl Fn(&Subject) -> bool) {
        self.watches.retain(|subject, _| is_there(subject));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SUBJECT: Subject = Subject::Output(OutputSlot(7));

    fn sums(came: u64, accounted: u64) -> Sums {
        Sums { came, accounted: [accounted, 0], elsewhere: 0, in_flight: 100 }
    }

    /// What looks at these counters bring, one after another.
    fn check(looks: &[Sums], expected: &[Judgement]) {
        let mut balance = Balance::default();
        let judged: Vec<_> = looks.iter().map(|&now| balance.look(&SUBJECT, now)).collect();
        assert_eq!(judged, expected, "{looks:?}");
    }

    use Judgement::{Gone, Quiet, Raised, Restated};

    #[test]
    fn what_balances_is_quiet() {
        check(&[sums(0, 0); 5], &[Quiet; 5]);
        check(&[sums(0, 0), sums(9_000, 9_000), sums(20_000, 20_000)], &[Quiet; 3]);
        check(&[sums(10, 10); 4], &[Quiet; 4]);
    }

    #[test]
    fn what_can_be_in_flight_is_no_alarm_while_it_moves() {
        let looks: Vec<_> = (0..10).map(|look| sums(10_000 * look + 100, 10_000 * look)).collect();
        check(&looks, &[Quiet; 10]);
    }

    #[test]
    fn counters_that_are_written_down_late_are_no_alarm() {
        // Half of what came within the last second is not accounted for yet.
        let looks: Vec<_> = (0..10).map(|look| sums(10_000 * (look + 1), 10_000 * look + 5_000)).collect();
        check(&looks, &[Quiet; 10]);
    }

    #[test]
    fn more_than_can_be_in_flight_is_an_alarm_at_the_third_look() {
        let looks = |short: u64| (2..6).map(move |look| sums(10_000 * look, 10_000 * (look - 1) - short));
        let after = |first: Sums, looks: &mut dyn Iterator<Item = Sums>| {
            [first].into_iter().chain(looks).collect::<Vec<_>>()
        };
        check(&after(sums(10_000, 0), &mut looks(101)), &[Quiet, Quiet, Quiet, Raised, Quiet]);
        check(&after(sums(10_000, 0), &mut looks(100)), &[Quiet; 5]);
        // Twice is not enough.
        let twice = [sums(10_000, 10_000), sums(20_000, 9_899), sums(30_000, 19_899), sums(40_000, 40_000)];
        check(&twice, &[Quiet; 4]);
    }

    #[test]
    fn what_stays_when_traffic_rests_is_an_alarm_until_it_is_gone() {
        let (whole, short) = (sums(10_000, 10_000), sums(10_005, 10_000));
        check(
            &[whole, short, short, short, short, whole, whole],
            &[Quiet, Quiet, Quiet, Raised, Quiet, Gone, Quiet],
        );
        // More of it is said; that it plays again does not take it away, while something is missing.
        let (more, plays) = (sums(10_009, 10_000), sums(20_009, 20_000));
        check(
            &[short, short, short, more, more, more, plays, plays, plays],
            &[Quiet, Quiet, Raised, Quiet, Quiet, Restated, Quiet, Quiet, Quiet],
        );
    }

    #[test]
    fn what_was_counted_twice_is_an_alarm() {
        let (whole, twice) = (sums(10_000, 10_000), sums(10_000, 10_001));
        check(&[whole, twice, twice, twice, whole], &[Quiet, Quiet, Quiet, Raised, Quiet]);
        // While it plays, at the third look; what is then in flight may hide it, so only rest takes it away.
        let plays = |look: u64| sums(1_000 * look, 1_000 * look + 1);
        let hidden = sums(9_000, 9_000);
        check(
            &[plays(1), plays(2), plays(3), plays(4), hidden, hidden, hidden],
            &[Quiet, Quiet, Quiet, Raised, Quiet, Quiet, Gone],
        );
        // Of both signs in turn it is nothing that lasts.
        let short = |look: u64| sums(1_000 * look, 1_000 * (look - 2));
        check(&[plays(1), plays(2), plays(3), short(4), plays(5), plays(6)], &[Quiet; 6]);
    }

    #[test]
    fn what_others_account_for_may_be_missing() {
        let of = |came, elsewhere| Sums { elsewhere, ..sums(came, 10_000) };
        for (came, elsewhere, gap) in [
            (10_000, 0, 0),
            (10_005, 5, 0),
            (10_004, 5, 0),
            (10_006, 5, 1),
            (9_999, 5, -1),
            (u64::MAX, u64::MAX, 0),
            (u64::MAX, 0, i64::MAX),
            (0, 0, -10_000),
        ] {
            assert_eq!(of(came, elsewhere).gap(), gap, "{came} {elsewhere}");
        }
        check(&[of(10_005, 5); 4], &[Quiet; 4]);
        check(&[of(10_006, 5); 4], &[Quiet, Quiet, Raised, Quiet]);
    }

    #[test]
    fn what_is_no_more_is_forgotten() {
        let mut balance = Balance::default();
        let short = sums(5, 0);
        assert_eq!([balance.look(&SUBJECT, short), balance.look(&SUBJECT, short)], [Quiet; 2]);
        balance.retain(|subject| *subject != SUBJECT);
        assert_eq!([balance.look(&SUBJECT, short), balance.look(&SUBJECT, short)], [Quiet; 2]);
        assert_eq!(balance.look(&SUBJECT, short), Raised);
    }
}
