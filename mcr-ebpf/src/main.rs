//! What runs in the kernel: the XDP program finds the rule that a frame belongs to and steers it to the
//! worker of its RX queue, or broadcasts it to the devices of the rule's outputs, where the egress program rewrites
//! it; the socket filter decides by the same table what a packet socket takes.
//!
//! What no rule wants passes untouched.
#![no_std]
#![no_main]

mod kernel;
mod redirect;

use aya_ebpf::{
    bindings::xdp_action,
    btf_maps::{Array, HashMap, PerCpuArray, XskMap},
    macros::{btf_map, socket_filter, xdp},
    programs::{SkBuffContext, XdpContext},
};
use mcr_common::{
    abi::{self, verdicts_of},
    counters::{QueueCounters, RuleCounters, Verdict, Verdicts},
    flow::{self, FlowKey4, FlowTable, FlowValue, Found, action},
    parse::{self, Datagram},
};

use crate::kernel::{Buffered, Frame, count};

/// Checked by the loader before anything is loaded.
#[unsafe(no_mangle)]
static MCR_ABI_VERSION: u32 = abi::ABI_VERSION;

// The names of the maps are the names that bpftool shows: `mcr_common::abi::map`.
#[btf_map(name = "mcr_flows_v4")]
static FLOWS_V4: HashMap<FlowKey4, FlowValue, { abi::DEFAULT_MAX_RULES as usize }> = HashMap::new();

#[btf_map(name = "mcr_flow_table")]
static FLOW_TABLE: Array<FlowTable, 1> = Array::new();

#[btf_map(name = "mcr_found")]
static FOUND: PerCpuArray<Found, { flow::FOUND as usize }> = PerCpuArray::new();

#[btf_map(name = "mcr_rules")]
static RULES: PerCpuArray<RuleCounters, { abi::DEFAULT_MAX_RULES as usize }> = PerCpuArray::new();

#[btf_map(name = "mcr_verdicts")]
static VERDICTS: PerCpuArray<Verdicts, { verdicts_of::COUNT }> = PerCpuArray::new();

#[btf_map(name = "mcr_queues")]
static QUEUES: PerCpuArray<QueueCounters, { abi::DEFAULT_QUEUES as usize }> = PerCpuArray::new();

#[btf_map(name = "mcr_sockets")]
static SOCKETS: XskMap<{ abi::DEFAULT_QUEUES as usize }> = XskMap::new();

/// Steers what rules want to the AF_XDP socket of the RX queue.
#[expect(clippy::needless_pass_by_value, reason = "the signature of an XDP program")]
#[xdp]
pub fn mcr_steer(ctx: XdpContext) -> u32 {
    let verdict = match parse::parse(&Frame::new(&ctx)) {
        Ok(datagram) => steer(&ctx, &datagram),
        Err(reject) => reject.into(),
    };
    kernel::update(&VERDICTS, verdicts_of::XDP, |verdicts| count(verdicts.of(verdict), 1));
    match verdict {
        Verdict::Steered | Verdict::Redirected => xdp_action::XDP_REDIRECT,
        Verdict::Looped | Verdict::NoOutput => xdp_action::XDP_DROP,
        _ => xdp_action::XDP_PASS,
    }
}

#[inline(always)]
fn steer(ctx: &XdpContext, datagram: &Datagram) -> Verdict {
    let Some(flow) = remember(datagram) else {
        return Verdict::NoRule;
    };
    let verdict = match flow.action {
        action::NONE => return Verdict::NoRule,
        action::LOOP => Verdict::Looped,
        // The filter counts the rule's datagrams.
        action::PASS => return Verdict::AfPacket,
        action::REDIRECT => {
            let verdict = redirect::broadcast(ctx, flow.rule, datagram);
            count_redirect(flow.rule, verdict, datagram.payload_len);
            return verdict;
        }
        // With an empty slot the helper answers the action in the flags' low bits.
        _ if SOCKETS.redirect(ctx.rx_queue_index(), u64::from(xdp_action::XDP_PASS)).is_ok() => {
            Verdict::Steered
        }
        _ => Verdict::NoWorker,
    };
    count_rule(flow.rule, verdict, 1, datagram.payload_len);
    if matches!(verdict, Verdict::Steered) {
        kernel::update(&QUEUES, ctx.rx_queue_index(), |queue| count(&mut queue.steered, 1));
        #[cfg(feature = "log")]
        aya_log_ebpf::debug!(ctx, "steered a datagram of rule slot {}", flow.rule);
    }
    verdict
}

/// Rewrites a clone of a broadcast frame on its way out of a device.
#[xdp(map = "devmap")]
pub fn mcr_rewrite(mut ctx: XdpContext) -> u32 {
    let device = kernel::egress_device(&ctx);
    redirect::rewrite(&mut ctx, device)
}

/// [`mcr_rewrite`] as a program that can be run by itself.
#[xdp]
pub fn mcr_rewrite_run(mut ctx: XdpContext) -> u32 {
    let device = ctx.ingress_ifindex() as u32;
    redirect::rewrite(&mut ctx, device)
}

/// Lets into a packet socket what its rules want, and nothing else. The host gets its own copy.
#[expect(clippy::needless_pass_by_value, reason = "the signature of a socket filter")]
#[socket_filter]
pub fn mcr_filter(ctx: SkBuffContext) -> i64 {
    let frame = Buffered::new(&ctx);
    let verdict = if frame.is_tagged() {
        Verdict::Vlan
    } else {
        match parse::parse(&frame) {
            Ok(datagram) => admit(&frame, &datagram),
            Err(reject) => reject.into(),
        }
    };
    kernel::update(&VERDICTS, verdicts_of::FILTER, |verdicts| count(verdicts.of(verdict), 1));
    if matches!(verdict, Verdict::Steered) { i64::from(u32::MAX) } else { 0 }
}

#[inline(always)]
fn admit(frame: &Buffered<'_>, datagram: &Datagram) -> Verdict {
    let Some(flow) = FLOW_TABLE.get(0).and_then(|table| look_up(datagram, *table)) else {
        return Verdict::NoRule;
    };
    let verdict = match flow.action {
        action::PASS => Verdict::Steered,
        action::LOOP => Verdict::Looped,
        // The XDP program could not serve it, and has counted it.
        action::REDIRECT => return Verdict::NotRedirected,
        _ => return Verdict::NoWorker,
    };
    let segment = frame.segment_len();
    let datagrams = if segment == 0 { 1 } else { u32::from(datagram.payload_len).div_ceil(segment) };
    count_rule(flow.rule, verdict, datagrams, datagram.payload_len);
    verdict
}

/// Counts datagrams of a rule with their payload bytes together.
#[inline(always)]
fn count_rule(slot: u32, verdict: Verdict, datagrams: u32, bytes: u16) {
    let datagrams = u64::from(datagrams);
    kernel::update(&RULES, slot, |rule| {
        count(&mut rule.matched, datagrams);
        count(&mut rule.matched_bytes, u64::from(bytes));
        // No branches: a pointer to one of several fields is arithmetic that takes CAP_PERFMON.
        count(&mut rule.no_worker, datagrams * u64::from(matches!(verdict, Verdict::NoWorker)));
        count(&mut rule.looped, datagrams * u64::from(matches!(verdict, Verdict::Looped)));
    });
}

/// Counts a datagram of a rule that redirects.
#[inline(always)]
fn count_redirect(slot: u32, verdict: Verdict, bytes: u16) {
    kernel::update(&RULES, slot, |rule| {
        count(&mut rule.matched, 1);
        count(&mut rule.matched_bytes, u64::from(bytes));
        // As above.
        let not_redirected = matches!(verdict, Verdict::NotRedirected);
        count(&mut rule.redirected, u64::from(matches!(verdict, Verdict::Redirected)));
        count(&mut rule.no_output, u64::from(matches!(verdict, Verdict::NoOutput)));
        count(&mut rule.not_redirected, u64::from(not_redirected));
        count(&mut rule.redirect_bytes, u64::from(bytes) * u64::from(!not_redirected));
    });
}

/// The flow of a datagram, as this CPU found it last where no flow has changed since. Not for the filter, which the XDP
/// program may interrupt.
#[inline(always)]
fn remember(datagram: &Datagram) -> Option<FlowValue> {
    // Its generation is read before the flows, so that what is found may be newer than it is said to be, never older.
    let table = *FLOW_TABLE.get(0)?;
    let key = FlowKey4::source_group(datagram.source, datagram.group, datagram.port);
    kernel::update(&FOUND, key.place(), |found| {
        if found.generation != table.generation || found.key != key {
            let value = look_up(datagram, table).unwrap_or(FlowValue::NONE);
            *found = Found { key, generation: table.generation, value };
        }
        found.value
    })
}

/// The flow of a datagram: the rule for its source goes before the rule for any source.
#[inline(always)]
fn look_up(datagram: &Datagram, table: FlowTable) -> Option<FlowValue> {
    if table.for_one_source > 0 {
        let specific = FlowKey4::source_group(datagram.source, datagram.group, datagram.port);
        if let Some(flow) = kernel::lookup(&FLOWS_V4, &specific) {
            return Some(flow);
        }
    }
    kernel::lookup(&FLOWS_V4, &FlowKey4::any_source(datagram.group, datagram.port))
}

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    // The verifier refuses a program in which this can be reached.
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
