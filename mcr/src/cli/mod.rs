//! The command line: typed arguments, one file per noun, output as table or JSON.

mod completions;
mod config;
mod doctor;
mod events;
mod generate;
mod hold;
mod log_level;
mod man;
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

use clap::{CommandFactory, Parser, Subcommand};

use crate::{api::client::ClientError, sys::service_manager::stderr_is_journal};

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
    Doctor(doctor::Args),
    Top(top::Args),
    Events(events::Args),
    Config(config::Args),
    Ping(ping::Args),
    LogLevel(log_level::Args),
    Stop(stop::Args),
    Gen(generate::Args),
    Recv(receive::Args),
    Completions(completions::Args),
    Man(man::Args),
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
        Command::Doctor(args) => doctor::run(&args),
        Command::Top(args) => args.run().map(done),
        Command::Events(args) => args.run().map(done),
        Command::Config(args) => args.run().map(done),
        Command::Ping(args) => args.run().map(done),
        Command::LogLevel(args) => args.run().map(done),
        Command::Stop(args) => args.run().map(done),
        Command::Gen(args) => generate::run(&args),
        Command::Recv(args) => receive::run(&args),
        Command::Completions(args) => args.run().map(done),
        Command::Man(args) => args.run().map(done),
        Command::Worker(args) => args.run().map(done),
        Command::Hold(args) => args.run().map(done),
    };
    outcome.unwrap_or_else(|error| report(&error))
}

/// The command line as people have it: without the commands that the daemon starts itself.
fn public() -> clap::Command {
    let whole = Cli::command();
    let about = whole.get_about().cloned().unwrap_or_default();
    let commands: Vec<_> =
        whole.get_subcommands().filter(|command| !command.is_hide_set()).cloned().collect();
    clap::Command::new("mcr")
        .version(env!("CARGO_PKG_VERSION"))
        .about(about)
        .subcommand_required(true)
        .subcommands(commands)
}

/// Says what went wrong in one line on stderr, and gives the exit status that goes with it.
fn report(error: &anyhow::Error) -> ExitCode {
    if error.is::<ReaderGone>() {
        return ExitCode::SUCCESS;
    }
    // The level of an error, as the journal has it.
    let level = if stderr_is_journal() { "<3>" } else { "" };
    let _ = writeln!(io::stderr(), "{level}mcr: {}", text::one_line(&format!("{error:#}")));
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

    #[test]
    fn the_arguments_are_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_and_every_argument_says_what_it_is() {
        fn check(command: &clap::Command) {
            let name = command.get_display_name().unwrap_or_else(|| command.get_name());
            assert!(command.get_about().is_some(), "{name}");
            for argument in command.get_arguments() {
                assert!(argument.get_help().is_some(), "{name}: {}", argument.get_id());
            }
            command.get_subcommands().for_each(check);
        }
        let mut public = public().disable_help_subcommand(true);
        public.build();
        check(&public);
    }
}
