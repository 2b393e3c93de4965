//! What a daemon is started with.

use std::{fmt, num::NonZeroU32, path::PathBuf};

use clap::ValueEnum;

use crate::rule::DatapathChoice;

/// Where the control socket is unless it is said otherwise.
pub const DEFAULT_CONTROL: &str = "/run/mcr/mcr.sock";

/// Under which pins stand unless it is said otherwise.
pub const DEFAULT_PIN_ROOT: &str = "/sys/fs/bpf/mcr";

/// When a rule counts as stalled unless it is said otherwise.
pub const DEFAULT_STALLED_AFTER_S: u32 = 10;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// For rules that do not name one.
    pub datapath: DatapathChoice,
    /// Generic XDP may stand in where there is no native XDP.
    pub generic_xdp: bool,
    /// Workers per ingress interface; chosen from its queues and CPUs if none.
    pub workers: Option<NonZeroU32>,
    /// The CPUs that workers may be pinned to, ascending; chosen if none.
    pub cpus: Option<Vec<u32>>,
    /// How long an idle worker looks for frames before it sleeps, in microseconds; if none, that depends on
    /// what comes.
    pub busy_poll_us: Option<u32>,
    pub control: PathBuf,
    /// Whose the control socket is beside the daemon's user.
    pub group: Option<String>,
    /// Whom the daemon becomes once it has what only root can give it.
    pub user: Option<String>,
    pub pin_root: PathBuf,
    /// Source port of what is sent; chosen once if none.
    pub source_port: Option<u16>,
    pub max_rules: u32,
    /// Seconds without a datagram after which a rule that had some counts as stalled.
    pub stalled_after_s: u32,
    /// eBPF object in place of the embedded one.
    pub bpf_object: Option<PathBuf>,
    pub log_format: LogFormat,
    pub log_level: LogLevel,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    #[default]
    Text,
    Json,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum LogLevel {
    Error,
    Warn,
    #[default]
    Info,
    Debug,
    Trace,
}

impl LogLevel {
    pub fn as_str(self) -> &'static str {
        match self {
            LogLevel::Error => "error",
            LogLevel::Warn => "warn",
            LogLevel::Info => "info",
            LogLevel::Debug => "debug",
            LogLevel::Trace => "trace",
        }
    }
}

impl fmt::Display for LogLevel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
