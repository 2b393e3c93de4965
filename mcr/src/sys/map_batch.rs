//! Many entries of an eBPF map in one call.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

use super::bpf;

const BPF_MAP_UPDATE_BATCH: libc::c_int = 26;

/// `union bpf_attr` for the batch commands.
#[repr(C)]
struct Batch {
    from: u64,
    to: u64,
    keys: u64,
    values: u64,
    count: u32,
    map: u32,
    element_flags: u64,
    flags: u64,
}

/// Puts maps into places of an array of maps. Returns when every program that was running has ended, after one wait for
/// all of them together (one by one before Linux 6.8).
pub fn set_inner_maps(outer: BorrowedFd<'_>, places: &[(u32, BorrowedFd<'_>)]) -> io::Result<()> {
    let keys: Vec<u32> = places.iter().map(|(place, _)| *place).collect();
    let values: Vec<u32> = places.iter().map(|(_, map)| map.as_raw_fd().cast_unsigned()).collect();
    let mut batch = Batch {
        from: 0,
        to: 0,
        keys: keys.as_ptr().addr() as u64,
        values: values.as_ptr().addr() as u64,
        count: places.len() as u32,
        map: outer.as_raw_fd().cast_unsigned(),
        element_flags: 0,
        flags: 0,
    };
    // SAFETY: the kernel reads `count` keys and values of four bytes, which outlive the call, and writes the count back.
    unsafe { bpf::call(BPF_MAP_UPDATE_BATCH, &mut batch) }?;
    Ok(())
}
