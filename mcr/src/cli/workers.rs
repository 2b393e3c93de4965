//! `mcr workers`: who does the work.

use super::{
    remote::Remote,
    text::{count, ranges, rate, table},
};
use crate::api::wire::{Request, WorkerInfo, WorkerList};

/// List the worker processes
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    remote: Remote,
}

impl Args {
    pub fn run(self) -> anyhow::Result<()> {
        self.remote.ask(&Request::Workers, render)
    }
}

const HEADER: [&str; 10] =
    ["WORKER", "DATAPATH", "QUEUES", "CPU", "PID", "STATE", "RECEIVED", "RATE", "RESTARTS", "LAST EXIT"];

fn render(list: &WorkerList, width: u16) -> String {
    if list.workers.is_empty() {
        return "no workers: an interface gets its own with its first rule\n".to_owned();
    }
    table(width, &HEADER, &[3, 4, 6, 7, 8], list.workers.iter().map(row).collect())
}

fn row(worker: &WorkerInfo) -> Vec<String> {
    let or_dash = |number: Option<u32>| number.map_or_else(|| "-".to_owned(), |number| number.to_string());
    vec![
        worker.id.clone(),
        worker.datapath.clone(),
        ranges(&worker.queues),
        or_dash(worker.cpu),
        or_dash(worker.pid),
        worker.state.clone(),
        count(worker.received),
        rate(worker.received_pps),
        count(worker.restarts),
        worker.last_exit.clone().unwrap_or_else(|| "-".to_owned()),
    ]
}
