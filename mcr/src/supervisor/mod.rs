//! The privileged half of the daemon: rules, eBPF objects, memberships, worker processes, control socket.
//! It touches no packet.

mod alarms;
mod answers;
mod balance;
mod books;
mod commands;
mod devices;
pub mod event;
mod host;
mod log;
mod run;
pub mod settings;
pub mod state;
mod worker_process;

use settings::Settings;

/// Runs the daemon until it is told to stop, by a call, SIGTERM or SIGINT.
///
/// # Errors
///
/// What keeps the daemon from starting, in one line: what, why, what to do. A daemon that has started
/// ends with an error only if it cannot go on.
pub fn run(settings: Settings) -> anyhow::Result<()> {
    let log = log::start(settings.log_format, settings.log_level);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let outcome = runtime.block_on(run::run(settings, log));
    runtime.shutdown_background();
    outcome
}
