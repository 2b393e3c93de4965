//! What a daemon that is gone left in the kernel: gone on with where this one can, cleared away where it cannot.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    time::Duration,
};

use mcr_common::flow::action;
use tokio::time::sleep;
use tracing::{debug, info, warn};

use super::{
    books::{Counted, Offsets},
    event::{Event, Inheritance},
    host::Namespace,
    journal::Memory,
    run::{Daemon, follow_log, one_line},
};
use crate::{
    config::Config,
    ebpf::{self, Adopted, Carried, Former, Steering, Unfit},
    net::links::LinkWatch,
    rule::{InterfaceName, RuleSlot},
};

/// How long the kernel may take to detach a program whose pins are gone.
const DETACHING: Duration = Duration::from_secs(1);

/// A program that runs until that of this daemon takes its place.
pub struct Succeeded {
    former: Former,
    /// What it had counted when this daemon came.
    counted: Vec<Counted>,
    /// What of that was each rule's own.
    pub offsets: Vec<Offsets>,
}

impl Daemon {
    /// Takes over what was left and was remembered, and the rules of the files; then these are what is remembered.
    pub async fn begin(
        &mut self,
        namespace: &Namespace,
        links: &LinkWatch,
        config: Config,
        memory: Memory,
    ) -> anyhow::Result<()> {
        let places = self.inherit(namespace, links, memory.offsets).await;
        self.load_first(config, memory.confirmed)?;
        self.recall(memory.rules);
        self.books.end_inheritance();
        self.remember();
        for place in &places {
            ebpf::clear_former(place);
        }
        Ok(())
    }

    /// Takes over what was left, or clears it away; before there are rules. Gives the places of the pins, in which former
    /// ones stay until this daemon's own offsets are written down.
    async fn inherit(
        &mut self,
        namespace: &Namespace,
        links: &LinkWatch,
        mut offsets: Vec<Offsets>,
    ) -> BTreeSet<PathBuf> {
        self.state.inherit_memberships(self.kept.held());
        let mut cleared = Vec::new();
        let places = ebpf::settle(&namespace.leftovers());
        for pins in &places {
            offsets.extend(self.continued(pins, &offsets));
            let name = pins.file_name().and_then(|name| name.to_str()).and_then(|name| name.parse().ok());
            let taken_over = match &name {
                Some(interface) => self.take_over(interface, &offsets),
                None => Err("no interface has such a name".to_owned()),
            };
            if let Err(why) = taken_over {
                warn!(pins = %pins.display(), "cleared what a daemon before left: {why}");
                ebpf::clear_pins(pins);
                cleared.extend(name);
            }
        }
        if !cleared.is_empty() {
            self.wait_until_detached(links, &cleared).await;
        }
        places
    }

    /// The offsets of what runs in a place, where its daemon did not live to write them down.
    fn continued(&self, place: &Path, offsets: &[Offsets]) -> Vec<Offsets> {
        let Some(mut former) = Former::in_place_of(place, self.settings.max_rules) else { return Vec::new() };
        let (_, counted) = read_carried(former.counted(), former.identity());
        let maps = ebpf::identity_of(place);
        let known = |counted: &Counted| offsets.iter().find_map(|known| known.continued(counted, maps));
        counted.iter().filter_map(known).collect()
    }

    fn take_over(&mut self, interface: &InterfaceName, offsets: &[Offsets]) -> Result<(), String> {
        if !self.state.has_bpf() {
            return Err("this daemon has no eBPF".to_owned());
        }
        let placement = self.placement(interface)?;
        let (mut steering, inheritance, counted) = match Steering::adopt(&self.object, &placement) {
            Ok(None) => return Ok(()),
            Ok(Some(Adopted { mut steering, flows, sets, former_rewrite })) => {
                if former_rewrite {
                    steering.renew_outputs(&sets).map_err(|error| one_line(&error))?;
                }
                let (goes_on, others): (Vec<_>, Vec<_>) = flows
                    .into_iter()
                    .partition(|(_, flow)| matches!(flow.action, action::REDIRECT | action::LOOP));
                // Whose workers are gone begins anew: no frame comes to one that does not listen yet.
                let mut others = others.iter();
                others
                    .try_for_each(|(key, _)| steering.delete_flow(key))
                    .map_err(|error| one_line(&error))?;
                let inheritance = Inheritance { flows: goes_on, sets, to_succeed: false };
                let redirected = inheritance.flows.iter().filter(|(_, flow)| flow.action == action::REDIRECT);
                let slots = redirected.map(|(_, flow)| RuleSlot(flow.rule));
                let counted = slots.filter_map(|slot| Counted::read(&steering, &inheritance, slot)).collect();
                (steering, inheritance, counted)
            }
            Err(unfit) => {
                let Unfit { why, carried, former } = *unfit;
                let Some(former) = former else { return Err(one_line(&why)) };
                info!(%interface, "what a daemon before left is replaced: {}", one_line(&why));
                let steering = Steering::succeed(&self.object, &placement, &former);
                let steering = steering.map_err(|error| one_line(&error))?;
                let maps = former.identity();
                let (inheritance, counted) = read_carried(carried, maps);
                let offsets = offsets.iter().filter(|offsets| offsets.is_of(maps)).cloned().collect();
                let succeeded = Succeeded { former, counted: counted.clone(), offsets };
                self.formers.insert(interface.clone(), succeeded);
                (steering, inheritance, counted)
            }
        };
        if !self.state.inherit(interface, &inheritance) {
            return Err("its rules do not go together with those of another interface".to_owned());
        }
        let ours = !inheritance.to_succeed;
        self.books.inherit(&counted, offsets, ours);
        if ours {
            self.books.begin_sockets(interface, &steering);
        }
        follow_log(interface, &mut steering);
        self.programs.insert(interface.clone(), steering);
        let rules = inheritance.sets.len();
        info!(%interface, rules, "taken over what the kernel does by itself");
        Ok(())
    }

    /// Adds what a former program has counted since it was taken over, if there was one; it has ended.
    pub fn end_former(&mut self, interface: &InterfaceName) -> bool {
        let Some(Succeeded { mut former, counted, .. }) = self.formers.remove(interface) else {
            return false;
        };
        if let Err(error) = ebpf::barrier() {
            debug!(%error, "what is just being counted may be missing");
        }
        let (_, now) = read_carried(former.counted(), former.identity());
        self.books.carry(&counted, &now);
        true
    }

    /// An interface takes another program only when the former one is gone.
    async fn wait_until_detached(&mut self, links: &LinkWatch, cleared: &[InterfaceName]) {
        const PERIOD: Duration = Duration::from_millis(10);
        for _ in 0..DETACHING.as_millis() / PERIOD.as_millis() {
            let Ok(now) = links.snapshot().await else { return };
            let occupied =
                cleared.iter().any(|name| now.get(name).is_some_and(|link| link.xdp_program.is_some()));
            self.state.apply(Event::Links(now));
            if !occupied {
                return;
            }
            sleep(PERIOD).await;
        }
    }
}

/// What another build left, as this one would have found it.
fn read_carried(carried: Carried, maps: u32) -> (Inheritance, Vec<Counted>) {
    let Carried { flows, rules, outputs, .. } = carried;
    let mut inheritance = Inheritance { flows, to_succeed: true, ..Inheritance::default() };
    let mut counted: BTreeMap<RuleSlot, Counted> = BTreeMap::new();
    for carried in outputs {
        inheritance.sets.entry(carried.rule).or_default().push(carried.output);
        let Some(rule) = rules.get(&carried.rule) else { continue };
        let counted = counted.entry(carried.rule);
        let counted =
            counted.or_insert(Counted { slot: carried.rule, maps, rule: *rule, outputs: Vec::new() });
        counted.outputs.push((carried.output.slot, carried.totals));
    }
    (inheritance, counted.into_values().collect())
}
