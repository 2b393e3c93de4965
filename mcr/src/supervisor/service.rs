//! What the service manager hears of the daemon's life.

use std::{io, time::Duration};

use nix::time::{ClockId, clock_gettime};
use tracing::{debug, warn};

use crate::{
    net::membership::Stored,
    sys::service_manager::{self, ServiceManager},
};

/// The daemon as a service, if it is one.
#[derive(Debug, Default)]
pub struct Service {
    manager: Option<ServiceManager>,
    /// The time within which it must show that it lives.
    pub watchdog: Option<Duration>,
    /// The status that was said last.
    status: String,
}

impl Service {
    /// What the environment says, and what the service manager has passed. To be called once, before anything is opened.
    pub fn of_environment() -> (io::Result<Self>, Stored) {
        let passed = service_manager::take_descriptors();
        let service = ServiceManager::of_environment().map(|manager| {
            let watchdog = manager.as_ref().and_then(|_| service_manager::watchdog());
            Self { manager, watchdog, status: String::new() }
        });
        let size = service_manager::store_size();
        let manager = service.as_ref().ok().and_then(|service| service.manager.clone());
        (service, Stored { store: manager.filter(|_| size > 0).map(|manager| (manager, size)), passed })
    }

    /// Whether anybody listens.
    pub fn is_managed(&self) -> bool {
        self.manager.is_some()
    }

    pub fn ready(&mut self, status: String) {
        self.tell(&format!("READY=1\nSTATUS={status}"));
        self.status = status;
    }

    pub fn reloading(&self) {
        match clock_gettime(ClockId::CLOCK_MONOTONIC) {
            Ok(now) => {
                let now = Duration::from(now).as_micros();
                self.tell(&format!("RELOADING=1\nMONOTONIC_USEC={now}\nSTATUS=reloading"));
            }
            Err(errno) => debug!(%errno, "there is no monotonic clock"),
        }
    }

    pub fn stopping(&self) {
        self.tell("STOPPING=1\nSTATUS=ending");
    }

    /// Says how things are, if that has changed.
    pub fn says(&mut self, status: String) {
        if self.status != status && self.mention(&format!("STATUS={status}")) {
            self.status = status;
        }
    }

    pub fn lives(&self) {
        self.mention("WATCHDOG=1");
    }

    fn tell(&self, words: &str) {
        let Some(manager) = &self.manager else { return };
        if let Err(error) = manager.tell(words, &[]) {
            warn!("the service manager cannot be told {}: {error}", words.replace('\n', " "));
        }
    }

    fn mention(&self, words: &str) -> bool {
        let told = self.manager.as_ref().map(|manager| manager.mention(words));
        if let Some(Err(error)) = &told {
            debug!(%error, words, "the service manager does not listen");
        }
        matches!(told, Some(Ok(())))
    }
}
