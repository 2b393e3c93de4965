//! What has been joined in this network namespace, by whatever socket, as the kernel tells it.

use std::{collections::BTreeSet, fs, io, net::Ipv4Addr};

use super::membership::Membership;
use crate::rule::IfIndex;

/// Every group of every interface, and every source that one is joined for; perhaps one too that has just been left.
pub fn joined() -> io::Result<BTreeSet<Membership>> {
    let mut all = BTreeSet::new();
    loop {
        let known = all.len();
        // The kernel counts lines from one read to the next: where others leave meanwhile, it passes some by.
        all.extend(parse_groups(&fs::read_to_string("/proc/thread-self/net/igmp")?));
        all.extend(parse_sources(&fs::read_to_string("/proc/thread-self/net/mcfilter")?));
        if all.len() == known {
            return Ok(all);
        }
    }
}

/// A line for each interface, which begins with its index, and under it one for each group: its address in the memory of this
/// machine, read as a number.
fn parse_groups(text: &str) -> impl Iterator<Item = Membership> {
    let of_line = |interface: &mut Option<IfIndex>, line: &str| {
        let word = line.split_whitespace().next().unwrap_or_default();
        if !line.starts_with(char::is_whitespace) {
            *interface = word.parse().ok().map(IfIndex);
            return Some(None);
        }
        let group = u32::from_str_radix(word, 16).ok().map(|bits| Ipv4Addr::from(bits.to_ne_bytes()));
        Some(interface.zip(group).map(|(interface, group)| Membership { interface, group, source: None }))
    };
    text.lines().scan(None, of_line).flatten()
}

/// A line for each source: index, device, group, source, and how many sockets include and exclude it.
fn parse_sources(text: &str) -> impl Iterator<Item = Membership> {
    let address = |word: &str| Some(Ipv4Addr::from(u32::from_str_radix(word.strip_prefix("0x")?, 16).ok()?));
    let of_line = move |line: &str| {
        let mut words = line.split_whitespace();
        let interface = IfIndex(words.next()?.parse().ok()?);
        let mut addresses = words.skip(1).map(address);
        Some(Membership { interface, group: addresses.next()??, source: Some(addresses.next()??) })
    };
    text.lines().filter_map(of_line)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn membership(interface: u32, group: [u8; 4], source: Option<[u8; 4]>) -> Membership {
        Membership { interface: IfIndex(interface), group: group.into(), source: source.map(Into::into) }
    }

    #[test]
    #[cfg(target_endian = "little")]
    fn groups_are_those_of_the_interface_above_them() {
        let text = "Idx\tDevice    : Count Querier\tGroup    Users Timer\tReporter\n\
                    1\tlo        :     1      V3\n\
                    \t\t\t\t010000E0     1 0:00000000\t\t0\n\
                    12\tin0       :     2      V3\n\
                    \t\t\t\t010101EF     1 0:00000000\t\t1\n\
                    \t\t\t\t010000E0     1 0:00000000\t\t0\n";
        let expected = [
            membership(1, [224, 0, 0, 1], None),
            membership(12, [239, 1, 1, 1], None),
            membership(12, [224, 0, 0, 1], None),
        ];
        assert_eq!(parse_groups(text).collect::<Vec<_>>(), expected);
    }

    #[test]
    fn sources_have_a_line_each() {
        let text = "Idx Device        MCA        SRC    INC    EXC\n\
                    \x20 3    in0 0xe8010101 0xc0000207      1      0\n";
        let expected = [membership(3, [232, 1, 1, 1], Some([192, 0, 2, 7]))];
        assert_eq!(parse_sources(text).collect::<Vec<_>>(), expected);
    }
}
