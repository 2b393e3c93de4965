//! The privileged half of the daemon: rules, eBPF objects, memberships, worker processes, control socket.
//! It touches no packet.

pub mod event;
pub mod state;
