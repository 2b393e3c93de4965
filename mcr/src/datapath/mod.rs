//! Chooses the datapath of a rule, and says why. Pure.

use crate::rule::{Datapath, DatapathChoice};

pub mod af_packet;
pub mod af_xdp;
pub mod budget;
pub mod redirect;

/// The datapath for what was asked for, on an interface where XDP can be had or not, for a rule that the kernel can
/// serve by itself or not. A datapath asked for by name is taken or refused, never replaced.
pub fn choose(asked: DatapathChoice, xdp: bool, redirect: impl FnOnce() -> bool) -> Datapath {
    asked.0.unwrap_or_else(|| match xdp {
        true if redirect() => Datapath::Redirect,
        true => Datapath::AfXdp,
        false => Datapath::AfPacket,
    })
}

/// Why a datapath is in use, and what of the traffic the host itself still sees.
///
/// `no_faster` is why it is not the one that `auto` would rather take, or why `auto` would not take it, if that is known.
pub fn explain(datapath: Datapath, asked: DatapathChoice, generic: bool, no_faster: Option<&str>) -> String {
    let why = match (datapath, asked.0) {
        (Datapath::AfXdp, Some(_)) if generic => "asked for by name, with --generic-xdp",
        (Datapath::AfXdp, None) if generic => "auto takes generic XDP, as --generic-xdp allows",
        (_, Some(_)) => "asked for by name",
        (Datapath::AfXdp, None) => "auto takes native XDP",
        (Datapath::Redirect, None) => "auto lets the kernel do it",
        (_, None) => no_faster.unwrap_or("auto takes what there is"),
    };
    let why = match (datapath, asked.0, no_faster) {
        (Datapath::AfXdp, None, Some(no_faster)) => format!("{why}, not redirect: {no_faster}"),
        (Datapath::Redirect, Some(_), Some(objection)) => format!("{why}, which auto would not: {objection}"),
        _ => why.to_owned(),
    };
    let sees = match datapath {
        Datapath::AfPacket => af_packet::HOST_SEES,
        Datapath::AfXdp => af_xdp::HOST_SEES,
        Datapath::Redirect => redirect::HOST_SEES,
    };
    format!("{why}; {sees}")
}
