//! The one header parser: Ethernet, IPv4, UDP.
//!
//! It runs in the XDP program over packet memory, in the socket filter over socket buffers and in user
//! space over slices; [`Bytes`] is all that differs. What it cannot vouch for it rejects with a reason, and nothing that it rejects is relayed.

/// Length of an Ethernet header without tags.
pub const ETHERNET_LEN: usize = 14;
/// Length of an IPv4 header without options.
pub const IPV4_LEN: usize = 20;
/// Length of a UDP header.
pub const UDP_LEN: usize = 8;
/// Where the UDP payload of an accepted frame starts.
pub const PAYLOAD_OFFSET: usize = ETHERNET_LEN + IPV4_LEN + UDP_LEN;

const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_8021Q: u16 = 0x8100;
const ETHERTYPE_8021AD: u16 = 0x88a8;
const PROTOCOL_UDP: u8 = 17;
/// More-fragments flag and fragment offset; "don't fragment" and the reserved bit are left out.
const FRAGMENT_MASK: u16 = 0x3fff;

/// How the parser reaches a frame, from its Ethernet header on.
pub trait Bytes {
    /// How many bytes the frame has. Asked once at most.
    fn frame_len(&self) -> usize;

    /// Two bytes at `offset`, or `None` where the frame ends before.
    fn pair(&self, offset: usize) -> Option<[u8; 2]>;

    /// `N` words of four bytes at `offset`, each as it lies in memory, or `None` where the frame ends before. A parser
    /// that took bytes would be compiled to take them one by one.
    fn words<const N: usize>(&self, offset: usize) -> Option<[u32; N]>;
}

impl Bytes for &[u8] {
    #[inline]
    fn frame_len(&self) -> usize {
        self.len()
    }

    #[inline]
    fn pair(&self, offset: usize) -> Option<[u8; 2]> {
        self.get(offset..offset.checked_add(2)?)?.try_into().ok()
    }

    #[inline]
    fn words<const N: usize>(&self, offset: usize) -> Option<[u32; N]> {
        let (words, _) = self.get(offset..)?.as_chunks();
        let words: &[[u8; 4]; N] = words.first_chunk()?;
        Some(words.map(u32::from_ne_bytes))
    }
}

/// A multicast UDP datagram over IPv4, headers checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Datagram {
    /// Source address, network order.
    pub source: [u8; 4],
    /// Group, network order.
    pub group: [u8; 4],
    /// Destination port, network order.
    pub port: [u8; 2],
    /// Time to live as received.
    pub ttl: u8,
    /// DSCP and ECN as received.
    pub tos: u8,
    /// Length of the UDP payload, which starts at [`PAYLOAD_OFFSET`] and lies within the frame.
    pub payload_len: u16,
    /// Length of what lies behind it in the frame.
    pub trailer_len: u32,
}

/// Why a frame is none that can be relayed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reject {
    /// IPv4 to an address outside 224.0.0.0/4.
    NotMulticast,
    /// IPv4 multicast of another protocol.
    NotUdp,
    /// Another Ethernet type.
    NotIpv4,
    /// Tagged, in the frame's bytes or beside them.
    Vlan,
    /// A fragment, the first included: only it would have a UDP header.
    Fragment,
    /// The IPv4 header carries options.
    IpOptions,
    /// The frame ends before its headers or before the length that they state.
    Truncated,
    /// Lengths or versions that contradict one another.
    Malformed,
    /// The IPv4 header's checksum is wrong.
    BadChecksum,
}

/// Parses a frame from its Ethernet header on.
///
/// Host traffic is told apart first, so that it leaves after few checks. Bytes behind the IPv4 total
/// length (Ethernet padding) and behind the UDP length are no part of the payload, as in the kernel's
/// own UDP receive path.
#[inline(always)]
pub fn parse(frame: &impl Bytes) -> Result<Datagram, Reject> {
    let ethertype = u16::from_be_bytes(frame.pair(12).ok_or(Reject::Truncated)?);
    match ethertype {
        ETHERTYPE_IPV4 => {}
        ETHERTYPE_8021Q | ETHERTYPE_8021AD => return Err(Reject::Vlan),
        _ => return Err(Reject::NotIpv4),
    }

    let ip: [u32; IPV4_LEN / 4] = frame.words(ETHERNET_LEN).ok_or(Reject::Truncated)?;
    let [version, tos, len_high, len_low] = ip[0].to_ne_bytes();
    let [_, _, fragment_high, fragment_low] = ip[1].to_ne_bytes();
    let [ttl, protocol, ..] = ip[2].to_ne_bytes();
    let (source, group) = (ip[3].to_ne_bytes(), ip[4].to_ne_bytes());
    if version >> 4 != 4 {
        return Err(Reject::Malformed);
    }
    if group[0] & 0xf0 != 0xe0 {
        return Err(Reject::NotMulticast);
    }
    if protocol != PROTOCOL_UDP {
        return Err(Reject::NotUdp);
    }
    match version & 0x0f {
        0..5 => return Err(Reject::Malformed),
        5 => {}
        _ => return Err(Reject::IpOptions),
    }
    if !header_checksum_holds(&ip) {
        return Err(Reject::BadChecksum);
    }
    if u16::from_be_bytes([fragment_high, fragment_low]) & FRAGMENT_MASK != 0 {
        return Err(Reject::Fragment);
    }
    let total_len = usize::from(u16::from_be_bytes([len_high, len_low]));
    if total_len < IPV4_LEN + UDP_LEN {
        return Err(Reject::Malformed);
    }
    let udp: [u32; UDP_LEN / 4] = frame.words(ETHERNET_LEN + IPV4_LEN).ok_or(Reject::Truncated)?;
    let frame_len = frame.frame_len();
    if frame_len < ETHERNET_LEN + total_len {
        return Err(Reject::Truncated);
    }

    let [_, _, port_high, port_low] = udp[0].to_ne_bytes();
    let [udp_len_high, udp_len_low, ..] = udp[1].to_ne_bytes();
    let udp_len = usize::from(u16::from_be_bytes([udp_len_high, udp_len_low]));
    if udp_len < UDP_LEN || udp_len > total_len - IPV4_LEN {
        return Err(Reject::Malformed);
    }

    Ok(Datagram {
        source,
        group,
        port: [port_high, port_low],
        ttl,
        tos,
        payload_len: (udp_len - UDP_LEN) as u16,
        trailer_len: (frame_len - ETHERNET_LEN - IPV4_LEN - udp_len) as u32,
    })
}

/// RFC 1071: the ones' complement sum over a header with its checksum is all ones.
#[inline(always)]
fn header_checksum_holds(ip: &[u32; IPV4_LEN / 4]) -> bool {
    fold(ip.iter().map(|word| u64::from(*word)).sum()) == 0xffff
}

/// The ones' complement sum of 16 bits (RFC 1071) of what was added up in words of 16 or 32 bits. It knows no byte order.
#[inline(always)]
pub(crate) const fn fold(sum: u64) -> u16 {
    let sum = (sum & 0xffff_ffff) + (sum >> 32);
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    ((sum & 0xffff) + (sum >> 16)) as u16
}
