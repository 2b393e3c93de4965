//! The eBPF object: load, attach, pin, fill maps, read counters. The only user of aya.
//!
//! [`Steering`] is what one interface has in the kernel, [`redirect`] the part of it that serves rules without a worker, and
//! [`Adopted`] what a daemon finds of it that goes on.

mod pinned;
pub mod redirect;
mod steering;

use std::{
    borrow::Cow,
    fs, io,
    path::{Path, PathBuf},
};

use aya::{
    Ebpf, EbpfError, EbpfLoader,
    maps::MapError,
    programs::{ProgramError, SocketFilter, Xdp},
};
use mcr_common::abi::{self, map};
use object::{Object as _, ObjectSection as _, ObjectSymbol as _};
use thiserror::Error;

pub use self::{
    pinned::{
        Adopted, Carried, CarriedOutput, Former, Misfit, Unfit, clear_former, identity_of, linked, settle,
    },
    redirect::{RedirectOutput, RedirectTotals, Sets},
    steering::{Placement, Steering},
};
use crate::rule::InterfaceName;

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
            .map_max_entries(map::BANKS, 1)
            .map_max_entries(map::FANS, 1)
            .map_max_entries(map::DEVICES, 1)
            .map_max_entries(map::RECORDS, 1)
            .map_max_entries(map::LOW_OUTPUTS, 1)
            .load(self.bytes())?;
        xdp(&mut ebpf, abi::PROGRAM)?.load()?;
        xdp(&mut ebpf, abi::REWRITE)?.load()?;
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

fn access(map: &'static str, what: &'static str) -> impl FnOnce(MapError) -> MapAccessError {
    move |source| MapAccessError { map, what, source }
}

fn xdp<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut Xdp, ProgramError> {
    let missing = ProgramError::InvalidName { name: name.to_owned() };
    ebpf.program_mut(name).ok_or(missing)?.try_into()
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
    // It stays where something is left in it.
    let _ = fs::remove_dir(pins);
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
