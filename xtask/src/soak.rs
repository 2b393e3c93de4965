//! `cargo xtask soak`: streams play for minutes while rules come and go; nothing may be lost and nothing grow.

use anyhow::Result;

use crate::test;

/// Play eight streams while rules come and go, on each datapath; nothing may be lost, nothing grow
#[derive(Debug, clap::Args)]
pub struct Args {
    /// How long, on each datapath; the ordinary tests do it for a minute
    #[arg(long, value_name = "S", default_value_t = 600, value_parser = clap::value_parser!(u32).range(11..=86_400))]
    seconds: u32,
}

pub fn main(args: &Args) -> Result<()> {
    test::soak(args.seconds)
}
