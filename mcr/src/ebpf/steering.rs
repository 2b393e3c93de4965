//! What one interface has in the kernel.

use std::{
    fs, io,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    path::{Path, PathBuf},
};

use aya::{
    Ebpf, EbpfError, EbpfLoader,
    maps::{HashMap, Map, MapData, MapError, PerCpuArray, XskMap},
    programs::{
        ProgramError, XdpMode,
        links::{FdLink, PinnedLink},
    },
};
use mcr_common::{
    abi::{self, map},
    counters::{QueueCounters, RuleCounters, Verdicts},
    flow::{FlowKey4, FlowValue},
};

use super::{
    AttachError, MapAccessError, Object, TracingLog, access, clear_pins, errno, last_words,
    redirect::{Redirect, RedirectError, RedirectOutput, RedirectTotals},
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

/// Where a pin was to be, and why it is not.
pub(super) type PinError = (PathBuf, String);

/// The maps of a loaded object, to be pinned and taken out one by one.
pub(super) struct Maps<'a> {
    ebpf: &'a mut Ebpf,
    pins: &'a Path,
}

impl Maps<'_> {
    pub(super) fn take<T: TryFrom<Map, Error = MapError>>(&mut self, name: &str) -> Result<T, PinError> {
        let map = self.take_any(name)?;
        map.try_into().map_err(|error: MapError| (self.pins.join(name), error.to_string()))
    }

    pub(super) fn take_any(&mut self, name: &str) -> Result<Map, PinError> {
        let at = self.pins.join(name);
        let Some(map) = self.ebpf.take_map(name) else {
            return Err((at, "the object has no such map".to_owned()));
        };
        map.pin(&at).map_err(|error| (at, error.to_string()))?;
        Ok(map)
    }
}

/// What one interface has in the kernel: the maps, the socket filter, and the XDP program if it is attached.
/// Pinned, but for the filter, which lives as long as its sockets.
///
/// Dropping it detaches the program and removes the pins.
pub struct Steering {
    flows: HashMap<MapData, FlowKey4, FlowValue>,
    rules: PerCpuArray<MapData, RuleCounters>,
    verdicts: PerCpuArray<MapData, Verdicts>,
    sockets: XskMap<MapData>,
    queues: PerCpuArray<MapData, QueueCounters>,
    redirect: Redirect,
    /// Holds the programs, and the XDP program's log if the object has one.
    ebpf: Ebpf,
    // The link goes before its pins' directory.
    link: Option<PinnedLink>,
    generic: bool,
    pins: PathBuf,
}

impl Steering {
    /// Makes the maps and pins them. Nothing is attached yet.
    pub fn prepare(object: &Object, placement: &Placement<'_>) -> Result<Self, AttachError> {
        let load = |error: EbpfError| AttachError::Load {
            interface: placement.interface.clone(),
            why: last_words(&error),
        };
        let ebpf = EbpfLoader::new()
            // A flow for each rule, and for each output that feeds one: its loop.
            .map_max_entries(map::FLOWS_V4, (1 + OUTPUTS_PER_RULE) * placement.max_rules)
            .map_max_entries(map::RULES, placement.max_rules)
            .map_max_entries(map::SOCKETS, placement.queues)
            .map_max_entries(map::QUEUES, placement.queues)
            .map_max_entries(map::BANKS, placement.max_rules)
            .map_max_entries(map::FANS, 2 * placement.max_rules)
            .map_max_entries(map::DEVICES, 2 * placement.max_rules)
            .map_max_entries(map::RECORDS, 2 * OUTPUTS_PER_RULE * placement.max_rules)
            .map_max_entries(map::CHAINS, 2 * OUTPUTS_PER_RULE * placement.max_rules)
            .map_max_entries(map::OUTPUTS, OUTPUTS_PER_RULE * placement.max_rules)
            .load(object.bytes())
            .map_err(load)?;
        Self::pin(ebpf, &placement.pins).map_err(|(path, why)| {
            clear_pins(&placement.pins);
            AttachError::Pin { path, why }
        })
    }

    fn pin(mut ebpf: Ebpf, pins: &Path) -> Result<Self, PinError> {
        clear_pins(pins);
        fs::create_dir_all(pins).map_err(|error| (pins.to_owned(), error.to_string()))?;
        let mut maps = Maps { ebpf: &mut ebpf, pins };
        Ok(Self {
            flows: maps.take(map::FLOWS_V4)?,
            rules: maps.take(map::RULES)?,
            verdicts: maps.take(map::VERDICTS)?,
            sockets: maps.take(map::SOCKETS)?,
            queues: maps.take(map::QUEUES)?,
            redirect: Redirect::take(&mut maps)?,
            ebpf,
            link: None,
            generic: false,
            pins: pins.to_owned(),
        })
    }

    /// Attaches the XDP program, and pins it with its link; as generic XDP if that is allowed and there is
    /// no native XDP.
    pub fn attach(&mut self, placement: &Placement<'_>, generic: bool) -> Result<(), AttachError> {
        match self.attach_as(placement, XdpMode::Driver) {
            Err(AttachError::NoNativeXdp { .. }) if generic => {
                self.attach_as(placement, XdpMode::Skb)?;
                self.generic = true;
                Ok(())
            }
            result => result,
        }
    }

    fn attach_as(&mut self, placement: &Placement<'_>, mode: XdpMode) -> Result<(), AttachError> {
        let interface = placement.interface;
        let load =
            |error: EbpfError| AttachError::Load { interface: interface.clone(), why: last_words(&error) };
        let pinned = |name: &str, error: &dyn std::error::Error| AttachError::Pin {
            path: placement.pins.join(name),
            why: error.to_string(),
        };
        let program = xdp(&mut self.ebpf, abi::PROGRAM).map_err(|error| load(error.into()))?;
        if program.fd().is_err() {
            program.load().map_err(|error| load(error.into()))?;
        }
        let link = program
            .attach_to_if_index(placement.index.0, mode)
            .map_err(|error| explain(placement, &error))?;
        let link = program.take_link(link).map_err(|error| load(error.into()))?;
        // aya falls back to an attachment that no pin can hold; only a link will do.
        let link = FdLink::try_from(link).map_err(|_| AttachError::Attach {
            interface: interface.clone(),
            source: io::Error::other("the kernel offers no XDP links (Linux 5.9 has them)"),
        })?;
        program.pin(self.pins.join("program")).map_err(|error| pinned("program", &error))?;
        self.link = Some(link.pin(self.pins.join("link")).map_err(|error| pinned("link", &error))?);
        Ok(())
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
        self.flows.insert(key, value, 0).map_err(access(map::FLOWS_V4, "written"))
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
        let program = xdp(&mut self.ebpf, abi::REWRITE).map_err(RedirectError::Load)?;
        if program.fd().is_err() {
            program.load().map_err(RedirectError::Load)?;
        }
        self.redirect.set(program.fd().map_err(RedirectError::Load)?, changes)
    }

    /// Totals of an output of a rule that is redirected, or was.
    pub fn redirected(&self, rule: RuleSlot, output: OutputSlot) -> Result<RedirectTotals, MapAccessError> {
        self.redirect.totals(rule, output)
    }

    /// Takes a flow out; programs that run may still act on it until [`barrier`] has returned.
    pub fn delete_flow(&mut self, key: &FlowKey4) -> Result<(), MapAccessError> {
        match self.flows.remove(key) {
            Ok(()) | Err(MapError::KeyNotFound) => Ok(()),
            Err(error) => Err(access(map::FLOWS_V4, "written")(error)),
        }
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
        let mut sum = RuleCounters::default();
        for cpu in self.rules.get(&slot.0, 0).map_err(access(map::RULES, "read"))?.iter() {
            sum.matched += cpu.matched;
            sum.matched_bytes += cpu.matched_bytes;
            sum.no_worker += cpu.no_worker;
            sum.looped += cpu.looped;
            sum.redirected += cpu.redirected;
            sum.no_output += cpu.no_output;
            sum.not_redirected += cpu.not_redirected;
            sum.redirect_bytes += cpu.redirect_bytes;
        }
        Ok(sum)
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
        // Unpinning gives the link back, whose end detaches the program.
        if let Some(link) = self.link.take()
            && let Err(error) = link.unpin()
        {
            tracing::warn!(%error, pins = %self.pins.display(), "the XDP link's pin cannot be removed");
        }
        clear_pins(&self.pins);
    }
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
