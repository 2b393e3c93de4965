//! The pages of the guide, as a reader follows them: their commands are run in a site, in order, and what they print is
//! compared with what the page shows.
//!
//! A block marked `console` holds commands, each with what it prints below it. `$ COMMAND` is typed on the relay host,
//! `source$ COMMAND` and `sink$ COMMAND` (`sink1$`, `sink2$`) at its other ends; a `\` at the end goes on in the next
//! line. One that ends with `&` runs in the background: what is shown below it is what it says before the reader goes on;
//! `wait $!` waits for the last of them to end and shows the rest. A block whose first line is `# /PATH` is that file.
//!
//! What is printed must be what is shown, but that the width of columns, times of day and rates do not count, `…` stands
//! for anything within a line, and a line `...` for any lines. A command that only looks is repeated until it shows that.
//!
//! A block marked `console norun="REASON"` is not run.

use std::{
    env, fs,
    fs::File,
    os::{fd::AsRawFd, unix::process::CommandExt},
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};

use crate::{Namespace, Process, Site, relay, wait::wait_until};

/// How long a command, or what one in the background is to say, may take.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long one that only looks is repeated.
const LOOKED_AT: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(50);

/// Commands that change nothing.
const LOOKS: [&str; 15] = [
    "mcr rule show",
    "mcr rule list",
    "mcr status",
    "mcr stats",
    "mcr workers",
    "mcr config diff",
    "mcr ping",
    "bpftool",
    "ethtool -S",
    "ethtool -l",
    "ip -s",
    "ip -br",
    "ip maddress",
    "tc -s",
    "cat",
];

/// What a page asks its reader to do.
#[derive(Debug)]
pub enum Step {
    Type(Typed),
    /// A file of the relay host.
    Write {
        path: PathBuf,
        text: String,
    },
    /// A block of commands that cannot be run here.
    Leave {
        line: usize,
        reason: String,
    },
}

#[derive(Debug)]
pub struct Typed {
    /// Of the command in the page.
    line: usize,
    /// Empty for the relay host.
    host: String,
    command: String,
    shown: Vec<String>,
}

/// Reads the fenced blocks of a page.
#[track_caller]
pub fn steps(page: &str) -> Vec<Step> {
    let mut steps = Vec::new();
    let mut lines = page.lines().enumerate();
    while let Some((at, line)) = lines.next() {
        let Some(info) = line.trim_start().strip_prefix("```") else { continue };
        let block: Vec<_> = lines.by_ref().take_while(|(_, line)| line.trim_start() != "```").collect();
        let first = block.first().map_or("", |(_, line)| line);
        if let Some(reason) = info.strip_prefix("console norun=\"") {
            steps.push(Step::Leave { line: at + 1, reason: reason.trim_end_matches('"').to_owned() });
        } else if info == "console" {
            steps.extend(typed(&block).into_iter().map(Step::Type));
        } else if let Some(path) = first.strip_prefix("# /") {
            let path = Path::new("/").join(path.split([',', ' ']).next().unwrap_or_default());
            let text = block.iter().flat_map(|(_, line)| [*line, "\n"]).collect();
            steps.push(Step::Write { path, text });
        } else {
            let prompted = block.iter().find(|(_, line)| prompt(line).is_some());
            assert!(prompted.is_none(), "a command in a block that is not marked `console`: {prompted:?}");
        }
    }
    steps
}

fn typed(block: &[(usize, &str)]) -> Vec<Typed> {
    let mut steps: Vec<Typed> = Vec::new();
    let mut goes_on = false;
    for (at, line) in block {
        if goes_on {
            let step = steps.last_mut().expect("one that goes on");
            step.command = format!("{}\n{line}", step.command);
        } else if let Some((host, command)) = prompt(line) {
            let (host, command) = (host.to_owned(), command.to_owned());
            steps.push(Typed { line: at + 1, host, command, shown: Vec::new() });
        } else {
            let step = steps.last_mut().unwrap_or_else(|| panic!("line {}: no command yet: {line}", at + 1));
            step.shown.push((*line).to_owned());
            continue;
        }
        goes_on = line.ends_with('\\');
    }
    steps
}

/// Host and command of a line that begins with a prompt.
fn prompt(line: &str) -> Option<(&str, &str)> {
    let (host, command) = line.split_once("$ ")?;
    host.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit()).then_some((host, command))
}

/// Who follows a page in a site. The relay host has `/run`, `/etc` and bpffs of its own, and `mcr` on its path.
#[derive(Debug)]
pub struct Reader<'a> {
    site: &'a Site,
    mounts: File,
    background: Vec<Background>,
    /// Where a page is not right.
    wrong: Vec<String>,
}

#[derive(Debug)]
struct Background {
    host: String,
    process: Process,
    /// Lines of it that the page has shown.
    seen: usize,
}

impl<'a> Reader<'a> {
    #[track_caller]
    pub fn new(site: &'a Site) -> Self {
        Self { site, mounts: private_mounts(), background: Vec::new(), wrong: Vec::new() }
    }

    /// Follows a page to its end; answers the reasons of what it left out, and panics with all that was not as shown.
    #[track_caller]
    pub fn follow(&mut self, name: &str, page: &str) -> Vec<String> {
        let mut left_out = Vec::new();
        for step in steps(page) {
            match step {
                Step::Type(typed) => self.type_in(&typed),
                Step::Write { path, text } => self.write(&path, &text),
                Step::Leave { line, reason } => {
                    println!("{name}:{line} is not run: {reason}");
                    left_out.push(reason);
                }
            }
        }
        assert!(self.wrong.is_empty(), "{name} is not what happens:\n\n{}", self.wrong.join("\n"));
        left_out
    }

    #[track_caller]
    fn type_in(&mut self, typed: &Typed) {
        let start = Instant::now();
        let mut came;
        let mut right;
        if typed.command == "wait $!" {
            came = self.rest(&typed.host);
            right = matches(&typed.shown, &came);
        } else if let Some(command) = typed.command.strip_suffix(" &") {
            let process = Process::spawn(&mut self.command(&typed.host, command));
            let seen = loop {
                came = lines(&process.stdout());
                let seen = (0..=came.len()).find(|&n| matches(&typed.shown, &came[..n]));
                if seen.is_some() || start.elapsed() > PATIENCE {
                    break seen;
                }
                thread::sleep(PAUSE);
            };
            right = seen.is_some();
            let (host, seen) = (typed.host.clone(), seen.unwrap_or(came.len()));
            self.background.push(Background { host, process, seen });
        } else {
            let looks = LOOKS.iter().any(|looks| typed.command.starts_with(looks));
            if !typed.host.is_empty() {
                self.let_memberships_arrive();
            }
            loop {
                let mut process = Process::spawn(&mut self.command(&typed.host, &typed.command));
                let succeeded = ends(&mut process);
                came = lines(&process.stdout());
                right = matches(&typed.shown, &came) && (succeeded || !came.is_empty());
                if right || !looks || start.elapsed() > LOOKED_AT {
                    break;
                }
                thread::sleep(PAUSE);
            }
        }
        if !right {
            let Typed { line, host, command, shown } = typed;
            let (shown, came) = (shown.join("\n"), came.join("\n"));
            self.wrong
                .push(format!("line {line}: {host}$ {command}\n--- shown\n{shown}\n--- came\n{came}\n"));
        }
    }

    /// What the last command in a host's background had not yet said, once it has ended.
    #[track_caller]
    fn rest(&mut self, host: &str) -> Vec<String> {
        let last = self.background.iter().rposition(|background| background.host == host);
        let mut last = self.background.remove(last.unwrap_or_else(|| panic!("nothing runs behind {host}$")));
        ends(&mut last.process);
        lines(&last.process.stdout()).into_iter().skip(last.seen).collect()
    }

    /// A person does not type as fast as a switch learns of memberships.
    #[track_caller]
    fn let_memberships_arrive(&self) {
        for segment in &self.site.segments {
            for group in self.site.groups(&segment.interface) {
                wait_until(&format!("the bridge's entry of {group} appears"), PATIENCE, || {
                    segment.joined().iter().any(|(joined, _)| *joined == group)
                });
            }
        }
    }

    /// What a reader types, its errors among what it prints.
    #[track_caller]
    fn command(&self, host: &str, typed: &str) -> Command {
        let mut command = self.host(host).command("bash");
        let path = env::var("PATH").unwrap_or_default();
        let mcr = relay::binary();
        let mcr = mcr.parent().expect("a directory").display();
        command.args(["-c", &format!("cd /run\nexec 2>&1\n{typed}")]);
        command.env("PATH", format!("{mcr}:{path}")).env("LC_ALL", "C.UTF-8").env_remove("MCR_CONTROL");
        if host.is_empty() {
            let mounts = self.mounts.as_raw_fd();
            // SAFETY: between fork and exec the closure makes a system call only; the descriptor is open as long as
            // `self` is, and spawning without it fails.
            unsafe {
                command.pre_exec(move || {
                    if libc::setns(mounts, libc::CLONE_NEWNS) == 0 {
                        Ok(())
                    } else {
                        Err(std::io::Error::last_os_error())
                    }
                });
            }
        }
        command
    }

    #[track_caller]
    fn host(&self, name: &str) -> &Namespace {
        match name {
            "" => &self.site.relay,
            "source" => self.site.source(),
            "sink" => &self.site.sinks[0].host,
            _ => {
                let sink = name.strip_prefix("sink").and_then(|number| number.parse::<usize>().ok());
                &self.site.sinks[sink.unwrap_or_else(|| panic!("no host {name}"))].host
            }
        }
    }

    #[track_caller]
    fn write(&self, path: &Path, text: &str) {
        let place = self.site.scratch.dir().join("file");
        fs::write(&place, text).expect("write a file");
        let (from, to) = (place.display(), path.display());
        let command = format!("install -D -m 644 {from} {to}");
        let answer = Process::spawn(&mut self.command("", &command)).answer(PATIENCE);
        assert_eq!(answer.status, 0, "{answer}");
    }
}

/// A mount namespace in which `/run`, `/etc` and the bpffs are its own, so that pages can name the usual paths.
#[track_caller]
fn private_mounts() -> File {
    let made = thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNS).expect("a mount namespace (root needed)");
        let none = None::<&str>;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).expect("private mounts");
        mount(Some("run"), "/run", Some("tmpfs"), MsFlags::empty(), none).expect("mount a tmpfs");
        mount(Some("bpf"), "/sys/fs/bpf", Some("bpf"), MsFlags::empty(), none).expect("mount a bpffs");
        let copied = Command::new("cp").args(["-a", "/etc", "/run/etc"]).status().expect("cp");
        assert!(copied.success(), "/etc cannot be copied");
        mount(Some("/run/etc"), "/etc", none, MsFlags::MS_BIND, none).expect("bind /etc");
        File::open("/proc/thread-self/ns/mnt").expect("the mount namespace")
    });
    made.join().expect("mounts of its own")
}

/// Waits for a command's end, and answers whether it was a good one.
fn ends(process: &mut Process) -> bool {
    let start = Instant::now();
    while start.elapsed() < PATIENCE {
        if let Some(status) = process.ended() {
            return status.success();
        }
        thread::sleep(Duration::from_millis(1));
    }
    false
}

fn lines(text: &str) -> Vec<String> {
    text.lines().map(str::to_owned).collect()
}

/// Whether what came is what a page shows. Empty lines at the end do not count.
pub fn matches(shown: &[String], came: &[String]) -> bool {
    let words = |lines: &[String]| {
        let lines: Vec<_> = lines.iter().map(|line| normal(line)).collect();
        let end = lines.iter().rposition(|line| !line.is_empty()).map_or(0, |last| last + 1);
        lines[..end].to_vec()
    };
    lines_match(&words(shown), &words(came))
}

fn lines_match(shown: &[String], came: &[String]) -> bool {
    match (shown.split_first(), came.split_first()) {
        (None, _) => came.is_empty(),
        (Some((first, rest)), _) if first == "..." => (0..=came.len()).any(|n| lines_match(rest, &came[n..])),
        (Some((first, rest)), Some((line, others))) => line_matches(first, line) && lines_match(rest, others),
        (Some(_), None) => false,
    }
}

fn line_matches(shown: &str, came: &str) -> bool {
    let Some((start, rest)) = shown.split_once('…') else { return shown == came };
    let Some(came) = came.strip_prefix(start) else { return false };
    let places = came.char_indices().map(|(at, _)| at).chain([came.len()]);
    places.into_iter().any(|at| line_matches(rest, &came[at..]))
}

/// A line with one space between its words, and without its times of day and its rates.
fn normal(line: &str) -> String {
    let mut words: Vec<&str> = Vec::new();
    for word in line.split_whitespace() {
        let bare = word.trim_end_matches([',', ')']);
        if is_time(bare) {
            words.push("TIME");
        } else if bare.ends_with("/s") && words.last().is_some_and(|last| last.parse::<f64>().is_ok()) {
            words.pop();
            words.push("RATE");
        } else {
            words.push(word);
            continue;
        }
        words.extend(Some(&word[bare.len()..]).filter(|rest| !rest.is_empty()));
    }
    words.join(" ")
}

/// `2026-11-21T09:27:20.545Z`.
fn is_time(word: &str) -> bool {
    word.len() >= 20
        && word.ends_with('Z')
        && word.split_once('T').is_some_and(|(day, _)| day.split('-').count() == 3)
        && word.chars().all(|c| c.is_ascii_digit() || "-T:.Z".contains(c))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_came_is_what_is_shown_but_for_what_varies() {
        for (shown, came, same) in [
            ("a b", "a   b", true),
            ("a b", "a c", false),
            ("a\n\nb", "a\n\nb\n\n", true),
            ("a\nb", "a\n\nb", false),
            ("a", "a\nb", false),
            ("a\n...", "a\nb\nc", true),
            ("...\nc", "a\nb\nc", true),
            ("a\n...\nd", "a\nb\nc", false),
            ("pid …, up", "pid 77, up", true),
            ("pid …, up", "pid 77, down", false),
            ("… of …", "3 of 4 of 5", true),
            ("x 10.0 k/s 0", "x 9.9 k/s 0", true),
            ("x 10.0 k/s 0", "x 9.9 k/s 1", false),
            ("sent 1 /s, 8.0 kb/s", "sent 12.0 k/s, 2 b/s", true),
            ("2026-11-21T09:27:20.545Z, a", "2027-01-02T03:04:05Z, a", true),
            ("since 2026-11-21T09:27:20.545Z)", "since yesterday)", false),
        ] {
            assert_eq!(matches(&lines(shown), &lines(came)), same, "{shown:?} {came:?}");
        }
    }

    #[test]
    fn a_page_is_read_block_by_block() {
        let page = "\
text $ not a command
```console
$ mcr rule add a \\
    --in b
added

source$ mcr gen &
```
```toml
# /etc/mcr/mcr.toml, a file
[daemon]
```
```console norun=\"needs a card\"
$ ethtool
```
";
        let steps = format!("{:?}", steps(page));
        for part in [
            "Type(Typed { line: 3, host: \"\", command: \"mcr rule add a \\\\\\n    --in b\", shown: [\"added\", \"\"] })",
            "Type(Typed { line: 7, host: \"source\", command: \"mcr gen &\", shown: [] })",
            "Write { path: \"/etc/mcr/mcr.toml\", text: \"# /etc/mcr/mcr.toml, a file\\n[daemon]\\n\" }",
            "Leave { line: 13, reason: \"needs a card\" }",
        ] {
            assert!(steps.contains(part), "{part}\n{steps}");
        }
    }
}
