//! `mcr run`: the daemon's arguments to its settings.

use std::{num::NonZeroU32, path::PathBuf};

use mcr_common::abi::DEFAULT_MAX_RULES;

use crate::{
    rule::DatapathChoice,
    supervisor::{
        self,
        settings::{
            DEFAULT_CONTROL, DEFAULT_PIN_ROOT, DEFAULT_STALLED_AFTER_S, LogFormat, LogLevel, Settings,
        },
    },
    sys::cpu_list::parse_cpus,
};

/// Run the relay daemon in the foreground
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Datapath of rules that name none: auto, redirect, af-xdp or af-packet
    #[arg(long, value_name = "DATAPATH", default_value = "auto", value_parser = str::parse::<DatapathChoice>)]
    datapath: DatapathChoice,
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
    /// The control socket to listen on
    #[arg(long, value_name = "PATH", env = "MCR_CONTROL", default_value = DEFAULT_CONTROL)]
    control: PathBuf,
    /// Group whose members may use the control socket [default: the daemon's own]
    #[arg(long, value_name = "GROUP")]
    group: Option<String>,
    /// Become this user once started as root, keeping only the capabilities that are used
    #[arg(long, value_name = "USER")]
    user: Option<String>,
    /// Directory on bpffs under which program, maps and link are pinned
    #[arg(long, value_name = "DIR", default_value = DEFAULT_PIN_ROOT)]
    pin_root: PathBuf,
    /// UDP source port of what is sent [default: one that is free, the same for the daemon's life]
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    source_port: Option<u16>,
    /// Rules that the maps are sized for
    #[arg(long, value_name = "N", default_value_t = DEFAULT_MAX_RULES, value_parser = clap::value_parser!(u32).range(1..=65536))]
    max_rules: u32,
    /// eBPF object in place of the embedded one
    #[arg(long, value_name = "FILE")]
    bpf_object: Option<PathBuf>,
    /// How the log is written to stderr
    #[arg(long, value_name = "FORMAT", value_enum, default_value_t)]
    log_format: LogFormat,
    /// What is logged; `mcr log-level set` changes it later
    #[arg(long, value_name = "LEVEL", value_enum, default_value_t)]
    log_level: LogLevel,
}

impl Args {
    pub fn run(self) -> anyhow::Result<()> {
        supervisor::run(self.into())
    }
}

impl From<Args> for Settings {
    fn from(args: Args) -> Self {
        Self {
            datapath: args.datapath,
            generic_xdp: args.generic_xdp,
            workers: args.workers,
            cpus: args.cpus.map(|CpuList(cpus)| cpus),
            busy_poll_us: args.busy_poll,
            control: args.control,
            group: args.group,
            user: args.user,
            pin_root: args.pin_root,
            source_port: args.source_port,
            max_rules: args.max_rules,
            stalled_after_s: DEFAULT_STALLED_AFTER_S,
            bpf_object: args.bpf_object,
            log_format: args.log_format,
            log_level: args.log_level,
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

fn parse_list(text: &str) -> Result<CpuList, String> {
    parse_cpus(text).map(CpuList)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rule::Datapath;
    use clap::Parser;

    #[derive(Parser)]
    struct Run {
        #[command(flatten)]
        args: Args,
    }

    fn settings(line: &str) -> Result<Settings, clap::Error> {
        Run::try_parse_from(std::iter::once("run").chain(line.split_whitespace())).map(|run| run.args.into())
    }

    #[test]
    fn arguments_become_settings() {
        let given = settings(
            "--datapath af-xdp --generic-xdp --busy-poll 50 --workers 2 --cpus 6,0-3 --control /tmp/s --group ops --user mcr --pin-root /tmp/bpf --source-port 7000 \
             --max-rules 10 --bpf-object a.o --log-format json --log-level debug",
        );
        let expected = Settings {
            datapath: DatapathChoice(Some(Datapath::AfXdp)),
            generic_xdp: true,
            workers: NonZeroU32::new(2),
            cpus: Some(vec![0, 1, 2, 3, 6]),
            busy_poll_us: Some(50),
            control: "/tmp/s".into(),
            group: Some("ops".to_owned()),
            user: Some("mcr".to_owned()),
            pin_root: "/tmp/bpf".into(),
            source_port: Some(7000),
            max_rules: 10,
            stalled_after_s: DEFAULT_STALLED_AFTER_S,
            bpf_object: Some("a.o".into()),
            log_format: LogFormat::Json,
            log_level: LogLevel::Debug,
        };
        assert_eq!(given.unwrap(), expected);
    }

    #[test]
    fn nothing_given_is_the_defaults() {
        let given = settings("--control /tmp/s").unwrap();
        assert_eq!((given.datapath, given.workers, given.cpus), (DatapathChoice(None), None, None));
        assert_eq!((given.max_rules, given.pin_root), (4096, DEFAULT_PIN_ROOT.into()));
        assert_eq!((given.log_format, given.log_level), (LogFormat::Text, LogLevel::Info));
    }

    #[test]
    fn bad_arguments_are_refused() {
        for line in [
            "--datapath fast",
            "--workers 0",
            "--workers 257",
            "--busy-poll 1000001",
            "--cpus 3-1",
            "--cpus 0,,1",
            "--cpus 1024",
            "--cpus 0-4294967295",
            "--source-port 0",
            "--source-port 65536",
            "--max-rules 0",
            "--log-level loud",
            "--log-format xml",
        ] {
            let error = settings(line).expect_err(line);
            assert_eq!(error.exit_code(), 2, "{line}");
        }
    }
}
