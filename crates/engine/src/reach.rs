//! Which past positions layers see, and which layers share a table of KV blocks.
//!
//! A block that no position to come can see any more is of no use to its sequence. Layers that see the same positions
//! lose their blocks at the same time, so layers are put in groups: all groups have as many layers, and all layers of
//! a group have one [`Reach`]. A KV block holds some positions of one group's layers, so blocks of all groups are
//! equally large and come from one pool. A model whose layers are all alike is one group.
//!
//! What always holds: a later position sees nothing that an earlier one no longer saw. Knows nothing of blocks in
//! use, nor of the memory behind them.

use std::num::NonZero;

use muster_types::Reach;

/// Leading blocks that the position `next` and all after it do not see.
pub(crate) const fn unseen_blocks(reach: Reach, next: u32, block_tokens: NonZero<u32>) -> u32 {
    reach.first_visible(next) / block_tokens.get()
}

/// Most blocks that hold `chunk` consecutive positions and all that those see; `None` where length alone bounds them.
pub(crate) const fn most_blocks(reach: Reach, chunk: u32, block_tokens: NonZero<u32>) -> Option<u64> {
    let before = match reach {
        Reach::All => return None,
        Reach::Last(count) => count.get() - 1,
        Reach::Chunk(length) => length.get() - 1,
    };
    // Wherever they begin: one may be the last of its block.
    let but_one = before as u64 + chunk as u64 - 1;
    Some(but_one.div_ceil(block_tokens.get() as u64) + 1)
}

/// Where a layer's keys and values are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerPlace {
    /// The layer's group.
    pub group: usize,
    /// Its number among the group's layers.
    pub layer: usize,
}

/// A model's layers in groups.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerGroups {
    reaches: Vec<Reach>,
    size: usize,
    places: Vec<LayerPlace>,
}

impl LayerGroups {
    /// The fewest groups of equal size with layers of one reach each: their size is the greatest common divisor of how
    /// many layers have each reach. Groups are in order of their first layers' reaches, layers in their own order.
    #[must_use]
    pub fn of(layers: impl IntoIterator<Item = Reach>) -> Self {
        let layers: Vec<Reach> = layers.into_iter().collect();
        let mut kinds: Vec<(Reach, Vec<usize>)> = Vec::new();
        for (layer, &reach) in layers.iter().enumerate() {
            match kinds.iter_mut().find(|(kind, _)| *kind == reach) {
                Some((_, members)) => members.push(layer),
                None => kinds.push((reach, vec![layer])),
            }
        }
        let size = kinds.iter().map(|(_, members)| members.len()).fold(0, greatest_common_divisor).max(1);
        let mut groups =
            Self { reaches: Vec::new(), size, places: vec![LayerPlace { group: 0, layer: 0 }; layers.len()] };
        for (reach, members) in kinds {
            for members in members.chunks(size) {
                let group = groups.reaches.len();
                groups.reaches.push(reach);
                for (layer, &member) in members.iter().enumerate() {
                    groups.places[member] = LayerPlace { group, layer };
                }
            }
        }
        groups
    }

    /// What each group's layers see.
    #[must_use]
    pub fn reaches(&self) -> &[Reach] {
        &self.reaches
    }

    /// Layers of a group.
    #[must_use]
    pub const fn size(&self) -> usize {
        self.size
    }

    /// Where a layer is.
    ///
    /// # Panics
    /// If there is no such layer.
    #[must_use]
    pub fn place(&self, layer: usize) -> LayerPlace {
        self.places[layer]
    }
}

const fn greatest_common_divisor(a: usize, b: usize) -> usize {
    let (mut a, mut b) = (a, b);
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a
}

/// Blocks that a sequence holds at most at once, of all groups, while its first `tokens` positions are computed, at
/// most `chunk` of them in a step.
#[must_use]
pub fn most_held(groups: &[Reach], block_tokens: NonZero<u32>, chunk: u32, tokens: u32) -> u64 {
    let all = u64::from(tokens.div_ceil(block_tokens.get()));
    let of_group = |&reach: &Reach| most_blocks(reach, chunk, block_tokens).map_or(all, |most| most.min(all));
    groups.iter().map(of_group).sum()
}

/// The greatest number of positions, up to `context`, that a sequence can have with so many blocks.
#[must_use]
pub fn longest(groups: &[Reach], block_tokens: NonZero<u32>, chunk: u32, context: u32, blocks: u32) -> u32 {
    let fits = |tokens| most_held(groups, block_tokens, chunk, tokens) <= u64::from(blocks);
    if fits(context) {
        return context;
    }
    // `low` fits and `high` does not.
    let (mut low, mut high) = (0, context);
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        if fits(middle) { low = middle } else { high = middle }
    }
    low
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn positive(number: u32) -> NonZero<u32> {
        NonZero::new(number).unwrap()
    }

    fn reach() -> impl Strategy<Value = Reach> {
        prop_oneof![
            Just(Reach::All),
            (1_u32..40).prop_map(|count| Reach::Last(positive(count))),
            (1_u32..40).prop_map(|size| Reach::Chunk(positive(size))),
        ]
    }

    #[test]
    fn a_row_sees_what_its_layer_says() {
        let seen = |reach: Reach| [0, 1, 2, 3, 4, 7, 8].map(|position| reach.first_visible(position));
        assert_eq!(seen(Reach::All), [0; 7]);
        assert_eq!(seen(Reach::Last(positive(1))), [0, 1, 2, 3, 4, 7, 8]);
        assert_eq!(seen(Reach::Last(positive(3))), [0, 0, 0, 1, 2, 5, 6]);
        assert_eq!(seen(Reach::Chunk(positive(4))), [0, 0, 0, 0, 4, 4, 8]);
        assert_eq!(Reach::Last(positive(u32::MAX)).first_visible(u32::MAX), 1);
    }

    #[test]
    fn published_models_fall_into_few_groups() {
        let (window, chunk) = (Reach::Last(positive(128)), Reach::Chunk(positive(8192)));
        let place = |group, layer| LayerPlace { group, layer };
        // Every other layer of 24 has a window.
        let layers: Vec<_> = (0..24).map(|layer| if layer % 2 == 0 { window } else { Reach::All }).collect();
        let groups = LayerGroups::of(layers);
        assert_eq!((groups.reaches(), groups.size()), (&[window, Reach::All][..], 12));
        assert_eq!(
            [0, 1, 22, 23].map(|layer| groups.place(layer)),
            [place(0, 0), place(1, 0), place(0, 11), place(1, 11)]
        );
        // Three of four of 48 see their chunk.
        let layers: Vec<_> = (0..48).map(|layer| if layer % 4 < 3 { chunk } else { Reach::All }).collect();
        let groups = LayerGroups::of(layers);
        assert_eq!((groups.reaches(), groups.size()), (&[chunk, chunk, chunk, Reach::All][..], 12));
        assert_eq!(
            [0, 3, 16, 47].map(|layer| groups.place(layer)),
            [place(0, 0), place(3, 0), place(1, 0), place(3, 11)]
        );
        // All alike.
        let groups = LayerGroups::of([window; 32]);
        assert_eq!((groups.reaches(), groups.size(), groups.place(31)), (&[window][..], 32, place(0, 31)));
    }

    #[test]
    fn a_long_sequence_holds_what_it_sees() {
        let groups = [Reach::Last(positive(128)), Reach::All];
        let held = |tokens| most_held(&groups, positive(16), 512, tokens);
        assert_eq!([0, 1, 640, 100_000].map(held), [0, 2, 40 + 40, 41 + 6250]);
        assert_eq!(most_held(&[Reach::All; 8], positive(1), 1, u32::MAX), 8 * u64::from(u32::MAX));
        let longest = |blocks| longest(&groups, positive(16), 512, 1_000_000, blocks);
        assert_eq!([0, 1, 2, 81, 6291, u32::MAX].map(longest), [0, 0, 16, 640, 100_000, 1_000_000]);
        let window = [Reach::Last(positive(128))];
        assert_eq!(super::longest(&window, positive(16), 512, 1_000_000, 41), 1_000_000);
        assert_eq!(super::longest(&window, positive(16), 512, 1_000_000, 40), 640);
    }

    proptest! {
        #[test]
        fn every_layer_has_a_place_of_its_own(layers in prop::collection::vec(
            prop::sample::select(vec![Reach::All, Reach::Last(positive(8)), Reach::Chunk(positive(8))]), 0..40,
        )) {
            let groups = LayerGroups::of(layers.iter().copied());
            let mut places: Vec<_> = (0..layers.len())
                .map(|layer| (groups.place(layer).group, groups.place(layer).layer))
                .collect();
            prop_assert!((0..layers.len()).all(|at| groups.reaches()[places[at].0] == layers[at]));
            places.sort_unstable();
            let all = (0..groups.reaches().len())
                .flat_map(|group| (0..groups.size()).map(move |layer| (group, layer)));
            prop_assert!(places.into_iter().eq(all), "no gap, and nothing twice");
        }

        /// Against counting the blocks of every chunk.
        #[test]
        fn the_bound_holds_for_every_chunk(
            reach in reach(), block_tokens in 1_u32..20, chunk in 1_u32..50, tokens in 0_u32..200,
        ) {
            let size = positive(block_tokens);
            let bound = most_held(&[reach], size, chunk, tokens);
            let mut reached = false;
            for start in 0..tokens {
                for end in start + 1..=tokens.min(start + chunk) {
                    let held = end.div_ceil(block_tokens) - unseen_blocks(reach, start, size);
                    prop_assert!(u64::from(held) <= bound);
                    reached |= u64::from(held) + 1 >= bound;
                }
                prop_assert!(reach.first_visible(start) <= reach.first_visible(start + 1));
            }
            prop_assert!(reached || tokens == 0, "no more than one too many: {}", bound);
        }
    }
}
