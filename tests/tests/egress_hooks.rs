//! What stands in the way of datagrams that leave a host is seen, with its reason, while it is there, and a change of it is
//! heard of. All is asked with the documented capabilities alone.

#![expect(clippy::unwrap_used, reason = "the helpers of tests")]

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::{self, Command},
    sync::mpsc,
    thread,
    time::Duration,
};

use mcr::{net::egress_hooks::EgressHooks, rule::IfIndex};
use tests::{
    Namespace,
    bpf::ForeignEgress,
    deprive::{DOCUMENTED, become_ordinary_on_this_thread, keep_on_this_thread},
    wait::PATIENCE,
};

const LEGACY_TABLES: &str = "/proc/thread-self/net/ip_tables_names";

/// A namespace with two interfaces, and the hooks there.
struct Host {
    hooks: EgressHooks,
}

impl Host {
    /// Runs `job` in a new namespace, with the documented capabilities alone.
    #[track_caller]
    fn run(job: impl AsyncFnOnce(Self) + Send) {
        Self::run_as(|| keep_on_this_thread(DOCUMENTED), job);
    }

    #[track_caller]
    fn run_as(become_another: impl FnOnce() + Send, job: impl AsyncFnOnce(Self) + Send) {
        let namespace = namespace();
        namespace.run(|| {
            become_another();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async { job(Self { hooks: EgressHooks::open().unwrap() }).await });
        });
    }

    /// The reasons of `out0` and `out1`.
    #[track_caller]
    fn check(&self, when: &str, first: Option<&str>, second: Option<&str>) {
        let interfaces = ["out0", "out1"]
            .map(|name| (name.parse().unwrap(), IfIndex(nix::net::if_::if_nametoindex(name).unwrap())));
        let read = self.hooks.read(&interfaces);
        let expected = interfaces.iter().map(|(name, _)| name.clone()).zip([first, second]);
        let expected: BTreeMap<_, _> =
            expected.map(|(name, reason)| (name, reason.map(str::to_owned))).collect();
        assert_eq!(read, expected, "{when}");
    }

    /// A change that netlink speaks of, and the reasons after it.
    async fn changes(&mut self, line: &str, first: Option<&str>, second: Option<&str>) {
        while self.hears(Duration::from_millis(10)).await {}
        run(line);
        assert!(self.hears(PATIENCE).await, "no word of: {line}");
        self.check(line, first, second);
    }

    /// For both interfaces alike.
    async fn changes_all(&mut self, line: &str, reason: Option<&str>) {
        self.changes(line, reason, reason).await;
    }

    async fn hears(&mut self, patience: Duration) -> bool {
        tokio::time::timeout(patience, self.hooks.changed()).await.is_ok()
    }
}

#[track_caller]
fn namespace() -> Namespace {
    let namespace = Namespace::new("hooks");
    namespace.ip(&[
        "link add out0 numtxqueues 2 type veth peer name far0",
        "link add out1 type veth peer name far1",
        "link set out0 up",
        "link set out1 up",
        "link set far0 up",
        "link set far1 up",
    ]);
    namespace
}

/// Runs a line of a program where the calling thread is.
#[track_caller]
fn run(line: &str) {
    let mut words = line.split(' ');
    let program = words.next().unwrap();
    let mut command = Command::new(program);
    match line.strip_prefix("nft ") {
        Some(commands) => command.arg(commands),
        None => command.args(words),
    };
    let output = command.output().unwrap_or_else(|error| panic!("{program}: {error}"));
    assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
}

fn is_there(program: &str) -> bool {
    Command::new(program).arg("--version").output().is_ok()
}

#[test]
fn chains_of_nftables() {
    Host::run(async |mut host| {
        for (family, hook) in
            [("inet", "output"), ("inet", "postrouting"), ("ip", "output"), ("ip", "postrouting")]
        {
            let rules = format!("nftables has rules in its {hook} chain 'way-out' (table {family} guard)");
            let drops =
                format!("nftables drops by policy in its {hook} chain 'way-out' (table {family} guard)");
            let chain = format!("{family} guard way-out");
            host.changes_all(&format!("nft add table {family} guard"), None).await;
            let base = format!("{{ type filter hook {hook} priority 0; policy accept; }}");
            host.changes_all(&format!("nft add chain {chain} {base}"), None).await;
            host.changes_all(&format!("nft add rule {chain} ip daddr 239.2.2.2 drop"), Some(&rules)).await;
            host.changes_all(&format!("nft add rule {chain} counter"), Some(&rules)).await;
            host.changes_all(&format!("nft flush chain {chain}"), None).await;
            host.changes_all(&format!("nft chain {chain} {{ policy drop; }}"), Some(&drops)).await;
            host.changes_all(&format!("nft add rule {chain} counter"), Some(&rules)).await;
            host.changes_all(&format!("nft delete table {family} guard"), None).await;
        }
    });
}

#[test]
fn other_chains_of_nftables_are_none() {
    Host::run(async |mut host| {
        host.check("at first", None, None);
        for chain in [
            "inet x in { type filter hook input priority 0; policy drop; counter; }",
            "inet x way { type filter hook forward priority 0; policy drop; counter; }",
            "ip x in { type filter hook prerouting priority 0; counter; }",
            "ip6 x out { type filter hook output priority 0; policy drop; counter; }",
            "arp x out { type filter hook output priority 0; policy drop; counter; }",
            "bridge x out { type filter hook output priority 0; policy drop; counter; }",
            "netdev x in { type filter hook ingress device out0 priority 0; counter; }",
            "inet x plain { counter; }",
        ] {
            let (table, chain) = chain.split_once(" x ").unwrap();
            host.changes_all(&format!("nft table {table} x {{ chain {chain}; }}"), None).await;
        }
        host.changes_all("nft flush ruleset", None).await;
    });
}

#[test]
fn a_rule_among_many_chains_is_found() {
    Host::run(async |mut host| {
        let chain = |n| format!("chain c{n} {{ type filter hook output priority {n}; }}");
        let empty: Vec<_> = (0..900).map(chain).collect();
        let file = std::env::temp_dir().join(format!("mcr-test-{}-chains", process::id()));
        fs::write(&file, format!("table ip many {{ {}; }}", empty.join("; "))).unwrap();
        let made = Command::new("nft").arg("-f").arg(&file).status();
        fs::remove_file(&file).unwrap();
        assert!(made.unwrap().success());
        assert!(host.hears(PATIENCE).await);
        host.check("all are empty", None, None);
        let reason = "nftables has rules in its output chain 'c777' (table ip many)";
        host.changes_all("nft add rule ip many c777 counter", Some(reason)).await;
    });
}

#[test]
fn egress_chains_of_devices() {
    Host::run(async |mut host| {
        let reason = "nftables has rules in its egress chain 'out' (table netdev guard)";
        let table = |devices| {
            format!(
                "nft table netdev guard {{ chain out {{ type filter hook egress {devices} priority 0; \
                 policy accept; counter; }}; }}"
            )
        };
        host.changes(&table("device out0"), Some(reason), None).await;
        host.changes("nft flush chain netdev guard out", None, None).await;
        host.changes("nft delete table netdev guard", None, None).await;
        host.changes(&table("devices = { far0, out1 }"), None, Some(reason)).await;
        host.changes("nft delete table netdev guard", None, None).await;
        host.changes(&table("devices = { out0, out1 }"), Some(reason), Some(reason)).await;
        host.changes("nft delete table netdev guard", None, None).await;
    });
}

#[test]
fn filters_of_tc() {
    const REASON: Option<&str> = Some("out0 has a tc egress filter");
    const MATCH: &str = "protocol ip u32 match ip dst 239.2.2.2 classid 1:1";
    Host::run(async |mut host| {
        host.changes("tc qdisc add dev out0 clsact", None, None).await;
        host.changes(&format!("tc filter add dev out0 ingress {MATCH}"), None, None).await;
        host.changes(&format!("tc filter add dev out0 egress {MATCH}"), REASON, None).await;
        host.changes("tc filter del dev out0 egress", None, None).await;
        host.changes(&format!("tc filter add dev out0 egress chain 7 {MATCH}"), REASON, None).await;
        host.changes("tc qdisc del dev out0 clsact", None, None).await;
        // A block that devices share.
        host.changes("tc qdisc add dev out0 egress_block 7 clsact", None, None).await;
        host.changes(&format!("tc filter add block 7 {MATCH}"), REASON, None).await;
        host.changes("tc filter del block 7", None, None).await;
        host.changes("tc qdisc del dev out0 clsact", None, None).await;
        host.changes("tc qdisc add dev out0 ingress", None, None).await;
    });
}

#[test]
fn shaping() {
    const SHAPE: &str = "tbf rate 10mbit burst 10k latency 50ms";
    Host::run(async |mut host| {
        host.changes("tc qdisc add dev out0 root pfifo limit 100", None, None).await;
        let by_tbf = Some("out0 is shaped by tbf");
        host.changes(&format!("tc qdisc replace dev out0 root {SHAPE}"), by_tbf, None).await;
        host.changes("tc qdisc replace dev out0 root htb", Some("out0 is shaped by htb"), None).await;
        host.changes("tc qdisc replace dev out0 root handle 1: mq", None, None).await;
        host.changes(&format!("tc qdisc add dev out0 parent 1:2 {SHAPE}"), by_tbf, None).await;
        host.changes("tc qdisc del dev out0 root", None, None).await;
    });
}

#[test]
fn programs_of_devices() {
    Host::run(async |host| {
        let program = ForeignEgress::on_device("out0");
        host.check("attached", Some("out0 has an eBPF program on egress (tcx)"), None);
        drop(program);
        host.check("detached", None, None);
    });
}

/// A cgroup with one below, in which this process is until it is dropped.
struct Cgroup {
    directory: PathBuf,
    former: PathBuf,
}

impl Cgroup {
    fn enter() -> Self {
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        let root = mounts.lines().find(|mount| mount.split(' ').nth(2) == Some("cgroup2"));
        let root = Path::new(root.expect("a mount of cgroup2").split(' ').nth(1).unwrap());
        let groups = fs::read_to_string("/proc/self/cgroup").unwrap();
        let former = groups.lines().find_map(|line| line.strip_prefix("0::/")).unwrap();
        let entered =
            Self { directory: root.join(format!("mcr-test-{}", process::id())), former: root.join(former) };
        fs::create_dir_all(entered.below()).unwrap();
        move_to(&entered.below());
        entered
    }

    fn below(&self) -> PathBuf {
        self.directory.join("below")
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        move_to(&self.former);
        fs::remove_dir(self.below()).unwrap();
        fs::remove_dir(&self.directory).unwrap();
    }
}

fn move_to(cgroup: &Path) {
    fs::write(cgroup.join("cgroup.procs"), "0").unwrap();
}

#[test]
fn programs_of_our_cgroup() {
    let cgroup = Cgroup::enter();
    Host::run(async |host| {
        let name = cgroup.directory.file_name().unwrap().to_str().unwrap();
        let reason = format!("an eBPF program sees what the cgroup /{name}/below sends");
        for directory in [&cgroup.below(), &cgroup.directory] {
            let program = ForeignEgress::on_cgroup(directory);
            host.check("attached", Some(&reason), Some(&reason));
            drop(program);
            host.check("detached", None, None);
        }
    });
}

#[test]
fn rules_of_iptables() {
    if !is_there("iptables-nft") {
        eprintln!("skipped: no iptables-nft");
        return;
    }
    Host::run(async |mut host| {
        let reason = "nftables has rules in its output chain 'OUTPUT' (table ip filter)";
        host.changes_all("iptables-nft -A OUTPUT -d 239.2.2.2 -j DROP", Some(reason)).await;
        host.changes_all("iptables-nft -F OUTPUT", None).await;
        let reason = "nftables drops by policy in its output chain 'OUTPUT' (table ip filter)";
        host.changes_all("iptables-nft -P OUTPUT DROP", Some(reason)).await;
        host.changes_all("iptables-nft -P OUTPUT ACCEPT", None).await;
    });
}

#[test]
fn policies_of_ipsec() {
    Host::run(async |host| {
        let reason = Some("IPsec has a policy for what is sent (ip xfrm policy)");
        host.check("at first", None, None);
        for (line, reason) in [
            ("ip xfrm policy add dir in dst 10.2.0.2/32 action block", None),
            ("ip xfrm policy add dir out dst fd00::2/128 action block", None),
            ("ip xfrm policy add dir out dst 10.2.0.2/32 action block", reason),
            ("ip xfrm policy delete dir out dst 10.2.0.2/32", None),
        ] {
            run(line);
            host.check(line, reason, reason);
        }
    });
}

#[test]
fn rules_of_legacy_iptables() {
    if !is_there("iptables-legacy") {
        eprintln!("skipped: no iptables-legacy");
        return;
    }
    Host::run(async |host| {
        for (line, reason) in [
            ("-A INPUT -j DROP", None),
            (
                "-A OUTPUT -d 239.2.2.2 -j DROP",
                Some("iptables (legacy) has rules in OUTPUT of its table filter"),
            ),
            ("-F OUTPUT", None),
            ("-P OUTPUT DROP", Some("iptables (legacy) drops by policy in OUTPUT of its table filter")),
            ("-P OUTPUT ACCEPT", None),
            (
                "-t mangle -A POSTROUTING -j TTL --ttl-set 9",
                Some("iptables (legacy) has rules in POSTROUTING of its table mangle"),
            ),
            ("-t mangle -F", None),
            (
                "-t nat -A POSTROUTING -j MASQUERADE",
                Some("iptables (legacy) has rules in POSTROUTING of its table nat"),
            ),
            ("-t nat -F", None),
        ] {
            run(&format!("iptables-legacy {line}"));
            host.check(line, reason, reason);
        }
    });
}

#[test]
fn whom_root_becomes_sees_all() {
    Host::run_as(
        || (),
        async |host| {
            run("nft table ip x { chain out { type filter hook output priority 0; }; }");
            let program = ForeignEgress::on_device("out0");
            become_ordinary_on_this_thread(DOCUMENTED);
            host.check("attached", Some("out0 has an eBPF program on egress (tcx)"), None);
            drop(program);
            host.check("detached", None, None);
        },
    );
}

/// The names of the tables of legacy iptables are for root: where the kernel has any, they may hold anything.
#[test]
fn an_ordinary_user_is_told_what_he_cannot_see() {
    Host::run_as(
        || become_ordinary_on_this_thread(DOCUMENTED),
        async |host| {
            let reason =
                format!("iptables (legacy) cannot be asked about: only root may open {LEGACY_TABLES}");
            let reason = Path::new(LEGACY_TABLES).exists().then_some(&*reason);
            host.check("all else can be asked about", reason, reason);
        },
    );
}

#[test]
fn asking_makes_no_table() {
    Host::run(async |mut host| {
        host.check("again", None, None);
        assert!(!host.hears(Duration::from_millis(10)).await, "to ask is no change");
        let names = fs::read_to_string(LEGACY_TABLES).unwrap_or_default();
        assert_eq!(names, "");
    });
}

#[test]
fn nothing_of_other_namespaces_is_seen_or_heard() {
    let other = &namespace();
    let (go, gone) = mpsc::channel();
    let (done, awaited) = mpsc::channel();
    thread::scope(|scope| {
        // It has the capabilities to enter another namespace.
        scope.spawn(move || {
            gone.recv().unwrap();
            other.run(|| {
                run("nft table inet x { chain out { type filter hook output priority 0; policy drop; }; }");
                run("tc qdisc add dev out0 root tbf rate 10mbit burst 10k latency 50ms");
                done.send(ForeignEgress::on_device("out1")).unwrap();
            });
        });
        Host::run(async move |mut host| {
            while host.hears(Duration::from_millis(10)).await {}
            go.send(()).unwrap();
            let _program = awaited.recv().unwrap();
            assert!(!host.hears(Duration::from_millis(10)).await);
            host.check("all of it in the other namespace", None, None);
            host.changes("nft add table ip own", None, None).await;
        });
    });
}
