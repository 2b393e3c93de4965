//! Metrics for Prometheus, and whether the daemon is alive and ready, by HTTP.
//!
//! They are served by a thread of its own without any capability: whatever a client does, the supervisor only
//! hears a [`Question`] now and then; and where the supervisor is held up, there is still somebody who says so.

pub mod address;
mod exposition;
mod http;
pub mod server;

use std::collections::BTreeMap;

use tokio::sync::oneshot;

use crate::api::wire::{Health, Problem, RuleInfo, Stats};

/// What the server asks of the supervisor. A question that is dropped was not answered.
#[derive(Debug)]
pub enum Question {
    Alive(oneshot::Sender<()>),
    Survey(oneshot::Sender<Survey>),
}

/// All that the pages tell, as of one moment.
#[derive(Clone, Debug)]
pub struct Survey {
    pub health: Health,
    /// Worst first.
    pub problems: Vec<Problem>,
    /// In the order of `stats.rules`.
    pub rules: Vec<RuleInfo>,
    /// With every counter of a device, also those without a loss.
    pub stats: Stats,
    /// Groups and sources that are joined, by interface.
    pub memberships: BTreeMap<String, u64>,
}
