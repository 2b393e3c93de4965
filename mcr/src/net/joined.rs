//! The groups that have been joined in this network namespace, by whatever socket. (The kernel's list of their sources,
//! `/proc/net/mcfilter`, leaves out devices whose newest group has none.)

use std::{collections::BTreeSet, fs, io, net::Ipv4Addr};

use crate::rule::IfIndex;

/// Every group of every interface; perhaps one too that has just been left.
pub fn groups() -> io::Result<BTreeSet<(IfIndex, Ipv4Addr)>> {
    let mut all = BTreeSet::new();
    loop {
        let known = all.len();
        // The kernel counts lines from one read to the next: where others leave meanwhile, it passes some by.
        all.extend(parse(&fs::read_to_string("/proc/thread-self/net/igmp")?));
        if all.len() == known {
            return Ok(all);
        }
    }
}

/// A line for each interface, which begins with its index, and under it one for each group: its address in the memory of this
/// machine, read as a number.
fn parse(text: &str) -> Vec<(IfIndex, Ipv4Addr)> {
    let mut interface = None;
    let mut groups = Vec::new();
    for line in text.lines() {
        let word = line.split_whitespace().next().unwrap_or_default();
        if line.starts_with(char::is_whitespace) {
            let group = u32::from_str_radix(word, 16).ok().map(|bits| Ipv4Addr::from(bits.to_ne_bytes()));
            groups.extend(interface.zip(group));
        } else {
            interface = word.parse().ok().map(IfIndex);
        }
    }
    groups
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(target_endian = "little")]
    fn groups_are_those_of_the_interface_above_them() {
        let text = "Idx\tDevice    : Count Querier\tGroup    Users Timer\tReporter\n\
                    1\tlo        :     1      V3\n\
                    \t\t\t\t010000E0     1 0:00000000\t\t0\n\
                    12\tin0       :     2      V3\n\
                    \t\t\t\t010101EF     1 0:00000000\t\t1\n\
                    \t\t\t\t010000E0     1 0:00000000\t\t0\n";
        let expected = [(1, [224, 0, 0, 1]), (12, [239, 1, 1, 1]), (12, [224, 0, 0, 1])];
        assert_eq!(parse(text), expected.map(|(index, group)| (IfIndex(index), Ipv4Addr::from(group))));
    }
}
