//! What every command that talks to the daemon has in common.

use std::{
    io::{self, Write},
    path::{Path, PathBuf},
};

use serde::{Serialize, de::DeserializeOwned};

use super::{print, text};
use crate::{
    api::{
        client::{Client, ClientError},
        wire::Request,
    },
    supervisor::settings::DEFAULT_CONTROL,
};

#[derive(Debug, clap::Args)]
pub struct Remote {
    /// The daemon's control socket
    #[arg(long, value_name = "PATH", env = "MCR_CONTROL", default_value = DEFAULT_CONTROL, global = true)]
    control: PathBuf,
    /// Print the daemon's answer as one line of JSON
    #[arg(long, global = true)]
    json: bool,
}

impl Remote {
    pub fn control(&self) -> &Path {
        &self.control
    }

    pub fn json(&self) -> bool {
        self.json
    }

    pub fn connect(&self) -> Result<Client, ClientError> {
        Client::connect(&self.control)
    }

    /// One call on a connection of its own.
    pub fn call<T: DeserializeOwned>(&self, request: &Request) -> Result<T, ClientError> {
        self.connect()?.call(request)
    }

    /// Prints an answer: as the protocol has it, or as `render` has it for the width of the terminal.
    pub fn show<T: Serialize>(
        &self,
        answer: &T,
        render: impl FnOnce(&T, u16) -> String,
    ) -> anyhow::Result<()> {
        if self.json {
            let mut line = serde_json::to_string(answer)?;
            line.push('\n');
            print(&line)
        } else {
            print(&text::harmless(&render(answer, text::width())))
        }
    }

    /// Tells a person what an answer warns of.
    pub fn warn(&self, warnings: &[String]) {
        for warning in warnings.iter().filter(|_| !self.json) {
            let _ = writeln!(io::stderr(), "warning: {}", text::one_line(warning));
        }
    }

    /// One call and its answer, printed.
    pub fn ask<T: DeserializeOwned + Serialize>(
        &self,
        request: &Request,
        render: impl FnOnce(&T, u16) -> String,
    ) -> anyhow::Result<()> {
        self.show(&self.call(request)?, render)
    }
}
