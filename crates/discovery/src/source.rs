//! Names of sources and of objects in a cluster, checked.

use std::fmt;
use std::str::FromStr;

/// Longest name of an object, bytes.
const LONGEST_NAME: usize = 253;
/// Longest name of a namespace or a Service, bytes.
const LONGEST_LABEL: usize = 63;
/// What names in a Kubernetes cluster begin with.
const KUBERNETES: &str = "kubernetes:";

/// A source of workers.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Source {
    /// All addresses of a name.
    Dns {
        /// The name.
        host: String,
        /// The workers' port.
        port: u16,
    },
    /// The EndpointSlices of a Service.
    Service(ObjectName),
}

/// An object in a Kubernetes cluster.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ObjectName {
    /// `None`: this process's own.
    pub namespace: Option<String>,
    /// Its name.
    pub name: String,
}

/// Text that is no such name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} {reason}; write {form}")]
pub struct SourceError {
    text: String,
    reason: &'static str,
    form: &'static str,
}

impl FromStr for Source {
    type Err = SourceError;

    fn from_str(text: &str) -> Result<Self, SourceError> {
        const FORM: &str = "kubernetes:SERVICE, kubernetes:NAMESPACE/SERVICE or dns:HOST:PORT";
        let error = |reason| SourceError { text: text.chars().take(300).collect(), reason, form: FORM };
        if let Some(object) = text.strip_prefix(KUBERNETES) {
            let service = ObjectName::parse(object).map_err(error)?;
            if !is_label(&service.name) {
                return Err(error("has a name that no Service can have"));
            }
            return Ok(Self::Service(service));
        }
        let rest = text.strip_prefix("dns:").ok_or_else(|| error("is no source of workers"))?;
        let (host, port) = rest.rsplit_once(':').ok_or_else(|| error("has no port"))?;
        let port: u16 = port.parse().map_err(|_| error("has a port that is not a number from 1 to 65535"))?;
        if port == 0 {
            return Err(error("has port 0, which is nowhere"));
        }
        let is_name = !host.is_empty()
            && host.len() <= LONGEST_NAME
            && host.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte));
        if !is_name {
            return Err(error("has a host that is not a name"));
        }
        Ok(Self::Dns { host: host.to_owned(), port })
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Dns { host, port } => write!(f, "dns:{host}:{port}"),
            Self::Service(service) => service.fmt(f),
        }
    }
}

impl ObjectName {
    fn parse(text: &str) -> Result<Self, &'static str> {
        let (namespace, name) = match text.split_once('/') {
            Some((namespace, name)) => (Some(namespace), name),
            None => (None, text),
        };
        if !namespace.is_none_or(is_label) {
            return Err("has a namespace that cannot be one");
        }
        let is_name = name.len() <= LONGEST_NAME && name.split('.').all(is_label);
        if !is_name {
            return Err("has a name that cannot be one");
        }
        Ok(Self { namespace: namespace.map(str::to_owned), name: name.to_owned() })
    }
}

impl FromStr for ObjectName {
    type Err = SourceError;

    fn from_str(text: &str) -> Result<Self, SourceError> {
        const FORM: &str = "kubernetes:NAME or kubernetes:NAMESPACE/NAME";
        let error = |reason| SourceError { text: text.chars().take(300).collect(), reason, form: FORM };
        let object = text.strip_prefix(KUBERNETES).ok_or_else(|| error("names no object of a cluster"))?;
        Self::parse(object).map_err(error)
    }
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.namespace {
            Some(namespace) => write!(f, "{KUBERNETES}{namespace}/{}", self.name),
            None => write!(f, "{KUBERNETES}{}", self.name),
        }
    }
}

/// A label as in RFC 1123.
fn is_label(text: &str) -> bool {
    let inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    (1..=LONGEST_LABEL).contains(&text.len())
        && text.bytes().all(|byte| inner(byte) || byte == b'-')
        && text.bytes().next().is_some_and(inner)
        && text.bytes().next_back().is_some_and(inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn good_sources_survive_the_round_trip() {
        for text in
            ["kubernetes:workers", "kubernetes:ns-1/demo-workers", "dns:workers.ns.svc:7070", "dns:h:1"]
        {
            assert_eq!(text.parse::<Source>().map(|source| source.to_string()).as_deref(), Ok(text));
        }
        for text in ["kubernetes:leader", "kubernetes:ns/a.b-c"] {
            assert_eq!(text.parse::<ObjectName>().map(|name| name.to_string()).as_deref(), Ok(text));
        }
    }

    #[test]
    fn bad_sources_are_refused() {
        let long = format!("kubernetes:{}", "x".repeat(64));
        for text in [
            "",
            "workers",
            "kubernetes:",
            "kubernetes:/",
            "kubernetes:a/",
            "kubernetes:/a",
            "kubernetes:a/b/c",
            "kubernetes:A",
            "kubernetes:-a",
            "kubernetes:a-",
            "kubernetes:a.b",
            "kubernetes:../x",
            "kubernetes:a b",
            &long,
            "dns:",
            "dns:host",
            "dns::1",
            "dns:h:",
            "dns:h:0",
            "dns:h:65536",
            "dns:h:+1x",
            "dns:a/b:1",
            "dns:[::1]:1",
            "DNS:h:1",
            "http://h:1",
        ] {
            let error = text.parse::<Source>().expect_err(text).to_string();
            assert!(error.contains("write kubernetes:SERVICE"), "{error}");
        }
        for text in ["", "leader", "kubernetes:", "kubernetes:a..b", "kubernetes:a/B", "dns:h:1"] {
            let error = text.parse::<ObjectName>().expect_err(text).to_string();
            assert!(error.contains("write kubernetes:NAME"), "{error}");
        }
    }
}
