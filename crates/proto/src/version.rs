//! Versions of the protocol, and the one that two processes have in common.
//!
//! Every version is compatible with the one before: fields are added, never changed or taken away, and a process that
//! speaks a version speaks the one before, too. So a cluster is upgraded, and rolled back, one process at a time. A
//! message that opens a conversation has the oldest and the newest version of its sender; without a newest, as in
//! version 1, the sender has one version.

use std::fmt;

use crate::convert::WireError;

/// Range of versions that a process speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Versions {
    oldest: u32,
    newest: u32,
}

/// The newest version. 2: descriptions have the times to a worker's first expert and to its first full assignment. 3:
/// descriptions have a digest of each expert's weights; an answer marks the output rows that are not finite, and has
/// the others.
///
/// A build with `MUSTER_NEXT_VERSION` in its environment is one version ahead, to test a rolling upgrade before there
/// is a new version.
const NEWEST: u32 = if option_env!("MUSTER_NEXT_VERSION").is_some() { 4 } else { 3 };

/// First version whose answers mark output rows.
pub const MARKS: u32 = 3;
/// First version with digests of weights.
pub const WITH_DIGESTS: u32 = 3;

/// Versions of this build.
pub const OURS: Versions = Versions { oldest: NEWEST - 1, newest: NEWEST };

impl Versions {
    /// Converts to the two fields of a message.
    #[must_use]
    pub const fn to_wire(self) -> (u32, u32) {
        (self.oldest, self.newest)
    }

    /// Parses the two fields of a message.
    ///
    /// # Errors
    /// When they contain no version.
    pub fn parse(oldest: u32, newest: u32) -> Result<Self, WireError> {
        match (oldest, newest) {
            (0, _) => Err(WireError::Missing("protocol_version")),
            (oldest, 0) => Ok(Self { oldest, newest: oldest }),
            (oldest, newest) if oldest <= newest => Ok(Self { oldest, newest }),
            _ => Err(WireError::rule(
                "newest_protocol_version",
                format!("is {newest}, below protocol_version {oldest}"),
            )),
        }
    }

    /// The newest version in common.
    #[must_use]
    pub fn common(self, other: Self) -> Option<u32> {
        let newest = self.newest.min(other.newest);
        (newest >= self.oldest.max(other.oldest)).then_some(newest)
    }
}

impl fmt::Display for Versions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self { oldest, newest } if oldest == newest => write!(f, "{oldest}"),
            Self { oldest, newest } => write!(f, "{oldest} to {newest}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn versions(oldest: u32, newest: u32) -> Versions {
        Versions::parse(oldest, newest).unwrap()
    }

    #[test]
    fn neighbours_have_a_version_in_common_and_others_have_not() {
        assert_eq!(OURS.newest - OURS.oldest, 1, "one version back, in both directions");
        assert_eq!(versions(1, 2).common(versions(2, 3)), Some(2));
        assert_eq!(versions(2, 3).common(versions(1, 2)), Some(2));
        // A build from before version ranges.
        assert_eq!(versions(1, 2).common(versions(1, 0)), Some(1));
        assert_eq!(versions(1, 2).common(versions(3, 4)), None);
        assert_eq!(versions(3, 4).common(versions(1, 2)), None);
        assert!(Versions::parse(0, 2).is_err() && Versions::parse(0, 0).is_err());
        assert!(Versions::parse(3, 2).is_err());
        assert_eq!((versions(1, 2).to_string(), versions(3, 0).to_string()), ("1 to 2".into(), "3".into()));
    }
}
