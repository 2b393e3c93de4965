//! The command line: typed arguments, one file per noun, output as table or JSON.

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Multicast relay for Linux.
#[derive(Debug, Parser)]
#[command(name = "mcr", version, about, max_term_width = 100)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {}

/// Parses the process's arguments and runs the command.
///
/// Exit status: 0 done, 1 refused or failed, 2 usage, 3 no daemon on the socket.
pub fn main() -> ExitCode {
    match Cli::parse().command {}
}
