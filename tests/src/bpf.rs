//! The eBPF object under test, altered copies of it, and a stranger's XDP program.

use std::{
    env, fs,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    path::{Path, PathBuf},
};

use mcr_common::abi;
use object::{Object, ObjectSection, ObjectSymbol};

use crate::Namespace;

/// The object that `mcr` embeds, or the one that `MCR_BPF_OBJECT` names.
#[track_caller]
pub fn object_path() -> PathBuf {
    let path = env::var_os("MCR_BPF_OBJECT")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../mcr/bpf/mcr.bpf.o"), PathBuf::from);
    assert!(path.exists(), "{} is missing: `cargo xtask build-ebpf` makes it", path.display());
    path
}

#[track_caller]
pub fn object() -> Vec<u8> {
    let path = object_path();
    fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The object as if it had been built from another version of the shared types.
#[track_caller]
pub fn object_of_abi(version: u32) -> Vec<u8> {
    let mut bytes = object();
    let at = {
        let file = object::File::parse(&*bytes).expect("an ELF object");
        let symbol = file.symbols().find(|symbol| symbol.name() == Ok(abi::ABI_SYMBOL));
        let symbol = symbol.expect("the symbol of the ABI version");
        let section = symbol.section_index().expect("the symbol is defined");
        let (start, _) = file.section_by_index(section).expect("section").file_range().expect("file range");
        usize::try_from(start + symbol.address()).expect("an offset in the file")
    };
    let field = &mut bytes[at..at + 4];
    assert_eq!(field, abi::ABI_VERSION.to_le_bytes(), "the object's ABI version before the change");
    field.copy_from_slice(&version.to_le_bytes());
    bytes
}

/// The object as a build with other instructions and the same types would make it: the XDP program knows another number for
/// 802.1ad, and the egress program judges frames anew that are a byte less too long.
#[track_caller]
pub fn object_of_another_build() -> Vec<u8> {
    const ETHERTYPE_8021AD: i32 = 0x88a8;
    const MTU_SLACK: i32 = 4;
    const JUMP_IF_EQUAL: u8 = 0x15;
    const ADD: u8 = 0x07;
    let mut bytes = object();
    for (section, operation, immediate) in
        [("xdp", JUMP_IF_EQUAL, ETHERTYPE_8021AD), ("xdp/devmap", ADD, MTU_SLACK)]
    {
        let (start, len) = {
            let file = object::File::parse(&*bytes).expect("an ELF object");
            let section = file.section_by_name(section).expect("a section of programs");
            section.file_range().expect("file range")
        };
        let section = &mut bytes[start as usize..(start + len) as usize];
        let of_interest = |instruction: &&mut [u8]| {
            instruction[0] == operation && instruction[4..8] == immediate.to_le_bytes()
        };
        let mut instructions: Vec<_> = section.chunks_exact_mut(8).filter(of_interest).collect();
        assert_eq!(instructions.len(), 1, "instructions that use {immediate:#x}");
        instructions[0][4..8].copy_from_slice(&(immediate - 1).to_le_bytes());
    }
    bytes
}

/// An XDP program that is not ours, attached natively until it is dropped.
#[derive(Debug)]
pub struct ForeignXdp {
    _program: OwnedFd,
    _link: OwnedFd,
    pub id: u32,
}

/// As `bpftool` shows it.
pub const FOREIGN_NAME: &str = "strangers_xdp";

impl ForeignXdp {
    #[track_caller]
    pub fn attach(namespace: &Namespace, interface: &str) -> Self {
        namespace.run(|| {
            let index = nix::net::if_::if_nametoindex(interface).expect("interface index");
            let program = load(BPF_PROG_TYPE_XDP, XDP_PASS);
            let link = attach_link(&program, index, BPF_XDP, XDP_FLAGS_DRV_MODE);
            let id = program_id(&program);
            Self { _program: program, _link: link, id }
        })
    }
}

/// A stranger's program that lets everything out, attached until it is dropped.
#[derive(Debug)]
pub struct ForeignEgress {
    _program: OwnedFd,
    _link: OwnedFd,
}

impl ForeignEgress {
    /// On a device of the caller's namespace, by tcx.
    #[track_caller]
    pub fn on_device(interface: &str) -> Self {
        let index = nix::net::if_::if_nametoindex(interface).expect("interface index");
        let program = load(BPF_PROG_TYPE_SCHED_CLS, TC_ACT_OK);
        Self { _link: attach_link(&program, index, BPF_TCX_EGRESS, 0), _program: program }
    }

    /// On the sockets of a cgroup.
    #[track_caller]
    pub fn on_cgroup(directory: &Path) -> Self {
        let cgroup = fs::File::open(directory).expect("a cgroup");
        let program = load(BPF_PROG_TYPE_CGROUP_SKB, CGROUP_ALLOW);
        let link = attach_link(&program, cgroup.as_raw_fd().cast_unsigned(), BPF_CGROUP_INET_EGRESS, 0);
        Self { _link: link, _program: program }
    }
}

const BPF_PROG_LOAD: u32 = 5;
const BPF_OBJ_GET_INFO_BY_FD: u32 = 15;
const BPF_LINK_CREATE: u32 = 28;
const BPF_PROG_TYPE_SCHED_CLS: u32 = 3;
const BPF_PROG_TYPE_XDP: u32 = 6;
const BPF_PROG_TYPE_CGROUP_SKB: u32 = 8;
const BPF_CGROUP_INET_EGRESS: u32 = 1;
const BPF_XDP: u32 = 37;
const BPF_TCX_EGRESS: u32 = 47;
const TC_ACT_OK: u32 = 0;
const CGROUP_ALLOW: u32 = 1;
const XDP_PASS: u32 = 2;
const XDP_FLAGS_DRV_MODE: u32 = 1 << 2;

/// The head of `union bpf_attr` for `BPF_PROG_LOAD`.
#[repr(C)]
#[derive(Default)]
struct ProgLoad {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
    prog_name: [u8; 16],
}

/// The head of `union bpf_attr` for `BPF_LINK_CREATE`.
#[repr(C)]
struct LinkCreate {
    prog_fd: u32,
    /// An interface's index or a descriptor.
    target: u32,
    attach_type: u32,
    flags: u32,
}

/// `union bpf_attr` for `BPF_OBJ_GET_INFO_BY_FD`.
#[repr(C)]
struct GetInfo {
    bpf_fd: u32,
    info_len: u32,
    info: u64,
}

/// `r0 = verdict; exit`.
fn load(prog_type: u32, verdict: u32) -> OwnedFd {
    let instructions: [u64; 2] = [0x0000_0000_0000_00b7 | u64::from(verdict) << 32, 0x0000_0000_0000_0095];
    let mut attr = ProgLoad {
        prog_type,
        insn_cnt: instructions.len() as u32,
        insns: instructions.as_ptr().addr() as u64,
        license: c"GPL".as_ptr().addr() as u64,
        ..ProgLoad::default()
    };
    attr.prog_name[..FOREIGN_NAME.len()].copy_from_slice(FOREIGN_NAME.as_bytes());
    let fd = bpf(BPF_PROG_LOAD, &mut attr).expect("load a program");
    // SAFETY: the kernel just made this descriptor for the caller alone.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn attach_link(program: &OwnedFd, target: u32, attach_type: u32, flags: u32) -> OwnedFd {
    let mut attr = LinkCreate { prog_fd: program.as_raw_fd().cast_unsigned(), target, attach_type, flags };
    let fd = bpf(BPF_LINK_CREATE, &mut attr).expect("attach a program");
    // SAFETY: the kernel just made this descriptor for the caller alone.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn program_id(program: &OwnedFd) -> u32 {
    // The head of `struct bpf_prog_info`: type, id.
    let mut info = [0u32; 2];
    let mut attr = GetInfo {
        bpf_fd: program.as_raw_fd().cast_unsigned(),
        info_len: size_of_val(&info) as u32,
        info: info.as_mut_ptr().addr() as u64,
    };
    bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attr).expect("program information");
    info[1]
}

fn bpf<T>(command: u32, attr: &mut T) -> std::io::Result<i32> {
    // SAFETY: `attr` is a prefix of union bpf_attr, the rest of which the kernel takes as zero; what it
    // points to lives through the call.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size_of::<T>()) };
    if result < 0 { Err(std::io::Error::last_os_error()) } else { Ok(result as i32) }
}
