//! Which sequence numbers of one stream of one run have arrived: a sliding bitmap, so that memory is the same
//! after a day as after a second.
//!
//! Exact for whatever arrives less than [`WINDOW`] sequence numbers behind the highest one. What arrives further behind
//! is `late`: whether it came before cannot be known, so it counts neither as a duplicate nor as arrived.

/// Sequence numbers that are remembered below the highest seen, itself included.
pub const WINDOW: u64 = 65_536;

const WORD_BITS: u64 = 64;

/// What an arrival was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrival {
    /// Higher than all before.
    New,
    /// New, after a higher one.
    Reordered,
    Duplicate,
    /// Too far behind to tell.
    Late,
}

/// The arrivals of one stream of one run, of which there was at least one.
#[derive(Clone, Debug)]
pub struct SequenceLedger {
    /// Bit `sequence % WINDOW`: whether it arrived. Bits outside of the window are 0.
    seen: Box<[u64]>,
    lowest: u64,
    highest: u64,
    counts: SequenceCounts,
}

/// Sums over arrivals: `unique + duplicates + late` is how many there were.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SequenceCounts {
    /// Sequence numbers that arrived.
    pub unique: u64,
    /// Sequence numbers between the lowest and the highest seen that did not arrive.
    pub lost: u64,
    pub duplicates: u64,
    pub reordered: u64,
    pub late: u64,
}

impl SequenceLedger {
    /// A ledger whose first arrival is `first`.
    pub fn new(first: u64) -> Self {
        let mut ledger = Self {
            seen: vec![0; (WINDOW / WORD_BITS) as usize].into_boxed_slice(),
            lowest: first,
            highest: first,
            counts: SequenceCounts { unique: 1, ..SequenceCounts::default() },
        };
        ledger.set(first);
        ledger
    }

    /// Enters an arrival.
    pub fn enter(&mut self, sequence: u64) -> Arrival {
        if sequence > self.highest {
            self.advance(sequence);
            self.set(sequence);
            self.counts.unique += 1;
            return Arrival::New;
        }
        let arrival = self.look_up(sequence);
        match arrival {
            Arrival::Late => self.counts.late += 1,
            Arrival::Duplicate => self.counts.duplicates += 1,
            Arrival::New | Arrival::Reordered => {
                self.set(sequence);
                self.lowest = self.lowest.min(sequence);
                self.counts.unique += 1;
                self.counts.reordered += 1;
            }
        }
        arrival
    }

    /// What [`Self::enter`] would find.
    pub fn look_up(&self, sequence: u64) -> Arrival {
        if sequence > self.highest {
            Arrival::New
        } else if self.highest - sequence >= WINDOW {
            Arrival::Late
        } else if self.is_set(sequence) {
            Arrival::Duplicate
        } else {
            Arrival::Reordered
        }
    }

    pub fn lowest(&self) -> u64 {
        self.lowest
    }

    pub fn highest(&self) -> u64 {
        self.highest
    }

    pub fn counts(&self) -> SequenceCounts {
        // As differences of positions, so that a span of all 2^64 does not overflow.
        SequenceCounts { lost: self.highest - self.lowest - (self.counts.unique - 1), ..self.counts }
    }

    /// Moves the window up to `highest`, forgetting what falls out of it.
    fn advance(&mut self, highest: u64) {
        if highest - self.highest >= WINDOW {
            self.seen.fill(0);
        } else {
            for sequence in self.highest + 1..=highest {
                let (word, bit) = place(sequence);
                self.seen[word] &= !bit;
            }
        }
        self.highest = highest;
    }

    fn set(&mut self, sequence: u64) {
        let (word, bit) = place(sequence);
        self.seen[word] |= bit;
    }

    fn is_set(&self, sequence: u64) -> bool {
        let (word, bit) = place(sequence);
        self.seen[word] & bit != 0
    }
}

impl std::ops::AddAssign for SequenceCounts {
    fn add_assign(&mut self, other: Self) {
        self.unique += other.unique;
        self.lost += other.lost;
        self.duplicates += other.duplicates;
        self.reordered += other.reordered;
        self.late += other.late;
    }
}

fn place(sequence: u64) -> (usize, u64) {
    let position = sequence % WINDOW;
    ((position / WORD_BITS) as usize, 1 << (position % WORD_BITS))
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::{Arrival::*, *};

    /// Enters `arrivals` one by one and compares what each was, and the sums.
    fn check(arrivals: &[(u64, Arrival)], lost: u64) {
        let mut ledger = SequenceLedger::new(arrivals[0].0);
        for (i, &(sequence, expected)) in arrivals.iter().enumerate().skip(1) {
            assert_eq!(ledger.look_up(sequence), expected, "look up of arrival {i}, {sequence}");
            assert_eq!(ledger.enter(sequence), expected, "arrival {i}, {sequence}");
        }
        let counts = ledger.counts();
        assert_eq!(counts.lost, lost, "{arrivals:?}");
        assert_eq!(counts.unique + counts.duplicates + counts.late, arrivals.len() as u64, "{arrivals:?}");
    }

    #[test]
    fn tells_arrivals_apart() {
        check(&[(0, New)], 0);
        check(&[(0, New), (1, New), (2, New)], 0);
        check(&[(0, New), (2, New)], 1);
        check(&[(0, New), (2, New), (1, Reordered), (1, Duplicate), (2, Duplicate), (3, New)], 0);
        check(&[(5, New), (3, Reordered), (5, Duplicate), (4, Reordered), (3, Duplicate)], 0);
        // Joining midway is no loss.
        check(&[(1_000_000, New), (1_000_001, New)], 0);
    }

    #[test]
    fn knows_its_window_to_the_last_sequence() {
        let top = WINDOW + 9;
        check(&[(0, New), (top, New), (10, Reordered), (9, Late), (10, Duplicate)], top - 2);
        // A jump of exactly the window, and of one less.
        check(&[(3, New), (3 + WINDOW, New), (3, Late), (4, Reordered)], WINDOW - 2);
        check(&[(3, New), (2 + WINDOW, New), (3, Duplicate)], WINDOW - 2);
        check(&[(3, New), (3 + 10 * WINDOW, New), (4 + 9 * WINDOW, Reordered)], 10 * WINDOW - 2);
    }

    #[test]
    fn counts_to_the_end_of_the_numbers() {
        check(&[(0, New), (u64::MAX, New), (u64::MAX - 1, Reordered)], u64::MAX - 2);
        check(&[(u64::MAX, New), (u64::MAX, Duplicate)], 0);
    }

    #[test]
    fn forgets_what_fell_out_on_a_long_run() {
        let mut ledger = SequenceLedger::new(0);
        for sequence in 1..10 * WINDOW {
            assert_eq!(ledger.enter(sequence), New);
            assert_eq!(ledger.enter(sequence - 1), Duplicate);
        }
        let counts = ledger.counts();
        assert_eq!((counts.unique, counts.duplicates, counts.lost), (10 * WINDOW, 10 * WINDOW - 1, 0));
    }

    /// The same by remembering everything.
    #[derive(Default)]
    struct Model {
        seen: HashSet<u64>,
        counts: SequenceCounts,
    }

    impl Model {
        fn enter(&mut self, sequence: u64) -> Arrival {
            let highest = self.seen.iter().max().copied();
            if highest.is_some_and(|highest| sequence.saturating_add(WINDOW) <= highest) {
                self.counts.late += 1;
                return Late;
            }
            if !self.seen.insert(sequence) {
                self.counts.duplicates += 1;
                return Duplicate;
            }
            self.counts.unique += 1;
            if highest.is_none_or(|highest| sequence > highest) {
                return New;
            }
            self.counts.reordered += 1;
            Reordered
        }

        fn counts(&self) -> SequenceCounts {
            let lowest = self.seen.iter().min().copied().unwrap_or(0);
            let highest = self.seen.iter().max().copied().unwrap_or(0);
            let lost = (lowest..=highest).filter(|sequence| !self.seen.contains(sequence)).count() as u64;
            SequenceCounts { lost, ..self.counts }
        }
    }

    fn compare(arrivals: impl IntoIterator<Item = u64>) {
        let mut arrivals = arrivals.into_iter();
        let mut model = Model::default();
        let Some(first) = arrivals.next() else { return };
        let mut ledger = SequenceLedger::new(first);
        model.enter(first);
        for sequence in arrivals {
            assert_eq!(ledger.enter(sequence), model.enter(sequence), "{sequence}");
        }
        assert_eq!(ledger.counts(), model.counts());
    }

    proptest! {
        #[test]
        fn agrees_with_a_set_near_by(arrivals in prop::collection::vec(0..200u64, 1..400)) {
            compare(arrivals);
        }

        #[test]
        fn agrees_with_a_set_across_windows(arrivals in prop::collection::vec(0..4 * WINDOW, 1..100)) {
            compare(arrivals);
        }

        #[test]
        fn agrees_with_a_set_on_a_shaky_stream(jitter in prop::collection::vec((0..9u64, 0..5u64), 1..400)) {
            // Mostly upwards, over several windows, each up to 1 window behind and sometimes twice.
            compare(jitter.iter().enumerate().map(|(i, &(back, step))| {
                (WINDOW + i as u64 * 700 + step).saturating_sub(back * WINDOW / 8)
            }));
        }
    }
}
