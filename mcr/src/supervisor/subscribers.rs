//! Who listens to what happens. Nobody is waited for, and while nobody listens nothing is looked at.

use std::time::SystemTime;

use tracing::{error, info};

use crate::{
    api::{
        event::{Event, Occurrence},
        rpc,
        subscription::{Lines, Subscriber},
        wire::{Error, Health, SCHEMA, Subscribed, code, timestamp},
    },
    supervisor::{
        commands::{Answer, json},
        notices::{Look, SeenRule, SeenWorker},
        run::Daemon,
    },
};

/// Subscribers that are served at once.
const MOST: usize = 16;

#[derive(Default)]
pub struct Subscribers {
    all: Vec<Subscriber>,
    /// What they know.
    known: Look,
    /// Events told so far.
    seq: u64,
}

impl Daemon {
    pub fn subscribe(&mut self, subscriber: Option<Subscriber>) -> Answer {
        let Some(subscriber) = subscriber else {
            let message = "events.subscribe has an id: it is answered".to_owned();
            return Err(Error { code: code::INVALID_REQUEST, message });
        };
        // Those who listen already are told what the new one cannot know of.
        self.tell_subscribers();
        if self.subscribers.all.len() >= MOST {
            let message = format!("{MOST} programs are subscribed already: end one, or try again");
            return Err(Error { code: code::BUSY, message });
        }
        if self.subscribers.all.is_empty() {
            self.subscribers.known = self.look();
        }
        self.subscribers.all.push(subscriber);
        json(&Subscribed { schema: SCHEMA, seq: self.subscribers.seq })
    }

    /// Tells whoever listens what has happened since the last time.
    pub fn tell_subscribers(&mut self) {
        let news = std::mem::take(&mut self.configuration.news);
        self.subscribers.all.retain(|subscriber| !subscriber.is_gone());
        if self.subscribers.all.is_empty() {
            return;
        }
        let mut now = self.look();
        now.follow(&self.subscribers.known);
        let why = |rule: &SeenRule| {
            rule.datapath.map(|served| self.rule_why(&rule.entry.rule, served)).unwrap_or_default()
        };
        let changes = now.since(&self.subscribers.known, why);
        self.subscribers.known = now;
        self.subscribers.tell(news.into_iter().chain(changes));
    }

    /// Tells whoever listens that the daemon ends, and nothing more.
    pub fn dismiss_subscribers(&mut self) {
        self.tell_subscribers();
        let stopping = Occurrence::DaemonStopping { pid: std::process::id(), keep: self.keeps };
        self.subscribers.tell([stopping].into_iter());
        self.subscribers.all.clear();
    }

    fn look(&self) -> Look {
        let rule = |entry| {
            let (health, reason) = self.rule_health(entry);
            let idle = self.is_idle(entry);
            let stalled = idle && health == Health::Active;
            let seen = SeenRule {
                entry: entry.clone(),
                health,
                reason,
                datapath: self.served_by(&entry.rule),
                stalled,
                idle,
            };
            (entry.rule.name.clone(), seen)
        };
        let worker = |id| {
            let running = self.state.workers().get(&id).is_some_and(|running| !running.failed);
            let pid = self.workers.get(&id).filter(|_| running).map(|worker| worker.pid);
            let mishaps = self.state.mishaps(&id);
            let seen = SeenWorker { pid, restarts: mishaps.restarts, last_exit: mishaps.last_exit };
            (id, seen)
        };
        let rules = self.state.rules();
        let links = self.state.links();
        Look {
            rules: rules.iter().map(rule).collect(),
            workers: self.state.worker_ids().into_iter().map(worker).collect(),
            interfaces: rules
                .interfaces()
                .into_iter()
                .map(|name| (name.clone(), links.get(name).cloned()))
                .collect(),
            alarms: self.alarms.clone(),
        }
    }
}

impl Subscribers {
    fn tell(&mut self, occurrences: impl Iterator<Item = Occurrence>) {
        let first = self.seq + 1;
        let mut lines = Vec::new();
        for occurrence in occurrences {
            self.seq += 1;
            lines.extend(line(self.seq, occurrence));
        }
        if lines.is_empty() {
            return;
        }
        let (lines, farewell) = (Lines::from(lines), Lines::from(line(first, Occurrence::Overrun)));
        self.all.retain(|subscriber| {
            let keeps_up = subscriber.tell(&lines, &farewell);
            if !keeps_up {
                info!("a subscriber did not read fast enough and is told no more");
            }
            keeps_up
        });
    }
}

fn line(seq: u64, occurrence: Occurrence) -> Vec<u8> {
    let event = Event { schema: SCHEMA, time: timestamp(SystemTime::now()), seq, occurrence };
    rpc::notification_line("event", &event).unwrap_or_else(|error| {
        error!(%error, seq, "an event cannot be written");
        Vec::new()
    })
}
