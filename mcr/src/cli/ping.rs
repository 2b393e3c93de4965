//! `mcr ping`: whether a daemon answers.

use std::time::Instant;

use super::remote::Remote;
use crate::api::wire::{Pong, Request};

/// Ask whether the daemon answers
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    remote: Remote,
}

impl Args {
    pub fn run(self) -> anyhow::Result<()> {
        let start = Instant::now();
        let pong: Pong = self.remote.call(&Request::Ping)?;
        let took = start.elapsed();
        self.remote.show(&pong, |pong, _| {
            let took = took.as_secs_f64() * 1e3;
            format!("mcr {} answers (pid {}, {took:.1} ms)\n", pong.version, pong.pid)
        })
    }
}
