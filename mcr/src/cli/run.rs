//! `mcr run`: the daemon, started with what its arguments and its configuration files say.

use std::path::{Path, PathBuf};

use anyhow::bail;

use crate::{
    config::{self, options::Options},
    supervisor::{self, Launch, first_mistake},
};

/// Run the relay daemon in the foreground
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Options and rules, as TOML; rules.d/*.toml beside it holds further rules. What is said here goes before it
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    options: Options,
}

impl Args {
    pub fn run(self) -> anyhow::Result<()> {
        let file = self.config.map(std::path::absolute).transpose()?;
        let sources = file.as_deref().map(config::gather).transpose()?.unwrap_or_default();
        let config = match config::read(&sources, &self.options) {
            Ok(config) => config,
            Err(mistakes) => bail!(first_mistake(file.as_deref().unwrap_or(Path::new("")), &mistakes)),
        };
        supervisor::run(Launch { options: self.options, file, sources }, config)
    }
}
