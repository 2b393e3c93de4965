//! What people type out of habit, read as the endpoint that they meant.

use std::net::Ipv4Addr;

use super::InterfaceName;

/// The parts of an endpoint, in whatever order and with whatever between them.
#[derive(Default)]
struct Parts<'a> {
    address: Option<Ipv4Addr>,
    /// The unicast one of two addresses.
    source: Option<Ipv4Addr>,
    port: Option<&'a str>,
    interface: Option<&'a str>,
}

/// The endpoint that `text` comes near to, with `PORT` and `INTERFACE` for what it does not say; none if
/// that cannot be told.
pub fn meant(text: &str) -> Option<String> {
    let text = text.split_once("://").map_or(text, |(_, rest)| rest);
    let (place, options) = text.split_once(',').unwrap_or((text, ""));
    let place = place.split('?').next().unwrap_or(place);
    let mut parts = Parts::default();
    for part in place.split(|c: char| c.is_whitespace() || matches!(c, ':' | '@' | '%' | '/' | ';')) {
        if !part.is_empty() {
            parts.take(part)?;
        }
    }
    let mut endpoint = format!(
        "{}:{}@{}",
        parts.address?,
        parts.port.unwrap_or("PORT"),
        parts.interface.unwrap_or("INTERFACE")
    );
    let source = parts.source.map(|source| format!("source={source}"));
    let options = options.split(',').map(|option| option.split_whitespace().collect::<String>());
    for option in source.into_iter().chain(options.filter(|option| option.contains('='))) {
        if option.contains(char::is_control) {
            return None;
        }
        endpoint.push(',');
        endpoint.push_str(&option);
    }
    Some(endpoint)
}

impl<'a> Parts<'a> {
    fn take(&mut self, part: &'a str) -> Option<()> {
        if let Ok(address) = part.parse::<Ipv4Addr>() {
            return self.take_address(address);
        }
        if part.bytes().all(|byte| byte.is_ascii_digit()) {
            let fits = self.port.is_none() && part.parse::<u16>().is_ok_and(|port| port > 0);
            return fits.then(|| self.port = Some(part));
        }
        part.parse::<InterfaceName>().ok()?;
        if !part.starts_with(|c: char| c.is_ascii_alphabetic()) {
            return None;
        }
        // Of `eth0@if12` and `eth0.5@eth0`, which is how `ip link` writes them, the first is the name.
        self.interface.get_or_insert(part);
        Some(())
    }

    fn take_address(&mut self, address: Ipv4Addr) -> Option<()> {
        match (self.address, self.source) {
            (None, None) => self.address = Some(address),
            (Some(source), None) if address.is_multicast() && !source.is_multicast() => {
                (self.address, self.source) = (Some(address), Some(source));
            }
            (Some(group), None) if group.is_multicast() && !address.is_multicast() => {
                self.source = Some(address);
            }
            _ => return None,
        }
        Some(())
    }
}
