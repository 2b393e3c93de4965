//! How long a worker that finds no frames looks on before it sleeps. Pure: the clock is the caller's.
//!
//! To sleep and be woken costs a worker some microseconds of CPU, and its next frame more than that. So where
//! frames usually come within that time it is cheaper for both to look on; where they do not, only now and then
//! is it tried again.

use std::time::{Duration, Instant};

/// What sleeping and waking cost, about.
const WAKE_UP: Duration = Duration::from_micros(25);

/// One time in so many it is tried though it was in vain before.
const RARELY: u32 = 32;

/// Successes that are remembered, at most.
const MOST_LUCK: u8 = 8;

#[derive(Clone, Copy, Debug)]
enum State {
    Busy,
    LookingSince(Instant),
    /// Asleep, or awake for something else than frames.
    Resting,
}

#[derive(Debug)]
pub struct Idling {
    /// How long to look on in any case; otherwise it depends.
    always: Option<Duration>,
    state: State,
    /// How often looking on has been of use lately.
    luck: u8,
    /// Times that frames ran out.
    times: u32,
}

impl Idling {
    /// `busy_poll` is how long to look on each time; without it that depends on what comes.
    pub fn new(busy_poll: Option<Duration>) -> Self {
        Self { always: busy_poll, state: State::Resting, luck: 0, times: 0 }
    }

    /// Frames were found.
    pub fn found(&mut self) {
        if let State::LookingSince(_) = self.state {
            self.luck = (self.luck + 1).min(MOST_LUCK);
        }
        self.state = State::Busy;
    }

    /// Whether to look once more, there being no frames now.
    pub fn looks_on(&mut self, now: Instant) -> bool {
        match self.state {
            State::Busy => {
                self.times = self.times.wrapping_add(1);
                let worthwhile = self.luck > 0 || self.times.is_multiple_of(RARELY);
                if worthwhile || self.always.is_some() {
                    self.state = State::LookingSince(now);
                    return true;
                }
            }
            State::LookingSince(since) => {
                if now.duration_since(since) < self.always.unwrap_or(WAKE_UP) {
                    return true;
                }
                self.luck = self.luck.saturating_sub(2);
            }
            State::Resting => return false,
        }
        self.state = State::Resting;
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Time spent looking on, and how often the worker slept, for frames that come so far apart.
    fn idle(mut idling: Idling, gaps: impl IntoIterator<Item = u64>) -> (Duration, u32) {
        const STEP: Duration = Duration::from_micros(1);
        let (mut now, mut looked, mut slept) = (Instant::now(), Duration::ZERO, 0);
        for gap in gaps {
            idling.found();
            let next = now + Duration::from_micros(gap);
            while now < next && idling.looks_on(now) {
                now += STEP;
                looked += STEP;
            }
            slept += u32::from(now < next);
            now = next;
        }
        (looked, slept)
    }

    #[test]
    fn looks_on_where_frames_come_soon() {
        let (_, slept) = idle(Idling::new(None), std::iter::repeat_n(7, 10_000));
        assert!(slept <= RARELY, "{slept}");
    }

    #[test]
    fn sleeps_where_they_come_late_and_looks_on_in_vain_for_little_time() {
        let (looked, slept) = idle(Idling::new(None), std::iter::repeat_n(100, 10_000));
        assert_eq!(slept, 10_000);
        assert!(looked < Duration::from_millis(1_000 / 100), "{looked:?} of a second");
    }

    #[test]
    fn bursts_are_slept_between() {
        let gaps = [3, 3, 200].into_iter().cycle().take(30_000);
        let (looked, _) = idle(Idling::new(None), gaps);
        assert!(looked < Duration::from_millis(500), "{looked:?} of two seconds");
    }

    #[test]
    fn looks_on_as_long_as_it_is_told() {
        let told = |micros| Idling::new(Some(Duration::from_micros(micros)));
        assert_eq!(idle(told(500), [400; 100]), (Duration::from_millis(40), 0));
        assert_eq!(idle(told(50), [400; 100]), (Duration::from_millis(5), 100));
        assert_eq!(idle(told(0), [3; 100]).1, 100);
    }
}
