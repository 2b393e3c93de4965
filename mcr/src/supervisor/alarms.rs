//! What the daemon makes of a ledger that does not balance: alarms, in words.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::SystemTime,
};

use tracing::{error, info};

use crate::{
    api::wire::{Alarm, count, timestamp},
    rule::{Datapath, InterfaceName},
    ruleset::RuleSet,
    supervisor::{
        balance::{Judgement, Subject, Sums},
        books::InFlight,
        event::{FrameSource, WorkerId},
        run::{Daemon, PacketIngress},
        state::State,
    },
    worker::relay::BATCH,
};

impl Daemon {
    /// Looks at every equality of the ledger; once a second.
    pub fn check_ledger(&mut self) {
        let accounted = self.books.accounted(&self.state);
        self.read_packet_statistics();
        let (state, sockets) = (&self.state, &self.packet_sockets);
        let in_flight = |name: &InterfaceName, datapath| in_flight(state, sockets, name, datapath);
        let looks = self.books.equations(accounted, state, &self.programs, in_flight);
        for (subject, sums) in &looks {
            match self.balance.look(subject, *sums) {
                Judgement::Quiet => {}
                Judgement::Raised => {
                    let alarm = alarm(state.rules(), subject, *sums);
                    error!("{}", alarm.what);
                    self.alarms.insert(subject.clone(), alarm);
                }
                Judgement::Restated => {
                    if let Some(former) = self.alarms.get_mut(subject) {
                        let Alarm { what, gap, .. } = alarm(state.rules(), subject, *sums);
                        (former.what, former.gap) = (what, gap);
                    }
                }
                Judgement::Gone => settle(&mut self.alarms, subject, "it balances again"),
            }
        }
        if self.balance.len() > looks.len() {
            self.forget_former();
        }
    }

    /// Forgets rules and outputs that are gone.
    fn forget_former(&mut self) {
        let rules = self.state.rules();
        let slots: BTreeSet<_> = rules.iter().map(|entry| entry.slot).collect();
        let outputs: BTreeSet<_> = rules.iter().flat_map(|entry| &entry.output_slots).copied().collect();
        let is_there = |subject: &Subject| match subject {
            Subject::Rule(slot) => slots.contains(slot),
            Subject::Output(slot) => outputs.contains(slot),
            _ => true,
        };
        self.balance.retain(is_there);
        let former: Vec<_> = self.alarms.keys().filter(|&subject| !is_there(subject)).cloned().collect();
        for subject in former {
            settle(&mut self.alarms, &subject, "what an alarm was about is gone");
        }
    }
}

fn settle(alarms: &mut BTreeMap<Subject, Alarm>, subject: &Subject, why: &str) {
    if let Some(alarm) = alarms.remove(subject) {
        info!("{why}: it was {}", alarm.what);
    }
}

/// What the sockets and the workers of an interface can hold: the chunks of the UMEMs or the slots of the
/// packet rings; the batch in a worker's hands, and as many datagrams of super-packets beyond it.
fn in_flight(
    state: &State,
    sockets: &BTreeMap<WorkerId, PacketIngress>,
    name: &InterfaceName,
    datapath: Datapath,
) -> InFlight {
    let mut all = InFlight::default();
    for (id, running) in state.workers().iter().filter(|(id, _)| id.is_of(name, datapath)) {
        all.batches += 2 * BATCH as u64;
        all.sockets += match running.spec.as_ref().map(|spec| &spec.source) {
            Some(FrameSource::AfXdp { queues, .. }) => queues.len() as u64 * u64::from(state.frames()),
            Some(FrameSource::AfPacket) => sockets.get(id).map_or(0, PacketIngress::slots),
            None => 0,
        };
    }
    all
}

fn alarm(rules: &RuleSet, subject: &Subject, sums: Sums) -> Alarm {
    let (came, [went_on, lost]) = match subject {
        Subject::Frames(..) => ("steered", ["received", "dropped"]),
        Subject::Datagrams(..) => ("received", ["of rules", "discarded"]),
        Subject::Rules(_) => ("matched for workers", ["received, looped or cut", "lost by the interface"]),
        Subject::Rule(_) => ("matched", ["received", "dropped"]),
        Subject::Output(_) => ("received", ["sent", "dropped"]),
    };
    let (whose, next) = name(rules, subject);
    let (gap, [first, second]) = (sums.gap(), sums.accounted.map(count));
    let came = format!("ledger: {whose}: {came} {} is {first} {went_on}", count(sums.came));
    let missing = count(gap.unsigned_abs());
    let what = if gap < 0 {
        format!("{came} and {second} {lost}, which is {missing} too many")
    } else {
        format!("{came}, {second} {lost} and {missing} unaccounted for")
    };
    Alarm { what, gap, since: timestamp(SystemTime::now()), next }
}

/// What an equality is of, and what shows its counters.
fn name(rules: &RuleSet, subject: &Subject) -> (String, String) {
    let all = "mcr stats".to_owned();
    let rule = rules.iter().find(|entry| match subject {
        Subject::Rule(slot) => entry.slot == *slot,
        Subject::Output(slot) => entry.output_slots.contains(slot),
        _ => false,
    });
    let whose = match (subject, rule) {
        (Subject::Frames(name, datapath), _) => format!("{name} by {datapath}"),
        (Subject::Datagrams(name, datapath), _) => format!("workers of {name} by {datapath}"),
        (Subject::Rules(name), _) => format!("all rules of {name}"),
        (Subject::Rule(_), Some(entry)) => format!("rule {}", entry.rule.name),
        (Subject::Output(slot), Some(entry)) => {
            let output = entry.outputs().find(|(_, its)| its == slot);
            let output = output.map(|(output, _)| output.to_string()).unwrap_or_default();
            format!("output {output} of rule {}", entry.rule.name)
        }
        (Subject::Rule(_) | Subject::Output(_), None) => "a former rule".to_owned(),
    };
    (whose, rule.map_or(all, |entry| format!("mcr stats {}", entry.rule.name)))
}
