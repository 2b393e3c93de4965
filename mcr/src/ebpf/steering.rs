//! What one interface has in the kernel.

use std::{
    collections::BTreeSet,
    fs, io,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    path::{Path, PathBuf},
};

use aya::{
    Ebpf, EbpfError, EbpfLoader,
    maps::{Array, HashMap, Map, MapData, MapError, PerCpuArray, XskMap},
    programs::{
        ProgramError, Xdp, XdpMode,
        links::{FdLink, LinkError, PinnedLink},
        xdp::XdpLink,
    },
};
use mcr_common::{
    abi::{self, map},
    counters::{QueueCounters, RuleCounters, Verdicts},
    flow::{FlowKey4, FlowTable, FlowValue},
};

use super::{
    AttachError, MapAccessError, Object, TracingLog, access, clear_pins, errno, last_words,
    pinned::{self, Former, LINK, MARKS, Misfit, NEXT_PROGRAM, PROGRAM, REWRITE, mark},
    redirect::{Redirect, RedirectError, RedirectOutput, RedirectTotals, Sets},
    socket_filter, xdp,
};
use crate::{
    rule::{IfIndex, InterfaceName, OutputSlot, QueueId, RuleSlot},
    ruleset::OUTPUTS_PER_RULE,
};

/// Where one interface's programs belong and how large its maps are.
#[derive(Clone, Debug)]
pub struct Placement<'a> {
    pub interface: &'a InterfaceName,
    pub index: IfIndex,
    pub kind: String,
    pub mtu: u32,
    pub queues: u32,
    pub max_rules: u32,
    /// Directory for the pins of this interface.
    pub pins: PathBuf,
    /// Id of the program that was seen in the slot.
    pub occupant: Option<u32>,
}

impl Placement<'_> {
    /// Entries of the maps whose size depends on the interface or on the daemon.
    pub(super) fn sizes(&self) -> [(&'static str, u32); 11] {
        [
            // A flow for each rule, and for each output that feeds one: its loop.
            (map::FLOWS_V4, (1 + OUTPUTS_PER_RULE) * self.max_rules),
            (map::RULES, self.max_rules),
            (map::SOCKETS, self.queues),
            (map::QUEUES, self.queues),
            (map::BANKS, self.max_rules),
            (map::FANS, 2 * self.max_rules),
            (map::DEVICES, 2 * self.max_rules),
            (map::RECORDS, 2 * OUTPUTS_PER_RULE * self.max_rules),
            (map::CHAINS, 2 * OUTPUTS_PER_RULE * self.max_rules),
            // Slots are given from the lowest on: few rules with many outputs need more.
            (map::LOW_OUTPUTS, self.max_rules),
            (map::OUTPUTS, OUTPUTS_PER_RULE * self.max_rules),
        ]
    }
}

/// Where a pin was to be, and why it is not.
pub(super) type PinError = (PathBuf, String);

/// Where maps come from: out of a loaded object, or made here, to be pinned; or from their pins.
pub(super) struct Maps<'a> {
    ebpf: Option<&'a mut Ebpf>,
    pins: &'a Path,
}

impl<'a> Maps<'a> {
    pub(super) fn pinned(pins: &'a Path) -> Self {
        Self { ebpf: None, pins }
    }

    pub(super) fn take<T: TryFrom<Map, Error = MapError>>(&mut self, name: &str) -> Result<T, PinError> {
        let map = self.take_any(name)?;
        map.try_into().map_err(|error: MapError| (self.pins.join(name), error.to_string()))
    }

    pub(super) fn take_any(&mut self, name: &str) -> Result<Map, PinError> {
        let at = self.pins.join(name);
        let Some(ebpf) = &mut self.ebpf else { return Self::reopen(at) };
        let Some(map) = ebpf.take_map(name) else {
            return Err((at, "the object has no such map".to_owned()));
        };
        map.pin(&at).map_err(|error| (at, error.to_string()))?;
        Ok(map)
    }

    /// A map that no program uses.
    pub(super) fn make<T: TryFrom<Map, Error = MapError>>(
        &self,
        shape: aya_obj::Map,
        name: &str,
    ) -> Result<T, PinError> {
        let at = self.pins.join(name);
        let map = if self.ebpf.is_some() {
            let made = MapData::create(shape, name, None).and_then(Map::from_map_data);
            let map = made.map_err(|error| (at.clone(), error.to_string()))?;
            map.pin(&at).map_err(|error| (at.clone(), error.to_string()))?;
            map
        } else {
            Self::reopen(at.clone())?
        };
        map.try_into().map_err(|error: MapError| (at, error.to_string()))
    }

    fn reopen(at: PathBuf) -> Result<Map, PinError> {
        let map = MapData::from_pin(&at).and_then(Map::from_map_data);
        map.map_err(|error| (at, error.to_string()))
    }
}

/// What one interface has in the kernel: the maps, the socket filter, and the XDP program if it is attached.
/// Pinned, but for the filter, which lives as long as its sockets.
///
/// Dropping it detaches the program and removes the pins, unless they are to be [kept](Self::keep). Who is killed leaves
/// them: [`adopt`](Self::adopt) goes on with them.
pub struct Steering {
    flows: HashMap<MapData, FlowKey4, FlowValue>,
    /// The flows for one source.
    source_flows: BTreeSet<FlowKey4>,
    flow_table: Array<MapData, FlowTable>,
    rules: PerCpuArray<MapData, RuleCounters>,
    verdicts: PerCpuArray<MapData, Verdicts>,
    sockets: XskMap<MapData>,
    queues: PerCpuArray<MapData, QueueCounters>,
    pub(super) redirect: Redirect,
    /// By [`mark`]: what the next daemon is to know.
    marks: Array<MapData, u32>,
    /// Holds the programs, and the XDP program's log if the object has one.
    ebpf: Ebpf,
    // The link goes before its pins' directory.
    link: Option<PinnedLink>,
    identity: u32,
    generic: bool,
    /// Whether another program runs by the pinned link, to be replaced.
    succeeds: bool,
    keep: bool,
    pins: PathBuf,
}

impl Steering {
    /// Makes the maps and pins them. Nothing is attached yet.
    pub fn prepare(object: &Object, placement: &Placement<'_>) -> Result<Self, AttachError> {
        clear_pins(&placement.pins);
        Self::make(object, placement)
    }

    /// As [`prepare`](Self::prepare), in the place of what this build cannot go on with: that works on by its own maps until
    /// [`attach`](Self::attach) replaces its program, in one step.
    ///
    /// Until then its pins are beside those of the former one, which stay: who is killed leaves these to the next.
    pub fn succeed(object: &Object, placement: &Placement<'_>, former: &Former) -> Result<Self, AttachError> {
        let beside = pinned::beside(&placement.pins, pinned::NEXT);
        clear_pins(&beside);
        let mut steering = Self::make(object, &Placement { pins: beside, ..placement.clone() })?;
        steering.generic = former.generic;
        steering.succeeds = true;
        Ok(steering)
    }

    fn make(object: &Object, placement: &Placement<'_>) -> Result<Self, AttachError> {
        let load = |error: EbpfError| AttachError::Load {
            interface: placement.interface.clone(),
            why: last_words(&error),
        };
        let ebpf = loader(placement).load(object.bytes()).map_err(load)?;
        let made = fs::create_dir_all(&placement.pins);
        let made = made.map_err(|error| (placement.pins.clone(), error.to_string()));
        let mut steering =
            made.and_then(|()| Self::take(ebpf, placement, false)).map_err(|(path, why)| {
                clear_pins(&placement.pins);
                AttachError::Pin { path, why }
            })?;
        // Last: without it nobody goes on with what is half made.
        steering.set_mark(mark::ABI, abi::ABI_VERSION)?;
        Ok(steering)
    }

    /// Opens what is pinned. All of it is known to fit.
    pub(super) fn reopen(object: &Object, placement: &Placement<'_>) -> Result<Self, Misfit> {
        let pins = &placement.pins;
        let mut loader = loader(placement);
        for map in pinned::MAPS {
            loader.map_pin_path(map, pins.join(map));
        }
        let ebpf = loader.load(object.bytes()).map_err(|error| Misfit::Load { why: last_words(&error) })?;
        let opened = Self::take(ebpf, placement, true);
        let mut steering = opened.map_err(|(path, why)| Misfit::Open { path, why })?;
        let link = PinnedLink::from_pin(pins.join(LINK));
        let unopened = |error: LinkError| Misfit::Open { path: pins.join(LINK), why: error.to_string() };
        steering.link = Some(link.map_err(unopened)?);
        let flows = steering.flows()?.into_iter().map(|(key, _)| key);
        steering.source_flows = flows.filter(|key| key.source != [0; 4]).collect();
        steering.tell_flows()?;
        let generic = steering.marks.get(&mark::GENERIC, 0).map_err(access(MARKS, "read"))?;
        steering.generic = generic != 0;
        Ok(steering)
    }

    fn take(mut ebpf: Ebpf, placement: &Placement<'_>, pinned: bool) -> Result<Self, PinError> {
        let ebpf_maps = (!pinned).then_some(&mut ebpf);
        let mut maps = Maps { ebpf: ebpf_maps, pins: &placement.pins };
        Ok(Self {
            flows: maps.take(map::FLOWS_V4)?,
            source_flows: BTreeSet::new(),
            flow_table: maps.take(map::FLOW_TABLE)?,
            rules: maps.take(map::RULES)?,
            verdicts: maps.take(map::VERDICTS)?,
            sockets: maps.take(map::SOCKETS)?,
            queues: maps.take(map::QUEUES)?,
            redirect: Redirect::take(&mut maps, placement.max_rules)?,
            marks: maps.make(pinned::marks_shape(), MARKS)?,
            ebpf,
            link: None,
            identity: pinned::identity_of(&placement.pins),
            generic: false,
            succeeds: false,
            keep: pinned,
            pins: placement.pins.clone(),
        })
    }

    /// Takes charge of what is pinned: it goes when this does.
    pub(super) fn own(&mut self) {
        self.keep = false;
    }

    fn set_mark(&mut self, mark: u32, value: u32) -> Result<(), AttachError> {
        self.marks
            .set(mark, value, 0)
            .map_err(|error| AttachError::Pin { path: self.pins.join(MARKS), why: error.to_string() })
    }

    /// Leaves what is pinned, and so what the kernel does by itself, to the next daemon.
    pub fn keep(mut self) {
        self.keep = true;
    }

    /// Attaches the XDP program, and pins it with its link; as generic XDP if that is allowed and there is
    /// no native XDP. In the place of a [former one](Self::succeed) it runs as that did.
    pub fn attach(&mut self, placement: &Placement<'_>, generic: bool) -> Result<(), AttachError> {
        if std::mem::take(&mut self.succeeds) {
            self.take_place(placement)?;
        } else {
            match self.attach_as(placement, XdpMode::Driver) {
                Err(AttachError::NoNativeXdp { .. }) if generic => {
                    self.attach_as(placement, XdpMode::Skb)?;
                    self.generic = true;
                }
                result => result?,
            }
        }
        self.set_mark(mark::GENERIC, self.generic.into())
    }

    fn attach_as(&mut self, placement: &Placement<'_>, mode: XdpMode) -> Result<(), AttachError> {
        let interface = placement.interface;
        let pins = self.pins.clone();
        let program = loaded(&mut self.ebpf, abi::PROGRAM).map_err(unloaded(interface))?;
        let link = program
            .attach_to_if_index(placement.index.0, mode)
            .map_err(|error| explain(placement, &error))?;
        let link = program.take_link(link).map_err(unloaded(interface))?;
        // aya falls back to an attachment that no pin can hold; only a link will do.
        let link = FdLink::try_from(link).map_err(|_| AttachError::Attach {
            interface: interface.clone(),
            source: io::Error::other("the kernel offers no XDP links (Linux 5.9 has them)"),
        })?;
        program.pin(pins.join(PROGRAM)).map_err(unpinned(pins.join(PROGRAM)))?;
        self.link = Some(link.pin(pins.join(LINK)).map_err(unpinned(pins.join(LINK)))?);
        Ok(())
    }

    /// Puts the XDP program in the place of the one that the pinned link has; no frame meets none.
    pub(super) fn replace(&mut self, placement: &Placement<'_>) -> Result<(), AttachError> {
        let (beside, pin) = (self.pins.join(NEXT_PROGRAM), self.pins.join(PROGRAM));
        let _ = fs::remove_file(&beside);
        self.run_by_pinned_link(placement, &beside)?;
        fs::rename(&beside, &pin).map_err(unpinned(pin))
    }

    /// Replaces a former program, and its pins. Whoever ends this on the way leaves the former ones or these whole, and
    /// [`settle`](pinned::settle) knows which.
    fn take_place(&mut self, placement: &Placement<'_>) -> Result<(), AttachError> {
        let (place, beside) = (&placement.pins, self.pins.clone());
        let taken = self.take_link(&place.join(LINK), placement);
        if taken.is_err() {
            // What cannot be succeeded goes too: nothing is to run that nobody knows of.
            clear_pins(place);
            self.link = None;
            let _ = fs::remove_file(beside.join(LINK));
        }
        pinned::put_in_place(&beside, place).map_err(unpinned(place.clone()))?;
        self.pins.clone_from(place);
        taken?;
        let link = self.pins.join(LINK);
        self.link = Some(PinnedLink::from_pin(&link).map_err(unpinned(link))?);
        Ok(())
    }

    /// Pins a former program's link here too, and has it run ours.
    fn take_link(&mut self, former: &Path, placement: &Placement<'_>) -> Result<(), AttachError> {
        let (link, program) = (self.pins.join(LINK), self.pins.join(PROGRAM));
        let shared = PinnedLink::from_pin(former).map_err(unpinned(former.to_owned()))?;
        FdLink::from(shared).pin(&link).map_err(unpinned(link))?;
        self.run_by_pinned_link(placement, &program)
    }

    /// Pins the XDP program, then has the pinned link run it.
    fn run_by_pinned_link(&mut self, placement: &Placement<'_>, pin: &Path) -> Result<(), AttachError> {
        let link = self.pins.join(LINK);
        let unloaded = unloaded(placement.interface);
        let program = loaded(&mut self.ebpf, abi::PROGRAM).map_err(&unloaded)?;
        program.pin(pin).map_err(unpinned(pin.to_owned()))?;
        let former = PinnedLink::from_pin(&link).map_err(unpinned(link.clone()))?;
        let former = XdpLink::try_from(FdLink::from(former)).map_err(unpinned(link.clone()))?;
        let replaced = program.attach_to_link(former).map_err(|error| explain(placement, &error))?;
        // The pin holds it.
        drop(program.take_link(replaced).map_err(&unloaded)?);
        self.link = Some(PinnedLink::from_pin(&link).map_err(unpinned(link))?);
        Ok(())
    }

    /// A program as this build has it.
    pub(super) fn program(&mut self, name: &str) -> Result<BorrowedFd<'_>, ProgramError> {
        Ok(loaded(&mut self.ebpf, name)?.fd()?.as_fd())
    }

    /// What no other interface's maps, and none made anew, have in this boot.
    pub fn identity(&self) -> u32 {
        self.identity
    }

    /// Whether the program runs as generic XDP.
    pub fn is_generic(&self) -> bool {
        self.generic
    }

    /// The filter for the interface's packet sockets.
    pub fn filter(&mut self) -> Result<BorrowedFd<'_>, ProgramError> {
        let filter = socket_filter(&mut self.ebpf)?;
        if filter.fd().is_err() {
            filter.load()?;
        }
        Ok(filter.fd()?.as_fd())
    }

    pub fn set_flow(&mut self, key: &FlowKey4, value: FlowValue) -> Result<(), MapAccessError> {
        if key.source != [0; 4] && self.source_flows.insert(*key) {
            self.tell_flows()?;
        }
        self.flows.insert(key, value, 0).map_err(access(map::FLOWS_V4, "written"))?;
        self.tell_flows()
    }

    /// Has the programs forget what they found, and tells them how many flows are for one source.
    fn tell_flows(&mut self) -> Result<(), MapAccessError> {
        let FlowTable { generation, .. } =
            self.flow_table.get(&0, 0).map_err(access(map::FLOW_TABLE, "read"))?;
        let table = FlowTable {
            for_one_source: self.source_flows.len() as u32,
            generation: generation.wrapping_add(1),
        };
        self.flow_table.set(0, table, 0).map_err(access(map::FLOW_TABLE, "written"))
    }

    /// The flows that there are.
    pub fn flows(&self) -> Result<Vec<(FlowKey4, FlowValue)>, MapAccessError> {
        self.flows.iter().collect::<Result<_, _>>().map_err(access(map::FLOWS_V4, "read"))
    }

    /// Gives rules that are redirected other outputs, or none: of each rule all at once, so that a frame meets the former
    /// ones or the new ones. When it returns no frame leaves by the former ones any more. For that it waits in the kernel,
    /// some 10 to 30 ms for all rules together.
    ///
    /// To be called in the network namespace of the interfaces. After [`RedirectError::Gone`] nothing has changed. After
    /// any error the call may be repeated.
    pub fn set_outputs(&mut self, changes: &[(RuleSlot, Vec<RedirectOutput>)]) -> Result<(), RedirectError> {
        if self.generic && changes.iter().any(|(_, outputs)| !outputs.is_empty()) {
            return Err(RedirectError::Generic);
        }
        let program = loaded(&mut self.ebpf, abi::REWRITE).map_err(RedirectError::Load)?;
        let pin = self.pins.join(REWRITE);
        if !pin.exists() {
            program.pin(&pin).map_err(|error| RedirectError::Pin { path: pin, why: error.to_string() })?;
        }
        self.redirect.set(program.fd().map_err(RedirectError::Load)?, changes)
    }

    /// Sets all these sets anew, which are those in use, so that no output is left with the egress program of another build.
    pub fn renew_outputs(&mut self, sets: &Sets) -> Result<(), RedirectError> {
        let changes: Vec<_> = sets.iter().map(|(rule, outputs)| (*rule, outputs.clone())).collect();
        self.set_outputs(&changes)?;
        let _ = fs::remove_file(self.pins.join(REWRITE));
        self.set_outputs(&[])
    }

    /// Totals of an output of a rule that is redirected, or was.
    pub fn redirected(&self, rule: RuleSlot, output: OutputSlot) -> Result<RedirectTotals, MapAccessError> {
        self.redirect.totals(rule, output)
    }

    /// Takes a flow out; programs that run may still act on it until [`barrier`] has returned.
    pub fn delete_flow(&mut self, key: &FlowKey4) -> Result<(), MapAccessError> {
        match self.flows.remove(key) {
            Ok(()) | Err(MapError::KeyNotFound) => {}
            Err(error) => return Err(access(map::FLOWS_V4, "written")(error)),
        }
        self.source_flows.remove(key);
        self.tell_flows()
    }

    /// Steers a queue's frames to no socket any more; programs that run may do so until [`barrier`].
    ///
    /// A slot empties by itself when its socket closes, but the io_uring of a killed process may hold
    /// the socket open for a while after the process is gone.
    pub fn clear_socket(&mut self, queue: QueueId) -> Result<(), MapAccessError> {
        match self.sockets.unset(queue.0) {
            Ok(()) | Err(MapError::KeyNotFound) => Ok(()),
            Err(error) if errno(&error) == Some(libc::ENOENT) => Ok(()),
            Err(error) => Err(access(map::SOCKETS, "written")(error)),
        }
    }

    /// Steers a queue's frames into a bound AF_XDP socket.
    pub fn set_socket(&mut self, queue: QueueId, socket: BorrowedFd<'_>) -> Result<(), MapAccessError> {
        self.sockets.set(queue.0, socket.as_raw_fd(), 0).map_err(access(map::SOCKETS, "written"))
    }

    /// Counters of a rule, of all CPUs together.
    pub fn rule(&self, slot: RuleSlot) -> Result<RuleCounters, MapAccessError> {
        rule_counters(&self.rules, slot)
    }

    /// Frames of a queue that were steered to its socket.
    pub fn steered(&self, queue: QueueId) -> Result<u64, MapAccessError> {
        let cpus = self.queues.get(&queue.0, 0).map_err(access(map::QUEUES, "read"))?;
        Ok(cpus.iter().map(|cpu| cpu.steered).sum())
    }

    /// What a program, one of [`abi::verdicts_of`], made of the interface's frames, by name.
    pub fn verdicts(&self, of: u32) -> Result<[(&'static str, u64); Verdicts::COUNT], MapAccessError> {
        let mut sum = Verdicts::default().named();
        for cpu in self.verdicts.get(&of, 0).map_err(access(map::VERDICTS, "read"))?.iter() {
            for (total, (_, count)) in sum.iter_mut().zip(cpu.named()) {
                total.1 += count;
            }
        }
        Ok(sum)
    }

    /// The program's own log, if the object was built with it.
    pub fn logger(&mut self) -> Option<aya_log::EbpfLogger<TracingLog>> {
        aya_log::EbpfLogger::init_with_logger(&mut self.ebpf, TracingLog).ok()
    }
}

impl Drop for Steering {
    fn drop(&mut self) {
        if self.keep {
            return;
        }
        // Unpinning gives the link back, whose end detaches the program.
        if let Some(link) = self.link.take()
            && let Err(error) = link.unpin()
        {
            tracing::warn!(%error, pins = %self.pins.display(), "the XDP link's pin cannot be removed");
        }
        clear_pins(&self.pins);
    }
}

pub(super) fn rule_counters(
    rules: &PerCpuArray<MapData, RuleCounters>,
    slot: RuleSlot,
) -> Result<RuleCounters, MapAccessError> {
    let cpus = rules.get(&slot.0, 0).map_err(access(map::RULES, "read"))?;
    Ok(cpus.iter().fold(RuleCounters::default(), |sum, cpu| sum.plus(*cpu)))
}

/// A loader with the maps' sizes.
fn loader<'a>(placement: &Placement<'_>) -> EbpfLoader<'a> {
    let mut loader = EbpfLoader::new();
    for (map, entries) in placement.sizes() {
        loader.map_max_entries(map, entries);
    }
    loader
}

/// An XDP program, loaded if it is not yet.
fn loaded<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut Xdp, ProgramError> {
    let program = xdp(ebpf, name)?;
    if program.fd().is_err() {
        program.load()?;
    }
    Ok(program)
}

fn unloaded(interface: &InterfaceName) -> impl Fn(ProgramError) -> AttachError {
    |error| AttachError::Load { interface: interface.clone(), why: last_words(&error.into()) }
}

fn unpinned<E: std::error::Error>(path: PathBuf) -> impl FnOnce(E) -> AttachError {
    |error| AttachError::Pin { path, why: error.to_string() }
}

/// Turns the errno of an attachment into what it means for this interface.
fn explain(placement: &Placement<'_>, error: &ProgramError) -> AttachError {
    let interface = placement.interface.clone();
    let errno = errno(error);
    match errno {
        Some(libc::EOPNOTSUPP) => AttachError::NoNativeXdp { interface, kind: placement.kind.clone() },
        Some(libc::ENOSPC) => AttachError::TooFewQueues { interface },
        Some(libc::ERANGE) => AttachError::Mtu { interface, mtu: placement.mtu },
        Some(libc::EBUSY | libc::EEXIST) => {
            AttachError::SlotTaken { interface, program: describe(placement.occupant) }
        }
        Some(libc::EPERM | libc::EACCES) => AttachError::Permission { interface },
        _ => AttachError::Attach {
            interface,
            source: errno.map_or_else(|| io::Error::other(error.to_string()), io::Error::from_raw_os_error),
        },
    }
}

/// A program, and how to learn more of it.
fn describe(program: Option<u32>) -> String {
    // Its name is for CAP_SYS_ADMIN to know.
    program.map_or_else(
        || "of unknown id (see `bpftool net`)".to_owned(),
        |id| format!("id {id} (`bpftool prog show id {id}` names it)"),
    )
}
