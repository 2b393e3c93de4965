//! Commands that run with less than root has.

use std::{io, os::unix::process::CommandExt, process::Command};

pub const CAP_NET_ADMIN: libc::c_ulong = 12;
pub const CAP_NET_RAW: libc::c_ulong = 13;
pub const CAP_IPC_LOCK: libc::c_ulong = 14;
pub const CAP_SYS_ADMIN: libc::c_ulong = 21;
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
