//! Descriptors that a process has from whoever started it.

use std::io;

/// Closes all but the standard streams: a pipe that somebody waits on for its end is not to be held for ever. To be called
/// before the process opens any of its own.
pub fn close() -> io::Result<()> {
    const FIRST: libc::c_uint = 3;
    // SAFETY: the call takes integers; nothing in this process has a descriptor of these yet.
    let result = unsafe { libc::syscall(libc::SYS_close_range, FIRST, libc::c_uint::MAX, 0) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
