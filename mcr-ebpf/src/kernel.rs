//! The edge to the kernel, and the only unsafe code of the programs: packet memory and map values.

use core::{ffi::c_void, mem::MaybeUninit};

use aya_ebpf::{
    bindings::__sk_buff,
    btf_maps::{HashMap, PerCpuArray, PerCpuHashMap},
    helpers::{bpf_loop, bpf_skb_load_bytes, bpf_xdp_adjust_tail, bpf_xdp_get_buff_len},
    programs::{SkBuffContext, XdpContext},
};
use mcr_common::{
    flow::{FlowKey4, FlowValue},
    parse::Bytes,
    redirect::{Headers, TAG_LEN, Tag},
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

    /// `T` is of bytes or words alone.
    #[inline(always)]
    fn read<T: Copy>(&self, offset: usize) -> Option<T> {
        if self.start + offset + size_of::<T>() > self.end {
            return None;
        }
        // SAFETY: the bytes lie between data and data_end, as just checked (and as the verifier checks again), and any
        // of them make a `T`.
        Some(unsafe { ((self.start + offset) as *const T).read_unaligned() })
    }
}

impl Bytes for Frame<'_> {
    /// By the kernel's word: computing it from packet pointers would take `CAP_PERFMON`.
    #[inline(always)]
    fn frame_len(&self) -> usize {
        // SAFETY: the context is the program's own.
        unsafe { bpf_xdp_get_buff_len(self.ctx.ctx) as usize }
    }

    #[inline(always)]
    fn pair(&self, offset: usize) -> Option<[u8; 2]> {
        self.read(offset)
    }

    #[inline(always)]
    fn words<const N: usize>(&self, offset: usize) -> Option<[u32; N]> {
        self.read(offset)
    }
}

/// Writes a tag over the MAC addresses of a frame.
#[inline(always)]
pub fn write_tag(ctx: &XdpContext, tag: Tag) -> bool {
    let start = ctx.data();
    if start + TAG_LEN > ctx.data_end() {
        return false;
    }
    // SAFETY: the bytes lie between data and data_end, as just checked (and as the verifier checks again).
    unsafe { (start as *mut [u32; TAG_LEN / 4]).write_unaligned(tag.to_words()) };
    true
}

/// Cuts a frame's last `len` bytes off.
#[inline(always)]
pub fn trim(ctx: &XdpContext, len: u32) -> bool {
    // SAFETY: the context is the program's own; pointers into the frame are taken anew.
    len == 0 || unsafe { bpf_xdp_adjust_tail(ctx.ctx, (len as i32).wrapping_neg()) == 0 }
}

/// The device that a frame is leaving by. For egress programs only.
#[inline(always)]
pub fn egress_device(ctx: &XdpContext) -> u32 {
    // SAFETY: the kernel hands the program a live context, which the verifier guards.
    unsafe { (*ctx.ctx).egress_ifindex }
}

/// The headers of a frame, in place.
#[inline(always)]
pub fn headers(ctx: &mut XdpContext) -> Option<&mut Headers> {
    let start = ctx.data();
    if start + size_of::<Headers>() > ctx.data_end() {
        return None;
    }
    // SAFETY: the bytes lie between data and data_end, as just checked (and as the verifier checks again), and are
    // this program's alone as long as the context is borrowed.
    Some(unsafe { &mut *(start as *mut Headers) })
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

    /// `T` is of bytes or words alone.
    #[inline(always)]
    fn load<T: Copy>(&self, offset: usize) -> Option<T> {
        // Not zeroed: a call of memset is arithmetic on a pointer that takes CAP_PERFMON.
        let mut value = MaybeUninit::<T>::uninit();
        let (to, len) = (value.as_mut_ptr().cast(), size_of::<T>() as u32);
        // Also from what lies in pages beside the buffer, which `bpf_skb_load_bytes_relative` does not reach.
        // SAFETY: the helper writes as many bytes into the value, or fails and says so.
        let result = unsafe { bpf_skb_load_bytes(self.ctx.skb.skb.cast(), offset as u32, to, len) };
        // SAFETY: all bytes were written, and any of them make a `T`.
        (result == 0).then(|| unsafe { value.assume_init() })
    }

    #[inline(always)]
    fn buffer(&self) -> &__sk_buff {
        // SAFETY: the kernel hands the program a live context, which the verifier guards.
        unsafe { &*self.ctx.skb.skb }
    }
}

impl Bytes for Buffered<'_> {
    #[inline(always)]
    fn frame_len(&self) -> usize {
        self.buffer().len as usize
    }

    #[inline(always)]
    fn pair(&self, offset: usize) -> Option<[u8; 2]> {
        self.load(offset)
    }

    #[inline(always)]
    fn words<const N: usize>(&self, offset: usize) -> Option<[u32; N]> {
        self.load(offset)
    }
}

/// Changes this CPU's value at `index`; `None` if there is no such index.
#[inline(always)]
pub fn update<T, R, const N: usize>(
    map: &PerCpuArray<T, N>,
    index: u32,
    change: impl FnOnce(&mut T) -> R,
) -> Option<R> {
    update_at(map.get_ptr_mut(index), change)
}

/// Changes this CPU's value of `key`; `None` if there is no such key.
#[inline(always)]
pub fn update_of<K, T, R, const N: usize, const FLAGS: usize>(
    map: &PerCpuHashMap<K, T, N, FLAGS>,
    key: &K,
    change: impl FnOnce(&mut T) -> R,
) -> Option<R> {
    update_at(map.get_ptr_mut(key), change)
}

/// Changes the value that a per-CPU map answered, if it answered one.
#[inline(always)]
pub fn update_at<T, R>(value: Option<*mut T>, change: impl FnOnce(&mut T) -> R) -> Option<R> {
    let value = value?;
    // SAFETY: the kernel returned a pointer to a live value of this CPU; the program runs to its end on this CPU without
    // being entered again, and changes one value at a time. User space removes a key after the last program that may
    // look for it has ended.
    Some(change(unsafe { &mut *value }))
}

/// Calls `step` with the number of the call, at most `most` times, until it answers other than 0.
///
/// A loop of its own would be too many branches for a verifier that must think of speculation, as it does without
/// `CAP_PERFMON`.
#[inline(always)]
pub fn repeat<T>(most: u32, state: &mut T, step: extern "C" fn(u32, &mut T) -> i64) {
    // SAFETY: the kernel calls the step with the number and the state that it was given, one call after another.
    unsafe { bpf_loop(most, step as *mut c_void, core::ptr::from_mut(state).cast(), 0) };
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
