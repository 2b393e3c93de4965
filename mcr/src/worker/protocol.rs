//! What the supervisor and a worker say to one another over their socket pair: one JSON object a
//! packet, file descriptors beside it. Both ends are of one build; the protocol has no version.

use std::net::Ipv4Addr;

use mcr_common::flow::FlowKey4;
use serde::{Deserialize, Serialize};

use crate::worker::ledger::{DropReason, Layout};

/// Longest packet: 256 outputs take less than half of it.
pub const MAX_PACKET_BYTES: usize = 128 * 1024;

/// From the supervisor.
#[derive(Debug, Serialize, Deserialize)]
pub enum Command {
    /// The first; with the ledger's memfd.
    Setup(Setup),
    /// With the egress socket that outputs name by `id`.
    OpenEgress {
        id: u32,
    },
    /// No rule names the egress socket any more.
    CloseEgress {
        id: u32,
    },
    /// Relay this rule from now on, in place of what has the slot.
    Upsert {
        sequence: u64,
        rule: CompiledRule,
    },
    /// Relay this rule no more.
    Remove {
        sequence: u64,
        slot: u32,
    },
    /// The rules are complete: take frames from now on.
    Begin,
    LogLevel {
        level: String,
    },
    /// Relay what the sockets hold, then end.
    Drain,
}

/// From a worker.
#[derive(Debug, Serialize, Deserialize)]
pub enum Report {
    /// The worker can relay; with its AF_XDP sockets, bound and with full fill rings, in the order of the
    /// queues.
    Ready,
    /// Commands up to this one are done.
    Applied { sequence: u64 },
    /// The worker cannot go on and ends.
    Failed { why: String },
}

/// What a worker is made of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Setup {
    pub ingress: Ingress,
    pub cpu: Option<u32>,
    /// How long an idle worker looks for frames before it sleeps.
    pub busy_poll_us: Option<u32>,
    pub layout: Layout,
    pub log_level: String,
}

/// Where a worker's frames come from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Ingress {
    /// AF_XDP sockets that the worker makes.
    AfXdp {
        interface: String,
        /// RX queues to serve.
        queues: Vec<u32>,
        umem: UmemShape,
    },
    /// A packet socket that comes with the set-up, behind the ledger.
    AfPacket {
        ring: PacketRing,
        /// Frames that a former worker has taken out of the ring.
        taken: u64,
        /// No eBPF filter is on the socket: the worker keeps a classic one.
        classic: bool,
    },
}

/// The shape of an RX queue's UMEM and RX ring: all are powers of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UmemShape {
    /// Holds headroom and frame.
    pub chunk_bytes: u32,
    /// Chunks.
    pub frames: u32,
    /// Places in the RX ring, at most as many as chunks.
    pub rx_ring: u32,
}

/// The shape of a packet socket's receive ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PacketRing {
    /// A multiple of 16 that holds the kernel's header and a frame.
    pub slot_bytes: u32,
    /// A multiple of the page size.
    pub block_bytes: u32,
    pub blocks: u32,
}

impl PacketRing {
    pub const fn slots_per_block(self) -> u32 {
        self.block_bytes / self.slot_bytes
    }

    pub const fn slots(self) -> u32 {
        self.slots_per_block() * self.blocks
    }

    pub const fn bytes(self) -> u64 {
        self.block_bytes as u64 * self.blocks as u64
    }
}

/// A rule as a worker needs it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CompiledRule {
    pub slot: u32,
    #[serde(with = "flow_key")]
    pub key: FlowKey4,
    /// Sources that this relay itself sends from to the rule's input, where the kernel does not bar them.
    pub own_sources: Vec<Ipv4Addr>,
    pub outputs: Vec<CompiledOutput>,
}

/// An output with everything resolved that a send needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CompiledOutput {
    pub slot: u32,
    /// Egress socket and addresses, or under which reason its datagrams are dropped meanwhile.
    pub route: Result<Route, DropReason>,
    pub ttl: Ttl,
    /// The DSCP to send, or the received one.
    pub dscp: Option<u8>,
    /// Longest run of datagrams in one send; 1 without GSO.
    pub max_run: u16,
}

/// Where an output's datagrams leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    /// Id of the egress socket.
    pub socket: u32,
    pub ifindex: u32,
    pub source: Ipv4Addr,
    pub destination: Ipv4Addr,
    pub port: u16,
    /// MTU of the egress interface.
    pub mtu: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Ttl {
    Fixed(u8),
    Copy,
    Decrement,
}

/// `FlowKey4` belongs to a crate without serde.
mod flow_key {
    use mcr_common::flow::FlowKey4;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    type Parts = ([u8; 4], [u8; 4], [u8; 2]);

    pub fn serialize<S: Serializer>(key: &FlowKey4, serializer: S) -> Result<S::Ok, S::Error> {
        (key.source, key.group, key.port).serialize(serializer)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<FlowKey4, D::Error> {
        let (source, group, port) = Parts::deserialize(deserializer)?;
        Ok(FlowKey4::source_group(source, group, port))
    }
}
