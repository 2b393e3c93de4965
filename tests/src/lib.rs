//! The namespace harness: what an end-to-end test of mcr stands on.
//!
//! A test makes a [`Site`], runs a [`Relay`] in it, sends with a [`Source`], a [`Generator`] or a
//! [`RawSender`], and counts with a [`Capture`] or a [`Receiver`]. Whatever was made is gone when its
//! value is dropped, a failed test included; what a killed run left is swept by the next one.
//!
//! The harness panics where the machine refuses it something: a test has no better answer.

pub mod bpf;
pub mod capture;
pub mod deprive;
pub mod frame;
pub mod ground;
pub mod namespace;
pub mod process;
pub mod relay;
pub mod scratch;
pub mod site;
pub mod source;
pub mod terminal;
pub mod traffic;
pub mod usage;
pub mod wait;

pub use crate::{
    capture::{Capture, Captured},
    frame::{RawSender, Udp},
    ground::Ground,
    namespace::Namespace,
    process::{Answer, Process},
    relay::Relay,
    scratch::Scratch,
    site::Site,
    source::Source,
    terminal::Terminal,
    traffic::{Generator, Receiver},
    usage::Usage,
    wait::{wait_for, wait_until},
};
