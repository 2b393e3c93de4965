//! A daemon under test, and its command line.

use std::{
    fs::File,
    os::{fd::AsRawFd, unix::process::CommandExt},
    path::{Path, PathBuf},
    process::{Command, ExitStatus},
    sync::LazyLock,
    thread,
    time::Duration,
};

use mcr::api::{
    client::Client,
    wire::{
        Health, InterfaceStats, Outcome, RuleInfo, RuleList, RuleOutcome, RuleShow, RuleSpec, RuleStats,
        Stats, WorkerInfo, WorkerList,
    },
};
use nix::sys::signal::Signal;

use crate::{
    Answer, Ground, Namespace, Process, Site,
    wait::{PATIENCE, wait_for, wait_until},
};

/// How long one call of the command line may take.
pub const CALL: Duration = Duration::from_secs(20);

/// The binary under test: `mcr` beside the directory of the test's own executable.
pub fn binary() -> PathBuf {
    let exe = std::env::current_exe().expect("the test's own path");
    let binary = exe.ancestors().nth(2).expect("target/PROFILE/deps/TEST").join("mcr");
    assert!(binary.exists(), "{} is missing: `cargo build -p mcr` makes it", binary.display());
    binary
}

/// Killed on drop. If that happens in a panic, its log and its counters are printed.
#[derive(Debug)]
pub struct Relay<'a> {
    namespace: &'a Namespace,
    ground: Ground,
    pin_root: PathBuf,
    control: PathBuf,
    daemon: Process,
}

impl<'a> Relay<'a> {
    /// Runs `mcr run` in the site's relay host and waits until it answers.
    #[track_caller]
    pub fn start(site: &'a Site) -> Self {
        Self::start_with(site, &[])
    }

    /// As [`Self::start`], with further arguments of `mcr run`.
    #[track_caller]
    pub fn start_with(site: &'a Site, args: &[&str]) -> Self {
        Self::spawn(site, Self::command(site).args(args))
    }

    /// As [`Self::start`], by a command made from [`Self::command`].
    #[track_caller]
    pub fn spawn(site: &'a Site, command: &mut Command) -> Self {
        Self::spawn_at(site, command, site.scratch.dir().join("mcr.sock"))
    }

    /// As [`Self::spawn`], where the control socket is elsewhere.
    #[track_caller]
    pub fn spawn_at(site: &'a Site, command: &mut Command, control: PathBuf) -> Self {
        let daemon = Process::spawn(command);
        let mut relay = Self {
            namespace: &site.relay,
            ground: site.ground,
            pin_root: site.scratch.pin_root().to_owned(),
            control,
            daemon,
        };
        relay.wait_until_ready();
        relay
    }

    /// `mcr run` with the site's control socket and pin root, in its relay host, with what makes its ground.
    pub fn command(site: &Site) -> Command {
        let mut command = Self::bare_command(site);
        site.ground.prepare(&mut command);
        command
    }

    /// As [`Self::command`], with all that root has.
    pub fn bare_command(site: &Site) -> Command {
        // By a descriptor an ordinary user gets there wherever it lies.
        static BINARY: LazyLock<File> = LazyLock::new(|| File::open(binary()).expect("the binary"));
        let binary = match site.ground {
            Ground::OrdinaryUser => format!("/proc/self/fd/{}", BINARY.as_raw_fd()).into(),
            _ => binary(),
        };
        let mut command = site.relay.command(binary);
        command
            .arg0("mcr")
            .args(["run", "--control"])
            .arg(site.scratch.dir().join("mcr.sock"))
            .arg("--pin-root")
            .arg(site.scratch.pin_root());
        command
    }

    /// Runs a daemon that is expected to refuse its start, and answers the line that says why.
    #[track_caller]
    pub fn refused(command: &mut Command) -> String {
        let answer = Process::spawn(command).answer(CALL);
        assert_eq!(answer.status, 1, "{answer}");
        let last = answer.stderr.lines().rfind(|line| !line.trim().is_empty());
        let last = last.unwrap_or_else(|| panic!("no word on stderr: {answer}"));
        assert!(last.starts_with("mcr: "), "the last line says no reason: {answer}");
        last.to_owned()
    }

    #[track_caller]
    pub fn wait_until_ready(&mut self) {
        wait_until("the daemon answers ping", PATIENCE, || {
            assert!(self.daemon.ended().is_none(), "the daemon ended:\n{}", self.log());
            self.cli(&["ping"]).status == 0
        });
    }

    /// Starts another daemon in the place of one that has ended.
    #[track_caller]
    pub fn start_again(&mut self, site: &Site) {
        self.start_again_with(site, &[]);
    }

    /// As [`Self::start_again`], with further arguments of `mcr run`.
    #[track_caller]
    pub fn start_again_with(&mut self, site: &Site, args: &[&str]) {
        self.start_again_by(Self::command(site).args(args));
    }

    /// As [`Self::start_again`], by a command made from [`Self::command`].
    #[track_caller]
    pub fn start_again_by(&mut self, command: &mut Command) {
        assert!(self.daemon.ended().is_some(), "the daemon still runs");
        self.daemon = Process::spawn(command);
        self.wait_until_ready();
    }

    pub fn pid(&self) -> u32 {
        self.daemon.pid()
    }

    /// Everything that the daemon has logged.
    pub fn log(&self) -> String {
        self.daemon.stdout() + &self.daemon.stderr()
    }

    #[track_caller]
    pub fn signal(&self, signal: Signal) {
        self.daemon.signal(signal);
    }

    /// Waits for the daemon's own end.
    #[track_caller]
    pub fn wait(&mut self, patience: Duration) -> ExitStatus {
        self.daemon.wait(patience)
    }

    pub fn control(&self) -> &Path {
        &self.control
    }

    pub fn pin_root(&self) -> &Path {
        &self.pin_root
    }

    /// Where the maps, the program and the link of an interface are pinned.
    #[track_caller]
    pub fn pins(&self, interface: &str) -> PathBuf {
        self.pin_root.join(netns_cookie(self.namespace).to_string()).join(interface)
    }

    /// A call of the command line, in the relay host.
    pub fn call(&self, args: &[&str]) -> Command {
        let mut command = self.namespace.command(binary());
        command.env("MCR_CONTROL", &self.control).args(args);
        command
    }

    #[track_caller]
    pub fn cli(&self, args: &[&str]) -> Answer {
        Process::spawn(&mut self.call(args)).answer(CALL)
    }

    /// `mcr events`, which listens when this returns.
    #[track_caller]
    pub fn events(&self) -> Process {
        let subscriptions = || self.log().matches("asked=events.subscribe").count();
        let before = subscriptions();
        let process = Process::spawn(&mut self.call(&["events"]));
        wait_until("mcr events has subscribed", PATIENCE, || subscriptions() > before);
        process
    }

    /// The daemon without its command line: for what is asked some hundred times.
    #[track_caller]
    pub fn client(&self) -> Client {
        Client::connect(&self.control).expect("the daemon listens")
    }

    /// What a call prints with `--json`.
    #[track_caller]
    pub fn json<T: serde::de::DeserializeOwned>(&self, args: &[&str]) -> T {
        self.cli(&[args, &["--json"]].concat()).json()
    }

    /// Adds a rule, and waits until it is at work.
    #[track_caller]
    pub fn add(&self, name: &str, input: &str, outputs: &[&str]) -> RuleInfo {
        self.add_with(name, input, outputs, &[])
    }

    #[track_caller]
    pub fn add_with(&self, name: &str, input: &str, outputs: &[&str], args: &[&str]) -> RuleInfo {
        let mut call = vec!["rule", "add", name, "--in", input];
        for output in outputs {
            call.extend(["--out", output]);
        }
        call.extend(args);
        let outcome: RuleOutcome = self.json(&call);
        assert_eq!(outcome.outcome, Outcome::Added);
        assert_eq!(outcome.rule.name, name);
        let rule = self.wait_until_active(name);
        // The kernel alone sends to hosts when it knows them.
        let awaits_hosts =
            self.ground == Ground::Kernel && outputs.iter().any(|output| !output.starts_with("239."));
        if input.ends_with("@in0") && !args.contains(&"--datapath") && !awaits_hosts {
            let own_listeners = outputs.iter().any(|output| output.contains("loop=true"));
            let expected = match self.ground {
                Ground::Kernel if own_listeners => "af-xdp",
                ground => ground.datapath(),
            };
            assert_eq!(rule.datapath.as_deref(), Some(expected), "{rule:?}");
        }
        rule
    }

    #[track_caller]
    pub fn set(&self, name: &str, changes: &[&str]) -> RuleOutcome {
        let outcome: RuleOutcome = self.json(&[&["rule", "set", name], changes].concat());
        assert_eq!(outcome.outcome, Outcome::Changed);
        outcome
    }

    #[track_caller]
    pub fn remove(&self, name: &str) {
        let outcome: RuleOutcome = self.json(&["rule", "remove", name]);
        assert_eq!(outcome.outcome, Outcome::Removed);
    }

    /// Every rule.
    #[track_caller]
    pub fn show_all(&self) -> Vec<RuleInfo> {
        self.json::<RuleList>(&["rule", "list"]).rules
    }

    #[track_caller]
    pub fn show(&self, name: &str) -> RuleInfo {
        self.json::<RuleShow>(&["rule", "show", name]).rule
    }

    /// Waits until a rule and all its outputs are active, and every worker runs.
    #[track_caller]
    pub fn wait_until_active(&self, name: &str) -> RuleInfo {
        let what = format!("the rule {name} and its workers are active");
        let rule = wait_for(&what, PATIENCE, || {
            let rule = self.show(name);
            let outputs = rule.outputs.iter().all(|output| output.health == Health::Active);
            (rule.health == Health::Active && outputs).then_some(rule)
        });
        wait_until(&what, PATIENCE, || self.workers().iter().all(|worker| worker.state == "running"));
        rule
    }

    /// Waits until a rule is served by a datapath.
    #[track_caller]
    pub fn wait_until_by(&self, name: &str, datapath: &str) -> RuleInfo {
        wait_for(&format!("{name} is served by {datapath}"), PATIENCE, || {
            Some(self.show(name)).filter(|rule| rule.datapath.as_deref() == Some(datapath))
        })
    }

    #[track_caller]
    pub fn workers(&self) -> Vec<WorkerInfo> {
        self.json::<WorkerList>(&["workers"]).workers
    }

    #[track_caller]
    pub fn stats(&self) -> Stats {
        self.json(&["stats"])
    }

    #[track_caller]
    pub fn rule(&self, name: &str) -> RuleStats {
        let stats = self.stats();
        stats.rules.into_iter().find(|rule| rule.name == name).unwrap_or_else(|| panic!("no rule {name}"))
    }

    #[track_caller]
    pub fn interface(&self, name: &str) -> InterfaceStats {
        let stats = self.stats();
        let interface = stats.interfaces.into_iter().find(|interface| interface.name == name);
        interface.unwrap_or_else(|| panic!("no interface {name}"))
    }

    /// Waits until a rule has matched `n` datagrams and its ledger balances, which it does once nothing
    /// is in flight. Between the XDP program and a worker only the interface knows of a loss: without one
    /// there, the rule's own counters must add up.
    #[track_caller]
    pub fn balanced(&self, name: &str, n: u64) -> RuleStats {
        let mut last = None;
        let start = std::time::Instant::now();
        while start.elapsed() < Duration::from_secs(5) {
            let stats = self.stats();
            let rule = stats.rules.iter().find(|rule| rule.name == name).cloned();
            let interface = rule.as_ref().and_then(|rule| rule.input.split(['@', ',']).nth(1));
            let interface = interface.and_then(|name| stats.interfaces.iter().find(|i| i.name == name));
            if let (Some(rule), Some(interface)) = (&rule, interface)
                && rule.matched >= n
                && unaccounted(rule) <= lost(interface)
                && outputs_balance(rule)
                && interface_balances(interface)
            {
                assert_eq!(rule.matched, n, "datagrams matched by {name}: {stats:#?}");
                return rule.clone();
            }
            last = Some(stats);
        }
        panic!("the ledger of {name} does not balance at {n}: {last:#?}");
    }
}

/// What `mcr rule add` asks of the daemon.
pub fn spec(name: &str, input: &str, outputs: &[&str]) -> RuleSpec {
    RuleSpec {
        name: Some(name.to_owned()),
        input: input.to_owned(),
        outputs: outputs.iter().map(|&output| output.to_owned()).collect(),
        ..RuleSpec::default()
    }
}

/// What a rule matched and neither received nor dropped itself.
#[track_caller]
pub fn unaccounted(rule: &RuleStats) -> u64 {
    let accounted = rule.received + rule.dropped.values().sum::<u64>();
    rule.matched.checked_sub(accounted).unwrap_or(u64::MAX)
}

/// For each output, `received = sent + dropped`.
pub fn outputs_balance(rule: &RuleStats) -> bool {
    rule.outputs.iter().all(|output| output.received == output.sent + output.dropped.values().sum::<u64>())
}

/// What an interface lost or threw away between the XDP program and its rules.
pub fn lost(interface: &InterfaceStats) -> u64 {
    interface.dropped.values().chain(interface.discarded.values()).sum()
}

/// `steered = received + dropped`.
pub fn interface_balances(interface: &InterfaceStats) -> bool {
    let steered = interface.verdicts.get("steered").copied().unwrap_or(0);
    steered == interface.received + interface.dropped.values().sum::<u64>()
}

/// What tells the namespaces of one bpffs apart.
#[track_caller]
pub fn netns_cookie(namespace: &Namespace) -> u64 {
    namespace.run(|| {
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").expect("UDP socket");
        mcr::sys::multicast::netns_cookie(&socket).expect("SO_NETNS_COOKIE")
    })
}

impl Drop for Relay<'_> {
    fn drop(&mut self) {
        if !thread::panicking() {
            return;
        }
        // Nothing here may panic: a second panic would hide the first.
        eprintln!("--- the daemon's log\n{}", self.log());
        for report in ["stats", "workers"] {
            // Bounded, since the daemon may be what hangs.
            let output = Command::new("timeout")
                .arg("3")
                .arg(binary())
                .args([report, "--json", "--control"])
                .arg(&self.control)
                .output();
            if let Ok(output) = output {
                eprintln!("--- mcr {report} --json\n{}", String::from_utf8_lossy(&output.stdout));
            }
        }
    }
}
