//! Test traffic: what `mcr gen` sends and how `mcr recv` accounts for it.
//!
//! Pure parts, one file each: [`probe`] (the payload), [`sequence`] (loss, duplicates, reordering),
//! [`account`] (all that is counted of a stream), [`pacing`] (when to send how many), [`group`] (the address of
//! stream i). At the kernel's edge: [`socket`], [`clock`], [`stop`], and the two loops, [`sender`] and
//! [`receiver`]. Nothing here knows the relay.

pub mod account;
pub mod clock;
pub mod group;
pub mod pacing;
pub mod probe;
pub mod receiver;
pub mod sender;
pub mod sequence;
pub mod socket;
pub mod stop;
