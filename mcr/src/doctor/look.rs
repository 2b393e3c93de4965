//! A short passive look at the wire: which groups arrive, from whom, and whether somebody asks for memberships.
//!
//! Packet sockets that take the beginning of the frames of some groups, and of IGMP. They see what XDP programs pass. A look
//! is bounded by time and by frames, so that it costs a stream that passes by little; nothing is joined and nothing sent.

use std::{
    collections::BTreeSet,
    io,
    net::Ipv4Addr,
    os::fd::AsFd,
    time::{Duration, Instant},
};

use mcr_common::parse::{ETHERNET_LEN, Reject, parse};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use socket2::{Domain, Protocol, Socket, Type};

use super::facts::{Fate, Look, Sighting};
use crate::{
    net::packet_socket,
    rule::{IfIndex, InterfaceName},
    sys::{multicast, netlink::bytes, packet_tap, socket_option},
    worker::ingress::Frame,
};

/// Frames after which no more is looked at on an interface.
const MOST_FRAMES: u64 = 4096;

/// Bytes of each frame: the longest IPv4 header and a UDP header, or the beginning of an IGMP query.
const SNAP: usize = 128;

/// Groups that a filter names; of more it lets all in. A jump of a classic filter spans 255 instructions.
const MOST_GROUPS: usize = 200;

const IGMP: u8 = 2;
const QUERY: u8 = 0x11;

/// What a frame tells.
#[derive(Debug, PartialEq, Eq)]
enum Word {
    Query(Ipv4Addr),
    Of { group: Ipv4Addr, source: Ipv4Addr, fate: Fate },
}

/// Looks at these interfaces for these groups, for so long.
pub fn look(interfaces: &[(InterfaceName, IfIndex)], groups: &BTreeSet<Ipv4Addr>, lasts: Duration) -> Look {
    let mut look = Look { lasted: lasts, ..Look::default() };
    let mut taps = Vec::new();
    for (name, index) in interfaces {
        match open(*index, groups) {
            Ok(socket) => taps.push((name, socket, 0)),
            Err(error) => look.refused = Some(format!("{name}: {error}")),
        }
    }
    let end = Instant::now() + lasts;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return look;
        }
        let mut waiting: Vec<_> =
            taps.iter().map(|(_, socket, _)| PollFd::new(socket.as_fd(), PollFlags::POLLIN)).collect();
        let timeout = PollTimeout::try_from(left.as_millis() + 1).unwrap_or(PollTimeout::MAX);
        // What cannot be waited for is waited out.
        let ready = poll(&mut waiting, timeout).unwrap_or(0);
        if ready > 0 {
            for (name, socket, frames) in &mut taps {
                drain(&mut look, name, socket, frames);
            }
            taps.retain(|(_, _, frames)| *frames < MOST_FRAMES);
        }
    }
}

fn open(index: IfIndex, groups: &BTreeSet<Ipv4Addr>) -> io::Result<Socket> {
    let socket = Socket::new(Domain::PACKET, Type::RAW.cloexec().nonblocking(), Some(Protocol::from(0)))?;
    socket_option::attach_filter(&socket, &mut filter(groups))?;
    socket_option::set(&socket, libc::SOL_PACKET, libc::PACKET_IGNORE_OUTGOING, &1)?;
    packet_tap::enable(&socket)?;
    packet_socket::bind(&socket, index)?;
    Ok(socket)
}

/// Lets in IGMP and the frames of these groups, and of each the beginning.
fn filter(groups: &BTreeSet<Ipv4Addr>) -> Vec<libc::sock_filter> {
    const LOAD_HALF: u16 = 0x28;
    const LOAD_BYTE: u16 = 0x30;
    const LOAD_WORD: u16 = 0x20;
    const IF_EQUAL: u16 = 0x15;
    const IF_AT_LEAST: u16 = 0x35;
    const RETURN: u16 = 0x06;
    let step = |code, k, jt, jf| libc::sock_filter { code, jt, jf, k };
    let mut last = vec![step(RETURN, 0, 0, 0), step(RETURN, SNAP as u32, 0, 0)];
    let wanted: Vec<u32> = groups.iter().map(|group| group.to_bits()).collect();
    let tests: Vec<_> = match &wanted[..] {
        many if many.len() > MOST_GROUPS => vec![step(IF_AT_LEAST, 0xe000_0000, 1, 0)],
        few => few
            .iter()
            .enumerate()
            .map(|(n, group)| step(IF_EQUAL, *group, (few.len() - n) as u8, 0))
            .collect(),
    };
    let to_refusal = tests.len() as u8;
    let mut program = vec![
        step(LOAD_HALF, 12, 0, 0),
        step(IF_EQUAL, 0x0800, 0, 3 + to_refusal),
        step(LOAD_BYTE, ETHERNET_LEN as u32 + 9, 0, 0),
        step(IF_EQUAL, IGMP.into(), 2 + to_refusal, 0),
        step(LOAD_WORD, ETHERNET_LEN as u32 + 16, 0, 0),
    ];
    program.extend(tests);
    program.append(&mut last);
    program
}

/// Takes what has come.
fn drain(look: &mut Look, name: &InterfaceName, socket: &Socket, frames: &mut u64) {
    let mut buffer = [0; SNAP];
    while *frames < MOST_FRAMES {
        let Ok(tapped) = packet_tap::receive(socket, &mut buffer) else { return };
        *frames += 1;
        let frame = Frame { bytes: &buffer[..tapped.captured], len: tapped.length, segment: 0 };
        match read(&frame, tapped.vlan) {
            Some(Word::Query(from)) => {
                look.queriers.insert(name.clone(), from);
            }
            Some(Word::Of { group, source, fate }) => {
                let sighting = Sighting { interface: name.clone(), group, source, fate };
                *look.seen.entry(sighting).or_default() += 1;
            }
            None => {}
        }
    }
    // Nothing more is wanted, and nothing more is to be paid for.
    let _ = multicast::receive_nothing(socket);
}

/// Reads a frame whose tag is beside it.
fn read(frame: &Frame<'_>, vlan: Option<u16>) -> Option<Word> {
    let address = |at| bytes(frame.bytes, ETHERNET_LEN + at).map(|octets: [u8; 4]| Ipv4Addr::from(octets));
    let (source, group) = (address(12)?, address(16)?);
    let [protocol] = bytes(frame.bytes, ETHERNET_LEN + 9)?;
    if protocol == IGMP {
        let [first] = bytes(frame.bytes, ETHERNET_LEN)?;
        let [kind] = bytes(frame.bytes, ETHERNET_LEN + usize::from(first & 0x0f) * 4)?;
        return (kind == QUERY && vlan.is_none()).then_some(Word::Query(source));
    }
    let fate = match (parse(frame), vlan) {
        (_, Some(vlan)) => Fate::Vlan(vlan),
        (Ok(datagram), None) => Fate::Datagram { port: u16::from_be_bytes(datagram.port), ttl: datagram.ttl },
        (Err(Reject::Fragment), None) => Fate::Fragment,
        (Err(Reject::IpOptions), None) => Fate::Options,
        (Err(Reject::BadChecksum), None) => Fate::BadChecksum,
        (Err(Reject::Truncated | Reject::Malformed), None) => Fate::Damaged,
        (Err(_), None) => return None,
    };
    Some(Word::Of { group, source, fate })
}

#[cfg(test)]
mod tests {
    use etherparse::PacketBuilder;

    use super::*;

    const GROUP: [u8; 4] = [239, 1, 1, 1];

    fn udp() -> Vec<u8> {
        let builder = PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], multicast::multicast_mac(GROUP.into()))
            .ipv4([192, 0, 2, 7], GROUP, 1)
            .udp(40_000, 5_000);
        let mut frame = Vec::new();
        builder.write(&mut frame, &[7; 300]).unwrap();
        frame
    }

    fn word(frame: &[u8], vlan: Option<u16>) -> Option<Word> {
        read(&Frame { bytes: &frame[..frame.len().min(SNAP)], len: frame.len(), segment: 0 }, vlan)
    }

    #[test]
    fn frames_are_told_apart_by_their_beginning() {
        let of = |fate| Some(Word::Of { group: GROUP.into(), source: [192, 0, 2, 7].into(), fate });
        let whole = udp();
        assert_eq!(word(&whole, None), of(Fate::Datagram { port: 5_000, ttl: 1 }));
        assert_eq!(word(&whole, Some(42)), of(Fate::Vlan(42)));
        assert_eq!(word(&whole[..200], None), of(Fate::Damaged));
        let changed = |at: usize, to: u8| {
            let mut frame = udp();
            frame[at] = to;
            frame
        };
        assert_eq!(word(&changed(ETHERNET_LEN + 8, 9), None), of(Fate::BadChecksum));
        assert_eq!(word(&changed(ETHERNET_LEN, 0x46), None), of(Fate::Options));
        let mut fragment = udp();
        // The flag "more fragments" in the place of "don't fragment", and the sum that goes with it.
        fragment[ETHERNET_LEN + 6] = 0x20;
        let at = ETHERNET_LEN + 10;
        let (sum, carry) = u16::from_be_bytes([fragment[at], fragment[at + 1]]).overflowing_add(0x2000);
        fragment[at..at + 2].copy_from_slice(&(sum + u16::from(carry)).to_be_bytes());
        assert_eq!(word(&fragment, None), of(Fate::Fragment));
    }

    #[test]
    fn queries_are_told_from_reports() {
        for (kind, heard) in [(QUERY, true), (0x16, false), (0x22, false)] {
            let mut frame = Vec::new();
            let builder = PacketBuilder::ethernet2([2; 6], multicast::multicast_mac([224, 0, 0, 1].into()))
                .ipv4([10, 0, 0, 254], [224, 0, 0, 1], 1);
            builder.write(&mut frame, IGMP.into(), &[kind, 0, 0, 0, 0, 0, 0, 0]).unwrap();
            let expected = heard.then_some(Word::Query([10, 0, 0, 254].into()));
            assert_eq!(word(&frame, None), expected, "{kind:#x}");
        }
    }

    #[test]
    fn what_is_too_short_says_nothing() {
        let frame = udp();
        for length in 0..ETHERNET_LEN + 20 {
            assert_eq!(word(&frame[..length], None), None, "{length} bytes");
        }
    }

    #[test]
    fn filters_stay_within_what_a_jump_spans() {
        let groups = |n: u32| (0..n).map(|n| Ipv4Addr::from_bits(0xef00_0000 + n)).collect::<BTreeSet<_>>();
        for n in [0, 1, 2, MOST_GROUPS as u32, MOST_GROUPS as u32 + 1, 5_000] {
            let program = filter(&groups(n));
            for (place, step) in program.iter().enumerate() {
                let furthest = place + 1 + usize::from(step.jt.max(step.jf));
                assert!(furthest < program.len() || step.code == 0x06, "{n} groups: {place}");
            }
        }
    }
}
