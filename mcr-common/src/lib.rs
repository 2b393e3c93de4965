//! What the XDP program and user space share: the header parser, the flow key, the rewriting of
//! headers and the counters.
//!
//! No I/O and no allocation; every shared type is `repr(C)` and free of padding, with addresses and
//! ports as bytes in network order.
#![cfg_attr(not(test), no_std)]

pub mod abi;
pub mod counters;
pub mod flow;
pub mod parse;
pub mod redirect;
