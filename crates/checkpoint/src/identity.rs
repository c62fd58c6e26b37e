//! The model's fingerprint: a digest of everything that tells it from another.

use muster_types::Fingerprint;
use sha2::{Digest, Sha256};

/// A fingerprint in the making. Each part goes in with its label and length, so that no two different
/// sequences of parts feed the digest the same bytes.
pub(crate) struct Identity(Sha256);

impl Identity {
    pub(crate) fn new() -> Self {
        Self(Sha256::new_with_prefix("muster checkpoint v1\n"))
    }

    pub(crate) fn part(&mut self, label: &str, bytes: &[u8]) {
        for field in [label.as_bytes(), bytes] {
            self.0.update((field.len() as u64).to_le_bytes());
            self.0.update(field);
        }
    }

    pub(crate) fn finish(self) -> Fingerprint {
        Fingerprint::new(self.0.finalize().into())
    }
}
