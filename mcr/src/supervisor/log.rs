//! The daemon's log: its own lines and those of its workers, on stderr.

use std::io;

use tracing_subscriber::{
    EnvFilter, Registry, fmt, layer::SubscriberExt, reload, reload::Handle, util::SubscriberInitExt,
};

use crate::supervisor::settings::{LogFormat, LogLevel};

/// Sets the level.
pub struct LogControl(Handle<EnvFilter, Registry>);

/// Starts logging.
pub fn start(format: LogFormat, level: LogLevel) -> LogControl {
    let (filter, handle) = reload::Layer::new(filter(level));
    let registry = tracing_subscriber::registry().with(filter);
    match format {
        LogFormat::Text => {
            let ansi = io::IsTerminal::is_terminal(&io::stderr());
            registry.with(fmt::layer().with_target(false).with_ansi(ansi).with_writer(io::stderr)).init();
        }
        LogFormat::Json => {
            registry.with(fmt::layer().json().with_target(false).with_writer(io::stderr)).init();
        }
    }
    LogControl(handle)
}

/// The libraries' own lines are of interest only when they warn.
fn filter(level: LogLevel) -> EnvFilter {
    EnvFilter::new(format!("warn,mcr={level}"))
}

impl LogControl {
    pub fn set_level(&self, level: LogLevel) {
        // It fails only when the subscriber is gone, with the process.
        let _ = self.0.reload(filter(level));
    }
}
