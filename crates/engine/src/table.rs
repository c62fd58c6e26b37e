//! The KV blocks of one sequence, in all groups of layers.
//!
//! Always holds: every group has as many places, one for every block's worth of positions from 0 on, and of each group
//! the places that positions to come may see hold a block, those before them may be empty. A place that was emptied
//! stays empty. Knows nothing of tokens, nor of other sequences.

use std::num::NonZero;
use std::sync::Arc;

use crate::kv::{Block, BlockPool, Found};
use crate::prefix::{BlockKey, BlockName};
use crate::reach::Reach;
use crate::scheduler::NO_BLOCK;

/// A group of layers.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Group {
    reach: Reach,
    /// Blocks that a sequence of any length holds at most at once.
    most: u64,
}

impl Group {
    /// With sequences that are computed in chunks of at most `chunk` positions.
    pub(crate) fn new(reach: Reach, block_tokens: NonZero<u32>, chunk: u32) -> Self {
        Self { reach, most: reach.most_blocks(chunk, block_tokens).unwrap_or(u64::MAX) }
    }
}

/// Blocks by place and, of one place, by group.
#[derive(Debug)]
pub(crate) struct Table {
    groups: Arc<[Group]>,
    blocks: Vec<Option<Block>>,
    /// By group: empty places.
    emptied: Box<[u32]>,
}

impl Table {
    pub(crate) fn new(groups: Arc<[Group]>) -> Self {
        Self { emptied: vec![0; groups.len()].into(), groups, blocks: Vec::new() }
    }

    /// Places of every group.
    pub(crate) fn places(&self) -> u32 {
        // At most those of the context, which is counted in u32.
        (self.blocks.len() / self.groups.len()) as u32
    }

    /// Blocks that it comes to hold beyond those it has, at most at once, when it grows to so many places.
    pub(crate) fn wanted(&self, places: u32) -> u64 {
        let more = u64::from(places.saturating_sub(self.places()));
        let of_group = |(group, emptied): (&Group, &u32)| {
            let held = u64::from(self.places() - emptied);
            more.min(group.most.saturating_sub(held))
        };
        self.groups.iter().zip(&self.emptied).map(of_group).sum()
    }

    /// Adds places, with a block in every group, until there are so many or blocks run out.
    pub(crate) fn grow(&mut self, pool: &mut BlockPool, places: u32) {
        while self.places() < places && pool.available() as usize >= self.groups.len() {
            self.blocks.extend(self.groups.iter().map(|_| pool.allocate()));
        }
    }

    /// Gives up what the position `next` and all after it do not see.
    pub(crate) fn forget_unseen(&mut self, pool: &mut BlockPool, next: u32) {
        let (count, places) = (self.groups.len(), self.places());
        for (number, (group, emptied)) in self.groups.iter().zip(&mut self.emptied).enumerate() {
            let unseen = group.reach.unseen_blocks(next, pool.block_tokens()).min(places);
            if unseen > *emptied {
                let blocks = &mut self.blocks[*emptied as usize * count..unseen as usize * count];
                pool.release(blocks.chunks_exact_mut(count).filter_map(|place| place[number].take()));
                *emptied = unseen;
            }
        }
    }

    /// Gives up all places but the first so many.
    pub(crate) fn truncate(&mut self, pool: &mut BlockPool, places: u32) {
        let kept = (places as usize * self.groups.len()).min(self.blocks.len());
        pool.release(self.blocks.drain(kept..).flatten());
        for emptied in &mut self.emptied {
            *emptied = (*emptied).min(places);
        }
    }

    /// Tells the pool what the blocks of a place hold.
    pub(crate) fn name(&self, pool: &mut BlockPool, place: usize, key: BlockKey) {
        for (group, block) in (0..).zip(&self.blocks[place * self.groups.len()..][..self.groups.len()]) {
            if let Some(block) = block {
                pool.name(block, BlockName { group, key });
            }
        }
    }

    /// The greatest number of places that can be taken over from the pool: of each group, the blocks must be there
    /// that positions behind those places see.
    pub(crate) fn adoptable(&self, pool: &BlockPool, keys: &[BlockKey]) -> u32 {
        // By group: how many blocks in a row are there, up to the one just looked at.
        let mut in_a_row = vec![0_u32; self.groups.len()];
        let mut most = 0;
        for (places, &key) in (1..).zip(keys) {
            let mut is_whole = true;
            for (number, (group, in_a_row)) in (0..).zip(self.groups.iter().zip(&mut in_a_row)) {
                let is_there = pool.find(&BlockName { group: number, key }).is_some();
                *in_a_row = if is_there { *in_a_row + 1 } else { 0 };
                if !is_there && group.reach == Reach::All {
                    return most;
                }
                is_whole &= *in_a_row >= places - first_needed(group, pool, places);
            }
            if is_whole {
                most = places;
            }
        }
        most
    }

    /// Blocks that would no longer be available if an empty table took over so many places and then grew to `places`,
    /// at most at once. Those that others hold cost nothing.
    pub(crate) fn cost(&self, pool: &BlockPool, keys: &[BlockKey], adopted: u32, places: u32) -> u64 {
        let of_group = |(number, group): (u32, &Group)| {
            let first = first_needed(group, pool, adopted);
            let is_held =
                |&&key: &&BlockKey| pool.find(&BlockName { group: number, key }) == Some(Found::Held);
            let held = keys[first as usize..adopted as usize].iter().filter(is_held).count();
            (u64::from(places - first) - held as u64).min(group.most)
        };
        (0..).zip(self.groups.iter()).map(of_group).sum()
    }

    /// Takes over so many places, as [`adoptable`](Self::adoptable) allowed, into an empty table.
    pub(crate) fn adopt(&mut self, pool: &mut BlockPool, keys: &[BlockKey], places: u32) {
        for (group, emptied) in self.groups.iter().zip(&mut self.emptied) {
            *emptied = first_needed(group, pool, places);
        }
        for (place, &key) in (0..places).zip(keys) {
            for (group, &emptied) in (0..).zip(&self.emptied) {
                let block = if place < emptied { None } else { pool.share(&BlockName { group, key }) };
                self.blocks.push(block);
            }
        }
    }

    /// Block numbers, group by group; [`NO_BLOCK`] for empty places.
    pub(crate) fn numbers(&self) -> Vec<u32> {
        let count = self.groups.len();
        let mut numbers = Vec::with_capacity(self.blocks.len());
        for group in 0..count.min(self.blocks.len()) {
            let of_group = self.blocks[group..].iter().step_by(count);
            numbers.extend(of_group.map(|block| block.as_ref().map_or(NO_BLOCK, Block::index)));
        }
        numbers
    }
}

/// The first block that positions behind so many places see; `places` if they see none of them.
fn first_needed(group: &Group, pool: &BlockPool, places: u32) -> u32 {
    // What full blocks hold is counted in u32, as the context is.
    group.reach.unseen_blocks(places * pool.block_tokens().get(), pool.block_tokens())
}
