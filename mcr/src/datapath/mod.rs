//! Chooses the datapath of a rule, and says why. Pure.

use thiserror::Error;

use crate::rule::{Datapath, DatapathChoice};

pub mod af_packet;
pub mod af_xdp;
pub mod budget;
pub mod redirect;

/// A datapath that was asked for by name and is none of this version's.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("the datapath {datapath} is not built yet: use af-xdp, af-packet or auto")]
pub struct NotBuilt {
    pub datapath: Datapath,
}

pub fn check_built(asked: DatapathChoice) -> Result<(), NotBuilt> {
    match asked.0 {
        Some(datapath @ Datapath::Redirect) => Err(NotBuilt { datapath }),
        _ => Ok(()),
    }
}

/// The datapath for what was asked for, on an interface where XDP can be had or not. A datapath asked for
/// by name is taken or refused, never replaced.
pub fn choose(asked: DatapathChoice, xdp: bool) -> Datapath {
    asked.0.unwrap_or(if xdp { Datapath::AfXdp } else { Datapath::AfPacket })
}

/// Why a datapath is in use, and what of the traffic the host itself still sees.
pub fn explain(datapath: Datapath, asked: DatapathChoice, generic: bool, no_xdp: Option<&str>) -> String {
    let why = match (datapath, asked.0) {
        (Datapath::AfXdp, Some(_)) if generic => "asked for by name, with --generic-xdp",
        (Datapath::AfXdp, None) if generic => "auto takes generic XDP, as --generic-xdp allows",
        (_, Some(_)) => "asked for by name",
        (Datapath::AfXdp, None) => "auto takes native XDP",
        (_, None) => no_xdp.unwrap_or("auto takes what there is"),
    };
    let sees = match datapath {
        Datapath::AfPacket => af_packet::HOST_SEES,
        _ => af_xdp::HOST_SEES,
    };
    format!("{why}; {sees}")
}
