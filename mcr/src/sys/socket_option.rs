//! Socket options that no library of ours names.

use std::{io, os::fd::AsRawFd};

/// Sets an option whose value the kernel knows as `T`, a C structure or integer.
pub fn set<T: Copy>(socket: &impl AsRawFd, level: i32, name: i32, value: &T) -> io::Result<()> {
    let len = size_of::<T>() as libc::socklen_t;
    // SAFETY: the kernel reads `len` bytes of the value, which outlives the call.
    let result =
        unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, std::ptr::from_ref(value).cast(), len) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Asks by a value that the kernel completes, a C structure.
pub fn complete<T: Copy>(socket: &impl AsRawFd, level: i32, name: i32, value: &mut T) -> io::Result<()> {
    let mut len = size_of::<T>() as libc::socklen_t;
    let value = std::ptr::from_mut(value);
    // SAFETY: the kernel reads and writes at most `len` bytes, the size of the value, which outlives the call.
    let result = unsafe { libc::getsockopt(socket.as_raw_fd(), level, name, value.cast(), &raw mut len) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Sets the size of a buffer beyond the system's limit, or up to it where that takes a capability that is
/// missing.
pub fn set_buffer(socket: &impl AsRawFd, forced: i32, limited: i32, bytes: i32) -> io::Result<()> {
    set(socket, libc::SOL_SOCKET, forced, &bytes).or_else(|_| set(socket, libc::SOL_SOCKET, limited, &bytes))
}

/// Puts a classic filter on a socket, in the place of the one that it has.
pub fn attach_filter(socket: &impl AsRawFd, instructions: &mut [libc::sock_filter]) -> io::Result<()> {
    let program = libc::sock_fprog { len: instructions.len() as u16, filter: instructions.as_mut_ptr() };
    set(socket, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &program)
}

/// Reads an option of `N` bytes.
pub fn get<const N: usize>(socket: &impl AsRawFd, level: i32, name: i32) -> io::Result<[u8; N]> {
    let mut value = [0u8; N];
    ask(socket, level, name, &mut value)?;
    Ok(value)
}

/// Reads an option into the place of the question that it takes.
pub fn ask(socket: &impl AsRawFd, level: i32, name: i32, value: &mut [u8]) -> io::Result<()> {
    let mut len = value.len() as libc::socklen_t;
    // SAFETY: the kernel reads and writes at most `len` bytes, the length of the slice.
    let result =
        unsafe { libc::getsockopt(socket.as_raw_fd(), level, name, value.as_mut_ptr().cast(), &raw mut len) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
