//! Where a worker listens: `host:port`, or `unix:/path` for a socket on the same machine.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// The longest path a Unix socket can have on every system we run on, bytes.
const UNIX_PATH_MAX: usize = 103;

/// A checked address. Names are resolved when it is used, not before.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Address {
    /// A host name or IP address, and a port.
    Tcp {
        /// Without brackets, also for IPv6.
        host: String,
        /// 0 only makes sense for listening: the system picks one.
        port: u16,
    },
    /// A Unix socket.
    Unix(PathBuf),
}

/// Text that is no address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not an address: {reason}; write host:port, [ipv6]:port or unix:/path")]
pub struct AddressError {
    text: String,
    reason: &'static str,
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let error = |reason| AddressError { text: text.chars().take(256).collect(), reason };
        if let Some(path) = text.strip_prefix("unix:") {
            return match path.len() {
                0 => Err(error("the path is empty")),
                n if n > UNIX_PATH_MAX => {
                    Err(error("the path is longer than the system allows for a socket"))
                }
                _ if path.contains('\0') => Err(error("the path has a zero byte")),
                _ => Ok(Self::Unix(path.into())),
            };
        }
        if text.contains("://") {
            return Err(error("what stands before the host, as in http://, is left out here"));
        }
        let (host, port) = text.rsplit_once(':').ok_or_else(|| error("the port is missing"))?;
        let port = port.parse().map_err(|_| error("the port is not a number from 0 to 65535"))?;
        let host = match host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            Some(inner) if inner.parse::<std::net::Ipv6Addr>().is_ok() => inner,
            Some(_) => return Err(error("what is in brackets is not an IPv6 address")),
            None if host.contains(':') => return Err(error("an IPv6 address needs brackets")),
            None => host,
        };
        if host.is_empty() {
            return Err(error("the host is empty"));
        }
        if host.len() > 253 || !host.chars().all(|c| c.is_ascii_alphanumeric() || "._-:".contains(c)) {
            return Err(error("the host has a character that names do not have, or is too long"));
        }
        Ok(Self::Tcp { host: host.to_owned(), port })
    }
}

impl From<std::net::SocketAddr> for Address {
    fn from(address: std::net::SocketAddr) -> Self {
        Self::Tcp { host: address.ip().to_string(), port: address.port() }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "{host}:{port}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn good_addresses_survive_the_round_trip() {
        for text in ["127.0.0.1:7070", "worker-0.pool.svc:1", "[::1]:65535", "unix:/run/muster.sock", "h:0"] {
            assert_eq!(text.parse::<Address>().map(|a| a.to_string()).as_deref(), Ok(text));
        }
    }

    #[test]
    fn bad_addresses_are_refused() {
        let long = format!("unix:/{}", "x".repeat(200));
        for text in [
            "",
            "host",
            "http://h:1",
            "https://h",
            "grpc://h:1/",
            ":1",
            "h:",
            "h:70000",
            "h:-1",
            "::1:80",
            "[::1:80",
            "[x]:1",
            "a b:1",
            "a/b:1",
            "unix:",
            &long,
        ] {
            let error = text.parse::<Address>().expect_err(text);
            assert!(error.to_string().contains("write host:port"), "{error}");
        }
    }
}
