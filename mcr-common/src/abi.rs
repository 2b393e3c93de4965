//! The version of everything that crosses the boundary between the eBPF object and user space.

/// Raised whenever a shared type, a map's name or shape, or the meaning of a field changes.
pub const ABI_VERSION: u32 = 2;

/// Symbol in the eBPF object that holds [`ABI_VERSION`] as four bytes, little endian.
pub const ABI_SYMBOL: &str = "MCR_ABI_VERSION";

/// The XDP program's name, as `bpftool prog` shows it.
pub const PROGRAM: &str = "mcr_steer";

/// The socket filter's name.
pub const FILTER: &str = "mcr_filter";

/// Names of the maps, as `bpftool map` shows them and as they are pinned.
pub mod map {
    /// Hash: [`FlowKey4`](crate::flow::FlowKey4) to [`FlowValue`](crate::flow::FlowValue).
    pub const FLOWS_V4: &str = "mcr_flows_v4";
    /// Per-CPU array by rule slot: [`RuleCounters`](crate::counters::RuleCounters).
    pub const RULES: &str = "mcr_rules";
    /// Per-CPU array by [`verdicts_of`](super::verdicts_of): [`Verdicts`](crate::counters::Verdicts).
    pub const VERDICTS: &str = "mcr_verdicts";
    /// Per-CPU array by RX queue: [`QueueCounters`](crate::counters::QueueCounters).
    pub const QUEUES: &str = "mcr_queues";
    /// XSKMAP by RX queue.
    pub const SOCKETS: &str = "mcr_sockets";
}

/// Whose verdicts an entry of [`map::VERDICTS`] counts.
pub mod verdicts_of {
    /// The XDP program.
    pub const XDP: u32 = 0;
    /// The socket filter.
    pub const FILTER: u32 = 1;
    /// How many there are.
    pub const COUNT: usize = 2;
}

/// `[daemon] max_rules` where nothing else is said.
pub const DEFAULT_MAX_RULES: u32 = 4096;

/// RX queues that the object's XSKMAP has room for before the loader resizes it.
pub const DEFAULT_QUEUES: u32 = 64;
