//! Where a worker's frames come from.

pub mod af_xdp;
