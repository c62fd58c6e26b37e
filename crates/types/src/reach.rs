//! How far attention looks back.

use std::num::NonZero;

/// Positions that a query attends to, among those up to its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reach {
    /// All.
    All,
    /// This many, its own among them.
    Last(NonZero<u32>),
    /// Those of its own chunk, where chunks of this length follow each other from position 0.
    Chunk(NonZero<u32>),
}

impl Reach {
    /// [`Reach::Last`]; what is more than positions can be counted, or none, is [`Reach::All`].
    #[must_use]
    pub fn last(positions: usize) -> Self {
        u32::try_from(positions).ok().and_then(NonZero::new).map_or(Self::All, Self::Last)
    }

    /// [`Reach::Chunk`], as [`Reach::last`].
    #[must_use]
    pub fn chunk(positions: usize) -> Self {
        u32::try_from(positions).ok().and_then(NonZero::new).map_or(Self::All, Self::Chunk)
    }

    /// The first position that the one at `position` attends to.
    #[must_use]
    pub const fn first_visible(self, position: u32) -> u32 {
        match self {
            Self::All => 0,
            Self::Last(count) => position.saturating_sub(count.get() - 1),
            Self::Chunk(length) => position - position % length.get(),
        }
    }
}
