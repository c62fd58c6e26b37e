//! What a request gave that has no effect, as the header `x-muster-ignored` tells it.

use axum::http::{HeaderName, HeaderValue};

/// Names the fields of a request that were taken without effect.
pub(crate) const IGNORED: HeaderName = HeaderName::from_static("x-muster-ignored");

/// Names that are kept.
const NAMES: usize = 32;
/// Bytes of one of them.
const BYTES: usize = 96;

/// Fields taken without effect, each once, as paths such as `messages[].id`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Ignored {
    names: Vec<String>,
    has_more: bool,
}

impl Ignored {
    /// Adds a field. Its name may be anything, and as long as a body.
    pub(super) fn push(&mut self, name: &str) {
        let is_plain = |c: char| c.is_ascii_alphanumeric() || "_-.[]".contains(c);
        let plain = name.chars().take(BYTES).map(|c| if is_plain(c) { c } else { '?' }).collect();
        if self.names.contains(&plain) {
            return;
        }
        match self.names.len() {
            NAMES => self.has_more = true,
            _ => self.names.push(plain),
        }
    }

    /// The header's value; `None` where all had its effect.
    pub(crate) fn header(&self) -> Option<HeaderValue> {
        let more = if self.has_more { ", ..." } else { "" };
        let text = self.names.join(", ") + more;
        HeaderValue::from_str(&text).ok().filter(|value| !value.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_told_once_and_cannot_break_the_header() {
        let mut ignored = Ignored::default();
        assert_eq!(ignored.header(), None);
        for name in ["user", "messages[].id", "user", "a\r\nset-cookie: x=é", ""] {
            ignored.push(name);
        }
        assert_eq!(ignored.header().unwrap(), "user, messages[].id, a??set-cookie??x??, ");
        for number in 0..1000 {
            ignored.push(&format!("{number}{}", "x".repeat(1000)));
        }
        let header = ignored.header().unwrap();
        assert!(
            header.len() < NAMES * (BYTES + 2) + 8 && header.as_bytes().ends_with(b", ..."),
            "{header:?}"
        );
    }
}
