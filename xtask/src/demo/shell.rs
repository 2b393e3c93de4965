//! Commands that are shown before they are run, and waits that Ctrl-C ends.

use std::{
    fs::File,
    os::unix::process::CommandExt as _,
    path::Path,
    process::{Child, Command, ExitStatus, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use crate::process;

const POLL: Duration = Duration::from_millis(20);

#[derive(Debug)]
pub struct Shell {
    interrupted: Arc<AtomicBool>,
    variable: (&'static str, &'static str),
}

impl Shell {
    /// With one environment variable that every command sees.
    pub fn new(variable: (&'static str, &'static str)) -> Result<Self> {
        let interrupted = Arc::new(AtomicBool::new(false));
        for signal in [SIGINT, SIGTERM, SIGHUP] {
            signal_hook::flag::register(signal, Arc::clone(&interrupted))
                .context("cannot watch for Ctrl-C")?;
        }
        Ok(Self { interrupted, variable })
    }

    /// Shows the environment variable as it would be typed.
    pub fn show_variable(&self) {
        println!("$ export {}={}", self.variable.0, self.variable.1);
    }

    /// A command and its arguments, separated by spaces, shown and run to its end.
    pub fn type_in(&self, words: &str) -> Result<()> {
        self.run(&mut self.command(words.split_whitespace()))
    }

    /// A command for [`Self::run`] and [`Self::start`].
    pub fn command<'a>(&self, words: impl IntoIterator<Item = &'a str>) -> Command {
        let mut words = words.into_iter();
        let mut command = Command::new(words.next().unwrap_or("true"));
        // In a group of its own, so that Ctrl-C reaches only us: we end what we started, in order.
        command.args(words).env(self.variable.0, self.variable.1).stdin(Stdio::null()).process_group(0);
        command
    }

    pub fn run(&self, command: &mut Command) -> Result<()> {
        self.stop_if_interrupted()?;
        println!("$ {}", process::line(command));
        process::run(command)
    }

    /// Shows a command and starts it in the background; what it prints goes to `stdout`,
    /// what it complains of to `stderr`, if that is another file.
    pub fn start(&self, command: &mut Command, stdout: &Path, stderr: Option<&Path>) -> Result<Background> {
        self.stop_if_interrupted()?;
        let complaints = stderr.map_or("&1".to_owned(), |path| format!(" {}", path.display()));
        println!("$ {} > {} 2>{complaints} &", process::line(command), stdout.display());
        let create =
            |path: &Path| File::create(path).with_context(|| format!("cannot write {}", path.display()));
        let stdout = create(stdout)?;
        let stderr = stderr.map_or_else(|| Ok(stdout.try_clone()?), create)?;
        let child = command
            .stdout(stdout)
            .stderr(stderr)
            .spawn()
            .with_context(|| format!("cannot start `{}`", process::line(command)))?;
        Ok(Background(child))
    }

    /// Waits until a condition holds, its check fails, its time is over or Ctrl-C is pressed.
    pub fn wait_for(
        &self,
        what: &str,
        within: Duration,
        mut condition: impl FnMut() -> Result<bool>,
    ) -> Result<()> {
        let start = Instant::now();
        while !condition()? {
            self.stop_if_interrupted()?;
            if start.elapsed() > within {
                bail!("waited {} s in vain until {what}", within.as_secs());
            }
            thread::sleep(POLL);
        }
        Ok(())
    }

    pub fn is_interrupted(&self) -> bool {
        self.interrupted.load(Ordering::Relaxed)
    }

    fn stop_if_interrupted(&self) -> Result<()> {
        if self.is_interrupted() {
            bail!("interrupted");
        }
        Ok(())
    }
}

/// A command that runs in the background. It is ended with the namespace that it runs in, not on drop:
/// a daemon is asked before it is killed.
#[derive(Debug)]
pub struct Background(Child);

impl Background {
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.0.try_wait()?)
    }
}
