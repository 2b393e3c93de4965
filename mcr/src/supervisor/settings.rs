//! What a daemon is started with.

use std::{
    fmt,
    num::NonZeroU32,
    path::{Path, PathBuf},
};

use clap::ValueEnum;
use toml::Value;

use crate::{metrics::address::Address, rule::DatapathChoice, sys::cpu_list::ranges};

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
    /// Chunks of each RX queue's UMEM: a power of two.
    pub frames: u32,
    /// Places in each RX ring: a power of two, as many as chunks if none.
    pub rx_ring: Option<u32>,
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
    /// Where metrics are served, if they are.
    pub metrics: Option<Address>,
    /// eBPF object in place of the embedded one.
    pub bpf_object: Option<PathBuf>,
    pub log_format: LogFormat,
    pub log_level: LogLevel,
}

impl Settings {
    /// What of them contradicts one another, if anything does.
    pub fn check(&self) -> Result<(), String> {
        match self.rx_ring {
            Some(places) if places > self.frames => Err(format!(
                "--rx-ring {places} has more places than there are frames: at most --frames {}",
                self.frames
            )),
            _ => Ok(()),
        }
    }

    /// Each setting by its key in `[daemon]`, with its value as TOML unless it is left to the daemon.
    pub fn named(&self) -> [(&'static str, Option<String>); 18] {
        let path = |path: &Path| {
            let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
            Some(Value::String(path.display().to_string()).to_string())
        };
        let text = |text: &dyn fmt::Display| Some(Value::String(text.to_string()).to_string());
        let cpus = self.cpus.as_ref().map(|cpus| ranges(cpus));
        let format = self.log_format.to_possible_value().map(|value| value.get_name().to_owned());
        [
            ("datapath", text(&self.datapath)),
            ("generic_xdp", Some(self.generic_xdp.to_string())),
            ("workers", self.workers.map(|workers| workers.to_string())),
            ("cpus", cpus.and_then(|cpus| text(&cpus))),
            ("busy_poll", self.busy_poll_us.map(|us| us.to_string())),
            ("frames", Some(self.frames.to_string())),
            ("rx_ring", self.rx_ring.map(|places| places.to_string())),
            ("control", path(&self.control)),
            ("group", self.group.as_ref().and_then(|group| text(group))),
            ("user", self.user.as_ref().and_then(|user| text(user))),
            ("pin_root", path(&self.pin_root)),
            ("source_port", self.source_port.map(|port| port.to_string())),
            ("max_rules", Some(self.max_rules.to_string())),
            ("stalled_after", Some(self.stalled_after_s.to_string())),
            ("metrics", self.metrics.as_ref().and_then(|address| text(address))),
            ("bpf_object", self.bpf_object.as_ref().and_then(|object| path(object))),
            ("log_format", format.and_then(|format| text(&format))),
            ("log_level", text(&self.log_level)),
        ]
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    #[default]
    Text,
    Json,
}

/// Later ones log more.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
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
