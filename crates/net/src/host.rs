//! The rule on `Host` (RFC 9112, section 3.2): one, of a form that names a host, in every request of HTTP/1.1.
//!
//! Proxies and caches that read a request's host otherwise than its server does can be made to mix up requests. The host
//! of a request whose target is a whole URI is that of the target, as the same section says; `Host` has to be there all
//! the same.

use http::uri::Authority;
use http::{HeaderMap, HeaderValue, Version, header};

/// A request with an invalid `Host`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadHost {
    /// It is missing.
    #[error("a request of HTTP/1.1 needs a host header")]
    Missing,
    /// It is given several times.
    #[error("a request has one host header, not several")]
    Several,
    /// It names no host.
    #[error("the host header names no host; it is a name or an address, with a port or without")]
    Malformed,
}

/// Checks a request's version and headers.
///
/// # Errors
/// See [`BadHost`]; the answer to each is 400.
pub fn check(version: Version, headers: &HeaderMap) -> Result<(), BadHost> {
    let mut hosts = headers.get_all(header::HOST).iter();
    match (hosts.next(), hosts.next()) {
        (None, _) if version == Version::HTTP_11 => Err(BadHost::Missing),
        (None, _) => Ok(()),
        (Some(_), Some(_)) => Err(BadHost::Several),
        (Some(host), None) if names_a_host(host) => Ok(()),
        (Some(_), None) => Err(BadHost::Malformed),
    }
}

/// A target without an authority goes with an empty one.
fn names_a_host(host: &HeaderValue) -> bool {
    let Ok(host) = host.to_str() else { return false };
    host.is_empty() || (!host.contains('@') && host.parse::<Authority>().is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(version: Version, hosts: &[&str]) -> Result<(), BadHost> {
        let hosts = hosts.iter().map(|host| (header::HOST, HeaderValue::from_str(host).unwrap()));
        let mut headers = HeaderMap::new();
        for (name, host) in hosts {
            headers.append(name, host);
        }
        check(version, &headers)
    }

    #[test]
    fn a_request_has_one_host_that_names_one() {
        for host in ["x", "x:80", "10.0.0.1", "[::1]:8080", "a.b-c.example", ""] {
            assert_eq!(outcome(Version::HTTP_11, &[host]), Ok(()), "{host:?}");
            assert_eq!(outcome(Version::HTTP_10, &[host]), Ok(()), "{host:?}");
        }
        for host in ["a b", "a/b", "user@x", "x:y:z", "http://x", "x,y z", "[::1"] {
            assert_eq!(outcome(Version::HTTP_11, &[host]), Err(BadHost::Malformed), "{host:?}");
        }
        assert_eq!(outcome(Version::HTTP_11, &[]), Err(BadHost::Missing));
        assert_eq!(outcome(Version::HTTP_10, &[]), Ok(()));
        for version in [Version::HTTP_10, Version::HTTP_11] {
            assert_eq!(outcome(version, &["x", "x"]), Err(BadHost::Several));
            assert_eq!(outcome(version, &["x", "y"]), Err(BadHost::Several));
        }
    }
}
