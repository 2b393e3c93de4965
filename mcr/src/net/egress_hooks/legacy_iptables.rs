//! The rules of iptables as it was before nftables, by socket options.
//!
//! Only tables that are there are asked: to ask for another makes it. Their names are for root to open, and are held
//! open for whom root becomes. Where an ordinary user runs mcr and the kernel has these tables, what they hold is
//! not known.

use std::{
    fs::{self, File},
    io::{self, Read, Seek},
};

use socket2::{Domain, Socket, Type};

use crate::sys::{netlink::bytes, socket_option};

// linux/netfilter_ipv4/ip_tables.h.
const NAMES: &str = "/proc/thread-self/net/ip_tables_names";
const GET_INFO: i32 = 64;
const GET_ENTRIES: i32 = 65;
const NAME: usize = 32;
/// `ipt_getinfo`: the name, hooks, where the entries of each begin and its policy is, number and size of all.
const INFO: usize = 84;
const BEGINNINGS: usize = 36;
const POLICIES: usize = 56;
const SIZE: usize = 80;
/// `ipt_get_entries` before the entries.
const ENTRIES: usize = 40;
/// From an entry to the verdict of its standard target: `ipt_entry` and `xt_entry_target`.
const VERDICT: usize = 112 + 32;
const ACCEPT: i32 = -2;
const CHAINS: [(usize, &str); 2] = [(3, "OUTPUT"), (4, "POSTROUTING")];

/// The names of the tables, if they were there to be opened.
#[derive(Debug)]
pub(super) struct Tables(Option<File>);

impl Tables {
    pub(super) fn open() -> Self {
        Self(File::open(NAMES).ok())
    }

    /// Why what is sent must not pass them by: a rule in `OUTPUT` or `POSTROUTING` of a table, or a policy other than to
    /// accept.
    pub(super) fn rules(&self) -> io::Result<Option<String>> {
        for table in self.names()?.lines() {
            match of_table(table) {
                // Gone meanwhile.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Ok(None) => {}
                answer => return answer,
            }
        }
        Ok(None)
    }

    fn names(&self) -> io::Result<String> {
        let mut names = String::new();
        if let Some(mut file) = self.0.as_ref()
            && file.rewind().and_then(|()| file.read_to_string(&mut names)).is_ok()
        {
            return Ok(names);
        }
        // Come or gone with a module since.
        fs::read_to_string(NAMES).or_else(|error| match error.kind() {
            io::ErrorKind::NotFound => Ok(String::new()),
            io::ErrorKind::PermissionDenied => Err(io::Error::other(format!("only root may open {NAMES}"))),
            _ => Err(error),
        })
    }
}

fn of_table(table: &str) -> io::Result<Option<String>> {
    let malformed = || io::Error::other(format!("the kernel's answer about the table {table} is none"));
    let socket = Socket::new(Domain::IPV4, Type::DGRAM, None)?;
    let mut info = [0; INFO];
    let name = table.as_bytes();
    info.get_mut(..name.len()).filter(|_| name.len() < NAME).ok_or_else(malformed)?.copy_from_slice(name);
    socket_option::ask(&socket, libc::IPPROTO_IP, GET_INFO, &mut info)?;
    let word = |at| bytes(&info, at).map_or(0, u32::from_ne_bytes);
    let mut entries = vec![0; ENTRIES + word(SIZE) as usize];
    entries[..NAME].copy_from_slice(&info[..NAME]);
    entries[NAME..NAME + 4].copy_from_slice(&word(SIZE).to_ne_bytes());
    socket_option::ask(&socket, libc::IPPROTO_IP, GET_ENTRIES, &mut entries)?;
    for (hook, chain) in CHAINS.into_iter().filter(|(hook, _)| word(NAME) & 1 << hook != 0) {
        let policy = word(POLICIES + 4 * hook);
        if word(BEGINNINGS + 4 * hook) != policy {
            return Ok(Some(format!("iptables (legacy) has rules in {chain} of its table {table}")));
        }
        let verdict = bytes(&entries, ENTRIES + policy as usize + VERDICT).map(i32::from_ne_bytes);
        if verdict.ok_or_else(malformed)? != ACCEPT {
            return Ok(Some(format!("iptables (legacy) drops by policy in {chain} of its table {table}")));
        }
    }
    Ok(None)
}
