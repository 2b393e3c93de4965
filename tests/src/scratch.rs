//! Names and directories of one test, and the sweep of what killed runs left.

use std::{
    fs,
    os::unix::fs::chown,
    path::{Path, PathBuf},
    process,
    sync::{
        Once,
        atomic::{AtomicU32, Ordering},
    },
};

use nix::mount::{MntFlags, MsFlags, mount, umount2};

/// Where the namespaces' names stand.
pub const NETNS_DIR: &str = "/run/netns";
/// Where the pin roots of the tests stand.
pub const BPFFS: &str = "/sys/fs/bpf";

/// Where in a temporary directory a bpffs of its own is mounted.
const OWN_BPFFS: &str = "bpf";

const PREFIX: &str = "mcrt";
const PIN_PREFIX: &str = "mcr-test";

/// A number that no other value of this process has.
fn number() -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// A name for a namespace, unique on this machine: `mcrt-PID-N-ROLE`.
pub fn namespace_name(role: &str) -> String {
    format!("{PREFIX}-{}-{}-{role}", process::id(), number())
}

/// A temporary directory and a pin root, both removed on drop.
#[derive(Debug)]
pub struct Scratch {
    dir: PathBuf,
    pin_root: PathBuf,
}

impl Scratch {
    pub fn make() -> Self {
        sweep();
        let (pid, n) = (process::id(), number());
        let dir = std::env::temp_dir().join(format!("{PREFIX}-{pid}-{n}"));
        fs::create_dir_all(&dir).expect("temporary directory");
        Self { dir, pin_root: Path::new(BPFFS).join(format!("{PIN_PREFIX}-{pid}-{n}")) }
    }

    /// One that a user may use, with a bpffs of its own: the usual one may be closed to others than root.
    pub fn of_user(uid: u32) -> Self {
        let mut scratch = Self::make();
        let bpffs = scratch.dir.join(OWN_BPFFS);
        scratch.pin_root = bpffs.join("mcr");
        fs::create_dir_all(&bpffs).expect("a directory for a bpffs");
        let made = mount(Some("bpf"), &bpffs, Some("bpf"), MsFlags::empty(), None::<&str>);
        made.expect("mount a bpffs (root needed)");
        for place in [&scratch.dir, &bpffs] {
            chown(place, Some(uid), Some(uid)).expect("hand a directory over");
        }
        scratch
    }

    /// The temporary directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A directory under the bpffs, for the daemon to make.
    pub fn pin_root(&self) -> &Path {
        &self.pin_root
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        remove(&self.pin_root);
        remove(&self.dir);
    }
}

/// Removes, once in this process, what runs of these tests left whose process is gone.
pub fn sweep() {
    static SWEPT: Once = Once::new();
    SWEPT.call_once(sweep_now);
}

pub fn sweep_now() {
    for name in leftovers(Path::new(NETNS_DIR), PREFIX) {
        crate::namespace::remove(&name);
    }
    for (dir, prefix) in [(std::env::temp_dir(), PREFIX), (PathBuf::from(BPFFS), PIN_PREFIX)] {
        for name in leftovers(&dir, prefix) {
            remove(&dir.join(name));
        }
    }
}

/// Removes a directory, and the bpffs that may be mounted within.
fn remove(dir: &Path) {
    let _none_mounted = umount2(&dir.join(OWN_BPFFS), MntFlags::MNT_DETACH);
    let _gone_already = fs::remove_dir_all(dir);
}

/// Entries `PREFIX-PID-...` of a directory whose process is gone.
fn leftovers(dir: &Path, prefix: &str) -> Vec<String> {
    let Ok(entries) = fs::read_dir(dir) else { return Vec::new() };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| {
            let pid = name.strip_prefix(prefix).and_then(|rest| rest.strip_prefix('-'));
            pid.and_then(|rest| rest.split('-').next()?.parse::<u32>().ok())
                .is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists())
        })
        .collect()
}
