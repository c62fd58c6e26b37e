//! Settings of the router's edges: what one request may ask, how long a connection may be idle, and whose pages may ask.

use std::time::Duration;

use crate::layers::{Key, Reader, ValueKind};
use crate::value::{self, parse_duration, parse_size};

/// Bytes of the largest body that may be allowed: what it becomes on the way has to fit into memory that is set aside.
const LARGEST_BODY: u64 = 16 << 20;

pub(crate) const MAX_CHOICES: Key =
    Key { name: "max_choices", kind: ValueKind::Number, default: Some("256") };
pub(crate) const MAX_STOPS: Key = Key { name: "max_stops", kind: ValueKind::Number, default: Some("16") };
pub(crate) const MAX_BIAS: Key = Key { name: "max_bias", kind: ValueKind::Number, default: Some("1024") };
pub(crate) const MAX_BODY: Key = Key { name: "max_body", kind: ValueKind::Text, default: Some("8MiB") };
pub(crate) const KEEP_ALIVE: Key = Key { name: "keep_alive", kind: ValueKind::Text, default: Some("30s") };
pub(crate) const CORS_ORIGINS: Key = Key { name: "cors_origins", kind: ValueKind::List, default: None };

/// What the router's edges are told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EdgeSettings {
    /// Choices of all prompts of one request.
    pub max_choices: u32,
    /// Stop strings, or stop ids, of one request.
    pub max_stops: usize,
    /// Entries of one request's `logit_bias`.
    pub max_bias: usize,
    /// Bytes of one request.
    pub max_body: usize,
    /// How long a connection of HTTP may wait for a request.
    pub keep_alive: Duration,
    /// Origins whose pages may ask, as browsers write them, or `*`.
    pub cors_origins: Vec<String>,
}

pub(crate) fn read(reader: &mut Reader) -> Option<EdgeSettings> {
    let mut count = |key: &Key, most| reader.required(key.name, |text| value::count(text, 1, most));
    let max_choices = count(&MAX_CHOICES, 1 << 16).and_then(|count| u32::try_from(count).ok());
    let max_stops = count(&MAX_STOPS, 1 << 10).and_then(|count| usize::try_from(count).ok());
    let max_bias = count(&MAX_BIAS, 1 << 20).and_then(|count| usize::try_from(count).ok());
    let max_body = reader.required(MAX_BODY.name, body).and_then(|bytes| usize::try_from(bytes).ok());
    let keep_alive = reader.required(KEEP_ALIVE.name, parse_duration);
    let cors_origins = reader.list(CORS_ORIGINS.name, origin);
    Some(EdgeSettings {
        max_choices: max_choices?,
        max_stops: max_stops?,
        max_bias: max_bias?,
        max_body: max_body?,
        keep_alive: keep_alive?,
        cors_origins,
    })
}

fn body(text: &str) -> Result<u64, String> {
    let bytes = parse_size(text)?;
    if (1 << 10..=LARGEST_BODY).contains(&bytes) {
        Ok(bytes)
    } else {
        Err(format!("{text} is not 1KiB to 16MiB, which a request may be as large as"))
    }
}

/// `scheme://host`, with a port or without, or `*`.
fn origin(text: &str) -> Result<String, String> {
    let authority = text.strip_prefix("http://").or_else(|| text.strip_prefix("https://"));
    let is_plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "-.:[]".contains(c);
    let is_one = authority.is_some_and(|host| !host.is_empty() && host.chars().all(is_plain));
    if text == "*" || is_one {
        return Ok(text.to_owned());
    }
    Err(format!(
        "{text:?} is not an origin; write it as browsers do, https://example.org or http://localhost:3000 in small letters \
         and without a path, or * for all"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn origins_are_written_as_browsers_do() {
        for good in ["*", "https://example.org", "http://localhost:3000", "http://[::1]:8080"] {
            assert_eq!(origin(good), Ok(good.to_owned()));
        }
        for bad in ["", "example.org", "https://", "https://example.org/", "https://A.org", "ftp://x", "null"]
        {
            assert!(origin(bad).unwrap_err().contains("is not an origin"), "{bad}");
        }
    }

    #[test]
    fn bodies_have_a_range() {
        assert_eq!((body("8MiB"), body("1KiB")), (Ok(8 << 20), Ok(1 << 10)));
        for bad in ["1B", "17MiB", "8"] {
            assert!(body(bad).is_err(), "{bad}");
        }
    }
}
