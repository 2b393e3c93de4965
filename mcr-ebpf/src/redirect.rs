//! Redirecting: a frame to all devices of its rule's fan, and there each clone to the output whose turn it is.

use aya_ebpf::{
    bindings::{BPF_F_BROADCAST, BPF_F_NO_PREALLOC, xdp_action},
    btf_maps::{Array, ArrayOfMaps, DevMap, PerCpuArray, PerCpuHashMap},
    macros::btf_map,
    programs::XdpContext,
};
use mcr_common::{
    abi,
    counters::OutputCounters,
    parse::{Datagram, IPV4_LEN, PAYLOAD_OFFSET, UDP_LEN},
    redirect::{self, Chain, ChainKey, Fan, MOST_OUTPUTS, MTU_SLACK, Record, Refusal, Tag},
};

use crate::{
    Verdict,
    kernel::{self, count},
};

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
    let len = PAYLOAD_OFFSET + usize::from(datagram.payload_len);
    if !kernel::make_room(ctx) || !kernel::trim(ctx, len) {
        return Verdict::NotRedirected;
    }
    let numbered = kernel::update(&FANS, fan, |fan| {
        count(&mut fan.frames, 1);
        *fan
    });
    let Some(Fan { frames, mtu, first }) = numbered else {
        return Verdict::NoOutput;
    };
    if !kernel::write_tag(ctx, Tag { sequence: frames, fan }) {
        return Verdict::NotRedirected;
    }
    let datagram_len = IPV4_LEN as u32 + UDP_LEN as u32 + u32::from(datagram.payload_len);
    if datagram_len > mtu + MTU_SLACK {
        kernel::repeat(MOST_OUTPUTS, &mut Walk { at: first, len: datagram_len }, count_skipped);
    }
    match devices.redirect(0, u64::from(BPF_F_BROADCAST)) {
        Ok(_) => Verdict::Redirected,
        Err(_) => Verdict::NotRedirected,
    }
}

/// A datagram, and the record of a fan that it has come to.
struct Walk {
    at: u32,
    len: u32,
}

/// Counts a datagram as too big at an output whose device the kernel will skip for its length, and goes on to the next.
extern "C" fn count_skipped(_step: u32, walk: &mut Walk) -> i64 {
    let Some(record) = RECORDS.get(walk.at) else { return 1 };
    let skipped = walk.len > record.rewrite.mtu + MTU_SLACK;
    kernel::update_of(&OUTPUTS, &record.output, |output| count(&mut output.too_big, u64::from(skipped)));
    walk.at = record.after;
    0
}

/// Makes a clone the datagram of its output. What is no clone of ours is dropped.
#[inline(always)]
pub fn rewrite(ctx: &mut XdpContext, device: u32) -> u32 {
    let Some(record) = kernel::take_tag(ctx).and_then(|tag| turn(&tag, device)) else {
        return xdp_action::XDP_DROP;
    };
    let Some(headers) = kernel::headers(ctx) else {
        return xdp_action::XDP_DROP;
    };
    let len = redirect::datagram_len(headers);
    let outcome = redirect::rewrite(headers, &record.rewrite);
    let sent = u64::from(outcome.is_ok());
    let too_big = outcome == Err(Refusal::TooBig) && len <= record.rewrite.mtu + MTU_SLACK;
    let payload_len = len.wrapping_sub((IPV4_LEN + UDP_LEN) as u32);
    kernel::update_of(&OUTPUTS, &record.output, |output| {
        count(&mut output.rewritten, sent);
        count(&mut output.rewritten_bytes, sent * u64::from(payload_len));
        // Beyond the slack the XDP program has counted it.
        count(&mut output.too_big, u64::from(too_big));
        count(&mut output.ttl_expired, u64::from(outcome == Err(Refusal::TtlExpired)));
    });
    if outcome.is_ok() { xdp_action::XDP_PASS } else { xdp_action::XDP_DROP }
}

/// The output whose turn it is among the fan's on this device.
#[inline(always)]
fn turn(tag: &Tag, device: u32) -> Option<&'static Record> {
    kernel::update_of(&CHAINS, &ChainKey { fan: tag.fan, device }, |chain| {
        let at = if chain.sequence == tag.sequence { chain.next } else { chain.first };
        let record = RECORDS.get(at)?;
        chain.sequence = tag.sequence;
        chain.next = record.next;
        Some(record)
    })?
}
