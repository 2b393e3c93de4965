//! What keys do: pure.

use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};

use super::model::{Model, Sort};

/// Longest filter: longer than any endpoint.
const MAX_FILTER: usize = 128;

impl Model {
    /// Takes a key; `page` is how many rules there is room for. True if it is to end.
    pub fn press(&mut self, KeyEvent { code, modifiers, .. }: KeyEvent, page: usize) -> bool {
        let control = modifiers.contains(KeyModifiers::CONTROL);
        match code {
            KeyCode::Char('c') if control => return true,
            KeyCode::Esc if self.editing || !self.filter.is_empty() => {
                self.editing = false;
                self.filter.clear();
            }
            KeyCode::Up => self.step(-1),
            KeyCode::Down => self.step(1),
            KeyCode::PageUp => self.step(-(page.max(1) as isize)),
            KeyCode::PageDown => self.step(page.max(1) as isize),
            KeyCode::Home => self.step(isize::MIN),
            KeyCode::End => self.step(isize::MAX),
            KeyCode::Enter => self.editing = false,
            KeyCode::Backspace if self.editing => self.editing = self.filter.pop().is_some(),
            // Whatever is no letter of a filter is nothing while one is typed.
            KeyCode::Char(letter) if self.editing && !control && self.filter.len() < MAX_FILTER => {
                self.filter.push(letter);
            }
            KeyCode::Char(_) if self.editing => {}
            KeyCode::Char('q') | KeyCode::Esc => return true,
            KeyCode::Char('/') => {
                self.editing = true;
                self.filter.clear();
            }
            KeyCode::Char('r') => self.sort = Sort::Rate,
            KeyCode::Char('d') => self.sort = Sort::Drops,
            KeyCode::Char('n') => self.sort = Sort::Name,
            _ => {}
        }
        false
    }

    fn step(&mut self, by: isize) {
        let shown = self.shown();
        let last = shown.len().saturating_sub(1);
        let place = self.place(&shown).saturating_add_signed(by).min(last);
        // Who stays with the first sees the first, whichever it is.
        self.selected = shown.get(place).filter(|_| place > 0).map(|row| row.name.clone());
    }
}
