//! What a daemon that is gone left pinned on an interface: whether this one can go on with it, and what is to be taken over
//! if it cannot.
//!
//! All of it by the documented capabilities: what hangs in an array of maps cannot be read without more, so which outputs
//! a rule has is read from its records.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, fs, io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use aya::maps::{Array, HashMap, Map, MapData, PerCpuArray};
use mcr_common::{
    abi::{self, map},
    counters::RuleCounters,
    flow::{FlowKey4, FlowValue},
};
use thiserror::Error;
use tracing::warn;

use super::{
    AttachError, MapAccessError, Object, Placement, Steering, clear_pins,
    redirect::{Redirect, RedirectError, RedirectOutput, RedirectTotals, Sets},
    steering::{Maps, rule_counters},
};
use crate::{
    rule::{IfIndex, InterfaceName, QueueId, RuleSlot},
    ruleset::OUTPUTS_PER_RULE,
    sys::bpf_object::{self, Kind, LinkInfo, MapInfo, Program},
};

pub(super) const LINK: &str = "link";
pub(super) const PROGRAM: &str = "program";
/// A program that is about to take the other's place.
pub(super) const NEXT_PROGRAM: &str = "program:next";
/// The egress program that the outputs of redirected rules have; pinned with the first of them.
pub(super) const REWRITE: &str = "rewrite";
/// Array by [`mark`].
pub(super) const MARKS: &str = "mcr_marks";
/// Hash by record: what outputs received, and which are in a set. See [`Redirect`].
pub(super) const RECEIVED: &str = "mcr_received";

/// What a daemon writes down for the next one.
pub(super) mod mark {
    /// [`ABI_VERSION`](mcr_common::abi::ABI_VERSION); written when all else is pinned.
    pub const ABI: u32 = 0;
    /// 1 if the program runs as generic XDP.
    pub const GENERIC: u32 = 1;
    pub const COUNT: u32 = 2;
}

/// The maps of the object that outlive a daemon: all but what each CPU remembers of the flows, which begins anew with a program.
pub(super) const MAPS: [&str; 13] = [
    map::FLOWS_V4,
    map::FLOW_TABLE,
    map::RULES,
    map::VERDICTS,
    map::QUEUES,
    map::SOCKETS,
    map::BANKS,
    map::FANS,
    map::DEVICES,
    map::RECORDS,
    map::LOW_OUTPUTS,
    map::OUTPUTS,
    map::CHAINS,
];

const BPF_MAP_TYPE_HASH: u32 = 1;
const BPF_MAP_TYPE_ARRAY: u32 = 2;
const BPF_F_NO_PREALLOC: u32 = 1;

pub(super) fn marks_shape() -> aya_obj::Map {
    aya_obj::Map::new_from_params(BPF_MAP_TYPE_ARRAY, 4, 4, mark::COUNT, 0)
}

pub(super) fn received_shape(max_rules: u32) -> aya_obj::Map {
    let entries = 2 * OUTPUTS_PER_RULE * max_rules;
    aya_obj::Map::new_from_params(BPF_MAP_TYPE_HASH, 4, 24, entries, BPF_F_NO_PREALLOC)
}

/// What follows an interface's name where its pins are not in their place: no interface has such a name.
pub(super) const NEXT: &str = ":next";
const FORMER: &str = ":former";

/// The directory beside that of an interface's pins.
pub(super) fn beside(pins: &Path, suffix: &str) -> PathBuf {
    let mut name = pins.file_name().unwrap_or_default().to_owned();
    name.push(suffix);
    pins.with_file_name(name)
}

/// Where a directory of pins is, or is to be.
fn place_of(pins: &Path) -> PathBuf {
    let of =
        |name: &str| [NEXT, FORMER].iter().find_map(|suffix| name.strip_suffix(suffix)).map(PathBuf::from);
    pins.to_str().and_then(of).unwrap_or(pins.to_owned())
}

/// The places below a directory that have a pinned link, without which nothing runs on.
pub fn linked(pins: &Path) -> BTreeSet<PathBuf> {
    let directories = fs::read_dir(pins).into_iter().flatten().flatten().map(|entry| entry.path());
    directories.filter(|pins| pins.join(LINK).exists()).map(|pins| place_of(&pins)).collect()
}

/// Puts the pins of what runs now in the place of the former ones, which stay beside until [`clear_former`].
pub(super) fn put_in_place(next: &Path, place: &Path) -> io::Result<()> {
    let former = beside(place, FORMER);
    clear_pins(&former);
    match fs::rename(place, &former) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => fs::rename(next, place),
    }
}

/// Removes the pins of what ran on an interface before, when what it counted is written down.
pub fn clear_former(place: &Path) {
    clear_pins(&beside(place, FORMER));
}

/// Brings to its end what a daemon did not live to end, who replaced a program: of two sets of pins stays the one whose
/// program runs. Gives the places in which there are pins then, out of all directories of pins.
pub fn settle(directories: &[PathBuf]) -> BTreeSet<PathBuf> {
    let places: BTreeSet<_> = directories.iter().map(|pins| place_of(pins)).collect();
    for place in &places {
        let (next, former) = (beside(place, NEXT), beside(place, FORMER));
        if runs(&next, PROGRAM)
            && let Err(error) = put_in_place(&next, place)
        {
            warn!(%error, pins = %next.display(), "the pins of what runs cannot be put in their place");
        }
        clear_pins(&next);
        if !place.exists() {
            clear_pins(&former);
        }
        let next = place.join(NEXT_PROGRAM);
        let settled = if runs(place, NEXT_PROGRAM) {
            fs::rename(&next, place.join(PROGRAM))
        } else {
            fs::remove_file(&next)
        };
        if let Err(error) = settled
            && error.kind() != io::ErrorKind::NotFound
        {
            warn!(%error, pin = %next.display(), "a program's pin is left over");
        }
    }
    places.into_iter().filter(|place| place.exists()).collect()
}

/// Whether the pinned link runs a pinned program.
fn runs(pins: &Path, pin: &str) -> bool {
    matches!((link_info(&pins.join(LINK)), program(pins, pin)), (Ok(link), Ok(program)) if link.program == program.id)
}

/// What goes on as if its daemon had never ended.
pub struct Adopted {
    /// As one that was prepared and attached. No queue has a socket.
    pub steering: Steering,
    pub flows: Vec<(FlowKey4, FlowValue)>,
    /// The outputs of rules that are redirected. A set that is as it should be needs no call.
    pub sets: Sets,
    /// Whether outputs have the egress program of another build, until [`Steering::renew_outputs`] or new sets.
    pub former_rewrite: bool,
}

/// What cannot go on with this daemon, and what there is of it.
pub struct Unfit {
    pub why: Misfit,
    pub carried: Carried,
    /// If our program runs on this very interface: leave to [succeed](Steering::succeed) it without a gap.
    pub former: Option<Former>,
}

/// A program of ours that runs on by what is pinned.
pub struct Former {
    pub(super) generic: bool,
    identity: u32,
    maps: FormerMaps,
}

impl Former {
    /// As [`Steering::identity`].
    pub fn identity(&self) -> u32 {
        self.identity
    }

    /// What ran in a place before what runs there now, where nobody has written down yet what it counted.
    pub fn in_place_of(place: &Path, max_rules: u32) -> Option<Self> {
        let pins = beside(place, FORMER);
        let maps = pins.exists().then(|| FormerMaps::open(&pins, max_rules))?;
        Some(Self { generic: is_generic(&pins), identity: identity_of(&pins), maps })
    }

    /// What it has counted by now; all of it, once it is succeeded and a [`barrier`](super::barrier) is over.
    pub fn counted(&mut self) -> Carried {
        self.maps.read()
    }
}

/// Tells the maps of a set of pins from all others in this boot: the id of one of them, or 0 if it cannot be read.
pub fn identity_of(pins: &Path) -> u32 {
    map_info(pins, map::RULES).map_or(0, |map| map.id)
}

/// The maps of a former program, as far as their layout is ours.
struct FormerMaps {
    flows: Option<HashMap<MapData, FlowKey4, FlowValue>>,
    rules: Option<PerCpuArray<MapData, RuleCounters>>,
    redirect: Option<Redirect>,
}

/// What was counted, as far as its layout is ours.
#[derive(Debug, Default)]
pub struct Carried {
    pub flows: Vec<(FlowKey4, FlowValue)>,
    /// Of the rules that have a flow.
    pub rules: BTreeMap<RuleSlot, RuleCounters>,
    /// The outputs that were in use.
    pub outputs: Vec<CarriedOutput>,
}

#[derive(Clone, Copy, Debug)]
pub struct CarriedOutput {
    pub rule: RuleSlot,
    pub output: RedirectOutput,
    pub totals: RedirectTotals,
}

/// Why nothing can be done with what is pinned but to make it anew.
#[derive(Debug, Error)]
pub enum Misfit {
    #[error("{path} cannot be opened: {why}")]
    Open { path: PathBuf, why: String },
    #[error("the interface that it was pinned for is gone")]
    Gone,
    #[error("it is attached to another interface, with index {}; that of {interface} is {}", .found.0, .index.0)]
    Elsewhere { interface: InterfaceName, index: IfIndex, found: IfIndex },
    #[error("it is not what runs on {interface} in this network namespace")]
    NotInPlace { interface: InterfaceName },
    #[error("{path} does not belong to what is pinned beside it: {what}")]
    Foreign { path: PathBuf, what: String },
    #[error("it was pinned by an mcr with ABI version {found}, this one has {needed}")]
    Abi { found: u32, needed: u32 },
    #[error("{map} is not as this mcr makes it: {found} instead of {needed}")]
    Shape { map: &'static str, found: Shape, needed: Shape },
    #[error("the eBPF object cannot be loaded beside it: {why}")]
    Load { why: String },
    #[error(transparent)]
    Replace(#[from] AttachError),
    #[error(transparent)]
    Outputs(#[from] RedirectError),
    #[error(transparent)]
    Map(#[from] MapAccessError),
}

/// All that must be the same of two maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    kind: u32,
    key_size: u32,
    value_size: u32,
    entries: u32,
    flags: u32,
}

impl Shape {
    fn of(map: &aya_obj::Map) -> Self {
        Self {
            kind: map.map_type(),
            key_size: map.key_size(),
            value_size: map.value_size(),
            entries: map.max_entries(),
            flags: map.map_flags(),
        }
    }
}

impl From<MapInfo> for Shape {
    fn from(info: MapInfo) -> Self {
        let MapInfo { kind, key_size, value_size, max_entries: entries, flags, .. } = info;
        Self { kind, key_size, value_size, entries, flags }
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kind, key_size, value_size, entries, flags } = self;
        write!(f, "{entries} entries of {key_size} and {value_size} bytes (type {kind}, flags {flags:#x})")
    }
}

impl Steering {
    /// Goes on with what is pinned for an interface, if there is anything. Its program is replaced, in one step, where it is not
    /// that of this build.
    ///
    /// `placement.occupant` must be what is attached to the interface now. To be called in its network namespace.
    ///
    /// # Errors
    ///
    /// What does not fit, with its reason. It is still there and runs: the caller [succeeds](Steering::succeed) it,
    /// or clears it ([`clear_pins`](super::clear_pins), or [`prepare`](Steering::prepare), which does) and makes all anew.
    pub fn adopt(object: &Object, placement: &Placement<'_>) -> Result<Option<Adopted>, Box<Unfit>> {
        if !placement.pins.exists() {
            return Ok(None);
        }
        let adopted = Pinned::open(placement)
            .and_then(|pinned| pinned.check_maps(object).map(|()| pinned))
            .and_then(|pinned| pinned.adopt(object));
        adopted.map(Some).map_err(|why| {
            let mut maps = FormerMaps::open(&placement.pins, placement.max_rules);
            let carried = maps.read();
            let former = Pinned::open(placement).ok().map(|_| Former {
                generic: is_generic(&placement.pins),
                identity: identity_of(&placement.pins),
                maps,
            });
            Box::new(Unfit { why, carried, former })
        })
    }
}

/// A program of ours on its interface.
struct Pinned<'a> {
    placement: &'a Placement<'a>,
    program: Program,
}

impl<'a> Pinned<'a> {
    fn open(placement: &'a Placement<'a>) -> Result<Self, Misfit> {
        let interface = || placement.interface.clone();
        let program = program(&placement.pins, PROGRAM)?;
        // Names are no proof, and need more than the documented capabilities to be given.
        if !program.maps.contains(&map_info(&placement.pins, map::FLOWS_V4)?.id) {
            let what = format!("it does not use {}", map::FLOWS_V4);
            return Err(Misfit::Foreign { path: placement.pins.join(PROGRAM), what });
        }
        let path = placement.pins.join(LINK);
        let link = link_info(&path)?;
        if link.kind != LinkInfo::XDP || link.program != program.id {
            return Err(Misfit::Foreign { path, what: format!("it runs program {}", link.program) });
        }
        match link.interface {
            0 => Err(Misfit::Gone),
            found if found != placement.index.0 => Err(Misfit::Elsewhere {
                interface: interface(),
                index: placement.index,
                found: IfIndex(found),
            }),
            // Another namespace may have an interface with this index.
            _ if placement.occupant != Some(program.id) => Err(Misfit::NotInPlace { interface: interface() }),
            _ => Ok(Self { placement, program }),
        }
    }

    /// Whether the maps are those that this build would make, and the program's own.
    fn check_maps(&self, object: &Object) -> Result<(), Misfit> {
        let pins = &self.placement.pins;
        self.check_map(MARKS, Shape::of(&marks_shape()))?;
        let found = read_mark(pins, mark::ABI).unwrap_or_default();
        if found != abi::ABI_VERSION {
            return Err(Misfit::Abi { found, needed: abi::ABI_VERSION });
        }
        let load = |why: String| Misfit::Load { why };
        let maps = aya_obj::Object::parse(object.bytes()).map_err(|error| load(error.to_string()))?.maps;
        let sizes = BTreeMap::from(self.placement.sizes());
        let mut used = self.program.maps.clone();
        let redirects = pins.join(REWRITE).exists();
        if redirects {
            used.extend(program(pins, REWRITE)?.maps);
        }
        for name in MAPS {
            let map = maps.get(name).ok_or_else(|| load(format!("it has no map {name}")))?;
            let made = Shape::of(map);
            let entries = sizes.get(name).copied().unwrap_or(made.entries);
            let id = self.check_map(name, Shape { entries, ..made })?;
            // Chains are the egress program's alone.
            if !used.contains(&id) && (redirects || name != map::CHAINS) {
                let what = "the programs use another".to_owned();
                return Err(Misfit::Foreign { path: pins.join(name), what });
            }
        }
        self.check_map(RECEIVED, Shape::of(&received_shape(self.placement.max_rules)))?;
        Ok(())
    }

    /// The id of a map that has a shape.
    fn check_map(&self, name: &'static str, needed: Shape) -> Result<u32, Misfit> {
        let info = map_info(&self.placement.pins, name)?;
        let found = Shape::from(info);
        if found == needed { Ok(info.id) } else { Err(Misfit::Shape { map: name, found, needed }) }
    }

    fn adopt(self, object: &Object) -> Result<Adopted, Misfit> {
        let Self { placement, program } = self;
        let mut steering = Steering::reopen(object, placement)?;
        let sets = steering.redirect.adopt()?;
        let rewrite = self::program(&placement.pins, REWRITE);
        let mut former_rewrite = false;
        if !sets.is_empty() {
            former_rewrite = !is_ours(&mut steering, abi::REWRITE, &rewrite?)?;
        }
        if !is_ours(&mut steering, abi::PROGRAM, &program)? {
            steering.replace(placement)?;
        }
        for queue in (0..placement.queues).map(QueueId) {
            steering.clear_socket(queue)?;
        }
        let flows = steering.flows()?;
        steering.own();
        Ok(Adopted { steering, flows, sets, former_rewrite })
    }
}

/// Whether a program is that of this build, as the verifier lets this daemon have it.
fn is_ours(steering: &mut Steering, name: &str, found: &Program) -> Result<bool, Misfit> {
    let program = steering.program(name).map_err(|error| Misfit::Load { why: error.to_string() })?;
    let program = bpf_object::program(program).map_err(|error| Misfit::Load { why: error.to_string() })?;
    Ok((program.tag, program.verified_bytes) == (found.tag, found.verified_bytes))
}

fn open(path: &Path, kind: Kind) -> Result<OwnedFd, Misfit> {
    bpf_object::open(path, kind).map_err(|error| unopened(path, &error))
}

fn unopened(path: &Path, error: &io::Error) -> Misfit {
    Misfit::Open { path: path.to_owned(), why: error.to_string() }
}

fn program(pins: &Path, pin: &str) -> Result<Program, Misfit> {
    let path = pins.join(pin);
    let program = open(&path, Kind::Program)?;
    bpf_object::program(program).map_err(|error| unopened(&path, &error))
}

fn link_info(path: &Path) -> Result<LinkInfo, Misfit> {
    let link = open(path, Kind::Link)?;
    bpf_object::link(link).map_err(|error| unopened(path, &error))
}

fn map_info(pins: &Path, name: &str) -> Result<MapInfo, Misfit> {
    let path = pins.join(name);
    let map = open(&path, Kind::Map)?;
    bpf_object::map(map).map_err(|error| unopened(&path, &error))
}

fn read_mark(pins: &Path, mark: u32) -> Option<u32> {
    let marks = MapData::from_pin(pins.join(MARKS)).and_then(Map::from_map_data).ok()?;
    let marks: Array<MapData, u32> = marks.try_into().ok()?;
    marks.get(&mark, 0).ok()
}

fn is_generic(pins: &Path) -> bool {
    read_mark(pins, mark::GENERIC) == Some(1)
}

impl FormerMaps {
    fn open(pins: &Path, max_rules: u32) -> Self {
        let mut maps = Maps::pinned(pins);
        Self {
            flows: maps.take(map::FLOWS_V4).ok(),
            rules: maps.take(map::RULES).ok(),
            redirect: Redirect::take(&mut maps, max_rules).ok(),
        }
    }

    /// What can be read. What became of datagrams is read before how many there were.
    fn read(&mut self) -> Carried {
        let mut carried = Carried::default();
        if let Some(redirect) = &mut self.redirect {
            for (rule, outputs) in redirect.read().unwrap_or_default() {
                carried.outputs.extend(outputs.into_iter().filter_map(|output| {
                    let totals = redirect.totals(rule, output.slot).ok()?;
                    Some(CarriedOutput { rule, output, totals })
                }));
            }
        }
        if let Some(flows) = &self.flows {
            carried.flows = flows.iter().flatten().collect();
        }
        if let Some(rules) = &self.rules {
            let slots = carried.flows.iter().map(|(_, flow)| RuleSlot(flow.rule));
            carried.rules = slots.filter_map(|slot| Some((slot, rule_counters(rules, slot).ok()?))).collect();
        }
        carried
    }
}
