//! What follows from the facts: findings, each with what mends it. Pure; one file an area.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::facts::{Flow, Observations, Seen};
use crate::rule::{Input, InterfaceName};

mod arrival;
mod bystanders;
mod daemon;
mod datapath;
mod egress;
mod host;
mod interface;
mod losses;
#[cfg(test)]
mod tests;

/// What is wrong, or worth knowing. The names are stable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, ValueEnum, Serialize, Deserialize)]
#[value(rename_all = "snake_case")]
#[serde(rename_all = "snake_case")]
pub enum Code {
    NoDaemon,
    PermissionDenied,
    DaemonSilent,
    OtherNamespace,
    DaemonProblem,
    LedgerAlarm,
    WorkerDown,
    RulePending,
    RuleFailed,
    MissingCapability,
    LockedMemory,
    PrivateMounts,
    IoUringDisabled,
    BpfJitOff,
    NoBpffs,
    OptmemSmall,
    IgmpLimit,
    InterfaceMissing,
    InterfaceDown,
    NoCarrier,
    NotEthernet,
    NoAddress,
    NotJoined,
    NoQuerier,
    QuerierUnseen,
    IgmpVersion,
    NothingArrives,
    OtherSource,
    OtherPort,
    OtherInterface,
    Fragments,
    VlanTagged,
    IpOptions,
    BadChecksum,
    Damaged,
    TtlExpired,
    LookRefused,
    DriverWithoutXdp,
    MtuTooLarge,
    XdpSlotTaken,
    TooFewQueues,
    XdpRefused,
    GenericXdp,
    NotRedirected,
    EgressHook,
    OneQueue,
    WorkersShareCpu,
    Lro,
    VlanTagsHidden,
    RingDrops,
    DeviceRxLost,
    DeviceTxLost,
    RuleDrops,
    TooBig,
    EgressFull,
    OutputDrops,
    Filtered,
    NoRoute,
    HostSilent,
    HostRefuses,
    OutputPending,
    ListenerBlind,
    Ptp,
    LinkLocalControl,
}

impl Code {
    pub fn name(self) -> String {
        self.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// Worth knowing; nothing is lost by it now.
    Note,
    /// It keeps something from flowing as it should.
    Problem,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    pub code: Code,
    pub severity: Severity,
    /// `daemon`, `host`, `interface NAME` or `rule NAME`.
    pub subject: String,
    /// One line.
    pub what: String,
    /// The command that mends it, or what is to be done where no command of this host can. What only the operator knows
    /// stands in capitals.
    pub next: String,
    /// `next` can be typed as it is.
    #[serde(default)]
    pub run: bool,
}

impl Finding {
    pub fn problem(
        code: Code,
        subject: impl Into<String>,
        what: impl Into<String>,
        next: impl Into<String>,
    ) -> Self {
        Self {
            code,
            severity: Severity::Problem,
            subject: subject.into(),
            what: what.into(),
            next: next.into(),
            run: false,
        }
    }

    pub fn note(
        code: Code,
        subject: impl Into<String>,
        what: impl Into<String>,
        next: impl Into<String>,
    ) -> Self {
        Self { severity: Severity::Note, ..Self::problem(code, subject, what, next) }
    }

    /// A problem where `now` holds, else a note.
    #[must_use]
    fn only_if(mut self, now: bool) -> Self {
        self.severity = if now { Severity::Problem } else { Severity::Note };
        self
    }
}

/// What was looked at and found well.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    pub subject: String,
    pub what: String,
}

/// Findings, worst first within their order, and what was found well.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    pub findings: Vec<Finding>,
    pub checked: Vec<Check>,
}

impl Outcome {
    fn push(&mut self, finding: Finding) {
        self.findings.push(finding);
    }

    fn well(&mut self, subject: impl Into<String>, what: impl Into<String>) {
        self.checked.push(Check { subject: subject.into(), what: what.into() });
    }
}

/// Decides.
pub fn decide(seen: &Observations) -> Outcome {
    let mut outcome = Outcome::default();
    daemon::decide(seen, &mut outcome);
    host::decide(seen, &mut outcome);
    interface::decide(seen, &mut outcome);
    datapath::decide(seen, &mut outcome);
    losses::decide(seen, &mut outcome);
    arrival::decide(seen, &mut outcome);
    egress::decide(seen, &mut outcome);
    bystanders::decide(seen, &mut outcome);
    outcome
}

fn of_interface(name: &InterfaceName) -> String {
    format!("interface {name}")
}

fn of_rule(flow: &Flow<'_>) -> String {
    format!("rule {}", flow.name())
}

/// Gives a rule another input: the commands, or the line of the file that has it.
fn moved(rule: &Seen, input: &Input) -> String {
    let info = &rule.info;
    if let Some(place) = &info.place {
        let file = place.rsplit_once(':').map_or(place.as_str(), |(file, _)| file);
        return format!("write in = \"{input}\" at {place}, then mcr config load {file}");
    }
    let outputs: Vec<_> = info.outputs.iter().map(|output| format!(" --out {}", output.to)).collect();
    let datapath = match info.datapath_asked.as_str() {
        "auto" | "" => String::new(),
        named => format!(" --datapath {named}"),
    };
    format!(
        "mcr rule remove {name} && mcr rule add {name} --in {input}{}{datapath}",
        outputs.concat(),
        name = info.name
    )
}
