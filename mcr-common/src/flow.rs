//! The compiled form of a rule's input: what a frame is looked up by, and what is found.

/// An IPv4 flow: (S,G) and port, or (*,G) and port with an all-zero source.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FlowKey4 {
    /// Source address in network order; zero for any source.
    pub source: [u8; 4],
    /// Group address in network order.
    pub group: [u8; 4],
    /// UDP destination port in network order.
    pub port: [u8; 2],
    /// Zero. Rounds the key to whole words, which hash faster.
    pub reserved: [u8; 2],
}

impl FlowKey4 {
    /// The key of one source's datagrams to a group and port.
    #[inline(always)]
    pub const fn source_group(source: [u8; 4], group: [u8; 4], port: [u8; 2]) -> Self {
        Self { source, group, port, reserved: [0; 2] }
    }

    /// The key of any source's datagrams to a group and port.
    #[inline(always)]
    pub const fn any_source(group: [u8; 4], port: [u8; 2]) -> Self {
        Self::source_group([0; 4], group, port)
    }
}

/// What the programs are told of all flows. Written after each change of them.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FlowTable {
    /// How many flows are for one source: without any, a datagram is looked up once. Written before there is one more, too.
    pub for_one_source: u32,
    /// Another number after each change.
    pub generation: u32,
}

/// What the flows of the table's [`generation`](FlowTable::generation) said of a datagram, for each CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found {
    pub key: FlowKey4,
    pub generation: u32,
    pub value: FlowValue,
}

/// How many datagrams' flows a CPU remembers; a power of two.
pub const FOUND: u32 = 64;

impl FlowKey4 {
    /// Where what was found for it is remembered: streams that differ in the last bytes of source, group or port, by which
    /// they are usually numbered, are not in each other's way.
    #[inline(always)]
    pub const fn place(&self) -> u32 {
        (self.source[3] ^ self.group[3] ^ self.port[1]) as u32 % FOUND
    }
}

/// What a flow's datagrams are for.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowValue {
    /// Slot of the rule, the index of its counters.
    pub rule: u32,
    /// One of [`action`].
    pub action: u32,
}

impl FlowValue {
    /// No rule wants the datagram.
    pub const NONE: Self = Self { rule: 0, action: action::NONE };
}

/// What is done with a flow's frames.
pub mod action {
    /// No rule wants them.
    pub const NONE: u32 = 0;
    /// Steer into the AF_XDP socket of the RX queue.
    pub const STEER: u32 = 1;
    /// Sent by this relay itself: drop in XDP, refuse in the filter, and count as a loop.
    pub const LOOP: u32 = 2;
    /// Pass in XDP, take in the filter: a packet socket's, and the host's too.
    pub const PASS: u32 = 3;
    /// Broadcast to the devices of the rule's outputs, which rewrite it.
    pub const REDIRECT: u32 = 4;
}

const _: () = assert!(size_of::<FlowKey4>() == 12 && align_of::<FlowKey4>() == 1);
const _: () = assert!(size_of::<FlowValue>() == 8 && align_of::<FlowValue>() == 4);
const _: () = assert!(size_of::<FlowTable>() == 8 && size_of::<Found>() == 24 && FOUND.is_power_of_two());

// SAFETY: repr(C) without padding, and any bit pattern is a value.
#[cfg(feature = "user")]
unsafe impl aya::Pod for FlowKey4 {}
// SAFETY: as above.
#[cfg(feature = "user")]
unsafe impl aya::Pod for FlowValue {}
// SAFETY: as above.
#[cfg(feature = "user")]
unsafe impl aya::Pod for FlowTable {}
// SAFETY: as above.
#[cfg(feature = "user")]
unsafe impl aya::Pod for Found {}
