//! The identity of a model: a digest that router and worker compare before a single row travels.

use std::fmt;

/// 256-bit digest of a checkpoint's configuration, index and shard headers.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Fingerprint([u8; 32]);

/// Text that is not 64 hexadecimal digits.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a model fingerprint is 32 bytes (64 hexadecimal digits), got {0} bytes")]
pub struct ParseFingerprintError(usize);

impl Fingerprint {
    /// The fingerprint with these bytes.
    #[must_use]
    pub const fn new(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The fingerprint in a slice off the wire.
    ///
    /// # Errors
    /// When the slice is not 32 bytes long.
    pub fn from_slice(bytes: &[u8]) -> Result<Self, ParseFingerprintError> {
        bytes.try_into().map(Self).map_err(|_| ParseFingerprintError(bytes.len()))
    }

    /// The bytes.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The first 12 hexadecimal digits: enough to tell two models apart in a log line.
    #[must_use]
    pub fn short(&self) -> String {
        let mut text = self.to_string();
        text.truncate(12);
        text
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Fingerprint({})", self.short())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_is_a_prefix_of_the_whole() {
        let fingerprint = Fingerprint::new([0xab; 32]);
        assert_eq!(fingerprint.short(), "abababababab");
        assert_eq!(fingerprint.to_string().len(), 64);
        assert!(Fingerprint::from_slice(&[0; 31]).is_err());
    }
}
