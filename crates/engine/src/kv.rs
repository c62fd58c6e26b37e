//! The blocks of the KV cache, as numbers.
//!
//! Owns which blocks are free. A [`Block`] can be neither copied nor made elsewhere, and freeing consumes it,
//! so a block is never in two hands and never freed twice; free and used blocks always add up to the total.
//! Knows nothing of sequences, nor of the memory behind a block.

use std::num::NonZero;

/// A block of the KV cache in use. Give it back with [`BlockPool::free`]: one that is dropped is lost.
#[derive(Debug, PartialEq, Eq)]
#[must_use]
pub(crate) struct Block(u32);

impl Block {
    /// Its number, below the pool's total.
    pub(crate) const fn index(&self) -> u32 {
        self.0
    }
}

/// A fixed number of blocks, each with room for the keys and values of the same number of tokens.
#[derive(Debug)]
pub(crate) struct BlockPool {
    free: Vec<Block>,
    total: u32,
    block_tokens: NonZero<u32>,
}

impl BlockPool {
    /// A pool of `total` free blocks.
    pub(crate) fn new(total: u32, block_tokens: NonZero<u32>) -> Self {
        // Reversed, so that blocks are handed out in ascending order at first.
        Self { free: (0..total).rev().map(Block).collect(), total, block_tokens }
    }

    /// A free block, the one freed last first, since it is the likeliest to be in a cache still.
    pub(crate) fn allocate(&mut self) -> Option<Block> {
        self.free.pop()
    }

    /// Takes blocks back.
    pub(crate) fn free(&mut self, blocks: Vec<Block>) {
        self.free.extend(blocks);
    }

    /// Blocks needed for this many tokens.
    pub(crate) const fn blocks_for(&self, tokens: u32) -> u32 {
        tokens.div_ceil(self.block_tokens.get())
    }

    /// Tokens that fit in this many blocks.
    pub(crate) fn tokens_in(&self, blocks: usize) -> u64 {
        blocks as u64 * u64::from(self.block_tokens.get())
    }

    /// All blocks, free or not.
    pub(crate) const fn total(&self) -> u32 {
        self.total
    }

    /// Free blocks.
    pub(crate) fn available(&self) -> u32 {
        // At most `total`.
        self.free.len() as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_distinct_until_they_run_out_and_come_back() {
        let mut pool = BlockPool::new(3, NonZero::new(16).unwrap());
        let blocks: Vec<_> = (0..3).map(|_| pool.allocate().unwrap()).collect();
        assert_eq!(blocks.iter().map(Block::index).collect::<Vec<_>>(), [0, 1, 2]);
        assert_eq!((pool.allocate(), pool.available(), pool.total()), (None, 0, 3));
        pool.free(blocks);
        assert_eq!((pool.available(), pool.total()), (3, 3));
        assert_eq!(pool.allocate().map(|block| block.index()), Some(2));
    }

    #[test]
    fn blocks_and_tokens_convert_without_overflow() {
        let pool = BlockPool::new(0, NonZero::new(16).unwrap());
        assert_eq!([0, 1, 16, 17, u32::MAX].map(|tokens| pool.blocks_for(tokens)), [0, 1, 1, 2, 1 << 28]);
        assert_eq!(pool.tokens_in(1 << 28), 1 << 32);
    }
}
