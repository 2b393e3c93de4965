//! `mcr top`: what is going on, live. Asking, drawing and listening to keys are threads and pure functions apart: a
//! [`Model`] of what is known and wanted, [`screen`] that draws it, [`Model::press`] that takes keys.

mod cpu;
mod keys;
mod model;
mod screen;
#[cfg(test)]
mod tests;

use std::{
    fs::File,
    io::{IsTerminal, stdin, stdout},
    path::PathBuf,
    sync::mpsc::{self, Sender},
    thread,
    time::{Duration, Instant},
};

use nix::sys::signal::{SigSet, Signal};
use ratatui::crossterm::event::{self, Event, KeyEvent, KeyEventKind};

use super::remote::Remote;
use crate::api::{
    client::{Client, ClientError},
    wire::{Request, RuleList, Stats, StatsQuery, Status},
};
use model::{Model, Sample, Sort};

/// Watch rules, workers and interfaces, live
#[derive(Debug, clap::Args)]
#[command(
    mut_arg("json", |json| json.hide(true)),
    after_help = "Keys: up, down, PageUp, PageDown choose a rule; r, d, n sort by rate, drops, name; / filters by \
                        rule or endpoint, Esc shows all again; q, Esc and Ctrl-C quit."
)]
pub struct Args {
    /// What stands first
    #[arg(long, value_enum, default_value = "rate")]
    sort: Sort,
    /// Seconds from one look to the next
    #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = interval)]
    interval: Duration,
    #[command(flatten)]
    remote: Remote,
}

fn interval(text: &str) -> Result<Duration, String> {
    let seconds = text.parse().ok().filter(|seconds| (0.1..=3600.0).contains(seconds));
    seconds.map(Duration::from_secs_f64).ok_or_else(|| "write seconds, 0.1 to 3600".to_owned())
}

#[derive(Debug, thiserror::Error)]
#[error("top needs a terminal to draw on; for programs there are `mcr stats --json` and `mcr events`")]
struct NoTerminal;

/// What the loop waits for.
enum Input {
    Key(KeyEvent),
    Resized,
    Looked(Result<Box<Sample>, ClientError>),
    Quit,
}

impl Args {
    pub fn run(self) -> anyhow::Result<()> {
        let keys = stdin().is_terminal() || File::open("/dev/tty").is_ok();
        if self.remote.json() || !stdout().is_terminal() || !keys {
            return Err(NoTerminal.into());
        }
        // Without a daemon there is nothing to watch, and no screen for it.
        let mut client = self.remote.connect()?;
        let first = look(&mut client)?;
        let mut model = Model::new(self.sort, self.interval);
        model.take(first);
        let (inputs, taken) = mpsc::channel();
        follow_signals(inputs.clone())?;
        let _screen = Screen;
        let mut terminal = ratatui::try_init()?;
        follow_keys(inputs.clone());
        follow_daemon(client, self.remote.control().to_owned(), self.interval, inputs);
        loop {
            terminal.draw(|frame| screen::draw(frame, &model))?;
            let page = screen::page(terminal.size()?.into(), &model);
            // Those who send end with the process.
            let quits = match taken.recv()? {
                Input::Key(key) => model.press(key, page),
                Input::Looked(Ok(sample)) => {
                    model.take(*sample);
                    false
                }
                Input::Looked(Err(why)) => {
                    model.lose(why.to_string());
                    false
                }
                Input::Resized => false,
                Input::Quit => true,
            };
            if quits {
                return Ok(());
            }
        }
    }
}

/// The terminal is as it was when this is dropped; a panic is seen to by ratatui.
struct Screen;

impl Drop for Screen {
    fn drop(&mut self) {
        ratatui::restore();
    }
}

/// Has signals that would end the process end the loop.
fn follow_signals(inputs: Sender<Input>) -> anyhow::Result<()> {
    let signals = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGQUIT]);
    signals.thread_block()?;
    thread::spawn(move || {
        let _ = signals.wait();
        let _ = inputs.send(Input::Quit);
    });
    Ok(())
}

fn follow_keys(inputs: Sender<Input>) {
    thread::spawn(move || {
        loop {
            let input = match event::read() {
                Ok(Event::Key(key)) if key.kind != KeyEventKind::Release => Input::Key(key),
                Ok(Event::Resize(..)) => Input::Resized,
                Ok(_) => continue,
                // The terminal is gone.
                Err(_) => Input::Quit,
            };
            let ends = matches!(input, Input::Quit);
            if inputs.send(input).is_err() || ends {
                return;
            }
        }
    });
}

/// Looks at the daemon again and again, and for a new one when it has gone.
fn follow_daemon(client: Client, control: PathBuf, interval: Duration, inputs: Sender<Input>) {
    thread::spawn(move || {
        let mut client = Some(client);
        let mut next = Instant::now();
        loop {
            next = (next + interval).max(Instant::now());
            thread::sleep(next.saturating_duration_since(Instant::now()));
            let looked = match client.take() {
                Some(client) => Ok(client),
                None => Client::connect(&control),
            };
            let looked = looked.and_then(|mut its| {
                let sample = look(&mut its)?;
                client = Some(its);
                Ok(Box::new(sample))
            });
            if inputs.send(Input::Looked(looked)).is_err() {
                return;
            }
        }
    });
}

fn look(client: &mut Client) -> Result<Sample, ClientError> {
    let counters: Stats = client.call(&Request::Stats(StatsQuery::default()))?;
    let at = Instant::now();
    let status: Status = client.call(&Request::Status)?;
    let rules: RuleList = client.call(&Request::RuleList)?;
    // Its process ids are ours only where it knows itself by the one by which we know it.
    let ours = client.daemon_pid().is_some_and(|pid| pid.cast_unsigned() == status.pid);
    let pids = counters.workers.iter().filter_map(|worker| worker.pid.filter(|_| ours));
    let cpu = pids.filter_map(|pid| Some((pid, cpu::used(pid)?))).collect();
    Ok(Sample { at, stats: counters, status, rules: rules.rules, cpu })
}
