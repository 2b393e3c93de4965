//! The edge to the kernel, and the only unsafe code of the programs: packet memory and map values.

use core::mem::MaybeUninit;

use aya_ebpf::{
    bindings::__sk_buff,
    btf_maps::{HashMap, PerCpuArray},
    helpers::{bpf_skb_load_bytes, bpf_xdp_get_buff_len},
    programs::{SkBuffContext, XdpContext},
};
use mcr_common::{
    flow::{FlowKey4, FlowValue},
    parse::Bytes,
};

/// A frame in packet memory.
pub struct Frame<'a> {
    ctx: &'a XdpContext,
    start: usize,
    end: usize,
}

impl<'a> Frame<'a> {
    #[inline(always)]
    pub fn new(ctx: &'a XdpContext) -> Self {
        Self { ctx, start: ctx.data(), end: ctx.data_end() }
    }
}

impl Bytes for Frame<'_> {
    /// By the kernel's word: computing it from packet pointers would take `CAP_PERFMON`.
    #[inline(always)]
    fn reaches(&self, len: usize) -> bool {
        // SAFETY: the context is the program's own.
        len <= unsafe { bpf_xdp_get_buff_len(self.ctx.ctx) as usize }
    }

    #[inline(always)]
    fn at<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        if self.start + offset + N > self.end {
            return None;
        }
        // SAFETY: the N bytes lie between data and data_end, as just checked (and as the verifier
        // checks again); byte arrays have no alignment and no invalid values.
        Some(unsafe { ((self.start + offset) as *const [u8; N]).read() })
    }
}

/// A frame in a socket buffer, however it is scattered. A packet socket's filter sees it from its Ethernet
/// header on.
pub struct Buffered<'a> {
    ctx: &'a SkBuffContext,
}

impl<'a> Buffered<'a> {
    #[inline(always)]
    pub fn new(ctx: &'a SkBuffContext) -> Self {
        Self { ctx }
    }

    /// Whether the kernel has taken a VLAN tag out of the frame's bytes.
    #[inline(always)]
    pub fn is_tagged(&self) -> bool {
        self.buffer().vlan_present != 0
    }

    /// Payload bytes of each datagram but the last if the buffer holds several (GSO), else 0.
    #[inline(always)]
    pub fn segment_len(&self) -> u32 {
        self.buffer().gso_size
    }

    #[inline(always)]
    fn buffer(&self) -> &__sk_buff {
        // SAFETY: the kernel hands the program a live context, which the verifier guards.
        unsafe { &*self.ctx.skb.skb }
    }
}

impl Bytes for Buffered<'_> {
    #[inline(always)]
    fn reaches(&self, len: usize) -> bool {
        len <= self.buffer().len as usize
    }

    #[inline(always)]
    fn at<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        // Not zeroed: a call of memset is arithmetic on a pointer that takes CAP_PERFMON.
        let mut bytes = MaybeUninit::<[u8; N]>::uninit();
        // Also from what lies in pages beside the buffer, which `bpf_skb_load_bytes_relative` does not reach.
        // SAFETY: the helper writes N bytes into the array, or fails and says so.
        let result = unsafe {
            bpf_skb_load_bytes(self.ctx.skb.skb.cast(), offset as u32, bytes.as_mut_ptr().cast(), N as u32)
        };
        // SAFETY: all N bytes were written.
        (result == 0).then(|| unsafe { bytes.assume_init() })
    }
}

/// Changes this CPU's value at `index`; `None` if there is no such index.
#[inline(always)]
pub fn update<T, R, const N: usize>(
    map: &PerCpuArray<T, N>,
    index: u32,
    change: impl FnOnce(&mut T) -> R,
) -> Option<R> {
    let value = map.get_ptr_mut(index)?;
    // SAFETY: the kernel returned a pointer to a live value of this CPU; the program runs to its end
    // on this CPU without being entered again, and changes one value at a time.
    Some(change(unsafe { &mut *value }))
}

/// A copy of the value of a flow.
#[inline(always)]
pub fn lookup<const N: usize>(map: &HashMap<FlowKey4, FlowValue, N>, key: &FlowKey4) -> Option<FlowValue> {
    // SAFETY: the value is copied at once. User space replaces values whole and keeps a removed rule's
    // slot unused until all running programs are through, so that a recycled element is never acted on.
    unsafe { map.get(key).copied() }
}

/// Adds to a counter of this CPU.
#[inline(always)]
pub fn count(counter: &mut u64, n: u64) {
    *counter = counter.wrapping_add(n);
}
