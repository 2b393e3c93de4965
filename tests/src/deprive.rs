//! Commands that run with less than root has.

use std::{io, os::unix::process::CommandExt, process::Command};

pub const CAP_NET_ADMIN: libc::c_ulong = 12;
pub const CAP_NET_RAW: libc::c_ulong = 13;
pub const CAP_IPC_LOCK: libc::c_ulong = 14;
pub const CAP_SYS_ADMIN: libc::c_ulong = 21;
pub const CAP_PERFMON: libc::c_ulong = 38;
pub const CAP_BPF: libc::c_ulong = 39;

/// What lets a process use BPF: either of the two does.
pub const NO_BPF: &[libc::c_ulong] = &[CAP_BPF, CAP_SYS_ADMIN];

/// Makes the command run without these capabilities, as root's exec takes what the bounding set leaves.
pub fn without_capabilities(command: &mut Command, capabilities: &'static [libc::c_ulong]) {
    // SAFETY: between fork and exec the closure makes system calls only.
    unsafe {
        command.pre_exec(move || {
            for capability in capabilities {
                if libc::prctl(libc::PR_CAPBSET_DROP, *capability, 0, 0, 0) != 0 {
                    return Err(io::Error::last_os_error());
                }
            }
            Ok(())
        });
    }
}

/// What mcr documents that it uses, but for `CAP_PERFMON`: the programs must load without it too, where the verifier is
/// at its strictest.
pub const DOCUMENTED: &[libc::c_ulong] = &[CAP_NET_ADMIN, CAP_NET_RAW, CAP_IPC_LOCK, CAP_BPF];

/// All that mcr documents that it uses.
pub const ALL: &[libc::c_ulong] = &[CAP_NET_ADMIN, CAP_NET_RAW, CAP_IPC_LOCK, CAP_PERFMON, CAP_BPF];

/// The ordinary user that tests become.
pub const NOBODY: u32 = 65_534;

/// Makes the command run as an ordinary user who has these capabilities alone, as a service manager gives them.
pub fn as_ordinary_user(command: &mut Command, capabilities: &'static [libc::c_ulong]) {
    // SAFETY: between fork and exec the closure makes system calls only, straight ones: those of libc would
    // wait for threads that the child does not have.
    unsafe {
        command.pre_exec(move || {
            let nobody = libc::c_long::from(NOBODY);
            let mut done = libc::prctl(libc::PR_SET_KEEPCAPS, 1) == 0
                && libc::syscall(libc::SYS_setgroups, 0, 0) == 0
                && libc::syscall(libc::SYS_setresgid, nobody, nobody, nobody) == 0
                && libc::syscall(libc::SYS_setresuid, nobody, nobody, nobody) == 0
                && set_capabilities(capabilities)
                // Another user's wish to be killed with a parent is forgotten.
                && libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) == 0;
            for capability in capabilities {
                done &= libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_RAISE, *capability, 0, 0) == 0;
            }
            if done { Ok(()) } else { Err(io::Error::last_os_error()) }
        });
    }
}

/// Leaves the calling thread these capabilities alone.
#[track_caller]
pub fn keep_on_this_thread(capabilities: &[libc::c_ulong]) {
    assert!(set_capabilities(capabilities), "capset: {}", io::Error::last_os_error());
}

/// Makes the calling thread the ordinary user, with these capabilities alone.
#[track_caller]
pub fn become_ordinary_on_this_thread(capabilities: &[libc::c_ulong]) {
    let nobody = libc::c_long::from(NOBODY);
    // SAFETY: straight system calls, which change the calling thread alone.
    let done = unsafe {
        libc::prctl(libc::PR_SET_KEEPCAPS, 1) == 0
            && libc::syscall(libc::SYS_setgroups, 0, 0) == 0
            && libc::syscall(libc::SYS_setresgid, nobody, nobody, nobody) == 0
            && libc::syscall(libc::SYS_setresuid, nobody, nobody, nobody) == 0
    };
    assert!(done, "become user {NOBODY}: {}", io::Error::last_os_error());
    keep_on_this_thread(capabilities);
}

/// Makes system calls only.
fn set_capabilities(capabilities: &[libc::c_ulong]) -> bool {
    let [low, high] = [0, 32].map(|first| {
        let of_word = capabilities.iter().filter(|capability| (first..first + 32).contains(*capability));
        of_word.fold(0u32, |mask, capability| mask | 1 << (capability - first))
    });
    // `_LINUX_CAPABILITY_VERSION_3`, and effective, permitted and inheritable ones of either word.
    let header = [0x2008_0522u32, 0];
    let sets = [low, low, low, high, high, high];
    // SAFETY: the kernel reads a header and two words of three sets, which outlive the call.
    unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), sets.as_ptr()) == 0 }
}

/// Makes the command run with one system call answered by an error.
pub fn without_syscall(command: &mut Command, syscall: libc::c_long, errno: i32) {
    let instruction = |code: u32, k: u32, jf: u8| libc::sock_filter { code: code as u16, jt: 0, jf, k };
    let number = u32::try_from(syscall).expect("a system call's number");
    // A = the system call's number; if it is this one, answer the error; otherwise allow.
    let filter = [
        instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0),
        instruction(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, number, 1),
        instruction(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ERRNO | errno.cast_unsigned(), 0),
        instruction(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW, 0),
    ];
    // SAFETY: between fork and exec the closure makes system calls only; the filter is its own copy and
    // is as long as is said.
    unsafe {
        command.pre_exec(move || {
            let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_ptr().cast_mut() };
            if libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0
                || libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) != 0
            {
                return Err(io::Error::last_os_error());
            }
            Ok(())
        });
    }
}

/// Makes the command run with a limit, soft and hard.
pub fn with_limit(command: &mut Command, resource: libc::__rlimit_resource_t, value: u64) {
    // SAFETY: between fork and exec the closure makes a system call only.
    unsafe {
        command.pre_exec(move || {
            let limit = libc::rlimit { rlim_cur: value, rlim_max: value };
            if libc::setrlimit(resource, &raw const limit) == 0 {
                Ok(())
            } else {
                Err(io::Error::last_os_error())
            }
        });
    }
}
