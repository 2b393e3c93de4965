//! `mcr log-level`: what the daemon logs.

use clap::Subcommand;

use super::remote::Remote;
use crate::{
    api::wire::{self, LogLevelInfo, Request},
    supervisor::settings::LogLevel,
};

/// Show or change what the daemon logs
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    remote: Remote,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Print the level
    Get,
    /// Change the level, for the daemon and its workers
    Set {
        /// The least that is logged
        level: LogLevel,
    },
}

impl Args {
    pub fn run(self) -> anyhow::Result<()> {
        let request = match self.command {
            Command::Get => Request::LogLevelGet,
            Command::Set { level } => Request::LogLevelSet(wire::LogLevel { level: level.to_string() }),
        };
        self.remote.ask(&request, |info: &LogLevelInfo, _| format!("{}\n", info.level))
    }
}
