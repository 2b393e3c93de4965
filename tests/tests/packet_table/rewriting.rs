//! What the egress program makes of a frame, by its twin that `BPF_PROG_TEST_RUN` takes, against what etherparse makes of
//! the same datagram, and against the same function in user space.

use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, PerCpuHashMap, PerCpuValues},
    programs::{TestRun, TestRunOptions, Xdp},
    util::nr_cpus,
};
use mcr_common::{
    abi::{self, map},
    counters::OutputCounters,
    redirect::{
        Chain, ChainKey, Headers, MTU_SLACK, NO_RECORD, Record, Refusal, Rewrite, TAG_LEN, Tag, rewrite, tos,
        ttl,
    },
};
use proptest::{prelude::*, test_runner::TestRunner};
use tests::{
    Udp, bpf,
    frame::{PAYLOAD, UDP, multicast_mac},
};

use super::{XDP_DROP, XDP_PASS, at, bytes_of, put, stay_on_one_cpu};

const FAN: u32 = 9;
/// Beyond those that have counters in the array.
const OUTPUT: u32 = abi::DEFAULT_MAX_RULES + 5;
/// Without a context of its own a program runs on the loopback interface.
const DEVICE: u32 = 1;

const SOURCE_MAC: [u8; 6] = [2, 0, 0, 0, 7, 7];

/// The twin, with one output.
struct Twin {
    ebpf: Ebpf,
    sequence: u64,
}

impl Twin {
    fn load() -> Self {
        let mut ebpf = EbpfLoader::new().load(&bpf::object()).expect("load the object");
        let program: &mut Xdp =
            ebpf.program_mut(abi::REWRITE_TWIN).expect("the twin").try_into().expect("XDP");
        program.load().expect("the verifier takes the twin");
        // The one that is shipped cannot be run, but it can be loaded.
        let program: &mut Xdp =
            ebpf.program_mut(abi::REWRITE).expect("the egress program").try_into().expect("XDP");
        program.load().expect("the verifier takes the egress program");
        let mut outputs: PerCpuHashMap<_, u32, OutputCounters> =
            ebpf.map_mut(map::OUTPUTS).expect("map").try_into().expect("a per-CPU hash");
        outputs.insert(OUTPUT, on_every_cpu(OutputCounters::default()), 0).expect("insert an output");
        Self { ebpf, sequence: 0 }
    }

    /// Writes the outputs of the device, in their order.
    fn set(&mut self, outputs: &[Rewrite]) {
        let mut records: Array<_, Record> =
            self.ebpf.map_mut(map::RECORDS).expect("map").try_into().expect("an array");
        for (index, output) in (0..).zip(outputs) {
            let last = index as usize == outputs.len() - 1;
            let next = if last { NO_RECORD } else { index + 1 };
            let record = Record { rewrite: *output, output: OUTPUT, next, after: next };
            records.set(index, record, 0).expect("set a record");
        }
        let mut chains: PerCpuHashMap<_, ChainKey, Chain> =
            self.ebpf.map_mut(map::CHAINS).expect("map").try_into().expect("a per-CPU hash");
        let chain = on_every_cpu(Chain { sequence: 0, next: 0, first: 0 });
        chains.insert(ChainKey { fan: FAN, device: DEVICE }, chain, 0).expect("insert a chain");
    }

    /// Runs a clone of a frame; what leaves, if it does.
    fn run(&self, frame: &[u8], tag: Tag) -> Option<Vec<u8>> {
        let data = [&bytes_of(tag), &frame[TAG_LEN..]].concat();
        let mut out = [0; 2048];
        let options =
            TestRunOptions { data_in: Some(&data), data_out: Some(&mut out), ..TestRunOptions::new() };
        let twin: &Xdp = self.ebpf.program(abi::REWRITE_TWIN).expect("the twin").try_into().expect("XDP");
        let result = twin.test_run(options).expect("BPF_PROG_TEST_RUN");
        match result.return_value {
            XDP_PASS => Some(out[..result.data_size_out as usize].to_vec()),
            XDP_DROP => None,
            action => panic!("the egress program answered {action}"),
        }
    }

    /// Runs the one clone of the next frame.
    fn next(&mut self, frame: &[u8]) -> Option<Vec<u8>> {
        self.sequence += 1;
        self.run(frame, Tag { sequence: self.sequence, fan: FAN })
    }

    fn counters(&self) -> OutputCounters {
        let outputs: PerCpuHashMap<_, u32, OutputCounters> =
            self.ebpf.map(map::OUTPUTS).expect("map").try_into().expect("a per-CPU hash");
        let cpus = outputs.get(&OUTPUT, 0).expect("the output's counters");
        cpus.iter().fold(OutputCounters::default(), |a, b| OutputCounters {
            rewritten: a.rewritten + b.rewritten,
            rewritten_bytes: a.rewritten_bytes + b.rewritten_bytes,
            too_big: a.too_big + b.too_big,
            ttl_expired: a.ttl_expired + b.ttl_expired,
        })
    }

    /// Checks what leaves, and that exactly the counters for it moved.
    fn check(&mut self, name: &str, output: Rewrite, frame: &[u8], expected: Result<Vec<u8>, Refusal>) {
        let mut counters = self.counters();
        self.set(&[output]);
        let sent = self.next(frame);
        match &expected {
            Ok(_) => {
                counters.rewritten += 1;
                counters.rewritten_bytes += (frame.len() - PAYLOAD) as u64;
            }
            // Beyond the slack no device gets it: the XDP program counts it.
            Err(Refusal::TooBig) => {
                counters.too_big += u64::from((frame.len() - 14) as u32 <= output.mtu + MTU_SLACK);
            }
            Err(Refusal::TtlExpired) => counters.ttl_expired += 1,
        }
        assert_eq!(sent, expected.ok(), "{name}");
        assert_eq!(self.counters(), counters, "{name}");
    }
}

fn on_every_cpu<T: aya::Pod>(value: T) -> PerCpuValues<T> {
    let cpus = nr_cpus().expect("a number of CPUs");
    PerCpuValues::try_from(vec![value; cpus]).expect("a value for each CPU")
}

/// TTL 16, DSCP as received.
fn output() -> Rewrite {
    Rewrite {
        destination_mac: multicast_mac([239, 2, 3, 4].into()),
        source_mac: SOURCE_MAC,
        source: [10, 78, 0, 1],
        destination: [239, 2, 3, 4],
        source_port: 40_404u16.to_be_bytes(),
        destination_port: 6000u16.to_be_bytes(),
        ttl_mode: ttl::FIXED,
        ttl: 16,
        tos_mode: tos::COPY,
        tos: 0,
        mtu: 1500,
    }
}

/// What an application sent.
fn received() -> Udp {
    Udp::new(at("198.51.100.9", 5001), at("239.1.1.1", 5000)).ttl(7).dscp(46, 3).payload(b"the payload")
}

/// What is to leave by [`output`], with its UDP checksum or without.
fn sent(ttl: u8, dscp: u8, payload: &[u8], checksum: bool) -> Vec<u8> {
    let datagram = Udp::new(at("10.78.0.1", 40_404), at("239.2.3.4", 6000));
    let mut frame = datagram.ttl(ttl).dscp(dscp, 0).payload(payload).frame();
    frame[6..12].copy_from_slice(&SOURCE_MAC);
    if !checksum {
        put(&mut frame, UDP + 6, 0);
    }
    frame
}

/// The frame as a sender on the same host leaves it: the UDP checksum is that of the pseudo header alone.
fn unfinished(datagram: &Udp) -> Vec<u8> {
    let mut frame = datagram.frame();
    let len = (8 + datagram.payload.len()) as u32;
    let octets = [datagram.source.ip().octets(), datagram.destination.ip().octets()].concat();
    let words = octets.chunks(2).map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])));
    let mut sum = words.sum::<u32>() + 17 + len;
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    put(&mut frame, UDP + 6, sum as u16);
    frame
}

#[test]
fn a_clone_leaves_as_the_datagram_of_its_output() {
    let mut twin = Twin::load();
    let payload = b"the payload";
    let base = received();
    let with = |change: fn(&mut Rewrite)| {
        let mut output = output();
        change(&mut output);
        output
    };
    let copy_ttl = with(|output| output.ttl_mode = ttl::COPY);
    let decrement = with(|output| output.ttl_mode = ttl::DECREMENT);
    let fixed_dscp = with(|output| (output.tos_mode, output.tos) = (tos::FIXED, 10 << 2));
    let mut no_checksum = base.frame();
    put(&mut no_checksum, UDP + 6, 0);
    let fragmentable = |datagram: &Udp| {
        let mut frame = datagram.frame();
        put(&mut frame, 14 + 4, 0x1234);
        put(&mut frame, 14 + 6, 0);
        tests::frame::fix_ip_checksum(&mut frame);
        frame
    };

    let mut check = |name: &str, output, frame: &[u8], expected| twin.check(name, output, frame, expected);
    check("TTL 16, DSCP as received", output(), &base.frame(), Ok(sent(16, 46, payload, true)));
    check("the TTL received", copy_ttl, &base.frame(), Ok(sent(7, 46, payload, true)));
    check("TTL less one", decrement, &base.frame(), Ok(sent(6, 46, payload, true)));
    check("another DSCP", fixed_dscp, &base.frame(), Ok(sent(16, 10, payload, true)));
    let last_hop = base.clone().ttl(1);
    check("TTL 1", output(), &last_hop.frame(), Ok(sent(16, 46, payload, true)));
    check("TTL 1 as received", copy_ttl, &last_hop.frame(), Ok(sent(1, 46, payload, true)));
    check("TTL 1 less one", decrement, &last_hop.frame(), Err(Refusal::TtlExpired));
    let no_hop = base.clone().ttl(0);
    check("TTL 0 less one", decrement, &no_hop.frame(), Err(Refusal::TtlExpired));
    check("TTL 0 as received", copy_ttl, &no_hop.frame(), Err(Refusal::TtlExpired));
    check("no UDP checksum", output(), &no_checksum, Ok(sent(16, 46, payload, false)));
    check("an unfinished one", output(), &unfinished(&base), Ok(sent(16, 46, payload, false)));
    check("ID and no DF", output(), &fragmentable(&base), Ok(sent(16, 46, payload, true)));
    let empty = base.clone().payload(&[]);
    check("no payload", output(), &empty.frame(), Ok(sent(16, 46, &[], true)));
    check("no payload, unfinished", output(), &unfinished(&empty), Ok(sent(16, 46, &[], false)));
    for len in [1, 2, 3, 1471, 1472] {
        let payload = vec![0xa7; len];
        let datagram = base.clone().payload(&payload);
        check(&format!("{len} bytes"), output(), &datagram.frame(), Ok(sent(16, 46, &payload, true)));
    }
    for (payload, mtu, fits) in [(72, 100, true), (73, 100, false), (76, 100, false), (77, 100, false)] {
        let output = Rewrite { mtu, ..output() };
        let datagram = base.clone().payload(&vec![1; payload]);
        let expected = Ok(sent(16, 46, &vec![1; payload], true));
        let expected = if fits { expected } else { Err(Refusal::TooBig) };
        check(&format!("{payload} bytes by an MTU of {mtu}"), output, &datagram.frame(), expected);
    }
    // Every checksum there is, 0 and 0xffff among them.
    for value in 0..=u16::MAX {
        let payload = value.to_be_bytes();
        let datagram = base.clone().payload(&payload);
        let frame = datagram.frame();
        if frame == unfinished(&datagram) {
            continue;
        }
        check(&format!("payload {value:#x}"), output(), &frame, Ok(sent(16, 46, &payload, true)));
    }
}

#[test]
fn the_clones_of_a_frame_go_to_the_outputs_of_the_device_in_turn() {
    stay_on_one_cpu();
    let mut twin = Twin::load();
    let outputs: [Rewrite; 3] = std::array::from_fn(|index| Rewrite { ttl: 20 + index as u8, ..output() });
    twin.set(&outputs);
    let frame = received().frame();
    let by_ttl = |ttl| Some(sent(ttl, 46, b"the payload", true));
    let run = |sequence, fan| twin.run(&frame, Tag { sequence, fan });
    for sequence in 1..4 {
        let clones: Vec<_> = (0..3).map(|_| run(sequence, FAN)).collect();
        assert_eq!(clones, [by_ttl(20), by_ttl(21), by_ttl(22)]);
        // There are no more outputs.
        assert_eq!(run(sequence, FAN), None);
    }
    // A frame that not all clones were made of leaves nothing for the next.
    assert_eq!([run(4, FAN), run(4, FAN)], [by_ttl(20), by_ttl(21)]);
    assert_eq!([run(5, FAN), run(5, FAN), run(5, FAN)], [by_ttl(20), by_ttl(21), by_ttl(22)]);
    // Beyond 32 bits.
    let large = u64::MAX - 3;
    assert_eq!([run(large, FAN), run(large, FAN)], [by_ttl(20), by_ttl(21)]);
    assert_eq!(run(large & 0xffff_ffff, FAN), by_ttl(20));
    // Nobody's.
    assert_eq!(run(6, FAN + 1), None);
    let counters = twin.counters();
    assert_eq!((counters.too_big, counters.ttl_expired), (0, 0));
}

#[test]
fn what_bears_no_tag_does_not_leave() {
    let mut twin = Twin::load();
    twin.set(&[output()]);
    let xdp: &Xdp = twin.ebpf.program(abi::REWRITE_TWIN).expect("the twin").try_into().expect("XDP");
    let frame = received().frame();
    let options = TestRunOptions { data_in: Some(&frame), ..TestRunOptions::new() };
    assert_eq!(xdp.test_run(options).expect("BPF_PROG_TEST_RUN").return_value, XDP_DROP);
    assert_eq!(twin.counters(), OutputCounters::default());
}

fn any_rewrite() -> impl Strategy<Value = Rewrite> {
    let addresses = (any::<[u8; 6]>(), any::<[u8; 6]>(), any::<[u8; 4]>(), any::<[u8; 4]>());
    let marks = (0..3u8, any::<u8>(), 0..2u8, any::<u8>(), 28..200u32);
    (addresses, any::<[u8; 2]>(), any::<[u8; 2]>(), marks).prop_map(
        |(addresses, source, destination, marks)| {
            let (destination_mac, source_mac, source_address, destination_address) = addresses;
            let (ttl_mode, ttl, tos_mode, tos, mtu) = marks;
            Rewrite {
                destination_mac,
                source_mac,
                source: source_address,
                destination: destination_address,
                source_port: source,
                destination_port: destination,
                ttl_mode,
                ttl,
                tos_mode,
                tos,
                mtu,
            }
        },
    )
}

#[derive(Clone, Copy, Debug)]
enum Checksum {
    Right,
    Unfinished,
    Any(u16),
}

fn any_frame() -> impl Strategy<Value = Vec<u8>> {
    let checksum = prop_oneof![
        Just(Checksum::Right),
        Just(Checksum::Unfinished),
        any::<u16>().prop_map(Checksum::Any),
        Just(Checksum::Any(0)),
        Just(Checksum::Any(0xffff)),
    ];
    let marks = (any::<u8>(), 0..64u8, 0..4u8);
    let payload = proptest::collection::vec(any::<u8>(), 0..180);
    (any::<u32>(), any::<u16>(), any::<u16>(), marks, payload, checksum).prop_map(
        |(source, source_port, port, (ttl, dscp, ecn), payload, checksum)| {
            let source = std::net::SocketAddrV4::new(source.into(), source_port);
            let datagram = Udp::new(source, at("239.1.1.1", port)).ttl(ttl).dscp(dscp, ecn).payload(&payload);
            match checksum {
                Checksum::Right => datagram.frame(),
                Checksum::Unfinished => unfinished(&datagram),
                Checksum::Any(value) => {
                    let mut frame = datagram.frame();
                    put(&mut frame, UDP + 6, value);
                    frame
                }
            }
        },
    )
}

/// What user space makes of a frame.
fn rewritten(frame: &[u8], output: &Rewrite) -> Result<Vec<u8>, Refusal> {
    let (head, payload) = frame.split_at(PAYLOAD);
    let mut headers: Headers = head.try_into().expect("as long as the headers");
    rewrite(&mut headers, output)?;
    Ok([&headers, payload].concat())
}

#[test]
fn kernel_and_user_space_agree_on_any_output() {
    let twin = std::cell::RefCell::new(Twin::load());
    let config = ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(20_000) };
    let agree = TestRunner::new(config).run(&(any_frame(), any_rewrite()), |(frame, output)| {
        twin.borrow_mut().check("any output", output, &frame, rewritten(&frame, &output));
        Ok(())
    });
    agree.unwrap();
}
