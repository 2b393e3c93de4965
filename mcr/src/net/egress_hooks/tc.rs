//! Queueing disciplines and the filters on egress of devices.
//!
//! A device's own queue, whatever its kind among `PLAIN`, treats all that is sent alike: to pass it by is no offence. Any
//! other kind is somebody's shaping, also below a `mq`.

use std::io;

use crate::{
    rule::{IfIndex, InterfaceName},
    sys::netlink::{attribute, bytes, dump, text},
};

const RTM_GETQDISC: u16 = 38;
const RTM_GETTFILTER: u16 = 46;
const TCA_KIND: u16 = 1;
/// `tcmsg`.
const HEADER: usize = 20;
/// `TC_H_CLSACT` and `TC_H_MIN_EGRESS`.
const CLSACT_EGRESS: u32 = 0xffff_fff3;

const CLSACT: &str = "clsact";
const PLAIN: [&str; 10] =
    ["noqueue", "noop", "pfifo_fast", "fq_codel", "fq", "mq", "pfifo", "bfifo", CLSACT, "ingress"];

/// A qdisc: its device and its kind.
pub(super) type Qdisc = (IfIndex, String);

/// All qdiscs of the namespace but those that the kernel made by itself below others.
pub(super) fn qdiscs() -> io::Result<Vec<Qdisc>> {
    dump(libc::NETLINK_ROUTE, RTM_GETQDISC, &[0; HEADER], usize::MAX, |message| {
        let device = IfIndex(bytes(message, 4).map(u32::from_ne_bytes)?);
        Some((device, text(attribute(message.get(HEADER..)?, TCA_KIND))))
    })
}

/// Why a device must not be passed by.
pub(super) fn hook(name: &InterfaceName, index: IfIndex, qdiscs: &[Qdisc]) -> io::Result<Option<String>> {
    let mut kinds = qdiscs.iter().filter(|(device, _)| *device == index).map(|(_, kind)| kind.as_str());
    if let Some(kind) = kinds.clone().find(|kind| !PLAIN.contains(kind)) {
        return Ok(Some(format!("{name} is shaped by {kind}")));
    }
    Ok((kinds.any(|kind| kind == CLSACT) && has_filter(index)?)
        .then(|| format!("{name} has a tc egress filter")))
}

/// Whether a filter, of its own or of a block that it shares, is on egress.
fn has_filter(index: IfIndex) -> io::Result<bool> {
    let mut question = [0; HEADER];
    question[4..8].copy_from_slice(&index.0.to_ne_bytes());
    question[12..16].copy_from_slice(&CLSACT_EGRESS.to_ne_bytes());
    let found = dump(libc::NETLINK_ROUTE, RTM_GETTFILTER, &question, 1, |_| Some(()))?;
    Ok(!found.is_empty())
}
