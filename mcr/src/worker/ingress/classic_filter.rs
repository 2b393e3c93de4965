//! The classic filter of a packet socket, where no eBPF may be loaded: it lets in unfragmented multicast
//! UDP to groups and ports that rules want. Pure, but for attaching.

use std::{collections::BTreeSet, io, os::fd::AsRawFd};

use libc::{
    BPF_ABS, BPF_B, BPF_H, BPF_JEQ, BPF_JGE, BPF_JMP, BPF_JSET, BPF_K, BPF_LD, BPF_RET, BPF_W, sock_filter,
};

use crate::sys::socket_option;

/// Destinations that are told apart; where there are more, every multicast datagram is let in and the
/// worker looks.
const MOST: usize = 64;

/// `SKF_AD_OFF + SKF_AD_VLAN_TAG_PRESENT`: whether the kernel took a VLAN tag out of the bytes.
const VLAN_TAG_PRESENT: u32 = 0xffff_f000 + 48;

const REFUSE: sock_filter = instruction(BPF_RET | BPF_K, 0);
const ADMIT: sock_filter = instruction(BPF_RET | BPF_K, u32::MAX);

/// Puts the filter on a socket, in the place of the one that it has.
pub fn attach(
    socket: &impl AsRawFd,
    destinations: impl Iterator<Item = ([u8; 4], [u8; 2])>,
) -> io::Result<()> {
    socket_option::attach_filter(socket, &mut program(&destinations.collect()))
}

const fn instruction(code: u32, k: u32) -> sock_filter {
    sock_filter { code: code as u16, jt: 0, jf: 0, k }
}

/// Goes on if what was loaded compares so with `k`; else jumps over `skip` instructions.
const fn unless(comparison: u32, k: u32, skip: u8) -> sock_filter {
    sock_filter { code: (BPF_JMP | comparison | BPF_K) as u16, jt: 0, jf: skip, k }
}

const fn load(width: u32, offset: u32) -> sock_filter {
    instruction(BPF_LD | width | BPF_ABS, offset)
}

fn program(destinations: &BTreeSet<([u8; 4], [u8; 2])>) -> Vec<sock_filter> {
    // Every condition that does not hold refuses, the next instruction but one.
    let mut program = Vec::new();
    let mut require = |load: sock_filter, condition: sock_filter| {
        program.extend([load, condition, instruction(BPF_JMP, 1), REFUSE]);
    };
    require(load(BPF_W, VLAN_TAG_PRESENT), unless(BPF_JEQ, 0, 1));
    require(load(BPF_H, 12), unless(BPF_JEQ, 0x0800, 1));
    require(load(BPF_B, 14), unless(BPF_JEQ, 0x45, 1));
    require(load(BPF_B, 23), unless(BPF_JEQ, 17, 1));
    require(load(BPF_B, 30), unless(BPF_JGE, 224, 1));
    // More fragments, or not the first.
    program.extend([load(BPF_H, 20), unless(BPF_JSET, 0x3fff, 1), REFUSE]);
    if destinations.len() > MOST {
        program.push(ADMIT);
        return program;
    }
    for (group, port) in destinations {
        program.extend([
            load(BPF_W, 30),
            unless(BPF_JEQ, u32::from_be_bytes(*group), 3),
            load(BPF_H, 36),
            unless(BPF_JEQ, u32::from(u16::from_be_bytes(*port)), 1),
            ADMIT,
        ]);
    }
    program.push(REFUSE);
    program
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a filter makes of a frame; just the instructions that filters here are made of.
    fn admits(program: &[sock_filter], frame: &[u8], tagged: bool) -> bool {
        let (mut at, mut loaded) = (0, 0);
        loop {
            let sock_filter { code, jt, jf, k } = program[at];
            at += 1;
            let bytes = |n: usize| {
                let bytes = frame.get(k as usize..k as usize + n)?;
                Some(bytes.iter().fold(0u32, |value, byte| value << 8 | u32::from(*byte)))
            };
            let code = u32::from(code);
            let jump = |holds: bool| usize::from(if holds { jt } else { jf });
            match code & 0x07 {
                BPF_LD if k == VLAN_TAG_PRESENT => loaded = u32::from(tagged),
                BPF_LD => {
                    let width =
                        [(BPF_W, 4), (BPF_H, 2), (BPF_B, 1)].iter().find(|w| w.0 == code & 0x18).unwrap().1;
                    match bytes(width) {
                        Some(value) => loaded = value,
                        None => return false,
                    }
                }
                BPF_JMP => match code & 0xf0 {
                    BPF_JEQ => at += jump(loaded == k),
                    BPF_JGE => at += jump(loaded >= k),
                    BPF_JSET => at += jump(loaded & k != 0),
                    _ => at += k as usize,
                },
                _ => return k != 0,
            }
        }
    }

    /// A datagram to 239.1.1.1:5000 without payload.
    fn datagram() -> Vec<u8> {
        let mut frame = vec![0; 42];
        frame[12..15].copy_from_slice(&[0x08, 0x00, 0x45]);
        frame[23] = 17;
        frame[30..34].copy_from_slice(&[239, 1, 1, 1]);
        frame[36..38].copy_from_slice(&5000u16.to_be_bytes());
        frame
    }

    fn wanted(n: u16) -> BTreeSet<([u8; 4], [u8; 2])> {
        (0..n).map(|i| ([239, 1, 1, 1], (5000 + i).to_be_bytes())).collect()
    }

    #[test]
    fn admits_what_a_rule_may_want_and_nothing_else() {
        let changed = |offset: usize, value: u8| {
            let mut frame = datagram();
            frame[offset] = value;
            frame
        };
        for (what, frame, admitted) in [
            ("the group and port", datagram(), true),
            ("don't fragment", changed(20, 0x40), true),
            ("another Ethernet type", changed(13, 0x06), false),
            ("IP options", changed(14, 0x46), false),
            ("another protocol", changed(23, 6), false),
            ("more fragments", changed(20, 0x20), false),
            ("a later fragment", changed(21, 1), false),
            ("a host", changed(30, 10), false),
            ("another group", changed(33, 2), false),
            ("another port", changed(37, 0), false),
            ("a frame that ends early", datagram()[..37].to_vec(), false),
        ] {
            assert_eq!(admits(&program(&wanted(3)), &frame, false), admitted, "{what}");
        }
        assert!(!admits(&program(&wanted(3)), &datagram(), true), "a VLAN tag");
        assert!(!admits(&program(&wanted(0)), &datagram(), false), "no rule");
    }

    #[test]
    fn many_destinations_are_left_to_the_worker() {
        let program = program(&wanted(MOST as u16 + 1));
        let mut other = datagram();
        other[33] = 99;
        assert!(admits(&program, &other, false));
        assert!(!admits(&program, &[0; 60], false));
    }
}
