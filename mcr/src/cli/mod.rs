//! The command line: typed arguments, one file per noun, output as table or JSON.

mod config;
mod events;
mod generate;
mod hold;
mod log_level;
mod ping;
mod receive;
mod remote;
mod rule;
mod run;
mod stats;
mod status;
mod stop;
mod text;
mod top;
mod traffic;
mod worker;
mod workers;

use std::{
    io::{self, Write},
    process::ExitCode,
};

use clap::{Parser, Subcommand};

use crate::api::client::ClientError;

/// Multicast relay for Linux.
#[derive(Debug, Parser)]
#[command(name = "mcr", version, about, max_term_width = 100)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Run(run::Args),
    Rule(rule::Args),
    Status(status::Args),
    Stats(stats::Args),
    Workers(workers::Args),
    Top(top::Args),
    Events(events::Args),
    Config(config::Args),
    Ping(ping::Args),
    LogLevel(log_level::Args),
    Stop(stop::Args),
    Gen(generate::Args),
    Recv(receive::Args),
    #[command(hide = true)]
    Worker(worker::Args),
    #[command(hide = true)]
    Hold(hold::Args),
}

/// Parses the process's arguments and runs the command.
///
/// Exit status: 0 done, 1 refused or failed, 2 usage, 3 no daemon on the socket.
pub fn main() -> ExitCode {
    let done = |()| ExitCode::SUCCESS;
    let outcome = match Cli::parse().command {
        Command::Run(args) => args.run().map(done),
        Command::Rule(args) => args.run().map(done),
        Command::Status(args) => args.run().map(done),
        Command::Stats(args) => args.run().map(done),
        Command::Workers(args) => args.run().map(done),
        Command::Top(args) => args.run().map(done),
        Command::Events(args) => args.run().map(done),
        Command::Config(args) => args.run().map(done),
        Command::Ping(args) => args.run().map(done),
        Command::LogLevel(args) => args.run().map(done),
        Command::Stop(args) => args.run().map(done),
        Command::Gen(args) => generate::run(&args),
        Command::Recv(args) => receive::run(&args),
        Command::Worker(args) => args.run().map(done),
        Command::Hold(args) => args.run().map(done),
    };
    outcome.unwrap_or_else(|error| report(&error))
}

/// Says what went wrong in one line on stderr, and gives the exit status that goes with it.
fn report(error: &anyhow::Error) -> ExitCode {
    if error.is::<ReaderGone>() {
        return ExitCode::SUCCESS;
    }
    let _ = writeln!(io::stderr(), "mcr: {}", text::one_line(&format!("{error:#}")));
    match error.downcast_ref() {
        Some(ClientError::NoDaemon { .. }) => ExitCode::from(3),
        _ => ExitCode::FAILURE,
    }
}

/// Whoever read our stdout has seen enough, as in `mcr rule list | head`.
#[derive(Debug, thiserror::Error)]
#[error("stdout is closed")]
struct ReaderGone;

/// Writes to stdout.
fn print(text: &str) -> anyhow::Result<()> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Err(ReaderGone.into()),
        other => other.map_err(|error| anyhow::Error::new(error).context("cannot write to stdout")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_arguments_are_consistent() {
        Cli::command().debug_assert();
    }
}
