//! What the host has put in the way of the datagrams that leave it: firewall rules, filters, programs and shaping, all of
//! which a frame that the kernel redirects would pass by.
//!
//! Everything is looked at in the network namespace of the caller. What cannot be asked about counts as a hook, with the
//! error in its reason: nobody's rules are passed by for a question that was refused. What a kernel does not have is
//! none.

use std::{collections::BTreeMap, future, io, io::Read};

use socket2::Socket;
use tokio::io::unix::AsyncFd;

use crate::{
    rule::{IfIndex, InterfaceName},
    sys::{bpf_query, netdev, netlink},
};

mod cgroup;
mod legacy_iptables;
mod nftables;
mod tc;
mod xfrm;

const RTNLGRP_TC: u32 = 4;
const NFNLGRP_NFTABLES: u32 = 7;

/// Reads egress hooks, and hears of changes of those that netlink speaks of: nftables (and so `iptables-nft`), qdiscs and
/// tc filters; and of interfaces that take redirected frames, or no longer. Of tcx programs, cgroup programs, IPsec and legacy iptables nothing is heard: they are to be read from time
/// to time.
#[derive(Debug)]
pub struct EgressHooks {
    notices: Vec<AsyncFd<Socket>>,
    legacy: legacy_iptables::Tables,
}

impl EgressHooks {
    /// Must be called within the runtime, in the network namespace that is meant; by root where it becomes another user,
    /// who may not open what is opened here.
    pub fn open() -> io::Result<Self> {
        let mut notices = vec![netlink::listen(libc::NETLINK_ROUTE, RTNLGRP_TC)?];
        match netlink::listen(libc::NETLINK_NETFILTER, NFNLGRP_NFTABLES) {
            Ok(socket) => notices.push(socket),
            Err(error) if nftables::is_absent(&error) => {}
            Err(error) => return Err(error),
        }
        notices.extend(netdev::listen()?);
        Ok(Self { notices, legacy: legacy_iptables::Tables::open() })
    }

    /// Returns when something may have changed since it was last called.
    pub async fn changed(&self) {
        let heard = self.notices.iter().map(|socket| Box::pin(heard(socket)));
        futures_util::future::select_all(heard).await;
    }

    /// Why each of these interfaces must not be passed redirected frames: what stands in their way, as a line for a
    /// person. `None` if nothing does.
    ///
    /// Takes some system calls for the namespace and two for each interface; it blocks only for as long as the kernel
    /// answers.
    pub fn read(&self, interfaces: &[(InterfaceName, IfIndex)]) -> BTreeMap<InterfaceName, Option<String>> {
        let chains = known("nftables", nftables::chains());
        let of_all = match &chains {
            Ok(chains) => chains.iter().find(|chain| chain.devices.is_none()).map(ToString::to_string),
            Err(reason) => Some(reason.clone()),
        };
        let of_all = of_all
            .or_else(|| reason("iptables (legacy)", self.legacy.rules()))
            .or_else(|| reason("IPsec", xfrm::policies()))
            .or_else(|| reason("the programs of mcr's cgroup", cgroup::programs()));
        let queueing = known("the qdiscs", tc::qdiscs());
        let of_one = |name: &InterfaceName, index| {
            let qdiscs = match &queueing {
                Ok(qdiscs) => reason("tc", tc::hook(name, index, qdiscs)),
                Err(reason) => Some(reason.clone()),
            };
            let on_egress =
                || chains.iter().flatten().find(|chain| chain.is_of(name)).map(ToString::to_string);
            qdiscs.or_else(|| reason("tcx", tcx(name, index))).or_else(on_egress)
        };
        let answer = |(name, index): &(InterfaceName, IfIndex)| {
            (name.clone(), of_one(name, *index).or_else(|| of_all.clone()))
        };
        interfaces.iter().map(answer).collect()
    }
}

/// The chains of nftables that what an interface sends passes, as `nft` takes them.
pub fn chains_of(interface: &InterfaceName) -> io::Result<Vec<String>> {
    let passes = |chain: &&nftables::Chain| chain.devices.is_none() || chain.is_of(interface);
    Ok(nftables::chains()?.iter().filter(passes).map(nftables::Chain::path).collect())
}

/// Returns when a socket has been told something, or more than it could hold.
async fn heard(socket: &AsyncFd<Socket>) {
    let mut any = false;
    while !any {
        let Ok(mut ready) = socket.readable().await else { return future::pending().await };
        // One change comes as several messages.
        while !socket
            .get_ref()
            .read(&mut [0; 16])
            .is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock)
        {
            any = true;
        }
        ready.clear_ready();
    }
}

fn tcx(name: &InterfaceName, index: IfIndex) -> io::Result<Option<String>> {
    let programs = bpf_query::tcx_egress(index)?;
    Ok((programs > 0).then(|| format!("{name} has an eBPF program on egress (tcx)")))
}

/// What was asked, or that it could not be.
fn known<T>(what: &str, asked: io::Result<T>) -> Result<T, String> {
    asked.map_err(|error| format!("{what} cannot be asked about: {error}"))
}

fn reason(what: &str, asked: io::Result<Option<String>>) -> Option<String> {
    known(what, asked).unwrap_or_else(Some)
}
