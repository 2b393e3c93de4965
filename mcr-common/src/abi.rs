//! The version of everything that crosses the boundary between the eBPF object and user space.

/// Raised whenever a shared type, a map's name or shape, or the meaning of a field changes.
pub const ABI_VERSION: u32 = 5;

/// Symbol in the eBPF object that holds [`ABI_VERSION`] as four bytes, little endian.
pub const ABI_SYMBOL: &str = "MCR_ABI_VERSION";

/// The XDP program's name, as `bpftool prog` shows it.
pub const PROGRAM: &str = "mcr_steer";

/// The egress program's name: on the devices of outputs, it rewrites what is redirected there.
pub const REWRITE: &str = "mcr_rewrite";

/// The egress program as an ordinary XDP program, which `BPF_PROG_TEST_RUN` takes. Nothing attaches it. The device that
/// it takes itself to run on is the ingress one.
pub const REWRITE_TWIN: &str = "mcr_rewrite_run";

/// The socket filter's name.
pub const FILTER: &str = "mcr_filter";

/// Names of the maps, as `bpftool map` shows them and as they are pinned.
pub mod map {
    /// Hash: [`FlowKey4`](crate::flow::FlowKey4) to [`FlowValue`](crate::flow::FlowValue).
    pub const FLOWS_V4: &str = "mcr_flows_v4";
    /// Array of one: [`FlowTable`](crate::flow::FlowTable).
    pub const FLOW_TABLE: &str = "mcr_flow_table";
    /// Per-CPU array by [`place`](crate::flow::FlowKey4::place): [`Found`](crate::flow::Found).
    pub const FOUND: &str = "mcr_found";
    /// Per-CPU array by rule slot: [`RuleCounters`](crate::counters::RuleCounters).
    pub const RULES: &str = "mcr_rules";
    /// Per-CPU array by [`verdicts_of`](super::verdicts_of): [`Verdicts`](crate::counters::Verdicts).
    pub const VERDICTS: &str = "mcr_verdicts";
    /// Per-CPU array by RX queue: [`QueueCounters`](crate::counters::QueueCounters).
    pub const QUEUES: &str = "mcr_queues";
    /// XSKMAP by RX queue.
    pub const SOCKETS: &str = "mcr_sockets";
    /// Array by rule slot: which of its two fans is in use, 1 or 2; 0 for none.
    pub const BANKS: &str = "mcr_banks";
    /// Per-CPU array by [`fan`](crate::redirect::fan): [`Fan`](crate::redirect::Fan).
    pub const FANS: &str = "mcr_fans";
    /// Array by fan of device maps, each with an entry an output.
    pub const DEVICES: &str = "mcr_devices";
    /// Per-CPU hash: [`ChainKey`](crate::redirect::ChainKey) to [`Chain`](crate::redirect::Chain).
    pub const CHAINS: &str = "mcr_chains";
    /// Array by [`record`](crate::redirect::record): [`Record`](crate::redirect::Record).
    pub const RECORDS: &str = "mcr_records";
    /// Per-CPU array by output slot, of the lower ones: [`OutputCounters`](crate::counters::OutputCounters).
    pub const LOW_OUTPUTS: &str = "mcr_low_outputs";
    /// Per-CPU hash by output slot, of the others: the same.
    pub const OUTPUTS: &str = "mcr_outputs";
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
