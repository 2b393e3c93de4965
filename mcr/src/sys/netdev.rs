//! What the kernel says of an interface's XDP: the generic netlink family `netdev`, by hand.

use std::io;

use socket2::Socket;

use super::netlink::{self, ATTRIBUTE_HEADER, malformed};
use crate::rule::IfIndex;

/// `NETDEV_XDP_ACT_BASIC`: it runs XDP programs.
pub const XDP_BASIC: u64 = 1;
/// `NETDEV_XDP_ACT_NDO_XMIT`: it takes redirected frames.
pub const XDP_NDO_XMIT: u64 = 4;

// linux/genetlink.h and linux/netdev.h.
const GENL_ID_CTRL: u16 = 0x10;
const CTRL_CMD_GETFAMILY: u8 = 3;
const CTRL_ATTR_FAMILY_ID: u16 = 1;
const CTRL_ATTR_FAMILY_NAME: u16 = 2;
const NETDEV_CMD_DEV_GET: u8 = 1;
const NETDEV_A_DEV_IFINDEX: u16 = 1;
const NETDEV_A_DEV_XDP_FEATURES: u16 = 3;

/// `genlmsghdr`.
const HEADER: usize = 4;

/// The XDP features of an interface, as they are at the moment. `None` if the kernel has no such family (before 6.3).
pub fn xdp_features(interface: IfIndex) -> io::Result<Option<u64>> {
    let mut socket = netlink::open(libc::NETLINK_GENERIC)?;
    let family = match ask(&mut socket, GENL_ID_CTRL, CTRL_CMD_GETFAMILY, CTRL_ATTR_FAMILY_NAME, b"netdev\0")
    {
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(None),
        answer => attribute(&answer?, CTRL_ATTR_FAMILY_ID).map(u16::from_ne_bytes).ok_or_else(malformed)?,
    };
    let index = interface.0.to_ne_bytes();
    let answer = ask(&mut socket, family, NETDEV_CMD_DEV_GET, NETDEV_A_DEV_IFINDEX, &index)?;
    let features = attribute(&answer, NETDEV_A_DEV_XDP_FEATURES).map(u64::from_ne_bytes);
    features.map(Some).ok_or_else(malformed)
}

/// Asks with one attribute; the attributes of the answer.
fn ask(socket: &mut Socket, family: u16, command: u8, kind: u16, value: &[u8]) -> io::Result<Vec<u8>> {
    let mut body = vec![command, 1, 0, 0];
    body.extend(((ATTRIBUTE_HEADER + value.len()) as u16).to_ne_bytes());
    body.extend(kind.to_ne_bytes());
    body.extend(value);
    body.resize(body.len().next_multiple_of(4), 0);
    let mut answer = netlink::ask(socket, family, &body)?;
    answer.drain(..HEADER.min(answer.len()));
    Ok(answer)
}

/// The first attribute of a kind, if it is of this length.
fn attribute<const N: usize>(attributes: &[u8], kind: u16) -> Option<[u8; N]> {
    netlink::attribute(attributes, kind).try_into().ok()
}
