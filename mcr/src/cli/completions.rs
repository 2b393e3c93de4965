//! `mcr completions`: what shells complete.

use clap_complete::Shell;

use super::{print, public};

/// Print what a shell needs to complete the command line
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The shell; packages install it for bash, zsh and fish
    shell: Shell,
}

impl Args {
    pub fn run(self) -> anyhow::Result<()> {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut public(), "mcr", &mut script);
        print(&String::from_utf8(script)?)
    }
}
