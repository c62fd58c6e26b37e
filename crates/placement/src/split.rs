//! The static start: the experts that each of N workers loads before any load is measured.

use std::num::NonZero;

use muster_types::{ExpertId, ExpertKey};

use crate::Shape;

/// A share that does not exist.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("share index {index} is out of range: there are {workers} workers (valid: 0 to {})", .workers.get() - 1)]
pub struct SplitError {
    /// The share asked for.
    pub index: u32,
    /// How many there are.
    pub workers: NonZero<u32>,
}

/// Share `index` of `workers`, ascending. Empty when there are more workers than experts and none is left.
///
/// Experts are dealt like cards, and the deal goes on where the layer before ended: expert `n`, counted over
/// the whole model, goes to share `n mod workers`. So every expert is in exactly one share, and share sizes
/// differ by at most one within each layer and over the whole model.
///
/// # Errors
/// When `index >= workers`.
pub fn split(shape: &Shape, workers: NonZero<u32>, index: u32) -> Result<Vec<ExpertKey>, SplitError> {
    if index >= workers.get() {
        return Err(SplitError { index, workers });
    }
    let (count, index) = (u64::from(workers.get()), u64::from(index));
    let mut share = Vec::new();
    // Experts of all layers before this one.
    let mut dealt = 0;
    for (layer, experts) in shape.layers() {
        let first = (index + count - dealt % count) % count;
        let mine = ExpertId::all(experts).skip(first as usize).step_by(count as usize);
        share.extend(mine.map(|expert| ExpertKey { layer, expert }));
        dealt += u64::from(experts);
    }
    Ok(share)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn shares(shape: &Shape, workers: u32) -> Vec<Vec<ExpertKey>> {
        let workers = NonZero::new(workers).unwrap();
        (0..workers.get()).map(|index| split(shape, workers, index).unwrap()).collect()
    }

    fn spread(sizes: impl Iterator<Item = usize> + Clone) -> usize {
        sizes.clone().max().unwrap_or(0) - sizes.min().unwrap_or(0)
    }

    #[test]
    fn the_remainder_rotates_over_layers() {
        let shape = Shape::new(vec![4, 0, 4]);
        let numbers = |share: &Vec<ExpertKey>| -> Vec<_> {
            share.iter().map(|key| (key.layer.get(), key.expert.get())).collect()
        };
        let shares: Vec<_> = shares(&shape, 3).iter().map(numbers).collect();
        assert_eq!(shares[0], [(0, 0), (0, 3), (2, 2)]);
        assert_eq!(shares[1], [(0, 1), (2, 0), (2, 3)]);
        assert_eq!(shares[2], [(0, 2), (2, 1)]);
    }

    #[test]
    fn an_index_past_the_end_is_refused() {
        let workers = NonZero::new(3).unwrap();
        let error = split(&Shape::new(vec![8]), workers, 3).unwrap_err();
        assert_eq!(error.to_string(), "share index 3 is out of range: there are 3 workers (valid: 0 to 2)");
    }

    #[test]
    fn more_workers_than_experts_leave_some_with_nothing() {
        let shares = shares(&Shape::new(vec![1, 2]), 5);
        assert_eq!(shares.iter().map(Vec::len).collect::<Vec<_>>(), [1, 1, 1, 0, 0]);
    }

    proptest! {
        #[test]
        fn shares_are_a_balanced_partition(
            experts in prop::collection::vec(0_u32..40, 0..12),
            workers in 1_u32..20,
        ) {
            let shape = Shape::new(experts.clone());
            let shares = shares(&shape, workers);

            let mut all: Vec<_> = shares.concat();
            all.sort_unstable();
            prop_assert_eq!(all, shape.keys().collect::<Vec<_>>());

            prop_assert!(shares.iter().all(|share| share.is_sorted()));
            prop_assert!(spread(shares.iter().map(Vec::len)) <= 1);
            for layer in 0..experts.len() {
                let in_layer = |share: &Vec<ExpertKey>| {
                    share.iter().filter(|key| key.layer.index() == layer).count()
                };
                prop_assert!(spread(shares.iter().map(in_layer)) <= 1);
            }
        }
    }
}
