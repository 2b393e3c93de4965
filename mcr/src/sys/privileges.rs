//! Who the daemon is and what it may do: what is missing, what it keeps, and how a worker gives all up.

use std::{ffi::CString, io};

use caps::{CapSet, Capability, CapsHashSet};
use nix::{
    sys::prctl,
    unistd::{Gid, Group, Uid, User, getgrouplist, setgid, setgroups, setuid},
};
use thiserror::Error;

/// What the daemon cannot do without: attaching programs, and raw and AF_XDP sockets.
const NEEDED: [Capability; 2] = [Capability::CAP_NET_ADMIN, Capability::CAP_NET_RAW];

/// What it uses where it has it: without the first there is no eBPF, without the second the limit of locked
/// memory holds, without the third the verifier fences the programs against speculation, which doubles their cost.
const USED: [Capability; 3] = [Capability::CAP_BPF, Capability::CAP_IPC_LOCK, Capability::CAP_PERFMON];

/// What a worker makes its sockets with, before it gives up all.
const OF_WORKERS: [Capability; 2] = [Capability::CAP_NET_RAW, Capability::CAP_IPC_LOCK];

/// Whom the daemon becomes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Account {
    pub uid: Uid,
    pub gid: Gid,
    /// The user's, and the one that the control socket is to have.
    groups: Vec<Gid>,
}

#[derive(Debug, Error)]
pub enum AccountError {
    #[error("there is no {what} {name}: make it, or name another with --{what}")]
    Unknown { what: &'static str, name: String },
    #[error("the {what} {name} cannot be looked up: {errno}")]
    Lookup { what: &'static str, name: String, errno: nix::errno::Errno },
}

impl Account {
    pub fn root() -> Self {
        Self { uid: Uid::from_raw(0), gid: Gid::from_raw(0), groups: Vec::new() }
    }

    /// Looks up a user, who is to be in this group too.
    pub fn of(user: &str, group: Option<Gid>) -> Result<Self, AccountError> {
        const WHAT: &str = "user";
        let failed = |errno| AccountError::Lookup { what: WHAT, name: user.to_owned(), errno };
        let unknown = || AccountError::Unknown { what: WHAT, name: user.to_owned() };
        let User { uid, gid, name, .. } = User::from_name(user).map_err(failed)?.ok_or_else(unknown)?;
        let name = CString::new(name).map_err(|_| unknown())?;
        let mut groups = getgrouplist(&name, gid).map_err(failed)?;
        groups.extend(group);
        Ok(Self { uid, gid, groups })
    }
}

/// Looks up a group by its name.
pub fn group(name: &str) -> Result<Gid, AccountError> {
    const WHAT: &str = "group";
    let found = Group::from_name(name).map_err(|errno| AccountError::Lookup {
        what: WHAT,
        name: name.to_owned(),
        errno,
    })?;
    found.map(|group| group.gid).ok_or_else(|| AccountError::Unknown { what: WHAT, name: name.to_owned() })
}

/// The needed capabilities that this process lacks.
pub fn missing() -> Vec<String> {
    let held = caps::read(None, CapSet::Effective).unwrap_or_default();
    NEEDED.iter().filter(|capability| !held.contains(capability)).map(ToString::to_string).collect()
}

/// What the daemon uses and a process with this mask of capabilities lacks.
pub fn lacking(mask: u64) -> Vec<String> {
    let lacks = |capability: &&Capability| mask & capability.bitmask() == 0;
    NEEDED.iter().chain(&USED).filter(lacks).map(ToString::to_string).collect()
}

/// All that the daemon uses, by name.
pub fn documented() -> Vec<String> {
    NEEDED.iter().chain(&USED).map(ToString::to_string).collect()
}

/// Whether this process, and so its workers, may lock memory beyond the limit.
pub fn locks_memory() -> bool {
    caps::has_cap(None, CapSet::Effective, Capability::CAP_IPC_LOCK).unwrap_or(false)
}

/// Becomes another user, if one is named, and gives up every capability but those that the daemon uses and
/// those that workers start with. Neither this process nor what it executes gets another one.
///
/// To be called while the process has one thread.
pub fn step_down(account: Option<&Account>) -> Result<(), Box<dyn std::error::Error>> {
    let permitted = caps::read(None, CapSet::Permitted)?;
    let kept: CapsHashSet =
        NEEDED.into_iter().chain(USED).filter(|capability| permitted.contains(capability)).collect();
    let handed_down: CapsHashSet =
        OF_WORKERS.into_iter().filter(|capability| kept.contains(capability)).collect();
    if caps::has_cap(None, CapSet::Effective, Capability::CAP_SETPCAP)? {
        for capability in caps::all().difference(&kept) {
            // One that this kernel does not know is none to give up.
            let _ = caps::drop(None, CapSet::Bounding, *capability);
        }
    }
    if let Some(Account { uid, gid, groups }) = account {
        prctl::set_keepcaps(true)?;
        setgroups(groups)?;
        setgid(*gid)?;
        setuid(*uid)?;
        prctl::set_keepcaps(false)?;
    }
    caps::clear(None, CapSet::Ambient)?;
    caps::set(None, CapSet::Effective, &kept)?;
    caps::set(None, CapSet::Permitted, &kept)?;
    caps::set(None, CapSet::Inheritable, &handed_down)?;
    caps::set(None, CapSet::Ambient, &handed_down)?;
    prctl::set_no_new_privs()?;
    Ok(())
}

/// Gives up every capability, for good: neither this process nor what it executes gets one again.
pub fn drop_all() -> Result<(), Box<dyn std::error::Error>> {
    let none = CapsHashSet::new();
    caps::clear(None, CapSet::Ambient)?;
    // With its last capabilities gone a process can no longer change its bounding set; no_new_privs
    // makes that set moot.
    for set in [CapSet::Effective, CapSet::Permitted, CapSet::Inheritable] {
        caps::set(None, set, &none)?;
    }
    prctl::set_no_new_privs()?;
    Ok(())
}

/// Makes a file or directory an account's, not following a link.
pub fn give(path: &std::path::Path, account: &Account) -> io::Result<()> {
    std::os::unix::fs::lchown(path, Some(account.uid.as_raw()), Some(account.gid.as_raw()))
}
