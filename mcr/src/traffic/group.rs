//! The address of stream i: that of the endpoint plus i, the port the same.

use std::net::Ipv4Addr;

/// Most streams that one generator or receiver serves.
pub const MAX_STREAMS: u32 = 4_096;

/// The addresses of `streams` streams from `first` on; `None` if they leave what `first` is, a group or a host.
pub fn addresses(first: Ipv4Addr, streams: u32) -> Option<Vec<Ipv4Addr>> {
    (0..streams)
        .map(|i| first.to_bits().checked_add(i).map(Ipv4Addr::from_bits))
        .map(|address| address.filter(|a| a.is_multicast() == first.is_multicast() && !a.is_broadcast()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_addresses_up() {
        let check = |first: &str, streams, last: Option<&str>| {
            let addresses = addresses(first.parse().expect("an address"), streams);
            let found = addresses.as_ref().map(|a| (a.len(), a[a.len() - 1].to_string()));
            assert_eq!(found, last.map(|last| (streams as usize, last.to_owned())), "{first} and {streams}");
        };
        check("239.1.1.1", 1, Some("239.1.1.1"));
        check("239.1.1.250", 50, Some("239.1.2.43"));
        check("239.255.255.254", 2, Some("239.255.255.255"));
        check("239.255.255.254", 3, None);
        check("10.0.0.5", 3, Some("10.0.0.7"));
        check("223.255.255.255", 2, None);
        check("255.255.255.254", 2, None);
    }
}
