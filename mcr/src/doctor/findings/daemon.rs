//! The daemon: whether it answers, where it is, what it says of itself and what it lacks.

use super::{Code, Finding, Outcome, of_rule};
use crate::{
    api::wire::{Health, count},
    doctor::facts::{Flow, Observations, Told},
    rule::InterfaceName,
};

const DAEMON: &str = "daemon";

pub fn decide(seen: &Observations, outcome: &mut Outcome) {
    let told = match &seen.daemon {
        Ok(told) => told,
        Err(silence) => return outcome.push(silence.clone()),
    };
    let pid = told.process.pid;
    if told.process.elsewhere {
        return outcome.push(Finding::problem(
            Code::OtherNamespace,
            DAEMON,
            "it serves another network namespace: its interfaces cannot be seen from here",
            format!("sudo nsenter --net=/proc/{pid}/ns/net mcr doctor"),
        ));
    }
    let status = &told.status;
    outcome.well(
        DAEMON,
        format!(
            "mcr {} answers (pid {pid}): {} of {} rules active, {} of {} workers running",
            status.version,
            count(status.rules.active.into()),
            count(status.rules.total.into()),
            status.workers_running,
            status.workers_total,
        ),
    );
    own_words(told, outcome);
    process(told, outcome);
    seen.flows().filter_map(|flow| rule(seen, &flow)).for_each(|finding| outcome.push(finding));
}

/// What the daemon itself says is wrong, but for what is found out about rules here.
fn own_words(told: &Told, outcome: &mut Outcome) {
    let status = &told.status;
    for alarm in &status.alarms {
        outcome.push(Finding::problem(Code::LedgerAlarm, DAEMON, &alarm.what, &alarm.next));
    }
    for worker in told.after.workers.iter().filter(|worker| worker.pid.is_none()) {
        let why = worker.last_exit.as_deref().unwrap_or("it has not started yet");
        let what = format!("worker {} is down: {why}", worker.id);
        outcome.push(Finding::problem(Code::WorkerDown, DAEMON, what, "mcr workers"));
    }
    let alarm = |what: &str| status.alarms.iter().any(|alarm| alarm.what == what);
    for problem in &status.problems {
        let of_rules = ["mcr rule show ", "mcr stats", "mcr workers"];
        if !alarm(&problem.what) && !of_rules.iter().any(|next| problem.next.starts_with(next)) {
            outcome.push(Finding::problem(Code::DaemonProblem, DAEMON, &problem.what, &problem.next));
        }
    }
}

/// What the process lacks.
fn process(told: &Told, outcome: &mut Outcome) {
    let process = &told.process;
    for capability in &process.missing {
        let costs = match capability.as_str() {
            "CAP_BPF" => "it loads no eBPF program, so rules are served by af-packet with a classic filter",
            "CAP_PERFMON" => "the kernel fences its programs against speculation, which doubles their cost",
            "CAP_IPC_LOCK" => "the limit of locked memory holds for the frames of af-xdp",
            _ => "it cannot make its sockets anew or attach programs",
        };
        let name = capability.trim_start_matches("CAP_").to_lowercase();
        outcome.push(Finding::note(
            Code::MissingCapability,
            DAEMON,
            format!("it has no {capability}: {costs}"),
            format!(
                "start it with {capability}: AmbientCapabilities= of its service, or setpriv --inh-caps +{name} \
                 --ambient-caps +{name} mcr run"
            ),
        ));
    }
    if let Some(bytes) =
        process.locked_bytes.filter(|_| process.missing.iter().any(|name| name == "CAP_IPC_LOCK"))
    {
        outcome.push(Finding::note(
            Code::LockedMemory,
            DAEMON,
            format!("it may lock {} MiB of memory, and a queue's frames take 16 MiB", bytes >> 20),
            "start it with LimitMEMLOCK=infinity in its service, or after ulimit -l unlimited",
        ));
    }
    if process.private_mounts {
        outcome.push(Finding::note(
            Code::PrivateMounts,
            DAEMON,
            "it runs in a mount namespace of its own (`ip netns exec` makes one): what it pins ends with that, and \
             bpftool elsewhere may not see it",
            format!("start it with nsenter --net=/run/netns/NAME mcr run in the place of ip netns exec (now: pid {})", process.pid),
        ));
    }
}

/// A rule that is not at work, unless its interfaces say why.
fn rule(seen: &Observations, flow: &Flow<'_>) -> Option<Finding> {
    let info = &flow.rule.info;
    let why = info.reason.as_deref().unwrap_or("the daemon gives no reason");
    let next = format!("mcr rule show {}", flow.name());
    match info.health {
        Health::Active => None,
        Health::Failed => {
            Some(Finding::problem(Code::RuleFailed, of_rule(flow), format!("it failed: {why}"), next))
        }
        Health::Pending => {
            let output = info.outputs.iter().any(|output| output.reason.as_deref() == Some(why));
            let explained = output || is_broken(seen, &flow.rule.input.interface);
            (!explained)
                .then(|| Finding::problem(Code::RulePending, of_rule(flow), format!("it waits: {why}"), next))
        }
    }
}

/// Whether an interface itself says why nothing comes in.
fn is_broken(seen: &Observations, name: &InterfaceName) -> bool {
    seen.devices.get(name).is_none_or(|device| !device.link.up)
}
