//! The interfaces of this network namespace, with their addresses, by netlink.
//!
//! Never from sysfs: a process that entered a namespace by `setns` still sees the devices of another there.

use std::{collections::BTreeMap, io, net::IpAddr, net::Ipv4Addr};

use futures_util::StreamExt;
use rtnetlink::{
    Handle, MulticastGroup,
    packet_core::{NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload},
    packet_route::{
        RouteNetlinkMessage,
        address::{AddressAttribute, AddressHeaderFlags, AddressMessage},
        link::{
            InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage, LinkXdp, XdpAttached,
        },
    },
};

use crate::{
    rule::{IfIndex, InterfaceName},
    sys::{cpu_list::parse_cpus, ethtool},
};

/// An interface as the kernel has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    pub index: IfIndex,
    /// Administratively up and with a carrier.
    pub up: bool,
    pub mtu: u32,
    /// Its Ethernet address, if it has one.
    pub mac: Option<[u8; 6]>,
    /// IPv4 addresses, primary ones first.
    pub addresses: Vec<Ipv4Addr>,
    /// Its frames have an Ethernet header.
    pub ethernet: bool,
    /// Its neighbours are looked for by ARP.
    pub arp: bool,
    /// What kind of device: `veth`, `bridge` ..., or the driver's name.
    pub kind: String,
    /// RX queues in use.
    pub rx_queues: u32,
    /// CPUs of the memory node that its device belongs to; none where there is no such device.
    pub near_cpus: Vec<u32>,
    /// Id of the XDP program in its slot.
    pub xdp_program: Option<u32>,
}

/// All interfaces by name.
pub type Links = BTreeMap<InterfaceName, Link>;

/// Asks the kernel.
#[derive(Clone, Debug)]
pub struct LinkReader(Handle);

/// Reads the interfaces, and hears of their changes.
pub struct LinkWatch {
    reader: LinkReader,
    changes: super::Changes,
}

impl LinkWatch {
    /// Must be called within the runtime whose task carries the netlink connection.
    pub fn open() -> io::Result<Self> {
        let groups = [MulticastGroup::Link, MulticastGroup::Ipv4Ifaddr];
        let (connection, handle, messages) = rtnetlink::new_multicast_connection(&groups)?;
        tokio::spawn(connection);
        Ok(Self { reader: LinkReader(handle), changes: Box::new(messages.map(|_| ())) })
    }

    pub fn reader(&self) -> LinkReader {
        self.reader.clone()
    }

    /// Returns when something has changed since it was last called.
    pub async fn changed(&mut self) {
        super::next(&mut self.changes).await;
    }

    /// All interfaces as they are now.
    pub async fn snapshot(&self) -> Result<Links, rtnetlink::Error> {
        const ATTEMPTS: usize = 10;
        for _ in 1..ATTEMPTS {
            let (links, whole) = self.dump().await?;
            if whole {
                return Ok(links);
            }
        }
        // They change all the time: the next change brings the next look.
        Ok(self.dump().await?.0)
    }

    /// The interfaces, and whether none changed meanwhile: if one did, others may be missing.
    async fn dump(&self) -> Result<(Links, bool), rtnetlink::Error> {
        let mut names = BTreeMap::new();
        let mut links = Links::new();
        let (messages, links_whole) =
            self.reader.ask(RouteNetlinkMessage::GetLink(LinkMessage::default())).await?;
        for message in messages {
            if let RouteNetlinkMessage::NewLink(message) = message
                && let Some((name, link)) = read_link(&message)
            {
                names.insert(message.header.index, name.clone());
                links.insert(name, link);
            }
        }
        let mut secondary: BTreeMap<InterfaceName, Vec<Ipv4Addr>> = BTreeMap::new();
        let (messages, addresses_whole) =
            self.reader.ask(RouteNetlinkMessage::GetAddress(AddressMessage::default())).await?;
        for message in messages {
            let RouteNetlinkMessage::NewAddress(message) = message else { continue };
            let Some(name) = names.get(&message.header.index) else { continue };
            let Some(address) = read_address(&message) else { continue };
            if message.header.flags.contains(AddressHeaderFlags::Secondary) {
                secondary.entry(name.clone()).or_default().push(address);
            } else if let Some(link) = links.get_mut(name) {
                link.addresses.push(address);
            }
        }
        for (name, addresses) in secondary {
            if let Some(link) = links.get_mut(&name) {
                link.addresses.extend(addresses);
            }
        }
        Ok((links, links_whole && addresses_whole))
    }
}

impl LinkReader {
    /// All that the kernel answers to a question, and whether nothing changed while it did.
    pub async fn ask(
        &self,
        question: RouteNetlinkMessage,
    ) -> Result<(Vec<RouteNetlinkMessage>, bool), rtnetlink::Error> {
        let mut question = NetlinkMessage::from(question);
        question.header.flags = NLM_F_REQUEST | NLM_F_DUMP;
        let mut answers = self.0.clone().request(question)?;
        let (mut messages, mut whole) = (Vec::new(), true);
        while let Some(answer) = answers.next().await {
            whole &= answer.header.flags & NLM_F_DUMP_INTR == 0;
            match answer.payload {
                NetlinkPayload::InnerMessage(message) => messages.push(message),
                NetlinkPayload::Error(error) => return Err(rtnetlink::Error::NetlinkError(error)),
                _ => {}
            }
        }
        Ok((messages, whole))
    }
}

fn read_link(message: &LinkMessage) -> Option<(InterfaceName, Link)> {
    let flags = message.header.flags;
    let mut name = None;
    let mut link = Link {
        index: IfIndex(message.header.index),
        up: flags.contains(LinkFlags::Up) && flags.contains(LinkFlags::LowerUp),
        mtu: 0,
        mac: None,
        ethernet: matches!(message.header.link_layer_type, LinkLayerType::Ether | LinkLayerType::Loopback),
        arp: !flags.intersects(LinkFlags::Noarp | LinkFlags::Loopback | LinkFlags::Pointopoint),
        addresses: Vec::new(),
        kind: String::new(),
        rx_queues: 1,
        near_cpus: Vec::new(),
        xdp_program: None,
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(text) => name = text.parse::<InterfaceName>().ok(),
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            LinkAttribute::Address(address) => link.mac = address[..].try_into().ok(),
            LinkAttribute::NumRxQueues(queues) => link.rx_queues = *queues,
            LinkAttribute::Xdp(xdp) => link.xdp_program = read_xdp(xdp),
            LinkAttribute::LinkInfo(infos) => {
                link.kind = infos.iter().find_map(read_kind).unwrap_or_default();
            }
            _ => {}
        }
    }
    let name = name?;
    link.rx_queues = ethtool::rx_queues(&name).unwrap_or(link.rx_queues).max(1);
    let driver = ethtool::driver(&name);
    if let Some((_, bus)) = &driver {
        // By the bus, whose devices every network namespace shows alike.
        let list = std::fs::read_to_string(format!("/sys/bus/pci/devices/{bus}/local_cpulist"));
        link.near_cpus = list.ok().and_then(|list| parse_cpus(list.trim()).ok()).unwrap_or_default();
    }
    if link.kind.is_empty() {
        link.kind = driver.map_or_else(|| "device".to_owned(), |(driver, _)| driver);
    }
    Some((name, link))
}

fn read_kind(info: &LinkInfo) -> Option<String> {
    match info {
        LinkInfo::Kind(InfoKind::Other(kind)) => Some(kind.clone()),
        LinkInfo::Kind(kind) => Some(kind.to_string()),
        _ => None,
    }
}

fn read_xdp(xdp: &[LinkXdp]) -> Option<u32> {
    let attached = !xdp.iter().any(|attribute| matches!(attribute, LinkXdp::Attached(XdpAttached::None)));
    let id = xdp.iter().find_map(|attribute| match attribute {
        LinkXdp::ProgId(id) | LinkXdp::DrvProgId(id) | LinkXdp::SkbProgId(id) | LinkXdp::HwProgId(id) => {
            Some(*id)
        }
        _ => None,
    });
    id.filter(|_| attached)
}

fn read_address(message: &AddressMessage) -> Option<Ipv4Addr> {
    let mut found = None;
    for attribute in &message.attributes {
        match attribute {
            // On a point-to-point device `Address` is the peer's and `Local` our own.
            AddressAttribute::Local(IpAddr::V4(address)) => return Some(*address),
            AddressAttribute::Address(IpAddr::V4(address)) => found = Some(*address),
            _ => {}
        }
    }
    found
}
