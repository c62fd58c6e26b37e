//! Checked ids. Private fields, fallible constructors.

use std::fmt;
use std::sync::Arc;

/// An index that does not exist in its model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{what} {value} is out of range: there are {limit} (valid: 0 to {})", .limit.saturating_sub(1))]
pub struct OutOfRange {
    /// Kind of the indexed thing: "layer", "expert", "token id".
    pub what: &'static str,
    /// The offending value.
    pub value: u64,
    /// Number of such things.
    pub limit: u64,
}

macro_rules! index_type {
    ($(#[$doc:meta])* $name:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(u32);

        impl $name {
            /// Checks `value` against the number of such things in the model.
            ///
            /// # Errors
            /// `OutOfRange` when `value >= count`.
            pub fn new(value: u32, count: u32) -> Result<Self, OutOfRange> {
                if value < count {
                    Ok(Self(value))
                } else {
                    Err(OutOfRange { what: $what, value: u64::from(value), limit: u64::from(count) })
                }
            }

            /// All ids below `count`, in ascending order.
            pub fn all(count: u32) -> impl DoubleEndedIterator<Item = Self> + ExactSizeIterator + Clone {
                (0..count).map(Self)
            }

            /// The number itself, as it travels on the wire.
            #[must_use]
            pub const fn get(self) -> u32 {
                self.0
            }

            /// The number as an index.
            #[must_use]
            pub const fn index(self) -> usize {
                self.0 as usize
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

index_type!(
    /// A decoder layer, counted from 0 over all layers (dense ones included).
    LayerId,
    "layer"
);
index_type!(
    /// A routed expert within one layer.
    ExpertId,
    "expert"
);
index_type!(
    /// A token of the vocabulary.
    TokenId,
    "token id"
);

/// One routed expert of the model: the unit that is placed, loaded and replicated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ExpertKey {
    /// The layer it belongs to.
    pub layer: LayerId,
    /// Its number in that layer.
    pub expert: ExpertId,
}

impl fmt::Display for ExpertKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "layer {} expert {}", self.layer, self.expert)
    }
}

macro_rules! counter_type {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(u64);

        impl $name {
            /// The value with this number.
            #[must_use]
            pub const fn new(number: u64) -> Self {
                Self(number)
            }

            /// Its number.
            #[must_use]
            pub const fn get(self) -> u64 {
                self.0
            }

            /// The next value.
            #[must_use]
            pub const fn next(self) -> Self {
                Self(self.0.saturating_add(1))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

counter_type!(
    /// A version of the placement. Grows by one with every change.
    Epoch
);
counter_type!(
    /// A sequence under generation inside one router. Never reused during the process's lifetime.
    SeqId
);

/// A worker process, by the name it announces. At most 128 bytes of `[A-Za-z0-9._:/-]`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WorkerId(Arc<str>);

/// An invalid worker name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidWorkerId {
    /// No characters at all.
    #[error("worker id is empty")]
    Empty,
    /// Longer than 128 bytes.
    #[error("worker id is {0} bytes long; at most 128 are allowed")]
    TooLong(usize),
    /// A character that is not allowed in a name.
    #[error("worker id has the character {0:?}; allowed are letters, digits and . _ : / -")]
    BadCharacter(char),
}

impl WorkerId {
    /// Checks a name.
    ///
    /// # Errors
    /// When it is empty, longer than 128 bytes, or has a character outside `[A-Za-z0-9._:/-]`.
    pub fn new(name: &str) -> Result<Self, InvalidWorkerId> {
        if name.is_empty() {
            return Err(InvalidWorkerId::Empty);
        }
        if name.len() > 128 {
            return Err(InvalidWorkerId::TooLong(name.len()));
        }
        let allowed = |c: char| c.is_ascii_alphanumeric() || "._:/-".contains(c);
        if let Some(bad) = name.chars().find(|&c| !allowed(c)) {
            return Err(InvalidWorkerId::BadCharacter(bad));
        }
        Ok(Self(name.into()))
    }

    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for WorkerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_check_their_range() {
        assert_eq!(ExpertId::new(7, 8).map(ExpertId::get), Ok(7));
        let error = ExpertId::new(8, 8).unwrap_err();
        assert_eq!(error.to_string(), "expert 8 is out of range: there are 8 (valid: 0 to 7)");
        assert!(TokenId::new(u32::MAX, u32::MAX).is_err());
        assert!(LayerId::new(0, 0).is_err());
    }

    #[test]
    fn worker_ids_refuse_what_could_break_a_log_line() {
        assert!(WorkerId::new("worker-0.pool/a:9").is_ok());
        assert_eq!(WorkerId::new(""), Err(InvalidWorkerId::Empty));
        assert_eq!(WorkerId::new("a\nb"), Err(InvalidWorkerId::BadCharacter('\n')));
        assert_eq!(WorkerId::new(&"x".repeat(129)), Err(InvalidWorkerId::TooLong(129)));
    }
}
