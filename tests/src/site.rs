//! The topology of the tests: sources behind snooping bridges, a relay host, sinks.
//!
//! ```text
//!  source K                 bridge K                       relay                     sink K
//! +--------+  veth   +------------------+  veth   +------------------+  veth   +--------+
//! | eth0   |=========| src  br0   relay |=========| inK        outK  |=========| eth0   |
//! | 10.77.K.2        | .254, snooping   |         | 10.77.K.1  10.78.K.1       | 10.78.K.2
//! +--------+         +------------------+         +------------------+         +--------+
//! ```

use std::{
    net::{Ipv4Addr, SocketAddrV4},
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use socket2::{Domain, InterfaceIndexOrAddress, Protocol, Socket, Type};

use crate::{
    Capture, Ground, Namespace, RawSender, Scratch, Udp,
    deprive::NOBODY,
    wait::{PATIENCE, wait_until},
};

/// The interface of a source and of a sink.
pub const ETH: &str = "eth0";

/// Asks a bridge whether it forwards by membership yet. No test uses it.
const PROBE: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(239, 255, 77, 77), 7);

/// How many of what a site has.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    pub segments: u8,
    pub sinks: u8,
    /// Queues of the ingress interfaces.
    pub queues: u8,
    /// What the ingress interfaces are.
    pub ground: Ground,
    /// Instead of `10.77.K.2/24`: an address that the relay host need not have a route to.
    pub source_address: Option<Ipv4Addr>,
}

impl Default for Plan {
    fn default() -> Self {
        Self { segments: 1, sinks: 3, queues: 1, ground: Ground::current(), source_address: None }
    }
}

/// An ingress segment: a source and the bridge between it and the relay.
#[derive(Debug)]
pub struct Segment {
    pub source: Namespace,
    pub source_address: Ipv4Addr,
    pub bridge: Namespace,
    /// The relay's interface and its address there.
    pub interface: String,
    pub relay_address: Ipv4Addr,
    k: u8,
    plan: Plan,
}

/// An egress link and the host at its end.
#[derive(Debug)]
pub struct Sink {
    pub host: Namespace,
    pub address: Ipv4Addr,
    /// The relay's interface and its address there.
    pub interface: String,
    pub relay_address: Ipv4Addr,
    ground: Ground,
}

#[derive(Debug)]
pub struct Site {
    pub segments: Vec<Segment>,
    pub relay: Namespace,
    pub sinks: Vec<Sink>,
    pub scratch: Scratch,
    pub ground: Ground,
}

impl Default for Site {
    fn default() -> Self {
        Self::build(Plan::default())
    }
}

impl Site {
    /// Builds the namespaces and waits until each bridge forwards by membership.
    #[track_caller]
    pub fn build(plan: Plan) -> Self {
        let scratch = match plan.ground {
            Ground::OrdinaryUser => Scratch::of_user(NOBODY),
            _ => Scratch::make(),
        };
        let relay = Namespace::new("relay");
        // Strict: what comes from where no route leads is dropped by the host itself.
        relay.sysctl("ipv4/conf/all/rp_filter", "1");
        relay.sysctl("ipv4/conf/default/rp_filter", "1");
        let segments = (0..plan.segments).map(|k| Segment::build(&relay, k, plan)).collect();
        let sinks = (0..plan.sinks).map(|k| Sink::build(&relay, k, plan.ground)).collect();
        let site = Self { segments, relay, sinks, scratch, ground: plan.ground };
        for segment in &site.segments {
            site.relay.sysctl(&format!("ipv4/conf/{}/rp_filter", segment.interface), "1");
            segment.wait_until_snooping(&site.relay);
        }
        for sink in &site.sinks {
            site.relay.sysctl(&format!("ipv4/conf/{}/rp_filter", sink.interface), "1");
        }
        site
    }

    /// The first segment, of most sites the only one.
    pub fn source(&self) -> &Namespace {
        &self.segments[0].source
    }

    /// Groups that an interface of the relay host is joined to, ascending, all-hosts left out.
    #[track_caller]
    pub fn groups(&self, interface: &str) -> Vec<Ipv4Addr> {
        let mut here = false;
        let mut groups = Vec::new();
        for line in self.relay.proc_net("igmp").lines().skip(1) {
            if line.starts_with(|c: char| c.is_ascii_digit()) {
                here = line.split_whitespace().nth(1) == Some(interface);
            } else if here && let Some(group) = line.split_whitespace().next() {
                // The kernel prints the address as a number of this machine's byte order.
                let number = u32::from_str_radix(group, 16).expect("a group in hexadecimal");
                groups.push(Ipv4Addr::from(number.to_ne_bytes()));
            }
        }
        groups.retain(|group| *group != Ipv4Addr::new(224, 0, 0, 1));
        groups.sort_unstable();
        groups
    }

    /// Groups of which an interface of the relay host is joined to some source, with the source, ascending.
    #[track_caller]
    pub fn sources(&self, interface: &str) -> Vec<(Ipv4Addr, Ipv4Addr)> {
        let filters = self.relay.proc_net("mcfilter");
        let mut sources = Vec::new();
        for line in filters.lines().skip(1) {
            let [_, device, group, source, included, _] = line.split_whitespace().collect::<Vec<_>>()[..]
            else {
                panic!("not a line of /proc/net/mcfilter: {line}");
            };
            if device == interface && included != "0" {
                let address = |text: &str| {
                    let digits = text.trim_start_matches("0x");
                    Ipv4Addr::from_bits(u32::from_str_radix(digits, 16).expect("an address in hexadecimal"))
                };
                sources.push((address(group), address(source)));
            }
        }
        sources.sort_unstable();
        sources
    }

    /// Captures at the end of an egress link.
    #[track_caller]
    pub fn capture(&self, sink: usize) -> Capture {
        Capture::start(&self.sinks[sink].host, ETH)
    }
}

impl Segment {
    fn build(relay: &Namespace, k: u8, plan: Plan) -> Self {
        let source = Namespace::new("src");
        let bridge = Namespace::new("bridge");
        let net = |host| Ipv4Addr::new(10, 77, k, host);
        let (relay_address, prefix) = (net(1), if plan.source_address.is_some() { 32 } else { 24 });
        let source_address = plan.source_address.unwrap_or(net(2));

        bridge.ip(&[
            "link add br0 type bridge mcast_snooping 1 mcast_igmp_version 3 \
             mcast_query_response_interval 10 mcast_last_member_interval 10",
            &format!("link add name src type veth peer name {ETH} netns {}", source.name()),
            "link set src master br0 up",
            &format!("addr add {}/24 dev br0", net(254)),
            "link set br0 up",
            // In the command that makes the bridge, the querier would count after ten seconds only.
            "link set br0 type bridge mcast_querier 1",
        ]);
        bridge.bridge(&["link set dev src mcast_flood off", "link set dev src fastleave on"]);
        source.ip(&[
            &format!("addr add {source_address}/{prefix} dev {ETH}"),
            &format!("link set {ETH} up"),
            &format!("route add 224.0.0.0/4 dev {ETH}"),
        ]);
        if plan.ground == Ground::Bridge {
            // Where the kernel has it, it drops what lies about its length before anybody sees it.
            relay.sysctl_if_there("bridge/bridge-nf-call-iptables", "0");
        }
        let segment =
            Self { source, source_address, bridge, interface: format!("in{k}"), relay_address, k, plan };
        if segment.has_interface_above() {
            segment.lay_cable(relay);
        }
        segment.plug(relay);
        relay.ip(&[&format!("link set {} up", segment.interface)]);
        segment
    }

    /// Whether the ingress interface is one above the end of the segment's cable.
    fn has_interface_above(&self) -> bool {
        matches!(self.plan.ground, Ground::Bridge | Ground::Macvlan)
    }

    /// The end of the segment's cable, which is the ingress interface or lies below it.
    fn end(&self) -> String {
        if self.has_interface_above() { format!("low{}", self.k) } else { self.interface.clone() }
    }

    /// Ties the bridge to the relay host.
    fn lay_cable(&self, relay: &Namespace) {
        let (queues, end) = (self.plan.queues, self.end());
        self.bridge.ip(&[
            &format!(
                "link add name relay numrxqueues {queues} numtxqueues {queues} type veth \
                 peer name {end} numrxqueues {queues} numtxqueues {queues} netns {}",
                relay.name()
            ),
            "link set relay master br0 up",
        ]);
        // Nothing that no one joined leaves the bridge, and what everyone left stops at once.
        self.bridge.bridge(&["link set dev relay mcast_flood off", "link set dev relay fastleave on"]);
    }

    /// Makes the ingress interface, with its address; it is down.
    #[track_caller]
    pub fn plug(&self, relay: &Namespace) {
        let (interface, end) = (&self.interface, self.end());
        match self.plan.ground {
            Ground::Veth | Ground::PlainVeth | Ground::WithoutBpf | Ground::OrdinaryUser => {
                self.lay_cable(relay);
            }
            Ground::Kernel => {
                self.lay_cable(relay);
                take_redirected(&self.bridge, "relay");
            }
            Ground::Bridge => relay.ip(&[
                &format!("link add {interface} type bridge mcast_snooping 0"),
                &format!("link set {end} master {interface} up"),
            ]),
            Ground::Macvlan => relay.ip(&[
                &format!("link set {end} up"),
                &format!("link add {interface} link {end} type macvlan mode private bcqueuelen 20000"),
            ]),
        }
        relay.ip(&[&format!("addr add {}/24 dev {interface}", self.relay_address)]);
    }

    /// Deletes the ingress interface; a veth takes its end at the bridge along.
    #[track_caller]
    pub fn unplug(&self, relay: &Namespace) {
        relay.ip(&[&format!("link del {}", self.interface)]);
    }

    fn wait_until_snooping(&self, relay: &Namespace) {
        wait_until("every bridge's ports forward", PATIENCE, || {
            let forwarding = |host: &Namespace, least: usize| {
                let links = host.json("bridge", &["-j", "link", "show"]);
                let ports = links.as_array().map_or(&[][..], Vec::as_slice);
                ports.len() >= least && ports.iter().all(|port| port["state"] == "forwarding")
            };
            // The relay host has one of its own on some grounds.
            forwarding(&self.bridge, 2) && forwarding(relay, 0)
        });
        let membership = Membership::join(relay, &self.interface, *PROBE.ip());
        self.wait_until_joined(*PROBE.ip());
        let mut capture = Capture::start(relay, &self.interface);
        let sender = RawSender::new(&self.source, ETH);
        let probe = Udp::new(SocketAddrV4::new(self.source_address, 7), PROBE).payload(b"probe").frame();
        wait_until("the bridge forwards by membership", PATIENCE, || {
            sender.send(&probe);
            !capture.to(PROBE).is_empty()
        });
        drop(membership);
        self.wait_until_left(*PROBE.ip());
    }

    /// The groups that the relay's port of the bridge is joined to: for any source, or for one.
    #[track_caller]
    pub fn joined(&self) -> Vec<(Ipv4Addr, Option<Ipv4Addr>)> {
        self.joined_on("relay")
    }

    #[track_caller]
    fn joined_on(&self, port: &str) -> Vec<(Ipv4Addr, Option<Ipv4Addr>)> {
        let shown = self.bridge.json("bridge", &["-j", "-d", "mdb", "show"]);
        let entries = shown.pointer("/0/mdb").and_then(|mdb| mdb.as_array().cloned()).unwrap_or_default();
        entries
            .iter()
            .filter(|entry| entry["port"] == port)
            .filter_map(|entry| {
                let address = |key: &str| entry[key].as_str().and_then(|text| text.parse().ok());
                let source = address("src");
                // A group of which some sources are joined has an entry of its own, which forwards nothing.
                let blocked =
                    entry["flags"].as_array().is_some_and(|flags| flags.contains(&"blocked".into()));
                let forwards = !blocked && (source.is_some() || entry["filter_mode"] != "include");
                forwards.then_some((address("grp")?, source))
            })
            .collect()
    }

    /// Waits until the bridge sends the group to the relay, whoever its source.
    #[track_caller]
    pub fn wait_until_joined(&self, group: Ipv4Addr) {
        self.wait_until_port_joined("relay", group);
    }

    /// Waits until the bridge sends one source's datagrams to a group to the relay.
    #[track_caller]
    pub fn wait_until_source_joined(&self, group: Ipv4Addr, source: Ipv4Addr) {
        wait_until(&format!("the bridge's entry of {source} to {group} appears"), PATIENCE, || {
            self.joined().contains(&(group, Some(source)))
        });
    }

    /// Waits until the bridge sends the group to one of its ports.
    #[track_caller]
    pub fn wait_until_port_joined(&self, port: &str, group: Ipv4Addr) {
        wait_until(&format!("the bridge's entry of {group} appears"), PATIENCE, || {
            self.joined_on(port).contains(&(group, None))
        });
    }

    /// Waits until the bridge has stopped to.
    #[track_caller]
    pub fn wait_until_left(&self, group: Ipv4Addr) {
        wait_until(&format!("the bridge's entry of {group} goes"), Duration::from_secs(5), || {
            self.joined().iter().all(|(joined, _)| *joined != group)
        });
    }

    /// Joins a group at the source's end, so that what the relay sends into this segment arrives there.
    #[track_caller]
    pub fn join_at_source(&self, group: Ipv4Addr) -> Membership {
        let membership = Membership::join(&self.source, ETH, group);
        self.wait_until_port_joined("src", group);
        membership
    }
}

impl Sink {
    fn build(relay: &Namespace, k: u8, ground: Ground) -> Self {
        let (relay_address, address) = (Ipv4Addr::new(10, 78, k, 1), Ipv4Addr::new(10, 78, k, 2));
        let host = Namespace::new("sink");
        let sink = Self { host, address, interface: format!("out{k}"), relay_address, ground };
        sink.plug(relay);
        relay.ip(&[&format!("link set {} up", sink.interface)]);
        sink
    }

    /// Makes the egress link, with the addresses at its ends; the relay's is down.
    #[track_caller]
    pub fn plug(&self, relay: &Namespace) {
        // Past the indices that the relay host gives: an interface that is made anew is another.
        static INDEX: AtomicU32 = AtomicU32::new(1_000);
        let Self { host, address, interface, relay_address, ground } = self;
        let index = INDEX.fetch_add(1, Ordering::Relaxed);
        host.ip(&[
            &format!("link add name {interface} index {index} type veth peer name {ETH}"),
            &format!("addr add {address}/24 dev {ETH}"),
            &format!("link set {ETH} up"),
            &format!("route add 224.0.0.0/4 dev {ETH}"),
        ]);
        if *ground == Ground::Kernel {
            take_redirected(host, ETH);
        }
        host.ip(&[&format!("link set {interface} netns {}", relay.name())]);
        relay.ip(&[&format!("addr add {relay_address}/24 dev {interface}")]);
    }

    /// Deletes the egress link.
    #[track_caller]
    pub fn unplug(&self, relay: &Namespace) {
        relay.ip(&[&format!("link del {}", self.interface)]);
    }
}

/// A veth takes redirected frames while its other end, this one, has GRO.
#[track_caller]
pub fn take_redirected(namespace: &Namespace, end: &str) {
    namespace.output("ethtool", &["-K", end, "gro", "on"]);
}

/// A group joined by a socket that receives nothing; left on drop.
#[derive(Debug)]
pub struct Membership {
    _socket: Socket,
}

impl Membership {
    /// Joins one source's datagrams to a group, on the interface with this address.
    #[track_caller]
    pub fn join_source(namespace: &Namespace, address: Ipv4Addr, group: Ipv4Addr, source: Ipv4Addr) -> Self {
        let socket = namespace.run(|| {
            let socket = Socket::new(Domain::IPV4, Type::DGRAM, Some(Protocol::UDP)).expect("UDP socket");
            socket.join_ssm_v4(&source, &group, &address).expect("join");
            socket
        });
        Self { _socket: socket }
    }

    #[track_caller]
    pub fn join(namespace: &Namespace, interface: &str, group: Ipv4Addr) -> Self {
        let socket = namespace.run(|| {
            let socket = Socket::new(Domain::IPV4, Type::DGRAM, Some(Protocol::UDP)).expect("UDP socket");
            let index = nix::net::if_::if_nametoindex(interface).expect("interface index");
            socket.join_multicast_v4_n(&group, &InterfaceIndexOrAddress::Index(index)).expect("join");
            socket
        });
        Self { _socket: socket }
    }
}
