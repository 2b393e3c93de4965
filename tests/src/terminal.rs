//! A terminal of the test's own: a pseudo-terminal with a program on it, and what its screen shows.

use std::{
    fmt::Write as _,
    fs::File,
    io::{Read, Write},
    num::NonZeroU16,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::process::CommandExt,
    },
    process::{Child, Command, ExitStatus, Stdio},
    time::Duration,
};

use nix::{
    fcntl::{FcntlArg, OFlag, fcntl},
    pty::{Winsize, openpty},
    sys::{
        signal::{Signal, kill},
        termios::{Termios, tcgetattr},
    },
    unistd::Pid,
};
use vt100::{Cell, Color, Parser};

use crate::wait::{PATIENCE, wait_for, wait_until};

/// A program on a terminal; killed on drop.
pub struct Terminal {
    master: File,
    slave: OwnedFd,
    child: Child,
    screen: Parser,
}

fn size(rows: u16, columns: u16) -> Winsize {
    Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 }
}

fn nonzero(number: u16) -> NonZeroU16 {
    NonZeroU16::new(number).expect("a screen has rows and columns")
}

impl Terminal {
    /// Runs a command with the terminal as its own.
    #[track_caller]
    pub fn start(command: &mut Command, rows: u16, columns: u16) -> Self {
        let pty = openpty(Some(&size(rows, columns)), None).expect("a pseudo-terminal");
        let end = || Stdio::from(pty.slave.try_clone().expect("duplicate a descriptor"));
        command.stdin(end()).stdout(end()).stderr(end()).env("TERM", "xterm-256color").env_remove("NO_COLOR");
        // SAFETY: between fork and exec the closure only makes system calls, which are async-signal-safe; descriptor 0 is
        // the terminal by then.
        unsafe {
            command.pre_exec(|| {
                if libc::setsid() < 0 || libc::ioctl(0, libc::TIOCSCTTY, 0) < 0 {
                    return Err(std::io::Error::last_os_error());
                }
                Ok(())
            });
        }
        let child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
        fcntl(&pty.master, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).expect("O_NONBLOCK");
        let screen = Parser::new(nonzero(rows), nonzero(columns), 0);
        Self { master: pty.master.into(), slave: pty.slave, child, screen }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The screen as it is now, a line a row.
    pub fn text(&mut self) -> String {
        let mut chunk = [0; 16 * 1024];
        while let Ok(n @ 1..) = self.master.read(&mut chunk) {
            self.screen.process(&chunk[..n]);
        }
        self.screen.screen().contents()
    }

    /// Waits until the screen shows what is looked for, and answers the screen.
    #[track_caller]
    pub fn until(&mut self, what: &str, mut shows: impl FnMut(&str) -> bool) -> String {
        let start = std::time::Instant::now();
        loop {
            let text = self.text();
            if shows(&text) {
                return text;
            }
            assert!(start.elapsed() < PATIENCE, "not within {PATIENCE:?}: {what}\n{text}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    #[track_caller]
    pub fn until_text(&mut self, text: &str) -> String {
        self.until(text, |screen| screen.contains(text))
    }

    #[track_caller]
    pub fn press(&mut self, keys: &str) {
        self.master.write_all(keys.as_bytes()).expect("the terminal takes keys");
    }

    /// Another size; the program hears of it.
    #[track_caller]
    pub fn resize(&mut self, rows: u16, columns: u16) {
        let size = size(rows, columns);
        // Before the program hears of it, as a terminal's window is: what it then draws fits.
        self.text();
        self.screen.set_size(nonzero(rows), nonzero(columns));
        // SAFETY: TIOCSWINSZ reads a winsize, which lives for the call.
        let set = unsafe { libc::ioctl(self.master.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) };
        assert_eq!(set, 0, "TIOCSWINSZ");
    }

    /// The modes of the terminal: raw, cooked, echo.
    #[track_caller]
    pub fn modes(&self) -> Termios {
        tcgetattr(self.slave.as_fd()).expect("the modes of the terminal")
    }

    /// Whether a program has the screen for itself.
    pub fn is_taken(&mut self) -> bool {
        self.text();
        self.screen.screen().alternate_screen()
    }

    pub fn hides_cursor(&mut self) -> bool {
        self.text();
        self.screen.screen().hide_cursor()
    }

    #[track_caller]
    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id().cast_signed()), signal).expect("signal a child");
    }

    /// Waits for the program's end.
    #[track_caller]
    pub fn wait(&mut self) -> ExitStatus {
        let status = wait_for("the program on the terminal ends", PATIENCE, || {
            self.text();
            self.child.try_wait().expect("wait for a child")
        });
        self.text();
        status
    }

    /// Waits until the program has drawn something.
    #[track_caller]
    pub fn wait_until_taken(&mut self) {
        wait_until("the program takes the screen", PATIENCE, || self.is_taken());
    }

    /// The screen as a picture.
    pub fn svg(&mut self) -> String {
        self.text();
        picture(self.screen.screen())
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ended_already = self.child.kill();
        let _reaped_already = self.child.wait();
        if std::thread::panicking() {
            eprintln!("--- the screen\n{}", self.text());
        }
    }
}

/// A cell's width and height, and where a letter stands in it.
const CELL: (f64, f64, f64) = (8.4, 18.0, 13.5);

fn picture(screen: &vt100::Screen) -> String {
    let (rows, columns) = screen.size();
    let (width, height) = (f64::from(columns.get()) * CELL.0, f64::from(rows.get()) * CELL.1);
    let (width, height) = (width + 20.0, height + 20.0);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width:.1} {height:.1}\" \
         font-family=\"ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas, monospace\" font-size=\"14\">\n\
         <rect width=\"100%\" height=\"100%\" rx=\"6\" fill=\"#16181d\"/>\n"
    );
    for row in 0..rows.get() {
        let cells: Vec<_> = (0..columns.get()).filter_map(|column| screen.cell(row, column)).collect();
        let mut start = 0;
        for run in cells.chunk_by(|a, b| look(a) == look(b)) {
            run_of(&mut svg, row, start, run);
            start += run.len();
        }
    }
    svg + "</svg>\n"
}

/// Foreground, background, bold, dim.
fn look(cell: &Cell) -> (&'static str, Option<&'static str>, bool, bool) {
    let foreground = colour(cell.fgcolor()).unwrap_or("#d6d9de");
    let background = colour(cell.bgcolor());
    if cell.inverse() {
        return (background.unwrap_or("#16181d"), Some(foreground), cell.bold(), cell.dim());
    }
    (foreground, background, cell.bold(), cell.dim())
}

fn colour(colour: Color) -> Option<&'static str> {
    const BASIC: [&str; 8] =
        ["#3a3f4b", "#ff6b6b", "#69db7c", "#ffd43b", "#74a7ff", "#e599f7", "#66d9e8", "#d6d9de"];
    match colour {
        Color::Idx(index) => BASIC.get(usize::from(index % 8)).copied(),
        _ => None,
    }
}

fn run_of(svg: &mut String, row: u16, start: usize, cells: &[&Cell]) {
    let text: String =
        cells.iter().map(|cell| if cell.has_contents() { cell.contents() } else { " " }).collect();
    let (foreground, background, bold, dim) = look(cells[0]);
    let left = 10.0 + CELL.0 * f64::from(u16::try_from(start).expect("columns"));
    let top = 10.0 + CELL.1 * f64::from(row);
    let long = |cells: usize| CELL.0 * f64::from(u16::try_from(cells).expect("columns"));
    if let Some(background) = background {
        let (length, height) = (long(cells.len()), CELL.1);
        let _ = writeln!(
            svg,
            "<rect x=\"{left:.1}\" y=\"{top:.1}\" width=\"{length:.1}\" height=\"{height}\" fill=\"{background}\"/>"
        );
    }
    if text.trim().is_empty() {
        return;
    }
    let text = text.trim_end();
    let length = long(text.chars().count());
    let text = text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    let weight = if bold { " font-weight=\"bold\"" } else { "" };
    let opacity = if dim { " opacity=\"0.65\"" } else { "" };
    let base = top + CELL.2;
    let _ = writeln!(
        svg,
        "<text x=\"{left:.1}\" y=\"{base:.1}\" textLength=\"{length:.1}\" xml:space=\"preserve\" \
         fill=\"{foreground}\"{weight}{opacity}>{text}</text>"
    );
}
