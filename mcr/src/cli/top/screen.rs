//! What a [`Model`] looks like at a size: pure.

use std::{fmt::Write, time::Duration};

use ratatui::{
    Frame,
    layout::{Constraint, Layout, Rect},
    style::{Color, Modifier, Style, Stylize},
    symbols::bar::NINE_LEVELS,
    text::{Line, Span},
    widgets::Paragraph,
};

use super::model::{Model, Row, Sample, Sort, State, Worker};
use crate::{
    api::wire::Health,
    cli::{
        status::verdict,
        text::{count, plural, rate, si, total},
    },
};

/// Least height of the screen that has more than rules.
const ROOM_FOR_MORE: u16 = 14;

/// Rules that there is room for.
pub fn page(area: Rect, model: &Model) -> usize {
    let [_, rules, ..] = split(area, model).0;
    usize::from(rules.height.saturating_sub(1))
}

pub fn draw(frame: &mut Frame, model: &Model) {
    let ([head, rules, more, foot], lines) = split(frame.area(), model);
    frame.render_widget(Paragraph::new(header(model, frame.area())), head);
    frame.render_widget(Paragraph::new(table(model, rules)), rules);
    frame.render_widget(Paragraph::new(lines), more);
    frame.render_widget(Paragraph::new(footer(model)), foot);
}

/// Where everything goes, and what stands below the rules.
fn split(area: Rect, model: &Model) -> ([Rect; 4], Vec<Line<'_>>) {
    let head = header(model, area).len() as u16;
    let below = if area.height >= ROOM_FOR_MORE { below(model) } else { Vec::new() };
    // The rules have half of what there is, if they need it.
    let room = area.height.saturating_sub(head + 1);
    let needed = model.rows.len().saturating_add(1).min(usize::from(room / 2)) as u16;
    let height = (below.len() as u16).min(room - needed);
    let parts = [head, room - height, height, 1].map(Constraint::Length);
    (Layout::vertical(parts).areas(area), below)
}

fn red() -> Style {
    Style::new().fg(Color::Red).add_modifier(Modifier::BOLD)
}

fn header(model: &Model, area: Rect) -> Vec<Line<'_>> {
    let Some(Sample { status, stats, .. }) = &model.last else { return Vec::new() };
    let colour = match status.health {
        _ if model.lost.is_some() => Color::Red,
        Health::Active => Color::Green,
        Health::Pending => Color::Yellow,
        Health::Failed => Color::Red,
    };
    let title = format!("mcr {}", status.version);
    let verdict = match &model.lost {
        Some(_) => "is gone; looking for it",
        None => verdict(status),
    };
    let up = format!("up {}, pid {}", uptime(&status.since, &status.time), status.pid);
    let used = title.len() + 1 + verdict.len() + up.len();
    let gap = usize::from(area.width).saturating_sub(used).max(2);
    let rules = &status.rules;
    let mut counts = format!("rules {}", count(rules.total.into()));
    for (number, what) in [(rules.failed, "failed"), (rules.pending, "pending"), (rules.stalled, "stalled")] {
        if number > 0 {
            let _ = write!(counts, ", {number} {what}");
        }
    }
    let drops = model.drop_rate();
    let received = model.received_bps.map_or_else(|| "-".to_owned(), |bps| si(bps, "b/s"));
    let mut lines = vec![
        Line::from(vec![
            title.bold(),
            " ".into(),
            Span::styled(verdict, Style::new().fg(colour).add_modifier(Modifier::BOLD)),
            " ".repeat(gap).into(),
            up.into(),
        ]),
        Line::from(vec![
            format!("in {} {received}  ", rate(status.received_pps)).into(),
            format!("out {} {}  ", rate(status.sent_pps), si(status.sent_bps, "b/s")).into(),
            Span::styled(format!("drops {}", rate(drops)), if drops > 0.0 { red() } else { Style::new() }),
        ]),
    ];
    if area.height >= ROOM_FOR_MORE {
        lines.push(Line::from(format!(
            "{counts}  workers {}/{}, {} restart{}",
            status.workers_running,
            status.workers_total,
            count(status.worker_restarts),
            plural(usize::try_from(status.worker_restarts).unwrap_or(usize::MAX)),
        )));
    }
    if let Some(why) = &model.lost {
        lines.push(Line::styled(why.as_str(), red()));
    }
    if let Some(alarm) = stats.alarms.first() {
        let more = stats.alarms.len() - 1;
        let more = if more > 0 { format!(" (and {more} more)") } else { String::new() };
        lines.push(Line::styled(format!("! {}{more}", alarm.what), red()));
    }
    lines
}

/// `3h 12m`: the two largest units.
fn uptime(since: &str, now: &str) -> String {
    let parsed = humantime::parse_rfc3339(since).ok().zip(humantime::parse_rfc3339(now).ok());
    let Some(up) = parsed.and_then(|(since, now)| now.duration_since(since).ok()) else {
        return "-".to_owned();
    };
    let text = humantime::format_duration(Duration::from_secs(up.as_secs())).to_string();
    text.split(' ').take(2).collect::<Vec<_>>().join(" ")
}

/// A column of the rules.
struct Column<'a> {
    head: &'static str,
    width: usize,
    right: bool,
    cell: Box<dyn Fn(&Row) -> String + 'a>,
}

fn column<'a>(
    head: &'static str,
    width: usize,
    right: bool,
    cell: impl Fn(&Row) -> String + 'a,
) -> Column<'a> {
    Column { head, width, right, cell: Box::new(cell) }
}

/// What there is room for, least needed last to come.
fn columns(model: &Model, width: usize) -> Vec<Column<'_>> {
    let longest = model.rows.iter().map(|row| row.name.len()).max().unwrap_or(0);
    let mut name = longest.clamp(4, 16).min(width);
    let (mut spark, mut worst) = (0, 0);
    let mut left = width - name;
    let mut fits = |needed: usize| {
        let fits = left > needed;
        left -= if fits { needed + 1 } else { 0 };
        fits
    };
    let [received, dropped, sent, state] = [fits(9), fits(9), fits(9), fits(7)];
    spark += if fits(12) { 12 } else { 0 };
    worst += if fits(10) { 10 } else { 0 };
    let mut widen = |column: &mut usize, most: usize| {
        if *column > 0 {
            let more = most.saturating_sub(*column).min(left);
            *column += more;
            left -= more;
        }
    };
    widen(&mut worst, 16);
    widen(&mut name, longest.min(24));
    widen(&mut spark, model.minute);
    widen(&mut name, longest);
    let mut columns = vec![column("RULE", name, false, |row| row.name.clone())];
    let mut push = |is_there: bool, column| columns.extend(is_there.then_some(column));
    push(state, column("STATE", 7, false, |row| word(row.state).to_owned()));
    push(received, column("IN", 9, true, |row| rate(row.received_pps)));
    push(sent, column("OUT", 9, true, |row| rate(row.sent_pps)));
    push(spark > 0, column("LAST MINUTE", spark, false, move |row| sparkline(row, model.minute, spark)));
    push(dropped, column("DROPS", 9, true, |row| rate(row.dropped().rate)));
    push(
        worst > 0,
        column("WORST", worst, false, |row| {
            row.reasons().first().map(|(reason, _)| (*reason).to_owned()).unwrap_or_default()
        }),
    );
    columns
}

fn word(state: State) -> &'static str {
    match state {
        State::Active => "active",
        State::Stalled => "stalled",
        State::Pending => "pending",
        State::Failed => "failed",
    }
}

/// The last minute, as high as the highest of it; where there is no room for every look, the highest of some.
fn sparkline(row: &Row, minute: usize, width: usize) -> String {
    const BARS: [&str; 9] = [
        " ",
        NINE_LEVELS.one_eighth,
        NINE_LEVELS.one_quarter,
        NINE_LEVELS.three_eighths,
        NINE_LEVELS.half,
        NINE_LEVELS.five_eighths,
        NINE_LEVELS.three_quarters,
        NINE_LEVELS.seven_eighths,
        NINE_LEVELS.full,
    ];
    let looks: Vec<_> = row.history.iter().copied().collect();
    let highest = |looks: &[f64]| looks.iter().copied().fold(0.0, f64::max);
    let most = highest(&looks);
    // Little is more than nothing at all.
    let bar = |value: f64| if most > 0.0 { BARS[((value / most * 8.0).ceil() as usize).min(8)] } else { " " };
    let bars: Vec<_> = looks.rchunks(minute.div_ceil(width)).map(|some| bar(highest(some))).collect();
    bars.into_iter().rev().collect()
}

fn cut(text: &str, width: usize) -> String {
    text.chars().take(width).collect()
}

fn table(model: &Model, area: Rect) -> Vec<Line<'_>> {
    let columns = columns(model, area.width.into());
    let line = |cell: &dyn Fn(&Column) -> String| {
        let cells = columns.iter().map(|column| {
            let (text, width) = (cut(&cell(column), column.width), column.width);
            if column.right { format!("{text:>width$}") } else { format!("{text:<width$}") }
        });
        cells.collect::<Vec<_>>().join(" ")
    };
    let mut lines = vec![Line::styled(line(&|column| column.head.to_owned()), Modifier::BOLD)];
    let shown = model.shown();
    let (place, page) = (model.place(&shown), usize::from(area.height.saturating_sub(1)).max(1));
    let first = place / page * page;
    for (index, row) in shown.iter().enumerate().skip(first).take(page) {
        let mut style = match row.state {
            State::Failed => Style::new().fg(Color::Red),
            State::Pending | State::Stalled => Style::new().fg(Color::Yellow),
            State::Active if row.dropped().rate > 0.0 => Style::new().fg(Color::Magenta),
            State::Active => Style::new(),
        };
        if index == place {
            style = style.add_modifier(Modifier::REVERSED);
        }
        if model.lost.is_some() {
            style = style.add_modifier(Modifier::DIM);
        }
        lines.push(Line::styled(line(&|column| (column.cell)(row)), style));
    }
    if shown.is_empty() {
        let why = if model.rows.is_empty() {
            "no rules: add one with `mcr rule add`".to_owned()
        } else {
            format!("none of {} rules has '{}' in it", model.rows.len(), model.filter)
        };
        lines.push(Line::from(why));
    }
    lines
}

/// The rule that is looked at, workers, and interfaces that lost something.
fn below(model: &Model) -> Vec<Line<'_>> {
    let mut lines = Vec::new();
    let shown = model.shown();
    if let Some(row) = shown.get(model.place(&shown)) {
        lines.push(Line::default());
        lines.extend(rule(row));
    }
    if !model.workers.is_empty() {
        lines.push(Line::default());
        let head = format!(
            "{:<18} {:>6} {:>3} {:<10} {:>9} {:>8}",
            "WORKER", "CPU", "ON", "QUEUES", "RATE", "RESTARTS"
        );
        lines.push(Line::styled(head, Modifier::BOLD));
        lines.extend(model.workers.iter().map(worker));
    }
    let losses = losses(model);
    if !losses.is_empty() {
        lines.push(Line::default());
        lines.push(Line::styled("INTERFACE  LOST", Modifier::BOLD));
        lines.extend(losses);
    }
    lines
}

fn rule(row: &Row) -> Vec<Line<'_>> {
    let by = row.datapath.as_deref().map(|datapath| format!(" by {datapath}")).unwrap_or_default();
    let outputs = match &row.outputs[..] {
        [output] => output.clone(),
        outputs => format!("{} outputs", outputs.len()),
    };
    let mut lines =
        vec![Line::from(vec![row.name.as_str().bold(), format!(": {} -> {outputs}{by}", row.input).into()])];
    if let Some(reason) = &row.reason {
        lines.push(Line::styled(format!("  {}: {reason}", word(row.state)), Color::Yellow));
    }
    let drops = row.reasons().into_iter().map(|(reason, drops)| {
        let style = if drops.rate > 0.0 { red() } else { Style::new() };
        Line::styled(
            format!("  {:<18} {:>9}, {} in all", reason, rate(drops.rate), count(drops.total)),
            style,
        )
    });
    lines.extend(drops);
    lines
}

fn worker(Worker { info, cpu }: &Worker) -> Line<'_> {
    let cpu = cpu.map_or_else(|| "-".to_owned(), |cpu| format!("{cpu:.1} %"));
    let on = info.cpu.map_or_else(|| "-".to_owned(), |cpu| cpu.to_string());
    let queues: Vec<_> = info.queues.iter().map(ToString::to_string).collect();
    let queues = if queues.is_empty() { "-".to_owned() } else { cut(&queues.join(","), 10) };
    let text = format!(
        "{:<18} {cpu:>6} {on:>3} {queues:<10} {:>9} {:>8}",
        info.id,
        rate(info.received_pps),
        count(info.restarts)
    );
    match (&info.pid, &info.last_exit) {
        (None, Some(why)) => Line::styled(format!("{text}  {}: {why}", info.state), red()),
        (None, None) => Line::styled(format!("{text}  {}", info.state), red()),
        (Some(_), Some(why)) => Line::from(format!("{text}  last: {why}")),
        (Some(_), None) => Line::from(text),
    }
}

fn losses(model: &Model) -> Vec<Line<'_>> {
    let Some(Sample { stats, .. }) = &model.last else { return Vec::new() };
    let text = |name: &str, by: &str, counters: &std::collections::BTreeMap<String, u64>| {
        let counters = counters.iter().filter(|(_, count)| **count > 0);
        let all: Vec<_> = counters.map(|(what, number)| format!("{} {what}", count(*number))).collect();
        Line::from(format!("{name:<10} {by}: {}", all.join(", ")))
    };
    let sockets = stats.interfaces.iter().flat_map(|interface| {
        [(&interface.datapath, &interface.dropped)].map(|(by, lost)| (&interface.name, by.as_str(), lost))
    });
    let devices = stats.devices.iter().flat_map(|device| {
        [("link", &device.link), ("qdisc", &device.qdisc), ("driver", &device.driver)]
            .map(|(level, lost)| (&device.name, level, lost))
    });
    let all = sockets.chain(devices).filter(|(_, _, lost)| total(lost) > 0);
    all.map(|(name, by, lost)| text(name, by, lost)).collect()
}

fn footer(model: &Model) -> Line<'_> {
    if model.editing {
        return Line::from(vec!["/".bold(), model.filter.as_str().into(), "_".into()]);
    }
    let by = match model.sort {
        Sort::Rate => "rate",
        Sort::Drops => "drops",
        Sort::Name => "name",
    };
    let mut text = format!("q quit  / filter  r d n sort (by {by})");
    if !model.filter.is_empty() {
        text = format!("only '{}', Esc shows all  {text}", model.filter);
    }
    Line::styled(text, Modifier::DIM)
}
