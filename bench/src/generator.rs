//! The saturating source: frames made in the kernel by a BPF program, millions a second from one CPU.
//!
//! `BPF_PROG_TEST_RUN` runs the program on live frames, which it redirects into the source's cable. An
//! ordinary sender of UDP would measure itself.

use std::{
    cell::RefCell,
    io,
    net::Ipv4Addr,
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd},
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use anyhow::{Context as _, Result, anyhow};
use aya::maps::{Array, MapData};

use crate::{
    cpu::{self, SOURCE_CPU},
    programs,
    site::{SOURCE, SOURCE_ADDRESS, Site},
};

/// It is to end soon after it is asked to.
const FRAMES_A_CALL: u32 = 250_000;
/// Each call sleeps some 20 ms at its end, for the kernel's RCU: meanwhile another thread sends. On one CPU, where
/// softirqs are off while the program runs, no two write its state at a time.
const THREADS: usize = 2;
/// Ethernet, IPv4 and UDP.
const HEADER_BYTES: usize = 42;

/// What to send.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    pub payload: u16,
    /// Stream i goes to the first group plus i, round robin.
    pub first: Ipv4Addr,
    pub streams: u32,
    pub port: u16,
    /// Frames a second over all streams; as many as go, if there is none.
    pub rate: Option<f64>,
}

/// What is being sent.
pub struct Offered {
    /// `struct generator`: frames sent, time of the next, its stream.
    state: Array<MapData, [u64; 3]>,
    interval: RefCell<Array<MapData, u64>>,
}

impl Offered {
    /// Frames sent so far.
    pub fn frames(&self) -> Result<u64> {
        Ok(self.state.get(&0, 0).context("the generator's state")?[0])
    }

    /// Goes on at so many frames a second, or at as many as go.
    #[expect(clippy::cast_precision_loss, reason = "a second in 1/1024 ns is exact")]
    pub fn set_rate(&self, rate: Option<f64>) -> Result<()> {
        const SECOND: u64 = 1_000_000_000 << 10;
        let interval = rate.map_or(0, |rate| (SECOND as f64 / rate) as u64);
        self.interval.borrow_mut().set(0, interval, 0).context("the generator's pace")
    }
}

/// Sends while `job` runs; its answer, and how many frames were sent in all.
pub fn send_while<T>(site: &Site, load: &Load, job: impl FnOnce(&Offered) -> Result<T>) -> Result<(T, u64)> {
    let mut ebpf = programs::load(
        "generate",
        &[
            ("target_ifindex", programs::interface_index(&site.source, SOURCE)?),
            ("source_address", SOURCE_ADDRESS.to_bits()),
            ("first_group", load.first.to_bits()),
            ("destination_port", load.port.into()),
            ("payload_bytes", load.payload.into()),
            ("streams", load.streams),
        ],
    )?;
    let offered = Offered {
        state: programs::array(&mut ebpf, "generator_state")?,
        interval: RefCell::new(programs::array(&mut ebpf, "generator_interval")?),
    };
    offered.set_rate(load.rate)?;
    let program = programs::xdp(&mut ebpf, "generate")?.fd()?.try_clone()?;
    let frame = vec![0u8; HEADER_BYTES + usize::from(load.payload)];
    let stop = AtomicBool::new(false);
    let answer = thread::scope(|scope| {
        // Also if the job panics: the scope waits for the threads.
        let stopper = Stopper(&stop);
        let senders: Vec<_> = (0..THREADS)
            .map(|_| {
                scope.spawn(|| {
                    site.source.run(|| {
                        cpu::pin(SOURCE_CPU)?;
                        while !stop.load(Ordering::Relaxed) {
                            test_run(program.as_fd(), &frame)?;
                        }
                        Ok::<_, anyhow::Error>(())
                    })
                })
            })
            .collect();
        let answer = job(&offered);
        drop(stopper);
        for sender in senders {
            // If nothing was sent, that is why nothing arrived.
            sender.join().map_err(|_| anyhow!("the generator's thread panicked"))??;
        }
        answer
    })?;
    Ok((answer, offered.frames()?))
}

struct Stopper<'a>(&'a AtomicBool);

impl Drop for Stopper<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// `union bpf_attr` for `BPF_PROG_TEST_RUN`.
#[repr(C)]
#[derive(Default)]
struct TestRun {
    prog_fd: u32,
    retval: u32,
    data_size_in: u32,
    data_size_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
    ctx_size_in: u32,
    ctx_size_out: u32,
    ctx_in: u64,
    ctx_out: u64,
    flags: u32,
    cpu: u32,
    batch_size: u32,
    padding: u32,
}

const BPF_PROG_TEST_RUN: libc::c_long = 10;
const BPF_F_TEST_XDP_LIVE_FRAMES: u32 = 1 << 1;
const FRAMES_A_BATCH: u32 = 64;

/// Runs an XDP program on live frames.
fn test_run(program: BorrowedFd<'_>, frame: &[u8]) -> Result<()> {
    let mut attr = TestRun {
        prog_fd: program.as_raw_fd().cast_unsigned(),
        data_size_in: frame.len() as u32,
        data_in: frame.as_ptr().addr() as u64,
        repeat: FRAMES_A_CALL,
        flags: BPF_F_TEST_XDP_LIVE_FRAMES,
        batch_size: FRAMES_A_BATCH,
        ..TestRun::default()
    };
    let (attr, size) = (&raw mut attr, size_of::<TestRun>());
    // SAFETY: `attr` is a prefix of union bpf_attr, the rest of which the kernel takes as zero; it points to
    // `frame` alone, which the kernel reads during the call.
    let result = unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_TEST_RUN, attr, size) };
    let error = io::Error::last_os_error();
    if result < 0 && error.kind() != io::ErrorKind::Interrupted {
        return Err(error).context("BPF_PROG_TEST_RUN on live frames (Linux 5.18)");
    }
    Ok(())
}
