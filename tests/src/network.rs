//! A private network, two links away from this process, with a lossy wire in between.
//!
//! Linux network namespaces and nftables: needs root, `ip` and `nft`. Packets are dropped on the way, not in either
//! end's own stack, so that both ends notice as on a real wire.

use std::process::{Command, Output};
use std::sync::atomic::{AtomicU32, Ordering};

use serde_json::Value;

use crate::process::run_command;

/// A private network. Removed when dropped; processes in it must have ended before.
pub struct Network {
    /// Namespaces of the wire and of the far end.
    wire: String,
    far: String,
    /// Address of the far end.
    host: String,
}

impl Network {
    /// A network without processes.
    ///
    /// # Errors
    /// The prerequisite that this machine lacks.
    ///
    /// # Panics
    /// When the setup fails despite all prerequisites.
    pub fn new() -> Result<Self, String> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        for program in ["ip", "nft"] {
            if let Err(error) = Command::new(program).arg("-V").output() {
                return Err(format!("it needs `{program}` (packages iproute2 and nftables): {error}"));
            }
        }
        let process = std::process::id();
        let index = NEXT.fetch_add(1, Ordering::Relaxed);
        let (wire, far) = (format!("muster-wire-{process}-{index}"), format!("muster-far-{process}-{index}"));
        let output = command("ip", &["netns", "add", &wire]);
        let refusal = String::from_utf8_lossy(&output.stderr);
        if refusal.contains("Operation not permitted") || refusal.contains("Permission denied") {
            return Err(format!("it needs root and may make no network namespace: {}", refusal.trim()));
        }
        assert!(output.status.success(), "ip netns add {wire}: {refusal}");
        // From the block reserved for network tests (RFC 2544): eight addresses for each.
        let block = (process.wrapping_mul(4).wrapping_add(index) % (1 << 14)) * 8;
        let address =
            |n: u32| format!("198.{}.{}.{}", 18 + (block >> 16), (block >> 8) & 255, (block & 255) + n);
        let network = Self { wire, far, host: address(6) };
        let Self { wire, far, host } = &network;
        let (near, near_wire, far_wire) =
            (format!("mn{process}i{index}"), format!("mw{process}i{index}"), "far".to_owned());
        ip(&["netns", "add", far]);
        ip(&["link", "add", &near, "type", "veth", "peer", "name", &near_wire, "netns", wire]);
        ip(&["-n", wire, "link", "add", &far_wire, "type", "veth", "peer", "name", "wire", "netns", far]);
        ip(&["address", "add", &format!("{}/30", address(1)), "dev", &near]);
        ip(&["-n", wire, "address", "add", &format!("{}/30", address(2)), "dev", &near_wire]);
        ip(&["-n", wire, "address", "add", &format!("{}/30", address(5)), "dev", &far_wire]);
        ip(&["-n", far, "address", "add", &format!("{host}/30"), "dev", "wire"]);
        ip(&["link", "set", &near, "up"]);
        ip(&["-n", wire, "link", "set", &near_wire, "up"]);
        ip(&["-n", wire, "link", "set", &far_wire, "up"]);
        ip(&["-n", far, "link", "set", "wire", "up"]);
        ip(&["-n", far, "link", "set", "lo", "up"]);
        ip(&["route", "add", host, "via", &address(2), "dev", &near]);
        ip(&["-n", far, "route", "add", "default", "via", &address(5)]);
        ip(&["netns", "exec", wire, "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward"]);
        network.nft(&["add", "table", "inet", "wire"]);
        network.nft(&["add", "chain", "inet", "wire", "carry", "{ type filter hook forward priority 0; }"]);
        Ok(network)
    }

    /// Address of the far end.
    #[must_use]
    pub fn far_host(&self) -> String {
        self.host.clone()
    }

    /// Command prefix that runs a program at the far end.
    #[must_use]
    pub fn enter(&self) -> Vec<String> {
        ["ip", "netns", "exec", &self.far].map(Into::into).into()
    }

    /// Drops this percentage of packets at random from now on, in both directions.
    pub fn lose(&self, percent: u32) {
        let percent = percent.to_string();
        self.nft(&[
            "add", "rule", "inet", "wire", "carry", "numgen", "random", "mod", "100", "<", &percent,
            "counter", "drop",
        ]);
    }

    /// Stops dropping packets.
    pub fn heal(&self) {
        self.nft(&["flush", "chain", "inet", "wire", "carry"]);
    }

    /// Packets lost since [`Self::lose`].
    ///
    /// # Panics
    /// When no packets are being dropped.
    #[must_use]
    pub fn lost(&self) -> u64 {
        let listed: Value =
            serde_json::from_slice(&self.nft(&["-j", "list", "chain", "inet", "wire", "carry"]))
                .expect("nft writes JSON");
        let rules = listed["nftables"].as_array().expect("a list").iter();
        let mut counters = rules.filter_map(|entry| {
            entry["rule"]["expr"].as_array()?.iter().find_map(|part| part["counter"]["packets"].as_u64())
        });
        counters.next().expect("a rule that counts")
    }

    fn nft(&self, args: &[&str]) -> Vec<u8> {
        ip(&[&["netns", "exec", self.wire.as_str(), "nft"], args].concat()).stdout
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        // A namespace takes its interfaces with it, also the one at this end.
        for namespace in [&self.wire, &self.far] {
            let _ = Command::new("ip").args(["netns", "delete", namespace]).output();
        }
    }
}

fn command(program: &str, args: &[&str]) -> Output {
    run_command(Command::new(program).args(args))
}

fn ip(args: &[&str]) -> Output {
    let output = command("ip", args);
    assert!(output.status.success(), "ip {}: {}", args.join(" "), String::from_utf8_lossy(&output.stderr));
    output
}
