//! Which eBPF programs are attached to a place: `BPF_PROG_QUERY`, which takes `CAP_NET_ADMIN` and `CAP_BPF`.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

use super::bpf;
use crate::rule::IfIndex;

const BPF_PROG_QUERY: libc::c_int = 16;
const BPF_F_QUERY_EFFECTIVE: u32 = 1;
const BPF_CGROUP_INET_EGRESS: u32 = 1;
const BPF_CGROUP_UDP4_SENDMSG: u32 = 14;
const BPF_TCX_EGRESS: u32 = 47;

/// `union bpf_attr` for this command, as long as the newest kernel writes to it.
#[repr(C)]
#[derive(Default)]
struct Query {
    target: u32,
    attach_type: u32,
    flags: u32,
    attach_flags: u32,
    program_ids: u64,
    count: u32,
    padding: u32,
    program_attach_flags: u64,
    link_ids: u64,
    link_attach_flags: u64,
    revision: u64,
}

/// How many programs a device runs on egress by tcx; none where the kernel has no tcx (before 6.6).
pub fn tcx_egress(interface: IfIndex) -> io::Result<u32> {
    let query = Query { target: interface.0, attach_type: BPF_TCX_EGRESS, ..Query::default() };
    let gone = [libc::EINVAL, libc::ENODEV];
    count(query).or_else(|error| if of(&error, &gone) { Ok(0) } else { Err(error) })
}

/// How many programs see, or may refuse, the datagrams of sockets that are made in a cgroup, those of its parents
/// included.
pub fn cgroup_egress(cgroup: BorrowedFd<'_>) -> io::Result<u32> {
    let target = cgroup.as_raw_fd().cast_unsigned();
    let mut programs = 0;
    for attach_type in [BPF_CGROUP_INET_EGRESS, BPF_CGROUP_UDP4_SENDMSG] {
        let query = Query { target, attach_type, flags: BPF_F_QUERY_EFFECTIVE, ..Query::default() };
        // A kernel without such programs.
        programs +=
            count(query).or_else(|error| if of(&error, &[libc::EINVAL]) { Ok(0) } else { Err(error) })?;
    }
    Ok(programs)
}

fn of(error: &io::Error, numbers: &[i32]) -> bool {
    error.raw_os_error().is_some_and(|number| numbers.contains(&number))
}

/// Asked without room for their ids, the kernel says how many there are.
fn count(mut query: Query) -> io::Result<u32> {
    // SAFETY: the structure is as long as all that the kernel writes to, and points nowhere.
    unsafe { bpf::call(BPF_PROG_QUERY, &mut query) }?;
    Ok(query.count)
}
