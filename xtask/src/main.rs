//! The project's own verbs, as `cargo xtask VERB`: one file each.

mod bench;
mod build_ebpf;
mod check;
mod demo;
mod notices;
mod package;
mod process;
mod run;
mod setup;
mod soak;
mod test;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// What can be done with this project, each by one command.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    Setup(setup::Args),
    BuildEbpf(build_ebpf::Args),
    Check(check::Args),
    Test(test::Args),
    Soak(soak::Args),
    Run(run::Args),
    Demo(demo::Args),
    Bench(bench::Args),
    Package(package::Args),
}

fn main() -> ExitCode {
    let done = match Cli::parse().verb {
        Verb::Setup(args) => setup::main(&args),
        Verb::BuildEbpf(args) => build_ebpf::main(&args),
        Verb::Check(args) => check::main(&args),
        Verb::Test(args) => test::main(&args),
        Verb::Soak(args) => soak::main(&args),
        Verb::Run(args) => run::main(&args),
        Verb::Demo(args) => demo::main(&args),
        Verb::Bench(args) => bench::main(&args),
        Verb::Package(args) => package::main(&args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
