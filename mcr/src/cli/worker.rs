//! `mcr worker`: the data plane process. The supervisor starts it; a person has no use for it.

/// A worker of the daemon, which starts it itself.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Interface and place of the worker, for `ps`.
    id: String,
}

impl Args {
    #[expect(clippy::unused_self, reason = "as every command of the command line")]
    pub fn run(self) -> anyhow::Result<()> {
        crate::worker::run()
    }
}
