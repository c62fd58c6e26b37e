//! One sequence under generation: its tokens, and how far its keys and values are computed.
//!
//! Always holds: `computed <= tokens.len() <= limit`, `table` covers exactly `computed` positions, and every block that it
//! may share with others is full. Knows nothing of other sequences, nor whether it is waiting or running.

use muster_types::{SeqId, TokenId};

use crate::kv::BlockPool;
use crate::prefix::BlockKey;
use crate::step::StepItem;
use crate::table::{Group, Table};

#[derive(Debug)]
pub(crate) struct Sequence {
    id: SeqId,
    /// The prompt, then what was generated.
    tokens: Vec<TokenId>,
    /// Most tokens, prompt included.
    limit: u32,
    /// Positions whose keys and values are in the cache once the current step has run.
    computed: u32,
    table: Table,
    /// What its first block follows.
    origin: Option<BlockKey>,
    /// Names of the tokens that fill blocks, as far as they were needed.
    keys: Vec<BlockKey>,
    /// Leading places of the table whose blocks have a name in the pool.
    named: usize,
    /// Prompt tokens that were in the cache when it first ran.
    cached_prompt: Option<u32>,
    /// Left out of steps for now.
    parked: bool,
}

impl Sequence {
    /// A sequence that may grow from its prompt to `limit` tokens. `limit` is above the prompt's length. It shares beginnings
    /// with others of its origin.
    pub(crate) fn new(
        id: SeqId,
        prompt: Vec<TokenId>,
        limit: u32,
        groups: &[Group],
        origin: Option<BlockKey>,
    ) -> Self {
        Self {
            id,
            tokens: prompt,
            limit,
            computed: 0,
            table: Table::new(groups),
            origin,
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

    /// Whether one token is left to compute: a sampled one, or the last of a prefill.
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

    /// Most further blocks that it holds at once on the way to the end of its known tokens.
    pub(crate) fn blocks_wanted(&self, pool: &BlockPool) -> u64 {
        self.table.wanted(pool.blocks_for(self.known()))
    }

    /// Most available blocks that it takes at once, from none, on the way to the end of its known tokens. Blocks that others hold
    /// cost nothing.
    pub(crate) fn cost(&mut self, pool: &BlockPool) -> u64 {
        let adopted = self.adoptable(pool);
        self.table.cost(pool, &self.keys, adopted, pool.blocks_for(self.known()))
    }

    /// Adopts the longest prefix in the pool and returns the number of its tokens. At least one token is left to compute, for
    /// its logits.
    pub(crate) fn adopt(&mut self, pool: &mut BlockPool) -> u32 {
        let places = self.adoptable(pool);
        self.table.adopt(pool, &self.keys, places);
        self.named = places as usize;
        self.computed = places * pool.block_tokens().get();
        self.cached_prompt.get_or_insert(self.computed);
        self.computed
    }

    /// Prompt tokens that were in the cache when it first ran.
    pub(crate) fn cached_prompt(&self) -> u32 {
        self.cached_prompt.unwrap_or(0)
    }

    /// Whether it was admitted to the batch before.
    pub(crate) const fn has_run(&self) -> bool {
        self.cached_prompt.is_some()
    }

    /// Number of leading full blocks that it can adopt.
    fn adoptable(&mut self, pool: &BlockPool) -> u32 {
        if !pool.keeps_prefixes() {
            return 0;
        }
        let most = (self.known() - 1) / pool.block_tokens();
        self.name_blocks(most as usize, pool);
        self.table.adoptable(pool, &self.keys[..most as usize])
    }

    /// Names the full blocks in the pool. Every position counted as computed must have been computed successfully.
    pub(crate) fn settle(&mut self, pool: &mut BlockPool) {
        let full = (self.computed / pool.block_tokens()) as usize;
        if pool.keeps_prefixes() && full > self.named {
            self.name_blocks(full, pool);
            for place in self.named..full {
                self.table.name(pool, place, self.keys[place]);
            }
            self.named = full;
        }
    }

    /// Gives up the blocks that no later position sees. Computed positions must be settled.
    pub(crate) fn forget_unseen(&mut self, pool: &mut BlockPool) {
        self.table.forget_unseen(pool, self.computed);
    }

    fn name_blocks(&mut self, count: usize, pool: &BlockPool) {
        let block_tokens = pool.block_tokens().get() as usize;
        while self.keys.len() < count {
            let start = self.keys.len() * block_tokens;
            self.keys.push(BlockKey::after(
                self.keys.last().or(self.origin.as_ref()),
                &self.tokens[start..start + block_tokens],
            ));
        }
    }

    /// Takes free blocks for up to `wanted` more positions and returns the number of positions with room.
    pub(crate) fn reserve(&mut self, pool: &mut BlockPool, wanted: u32) -> u32 {
        self.table.grow(pool, pool.blocks_for(self.computed + wanted));
        let room = pool.tokens_in(self.table.places()) - u64::from(self.computed);
        // No more than `wanted`, which has 32 bits.
        room.min(u64::from(wanted)) as u32
    }

    /// Counts the next `count` pending tokens as computed and returns their step item. There must be room for them.
    pub(crate) fn advance(&mut self, count: u32) -> StepItem {
        let start = self.computed;
        self.computed += count;
        StepItem {
            seq: self.id,
            start,
            tokens: self.tokens[start as usize..self.computed as usize].to_vec(),
            blocks: self.table.numbers(),
            sample: self.computed == self.known(),
        }
    }

    /// Resets `computed` to position `start`, and gives up the blocks behind it. Settled positions must lie before it.
    pub(crate) fn undo(&mut self, pool: &mut BlockPool, start: u32) {
        self.computed = start;
        self.table.truncate(pool, pool.blocks_for(start));
    }

    /// Adds a sampled token.
    pub(crate) fn push(&mut self, token: TokenId) {
        self.tokens.push(token);
    }

    /// Forgets all keys and values, to be computed again, and gives up the blocks.
    pub(crate) fn reset(&mut self, pool: &mut BlockPool) {
        self.computed = 0;
        self.named = 0;
        self.parked = false;
        self.table.truncate(pool, 0);
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZero;

    use super::*;
    use crate::kv::Keep;
    use crate::step::NO_BLOCK;
    use muster_types::Reach;

    fn tokens(count: u32) -> Vec<TokenId> {
        TokenId::all(count).collect()
    }

    fn pool(total: u32, block_tokens: u32, keep: Keep) -> BlockPool {
        BlockPool::new(total, NonZero::new(block_tokens).unwrap(), keep)
    }

    /// One that is computed in chunks of at most four tokens.
    fn sequence(prompt: u32, limit: u32, pool: &BlockPool, reaches: &[Reach]) -> Sequence {
        let group = |&reach: &Reach| Group::new(reach, pool.block_tokens(), 4);
        Sequence::new(
            SeqId::new(1),
            tokens(prompt),
            limit,
            &reaches.iter().map(group).collect::<Vec<_>>(),
            None,
        )
    }

    fn window(positions: u32) -> Reach {
        Reach::Last(NonZero::new(positions).unwrap())
    }

    #[test]
    fn room_ends_where_the_blocks_do() {
        let mut pool = pool(2, 4, Keep::Nothing);
        let mut sequence = sequence(10, 20, &pool, &[Reach::All]);
        assert_eq!(sequence.blocks_wanted(&pool), 3);
        assert_eq!(sequence.reserve(&mut pool, 3), 3);
        let item = sequence.advance(3);
        assert_eq!((item.start, item.tokens.len(), item.blocks, item.sample), (0, 3, vec![0], false));
        // Five more positions in two blocks of four, three of them taken.
        assert_eq!(sequence.reserve(&mut pool, 7), 5);
        let item = sequence.advance(5);
        assert_eq!((item.start, item.tokens, item.blocks), (3, tokens(10)[3..8].to_vec(), vec![0, 1]));
        assert_eq!((sequence.reserve(&mut pool, 1), pool.available()), (0, 0));
        sequence.reset(&mut pool);
        assert_eq!((sequence.pending(), pool.available()), (10, 2));
    }

    #[test]
    fn the_last_token_is_never_fed_back() {
        let mut pool = pool(1, 2, Keep::Nothing);
        let mut sequence = sequence(2, 3, &pool, &[Reach::All]);
        assert_eq!(sequence.reserve(&mut pool, 2), 2);
        assert!(sequence.advance(2).sample && sequence.awaits_token());
        sequence.push(tokens(1)[0]);
        assert_eq!((sequence.is_full(), sequence.pending(), sequence.awaits_token()), (true, 0, false));
    }

    #[test]
    fn only_settled_full_blocks_are_adopted_and_a_token_is_left() {
        let mut pool = pool(8, 4, Keep::Prefixes);
        let run = |pool: &mut BlockPool, prompt: u32| {
            let mut sequence = sequence(prompt, 20, pool, &[Reach::All]);
            let adopted = sequence.adopt(pool);
            assert_eq!(sequence.reserve(pool, prompt - adopted), prompt - adopted);
            (sequence.advance(prompt - adopted), sequence)
        };
        let (_, mut failed) = run(&mut pool, 12);
        failed.reset(&mut pool);
        let (item, mut first) = run(&mut pool, 11);
        assert_eq!(item.start, 0, "a step that failed left nothing behind");
        first.settle(&mut pool);
        // Shared with the first; the third block is not full.
        let (item, mut second) = run(&mut pool, 12);
        let blocks = first.table.numbers();
        assert_eq!((item.start, &item.blocks[..2]), (8, &blocks[..2]));
        assert_ne!(item.blocks[2], blocks[2]);
        second.settle(&mut pool);
        first.reset(&mut pool);
        second.reset(&mut pool);
        assert_eq!((pool.available(), pool.cached()), (8, 3));
        // All twelve are there, but the last must be run for its logits.
        let (item, mut third) = run(&mut pool, 12);
        assert_eq!((item.start, item.tokens.len(), third.cached_prompt()), (8, 4, 8));
        third.reset(&mut pool);
        let (item, _) = run(&mut pool, 13);
        assert_eq!((item.start, item.tokens.len()), (12, 1));
    }

    #[test]
    fn blocks_are_given_up_once_nothing_to_come_sees_them() {
        let mut pool = pool(20, 2, Keep::Nothing);
        let chunk = Reach::Chunk(NonZero::new(6).unwrap());
        let mut sequence = sequence(11, 20, &pool, &[Reach::All, window(3), chunk]);
        let mut run = |count| {
            sequence.forget_unseen(&mut pool);
            assert_eq!(sequence.reserve(&mut pool, count), count);
            let blocks = sequence.advance(count).blocks;
            let held = |table: &[u32]| table.iter().map(|&block| block != NO_BLOCK).collect::<Vec<_>>();
            let tables: Vec<_> = blocks.chunks(blocks.len() / 3).map(held).collect();
            assert_eq!(pool.available() as usize, 20 - tables.concat().iter().filter(|&&held| held).count());
            tables
        };
        assert_eq!(run(4), vec![vec![true; 2]; 3]);
        // Position 4 sees from 2 on with the window, and position 5 still from 0 on in its chunk.
        assert_eq!(run(1), [vec![true; 3], vec![false, true, true], vec![true; 3]]);
        assert_eq!(run(1), [vec![true; 3], vec![false, true, true], vec![true; 3]]);
        let (all, last) = (vec![true; 4], vec![false, false, true, true]);
        assert_eq!(run(1), [all, last, vec![false, false, false, true]]);
        sequence.reset(&mut pool);
        assert_eq!(pool.available(), 20);
    }

    #[test]
    fn a_beginning_is_adopted_where_every_group_has_what_is_seen() {
        let mut pool = pool(20, 2, Keep::Prefixes);
        let groups = [Reach::All, window(4)];
        let mut first = sequence(9, 20, &pool, &groups);
        assert_eq!(first.reserve(&mut pool, 8), 8);
        first.advance(8);
        first.settle(&mut pool);
        first.forget_unseen(&mut pool);
        // Position 8 sees from 5 on, so the first two places of the window are cached.
        assert_eq!((pool.available(), pool.cached()), (20 - 6, 2));
        let mut second = sequence(9, 20, &pool, &groups);
        // One new block in each group.
        assert_eq!((second.cost(&pool), second.adopt(&mut pool)), (2, 8));
        let blocks = first.table.numbers();
        assert_eq!(second.table.numbers(), blocks);
        assert_eq!(blocks[4..6], [NO_BLOCK; 2]);
        second.reset(&mut pool);
        // Position 6 sees from 3 on: one of the two blocks is cached.
        let mut third = sequence(8, 20, &pool, &groups);
        assert_eq!((third.cost(&pool), third.adopt(&mut pool)), (1 + 2, 6));
        assert_eq!(pool.cached(), 1);
        third.reset(&mut pool);
        // Without it there is nothing to begin behind, except where all is still held.
        let taken: Vec<_> = (0..14).map_while(|_| pool.allocate()).collect();
        assert_eq!((taken.len(), pool.cached()), (14, 0));
        assert_eq!(sequence(8, 20, &pool, &groups).adopt(&mut pool), 0);
        assert_eq!(sequence(9, 20, &pool, &groups).adopt(&mut pool), 8);
    }
}
