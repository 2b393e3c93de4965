//! What was lost on the devices that rules name, since the daemon first looked at each. It is known of the device
//! as a whole and put on no rule.

use std::collections::BTreeMap;

use crate::{
    net::{
        links::LinkReader,
        losses::{Counters, Level},
    },
    rule::{IfIndex, InterfaceName},
    supervisor::state::State,
};

/// What was lost, by name; every counter is there that was ever seen.
pub type Losses = BTreeMap<(Level, String), u64>;

/// A device's counters, which only go on: they start where the daemon first saw them, and again with each
/// device that is made anew under the name.
#[derive(Debug)]
struct Device {
    index: IfIndex,
    last: Counters,
    lost: Losses,
}

impl Device {
    fn new(index: IfIndex, last: Counters) -> Self {
        let nothing = last.keys().map(|counter| ((counter.level, counter.name.clone()), 0)).collect();
        Self { index, last, lost: nothing }
    }

    fn take(&mut self, index: IfIndex, now: Counters) {
        if index == self.index {
            for (counter, &count) in &now {
                // One that is new, as a queueing discipline that came later, or that went back, starts from nothing.
                let before = self.last.get(counter).copied().unwrap_or_default();
                let gained = count.checked_sub(before).unwrap_or(count);
                *self.lost.entry((counter.level, counter.name.clone())).or_default() += gained;
            }
        }
        self.index = index;
        self.last = now;
    }
}

pub struct Devices {
    links: LinkReader,
    seen: BTreeMap<InterfaceName, Device>,
}

impl Devices {
    pub fn new(links: LinkReader) -> Self {
        Self { links, seen: BTreeMap::new() }
    }

    /// Whether rules name a device that has not been looked at.
    pub fn awaits(&self, state: &State) -> bool {
        state.rules().interfaces().into_iter().any(|name| {
            let index = state.links().get(name).map(|link| link.index);
            index.is_some() && index != self.seen.get(name).map(|device| device.index)
        })
    }

    /// Reads the counters of the devices that rules name.
    pub async fn read(&mut self, state: &State) -> Result<(), rtnetlink::Error> {
        let named = state.rules().interfaces();
        if named.is_empty() {
            return Ok(());
        }
        for (name, (index, counters)) in self.links.losses(|name| named.contains(name)).await? {
            if let Some(device) = self.seen.get_mut(&name) {
                device.take(index, counters);
            } else {
                self.seen.insert(name, Device::new(index, counters));
            }
        }
        Ok(())
    }

    /// Every device that was looked at, and what it lost.
    pub fn iter(&self) -> impl Iterator<Item = (&InterfaceName, &Losses)> {
        self.seen.iter().map(|(name, device)| (name, &device.lost))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::losses::Counter;

    fn counters(counts: &[(&str, u16, u64)]) -> Counters {
        let counter = |name: &str, major| Counter {
            level: Level::Qdisc,
            name: name.to_owned(),
            of: [(major, 0), (0xffff, 0xffff)],
        };
        counts.iter().map(|&(name, major, count)| (counter(name, major), count)).collect()
    }

    #[test]
    fn counters_only_go_on() {
        let mut device = Device::new(IfIndex(4), counters(&[("tbf drops", 1, 100)]));
        for (index, now, drops) in [
            (4, &[("tbf drops", 1, 100)][..], 0),
            (4, &[("tbf drops", 1, 107)], 7),
            // Another of its kind beside it, all of whose drops are new.
            (4, &[("tbf drops", 1, 107), ("tbf drops", 2, 3)], 10),
            // It was replaced.
            (4, &[("tbf drops", 5, 2)], 12),
            // It went back.
            (4, &[("tbf drops", 5, 1)], 13),
            // Another device: what it had lost before is not known to be ours.
            (9, &[("tbf drops", 5, 1000)], 13),
            (9, &[("tbf drops", 5, 1001)], 14),
        ] {
            device.take(IfIndex(index), counters(now));
            assert_eq!(device.lost.values().copied().collect::<Vec<_>>(), [drops], "{now:?}");
        }
    }
}
