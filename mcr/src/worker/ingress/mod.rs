//! Where a worker's frames come from.

pub mod af_packet;
pub mod af_xdp;
mod classic_filter;

use std::{io, os::fd::RawFd};

use mcr_common::parse::Bytes;

use crate::worker::{ledger::QueueLedger, relay::FlowTable};

/// A frame in a socket's memory.
#[derive(Clone, Copy, Debug)]
pub struct Frame<'a> {
    /// From the Ethernet header on, as far as they are there.
    pub bytes: &'a [u8],
    /// How long the frame was on the wire.
    pub len: usize,
    /// Payload bytes of each datagram but the last where the frame holds several (GSO); 0 if it is one.
    pub segment: usize,
}

impl Bytes for Frame<'_> {
    #[inline]
    fn frame_len(&self) -> usize {
        self.len
    }

    #[inline]
    fn pair(&self, offset: usize) -> Option<[u8; 2]> {
        self.bytes.pair(offset)
    }

    #[inline]
    fn words<const N: usize>(&self, offset: usize) -> Option<[u32; N]> {
        self.bytes.words(offset)
    }
}

/// A socket with its frames, each of which is at all times with the kernel or in the batch that was
/// received last.
pub trait Ingress {
    /// Takes what waits, [`BATCH`](super::relay::BATCH) frames at most, after the last batch was given
    /// back; answers how many there are.
    fn receive(&mut self) -> usize;

    /// A frame of the batch, or `None` if the kernel's word for it does not hold.
    fn frame(&self, index: usize) -> Option<Frame<'_>>;

    /// Gives the frames of the batch back to the kernel.
    fn recycle(&mut self);

    /// The socket, for polling.
    fn fd(&self) -> RawFd;

    /// Writes the kernel's counters of the socket into the ledger, if it is the worker that reads them.
    fn read_statistics(&self, _ledger: &QueueLedger) -> io::Result<()> {
        Ok(())
    }

    /// Takes note that the rules have changed.
    fn follow(&mut self, _table: &FlowTable) -> io::Result<()> {
        Ok(())
    }
}
