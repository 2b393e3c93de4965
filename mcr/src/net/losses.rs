//! What the kernel and the driver say that a device has lost: its link's statistics, those of its queueing
//! disciplines, and those of the driver.

use std::collections::BTreeMap;

use rtnetlink::packet_route::{
    RouteNetlinkMessage,
    link::{LinkAttribute, LinkMessage, Stats64},
    tc::{TcAttribute, TcHandle, TcMessage, TcStats2},
};

use crate::{
    net::links::LinkReader,
    rule::{IfIndex, InterfaceName},
    sys::ethtool,
};

/// Who counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// `struct rtnl_link_stats64`, by the names of its fields.
    Link,
    /// A queueing discipline, its kind before the name.
    Qdisc,
    /// `ethtool -S`.
    Driver,
}

/// A counter of a device.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Counter {
    pub level: Level,
    pub name: String,
    /// Handle and parent of the queueing discipline, of which a device may have several of one kind.
    pub of: [(u16, u16); 2],
}

impl Counter {
    fn new(level: Level, name: impl Into<String>) -> Self {
        Self { level, name: name.into(), of: [(0, 0); 2] }
    }
}

/// Counters of losses, as the kernel has them.
pub type Counters = BTreeMap<Counter, u64>;

impl LinkReader {
    /// Of each of these devices that is there: its index and its counters.
    pub async fn losses(
        &self,
        wanted: impl Fn(&InterfaceName) -> bool,
    ) -> Result<BTreeMap<InterfaceName, (IfIndex, Counters)>, rtnetlink::Error> {
        let mut devices = BTreeMap::new();
        let mut names = BTreeMap::new();
        for message in self.ask(RouteNetlinkMessage::GetLink(LinkMessage::default())).await?.0 {
            let RouteNetlinkMessage::NewLink(message) = message else { continue };
            let Some((name, mut counters)) = of_link(&message).filter(|(name, _)| wanted(name)) else {
                continue;
            };
            counters.extend(of_driver(&name));
            names.insert(message.header.index, name.clone());
            devices.insert(name, (IfIndex(message.header.index), counters));
        }
        for message in self.ask(RouteNetlinkMessage::GetQueueDiscipline(TcMessage::default())).await?.0 {
            let RouteNetlinkMessage::NewQueueDiscipline(message) = message else { continue };
            let name = names.get(&(message.header.index.cast_unsigned()));
            if let Some((_, counters)) = name.and_then(|name| devices.get_mut(name)) {
                counters.extend(of_qdisc(&message));
            }
        }
        Ok(devices)
    }
}

fn of_link(message: &LinkMessage) -> Option<(InterfaceName, Counters)> {
    let (mut name, mut counters) = (None, Counters::new());
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(text) => name = text.parse::<InterfaceName>().ok(),
            LinkAttribute::Stats64(stats) => {
                let named = losses(stats).map(|(name, count)| (Counter::new(Level::Link, name), count));
                counters.extend(named);
            }
            _ => {}
        }
    }
    Some((name?, counters))
}

fn losses(stats: &Stats64) -> [(&'static str, u64); 13] {
    [
        ("rx_errors", stats.rx_errors),
        ("rx_dropped", stats.rx_dropped),
        ("rx_missed_errors", stats.rx_missed_errors),
        ("rx_over_errors", stats.rx_over_errors),
        ("rx_fifo_errors", stats.rx_fifo_errors),
        ("rx_crc_errors", stats.rx_crc_errors),
        ("rx_length_errors", stats.rx_length_errors),
        ("rx_frame_errors", stats.rx_frame_errors),
        ("rx_nohandler", stats.rx_nohandler),
        ("tx_errors", stats.tx_errors),
        ("tx_dropped", stats.tx_dropped),
        ("tx_fifo_errors", stats.tx_fifo_errors),
        ("tx_carrier_errors", stats.tx_carrier_errors),
    ]
}

/// Those of the driver's statistics whose names say that something was lost.
fn of_driver(device: &InterfaceName) -> impl Iterator<Item = (Counter, u64)> {
    ethtool::statistics(device)
        .into_iter()
        .filter(|(name, _)| says_loss(name))
        .map(|(name, count)| (Counter::new(Level::Driver, name), count))
}

fn says_loss(name: &str) -> bool {
    const WORDS: [&str; 8] = ["drop", "miss", "err", "discard", "no_buf", "nobuf", "fail", "full"];
    let name = name.to_ascii_lowercase();
    WORDS.iter().any(|word| name.contains(word))
}

fn of_qdisc(message: &TcMessage) -> Vec<(Counter, u64)> {
    let number = |TcHandle { major, minor }| (major, minor);
    let of = [number(message.header.handle), number(message.header.parent)];
    let (mut kind, mut found) = ("", None);
    for attribute in &message.attributes {
        match attribute {
            TcAttribute::Kind(text) => kind = text,
            TcAttribute::Stats2(stats) => {
                found = stats
                    .iter()
                    .find_map(|of| if let TcStats2::Queue(queue) = of { Some(queue) } else { None });
            }
            _ => {}
        }
    }
    let Some(queue) = found else { return Vec::new() };
    [("drops", queue.drops), ("overlimits", queue.overlimits)]
        .map(|(name, count)| {
            (Counter { of, ..Counter::new(Level::Qdisc, format!("{kind} {name}")) }, count.into())
        })
        .to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_say_loss() {
        for (name, loss) in [
            ("rx_queue_0_drops", true),
            ("rx_queue_0_xdp_drops", true),
            ("tx_queue_0_xdp_xmit_errors", true),
            ("rx_missed_errors", true),
            ("rx_no_buffer_count", true),
            ("port.rx_dropped", true),
            ("rx_out_of_buffer", false),
            ("RxDiscards", true),
            ("alloc_rx_buff_failed", true),
            ("tx_queue_full", true),
            ("rx_queue_0_xdp_packets", false),
            ("tx_bytes", false),
            ("peer_ifindex", false),
        ] {
            assert_eq!(says_loss(name), loss, "{name}");
        }
    }
}
