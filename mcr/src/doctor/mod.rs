//! `mcr doctor`: why nothing flows, in plain words, with the command that mends it.
//!
//! What is true is collected at the edge ([`collect`], [`look`]), what follows from it is decided by pure functions
//! ([`findings`]). It runs in the operator's process, with whatever privileges he has; what he may not read is said,
//! not guessed. It sends nothing and joins nothing.

pub mod collect;
pub mod facts;
pub mod findings;
pub mod look;
mod proc_net;
pub mod typed;
