//! Names and directories of one test, and the sweep of what killed runs left.

use std::{
    fs,
    path::{Path, PathBuf},
    process,
    sync::{
        Once,
        atomic::{AtomicU32, Ordering},
    },
};

/// Where the namespaces' names stand.
pub const NETNS_DIR: &str = "/run/netns";
/// Where the pin roots of the tests stand.
pub const BPFFS: &str = "/sys/fs/bpf";

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
        for dir in [&self.dir, &self.pin_root] {
            let _gone_already = fs::remove_dir_all(dir);
        }
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
            let _gone_already = fs::remove_dir_all(dir.join(name));
        }
    }
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
