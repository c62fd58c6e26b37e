//! One pass through the model: which tokens of which sequences, with which KV blocks. Does not know how they were chosen.

use muster_types::{SeqId, TokenId};

/// In [`StepItem::blocks`]: no block, since no later position sees its positions. No block has this number.
pub const NO_BLOCK: u32 = u32::MAX;

/// The work of one pass through the model.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Step {
    /// At most one per sequence: single sampled tokens first, then prefill chunks; each by age.
    pub items: Vec<StepItem>,
    /// Sequences that lost their blocks to older ones, youngest first. They wait and have no item.
    pub preempted: Vec<SeqId>,
}

impl Step {
    /// Tokens of all items.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.items.iter().map(|item| item.tokens.len()).sum()
    }
}

/// Consecutive tokens of one sequence whose keys and values are to be computed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StepItem {
    /// The sequence.
    pub seq: SeqId,
    /// Position of the first token in the sequence.
    pub start: u32,
    /// The tokens; at least one.
    pub tokens: Vec<TokenId>,
    /// The sequence's KV blocks: for one group of layers after the other its table in order of position, with exactly
    /// enough places for `start + tokens.len()` positions. A place that no later position sees has [`NO_BLOCK`].
    pub blocks: Vec<u32>,
    /// Whether the last token's logits are wanted, to sample the next token and append it.
    pub sample: bool,
}
