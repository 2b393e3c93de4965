//! The holder: a tiny process that keeps a daemon's memberships while there is no daemon, where no service manager's
//! descriptor store does.
//!
//! When the last socket that joined a group closes, the kernel leaves, and a snooping switch cuts the stream. So the sockets
//! are in two processes: the daemon joins and leaves by them, and the holder does nothing but have them. It has no
//! capability and ends by itself. There is one for each network namespace and pin root: the name of its socket is its lock.

pub mod client;
pub mod process;
pub mod store;

use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};

use crate::{net::membership::Membership, rule::IfIndex};

/// Longest message either way.
const MAX_PACKET_BYTES: usize = 1 << 14;

/// Memberships in one message.
const MEMBERSHIPS_AT_ONCE: usize = 64;

/// What a daemon asks of the holder, by `SOCK_SEQPACKET`, a JSON object a packet.
#[derive(Debug, Serialize, Deserialize)]
enum Ask {
    /// Hold the socket that comes with this.
    Open {
        socket: u32,
    },
    Close {
        socket: u32,
    },
    /// Note memberships that some socket has, or is about to have.
    Add {
        memberships: Vec<Noted>,
    },
    Remove {
        membership: Noted,
    },
    /// Show everything.
    Give,
    /// Drop everything and end.
    End,
}

/// What the holder shows when it is asked to give.
#[derive(Debug, Serialize, Deserialize)]
enum Answer {
    /// A socket comes with this.
    Socket {
        socket: u32,
    },
    Memberships {
        memberships: Vec<Noted>,
    },
    All,
}

/// A membership: interface, group, source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
struct Noted(u32, Ipv4Addr, Option<Ipv4Addr>);

impl From<Membership> for Noted {
    fn from(Membership { interface, group, source }: Membership) -> Self {
        Self(interface.0, group, source)
    }
}

impl From<Noted> for Membership {
    fn from(Noted(interface, group, source): Noted) -> Self {
        Self { interface: IfIndex(interface), group, source }
    }
}
