//! What `/proc/self/net` says of memberships and UDP sockets, which is of the reading process's network namespace. Pure.

use std::net::{Ipv4Addr, SocketAddrV4};

use super::facts::{Group, Groups};
use crate::rule::InterfaceName;

/// Reads `igmp` and `mcfilter`.
pub fn groups(igmp: &str, mcfilter: &str) -> Groups {
    let mut groups = Groups::default();
    let mut here: Option<InterfaceName> = None;
    for line in igmp.lines().skip(1) {
        let mut fields = line.split_whitespace();
        if line.starts_with(|c: char| c.is_ascii_digit()) {
            here = fields.nth(1).and_then(|name| name.trim_end_matches(':').parse().ok());
            let version = line.rsplit('V').next().and_then(|version| version.trim().parse().ok());
            if let (Some(name), Some(version)) = (&here, version) {
                groups.versions.insert(name.clone(), version);
            }
        } else if let (Some(name), Some(group), Some(users)) =
            (&here, fields.next().and_then(|text| hexadecimal(text, u32::to_ne_bytes)), fields.next())
        {
            let of = groups.joined.entry((name.clone(), group)).or_default();
            of.users = users.parse().unwrap_or_default();
        }
    }
    for line in mcfilter.lines().skip(1) {
        let [_, device, group, source, included, _] = line.split_whitespace().collect::<Vec<_>>()[..] else {
            continue;
        };
        let address = |text: &str| hexadecimal(text.trim_start_matches("0x"), u32::to_be_bytes);
        if let (Ok(name), Some(group), Some(source)) = (device.parse(), address(group), address(source))
            && included != "0"
        {
            groups.joined.entry((name, group)).or_insert_with(Group::default).sources.insert(source);
        }
    }
    groups
}

/// Reads `udp`: where sockets are bound.
pub fn listeners(udp: &str) -> Vec<SocketAddrV4> {
    let bound = |line: &str| {
        let (address, port) = line.split_whitespace().nth(1)?.split_once(':')?;
        let address = hexadecimal(address, u32::to_ne_bytes)?;
        Some(SocketAddrV4::new(address, u16::from_str_radix(port, 16).ok()?))
    };
    udp.lines().skip(1).filter_map(bound).collect()
}

/// The kernel prints an address as a number, in `igmp` and `udp` of this machine's byte order.
fn hexadecimal(text: &str, order: fn(u32) -> [u8; 4]) -> Option<Ipv4Addr> {
    u32::from_str_radix(text, 16).ok().map(|number| order(number).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    const IGMP: &str = "Idx\tDevice    : Count Querier\tGroup    Users Timer\tReporter
1\tlo        :     1      V3
\t\t\t\t010000E0     1 0:00000000\t\t0
4\tin0       :     2      V2
\t\t\t\t010101EF     2 0:00000000\t\t0
\t\t\t\t010000E0     1 0:00000000\t\t0
";
    const FILTER: &str = "Idx Device        MCA        SRC    INC    EXC
  4    in0 0xe8010101 0xc0000207      1      0
  4    in0 0xe8010101 0xc0000208      0      1
";
    const UDP: &str =
        "   sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout
  12: 00000000:1388 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 5 2 0 0
  13: 010101EF:1389 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 5 2 0 0
";

    #[cfg(target_endian = "little")]
    #[test]
    fn memberships_with_their_users_and_sources() {
        let groups = groups(IGMP, FILTER);
        let in0: InterfaceName = "in0".parse().unwrap();
        assert_eq!(groups.versions.get(&in0), Some(&2));
        assert_eq!(groups.joined[&(in0.clone(), [239, 1, 1, 1].into())].users, 2);
        let one_source = &groups.joined[&(in0, [232, 1, 1, 1].into())];
        assert_eq!(one_source.sources, [[192, 0, 2, 7].into()].into());
    }

    #[cfg(target_endian = "little")]
    #[test]
    fn sockets_with_their_addresses() {
        let expected: Vec<SocketAddrV4> =
            ["0.0.0.0:5000", "239.1.1.1:5001"].map(|text| text.parse().unwrap()).into();
        assert_eq!(listeners(UDP), expected);
    }

    #[test]
    fn what_is_no_such_file_gives_nothing() {
        for text in ["", "\n\n", "a b c\nd e f\n1 x: y\n zz 1\n", "Idx\n4\tin0 : 1 Vx\n"] {
            assert_eq!(groups(text, text), Groups::default(), "{text:?}");
            assert_eq!(listeners(text), [], "{text:?}");
        }
    }
}
