//! A survey as metrics: `OpenMetrics`, or Prometheus' own text format. `docs/metrics.md` is their list.

use std::{collections::BTreeMap, fmt, sync::Arc, time::UNIX_EPOCH};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeGaugeValue, prometheus_text, text},
    metrics::MetricType,
    registry::Registry,
};

use super::Survey;
use crate::{
    api::wire::{Health, INTERFACE_DISCARDS, INTERFACE_DROPS, OutputStats, RULE_DROPS, RuleStats},
    worker::ledger::DropReason,
};

pub const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
pub const PROMETHEUS: &str = prometheus_text::CONTENT_TYPE;

const HEALTHS: [(Health, &str); 3] =
    [(Health::Active, "active"), (Health::Pending, "pending"), (Health::Failed, "failed")];

/// The page of a survey.
pub fn page(survey: Arc<Survey>, open_metrics: bool) -> Result<String, fmt::Error> {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(Metrics(survey)));
    let mut page = String::new();
    if open_metrics {
        text::encode(&mut page, &registry)?;
    } else {
        prometheus_text::encode(&mut page, &registry)?;
    }
    Ok(page)
}

#[derive(Debug)]
struct Metrics(Arc<Survey>);

impl Collector for Metrics {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut page = Page(encoder);
        page.daemon(&self.0)?;
        page.rules(&self.0)?;
        page.outputs(&self.0)?;
        page.drops(&self.0)?;
        page.interfaces(&self.0)?;
        page.workers(&self.0)
    }
}

/// Takes a counter out of what has it.
type Count<T> = fn(&T) -> u64;

type Labels<'a, const N: usize> = [(&'static str, &'a str); N];

/// What is written so far.
struct Page<'a>(DescriptorEncoder<'a>);

impl Page<'_> {
    fn gauges<'l, const N: usize, V: EncodeGaugeValue>(
        &mut self,
        name: &str,
        help: &str,
        samples: impl IntoIterator<Item = (Labels<'l, N>, V)>,
    ) -> fmt::Result {
        let mut family = self.0.encode_descriptor(name, help, None, MetricType::Gauge)?;
        samples
            .into_iter()
            .try_for_each(|(labels, value)| family.encode_family(&labels)?.encode_gauge(&value))
    }

    /// Whose name ends with `_total`, beyond `name`.
    fn counters<'l, const N: usize>(
        &mut self,
        name: &str,
        help: &str,
        samples: impl IntoIterator<Item = (Labels<'l, N>, u64)>,
    ) -> fmt::Result {
        let mut family = self.0.encode_descriptor(name, help, None, MetricType::Counter)?;
        samples.into_iter().try_for_each(|(labels, value)| {
            family.encode_family(&labels)?.encode_counter::<Labels<'l, N>, u64, f64>(&value, None)
        })
    }

    /// Whose name ends with `_info`, beyond `name`.
    fn infos<'l, const N: usize>(
        &mut self,
        name: &str,
        help: &str,
        samples: impl IntoIterator<Item = Labels<'l, N>>,
    ) -> fmt::Result {
        let mut family = self.0.encode_descriptor(name, help, None, MetricType::Info)?;
        samples.into_iter().try_for_each(|labels| family.encode_info(&labels))
    }

    fn daemon(&mut self, survey: &Survey) -> fmt::Result {
        let Survey { stats, health, memberships, .. } = survey;
        self.infos("mcr_build", "The version of mcr", [[("version", env!("CARGO_PKG_VERSION"))]])?;
        let start = seconds(&stats.since).map(|start| ([], start));
        self.gauges("mcr_start_time_seconds", "When the daemon started, in seconds since 1970", start)?;
        let states = HEALTHS.map(|(state, name)| ([("state", name)], u64::from(*health == state)));
        self.gauges("mcr_health", "Whether the daemon is in this state, as in mcr status", states)?;
        let alarms = [([], stats.alarms.len())];
        self.gauges("mcr_ledger_alarms", "Equations of the ledger that do not hold", alarms)?;
        let memberships = memberships.iter().map(|(name, count)| ([("interface", name.as_str())], *count));
        self.gauges("mcr_memberships", "Groups, and sources of groups, that are joined", memberships)
    }

    fn rules(&mut self, survey: &Survey) -> fmt::Result {
        let Survey { stats, rules, .. } = survey;
        let infos = stats.rules.iter().map(|rule| {
            let datapath = rule.datapath.as_deref().unwrap_or_default();
            [
                ("rule", &rule.name[..]),
                ("datapath", datapath),
                ("origin", &rule.origin),
                ("input", &rule.input),
            ]
        });
        self.infos("mcr_rule", "What a rule is; no datapath while there is none", infos)?;
        let states = rules.iter().flat_map(|rule| {
            HEALTHS.map(|(state, name)| {
                ([("rule", &rule.name[..]), ("state", name)], u64::from(rule.health == state))
            })
        });
        self.gauges("mcr_rule_state", "Whether a rule is in this state, as in mcr rule list", states)?;
        let stalled = rules.iter().zip(&stats.rules).map(|(rule, stats)| {
            ([("rule", &rule.name[..])], u64::from(rule.health == Health::Active && stats.stalled))
        });
        self.gauges(
            "mcr_rule_stalled",
            "Whether an active rule that had datagrams has none any more",
            stalled,
        )?;
        let last = stats
            .rules
            .iter()
            .filter_map(|rule| Some(([("rule", &rule.name[..])], seconds(rule.last_seen.as_deref()?)?)));
        self.gauges(
            "mcr_rule_last_packet_timestamp_seconds",
            "When a rule's last datagram came, in seconds since 1970; none before the first",
            last,
        )?;
        for (name, help, count) in [
            (
                "mcr_rule_matched_packets",
                "Datagrams of a rule that were seen on the wire",
                (|rule| rule.matched) as Count<RuleStats>,
            ),
            ("mcr_rule_received_packets", "Datagrams of a rule that were taken in", |rule| rule.received),
            ("mcr_rule_received_bytes", "Their UDP payload", |rule| rule.received_bytes),
        ] {
            let counts = stats.rules.iter().map(|rule| ([("rule", &rule.name[..])], count(rule)));
            self.counters(name, help, counts)?;
        }
        Ok(())
    }

    fn outputs(&mut self, survey: &Survey) -> fmt::Result {
        let up = survey.rules.iter().flat_map(|rule| {
            rule.outputs
                .iter()
                .map(|output| (of_output(&rule.name, &output.to), u64::from(output.health == Health::Active)))
        });
        self.gauges("mcr_output_up", "Whether an output sends what it is handed", up)?;
        for (name, help, count) in [
            (
                "mcr_output_received_packets",
                "Datagrams that a rule handed to an output",
                (|output| output.received) as Count<OutputStats>,
            ),
            ("mcr_output_sent_packets", "Datagrams of an output that the kernel accepted", |output| {
                output.sent
            }),
            ("mcr_output_sent_bytes", "Their UDP payload", |output| output.sent_bytes),
        ] {
            let counts = survey.stats.rules.iter().flat_map(|rule| {
                let outputs = rule.outputs.iter();
                outputs.map(move |output| (of_output(&rule.name, &output.to), count(output)))
            });
            self.counters(name, help, counts)?;
        }
        Ok(())
    }

    /// All reasons are there from the start: what comes up at one is no increase to Prometheus.
    fn drops(&mut self, survey: &Survey) -> fmt::Result {
        let drops = survey.stats.rules.iter().flat_map(|rule| {
            let of_rule = RULE_DROPS.into_iter().map(|reason| ("", reason, count(&rule.dropped, reason)));
            let of_outputs = rule.outputs.iter().flat_map(|output| {
                let reasons = DropReason::ALL.iter().map(|reason| reason.name()).chain([DropReason::SKIPPED]);
                reasons.map(|reason| (&output.to[..], reason, count(&output.dropped, reason)))
            });
            of_rule.chain(of_outputs).map(|(output, reason, count)| {
                ([("rule", &rule.name[..]), ("output", output), ("reason", reason)], count)
            })
        });
        self.counters("mcr_drops", "Datagrams dropped; no output where it was before any", drops)
    }

    fn interfaces(&mut self, survey: &Survey) -> fmt::Result {
        let interfaces = || {
            let all = survey.stats.interfaces.iter();
            all.map(|its| (its, [("interface", &its.name[..]), ("datapath", &its.datapath[..])]))
        };
        let steered = interfaces().map(|(its, labels)| (labels, count(&its.verdicts, "steered")));
        self.counters("mcr_interface_steered_frames", "Frames given to the workers' sockets", steered)?;
        let received = interfaces().map(|(its, labels)| (labels, its.received));
        self.counters("mcr_interface_received_frames", "Frames that the workers took out", received)?;
        let drops = interfaces().flat_map(|(its, [interface, datapath])| {
            INTERFACE_DROPS
                .map(|reason| ([interface, datapath, ("reason", reason)], count(&its.dropped, reason)))
        });
        self.counters("mcr_interface_drops", "Frames that the workers' sockets lost", drops)?;
        let discards = interfaces().flat_map(|(its, [interface, datapath])| {
            INTERFACE_DISCARDS
                .map(|reason| ([interface, datapath, ("reason", reason)], count(&its.discarded, reason)))
        });
        self.counters(
            "mcr_interface_discarded_frames",
            "Frames taken out, and relayed by no rule",
            discards,
        )?;
        let frames = interfaces().flat_map(|(its, [interface, datapath])| {
            let verdicts = its.verdicts.iter();
            verdicts.map(move |(verdict, count)| ([interface, datapath, ("verdict", verdict)], *count))
        });
        self.counters("mcr_interface_frames", "Frames by what mcr's program made of them", frames)?;
        let losses = survey.stats.devices.iter().flat_map(|device| {
            let levels = [("link", &device.link), ("qdisc", &device.qdisc), ("driver", &device.driver)];
            levels.into_iter().flat_map(move |(level, counters)| {
                counters.iter().map(move |(counter, count)| {
                    ([("device", &device.name[..]), ("level", level), ("counter", counter)], *count)
                })
            })
        });
        self.counters("mcr_device_losses", "What a device lost, by names of kernel and driver", losses)
    }

    fn workers(&mut self, survey: &Survey) -> fmt::Result {
        let workers = || survey.stats.workers.iter().map(|worker| (worker, [("worker", &worker.id[..])]));
        let up = workers().map(|(worker, labels)| (labels, u64::from(worker.pid.is_some())));
        self.gauges("mcr_worker_up", "Whether a worker runs", up)?;
        let restarts = workers().map(|(worker, labels)| (labels, worker.restarts));
        self.counters("mcr_worker_restarts", "How often a worker ended and was to run again", restarts)?;
        let received = workers().map(|(worker, labels)| (labels, worker.received));
        self.counters("mcr_worker_received_frames", "Frames that a worker took out of its sockets", received)
    }
}

fn of_output<'a>(rule: &'a str, output: &'a str) -> Labels<'a, 2> {
    [("rule", rule), ("output", output)]
}

/// A count that is absent where it is 0.
fn count(counts: &BTreeMap<String, u64>, name: &str) -> u64 {
    counts.get(name).copied().unwrap_or_default()
}

/// A time of the control protocol in seconds since 1970.
fn seconds(time: &str) -> Option<f64> {
    let time = humantime::parse_rfc3339(time).ok()?;
    Some(time.duration_since(UNIX_EPOCH).ok()?.as_secs_f64())
}
