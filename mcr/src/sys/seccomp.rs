//! The system calls that a worker makes once it relays, and a holder once it holds; all others are answered by EPERM.

use seccompiler::{
    BackendError, BpfProgram, Error, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, apply_filter,
};

/// A worker's, by what they are for.
pub const WORKER: &[libc::c_long] = &[
    // The ring, the rings of AF_XDP sockets, and looking on before it sleeps.
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_sched_yield,
    // Commands and reports, error queues, long frames, counters and classic filters of sockets it was given.
    libc::SYS_recvmsg,
    libc::SYS_recvfrom,
    libc::SYS_sendmsg,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_close,
    // The log, on a pipe.
    libc::SYS_write,
    // Memory; what makes it executable is refused below.
    libc::SYS_brk,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    // Time, locks, random seeds.
    libc::SYS_clock_gettime,
    libc::SYS_futex,
    libc::SYS_getrandom,
    // Signals and the end, an abort among them.
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_restart_syscall,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_tgkill,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// A holder's.
pub const HOLDER: &[libc::c_long] = &[
    // Daemons and what they say.
    #[cfg(target_arch = "x86_64")]
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_accept4,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_close,
    // Memory.
    libc::SYS_brk,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    // The end, and going on after it was stopped.
    libc::SYS_restart_syscall,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// Calls that map memory, with protection as their third argument.
const MAPPING: [libc::c_long; 2] = [libc::SYS_mmap, libc::SYS_mprotect];

/// Confines this thread, for good; sets `no_new_privs` too.
///
/// # Errors
///
/// Where the kernel has no seccomp filters, or this architecture is none that they are made for.
pub fn confine(allowed: &[libc::c_long]) -> Result<(), Error> {
    apply_filter(&program(allowed)?)
}

fn program(allowed: &[libc::c_long]) -> Result<BpfProgram, BackendError> {
    const PROTECTION: u8 = 2;
    let executable = SeccompCmpOp::MaskedEq(libc::PROT_EXEC as u64);
    let plain = SeccompCondition::new(PROTECTION, SeccompCmpArgLen::Dword, executable, 0)?;
    let plain = SeccompRule::new(vec![plain])?;
    let always = allowed.iter().map(|&call| (call, Vec::new()));
    let rules = always.chain(MAPPING.map(|call| (call, vec![plain.clone()]))).collect();
    let refuse = SeccompAction::Errno(libc::EPERM as u32);
    SeccompFilter::new(rules, refuse, SeccompAction::Allow, std::env::consts::ARCH.try_into()?)?.try_into()
}
