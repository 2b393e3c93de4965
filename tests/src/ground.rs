//! What the ingress interfaces of a site are, and so which datapath serves the rules there. One table of
//! behaviours runs on each.

use std::{cell::Cell, process::Command};

use crate::deprive::{DOCUMENTED, NO_BPF, as_ordinary_user, without_capabilities};

/// A kind of ingress interface.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Ground {
    /// A veth, which has native XDP: `auto` takes AF_XDP.
    #[default]
    Veth,
    /// A veth, with AF_PACKET asked for.
    PlainVeth,
    /// A bridge: `auto` takes AF_PACKET.
    Bridge,
    /// A macvlan: `auto` takes AF_PACKET.
    Macvlan,
    /// A veth, and a daemon that may load no eBPF: `auto` takes AF_PACKET with a classic filter.
    WithoutBpf,
    /// A veth, and sinks that take redirected frames: `auto` has the kernel send on what needs new headers alone.
    Kernel,
    /// A veth, and a daemon of an ordinary user with the documented capabilities: `auto` takes AF_XDP.
    OrdinaryUser,
}

thread_local! {
    static CURRENT: Cell<Ground> = const { Cell::new(Ground::Veth) };
}

impl Ground {
    /// That of the test that runs on this thread.
    pub fn current() -> Self {
        CURRENT.get()
    }

    /// Runs a test on this ground.
    pub fn run(self, test: fn()) {
        CURRENT.set(self);
        test();
    }

    /// The datapath that rules without a wish of their own get.
    pub fn datapath(self) -> &'static str {
        match self {
            Self::Veth | Self::OrdinaryUser => "af-xdp",
            Self::Kernel => "redirect",
            _ => "af-packet",
        }
    }

    /// Gives `mcr run` what makes this ground.
    pub fn prepare(self, run: &mut Command) {
        match self {
            Self::PlainVeth => drop(run.args(["--datapath", "af-packet"])),
            Self::WithoutBpf => without_capabilities(run, NO_BPF),
            Self::OrdinaryUser => as_ordinary_user(run, DOCUMENTED),
            Self::Veth | Self::Bridge | Self::Macvlan | Self::Kernel => {}
        }
    }
}

/// Makes tests of functions, one for each ground.
#[macro_export]
macro_rules! on_every_ground {
    ($($test:ident),* $(,)?) => {
        mod on_veth {
            $(#[test] fn $test() { tests::Ground::Veth.run(super::$test); })*
        }
        mod on_plain_veth {
            $(#[test] fn $test() { tests::Ground::PlainVeth.run(super::$test); })*
        }
        mod on_bridge {
            $(#[test] fn $test() { tests::Ground::Bridge.run(super::$test); })*
        }
        mod on_macvlan {
            $(#[test] fn $test() { tests::Ground::Macvlan.run(super::$test); })*
        }
    };
}

/// Makes tests of functions, one for each datapath.
#[macro_export]
macro_rules! on_both_datapaths {
    ($($test:ident),* $(,)?) => {
        mod by_af_xdp {
            $(#[test] fn $test() { tests::Ground::Veth.run(super::$test); })*
        }
        mod by_af_packet {
            $(#[test] fn $test() { tests::Ground::PlainVeth.run(super::$test); })*
        }
    };
}

/// Makes tests of functions, where the kernel itself sends on what it can.
#[macro_export]
macro_rules! by_the_kernel {
    ($($test:ident),* $(,)?) => {
        mod by_the_kernel {
            $(#[test] fn $test() { tests::Ground::Kernel.run(super::$test); })*
        }
    };
}

/// Makes tests of functions, for a daemon that may load no eBPF.
#[macro_export]
macro_rules! without_bpf {
    ($($test:ident),* $(,)?) => {
        mod without_bpf {
            $(#[test] fn $test() { tests::Ground::WithoutBpf.run(super::$test); })*
        }
    };
}

/// Makes tests of functions, for a daemon of an ordinary user.
#[macro_export]
macro_rules! as_ordinary_user {
    ($($test:ident),* $(,)?) => {
        mod as_ordinary_user {
            $(#[test] fn $test() { tests::Ground::OrdinaryUser.run(super::$test); })*
        }
    };
}
