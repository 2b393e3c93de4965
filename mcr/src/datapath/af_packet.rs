//! The budget of the AF_PACKET datapath: the shape of a packet socket's ring. Pure.

use crate::worker::protocol::PacketRing;

/// What of a rule's traffic the host itself still sees.
pub const HOST_SEES: &str = "the host's own sockets, firewall and tcpdump see the rule's datagrams, on \
                             ingress and on egress";

/// Slots of a ring, unless they would take more than [`MOST_RING_BYTES`].
const SLOTS: u32 = 8192;

/// 10 Gbit/s fill this much in 27 ms.
const MOST_RING_BYTES: u32 = 32 * 1024 * 1024;

/// Frames that are longer come whole by the socket's queue, one copy and one call each.
const LONGEST_SLOT: u32 = 16 * 1024;

/// What the kernel puts before a frame in its slot, rounded up: `tpacket2_hdr`, `sockaddr_ll`, the virtio
/// header and its alignment of the network header; and the Ethernet header itself.
const BEFORE_PAYLOAD: u32 = 96;

/// A multiple of every page size up to 64 KB.
const BLOCK_BYTES: u32 = 64 * 1024;

/// The ring for frames of this MTU.
pub fn ring(mtu: u32) -> PacketRing {
    let slot_bytes = mtu.saturating_add(BEFORE_PAYLOAD).min(LONGEST_SLOT).next_multiple_of(16);
    let blocks = SLOTS.div_ceil(BLOCK_BYTES / slot_bytes).min(MOST_RING_BYTES / BLOCK_BYTES);
    PacketRing { slot_bytes, block_bytes: BLOCK_BYTES, blocks }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rings_hold_the_mtu_and_stay_within_their_budget() {
        for (mtu, slot_bytes) in [
            (68, 176),
            (1500, 1600),
            (1501, 1600),
            (1505, 1616),
            (9000, 9104),
            (16_288, 16_384),
            (65_536, 16_384),
            (u32::MAX, 16_384),
        ] {
            let ring = ring(mtu);
            assert_eq!(ring.slot_bytes, slot_bytes, "MTU {mtu}");
            assert!(ring.bytes() <= u64::from(MOST_RING_BYTES), "MTU {mtu}");
            let least = MOST_RING_BYTES / LONGEST_SLOT;
            assert!(ring.slots() >= least && ring.slots() < SLOTS + ring.slots_per_block(), "MTU {mtu}");
        }
    }
}
