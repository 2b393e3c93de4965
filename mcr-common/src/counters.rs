//! What the XDP program and the socket filter count, per CPU.

use crate::parse::Reject;

/// Counters of one rule on one interface. Bytes are UDP payload bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RuleCounters {
    /// Datagrams of the rule's flows seen on the wire; each segment of a super-packet is one.
    pub matched: u64,
    /// Their UDP payload bytes.
    pub matched_bytes: u64,
    /// Of these: no worker had a socket on the RX queue; passed to the host.
    pub no_worker: u64,
    /// Of these: sent by this relay itself; dropped.
    pub looped: u64,
    /// Of these: broadcast to the rule's outputs.
    pub redirected: u64,
    /// Of these: to be redirected, and the rule has no outputs; dropped.
    pub no_output: u64,
    /// Of these: to be redirected, and the driver could not cut what lies behind the datagram; passed to the host.
    pub not_redirected: u64,
    /// UDP payload bytes of the redirected and of those without output.
    pub redirect_bytes: u64,
}

impl RuleCounters {
    /// How many there are.
    pub const COUNT: usize = 8;

    /// The counters, in the order of the fields.
    pub const fn to_words(self) -> [u64; Self::COUNT] {
        let Self {
            matched,
            matched_bytes,
            no_worker,
            looped,
            redirected,
            no_output,
            not_redirected,
            redirect_bytes,
        } = self;
        [matched, matched_bytes, no_worker, looped, redirected, no_output, not_redirected, redirect_bytes]
    }

    pub const fn from_words(words: [u64; Self::COUNT]) -> Self {
        let [
            matched,
            matched_bytes,
            no_worker,
            looped,
            redirected,
            no_output,
            not_redirected,
            redirect_bytes,
        ] = words;
        Self {
            matched,
            matched_bytes,
            no_worker,
            looped,
            redirected,
            no_output,
            not_redirected,
            redirect_bytes,
        }
    }

    /// The sum, counter by counter. It wraps.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self::from_words(add_words(self.to_words(), other.to_words()))
    }

    /// The difference, counter by counter. It wraps.
    #[must_use]
    pub fn minus(self, other: Self) -> Self {
        self.plus(Self::from_words(other.to_words().map(u64::wrapping_neg)))
    }
}

/// The sum of each two. It wraps.
pub fn add_words<const N: usize>(mut words: [u64; N], others: [u64; N]) -> [u64; N] {
    for (word, other) in words.iter_mut().zip(others) {
        *word = word.wrapping_add(other);
    }
    words
}

/// Counters of one output that the kernel itself serves.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OutputCounters {
    /// Datagrams rewritten and given to the device.
    pub rewritten: u64,
    /// Their UDP payload bytes.
    pub rewritten_bytes: u64,
    /// Dropped: longer than the egress MTU takes.
    pub too_big: u64,
    /// Dropped: no TTL left.
    pub ttl_expired: u64,
}

/// Counters of one RX queue.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueCounters {
    /// Frames redirected to the queue's AF_XDP socket.
    pub steered: u64,
}

/// What is to become of a frame; each is a counter of [`Verdicts`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Steered,
    NoWorker,
    Looped,
    Redirected,
    NoOutput,
    NotRedirected,
    AfPacket,
    NoRule,
    NotMulticast,
    NotUdp,
    NotIpv4,
    Vlan,
    Fragment,
    IpOptions,
    Truncated,
    Malformed,
    BadChecksum,
}

impl From<Reject> for Verdict {
    #[inline(always)]
    fn from(reject: Reject) -> Self {
        match reject {
            Reject::NotMulticast => Self::NotMulticast,
            Reject::NotUdp => Self::NotUdp,
            Reject::NotIpv4 => Self::NotIpv4,
            Reject::Vlan => Self::Vlan,
            Reject::Fragment => Self::Fragment,
            Reject::IpOptions => Self::IpOptions,
            Reject::Truncated => Self::Truncated,
            Reject::Malformed => Self::Malformed,
            Reject::BadChecksum => Self::BadChecksum,
        }
    }
}

/// What one of the two programs made of every frame of an interface. The fields add up to the frames seen.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Verdicts {
    /// Redirected to an AF_XDP socket, or by the filter given to a packet socket.
    pub steered: u64,
    /// Matched, but no AF_XDP socket on the RX queue; passed.
    pub no_worker: u64,
    /// Matched, but sent by this relay; dropped by the XDP program, left to the host by the filter.
    pub looped: u64,
    /// Broadcast to the devices of the rule's outputs.
    pub redirected: u64,
    /// Matched by a rule that redirects and has no outputs; dropped.
    pub no_output: u64,
    /// Matched by a rule that redirects, but the driver could not cut what lies behind the datagram; passed.
    pub not_redirected: u64,
    /// Matched by a rule that AF_PACKET serves; passed by the XDP program, to the filter.
    pub af_packet: u64,
    /// Multicast UDP that no rule wants; passed, like all that follow.
    pub no_rule: u64,
    /// IPv4 to a unicast or broadcast address.
    pub not_multicast: u64,
    /// IPv4 multicast of another protocol (IGMP, PIM, OSPF ...).
    pub not_udp: u64,
    /// Another Ethernet type (ARP, IPv6 ...).
    pub not_ipv4: u64,
    /// Tagged (802.1Q, 802.1ad), in the frame's bytes or, where the filter sees it, beside them.
    pub vlan: u64,
    /// A fragment of a multicast UDP datagram.
    pub fragment: u64,
    /// Multicast UDP with IP options.
    pub ip_options: u64,
    /// The frame ends before its headers or the length that they state.
    pub truncated: u64,
    /// Lengths or versions that contradict one another.
    pub malformed: u64,
    /// The IPv4 header checksum is wrong.
    pub bad_checksum: u64,
}

impl Verdicts {
    /// How many there are.
    pub const COUNT: usize = 17;

    /// The counter of a verdict. Not by its number: a pointer to the field of a number is arithmetic that takes `CAP_PERFMON`.
    #[inline(always)]
    pub const fn of(&mut self, verdict: Verdict) -> &mut u64 {
        match verdict {
            Verdict::Steered => &mut self.steered,
            Verdict::NoWorker => &mut self.no_worker,
            Verdict::Looped => &mut self.looped,
            Verdict::Redirected => &mut self.redirected,
            Verdict::NoOutput => &mut self.no_output,
            Verdict::NotRedirected => &mut self.not_redirected,
            Verdict::AfPacket => &mut self.af_packet,
            Verdict::NoRule => &mut self.no_rule,
            Verdict::NotMulticast => &mut self.not_multicast,
            Verdict::NotUdp => &mut self.not_udp,
            Verdict::NotIpv4 => &mut self.not_ipv4,
            Verdict::Vlan => &mut self.vlan,
            Verdict::Fragment => &mut self.fragment,
            Verdict::IpOptions => &mut self.ip_options,
            Verdict::Truncated => &mut self.truncated,
            Verdict::Malformed => &mut self.malformed,
            Verdict::BadChecksum => &mut self.bad_checksum,
        }
    }

    /// Every counter with its name, in the order of the fields.
    pub const fn named(&self) -> [(&'static str, u64); Self::COUNT] {
        [
            ("steered", self.steered),
            ("no_worker", self.no_worker),
            ("looped", self.looped),
            ("redirected", self.redirected),
            ("no_output", self.no_output),
            ("not_redirected", self.not_redirected),
            ("af_packet", self.af_packet),
            ("no_rule", self.no_rule),
            ("not_multicast", self.not_multicast),
            ("not_udp", self.not_udp),
            ("not_ipv4", self.not_ipv4),
            ("vlan", self.vlan),
            ("fragment", self.fragment),
            ("ip_options", self.ip_options),
            ("truncated", self.truncated),
            ("malformed", self.malformed),
            ("bad_checksum", self.bad_checksum),
        ]
    }
}

const _: () = assert!(size_of::<RuleCounters>() == RuleCounters::COUNT * 8);
const _: () = assert!(size_of::<QueueCounters>() == 8);
const _: () = assert!(size_of::<OutputCounters>() == 4 * 8);
const _: () = assert!(size_of::<Verdicts>() == Verdicts::COUNT * 8);

// SAFETY: repr(C), u64 fields only: no padding, any bit pattern is a value.
#[cfg(feature = "user")]
unsafe impl aya::Pod for RuleCounters {}
// SAFETY: as above.
#[cfg(feature = "user")]
unsafe impl aya::Pod for QueueCounters {}
// SAFETY: as above.
#[cfg(feature = "user")]
unsafe impl aya::Pod for OutputCounters {}
// SAFETY: as above.
#[cfg(feature = "user")]
unsafe impl aya::Pod for Verdicts {}
