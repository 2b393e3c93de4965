//! Pinned eBPF objects as the kernel describes them: what aya keeps to itself, or asks more capabilities for.

use std::{
    ffi::CString,
    fs, io,
    os::{
        fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

use super::bpf;

const BPF_OBJ_GET: libc::c_int = 7;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_int = 15;

/// What a pin may hold, as the kernel names such descriptors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Map,
    Program,
    Link,
}

impl Kind {
    /// Kernels differ in how they write the last.
    fn names(self) -> [&'static str; 2] {
        match self {
            Self::Map => ["bpf-map"; 2],
            Self::Program => ["bpf-prog"; 2],
            Self::Link => ["bpf-link", "bpf_link"],
        }
    }
}

/// The head of `struct bpf_map_info`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MapInfo {
    pub kind: u32,
    pub id: u32,
    pub key_size: u32,
    pub value_size: u32,
    pub max_entries: u32,
    pub flags: u32,
}

/// The head of `struct bpf_link_info`, for a link of XDP.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LinkInfo {
    pub kind: u32,
    pub id: u32,
    pub program: u32,
    reserved: u32,
    /// Index of the interface, in whatever namespace it is; 0 if it is gone.
    pub interface: u32,
}

impl LinkInfo {
    /// `BPF_LINK_TYPE_XDP`.
    pub const XDP: u32 = 6;
}

/// A program, and the ids of the maps that it uses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Program {
    pub id: u32,
    /// A digest of its instructions.
    pub tag: [u8; 8],
    /// Bytes that the verifier made of them: more where it fences them.
    pub verified_bytes: u32,
    pub maps: Vec<u32>,
}

/// The head of `struct bpf_prog_info`.
#[repr(C)]
#[derive(Default)]
struct ProgramInfo {
    kind: u32,
    id: u32,
    tag: [u8; 8],
    /// As machine code, and as verified.
    lengths: [u32; 2],
    instructions: [u64; 2],
    load_time: u64,
    uid: u32,
    map_count: u32,
    maps: u64,
}

/// Opens what is pinned at a path. What is of another kind is `InvalidData`.
pub fn open(path: &Path, kind: Kind) -> io::Result<OwnedFd> {
    let name = CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: the path, which outlives the call, then a descriptor and flags that are none.
    let fd = unsafe { bpf::call(BPF_OBJ_GET, &mut [name.as_ptr().addr() as u64, 0]) }?;
    // SAFETY: the kernel has just made this descriptor for the caller alone.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    let found = fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))?;
    let found = found.display().to_string();
    let found = found.strip_prefix("anon_inode:").unwrap_or(&found);
    if kind.names().contains(&found) {
        Ok(fd)
    } else {
        Err(io::Error::new(io::ErrorKind::InvalidData, format!("a {found} is pinned there")))
    }
}

pub fn map(map: impl AsFd) -> io::Result<MapInfo> {
    let mut answer = MapInfo::default();
    info(map, &mut answer)?;
    Ok(answer)
}

pub fn link(link: impl AsFd) -> io::Result<LinkInfo> {
    let mut answer = LinkInfo::default();
    info(link, &mut answer)?;
    Ok(answer)
}

pub fn program(program: impl AsFd) -> io::Result<Program> {
    let mut count = ProgramInfo::default();
    info(&program, &mut count)?;
    let mut maps = vec![0u32; count.map_count as usize];
    let mut answer = ProgramInfo {
        map_count: count.map_count,
        maps: maps.as_mut_ptr().addr() as u64,
        ..ProgramInfo::default()
    };
    info(&program, &mut answer)?;
    let [_, verified_bytes] = answer.lengths;
    Ok(Program { id: answer.id, tag: answer.tag, verified_bytes, maps })
}

/// `union bpf_attr` for `BPF_OBJ_GET_INFO_BY_FD`.
#[repr(C)]
struct GetInfo {
    object: u32,
    len: u32,
    info: u64,
}

/// Has the kernel fill in the head of an object's description.
fn info<T>(object: impl AsFd, answer: &mut T) -> io::Result<()> {
    let object = object.as_fd().as_raw_fd().cast_unsigned();
    let info = std::ptr::from_mut(answer).addr() as u64;
    let mut attributes = GetInfo { object, len: size_of::<T>() as u32, info };
    // SAFETY: the answer is as long as is said; what it points to itself is its owner's, who holds it through the call.
    unsafe { bpf::call(BPF_OBJ_GET_INFO_BY_FD, &mut attributes) }?;
    Ok(())
}
