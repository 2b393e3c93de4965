//! The clocks: monotonic for pacing and durations, real time for the stamps that travel.

use nix::{
    errno::Errno,
    sys::time::TimeSpec,
    time::{ClockId, ClockNanosleepFlags, clock_gettime, clock_nanosleep},
};

pub fn monotonic_ns() -> u64 {
    now_ns(ClockId::CLOCK_MONOTONIC)
}

pub fn realtime_ns() -> u64 {
    now_ns(ClockId::CLOCK_REALTIME)
}

/// Sleeps to a moment of the monotonic clock; a signal may end it early.
pub fn sleep_until(monotonic_ns: u64) {
    let until = TimeSpec::new(
        (monotonic_ns / 1_000_000_000).cast_signed(),
        (monotonic_ns % 1_000_000_000).cast_signed(),
    );
    match clock_nanosleep(ClockId::CLOCK_MONOTONIC, ClockNanosleepFlags::TIMER_ABSTIME, &until) {
        Ok(_) | Err(Errno::EINTR) => {}
        Err(errno) => unreachable!("an absolute sleep on CLOCK_MONOTONIC: {errno}"),
    }
}

/// A moment of the real-time clock as RFC 3339 has it, in UTC, to the millisecond.
pub fn rfc3339(realtime_ns: u64) -> String {
    let (seconds, milliseconds) = (realtime_ns / 1_000_000_000, realtime_ns / 1_000_000 % 1_000);
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = civil(days);
    let (hour, minute, second) = (second / 3_600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{milliseconds:03}Z")
}

/// Year, month and day of a day since 1970, by Howard Hinnant's `civil_from_days`: years begin in March, eras
/// of 400 years are alike.
fn civil(days: u64) -> (u64, u64, u64) {
    let day = days + 719_468;
    let (era, day_of_era) = (day / 146_097, day % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    (year, month, day_of_year - (153 * march_month + 2) / 5 + 1)
}

fn now_ns(clock: ClockId) -> u64 {
    let now = clock_gettime(clock).expect("Linux has this clock");
    now.tv_sec().cast_unsigned() * 1_000_000_000 + now.tv_nsec().cast_unsigned()
}

#[cfg(test)]
mod tests {
    use super::rfc3339;

    #[test]
    fn writes_dates() {
        let check = |seconds: u64, text| assert_eq!(rfc3339(seconds * 1_000_000_000), text);
        check(0, "1970-01-01T00:00:00.000Z");
        check(951_782_399, "2000-02-28T23:59:59.000Z");
        check(951_782_400, "2000-02-29T00:00:00.000Z");
        check(1_709_251_199, "2024-02-29T23:59:59.000Z");
        check(1_709_251_200, "2024-03-01T00:00:00.000Z");
        check(4_102_444_800, "2100-01-01T00:00:00.000Z");
        assert_eq!(rfc3339(1_234_567_890_987_654_321), "2009-02-13T23:31:30.987Z");
    }
}
