//! What the kernel says of an interface's XDP: the generic netlink family `netdev`, by hand.

use std::io;

use socket2::Socket;
use tokio::io::unix::AsyncFd;

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
const CTRL_ATTR_MCAST_GROUPS: u16 = 7;
const CTRL_ATTR_MCAST_GRP_NAME: u16 = 1;
const CTRL_ATTR_MCAST_GRP_ID: u16 = 2;
const NETDEV_MCGRP_MGMT: &[u8] = b"mgmt\0";
const NETDEV_CMD_DEV_GET: u8 = 1;
const NETDEV_A_DEV_IFINDEX: u16 = 1;
const NETDEV_A_DEV_XDP_FEATURES: u16 = 3;

/// `genlmsghdr`.
const HEADER: usize = 4;

/// The XDP features of an interface, as they are at the moment. `None` if the kernel has no such family (before 6.3).
pub fn xdp_features(interface: IfIndex) -> io::Result<Option<u64>> {
    let mut socket = netlink::open(libc::NETLINK_GENERIC)?;
    let Some(family) = family(&mut socket)? else { return Ok(None) };
    let family = attribute(&family, CTRL_ATTR_FAMILY_ID).map(u16::from_ne_bytes).ok_or_else(malformed)?;
    let index = interface.0.to_ne_bytes();
    let answer = ask(&mut socket, family, NETDEV_CMD_DEV_GET, NETDEV_A_DEV_IFINDEX, &index)?;
    let features = attribute(&answer, NETDEV_A_DEV_XDP_FEATURES).map(u64::from_ne_bytes);
    features.map(Some).ok_or_else(malformed)
}

/// Hears of changes of interfaces' XDP features in this network namespace. `None` if the kernel tells nobody. Must be called
/// within the runtime.
pub fn listen() -> io::Result<Option<AsyncFd<Socket>>> {
    let family = family(&mut netlink::open(libc::NETLINK_GENERIC)?)?.unwrap_or_default();
    let mut groups = netlink::attributes(netlink::attribute(&family, CTRL_ATTR_MCAST_GROUPS));
    let group = groups
        .find(|(_, group)| netlink::attribute(group, CTRL_ATTR_MCAST_GRP_NAME) == NETDEV_MCGRP_MGMT)
        .and_then(|(_, group)| attribute(group, CTRL_ATTR_MCAST_GRP_ID).map(u32::from_ne_bytes));
    group.filter(|group| *group <= 32).map(|group| netlink::listen(libc::NETLINK_GENERIC, group)).transpose()
}

/// What the kernel says of the family.
fn family(socket: &mut Socket) -> io::Result<Option<Vec<u8>>> {
    match ask(socket, GENL_ID_CTRL, CTRL_CMD_GETFAMILY, CTRL_ATTR_FAMILY_NAME, b"netdev\0") {
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        answer => answer.map(Some),
    }
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
