//! The privileged half: rules, eBPF objects, memberships, the lives of the workers.

pub mod settings;

use settings::Settings;

/// Runs the daemon until it is told to stop.
#[expect(clippy::needless_pass_by_value, reason = "the daemon owns what it runs on")]
pub fn run(settings: Settings) -> anyhow::Result<()> {
    anyhow::bail!("the supervisor is not built: nothing serves {}", settings.control.display())
}
