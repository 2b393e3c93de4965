//! What happens to the supervisor, and what it does about it.

use std::{collections::BTreeMap, fmt, time::Duration};

use mcr_common::flow::{FlowKey4, FlowValue};

use crate::{
    ebpf::{RedirectOutput, Sets},
    net::{egress_socket::EgressKey, links::Links, membership::Membership, neighbours::NextHops},
    rule::{Datapath, IfIndex, InterfaceName, RuleSlot},
    worker::protocol::{CompiledRule, PacketRing},
};

/// A worker: its interface and datapath, and its place among their workers.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct WorkerId {
    pub interface: InterfaceName,
    pub datapath: Datapath,
    pub index: u32,
}

impl WorkerId {
    /// Whether it serves a datapath of an interface.
    pub fn is_of(&self, interface: &InterfaceName, datapath: Datapath) -> bool {
        self.interface == *interface && self.datapath == datapath
    }
}

impl fmt::Display for WorkerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = if self.datapath == Datapath::AfPacket { "packet" } else { "xdp" };
        write!(f, "{}/{kind}{}", self.interface, self.index)
    }
}

/// What a worker is to serve.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkerSpec {
    pub ifindex: IfIndex,
    pub cpu: Option<u32>,
    pub source: FrameSource,
}

/// Where a worker's frames come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FrameSource {
    /// RX queues, with UMEMs of such chunks.
    AfXdp { queues: Vec<u32>, chunk_bytes: u32 },
    /// The worker's packet socket.
    AfPacket,
}

impl FrameSource {
    /// RX queues, none of a packet socket.
    pub fn queues(&self) -> &[u32] {
        match self {
            Self::AfXdp { queues, .. } => queues,
            Self::AfPacket => &[],
        }
    }
}

/// The packet sockets of an interface. They are made before any flow is theirs, and stay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fanout {
    pub sockets: u32,
    pub ring: PacketRing,
}

/// A membership, and whether it is to outlive the daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Joined {
    pub membership: Membership,
    pub outlives: bool,
}

/// What the kernel has on an interface of a daemon that is gone.
#[derive(Clone, Debug, Default)]
pub struct Inheritance {
    pub flows: Vec<(FlowKey4, FlowValue)>,
    pub sets: Sets,
    /// A program runs there that ours is to succeed: it has its own maps, and goes on by them until then.
    pub to_succeed: bool,
}

/// Which interfaces take frames that the kernel redirects, and what of theirs that would pass by.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Targets {
    /// Of each interface that was asked: why it takes none, if it takes none.
    pub refusals: BTreeMap<InterfaceName, Option<String>>,
    /// Of each interface that was asked: the firewall or the shaping that is in place there, if any is.
    pub hooks: BTreeMap<InterfaceName, Option<String>>,
    /// Frames that wait for each interface that was asked at most, if it says so.
    pub queues: BTreeMap<InterfaceName, u32>,
}

/// What happens beside the operator's commands.
#[derive(Clone, Debug)]
pub enum Event {
    /// The interfaces are these now.
    Links(Links),
    /// The hosts of outputs are found there now.
    NextHops(NextHops),
    /// A worker process has ended.
    WorkerExited { id: WorkerId, why: String, lived: Duration },
    /// The pause after a worker's end is over.
    RestartDue { id: WorkerId },
    /// What the kernel can do by itself, and what that would pass by, is this now.
    Targets(Targets),
    /// What could not be joined is to be tried again.
    JoinsDue,
    /// The daemon is to end; what the kernel does by itself goes on if that is to be kept.
    Stop { keep: bool },
}

/// Why an effect could not be carried out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Failure {
    /// What it was to do cannot be done now.
    Refused(String),
    /// The worker that was to do it is of no use any more and is being ended.
    Worker { id: WorkerId, why: String },
}

/// What is to be done, in the order in which it is said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Make an interface's maps.
    Prepare {
        interface: InterfaceName,
    },
    /// Attach the XDP program to a prepared interface.
    Attach {
        interface: InterfaceName,
    },
    /// Open the packet sockets of a prepared interface.
    OpenFanout {
        interface: InterfaceName,
        fanout: Fanout,
    },
    /// Give up all that an interface was prepared with.
    Detach {
        interface: InterfaceName,
    },
    /// Start a worker; nothing is steered to it yet.
    StartWorker {
        id: WorkerId,
        spec: WorkerSpec,
    },
    /// Let a worker take frames, and put its AF_XDP sockets into the XSKMAP: it has its rules.
    Steer {
        id: WorkerId,
    },
    /// Let a worker relay what it holds, and end it.
    StopWorker {
        id: WorkerId,
    },
    /// Send the event `RestartDue` then.
    RestartAfter {
        id: WorkerId,
        delay: Duration,
    },
    OpenEgress {
        id: WorkerId,
        socket: u32,
        key: EgressKey,
    },
    CloseEgress {
        id: WorkerId,
        socket: u32,
    },
    /// Give a worker a rule, and wait until it has taken it.
    UpsertRule {
        id: WorkerId,
        rule: CompiledRule,
    },
    /// Take a rule from a worker, and wait until it has let go.
    RemoveRule {
        id: WorkerId,
        slot: RuleSlot,
    },
    /// Give rules the outputs that the kernel sends their datagrams on to by itself; no frame leaves by their former
    /// ones any more when it is done.
    SetOutputs {
        interface: InterfaceName,
        rules: Vec<(RuleSlot, Vec<RedirectOutput>)>,
    },
    /// Take from rules, which no flow feeds any more, the outputs that the kernel has for them.
    DropOutputs {
        interface: InterfaceName,
        rules: Vec<RuleSlot>,
    },
    SetFlow {
        interface: InterfaceName,
        key: FlowKey4,
        value: FlowValue,
    },
    DeleteFlow {
        interface: InterfaceName,
        key: FlowKey4,
    },
    /// Wait until no program that runs can still act on a deleted flow.
    Barrier,
    Join(Joined),
    Leave(Joined),
}
