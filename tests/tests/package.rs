//! The Debian package: what is in it, what its installation, upgrade and removal do, and its manual pages.

use std::{
    collections::BTreeSet,
    fs,
    net::SocketAddrV4,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    process::Command,
};

use nix::sys::signal::{Signal, kill};
use tests::{
    Answer, Process, Relay, Root, Scratch, Site, Source, capture::assert_sequence, relay::binary,
    source::Stream, wait::PATIENCE, wait_until,
};

/// Packs the binary under test; what `apt` would take.
#[track_caller]
fn package(folder: &Path, revision: u32) -> PathBuf {
    let xtask = binary().with_file_name("xtask");
    assert!(xtask.exists(), "{} is missing: `cargo build -p xtask` makes it", xtask.display());
    let mut pack = Command::new(xtask);
    pack.arg("package").arg("--binary").arg(binary()).arg("--output").arg(folder);
    pack.args(["--revision", &revision.to_string()]);
    // To say them takes a working copy whose owner runs git; and packing takes seconds.
    pack.env("SOURCE_DATE_EPOCH", "1700000000")
        .env("DEBFULLNAME", "A Tester")
        .env("DEBEMAIL", "a@tester.example");
    pack.env("DPKG_DEB_COMPRESSOR_LEVEL", "0");
    let packed = Process::spawn(&mut pack).answer(PATIENCE);
    packed.ok().trim().into()
}

/// The package's files in a folder, installed by nobody.
#[track_caller]
fn unpacked(scratch: &Scratch) -> PathBuf {
    let root = scratch.dir().join("unpacked");
    ok(Command::new("dpkg-deb").arg("--extract").arg(package(scratch.dir(), 1)).arg(&root));
    root
}

#[track_caller]
fn ok(command: &mut Command) -> String {
    Process::spawn(command).answer(PATIENCE).ok().to_owned()
}

#[track_caller]
fn dpkg(root: &Root, action: &str, what: &str) -> Answer {
    let answer = root.run(&["dpkg", "--force-unsafe-io", action, what]);
    answer.ok();
    answer
}

fn at(address: &str) -> SocketAddrV4 {
    address.parse().expect("address:port")
}

#[test]
fn it_is_the_same_bytes_every_time() {
    let scratch = Scratch::make();
    let [first, second] = ["first", "second"].map(|folder| package(&scratch.dir().join(folder), 1));
    assert_eq!(first.file_name(), second.file_name());
    assert!(fs::read(first).expect("a package") == fs::read(second).expect("a package"));
    // Nothing is left of the making.
    assert_eq!(fs::read_dir(scratch.dir().join("first")).expect("a folder").count(), 1);
}

#[test]
fn it_bears_the_licences_of_all_that_is_linked() {
    let scratch = Scratch::make();
    let notices = unpacked(&scratch).join("usr/share/doc/mcr/third-party-notices.gz");
    let notices = ok(Command::new("zcat").arg(notices));
    let (list, texts) = notices.split_once("\n====").expect("a list, and texts");
    for linked in ["aya", "clap", "io-uring", "libxdp-sys", "ratatui", "tokio"] {
        assert!(list.contains(&format!("\n  {linked} ")), "{linked} is not in {list}");
        let names = |line: &str| line.strip_prefix("Of ")?.strip_suffix(':').map(str::to_owned);
        let has_text =
            texts.lines().filter_map(names).any(|names| names.split(", ").any(|name| name == linked));
        assert!(has_text, "{linked} has no text");
    }
    // libbpf's, which libxdp-sys brings.
    assert!(texts.contains("GNU LESSER GENERAL PUBLIC LICENSE"));
    assert!(!list.contains("mcr-common"));
}

#[test]
fn it_says_what_it_needs() {
    let scratch = Scratch::make();
    let package = package(scratch.dir(), 7);
    let field =
        |field: &str| ok(Command::new("dpkg-deb").arg("--field").arg(&package).arg(field)).trim().to_owned();
    assert_eq!(field("Package"), "mcr");
    assert_eq!(field("Version"), concat!(env!("CARGO_PKG_VERSION"), "-7"));
    assert_eq!(field("Maintainer"), "A Tester <a@tester.example>");
    let depends = field("Depends");
    for library in ["libc6 (>= ", "libelf1", "zlib1g"] {
        assert!(depends.contains(library), "{depends}");
    }
}

const ENABLED: &str = "/etc/systemd/system/multi-user.target.wants/mcr.service";

/// What the service manager is told first and last whatever is done.
const DAEMON_RELOAD: &str = "daemon-reload";

#[test]
fn it_is_installed_upgraded_removed_and_purged() {
    let scratch = Scratch::make();
    let root = Root::make();
    let [first, second] = [1, 2].map(|revision| root.bring(&package(scratch.dir(), revision)));
    let is_there = |path: &str| root.path(path).symlink_metadata().is_ok();
    let told = |expected: &[&str]| {
        let told = root.told();
        let told: Vec<_> = told.iter().filter(|line| *line != DAEMON_RELOAD).collect();
        assert_eq!(told, expected);
    };

    dpkg(&root, "--install", &first);
    told(&["--quiet --system start mcr.service"]);
    assert!(is_there(ENABLED));
    assert_installed(&root);

    // No daemon runs: the operator has stopped it, or it never came up. An upgrade does not start it.
    let operators = root.read("/etc/mcr/mcr.toml")
        + "\n[[rule]]\nin = \"239.1.1.1:5000@in0\"\nout = \"239.2.2.2:6000@out0\"\n";
    root.write("/etc/mcr/mcr.toml", &operators);
    root.write("/etc/mcr/rules.d/mcr-saved.toml", "");
    dpkg(&root, "--install", &second);
    told(&[]);
    assert_eq!(root.read("/etc/mcr/mcr.toml"), operators);
    assert!(is_there(ENABLED));

    // Disabled it stays.
    fs::remove_file(root.path(ENABLED)).expect("disabled");
    dpkg(&root, "--install", &second);
    told(&[]);
    assert!(!is_there(ENABLED));

    // Removed it leaves what the operator wrote, and comes back as it was.
    dpkg(&root, "--remove", "mcr");
    told(&["stop mcr.service run-bpf-mcr.mount"]);
    assert!(!is_there("/usr/bin/mcr"));
    assert_eq!(root.read("/etc/mcr/mcr.toml"), operators);
    dpkg(&root, "--install", &second);
    told(&[]);
    assert!(!is_there(ENABLED));
    fs::remove_dir_all(root.path("/var/lib/systemd/deb-systemd-helper-enabled")).expect("forgotten");
    dpkg(&root, "--install", &second);
    told(&["--quiet --system start mcr.service"]);
    assert!(is_there(ENABLED));
    dpkg(&root, "--remove", "mcr");
    assert!(!is_there(ENABLED));
    root.told();
    dpkg(&root, "--install", &second);
    told(&["--quiet --system start mcr.service"]);
    assert!(is_there(ENABLED));
    assert_eq!(root.read("/etc/mcr/mcr.toml"), operators);

    for state in ["/var/lib/mcr", "/run/mcr"] {
        fs::create_dir_all(root.path(state)).expect("what the service had");
    }
    dpkg(&root, "--purge", "mcr");
    told(&["stop mcr.service run-bpf-mcr.mount"]);
    assert!(!is_there("/run/mcr"));
    assert_nothing_left(&root);
}

/// Files with their owners and modes, the user, and a binary that works.
#[track_caller]
fn assert_installed(root: &Root) {
    for (path, mode) in [
        ("/usr/bin/mcr", 0o100_755),
        ("/usr/lib/systemd/system/mcr.service", 0o100_644),
        ("/usr/lib/systemd/system/run-bpf-mcr.mount", 0o100_644),
        ("/usr/lib/sysusers.d/mcr.conf", 0o100_644),
        ("/usr/lib/tmpfiles.d/mcr.conf", 0o100_644),
        ("/etc/mcr", 0o40_755),
        ("/etc/mcr/mcr.toml", 0o100_644),
        ("/etc/mcr/rules.d", 0o40_775),
        ("/usr/share/man/man1/mcr.1.gz", 0o100_644),
        ("/usr/share/man/man1/mcr-rule-add.1.gz", 0o100_644),
        ("/usr/share/man/man5/mcr.toml.5.gz", 0o100_644),
        ("/usr/share/bash-completion/completions/mcr", 0o100_644),
        ("/usr/share/zsh/vendor-completions/_mcr", 0o100_644),
        ("/usr/share/fish/vendor_completions.d/mcr.fish", 0o100_644),
        ("/usr/share/doc/mcr/copyright", 0o100_644),
        ("/usr/share/doc/mcr/changelog.gz", 0o100_644),
        ("/usr/share/doc/mcr/third-party-notices.gz", 0o100_644),
        ("/usr/share/doc/mcr/README.md", 0o100_644),
        ("/usr/share/doc/mcr/examples/fan-out.toml", 0o100_644),
    ] {
        let metadata = root.path(path).metadata().unwrap_or_else(|error| panic!("{path}: {error}"));
        assert_eq!(format!("{:o}", metadata.permissions().mode()), format!("{mode:o}"), "{path}");
        assert_eq!(metadata.uid(), 0, "{path}");
    }
    // The user, and what its daemon may write.
    let group = root.run(&["id", "--group", "mcr"]).ok().trim().parse::<u32>().expect("a number");
    assert_eq!(root.path("/etc/mcr/rules.d").metadata().expect("a folder").gid(), group);
    // What is on the disk is what was packed.
    assert_eq!(root.run(&["dpkg", "--verify", "mcr"]).ok(), "");
    assert_eq!(root.run(&["mcr", "--version"]).ok(), concat!("mcr ", env!("CARGO_PKG_VERSION"), "\n"));
    for (file, rules) in [
        ("/etc/mcr/mcr.toml", 0),
        ("/usr/share/doc/mcr/examples/fan-out.toml", 1),
        ("/usr/share/doc/mcr/examples/market-data.toml", 2),
    ] {
        let checked = root.run(&["mcr", "config", "check", file]);
        assert!(checked.ok().contains(&format!("is right: {rules} rule")), "{checked}");
    }
}

/// Of the package and of what its service had.
#[track_caller]
fn assert_nothing_left(root: &Root) {
    let named = |path: &PathBuf| path.to_string_lossy().contains("mcr");
    let left: Vec<_> = root.changed().into_iter().filter(named).collect();
    assert!(left.is_empty(), "{left:?}");
    let known = root.run(&["dpkg-query", "--show", "mcr"]);
    assert_eq!(known.status, 1, "{known}");
}

#[test]
fn nothing_fails_where_no_systemd_runs() {
    let scratch = Scratch::make();
    let root = Root::make();
    let [first, second] = [1, 2].map(|revision| root.bring(&package(scratch.dir(), revision)));
    fs::remove_dir(root.path("/run/systemd/system")).expect("systemd does not run");
    for tools_are_there in [true, false] {
        if !tools_are_there {
            root.run(&["sh", "-c", "rm -f /usr/bin/systemctl /usr/bin/systemd-*"]).ok();
        }
        dpkg(&root, "--install", &first);
        root.run(&["mcr", "config", "check", "/etc/mcr/mcr.toml"]).ok();
        dpkg(&root, "--install", &second);
        dpkg(&root, "--remove", "mcr");
        dpkg(&root, "--purge", "mcr");
        assert_nothing_left(&root);
    }
    assert_eq!(root.told(), [""; 0]);
}

const RULES: &str = r#"
[[rule]]
name = "cam1"
in = "239.1.1.1:5000@in0"
out = "239.2.2.1:6000@out0"

[[rule]]
name = "cam2"
in = "239.1.1.2:5000@in0"
out = "239.2.2.2:6000@out1"

[[rule]]
name = "cam3"
in = "239.1.1.3:5000@in0"
out = ["239.2.2.3:6000@out0", "10.78.2.2:6000@out2"]
"#;

#[test]
fn what_was_installed_relays_and_an_upgrade_reloads_it_without_a_gap() {
    let site = Site::default();
    let root = Root::make();
    let [first, second] = [1, 2].map(|revision| root.bring(&package(site.scratch.dir(), revision)));
    dpkg(&root, "--install", &first);
    let original = root.read("/etc/mcr/mcr.toml");
    root.write("/etc/mcr/mcr.toml", &format!("{original}{RULES}"));
    let mut run = root.command(&site.relay, &["mcr", "run", "--config", "/etc/mcr/mcr.toml"]);
    let relay = Relay::spawn_at(&site, &mut run, root.path("/run/mcr/mcr.sock"));

    // Three rules, a datagram each.
    let mut sinks = [0, 1, 2].map(|sink| site.capture(sink));
    for camera in 1..=3 {
        relay.wait_until_active(&format!("cam{camera}"));
        let group = format!("239.1.1.{camera}");
        site.segments[0].wait_until_joined(group.parse().expect("a group"));
        Source::play(site.source(), Stream { count: 1, ..Stream::to(at(&format!("{group}:5000"))) });
    }
    for (sink, to) in
        [(0, "239.2.2.1:6000"), (1, "239.2.2.2:6000"), (0, "239.2.2.3:6000"), (2, "10.78.2.2:6000")]
    {
        sinks[sink].exactly(at(to), 1);
    }

    // The operator has one rule more, and the package a successor.
    let fourth = "\n[[rule]]\nname = \"cam4\"\nin = \"239.1.1.4:5000@in0\"\nout = \"239.2.2.4:6000@out0\"\n";
    root.write("/etc/mcr/mcr.toml", &format!("{original}{RULES}{fourth}"));
    let pid = relay.pid();
    let mut sink = site.capture(1);
    let source = Source::start(site.source(), Stream::to(at("239.1.1.2:5000")));
    sink.at_least(at("239.2.2.2:6000"), 1_000);
    root.told();
    let upgrade = dpkg(&root, "--install", &second);
    source.wait_for_more(1_000);
    let sent = source.stop();
    assert!(upgrade.stdout.contains("the new version takes over with: systemctl restart mcr"), "{upgrade}");
    let told = root.told();
    let told: Vec<_> = told.iter().filter(|line| *line != DAEMON_RELOAD).collect();
    assert_eq!(told, ["reload mcr.service"]);
    let relayed = sink.exactly(at("239.2.2.2:6000"), usize::try_from(sent).expect("a count"));
    assert_sequence(&relayed, 0..sent);
    assert_eq!(relay.pid(), pid);
    relay.wait_until_active("cam4");

    // Its own program's file is gone; what it starts is still of its own build.
    let worker = relay.workers()[0].pid.expect("a worker that runs");
    kill(nix::unistd::Pid::from_raw(worker.cast_signed()), Signal::SIGKILL).expect("a process");
    wait_until("the worker is replaced", PATIENCE, || {
        relay.workers()[0].pid.is_some_and(|pid| pid != worker) && relay.workers()[0].state == "running"
    });
    let mut sink = site.capture(0);
    Source::play(site.source(), Stream { count: 1_000, ..Stream::to(at("239.1.1.4:5000")) });
    assert_sequence(&sink.exactly(at("239.2.2.4:6000"), 1_000), 0..1_000);
}

#[test]
fn every_manual_page_is_right() {
    let scratch = Scratch::make();
    let man = unpacked(&scratch).join("usr/share/man");
    let names = |section: &str| -> BTreeSet<_> {
        let entries = fs::read_dir(man.join(section)).expect("manual pages");
        entries.map(|entry| entry.expect("an entry").file_name().into_string().expect("a name")).collect()
    };
    let commands = names("man1");
    for page in ["mcr.1.gz", "mcr-run.1.gz", "mcr-rule.1.gz", "mcr-rule-add.1.gz", "mcr-log-level-set.1.gz"] {
        assert!(commands.contains(page), "{commands:?}");
    }
    for page in ["mcr-worker.1.gz", "mcr-hold.1.gz", "mcr-help.1.gz"] {
        assert!(!commands.contains(page), "{page}");
    }
    let pages = commands.iter().map(|name| man.join("man1").join(name));
    for page in pages.chain([man.join("man5/mcr.toml.5.gz")]) {
        let mut render = Command::new("man");
        render.args(["--warnings", "-E", "UTF-8", "-l", "-Tutf8", "-Z"]).arg(&page).env("LC_ALL", "C.UTF-8");
        let rendered = Process::spawn(&mut render).answer(PATIENCE);
        assert_eq!(rendered.stderr, "", "{}", page.display());
        assert!(rendered.ok().contains("DESCRIPTION"), "{}", page.display());
        // `apropos` finds it.
        let what = ok(Command::new("lexgrog").arg(&page));
        let name = page.file_name().expect("a name").to_string_lossy();
        let name = name.rsplitn(3, '.').last().expect("NAME.SECTION.gz");
        assert!(what.contains(&format!("\"{name} - ")), "{what}");
    }
}

/// What stands between two texts, the first time that they come.
#[track_caller]
fn between<'a>(text: &'a str, start: &str, end: &str) -> &'a str {
    let (_, rest) = text.split_once(start).unwrap_or_else(|| panic!("no '{start}' in {text}"));
    rest.split_once(end).map_or(rest, |(found, _)| found)
}

#[test]
fn mcr_toml_5_has_every_key_and_every_option() {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../packaging/man/mcr.toml.5");
    let page = fs::read_to_string(page).expect("the page");
    let documented = |section: &str, end: &str, item: &str| -> BTreeSet<String> {
        let lines = between(&page, section, end).lines();
        lines.filter_map(|line| Some(line.strip_prefix(item)?.split_once(" No = ")?.0.to_owned())).collect()
    };

    // What there is, the binary says of what there is not.
    let scratch = Scratch::make();
    let file = scratch.dir().join("mcr.toml");
    let wrong = "[daemon]\nno_key = 1\n[[rule]]\nno_key = 1\n[[rule]]\nin = \"239.1.1.1:5000@eth0,nought=1\"\n\
                 out = \"239.1.1.1:5000@eth0,nought=1\"\n";
    fs::write(&file, wrong).expect("a file");
    let checked =
        Process::spawn(Command::new(binary()).args(["config", "check"]).arg(&file)).answer(PATIENCE);
    let said = &checked.stdout;
    let list = |start: &str| -> BTreeSet<String> {
        between(said, start, "\n").split(", ").map(str::to_owned).collect()
    };
    let options = |form: &str| -> BTreeSet<String> {
        let form = between(said, &format!("write {form}"), "\n");
        form.split("[,").skip(1).filter_map(|option| Some(option.split_once('=')?.0.to_owned())).collect()
    };

    for (what, documented, accepted) in [
        (
            "[daemon]",
            documented(".Sh THE DAEMON", ".Sh RULES", ".It Ic "),
            list("is no key of [daemon]: there are "),
        ),
        (
            "[[rule]]",
            documented(".Sh RULES", ".Sh ENDPOINTS", ".It Ic "),
            list("is no key of a rule: there are "),
        ),
        (
            "in",
            documented(".Ss Options of inputs", ".Ss Options of outputs", ".It Cm "),
            options("GROUP:PORT"),
        ),
        (
            "out",
            documented(".Ss Options of outputs", ".Sh DATAPATHS", ".It Cm "),
            options("GROUP-OR-HOST:PORT"),
        ),
    ] {
        assert!(!accepted.is_empty(), "{what}: {checked}");
        assert_eq!(documented, accepted, "{what}");
    }
}

/// What bash completes a line's last word to.
#[track_caller]
fn bash_completes(file: &Path, line: &str) -> BTreeSet<String> {
    const COMPLETE: &str = r#"
        source "$1"; shift
        # As bash itself does: the function that is registered for the command, told what was typed.
        function=$(complete -p "$1") && function=${function#*-F } && function=${function%% *}
        COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)) COMP_LINE="$*" COMP_POINT=${#COMP_LINE}
        "$function" "$1" "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
        printf '%s\n' "${COMPREPLY[@]}"
    "#;
    let mut bash = Command::new("bash");
    bash.args(["--norc", "-c", COMPLETE, "bash"]).arg(file).args(line.split(' '));
    ok(&mut bash).lines().map(str::to_owned).collect()
}

#[test]
fn bash_zsh_and_fish_complete_what_there_is() {
    let scratch = Scratch::make();
    let share = unpacked(&scratch).join("usr/share");
    let bash = share.join("bash-completion/completions/mcr");
    for (line, words) in [
        ("mcr rule a", &["add"][..]),
        ("mcr ru", &["rule", "run"]),
        ("mcr config ro", &["rollback"]),
        ("mcr stop --k", &["--keep"]),
        ("mcr run --log-format ", &["json", "text"]),
        // The daemon's own.
        ("mcr worke", &["workers"]),
        ("mcr hol", &[]),
    ] {
        let completed = bash_completes(&bash, line);
        assert_eq!(
            completed.iter().map(String::as_str).filter(|word| !word.is_empty()).collect::<Vec<_>>(),
            words,
            "{line}"
        );
    }

    let fish = share.join("fish/vendor_completions.d/mcr.fish");
    let mut fish_command = Command::new("fish");
    fish_command
        .args(["--no-config", "-c", "source $argv[1]; complete --do-complete 'mcr rule a'"])
        .arg(&fish);
    // A home of its own: fish writes there.
    let completed = ok(fish_command.env("HOME", scratch.dir()));
    assert_eq!(completed.split('\t').next(), Some("add"), "{completed}");

    let functions = share.join("zsh/vendor-completions");
    let mut zsh = Command::new("zsh");
    zsh.args([
        "-f",
        "-c",
        "fpath+=($1); autoload -Uz compinit; compinit -D -u; print $_comps[mcr]; autoload +X _mcr",
        "zsh",
    ]);
    assert_eq!(ok(zsh.arg(&functions).env("HOME", scratch.dir())), "_mcr\n");
}
