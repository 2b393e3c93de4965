//! What the relay leaves to the host that it runs on.

#![expect(clippy::unwrap_used, reason = "where it fails, the test fails and says where")]

use std::{
    net::{SocketAddrV4, UdpSocket},
    time::Duration,
};

use mcr::api::wire::{Health, RuleShow};
use tests::{
    Namespace, Relay, Site, Source, capture::assert_sequence, site::Membership, source::Stream, wait_until,
};

fn at(address: &str) -> SocketAddrV4 {
    address.parse().expect("address:port")
}

/// A program of the host, bound to an address and counting what it gets.
struct Listener {
    socket: UdpSocket,
    received: Vec<u64>,
}

impl Listener {
    #[track_caller]
    fn bind(namespace: &Namespace, address: &str) -> Self {
        let socket = namespace.run(|| UdpSocket::bind(address)).expect("bind");
        socket.set_nonblocking(true).expect("non-blocking");
        nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::RcvBufForce, &(32 << 20))
            .expect("SO_RCVBUFFORCE");
        Self { socket, received: Vec::new() }
    }

    fn count(&mut self) -> usize {
        let mut buffer = [0; 4096];
        while let Ok(len) = self.socket.recv(&mut buffer) {
            assert!(len >= 8);
            self.received.push(u64::from_be_bytes(buffer[..8].try_into().expect("eight bytes")));
        }
        self.received.len()
    }

    /// Waits for `n`, which must come each once and in order.
    #[track_caller]
    fn exactly(&mut self, n: u64) {
        wait_until(&format!("{n} datagrams at the host's own socket"), Duration::from_secs(5), || {
            self.count() as u64 >= n
        });
        assert!(self.received.iter().copied().eq(0..n), "{} datagrams, not each once", self.received.len());
    }
}

fn what_no_rule_wants_reaches_the_hosts_own_sockets() {
    let site = Site::default();
    let relay = Relay::start(&site);
    relay.add("cam1", "239.1.1.1:5000@in0", &["239.2.2.2:6000@out0"]);
    let mut other_port = Listener::bind(&site.relay, "239.1.1.1:5001");
    let mut other_group = Listener::bind(&site.relay, "239.1.1.9:5000");
    let mut unicast = Listener::bind(&site.relay, "10.77.0.1:5000");
    let mut fragmented = Listener::bind(&site.relay, "10.77.0.1:5002");
    let _membership = Membership::join(&site.relay, "in0", "239.1.1.9".parse().unwrap());
    // The host's program needs its own membership, though the relay has one, to receive by IP.
    let _another = Membership::join(&site.relay, "in0", "239.1.1.1".parse().unwrap());
    for group in ["239.1.1.1", "239.1.1.9"] {
        site.segments[0].wait_until_joined(group.parse().unwrap());
    }
    let mut sink = site.capture(0);
    let relayed = Source::start(site.source(), Stream::to(at("239.1.1.1:5000")));
    let sources: Vec<_> = [
        ("239.1.1.1:5001", 1_000, 1316),
        ("239.1.1.9:5000", 1_000, 1316),
        ("10.77.0.1:5000", 1_000, 1316),
        ("10.77.0.1:5002", 200, 3_000),
    ]
    .into_iter()
    .map(|(to, count, size)| {
        Source::start(site.source(), Stream { count, size, rate: 2_000, ..Stream::to(at(to)) })
    })
    .collect();
    for source in sources {
        source.finish();
    }
    other_port.exactly(1_000);
    other_group.exactly(1_000);
    unicast.exactly(1_000);
    fragmented.exactly(200);
    let sent = relayed.stop();
    relay.balanced("cam1", sent);
    assert_sequence(&sink.exactly(at("239.2.2.2:6000"), sent as usize), 0..sent);
    let verdicts = relay.interface("in0").verdicts;
    assert_eq!(verdicts["no_rule"], 2_000, "{verdicts:?}");
}

fn a_program_on_an_outputs_port_keeps_its_unicast_traffic() {
    let site = Site::default();
    let mut before = Listener::bind(&site.relay, "0.0.0.0:6000");
    let relay = Relay::start(&site);
    relay.add("cam1", "239.1.1.1:5000@in0", &["239.2.2.2:6000@out0", "10.78.1.2:6001@out1"]);
    site.segments[0].wait_until_joined("239.1.1.1".parse().unwrap());
    let mut after = Listener::bind(&site.relay, "0.0.0.0:6001");
    let relayed = Source::start(site.source(), Stream::to(at("239.1.1.1:5000")));
    Source::play(&site.sinks[0].host, Stream { count: 1_000, ..Stream::to(at("10.78.0.1:6000")) });
    Source::play(&site.sinks[1].host, Stream { count: 1_000, ..Stream::to(at("10.78.1.1:6001")) });
    before.exactly(1_000);
    after.exactly(1_000);
    let sent = relayed.stop();
    assert_eq!(relay.balanced("cam1", sent).outputs[1].sent, sent);
}

fn a_program_on_the_host_hears_an_output_only_if_the_rule_says_so() {
    let site = Site::default();
    let relay = Relay::start(&site);
    relay.add("quiet", "239.1.1.1:5000@in0", &["239.2.2.2:6000@out0"]);
    relay.add("loud", "239.1.1.2:5000@in0", &["239.2.2.3:6000@out0,loop=true"]);
    let mut quiet = Listener::bind(&site.relay, "239.2.2.2:6000");
    let mut loud = Listener::bind(&site.relay, "239.2.2.3:6000");
    let _memberships =
        ["239.2.2.2", "239.2.2.3"].map(|group| Membership::join(&site.relay, "out0", group.parse().unwrap()));
    for group in ["239.1.1.1", "239.1.1.2"] {
        let to = at(&format!("{group}:5000"));
        site.segments[0].wait_until_joined(*to.ip());
        Source::play(site.source(), Stream { count: 1_000, ..Stream::to(to) });
    }
    relay.balanced("quiet", 1_000);
    relay.balanced("loud", 1_000);
    loud.exactly(1_000);
    assert_eq!(quiet.count(), 0);
}

fn an_output_whose_source_port_is_taken_waits_and_disturbs_no_other() {
    let site = Site::default();
    let mut taken = Listener::bind(&site.relay, "0.0.0.0:6000");
    let relay = Relay::start(&site);
    relay.add("cam1", "239.1.1.1:5000@in0", &["239.2.2.2:6000@out0"]);
    site.segments[0].wait_until_joined("239.1.1.1".parse().unwrap());
    let relayed = Source::start(site.source(), Stream::to(at("239.1.1.1:5000")));
    let answer = relay.cli(&["rule", "set", "cam1", "--add-out", "239.2.2.3:6001@out1,from=10.78.1.1:6000"]);
    answer.ok();
    assert!(answer.stderr.contains("6000") && answer.stderr.lines().count() == 1, "{answer}");
    let rule = relay.json::<RuleShow>(&["rule", "show", "cam1"]).rule;
    assert_eq!(
        (rule.outputs[0].health, rule.outputs[1].health),
        (Health::Active, Health::Pending),
        "{rule:?}"
    );
    Source::play(&site.sinks[0].host, Stream { count: 1_000, ..Stream::to(at("10.78.0.1:6000")) });
    taken.exactly(1_000);
    let sent = relayed.stop();
    let stats = relay.balanced("cam1", sent);
    assert_eq!(stats.outputs[0].sent, sent);
    assert_eq!(stats.outputs[1].dropped.get("pending"), Some(&stats.outputs[1].received), "{stats:?}");
    assert_eq!(relay.workers()[0].restarts, 0);
}

tests::on_every_ground!(
    what_no_rule_wants_reaches_the_hosts_own_sockets,
    a_program_on_an_outputs_port_keeps_its_unicast_traffic,
    a_program_on_the_host_hears_an_output_only_if_the_rule_says_so,
    an_output_whose_source_port_is_taken_waits_and_disturbs_no_other,
);
