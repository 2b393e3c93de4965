//! The control protocol: JSON-RPC 2.0, one object a line, over a Unix socket.
//!
//! [`wire`] has the types, which are what scripts see with `--json`; [`client`] and [`server`] carry them.

pub mod wire;
