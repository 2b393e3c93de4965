//! How what is to be done is typed here: by this user, for this socket, and whether it can be typed as it is.

use std::path::Path;

use nix::unistd::geteuid;

use super::findings::Outcome;
use crate::supervisor::settings::DEFAULT_CONTROL;

/// Commands of mcr that talk to a daemon, or are one.
const OF_DAEMON: [&str; 11] =
    ["run", "rule", "status", "stats", "workers", "doctor", "top", "events", "config", "log-level", "stop"];

/// What commands begin with.
const PROGRAMS: [&str; 10] =
    ["mcr", "ip", "tc", "nft", "iptables-legacy", "ethtool", "sysctl", "mount", "nsenter", "bpftool"];

/// What only the operator knows.
const PLACES: [&str; 6] = ["ADDRESS", "INTERFACE", "LIST", "MAC", "PATH", "VLAN"];

/// Who asks, and how he asked.
#[derive(Clone, Debug, Default)]
pub struct Asking {
    root: bool,
    /// The option that names the socket, where it is not the usual one.
    control: Option<String>,
    subject: Option<String>,
}

impl Asking {
    pub fn new(control: &Path, subject: Option<&str>) -> Self {
        let named = (control != Path::new(DEFAULT_CONTROL)).then(|| control.to_string_lossy());
        Self {
            root: geteuid().is_root(),
            control: named.map(|path| format!("--control {}", quoted(&path))),
            subject: subject.map(quoted),
        }
    }

    /// Writes all that is to be done as it is typed here.
    pub fn write(&self, outcome: &mut Outcome) {
        for finding in &mut outcome.findings {
            finding.run = is_command(&finding.next);
            finding.next = self.typed(&finding.next);
        }
    }

    fn typed(&self, next: &str) -> String {
        let mut typed: Vec<&str> = Vec::new();
        let mut words = next.split(' ').peekable();
        while let Some(word) = words.next() {
            let begins = typed.last().is_none_or(|last| *last == "&&" || last.ends_with([':', ';']));
            if word == "sudo" && begins && self.root {
                continue;
            }
            typed.push(word);
            let Some(command) = words.next_if(|next| word == "mcr" && OF_DAEMON.contains(next)) else {
                continue;
            };
            typed.push(command);
            if command == "doctor" && words.peek().is_none_or(|next| next.starts_with('-')) {
                typed.extend(self.subject.as_deref());
            }
            if words.peek() != Some(&"--control") {
                typed.extend(self.control.as_deref());
            }
        }
        typed.join(" ")
    }
}

/// As a shell takes it for one word.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-@:".contains(c);
    if word.chars().all(plain) { word.to_owned() } else { format!("'{}'", word.replace('\'', r"'\''")) }
}

/// Whether it can be typed as it is.
fn is_command(next: &str) -> bool {
    let begins = |part: &str| {
        let mut words = part.split(' ').skip_while(|word| *word == "sudo");
        words.next().is_some_and(|word| PROGRAMS.contains(&word))
    };
    let words =
        |part: &str| part.split(|c: char| !c.is_ascii_alphanumeric()).any(|word| PLACES.contains(&word));
    let told = next.contains(", ") || next.contains(": ") || words(next);
    !told && next.split(" && ").flat_map(|part| part.split("; ")).all(begins)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn asking(root: bool, control: &str, subject: Option<&str>) -> Asking {
        Asking { root, ..Asking::new(Path::new(control), subject) }
    }

    #[test]
    fn commands_are_for_who_asks_and_for_the_socket_that_he_named() {
        let usual = DEFAULT_CONTROL;
        for (root, control, subject, next, expected) in [
            (false, usual, None, "sudo mcr run", "sudo mcr run"),
            (true, usual, None, "sudo mcr run", "mcr run"),
            (
                true,
                usual,
                None,
                "sudo ip link add a && sudo ip link set a up",
                "ip link add a && ip link set a up",
            ),
            (true, usual, None, "start it again: sudo mcr run", "start it again: mcr run"),
            // A rule may have that name.
            (true, usual, None, "mcr rule show sudo", "mcr rule show sudo"),
            (false, "/x", None, "sudo mcr run", "sudo mcr run --control /x"),
            (
                false,
                "/x",
                None,
                "start it with mcr run --workers 4",
                "start it with mcr run --control /x --workers 4",
            ),
            (
                false,
                "/x",
                None,
                "mcr rule remove a && mcr rule add a --in i --out o",
                "mcr rule --control /x remove a && mcr rule --control /x add a --in i --out o",
            ),
            (false, "/a b'c", None, "mcr workers", r"mcr workers --control '/a b'\''c'"),
            // Who sends has no daemon, and who is told to name another socket names it.
            (false, "/x", None, "at the source: mcr gen g@INTERFACE", "at the source: mcr gen g@INTERFACE"),
            (false, "/x", None, "mcr doctor --control PATH", "mcr doctor --control PATH"),
            (false, usual, Some("in0"), "sudo mcr doctor", "sudo mcr doctor in0"),
            (
                false,
                "/x",
                Some("cam1"),
                "sudo nsenter --net=n mcr doctor",
                "sudo nsenter --net=n mcr doctor cam1 --control /x",
            ),
            (false, "/x", Some("cam1"), "mcr doctor --control PATH", "mcr doctor cam1 --control PATH"),
            (
                false,
                "/x",
                Some("cam1"),
                "mcr doctor in0 --seconds 130",
                "mcr doctor --control /x in0 --seconds 130",
            ),
        ] {
            assert_eq!(asking(root, control, subject).typed(next), expected);
        }
    }

    #[test]
    fn a_command_is_told_from_advice() {
        for command in [
            "mcr workers",
            "sudo ip link set in0 up",
            "ip -br link show",
            "sudo nft insert rule ip a b accept && sudo nft insert rule inet c d accept",
            "ip neigh show dev out0; ip route get 10.0.0.9 oif out0",
            "mcr rule set cam1 --del-out 239.2.2.2:6000@out0,ttl=dec --add-out 239.2.2.2:6000@out0,ttl=16",
            "sudo nsenter --net=/proc/7/ns/net mcr doctor",
        ] {
            assert!(is_command(command), "{command}");
        }
        for advice in [
            "start it with mcr run --workers 4",
            "at its other end: ethtool -K INTERFACE gro on",
            "sudo ip addr add ADDRESS/24 dev out0",
            "mcr doctor --control PATH",
            "mcr rule remove clock, and a boundary clock in its place",
            "ethtool -i in0; see the daemon's log",
            "nothing is to be done",
        ] {
            assert!(!is_command(advice), "{advice}");
        }
    }
}
