//! What a process holds.

use std::fs;

/// Descriptors and memory of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    pub descriptors: usize,
    /// In RAM, shared memory included.
    pub resident_kib: u64,
    /// Of that, what no file stands behind: the process's own.
    pub private_kib: u64,
}

impl Usage {
    #[track_caller]
    pub fn of(pid: u32) -> Self {
        let folder = format!("/proc/{pid}");
        let status = fs::read_to_string(format!("{folder}/status")).expect("a process that runs");
        let kib = |key: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(key));
            let value = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
            value.unwrap_or_else(|| panic!("no {key} in {status}"))
        };
        Self {
            descriptors: fs::read_dir(format!("{folder}/fd")).expect("a process of this user").count(),
            resident_kib: kib("VmRSS:"),
            private_kib: kib("RssAnon:"),
        }
    }
}
