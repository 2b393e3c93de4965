//! Interfaces: whether they are there, up, of the right kind, and with an address to send from.

use super::{Code, Finding, Outcome, of_interface};
use crate::{
    doctor::facts::{Device, Observations},
    rule::InterfaceName,
};

pub fn decide(seen: &Observations, outcome: &mut Outcome) {
    let (ingress, egress) = (seen.ingress(), seen.egress());
    for name in ingress.union(&egress) {
        match seen.devices.get(*name) {
            None => outcome.push(missing(seen, name)),
            Some(device) => {
                let before = outcome.findings.len();
                link(name, device, outcome);
                if ingress.contains(name) && !device.link.ethernet {
                    outcome.push(Finding::problem(
                        Code::NotEthernet,
                        of_interface(name),
                        format!(
                            "its frames ({}) have no Ethernet header: nothing can be relayed from it",
                            device.link.kind
                        ),
                        "relay from the Ethernet interface that it runs over: ip -br link show",
                    ));
                }
                if egress.contains(name) && device.link.addresses.is_empty() && needs_address(seen, name) {
                    outcome.push(Finding::problem(
                        Code::NoAddress,
                        of_interface(name),
                        "it has no IPv4 address to send from",
                        format!("sudo ip addr add ADDRESS/24 dev {name}"),
                    ));
                }
                if outcome.findings.len() == before {
                    outcome.well(of_interface(name), describe(device, ingress.contains(name)));
                }
            }
        }
    }
}

/// Whether an output of this interface has no address of its own.
fn needs_address(seen: &Observations, name: &InterfaceName) -> bool {
    let mut outputs = seen.flows().flat_map(|flow| &flow.rule.outputs);
    outputs.any(|output| output.interface == *name && output.from.is_none())
}

fn missing(seen: &Observations, name: &InterfaceName) -> Finding {
    let others: Vec<_> =
        seen.devices.keys().map(InterfaceName::as_str).filter(|name| *name != "lo").collect();
    let others = if others.is_empty() { "none but lo".to_owned() } else { others.join(", ") };
    Finding::problem(
        Code::InterfaceMissing,
        of_interface(name),
        format!("there is no such interface in this network namespace; there are {others}"),
        "ip -br link show",
    )
}

fn link(name: &InterfaceName, device: &Device, outcome: &mut Outcome) {
    if !device.admin_up {
        outcome.push(Finding::problem(
            Code::InterfaceDown,
            of_interface(name),
            "it is switched off",
            format!("sudo ip link set {name} up"),
        ));
    } else if !device.carrier {
        outcome.push(Finding::problem(
            Code::NoCarrier,
            of_interface(name),
            format!(
                "it is switched on and has no carrier: cable, switch port or the other end ({})",
                device.link.kind
            ),
            "at its other end: ip link set INTERFACE up",
        ));
    }
}

fn describe(device: &Device, ingress: bool) -> String {
    let link = &device.link;
    let plain = format!("up, {}, MTU {}", link.kind, link.mtu);
    if !ingress {
        return match link.addresses.first() {
            Some(address) => format!("{plain}, sends from {address}"),
            None => plain,
        };
    }
    let s = if link.rx_queues == 1 { "" } else { "s" };
    let xdp = match device.native_xdp {
        Some(true) => ", native XDP",
        Some(false) => ", no native XDP",
        None => "",
    };
    let filter = match device.rp_filter {
        None | Some(0) => "",
        Some(1) => "; its reverse-path filter is strict, which mcr does not mind",
        Some(_) => "; its reverse-path filter is loose, which mcr does not mind",
    };
    format!("{plain}, {} RX queue{s}{xdp}{filter}", link.rx_queues)
}
