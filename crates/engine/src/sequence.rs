//! One sequence under generation: its tokens, and how far its keys and values are computed.
//!
//! Always holds: `computed <= tokens.len() <= limit`, `blocks` covers exactly `computed` positions, and of those
//! blocks the ones that others may hold, too, are full. Knows nothing of other sequences, nor whether it is
//! waiting or running.

use muster_types::{SeqId, TokenId};

use crate::kv::{Block, BlockPool, Found};
use crate::prefix::BlockKey;
use crate::scheduler::StepItem;

#[derive(Debug)]
pub(crate) struct Sequence {
    id: SeqId,
    /// The prompt, then what was generated.
    tokens: Vec<TokenId>,
    /// Most tokens, prompt included.
    limit: u32,
    /// Positions whose keys and values are in the cache once the current step has run.
    computed: u32,
    blocks: Vec<Block>,
    /// Names of the blocks that its tokens fill, as far as they were needed.
    keys: Vec<BlockKey>,
    /// Blocks whose names the pool was told, or had.
    named: usize,
    /// Prompt tokens that were in the cache when it first ran.
    cached_prompt: Option<u32>,
    /// Left out of steps for now.
    parked: bool,
}

impl Sequence {
    /// A sequence that may grow from its prompt to `limit` tokens. `limit` is above the prompt's length.
    pub(crate) const fn new(id: SeqId, prompt: Vec<TokenId>, limit: u32) -> Self {
        Self {
            id,
            tokens: prompt,
            limit,
            computed: 0,
            blocks: Vec::new(),
            keys: Vec::new(),
            named: 0,
            cached_prompt: None,
            parked: false,
        }
    }

    pub(crate) const fn id(&self) -> SeqId {
        self.id
    }

    /// Tokens known so far, prompt included.
    pub(crate) const fn known(&self) -> u32 {
        // At most `limit`.
        self.tokens.len() as u32
    }

    /// Tokens whose keys and values are still to be computed. None at the limit: the last token is an output
    /// only, since nothing will attend to it.
    pub(crate) const fn pending(&self) -> u32 {
        if self.is_full() { 0 } else { self.known() - self.computed }
    }

    pub(crate) const fn park(&mut self, parked: bool) {
        self.parked = parked;
    }

    pub(crate) const fn is_parked(&self) -> bool {
        self.parked
    }

    /// Whether one token is left to feed: a sampled one, or the last of a prefill.
    pub(crate) const fn is_decoding(&self) -> bool {
        self.computed > 0 && self.pending() == 1
    }

    /// Whether the token limit is reached.
    pub(crate) const fn is_full(&self) -> bool {
        self.known() == self.limit
    }

    /// Whether every known token is computed and the next one may be sampled.
    pub(crate) const fn awaits_token(&self) -> bool {
        self.computed == self.known() && !self.is_full()
    }

    /// Blocks that its known tokens still need.
    pub(crate) fn blocks_wanted(&self, pool: &BlockPool) -> u32 {
        pool.blocks_for(self.known()).saturating_sub(self.blocks.len() as u32)
    }

    /// Blocks that would no longer be available if it ran to the end of its known tokens, having no block now. Those
    /// that others hold cost nothing.
    pub(crate) fn cost(&mut self, pool: &BlockPool) -> u32 {
        let held = self.found(pool).filter(|found| *found == Found::Held).count();
        pool.blocks_for(self.known()) - held as u32
    }

    /// Takes the longest run of blocks that are there already and says how many tokens they spare. At least one token
    /// is left to compute, for its logits.
    pub(crate) fn adopt(&mut self, pool: &mut BlockPool) -> u32 {
        let count = self.found(pool).count();
        self.blocks.extend(self.keys[..count].iter().map_while(|key| pool.share(key)));
        self.named = self.blocks.len();
        self.computed = self.blocks.len() as u32 * pool.block_tokens();
        self.cached_prompt.get_or_insert(self.computed);
        self.computed
    }

    /// Prompt tokens that were in the cache when it first ran.
    pub(crate) fn cached_prompt(&self) -> u32 {
        self.cached_prompt.unwrap_or(0)
    }

    /// The first blocks, as far as they are there.
    fn found<'a>(&'a mut self, pool: &'a BlockPool) -> impl Iterator<Item = Found> + 'a {
        // At most the context, which is counted in u32.
        let most = if pool.keeps_prefixes() { (self.known() - 1) / pool.block_tokens() } else { 0 };
        self.name_blocks(most as usize, pool.block_tokens());
        self.keys[..most as usize].iter().map_while(|key| pool.find(key))
    }

    /// Tells the pool what the full blocks hold. Every position counted as computed must have been, successfully.
    pub(crate) fn settle(&mut self, pool: &mut BlockPool) {
        let full = (self.computed / pool.block_tokens()) as usize;
        if !pool.keeps_prefixes() || full <= self.named {
            return;
        }
        self.name_blocks(full, pool.block_tokens());
        for at in self.named..full {
            pool.name(&self.blocks[at], self.keys[at]);
        }
        self.named = full;
    }

    fn name_blocks(&mut self, count: usize, block_tokens: u32) {
        let block_tokens = block_tokens as usize;
        while self.keys.len() < count {
            let start = self.keys.len() * block_tokens;
            self.keys.push(BlockKey::after(self.keys.last(), &self.tokens[start..start + block_tokens]));
        }
    }

    /// Takes free blocks for up to `wanted` more positions and says for how many there is room now.
    pub(crate) fn reserve(&mut self, pool: &mut BlockPool, wanted: u32) -> u32 {
        let needed = pool.blocks_for(self.computed + wanted) as usize;
        while self.blocks.len() < needed {
            let Some(block) = pool.allocate() else { break };
            self.blocks.push(block);
        }
        let room = pool.tokens_in(self.blocks.len()) - u64::from(self.computed);
        // No more than `wanted`, which has 32 bits.
        room.min(u64::from(wanted)) as u32
    }

    /// Counts the next `count` pending tokens as computed and returns the work that makes it true. There must
    /// be room for them.
    pub(crate) fn advance(&mut self, count: u32) -> StepItem {
        let start = self.computed;
        self.computed += count;
        StepItem {
            seq: self.id,
            start,
            tokens: self.tokens[start as usize..self.computed as usize].to_vec(),
            blocks: self.blocks.iter().map(Block::index).collect(),
            sample: self.computed == self.known(),
        }
    }

    /// Counts nothing from position `start` on as computed, and hands out the blocks that are no longer needed. What
    /// was settled must lie before it.
    pub(crate) fn undo(&mut self, pool: &BlockPool, start: u32) -> Vec<Block> {
        self.computed = start;
        self.blocks.split_off(pool.blocks_for(start) as usize)
    }

    /// Adds a sampled token.
    pub(crate) fn push(&mut self, token: TokenId) {
        self.tokens.push(token);
    }

    /// Forgets all keys and values, to be computed again, and hands out the blocks.
    pub(crate) fn reset(&mut self) -> Vec<Block> {
        self.computed = 0;
        self.named = 0;
        self.parked = false;
        std::mem::take(&mut self.blocks)
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZero;

    use super::*;
    use crate::kv::Keep;

    fn tokens(count: u32) -> Vec<TokenId> {
        TokenId::all(count).collect()
    }

    #[test]
    fn room_ends_where_the_blocks_do() {
        let mut pool = BlockPool::new(2, NonZero::new(4).unwrap(), Keep::Nothing);
        let mut sequence = Sequence::new(SeqId::new(1), tokens(10), 20);
        assert_eq!(sequence.blocks_wanted(&pool), 3);
        assert_eq!(sequence.reserve(&mut pool, 3), 3);
        let item = sequence.advance(3);
        assert_eq!((item.start, item.tokens.len(), item.blocks, item.sample), (0, 3, vec![0], false));
        // Five more positions in two blocks of four, three of them taken.
        assert_eq!(sequence.reserve(&mut pool, 7), 5);
        let item = sequence.advance(5);
        assert_eq!((item.start, item.tokens, item.blocks), (3, tokens(10)[3..8].to_vec(), vec![0, 1]));
        assert_eq!((sequence.reserve(&mut pool, 1), pool.available()), (0, 0));
        pool.release(sequence.reset());
        assert_eq!((sequence.pending(), pool.available()), (10, 2));
    }

    #[test]
    fn the_last_token_is_never_fed_back() {
        let mut pool = BlockPool::new(1, NonZero::new(2).unwrap(), Keep::Nothing);
        let mut sequence = Sequence::new(SeqId::new(1), tokens(2), 3);
        assert_eq!(sequence.reserve(&mut pool, 2), 2);
        assert!(sequence.advance(2).sample && sequence.awaits_token());
        sequence.push(tokens(1)[0]);
        assert_eq!((sequence.is_full(), sequence.pending(), sequence.awaits_token()), (true, 0, false));
    }

    #[test]
    fn only_settled_full_blocks_are_adopted_and_a_token_is_left() {
        let mut pool = BlockPool::new(8, NonZero::new(4).unwrap(), Keep::Prefixes);
        let run = |pool: &mut BlockPool, prompt: u32| {
            let mut sequence = Sequence::new(SeqId::new(1), tokens(prompt), 20);
            let adopted = sequence.adopt(pool);
            assert_eq!(sequence.reserve(pool, prompt - adopted), prompt - adopted);
            (sequence.advance(prompt - adopted), sequence)
        };
        let (_, mut failed) = run(&mut pool, 12);
        pool.release(failed.reset());
        let (item, mut first) = run(&mut pool, 11);
        assert_eq!(item.start, 0, "a step that failed left nothing behind");
        first.settle(&mut pool);
        // Shared with the first; the third block is not full.
        let (item, mut second) = run(&mut pool, 12);
        assert_eq!(
            (item.start, &item.blocks[..2]),
            (8, &[first.blocks[0].index(), first.blocks[1].index()][..])
        );
        assert_ne!(item.blocks[2], first.blocks[2].index());
        second.settle(&mut pool);
        pool.release(first.reset());
        pool.release(second.reset());
        assert_eq!((pool.available(), pool.cached()), (8, 3));
        // All twelve are there, but the last must be run for its logits.
        let (item, mut third) = run(&mut pool, 12);
        assert_eq!((item.start, item.tokens.len(), third.cached_prompt()), (8, 4, 8));
        pool.release(third.reset());
        let (item, _) = run(&mut pool, 13);
        assert_eq!((item.start, item.tokens.len()), (12, 1));
    }
}
