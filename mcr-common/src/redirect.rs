//! The redirect datapath: how a frame finds its outputs inside the kernel, and what it bears when it leaves.
//!
//! The XDP program broadcasts a rule's frame to the devices of its *fan*, and puts a [`Tag`] into every clone, in the place of
//! its MAC addresses, which the egress program writes anew.
//! The egress program on each device finds the clone's output by the tag: a fan's outputs on one device are a
//! [`Chain`] of [`Record`]s, taken in turn by the clones of one frame, in the order of the device map. A rule has
//! two fans, used by turns, so that a set of outputs is built while the former is in use and takes over at once.

use crate::parse::{IPV4_LEN, PAYLOAD_OFFSET, fold};

/// Most outputs of a fan.
pub const MOST_OUTPUTS: u32 = 256;

/// No record: a chain's end.
pub const NO_RECORD: u32 = u32::MAX;

/// The kernel gives a device frames this much longer than its MTU, and skips it in silence beyond: room for a tag.
pub const MTU_SLACK: u32 = 4;

/// How to read [`Rewrite::ttl_mode`].
pub mod ttl {
    /// Send [`Rewrite::ttl`](super::Rewrite::ttl).
    pub const FIXED: u8 = 0;
    /// Send the one received.
    pub const COPY: u8 = 1;
    /// Send the one received less one.
    pub const DECREMENT: u8 = 2;
}

/// How to read [`Rewrite::tos_mode`].
pub mod tos {
    /// Send [`Rewrite::tos`](super::Rewrite::tos).
    pub const FIXED: u8 = 0;
    /// Send the DSCP received, with ECN cleared.
    pub const COPY: u8 = 1;
}

/// What an output's datagrams bear. Addresses and ports in network order.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rewrite {
    pub destination_mac: [u8; 6],
    pub source_mac: [u8; 6],
    pub source: [u8; 4],
    pub destination: [u8; 4],
    pub source_port: [u8; 2],
    pub destination_port: [u8; 2],
    /// One of [`ttl`].
    pub ttl_mode: u8,
    pub ttl: u8,
    /// One of [`tos`].
    pub tos_mode: u8,
    /// DSCP in the upper six bits, ECN 0.
    pub tos: u8,
    /// Longest IP datagram, headers included, that may leave.
    pub mtu: u32,
}

/// An output in its places: in the fan, and among the fan's outputs on one device.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    pub rewrite: Rewrite,
    /// Slot of the output, the key of its counters.
    pub output: u32,
    /// Record of the fan's next output on the same device.
    pub next: u32,
    /// Record of the fan's next output on any device.
    pub after: u32,
}

/// A fan, for each CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fan {
    /// Frames broadcast by this CPU; the last one's number is its [`Tag::sequence`]. Only goes on.
    pub frames: u64,
    /// The smallest MTU among its outputs.
    pub mtu: u32,
    /// Its first record.
    pub first: u32,
    /// How many outputs it has.
    pub outputs: u32,
    /// Interface index of the first output's device.
    pub device: u32,
    /// The chain on that device. Those on others are looked for.
    pub chain: Chain,
}

/// Index of one of a rule's two fans. `bank` is 1 or 2.
#[inline(always)]
pub const fn fan(rule: u32, bank: u32) -> u32 {
    2 * rule + bank - 1
}

/// Index of an output's record in one of its rule's two fans. `bank` is 1 or 2.
#[inline(always)]
pub const fn record(output: u32, bank: u32) -> u32 {
    2 * output + bank - 1
}

/// A fan's outputs on one device.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ChainKey {
    pub fan: u32,
    /// Interface index of the device.
    pub device: u32,
}

/// How far the clones of a frame have come on a device, for each CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Chain {
    /// Of the last frame seen; 0 before the first.
    pub sequence: u64,
    /// Record of that frame's next clone.
    pub next: u32,
    /// Record of a frame's first clone.
    pub first: u32,
}

/// Length of a tag, which stands in a frame where its MAC addresses were.
pub const TAG_LEN: usize = 12;

/// What the XDP program tells the egress program of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tag {
    /// Number of the frame on this CPU, from 1 on.
    pub sequence: u64,
    pub fan: u32,
}

impl Tag {
    #[inline(always)]
    pub const fn to_words(self) -> [u32; TAG_LEN / 4] {
        [self.sequence as u32, (self.sequence >> 32) as u32, self.fan]
    }

    /// The tag at the beginning of a frame.
    #[inline(always)]
    pub fn of(headers: &Headers) -> Self {
        let [low, high, fan] = [long(headers, 0), long(headers, 4), long(headers, 8)];
        Self { sequence: high << 32 | low, fan: fan as u32 }
    }
}

/// Why a datagram does not leave by an output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Longer than [`Rewrite::mtu`]; it would have to be fragmented.
    TooBig,
    /// Its TTL would be 0.
    TtlExpired,
}

/// Ethernet, IPv4 and UDP headers of a frame that the parser accepts, as they lie in memory.
pub type Headers = [u8; PAYLOAD_OFFSET];

// Where they are.
const DESTINATION_MAC: usize = 0;
const SOURCE_MAC: usize = 6;
const VERSION: usize = 14;
const TOS: usize = 15;
const ID: usize = 18;
const TTL: usize = 22;
const SOURCE: usize = 26;
const DESTINATION: usize = 30;
const PORTS: usize = 34;
const UDP_LENGTH: usize = 38;
const UDP_CHECKSUM: usize = 40;

const VERSION_IHL: u8 = 0x45;
/// IP ID 0, DF, no offset.
const NEVER_FRAGMENTED: [u8; 4] = [0, 0, 0x40, 0];
const PROTOCOL_UDP: u8 = 17;

/// Length of the IP datagram that is sent for these headers: what lies behind the UDP length is no part of it.
#[inline(always)]
pub const fn datagram_len(headers: &Headers) -> u32 {
    IPV4_LEN as u32 + u16::from_be_bytes([headers[UDP_LENGTH], headers[UDP_LENGTH + 1]]) as u32
}

/// Makes the headers of a received datagram those of the one that an output sends, or leaves them as they are.
///
/// IP ID 0 and DF are those of a datagram that is never fragmented (RFC 6864). The IP checksum is computed anew. The UDP
/// checksum is updated (RFC 1624); where the sender left it unfinished, so that it is the pseudo header's alone, or
/// out, none is sent, as IPv4 allows (RFC 768).
#[inline(always)]
pub fn rewrite(headers: &mut Headers, output: &Rewrite) -> Result<(), Refusal> {
    let len = datagram_len(headers);
    if len > output.mtu {
        return Err(Refusal::TooBig);
    }
    let ttl = match output.ttl_mode {
        ttl::COPY => headers[TTL],
        ttl::DECREMENT => headers[TTL].saturating_sub(1),
        _ => output.ttl,
    };
    if ttl == 0 {
        return Err(Refusal::TtlExpired);
    }
    let tos = if output.tos_mode == tos::COPY { headers[TOS] & !3 } else { output.tos };
    let udp_checksum = udp_checksum(headers, output);
    let [len_high, len_low] = (len as u16).to_be_bytes();
    let version = [VERSION_IHL, tos, len_high, len_low];
    let ip_sum = long(&version, 0)
        + long(&NEVER_FRAGMENTED, 0)
        + long(&[ttl, PROTOCOL_UDP, 0, 0], 0)
        + long(&output.source, 0)
        + long(&output.destination, 0);
    let [checksum_high, checksum_low] = (!fold(ip_sum)).to_ne_bytes();
    let [from_high, from_low] = output.source_port;
    let [to_high, to_low] = output.destination_port;

    put(headers, DESTINATION_MAC, output.destination_mac);
    put(headers, SOURCE_MAC, output.source_mac);
    put(headers, VERSION, version);
    put(headers, ID, NEVER_FRAGMENTED);
    put(headers, TTL, [ttl, PROTOCOL_UDP, checksum_high, checksum_low]);
    put(headers, SOURCE, output.source);
    put(headers, DESTINATION, output.destination);
    put(headers, PORTS, [from_high, from_low, to_high, to_low]);
    put(headers, UDP_CHECKSUM, udp_checksum.to_ne_bytes());
    Ok(())
}

/// Less three words it is the sum of their complements: what adding these subtracts.
const THREE_WORDS: u64 = 3 * u32::MAX as u64;

/// The UDP checksum that goes with an output's addresses and ports; 0 for none.
#[inline(always)]
fn udp_checksum(headers: &Headers, output: &Rewrite) -> u16 {
    let checksum = u16::from_ne_bytes([headers[UDP_CHECKSUM], headers[UDP_CHECKSUM + 1]]);
    let addresses = long(headers, SOURCE) + long(headers, DESTINATION);
    let length = u16::from_ne_bytes([headers[UDP_LENGTH], headers[UDP_LENGTH + 1]]);
    let pseudo_header = addresses + u64::from(u16::from_ne_bytes([0, PROTOCOL_UDP])) + u64::from(length);
    if checksum == 0 || checksum == fold(pseudo_header) {
        return 0;
    }
    let less_former = THREE_WORDS - (addresses + long(headers, PORTS));
    let [from_high, from_low] = output.source_port;
    let [to_high, to_low] = output.destination_port;
    let new = long(&output.source, 0)
        + long(&output.destination, 0)
        + long(&[from_high, from_low, to_high, to_low], 0);
    match !fold(u64::from(!checksum) + less_former + new) {
        0 => 0xffff,
        checksum => checksum,
    }
}

/// Four bytes as they lie in memory, to be added up.
#[inline(always)]
fn long<const N: usize>(bytes: &[u8; N], at: usize) -> u64 {
    u64::from(u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]))
}

#[inline(always)]
fn put<const N: usize>(headers: &mut Headers, at: usize, bytes: [u8; N]) {
    headers[at..at + N].copy_from_slice(&bytes);
}

const _: () = assert!(size_of::<Rewrite>() == 32 && align_of::<Rewrite>() == 4);
const _: () = assert!(size_of::<Record>() == 44 && size_of::<Fan>() == 40);
const _: () = assert!(size_of::<ChainKey>() == 8 && size_of::<Chain>() == 16);

// SAFETY: repr(C) without padding, and any bit pattern is a value.
#[cfg(feature = "user")]
unsafe impl aya::Pod for Record {}
// SAFETY: as above.
#[cfg(feature = "user")]
unsafe impl aya::Pod for Fan {}
// SAFETY: as above.
#[cfg(feature = "user")]
unsafe impl aya::Pod for ChainKey {}
// SAFETY: as above.
#[cfg(feature = "user")]
unsafe impl aya::Pod for Chain {}
