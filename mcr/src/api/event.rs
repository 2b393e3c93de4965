//! What happens, as subscribers of the control protocol are told of it. Names are stable as all of [`wire`](super::wire):
//! fields and events are added, never renamed.

use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};

/// `params` of the notification `event`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    pub schema: u32,
    /// When it was noticed.
    pub time: String,
    /// Counts the events that the daemon has told, to whomever.
    pub seq: u64,
    #[serde(flatten)]
    pub occurrence: Occurrence,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event")]
pub enum Occurrence {
    #[serde(rename = "rule.added")]
    RuleAdded {
        rule: String,
        /// `cli` or `file`.
        origin: String,
        #[serde(rename = "in")]
        input: String,
        #[serde(rename = "out")]
        outputs: Vec<String>,
    },
    #[serde(rename = "rule.changed")]
    RuleChanged { rule: String, difference: String },
    #[serde(rename = "rule.removed")]
    RuleRemoved { rule: String },
    /// Another datapath serves it.
    #[serde(rename = "rule.moved")]
    RuleMoved { rule: String, from: String, to: String, why: String },
    #[serde(rename = "rule.active")]
    RuleActive { rule: String, datapath: Option<String> },
    #[serde(rename = "rule.pending")]
    RulePending { rule: String, reason: String },
    #[serde(rename = "rule.failed")]
    RuleFailed { rule: String, reason: String },
    /// It had datagrams, and has none any more.
    #[serde(rename = "rule.stalled")]
    RuleStalled { rule: String },
    /// It was stalled, and has datagrams again.
    #[serde(rename = "rule.resumed")]
    RuleResumed { rule: String },
    #[serde(rename = "worker.started")]
    WorkerStarted { worker: String, pid: u32 },
    #[serde(rename = "worker.ended")]
    WorkerEnded { worker: String, pid: u32, reason: String },
    /// It has ended unasked, and is started again after a pause.
    #[serde(rename = "worker.restarting")]
    WorkerRestarting {
        worker: String,
        reason: String,
        /// How often, this one included.
        restarts: u64,
    },
    #[serde(rename = "interface.there")]
    InterfaceThere { interface: String, up: bool, mtu: u32, addresses: Vec<Ipv4Addr> },
    #[serde(rename = "interface.gone")]
    InterfaceGone { interface: String },
    #[serde(rename = "interface.up")]
    InterfaceUp { interface: String },
    #[serde(rename = "interface.down")]
    InterfaceDown { interface: String },
    #[serde(rename = "interface.addresses")]
    InterfaceAddresses { interface: String, addresses: Vec<Ipv4Addr> },
    #[serde(rename = "interface.mtu")]
    InterfaceMtu { interface: String, mtu: u32 },
    #[serde(rename = "alarm.raised")]
    AlarmRaised { what: String, gap: i64, since: String, next: String },
    #[serde(rename = "alarm.cleared")]
    AlarmCleared { what: String, since: String },
    #[serde(rename = "configuration.loaded")]
    ConfigurationLoaded {
        added: u32,
        removed: u32,
        changed: u32,
        unchanged: u32,
        /// It is taken back then, unless it is confirmed.
        #[serde(skip_serializing_if = "Option::is_none", default)]
        confirm_within_s: Option<u32>,
    },
    #[serde(rename = "configuration.confirmed")]
    ConfigurationConfirmed,
    #[serde(rename = "configuration.rolled_back")]
    ConfigurationRolledBack,
    /// A reload that SIGHUP asked for came to nothing.
    #[serde(rename = "configuration.refused")]
    ConfigurationRefused { reason: String },
    /// It ends in order: the last event.
    #[serde(rename = "daemon.stopping")]
    DaemonStopping {
        pid: u32,
        /// What the kernel does by itself goes on.
        keep: bool,
    },
    /// The subscriber did not read fast enough and is told no more; `seq` is the first event that it misses.
    #[serde(rename = "events.overrun")]
    Overrun,
}
