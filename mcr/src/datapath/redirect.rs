//! The redirect datapath: which outputs the kernel can serve by itself, and what it is to write there. Pure.

use std::net::Ipv4Addr;

use mcr_common::redirect::{Rewrite, tos, ttl};

use crate::rule::{Dscp, From, Output, Ttl};

/// What of a rule's traffic the host itself still sees.
pub const HOST_SEES: &str = "the host's own sockets, firewall and tcpdump see the rule's datagrams neither on \
                             ingress nor on egress, and no queueing discipline shapes them";

/// Frames that the kernel takes from a device at one go before it turns to the next: `NAPI_POLL_WEIGHT`.
pub const BURST: u32 = 64;

/// Frames that wait for a device that does not say how many can: those of a veth, `VETH_RING_SIZE`.
pub const UNTOLD_QUEUE: u32 = 256;

/// What an output's interface and the next hop there give to its datagrams.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Egress {
    /// The group's, or that of the host or the router to it.
    pub destination_mac: [u8; 6],
    pub source_mac: [u8; 6],
    /// The interface's primary address, for an output without `from=`.
    pub address: Ipv4Addr,
    /// The daemon's source port, likewise.
    pub port: u16,
    pub mtu: u32,
}

/// Why an output needs more than new headers, whatever its interface and its neighbour are.
pub fn needs_host(output: &Output) -> Option<&'static str> {
    output.loop_back.then_some("loop=true is for the host's own sockets")
}

/// What is written over the headers of the datagrams that leave by an output.
pub fn rewrite(output: &Output, egress: Egress) -> Rewrite {
    let from = output.from.unwrap_or(From { address: egress.address, port: None });
    let (ttl_mode, ttl) = match output.ttl {
        Ttl::Fixed(ttl) => (ttl::FIXED, ttl),
        Ttl::Copy => (ttl::COPY, 0),
        Ttl::Decrement => (ttl::DECREMENT, 0),
    };
    let (tos_mode, tos) = match output.dscp {
        Dscp::Fixed(dscp) => (tos::FIXED, dscp << 2),
        Dscp::Copy => (tos::COPY, 0),
    };
    Rewrite {
        destination_mac: egress.destination_mac,
        source_mac: egress.source_mac,
        source: from.address.octets(),
        destination: output.destination.octets(),
        source_port: from.port.unwrap_or(egress.port).to_be_bytes(),
        destination_port: output.port.to_be_bytes(),
        ttl_mode,
        ttl,
        tos_mode,
        tos,
        mtu: egress.mtu,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_output_says_is_written() {
        let egress = Egress {
            destination_mac: [1, 0, 0x5e, 2, 2, 3],
            source_mac: [2, 0, 0, 0, 0, 5],
            address: [10, 78, 0, 1].into(),
            port: 404,
            mtu: 1400,
        };
        let of = |endpoint: &str| rewrite(&endpoint.parse::<Output>().unwrap(), egress);
        let plain = of("239.130.2.3:6000@eth1");
        let expected = Rewrite {
            destination_mac: egress.destination_mac,
            source_mac: egress.source_mac,
            source: [10, 78, 0, 1],
            destination: [239, 130, 2, 3],
            source_port: [1, 0x94],
            destination_port: [0x17, 0x70],
            ttl_mode: ttl::FIXED,
            ttl: 16,
            tos_mode: tos::COPY,
            tos: 0,
            mtu: 1400,
        };
        assert_eq!(plain, expected);
        assert_eq!(of("239.130.2.3:6000@eth1,ttl=copy"), Rewrite { ttl_mode: ttl::COPY, ttl: 0, ..expected });
        assert_eq!(
            of("239.130.2.3:6000@eth1,ttl=dec,dscp=46"),
            Rewrite { ttl_mode: ttl::DECREMENT, ttl: 0, tos_mode: tos::FIXED, tos: 46 << 2, ..expected }
        );
        let from = of("239.130.2.3:6000@eth1,from=192.0.2.7");
        assert_eq!(from, Rewrite { source: [192, 0, 2, 7], ..expected });
        let from = of("239.130.2.3:6000@eth1,from=192.0.2.7:257");
        assert_eq!(from, Rewrite { source: [192, 0, 2, 7], source_port: [1, 1], ..expected });
    }

    #[test]
    fn own_listeners_are_not_for_new_headers_alone() {
        let needs = |endpoint: &str| needs_host(&endpoint.parse::<Output>().unwrap()).is_some();
        assert!(needs("239.2.2.2:6000@eth1,loop=true"));
        assert!(!needs("10.0.0.9:6000@eth1"));
        assert!(!needs("239.2.2.2:6000@eth1,gso=false,ttl=dec"));
    }
}
