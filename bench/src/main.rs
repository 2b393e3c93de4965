//! How fast mcr is, and against what: `cargo xtask bench`.
//!
//! Everything happens in network namespaces that the bench makes itself, and is gone afterwards.

mod bench;
mod buckets;
mod cases;
mod cpu;
mod daemon;
mod figures;
mod generator;
mod losses;
mod plots;
mod programs;
mod report;
mod sink;
mod site;
mod systems;
mod targets;
mod traffic;

use std::{env, fs, path::PathBuf, process::ExitCode, time::Duration};

use anyhow::{Context as _, Result, ensure};
use clap::{Parser, ValueEnum as _};

use crate::{bench::Bench, cases::Case, figures::Figures, report::Machine};

/// Measure mcr's datapaths, what one would take instead, and the ceiling, in one run
#[derive(Debug, Parser)]
#[command(max_term_width = 100)]
struct Args {
    /// What to measure [default: everything]
    case: Vec<Case>,
    /// Everything shorter and once: two minutes in all
    #[arg(long)]
    quick: bool,
    /// The binary to measure [default: mcr beside this one]
    #[arg(long, value_name = "FILE")]
    mcr: Option<PathBuf>,
    /// Where results.json and the plots go [default: bench in the folder of cargo's output]
    #[arg(long, value_name = "DIR")]
    output: Option<PathBuf>,
}

fn main() -> ExitCode {
    match run(Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: Args) -> Result<()> {
    ensure!(nix::unistd::geteuid().is_root(), "namespaces need root: run `cargo xtask bench`");
    cpu::ensure_enough()?;
    let exe = env::current_exe().context("the bench's own path")?;
    let beside = exe.parent().context("the bench's own folder")?;
    let mcr = args.mcr.unwrap_or_else(|| beside.join("mcr"));
    ensure!(mcr.exists(), "{} is missing: `cargo build --release -p mcr` makes it", mcr.display());
    let output = args.output.unwrap_or_else(|| beside.join("../bench"));
    fs::create_dir_all(&output).with_context(|| output.display().to_string())?;
    let output = output.canonicalize()?;

    let cases = if args.case.is_empty() { Case::value_variants() } else { &args.case };
    let bench = Bench::new(mcr, args.quick)?;
    let machine = Machine::this(args.quick, others_busy(&bench)?, cpu::stalls(WATCH)?);
    let Machine { kernel, cpu, cpus, date, commit, others_busy, stalls, .. } = &machine;
    bench.say(&format!("mcr {commit}, Linux {kernel}, {cpu}, {cpus} CPUs, {date}"));
    if *others_busy > QUIET {
        bench.say(&format!(
            "others keep {others_busy:.1} CPUs busy: let the machine rest for figures that hold"
        ));
    }
    bench.say(&format!(
        "CPU {} stood still for {:.1} % of {WATCH:?}, at most {} us at a time: no latency is sure to be below that",
        cpu::RELAY_CPU, stalls.percent, stalls.longest_us
    ));
    let mut figures = Figures::default();
    for &case in cases {
        let name = case.name();
        case.run(&bench, &mut figures).with_context(|| format!("case {name}"))?;
        bench.say(&format!("\n{name}: {}\n{}", case.method(), report::table(&name, &figures)));
        // What is there is kept, whatever becomes of the next case.
        report::write_json(&output, &machine, cases, &figures)?;
    }
    bench.done();
    plots::write(&output, &figures)?;
    if let Some(targets) = report::targets(&figures) {
        println!("\n{targets}\n");
    }
    println!("results: {}", output.join("results.json").display());
    Ok(())
}

/// How long it is looked how steady the machine is.
const WATCH: Duration = Duration::from_secs(2);

/// CPUs that others may use without a word.
const QUIET: f64 = 0.1;

/// CPUs that are busy while the bench does nothing.
fn others_busy(bench: &Bench) -> Result<f64> {
    const LOOK: Duration = Duration::from_millis(500);
    let before = cpu::busy()?;
    bench.pause(LOOK)?;
    Ok(cpu::busy()?.saturating_sub(before).as_secs_f64() / LOOK.as_secs_f64())
}
