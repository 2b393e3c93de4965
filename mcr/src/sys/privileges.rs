//! Capabilities: which are missing, and giving them up.

use caps::{CapSet, Capability, CapsHashSet};
use nix::sys::prctl;

/// What the daemon cannot do without: attaching and sysctl-free networking, raw and AF_XDP sockets.
const NEEDED: [(Capability, &str); 2] =
    [(Capability::CAP_NET_ADMIN, "CAP_NET_ADMIN"), (Capability::CAP_NET_RAW, "CAP_NET_RAW")];

/// The needed capabilities that this process lacks.
pub fn missing() -> Vec<&'static str> {
    let held = caps::read(None, CapSet::Effective).unwrap_or_default();
    NEEDED.iter().filter(|(capability, _)| !held.contains(capability)).map(|(_, name)| *name).collect()
}

/// Whether this process, and so its workers, may lock memory beyond the limit.
pub fn locks_memory() -> bool {
    caps::has_cap(None, CapSet::Effective, Capability::CAP_IPC_LOCK).unwrap_or(false)
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
