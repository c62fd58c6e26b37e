//! From EndpointSlices of a Service to the workers in them.
//!
//! One reader for `discovery.k8s.io/v1` and `v1beta1`: only what both have, or one of them, is read, and nothing of it has
//! to be there. A slice has a list of endpoints and one of ports, either of which may be null.
//!
//! Readiness of endpoints is ignored. Kubernetes' readiness says whether a pod takes traffic of clients; a worker that is not
//! ready yet waits for orders, and one that terminates still serves experts without another owner. A worker announces its own
//! state to the routers that are connected to it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use serde::Deserialize;

use crate::seen::{MOST, Place};

/// The port of this name is the workers'; without one, the first.
const PORT: &str = "grpc";
/// Slices of one Service; each has at most a thousand endpoints, and a hundred as things are set up.
pub(crate) const MOST_SLICES: usize = 1024;

/// A page of them.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Slices {
    pub(crate) metadata: ListMeta,
    /// Written `null` by a server that has none.
    #[serde(default)]
    pub(crate) items: Option<Vec<Slice>>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ListMeta {
    #[serde(default)]
    pub(crate) resource_version: String,
    #[serde(rename = "continue", default)]
    pub(crate) next: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Slice {
    pub(crate) metadata: Meta,
    #[serde(default)]
    address_type: Option<String>,
    #[serde(default)]
    endpoints: Option<Vec<Endpoint>>,
    #[serde(default)]
    ports: Option<Vec<Port>>,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Meta {
    pub(crate) name: String,
    #[serde(default)]
    pub(crate) resource_version: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Endpoint {
    #[serde(default)]
    addresses: Option<Vec<String>>,
    #[serde(default)]
    node_name: Option<String>,
    #[serde(default)]
    zone: Option<String>,
    /// In v1beta1, where v1 has `nodeName` and `zone`.
    #[serde(default)]
    topology: Option<BTreeMap<String, String>>,
    #[serde(default)]
    target_ref: Option<TargetRef>,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
struct TargetRef {
    #[serde(default)]
    uid: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
struct Port {
    #[serde(default)]
    name: Option<String>,
    #[serde(default)]
    port: Option<i64>,
    #[serde(default)]
    protocol: Option<String>,
}

impl Slice {
    fn port(&self) -> Option<u16> {
        let tcp = |port: &&Port| port.protocol.as_deref().is_none_or(|protocol| protocol == "TCP");
        let number =
            |port: &Port| port.port.and_then(|port| u16::try_from(port).ok()).filter(|&port| port != 0);
        let mut ports = self.ports.iter().flatten().filter(tcp).filter(|port| number(port).is_some());
        let first = ports.clone().next();
        ports.find(|port| port.name.as_deref() == Some(PORT)).or(first).and_then(number)
    }
}

impl Endpoint {
    fn place(&self) -> Place {
        let topology = |key: &str| self.topology.as_ref().and_then(|topology| topology.get(key));
        let known =
            |names: [Option<&String>; 3]| names.into_iter().flatten().find(|name| is_name(name)).cloned();
        Place {
            zone: known([
                self.zone.as_ref(),
                topology("topology.kubernetes.io/zone"),
                topology("failure-domain.beta.kubernetes.io/zone"),
            ]),
            node: known([self.node_name.as_ref(), topology("kubernetes.io/hostname"), None]),
        }
    }
}

/// Whether it can be a part of a failure domain's name.
fn is_name(text: &str) -> bool {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    (1..=253).contains(&text.len()) && text.bytes().all(fits)
}

/// The workers in these slices, and the problems of the slices.
///
/// A pod that is in slices of both address families is one worker: it is reached by IPv4.
pub(crate) fn workers(slices: &BTreeMap<String, Slice>) -> (BTreeMap<SocketAddr, Place>, Option<String>) {
    let (mut workers, mut pods) = (BTreeMap::new(), BTreeSet::new());
    let (mut portless, mut more) = (false, false);
    for family in [Some("IPv4"), Some("IPv6")] {
        for slice in slices.values().filter(|slice| slice.address_type.as_deref() == family) {
            let endpoints = slice.endpoints.as_deref().unwrap_or_default();
            let Some(port) = slice.port() else {
                portless |= !endpoints.is_empty();
                continue;
            };
            for endpoint in endpoints {
                // Of several addresses, all but the first have no meaning.
                let address = endpoint.addresses.as_ref().and_then(|addresses| addresses.first());
                let Some(ip) = address.and_then(|text| text.parse::<IpAddr>().ok()) else { continue };
                if ip.is_unspecified() || ip.is_multicast() {
                    continue;
                }
                let pod = endpoint.target_ref.as_ref().and_then(|pod| pod.uid.as_deref());
                let address = SocketAddr::new(ip, port);
                let is_known =
                    workers.contains_key(&address) || pod.is_some_and(|pod| pods.contains(&(pod, port)));
                if is_known {
                    continue;
                }
                if workers.len() == MOST {
                    more = true;
                    continue;
                }
                pods.extend(pod.map(|pod| (pod, port)));
                workers.insert(address, endpoint.place());
            }
        }
    }
    let problem = match (more, portless) {
        (true, _) => Some(format!("it has more than {MOST} addresses; the rest is left out")),
        (_, true) => Some(format!("it has no TCP port; give the Service one named {PORT}")),
        _ => None,
    };
    (workers, problem)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    fn read(slices: &[Value]) -> (BTreeMap<SocketAddr, Place>, Option<String>) {
        let slices = slices.iter().map(|slice| {
            let slice: Slice = serde_json::from_value(slice.clone()).unwrap();
            (slice.metadata.name.clone(), slice)
        });
        workers(&slices.collect())
    }

    fn domains(slices: &[Value]) -> Vec<(String, Option<String>)> {
        let (workers, problem) = read(slices);
        assert_eq!(problem, None);
        workers.into_iter().map(|(address, place)| (address.to_string(), place.domain())).collect()
    }

    fn v1(name: &str, endpoints: &Value) -> Value {
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {"name": name, "resourceVersion": "7"}, "addressType": "IPv4",
            "endpoints": endpoints,
            "ports": [{"name": "admin", "port": 9090, "protocol": "TCP"}, {"name": "grpc", "port": 7070, "protocol": "TCP"}],
        })
    }

    #[test]
    fn v1_with_every_condition() {
        let endpoints = json!([
            {"addresses": ["10.0.0.1"], "nodeName": "n1", "zone": "a", "conditions": {"ready": true, "serving": true}},
            {"addresses": ["10.0.0.2"], "nodeName": "n2", "zone": "b", "conditions": {"ready": false}},
            {"addresses": ["10.0.0.3", "10.0.0.4"], "conditions": {"ready": false, "serving": true, "terminating": true}},
            {"addresses": ["10.0.0.5"], "nodeName": null, "zone": null, "conditions": {}, "hints": {"forZones": []}},
        ]);
        let seen = domains(&[v1("s", &endpoints)]);
        let expected = [
            ("10.0.0.1:7070", Some("a/n1")),
            ("10.0.0.2:7070", Some("b/n2")),
            ("10.0.0.3:7070", None),
            ("10.0.0.5:7070", None),
        ];
        assert_eq!(seen, expected.map(|(address, domain)| (address.to_owned(), domain.map(str::to_owned))));
    }

    #[test]
    fn v1beta1_with_nulls_and_topology() {
        let ipv4 = json!({
            "metadata": {"name": "demo-abc"}, "addressType": "IPv4",
            "endpoints": [{
                "addresses": ["10.244.1.2"], "conditions": {"ready": true}, "hostname": "demo-worker-0",
                "targetRef": {"kind": "Pod", "name": "demo-worker-0", "uid": "u1"},
                "topology": {"kubernetes.io/hostname": "n1", "topology.kubernetes.io/zone": "z"},
            }],
            "ports": [{"name": "grpc", "port": 7070, "protocol": "TCP"}],
        });
        let ipv6 = json!({"metadata": {"name": "demo-def"}, "addressType": "IPv6", "endpoints": null, "ports": null});
        let bare = json!({"metadata": {"name": "demo-ghi"}});
        let seen = domains(&[ipv4, ipv6, bare]);
        assert_eq!(seen, [("10.244.1.2:7070".to_owned(), Some("z/n1".to_owned()))]);
    }

    #[test]
    fn slices_of_one_service_are_added_up_and_nobody_counts_twice() {
        let pod = |ip: &str, uid: &str| json!({"addresses": [ip], "targetRef": {"uid": uid}});
        let one = v1("a", &json!([pod("10.0.0.1", "u1"), pod("10.0.0.1", "u1")]));
        let two = v1("b", &json!([pod("10.0.0.2", "u2"), pod("10.0.0.1", "u1")]));
        let mut six = v1("0", &json!([pod("fd00::1", "u1"), pod("fd00::3", "u3")]));
        six["addressType"] = json!("IPv6");
        let addresses: Vec<_> = domains(&[one, two, six]).into_iter().map(|(address, _)| address).collect();
        // The pods that have both families are reached by IPv4.
        assert_eq!(addresses, ["10.0.0.1:7070", "10.0.0.2:7070", "[fd00::3]:7070"]);
    }

    #[test]
    fn the_port_is_the_one_named_grpc_or_the_first_of_tcp() {
        let with = |ports: Value| {
            let mut slice = v1("s", &json!([{"addresses": ["10.0.0.1"]}]));
            slice["ports"] = ports;
            read(&[slice])
        };
        let port = |ports: Value| with(ports).0.keys().map(SocketAddr::port).collect::<Vec<_>>();
        assert_eq!(
            port(json!([{"name": "x", "port": 1}, {"name": "grpc", "port": 2, "protocol": "TCP"}])),
            [2]
        );
        assert_eq!(
            port(json!([{"port": 5, "protocol": "UDP"}, {"name": "", "port": 6, "protocol": "TCP"}])),
            [6]
        );
        assert_eq!(
            port(json!([{"name": "grpc", "port": null}, {"port": 70000}, {"port": 0}, {"port": 9}])),
            [9]
        );
        for none in [json!(null), json!([]), json!([{"name": "grpc"}]), json!([{"port": -1}])] {
            let (workers, problem) = with(none);
            assert!(workers.is_empty() && problem.unwrap().contains("named grpc"));
        }
    }

    #[test]
    fn addresses_that_are_none_are_left_out() {
        let endpoints = json!([
            {"addresses": null}, {"addresses": []}, {}, {"addresses": ["worker.example"]}, {"addresses": ["0.0.0.0"]},
            {"addresses": ["10.0.0.1:80"]}, {"addresses": ["224.0.0.1"]}, {"addresses": ["10.0.0.9"], "nodeName": "a/b\n"},
        ]);
        assert_eq!(domains(&[v1("s", &endpoints)]), [("10.0.0.9:7070".to_owned(), None)]);
        let mut named = v1("s", &json!([{"addresses": ["worker.example"]}]));
        named["addressType"] = json!("FQDN");
        assert_eq!(domains(&[named]), []);
    }

    #[test]
    fn no_service_is_too_large() {
        let endpoint =
            |n: usize| json!({"addresses": [format!("10.{}.{}.{}", n >> 16, n >> 8 & 255, n & 255)]});
        let endpoints: Vec<_> = (0..MOST + 10).map(endpoint).collect();
        let (workers, problem) = read(&[v1("s", &json!(endpoints))]);
        assert_eq!(workers.len(), MOST);
        assert!(problem.unwrap().contains("more than 4096"));
    }

    proptest! {
        /// Whatever a slice holds, reading it ends, and gives at most what may be.
        #[test]
        fn anything_can_be_read(
            texts in proptest::collection::vec("[0-9a-fA-F.:/]{0,12}|10\\.0\\.0\\.[0-9]", 0..20),
            ports in proptest::collection::vec(proptest::option::of(any::<i64>()), 0..4),
            family in "IPv4|IPv6|FQDN|",
        ) {
            let endpoints: Vec<_> = texts.iter().map(|text| json!({"addresses": [text]})).collect();
            let ports: Vec<_> = ports.iter().map(|port| json!({"port": port})).collect();
            let slice = json!({
                "metadata": {"name": "s"}, "addressType": family, "endpoints": endpoints, "ports": ports,
            });
            let (workers, _) = read(&[slice]);
            prop_assert!(workers.len() <= texts.len());
            prop_assert!(workers.keys().all(|address| address.port() != 0 && !address.ip().is_unspecified()));
        }
    }
}
