//! What rings, UMEMs and sockets take, against what the host gives. Pure.

use thiserror::Error;

use crate::worker::protocol::PacketRing;

const MIB: f64 = 1024.0 * 1024.0;

/// Descriptors that the daemon holds whatever it does: control, netlink, maps, log, io.
const DAEMON_DESCRIPTORS: u64 = 64;

/// Maps, programs and link of an interface.
const INTERFACE_DESCRIPTORS: u64 = 16;

/// Channel, log pipe, end, ledger and packet socket of a worker.
const WORKER_DESCRIPTORS: u64 = 5;

/// Memberships that a socket takes by default.
const MEMBERSHIPS_PER_SOCKET: u64 = 20;

/// What the host gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostLimits {
    /// Memory that may be locked; none where nothing limits it.
    pub locked_bytes: Option<u64>,
    /// Memory that was free when the daemon started.
    pub memory_bytes: u64,
    /// Open descriptors of the daemon.
    pub descriptors: u64,
}

/// Memory for frames, with the sum that it comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Demand {
    pub bytes: u64,
    sum: String,
    locked: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Shortfall {
    #[error(
        "the UMEMs do not fit into the locked memory: {sum} = {:.1} MiB, with {:.1} MiB already locked, and the limit \
         is {:.1} MiB: give CAP_IPC_LOCK, raise RLIMIT_MEMLOCK (LimitMEMLOCK=), or use fewer --frames", mib(*.bytes), mib(*.held), mib(*.limit)
    )]
    Locked { sum: String, bytes: u64, held: u64, limit: u64 },
    #[error(
        "the frames do not fit into the memory: {sum} = {:.1} MiB, with {:.1} MiB already taken, and {:.1} MiB were \
         free at start: use fewer --workers, queues or --frames", mib(*.bytes), mib(*.held), mib(*.limit)
    )]
    Memory { sum: String, bytes: u64, held: u64, limit: u64 },
    #[error(
        "too few descriptors: {DAEMON_DESCRIPTORS} + {INTERFACE_DESCRIPTORS} an interface + {workers} workers x \
         {WORKER_DESCRIPTORS} + {max_rules} rules / {MEMBERSHIPS_PER_SOCKET} memberships a socket = {needed}, and the limit \
         is {limit}: raise RLIMIT_NOFILE (LimitNOFILE=), or lower --max-rules"
    )]
    Descriptors { workers: u32, max_rules: u32, needed: u64, limit: u64 },
}

fn mib(bytes: u64) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "shown with one digit")]
    let bytes = bytes as f64;
    bytes / MIB
}

/// The UMEMs of an interface.
pub fn umems(queues: u32, frames: u32, chunk_bytes: u32) -> Demand {
    Demand {
        bytes: u64::from(queues) * u64::from(frames) * u64::from(chunk_bytes),
        sum: format!("{queues} RX queues x {frames} frames x {chunk_bytes} bytes"),
        locked: true,
    }
}

/// The packet rings of an interface.
pub fn rings(sockets: u32, ring: PacketRing) -> Demand {
    Demand {
        bytes: u64::from(sockets) * ring.bytes(),
        sum: format!("{sockets} workers x {} blocks x {} bytes", ring.blocks, ring.block_bytes),
        locked: false,
    }
}

impl HostLimits {
    /// Whether there is room for a demand beside what is held.
    pub fn check(&self, demand: &Demand, held_locked: u64, held: u64) -> Result<(), Shortfall> {
        let Demand { bytes, ref sum, locked } = *demand;
        let sum = sum.clone();
        match self.locked_bytes {
            Some(limit) if locked && held_locked + bytes > limit => {
                Err(Shortfall::Locked { sum, bytes, held: held_locked, limit })
            }
            _ if held + bytes > self.memory_bytes => {
                Err(Shortfall::Memory { sum, bytes, held, limit: self.memory_bytes })
            }
            _ => Ok(()),
        }
    }

    /// Whether there are descriptors for one interface with as many workers, and memberships for all rules.
    pub fn check_descriptors(&self, workers: u32, max_rules: u32) -> Result<(), Shortfall> {
        let memberships = u64::from(max_rules).div_ceil(MEMBERSHIPS_PER_SOCKET);
        let needed = DAEMON_DESCRIPTORS
            + INTERFACE_DESCRIPTORS
            + u64::from(workers) * WORKER_DESCRIPTORS
            + memberships;
        if needed > self.descriptors {
            return Err(Shortfall::Descriptors { workers, max_rules, needed, limit: self.descriptors });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::datapath::af_packet;

    const GIB: u64 = 1 << 30;

    #[test]
    fn says_what_does_not_fit_with_its_sum() {
        let limits = |locked_bytes, memory_bytes| HostLimits { locked_bytes, memory_bytes, descriptors: 400 };
        let two_queues = umems(2, 8192, 2048);
        assert_eq!(two_queues.bytes, 32 << 20);
        assert_eq!(limits(None, GIB).check(&two_queues, 0, 0), Ok(()));
        assert_eq!(limits(Some(32 << 20), GIB).check(&two_queues, 0, 0), Ok(()));
        let locked = limits(Some(32 << 20), GIB).check(&two_queues, 1 << 20, 0).unwrap_err().to_string();
        assert!(locked.contains("2 RX queues x 8192 frames x 2048 bytes = 32.0 MiB"), "{locked}");
        assert!(locked.contains("with 1.0 MiB already locked, and the limit is 32.0 MiB"), "{locked}");
        let memory = limits(None, GIB).check(&two_queues, 0, GIB).unwrap_err().to_string();
        assert!(memory.contains("32.0 MiB, with 1024.0 MiB already taken"), "{memory}");

        let rings = rings(4, af_packet::ring(1500));
        assert_eq!(limits(Some(0), GIB).check(&rings, 0, 0), Ok(()), "rings are not locked");
        assert!(limits(None, 1 << 20).check(&rings, 0, 0).is_err());
    }

    #[test]
    fn counts_descriptors() {
        let limits = HostLimits { locked_bytes: None, memory_bytes: 0, descriptors: 308 };
        assert_eq!(limits.check_descriptors(4, 4096), Ok(()));
        let refused = limits.check_descriptors(5, 4096).unwrap_err().to_string();
        assert!(refused.contains("= 310, and the limit is 308"), "{refused}");
    }
}
