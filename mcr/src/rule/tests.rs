//! Endpoints, good ones and bad ones, with the exact answer.

use proptest::prelude::*;

use super::*;

const IN: &str = "GROUP:PORT@INTERFACE[,source=ADDRESS], like 239.1.1.1:5000@eth0";
const OUT: &str = "GROUP-OR-HOST:PORT@INTERFACE[,ttl=N|copy|dec][,dscp=N|copy][,from=ADDRESS[:PORT]]\
     [,gso=false][,loop=true], like 239.2.2.2:6000@eth1";

fn round_trip<T: FromStr<Err = RuleError> + fmt::Display + fmt::Debug + PartialEq>(
    text: &str,
    canonical: &str,
) {
    let value: T = text.parse().unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(value.to_string(), canonical);
    assert_eq!(canonical.parse::<T>().unwrap(), value);
}

#[test]
fn inputs_have_one_canonical_text() {
    for (text, canonical) in [
        ("239.1.1.1:5000@eth0", "239.1.1.1:5000@eth0"),
        ("224.0.0.1:1@lo", "224.0.0.1:1@lo"),
        ("239.255.255.255:65535@enp129s0f1np1", "239.255.255.255:65535@enp129s0f1np1"),
        ("232.1.1.1:05000@eth0.5,source=192.0.2.7", "232.1.1.1:5000@eth0.5,source=192.0.2.7"),
        ("239.1.1.1:5000@br-lan_1", "239.1.1.1:5000@br-lan_1"),
    ] {
        round_trip::<Input>(text, canonical);
    }
}

#[test]
fn outputs_have_one_canonical_text() {
    for (text, canonical) in [
        ("239.2.2.2:6000@eth1", "239.2.2.2:6000@eth1"),
        ("192.0.2.9:6000@eth1", "192.0.2.9:6000@eth1"),
        ("239.2.2.2:6000@eth1,ttl=16,dscp=copy,gso=true,loop=false", "239.2.2.2:6000@eth1"),
        ("239.2.2.2:6000@eth1,loop=true,gso=false", "239.2.2.2:6000@eth1,gso=false,loop=true"),
        ("239.2.2.2:6000@eth1,dscp=46,ttl=dec", "239.2.2.2:6000@eth1,ttl=dec,dscp=46"),
        ("239.2.2.2:6000@eth1,ttl=copy", "239.2.2.2:6000@eth1,ttl=copy"),
        ("239.2.2.2:6000@eth1,from=192.0.2.1", "239.2.2.2:6000@eth1,from=192.0.2.1"),
        ("239.2.2.2:6000@eth1,from=192.0.2.1:7", "239.2.2.2:6000@eth1,from=192.0.2.1:7"),
        ("239.2.2.2:6000@eth1,ttl=255,dscp=0", "239.2.2.2:6000@eth1,ttl=255,dscp=0"),
    ] {
        round_trip::<Output>(text, canonical);
    }
}

/// What both inputs and outputs answer.
#[test]
fn what_was_meant_is_answered() {
    for (text, why, write) in [
        // Other notations.
        ("udp://@239.1.1.1:5000", "it is a URL (udp)", "239.1.1.1:5000@INTERFACE"),
        ("udp://239.1.1.1:5000/", "it is a URL (udp)", "239.1.1.1:5000@INTERFACE"),
        ("rtp://239.1.1.1:5000?localaddr=10.0.0.1&ttl=8", "it is a URL (rtp)", "239.1.1.1:5000@INTERFACE"),
        ("udp://@239.1.1.1:5000@eth0", "it is a URL (udp)", "239.1.1.1:5000@eth0"),
        ("udp://eth0@239.1.1.1:5000", "it is a URL (udp)", "239.1.1.1:5000@eth0"),
        ("rtp://192.0.2.7@239.1.1.1:5000", "it is a URL (rtp)", "239.1.1.1:5000@INTERFACE,source=192.0.2.7"),
        ("udp://239.1.1.1", "it is a URL (udp)", "239.1.1.1:PORT@INTERFACE"),
        ("@239.1.1.1:5000", "it starts with '@'", "239.1.1.1:5000@INTERFACE"),
        ("@239.1.1.1:5000@eth0", "it starts with '@'", "239.1.1.1:5000@eth0"),
        (
            "192.0.2.7@239.1.1.1:5000",
            "the source is an option, after a comma",
            "239.1.1.1:5000@INTERFACE,source=192.0.2.7",
        ),
        (
            "192.0.2.7@239.1.1.1:5000@eth0",
            "the source is an option, after a comma",
            "239.1.1.1:5000@eth0,source=192.0.2.7",
        ),
        (
            "239.1.1.1:5000@eth0@if12",
            "'eth0@if12' is how `ip link` shows eth0 and its peer",
            "239.1.1.1:5000@eth0",
        ),
        (
            "239.1.1.1:5000@eth0.5@eth0,ttl=8",
            "'eth0.5@eth0' is how `ip link` shows eth0.5 and its peer",
            "239.1.1.1:5000@eth0.5,ttl=8",
        ),
        ("239.1.1.1:5000@a@b@c", "it has more than one '@'", "239.1.1.1:5000@a"),
        ("eth0:239.1.1.1:5000", "the interface comes last, after '@'", "239.1.1.1:5000@eth0"),
        ("eth0/239.1.1.1:5000,ttl=8", "the interface comes last, after '@'", "239.1.1.1:5000@eth0,ttl=8"),
        ("239.1.1.1:5000%eth0", "the interface comes last, after '@'", "239.1.1.1:5000@eth0"),
        ("239.1.1.1%eth0:5000", "the interface comes last, after '@'", "239.1.1.1:5000@eth0"),
        ("239.1.1.1:5000:eth0", "the interface comes last, after '@'", "239.1.1.1:5000@eth0"),
        ("eth0@239.1.1.1:5000", "it names no port", "239.1.1.1:5000@eth0"),
        // Parts that are missing.
        ("239.1.1.1:5000", "it names no interface", "239.1.1.1:5000@INTERFACE"),
        ("239.1.1.1:5000@", "it names no interface", "239.1.1.1:5000@INTERFACE"),
        ("239.1.1.1:5000,ttl=8", "it names no interface", "239.1.1.1:5000@INTERFACE,ttl=8"),
        ("239.1.1.1", "it names neither port nor interface", "239.1.1.1:PORT@INTERFACE"),
        ("239.1.1.1@eth0", "it names no port", "239.1.1.1:PORT@eth0"),
        ("239.1.1.1:@eth0,ttl=8", "it names no port", "239.1.1.1:PORT@eth0,ttl=8"),
        // White space.
        (" 239.1.1.1:5000@eth0", "it contains white space", "239.1.1.1:5000@eth0"),
        ("239.1.1.1:5000 @ eth0", "it contains white space", "239.1.1.1:5000@eth0"),
        ("239.1.1.1:5000@eth0, ttl=8", "it contains white space", "239.1.1.1:5000@eth0,ttl=8"),
        ("239.1.1.1 5000 eth0", "it contains white space", "239.1.1.1:5000@eth0"),
        ("eth0 192.0.2.7 239.1.1.1", "it contains white space", "239.1.1.1:PORT@eth0,source=192.0.2.7"),
        // IPv6 is told apart.
        ("[ff3e::8000:1]:5000", "it names no interface", "[ff3e::8000:1]:5000@INTERFACE"),
        ("[ff3e::8000:1]@eth0", "it names no port", "[ff3e::8000:1]:PORT@eth0"),
        (
            "ff3e::8000:1@eth0",
            "an IPv6 address stands in brackets, with the port behind",
            "[ff3e::8000:1]:PORT@eth0",
        ),
    ] {
        let expected = format!("'{text}' is no endpoint: {why}; write {write}");
        assert_eq!(text.parse::<Input>().unwrap_err().to_string(), expected);
        assert_eq!(text.parse::<Output>().unwrap_err().to_string(), expected);
    }
}

#[test]
fn what_cannot_be_guessed_is_answered_with_the_form() {
    for (text, why) in [
        ("", "it is empty"),
        ("eth0", "it names no interface"),
        ("eth0@if12", "it names no port"),
        ("example.com:5000@eth0", "'example.com' is no IP address"),
        ("239.1.1:5000@eth0", "'239.1.1' is no IP address"),
        ("239.1.1.256:5000@eth0", "'239.1.1.256' is no IP address"),
        ("239.1.1.1:70000@eth0", "'70000' is no port (1 to 65535)"),
        ("239.1.1.1:+5000@eth0", "'+5000' is no port (1 to 65535)"),
        ("239.1.1.1:-1@eth0", "'-1' is no port (1 to 65535)"),
        ("239.1.1.1:5000-5010@eth0", "'5000-5010' is no port (1 to 65535)"),
        ("[ff3e::1:5000@eth0", "the bracket is not closed"),
        ("239.1.1.1:5000@eth0,", "there is no option after a comma"),
        ("239.1.1.1:5000@eth0,,ttl=8", "there is no option after a comma"),
        ("239.1.1.1:5000@eth0,ttl", "the option 'ttl' has no value"),
        ("239.1.1.1:5000@eth0,ttl=", "the option 'ttl' has no value"),
        ("239.1.1.1:5000@eth0,source=192.0.2.7,source=192.0.2.7", "the option 'source' stands twice"),
        ("239.1.1.1:5000@eth0,tll=8", "there is no option 'tll'"),
        ("http://example.com/", "it is a URL (http)"),
    ] {
        for (form, error) in
            [(IN, text.parse::<Input>().unwrap_err()), (OUT, text.parse::<Output>().unwrap_err())]
        {
            assert_eq!(error.to_string(), format!("'{text}' is no endpoint: {why}; write {form}"));
        }
    }
}

#[test]
fn bad_inputs_are_answered_in_a_line() {
    for (text, why, write) in [
        ("239.1.1.1:0@eth0", "port 0 cannot be received or sent to", "a port from 1 to 65535"),
        ("192.0.2.7:5000@eth0", "192.0.2.7 is no multicast group (224.0.0.0 to 239.255.255.255)", IN),
        ("239.1.1.1:5000@eth0,ttl=8", "the option 'ttl' belongs to an output", IN),
        (
            "239.1.1.1:5000@eth0,source=239.1.1.2",
            "'239.1.1.2' is no host address",
            "source=ADDRESS, like source=192.0.2.7",
        ),
        (
            "239.1.1.1:5000@eth0,source=any",
            "'any' is no host address",
            "source=ADDRESS, like source=192.0.2.7",
        ),
    ] {
        let error = text.parse::<Input>().unwrap_err().to_string();
        assert_eq!(error, format!("'{text}' is no endpoint: {why}; write {write}"));
    }
}

#[test]
fn bad_outputs_are_answered_in_a_line() {
    const TTL: &str = "ttl=1 to ttl=255, ttl=copy or ttl=dec";
    const DSCP: &str = "dscp=0 to dscp=63, or dscp=copy";
    for (options, why, write) in [
        ("ttl=0", "'0' is no TTL", TTL),
        ("ttl=256", "'256' is no TTL", TTL),
        ("ttl=+8", "'+8' is no TTL", TTL),
        ("dscp=64", "'64' is no DSCP", DSCP),
        ("dscp=ef", "'ef' is no DSCP", DSCP),
        ("from=0.0.0.0", "'0.0.0.0' is no host address", "from=ADDRESS, like from=192.0.2.7"),
        ("from=192.0.2.7:0", "port 0 cannot be received or sent to", "a port from 1 to 65535"),
        ("from=192.0.2.7:x", "'x' is no port (1 to 65535)", "from=ADDRESS[:PORT]"),
        ("gso=no", "'no' is neither true nor false", "gso=true or gso=false"),
        ("loop=1", "'1' is neither true nor false", "loop=true or loop=false"),
        ("source=192.0.2.7", "the option 'source' belongs to an input, an output has 'from'", OUT),
    ] {
        let text = format!("239.2.2.2:6000@eth1,{options}");
        let error = text.parse::<Output>().unwrap_err().to_string();
        assert_eq!(error, format!("'{text}' is no endpoint: {why}; write {write}"));
    }
    for text in ["0.0.0.0:6000@eth1", "255.255.255.255:6000@eth1"] {
        let error = text.parse::<Output>().unwrap_err().to_string();
        assert!(error.contains(" is neither a group nor a host; "), "{error}");
    }
}

#[test]
fn ipv6_is_refused_as_such() {
    for text in [
        "[ff3e::8000:1]:5000@eth0",
        "239.2.2.2:6000@eth1,from=2001:db8::1",
        "239.2.2.2:6000@eth1,from=[2001:db8::1]:7",
    ] {
        let error = text.parse::<Output>().unwrap_err().to_string();
        assert_eq!(error, format!("'{text}': IPv6 is not built yet; use an IPv4 address"));
    }
}

#[test]
fn interface_names_are_the_kernels() {
    for name in ["e", "eth0", "enp129s0f1np1", "veth-a.5", "abcdefghijklmno"] {
        assert_eq!(name.parse::<InterfaceName>().unwrap().as_str(), name);
    }
    for name in ["", ".", "..", "a/b", "a b", "abcdefghijklmnop", "eth0:1", "é"] {
        assert!(matches!(name.parse::<InterfaceName>(), Err(RuleError::Interface { .. })), "{name}");
    }
}

#[test]
fn rule_names_start_with_a_letter() {
    for name in ["a", "cam1", "Cam-1_b.c", &"x".repeat(63)] {
        assert_eq!(name.parse::<RuleName>().unwrap().as_str(), name);
    }
    for name in ["", "1cam", "-cam", "cam 1", "cam/1", "kamera-ä", &"x".repeat(64)] {
        assert!(matches!(name.parse::<RuleName>(), Err(RuleError::Name { .. })), "{name}");
    }
}

#[test]
fn a_derived_name_is_a_name() {
    for (input, name) in [
        ("239.1.1.1:5000@eth0", "r-239.1.1.1-5000-eth0"),
        ("239.1.1.1:5000@eth0,source=192.0.2.7", "r-239.1.1.1-5000-eth0-192.0.2.7"),
        ("239.1.1.1:5000@a+b", "r-239.1.1.1-5000-a_b"),
        (
            "239.255.255.255:65535@abcdefghijklmno,source=192.168.100.200",
            "r-239.255.255.255-65535-abcdefghijklmno-192.168.100.200",
        ),
    ] {
        let derived = RuleName::derived(&input.parse().unwrap());
        assert_eq!(derived.as_str(), name);
        assert_eq!(derived.as_str().parse(), Ok(derived));
    }
}

#[test]
fn an_answer_is_one_line_of_bearable_length() {
    let long = "x".repeat(100_000);
    for text in ["a\nb", "239.1.1.1:5000@eth0\u{1b}[2J", "a\u{2028}b", "239.1.1.1:5000@eth0,x\u{7}=1", &long]
    {
        for error in [
            text.parse::<Input>().unwrap_err().to_string(),
            text.parse::<Output>().unwrap_err().to_string(),
            text.parse::<RuleName>().unwrap_err().to_string(),
            text.parse::<DatapathChoice>().unwrap_err().to_string(),
        ] {
            assert!(!error.contains(|c: char| c.is_control() || c == '\u{2028}'), "{error:?}");
            assert!(error.len() < 1000, "{error}");
        }
    }
}

/// Strings that come near to endpoints, and strings that do not.
fn texts() -> impl Strategy<Value = String> {
    prop_oneof![
        any::<String>(),
        "[0-9.:@,\\[\\]a-f =%/]{0,40}",
        "(udp://)?@?(239\\.1\\.1\\.[0-9]{1,3})?:?[0-9]{0,6}@?(eth0(@if2)?)?(,(ttl|source|dscp|from|x)=?[0-9.:a-z]{0,12}){0,3}",
    ]
}

proptest! {
    #[test]
    fn what_parses_is_its_canonical_texts_meaning(text in texts()) {
        if let Ok(input) = text.parse::<Input>() {
            prop_assert_eq!(input.to_string().parse::<Input>(), Ok(input));
        }
        if let Ok(output) = text.parse::<Output>() {
            prop_assert_eq!(output.to_string().parse::<Output>(), Ok(output));
        }
    }

    #[test]
    fn every_answer_is_one_line(text in texts()) {
        for error in [text.parse::<Input>().map(drop), text.parse::<Output>().map(drop)] {
            if let Err(error) = error {
                let line = error.to_string();
                prop_assert!(!line.contains(char::is_control), "{:?}", line);
            }
        }
    }

    /// The endpoint that an answer proposes has the right shape once its blanks are filled in.
    #[test]
    fn what_is_proposed_is_well_formed(text in texts()) {
        if let Some(meant) = meant::meant(&text) {
            let place = meant.split(',').next().unwrap_or_default();
            let filled = place.replace("PORT", "5000").replace("INTERFACE", "eth0");
            let parsed = filled.parse::<Output>().map(drop);
            let plausible = parsed.is_ok() || filled.starts_with("0.0.0.0:") || filled.starts_with("255.255.255.255:");
            prop_assert!(plausible, "{} proposed {}: {:?}", text, meant, parsed);
        }
    }
}
