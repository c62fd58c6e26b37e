//! Fields of a request without effect, reported in the header `x-muster-ignored`.

use axum::http::{HeaderName, HeaderValue};

/// Header that names the ignored fields of a request.
pub(crate) const IGNORED: HeaderName = HeaderName::from_static("x-muster-ignored");

/// Most names kept.
const NAMES: usize = 32;
/// Most bytes of a name.
const BYTES: usize = 96;

/// Ignored fields, each once, as paths such as `messages[].id`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Ignored {
    names: Vec<String>,
    has_more: bool,
}

impl Ignored {
    /// Adds a field. Its name is client input of any content and length.
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

    /// The header's value; `None` when no field was ignored.
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
