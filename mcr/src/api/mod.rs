//! The control protocol: JSON-RPC 2.0, one object a line, over a Unix socket.
//!
//! [`wire`] has the types, which are what scripts see with `--json`; [`client`] and [`server`] carry them,
//! [`rpc`] is what they write on the line, and [`socket`] is the socket's place in the file system.

pub mod client;
pub mod event;
pub mod rpc;
#[cfg(test)]
pub(crate) mod scratch;
pub mod server;
pub mod socket;
pub mod subscription;
pub mod wire;
