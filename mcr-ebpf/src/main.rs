//! The XDP program: finds the rule that a frame belongs to and steers it to the worker of its RX queue.
//!
//! It decides, counts and redirects; it never writes to a frame. What no rule wants passes untouched.
#![no_std]
#![no_main]

mod kernel;

use aya_ebpf::{
    bindings::xdp_action,
    btf_maps::{HashMap, PerCpuArray, XskMap},
    macros::{btf_map, xdp},
    programs::XdpContext,
};
use mcr_common::{
    abi,
    counters::{QueueCounters, RuleCounters, Verdicts},
    flow::{FlowKey4, FlowValue, action},
    parse::{self, Datagram},
};

use crate::kernel::{Frame, count};

/// Checked by the loader before anything is loaded.
#[unsafe(no_mangle)]
static MCR_ABI_VERSION: u32 = abi::ABI_VERSION;

// The names of the maps are the names that bpftool shows: `mcr_common::abi::map`.
#[btf_map(name = "mcr_flows_v4")]
static FLOWS_V4: HashMap<FlowKey4, FlowValue, { abi::DEFAULT_MAX_RULES as usize }> = HashMap::new();

#[btf_map(name = "mcr_rules")]
static RULES: PerCpuArray<RuleCounters, { abi::DEFAULT_MAX_RULES as usize }> = PerCpuArray::new();

#[btf_map(name = "mcr_verdicts")]
static VERDICTS: PerCpuArray<Verdicts, 1> = PerCpuArray::new();

#[btf_map(name = "mcr_queues")]
static QUEUES: PerCpuArray<QueueCounters, { abi::DEFAULT_QUEUES as usize }> = PerCpuArray::new();

#[btf_map(name = "mcr_sockets")]
static SOCKETS: XskMap<{ abi::DEFAULT_QUEUES as usize }> = XskMap::new();

/// What is to become of a frame.
enum Verdict {
    Steered,
    NoWorker,
    Looped,
    AfPacket,
    NoRule,
    Rejected(parse::Reject),
}

#[expect(clippy::needless_pass_by_value, reason = "the signature of an XDP program")]
#[xdp]
pub fn mcr_steer(ctx: XdpContext) -> u32 {
    let verdict = match parse::parse(&Frame::new(&ctx)) {
        Ok(datagram) => steer(&ctx, &datagram),
        Err(reject) => Verdict::Rejected(reject),
    };
    let action = kernel::update(&VERDICTS, 0, |verdicts| {
        let (counter, action) = match verdict {
            Verdict::Steered => (&mut verdicts.steered, xdp_action::XDP_REDIRECT),
            Verdict::NoWorker => (&mut verdicts.no_worker, xdp_action::XDP_PASS),
            Verdict::Looped => (&mut verdicts.looped, xdp_action::XDP_DROP),
            Verdict::AfPacket => (&mut verdicts.af_packet, xdp_action::XDP_PASS),
            Verdict::NoRule => (&mut verdicts.no_rule, xdp_action::XDP_PASS),
            Verdict::Rejected(reject) => (verdicts.rejected(reject), xdp_action::XDP_PASS),
        };
        count(counter, 1);
        action
    });
    action.unwrap_or(xdp_action::XDP_PASS)
}

#[inline(always)]
fn steer(ctx: &XdpContext, datagram: &Datagram) -> Verdict {
    let Some(flow) = find(datagram) else {
        return Verdict::NoRule;
    };
    let verdict = match flow.action {
        action::LOOP => Verdict::Looped,
        action::PASS => Verdict::AfPacket,
        // With an empty slot the helper answers the action in the flags' low bits.
        _ if SOCKETS.redirect(ctx.rx_queue_index(), u64::from(xdp_action::XDP_PASS)).is_ok() => {
            Verdict::Steered
        }
        _ => Verdict::NoWorker,
    };
    kernel::update(&RULES, flow.rule, |rule| {
        count(&mut rule.matched, 1);
        count(&mut rule.matched_bytes, u64::from(datagram.payload_len));
        count(&mut rule.no_worker, u64::from(matches!(verdict, Verdict::NoWorker)));
        count(&mut rule.looped, u64::from(matches!(verdict, Verdict::Looped)));
    });
    if matches!(verdict, Verdict::Steered) {
        kernel::update(&QUEUES, ctx.rx_queue_index(), |queue| count(&mut queue.steered, 1));
        #[cfg(feature = "log")]
        aya_log_ebpf::debug!(ctx, "steered a datagram of rule slot {}", flow.rule);
    }
    verdict
}

/// The flow of a datagram: the rule for its source goes before the rule for any source.
#[inline(always)]
fn find(datagram: &Datagram) -> Option<FlowValue> {
    let specific = FlowKey4::source_group(datagram.source, datagram.group, datagram.port);
    let any = FlowKey4::any_source(datagram.group, datagram.port);
    kernel::lookup(&FLOWS_V4, &specific).or_else(|| kernel::lookup(&FLOWS_V4, &any))
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
