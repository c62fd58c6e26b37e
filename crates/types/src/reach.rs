//! Reach of attention: the positions that a query attends to.

use std::num::NonZero;

/// Positions that a query attends to, among those up to its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reach {
    /// All positions.
    All,
    /// The last positions, this many with its own.
    Last(NonZero<u32>),
    /// Positions of its own chunk, where chunks of this length follow each other from position 0.
    Chunk(NonZero<u32>),
}

impl Reach {
    /// [`Reach::Last`] of this many; [`Reach::All`] for 0 and above `u32::MAX`.
    #[must_use]
    pub fn last(positions: usize) -> Self {
        u32::try_from(positions).ok().and_then(NonZero::new).map_or(Self::All, Self::Last)
    }

    /// [`Reach::Chunk`] of this many; [`Reach::All`] for 0 and above `u32::MAX`.
    #[must_use]
    pub fn chunk(positions: usize) -> Self {
        u32::try_from(positions).ok().and_then(NonZero::new).map_or(Self::All, Self::Chunk)
    }

    /// The first position that a query at `position` attends to.
    #[must_use]
    pub const fn first_visible(self, position: u32) -> u32 {
        match self {
            Self::All => 0,
            Self::Last(count) => position.saturating_sub(count.get() - 1),
            Self::Chunk(length) => position - position % length.get(),
        }
    }
}
