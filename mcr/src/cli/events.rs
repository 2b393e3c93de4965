//! `mcr events`: what happens, as it happens.

use std::{io, os::fd::AsFd};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
};

use super::{ReaderGone, print, remote::Remote};
use crate::api::{
    client::{Client, ClientError},
    event::Occurrence,
    wire::{Request, Subscribed},
};

/// Print what happens, as it happens: a line of JSON for each change of rules, workers, interfaces, alarms and
/// configuration
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Ends with 0 when the daemon is stopped (the last event is daemon.stopping), with 1 when it \
                        went otherwise or this reader was too slow, with 3 when there was none."
)]
pub struct Args {
    #[command(flatten)]
    remote: Remote,
}

/// Why the events end before the daemon does.
#[derive(Debug, thiserror::Error)]
enum Ended {
    #[error("the daemon tells no more events: what reads them here is too slow; read faster, or into a file")]
    Overrun,
    #[error(
        "the events break off: the daemon was killed, or what reads them here was too slow for it; see its log"
    )]
    BrokenOff,
}

impl Args {
    pub fn run(self) -> anyhow::Result<()> {
        let mut client = self.remote.connect()?;
        client.call::<Subscribed>(&Request::EventsSubscribe)?;
        loop {
            wait(&client)?;
            let event = match client.next_event() {
                Err(ClientError::Closed { .. } | ClientError::HalfALine { .. }) => {
                    return Err(Ended::BrokenOff.into());
                }
                other => other?,
            };
            let mut line = serde_json::to_string(&event)?;
            line.push('\n');
            print(&line)?;
            match event.occurrence {
                Occurrence::DaemonStopping { .. } => return Ok(()),
                Occurrence::Overrun => return Err(Ended::Overrun.into()),
                _ => {}
            }
        }
    }
}

/// Waits until something comes from the daemon, unless whoever reads our stdout goes before.
fn wait(client: &Client) -> anyhow::Result<()> {
    let Some(daemon) = client.awaited() else { return Ok(()) };
    let stdout = io::stdout();
    // Of stdout there is nothing to ask: that its reader is gone is told in any case.
    let mut fds = [PollFd::new(daemon, PollFlags::POLLIN), PollFd::new(stdout.as_fd(), PollFlags::empty())];
    while let Err(error) = poll(&mut fds, PollTimeout::NONE) {
        if error != Errno::EINTR {
            return Err(error.into());
        }
    }
    let gone = PollFlags::POLLERR | PollFlags::POLLHUP;
    match fds[1].revents() {
        Some(told) if told.intersects(gone) => Err(ReaderGone.into()),
        _ => Ok(()),
    }
}
