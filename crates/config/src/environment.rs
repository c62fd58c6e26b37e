//! The environment layer: `MUSTER_ROUTER_HTTP` is the key `http` of the role `router`.
//!
//! Kubernetes puts variables of every Service into its pods, so a Service called `muster-router` brings
//! `MUSTER_ROUTER_PORT_8080_TCP` and the like. These are recognised by their form and ignored.

use std::ffi::OsString;

use muster_types::nearest;

use crate::ROLES;
use crate::entry::{Entry, Raw, unknown_key};
use crate::group::Role;
use crate::problem::{Origin, Problem};

/// Variables beside those of keys: a client's API key, and the ones for Muster's own tests and builds.
const OTHERS: [&str; 5] =
    ["MUSTER_API_KEY", "MUSTER_SKIP_PYTHON", "MUSTER_GOLDEN", "MUSTER_NEXT_VERSION", "MUSTER_WRITE_DOCS"];
/// Most unknown variables that are reported.
const TOLD: usize = 16;

/// Names and values of environment variables.
#[derive(Debug, Clone, Default)]
pub struct Environment(Vec<(OsString, OsString)>);

impl Environment {
    /// The environment of this process.
    #[must_use]
    pub fn of_process() -> Self {
        Self(std::env::vars_os().collect())
    }

    /// An environment of these variables, for tests.
    pub fn of(variables: impl IntoIterator<Item = (OsString, OsString)>) -> Self {
        Self(variables.into_iter().collect())
    }

    /// Reports of `MUSTER_…` variables that nothing reads, each with the likely intended one.
    #[must_use]
    pub fn strangers(&self) -> Vec<String> {
        let known: Vec<String> = ROLES
            .into_iter()
            .flat_map(|role| role.keys().map(|key| role.variable(key.name)))
            .chain(OTHERS.map(str::to_owned))
            .collect();
        let names = self.0.iter().map(|(name, _)| name.to_string_lossy());
        let strangers = names.filter(|name| {
            name.strip_prefix("MUSTER_").is_some_and(|rest| !is_kubernetes_service(rest))
                && !known.iter().any(|known| known.eq_ignore_ascii_case(name))
        });
        let told = strangers.take(TOLD).map(|name| {
            let shown: String = name.chars().take(64).flat_map(char::escape_default).collect();
            match nearest(&name, known.iter().map(String::as_str)) {
                Some(near) => format!("environment variable {shown}: nothing reads it; did you mean {near}?"),
                None => format!("environment variable {shown}: nothing reads it"),
            }
        });
        told.collect()
    }

    /// Entries for the keys of one role.
    pub(crate) fn read(
        &self,
        role: &'static Role,
        problems: &mut Vec<Problem>,
    ) -> Vec<(&'static str, Entry)> {
        let prefix = role.variable("");
        let mut entries = Vec::new();
        for (name, value) in &self.0 {
            let name = name.to_string_lossy();
            let Some(rest) = name.strip_prefix(&prefix) else { continue };
            let origin = Origin::Environment { name: name.clone().into_owned() };
            let Some(value) = value.to_str() else {
                let message = "the value is not UTF-8".to_owned();
                problems.push(Problem { origin, key: String::new(), message });
                continue;
            };
            if is_kubernetes_service(rest) {
                continue;
            }
            match role.keys().find(|key| key.name.eq_ignore_ascii_case(rest)) {
                Some(key) => entries.push((key.name, Entry { raw: Raw::One(value.to_owned()), origin })),
                None => problems.push(unknown_key(&rest.to_lowercase(), role, origin)),
            }
        }
        entries
    }
}

/// Whether what follows the prefix is one of the variables that Kubernetes makes for a Service.
fn is_kubernetes_service(rest: &str) -> bool {
    let parts: Vec<&str> = rest.split('_').collect();
    let port = |parts: &[&str]| match parts {
        ["PORT"] => true,
        ["PORT", number, protocol] | ["PORT", number, protocol, "PROTO" | "PORT" | "ADDR"] => {
            number.parse::<u16>().is_ok() && matches!(*protocol, "TCP" | "UDP" | "SCTP")
        }
        _ => false,
    };
    (0..parts.len()).any(|at| port(&parts[at..]) || matches!(parts[at..], ["SERVICE", "HOST" | "PORT", ..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_that_nothing_reads_are_told_with_what_may_be_meant() {
        let names = [
            "MUSTER_ROUTR_GRPC",
            "MUSTER_APIKEY",
            "MUSTER_API_KEY",
            "MUSTER_ROUTER_KV_MEMORY",
            "MUSTER_WORKER_JOIN",
            "MUSTER_DEMO_ROUTERS_SERVICE_HOST",
            "MUSTER_PORT_8080_TCP",
            "MUSTER_WHATEVER",
            "PATH",
        ];
        let environment = Environment::of(names.map(|name| (name.into(), "x".into())));
        assert_eq!(
            environment.strangers(),
            [
                "environment variable MUSTER_ROUTR_GRPC: nothing reads it; did you mean MUSTER_ROUTER_GRPC?",
                "environment variable MUSTER_APIKEY: nothing reads it; did you mean MUSTER_API_KEY?",
                "environment variable MUSTER_WHATEVER: nothing reads it",
            ]
        );
    }

    #[test]
    fn variables_of_services_are_told_from_settings() {
        for theirs in [
            "PORT",
            "PORT_8080_TCP",
            "PORT_8080_TCP_ADDR",
            "SERVICE_HOST",
            "SERVICE_PORT",
            "SERVICE_PORT_GRPC",
            "GRPC_PORT",
        ] {
            assert!(is_kubernetes_service(theirs), "{theirs}");
        }
        for ours in ["HTTP", "GRPC", "PORT_X", "PORTS", "PORT_8080_QUIC", "EXPERT_TIMEOUT", "SERVICE"] {
            assert!(!is_kubernetes_service(ours), "{ours}");
        }
    }
}
