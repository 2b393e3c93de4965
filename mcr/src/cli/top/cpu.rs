//! The CPU time that a process has used, as `/proc` has it.

use std::{fs, time::Duration};

use nix::unistd::{SysconfVar, sysconf};

/// In user and in kernel mode; none where it cannot be read.
pub fn used(pid: u32) -> Option<Duration> {
    let ticks = ticks(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)?;
    let per_second = sysconf(SysconfVar::CLK_TCK).ok()??;
    Some(Duration::from_millis(ticks.saturating_mul(1000) / u64::try_from(per_second).ok()?.max(1)))
}

/// `utime` and `stime`, fields 14 and 15 of `proc_pid_stat(5)`. The second field, in parentheses, may hold anything.
pub fn ticks(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_ascii_whitespace().skip(11);
    let mut next = || fields.next()?.parse::<u64>().ok();
    next()?.checked_add(next()?)
}
