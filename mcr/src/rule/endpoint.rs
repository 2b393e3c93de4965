//! Endpoints as people write them: `ADDRESS:PORT@INTERFACE`, with options after commas.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    str::FromStr,
};

use super::{DEFAULT_TTL, Dscp, From, Input, InterfaceName, Output, RuleError, Ttl, meant::meant, shown};

/// What an endpoint looks like, for messages.
const INPUT_FORM: &str = "GROUP:PORT@INTERFACE[,source=ADDRESS], like 239.1.1.1:5000@eth0";
const OUTPUT_FORM: &str = "GROUP-OR-HOST:PORT@INTERFACE[,ttl=N|copy|dec][,dscp=N|copy][,from=ADDRESS[:PORT]]\
     [,gso=false][,loop=true], like 239.2.2.2:6000@eth1";

fn malformed(text: &str, why: impl Into<String>, expected: impl Into<String>) -> RuleError {
    RuleError::Endpoint { text: shown(text), why: why.into(), expected: expected.into() }
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
        let misshapen = |why: String| malformed(text, why, meant(text).unwrap_or_else(|| form.to_owned()));
        if let Some(why) = misread(text) {
            return Err(misshapen(why));
        }
        let (place, options) = text.split_once(',').map_or((text, None), |(place, rest)| (place, Some(rest)));
        let (address_port, interface) = match place.split_once('@') {
            Some((address_port, interface)) if !interface.is_empty() => (address_port, interface),
            _ => return Err(no_interface(text, place.trim_end_matches('@'), form)),
        };
        let (address, port) = split_port(text, address_port, interface, form)?;
        let interface = interface.parse()?;
        let address = match address.parse::<IpAddr>() {
            Ok(IpAddr::V4(address)) => address,
            Ok(IpAddr::V6(_)) => return Err(RuleError::Ipv6 { text: shown(text) }),
            Err(_) => return Err(misshapen(format!("'{}' is no IP address", shown(address)))),
        };
        let port = parse_port(text, port, form)?;
        Ok(Self { address, port, interface, options: parse_options(text, options, form)? })
    }
}

/// Why `text` is another notation than ours, or a slip of the hand.
fn misread(text: &str) -> Option<String> {
    if text.is_empty() {
        return Some("it is empty".to_owned());
    }
    if text.contains(|c: char| c.is_whitespace() || c.is_control()) {
        return Some("it contains white space".to_owned());
    }
    if let Some((scheme, _)) = text.split_once("://") {
        return Some(format!("it is a URL ({})", shown(scheme)));
    }
    if text.starts_with('@') {
        return Some("it starts with '@'".to_owned());
    }
    let place = text.split(',').next().unwrap_or(text);
    match place.split('@').collect::<Vec<_>>()[..] {
        [first, ref rest @ ..] if !rest.is_empty() && is_source(first) && meant(place).is_some() => {
            Some("the source is an option, after a comma".to_owned())
        }
        [_, interface, peer] if !interface.is_empty() && !peer.is_empty() => {
            let (interface, peer) = (shown(interface), shown(peer));
            Some(format!("'{interface}@{peer}' is how `ip link` shows {interface} and its peer"))
        }
        [_, _, _, ..] => Some("it has more than one '@'".to_owned()),
        _ => None,
    }
}

/// Whether this is an address that stands where VLC and others have the source of (S,G).
fn is_source(text: &str) -> bool {
    text.parse::<Ipv4Addr>().is_ok_and(|address| !address.is_multicast())
}

/// An endpoint that says where, but not by which interface.
fn no_interface(text: &str, place: &str, form: &str) -> RuleError {
    let meant = if place.starts_with('[') && place.contains("]:") {
        Some(format!("{}@INTERFACE", shown(place)))
    } else {
        meant(text)
    };
    let why = match &meant {
        Some(meant) if meant.contains(":PORT@INTERFACE") => "it names neither port nor interface",
        Some(meant) if !meant.contains("@INTERFACE") => "the interface comes last, after '@'",
        _ => "it names no interface",
    };
    malformed(text, why, meant.unwrap_or_else(|| form.to_owned()))
}

/// Splits `ADDRESS:PORT` or `[ADDRESS]:PORT`.
fn split_port<'a>(
    text: &str,
    address_port: &'a str,
    interface: &str,
    form: &str,
) -> Result<(&'a str, &'a str), RuleError> {
    let bracketed = |address: &str| format!("[{address}]:PORT@{}", shown(interface));
    if let Some(rest) = address_port.strip_prefix('[') {
        let Some((address, port)) = rest.split_once(']') else {
            return Err(malformed(text, "the bracket is not closed", form));
        };
        return match port.strip_prefix(':') {
            Some(port) if !port.is_empty() => Ok((address, port)),
            _ => Err(malformed(text, "it names no port", bracketed(&shown(address)))),
        };
    }
    if let Ok(address) = address_port.parse::<Ipv6Addr>() {
        let why = "an IPv6 address stands in brackets, with the port behind";
        return Err(malformed(text, why, bracketed(&address.to_string())));
    }
    match address_port.rsplit_once(':') {
        Some((address, port)) if !port.is_empty() => Ok((address, port)),
        _ => Err(malformed(text, "it names no port", meant(text).unwrap_or_else(|| form.to_owned()))),
    }
}

fn parse_options<'a>(
    text: &str,
    options: Option<&'a str>,
    form: &str,
) -> Result<Vec<(&'a str, &'a str)>, RuleError> {
    let mut pairs: Vec<(&str, &str)> = Vec::new();
    for option in options.into_iter().flat_map(|options| options.split(',')) {
        let why = match option.split_once('=') {
            Some((key, _)) if pairs.iter().any(|&(earlier, _)| earlier == key) => {
                format!("the option '{}' stands twice", shown(key))
            }
            Some((key, value)) if !key.is_empty() && !value.is_empty() => {
                pairs.push((key, value));
                continue;
            }
            _ if option.is_empty() => "there is no option after a comma".to_owned(),
            _ => format!("the option '{}' has no value", shown(option.trim_end_matches('='))),
        };
        return Err(malformed(text, why, form));
    }
    Ok(pairs)
}

/// A number in digits only: no sign, no blank.
fn parse_number<T: FromStr>(digits: &str) -> Option<T> {
    digits.bytes().all(|byte| byte.is_ascii_digit()).then(|| digits.parse().ok()).flatten()
}

fn parse_port(text: &str, port: &str, form: &str) -> Result<u16, RuleError> {
    match parse_number(port) {
        Some(0) => Err(malformed(text, "port 0 cannot be received or sent to", "a port from 1 to 65535")),
        Some(port) => Ok(port),
        None => Err(malformed(text, format!("'{}' is no port (1 to 65535)", shown(port)), form)),
    }
}

impl FromStr for Input {
    type Err = RuleError;

    fn from_str(text: &str) -> Result<Self, RuleError> {
        let place = Place::parse(text, INPUT_FORM)?;
        if !place.address.is_multicast() {
            let why = format!("{} is no multicast group (224.0.0.0 to 239.255.255.255)", place.address);
            return Err(malformed(text, why, INPUT_FORM));
        }
        let mut source = None;
        for (key, value) in place.options {
            let why = match key {
                "source" => {
                    source = Some(parse_unicast(text, "source", value)?);
                    continue;
                }
                "ttl" | "dscp" | "from" | "gso" | "loop" => {
                    format!("the option '{key}' belongs to an output")
                }
                _ => format!("there is no option '{}'", shown(key)),
            };
            return Err(malformed(text, why, INPUT_FORM));
        }
        Ok(Self { group: place.address, port: place.port, interface: place.interface, source })
    }
}

impl FromStr for Output {
    type Err = RuleError;

    fn from_str(text: &str) -> Result<Self, RuleError> {
        let place = Place::parse(text, OUTPUT_FORM)?;
        if place.address.is_unspecified() || place.address.is_broadcast() {
            let why = format!("{} is neither a group nor a host", place.address);
            return Err(malformed(text, why, OUTPUT_FORM));
        }
        if place.address.is_loopback() && place.interface.as_str() != "lo" {
            let why = format!("{} is this host itself, reached by lo alone", place.address);
            return Err(malformed(text, why, OUTPUT_FORM));
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
            output.set(text, key, value)?;
        }
        Ok(output)
    }
}

impl Output {
    fn set(&mut self, text: &str, key: &str, value: &str) -> Result<(), RuleError> {
        match key {
            "ttl" => self.ttl = parse_ttl(text, value)?,
            "dscp" => self.dscp = parse_dscp(text, value)?,
            "from" => self.from = Some(parse_from(text, value)?),
            "gso" => self.gso = parse_bool(text, key, value)?,
            "loop" => self.loop_back = parse_bool(text, key, value)?,
            "source" => {
                let why = "the option 'source' belongs to an input, an output has 'from'";
                return Err(malformed(text, why, OUTPUT_FORM));
            }
            _ => return Err(malformed(text, format!("there is no option '{}'", shown(key)), OUTPUT_FORM)),
        }
        Ok(())
    }
}

fn parse_ttl(text: &str, value: &str) -> Result<Ttl, RuleError> {
    match (value, parse_number(value)) {
        ("copy", _) => Ok(Ttl::Copy),
        ("dec", _) => Ok(Ttl::Decrement),
        (_, Some(ttl @ 1..)) => Ok(Ttl::Fixed(ttl)),
        _ => {
            let why = format!("'{}' is no TTL", shown(value));
            Err(malformed(text, why, "ttl=1 to ttl=255, ttl=copy or ttl=dec"))
        }
    }
}

fn parse_dscp(text: &str, value: &str) -> Result<Dscp, RuleError> {
    match (value, parse_number(value)) {
        ("copy", _) => Ok(Dscp::Copy),
        (_, Some(dscp @ 0..=63)) => Ok(Dscp::Fixed(dscp)),
        _ => {
            let why = format!("'{}' is no DSCP", shown(value));
            Err(malformed(text, why, "dscp=0 to dscp=63, or dscp=copy"))
        }
    }
}

fn parse_from(text: &str, value: &str) -> Result<From, RuleError> {
    if value.parse::<Ipv6Addr>().is_ok() || value.starts_with('[') {
        return Err(RuleError::Ipv6 { text: shown(text) });
    }
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
        Ok(IpAddr::V6(_)) => Err(RuleError::Ipv6 { text: shown(text) }),
        _ => Err(malformed(
            text,
            format!("'{}' is no host address", shown(value)),
            format!("{option}=ADDRESS, like {option}=192.0.2.7"),
        )),
    }
}

fn parse_bool(text: &str, key: &str, value: &str) -> Result<bool, RuleError> {
    value.parse().map_err(|_| {
        let why = format!("'{}' is neither true nor false", shown(value));
        malformed(text, why, format!("{key}=true or {key}=false"))
    })
}
