//! What a daemon can be started with: the options of `mcr run`, which are the keys of `[daemon]` as well,
//! with underscores. What is said on the command line goes before what a file says.

use std::{any::TypeId, num::NonZeroU32, path::PathBuf};

use clap::{Arg, ArgAction, CommandFactory, Parser, error::ErrorKind};
use mcr_common::abi::DEFAULT_MAX_RULES;
use toml::de::DeValue;

use crate::{
    datapath::af_xdp,
    metrics::address::Address,
    rule::DatapathChoice,
    supervisor::settings::{
        DEFAULT_CONTROL, DEFAULT_PIN_ROOT, DEFAULT_STALLED_AFTER_S, LogFormat, LogLevel, Settings,
    },
    sys::cpu_list::parse_cpus,
};

#[derive(Clone, Debug, Default, clap::Args)]
pub struct Options {
    /// Datapath of rules that name none: auto, redirect, af-xdp or af-packet [default: auto]
    #[arg(long, value_name = "DATAPATH", value_parser = str::parse::<DatapathChoice>)]
    datapath: Option<DatapathChoice>,
    /// Let generic XDP stand in for af-xdp on interfaces without native XDP: slower than af-packet
    #[arg(long)]
    generic_xdp: bool,
    /// Workers per ingress interface, at most 256 [default: as many as it has RX queues, at most 4]
    #[arg(long, value_name = "N", value_parser = parse_workers)]
    workers: Option<NonZeroU32>,
    /// CPUs that workers are pinned to, like 0-3,6
    #[arg(long, value_name = "LIST", value_parser = parse_list)]
    cpus: Option<CpuList>,
    /// How long an idle worker looks for frames before it sleeps, at most 1000000: less latency for more CPU
    /// [default: 25 where frames usually come within that time, otherwise 0]
    #[arg(long, value_name = "MICROSECONDS", value_parser = clap::value_parser!(u32).range(..=1_000_000))]
    busy_poll: Option<u32>,
    /// Frames that an RX queue's UMEM holds (AF_XDP), a power of two from 256 to 65536: how long a stall of its worker
    /// is bridged, for 2 or 4 KiB of memory each [default: 8192]
    #[arg(long, value_name = "N", value_parser = parse_frames)]
    frames: Option<u32>,
    /// Places in an RX queue's RX ring (AF_XDP), a power of two, at most as many as frames [default: as many]
    #[arg(long, value_name = "N", value_parser = parse_rx_ring)]
    rx_ring: Option<u32>,
    /// The control socket to listen on [default: /run/mcr/mcr.sock]
    #[arg(long, value_name = "PATH", env = "MCR_CONTROL")]
    control: Option<PathBuf>,
    /// Group whose members may use the control socket [default: the daemon's own]
    #[arg(long, value_name = "GROUP")]
    group: Option<String>,
    /// Become this user once started as root, keeping only the capabilities that are used
    #[arg(long, value_name = "USER")]
    user: Option<String>,
    /// Directory on bpffs under which program, maps and link are pinned [default: /sys/fs/bpf/mcr]
    #[arg(long, value_name = "DIR")]
    pin_root: Option<PathBuf>,
    /// UDP source port of what is sent [default: one that is free, kept over restarts]
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    source_port: Option<u16>,
    /// Rules that the maps are sized for [default: 4096]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=65536))]
    max_rules: Option<u32>,
    /// Seconds without a datagram after which a rule that had some is said to be stalled [default: 10]
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..))]
    stalled_after: Option<u32>,
    /// Serve Prometheus metrics, /healthz and /readyz by HTTP: a port (on loopback alone), HOST:PORT or the path of
    /// a Unix socket [default: off]
    #[arg(long, value_name = "ADDRESS", value_parser = str::parse::<Address>)]
    metrics: Option<Address>,
    /// eBPF object in place of the embedded one
    #[arg(long, value_name = "FILE")]
    bpf_object: Option<PathBuf>,
    /// How the log is written to stderr [default: text]
    #[arg(long, value_name = "FORMAT", value_enum)]
    log_format: Option<LogFormat>,
    /// What is logged; `mcr log-level set` changes it later [default: info]
    #[arg(long, value_name = "LEVEL", value_enum)]
    log_level: Option<LogLevel>,
}

impl Options {
    /// These, for a daemon whose maps have room for so many rules.
    #[must_use]
    pub fn with_max_rules(self, max_rules: u32) -> Self {
        Self { max_rules: Some(max_rules), ..self }
    }

    /// Those that bear on what rules may stand.
    pub fn of_rules(max_rules: u32, datapath: DatapathChoice) -> Self {
        Self { max_rules: Some(max_rules), datapath: Some(datapath), ..Self::default() }
    }

    /// These, and of those what these leave open.
    #[must_use]
    pub fn or(self, those: Self) -> Self {
        Self {
            datapath: self.datapath.or(those.datapath),
            generic_xdp: self.generic_xdp || those.generic_xdp,
            workers: self.workers.or(those.workers),
            cpus: self.cpus.or(those.cpus),
            busy_poll: self.busy_poll.or(those.busy_poll),
            frames: self.frames.or(those.frames),
            rx_ring: self.rx_ring.or(those.rx_ring),
            control: self.control.or(those.control),
            group: self.group.or(those.group),
            user: self.user.or(those.user),
            pin_root: self.pin_root.or(those.pin_root),
            source_port: self.source_port.or(those.source_port),
            max_rules: self.max_rules.or(those.max_rules),
            stalled_after: self.stalled_after.or(those.stalled_after),
            metrics: self.metrics.or(those.metrics),
            bpf_object: self.bpf_object.or(those.bpf_object),
            log_format: self.log_format.or(those.log_format),
            log_level: self.log_level.or(those.log_level),
        }
    }
}

impl From<Options> for Settings {
    fn from(options: Options) -> Self {
        Self {
            datapath: options.datapath.unwrap_or_default(),
            generic_xdp: options.generic_xdp,
            workers: options.workers,
            cpus: options.cpus.map(|CpuList(cpus)| cpus),
            busy_poll_us: options.busy_poll,
            frames: options.frames.unwrap_or(af_xdp::FRAMES),
            rx_ring: options.rx_ring,
            control: options.control.unwrap_or_else(|| DEFAULT_CONTROL.into()),
            group: options.group,
            user: options.user,
            pin_root: options.pin_root.unwrap_or_else(|| DEFAULT_PIN_ROOT.into()),
            source_port: options.source_port,
            max_rules: options.max_rules.unwrap_or(DEFAULT_MAX_RULES),
            stalled_after_s: options.stalled_after.unwrap_or(DEFAULT_STALLED_AFTER_S),
            metrics: options.metrics,
            bpf_object: options.bpf_object,
            log_format: options.log_format.unwrap_or_default(),
            log_level: options.log_level.unwrap_or_default(),
        }
    }
}

/// A list of CPUs, ascending, each once.
#[derive(Clone, Debug, PartialEq, Eq)]
struct CpuList(Vec<u32>);

/// A fanout group takes no more sockets.
fn parse_workers(text: &str) -> Result<NonZeroU32, String> {
    let workers = text.parse().ok().filter(|workers: &NonZeroU32| workers.get() <= 256);
    workers.ok_or_else(|| "write a number from 1 to 256".to_owned())
}

fn parse_frames(text: &str) -> Result<u32, String> {
    parse_power_of_two(text, 256)
}

fn parse_rx_ring(text: &str) -> Result<u32, String> {
    parse_power_of_two(text, 2)
}

/// Rings have as many places as a power of two.
fn parse_power_of_two(text: &str, least: u32) -> Result<u32, String> {
    let number = text.parse().ok().filter(|n: &u32| n.is_power_of_two() && (least..=65536).contains(n));
    number.ok_or_else(|| format!("write a power of two from {least} to 65536"))
}

fn parse_list(text: &str) -> Result<CpuList, String> {
    parse_cpus(text).map(CpuList)
}

/// The options by themselves, as `[daemon]` has them.
#[derive(Parser)]
#[command(name = "daemon", disable_help_flag = true)]
struct Table {
    #[command(flatten)]
    options: Options,
}

/// The options that arguments make, each of which [`argument`] has made.
pub fn parse(arguments: &[String]) -> Options {
    let words = std::iter::once("daemon").chain(arguments.iter().map(String::as_str));
    Table::try_parse_from(words).map(|table| table.options).unwrap_or_default()
}

/// What is wrong with a line of `[daemon]`, in words for a person.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wrong {
    /// There is no such key.
    Key(String),
    Value(String),
}

/// A key of `[daemon]` as the argument that it is, none if it says what holds anyway.
///
/// # Errors
///
/// Why it is no key, or its value none.
pub fn argument(key: &str, value: &DeValue<'_>) -> Result<Option<String>, Wrong> {
    let table = Table::command();
    let arg = table.get_arguments().find(|arg| key_of(arg).as_deref() == Some(key));
    let Some(arg) = arg else {
        let mut keys: Vec<_> = table.get_arguments().filter_map(key_of).collect();
        keys.sort();
        return Err(Wrong::Key(format!("'{key}' is no key of [daemon]: there are {}", keys.join(", "))));
    };
    let wanted = if matches!(arg.get_action(), ArgAction::SetTrue) {
        "true or false"
    } else if is_number(arg) {
        "a number"
    } else {
        "a text in quotes"
    };
    let text = match (value, wanted) {
        (DeValue::Boolean(set), "true or false") => {
            return Ok(set.then(|| flag(key)));
        }
        (DeValue::Integer(number), "a number") if number.radix() == 10 => number.as_str().to_owned(),
        (DeValue::String(text), "a text in quotes") => text.to_string(),
        (DeValue::Integer(_), "a number") => {
            return Err(Wrong::Value(format!("'{key}' takes a number in decimal digits alone")));
        }
        _ => return Err(Wrong::Value(format!("'{key}' takes {wanted}, and this is {}", kind(value)))),
    };
    let argument = format!("{}={text}", flag(key));
    match Table::try_parse_from(["daemon", &argument]) {
        Ok(_) => Ok(Some(argument)),
        Err(error) => Err(Wrong::Value(format!("'{key}' cannot be '{text}': {}", advice(&error)))),
    }
}

/// What a value is, for people.
pub fn kind(value: &DeValue<'_>) -> String {
    let article = if matches!(value, DeValue::Integer(_) | DeValue::Array(_)) { "an" } else { "a" };
    format!("{article} {}", value.type_str())
}

fn key_of(arg: &Arg) -> Option<String> {
    arg.get_long().map(|long| long.replace('-', "_"))
}

fn flag(key: &str) -> String {
    format!("--{}", key.replace('_', "-"))
}

fn is_number(arg: &Arg) -> bool {
    let of = arg.get_value_parser().type_id();
    [TypeId::of::<u16>(), TypeId::of::<u32>(), TypeId::of::<NonZeroU32>()].iter().any(|number| of == *number)
}

/// What clap says is wrong with a value, without what it says of arguments.
fn advice(error: &clap::Error) -> String {
    if error.kind() == ErrorKind::InvalidValue {
        let valid = error.context().find(|(kind, _)| *kind == clap::error::ContextKind::ValidValue);
        let valid = valid.map(|(_, values)| values.to_string()).filter(|values| !values.is_empty());
        return valid.map_or_else(|| "it is empty".to_owned(), |values| format!("there are {values}"));
    }
    let cause = std::error::Error::source(error).map(ToString::to_string);
    cause.unwrap_or_else(|| error.kind().to_string())
}

#[cfg(test)]
#[path = "options_tests.rs"]
mod tests;
