//! Where the kernel sends a rule's datagrams on by itself: the outputs of each rule, and their counters.
//!
//! A set of outputs is built in the one of the rule's two fans that is not in use, and takes over by the write of
//! one byte: a frame meets the former set or the new one, whole. Changing a fan's devices waits in the kernel until no
//! program runs that might still use the former ones (a map of maps does that), so what is retired is final.
//!
//! What outputs received, and in which sets they are, lies in a map of its own ([`Share`]), for the daemon that comes after.

use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsFd, BorrowedFd},
    path::PathBuf,
};

use aya::{
    maps::{Array, HashMap, Map, MapData, MapError, PerCpuArray, PerCpuHashMap, PerCpuValues, xdp::DevMap},
    programs::{ProgramError, ProgramFd},
    util::nr_cpus,
};
use mcr_common::{
    abi::map,
    counters::OutputCounters,
    redirect::{self, Chain, ChainKey, Fan, MOST_OUTPUTS, NO_RECORD, Record, Rewrite},
};
use thiserror::Error;

use super::{
    MapAccessError, access, errno,
    pinned::{self, RECEIVED},
    steering::{Maps, PinError},
};
use crate::{
    rule::{IfIndex, MAX_OUTPUTS, OutputSlot, RuleSlot},
    sys::map_batch,
};

const _: () = assert!(MAX_OUTPUTS == MOST_OUTPUTS as usize);

#[derive(Debug, Error)]
pub enum RedirectError {
    #[error("the egress program cannot be loaded: {0}")]
    Load(#[source] ProgramError),
    #[error("generic XDP tells the egress interfaces nothing: native XDP is needed on the ingress interface")]
    Generic,
    #[error("the egress interface with index {} is gone", .egress.0)]
    Gone { rule: RuleSlot, egress: IfIndex },
    #[error("{path} cannot be pinned: {why}")]
    Pin { path: PathBuf, why: String },
    #[error("the pinned outputs of rule slot {} do not fit together", .rule.0)]
    Torn { rule: RuleSlot },
    #[error(transparent)]
    Map(#[from] MapAccessError),
}

/// An output as the kernel serves it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RedirectOutput {
    pub slot: OutputSlot,
    pub egress: IfIndex,
    pub rewrite: Rewrite,
}

/// What became of an output's datagrams. Counters only go on, whatever sets the output is in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RedirectTotals {
    /// Datagrams broadcast while the output was in its rule's set.
    pub received: u64,
    pub counters: OutputCounters,
}

impl RedirectTotals {
    /// Datagrams that the kernel lost in silence: the egress interface was down, or took no redirected frames. Those that
    /// are on their way at the moment are among them.
    pub fn skipped(&self) -> u64 {
        let OutputCounters { rewritten, too_big, ttl_expired, .. } = self.counters;
        self.received.saturating_sub(rewritten + too_big + ttl_expired)
    }
}

/// The outputs in a fan.
type Set = Vec<(OutputSlot, IfIndex)>;

/// The sets of outputs that rules use, in the order of their fans.
pub type Sets = BTreeMap<RuleSlot, Vec<RedirectOutput>>;

/// What an output got in the sets of one of its rule's banks, and the set that it is in there. By
/// [`redirect::record`], each written at once.
#[derive(Clone, Copy)]
struct Share {
    /// Datagrams that it got in sets that are no more.
    former: u64,
    /// What the fan had counted when the present set got it; `u64::MAX` if the output is in none.
    since: u64,
    fan: u32,
    egress: IfIndex,
}

impl Share {
    const OUTSIDE: u64 = u64::MAX;

    fn to_words(self) -> [u64; 3] {
        [self.former, self.since, u64::from(self.fan) << 32 | u64::from(self.egress.0)]
    }

    fn from_words([former, since, place]: [u64; 3]) -> Self {
        Self { former, since, fan: (place >> 32) as u32, egress: IfIndex(place as u32) }
    }
}

pub(super) struct Redirect {
    banks: Array<MapData, u32>,
    fans: PerCpuArray<MapData, Fan>,
    devices: MapData,
    records: Array<MapData, Record>,
    chains: PerCpuHashMap<MapData, ChainKey, Chain>,
    low_outputs: PerCpuArray<MapData, OutputCounters>,
    outputs: PerCpuHashMap<MapData, u32, OutputCounters>,
    shares: HashMap<MapData, u32, [u64; 3]>,
    cpus: usize,
    /// What stands in for the devices of a fan that is not in use; made when it is needed.
    nowhere: Option<MapData>,
    /// Sets by fan.
    sets: BTreeMap<u32, Set>,
    /// The bank that a rule uses.
    active: BTreeMap<RuleSlot, u32>,
}

impl Redirect {
    pub(super) fn take(maps: &mut Maps<'_>, max_rules: u32) -> Result<Self, PinError> {
        Ok(Self {
            banks: maps.take(map::BANKS)?,
            fans: maps.take(map::FANS)?,
            devices: match maps.take_any(map::DEVICES)? {
                Map::ArrayOfMaps(devices) => devices,
                _ => return Err((map::DEVICES.into(), "it is no array of maps".to_owned())),
            },
            records: maps.take(map::RECORDS)?,
            chains: maps.take(map::CHAINS)?,
            low_outputs: maps.take(map::LOW_OUTPUTS)?,
            outputs: maps.take(map::OUTPUTS)?,
            shares: maps.make(pinned::received_shape(max_rules), RECEIVED)?,
            cpus: nr_cpus().map_err(|(file, error)| (file.into(), error.to_string()))?,
            nowhere: None,
            sets: BTreeMap::new(),
            active: BTreeMap::new(),
        })
    }

    /// Goes on with what is pinned: clears up what a change left half-way, and answers the sets that are in use.
    pub(super) fn adopt(&mut self) -> Result<Sets, RedirectError> {
        let sets = self.read()?;
        let idle = |fan: &u32| self.active.get(&RuleSlot(fan / 2)).is_none_or(|bank| fan % 2 + 1 != *bank);
        let idle = self.sets.keys().copied().filter(idle).collect();
        self.retire(idle)?;
        Ok(sets)
    }

    /// Learns which outputs are in which fans, and which of these are in use.
    pub(super) fn read(&mut self) -> Result<Sets, RedirectError> {
        (self.sets, self.active) = Default::default();
        for entry in &self.shares {
            let (record, share) = entry.map_err(access(RECEIVED, "read"))?;
            let share = Share::from_words(share);
            if share.since != Share::OUTSIDE {
                self.sets.entry(share.fan).or_default().push((OutputSlot(record / 2), share.egress));
            }
        }
        let mut sets = Sets::new();
        for rule in (0..self.banks.len()).map(RuleSlot) {
            let bank = self.banks.get(&rule.0, 0).map_err(access(map::BANKS, "read"))?;
            if bank != 0 {
                self.active.insert(rule, bank);
                sets.insert(rule, self.walk(rule, redirect::fan(rule.0, bank))?);
            }
        }
        Ok(sets)
    }

    /// The outputs of a fan, by its records.
    fn walk(&self, rule: RuleSlot, fan: u32) -> Result<Vec<RedirectOutput>, RedirectError> {
        let torn = || RedirectError::Torn { rule };
        let set = self.sets.get(&fan).ok_or_else(torn)?;
        let cpus = self.fans.get(&fan, 0).map_err(access(map::FANS, "read"))?;
        let mut at = cpus.iter().next().map_or(NO_RECORD, |cpu| cpu.first);
        let mut outputs = Vec::with_capacity(set.len());
        while at != NO_RECORD && outputs.len() < set.len() {
            let record = self.records.get(&at, 0).map_err(access(map::RECORDS, "read"))?;
            let slot = OutputSlot(record.output);
            let (_, egress) = set.iter().find(|(output, _)| *output == slot).ok_or_else(torn)?;
            outputs.push(RedirectOutput { slot, egress: *egress, rewrite: record.rewrite });
            at = record.after;
        }
        if at == NO_RECORD && outputs.len() == set.len() { Ok(outputs) } else { Err(torn()) }
    }

    /// Gives rules other outputs, or none. When it returns no frame leaves by the former ones any more.
    pub(super) fn set(
        &mut self,
        program: &ProgramFd,
        changes: &[(RuleSlot, Vec<RedirectOutput>)],
    ) -> Result<(), RedirectError> {
        let spare = |redirect: &Self, rule| if redirect.active.get(&rule) == Some(&1) { 2 } else { 1 };
        // They are in use only if a change before failed half-way.
        self.retire(changes.iter().map(|(rule, _)| redirect::fan(rule.0, spare(self, *rule))).collect())?;
        let mut new = Vec::with_capacity(changes.len());
        for (rule, outputs) in changes.iter().filter(|(_, outputs)| !outputs.is_empty()) {
            let bank = spare(self, *rule);
            let fan = redirect::fan(rule.0, bank);
            new.push((fan, device_map(*rule, outputs, program)?));
            self.fill(fan, bank, outputs)?;
        }
        let places: Vec<_> = new.iter().map(|(fan, devices)| (*fan, devices.fd().as_fd())).collect();
        self.place(&places)?;
        let mut former = Vec::with_capacity(changes.len());
        for (rule, outputs) in changes {
            let bank = if outputs.is_empty() { 0 } else { spare(self, *rule) };
            former.extend(self.switch(*rule, bank)?);
        }
        self.retire(former)
    }

    /// Totals of an output of a rule.
    pub(super) fn totals(
        &self,
        rule: RuleSlot,
        output: OutputSlot,
    ) -> Result<RedirectTotals, MapAccessError> {
        let mut totals = RedirectTotals::default();
        // First, so that what is on its way is never counted as sent and not as received.
        for cpu in self.counters(output)?.iter().flat_map(|cpus| cpus.iter()) {
            totals.counters.rewritten += cpu.rewritten;
            totals.counters.rewritten_bytes += cpu.rewritten_bytes;
            totals.counters.too_big += cpu.too_big;
            totals.counters.ttl_expired += cpu.ttl_expired;
        }
        for bank in [1, 2] {
            if let Some(share) = self.share(output, bank)? {
                totals.received += share.former;
                let fan = redirect::fan(rule.0, bank);
                if share.since != Share::OUTSIDE && share.fan == fan {
                    totals.received += self.frames(fan)?.saturating_sub(share.since);
                }
            }
        }
        Ok(totals)
    }

    /// Has a rule use one of its fans, or none; the one that it used. One byte differs between any two banks, so that no
    /// program sees half of the change.
    fn switch(&mut self, rule: RuleSlot, bank: u32) -> Result<Option<u32>, MapAccessError> {
        self.banks.set(rule.0, bank, 0).map_err(access(map::BANKS, "written"))?;
        let former = match bank {
            0 => self.active.remove(&rule),
            _ => self.active.insert(rule, bank),
        };
        Ok(former.map(|bank| redirect::fan(rule.0, bank)))
    }

    /// Gives fans their devices. Returns when every program that was running has ended.
    fn place(&self, places: &[(u32, BorrowedFd<'_>)]) -> Result<(), MapAccessError> {
        map_batch::set_inner_maps(self.devices.fd().as_fd(), places)
            .map_err(|error| access(map::DEVICES, "written")(MapError::IoError(error)))
    }

    /// Writes records and chains of a fan that is not in use.
    fn fill(&mut self, fan: u32, bank: u32, outputs: &[RedirectOutput]) -> Result<(), MapAccessError> {
        let record = |output: &RedirectOutput| redirect::record(output.slot.0, bank);
        let since = self.frames(fan)?;
        // Known before anything is written, so that a failure leaves nothing that is not cleared up.
        self.sets.insert(fan, outputs.iter().map(|output| (output.slot, output.egress)).collect());
        for RedirectOutput { slot, egress, .. } in outputs {
            let former = self.share(*slot, bank)?.map_or(0, |share| share.former);
            self.set_share(*slot, bank, Share { former, since, fan, egress: *egress })?;
        }
        let mut firsts: BTreeMap<IfIndex, u32> = BTreeMap::new();
        let device = outputs.first().map_or(IfIndex(0), |output| output.egress);
        let mut after = NO_RECORD;
        for output in outputs.iter().rev() {
            let next = firsts.insert(output.egress, record(output)).unwrap_or(NO_RECORD);
            let value = Record { rewrite: output.rewrite, output: output.slot.0, next, after };
            after = record(output);
            self.records.set(after, value, 0).map_err(access(map::RECORDS, "written"))?;
            self.open_counters(output.slot)?;
        }
        let chain_from = |first| Chain { sequence: 0, next: first, first };
        let chain = chain_from(firsts.remove(&device).unwrap_or(NO_RECORD));
        for (device, first) in firsts {
            let key = ChainKey { fan, device: device.0 };
            let chain = chain_from(first);
            let chain = self.on_every_cpu(chain).map_err(access(map::CHAINS, "written"))?;
            self.chains.insert(key, chain, 0).map_err(access(map::CHAINS, "written"))?;
        }
        let mtu = outputs.iter().map(|output| output.rewrite.mtu).min().unwrap_or_default();
        let cpus = self.fans.get(&fan, 0).map_err(access(map::FANS, "read"))?;
        let (count, device) = (outputs.len() as u32, device.0);
        let fan_of = |cpu: &Fan| Fan { mtu, first: after, outputs: count, device, chain, ..*cpu };
        let cpus: Vec<_> = cpus.iter().map(fan_of).collect();
        let cpus =
            PerCpuValues::try_from(cpus).map_err(|error| access(map::FANS, "written")(error.into()))?;
        self.fans.set(fan, cpus, 0).map_err(access(map::FANS, "written"))
    }

    /// Counters go on where an output had some.
    fn open_counters(&mut self, slot: OutputSlot) -> Result<(), MapAccessError> {
        if self.counters(slot)?.is_some() {
            return Ok(());
        }
        let zero = self.on_every_cpu(OutputCounters::default());
        let zero = zero.map_err(access(map::OUTPUTS, "written"))?;
        self.outputs.insert(slot.0, zero, 0).map_err(access(map::OUTPUTS, "written"))
    }

    fn counters(&self, slot: OutputSlot) -> Result<Option<PerCpuValues<OutputCounters>>, MapAccessError> {
        let found = if slot.0 < self.low_outputs.len() {
            self.low_outputs.get(&slot.0, 0)
        } else {
            self.outputs.get(&slot.0, 0)
        };
        match found {
            Ok(cpus) => Ok(Some(cpus)),
            Err(MapError::KeyNotFound) => Ok(None),
            Err(error) => Err(access(map::OUTPUTS, "read")(error)),
        }
    }

    fn on_every_cpu<T: aya::Pod>(&self, value: T) -> Result<PerCpuValues<T>, MapError> {
        Ok(PerCpuValues::try_from(vec![value; self.cpus])?)
    }

    /// Clears up fans that their rules no longer use, and keeps what their outputs got.
    fn retire(&mut self, mut fans: Vec<u32>) -> Result<(), RedirectError> {
        fans.retain(|fan| self.sets.contains_key(fan));
        if fans.is_empty() {
            return Ok(());
        }
        let nowhere = match self.nowhere.take() {
            Some(nowhere) => nowhere,
            None => new_device_map(1).map_err(access(map::DEVICES, "made"))?,
        };
        let places: Vec<_> = fans.iter().map(|fan| (*fan, nowhere.fd().as_fd())).collect();
        let outcome = self.place(&places);
        self.nowhere = Some(nowhere);
        outcome?;
        for fan in fans {
            let set = self.sets.get(&fan).cloned().unwrap_or_default();
            // Chains first: the shares say which.
            for (_, device) in &set {
                match self.chains.remove(&ChainKey { fan, device: device.0 }) {
                    Ok(()) => {}
                    // Several outputs on one device share a chain.
                    Err(error) if errno(&error) == Some(libc::ENOENT) => {}
                    Err(error) => return Err(access(map::CHAINS, "written")(error).into()),
                }
            }
            let (frames, bank) = (self.frames(fan)?, fan % 2 + 1);
            for (slot, _) in set {
                let Some(share) = self.share(slot, bank)? else { continue };
                if share.fan == fan && share.since != Share::OUTSIDE {
                    let former = share.former + frames.saturating_sub(share.since);
                    self.set_share(slot, bank, Share { former, since: Share::OUTSIDE, ..share })?;
                }
            }
            self.sets.remove(&fan);
        }
        Ok(())
    }

    fn share(&self, output: OutputSlot, bank: u32) -> Result<Option<Share>, MapAccessError> {
        match self.shares.get(&redirect::record(output.0, bank), 0) {
            Ok(words) => Ok(Some(Share::from_words(words))),
            Err(MapError::KeyNotFound) => Ok(None),
            Err(error) => Err(access(RECEIVED, "read")(error)),
        }
    }

    fn set_share(&mut self, output: OutputSlot, bank: u32, share: Share) -> Result<(), MapAccessError> {
        let record = redirect::record(output.0, bank);
        self.shares.insert(record, share.to_words(), 0).map_err(access(RECEIVED, "written"))
    }

    /// Frames that a fan has counted on all CPUs.
    fn frames(&self, fan: u32) -> Result<u64, MapAccessError> {
        let cpus = self.fans.get(&fan, 0).map_err(access(map::FANS, "read"))?;
        Ok(cpus.iter().map(|cpu| cpu.frames).sum())
    }
}

/// A device map with an entry an output, each with the egress program: a broadcast walks it whole.
fn device_map(
    rule: RuleSlot,
    outputs: &[RedirectOutput],
    program: &ProgramFd,
) -> Result<MapData, RedirectError> {
    let made = |error| RedirectError::from(access(map::DEVICES, "made")(error));
    let mut map = Map::DevMap(new_device_map(outputs.len() as u32).map_err(made)?);
    let mut devices: DevMap<&mut MapData> = (&mut map).try_into().map_err(made)?;
    for (index, output) in (0..).zip(outputs) {
        devices.set(index, output.egress.0, Some(program), 0).map_err(|error| match errno(&error) {
            Some(libc::EINVAL | libc::ENODEV) => RedirectError::Gone { rule, egress: output.egress },
            code => made(MapError::IoError(io::Error::from_raw_os_error(code.unwrap_or(libc::EIO)))),
        })?;
    }
    match map {
        Map::DevMap(devices) => Ok(devices),
        _ => Err(made(MapError::IoError(io::ErrorKind::InvalidData.into()))),
    }
}

fn new_device_map(entries: u32) -> Result<MapData, MapError> {
    const BPF_MAP_TYPE_DEVMAP: u32 = 14;
    let shape = aya_obj::Map::new_from_params(BPF_MAP_TYPE_DEVMAP, 4, 8, entries, 0);
    MapData::create(shape, "mcr_fan", None)
}
