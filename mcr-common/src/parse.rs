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
    /// Whether the frame has at least `len` bytes.
    fn reaches(&self, len: usize) -> bool;

    /// `N` bytes at `offset`, or `None` where the frame ends before.
    fn at<const N: usize>(&self, offset: usize) -> Option<[u8; N]>;
}

impl Bytes for &[u8] {
    #[inline]
    fn reaches(&self, len: usize) -> bool {
        len <= self.len()
    }

    #[inline]
    fn at<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        self.get(offset..offset.checked_add(N)?)?.try_into().ok()
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
    let ethertype = u16::from_be_bytes(frame.at(12).ok_or(Reject::Truncated)?);
    match ethertype {
        ETHERTYPE_IPV4 => {}
        ETHERTYPE_8021Q | ETHERTYPE_8021AD => return Err(Reject::Vlan),
        _ => return Err(Reject::NotIpv4),
    }

    let ip: [u8; IPV4_LEN] = frame.at(ETHERNET_LEN).ok_or(Reject::Truncated)?;
    let group = [ip[16], ip[17], ip[18], ip[19]];
    if ip[0] >> 4 != 4 {
        return Err(Reject::Malformed);
    }
    if group[0] & 0xf0 != 0xe0 {
        return Err(Reject::NotMulticast);
    }
    if ip[9] != PROTOCOL_UDP {
        return Err(Reject::NotUdp);
    }
    match ip[0] & 0x0f {
        0..5 => return Err(Reject::Malformed),
        5 => {}
        _ => return Err(Reject::IpOptions),
    }
    if !header_checksum_holds(&ip) {
        return Err(Reject::BadChecksum);
    }
    if u16::from_be_bytes([ip[6], ip[7]]) & FRAGMENT_MASK != 0 {
        return Err(Reject::Fragment);
    }
    let total_len = u16::from_be_bytes([ip[2], ip[3]]) as usize;
    if total_len < IPV4_LEN + UDP_LEN {
        return Err(Reject::Malformed);
    }
    let udp: [u8; UDP_LEN] = frame.at(ETHERNET_LEN + IPV4_LEN).ok_or(Reject::Truncated)?;
    if !frame.reaches(ETHERNET_LEN + total_len) {
        return Err(Reject::Truncated);
    }

    let udp_len = u16::from_be_bytes([udp[4], udp[5]]) as usize;
    if udp_len < UDP_LEN || udp_len > total_len - IPV4_LEN {
        return Err(Reject::Malformed);
    }

    Ok(Datagram {
        source: [ip[12], ip[13], ip[14], ip[15]],
        group,
        port: [udp[2], udp[3]],
        ttl: ip[8],
        tos: ip[1],
        payload_len: (udp_len - UDP_LEN) as u16,
    })
}

/// RFC 1071: the ones' complement sum over a header with its checksum is all ones.
#[inline(always)]
fn header_checksum_holds(ip: &[u8; IPV4_LEN]) -> bool {
    let mut sum = 0u32;
    let mut i = 0;
    while i < IPV4_LEN {
        // The sum knows no byte order.
        sum += u32::from(u16::from_ne_bytes([ip[i], ip[i + 1]]));
        i += 2;
    }
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    sum == 0xffff
}
