//! What an operator sees with stock `bpftool`.

use std::net::SocketAddrV4;

use serde_json::{Value, json};
use tests::{Relay, Site, Source, source::Stream};

#[test]
fn bpftool_shows_program_rules_and_counters_by_name() {
    let site = Site::default();
    let relay = Relay::start(&site);
    relay.add("any", "239.1.1.1:5000@in0", &["239.2.2.2:6000@out0"]);
    relay.add("one", "239.1.1.1:5000@in0,source=10.77.0.99", &["239.2.2.3:6000@out0"]);
    let group: SocketAddrV4 = "239.1.1.1:5000".parse().unwrap();
    site.segments[0].wait_until_joined(*group.ip());
    Source::play(site.source(), Stream { count: 1_000, size: 100, ..Stream::to(group) });
    relay.balanced("any", 1_000);

    let pins = relay.pins("in0");
    let pinned = |map: &str| pins.join(map).to_str().expect("a path in UTF-8").to_owned();
    let bpftool = |args: &[&str]| site.relay.json("bpftool", &[&["-j"], args].concat());

    let flows = bpftool(&["map", "dump", "pinned", &pinned("mcr_flows_v4")]);
    let flow = |source: [u8; 4]| -> &Value {
        let key =
            json!({"source": source, "group": [239, 1, 1, 1], "port": [0x13, 0x88], "reserved": [0, 0]});
        let found = flows.as_array().expect("flows").iter().find(|flow| flow["formatted"]["key"] == key);
        &found.unwrap_or_else(|| panic!("no flow {key} in {flows}"))["formatted"]["value"]
    };
    assert_eq!((&flow([0; 4])["action"], &flow([10, 77, 0, 99])["action"]), (&json!(1), &json!(1)));
    assert_ne!(flow([0; 4])["rule"], flow([10, 77, 0, 99])["rule"]);

    let slot = flow([0; 4])["rule"].as_u64().expect("a rule slot");
    let key: Vec<_> = (slot as u32).to_ne_bytes().iter().map(ToString::to_string).collect();
    let mut lookup = vec!["map", "lookup", "pinned"];
    let rules = pinned("mcr_rules");
    lookup.extend([rules.as_str(), "key"]);
    lookup.extend(key.iter().map(String::as_str));
    let counters = bpftool(&lookup);
    let sum = |field: &str| -> u64 {
        let cpus = counters["formatted"]["values"].as_array().expect("a value per CPU");
        cpus.iter().map(|cpu| cpu["value"][field].as_u64().expect("a counter")).sum()
    };
    assert_eq!(
        (sum("matched"), sum("matched_bytes"), sum("no_worker"), sum("looped")),
        (1_000, 100_000, 0, 0)
    );

    let verdicts = bpftool(&["map", "dump", "pinned", &pinned("mcr_verdicts")]);
    let cpus = verdicts[0]["formatted"]["values"].as_array().expect("a value per CPU");
    let steered: u64 = cpus.iter().map(|cpu| cpu["value"]["steered"].as_u64().expect("a counter")).sum();
    assert_eq!(steered, 1_000);

    let net = bpftool(&["net"]);
    let attached = net[0]["xdp"].as_array().expect("XDP programs");
    assert_eq!(attached.len(), 1, "{net}");
    assert_eq!((&attached[0]["devname"], &attached[0]["mode"]), (&json!("in0"), &json!("driver")));
    let id = attached[0]["id"].to_string();
    let program = bpftool(&["prog", "show", "id", &id]);
    assert_eq!((&program["name"], &program["type"]), (&json!("mcr_steer"), &json!("xdp")));
    assert_eq!(program["gpl_compatible"], json!(true));

    let text = site.relay.output("bpftool", &["map", "dump", "pinned", &rules]);
    assert!(text.contains("\"matched_bytes\""), "{text}");
}
