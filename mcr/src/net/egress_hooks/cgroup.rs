//! eBPF programs on the cgroup that our sockets belong to, which is the one of the thread that makes them.

use std::{
    fs::{self, File},
    io,
    os::fd::AsFd,
    path::{Path, PathBuf},
};

use crate::sys::bpf_query;

/// Why what is sent must not pass them by.
pub(super) fn programs() -> io::Result<Option<String>> {
    let groups = fs::read_to_string("/proc/thread-self/cgroup")?;
    // Where version 2 has never been mounted, nobody could attach to it.
    let Some(group) = groups.lines().find_map(|line| line.strip_prefix("0::")) else { return Ok(None) };
    let mounts = fs::read_to_string("/proc/thread-self/mountinfo")?;
    let directory = mounts.lines().find_map(|mount| directory(mount, group));
    let directory =
        directory.ok_or_else(|| io::Error::other("its cgroup2 file system is not mounted here"))?;
    let programs = bpf_query::cgroup_egress(File::open(directory)?.as_fd())?;
    Ok((programs > 0).then(|| format!("an eBPF program sees what the cgroup {group} sends")))
}

/// Where a cgroup is by a mount, as `mountinfo` has it, if that is one of cgroup2 and shows it.
fn directory(mount: &str, group: &str) -> Option<PathBuf> {
    let (place, system) = mount.split_once(" - ")?;
    let mut fields = place.split(' ').skip(3);
    let (root, at) = (fields.next()?, fields.next()?);
    let below = Path::new(group).strip_prefix(root).ok()?;
    system.starts_with("cgroup2 ").then(|| Path::new(at).join(below))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_directory_of_a_cgroup() {
        for (mount, group, expected) in [
            ("30 23 0:26 / /sys/fs/cgroup rw,relatime shared:9 - cgroup2 cgroup2 rw", "/", "/sys/fs/cgroup"),
            ("30 23 0:26 / /sys/fs/cgroup rw - cgroup2 none rw", "/a.slice/b", "/sys/fs/cgroup/a.slice/b"),
            ("30 23 0:26 /a.slice /mnt rw - cgroup2 none rw", "/a.slice/b", "/mnt/b"),
            ("30 23 0:26 /c.slice /mnt rw - cgroup2 none rw", "/a.slice/b", ""),
            ("30 23 0:26 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu", "/", ""),
            ("nothing of the kind", "/", ""),
        ] {
            let found = directory(mount, group).unwrap_or_default();
            assert_eq!(found, Path::new(expected), "{group} by {mount}");
        }
    }
}
