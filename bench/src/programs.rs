//! The bench's BPF programs: loaded, attached, and their maps by name. See `bpf/bench.bpf.c`.

use anyhow::{Context as _, Result};
use aya::{
    Ebpf, EbpfLoader, include_bytes_aligned,
    maps::{Array, MapData, PerCpuArray, xdp::DevMap},
    programs::{Xdp, XdpMode},
};
use nix::net::if_::if_nametoindex;
use tests::Namespace;

static OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/bench.bpf.o"));

/// What a program is told before it is loaded.
pub type Globals<'a> = &'a [(&'a str, u32)];

pub fn load(program: &str, globals: Globals<'_>) -> Result<Ebpf> {
    load_for(program, globals, 1)
}

/// Loads a program for so many outputs.
fn load_for(program: &str, globals: Globals<'_>, outputs: u32) -> Result<Ebpf> {
    let mut loader = EbpfLoader::new();
    loader.map_max_entries("fan", outputs);
    for (name, value) in globals {
        loader.override_global(name, value, true);
    }
    let mut ebpf = loader.load(OBJECT).context("the bench's BPF object")?;
    xdp(&mut ebpf, program)?.load().with_context(|| format!("load the program {program}"))?;
    Ok(ebpf)
}

pub fn xdp<'a>(ebpf: &'a mut Ebpf, program: &str) -> Result<&'a mut Xdp> {
    Ok(ebpf.program_mut(program).with_context(|| format!("no program {program}"))?.try_into()?)
}

/// Loads a program and attaches it natively until the value is dropped.
pub fn attach(program: &str, globals: Globals<'_>, host: &Namespace, interface: &str) -> Result<Ebpf> {
    attach_loaded(load(program, globals)?, program, host, interface)
}

/// Broadcasts what comes to an interface to another, so many times, until the value is dropped.
pub fn attach_fan(host: &Namespace, ingress: &str, egress: &str, outputs: u32) -> Result<Ebpf> {
    let mut ebpf = load_for("fan_ceiling", &[], outputs)?;
    let egress = interface_index(host, egress)?;
    let mut fan: DevMap<_> = ebpf.map_mut("fan").context("no map fan")?.try_into()?;
    host.run(|| (0..outputs).try_for_each(|output| fan.set(output, egress, None, 0)))?;
    attach_loaded(ebpf, "fan_ceiling", host, ingress)
}

fn attach_loaded(mut ebpf: Ebpf, program: &str, host: &Namespace, interface: &str) -> Result<Ebpf> {
    let index = interface_index(host, interface)?;
    let attached = host.run(|| {
        xdp(&mut ebpf, program)?.attach_to_if_index(index, XdpMode::Driver).map_err(anyhow::Error::from)
    });
    attached.with_context(|| format!("attach {program} to {interface}"))?;
    Ok(ebpf)
}

pub fn interface_index(host: &Namespace, interface: &str) -> Result<u32> {
    host.run(|| if_nametoindex(interface)).with_context(|| format!("index of {interface}"))
}

pub fn array<V: aya::Pod>(ebpf: &mut Ebpf, name: &str) -> Result<Array<MapData, V>> {
    Ok(ebpf.take_map(name).with_context(|| format!("no map {name}"))?.try_into()?)
}

pub fn per_cpu_array<V: aya::Pod>(ebpf: &mut Ebpf, name: &str) -> Result<PerCpuArray<MapData, V>> {
    Ok(ebpf.take_map(name).with_context(|| format!("no map {name}"))?.try_into()?)
}
