//! mcr, a multicast relay for Linux: the daemon, its workers and its command line.

pub mod api;
pub mod cli;
pub mod config;
pub mod datapath;
pub mod doctor;
pub mod ebpf;
pub mod holder;
pub mod metrics;
pub mod net;
pub mod rule;
pub mod ruleset;
pub mod supervisor;
pub mod sys;
pub mod traffic;
pub mod worker;
