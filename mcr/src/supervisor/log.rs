//! The daemon's log: its own lines and those of its workers, on stderr.

use std::io;

use tracing::{Event, Level, Subscriber};
use tracing_subscriber::{
    EnvFilter, Registry,
    fmt::{
        self, FmtContext, FormatEvent, FormatFields,
        format::{Format, Full, Writer},
    },
    layer::SubscriberExt,
    registry::LookupSpan,
    reload,
    reload::Handle,
    util::SubscriberInitExt,
};

use crate::{
    supervisor::settings::{LogFormat, LogLevel},
    sys::service_manager::stderr_is_journal,
};

/// Sets the level.
pub struct LogControl(Handle<EnvFilter, Registry>);

/// Starts logging.
pub fn start(format: LogFormat, level: LogLevel) -> LogControl {
    let (filter, handle) = reload::Layer::new(filter(level));
    let registry = tracing_subscriber::registry().with(filter);
    match format {
        LogFormat::Text if stderr_is_journal() => {
            let lines =
                Format::default().without_time().with_ansi(false).with_level(false).with_target(false);
            let lines = fmt::layer().with_ansi(false).event_format(Journal(lines));
            registry.with(lines.with_writer(io::stderr)).init();
        }
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

/// Lines as the journal takes them: the level in front, as sd-daemon(3) numbers it, and the time left to the journal.
struct Journal(Format<Full, ()>);

impl<S, N> FormatEvent<S, N> for Journal
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut line: Writer<'_>,
        event: &Event<'_>,
    ) -> std::fmt::Result {
        let number = match *event.metadata().level() {
            Level::ERROR => 3,
            Level::WARN => 4,
            Level::INFO => 6,
            Level::DEBUG | Level::TRACE => 7,
        };
        write!(line, "<{number}>")?;
        self.0.format_event(context, line, event)
    }
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
