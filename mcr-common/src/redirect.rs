//! The redirect datapath: how a frame finds its outputs inside the kernel, and what it bears when it leaves.
//!
//! The XDP program broadcasts a rule's frame to the devices of its *fan*, and puts a [`Tag`] in front of every clone.
//! The egress program on each device finds the clone's output by the tag: a fan's outputs on one device are a
//! [`Chain`] of [`Record`]s, taken in turn by the clones of one frame, in the order of the device map. A rule has
//! two fans, used by turns, so that a set of outputs is built while the former is in use and takes over at once.

use crate::parse::{IPV4_LEN, PAYLOAD_OFFSET};

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

/// Length of a tag as it stands in front of a frame.
pub const TAG_WORDS: usize = 6;

/// What the XDP program tells the egress program of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tag {
    /// Number of the frame on this CPU, from 1 on.
    pub sequence: u64,
    pub fan: u32,
}

impl Tag {
    /// In words, since frames start at even addresses and no better.
    #[inline(always)]
    pub const fn to_words(self) -> [u16; TAG_WORDS] {
        let Self { sequence, fan } = self;
        [
            sequence as u16,
            (sequence >> 16) as u16,
            (sequence >> 32) as u16,
            (sequence >> 48) as u16,
            fan as u16,
            (fan >> 16) as u16,
        ]
    }

    #[inline(always)]
    pub const fn from_words(words: [u16; TAG_WORDS]) -> Self {
        Self {
            sequence: words[0] as u64
                | (words[1] as u64) << 16
                | (words[2] as u64) << 32
                | (words[3] as u64) << 48,
            fan: words[4] as u32 | (words[5] as u32) << 16,
        }
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
pub type Headers = [u16; PAYLOAD_OFFSET / 2];

// Words of the headers.
const VERSION_TOS: usize = 7;
const TOTAL_LEN: usize = 8;
const ID: usize = 9;
const FRAGMENT: usize = 10;
const TTL_PROTOCOL: usize = 11;
const IP_CHECKSUM: usize = 12;
const SOURCE: usize = 13;
const DESTINATION: usize = 15;
const SOURCE_PORT: usize = 17;
const DESTINATION_PORT: usize = 18;
const UDP_LEN: usize = 19;
const UDP_CHECKSUM: usize = 20;

const VERSION_IHL: u8 = 0x45;
const DONT_FRAGMENT: u16 = 0x4000;
const PROTOCOL_UDP: u8 = 17;

/// Length of the IP datagram that is sent for these headers: what lies behind the UDP length is no part of it.
#[inline(always)]
pub const fn datagram_len(headers: &Headers) -> u32 {
    IPV4_LEN as u32 + u16::from_be(headers[UDP_LEN]) as u32
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
    let [received_ttl, _] = headers[TTL_PROTOCOL].to_ne_bytes();
    let ttl = match output.ttl_mode {
        ttl::COPY => received_ttl,
        ttl::DECREMENT => received_ttl.saturating_sub(1),
        _ => output.ttl,
    };
    if ttl == 0 {
        return Err(Refusal::TtlExpired);
    }
    let [_, received_tos] = headers[VERSION_TOS].to_ne_bytes();
    let tos = if output.tos_mode == tos::COPY { received_tos & !3 } else { output.tos };
    let udp_checksum = udp_checksum(headers, output);

    let [source_high, source_low] = words(output.source);
    let [destination_high, destination_low] = words(output.destination);
    let version_tos = u16::from_ne_bytes([VERSION_IHL, tos]);
    let total_len = (len as u16).to_be();
    let ttl_protocol = u16::from_ne_bytes([ttl, PROTOCOL_UDP]);
    let ip_checksum = !fold(sum(&[
        version_tos,
        total_len,
        DONT_FRAGMENT.to_be(),
        ttl_protocol,
        source_high,
        source_low,
        destination_high,
        destination_low,
    ]));

    [headers[0], headers[1], headers[2]] = mac(output.destination_mac);
    [headers[3], headers[4], headers[5]] = mac(output.source_mac);
    headers[VERSION_TOS] = version_tos;
    headers[TOTAL_LEN] = total_len;
    headers[ID] = 0;
    headers[FRAGMENT] = DONT_FRAGMENT.to_be();
    headers[TTL_PROTOCOL] = ttl_protocol;
    headers[IP_CHECKSUM] = ip_checksum;
    headers[SOURCE] = source_high;
    headers[SOURCE + 1] = source_low;
    headers[DESTINATION] = destination_high;
    headers[DESTINATION + 1] = destination_low;
    headers[SOURCE_PORT] = u16::from_ne_bytes(output.source_port);
    headers[DESTINATION_PORT] = u16::from_ne_bytes(output.destination_port);
    headers[UDP_CHECKSUM] = udp_checksum;
    Ok(())
}

/// The UDP checksum that goes with an output's addresses and ports; 0 for none.
#[inline(always)]
fn udp_checksum(headers: &Headers, output: &Rewrite) -> u16 {
    let checksum = headers[UDP_CHECKSUM];
    let addresses =
        sum(&[headers[SOURCE], headers[SOURCE + 1], headers[DESTINATION], headers[DESTINATION + 1]]);
    let pseudo_header =
        addresses + u32::from(u16::from_ne_bytes([0, PROTOCOL_UDP])) + u32::from(headers[UDP_LEN]);
    if checksum == 0 || checksum == fold(pseudo_header) {
        return 0;
    }
    let former = fold(addresses + sum(&[headers[SOURCE_PORT], headers[DESTINATION_PORT]]));
    let new = sum(&words(output.source))
        + sum(&words(output.destination))
        + u32::from(u16::from_ne_bytes(output.source_port))
        + u32::from(u16::from_ne_bytes(output.destination_port));
    match !fold(u32::from(!checksum) + u32::from(!former) + new) {
        0 => 0xffff,
        checksum => checksum,
    }
}

#[inline(always)]
const fn words(address: [u8; 4]) -> [u16; 2] {
    [u16::from_ne_bytes([address[0], address[1]]), u16::from_ne_bytes([address[2], address[3]])]
}

#[inline(always)]
const fn mac(address: [u8; 6]) -> [u16; 3] {
    [
        u16::from_ne_bytes([address[0], address[1]]),
        u16::from_ne_bytes([address[2], address[3]]),
        u16::from_ne_bytes([address[4], address[5]]),
    ]
}

#[inline(always)]
fn sum<const N: usize>(words: &[u16; N]) -> u32 {
    let mut sum = 0;
    let mut word = 0;
    while word < N {
        sum += u32::from(words[word]);
        word += 1;
    }
    sum
}

/// The ones' complement sum of 16 bits (RFC 1071), which knows no byte order.
#[inline(always)]
const fn fold(sum: u32) -> u16 {
    let sum = (sum & 0xffff) + (sum >> 16);
    ((sum & 0xffff) + (sum >> 16)) as u16
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
