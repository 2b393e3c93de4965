//! What only ethtool's ioctl tells of an interface: its driver, the RX queues in use, the driver's statistics.

use std::{ffi::CStr, mem::zeroed, os::fd::AsRawFd};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

use crate::rule::InterfaceName;

const ETHTOOL_GDRVINFO: u32 = 0x03;
const ETHTOOL_GRINGPARAM: u32 = 0x10;
const ETHTOOL_GSTRINGS: u32 = 0x1b;
const ETHTOOL_GSTATS: u32 = 0x1d;
const ETHTOOL_GFLAGS: u32 = 0x25;
const ETHTOOL_GCHANNELS: u32 = 0x3c;
const ETH_FLAG_RXVLAN: u32 = 1 << 8;
const ETH_FLAG_LRO: u32 = 1 << 15;
const ETH_SS_STATS: u32 = 1;

/// Bytes of a statistic's name.
const NAME_BYTES: usize = 32;

/// Room for statistics that are added, as with more queues, between asking how many there are and reading them: the
/// kernel writes as many as there are.
const ROOM: usize = 4096;

/// `struct ethtool_channels` of `linux/ethtool.h`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Channels {
    cmd: u32,
    max: [u32; 4],
    rx: u32,
    tx: u32,
    other: u32,
    combined: u32,
}

/// `struct ethtool_drvinfo` of `linux/ethtool.h`.
#[repr(C)]
#[derive(Clone, Copy)]
struct DriverInfo {
    cmd: u32,
    driver: [u8; 32],
    versions: [u8; 64],
    bus: [u8; 32],
    before_stats: [u8; 48],
    stats: u32,
    rest: [u8; 12],
}

/// `struct ethtool_ringparam` of `linux/ethtool.h`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Rings {
    cmd: u32,
    max: [u32; 4],
    rx: u32,
    others: [u32; 2],
    tx: u32,
}

/// `struct ethtool_value` of `linux/ethtool.h`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Value {
    cmd: u32,
    data: u32,
}

/// What a device does to frames before anybody sees them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    /// Several frames are made into one.
    pub lro: bool,
    /// VLAN tags are taken out of the frames.
    pub rxvlan: bool,
}

/// `None` if the driver does not say.
pub fn offloads(interface: &InterfaceName) -> Option<Offloads> {
    let Value { data, .. } = call(interface, Value { cmd: ETHTOOL_GFLAGS, data: 0 })?;
    Some(Offloads { lro: data & ETH_FLAG_LRO != 0, rxvlan: data & ETH_FLAG_RXVLAN != 0 })
}

/// Places of the device's RX rings, and the most that it can have; `None` if the driver does not say.
pub fn rx_ring(interface: &InterfaceName) -> Option<(u32, u32)> {
    let answer = rings(interface)?;
    Some((answer.rx, answer.max[0])).filter(|(_, most)| *most > 0)
}

/// Places of each of the device's TX rings; `None` if the driver does not say.
pub fn tx_ring(interface: &InterfaceName) -> Option<u32> {
    Some(rings(interface)?.tx).filter(|places| *places > 0)
}

fn rings(interface: &InterfaceName) -> Option<Rings> {
    call(interface, Rings { cmd: ETHTOOL_GRINGPARAM, ..Rings::default() })
}

/// The most RX queues that an interface can have, or `None` if the driver does not say.
pub fn most_rx_queues(interface: &InterfaceName) -> Option<u32> {
    let [rx, _, _, combined] = channels(interface)?.max;
    Some(rx + combined).filter(|&queues| queues > 0)
}

/// RX queues in use, or `None` if the driver does not say.
pub fn rx_queues(interface: &InterfaceName) -> Option<u32> {
    let answer = channels(interface)?;
    Some(answer.rx + answer.combined).filter(|&queues| queues > 0)
}

fn channels(interface: &InterfaceName) -> Option<Channels> {
    call(interface, Channels { cmd: ETHTOOL_GCHANNELS, max: [0; 4], rx: 0, tx: 0, other: 0, combined: 0 })
}

/// The driver's statistics by name, none if it has none.
pub fn statistics(interface: &InterfaceName) -> Vec<(String, u64)> {
    read_statistics(interface).unwrap_or_default()
}

fn read_statistics(interface: &InterfaceName) -> Option<Vec<(String, u64)>> {
    let count = driver_info(interface)?.stats as usize;
    if count == 0 {
        return None;
    }
    // `struct ethtool_gstrings` and `struct ethtool_stats`: three words and two before what they hold.
    let names = list(interface, [ETHTOOL_GSTRINGS, ETH_SS_STATS], 12 + (count + ROOM) * NAME_BYTES)?;
    let values = list(interface, [ETHTOOL_GSTATS, 0], 8 + (count + ROOM) * 8)?;
    let names = names[12..].chunks_exact(NAME_BYTES).map(|bytes| {
        let name = bytes.split(|&byte| byte == 0).next().unwrap_or_default();
        String::from_utf8_lossy(name).trim().to_owned()
    });
    let (values, _) = values[8..].as_chunks();
    Some(names.zip(values.iter().map(|&bytes| u64::from_ne_bytes(bytes))).take(count).collect())
}

/// What the driver answers with a list, in `bytes` that begin with a command and an argument.
fn list(interface: &InterfaceName, head: [u32; 2], bytes: usize) -> Option<Vec<u8>> {
    let mut buffer = vec![0; bytes];
    buffer[..4].copy_from_slice(&head[0].to_ne_bytes());
    buffer[4..8].copy_from_slice(&head[1].to_ne_bytes());
    // SAFETY: the buffer begins with the command, and has room for more than the driver said it has.
    unsafe { ioctl(interface, buffer.as_mut_ptr().cast()) }.then_some(buffer)
}

fn driver_info(interface: &InterfaceName) -> Option<DriverInfo> {
    let request = DriverInfo {
        cmd: ETHTOOL_GDRVINFO,
        driver: [0; 32],
        versions: [0; 64],
        bus: [0; 32],
        before_stats: [0; 48],
        stats: 0,
        rest: [0; 12],
    };
    call(interface, request)
}

/// The driver's name, and the device's place on its bus, like `0000:3b:00.0`.
pub fn driver(interface: &InterfaceName) -> Option<(String, String)> {
    let answer = driver_info(interface)?;
    let text = |bytes| CStr::from_bytes_until_nul(bytes).ok()?.to_str().ok().map(str::to_owned);
    Some((text(&answer.driver)?, text(&answer.bus)?)).filter(|(driver, _)| !driver.is_empty())
}

/// Hands a request structure to the interface's driver, which answers in place.
fn call<T: Copy>(interface: &InterfaceName, mut request: T) -> Option<T> {
    // SAFETY: the request starts with the command that names its shape; the structures are laid out as the
    // kernel's.
    unsafe { ioctl(interface, (&raw mut request).cast()) }.then_some(request)
}

/// Whether the driver answered.
///
/// # Safety
///
/// The request must begin with a command of ethtool's and be as long as the kernel takes it to be, answer included.
unsafe fn ioctl(interface: &InterfaceName, request: *mut libc::c_char) -> bool {
    let Ok(any) = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None) else {
        return false;
    };
    // SAFETY: all zeroes is an ifreq.
    let mut ifreq = unsafe { zeroed::<libc::ifreq>() };
    for (to, from) in ifreq.ifr_name.iter_mut().zip(interface.as_str().bytes()) {
        *to = from as libc::c_char;
    }
    ifreq.ifr_ifru.ifru_data = request;
    // SAFETY: the kernel reads and writes the request, as the caller has made sure that it may.
    unsafe { libc::ioctl(any.as_raw_fd(), libc::SIOCETHTOOL as libc::Ioctl, &raw mut ifreq) == 0 }
}

const _: () = assert!(size_of::<Channels>() == 36 && size_of::<DriverInfo>() == 196);
const _: () = assert!(size_of::<Rings>() == 36 && size_of::<Value>() == 8);
