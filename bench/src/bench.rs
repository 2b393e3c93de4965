//! One run of the bench: how long and how often it measures, and that it can be interrupted.

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use indicatif::{ProgressBar, ProgressStyle};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use tests::Process;

/// Nothing that is waited for takes so long unless it has failed.
const PATIENCE: Duration = Duration::from_secs(20);
const PAUSE: Duration = Duration::from_millis(2);

#[derive(Debug)]
pub struct Bench {
    /// The binary that is measured.
    pub mcr: PathBuf,
    pub quick: bool,
    progress: ProgressBar,
    interrupted: Arc<AtomicBool>,
}

impl Bench {
    pub fn new(mcr: PathBuf, quick: bool) -> Result<Self> {
        let interrupted = Arc::default();
        for signal in [SIGINT, SIGTERM, SIGHUP] {
            signal_hook::flag::register(signal, Arc::clone(&interrupted)).context("handle signals")?;
        }
        let progress = ProgressBar::new_spinner();
        progress.set_style(ProgressStyle::with_template("{spinner} {elapsed} {msg}")?);
        progress.enable_steady_tick(Duration::from_millis(200));
        Ok(Self { mcr, quick, progress, interrupted })
    }

    /// How often each figure is taken; systems take turns.
    pub fn rounds(&self) -> u32 {
        if self.quick { 1 } else { 3 }
    }

    /// Before anything is counted.
    pub fn warm_up(&self) -> Duration {
        Duration::from_millis(if self.quick { 300 } else { 1000 })
    }

    /// For so long it is counted.
    pub fn window(&self) -> Duration {
        Duration::from_millis(if self.quick { 500 } else { 2000 })
    }

    /// Says what is being measured.
    pub fn doing(&self, what: &str) {
        if self.progress.is_hidden() {
            eprintln!("{what}");
        }
        self.progress.set_message(what.to_owned());
    }

    /// Prints a line above the progress.
    pub fn say(&self, line: &str) {
        self.progress.suspend(|| println!("{line}"));
    }

    pub fn done(&self) {
        self.progress.finish_and_clear();
    }

    /// Sleeps, unless it is interrupted.
    pub fn pause(&self, duration: Duration) -> Result<()> {
        let end = Instant::now() + duration;
        loop {
            if self.interrupted.load(Ordering::Relaxed) {
                bail!("interrupted");
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            thread::sleep(left.min(Duration::from_millis(50)));
        }
    }

    /// Waits until `holds`; fails at the deadline, naming `what`.
    pub fn wait_until(&self, what: &str, mut holds: impl FnMut() -> Result<bool>) -> Result<()> {
        let start = Instant::now();
        while !holds()? {
            if start.elapsed() > PATIENCE {
                bail!("not within {PATIENCE:?}: {what}");
            }
            self.pause(PAUSE)?;
        }
        Ok(())
    }

    /// Waits for the end of a process, and takes what it printed.
    pub fn wait_for(&self, process: &mut Process, patience: Duration) -> Result<String> {
        // While something is measured the bench keeps out of the way.
        const SELDOM: Duration = Duration::from_millis(20);
        let start = Instant::now();
        while process.ended().is_none() {
            if start.elapsed() > patience {
                bail!("a process did not end within {patience:?}: {}", process.stderr());
            }
            self.pause(SELDOM)?;
        }
        Ok(process.stdout())
    }
}
