//! `mcr man`: a manual page for each command, made from its arguments and from what is added here.

use std::{fs, path::PathBuf};

use anyhow::Context;
use clap::Command;
use clap_mangen::{
    Man,
    roff::{Roff, bold, roman},
};

use super::public;

/// Write the manual pages, one for each command
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Directory to write them to; it is made if it is not there
    dir: PathBuf,
}

impl Args {
    pub fn run(self) -> anyhow::Result<()> {
        let unwritten = || format!("cannot write manual pages to {}", self.dir.display());
        fs::create_dir_all(&self.dir).with_context(unwritten)?;
        let mut whole = public().disable_help_subcommand(true);
        whole.build();
        for (name, page) in pages(&whole)? {
            fs::write(self.dir.join(name), page).with_context(unwritten)?;
        }
        Ok(())
    }
}

/// The page of a command and those of its subcommands, with their files' names.
fn pages(command: &Command) -> anyhow::Result<Vec<(String, Vec<u8>)>> {
    let mut pages = vec![page(command)?];
    for subcommand in command.get_subcommands() {
        pages.extend(self::pages(subcommand)?);
    }
    Ok(pages)
}

fn page(command: &Command) -> anyhow::Result<(String, Vec<u8>)> {
    let source = concat!("mcr ", env!("CARGO_PKG_VERSION"));
    let man = Man::new(command.clone()).source(source).manual("Multicast relay");
    let mut page = Vec::new();
    man.render_title(&mut page)?;
    man.render_name_section(&mut page)?;
    man.render_synopsis_section(&mut page)?;
    man.render_description_section(&mut page)?;
    man.render_options_section(&mut page)?;
    if command.has_subcommands() {
        man.render_subcommands_section(&mut page)?;
    }
    let name = command.get_display_name().unwrap_or_else(|| command.get_name());
    let mut roff = Roff::new();
    for (heading, entries) in sections(command, name) {
        roff.control("SH", [heading]);
        for &(term, text) in entries {
            roff.control("TP", []);
            roff.text([bold(term)]);
            roff.text([roman(text)]);
        }
    }
    roff.control("SH", ["SEE ALSO"]);
    roff.text([roman(see_also(name))]);
    roff.to_writer(&mut page)?;
    Ok((man.get_filename(), page))
}

/// The commands that this one belongs to, and the file that all of them are about.
fn see_also(name: &str) -> String {
    let dashes = name.match_indices('-').map(|(at, _)| &name[..at]);
    // `mcr-log` of mcr-log-level is none.
    let above = dashes.filter(|above| *above != "mcr-log").map(|above| format!("{above}(1), "));
    above.chain(["mcr.toml(5)".to_owned()]).collect()
}

type Entries = &'static [(&'static str, &'static str)];

fn sections(command: &Command, name: &str) -> Vec<(&'static str, Entries)> {
    let is_of_the_daemon = command.get_arguments().any(|argument| argument.get_id() == "json")
        && command.get_arguments().any(|argument| argument.get_id() == "control");
    let status = match name {
        "mcr" => Some(STATUS),
        "mcr-run" => Some(RUN_STATUS),
        "mcr-events" => Some(EVENTS_STATUS),
        // Its description says its own.
        "mcr-doctor" => None,
        _ => is_of_the_daemon.then_some(STATUS),
    };
    let environment = match name {
        "mcr" => Some(ENVIRONMENT),
        "mcr-run" => Some(RUN_ENVIRONMENT),
        _ => is_of_the_daemon.then_some(ENVIRONMENT),
    };
    let files = match name {
        "mcr" | "mcr-run" => Some(FILES),
        _ => None,
    };
    let examples = EXAMPLES.iter().find(|(page, _)| *page == name).map(|(_, examples)| *examples);
    let keys = (name == "mcr-top").then_some(TOP_KEYS);
    [
        ("KEYS", keys),
        ("EXIT STATUS", status),
        ("ENVIRONMENT", environment),
        ("FILES", files),
        ("EXAMPLES", examples),
    ]
    .into_iter()
    .filter_map(|(heading, entries)| Some((heading, entries?)))
    .collect()
}

const STATUS: Entries = &[
    ("0", "Done."),
    ("1", "Refused or failed: one line on stderr says what, why and what to do."),
    ("2", "The arguments are wrong."),
    ("3", "No daemon answers on the control socket."),
];

const RUN_STATUS: Entries = &[
    ("0", "It was told to end: by SIGTERM, SIGINT or mcr stop, or by SIGUSR1, which is mcr stop --keep."),
    ("1", "It could not start, or could not go on: the last line on stderr says why and what to do."),
    ("2", "The arguments are wrong."),
];

const EVENTS_STATUS: Entries = &[
    ("0", "The daemon was stopped, and the last event is daemon.stopping; or what read them here is gone."),
    ("1", "It went otherwise, or what reads them was too slow: one line on stderr says which."),
    ("2", "The arguments are wrong."),
    ("3", "No daemon answers on the control socket."),
];

const TOP_KEYS: Entries = &[
    ("Up, Down, PageUp, PageDown, Home, End", "Choose a rule, whose outputs and drops are shown."),
    ("r, d, n", "Sort by rate, by drops, by name."),
    (
        "/",
        "Filter: rules whose name or endpoint contains what is typed. Enter ends typing, Esc shows all again.",
    ),
    ("q, Esc, Ctrl-C", "Quit."),
];

const ENVIRONMENT: Entries =
    &[("MCR_CONTROL", "The control socket, where --control says none [default: /run/mcr/mcr.sock].")];

const RUN_ENVIRONMENT: Entries = &[
    ("MCR_CONTROL", "The control socket, where --control says none; it goes before the file."),
    (
        "NOTIFY_SOCKET, WATCHDOG_USEC, FDSTORE, LISTEN_FDS, JOURNAL_STREAM",
        "As systemd sets them for a service of Type=notify.",
    ),
];

const FILES: Entries = &[
    ("/etc/mcr/mcr.toml", "Options and rules of the packaged service, mcr.service; see mcr.toml(5)."),
    (
        "/etc/mcr/rules.d/*.toml",
        "Further rules. Of these mcr-saved.toml is what --save and mcr config save write.",
    ),
    (
        "/run/mcr/mcr.sock",
        "The control socket. Beside it lie its lock and the journal of rules added by command.",
    ),
    (
        "/sys/fs/bpf/mcr",
        "Where programs and maps are pinned, by network namespace and interface; of mcr.service under /run/bpf/mcr.",
    ),
];

const EXAMPLES: &[(&str, Entries)] = &[
    (
        "mcr",
        &[
            ("mcr rule add cam1 --in 239.1.1.1:5000@eth0 --out 239.2.2.2:6000@eth1", "Relays one group."),
            ("mcr status", "Tells whether it works, and what to type if it does not."),
            ("mcr stats --watch", "Follows what comes, what leaves and what is dropped for which reason."),
        ],
    ),
    (
        "mcr-run",
        &[
            ("mcr run", "Runs in the foreground, without a rule, until it is told to stop."),
            (
                "mcr run --config /etc/mcr/mcr.toml --user mcr",
                "Runs with a file's options and rules, as an ordinary user.",
            ),
            ("kill -HUP PID", "Loads the file again. Rules that do not differ lose nothing."),
        ],
    ),
    (
        "mcr-rule-add",
        &[
            (
                "mcr rule add cam1 --in 239.1.1.1:5000@eth0 --out 239.2.2.2:6000@eth1",
                "Relays a group to another one.",
            ),
            (
                "mcr rule add feed --in 232.1.1.1:5000@eth0,source=192.0.2.7 --out 239.2.2.2:6000@eth1,ttl=8 --out 10.3.0.7:7000@eth2",
                "Takes one source's datagrams and sends them to a group and to a host.",
            ),
            (
                "mcr rule add --in 239.1.1.1:5000@eth0 --out 239.1.1.1:5000@eth1 --save",
                "Lets mcr name the rule, and makes it permanent.",
            ),
        ],
    ),
    (
        "mcr-rule-set",
        &[
            ("mcr rule set cam1 --add-out 239.3.3.3:7000@eth2", "Sends to one place more."),
            ("mcr rule set cam1 --datapath af-packet", "Moves the rule to another datapath while it plays."),
        ],
    ),
    (
        "mcr-rule-remove",
        &[("mcr rule remove cam1 --save", "Takes the rule away, and out of what was saved.")],
    ),
    ("mcr-rule-show", &[("mcr rule show cam1", "Tells which datapath the rule has and why.")]),
    ("mcr-rule-list", &[("mcr rule list --json", "All rules as one line of JSON.")]),
    ("mcr-doctor", &[("mcr doctor cam1", "Tells why nothing of a rule flows, and what mends it.")]),
    (
        "mcr-events",
        &[("mcr events", "Prints what happens from now on, a line of JSON each, until it is interrupted.")],
    ),
    ("mcr-stats", &[("mcr stats --watch cam1", "Follows one rule.")]),
    (
        "mcr-config-load",
        &[(
            "mcr config load /etc/mcr/mcr.toml --confirm 60",
            "Loads the file, and takes it back after a minute unless mcr config confirm comes before.",
        )],
    ),
    (
        "mcr-config-check",
        &[("mcr config check /etc/mcr/mcr.toml", "Tells every mistake of a file, with its place.")],
    ),
    (
        "mcr-config-save",
        &[("mcr config save /root/mcr-runs.toml", "Writes all that runs, as a file that gives it back.")],
    ),
    (
        "mcr-log-level-set",
        &[("mcr log-level set debug", "Logs more, until it is set back or the daemon ends.")],
    ),
    (
        "mcr-stop",
        &[(
            "mcr stop --keep",
            "Ends the daemon; rules that the kernel serves alone go on, and the next one takes them over.",
        )],
    ),
    (
        "mcr-gen",
        &[(
            "mcr gen 239.1.1.1:5000@eth0 --rate 10000 --size 1316 --seconds 10",
            "Sends 100,000 datagrams in ten seconds.",
        )],
    ),
    (
        "mcr-recv",
        &[(
            "mcr recv 239.2.2.2:6000@eth1",
            "Counts what comes until it is interrupted: loss, duplicates, latency.",
        )],
    ),
    (
        "mcr-completions",
        &[(
            "mcr completions bash > /usr/share/bash-completion/completions/mcr",
            "What the Debian package has installed.",
        )],
    ),
    (
        "mcr-man",
        &[("mcr man /usr/local/share/man/man1", "Installs the pages of a binary that came without them.")],
    ),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_have_what_is_special_of_their_commands() {
        let mut whole = public().disable_help_subcommand(true);
        whole.build();
        let pages = pages(&whole).unwrap();
        for (name, words) in [
            ("mcr-top.1", &[".SH KEYS\n", "Sort by rate"][..]),
            ("mcr-events.1", &[".SH \"EXIT STATUS\"\n", "what reads them was too slow"]),
            ("mcr-stats.1", &[".SH \"EXIT STATUS\"\n", "Refused or failed"]),
        ] {
            let (_, page) = pages.iter().find(|(file, _)| file == name).unwrap();
            let page = String::from_utf8_lossy(page);
            for word in words {
                assert!(page.contains(word), "{name}: {word} in {page}");
            }
        }
    }
}
