//! The unit that is shipped, and commands that are confined as it says, as far as no service manager is needed for that.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::CString,
    fs, io,
    os::unix::{ffi::OsStrExt, process::CommandExt},
    path::{Path, PathBuf},
    process::Command,
    ptr,
};

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    apply_filter,
};

use crate::deprive::{self, as_ordinary_user};

/// Assignments of the unit, in order.
#[derive(Debug)]
pub struct Unit(Vec<(String, String)>);

impl Unit {
    /// The directory of what is installed.
    pub fn packaging() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../packaging")
    }

    #[track_caller]
    pub fn shipped() -> Self {
        let text = fs::read_to_string(Self::packaging().join("systemd/mcr.service")).expect("the unit");
        let assignments =
            text.lines().filter(|line| !line.starts_with('#')).filter_map(|line| line.split_once('='));
        Self(assignments.map(|(key, value)| (key.to_owned(), value.to_owned())).collect())
    }

    /// What is assigned to a key, which may be so several times.
    pub fn values<'a>(&'a self, key: &'a str) -> impl Iterator<Item = &'a str> {
        self.0.iter().filter(move |(name, _)| name == key).map(|(_, value)| value.as_str())
    }

    #[track_caller]
    pub fn value<'a>(&'a self, key: &'a str) -> &'a str {
        self.values(key).last().unwrap_or_else(|| panic!("the unit has no {key}="))
    }

    /// The words of a command, with what is installed elsewhere put in its place.
    #[track_caller]
    pub fn words(&self, key: &str, places: &[(&str, &Path)]) -> Vec<PathBuf> {
        let place =
            |word: &str| places.iter().find(|(from, _)| *from == word).map(|(_, to)| to.to_path_buf());
        self.value(key).split_whitespace().map(|word| place(word).unwrap_or_else(|| word.into())).collect()
    }

    /// The variables that it sets.
    pub fn environment(&self) -> BTreeMap<&str, &str> {
        self.values("Environment").filter_map(|value| value.split_once('=')).collect()
    }

    /// Confines a command: an ordinary user with the capabilities, system calls and address families of the unit, who can write
    /// to one directory alone.
    #[track_caller]
    pub fn confine(&self, command: &mut Command, writable: &Path) {
        let capabilities: BTreeSet<_> = self.value("AmbientCapabilities").split_whitespace().collect();
        let known = ["CAP_NET_ADMIN", "CAP_NET_RAW", "CAP_IPC_LOCK", "CAP_PERFMON", "CAP_BPF"];
        assert_eq!(capabilities, known.into(), "what this test gives is what the unit gives");
        assert_eq!(self.value("AmbientCapabilities"), self.value("CapabilityBoundingSet"));
        let writable = CString::new(writable.as_os_str().as_bytes()).expect("a path");
        // SAFETY: between fork and exec the closure makes system calls only.
        unsafe {
            command.pre_exec(move || {
                mounts_of_its_own(&writable)?;
                bound_to(deprive::ALL)
            });
        }
        as_ordinary_user(command, deprive::ALL);
        let filters = self.filters();
        // SAFETY: as above; the programs are made.
        unsafe {
            command.pre_exec(move || {
                if libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0
                    || libc::prctl(libc::PR_SET_MDWE, libc::PR_MDWE_REFUSE_EXEC_GAIN, 0, 0, 0) != 0
                {
                    return Err(io::Error::last_os_error());
                }
                filters
                    .iter()
                    .try_for_each(|filter| apply_filter(filter))
                    .map_err(|_| io::Error::last_os_error())
            });
        }
    }

    /// `SystemCallFilter=` and `RestrictAddressFamilies=`.
    #[track_caller]
    pub fn filters(&self) -> [BpfProgram; 2] {
        let numbers = system_calls();
        let mut calls: BTreeSet<String> = expand("@default");
        for value in self.values("SystemCallFilter") {
            let (removes, names) = value.strip_prefix('~').map_or((false, value), |names| (true, names));
            for call in names.split_whitespace().flat_map(expand) {
                let _as_before = if removes { calls.remove(&call) } else { calls.insert(call) };
            }
        }
        // Some are another architecture's.
        let rules = calls.iter().filter_map(|call| Some((*numbers.get(call)?, Vec::new()))).collect();
        let families = self.value("RestrictAddressFamilies").split_whitespace().map(|family| {
            let condition =
                SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, number_of(family));
            SeccompRule::new(vec![condition.expect("a condition")]).expect("a rule")
        });
        let socket = numbers["socket"];
        let mut others: BTreeMap<_, _> = numbers.values().map(|&call| (call, Vec::new())).collect();
        others.insert(socket, families.collect());
        [rules, others].map(|rules| {
            let refuse = SeccompAction::Errno(libc::EPERM.cast_unsigned());
            let architecture = std::env::consts::ARCH.try_into().expect("an architecture");
            let filter =
                SeccompFilter::new(rules, refuse, SeccompAction::Allow, architecture).expect("a filter");
            filter.try_into().expect("a program")
        })
    }
}

/// A family's number.
#[track_caller]
fn number_of(family: &str) -> u64 {
    let number = match family {
        "AF_UNIX" => libc::AF_UNIX,
        "AF_INET" => libc::AF_INET,
        "AF_INET6" => libc::AF_INET6,
        "AF_NETLINK" => libc::AF_NETLINK,
        "AF_PACKET" => libc::AF_PACKET,
        "AF_XDP" => libc::AF_XDP,
        other => panic!("the number of {other} is not known here"),
    };
    u64::from(number.cast_unsigned())
}

/// The system calls of a set, or the one.
#[track_caller]
fn expand(name: &str) -> BTreeSet<String> {
    if !name.starts_with('@') {
        return BTreeSet::from([name.to_owned()]);
    }
    let output = Command::new("systemd-analyze").args(["syscall-filter", name]).output();
    let output = output.expect("systemd-analyze (Debian package systemd)");
    assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).expect("text");
    let members =
        text.lines().skip(1).map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    members.flat_map(expand).collect()
}

/// The numbers of this machine's system calls, as its C headers have them.
#[track_caller]
fn system_calls() -> BTreeMap<String, i64> {
    let arch = std::env::consts::ARCH;
    let places =
        [format!("/usr/include/{arch}-linux-gnu/asm/unistd_64.h"), "/usr/include/asm/unistd_64.h".into()];
    let text = places.iter().find_map(|place| fs::read_to_string(place).ok());
    let text = text.unwrap_or_else(|| panic!("{places:?} are missing (Debian package linux-libc-dev)"));
    let number = |line: &str| {
        let (name, number) = line.strip_prefix("#define __NR_")?.split_once(' ')?;
        Some((name.to_owned(), number.trim().parse().ok()?))
    };
    text.lines().filter_map(number).collect()
}

/// Leaves the process no capability to gain but these.
fn bound_to(capabilities: &[libc::c_ulong]) -> io::Result<()> {
    const LAST: libc::c_ulong = 40;
    for capability in (0..=LAST).filter(|capability| !capabilities.contains(capability)) {
        // SAFETY: the call takes integers.
        if unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) } != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// A mount namespace in which all is read-only but one directory and what is mounted in it.
fn mounts_of_its_own(writable: &CString) -> io::Result<()> {
    let root = c"/".as_ptr();
    let recursive = libc::MS_REC;
    // SAFETY: the paths are text that ends with NUL, the attributes a struct of the length that is said, and the kernel
    // keeps none of them.
    let done = unsafe {
        libc::unshare(libc::CLONE_NEWNS) == 0
            && libc::mount(ptr::null(), root, ptr::null(), libc::MS_SLAVE | recursive, ptr::null()) == 0
            && libc::mount(
                writable.as_ptr(),
                writable.as_ptr(),
                ptr::null(),
                libc::MS_BIND | recursive,
                ptr::null(),
            ) == 0
            && set_read_only(root, true)
            && set_read_only(writable.as_ptr(), false)
    };
    if done { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// # Safety
///
/// The path ends with NUL.
unsafe fn set_read_only(path: *const libc::c_char, read_only: bool) -> bool {
    let flag = libc::MOUNT_ATTR_RDONLY;
    let (attr_set, attr_clr) = if read_only { (flag, 0) } else { (0, flag) };
    let attributes = libc::mount_attr { attr_set, attr_clr, propagation: 0, userns_fd: 0 };
    // SAFETY: the caller has seen to the path, and the struct outlives the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            libc::AT_FDCWD,
            path,
            libc::AT_RECURSIVE,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    result == 0
}
