//! The command line: typed arguments, one file per noun, output as table or JSON.

mod generate;
mod receive;
mod traffic;

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
enum Command {
    Gen(generate::Args),
    Recv(receive::Args),
}

/// Parses the process's arguments and runs the command.
///
/// Exit status: 0 done, 1 refused or failed, 2 usage, 3 no daemon on the socket.
pub fn main() -> ExitCode {
    let outcome = match Cli::parse().command {
        Command::Gen(args) => generate::run(&args),
        Command::Recv(args) => receive::run(&args),
    };
    outcome.unwrap_or_else(|error| {
        eprintln!("mcr: {error:#}");
        ExitCode::from(1)
    })
}
