//! The eBPF object: load, attach, pin, fill maps, read counters. The only user of aya.

use std::{
    borrow::Cow,
    fs, io,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    path::{Path, PathBuf},
};

use aya::{
    Ebpf, EbpfError, EbpfLoader,
    maps::{HashMap, Map, MapData, MapError, PerCpuArray, XskMap},
    programs::{
        ProgramError, SocketFilter, Xdp, XdpMode,
        links::{FdLink, PinnedLink},
    },
};
use mcr_common::{
    abi::{self, map},
    counters::{QueueCounters, RuleCounters, Verdicts},
    flow::{FlowKey4, FlowValue},
};
use object::{Object as _, ObjectSection as _, ObjectSymbol as _};
use thiserror::Error;

use crate::{
    rule::{IfIndex, InterfaceName, QueueId, RuleSlot},
    ruleset::OUTPUTS_PER_RULE,
};

/// Built by `cargo xtask build-ebpf`.
static EMBEDDED: &[u8] = aya::include_bytes_aligned!(concat!(env!("CARGO_MANIFEST_DIR"), "/bpf/mcr.bpf.o"));

#[derive(Debug, Error)]
pub enum ObjectError {
    #[error("the eBPF object {path} cannot be read: {source}")]
    Read { path: String, source: io::Error },
    #[error("{path} is no eBPF object of mcr: {why}; build one with `cargo xtask build-ebpf`")]
    Foreign { path: String, why: String },
    #[error(
        "the eBPF object {path} has ABI version {found}, this mcr needs {needed}: use an object and a daemon of one build"
    )]
    Abi { path: String, found: u32, needed: u32 },
}

#[derive(Debug, Error)]
pub enum AttachError {
    #[error("{interface} ({kind}) has no native XDP")]
    NoNativeXdp { interface: InterfaceName, kind: String },
    #[error(
        "{interface} has too few RX queues for XDP: a veth needs as many as its peer has TX queues; see `ethtool -l {interface}`"
    )]
    TooFewQueues { interface: InterfaceName },
    #[error("the MTU of {interface} is too large for XDP ({mtu}): lower it, on a veth on both ends")]
    Mtu { interface: InterfaceName, mtu: u32 },
    #[error(
        "{interface} has another XDP program attached, {program}: mcr leaves it alone; detach it, or relay from another interface"
    )]
    SlotTaken { interface: InterfaceName, program: String },
    #[error(
        "XDP on {interface} was refused for want of a capability: run mcr with CAP_BPF and CAP_NET_ADMIN"
    )]
    Permission { interface: InterfaceName },
    #[error("the XDP program cannot be loaded for {interface}: {why}")]
    Load { interface: InterfaceName, why: String },
    #[error("the XDP program cannot be attached to {interface}: {source}")]
    Attach { interface: InterfaceName, source: io::Error },
    #[error("{path} cannot be pinned: {why}; is a bpffs mounted there?")]
    Pin { path: PathBuf, why: String },
}

#[derive(Debug, Error)]
#[error("the eBPF map {map} was not {what}: {source}")]
pub struct MapAccessError {
    map: &'static str,
    what: &'static str,
    source: MapError,
}

/// An eBPF object whose ABI is known to be ours.
#[derive(Debug)]
pub struct Object(Cow<'static, [u8]>);

impl Object {
    /// The object in `path`, or the one that this binary embeds.
    pub fn open(path: Option<&Path>) -> Result<Self, ObjectError> {
        let Some(path) = path else { return Self::check(EMBEDDED.into(), "embedded in this binary") };
        let name = path.display().to_string();
        match fs::read(path) {
            Ok(bytes) => Self::check(bytes.into(), &name),
            Err(source) => Err(ObjectError::Read { path: name, source }),
        }
    }

    fn check(bytes: Cow<'static, [u8]>, path: &str) -> Result<Self, ObjectError> {
        let found = abi_version(&bytes).map_err(|why| ObjectError::Foreign { path: path.to_owned(), why })?;
        if found == abi::ABI_VERSION {
            Ok(Self(bytes))
        } else {
            Err(ObjectError::Abi { path: path.to_owned(), found, needed: abi::ABI_VERSION })
        }
    }

    /// Loads the program with small maps and lets it go again: what cannot be had shows before anything
    /// depends on it.
    pub fn rehearse(&self) -> Result<(), EbpfError> {
        let mut ebpf = EbpfLoader::new()
            .map_max_entries(map::FLOWS_V4, 1)
            .map_max_entries(map::RULES, 1)
            .load(self.bytes())?;
        xdp(&mut ebpf)?.load()?;
        socket_filter(&mut ebpf)?.load()?;
        Ok(())
    }

    pub fn bytes(&self) -> &[u8] {
        &self.0
    }
}

fn abi_version(object: &[u8]) -> Result<u32, String> {
    let file = object::File::parse(object).map_err(|error| error.to_string())?;
    let symbol = file
        .symbols()
        .find(|symbol| symbol.name() == Ok(abi::ABI_SYMBOL))
        .ok_or_else(|| format!("it has no symbol {}", abi::ABI_SYMBOL))?;
    let section = symbol.section_index().ok_or("its ABI symbol is in no section")?;
    let section = file.section_by_index(section).map_err(|error| error.to_string())?;
    let data = section.data().map_err(|error| error.to_string())?;
    let start = symbol.address() as usize;
    let bytes = data.get(start..start + 4).ok_or("its ABI symbol lies outside of its section")?;
    Ok(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
}

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
            .load(object.bytes())
            .map_err(load)?;
        Self::pin(ebpf, &placement.pins).map_err(|(path, why)| {
            clear_pins(&placement.pins);
            AttachError::Pin { path, why }
        })
    }

    fn pin(mut ebpf: Ebpf, pins: &Path) -> Result<Self, (PathBuf, String)> {
        let at = |name: &str| pins.join(name);
        let failed = |name: &str, error: &dyn std::error::Error| (at(name), error.to_string());
        clear_pins(pins);
        fs::create_dir_all(pins).map_err(|error| (pins.to_owned(), error.to_string()))?;
        let mut take = |name: &str| -> Result<Map, (PathBuf, String)> {
            let map =
                ebpf.take_map(name).ok_or_else(|| (at(name), "the object has no such map".to_owned()))?;
            map.pin(at(name)).map_err(|error| failed(name, &error))?;
            Ok(map)
        };
        let shape = |name: &str, error: MapError| failed(name, &error);
        Ok(Self {
            flows: take(map::FLOWS_V4)?.try_into().map_err(|error| shape(map::FLOWS_V4, error))?,
            rules: take(map::RULES)?.try_into().map_err(|error| shape(map::RULES, error))?,
            verdicts: take(map::VERDICTS)?.try_into().map_err(|error| shape(map::VERDICTS, error))?,
            sockets: take(map::SOCKETS)?.try_into().map_err(|error| shape(map::SOCKETS, error))?,
            queues: take(map::QUEUES)?.try_into().map_err(|error| shape(map::QUEUES, error))?,
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
        let program = xdp(&mut self.ebpf).map_err(|error| load(error.into()))?;
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
        }
        Ok(sum)
    }

    /// Frames of a queue that were steered to its socket.
    pub fn steered(&self, queue: QueueId) -> Result<u64, MapAccessError> {
        let cpus = self.queues.get(&queue.0, 0).map_err(access(map::QUEUES, "read"))?;
        Ok(cpus.iter().map(|cpu| cpu.steered).sum())
    }

    /// What a program, one of [`abi::verdicts_of`], made of the interface's frames, by name.
    pub fn verdicts(&self, of: u32) -> Result<[(&'static str, u64); 14], MapAccessError> {
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

fn access(map: &'static str, what: &'static str) -> impl FnOnce(MapError) -> MapAccessError {
    move |source| MapAccessError { map, what, source }
}

fn xdp(ebpf: &mut Ebpf) -> Result<&mut Xdp, ProgramError> {
    let missing = ProgramError::InvalidName { name: abi::PROGRAM.to_owned() };
    ebpf.program_mut(abi::PROGRAM).ok_or(missing)?.try_into()
}

fn socket_filter(ebpf: &mut Ebpf) -> Result<&mut SocketFilter, ProgramError> {
    let missing = ProgramError::InvalidName { name: abi::FILTER.to_owned() };
    ebpf.program_mut(abi::FILTER).ok_or(missing)?.try_into()
}

/// Removes the pins of one interface, whoever left them. What they held and nothing else holds is gone:
/// a program is detached.
pub fn clear_pins(pins: &Path) {
    let Ok(entries) = fs::read_dir(pins) else { return };
    for entry in entries.flatten() {
        let _ = fs::remove_file(entry.path());
    }
    let _ = fs::remove_dir(pins);
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

fn errno(error: &(dyn std::error::Error + 'static)) -> Option<i32> {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(errno) = error.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error) {
            return Some(errno);
        }
        cause = error.source();
    }
    None
}

/// What went wrong with a load, without the verifier's log.
pub fn last_words(error: &EbpfError) -> String {
    let cause = errno(error).map(io::Error::from_raw_os_error);
    cause.map_or_else(
        || error.to_string().lines().next().unwrap_or_default().to_owned(),
        |cause| cause.to_string(),
    )
}

/// A program, and how to learn more of it.
fn describe(program: Option<u32>) -> String {
    // Its name is for CAP_SYS_ADMIN to know.
    program.map_or_else(
        || "of unknown id (see `bpftool net`)".to_owned(),
        |id| format!("id {id} (`bpftool prog show id {id}` names it)"),
    )
}

/// Waits until every eBPF program that was running when it was called has ended.
///
/// `MEMBARRIER_CMD_GLOBAL` waits for an RCU grace period, and so for all programs that might still use
/// a deleted map entry and for the AF_XDP sockets' rings to be written out.
pub fn barrier() -> io::Result<()> {
    const MEMBARRIER_CMD_GLOBAL: libc::c_int = 1;
    // SAFETY: the call takes integers only.
    let result = unsafe { libc::syscall(libc::SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Passes the program's log on to tracing.
#[derive(Debug)]
pub struct TracingLog;

impl log::Log for TracingLog {
    fn enabled(&self, _metadata: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        match record.level() {
            log::Level::Error => tracing::error!(target: "mcr::ebpf", "{}", record.args()),
            log::Level::Warn => tracing::warn!(target: "mcr::ebpf", "{}", record.args()),
            log::Level::Info => tracing::info!(target: "mcr::ebpf", "{}", record.args()),
            log::Level::Debug => tracing::debug!(target: "mcr::ebpf", "{}", record.args()),
            log::Level::Trace => tracing::trace!(target: "mcr::ebpf", "{}", record.args()),
        }
    }

    fn flush(&self) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_embedded_object_has_our_abi() {
        Object::open(None).unwrap();
    }

    #[test]
    fn an_object_of_another_abi_is_refused() {
        let mut bytes = EMBEDDED.to_vec();
        let file = object::File::parse(EMBEDDED).unwrap();
        let symbol = file.symbols().find(|symbol| symbol.name() == Ok(abi::ABI_SYMBOL)).unwrap();
        let section = file.section_by_index(symbol.section_index().unwrap()).unwrap();
        let (start, _) = section.file_range().unwrap();
        bytes[(start + symbol.address()) as usize] += 1;
        let error = Object::check(bytes.into(), "other.o").unwrap_err();
        assert!(matches!(error, ObjectError::Abi { found, .. } if found == abi::ABI_VERSION + 1), "{error}");
    }

    #[test]
    fn what_is_no_object_is_refused() {
        assert!(matches!(Object::check(vec![1, 2, 3].into(), "junk"), Err(ObjectError::Foreign { .. })));
    }
}
