//! Text for people: tables, numbers, rates. Pure but for the width of the terminal.

use std::collections::BTreeMap;

use comfy_table::{CellAlignment, ContentArrangement, Table, presets};

use crate::api::wire::Health;
pub use crate::api::wire::count;

/// Width of text where there is no terminal to ask.
const DEFAULT_WIDTH: u16 = 100;

/// Columns of the terminal on stdout.
pub fn width() -> u16 {
    console::Term::stdout().size_checked().map_or(DEFAULT_WIDTH, |(_, columns)| columns.max(40))
}

/// A table without borders, at most `width` columns wide.
pub fn table(width: u16, header: &[&str], right: &[usize], rows: Vec<Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_content_arrangement(ContentArrangement::Dynamic).set_width(width);
    if !header.is_empty() {
        table.set_header(header.to_vec());
    }
    table.add_rows(rows);
    for (index, column) in table.column_iter_mut().enumerate() {
        column.set_padding((0, 2));
        if right.contains(&index) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    let mut text = table.trim_fmt();
    text.push('\n');
    text
}

/// `9.8 Mb/s`: three digits or so, a decimal prefix, the unit.
pub fn si(value: f64, unit: &str) -> String {
    let mut scaled = value.max(0.0);
    if scaled < 999.5 {
        let decimals = usize::from(scaled < 9.95 && scaled.fract() > 0.0);
        return format!("{scaled:.decimals$} {unit}");
    }
    for prefix in ["k", "M", "G", "T"] {
        scaled /= 1000.0;
        if scaled < 999.95 {
            return format!("{scaled:.1} {prefix}{unit}");
        }
    }
    format!("{scaled:.0} T{unit}")
}

/// Datagrams a second.
pub fn rate(pps: f64) -> String {
    si(pps, "/s")
}

#[expect(clippy::cast_precision_loss, reason = "three digits of it are shown")]
pub fn bytes(number: u64) -> String {
    si(number as f64, "B")
}

/// Sum of drops.
pub fn total(dropped: &BTreeMap<String, u64>) -> u64 {
    dropped.values().fold(0, |sum, &count| sum.saturating_add(count))
}

/// `3 queue_full`, most first, one a line; `0` if there are none.
pub fn reasons(dropped: &BTreeMap<String, u64>) -> String {
    let mut reasons: Vec<_> = dropped.iter().filter(|&(_, &count)| count > 0).collect();
    reasons.sort_by_key(|&(_, &count)| std::cmp::Reverse(count));
    if reasons.is_empty() {
        return "0".to_owned();
    }
    let lines: Vec<_> =
        reasons.iter().map(|&(reason, &number)| format!("{} {reason}", count(number))).collect();
    lines.join("\n")
}

/// `active`, or `pending: eth1 is down`.
pub fn health(health: Health, reason: Option<&str>) -> String {
    let state = match health {
        Health::Active => "active",
        Health::Pending => "pending",
        Health::Failed => "failed",
    };
    match reason {
        Some(reason) => format!("{state}: {reason}"),
        None => state.to_owned(),
    }
}

/// The same text without line breaks and other control characters, which a path may contain.
pub fn one_line(text: &str) -> String {
    text.trim_end().chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// The same text without what a terminal would obey: of control characters only line breaks and tabs are left.
pub fn harmless(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && !matches!(c, '\n' | '\t') { ' ' } else { c }).collect()
}

/// `s` unless there is one.
pub fn plural(number: usize) -> &'static str {
    if number == 1 { "" } else { "s" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_have_thousands_separators() {
        for (number, text) in [
            (0, "0"),
            (999, "999"),
            (1000, "1,000"),
            (1_234_567, "1,234,567"),
            (u64::MAX, "18,446,744,073,709,551,615"),
        ] {
            assert_eq!(count(number), text);
        }
    }

    #[test]
    fn rates_are_short() {
        for (value, text) in [
            (0.0, "0 /s"),
            (0.5, "0.5 /s"),
            (9.0, "9 /s"),
            (123.4, "123 /s"),
            (999.4, "999 /s"),
            (999.6, "1.0 k/s"),
            (12_345.0, "12.3 k/s"),
            (999_949.0, "999.9 k/s"),
            (999_951.0, "1.0 M/s"),
            (9.8e9, "9.8 G/s"),
            (1e18, "1000000 T/s"),
            (-1.0, "0 /s"),
            (f64::NAN, "0 /s"),
        ] {
            assert_eq!(rate(value), text, "{value}");
        }
        assert_eq!(bytes(13_160_000), "13.2 MB");
        assert_eq!(si(9_800_000.0, "b/s"), "9.8 Mb/s");
    }

    #[test]
    fn reasons_stand_most_first() {
        let dropped =
            BTreeMap::from([("loop".to_owned(), 2), ("queue_full".to_owned(), 1500), ("none".to_owned(), 0)]);
        assert_eq!(reasons(&dropped), "1,500 queue_full\n2 loop");
        assert_eq!(reasons(&BTreeMap::new()), "0");
        assert_eq!(total(&dropped), 1502);
    }

    #[test]
    fn one_line_is_one_line() {
        assert_eq!(one_line("a\nb\tc\u{1b}[2J\n"), "a b c [2J");
    }

    #[test]
    fn a_terminal_is_told_nothing_but_text() {
        assert_eq!(harmless("a\nb\tc\u{1b}[2J\u{9b}31m\r\n"), "a\nb\tc [2J 31m \n");
    }
}
