//! API keys: kept as hashes, in a file of one line each: `NAME sha256:HEX`.
//!
//! A key has 256 random bits, so that a plain hash keeps it secret and no guessing helps.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sha2::{Digest, Sha256};

use crate::reloaded::Reload;

/// Keys of one file at most.
const MOST: usize = 100_000;
/// Longest name, bytes.
const LONGEST_NAME: usize = 128;
/// Longest key that is checked, bytes.
const LONGEST_KEY: usize = 512;
/// Shortest allowed key, bytes.
const SHORTEST_KEY: usize = 32;
/// Prefix of new keys, so that a leaked one is recognised.
const PREFIX: &str = "muster-";

/// A file of keys that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KeysError {
    /// It cannot be read.
    #[error("{} cannot be read: {reason}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        reason: String,
    },
    /// A line is malformed.
    #[error("{}:{line}: {reason}; a line is NAME sha256:HEX, as `muster keys new NAME` prints it", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// From 1.
        line: usize,
        /// The problem. Never the line's text: it may be a key.
        reason: &'static str,
    },
}

/// A key or a name that is not allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// The name.
    #[error("a key's name has 1 to {LONGEST_NAME} letters, digits, dots, dashes or underscores")]
    Name,
    /// The key.
    #[error(
        "a key has {SHORTEST_KEY} to {LONGEST_KEY} visible ASCII characters; `muster keys new` makes one"
    )]
    Key,
    /// No randomness.
    #[error("the system gives no random numbers")]
    Random,
}

/// A new key.
pub struct NewKey {
    /// For the client. It cannot be recovered.
    pub key: String,
    /// For the file.
    pub line: String,
}

impl NewKey {
    /// Makes one.
    ///
    /// # Errors
    /// When the name is not allowed, or the system has no randomness.
    pub fn generate(name: &str) -> Result<Self, KeyError> {
        let mut random = [0_u8; 32];
        crate::material::provider().secure_random.fill(&mut random).map_err(|_| KeyError::Random)?;
        let key = format!("{PREFIX}{}", hex(&random));
        Ok(Self { line: key_line(name, &key)?, key })
    }
}

/// The line of a key.
///
/// # Errors
/// When the name or the key is not allowed.
pub fn key_line(name: &str, key: &str) -> Result<String, KeyError> {
    if !is_name(name) {
        return Err(KeyError::Name);
    }
    let visible = key.bytes().all(|byte| byte.is_ascii_graphic());
    if !visible || !(SHORTEST_KEY..=LONGEST_KEY).contains(&key.len()) {
        return Err(KeyError::Key);
    }
    Ok(format!("{name} sha256:{}", hex(&Sha256::digest(key))))
}

fn is_name(name: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    (1..=LONGEST_NAME).contains(&name.len()) && name.bytes().all(allowed)
}

/// Valid keys.
#[derive(Debug, Default)]
pub struct ApiKeys {
    names: HashMap<[u8; 32], Arc<str>>,
}

impl ApiKeys {
    /// The name of a key; `None` when it is not valid.
    #[must_use]
    pub fn name_of(&self, key: &str) -> Option<Arc<str>> {
        if key.len() > LONGEST_KEY {
            return None;
        }
        let digest: [u8; 32] = Sha256::digest(key).into();
        // The time of a look-up reveals at most something of hashes, from which no key follows.
        self.names.get(&digest).cloned()
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.names.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.names.is_empty()
    }
}

impl Reload for ApiKeys {
    type Error = KeysError;
    const WHAT: &'static str = "API keys";

    fn make(paths: &[PathBuf], contents: &[Vec<u8>]) -> Result<Self, KeysError> {
        let (Some(path), Some(content)) = (paths.first(), contents.first()) else {
            return Ok(Self::default());
        };
        let wrong = |line, reason| KeysError::Line { path: path.clone(), line, reason };
        let text = std::str::from_utf8(content).map_err(|_| wrong(1, "the file is not UTF-8"))?;
        let text = text.trim_start_matches('\u{feff}');
        let (mut keys, mut names) = (Self::default(), HashSet::new());
        for (at, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let wrong = |reason| wrong(at + 1, reason);
            let (name, hash) =
                line.split_once(char::is_whitespace).ok_or_else(|| wrong("there is no hash"))?;
            if !is_name(name) {
                return Err(wrong(
                    "the name has other characters than letters, digits, dots, dashes and underscores",
                ));
            }
            let hash = hash
                .trim()
                .strip_prefix("sha256:")
                .ok_or_else(|| wrong("the hash does not begin with sha256:"))?;
            let hash = from_hex(hash).ok_or_else(|| wrong("the hash is not 64 hexadecimal digits"))?;
            if !names.insert(name) {
                return Err(wrong("the name stands in an earlier line"));
            }
            if keys.names.insert(hash, name.into()).is_some() {
                return Err(wrong("the key stands in an earlier line"));
            }
            if keys.names.len() > MOST {
                return Err(wrong("there are too many keys"));
            }
        }
        Ok(keys)
    }

    fn unreadable(path: &Path, reason: String) -> KeysError {
        KeysError::Unreadable { path: path.to_owned(), reason }
    }

    fn warning(&self) -> Option<&'static str> {
        self.is_empty().then_some(
            "there are none in the file, so that nobody is let in by a key; `muster keys new NAME --file FILE` adds one",
        )
    }

    fn report(&self) {
        metrics::gauge!("muster_api_keys").set(self.names.len() as f64);
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn from_hex(text: &str) -> Option<[u8; 32]> {
    let digits = text.as_bytes();
    if digits.len() != 64 {
        return None;
    }
    let mut bytes = [0; 32];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        let digit = |at: usize| char::from(pair[at]).to_digit(16);
        *byte = u8::try_from(digit(0)? * 16 + digit(1)?).ok()?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<ApiKeys, KeysError> {
        ApiKeys::make(&["keys".into()], &[text.into()])
    }

    #[test]
    fn a_new_key_is_known_by_its_line_alone() {
        let (first, second) = (NewKey::generate("ci").unwrap(), NewKey::generate("chat.1").unwrap());
        assert_ne!(first.key, second.key);
        assert!(!first.line.contains(&first.key[PREFIX.len()..]));
        let keys = parse(&format!("# ours\n\n{}\r\n  {}  \n", first.line, second.line)).unwrap();
        assert_eq!(
            (keys.name_of(&first.key).as_deref(), keys.name_of(&second.key).as_deref()),
            (Some("ci"), Some("chat.1"))
        );
        for bad in ["", "muster-", &first.key.to_uppercase(), &first.key[1..], &"x".repeat(1 << 20)] {
            assert_eq!(keys.name_of(bad), None);
        }
    }

    #[test]
    fn a_file_without_keys_is_warned_of() {
        for empty in ["", "\n", "# none yet\n", "\u{feff}"] {
            assert!(
                parse(empty).unwrap().warning().unwrap().contains("nobody is let in by a key"),
                "{empty:?}"
            );
        }
        let line = NewKey::generate("ci").unwrap().line;
        // As some editors begin a file.
        for text in [line.clone(), format!("\u{feff}{line}\r\n")] {
            let keys = parse(&text).unwrap();
            assert_eq!((keys.len(), keys.warning()), (1, None));
        }
    }

    #[test]
    fn the_hash_is_what_sha256sum_prints() {
        let line = key_line("a", "0123456789abcdef0123456789abcdef").unwrap();
        let hash = "3eb1bd439947eb762998e566ccc2e099c791118b2f40579cc4f7da2b5061b7f9";
        assert_eq!(line, format!("a sha256:{hash}"));
    }

    #[test]
    fn wrong_lines_are_named_without_what_stands_there() {
        let good = key_line("a", "0123456789abcdef0123456789abcdef").unwrap();
        let other = key_line("b", "0123456789abcdef0123456789abcdef").unwrap();
        let secret = "muster-0123";
        for (text, line) in [
            (secret.to_owned(), 1),
            (format!("# x\na {secret}"), 2),
            ("a sha256:12".into(), 1),
            (format!("a sha256:{}", "g".repeat(64)), 1),
            (format!("a/b sha256:{}", "0".repeat(64)), 1),
            (format!("{good}\n{good}"), 2),
            (format!("{good}\n\n{other}"), 3),
        ] {
            let error = parse(&text).unwrap_err().to_string();
            assert!(error.starts_with(&format!("keys:{line}: ")), "{error}");
            assert!(!error.contains(secret), "{error}");
        }
        assert!(parse("").unwrap().is_empty());
        assert_eq!(key_line("", &"k".repeat(32)), Err(KeyError::Name));
        assert_eq!(key_line("a", "short"), Err(KeyError::Key));
    }
}
