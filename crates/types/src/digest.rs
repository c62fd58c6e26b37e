//! The identity of an expert's weights: a digest of the bytes that one process hands another.

use std::fmt;
use std::str::FromStr;

/// BLAKE3 of an expert's packed weights.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct WeightDigest([u8; 32]);

/// Text or bytes that are not a digest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a digest of weights is 32 bytes (64 lower-case hexadecimal digits), got {0} of them")]
pub struct ParseDigestError(usize);

impl WeightDigest {
    /// Bytes of a digest.
    pub const BYTES: usize = 32;

    /// The digest with these bytes.
    #[must_use]
    pub const fn new(bytes: [u8; Self::BYTES]) -> Self {
        Self(bytes)
    }

    /// The digest of these bytes, one part behind the other.
    #[must_use]
    pub fn of<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> Self {
        let mut hasher = WeightHasher::default();
        parts.into_iter().for_each(|part| hasher.update(part));
        hasher.finish()
    }

    /// The digest in a slice off the wire.
    ///
    /// # Errors
    /// When the slice is not 32 bytes long.
    pub fn from_slice(bytes: &[u8]) -> Result<Self, ParseDigestError> {
        bytes.try_into().map(Self).map_err(|_| ParseDigestError(bytes.len()))
    }

    /// The bytes.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; Self::BYTES] {
        &self.0
    }
}

impl fmt::Display for WeightDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for WeightDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "WeightDigest({:.12})", self.to_string())
    }
}

impl FromStr for WeightDigest {
    type Err = ParseDigestError;

    fn from_str(text: &str) -> Result<Self, ParseDigestError> {
        let wrong = || ParseDigestError(text.len());
        let digit = |byte: &u8| match byte {
            b'0'..=b'9' => Some(byte - b'0'),
            b'a'..=b'f' => Some(byte - b'a' + 10),
            _ => None,
        };
        let digits: Vec<u8> = text.as_bytes().iter().map(digit).collect::<Option<_>>().ok_or_else(wrong)?;
        let (pairs, rest) = digits.as_chunks::<2>();
        let bytes: Vec<u8> = pairs.iter().map(|[high, low]| high << 4 | low).collect();
        if rest.is_empty() { Self::from_slice(&bytes).map_err(|_| wrong()) } else { Err(wrong()) }
    }
}

/// Hasher of a digest.
#[derive(Default)]
pub struct WeightHasher(blake3::Hasher);

impl WeightHasher {
    /// Appends bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// The digest of all appended bytes.
    #[must_use]
    pub fn finish(&self) -> WeightDigest {
        WeightDigest(*self.0.finalize().as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_read_as_it_is_written_and_nothing_else_is() {
        let digest = WeightDigest::of([&b"ab"[..], b"", b"c"]);
        // The BLAKE3 team's own vector for "abc".
        assert_eq!(digest.to_string(), "6437b3ac38465133ffb63b75273a8db548c558465d79db03fd359c6cd5bd9d85");
        assert_eq!(digest.to_string().parse(), Ok(digest));
        assert_eq!(digest, WeightDigest::of([&b"abc"[..]]));
        let text = digest.to_string();
        for bad in
            ["", "ab", &text[1..], &text.to_uppercase(), &format!("{text}00"), &format!("+{}", &text[1..])]
        {
            assert!(bad.parse::<WeightDigest>().is_err(), "{bad}");
        }
        assert!(WeightDigest::from_slice(&[0; 31]).is_err());
    }
}
