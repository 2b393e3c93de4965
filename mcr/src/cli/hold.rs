//! `mcr hold`: keeps memberships while there is no daemon. The daemon starts it; a person has no use for it.

use std::path::PathBuf;

/// A holder of memberships, which the daemon starts itself.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The pin root of its daemon, for `ps`.
    pin_root: PathBuf,
}

impl Args {
    #[expect(clippy::unused_self, reason = "as every command of the command line")]
    pub fn run(self) -> anyhow::Result<()> {
        crate::holder::process::run()
    }
}
