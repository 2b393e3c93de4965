//! The system call `bpf()`.

use std::io;

/// Asks the kernel for one command (`BPF_...`), which may write its answer into the attributes.
///
/// # Safety
///
/// The attributes are a prefix of the command's part of `union bpf_attr`, the rest of which the kernel takes as zero. What
/// they point to outlives the call, and is as long as they say.
pub unsafe fn call<T>(command: libc::c_int, attributes: &mut T) -> io::Result<i32> {
    // SAFETY: the attributes are as long as is said, and are what the caller has made sure of.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attributes), size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as i32) }
}
