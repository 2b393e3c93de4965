//! The host: what its kernel and its sysctls allow.

use super::{Code, Finding, Outcome};
use crate::doctor::facts::Observations;

const HOST: &str = "host";

/// A membership takes some 50 bytes of it, a source list some hundred.
const LEAST_OPTMEM: u64 = 4096;

pub fn decide(seen: &Observations, outcome: &mut Outcome) {
    let host = &seen.host;
    let before = outcome.findings.len();
    let set = |key: &str, value: u32| format!("sudo sysctl -w {key}={value}");
    if let Some(level @ 1..) = host.io_uring_disabled {
        let whom = if level == 1 { "all but one group's processes" } else { "every process" };
        outcome.push(
            Finding::problem(
                Code::IoUringDisabled,
                HOST,
                format!(
                    "io_uring is forbidden to {whom} (kernel.io_uring_disabled={level}): no worker can start"
                ),
                set("kernel.io_uring_disabled", 0),
            )
            // Who runs already goes on.
            .only_if(seen.told().is_none_or(|told| told.status.workers_running == 0)),
        );
    }
    if host.bpf_jit_enable == Some(0) {
        outcome.push(Finding::note(
            Code::BpfJitOff,
            HOST,
            "eBPF programs are interpreted (net.core.bpf_jit_enable=0): each frame costs several times as much",
            set("net.core.bpf_jit_enable", 1),
        ));
    }
    if host.bpffs == Some(false) {
        outcome.push(Finding::note(
            Code::NoBpffs,
            HOST,
            "no bpffs is mounted at /sys/fs/bpf: what is pinned there cannot be seen from here",
            "sudo mount -t bpf bpf /sys/fs/bpf",
        ));
    }
    if let Some(bytes) = host.optmem_max.filter(|bytes| *bytes < LEAST_OPTMEM) {
        outcome.push(Finding::note(
            Code::OptmemSmall,
            HOST,
            format!(
                "sockets have {bytes} bytes for memberships and filters (net.core.optmem_max): joins may fail"
            ),
            set("net.core.optmem_max", 131_072),
        ));
    }
    if let Some(most @ ..5) = host.igmp_max_memberships {
        let key = "net.ipv4.igmp_max_memberships";
        let what = match most {
            0 => format!("a socket may join no group at all ({key}=0): nothing is joined"),
            few => format!("a socket may join {few} groups only ({key}): mcr needs a socket for every {few}"),
        };
        outcome.push(Finding::problem(Code::IgmpLimit, HOST, what, set(key, 20)).only_if(most == 0));
    }
    if outcome.findings.len() == before {
        outcome.well(HOST, format!("io_uring, eBPF and memberships are allowed; {} CPUs", host.cpus));
    }
}
