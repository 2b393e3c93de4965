//! The privileged half of the daemon: rules, eBPF objects, memberships, worker processes, control socket.
//! It touches no packet.

mod alarms;
mod answers;
mod audit;
mod balance;
mod books;
mod commands;
mod configuration;
mod devices;
pub mod event;
pub mod host;
mod inheritance;
pub mod journal;
mod log;
mod notices;
mod run;
mod service;
pub mod settings;
pub mod state;
mod subscribers;
mod worker_process;

use std::path::PathBuf;

use anyhow::Context;

pub use configuration::first_mistake;

use crate::config::{Config, Source, options::Options};
use service::Service;
use settings::Settings;

/// How a daemon was called.
#[derive(Clone, Debug, Default)]
pub struct Launch {
    /// What its command line says, which goes before what its files say.
    pub options: Options,
    /// Absolute.
    pub file: Option<PathBuf>,
    /// What stood in the file and its fragments.
    pub sources: Vec<Source>,
}

/// Runs the daemon until it is told to stop, by a call, SIGTERM or SIGINT.
///
/// # Errors
///
/// What keeps the daemon from starting, in one line: what, why, what to do. A daemon that has started
/// ends with an error only if it cannot go on.
pub fn run(launch: Launch, config: Config) -> anyhow::Result<()> {
    // Before anything is opened that stays open.
    let (service, stored) = Service::of_environment();
    let settings = Settings::from(launch.options.clone().or(config.options.clone()));
    let log = log::start(settings.log_format, settings.log_level);
    let service = service.context("NOTIFY_SOCKET, where the service manager listens")?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let outcome = runtime.block_on(run::run(launch, settings, config, log, (service, stored)));
    runtime.shutdown_background();
    outcome
}
