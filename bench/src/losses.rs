//! Where datagrams went that did not arrive: the counters of both ends of each cable, of sockets, and the
//! relay's own ledger.

use std::{collections::BTreeMap, thread, time::Duration};

use anyhow::{Context as _, Result};
use mcr::api::wire::Stats;
use serde::Serialize;
use tests::Namespace;

use crate::{
    site::{EGRESS, INGRESS, SINK, SOURCE, Site},
    systems::Running,
};

/// `expected = delivered + lost + unexplained`, in datagrams that should have arrived.
#[derive(Clone, Debug, Serialize)]
pub struct Account {
    /// Frames sent, times outputs.
    pub expected: u64,
    pub delivered: u64,
    /// By where and why.
    pub lost: BTreeMap<String, u64>,
    pub unexplained: i64,
}

impl Account {
    /// Draws up the account of everything since the site was built. Nothing must be in flight.
    pub fn draw_up(site: &Site, running: &Running, sent: u64, delivered: u64, outputs: u32) -> Result<Self> {
        let outputs = u64::from(outputs);
        let relay = &site.relay().host;
        let mut lost = BTreeMap::new();
        // A veth counts on the sender's end what did not fit the other end's ring; what XDP redirects is
        // counted on both.
        let source = Dropped::of(&site.source, SOURCE)?;
        let ingress = Dropped::of(relay, INGRESS)?;
        let egress = Dropped::of(relay, EGRESS)?;
        let sink = Dropped::of(&site.sink, SINK)?;
        lost.insert(format!("{SOURCE} full ring of {INGRESS}"), source.sending * outputs);
        lost.insert(format!("{EGRESS} full ring of {SINK}"), egress.sending);
        lost.insert(SINK.to_owned(), sink.receiving.saturating_sub(egress.sending));
        if let Some(daemon) = &running.daemon {
            ledger(&balanced(|| daemon.stats())?, outputs, &mut lost);
        } else {
            lost.insert(INGRESS.to_owned(), ingress.receiving.saturating_sub(source.sending) * outputs);
            lost.insert("receive buffers".to_owned(), receive_buffer_errors(relay)?);
        }
        lost.retain(|_, count| *count > 0);
        let expected = sent * outputs;
        let accounted = delivered + lost.values().sum::<u64>();
        Ok(Self { expected, delivered, lost, unexplained: expected.cast_signed() - accounted.cast_signed() })
    }
}

/// The statistics once the ledger balances, or after some tries as they are.
fn balanced(stats: impl Fn() -> Result<Stats>) -> Result<Stats> {
    let mut latest = stats()?;
    for _ in 0..20 {
        let balances = latest.interfaces.iter().all(|interface| {
            let steered = interface.verdicts.get("steered").copied().unwrap_or(0);
            steered == interface.received + interface.dropped.values().sum::<u64>()
        });
        if balances {
            break;
        }
        thread::sleep(Duration::from_millis(50));
        latest = stats()?;
    }
    Ok(latest)
}

/// What the relay says that it lost, each in datagrams that did not leave.
fn ledger(stats: &Stats, outputs: u64, lost: &mut BTreeMap<String, u64>) {
    let mut add = |reason: &str, count: u64| *lost.entry(format!("mcr {reason}")).or_default() += count;
    for interface in &stats.interfaces {
        for (reason, count) in interface.dropped.iter().chain(&interface.discarded) {
            add(reason, count * outputs);
        }
    }
    for rule in &stats.rules {
        rule.dropped.iter().for_each(|(reason, count)| add(reason, count * outputs));
        for output in &rule.outputs {
            output.dropped.iter().for_each(|(reason, &count)| add(reason, count));
        }
    }
}

struct Dropped {
    sending: u64,
    receiving: u64,
}

impl Dropped {
    fn of(host: &Namespace, interface: &str) -> Result<Self> {
        let shown = host.json("ip", &["-j", "-s", "link", "show", "dev", interface]);
        let dropped = |direction: &str| {
            let number = shown.pointer(&format!("/0/stats64/{direction}/dropped"));
            number.and_then(serde_json::Value::as_u64).with_context(|| format!("statistics of {interface}"))
        };
        Ok(Self { sending: dropped("tx")?, receiving: dropped("rx")? })
    }
}

/// Datagrams that found no room in a socket.
fn receive_buffer_errors(host: &Namespace) -> Result<u64> {
    let text = host.proc_net("snmp");
    let mut lines = text.lines().filter_map(|line| line.strip_prefix("Udp:"));
    let (names, values) = lines.next().zip(lines.next()).context("counters of UDP")?;
    let mut counters = names.split_whitespace().zip(values.split_whitespace());
    let (_, errors) = counters.find(|(name, _)| *name == "RcvbufErrors").context("RcvbufErrors")?;
    errors.parse().context("a counter")
}
