//! What only ethtool's ioctl tells of an interface: its driver and the RX queues in use.

use std::{ffi::CStr, mem::zeroed, os::fd::AsRawFd};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

use crate::rule::InterfaceName;

const ETHTOOL_GDRVINFO: u32 = 0x03;
const ETHTOOL_GCHANNELS: u32 = 0x3c;

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
    rest: [u8; 64],
}

/// RX queues in use, or `None` if the driver does not say.
pub fn rx_queues(interface: &InterfaceName) -> Option<u32> {
    let request = Channels { cmd: ETHTOOL_GCHANNELS, max: [0; 4], rx: 0, tx: 0, other: 0, combined: 0 };
    let answer = call(interface, request)?;
    Some(answer.rx + answer.combined).filter(|&queues| queues > 0)
}

/// The driver's name, and the device's place on its bus, like `0000:3b:00.0`.
pub fn driver(interface: &InterfaceName) -> Option<(String, String)> {
    let request =
        DriverInfo { cmd: ETHTOOL_GDRVINFO, driver: [0; 32], versions: [0; 64], bus: [0; 32], rest: [0; 64] };
    let answer = call(interface, request)?;
    let text = |bytes| CStr::from_bytes_until_nul(bytes).ok()?.to_str().ok().map(str::to_owned);
    Some((text(&answer.driver)?, text(&answer.bus)?)).filter(|(driver, _)| !driver.is_empty())
}

/// Hands a request structure to the interface's driver, which answers in place.
fn call<T: Copy>(interface: &InterfaceName, mut request: T) -> Option<T> {
    let any = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None).ok()?;
    // SAFETY: all zeroes is an ifreq.
    let mut ifreq = unsafe { zeroed::<libc::ifreq>() };
    for (to, from) in ifreq.ifr_name.iter_mut().zip(interface.as_str().bytes()) {
        *to = from as libc::c_char;
    }
    ifreq.ifr_ifru.ifru_data = (&raw mut request).cast();
    // SAFETY: the kernel reads and writes the request, which starts with the command that names its
    // shape; both structures are laid out as the kernel's.
    let result = unsafe { libc::ioctl(any.as_raw_fd(), libc::SIOCETHTOOL as libc::Ioctl, &raw mut ifreq) };
    (result == 0).then_some(request)
}

const _: () = assert!(size_of::<Channels>() == 36 && size_of::<DriverInfo>() == 196);
