use super::*;
use crate::{
    config::{document, fragment},
    rule::Datapath,
    supervisor::settings::LogLevel,
};

fn source(file: &str, text: &str) -> Source {
    Source { file: file.to_owned(), text: text.to_owned() }
}

const GOOD: &str = r#"
[daemon]
datapath = "af-packet"
workers = 2
generic_xdp = true
cpus = "0-3,6"
busy_poll = 100
control = "/run/mcr/other.sock"
source_port = 7000
max_rules = 100
log_level = "debug"

[[rule]]
name = "cam1"
in   = "239.1.1.1:5000@eth0,source=192.0.2.7"
out  = ["239.2.2.2:6000@eth1", "239.3.3.3:7000@eth2,ttl=8,dscp=46,from=10.0.0.5:99,gso=false,loop=true"]
datapath = "af-xdp"
merge = true

[[rule]]
in = "224.0.0.9:5000@eth0"
out = "10.0.0.9:6000@eth1"
link_local = true
"#;

#[test]
fn every_option_and_every_rule_option_is_read() {
    let config = read(&[source("mcr.toml", GOOD)], &Options::default()).unwrap();
    let settings = Settings::from(config.options);
    assert_eq!(settings.datapath, DatapathChoice(Some(Datapath::AfPacket)));
    assert_eq!((settings.workers.map(std::num::NonZeroU32::get), settings.generic_xdp), (Some(2), true));
    assert_eq!((settings.cpus, settings.busy_poll_us), (Some(vec![0, 1, 2, 3, 6]), Some(100)));
    assert_eq!((settings.source_port, settings.max_rules), (Some(7000), 100));
    assert_eq!(settings.log_level, LogLevel::Debug);
    let [(cam1, place), (derived, _)] = &config.rules[..] else { panic!("{:?}", config.rules) };
    assert_eq!(place.to_string(), "mcr.toml:13");
    assert_eq!((cam1.name.as_str(), cam1.merge, cam1.link_local), ("cam1", true, false));
    assert_eq!(cam1.input.to_string(), "239.1.1.1:5000@eth0,source=192.0.2.7");
    let output = "239.3.3.3:7000@eth2,ttl=8,dscp=46,from=10.0.0.5:99,gso=false,loop=true";
    assert_eq!(cam1.outputs[1].to_string(), output);
    assert_eq!(cam1.datapath, DatapathChoice(Some(Datapath::AfXdp)));
    assert_eq!((derived.name.as_str(), derived.link_local), ("r-224.0.0.9-5000-eth0", true));
}

#[test]
fn of_a_great_many_mistakes_the_first_are_told() {
    for text in ["a\n", "[[rule]]\n", "[[rule]]\nin = 1\n"] {
        let mistakes = read(&[source("mcr.toml", &text.repeat(200_000))], &Options::default()).unwrap_err();
        assert_eq!(mistakes.len(), MOST + 1, "{text}");
        assert!(mistakes[MOST].what.starts_with("and more"), "{}", mistakes[MOST]);
    }
}

#[test]
fn what_is_written_is_read_as_it_was() {
    let config = read(&[source("mcr.toml", GOOD)], &Options::default()).unwrap();
    let mut set = RuleSet::new(10);
    for (rule, place) in &config.rules {
        set.add(rule.clone(), Origin::File(place.clone())).unwrap();
    }
    let settings = Settings::from(config.options);
    let again = read(&[source("saved.toml", &document(&settings, set.iter()))], &Options::default()).unwrap();
    assert_eq!(Settings::from(again.options), settings);
    let rules = |rules: &[(Rule, Place)]| rules.iter().map(|(rule, _)| rule.clone()).collect::<Vec<_>>();
    assert_eq!(rules(&again.rules), rules(&config.rules));
    let text = fragment(rules(&config.rules).iter(), settings.datapath);
    assert_eq!(
        rules(
            &read_fragment(&source("f.toml", &text), &Options::of_rules(100, settings.datapath))
                .unwrap()
                .rules
        ),
        rules(&config.rules)
    );
}

/// What is wrong with a file, each as `LINE:COLUMN: WHAT`, and the text that is meant.
fn mistakes(text: &str) -> Vec<(String, String)> {
    let mistakes = read(&[source("f", text)], &Options::default()).unwrap_err();
    let meant = |mistake: &Mistake| {
        let meant = mistake.text.chars().skip(mistake.column as usize - 1).take(mistake.width as usize);
        meant.collect::<String>()
    };
    mistakes.iter().map(|mistake| (mistake.to_string()[2..].to_owned(), meant(mistake))).collect()
}

#[test]
fn each_mistake_is_told_with_its_place() {
    let rule = "[[rule]]\nin = \"239.1.1.1:5000@eth0\"\nout = [\"239.2.2.2:6000@eth1\"]\n";
    for (text, place, what, meant) in [
        ("[deamon]\n", "1:2", "'deamon' is no key of a file: there are [daemon] and [[rule]]", "deamon"),
        (
            "[rule]\nname = \"a\"\n",
            "1:2",
            "there may be several rules: write [[rule]], with two brackets",
            "rule",
        ),
        ("daemon = 1\n", "1:10", "'daemon' is a table: write [daemon]", "1"),
        ("[daemon]\nworker = 2\n", "2:1", "'worker' is no key of [daemon]: there are ", "worker"),
        ("[daemon]\nconfig = \"x\"\n", "2:1", "'config' is no key of [daemon]: there are ", "config"),
        ("[daemon]\nworkers = \"2\"\n", "2:11", "'workers' takes a number, and this is a string", "\"2\""),
        ("[daemon]\nworkers = 2.5\n", "2:11", "'workers' takes a number, and this is a float", "2.5"),
        ("[daemon]\nworkers = 0\n", "2:11", "'workers' cannot be '0': write a number from 1 to 256", "0"),
        (
            "[daemon]\nmax_rules = 99999\n",
            "2:13",
            "'max_rules' cannot be '99999': 99999 is not in 1..=65536",
            "99999",
        ),
        ("[daemon]\nmax_rules = -1\n", "2:13", "'max_rules' cannot be '-1': ", "-1"),
        ("[daemon]\ngroup = true\n", "2:9", "'group' takes a text in quotes, and this is a boolean", "true"),
        (
            "[daemon]\ngeneric_xdp = 1\n",
            "2:15",
            "'generic_xdp' takes true or false, and this is an integer",
            "1",
        ),
        (
            "[daemon]\nlog_level = \"loud\"\n",
            "2:13",
            "'log_level' cannot be 'loud': there are error",
            "\"loud\"",
        ),
        ("[daemon]\ncpus = \"3-1\"\n", "2:8", "'cpus' cannot be '3-1': the range 3-1 ends", "\"3-1\""),
        (
            "[daemon]\ndatapath = \"fast\"\n",
            "2:12",
            "'datapath' cannot be 'fast': 'fast' is no datapath",
            "\"fast\"",
        ),
        ("[[rule]]\n", "1:1", "the rule has no 'in': write in = ", "[[rule]]"),
        (&format!("{rule}outt = 1\n"), "4:1", "'outt' is no key of a rule: there are name, in, out", "outt"),
        (&format!("{rule}merge = 1\n"), "4:9", "'merge' takes true or false, and this is an integer", "1"),
        (&format!("{rule}name = 7\n"), "4:8", "'name' takes a text in quotes, and this is an integer", "7"),
        (&format!("{rule}name = \"7\"\n"), "4:8", "'7' is no rule name: start with a letter", "\"7\""),
        (
            "[[rule]]\nin = \"239.1.1.1@eth0\"\nout = \"239.2.2.2:1@e\"",
            "2:6",
            "'239.1.1.1@eth0' is no endpoint",
            "\"239.1.1.1@eth0\"",
        ),
        (
            "[[rule]]\nin = \"239.1.1.1:1@eth0\"\nout = [\"239.2.2.2:1@e\", 7]",
            "3:25",
            "'out' takes a text in quotes",
            "7",
        ),
        (
            "[[rule]]\nin = \"239.1.1.1:1@eth0\"\nout = []",
            "1:1",
            "rule 'r-239.1.1.1-1-eth0' has no output",
            "[[rule]]",
        ),
        (
            "[[rule]]\nin = \"224.0.0.5:1@eth0\"\nout = \"239.2.2.2:1@e\"",
            "1:1",
            "224.0.0.5 is link-local",
            "[[rule]]",
        ),
        (
            &format!("{rule}{}", rule.replace("in =", "name = \"b\"\nin =")),
            "4:1",
            "239.1.1.1:5000@eth0 is the input of rule 'r-239.1.1.1-5000-eth0' (f:1) already",
            "[[rule]]",
        ),
        (
            &format!("{rule}{}", rule.replace("239.1.1.1", "239.1.1.2")),
            "4:1",
            "the output 239.2.2.2:6000@eth1 is fed by rule 'r-239.1.1.1-5000-eth0' (f:1) already: say merge = true",
            "[[rule]]",
        ),
        ("[daemon\n", "1:8", "unclosed table, expected `]`", ""),
        ("[daemon]\nworkers = 1\nworkers = 2\n", "3:1", "duplicate key", "workers"),
        ("\u{fc} = 1\n", "1:1", "", "\u{fc}"),
    ] {
        let found = mistakes(text);
        assert!(!found.is_empty(), "{text}");
        let (told, told_meant) = &found[0];
        assert!(told.starts_with(&format!("{place}: {what}")), "{text}: {found:?}");
        if !meant.is_empty() {
            assert_eq!(told_meant, meant, "{text}");
        }
        assert!(!told.contains('\n'), "{told}");
    }
}

#[test]
fn all_mistakes_are_told_at_once() {
    let text =
        "[daemon]\nworkers = 0\nlog_level = 3\n[[rule]]\nin = \"x\"\nout = [\"y\", \"z\"]\nzz = 1\n[other]\n";
    let lines: Vec<_> =
        mistakes(text).iter().map(|(told, _)| told.split(':').next().unwrap().to_owned()).collect();
    assert_eq!(lines, ["2", "3", "5", "6", "6", "7", "8"]);
}

#[test]
fn a_mistake_is_shown_under_its_line() {
    let mistakes = read(&[source("f", "[daemon]\n\tworkers = \"2\"\n")], &Options::default()).unwrap_err();
    let shown = "f:2:12: 'workers' takes a number, and this is a string\n  |\n2 | \tworkers = \"2\"\n  | \t          ^^^\n";
    assert_eq!(mistakes[0].excerpt(), shown);
}

#[test]
fn fragments_hold_rules_alone_and_conflict_across_files() {
    let rule = "[[rule]]\nin = \"239.1.1.1:5000@eth0\"\nout = [\"239.2.2.2:6000@eth1\"]\n";
    let sources = [
        source("mcr.toml", &format!("{rule}name = \"a\"\n")),
        source("rules.d/1.toml", "[daemon]\nworkers = 2\n"),
        source("rules.d/2.toml", &format!("{rule}name = \"b\"\n")),
    ];
    let told: Vec<_> =
        read(&sources, &Options::default()).unwrap_err().iter().map(ToString::to_string).collect();
    assert!(told[0].starts_with("rules.d/1.toml:1:2: [daemon] does not belong in a fragment"), "{told:?}");
    assert!(
        told[1].starts_with("rules.d/2.toml:1:1: 239.1.1.1:5000@eth0 is the input of rule 'a' (mcr.toml:1)")
    );
    // The very same rule twice is one.
    let twice = [sources[0].clone(), source("rules.d/3.toml", &format!("{rule}name = \"a\"\n"))];
    assert_eq!(read(&twice, &Options::default()).unwrap().rules.len(), 1);
}

#[test]
fn nothing_that_is_read_panics() {
    let bits = [
        "[", "]", "[[", "rule", "daemon", "=", "\"", "\n", "\u{fc}", "in", "out", "1", "{", "}", ",", "#",
        "\0", "'''",
    ];
    let mut state = 7u64;
    for _ in 0..3000 {
        let mut text = String::new();
        for _ in 0..12 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            text.push_str(bits[(state >> 33) as usize % bits.len()]);
        }
        if let Err(mistakes) = read(&[source("f", &text)], &Options::default()) {
            assert!(mistakes.iter().all(|mistake| !mistake.excerpt().is_empty()));
        }
    }
    for cut in 0..GOOD.len() {
        let _ = read(&[source("f", &GOOD[..cut])], &Options::default());
    }
}
