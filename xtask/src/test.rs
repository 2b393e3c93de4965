//! `cargo xtask test`: the tests, run as root.

use std::path::Path;

use anyhow::{Result, bail};

/// Runs the packet table of the XDP program on an object.
pub fn packet_table(object: &Path) -> Result<()> {
    bail!("there is no packet table yet for {}", object.display())
}
