//! The payload of a test datagram: a header, then filler that follows from the header, so that a receiver
//! verifies every byte without having seen what was sent.
//!
//! ```text
//!  0 magic "mcrp"   4 version   5 zero   6 size of the payload (u16)
//!  8 run (u64): random per run of the generator
//! 16 stream (u32)  20 check of the other header fields (u32)
//! 24 sequence (u64): from 0, per stream
//! 32 time of sending (u64), CLOCK_REALTIME in ns
//! 40 filler
//! ```
//! Numbers are in network order.
//!
//! The clock is `CLOCK_REALTIME` because it is the one in which the kernel stamps received datagrams, and the same
//! in all namespaces of a host (time namespaces shift the monotonic clock). Between hosts, latency is as
//! good as their clocks agree.

/// Length of the header, so the least size of a payload.
pub const HEADER_BYTES: usize = 40;

/// Longest payload of an IPv4 UDP datagram.
pub const MAX_BYTES: usize = 65_507;

const MAGIC: [u8; 4] = *b"mcrp";
const VERSION: u8 = 1;

/// What distinguishes one test datagram from all others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Probe {
    pub run: u64,
    pub stream: u32,
    pub sequence: u64,
    /// `CLOCK_REALTIME` when it was handed to the kernel.
    pub sent_ns: u64,
}

/// What a received payload is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Payload {
    /// A test datagram, every byte as it was sent.
    Intact(Probe),
    /// A test datagram; its header is right, its length or filler is not.
    Damaged(Probe),
    /// It starts as a test datagram, but the header contradicts itself: which one it was cannot be known.
    Unreadable,
    /// Somebody else's datagram.
    Foreign,
}

impl Probe {
    /// Fills the whole of `payload`, which is [`HEADER_BYTES`] to [`MAX_BYTES`] long.
    pub fn write(&self, payload: &mut [u8]) {
        let size = u16::try_from(payload.len()).expect("a UDP payload is shorter than 64 KiB");
        let (header, filler) = payload.split_at_mut(HEADER_BYTES);
        header[..4].copy_from_slice(&MAGIC);
        header[4] = VERSION;
        header[5] = 0;
        header[6..8].copy_from_slice(&size.to_be_bytes());
        header[8..16].copy_from_slice(&self.run.to_be_bytes());
        header[16..20].copy_from_slice(&self.stream.to_be_bytes());
        header[20..24].copy_from_slice(&self.check(size).to_be_bytes());
        header[24..32].copy_from_slice(&self.sequence.to_be_bytes());
        header[32..40].copy_from_slice(&self.sent_ns.to_be_bytes());

        let mut words = self.filler();
        let mut chunks = filler.chunks_exact_mut(8);
        for (chunk, word) in chunks.by_ref().zip(words.by_ref()) {
            chunk.copy_from_slice(&word.to_be_bytes());
        }
        let rest = chunks.into_remainder();
        if let Some(word) = words.next() {
            rest.copy_from_slice(&word.to_be_bytes()[..rest.len()]);
        }
    }

    fn filler_matches(&self, filler: &[u8]) -> bool {
        let mut words = self.filler();
        let (chunks, rest) = filler.as_chunks::<8>();
        // Differences are gathered and not tested one by one, so that the loop has no branch.
        let difference = chunks
            .iter()
            .zip(words.by_ref())
            .fold(0, |difference, (chunk, word)| difference | (u64::from_be_bytes(*chunk) ^ word));
        difference == 0 && words.next().is_some_and(|word| *rest == word.to_be_bytes()[..rest.len()])
    }

    /// The filler's words: without end, another row for each datagram.
    fn filler(&self) -> impl Iterator<Item = u64> + use<> {
        const STEP: u64 = 0x9e37_79b9_7f4a_7c15;
        let seed = mix(self.run ^ mix(self.sequence ^ mix(u64::from(self.stream))));
        (1u64..).map(move |i| seed ^ i.wrapping_mul(STEP))
    }

    fn check(&self, size: u16) -> u32 {
        let place = u64::from(self.stream) << 16 | u64::from(size);
        mix(place ^ mix(self.run ^ mix(self.sequence ^ mix(self.sent_ns)))) as u32
    }
}

impl Payload {
    /// Reads and verifies a payload.
    pub fn read(payload: &[u8]) -> Self {
        if payload.len() < 5 || payload[..4] != MAGIC || payload[4] != VERSION {
            return Payload::Foreign;
        }
        let Some((header, filler)) = payload.split_first_chunk::<HEADER_BYTES>() else {
            return Payload::Unreadable;
        };
        let size = u16::from_be_bytes([header[6], header[7]]);
        let probe = Probe {
            run: u64_at(header, 8),
            stream: u32_at(header, 16),
            sequence: u64_at(header, 24),
            sent_ns: u64_at(header, 32),
        };
        if header[5] != 0 || u32_at(header, 20) != probe.check(size) {
            return Payload::Unreadable;
        }
        if usize::from(size) == payload.len() && probe.filler_matches(filler) {
            Payload::Intact(probe)
        } else {
            Payload::Damaged(probe)
        }
    }
}

fn u64_at(header: &[u8; HEADER_BYTES], at: usize) -> u64 {
    header[at..at + 8].iter().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

fn u32_at(header: &[u8; HEADER_BYTES], at: usize) -> u32 {
    header[at..at + 4].iter().fold(0, |value, byte| value << 8 | u32::from(*byte))
}

/// The finaliser of splitmix64: every bit of the input reaches every bit of the output.
fn mix(mut x: u64) -> u64 {
    x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PROBE: Probe =
        Probe { run: 0x0123_4567_89ab_cdef, stream: 7, sequence: 99, sent_ns: 1_000_000_007 };

    fn written(probe: Probe, size: usize) -> Vec<u8> {
        let mut payload = vec![0xee; size];
        probe.write(&mut payload);
        payload
    }

    #[test]
    fn reads_what_was_written_at_every_size() {
        for size in (HEADER_BYTES..HEADER_BYTES + 20).chain([1316, 1472, 8972, MAX_BYTES]) {
            assert_eq!(Payload::read(&written(PROBE, size)), Payload::Intact(PROBE), "{size} bytes");
        }
    }

    #[test]
    fn notices_a_change_of_any_byte() {
        let payload = written(PROBE, 64 + 5);
        for at in 0..payload.len() {
            let mut changed = payload.clone();
            changed[at] ^= 0x10;
            let expected = match at {
                0..5 => Payload::Foreign,
                5..HEADER_BYTES => Payload::Unreadable,
                _ => Payload::Damaged(PROBE),
            };
            assert_eq!(Payload::read(&changed), expected, "byte {at}");
        }
    }

    #[test]
    fn notices_a_change_of_length() {
        let mut payload = written(PROBE, 100);
        assert_eq!(Payload::read(&payload[..99]), Payload::Damaged(PROBE));
        assert_eq!(Payload::read(&payload[..HEADER_BYTES]), Payload::Damaged(PROBE));
        assert_eq!(Payload::read(&payload[..HEADER_BYTES - 1]), Payload::Unreadable);
        payload.push(0);
        assert_eq!(Payload::read(&payload), Payload::Damaged(PROBE));
    }

    #[test]
    fn leaves_other_datagrams_alone() {
        for payload in [&b""[..], b"mcr", b"mcrp", b"mcrp\x02 another version", &[0x47; 1316]] {
            assert_eq!(Payload::read(payload), Payload::Foreign, "{payload:?}");
        }
    }

    #[test]
    fn filler_differs_between_datagrams() {
        let filler = |probe| written(probe, 80).split_off(HEADER_BYTES);
        assert_ne!(filler(PROBE), filler(Probe { sequence: 100, ..PROBE }));
        assert_ne!(filler(PROBE), filler(Probe { stream: 8, ..PROBE }));
        assert_ne!(filler(PROBE), filler(Probe { run: 1, ..PROBE }));
    }

    proptest! {
        #[test]
        fn round_trip(run: u64, stream: u32, sequence: u64, sent_ns: u64, size in HEADER_BYTES..2000) {
            let probe = Probe { run, stream, sequence, sent_ns };
            prop_assert_eq!(Payload::read(&written(probe, size)), Payload::Intact(probe));
        }

        #[test]
        fn reads_any_bytes(payload: Vec<u8>) {
            let _ = Payload::read(&payload);
        }
    }
}
