use super::*;
use crate::rule::Datapath;

fn options(line: &str) -> Result<Options, clap::Error> {
    Table::try_parse_from(std::iter::once("run").chain(line.split_whitespace())).map(|table| table.options)
}

fn settings(line: &str) -> Result<Settings, clap::Error> {
    options(line).map(Settings::from)
}

#[test]
fn arguments_become_settings() {
    let given = settings(
        "--datapath af-xdp --generic-xdp --busy-poll 50 --frames 1024 --rx-ring 512 --workers 2 --cpus 6,0-3 --control /tmp/s --group ops --user mcr --pin-root /tmp/bpf --source-port 7000 \
         --max-rules 10 --stalled-after 5 --metrics :9464 --bpf-object a.o --log-format json --log-level debug",
    );
    let expected = Settings {
        datapath: DatapathChoice(Some(Datapath::AfXdp)),
        generic_xdp: true,
        workers: NonZeroU32::new(2),
        cpus: Some(vec![0, 1, 2, 3, 6]),
        busy_poll_us: Some(50),
        frames: 1024,
        rx_ring: Some(512),
        control: "/tmp/s".into(),
        group: Some("ops".to_owned()),
        user: Some("mcr".to_owned()),
        pin_root: "/tmp/bpf".into(),
        source_port: Some(7000),
        max_rules: 10,
        stalled_after_s: 5,
        metrics: Some(Address::Tcp { host: "127.0.0.1".to_owned(), port: 9464 }),
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
    assert_eq!((given.frames, given.rx_ring), (8192, None));
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
        "--frames 128",
        "--frames 1000",
        "--frames 131072",
        "--rx-ring 3",
        "--cpus 3-1",
        "--cpus 0,,1",
        "--cpus 1024",
        "--cpus 0-4294967295",
        "--source-port 0",
        "--source-port 65536",
        "--max-rules 0",
        "--stalled-after 0",
        "--metrics 0",
        "--metrics unix:here",
        "--log-level loud",
        "--log-format xml",
    ] {
        let error = settings(line).expect_err(line);
        assert_eq!(error.exit_code(), 2, "{line}");
    }
}

#[test]
fn the_command_line_goes_before_the_file() {
    let said = options("--workers 2 --log-level debug --control /tmp/a").unwrap();
    let file = options("--workers 3 --max-rules 7 --generic-xdp --control /tmp/b").unwrap();
    let settings = Settings::from(said.or(file));
    assert_eq!((settings.workers, settings.max_rules), (NonZeroU32::new(2), 7));
    assert_eq!((settings.log_level, settings.generic_xdp), (LogLevel::Debug, true));
    assert_eq!(settings.control, PathBuf::from("/tmp/a"));
}

#[test]
fn every_option_is_a_key_and_every_setting_is_written_under_it() {
    let mut keys: Vec<_> = Table::command().get_arguments().filter_map(key_of).collect();
    let mut written: Vec<_> = settings("--control /tmp/s").unwrap().named().map(|(key, _)| key).into();
    keys.sort();
    written.sort_unstable();
    assert_eq!(keys, written);
}
