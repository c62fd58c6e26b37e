//! Cross-origin access (CORS): which origins' pages may read answers. Only browsers obey it; no other client is kept
//! out.
//!
//! A page whose own name was made to resolve to this host (DNS rebinding) is of the same origin to a browser; only its
//! `Host` gives it away.

use std::net::IpAddr;
use std::time::Duration;

use axum::extract::{Request, State};
use axum::http::uri::Authority;
use axum::http::{HeaderName, HeaderValue, Method, header};
use axum::middleware::Next;
use axum::response::Response;
use tower::ServiceExt;
use tower_http::cors::{AllowHeaders, AllowOrigin, CorsLayer};

use super::openai::IGNORED;
use crate::request_id::REQUEST_ID;

/// How long a browser may cache a preflight's answer.
const MAX_AGE: Duration = Duration::from_secs(600);

/// Origins whose pages may send requests and read the answers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Cors {
    origins: Vec<String>,
    local: bool,
}

impl Cors {
    /// The given origins, as browsers write them (`https://example.org`, with a port where it is not the default), or
    /// all for `*`; on a loopback address, also every page served by this host.
    #[must_use]
    pub fn new(origins: Vec<String>, is_loopback: bool) -> Self {
        Self { origins, local: is_loopback }
    }

    fn takes(&self, origin: &HeaderValue) -> bool {
        let Ok(origin) = origin.to_str() else { return false };
        (self.local && is_local(origin)) || self.origins.iter().any(|known| known == origin)
    }

    /// Whether the request's `Host` is a name that is not known to be this host's, as after DNS rebinding. IP addresses
    /// are never strangers. False unless this host listens on loopback.
    pub(super) fn is_stranger(&self, host: &HeaderValue) -> bool {
        if !self.local {
            return false;
        }
        let Some(name) = host.to_str().ok().and_then(|host| host.parse::<Authority>().ok()) else {
            return false;
        };
        let name = name.host().to_ascii_lowercase();
        let is_address = name.starts_with('[') || name.parse::<IpAddr>().is_ok();
        let is_own = name == "localhost" || name.ends_with(".localhost");
        let of_origin = |origin: &String| {
            let authority = origin.split_once("://").map_or(origin.as_str(), |(_, authority)| authority);
            origin == "*"
                || authority.parse::<Authority>().is_ok_and(|own| own.host().eq_ignore_ascii_case(&name))
        };
        !is_address && !is_own && !self.origins.iter().any(of_origin)
    }

    /// The layer that answers browsers; `None` where no other origin is allowed.
    pub(super) fn layer(self) -> Option<CorsLayer> {
        if !self.local && self.origins.is_empty() {
            return None;
        }
        let allowed = match self.origins.iter().any(|origin| origin == "*") {
            true => AllowOrigin::any(),
            false => AllowOrigin::predicate(move |origin, _| self.takes(origin)),
        };
        let shown = [IGNORED, REQUEST_ID, header::RETRY_AFTER, HeaderName::from_static("x-should-retry")];
        let layer = CorsLayer::new()
            .allow_origin(allowed)
            .allow_methods([Method::GET, Method::POST])
            .allow_headers(AllowHeaders::mirror_request())
            .expose_headers(shown)
            .max_age(MAX_AGE);
        Some(layer)
    }
}

/// Whether a page is served by this host, from any port.
fn is_local(origin: &str) -> bool {
    let Some(authority) = origin.strip_prefix("http://").or_else(|| origin.strip_prefix("https://")) else {
        return false;
    };
    ["localhost", "127.0.0.1", "[::1]"].iter().any(|host| match authority.strip_prefix(host) {
        Some("") => true,
        Some(rest) => rest.strip_prefix(':').is_some_and(|port| port.parse::<u16>().is_ok()),
        None => false,
    })
}

/// Answers preflights, which browsers send without keys, and marks the other answers with the allowed origin.
pub(super) async fn share(State(layer): State<CorsLayer>, request: Request, next: Next) -> Response {
    let headers = request.headers();
    let is_asked = headers.contains_key(header::ORIGIN)
        && (request.method() != Method::OPTIONS
            || headers.contains_key(header::ACCESS_CONTROL_REQUEST_METHOD));
    if !is_asked {
        return next.run(request).await;
    }
    let service = tower::Layer::layer(&layer, next);
    service.oneshot(request).await.unwrap_or_else(|never| match never {})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_under_other_names_are_strangers_on_a_loopback_address_alone() {
        let is_stranger = |cors: &Cors, host: &str| cors.is_stranger(&HeaderValue::from_str(host).unwrap());
        let local = Cors::new(vec!["https://proxied.example".to_owned()], true);
        for host in [
            "localhost",
            "LOCALHOST:8080",
            "a.localhost",
            "127.0.0.1:8080",
            "[::1]:8080",
            "10.0.0.7",
            "",
            "proxied.example:443",
        ] {
            assert!(!is_stranger(&local, host), "{host}");
        }
        for host in ["evil.example", "localhost.evil.example:8080", "127.0.0.1.nip.io", "notlocalhost"] {
            assert!(is_stranger(&local, host), "{host}");
            assert!(!is_stranger(&Cors::new(Vec::new(), false), host), "{host}");
            assert!(!is_stranger(&Cors::new(vec!["*".to_owned()], true), host), "{host}");
        }
    }

    #[test]
    fn origins_are_taken_whole() {
        let takes = |cors: &Cors, origin: &str| cors.takes(&HeaderValue::from_str(origin).unwrap());
        let local = Cors::new(Vec::new(), true);
        for origin in
            ["http://localhost", "http://localhost:3000", "https://127.0.0.1:1", "http://[::1]:8080"]
        {
            assert!(takes(&local, origin), "{origin}");
        }
        for origin in [
            "http://localhost.example.org",
            "http://localhost:x",
            "http://localhost:3000/",
            "http://localhost:99999",
            "ftp://localhost",
            "http://127.0.0.10",
            "null",
            "",
        ] {
            assert!(!takes(&local, origin), "{origin}");
        }
        let named = Cors::new(vec!["https://a.example".to_owned()], false);
        assert!(takes(&named, "https://a.example"));
        for origin in ["http://a.example", "https://a.example:444", "https://b.a.example", "http://localhost"]
        {
            assert!(!takes(&named, origin), "{origin}");
        }
        assert!(Cors::new(Vec::new(), false).layer().is_none());
    }
}
