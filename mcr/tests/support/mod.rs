//! Rules, sockets and a namespace for tests of the worker's parts with the real kernel.

use std::{net::Ipv4Addr, os::fd::OwnedFd, process::Command};

use libc::iovec;
use mcr::{
    net::egress_socket::{self, EgressKey},
    rule::IfIndex,
    worker::{
        egress::UringEgress,
        ledger::{Layout, Ledger},
        protocol::{CompiledOutput, CompiledRule, Route, Ttl},
        relay::{Batch, FlowTable, relay},
        ring::Ring,
    },
};
use mcr_common::{flow::FlowKey4, parse::Datagram};

pub const PORT: u16 = 6000;

/// Enters a network namespace of this thread's own, with nothing but its loopback.
pub fn enter_empty_namespace() {
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("a network namespace: run this as root");
    run("ip", &["link", "set", "lo", "up"]);
}

pub fn run(program: &str, args: &[&str]) {
    let status = Command::new(program).args(args).status().expect(program);
    assert!(status.success(), "{program} {args:?}");
}

/// A socket that sends to this host's own loopback.
pub fn loopback_socket() -> OwnedFd {
    let key = EgressKey {
        interface: "lo".parse().expect("an interface"),
        index: IfIndex(1),
        source_port: 40_000,
        loop_back: false,
        unicast: true,
    };
    egress_socket::open(&key).expect("an egress socket")
}

/// An output to [`PORT`] on the loopback, by egress socket 0.
pub fn to_loopback(slot: u32, mtu: u32) -> CompiledOutput {
    let route = Route {
        socket: 0,
        ifindex: 1,
        source: Ipv4Addr::LOCALHOST,
        destination: Ipv4Addr::LOCALHOST,
        port: PORT,
        mtu,
    };
    CompiledOutput { slot, route: Ok(route), ttl: Ttl::Copy, dscp: None, max_run: 64 }
}

/// A worker's relay step and egress.
pub struct Worker {
    pub table: FlowTable,
    pub ledger: Ledger,
    pub egress: UringEgress,
    batch: Batch,
    payload: Vec<u8>,
    _memfd: OwnedFd,
}

impl Worker {
    /// With rules of the given outputs: the first for 239.1.1.0:5000, the next for 239.1.1.1:5000 ...
    pub fn new(rules: impl IntoIterator<Item = Vec<CompiledOutput>>, socket: OwnedFd) -> Self {
        let mut table = FlowTable::default();
        for (slot, outputs) in (0u8..).zip(rules) {
            let key = FlowKey4::any_source([239, 1, 1, slot], 5000u16.to_be_bytes());
            table.upsert(CompiledRule { slot: slot.into(), key, own_sources: Vec::new(), outputs });
        }
        let (ledger, memfd) = Ledger::create(Layout { queues: 1, rules: 8, outputs: 16 }).expect("a ledger");
        let mut egress = UringEgress::new(Ring::new().expect("io_uring"));
        egress.open(0, socket);
        Self { table, ledger, egress, batch: Batch::new(8), payload: vec![7; 65_507], _memfd: memfd }
    }

    /// Relays datagrams of these groups (by their last byte) and sizes as one batch.
    pub fn relay(&mut self, datagrams: impl IntoIterator<Item = (u8, usize)>) {
        self.batch.clear();
        for (group, len) in datagrams {
            let datagram = Datagram {
                source: [10, 0, 0, 1],
                group: [239, 1, 1, group],
                port: 5000u16.to_be_bytes(),
                ttl: 9,
                tos: 0,
                payload_len: len as u16,
                trailer_len: 0,
            };
            let flow = self.table.find(&datagram).expect("a flow");
            let payload = iovec { iov_base: self.payload.as_ptr().cast_mut().cast(), iov_len: len };
            self.batch.push(flow.slot, &datagram, payload);
        }
        relay(&mut self.batch, &self.table, &self.ledger, 1, &mut self.egress);
        self.egress.flush(&self.ledger).expect("flush");
    }
}
