//! All that a receiver knows of one stream: pure counting, fed one datagram at a time.

use std::{collections::BTreeSet, net::SocketAddrV4};

use sha2::{Digest, Sha256};

use super::{
    probe::{Payload, Probe},
    sequence::{SequenceCounts, SequenceLedger},
};

/// Sources that are listed; of further ones it is only said that there were more.
pub const MAX_SOURCES: usize = 16;

/// Generator streams that one socket tells apart; with one more, the one that was silent longest is closed: its
/// counts stay, its window goes.
pub const MAX_FLOWS: usize = 64;

/// A datagram as the socket gave it.
#[derive(Clone, Copy, Debug)]
pub struct Datagram<'a> {
    pub payload: &'a [u8],
    pub source: SocketAddrV4,
    pub ttl: Option<u8>,
    pub tos: Option<u8>,
    /// `CLOCK_REALTIME` of its arrival.
    pub received_ns: u64,
}

/// What became of a datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// Counted; the time from sending to arrival, negative if the clocks disagree.
    Probe { latency_ns: i64 },
    /// Counted without a latency: foreign, unreadable, or more than was asked for.
    Other,
}

/// Sums over one stream, or over several. `received = unique + duplicates + late + unreadable + surplus`, where
/// `corrupt` includes the unreadable.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Datagrams of a generator.
    pub received: u64,
    pub received_bytes: u64,
    pub sequence: SequenceCounts,
    /// Not as they were sent.
    pub corrupt: u64,
    /// Corrupt in the header, so without a sequence number.
    pub unreadable: u64,
    /// Datagrams of others.
    pub foreign: u64,
    /// New ones after all that were asked for had come.
    pub surplus: u64,
}

/// One stream of one run of a generator.
#[derive(Clone, Debug)]
pub struct Flow {
    pub run: u64,
    pub stream: u32,
    pub ledger: SequenceLedger,
    last_heard: u64,
}

/// The account of one socket, that is of one group or host address.
#[derive(Debug, Default)]
pub struct StreamAccount {
    counts: Counts,
    /// Sequence counts of flows that are closed.
    closed: SequenceCounts,
    flows: Vec<Flow>,
    flows_opened: u64,
    entries: u64,
    pub sources: BTreeSet<SocketAddrV4>,
    pub more_sources: bool,
    pub ttl: BTreeSet<u8>,
    pub dscp: BTreeSet<u8>,
    pub ecn: BTreeSet<u8>,
    digest: Option<Sha256>,
}

impl StreamAccount {
    /// With `sha256`, a digest over the payloads in order of arrival is kept.
    pub fn new(sha256: bool) -> Self {
        Self { digest: sha256.then(Sha256::new), ..Self::default() }
    }

    /// Enters a datagram. Once all that was asked for has come (`complete`), duplicates still count as such, but
    /// what is new is surplus.
    pub fn enter(&mut self, datagram: &Datagram, complete: bool) -> Entry {
        let (probe, intact) = match Payload::read(datagram.payload) {
            Payload::Foreign => {
                self.counts.foreign += 1;
                return Entry::Other;
            }
            Payload::Intact(probe) => (Some(probe), true),
            Payload::Damaged(probe) => (Some(probe), false),
            Payload::Unreadable => (None, false),
        };
        self.counts.received += 1;
        self.counts.received_bytes += datagram.payload.len() as u64;
        if complete && probe.is_some_and(|probe| !self.is_duplicate(&probe)) {
            self.counts.surplus += 1;
            return Entry::Other;
        }
        self.observe(datagram);
        self.counts.corrupt += u64::from(!intact);
        let Some(probe) = probe else {
            self.counts.unreadable += 1;
            return Entry::Other;
        };
        self.enter_sequence(&probe);
        Entry::Probe { latency_ns: datagram.received_ns.wrapping_sub(probe.sent_ns).cast_signed() }
    }

    pub fn counts(&self) -> Counts {
        let mut sequence = self.closed;
        for flow in &self.flows {
            sequence += flow.ledger.counts();
        }
        Counts { sequence, ..self.counts }
    }

    /// Datagrams that arrived, each counted once.
    pub fn unique(&self) -> u64 {
        self.flows.iter().map(|flow| flow.ledger.counts().unique).sum::<u64>() + self.closed.unique
    }

    /// The streams of runs that are being followed, in the order in which they appeared.
    pub fn flows(&self) -> &[Flow] {
        &self.flows
    }

    /// Flows that were closed to make room for others.
    pub fn flows_closed(&self) -> u64 {
        self.flows_opened - self.flows.len() as u64
    }

    /// SHA-256 over the payloads in order of arrival, surplus and foreign ones left out, in hexadecimal.
    pub fn sha256(&self) -> Option<String> {
        self.digest.as_ref().map(|digest| hex(&digest.clone().finalize()))
    }

    /// What the datagram's headers say, and its place in the digest.
    fn observe(&mut self, datagram: &Datagram) {
        if !self.sources.contains(&datagram.source) {
            if self.sources.len() < MAX_SOURCES {
                self.sources.insert(datagram.source);
            } else {
                self.more_sources = true;
            }
        }
        self.ttl.extend(datagram.ttl);
        self.dscp.extend(datagram.tos.map(|tos| tos >> 2));
        self.ecn.extend(datagram.tos.map(|tos| tos & 0b11));
        if let Some(digest) = &mut self.digest {
            digest.update(datagram.payload);
        }
    }

    fn is_duplicate(&self, probe: &Probe) -> bool {
        use super::sequence::Arrival;
        self.position(probe)
            .is_some_and(|at| self.flows[at].ledger.look_up(probe.sequence) == Arrival::Duplicate)
    }

    fn position(&self, probe: &Probe) -> Option<usize> {
        self.flows.iter().position(|flow| flow.run == probe.run && flow.stream == probe.stream)
    }

    fn enter_sequence(&mut self, probe: &Probe) {
        self.entries += 1;
        if let Some(at) = self.position(probe) {
            let flow = &mut self.flows[at];
            flow.last_heard = self.entries;
            flow.ledger.enter(probe.sequence);
            return;
        }
        if self.flows.len() == MAX_FLOWS {
            self.close_silent();
        }
        self.flows_opened += 1;
        self.flows.push(Flow {
            run: probe.run,
            stream: probe.stream,
            ledger: SequenceLedger::new(probe.sequence),
            last_heard: self.entries,
        });
    }

    fn close_silent(&mut self) {
        let silent = self.flows.iter().enumerate().min_by_key(|(_, flow)| flow.last_heard);
        if let Some((at, _)) = silent {
            self.closed += self.flows.remove(at).ledger.counts();
        }
    }
}

impl Counts {
    /// Raises `lost` to what is missing of `expected`: what never came after the highest, or before the lowest.
    #[must_use]
    pub fn with_expected(mut self, expected: u64) -> Self {
        let missing = expected.saturating_sub(self.sequence.unique);
        self.sequence.lost = self.sequence.lost.max(missing);
        self
    }
}

impl std::ops::AddAssign for Counts {
    fn add_assign(&mut self, other: Self) {
        self.received += other.received;
        self.received_bytes += other.received_bytes;
        self.sequence += other.sequence;
        self.corrupt += other.corrupt;
        self.unreadable += other.unreadable;
        self.foreign += other.foreign;
        self.surplus += other.surplus;
    }
}

/// Bytes in hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn payload(run: u64, stream: u32, sequence: u64) -> Vec<u8> {
        let mut payload = vec![0; 100];
        Probe { run, stream, sequence, sent_ns: 1_000 }.write(&mut payload);
        payload
    }

    fn datagram(payload: &[u8]) -> Datagram<'_> {
        let source = "192.0.2.7:40000".parse().expect("an address");
        Datagram { payload, source, ttl: Some(16), tos: Some(46 << 2 | 1), received_ns: 1_500 }
    }

    /// Enters `payloads` and returns the counts, which must balance.
    fn enter(account: &mut StreamAccount, payloads: &[Vec<u8>], complete: bool) -> Counts {
        for payload in payloads {
            account.enter(&datagram(payload), complete);
        }
        let counts = account.counts();
        let SequenceCounts { unique, duplicates, late, .. } = counts.sequence;
        assert_eq!(counts.received, unique + duplicates + late + counts.unreadable + counts.surplus);
        counts
    }

    #[test]
    fn counts_each_kind_once() {
        let mut damaged = payload(1, 0, 3);
        damaged[50] ^= 1;
        let mut unreadable = payload(1, 0, 4);
        unreadable[30] ^= 1;
        let sent =
            [payload(1, 0, 0), payload(1, 0, 2), payload(1, 0, 2), damaged, unreadable, b"stranger".to_vec()];
        let counts = enter(&mut StreamAccount::new(false), &sent, false);
        assert_eq!((counts.received, counts.received_bytes), (5, 500));
        assert_eq!((counts.corrupt, counts.unreadable, counts.foreign), (2, 1, 1));
        let expected = SequenceCounts { unique: 3, lost: 1, duplicates: 1, reordered: 0, late: 0 };
        assert_eq!(counts.sequence, expected);
    }

    #[test]
    fn a_restarted_generator_is_a_flow_of_its_own() {
        let mut account = StreamAccount::new(false);
        let sent = [payload(1, 0, 0), payload(1, 0, 1), payload(2, 0, 0), payload(2, 0, 1), payload(1, 3, 0)];
        let counts = enter(&mut account, &sent, false);
        assert_eq!((counts.sequence.unique, counts.sequence.lost, counts.sequence.duplicates), (5, 0, 0));
        assert_eq!((account.flows().len(), account.flows_closed()), (3, 0));
    }

    #[test]
    fn closing_the_silent_flow_keeps_its_counts() {
        let mut account = StreamAccount::new(false);
        for run in 0..MAX_FLOWS as u64 + 10 {
            enter(&mut account, &[payload(run, 0, 0), payload(run, 0, 2), payload(run, 0, 2)], false);
        }
        let flows = MAX_FLOWS as u64 + 10;
        let counts = account.counts();
        assert_eq!(
            (counts.sequence.unique, counts.sequence.lost, counts.sequence.duplicates),
            (2 * flows, flows, flows)
        );
        assert_eq!((account.flows().len(), account.flows_closed()), (MAX_FLOWS, 10));
    }

    #[test]
    fn after_the_last_only_duplicates_count() {
        let mut account = StreamAccount::new(true);
        enter(&mut account, &[payload(1, 0, 0), payload(1, 0, 1)], false);
        let digest = account.sha256();
        let counts = enter(&mut account, &[payload(1, 0, 2)], true);
        assert_eq!((counts.surplus, counts.sequence.unique), (1, 2));
        assert_eq!(account.sha256(), digest);
        let counts = enter(&mut account, &[payload(1, 0, 1)], true);
        assert_eq!((counts.surplus, counts.sequence.duplicates), (1, 1));
    }

    #[test]
    fn what_is_missing_of_the_expected_is_lost() {
        let counts = |unique, lost| Counts {
            sequence: SequenceCounts { unique, lost, ..SequenceCounts::default() },
            ..Counts::default()
        };
        assert_eq!(counts(10, 0).with_expected(10).sequence.lost, 0);
        assert_eq!(counts(8, 1).with_expected(10).sequence.lost, 2);
        assert_eq!(counts(10, 3).with_expected(10).sequence.lost, 3);
    }

    #[test]
    fn lists_what_the_headers_say() {
        let mut account = StreamAccount::new(true);
        let sent = payload(1, 0, 0);
        assert_eq!(account.enter(&datagram(&sent), false), Entry::Probe { latency_ns: 500 });
        assert_eq!(account.ttl, BTreeSet::from([16]));
        assert_eq!((account.dscp.clone(), account.ecn.clone()), (BTreeSet::from([46]), BTreeSet::from([1])));
        assert_eq!(account.sha256(), Some(hex(&Sha256::digest(&sent))));
        for port in 1..=MAX_SOURCES as u16 + 1 {
            let source = SocketAddrV4::new([192, 0, 2, 8].into(), port);
            account.enter(&Datagram { source, ..datagram(&sent) }, false);
        }
        assert_eq!((account.sources.len(), account.more_sources), (MAX_SOURCES, true));
    }
}
