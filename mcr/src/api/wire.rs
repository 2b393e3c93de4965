//! The types of the control protocol. Their JSON is stable: fields are added, never renamed or removed
//! within one [`SCHEMA`].
//!
//! Endpoints travel in the form in which a person types them, canonical: `239.1.1.1:5000@eth0,source=192.0.2.7`.

use std::{collections::BTreeMap, time::SystemTime};

use serde::{Deserialize, Serialize};

use crate::config::Source;

/// Version of the shapes below.
pub const SCHEMA: u32 = 1;

/// A moment as it is written here: RFC 3339 in UTC, to the millisecond.
pub fn timestamp(time: SystemTime) -> String {
    humantime::format_rfc3339_millis(time).to_string()
}

/// `1,234,567`.
pub fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Longest request line, in bytes, newline included.
pub const MAX_REQUEST_BYTES: usize = 8 * 1024 * 1024;

/// A call of the control protocol: `method` and `params` of the JSON-RPC request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "method", content = "params", deny_unknown_fields)]
pub enum Request {
    #[serde(rename = "ping")]
    Ping,
    #[serde(rename = "status")]
    Status,
    #[serde(rename = "stop")]
    Stop(Stop),
    #[serde(rename = "rule.add")]
    RuleAdd(RuleSpec),
    #[serde(rename = "rule.set")]
    RuleSet(RuleChange),
    #[serde(rename = "rule.remove")]
    RuleRemove(RuleRemoval),
    #[serde(rename = "rule.list")]
    RuleList,
    #[serde(rename = "rule.show")]
    RuleShow(RuleRef),
    /// One rule's counters, or all.
    #[serde(rename = "stats")]
    Stats(StatsQuery),
    #[serde(rename = "workers")]
    Workers,
    /// What runs, as a configuration file.
    #[serde(rename = "config.show")]
    ConfigShow,
    /// Puts the rules of these files in the place of those that came from files.
    #[serde(rename = "config.load")]
    ConfigLoad(ConfigLoad),
    /// A load that waits to be confirmed stays.
    #[serde(rename = "config.confirm")]
    ConfigConfirm,
    /// A load that waits to be confirmed is taken back at once.
    #[serde(rename = "config.rollback")]
    ConfigRollback,
    /// Makes the rules that were added by command permanent.
    #[serde(rename = "config.save")]
    ConfigSave,
    /// The answer is followed by a notification for each event.
    #[serde(rename = "events.subscribe")]
    EventsSubscribe,
    #[serde(rename = "log_level.get")]
    LogLevelGet,
    #[serde(rename = "log_level.set")]
    LogLevelSet(LogLevel),
}

/// A rule to add.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RuleSpec {
    /// Given one, derived from the input, if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    #[serde(rename = "in")]
    pub input: String,
    #[serde(rename = "out")]
    pub outputs: Vec<String>,
    /// The daemon's if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub datapath: Option<String>,
    /// Other rules may feed the same output.
    #[serde(default)]
    pub merge: bool,
    /// Groups in 224.0.0.0/24 are meant.
    #[serde(default)]
    pub link_local: bool,
    /// Make it permanent.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub save: bool,
}

/// A change of a rule's outputs or datapath.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RuleChange {
    pub name: String,
    #[serde(default)]
    pub add_out: Vec<String>,
    /// By endpoint; options need not be repeated.
    #[serde(default)]
    pub del_out: Vec<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub datapath: Option<String>,
    #[serde(default)]
    pub merge: bool,
    #[serde(default)]
    pub link_local: bool,
    /// Make it permanent.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub save: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RuleRef {
    pub name: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RuleRemoval {
    pub name: String,
    /// Remove it from what was saved, too.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub save: bool,
}

/// A configuration to load, read where the caller is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConfigLoad {
    /// The file, and the fragments beside it.
    pub sources: Vec<Source>,
    /// Only tell what would change.
    #[serde(default)]
    pub dry_run: bool,
    /// Take it back after so many seconds unless `config.confirm` comes before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub confirm_within_s: Option<u32>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StatsQuery {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rule: Option<String>,
}

/// `error`, `warn`, `info`, `debug` or `trace`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LogLevel {
    pub level: String,
}

/// Answer to `ping`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pong {
    pub schema: u32,
    pub version: String,
    pub pid: u32,
}

/// Answer to `rule.add`, `rule.set` and `rule.remove`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RuleOutcome {
    pub schema: u32,
    pub outcome: Outcome,
    pub rule: RuleInfo,
    /// What the operator should know though it was done, a line each.
    pub warnings: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    Added,
    Changed,
    Removed,
    Unchanged,
}

/// Whether something is at work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Health {
    /// Relaying, or ready to.
    Active,
    /// Waits for something that its `reason` names, and resumes by itself.
    Pending,
    /// Something failed that its `reason` names.
    Failed,
}

/// A rule as it stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RuleInfo {
    pub name: String,
    /// `cli` or `file`.
    pub origin: String,
    /// Of a rule from a file: `FILE:LINE`.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub place: Option<String>,
    #[serde(rename = "in")]
    pub input: String,
    #[serde(rename = "out")]
    pub outputs: Vec<OutputInfo>,
    /// The datapath in use, or absent while there is none.
    pub datapath: Option<String>,
    /// The datapath asked for.
    pub datapath_asked: String,
    /// Why this datapath, and what of the rule's traffic the host itself still sees; empty while there is none.
    pub datapath_why: String,
    pub merge: bool,
    pub link_local: bool,
    pub health: Health,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub reason: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OutputInfo {
    pub to: String,
    pub health: Health,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub reason: Option<String>,
}

/// Answer to `rule.list`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RuleList {
    pub schema: u32,
    pub rules: Vec<RuleInfo>,
}

/// Answer to `rule.show`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RuleShow {
    pub schema: u32,
    pub rule: RuleInfo,
}

/// Why datagrams of a rule are dropped before any output.
pub const RULE_DROPS: [&str; 4] = ["no_worker", "loop", "cut", "not_redirected"];

/// Why the sockets of an interface lose frames.
pub const INTERFACE_DROPS: [&str; 5] =
    ["rx_ring_full", "fill_ring_empty", "socket_dropped", "worker_died", "packet_ring_full"];

/// Why frames that were received are relayed by no rule.
pub const INTERFACE_DISCARDS: [&str; 4] = ["no_rule", "refused", "cut", "worker_died"];

/// Answer to `stats`. Counters go on from `since`, across worker restarts; times are RFC 3339 in UTC.
/// Bytes are UDP payload bytes; rates are over the last second.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Stats {
    pub schema: u32,
    pub time: String,
    pub since: String,
    pub rules: Vec<RuleStats>,
    pub interfaces: Vec<InterfaceStats>,
    pub workers: Vec<WorkerInfo>,
    /// The interfaces that rules name or named, ingress and egress.
    #[serde(default)]
    pub devices: Vec<DeviceStats>,
    #[serde(default)]
    pub alarms: Vec<Alarm>,
}

/// An equality of the ledger that does not hold: more is missing than can be in flight, something is missing
/// while traffic rests, or something was counted twice. It stands until nothing is missing any more.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Alarm {
    pub what: String,
    /// Datagrams or frames that are missing; below zero those that were counted twice.
    pub gap: i64,
    pub since: String,
    /// A command that shows the counters.
    pub next: String,
}

/// What a device lost since the daemon first looked at it, by the kernel's and the driver's own names; counters
/// without a loss are absent. It is known of the device as a whole, whoever sent or was to receive.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceStats {
    pub name: String,
    /// As `ip -s -s link` has it (`struct rtnl_link_stats64`).
    pub link: BTreeMap<String, u64>,
    /// As `tc -s qdisc` has it: `KIND drops` and `KIND overlimits`.
    pub qdisc: BTreeMap<String, u64>,
    /// Of `ethtool -S`, what says by its name that something was lost.
    pub driver: BTreeMap<String, u64>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RuleStats {
    pub name: String,
    pub origin: String,
    pub datapath: Option<String>,
    #[serde(rename = "in")]
    pub input: String,
    /// From when on its counters only go on: when the rule came, or before this daemon did, if the kernel went on with the
    /// rule by itself.
    #[serde(default)]
    pub since: String,
    /// Datagrams of the rule that were seen on the wire; `matched = received + dropped`, and what is
    /// lost between the XDP program and a worker is a row of the interface.
    pub matched: u64,
    /// Datagrams that the workers took in.
    pub received: u64,
    pub received_bytes: u64,
    pub received_pps: f64,
    /// Absent until the first datagram.
    pub last_seen: Option<String>,
    /// Whole seconds since then.
    #[serde(default)]
    pub idle_seconds: Option<u64>,
    /// It had datagrams, and none for as long as the daemon's `stalled_after`, 10 s unless said otherwise.
    #[serde(default)]
    pub stalled: bool,
    /// Of [`RULE_DROPS`].
    pub dropped: BTreeMap<String, u64>,
    pub outputs: Vec<OutputStats>,
}

/// `received = sent + dropped`, once nothing is in flight.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OutputStats {
    pub to: String,
    /// Datagrams of the rule since this output is one of its outputs.
    pub received: u64,
    /// Accepted by the kernel.
    pub sent: u64,
    pub sent_bytes: u64,
    pub sent_pps: f64,
    /// Sends repeated because the kernel reported on them that a host refused or could not be sent an
    /// earlier datagram.
    #[serde(default)]
    pub retried: u64,
    /// Of the dropped: datagrams of runs of which the kernel refused some and does not say which.
    #[serde(default)]
    pub approximate: u64,
    /// By reason; reasons without a drop are absent.
    pub dropped: BTreeMap<String, u64>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InterfaceStats {
    pub name: String,
    /// The datapath that these are the counters of: `af-xdp` or `af-packet`.
    pub datapath: String,
    /// Frames by the verdict of the XDP program, or of the packet sockets' filter; `steered` among them.
    pub verdicts: BTreeMap<String, u64>,
    /// Frames that the workers took out of their sockets: `steered = received + dropped`, once nothing
    /// is in flight.
    pub received: u64,
    /// Of [`INTERFACE_DROPS`].
    pub dropped: BTreeMap<String, u64>,
    /// Frames received whose rule was gone by then (`no_rule`), that a worker's parser refused, that came
    /// without their end (`cut`), or that a worker held when it died (`worker_died`).
    pub discarded: BTreeMap<String, u64>,
    /// Of each RX queue by AF_XDP, of each packet socket by AF_PACKET.
    #[serde(default)]
    pub queues: Vec<QueueStats>,
}

/// `steered = received + dropped`, as for the interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueStats {
    pub queue: u32,
    /// Who serves it, or did last.
    pub worker: String,
    pub steered: u64,
    pub received: u64,
    pub dropped: BTreeMap<String, u64>,
}

/// Answer to `workers`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WorkerList {
    pub schema: u32,
    pub workers: Vec<WorkerInfo>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WorkerInfo {
    /// `INTERFACE/xdpN` or `INTERFACE/packetN`.
    pub id: String,
    pub interface: String,
    pub datapath: String,
    /// Why this datapath, and what of its traffic the host itself still sees.
    pub why: String,
    pub queues: Vec<u32>,
    pub cpu: Option<u32>,
    /// Absent while it is being restarted.
    pub pid: Option<u32>,
    /// `running` or `restarting`.
    pub state: String,
    pub restarts: u64,
    /// Why it ended last.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub last_exit: Option<String>,
    pub received: u64,
    /// Calls of `io_uring_enter`, as of the last time that the worker slept or its timer ran out.
    #[serde(default)]
    pub system_calls: u64,
    pub received_pps: f64,
}

/// Answer to `status`: is it working, what is wrong, what to type next.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Status {
    pub schema: u32,
    pub time: String,
    pub since: String,
    pub version: String,
    pub pid: u32,
    pub health: Health,
    pub rules: RuleCounts,
    pub workers_running: u32,
    pub workers_total: u32,
    pub worker_restarts: u64,
    pub received_pps: f64,
    pub sent_pps: f64,
    /// Bits a second of UDP payload, decimal.
    pub sent_bps: f64,
    /// All drops of all rules and interfaces, by reason.
    pub dropped: BTreeMap<String, u64>,
    /// Frames that were sent, and that devices then lost, by interface; none of those that lost none.
    #[serde(default)]
    pub device_lost: BTreeMap<String, u64>,
    /// What is wrong, worst first.
    pub problems: Vec<Problem>,
    #[serde(default)]
    pub alarms: Vec<Alarm>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RuleCounts {
    pub total: u32,
    pub active: u32,
    pub pending: u32,
    pub failed: u32,
    /// Of the active: they had datagrams, and have none now.
    #[serde(default)]
    pub stalled: u32,
    /// They never had a datagram.
    #[serde(default)]
    pub unseen: u32,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    pub what: String,
    /// A command that shows or mends it.
    pub next: String,
}

/// Answer to `config.show`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigText {
    pub schema: u32,
    /// TOML that gives back what runs.
    pub toml: String,
}

/// Answer to `config.load`, `config.confirm` and `config.rollback`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigOutcome {
    pub schema: u32,
    pub outcome: LoadOutcome,
    pub added: Vec<RuleSpec>,
    pub removed: Vec<RuleSpec>,
    pub changed: Vec<RuleDifference>,
    /// Rules that were added by command, and are now in a file too.
    pub adopted: Vec<String>,
    pub unchanged: u32,
    pub settings: Vec<SettingDifference>,
    /// Seconds that are left to confirm it.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub confirm_within_s: Option<u32>,
    /// What the operator should know though it was done, a line each.
    pub warnings: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LoadOutcome {
    /// Nothing was done: a dry run.
    Planned,
    Applied,
    /// It was so already.
    Unchanged,
    Confirmed,
    RolledBack,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RuleDifference {
    pub name: String,
    pub difference: String,
}

/// A key of `[daemon]` whose value in the file is another than the one that holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SettingDifference {
    pub key: String,
    /// As TOML; absent if it is left to the daemon.
    pub running: Option<String>,
    pub file: Option<String>,
    /// It takes effect when the daemon is started again, not now.
    pub needs_restart: bool,
}

/// Answer to `config.save`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigSaved {
    pub schema: u32,
    pub file: String,
    /// Rules that were saved now.
    pub saved: Vec<String>,
}

/// Answer to `events.subscribe`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Subscribed {
    pub schema: u32,
    /// The last event that was told before: the next one has the number after it.
    pub seq: u64,
}

/// Answer to `log_level.get` and `log_level.set`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogLevelInfo {
    pub schema: u32,
    pub level: String,
}

/// Parameters of `stop`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Stop {
    /// What the kernel does by itself, rules on the datapath `redirect`, goes on without the daemon.
    pub keep: bool,
}

/// Answer to `stop`: the daemon has begun to end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stopping {
    pub schema: u32,
    pub pid: u32,
    /// Rules that go on without the daemon.
    pub kept: Vec<String>,
}

/// A JSON-RPC error object. `message` is one line for a person.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    pub code: i32,
    pub message: String,
}

/// JSON-RPC error codes; those above -32000 are the specification's own.
pub mod code {
    pub const PARSE: i32 = -32700;
    pub const INVALID_REQUEST: i32 = -32600;
    pub const METHOD_NOT_FOUND: i32 = -32601;
    pub const INVALID_PARAMS: i32 = -32602;
    pub const INTERNAL: i32 = -32603;
    /// The call was understood and refused; nothing was changed.
    pub const REFUSED: i32 = -32000;
    /// No rule has the name.
    pub const UNKNOWN_RULE: i32 = -32001;
    /// Too many connections or subscribers; try again.
    pub const BUSY: i32 = -32002;
}

impl Error {
    pub fn refused(message: impl Into<String>) -> Self {
        Self { code: code::REFUSED, message: message.into() }
    }
}
