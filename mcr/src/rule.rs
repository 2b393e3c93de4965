//! What an operator means by a rule: the domain types, without I/O and without a wire format.
//!
//! Endpoints are read in [`endpoint`]; what is none is answered with the endpoint that was meant.

mod endpoint;
mod meant;
#[cfg(test)]
mod tests;

use std::{
    fmt::{self, Write},
    net::Ipv4Addr,
    str::FromStr,
    sync::Arc,
};

use thiserror::Error;

/// Outputs that one rule may have.
pub const MAX_OUTPUTS: usize = 256;

/// TTL of a relayed datagram where the output says nothing.
pub const DEFAULT_TTL: u8 = 16;

/// The identity of a rule: a letter, then letters, digits, `-`, `_` and `.`, at most 63 in all.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RuleName(String);

impl RuleName {
    /// The name of a rule that was given none: stable, derived from its input.
    pub fn derived(input: &Input) -> Self {
        let mut name = format!("r-{}-{}-{}", input.group, input.port, input.interface);
        if let Some(source) = input.source {
            let _ = write!(name, "-{source}");
        }
        Self(name.chars().map(|c| if is_name_char(c) { c } else { '_' }).collect())
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

fn is_name_char(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.')
}

impl FromStr for RuleName {
    type Err = RuleError;

    fn from_str(name: &str) -> Result<Self, RuleError> {
        let valid = name.len() <= 63
            && name.starts_with(|c: char| c.is_ascii_alphabetic())
            && name.chars().all(is_name_char);
        if valid { Ok(Self(name.to_owned())) } else { Err(RuleError::Name { name: shown(name) }) }
    }
}

impl fmt::Display for RuleName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Index of a rule's counters, the same in the eBPF maps and in the workers' ledgers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RuleSlot(pub u32);

/// Index of an output's counters in the workers' ledgers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct OutputSlot(pub u32);

/// Index of a network interface, as the kernel counts them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct IfIndex(pub u32);

/// An RX queue of an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct QueueId(pub u32);

/// Name of a network interface: 1 to 15 bytes without `/`, `:`, `@`, `,` or white space.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct InterfaceName(String);

impl InterfaceName {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for InterfaceName {
    type Err = RuleError;

    fn from_str(name: &str) -> Result<Self, RuleError> {
        let valid = (1..=15).contains(&name.len())
            && name != "."
            && name != ".."
            && name.chars().all(|c| c.is_ascii_graphic() && !matches!(c, '/' | ':' | '@' | ','));
        if valid { Ok(Self(name.to_owned())) } else { Err(RuleError::Interface { name: shown(name) }) }
    }
}

impl fmt::Display for InterfaceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Where a rule's datagrams come from: (S,G) or (*,G), port and interface.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Input {
    pub group: Ipv4Addr,
    pub port: u16,
    pub interface: InterfaceName,
    /// The one source that is wanted (SSM); any source if none.
    pub source: Option<Ipv4Addr>,
}

impl fmt::Display for Input {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}@{}", self.group, self.port, self.interface)?;
        match self.source {
            Some(source) => write!(f, ",source={source}"),
            None => Ok(()),
        }
    }
}

/// Time to live of what an output sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Ttl {
    /// This one, 1 to 255.
    Fixed(u8),
    /// The one received.
    Copy,
    /// The one received less one; a datagram that arrives with 1 is dropped.
    Decrement,
}

/// DSCP of what an output sends. ECN is always cleared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dscp {
    /// This one, 0 to 63.
    Fixed(u8),
    /// The one received.
    Copy,
}

/// The source that an output's datagrams bear.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct From {
    pub address: Ipv4Addr,
    /// The daemon's source port if none.
    pub port: Option<u16>,
}

/// Where a rule's datagrams go: a group or a host, port and interface, and how.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Output {
    pub destination: Ipv4Addr,
    pub port: u16,
    pub interface: InterfaceName,
    pub ttl: Ttl,
    pub dscp: Dscp,
    /// The egress interface's primary address and the daemon's port if none.
    pub from: Option<From>,
    /// Whether runs of datagrams may leave by one `UDP_SEGMENT` send.
    pub gso: bool,
    /// Whether this host's own listeners receive them too.
    pub loop_back: bool,
}

impl Output {
    /// What makes an output the one that it is: two outputs of a rule may not share it.
    pub fn identity(&self) -> (Ipv4Addr, u16, &InterfaceName) {
        (self.destination, self.port, &self.interface)
    }
}

impl fmt::Display for Output {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}@{}", self.destination, self.port, self.interface)?;
        match self.ttl {
            Ttl::Fixed(DEFAULT_TTL) => {}
            Ttl::Fixed(ttl) => write!(f, ",ttl={ttl}")?,
            Ttl::Copy => f.write_str(",ttl=copy")?,
            Ttl::Decrement => f.write_str(",ttl=dec")?,
        }
        if let Dscp::Fixed(dscp) = self.dscp {
            write!(f, ",dscp={dscp}")?;
        }
        if let Some(From { address, port }) = self.from {
            write!(f, ",from={address}")?;
            if let Some(port) = port {
                write!(f, ":{port}")?;
            }
        }
        if !self.gso {
            f.write_str(",gso=false")?;
        }
        if self.loop_back {
            f.write_str(",loop=true")?;
        }
        Ok(())
    }
}

/// How a rule's datagrams travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Datapath {
    Redirect,
    AfXdp,
    AfPacket,
}

impl fmt::Display for Datapath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Datapath::Redirect => "redirect",
            Datapath::AfXdp => "af-xdp",
            Datapath::AfPacket => "af-packet",
        })
    }
}

/// The datapath that was asked for: one by name, or the first that serves the rule (`auto`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DatapathChoice(pub Option<Datapath>);

impl FromStr for DatapathChoice {
    type Err = RuleError;

    fn from_str(choice: &str) -> Result<Self, RuleError> {
        match choice {
            "auto" => Ok(Self(None)),
            "redirect" => Ok(Self(Some(Datapath::Redirect))),
            "af-xdp" => Ok(Self(Some(Datapath::AfXdp))),
            "af-packet" => Ok(Self(Some(Datapath::AfPacket))),
            _ => Err(RuleError::Datapath { choice: shown(choice) }),
        }
    }
}

impl fmt::Display for DatapathChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(datapath) => datapath.fmt(f),
            None => f.write_str("auto"),
        }
    }
}

/// A place in a configuration file, which is what it displays: `FILE:LINE`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Place {
    pub file: Arc<str>,
    /// From 1.
    pub line: u32,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.file, self.line)
    }
}

/// Who wrote a rule.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Origin {
    File(Place),
    Cli,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Origin::File(_) => "file",
            Origin::Cli => "cli",
        })
    }
}

/// A rule as its operator wrote it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    pub name: RuleName,
    pub input: Input,
    /// One to [`MAX_OUTPUTS`], each with an identity of its own.
    pub outputs: Vec<Output>,
    pub datapath: DatapathChoice,
    /// Other rules may feed these outputs too.
    pub merge: bool,
    /// Groups in 224.0.0.0/24 are meant.
    pub link_local: bool,
}

/// Why a name, an endpoint or a rule is none. The text is one line: what, why, what to do.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum RuleError {
    #[error(
        "'{name}' is no rule name: start with a letter, go on with letters, digits, '-', '_' or '.', at most 63"
    )]
    Name { name: String },
    #[error(
        "'{name}' is no interface name: 1 to 15 printable characters without '/', ':', '@' or ','; see `ip -br link`"
    )]
    Interface { name: String },
    #[error("'{choice}' is no datapath: use auto, redirect, af-xdp or af-packet")]
    Datapath { choice: String },
    #[error("'{text}' is no endpoint: {why}; write {expected}")]
    Endpoint { text: String, why: String, expected: String },
    #[error("'{text}': IPv6 is not built yet; use an IPv4 address")]
    Ipv6 { text: String },
}

/// Text as a message of one line shows it: control characters escaped, not longer than a line bears.
fn shown(text: &str) -> String {
    const LONGEST: usize = 120;
    let mut line = String::new();
    for (index, c) in text.chars().enumerate() {
        if index == LONGEST {
            line.push_str("...");
            break;
        }
        if c.is_control() || matches!(c, '\u{2028}' | '\u{2029}') {
            line.extend(c.escape_default());
        } else {
            line.push(c);
        }
    }
    line
}
