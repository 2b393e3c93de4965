//! Redirecting: a frame to all devices of its rule's fan, and there each clone to the output whose turn it is.

use aya_ebpf::{
    bindings::{BPF_F_BROADCAST, BPF_F_NO_PREALLOC, xdp_action},
    btf_maps::{Array, ArrayOfMaps, DevMap, PerCpuArray, PerCpuHashMap},
    macros::btf_map,
    programs::XdpContext,
};
use mcr_common::{
    abi,
    counters::{OutputCounters, Verdict},
    parse::{Datagram, IPV4_LEN, UDP_LEN},
    redirect::{self, Chain, ChainKey, Fan, MOST_OUTPUTS, MTU_SLACK, Record, Refusal, Tag},
};

use crate::kernel::{self, count};

const RULES: usize = abi::DEFAULT_MAX_RULES as usize;

#[btf_map(name = "mcr_banks")]
static BANKS: Array<u32, RULES> = Array::new();

#[btf_map(name = "mcr_fans")]
static FANS: PerCpuArray<Fan, { 2 * RULES }> = PerCpuArray::new();

#[btf_map(name = "mcr_devices")]
static DEVICES: ArrayOfMaps<DevMap<1>, { 2 * RULES }> = ArrayOfMaps::new();

#[btf_map(name = "mcr_records")]
static RECORDS: Array<Record, { 2 * RULES }> = Array::new();

// Without preallocation: few rules may be redirected, and every CPU has its own value.
#[btf_map(name = "mcr_chains")]
static CHAINS: PerCpuHashMap<ChainKey, Chain, { 2 * RULES }, { BPF_F_NO_PREALLOC as usize }> =
    PerCpuHashMap::new();

#[btf_map(name = "mcr_low_outputs")]
static LOW_OUTPUTS: PerCpuArray<OutputCounters, RULES> = PerCpuArray::new();

#[btf_map(name = "mcr_outputs")]
static OUTPUTS: PerCpuHashMap<u32, OutputCounters, RULES, { BPF_F_NO_PREALLOC as usize }> =
    PerCpuHashMap::new();

/// Sends a frame to every device of its rule's fan.
#[inline(always)]
pub fn broadcast(ctx: &XdpContext, rule: u32, datagram: &Datagram) -> Verdict {
    let Some(&bank @ 1..) = BANKS.get(rule) else {
        return Verdict::NoOutput;
    };
    let fan = redirect::fan(rule, bank);
    let Some(devices) = DEVICES.get(fan) else {
        return Verdict::NoOutput;
    };
    // What lies behind the datagram is not sent on.
    if !kernel::trim(ctx, datagram.trailer_len) {
        return Verdict::NotRedirected;
    }
    let numbered = kernel::update(&FANS, fan, |fan| {
        count(&mut fan.frames, 1);
        *fan
    });
    let Some(Fan { frames, mtu, first, outputs, .. }) = numbered else {
        return Verdict::NoOutput;
    };
    if !kernel::write_tag(ctx, Tag { sequence: frames, fan }) {
        return Verdict::NotRedirected;
    }
    let datagram_len = IPV4_LEN as u32 + UDP_LEN as u32 + u32::from(datagram.payload_len);
    if datagram_len > mtu + MTU_SLACK {
        kernel::repeat(MOST_OUTPUTS, &mut Walk { at: first, len: datagram_len }, count_skipped);
    }
    // One output needs no clone. If its device is gone the kernel drops the frame, as a broadcast would pass the device by.
    let flags = if outputs == 1 { xdp_action::XDP_DROP } else { BPF_F_BROADCAST };
    // The host is to have no tagged frame, whatever the answer: what the kernel drops now is what the outputs do not get.
    let _ = devices.redirect(0, u64::from(flags));
    Verdict::Redirected
}

/// A datagram, and the record of a fan that it has come to.
struct Walk {
    at: u32,
    len: u32,
}

/// Counts a datagram as too big at an output whose device the kernel will skip for its length, and goes on to the next.
extern "C" fn count_skipped(_step: u32, walk: &mut Walk) -> i64 {
    let Some(record) = RECORDS.get(walk.at) else { return 1 };
    let too_big = walk.len > record.rewrite.mtu + MTU_SLACK;
    count_output(record.output, Outcome { sent: false, too_big, ttl_expired: false, payload_len: 0 });
    walk.at = record.after;
    0
}

/// Makes a clone the datagram of its output. What is no clone of ours is dropped.
#[inline(always)]
pub fn rewrite(ctx: &mut XdpContext, device: u32) -> u32 {
    let Some(headers) = kernel::headers(ctx) else {
        return xdp_action::XDP_DROP;
    };
    let Some(record) = turn(&Tag::of(headers), device) else {
        return xdp_action::XDP_DROP;
    };
    let len = redirect::datagram_len(headers);
    let outcome = redirect::rewrite(headers, &record.rewrite);
    count_output(
        record.output,
        Outcome {
            sent: outcome.is_ok(),
            // Beyond the slack the XDP program has counted it.
            too_big: outcome == Err(Refusal::TooBig) && len <= record.rewrite.mtu + MTU_SLACK,
            ttl_expired: outcome == Err(Refusal::TtlExpired),
            payload_len: len.wrapping_sub((IPV4_LEN + UDP_LEN) as u32),
        },
    );
    if outcome.is_ok() { xdp_action::XDP_PASS } else { xdp_action::XDP_DROP }
}

/// What became of a datagram at an output.
#[derive(Clone, Copy)]
struct Outcome {
    sent: bool,
    too_big: bool,
    ttl_expired: bool,
    payload_len: u32,
}

impl Outcome {
    #[inline(always)]
    fn add_to(self, output: &mut OutputCounters) {
        let sent = u64::from(self.sent);
        count(&mut output.rewritten, sent);
        count(&mut output.rewritten_bytes, sent * u64::from(self.payload_len));
        count(&mut output.too_big, u64::from(self.too_big));
        count(&mut output.ttl_expired, u64::from(self.ttl_expired));
    }
}

/// Counts at an output.
#[inline(always)]
fn count_output(slot: u32, outcome: Outcome) {
    let counters = LOW_OUTPUTS.get_ptr_mut(slot).or_else(|| OUTPUTS.get_ptr_mut(slot));
    kernel::update_at(counters, |output| outcome.add_to(output));
}

/// The output whose turn it is among the fan's on this device.
#[inline(always)]
fn turn(tag: &Tag, device: u32) -> Option<&'static Record> {
    let of_fan = kernel::update(&FANS, tag.fan, |fan| {
        (fan.device == device).then(|| next(&mut fan.chain, tag.sequence))
    })?;
    of_fan.or_else(|| {
        kernel::update_of(&CHAINS, &ChainKey { fan: tag.fan, device }, |chain| next(chain, tag.sequence))
    })?
}

/// The record of a frame's next clone.
#[inline(always)]
fn next(chain: &mut Chain, sequence: u64) -> Option<&'static Record> {
    let Chain { sequence: last, next, first } = *chain;
    // No branch: a pointer to one of two fields is arithmetic that takes CAP_PERFMON.
    let same = u32::from(last == sequence).wrapping_neg();
    let record = RECORDS.get(first ^ ((first ^ next) & same))?;
    chain.sequence = sequence;
    chain.next = record.next;
    Some(record)
}
