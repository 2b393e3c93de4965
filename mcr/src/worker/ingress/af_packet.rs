//! A packet socket's receive ring (`TPACKET_V2`), shared with the kernel slot by slot.
//!
//! The socket is the supervisor's and outlives the worker: what waits in the ring when a worker dies is
//! its successor's. Frames longer than a slot (super-packets of virtual senders, mostly) come whole by the
//! socket's queue.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd, RawFd},
    sync::atomic::{AtomicU8, AtomicU32, Ordering},
};

use memmap2::{MmapOptions, MmapRaw};

use crate::worker::{
    ingress::{Frame, Ingress, classic_filter},
    protocol::PacketRing,
    relay::{BATCH, FlowTable},
};

/// `struct virtio_net_hdr`, which the kernel puts before every frame (`PACKET_VNET_HDR`).
pub const VNET_HEADER: usize = 10;

/// The longest frame that there is: a super-packet with its Ethernet header and a VLAN tag.
const LONGEST_FRAME: usize = 65_535 + 18;

/// `VIRTIO_NET_HDR_GSO_UDP_L4`: UDP datagrams of one size, the last perhaps shorter, under one header.
const GSO_UDP_L4: u8 = 5;

/// The mark of a slot that a worker has taken.
const TAKEN: u8 = 1;

/// The ingress of one packet socket.
#[derive(Debug)]
pub struct PacketQueue {
    socket: OwnedFd,
    map: MmapRaw,
    ring: PacketRing,
    /// The next slot to take.
    next: u32,
    /// Slots of the batch, which end before `next`.
    taken: usize,
    /// A frame longer than its slot, the last of the batch if there is one, with its header before it.
    long: Box<[u8]>,
    /// Its length with the header.
    long_len: Option<usize>,
    classic: bool,
}

impl PacketQueue {
    /// Maps the ring of a socket, from which `taken` frames have been taken so far.
    pub fn adopt(socket: OwnedFd, ring: PacketRing, taken: u64, classic: bool) -> io::Result<Self> {
        let map = MmapOptions::new().len(ring.bytes() as usize).map_raw(socket.as_raw_fd())?;
        let next = (taken % u64::from(ring.slots())) as u32;
        let long = vec![0; VNET_HEADER + LONGEST_FRAME].into_boxed_slice();
        let mut queue = Self { socket, map, ring, next, taken: 0, long, long_len: None, classic };
        queue.release_former_batch();
        // Whose frames these are can no longer be told; their slots say that they are lost.
        while queue.receive_long().is_some() {}
        Ok(queue)
    }

    /// Gives back the slots that a former worker took and died with.
    ///
    /// They lie before the next and bear its mark; where the ring has filled since, frames that came later
    /// lie there too, and are left for their turn.
    fn release_former_batch(&mut self) {
        for back in (1..=BATCH.min(self.ring.slots() as usize - 1)).rev() {
            let slot = self.before_next(back);
            if self.is_ours(slot) && self.mark(slot).load(Ordering::Relaxed) == TAKEN {
                self.status(slot).store(libc::TP_STATUS_KERNEL, Ordering::Release);
            }
        }
    }

    /// The slot this many places before the next.
    fn before_next(&self, back: usize) -> u32 {
        let slots = self.ring.slots();
        (self.next + slots - back as u32) % slots
    }

    /// Where a slot starts. The kernel packs whole slots into each block.
    fn slot(&self, slot: u32) -> *mut u8 {
        let per_block = self.ring.slots_per_block();
        let offset = (slot / per_block) as usize * self.ring.block_bytes as usize
            + (slot % per_block) as usize * self.ring.slot_bytes as usize;
        // SAFETY: slots are numbered below the ring's number of them, which all lie within the mapping.
        unsafe { self.map.as_mut_ptr().add(offset) }
    }

    /// The status word, by which kernel and worker hand a slot to one another.
    #[expect(clippy::cast_ptr_alignment, reason = "slots are multiples of 16 bytes from a page's start on")]
    fn status(&self, slot: u32) -> &AtomicU32 {
        // SAFETY: the status is the first word of the slot, which is aligned to 16 bytes and mapped as
        // long as the queue lives; both sides access it atomically.
        unsafe { &*self.slot(slot).cast::<AtomicU32>() }
    }

    /// Where a worker marks a slot that it has taken: `tp_padding`, which the kernel clears with each frame
    /// that it puts there.
    fn mark(&self, slot: u32) -> &AtomicU8 {
        const PADDING: usize = std::mem::offset_of!(libc::tpacket2_hdr, tp_padding);
        // SAFETY: within the header at the slot's start, which is mapped as long as the queue lives; a byte
        // needs no alignment, and whoever has the slot alone writes it.
        unsafe { &*self.slot(slot).add(PADDING).cast::<AtomicU8>() }
    }

    fn is_ours(&self, slot: u32) -> bool {
        self.status(slot).load(Ordering::Acquire) & libc::TP_STATUS_USER != 0
    }

    #[expect(clippy::cast_ptr_alignment, reason = "slots are multiples of 16 bytes from a page's start on")]
    fn header(&self, slot: u32) -> libc::tpacket2_hdr {
        // SAFETY: every slot begins with this header; it is the worker's while the status says so.
        unsafe { self.slot(slot).cast::<libc::tpacket2_hdr>().read() }
    }

    /// Reads the next frame that was too long for its slot. `None` if there is none.
    fn receive_long(&mut self) -> Option<usize> {
        let (start, len) = (self.long.as_mut_ptr(), self.long.len());
        // SAFETY: the kernel writes at most `len` bytes into the buffer.
        let received = unsafe { libc::recv(self.socket.as_raw_fd(), start.cast(), len, libc::MSG_DONTWAIT) };
        usize::try_from(received).ok()
    }
}

impl Ingress for PacketQueue {
    fn receive(&mut self) -> usize {
        debug_assert_eq!(self.taken, 0, "slots of the last batch were not given back");
        self.long_len = None;
        let most = BATCH.min(self.ring.slots() as usize);
        while self.taken < most && self.is_ours(self.next) {
            let header = self.header(self.next);
            self.mark(self.next).store(TAKEN, Ordering::Relaxed);
            self.next = (self.next + 1) % self.ring.slots();
            self.taken += 1;
            if header.tp_snaplen < header.tp_len {
                // There is room for one long frame.
                let copied = header.tp_status & libc::TP_STATUS_COPY != 0;
                self.long_len = copied.then(|| self.receive_long()).flatten();
                break;
            }
        }
        self.taken
    }

    fn frame(&self, index: usize) -> Option<Frame<'_>> {
        let slot = self.before_next(self.taken - index);
        let header = self.header(slot);
        let long = self.long_len.filter(|_| header.tp_snaplen < header.tp_len);
        let bytes = if let Some(len) = long {
            self.long.get(..len)?
        } else {
            let (start, len) = (usize::from(header.tp_mac), header.tp_snaplen as usize);
            let begins = start.checked_sub(VNET_HEADER)?;
            if begins < size_of::<libc::tpacket2_hdr>() || start + len > self.ring.slot_bytes as usize {
                return None;
            }
            // SAFETY: header and frame lie within the slot as just checked, and the slot is the batch's:
            // the kernel does not touch it until its status is given back, which takes the queue by `&mut`.
            unsafe { std::slice::from_raw_parts(self.slot(slot).add(begins), VNET_HEADER + len) }
        };
        let (virtio, bytes) = bytes.split_at_checked(VNET_HEADER)?;
        // In this machine's byte order.
        let segment = u16::from_ne_bytes([virtio[4], virtio[5]]);
        let segment = if virtio[1] == GSO_UDP_L4 { segment.into() } else { 0 };
        let len = if long.is_some() { bytes.len() } else { header.tp_len as usize };
        Some(Frame { bytes, len, segment })
    }

    fn recycle(&mut self) {
        for back in (1..=self.taken).rev() {
            self.status(self.before_next(back)).store(libc::TP_STATUS_KERNEL, Ordering::Release);
        }
        self.taken = 0;
    }

    fn fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }

    fn follow(&mut self, table: &FlowTable) -> io::Result<()> {
        if self.classic { classic_filter::attach(&self.socket, table.destinations()) } else { Ok(()) }
    }
}
