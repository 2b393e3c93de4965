//! The base chains of nftables that datagrams pass on their way out.
//!
//! A chain counts if it has a rule, whatever the rule does, or drops by policy; one that is empty and accepts filters
//! nothing. Only `ip`, `inet` and `netdev` matter to what is relayed. A chain of a dormant table counts too.

use std::{fmt, io};

use crate::{
    rule::InterfaceName,
    sys::netlink::{attribute, attributes, bytes, dump, text},
};

// linux/netfilter/nf_tables.h, linux/netfilter.h.
const GET_CHAIN: u16 = 10 << 8 | 4;
const CHAIN_TABLE: u16 = 1;
const CHAIN_NAME: u16 = 3;
const CHAIN_HOOK: u16 = 4;
const CHAIN_POLICY: u16 = 5;
const CHAIN_USE: u16 = 6;
const HOOK_NUMBER: u16 = 1;
const HOOK_DEVICE: u16 = 3;
const HOOK_DEVICES: u16 = 4;
const DEVICE_PREFIX: u16 = 2;
const NF_ACCEPT: u32 = 1;
const INET: u8 = 1;
const IPV4: u8 = 2;
const NETDEV: u8 = 5;
const NETDEV_EGRESS: u32 = 1;
const LOCAL_OUT: u32 = 3;
const POST_ROUTING: u32 = 4;

/// A base chain that does something to what is sent.
pub(super) struct Chain {
    table: String,
    name: String,
    hook: &'static str,
    /// It has a rule, and not just a policy.
    has_rules: bool,
    /// Of the family `netdev`: its devices, and whether each is but the beginning of names.
    pub(super) devices: Option<Vec<(String, bool)>>,
}

impl Chain {
    /// As `nft` takes it: family, table and name.
    pub(super) fn path(&self) -> String {
        format!("{} {}", self.table, self.name)
    }

    pub(super) fn is_of(&self, interface: &InterfaceName) -> bool {
        let interface = interface.as_str();
        self.devices
            .iter()
            .flatten()
            .any(|(device, prefix)| if *prefix { interface.starts_with(device) } else { interface == device })
    }
}

impl fmt::Display for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let does = if self.has_rules { "has rules" } else { "drops by policy" };
        let Self { table, name, hook, .. } = self;
        write!(f, "nftables {does} in its {hook} chain '{name}' (table {table})")
    }
}

/// The chains that count, by one dump. None if the kernel has no nftables.
pub(super) fn chains() -> io::Result<Vec<Chain>> {
    // `nfgenmsg`: every family.
    let answer = dump(libc::NETLINK_NETFILTER, GET_CHAIN, &[0; 4], usize::MAX, read_chain);
    answer.or_else(|error| if is_absent(&error) { Ok(Vec::new()) } else { Err(error) })
}

/// The kernel has no such protocol, or no nftables behind it.
pub(super) fn is_absent(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EPROTONOSUPPORT | libc::EINVAL | libc::EOPNOTSUPP))
}

fn read_chain(message: &[u8]) -> Option<Chain> {
    let chain = message.get(4..)?;
    let number = |value: &[u8]| bytes(value, 0).map(u32::from_be_bytes);
    let hooked = attribute(chain, CHAIN_HOOK);
    let (family, hook) = match (message[0], number(attribute(hooked, HOOK_NUMBER))?) {
        (INET, LOCAL_OUT) => ("inet", "output"),
        (INET, POST_ROUTING) => ("inet", "postrouting"),
        (IPV4, LOCAL_OUT) => ("ip", "output"),
        (IPV4, POST_ROUTING) => ("ip", "postrouting"),
        (NETDEV, NETDEV_EGRESS) => ("netdev", "egress"),
        _ => return None,
    };
    // Nothing jumps to a base chain: what uses it are its rules.
    let has_rules = number(attribute(chain, CHAIN_USE)) != Some(0);
    let accepts = number(attribute(chain, CHAIN_POLICY)).is_none_or(|policy| policy == NF_ACCEPT);
    (has_rules || !accepts).then(|| Chain {
        table: format!("{family} {}", text(attribute(chain, CHAIN_TABLE))),
        name: text(attribute(chain, CHAIN_NAME)),
        hook,
        has_rules,
        devices: (family == "netdev").then(|| {
            let one = attributes(hooked).filter(|(kind, _)| *kind == HOOK_DEVICE);
            let several = attributes(attribute(hooked, HOOK_DEVICES));
            let several = several.map(|(kind, name)| (text(name), kind == DEVICE_PREFIX));
            one.map(|(_, name)| (text(name), false)).chain(several).collect()
        }),
    })
}
