//! The budget of the AF_XDP datapath: which chunk a frame needs, and how the queues of an interface are
//! shared out among workers. Pure.

use thiserror::Error;

use crate::worker::ingress::af_xdp::XDP_HEADROOM;

/// What of a rule's traffic the host itself still sees.
pub const HOST_SEES: &str = "on ingress the host's own sockets, firewall and tcpdump do not see the rule's \
                             datagrams, on egress they do";

/// Chunks of a queue's UMEM unless it is said otherwise, and places in its RX ring: what comes while a worker is
/// kept from its CPU waits there, 16 ms of it at 500,000 a second. Where all chunks are taken the kernel counts an
/// empty fill ring; where there are fewer places than chunks, a full RX ring.
pub const FRAMES: u32 = 8192;

/// Ethernet header and one VLAN tag.
const LINK_HEADER: u32 = 18;

/// Chunk sizes that the kernel takes in aligned mode on a machine with 4 KB pages.
const CHUNKS: [u32; 2] = [2048, 4096];

/// A frame that no chunk holds.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("the MTU {mtu} is too large for one UMEM chunk ({largest} at most)")]
pub struct MtuTooLarge {
    pub mtu: u32,
    pub largest: u32,
}

/// The smallest chunk that holds a frame of this MTU behind the XDP headroom.
pub fn chunk_bytes(mtu: u32) -> Result<u32, MtuTooLarge> {
    let fits = |chunk: &u32| mtu.saturating_add(LINK_HEADER + XDP_HEADROOM) <= *chunk;
    CHUNKS
        .into_iter()
        .find(fits)
        .ok_or(MtuTooLarge { mtu, largest: CHUNKS[CHUNKS.len() - 1] - LINK_HEADER - XDP_HEADROOM })
}

/// Workers of an interface where nothing else is said: one a queue, at most 4, at most the CPUs.
pub fn default_workers(queues: u32, cpus: u32) -> u32 {
    queues.min(4).min(cpus).max(1)
}

/// Queues that one worker may serve.
pub const MAX_QUEUES: u32 = 64;

/// The queues of each worker: queue `n` belongs to worker `n mod workers`. There are more workers than asked
/// for where one would have too many.
pub fn share_queues(queues: u32, workers: u32) -> Vec<Vec<u32>> {
    let least = queues.div_ceil(MAX_QUEUES).max(1);
    let workers = workers.clamp(least, queues.max(least));
    (0..workers).map(|worker| (worker..queues).step_by(workers as usize).collect()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_hold_the_mtu() {
        for (mtu, chunk) in [
            (1280, Some(2048)),
            (1500, Some(2048)),
            (1774, Some(2048)),
            (1775, Some(4096)),
            (3822, Some(4096)),
            (3823, None),
            (9000, None),
            (u32::MAX, None),
        ] {
            assert_eq!(chunk_bytes(mtu).ok(), chunk, "MTU {mtu}");
        }
    }

    #[test]
    fn every_queue_has_one_worker() {
        for queues in 1..20 {
            for workers in 1..8 {
                let mut all: Vec<_> = share_queues(queues, workers).into_iter().flatten().collect();
                all.sort_unstable();
                assert_eq!(all, (0..queues).collect::<Vec<_>>(), "{queues} queues, {workers} workers");
                assert!(share_queues(queues, workers).iter().all(|share| !share.is_empty()));
                assert!(
                    share_queues(70 * queues, workers).iter().all(|share| share.len() <= MAX_QUEUES as usize)
                );
            }
        }
    }

    #[test]
    fn workers_are_bounded_by_queues_and_cpus() {
        assert_eq!(default_workers(1, 8), 1);
        assert_eq!(default_workers(16, 8), 4);
        assert_eq!(default_workers(16, 2), 2);
        assert_eq!(default_workers(0, 0), 1);
    }
}
