//! What is wrong in a configuration file, and where.

use std::{fmt, ops::Range};

use serde::{Deserialize, Serialize};

use super::Source;

/// Something wrong in a configuration file. It displays as one line: place, what, why, what to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mistake {
    pub file: String,
    /// From 1.
    pub line: u32,
    /// In characters, from 1.
    pub column: u32,
    pub what: String,
    /// The line that it stands on.
    pub text: String,
    /// Characters of it that are meant, from the column on.
    pub width: u32,
}

impl Mistake {
    /// `span` is in bytes of the source.
    pub fn new(source: &Source, span: Range<usize>, what: impl Into<String>) -> Self {
        let (line, start) = line_at(&source.text, span.start);
        let text = source.text[start..].lines().next().unwrap_or_default();
        let column =
            source.text[start..].char_indices().take_while(|(at, _)| start + at < span.start).count();
        let meant = source.text.get(span).and_then(|meant| meant.lines().next()).unwrap_or_default();
        Self {
            file: source.file.clone(),
            line,
            column: column as u32 + 1,
            what: printable(&what.into(), usize::MAX),
            text: printable(text, LONGEST),
            width: (meant.chars().count() as u32).max(1),
        }
    }

    /// The mistake with the line that it stands on, and what is meant marked.
    pub fn excerpt(&self) -> String {
        let number = self.line.to_string();
        let margin = " ".repeat(number.len());
        // Tabs stay tabs, so that the mark stands under what is meant.
        let indent: String = self
            .text
            .chars()
            .take(self.column as usize - 1)
            .map(|c| if c == '\t' { c } else { ' ' })
            .collect();
        let mark = "^".repeat(self.width as usize);
        format!("{self}\n{margin} |\n{number} | {}\n{margin} | {indent}{mark}\n", self.text)
    }
}

impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}: {}", self.file, self.line, self.column, self.what)
    }
}

/// Characters of a line that are shown.
const LONGEST: usize = 200;

/// Text without what a terminal would obey, cut after so many characters.
fn printable(text: &str, longest: usize) -> String {
    let shown = |c: char| if c.is_control() && c != '\t' { '\u{fffd}' } else { c };
    text.chars().take(longest).map(shown).collect()
}

/// The number of the line at a place in a text, from 1, and where it starts.
pub fn line_at(text: &str, at: usize) -> (u32, usize) {
    let before = text.get(..at).unwrap_or(text);
    (before.matches('\n').count() as u32 + 1, before.rfind('\n').map_or(0, |newline| newline + 1))
}
