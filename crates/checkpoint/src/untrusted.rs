//! Text that came out of a file: what of it may name a file, and how it stands in a message.
//!
//! What always holds: a plain name leads nowhere but into the directory itself, and clipped text can neither break a log line
//! nor fill a disk.

/// Whether `name` can name a file in the directory itself: no separator, no `..`, nothing a shell or log would mind.
pub(crate) fn is_plain(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= 200
        && !name.starts_with('.')
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte))
}

/// Text from a file, fit for a message: control characters escaped, at most 160 characters.
pub(crate) fn clip(text: &str) -> String {
    const LONGEST: usize = 160;
    let mut shown: String = text.chars().take(LONGEST).flat_map(char::escape_debug).collect();
    if text.chars().nth(LONGEST).is_some() {
        shown.push('…');
    }
    // `escape_debug` also escapes quotes, which messages quote JSON values with.
    shown.replace("\\\"", "\"").replace("\\'", "'")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostile_text_stays_on_one_line() {
        assert_eq!(clip("a\nb\u{1b}[31m\"c\""), "a\\nb\\u{1b}[31m\"c\"");
        assert_eq!(clip(&"x".repeat(1000)).chars().count(), 161);
    }

    #[test]
    fn plain_names_have_no_way_out() {
        assert!(is_plain("model-00001-of-00002.safetensors"));
        for name in
            ["", ".", "..", "../x", "/x", "a/b", "a\\b", "a\0b", "a\nb", ".hidden", "ü", &"x".repeat(201)]
        {
            assert!(!is_plain(name), "{name:?}");
        }
    }
}
