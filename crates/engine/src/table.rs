//! The KV blocks of one sequence, in all groups of layers.
//!
//! Always holds: all groups have the same number of places, one for every block's worth of positions from 0 on; in each group
//! every place that a later position may see holds a block, and earlier ones may be empty. An emptied place stays empty.
//! Knows nothing of tokens, nor of other sequences.

use std::num::NonZero;

use muster_types::Reach;

use crate::kv::{Block, BlockPool, Found};
use crate::prefix::{BlockKey, BlockName};
use crate::reach::{most_blocks, unseen_blocks};
use crate::step::NO_BLOCK;

/// A group of layers.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Group {
    reach: Reach,
    /// Most blocks that a sequence of any length holds at once.
    most: u64,
}

impl Group {
    /// With sequences that are computed in chunks of at most `chunk` positions.
    pub(crate) fn new(reach: Reach, block_tokens: NonZero<u32>, chunk: u32) -> Self {
        Self { reach, most: most_blocks(reach, chunk, block_tokens).unwrap_or(u64::MAX) }
    }
}

#[derive(Debug)]
pub(crate) struct Table {
    groups: Vec<OfGroup>,
}

/// One group's part.
#[derive(Debug)]
struct OfGroup {
    group: Group,
    /// By place.
    blocks: Vec<Option<Block>>,
    /// Number of leading empty places.
    emptied: u32,
}

impl Table {
    /// An empty one for these groups; there is at least one.
    pub(crate) fn new(groups: &[Group]) -> Self {
        let of_group = |&group: &Group| OfGroup { group, blocks: Vec::new(), emptied: 0 };
        Self { groups: groups.iter().map(of_group).collect() }
    }

    /// Places of every group.
    pub(crate) fn places(&self) -> u32 {
        // At most those of the context, which is counted in u32.
        self.groups[0].blocks.len() as u32
    }

    /// Most further blocks that it holds at once while it grows to `places` places.
    pub(crate) fn wanted(&self, places: u32) -> u64 {
        let more = u64::from(places.saturating_sub(self.places()));
        let of_group = |OfGroup { group, emptied, .. }: &OfGroup| {
            let held = u64::from(self.places() - emptied);
            more.min(group.most.saturating_sub(held))
        };
        self.groups.iter().map(of_group).sum()
    }

    /// Adds places, with a block in every group, up to `places` or until blocks run out.
    pub(crate) fn grow(&mut self, pool: &mut BlockPool, places: u32) {
        while self.places() < places && pool.available() as usize >= self.groups.len() {
            self.groups.iter_mut().for_each(|of_group| of_group.blocks.push(pool.allocate()));
        }
    }

    /// Gives up the blocks that the position `next` and all after it do not see.
    pub(crate) fn forget_unseen(&mut self, pool: &mut BlockPool, next: u32) {
        let places = self.places();
        for OfGroup { group, blocks, emptied } in &mut self.groups {
            let unseen = unseen_blocks(group.reach, next, pool.block_tokens()).min(places);
            if unseen > *emptied {
                pool.release(blocks[*emptied as usize..unseen as usize].iter_mut().filter_map(Option::take));
                *emptied = unseen;
            }
        }
    }

    /// Gives up all places but the first `places`.
    pub(crate) fn truncate(&mut self, pool: &mut BlockPool, places: u32) {
        // From the end, so that the last blocks to be evicted are a prefix in all groups.
        while self.places() > places {
            for of_group in &mut self.groups {
                pool.release(of_group.blocks.pop().flatten().into_iter());
            }
        }
        for of_group in &mut self.groups {
            of_group.emptied = of_group.emptied.min(places);
        }
    }

    /// Names the blocks of a place in the pool.
    pub(crate) fn name(&self, pool: &mut BlockPool, place: usize, key: BlockKey) {
        for (group, of_group) in (0..).zip(&self.groups) {
            if let Some(block) = &of_group.blocks[place] {
                pool.name(block, BlockName { group, key });
            }
        }
    }

    /// Most leading places that can be adopted from the pool: in each group, every block that later positions see must be in it,
    /// held or cached.
    pub(crate) fn adoptable(&self, pool: &BlockPool, keys: &[BlockKey]) -> u32 {
        // By group: length of the run of blocks in the pool that ends at the current place.
        let mut in_a_row = vec![0_u32; self.groups.len()];
        let mut most = 0;
        for (places, &key) in (1..).zip(keys) {
            let mut is_whole = true;
            for (number, (OfGroup { group, .. }, in_a_row)) in
                (0..).zip(self.groups.iter().zip(&mut in_a_row))
            {
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

    /// Most available blocks that an empty table takes at once when it adopts `adopted` places and grows to `places`. Blocks that
    /// others hold cost nothing.
    pub(crate) fn cost(&self, pool: &BlockPool, keys: &[BlockKey], adopted: u32, places: u32) -> u64 {
        let of_group = |(number, OfGroup { group, .. }): (u32, &OfGroup)| {
            let first = first_needed(group, pool, adopted);
            let is_held =
                |&&key: &&BlockKey| pool.find(&BlockName { group: number, key }) == Some(Found::Held);
            let held = keys[first as usize..adopted as usize].iter().filter(is_held).count();
            (u64::from(places - first) - held as u64).min(group.most)
        };
        (0..).zip(self.groups.iter()).map(of_group).sum()
    }

    /// Adopts `places` places, as [`adoptable`](Self::adoptable) allowed, into an empty table.
    pub(crate) fn adopt(&mut self, pool: &mut BlockPool, keys: &[BlockKey], places: u32) {
        for (number, OfGroup { group, blocks, emptied }) in (0..).zip(&mut self.groups) {
            *emptied = first_needed(group, pool, places);
            blocks.extend((0..*emptied).map(|_| None));
            let needed = &keys[*emptied as usize..places as usize];
            blocks.extend(needed.iter().map(|&key| pool.share(&BlockName { group: number, key })));
        }
    }

    /// Block numbers, group by group; [`NO_BLOCK`] for empty places.
    pub(crate) fn numbers(&self) -> Vec<u32> {
        let mut numbers = Vec::with_capacity(self.groups.len() * self.groups[0].blocks.len());
        for of_group in &self.groups {
            numbers.extend(of_group.blocks.iter().map(|block| block.as_ref().map_or(NO_BLOCK, Block::index)));
        }
        numbers
    }
}

/// First block that positions behind `places` places see; `places` if they see none of them.
fn first_needed(group: &Group, pool: &BlockPool, places: u32) -> u32 {
    // What full blocks hold is counted in u32, as the context is.
    unseen_blocks(group.reach, places * pool.block_tokens().get(), pool.block_tokens())
}
