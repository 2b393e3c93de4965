//! What the daemon needs of its host, checked before it starts: capabilities, io_uring, a bpffs, and that
//! no other daemon serves this network namespace.

use std::{
    fs, io,
    os::{
        fd::OwnedFd,
        linux::net::SocketAddrExt,
        unix::{
            fs::MetadataExt,
            net::{SocketAddr, UnixDatagram},
        },
    },
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};
use nix::{
    mount::{MsFlags, mount},
    sched::{CpuSet, sched_getaffinity},
    sys::{
        resource::{Resource, getrlimit, setrlimit},
        statfs::{FsType, statfs},
    },
    unistd::{AccessFlags, Pid, access, geteuid},
};
use tracing::warn;

use crate::{
    datapath::budget::HostLimits,
    ebpf::Object,
    sys::{
        multicast,
        privileges::{self, Account},
    },
    worker::ring::Ring,
};

const BPF_FS_MAGIC: FsType = FsType(0xcafe_4a11);
const BPF_FS: &str = "/sys/fs/bpf";

/// The least kernel that mcr runs on, for messages.
const LEAST_KERNEL: &str = "Linux 6.1";

/// The daemon's place in this network namespace: nobody else serves it while this lives.
#[derive(Debug)]
pub struct Namespace {
    /// Directory of this namespace's pins.
    pub pins: PathBuf,
    /// An abstract name is the namespace's own and goes with its holder.
    _lock: OwnedFd,
}

pub fn check_capabilities() -> anyhow::Result<()> {
    let missing = privileges::missing();
    if !missing.is_empty() {
        bail!(
            "mcr run needs {}: run it as root, with --user if it is to be another's; or give an ordinary user {} by \
             AmbientCapabilities= of a service or `setpriv --ambient-caps`",
            missing.join(" and "),
            privileges::documented().join(", ")
        );
    }
    Ok(())
}

/// Tries what every worker will do.
pub fn check_io_uring() -> anyhow::Result<()> {
    let Err(error) = Ring::new() else { return Ok(()) };
    let release = nix::sys::utsname::uname()
        .map_or_else(|_| "?".to_owned(), |name| name.release().to_string_lossy().into_owned());
    match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => bail!(
            "io_uring is forbidden here: set kernel.io_uring_disabled=0, or allow it in the container's seccomp profile"
        ),
        Some(libc::ENOSYS) => bail!(
            "io_uring is missing: kernel {release} has none or a seccomp profile hides it; mcr needs {LEAST_KERNEL}"
        ),
        Some(libc::EINVAL) => {
            bail!("kernel {release} is too old for mcr's use of io_uring: it needs {LEAST_KERNEL}")
        }
        _ => bail!("io_uring cannot be set up on kernel {release}: {error}"),
    }
}

/// Loads the program as every interface will, without attaching it.
pub fn check_bpf(object: &Object) -> anyhow::Result<()> {
    let Err(error) = object.rehearse() else { return Ok(()) };
    // The verifier says what it did line by line, and last what it missed.
    tracing::debug!("{}", super::run::one_line(&error));
    let why = crate::ebpf::last_words(&error);
    bail!(
        "no eBPF program can be loaded ({why}): that needs {LEAST_KERNEL} with bpf() allowed, and CAP_BPF; \
         without, --datapath af-packet works with a classic filter"
    )
}

/// What this host gives for frames and sockets. As many descriptors as may be had are taken.
pub fn limits() -> HostLimits {
    let locked = getrlimit(Resource::RLIMIT_MEMLOCK).map_or(libc::RLIM_INFINITY, |(soft, _)| soft);
    let unlimited = locked == libc::RLIM_INFINITY || privileges::locks_memory();
    let descriptors = getrlimit(Resource::RLIMIT_NOFILE).map_or(1024, |(soft, hard)| {
        if setrlimit(Resource::RLIMIT_NOFILE, hard, hard).is_ok() { hard } else { soft }
    });
    let memory_bytes = available_memory().unwrap_or(u64::MAX);
    HostLimits { locked_bytes: (!unlimited).then_some(locked), memory_bytes, descriptors }
}

/// Datagrams that the kernel takes in one `UDP_SEGMENT` send (`UDP_MAX_SEGMENTS`): 64, and 128 from 6.9 on.
pub fn max_run() -> u16 {
    let release = nix::sys::utsname::uname().ok();
    let release = release.and_then(|name| name.release().to_str().map(str::to_owned)).unwrap_or_default();
    if version(&release) >= (6, 9) { 128 } else { 64 }
}

/// Major and minor number of a kernel release like `6.18.44-rc1`.
fn version(release: &str) -> (u32, u32) {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|number| number.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

/// `MemAvailable` of `/proc/meminfo`.
fn available_memory() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("MemAvailable:"))?;
    let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib * 1024)
}

/// Claims this network namespace under a pin root, and mounts a bpffs if there is none.
pub fn claim_namespace(pin_root: &Path, has_bpf: bool) -> anyhow::Result<Namespace> {
    let lock = lock_namespace(pin_root)?;
    if has_bpf {
        ensure_bpffs(pin_root)?;
    }
    let cookie = multicast::netns_cookie(&lock)
        .context("the network namespace has no cookie: mcr needs Linux 5.14")?;
    let pins = pin_root.join(cookie.to_string());
    Ok(Namespace { pins, _lock: lock })
}

fn lock_namespace(pin_root: &Path) -> anyhow::Result<OwnedFd> {
    let name = format!("mcr{}", pin_root.display());
    let address = SocketAddr::from_abstract_name(&name).with_context(|| {
        format!("the pin root {} is too long: choose another with --pin-root", pin_root.display())
    })?;
    match UnixDatagram::bind_addr(&address) {
        Ok(socket) => Ok(socket.into()),
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => bail!(
            "a daemon is running in this network namespace with the pin root {}: stop it with `mcr stop`, or choose another --pin-root",
            pin_root.display()
        ),
        Err(error) => Err(error).context("the network namespace cannot be claimed"),
    }
}

/// A bpffs where pins are to be: the usual one is mounted if it is not.
fn ensure_bpffs(pin_root: &Path) -> anyhow::Result<()> {
    if is_bpffs(pin_root) {
        warn_of_private_mounts(pin_root);
        return Ok(());
    }
    if !pin_root.starts_with(BPF_FS) {
        bail!(
            "{} is on no bpffs: mount one there with `mount -t bpf bpf DIR`, or choose another --pin-root",
            pin_root.display()
        );
    }
    mount(Some("bpf"), BPF_FS, Some("bpf"), MsFlags::empty(), None::<&str>).with_context(|| {
        format!("no bpffs can be mounted on {BPF_FS}: mount it with `mount -t bpf bpf {BPF_FS}`")
    })?;
    warn_of_private_mounts(pin_root);
    Ok(())
}

/// Whether the nearest directory that exists is on a bpffs.
pub fn is_bpffs(path: &Path) -> bool {
    path.ancestors()
        .find_map(|path| statfs(path).ok())
        .is_some_and(|stat| stat.filesystem_type() == BPF_FS_MAGIC)
}

/// Pins in a mount namespace of our own end with it, whatever they are to outlive.
fn warn_of_private_mounts(pin_root: &Path) {
    let namespace = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/mnt")).ok();
    if let (Some(ours), Some(first)) = (namespace("self"), namespace("1"))
        && ours != first
    {
        warn!(
            pins = %pin_root.display(),
            "this mount namespace is not the host's (`ip netns exec` makes one): bpftool elsewhere may not see the pins"
        );
    }
}

impl Namespace {
    /// Makes the place of the pins an account's, and what a dead daemon of another user left there: what is in a
    /// bpffs, never what a link leads to, and never all of the bpffs.
    pub fn give_to(&self, account: &Account) -> anyhow::Result<()> {
        let root = self.root();
        let failed = || format!("{} cannot be handed over", root.display());
        if let Err(error) = fs::create_dir(root)
            && error.kind() != io::ErrorKind::AlreadyExists
        {
            return Err(error).with_context(failed);
        }
        let mut places = vec![self.pins.clone()];
        for place in directories(&self.pins) {
            let pins = fs::read_dir(&place).into_iter().flatten().flatten().map(|entry| entry.path());
            places.extend(pins);
            places.push(place);
        }
        if !is_mount(root) {
            places.push(root.to_owned());
        }
        let ours = is_directory(root);
        for place in places.iter().filter(|place| ours && is_no_link(place) && is_bpffs(place)) {
            privileges::give(place, account).with_context(failed)?;
        }
        Ok(())
    }

    /// Where a daemon that is gone left pins, each directory with the interface of its name. No further than links.
    pub fn leftovers(&self) -> Vec<PathBuf> {
        if is_directory(self.root()) { directories(&self.pins) } else { Vec::new() }
    }

    /// Refuses to go on where pins cannot be made.
    pub fn check_pins(&self) -> anyhow::Result<()> {
        let root = self.root();
        let made = fs::create_dir_all(root).map_err(anyhow::Error::from);
        let able = made.and_then(|()| Ok(access(root, AccessFlags::W_OK | AccessFlags::X_OK)?));
        able.with_context(|| {
            format!(
                "{} is closed to user {}: open the way to it (`chmod 0711 {BPF_FS}`) and give it to them (chown), or choose \
                 another --pin-root",
                root.display(),
                geteuid()
            )
        })
    }

    fn root(&self) -> &Path {
        self.pins.parent().unwrap_or(&self.pins)
    }
}

/// Whether there is a directory, and no link to one.
fn is_directory(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_dir())
}

/// Whether there is something that is no link.
fn is_no_link(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|metadata| !metadata.is_symlink())
}

/// Whether a file system begins there.
fn is_mount(path: &Path) -> bool {
    let device = |path: &Path| fs::symlink_metadata(path).map(|metadata| metadata.dev()).ok();
    path.parent().is_some_and(|parent| device(parent) != device(path))
}

/// The directories in a directory; none in what a link leads to.
fn directories(path: &Path) -> Vec<PathBuf> {
    if !is_directory(path) {
        return Vec::new();
    }
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).filter(|path| is_directory(path)).collect()
}

impl Drop for Namespace {
    fn drop(&mut self) {
        // Each fails while something is left in it, which then is somebody else's.
        let _ = fs::remove_dir(&self.pins);
        let _ = fs::remove_dir(self.root());
    }
}

/// The CPUs that workers are pinned to where nothing is said: those that this process may run on.
pub fn default_cpus() -> Vec<u32> {
    let Ok(allowed) = sched_getaffinity(Pid::from_raw(0)) else { return vec![0] };
    (0..CpuSet::count()).filter(|&cpu| allowed.is_set(cpu).unwrap_or(false)).map(|cpu| cpu as u32).collect()
}

/// Refuses CPUs that there are not.
pub fn check_cpus(asked: &[u32]) -> anyhow::Result<()> {
    let allowed = default_cpus();
    match asked.iter().find(|cpu| !allowed.contains(cpu)) {
        None => Ok(()),
        Some(cpu) => {
            let allowed: Vec<_> = allowed.iter().map(u32::to_string).collect();
            bail!("CPU {cpu} is none that this process may use: choose from {}", allowed.join(","))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::version;

    #[test]
    fn reads_kernel_releases() {
        for (release, expected) in [
            ("6.18.44-fc", (6, 18)),
            ("6.9", (6, 9)),
            ("5.15.0-91-generic", (5, 15)),
            ("7", (7, 0)),
            ("", (0, 0)),
        ] {
            assert_eq!(version(release), expected, "{release}");
        }
    }
}
