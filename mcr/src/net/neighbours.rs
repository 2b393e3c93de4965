//! Where the hosts of outputs are found on their links: the next hop by the kernel's routes, and what its
//! neighbour table has of that. The kernel takes datagrams for a host that nobody answers for and drops them
//! without a word; this is how it is known.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::Ipv4Addr,
};

use futures_util::{Stream, StreamExt};
use rtnetlink::{
    Handle, MulticastGroup, RouteMessageBuilder,
    packet_core::NetlinkPayload,
    packet_route::{
        AddressFamily, RouteNetlinkMessage,
        neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState},
        route::{RouteAddress, RouteAttribute, RouteType},
    },
};

use crate::rule::IfIndex;

/// A host that is sent to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Host {
    /// The egress interface.
    pub interface: IfIndex,
    /// The source address of what is sent.
    pub source: Ipv4Addr,
    pub address: Ipv4Addr,
}

/// Where a host's datagrams go next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NextHop {
    /// The kernel refuses to route to it by that interface.
    NoRoute,
    /// The address is the broadcast of a network that the interface is in.
    Broadcast,
    /// It needs no neighbour: the host is this one.
    Direct,
    Neighbour(Neighbour),
}

/// A neighbour on a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Neighbour {
    /// The host itself, or the router to it.
    pub address: Ipv4Addr,
    /// Its MAC, while it is known; of one that is looked for again, the one that it had, until it fails to answer.
    pub mac: Option<[u8; 6]>,
    /// The kernel does not have its MAC.
    pub sought: bool,
    /// It did not answer when it was last looked for, and has not answered since.
    pub failed: bool,
}

/// Next hops of hosts.
pub type NextHops = BTreeMap<Host, NextHop>;

/// An address on a link.
type Place = (IfIndex, Ipv4Addr);

/// What the kernel has of each neighbour: MAC and state.
type Table = BTreeMap<Place, (Option<[u8; 6]>, NeighbourState)>;

impl Neighbour {
    /// A neighbour by what the kernel has of it, by the MAC that it had, and by whether it had failed. It goes on to
    /// be what it was while it is looked for again.
    fn read(
        address: Ipv4Addr,
        entry: Option<&(Option<[u8; 6]>, NeighbourState)>,
        former: Option<[u8; 6]>,
        had_failed: bool,
    ) -> Self {
        let failed = match entry.map(|(_, state)| state) {
            Some(NeighbourState::Failed) => true,
            Some(NeighbourState::Incomplete | NeighbourState::None) | None => had_failed,
            Some(_) => false,
        };
        let mac = entry.and_then(|(mac, _)| *mac);
        Self { address, mac: mac.or(former.filter(|_| !failed)), sought: mac.is_none(), failed }
    }
}

impl NextHop {
    /// The kernel does not know where it is.
    pub fn is_unresolved(&self) -> bool {
        matches!(self, Self::Neighbour(Neighbour { sought: true, .. }))
    }
}

/// Reads next hops, hears of changes, and has the kernel look for neighbours.
pub struct NeighbourWatch {
    handle: Handle,
    neighbours: Box<dyn Stream<Item = RouteNetlinkMessage> + Unpin>,
    routes: super::Changes,
    /// The neighbours that were asked about last: all others may do what they want.
    watched: BTreeSet<Place>,
    /// Those of them that have failed since: where much is sent to one the kernel looks for it again at once, so
    /// that its table hardly ever shows it.
    failed: BTreeSet<Place>,
    /// Something has changed since it was read.
    stale: bool,
    routes_stale: bool,
}

impl NeighbourWatch {
    /// Must be called within the runtime whose task carries the netlink connection.
    pub fn open() -> io::Result<Self> {
        let (connection, handle, neighbours) = rtnetlink::new_multicast_connection(&[MulticastGroup::Neigh])?;
        tokio::spawn(connection);
        let groups = [MulticastGroup::Ipv4Route, MulticastGroup::Ipv4Rule];
        let (connection, _, routes) = rtnetlink::new_multicast_connection(&groups)?;
        tokio::spawn(connection);
        let neighbours = neighbours.filter_map(|(message, _)| {
            std::future::ready(match message.payload {
                NetlinkPayload::InnerMessage(message) => Some(message),
                _ => None,
            })
        });
        Ok(Self {
            handle,
            neighbours: Box::new(neighbours),
            routes: Box::new(routes.map(|_| ())),
            watched: BTreeSet::new(),
            failed: BTreeSet::new(),
            stale: false,
            routes_stale: false,
        })
    }

    /// Takes note of one change.
    pub async fn changed(&mut self) {
        tokio::select! {
            Some(message) = self.neighbours.next() => self.neighbour_changed(&message),
            () = super::next(&mut self.routes) => (self.stale, self.routes_stale) = (true, true),
        }
    }

    fn neighbour_changed(&mut self, message: &RouteNetlinkMessage) {
        let (RouteNetlinkMessage::NewNeighbour(entry) | RouteNetlinkMessage::DelNeighbour(entry)) = message
        else {
            return;
        };
        let Some(place) = read_place(entry).filter(|place| self.watched.contains(place)) else { return };
        self.stale = true;
        if matches!(message, RouteNetlinkMessage::DelNeighbour(_)) {
            // Somebody flushes the table: before an entry goes the kernel calls it failed.
            self.failed.remove(&place);
        } else if entry.header.state == NeighbourState::Failed {
            self.failed.insert(place);
        }
    }

    /// Whether something has changed since the next hops were read.
    pub fn is_stale(&self) -> bool {
        self.stale
    }

    /// The next hops of hosts; `former` are those that were read last.
    pub async fn next_hops(
        &mut self,
        hosts: &BTreeSet<Host>,
        former: &NextHops,
    ) -> Result<NextHops, rtnetlink::Error> {
        let table = self.table().await?;
        let mut watched = BTreeSet::new();
        let mut hops = NextHops::new();
        for &host in hosts {
            let known = former.get(&host).copied();
            let mut hop = match known.filter(|_| !self.routes_stale) {
                Some(hop) => hop,
                None => self.route(host).await?,
            };
            if let NextHop::Neighbour(Neighbour { address, .. }) = hop {
                let place = (host.interface, address);
                let known = match known {
                    Some(NextHop::Neighbour(known)) if known.address == address => Some(known),
                    _ => None,
                };
                let had_failed = self.failed.contains(&place) || known.is_some_and(|known| known.failed);
                let former = known.and_then(|known| known.mac);
                watched.insert(place);
                hop = NextHop::Neighbour(Neighbour::read(address, table.get(&place), former, had_failed));
            }
            hops.insert(host, hop);
        }
        (self.watched, self.stale, self.routes_stale) = (watched, false, false);
        self.failed.clear();
        Ok(hops)
    }

    /// Has the kernel look for the neighbours whose MAC it does not know; with `all`, and see from time to time
    /// whether the others still have theirs, as it does for those that it sends to itself: frames that are
    /// redirected use no entry, and one that nobody uses is never asked again.
    pub async fn look_for(&self, all: bool) -> Result<(), rtnetlink::Error> {
        if self.watched.is_empty() {
            return Ok(());
        }
        let table = self.table().await?;
        let mut outcome = Ok(());
        for place @ &(interface, address) in &self.watched {
            let wanted = match table.get(place) {
                // To use an entry makes the kernel forget that it was to stand for good.
                Some((_, NeighbourState::Permanent)) => false,
                Some((Some(_), _)) => all,
                _ => true,
            };
            if wanted {
                let request = self.handle.neighbours().add(interface.0, address.into());
                // To replace is to take the entry as it is; `Use` alone is done to it.
                let request = request.state(NeighbourState::None).flags(NeighbourFlags::Use).replace();
                if let Err(error) = request.execute().await {
                    outcome = Err(error);
                }
            }
        }
        outcome
    }

    /// Where the routes lead; nothing is known yet of a neighbour there.
    async fn route(&self, host: Host) -> Result<NextHop, rtnetlink::Error> {
        let message = RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(host.address, 32)
            .source_prefix(host.source, 32)
            .output_interface(host.interface.0)
            .build();
        let mut answers = Box::pin(self.handle.route().get(message).execute());
        let route = match answers.next().await {
            Some(Ok(route)) if route.header.kind == RouteType::Unicast => route,
            Some(Ok(route)) if route.header.kind == RouteType::Broadcast => return Ok(NextHop::Broadcast),
            Some(Err(rtnetlink::Error::NetlinkError(_))) => return Ok(NextHop::NoRoute),
            Some(Err(error)) => return Err(error),
            _ => return Ok(NextHop::Direct),
        };
        let mut address = host.address;
        for attribute in &route.attributes {
            match attribute {
                RouteAttribute::Gateway(RouteAddress::Inet(gateway)) => address = *gateway,
                // A router of another family, whose neighbours are not read.
                RouteAttribute::Via(_) => return Ok(NextHop::Direct),
                _ => {}
            }
        }
        Ok(NextHop::Neighbour(Neighbour { address, mac: None, sought: true, failed: false }))
    }

    async fn table(&self) -> Result<Table, rtnetlink::Error> {
        let request = self.handle.neighbours().get().set_address_family(AddressFamily::Inet);
        let mut answers = Box::pin(request.execute());
        let mut table = Table::new();
        while let Some(message) = answers.next().await.transpose()? {
            if let Some(place) = read_place(&message) {
                table.insert(place, (read_mac(&message), message.header.state));
            }
        }
        Ok(table)
    }
}

fn read_place(message: &NeighbourMessage) -> Option<Place> {
    message.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::Destination(NeighbourAddress::Inet(address)) => {
            Some((IfIndex(message.header.ifindex), *address))
        }
        _ => None,
    })
}

fn read_mac(message: &NeighbourMessage) -> Option<[u8; 6]> {
    message.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::LinkLayerAddress(mac) => mac[..].try_into().ok(),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_neighbour_that_failed_stays_so_until_it_answers() {
        use NeighbourState::{Delay, Failed, Incomplete, None, Permanent, Probe, Reachable, Stale};
        let host = Ipv4Addr::new(10, 0, 0, 9);
        let failed =
            |state, before| Neighbour::read(host, Some(&(Option::None, state)), Option::None, before).failed;
        for before in [false, true] {
            for state in [Incomplete, None] {
                assert_eq!(failed(state, before), before, "{state}");
            }
            assert!(failed(Failed, before));
            for state in [Reachable, Stale, Delay, Probe, Permanent] {
                assert!(!failed(state, before), "{state}");
            }
            assert_eq!(Neighbour::read(host, Option::None, Option::None, before).failed, before);
        }
    }

    #[test]
    fn a_neighbour_that_is_looked_for_again_is_where_it_was_until_it_fails() {
        use NeighbourState::{Delay, Failed, Incomplete, Probe, Reachable, Stale};
        let (old, new) = ([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);
        let read = |entry: Option<(Option<[u8; 6]>, NeighbourState)>, had_failed| {
            let found = Neighbour::read(Ipv4Addr::LOCALHOST, entry.as_ref(), Some(old), had_failed);
            (found.mac, found.sought)
        };
        for state in [Reachable, Stale, Delay, Probe] {
            assert_eq!(read(Some((Some(new), state)), false), (Some(new), false), "{state}");
        }
        for gone in [None, Some((None, Incomplete))] {
            assert_eq!(read(gone, false), (Some(old), true), "{gone:?}");
            assert_eq!(read(gone, true), (None, true), "{gone:?}");
        }
        assert_eq!(read(Some((None, Failed)), false), (None, true));
    }
}
