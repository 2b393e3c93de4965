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

/// Watches the monotonic clock up to this moment: on time where a sleep is not, at the price of a busy CPU.
pub fn spin_until(monotonic_ns: u64) {
    const WAKE_UP_NS: u64 = 200_000;
    if monotonic_ns > self::monotonic_ns() + WAKE_UP_NS {
        sleep_until(monotonic_ns - WAKE_UP_NS);
    }
    while self::monotonic_ns() < monotonic_ns {
        std::hint::spin_loop();
    }
}

fn now_ns(clock: ClockId) -> u64 {
    let now = clock_gettime(clock).expect("Linux has this clock");
    now.tv_sec().cast_unsigned() * 1_000_000_000 + now.tv_nsec().cast_unsigned()
}
