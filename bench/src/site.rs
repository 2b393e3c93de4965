//! The ground of all measurements: a source, relays in a row, a sink, each a network namespace of its own.
//!
//! ```text
//!  source               relay 1               relay 2 ...              sink
//! +------+    veth    +----------+    veth   +----------+    veth    +------+
//! |   g0 |============| r0    r1 |===========| r0    r1 |============| s0   |
//! +------+            +----------+           +----------+            +------+
//!   10.79.0.1    10.79.0.2  10.79.1.1   10.79.1.2  ...             10.79.N.2
//! ```

use std::net::Ipv4Addr;

use tests::{Namespace, Scratch};

/// The source's interface.
pub const SOURCE: &str = "g0";
/// A relay's ingress interface.
pub const INGRESS: &str = "r0";
/// A relay's egress interface.
pub const EGRESS: &str = "r1";
/// The sink's interface.
pub const SINK: &str = "s0";

/// The source's address.
pub const SOURCE_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 79, 0, 1);
/// The address of the first relay's egress interface.
pub const EGRESS_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 79, 1, 1);

#[derive(Debug)]
pub struct Relay {
    pub host: Namespace,
    pub scratch: Scratch,
}

/// Gone on drop, with every process in it.
#[derive(Debug)]
pub struct Site {
    pub source: Namespace,
    pub relays: Vec<Relay>,
    pub sink: Namespace,
}

impl Site {
    /// A source and a sink with so many relays between them; with none they share a cable.
    pub fn build(relays: u8) -> Self {
        let source = Namespace::new("gen");
        let relays: Vec<_> =
            (0..relays).map(|_| Relay { host: Namespace::new("relay"), scratch: Scratch::make() }).collect();
        let sink = Namespace::new("sink");
        let mut left = (&source, SOURCE);
        for (k, relay) in (0..).zip(&relays) {
            relay.host.sysctl("ipv4/ip_forward", "1");
            relay.host.sysctl("ipv4/conf/all/rp_filter", "0");
            relay.host.sysctl("ipv4/conf/default/rp_filter", "0");
            cable(k, left, (&relay.host, INGRESS));
            // Its NAPI takes what XDP redirects into the cable, whether it has an XDP program or not.
            relay.host.output("ethtool", &["-K", INGRESS, "gro", "on"]);
            left = (&relay.host, EGRESS);
        }
        cable(relays.len() as u8, left, (&sink, SINK));
        // What `mcr gen --gso` sends travels as the datagrams that are counted.
        source.output("ethtool", &["-K", SOURCE, "tx-udp-segmentation", "off"]);
        Self { source, relays, sink }
    }

    /// The relay of a site that has one.
    pub fn relay(&self) -> &Relay {
        &self.relays[0]
    }
}

/// Ties two hosts together; the left one sends multicast to the right one.
fn cable(k: u8, left: (&Namespace, &str), right: (&Namespace, &str)) {
    let ((left, left_name), (right, right_name)) = (left, right);
    left.ip(&[
        &format!(
            "link add name {left_name} numrxqueues 1 numtxqueues 1 type veth \
             peer name {right_name} numrxqueues 1 numtxqueues 1 netns {}",
            right.name()
        ),
        &format!("addr add 10.79.{k}.1/24 dev {left_name}"),
        &format!("link set {left_name} up"),
        &format!("route add 224.0.0.0/4 dev {left_name}"),
    ]);
    right.ip(&[&format!("addr add 10.79.{k}.2/24 dev {right_name}"), &format!("link set {right_name} up")]);
}
