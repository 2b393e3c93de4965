//! Whether an interface takes redirected frames.

use std::io;

use thiserror::Error;

use crate::{
    rule::{IfIndex, InterfaceName},
    sys::netdev::{self, XDP_BASIC, XDP_NDO_XMIT},
};

/// Why the kernel cannot be told to send a rule's datagrams on by itself, or not to this interface.
#[derive(Debug, Error)]
pub enum NoTarget {
    #[error("this kernel does not say whether {interface} takes redirected frames (Linux 6.3 does)")]
    Unknown { interface: InterfaceName },
    #[error(
        "{interface} (veth) takes no redirected frames: its other end needs an XDP program or GRO, `ethtool -K \
         INTERFACE gro on` there"
    )]
    Peer { interface: InterfaceName },
    #[error(
        "{interface} ({kind}) takes no redirected frames now: many such devices do once an XDP program is attached to them, \
         `xdp-filter load {interface}` does that (package xdp-tools)"
    )]
    NotNow { interface: InterfaceName, kind: String },
    #[error("{interface} ({kind}) takes no redirected frames")]
    Never { interface: InterfaceName, kind: String },
    #[error("the kernel was asked whether {interface} takes redirected frames: {source}")]
    Asking { interface: InterfaceName, source: io::Error },
}

impl NoTarget {
    /// Whether the interface went before it could be asked about.
    pub fn is_gone(&self) -> bool {
        matches!(self, Self::Asking { source, .. } if source.raw_os_error() == Some(libc::ENODEV))
    }
}

/// Asks the kernel whether an interface of this network namespace takes redirected frames as it is now.
///
/// The answer is the driver's own: a veth's changes with the XDP program and GRO of its other end, wherever that is,
/// and a network card's with the XDP program attached to it. The kernel passes over an interface that does not, in
/// silence, so the question is worth repeating when interfaces change.
pub fn takes_redirects(interface: &InterfaceName, index: IfIndex, kind: &str) -> Result<(), NoTarget> {
    let interface = interface.clone();
    let kind = kind.to_owned();
    match netdev::xdp_features(index) {
        Ok(Some(features)) if features & XDP_NDO_XMIT != 0 => Ok(()),
        Ok(Some(_)) if kind == "veth" => Err(NoTarget::Peer { interface }),
        Ok(Some(features)) if features & XDP_BASIC != 0 => Err(NoTarget::NotNow { interface, kind }),
        Ok(Some(_)) => Err(NoTarget::Never { interface, kind }),
        Ok(None) => Err(NoTarget::Unknown { interface }),
        Err(source) => Err(NoTarget::Asking { interface, source }),
    }
}
