//! The blocks of the KV cache, as numbers.
//!
//! Owns the holders of each block and the name of its content. A [`Block`] is one holder's claim; it can be neither
//! copied nor made elsewhere, and its release consumes it, so no claim is released twice. Every block is one of:
//! - held, by one sequence or by several that begin with the same tokens;
//! - cached: without a holder, but its content has a name and is kept until the room is needed;
//! - free: without a holder and without a name.
//!
//! The three always add up to the total. A block with holders is never handed out as room, and of the cached
//! ones the least recently used goes first. Knows nothing of sequences, nor of the memory behind a block.

use std::collections::BTreeMap;
use std::num::NonZero;

use crate::prefix::BlockName;

/// A holder's claim on a block. Give it back with [`BlockPool::release`]: one that is dropped is lost.
#[derive(Debug, PartialEq, Eq)]
#[must_use]
pub(crate) struct Block(
    /// One more than its number, so that a place without a block is no larger than one with it.
    NonZero<u32>,
);

impl Block {
    /// `index` is below the pool's total.
    const fn new(index: u32) -> Self {
        Self(NonZero::<u32>::MIN.saturating_add(index))
    }

    /// Its number, below the pool's total.
    pub(crate) const fn index(&self) -> u32 {
        self.0.get() - 1
    }
}

/// Whether a block's content is kept after its last holder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Keep {
    /// Content is dropped.
    Nothing,
    /// Content stays cached for sequences with the same prefix.
    Prefixes,
}

/// State of a block.
#[derive(Debug, Clone, Default)]
struct State {
    holders: u32,
    /// The name of its content, once that is complete.
    name: Option<BlockName>,
    /// While it is cached: its place in the order of eviction.
    cached_at: u64,
}

/// A fixed number of blocks, each with room for the keys and values of the same number of tokens in one group of layers.
#[derive(Debug)]
pub(crate) struct BlockPool {
    free: Vec<u32>,
    states: Vec<State>,
    /// Held and cached blocks whose content has a name.
    named: BTreeMap<BlockName, u32>,
    /// Cached blocks, the least recently used first.
    cached: BTreeMap<u64, u32>,
    /// Counts releases, to order them.
    released: u64,
    block_tokens: NonZero<u32>,
    keep: Keep,
}

impl BlockPool {
    /// A pool of `total` free blocks.
    pub(crate) fn new(total: u32, block_tokens: NonZero<u32>, keep: Keep) -> Self {
        Self {
            // Reversed, so that blocks are handed out in ascending order at first.
            free: (0..total).rev().collect(),
            states: vec![State::default(); total as usize],
            named: BTreeMap::new(),
            cached: BTreeMap::new(),
            released: 0,
            block_tokens,
            keep,
        }
    }

    /// A block for new content: a free one, the one freed last first, since it is the likeliest to be in a cache
    /// still; or else the least recently used of the cached ones.
    pub(crate) fn allocate(&mut self) -> Option<Block> {
        let block = self.free.pop().or_else(|| self.evict())?;
        self.states[block as usize].holders = 1;
        Some(Block::new(block))
    }

    fn evict(&mut self) -> Option<u32> {
        let (_, block) = self.cached.pop_first()?;
        if let Some(name) = self.states[block as usize].name.take() {
            self.named.remove(&name);
        }
        Some(block)
    }

    /// Another claim on the block with this content, if there is one.
    pub(crate) fn share(&mut self, name: &BlockName) -> Option<Block> {
        let &block = self.named.get(name)?;
        let state = &mut self.states[block as usize];
        if state.holders == 0 {
            self.cached.remove(&state.cached_at);
        }
        state.holders += 1;
        Some(Block::new(block))
    }

    /// Names a block's content. From now on it must not change. Does nothing where a block of that name exists:
    /// one copy is enough.
    pub(crate) fn name(&mut self, block: &Block, name: BlockName) {
        if self.keep == Keep::Prefixes && !self.named.contains_key(&name) {
            self.named.insert(name, block.index());
            self.states[block.index() as usize].name = Some(name);
        }
    }

    /// Releases claims. Of blocks released together the last are evicted first: a block is useless without the blocks before it,
    /// but not the other way round.
    pub(crate) fn release(&mut self, blocks: impl DoubleEndedIterator<Item = Block>) {
        for block in blocks.rev().map(|block| block.index()) {
            let state = &mut self.states[block as usize];
            state.holders -= 1;
            if state.holders > 0 {
                continue;
            }
            if state.name.is_some() {
                self.released += 1;
                state.cached_at = self.released;
                self.cached.insert(self.released, block);
            } else {
                self.free.push(block);
            }
        }
    }

    /// The block with this content, held or cached, if there is one.
    pub(crate) fn find(&self, name: &BlockName) -> Option<Found> {
        let &block = self.named.get(name)?;
        Some(if self.states[block as usize].holders == 0 { Found::Cached } else { Found::Held })
    }

    /// Whether content is cached.
    pub(crate) fn keeps_prefixes(&self) -> bool {
        self.keep == Keep::Prefixes
    }

    /// Tokens of a block.
    pub(crate) const fn block_tokens(&self) -> NonZero<u32> {
        self.block_tokens
    }

    /// Blocks needed for this many tokens, in one group of layers.
    pub(crate) const fn blocks_for(&self, tokens: u32) -> u32 {
        tokens.div_ceil(self.block_tokens.get())
    }

    /// Tokens that fit in this many blocks of one group.
    pub(crate) fn tokens_in(&self, blocks: u32) -> u64 {
        u64::from(blocks) * u64::from(self.block_tokens.get())
    }

    /// All blocks.
    pub(crate) fn total(&self) -> u32 {
        // As many as `new` was given.
        self.states.len() as u32
    }

    /// Blocks without a holder, free and cached.
    pub(crate) fn available(&self) -> u32 {
        // At most `total`.
        self.free.len() as u32 + self.cached()
    }

    /// Blocks without a holder whose content is cached.
    pub(crate) fn cached(&self) -> u32 {
        self.cached.len() as u32
    }
}

/// State of a block that was found by its content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Found {
    /// It has a holder.
    Held,
    /// It has none.
    Cached,
}

#[cfg(test)]
mod tests {
    use std::collections::btree_map::Entry;

    use muster_types::TokenId;
    use proptest::prelude::*;

    use super::*;
    use crate::prefix::BlockKey;

    fn pool(total: u32, keep: Keep) -> BlockPool {
        BlockPool::new(total, NonZero::new(16).unwrap(), keep)
    }

    fn key(number: u32) -> BlockName {
        // The same tokens in two groups.
        let key = BlockKey::after(None, &[TokenId::new(number / 2, u32::MAX).unwrap()]);
        BlockName { group: number % 2, key }
    }

    #[test]
    fn blocks_are_distinct_until_they_run_out_and_come_back() {
        let mut pool = pool(3, Keep::Nothing);
        let blocks: Vec<_> = (0..3).map(|_| pool.allocate().unwrap()).collect();
        assert_eq!(blocks.iter().map(Block::index).collect::<Vec<_>>(), [0, 1, 2]);
        assert_eq!((pool.allocate(), pool.available(), pool.total()), (None, 0, 3));
        pool.name(&blocks[0], key(0));
        pool.release(blocks.into_iter());
        assert_eq!((pool.available(), pool.total(), pool.cached()), (3, 3, 0));
        assert_eq!(pool.allocate().map(|block| block.index()), Some(0));
    }

    #[test]
    fn blocks_and_tokens_convert_without_overflow() {
        let pool = pool(0, Keep::Nothing);
        assert_eq!([0, 1, 16, 17, u32::MAX].map(|tokens| pool.blocks_for(tokens)), [0, 1, 1, 2, 1 << 28]);
        assert_eq!(pool.tokens_in(1 << 28), 1 << 32);
    }

    #[test]
    fn the_least_recently_used_goes_first_and_its_end_before_its_beginning() {
        let mut pool = pool(4, Keep::Prefixes);
        let mut two = |names: [u32; 2]| {
            names.map(|name| {
                let block = pool.allocate().unwrap();
                pool.name(&block, key(name));
                block
            })
        };
        let (old, young) = (two([0, 1]), two([2, 3]));
        pool.release(old.into_iter());
        pool.release(young.into_iter());
        // Used again, so that 0 is younger than all others.
        let block = pool.share(&key(0)).unwrap();
        pool.release(std::iter::once(block));
        let order: Vec<_> = (0..4).map(|_| pool.allocate().unwrap().index()).collect();
        assert_eq!(order, [1, 3, 2, 0]);
        assert_eq!((pool.find(&key(0)), pool.share(&key(3)), pool.cached()), (None, None, 0));
    }

    #[derive(Debug, Clone)]
    enum Op {
        Allocate,
        Name(usize, u32),
        Share(u32),
        Release(usize, usize),
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            4 => Just(Op::Allocate),
            3 => (any::<usize>(), 0..12_u32).prop_map(|(at, name)| Op::Name(at, name)),
            3 => (0..12_u32).prop_map(Op::Share),
            2 => (any::<usize>(), 1..4_usize).prop_map(|(at, count)| Op::Release(at, count)),
        ]
    }

    proptest! {
        /// Against a model that knows only which claims are out and which names were given.
        #[test]
        fn blocks_are_conserved_and_held_ones_left_alone(
            total in 0..8_u32,
            keep in prop_oneof![1 => Just(Keep::Nothing), 4 => Just(Keep::Prefixes)],
            ops in prop::collection::vec(op(), 0..100),
        ) {
            let mut pool = pool(total, keep);
            let mut claims: Vec<Block> = Vec::new();
            // What each block was last named, until it is handed out for new content.
            let mut names: BTreeMap<u32, u32> = BTreeMap::new();
            for op in ops {
                let held = |claims: &[Block], index| claims.iter().any(|claim| claim.index() == index);
                match op {
                    Op::Allocate => {
                        let available = pool.available();
                        let block = pool.allocate();
                        prop_assert_eq!(block.is_some(), available > 0);
                        if let Some(block) = block {
                            prop_assert!(!held(&claims, block.index()), "taken from its holder");
                            names.remove(&block.index());
                            claims.push(block);
                        }
                    }
                    Op::Name(at, name) if !claims.is_empty() => {
                        let block = &claims[at % claims.len()];
                        // A block is named once: its content does not change while it is held.
                        if let Entry::Vacant(unnamed) = names.entry(block.index()) {
                            let new = pool.find(&key(name)).is_none();
                            pool.name(block, key(name));
                            if new && keep == Keep::Prefixes {
                                unnamed.insert(name);
                            }
                        }
                    }
                    Op::Share(name) => {
                        let found = pool.find(&key(name));
                        let block = pool.share(&key(name));
                        let expected = names.iter().find(|&(_, &named)| named == name).map(|(&index, _)| index);
                        prop_assert_eq!(block.as_ref().map(Block::index), expected);
                        if let Some(block) = block {
                            let status = if held(&claims, block.index()) { Found::Held } else { Found::Cached };
                            prop_assert_eq!(found, Some(status));
                            claims.push(block);
                        }
                    }
                    Op::Release(at, count) if !claims.is_empty() => {
                        let at = at % claims.len();
                        let end = claims.len().min(at + count);
                        pool.release(claims.drain(at..end));
                    }
                    Op::Name(..) | Op::Release(..) => {}
                }
                let mut distinct: Vec<_> = claims.iter().map(Block::index).collect();
                distinct.sort_unstable();
                distinct.dedup();
                prop_assert_eq!(pool.available() + distinct.len() as u32, total);
                prop_assert!(distinct.iter().all(|&index| index < total));
                let cached = names.keys().filter(|index| !distinct.contains(index)).count();
                prop_assert_eq!(pool.cached() as usize, cached);
            }
            pool.release(claims.into_iter());
            prop_assert_eq!(pool.available(), total);
        }
    }
}
