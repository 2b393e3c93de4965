//! An AF_XDP socket on one RX queue, with a UMEM of its own.
//!
//! Every chunk of the UMEM is in exactly one place: with the kernel (fill ring, driver, RX ring) or in the
//! batch that is being relayed. The fill ring has room for twice as many: the kernel shows a frame in
//! the RX ring before it shows its place in the fill ring as free (`xsk_flush`), so that with room for just
//! all of them giving back could fail.

use std::{
    io,
    num::NonZeroU32,
    os::fd::{AsRawFd, RawFd},
    thread,
    time::{Duration, Instant},
};

use thiserror::Error;
use xsk_rs::{
    CompQueue, FillQueue, FrameDesc, RxQueue, Socket, TxQueue, Umem,
    config::{BindFlags, FrameSize, Interface, LibxdpFlags, QueueSize, SocketConfig, UmemConfig},
};

use crate::{
    rule::QueueId,
    worker::{
        ingress::{Frame, Ingress},
        ledger::QueueLedger,
        protocol::UmemShape,
        relay::BATCH,
    },
};

/// Frames that the kernel places before the packet's bytes in every chunk.
pub const XDP_HEADROOM: u32 = 256;

/// How long to wait for a dead predecessor's socket and memory to be gone.
const BIND_DEADLINE: Duration = Duration::from_millis(500);

#[derive(Debug, Error)]
pub enum AfXdpError {
    #[error("the UMEM of {interface} queue {} cannot be made ({frames} chunks of {chunk} bytes): check the locked-memory limit, or give CAP_IPC_LOCK", queue.0)]
    Umem { interface: String, queue: QueueId, frames: u32, chunk: u32, source: io::Error },
    #[error("no AF_XDP socket on {interface} queue {}: is another program bound to the queue?", queue.0)]
    Bind { interface: String, queue: QueueId, source: io::Error },
    #[error("{what} is no valid AF_XDP size")]
    Size { what: String },
}

/// What the kernel counted before this worker was born: its sockets start at zero, the ledger goes on.
#[derive(Debug, Default)]
struct Base {
    rx_dropped: u64,
    fill_ring_empty: u64,
    rx_ring_full: u64,
}

/// The ingress of one RX queue.
#[derive(Debug)]
pub struct AfXdpQueue {
    rx: RxQueue,
    fill: FillQueue,
    umem: Umem,
    umem_bytes: usize,
    /// Frames taken out of the RX ring, the first `taken` of these: given back whole, once.
    batch: Box<[FrameDesc]>,
    taken: usize,
    /// Frames with the kernel; with the batch being relayed they are all frames.
    with_kernel: usize,
    frames: usize,
    base: Base,
    // libxdp unmaps their rings with the socket; mcr sends nothing through them.
    _tx: TxQueue,
    _completion: CompQueue,
}

impl AfXdpQueue {
    /// Makes the UMEM, fills the fill ring and binds the socket. No frame is lost between: the caller
    /// puts the socket into the XSKMAP after this returned.
    pub fn open(
        interface: &str,
        queue: QueueId,
        shape: UmemShape,
        ledger: &QueueLedger,
    ) -> Result<Self, AfXdpError> {
        let UmemShape { chunk_bytes, frames, rx_ring } = shape;
        let size = |what: &str, n: u32| AfXdpError::Size { what: format!("{what} {n}") };
        let fill_ring = QueueSize::new(2 * frames).map_err(|_| size("ring of", 2 * frames))?;
        let rx_ring = QueueSize::new(rx_ring).map_err(|_| size("ring of", rx_ring))?;
        let unused = QueueSize::new(2).map_err(|_| size("ring of", 2))?;
        let count = NonZeroU32::new(frames).ok_or_else(|| size("UMEM of", frames))?;
        let chunk = FrameSize::new(chunk_bytes).map_err(|_| size("chunk of", chunk_bytes))?;
        let umem_config = UmemConfig::builder()
            .frame_size(chunk)
            .fill_queue_size(fill_ring)
            .comp_queue_size(unused)
            .build()
            .map_err(|_| size("chunk of", chunk_bytes))?;
        let socket_config = SocketConfig::builder()
            .rx_queue_size(rx_ring)
            .tx_queue_size(unused)
            .libxdp_flags(LibxdpFlags::XSK_LIBXDP_FLAGS_INHIBIT_PROG_LOAD)
            .bind_flags(BindFlags::XDP_USE_NEED_WAKEUP)
            .build();
        let device: Interface = interface.parse().map_err(|_| size("interface", 0))?;

        let (umem, descriptors) =
            retry(|| Umem::new(umem_config, count, false).map_err(cause)).map_err(|source| {
                AfXdpError::Umem {
                    interface: interface.to_owned(),
                    queue,
                    frames,
                    chunk: chunk_bytes,
                    source,
                }
            })?;
        let bind = |source| AfXdpError::Bind { interface: interface.to_owned(), queue, source };
        // SAFETY: the UMEM is this queue's own and bound to nothing else.
        let (tx, rx, rings) =
            retry(|| unsafe { Socket::new(socket_config, &umem, &device, queue.0) }.map_err(cause))
                .map_err(bind)?;
        let (mut fill, completion) = rings.ok_or_else(|| bind(io::Error::other("the rings are in use")))?;
        // SAFETY: the frames are this UMEM's, and this is the first that is done with them.
        let with_kernel = unsafe { fill.produce(&descriptors) };
        if with_kernel != descriptors.len() {
            return Err(bind(io::Error::other("the fill ring took too few frames")));
        }
        let base = Base {
            rx_dropped: ledger.rx_dropped.get(),
            fill_ring_empty: ledger.fill_ring_empty.get(),
            rx_ring_full: ledger.rx_ring_full.get(),
        };
        Ok(Self {
            rx,
            fill,
            umem,
            umem_bytes: frames as usize * chunk_bytes as usize,
            batch: vec![FrameDesc::default(); BATCH].into_boxed_slice(),
            taken: 0,
            with_kernel,
            frames: frames as usize,
            base,
            _tx: tx,
            _completion: completion,
        })
    }
}

impl Ingress for AfXdpQueue {
    fn receive(&mut self) -> usize {
        debug_assert_eq!(self.taken, 0, "frames of the last batch were not given back");
        // SAFETY: the descriptors are written by the kernel for frames of this queue's UMEM.
        self.taken = unsafe { self.rx.consume(&mut self.batch) };
        self.with_kernel -= self.taken;
        debug_assert_eq!(self.with_kernel + self.taken, self.frames, "a frame is in two places or in none");
        self.taken
    }

    fn frame(&self, index: usize) -> Option<Frame<'_>> {
        let descriptor = self.batch[..self.taken].get(index)?;
        let end = descriptor.addr().checked_add(descriptor.lengths().data())?;
        if end > self.umem_bytes {
            return None;
        }
        // SAFETY: the frame lies within the UMEM as just checked, and it is the batch's: the kernel
        // does not touch it until it is back in the fill ring, which takes the queue by `&mut`.
        let data = unsafe { self.umem.data(descriptor) };
        let (start, len) = (data.contents().as_ptr(), data.contents().len());
        // SAFETY: as above; the slice lives as long as the borrow of the queue, not of the wrapper.
        Some(Frame { bytes: unsafe { std::slice::from_raw_parts(start, len) }, len, segment: 0 })
    }

    fn recycle(&mut self) {
        // SAFETY: the frames came from this queue, and nothing refers to them any more: the queue was
        // borrowed by every slice of them.
        let given = unsafe { self.fill.produce(&self.batch[..self.taken]) };
        debug_assert_eq!(given, self.taken, "the fill ring has room for every frame");
        self.with_kernel += given;
        self.taken = 0;
        if self.fill.needs_wakeup() {
            // A driver that ran out of frames waits to be told; a failure shows as frames it drops.
            let _ = self.fill.wakeup(self.rx.fd_mut(), 0);
        }
    }

    fn fd(&self) -> RawFd {
        self.rx.fd().as_raw_fd()
    }

    fn read_statistics(&self, ledger: &QueueLedger) -> io::Result<()> {
        let statistics = self.rx.fd().xdp_statistics()?;
        ledger.rx_dropped.set(self.base.rx_dropped + statistics.rx_dropped());
        ledger.fill_ring_empty.set(self.base.fill_ring_empty + statistics.rx_fill_ring_empty_descs());
        ledger.rx_ring_full.set(self.base.rx_ring_full + statistics.rx_ring_full());
        Ok(())
    }
}

fn cause(error: impl std::error::Error) -> io::Error {
    let errno = error
        .source()
        .and_then(|source| source.downcast_ref::<io::Error>())
        .and_then(io::Error::raw_os_error);
    errno.map_or_else(|| io::Error::other(error.to_string()), io::Error::from_raw_os_error)
}

/// Repeats what fails while the kernel still clears up after a dead worker.
fn retry<T>(mut attempt: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    let deadline = Instant::now() + BIND_DEADLINE;
    loop {
        match attempt() {
            Err(error)
                if matches!(error.raw_os_error(), Some(libc::EBUSY | libc::ENOBUFS))
                    && Instant::now() < deadline =>
            {
                thread::sleep(Duration::from_millis(10));
            }
            result => return result,
        }
    }
}
