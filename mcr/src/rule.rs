//! What an operator means by a rule: the domain types, without I/O and without a wire format.

use std::{
    fmt::{self, Write},
    net::{IpAddr, Ipv4Addr},
    str::FromStr,
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
        if valid { Ok(Self(name.to_owned())) } else { Err(RuleError::Name { name: name.to_owned() }) }
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
        if valid { Ok(Self(name.to_owned())) } else { Err(RuleError::Interface { name: name.to_owned() }) }
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
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
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
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct DatapathChoice(pub Option<Datapath>);

impl FromStr for DatapathChoice {
    type Err = RuleError;

    fn from_str(choice: &str) -> Result<Self, RuleError> {
        match choice {
            "auto" => Ok(Self(None)),
            "redirect" => Ok(Self(Some(Datapath::Redirect))),
            "af-xdp" => Ok(Self(Some(Datapath::AfXdp))),
            "af-packet" => Ok(Self(Some(Datapath::AfPacket))),
            _ => Err(RuleError::Datapath { choice: choice.to_owned() }),
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

/// Who wrote a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Origin {
    File,
    Cli,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Origin::File => "file",
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
    #[error("'{text}': IPv6 is not built yet; use an IPv4 group")]
    Ipv6 { text: String },
}

/// What an endpoint looks like, for messages.
const INPUT_FORM: &str = "GROUP:PORT@INTERFACE[,source=ADDRESS], like 239.1.1.1:5000@eth0";
const OUTPUT_FORM: &str = "GROUP-OR-HOST:PORT@INTERFACE[,ttl=N|copy|dec][,dscp=N|copy][,from=ADDRESS[:PORT]], like 239.2.2.2:6000@eth1";

fn malformed(text: &str, why: impl Into<String>, expected: impl Into<String>) -> RuleError {
    RuleError::Endpoint { text: text.to_owned(), why: why.into(), expected: expected.into() }
}

/// The part of an endpoint that inputs and outputs share.
struct Place<'a> {
    address: Ipv4Addr,
    port: u16,
    interface: InterfaceName,
    options: Vec<(&'a str, &'a str)>,
}

impl<'a> Place<'a> {
    fn parse(text: &'a str, form: &str) -> Result<Self, RuleError> {
        if let Some(meant) = lookalike(text) {
            return Err(meant);
        }
        let (place, options) = text.split_once(',').map_or((text, None), |(place, rest)| (place, Some(rest)));
        let Some((address_port, interface)) = place.split_once('@') else {
            return Err(malformed(
                text,
                "it names no interface",
                format!("{place}@INTERFACE, the interface as in `ip -br link`"),
            ));
        };
        let (address, port) = split_port(text, address_port, interface, form)?;
        let interface = interface.parse()?;
        let port = parse_port(text, port, form)?;
        let address = match address.parse::<IpAddr>() {
            Ok(IpAddr::V4(address)) => address,
            Ok(IpAddr::V6(_)) => return Err(RuleError::Ipv6 { text: text.to_owned() }),
            Err(_) => return Err(malformed(text, format!("'{address}' is no IP address"), form)),
        };
        let options = options
            .into_iter()
            .flat_map(|options| options.split(','))
            .map(|option| {
                option
                    .split_once('=')
                    .ok_or_else(|| malformed(text, format!("the option '{option}' has no value"), form))
            })
            .collect::<Result<Vec<_>, _>>()?;
        for (i, (key, _)) in options.iter().enumerate() {
            if options[..i].iter().any(|(earlier, _)| earlier == key) {
                return Err(malformed(text, format!("the option '{key}' stands twice"), form));
            }
        }
        Ok(Self { address, port, interface, options })
    }
}

/// Splits `ADDRESS:PORT` or `[ADDRESS]:PORT`.
fn split_port<'a>(
    text: &str,
    address_port: &'a str,
    interface: &str,
    form: &str,
) -> Result<(&'a str, &'a str), RuleError> {
    let no_port = |address: &str| malformed(text, "it names no port", format!("{address}:PORT@{interface}"));
    if let Some(rest) = address_port.strip_prefix('[') {
        let Some((address, port)) = rest.split_once(']') else {
            return Err(malformed(text, "the bracket is not closed", form));
        };
        return port
            .strip_prefix(':')
            .map(|port| (address, port))
            .ok_or_else(|| no_port(&format!("[{address}]")));
    }
    if address_port.parse::<std::net::Ipv6Addr>().is_ok() {
        return Err(malformed(
            text,
            "an IPv6 address stands in brackets",
            format!("[{address_port}]:PORT@{interface}"),
        ));
    }
    match address_port.rsplit_once(':') {
        Some((address, port)) if !port.is_empty() => Ok((address, port)),
        _ => Err(no_port(address_port.trim_end_matches(':'))),
    }
}

fn parse_port(text: &str, port: &str, form: &str) -> Result<u16, RuleError> {
    match port.parse::<u16>() {
        Ok(0) => Err(malformed(text, "port 0 cannot be received or sent to", "a port from 1 to 65535")),
        Ok(port) => Ok(port),
        Err(_) => Err(malformed(text, format!("'{port}' is no port (1 to 65535)"), form)),
    }
}

/// Recognises what people type out of habit, and answers with the endpoint that they meant.
fn lookalike(text: &str) -> Option<RuleError> {
    if text.is_empty() {
        return Some(malformed(text, "it is empty", INPUT_FORM));
    }
    if text.chars().any(char::is_whitespace) {
        return Some(malformed(text, "it contains white space", text.split_whitespace().collect::<String>()));
    }
    if let Some((scheme, rest)) = text.split_once("://") {
        let rest = rest.trim_start_matches('@').trim_end_matches('/');
        let rest = rest.split('?').next().unwrap_or(rest);
        let meant = if rest.contains('@') { rest.to_owned() } else { format!("{rest}@INTERFACE") };
        return Some(malformed(text, format!("it is a URL ({scheme})"), meant));
    }
    if let Some(rest) = text.strip_prefix('@') {
        let meant = if rest.contains('@') { rest.to_owned() } else { format!("{rest}@INTERFACE") };
        return Some(malformed(text, "it starts with '@'", meant));
    }
    let (place, options) = text.split_once(',').map_or((text, ""), |(place, rest)| (place, rest));
    let mut parts = place.splitn(3, '@');
    if let (Some(address), Some(interface), Some(peer)) = (parts.next(), parts.next(), parts.next()) {
        let comma = if options.is_empty() { "" } else { "," };
        return Some(malformed(
            text,
            format!("'{interface}@{peer}' is how `ip link` shows {interface} and its peer"),
            format!("{address}@{interface}{comma}{options}"),
        ));
    }
    // eth0:239.1.1.1:5000 and the like: interface first.
    let (first, rest) = place.split_once([':', '/'])?;
    let named_first =
        first.starts_with(|c: char| c.is_ascii_alphabetic()) && first.parse::<std::net::Ipv6Addr>().is_err();
    let address_next = rest.rsplit_once(':').is_some_and(|(address, _)| address.parse::<Ipv4Addr>().is_ok());
    (named_first && address_next && !place.contains('@'))
        .then(|| malformed(text, "the interface comes last, after '@'", format!("{rest}@{first}")))
}

impl FromStr for Input {
    type Err = RuleError;

    fn from_str(text: &str) -> Result<Self, RuleError> {
        let place = Place::parse(text, INPUT_FORM)?;
        if !place.address.is_multicast() {
            return Err(malformed(
                text,
                format!("{} is no multicast group (224.0.0.0 to 239.255.255.255)", place.address),
                INPUT_FORM,
            ));
        }
        let mut source = None;
        for (key, value) in place.options {
            match key {
                "source" => source = Some(parse_unicast(text, "source", value)?),
                "ttl" | "dscp" | "from" | "gso" | "loop" => {
                    return Err(malformed(
                        text,
                        format!("the option '{key}' belongs to an output"),
                        INPUT_FORM,
                    ));
                }
                _ => return Err(malformed(text, format!("there is no option '{key}'"), INPUT_FORM)),
            }
        }
        Ok(Self { group: place.address, port: place.port, interface: place.interface, source })
    }
}

impl FromStr for Output {
    type Err = RuleError;

    fn from_str(text: &str) -> Result<Self, RuleError> {
        let place = Place::parse(text, OUTPUT_FORM)?;
        if place.address.is_unspecified() || place.address.is_broadcast() {
            return Err(malformed(
                text,
                format!("{} is neither a group nor a host", place.address),
                OUTPUT_FORM,
            ));
        }
        let mut output = Self {
            destination: place.address,
            port: place.port,
            interface: place.interface,
            ttl: Ttl::Fixed(DEFAULT_TTL),
            dscp: Dscp::Copy,
            from: None,
            gso: true,
            loop_back: false,
        };
        for (key, value) in place.options {
            match key {
                "ttl" => output.ttl = parse_ttl(text, value)?,
                "dscp" => output.dscp = parse_dscp(text, value)?,
                "from" => output.from = Some(parse_from(text, value)?),
                "gso" => output.gso = parse_bool(text, key, value)?,
                "loop" => output.loop_back = parse_bool(text, key, value)?,
                "source" => {
                    return Err(malformed(
                        text,
                        "the option 'source' belongs to an input; an output's is 'from'",
                        OUTPUT_FORM,
                    ));
                }
                _ => return Err(malformed(text, format!("there is no option '{key}'"), OUTPUT_FORM)),
            }
        }
        Ok(output)
    }
}

fn parse_ttl(text: &str, value: &str) -> Result<Ttl, RuleError> {
    match value {
        "copy" => Ok(Ttl::Copy),
        "dec" => Ok(Ttl::Decrement),
        _ => match value.parse::<u8>() {
            Ok(ttl @ 1..) => Ok(Ttl::Fixed(ttl)),
            _ => {
                Err(malformed(text, format!("'{value}' is no TTL"), "ttl=1 to ttl=255, ttl=copy or ttl=dec"))
            }
        },
    }
}

fn parse_dscp(text: &str, value: &str) -> Result<Dscp, RuleError> {
    match value {
        "copy" => Ok(Dscp::Copy),
        _ => match value.parse::<u8>() {
            Ok(dscp @ 0..=63) => Ok(Dscp::Fixed(dscp)),
            _ => Err(malformed(text, format!("'{value}' is no DSCP"), "dscp=0 to dscp=63, or dscp=copy")),
        },
    }
}

fn parse_from(text: &str, value: &str) -> Result<From, RuleError> {
    let (address, port) = match value.split_once(':') {
        Some((address, port)) => (address, Some(parse_port(text, port, "from=ADDRESS[:PORT]")?)),
        None => (value, None),
    };
    Ok(From { address: parse_unicast(text, "from", address)?, port })
}

fn parse_unicast(text: &str, option: &str, value: &str) -> Result<Ipv4Addr, RuleError> {
    match value.parse::<IpAddr>() {
        Ok(IpAddr::V4(address))
            if !address.is_multicast() && !address.is_unspecified() && !address.is_broadcast() =>
        {
            Ok(address)
        }
        Ok(IpAddr::V6(_)) => Err(RuleError::Ipv6 { text: text.to_owned() }),
        _ => Err(malformed(
            text,
            format!("'{value}' is no host address"),
            format!("{option}=ADDRESS, like {option}=192.0.2.7"),
        )),
    }
}

fn parse_bool(text: &str, key: &str, value: &str) -> Result<bool, RuleError> {
    value.parse().map_err(|_| {
        malformed(text, format!("'{value}' is neither true nor false"), format!("{key}=true or {key}=false"))
    })
}
