//! `mcr workers`: who does the work.

use std::collections::BTreeSet;

use super::{
    remote::Remote,
    text::{count, rate, table},
};
use crate::{
    api::wire::{Request, WorkerInfo, WorkerList},
    sys::cpu_list::ranges,
};

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
    let mut text = table(width, &HEADER, &[3, 4, 6, 7, 8], list.workers.iter().map(row).collect());
    let why =
        |worker: &WorkerInfo| [&worker.interface, &worker.datapath, &worker.why].map(Clone::clone).to_vec();
    let reasons: BTreeSet<_> = list.workers.iter().map(why).collect();
    text.push('\n');
    text.push_str(&table(width, &["INTERFACE", "DATAPATH", "WHY"], &[], reasons.into_iter().collect()));
    text
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

#[cfg(test)]
mod tests {
    use super::*;

    fn worker(index: u32) -> WorkerInfo {
        WorkerInfo {
            id: format!("eth0/xdp{index}"),
            interface: "eth0".to_owned(),
            datapath: "af-xdp".to_owned(),
            why: "auto takes native XDP".to_owned(),
            queues: vec![0, 1, 2, 5],
            cpu: Some(index),
            pid: Some(1000 + index),
            state: "running".to_owned(),
            restarts: 0,
            last_exit: None,
            received: 1_234_567,
            system_calls: 0,
            received_pps: 12_345.0,
        }
    }

    #[test]
    fn workers_are_a_table() {
        let restarting = WorkerInfo {
            pid: None,
            cpu: None,
            state: "restarting".to_owned(),
            restarts: 2,
            last_exit: Some("signal 9".to_owned()),
            ..worker(1)
        };
        let list = WorkerList { schema: 1, workers: vec![worker(0), restarting] };
        assert_eq!(
            render(&list, 100),
            "\
WORKER     DATAPATH  QUEUES  CPU   PID  STATE        RECEIVED      RATE  RESTARTS  LAST EXIT
eth0/xdp0  af-xdp    0-2,5     0  1000  running     1,234,567  12.3 k/s         0  -
eth0/xdp1  af-xdp    0-2,5     -     -  restarting  1,234,567  12.3 k/s         2  signal 9

INTERFACE  DATAPATH  WHY
eth0       af-xdp    auto takes native XDP
"
        );
    }

    #[test]
    fn no_workers_are_said_so() {
        let list = WorkerList { schema: 1, workers: Vec::new() };
        assert_eq!(render(&list, 100), "no workers: an interface gets its own with its first rule\n");
    }
}
