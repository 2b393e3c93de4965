//! What a run found, for people: tables; and for programs: JSON.

use std::{collections::BTreeMap, fs, path::Path, process::Command, time::SystemTime};

use anyhow::{Context as _, Result};
use comfy_table::{CellAlignment, Table, presets};
use mcr::api::wire;
use serde::Serialize;

use crate::{
    cases::Case,
    cpu,
    figures::{DELIVERED, Figure, Figures, Subject, Unit},
    systems::System,
    targets::{self, Finding, Judgement, Verdict},
};

/// What the figures hold for.
#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    pub kernel: String,
    pub cpu: String,
    pub cpus: usize,
    pub date: String,
    pub commit: String,
    pub quick: bool,
    /// CPUs of two that others kept busy before anything was measured.
    pub others_busy: f64,
    /// Of the relay's CPU, before anything was measured.
    pub stalls: cpu::Stalls,
}

impl Machine {
    pub fn this(quick: bool, others_busy: f64, stalls: cpu::Stalls) -> Self {
        let read = |path| fs::read_to_string(path).unwrap_or_default();
        let cpu_info = read("/proc/cpuinfo");
        let model = cpu_info.lines().find(|line| line.starts_with("model name"));
        Self {
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            cpu: model.and_then(|line| line.split_once(": ")).map_or("", |(_, model)| model).to_owned(),
            cpus: std::thread::available_parallelism().map_or(0, usize::from),
            date: wire::timestamp(SystemTime::now()),
            commit: commit().unwrap_or_default(),
            quick,
            others_busy,
            stalls,
        }
    }
}

/// The commit of the sources, with `-dirty` where they differ from it.
fn commit() -> Option<String> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    // Root looks at a repository that is the user's.
    let safe = format!("safe.directory={}", folder.parent()?.display());
    let mut git = Command::new("git");
    git.arg("-C").arg(folder).args(["-c", &safe, "describe", "--always", "--dirty", "--abbrev=12"]);
    let output = git.output().ok().filter(|output| output.status.success())?;
    Some(String::from_utf8(output.stdout).ok()?.trim().to_owned())
}

#[derive(Serialize)]
struct Results<'a> {
    schema: u32,
    machine: &'a Machine,
    methods: BTreeMap<String, &'static str>,
    #[serde(flatten)]
    figures: &'a Figures,
    targets: Vec<Judgement>,
}

pub fn write_json(folder: &Path, machine: &Machine, cases: &[Case], figures: &Figures) -> Result<()> {
    let methods = cases.iter().map(|case| (case.name(), case.method())).collect();
    let results = Results { schema: 1, machine, methods, figures, targets: targets::judge(figures) };
    let path = folder.join("results.json");
    let json = serde_json::to_string_pretty(&results)? + "\n";
    fs::write(&path, json).with_context(|| path.display().to_string())
}

/// The table of a case: a row for each system and variant, a column for each metric.
pub fn table(case: &str, figures: &Figures) -> String {
    let figures_of_case: Vec<_> = figures.figures.iter().filter(|figure| figure.case == case).collect();
    let mut metrics = Vec::new();
    let mut rows: Vec<Subject<'_>> = Vec::new();
    for figure in &figures_of_case {
        if !metrics.contains(&figure.metric) {
            metrics.push(figure.metric);
        }
        if !rows.iter().any(|row| row.variant == figure.variant && row.system == figure.system) {
            rows.push(Subject { case: figure.case, variant: &figure.variant, system: figure.system });
        }
    }
    let against: Vec<_> = [System::Socat, System::KernelRouting, System::Ceiling]
        .into_iter()
        .filter(|system| {
            figures_of_case.iter().any(|figure| figure.system == system.name() && figure.metric == DELIVERED)
        })
        .collect();
    let mut header = vec![case.to_uppercase(), "SYSTEM".to_owned()];
    header.extend(metrics.iter().map(|metric| metric.name.to_uppercase()));
    header.extend(against.iter().map(|system| format!("x {}", system.name().to_uppercase())));
    let mut previous = "";
    let cells = rows.iter().map(|&row| {
        let variant = if row.variant == previous { "" } else { row.variant };
        previous = row.variant;
        let mut cells = vec![variant.to_owned(), row.system.to_owned()];
        for metric in &metrics {
            cells.push(figures.get(row, metric.name).map_or_else(String::new, cell));
        }
        for system in &against {
            let ratio = ratio(figures, row, system.name());
            cells.push(ratio.map_or_else(String::new, |ratio| format!("{ratio:.2}")));
        }
        cells
    });
    aligned(header, cells.collect(), 2)
}

/// The targets that this run has figures for; none if there are none.
pub fn targets(figures: &Figures) -> Option<String> {
    let judged = targets::judge(figures);
    let cells = |finding: Option<&Finding>| {
        finding.map_or([const { String::new() }; 3], |Finding { promised, found, verdict }| {
            let verdict = match verdict {
                Verdict::Met => "met",
                Verdict::NotMet => "NOT MET",
                Verdict::NotTried => "not tried",
            };
            [promised.clone(), found.clone(), verdict.to_owned()]
        })
    };
    let rows = judged.iter().map(|Judgement { what, must, aim }| {
        let mut row = vec![(*what).to_owned()];
        row.extend(cells(must.as_ref()));
        row.extend(cells(aim.as_ref()));
        row
    });
    let header = ["TARGET", "MUST", "FOUND", "", "AIM", "FOUND", ""].map(str::to_owned);
    (!judged.is_empty()).then(|| aligned(header.to_vec(), rows.collect(), 1))
}

/// A table without borders; columns from `right` on are numbers.
fn aligned(header: Vec<String>, rows: Vec<Vec<String>>, right: usize) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(header).add_rows(rows);
    for (index, column) in table.column_iter_mut().enumerate() {
        column.set_padding((0, 2));
        if index >= right {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table.trim_fmt()
}

/// Delivered by a system as a multiple of what another delivered in the same variant.
fn ratio(figures: &Figures, row: Subject<'_>, other: &'static str) -> Option<f64> {
    let own = figures.get(row, DELIVERED.name)?;
    let other = figures.get(Subject { system: other, ..row }, DELIVERED.name)?;
    Some(own.median / other.median)
}

/// `1.32 M/s (1.28..1.35)`.
fn cell(figure: &Figure) -> String {
    let unit = figure.metric.unit;
    let median = number(figure.median, unit);
    if figure.samples.len() == 1 { median } else { format!("{median} ({})", spread(figure)) }
}

fn spread(figure: &Figure) -> String {
    let unit = figure.metric.unit;
    let (min, max) = (number(figure.min, unit), number(figure.max, unit));
    let common = max.rsplit_once(' ').map_or("", |(_, unit)| unit);
    let min = min.strip_suffix(common).map_or(min.as_str(), str::trim_end);
    format!("{min}..{}", max.strip_suffix(common).map_or(max.as_str(), str::trim_end))
}

pub fn number(value: f64, unit: Unit) -> String {
    match unit {
        Unit::PerSecond if value >= 999_500.0 => format!("{:.2} M/s", value / 1e6),
        Unit::PerSecond if value >= 999.5 => format!("{:.0} k/s", value / 1e3),
        Unit::PerSecond => format!("{value:.0} /s"),
        Unit::Microseconds if value >= 1e5 => format!("{:.0} ms", value / 1e3),
        Unit::Microseconds if value < 99.5 => format!("{value:.1} us"),
        Unit::Microseconds => format!("{value:.0} us"),
        Unit::Milliseconds => format!("{value:.1} ms"),
        Unit::Percent if value > 0.0 && value < 0.1 => format!("{value:.3} %"),
        Unit::Percent => format!("{value:.1} %"),
        Unit::Megabytes => format!("{value:.1} MB"),
        Unit::Datagrams => format!("{value:.0}"),
        Unit::Times => format!("{value:.2} x"),
    }
}
