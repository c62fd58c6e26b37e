//! Settings of the router's edges: what one request may ask, how long a connection may be idle, and whose pages may
//! ask.

use std::time::Duration;

use crate::declare::settings;
use crate::group::DefaultTo::{Value, Words};
use crate::group::{Form, NUMBER, SIZE, TIME};
use crate::value::{self, parse_duration, parse_size};

/// Greatest allowed body, bytes: everything parsed from it must fit into reserved memory.
const LARGEST_BODY: u64 = 16 << 20;

settings! {
    /// Settings of the router's edges.
    pub struct EdgeSettings, EdgeRead {
        /// Most choices of one request: its prompts times n.
        ///
        /// In gRPC, times `choices`. 1 to 65536; they get their places in the queue together or not at all.
        max_choices: u32 = required(value::up_to(1 << 16)), NUMBER, Value("256");

        /// Most stop strings, or stop ids, of one request, 1 to 1024.
        max_stops: usize = required(value::up_to(1 << 10)), NUMBER, Value("16");

        /// Most entries of one request's logit_bias.
        max_bias: usize = required(value::up_to(1 << 20)), NUMBER, Value("1024");

        /// Largest request, 1KiB to 16MiB; the text of a prompt may have half of it.
        ///
        /// A body of HTTP, a message of gRPC.
        max_body: usize = required(body), SIZE, Value("8MiB");

        /// How long an HTTP connection may wait for its next request.
        ///
        /// A request's head has to be complete within it, too.
        keep_alive: Duration = required(parse_duration), TIME, Value("30s");

        /// An origin whose web pages may ask, as browsers write it (`https://example.org`), or * for all.
        ///
        /// Where `http` is a loopback address and there are no keys, also whose names `Host` may have. Pages of this
        /// host are those of `http://localhost` and loopback addresses, at any port.
        cors_origins: Vec<String> = list(origin), Form::list("ORIGIN"),
            Words("pages of this host where `http` is a loopback address, else none");
    }
}

fn body(text: &str) -> Result<usize, String> {
    let bytes = Some(parse_size(text)?).filter(|bytes| (1 << 10..=LARGEST_BODY).contains(bytes));
    let bytes = bytes.and_then(|bytes| usize::try_from(bytes).ok());
    bytes.ok_or_else(|| format!("{text} is not 1KiB to 16MiB, which a request may be as large as"))
}

/// Checks an origin: `scheme://host`, with a port or without, or `*`.
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
