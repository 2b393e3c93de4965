//! The descriptor store of a service manager, which keeps membership sockets as a holder does. What they have joined the
//! kernel tells.

use std::{
    collections::BTreeSet,
    io,
    os::fd::{BorrowedFd, OwnedFd},
};

use crate::sys::service_manager::ServiceManager;

/// Sockets are stored as `membership-NUMBER`.
const NAME: &str = "membership-";

#[derive(Debug)]
pub struct Store {
    manager: ServiceManager,
    /// Descriptors that it takes.
    size: usize,
    stored: BTreeSet<u32>,
}

impl Store {
    /// The store, with what it has of a daemon before.
    pub fn new(manager: ServiceManager, size: usize, stored: impl Iterator<Item = u32>) -> Self {
        Self { manager, size, stored: stored.collect() }
    }

    /// Stores a socket, unless it is stored.
    ///
    /// # Errors
    ///
    /// Where the store is full, which the service manager itself never tells, or the service manager does not listen.
    pub fn open(&mut self, socket: u32, fd: BorrowedFd<'_>) -> io::Result<()> {
        if self.stored.contains(&socket) {
            return Ok(());
        }
        if self.stored.len() >= self.size {
            let advice = "give the service a larger FileDescriptorStoreMax=";
            return Err(io::Error::other(format!("it takes {} descriptors: {advice}", self.size)));
        }
        // An error of the socket is none that its memberships end with.
        let words = format!("FDSTORE=1\nFDPOLL=0\nFDNAME={NAME}{socket}");
        self.manager.tell(&words, &[&fd.try_clone_to_owned()?])?;
        self.stored.insert(socket);
        Ok(())
    }

    pub fn close(&mut self, socket: u32) -> io::Result<()> {
        if self.stored.remove(&socket) {
            self.manager.tell(&format!("FDSTOREREMOVE=1\nFDNAME={NAME}{socket}"), &[])?;
        }
        Ok(())
    }

    /// Has nothing any more.
    pub fn end(&mut self) -> io::Result<()> {
        let all: Vec<_> = self.stored.iter().copied().collect();
        all.into_iter().try_for_each(|socket| self.close(socket))
    }
}

/// The sockets among what the service manager has passed, by their numbers.
pub fn sockets(passed: Vec<(String, OwnedFd)>) -> Vec<(u32, OwnedFd)> {
    let number = |name: &str| name.strip_prefix(NAME)?.parse().ok().filter(|&number| number < u32::MAX / 2);
    passed.into_iter().filter_map(|(name, fd)| Some((number(&name)?, fd))).collect()
}
