//! mcr, a multicast relay for Linux: the daemon, its workers and its command line.

pub mod api;
pub mod cli;
pub mod rule;
pub mod traffic;
