//! Chooses the datapath of a rule, and says why. Pure.

use thiserror::Error;

use crate::rule::{Datapath, DatapathChoice};

pub mod af_xdp;

/// A datapath with the reasons that `rule show` gives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    pub datapath: Datapath,
    pub why: String,
}

/// A datapath that was asked for by name and is none of this version's.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("the datapath {datapath} is not built yet: use af-xdp or auto")]
pub struct NotBuilt {
    pub datapath: Datapath,
}

/// The datapath for what was asked for; a datapath asked for by name is taken or refused, never replaced.
pub fn choose(asked: DatapathChoice) -> Result<Decision, NotBuilt> {
    match asked.0 {
        None => Ok(Decision {
            datapath: Datapath::AfXdp,
            why: format!("auto takes native XDP; {}", af_xdp::HOST_SEES),
        }),
        Some(Datapath::AfXdp) => Ok(Decision {
            datapath: Datapath::AfXdp,
            why: format!("asked for by name; {}", af_xdp::HOST_SEES),
        }),
        Some(datapath) => Err(NotBuilt { datapath }),
    }
}
