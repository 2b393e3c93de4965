//! What the documents say: every command of the guide is run, and prints what its page shows; the commands, options and
//! documents that are named exist.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::Command,
};

use tests::{Ground, Site, guide::Reader, relay, site::Plan};

/// Pages whose commands are run by the tests of what they describe.
const REFERENCE: [&str; 4] = ["control-protocol.md", "doctor.md", "metrics.md", "service.md"];

/// Blocks of commands that cannot be run here: page and reason.
const NOT_RUN: [(&str, &str); 5] = [
    ("containers.md", "needs docker"),
    ("tuning-a-nic.md", "needs a network card with queues that can be combined"),
    ("tuning-a-nic.md", "needs a network card with receive hashing"),
    ("tuning-a-nic.md", "needs a network card with ntuple filters"),
    ("tuning-a-nic.md", "needs a network card with rings that can be set"),
];

/// Commands that `--help` does not list.
const HIDDEN: [&str; 2] = ["hold", "worker"];

/// Options in the documents that are of other programs.
const OF_OTHERS: [&str; 1] = ["--quick"];

/// Makes a test of each page, in the site that it takes.
macro_rules! pages {
    ($($test:ident $page:literal $plan:expr;)*) => {
        const PAGES: &[&str] = &[$($page),*];

        mod the_page {
            use super::*;

            $(#[test] fn $test() { follow($page, $plan); })*
        }
    };
}

pages! {
    index "README.md" Plan::default();
    first_relay "first-relay.md" Plan::default();
    fan_out "fan-out.md" Plan::default();
    unroutable_source "unroutable-source.md" Plan {
        source_address: Some(Ipv4Addr::new(10, 1, 0, 1)),
        ..Plan::default()
    };
    vpn "vpn.md" Plan::default();
    ssm "ssm.md" Plan::default();
    tcpdump "tcpdump.md" Plan::default();
    tuning_a_nic "tuning-a-nic.md" Plan { queues: 2, ..Plan::default() };
    reading_the_ledger "reading-the-ledger.md" Plan::default();
    bpftool "bpftool.md" Plan::default();
    containers "containers.md" Plan::default();
    upgrading "upgrading.md" Plan { ground: Ground::Kernel, ..Plan::default() };
    troubleshooting "troubleshooting.md" Plan::default();
}

/// Follows a page of `docs/` in a site.
#[track_caller]
fn follow(page: &str, plan: Plan) {
    let site = Site::build(plan);
    let left_out = Reader::new(&site).follow(page, &read(&format!("docs/{page}")));
    let expected: Vec<_> = NOT_RUN.iter().filter(|(of, _)| *of == page).map(|(_, why)| *why).collect();
    assert_eq!(left_out, expected, "blocks of {page} that are not run");
}

/// What `README.md` leaves to its first block.
const DAEMON: &str = "\
```console
$ mcr run --metrics 9464 &
… INFO ready …
```
";

#[test]
fn the_readme_shows_what_happens() {
    let site = Site::default();
    let mut reader = Reader::new(&site);
    reader.follow("the daemon", DAEMON);
    let left_out = reader.follow("README.md", &read("README.md"));
    assert!(left_out.is_empty(), "{left_out:?}");
}

#[test]
fn every_page_is_run_and_in_the_index() {
    let index = read("docs/README.md");
    for page in documents().iter().filter_map(|document| document.strip_prefix("docs/")) {
        assert!(PAGES.contains(&page) || REFERENCE.contains(&page), "docs/{page} is run by no test");
        assert!(
            page == "README.md" || index.contains(&format!("({page})")),
            "docs/{page} is not in the index"
        );
    }
    for page in PAGES {
        let commands =
            read(&format!("docs/{page}")).lines().filter(|line| line.starts_with("```console")).count();
        assert!(commands > 0, "docs/{page} has no command");
    }
}

#[test]
fn every_command_and_option_in_the_documents_exists() {
    let mut commands = BTreeMap::new();
    learn(&mut Vec::new(), &mut commands);
    for hidden in HIDDEN {
        learn(&mut vec![hidden.to_owned()], &mut commands);
    }
    assert!(commands["rule add"].contains("--datapath"), "{commands:?}");
    let all: BTreeSet<_> = commands.values().flatten().map(String::as_str).chain(OF_OTHERS).collect();
    let mut wrong = Vec::new();
    for document in documents() {
        for code in code(&read(&document)) {
            let stale = stale(&code, &commands)
                .or_else(|| option(&code).filter(|option| !all.contains(option)).map(str::to_owned));
            wrong.extend(stale.map(|what| format!("{document}: {code}: there is no {what}")));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn links_between_documents_lead_somewhere() {
    let mut wrong = Vec::new();
    for document in documents() {
        let text = read(&document);
        let targets =
            text.split("](").skip(1).filter_map(|rest| rest.split_once(')')).map(|(target, _)| target);
        for target in targets.filter(|target| !target.contains("://")) {
            let (file, heading) = target.split_once('#').unwrap_or((target, ""));
            let folder = Path::new(&document).parent().expect("a folder");
            let path = if file.is_empty() { root().join(&document) } else { root().join(folder).join(file) };
            let there = path.exists()
                && (heading.is_empty()
                    || fs::read_to_string(&path).is_ok_and(|text| headings(&text).contains(heading)));
            if !there {
                wrong.push(format!("{document}: {target}"));
            }
        }
    }
    assert!(wrong.is_empty(), "these lead nowhere: {wrong:#?}");
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

#[track_caller]
fn read(document: &str) -> String {
    let path = root().join(document);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Every document of the project, but for what has been and those on its inside.
fn documents() -> Vec<String> {
    let pages = fs::read_dir(root().join("docs")).expect("docs/");
    let pages = pages.filter_map(|entry| entry.expect("an entry").file_name().into_string().ok());
    let pages = pages
        .filter(|name| Path::new(name).extension().is_some_and(|kind| kind == "md"))
        .map(|name| format!("docs/{name}"));
    let mut documents = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md"].map(str::to_owned).to_vec();
    documents.extend(pages);
    documents.sort();
    documents
}

/// Learns from `--help` which commands there are below one, and the options of each.
fn learn(command: &mut Vec<String>, commands: &mut BTreeMap<String, BTreeSet<String>>) {
    let output = Command::new(relay::binary()).args(&*command).arg("--help").output().expect("mcr --help");
    let help = String::from_utf8(output.stdout).expect("UTF-8");
    let options =
        help.lines().filter_map(|line| line.trim_start().trim_start_matches("-h, ").split_once("--"));
    let options = options.filter(|(before, _)| before.is_empty() || *before == "-V, ");
    let name = |(_, rest): (&str, &str)| {
        format!(
            "--{}",
            rest.split(|c: char| c != '-' && !c.is_ascii_alphanumeric()).next().unwrap_or_default()
        )
    };
    commands.insert(command.join(" "), options.map(name).collect());
    let below =
        help.lines().skip_while(|line| *line != "Commands:").skip(1).take_while(|line| !line.is_empty());
    for line in below.filter(|line| !line.starts_with("   ")) {
        let name = line.split_whitespace().next().expect("a command");
        command.push(name.to_owned());
        if name == "help" {
            commands.insert(command.join(" "), BTreeSet::new());
        } else {
            learn(command, commands);
        }
        command.pop();
    }
}

/// What stands in code in a document: between backticks, and in blocks; of blocks of commands only what is typed.
fn code(document: &str) -> Vec<String> {
    let mut pieces = Vec::new();
    let mut text = String::new();
    let mut block: Option<&str> = None;
    for line in document.lines() {
        match (line.trim_start().strip_prefix("```"), block) {
            (Some(_), Some(_)) => block = None,
            (Some(info), None) => block = Some(info),
            (None, Some(info)) if info.starts_with("console") => {
                pieces.extend(line.split_once("$ ").map(|(_, typed)| typed.to_owned()));
            }
            (None, Some(_)) => pieces.push(line.to_owned()),
            (None, None) => text = text + line + " ",
        }
    }
    pieces.extend(text.split('`').skip(1).step_by(2).map(str::to_owned));
    pieces
}

/// A command or option of mcr that code names and that does not exist.
fn stale(code: &str, commands: &BTreeMap<String, BTreeSet<String>>) -> Option<String> {
    let mut words = code.split_whitespace().peekable();
    while let Some(word) = words.next() {
        let is_command = |word: &&str| word.starts_with(|c: char| c.is_ascii_lowercase()) && *word != "mcr";
        if (word != "mcr" && !word.ends_with("/mcr")) || words.peek().is_none_or(|next| !is_command(next)) {
            continue;
        }
        let mut command = words.next()?.trim_end_matches([',', ';']).to_owned();
        if !commands.contains_key(&command) {
            return Some(format!("mcr {command}"));
        }
        while let Some(longer) = words.peek().map(|next| format!("{command} {next}"))
            && commands.contains_key(&longer)
        {
            command = longer;
            words.next();
        }
        while let Some(word) = words.next_if(|word| !["|", ";", "&", "&&", "#"].contains(word)) {
            if let Some(option) = option(word.trim_start_matches('['))
                && !commands[&command].contains(option)
            {
                return Some(format!("{option} of mcr {command}"));
            }
        }
    }
    None
}

/// The option that code begins with.
fn option(code: &str) -> Option<&str> {
    let end = code.find(|c: char| c != '-' && !c.is_ascii_alphanumeric()).unwrap_or(code.len());
    Some(&code[..end]).filter(|option| option.starts_with("--") && option.len() > 2)
}

/// The headings of a document as links name them.
fn headings(document: &str) -> BTreeSet<String> {
    let named = |heading: &str| {
        let kept = heading.trim().to_lowercase();
        let kept = kept.chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c));
        kept.map(|c| if c == ' ' { '-' } else { c }).collect()
    };
    document
        .lines()
        .filter(|line| line.starts_with('#'))
        .map(|line| named(line.trim_start_matches('#')))
        .collect()
}
