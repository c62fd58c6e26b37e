//! Splits a step into the two micro-batches that overlap: while the rows of one are with the experts, the
//! router computes attention for the other.
//!
//! Owns the split alone. Every item is in exactly one lane, whole, and lanes keep the order of items. Knows
//! nothing of layers or experts.

use crate::step::Step;

/// Indices into `step.items` for lane 0 and lane 1: a prefix and the rest, as equal in tokens as can be.
///
/// Lane 1 is empty when the step has a single item.
///
/// An item is never cut, however long. Its later tokens attend, in every layer, to keys and values that its
/// earlier tokens write in that same layer; in different lanes they would be correct only for one order of the
/// lanes. Whole items keep the lanes independent, so either may be ahead.
#[must_use]
pub fn split(step: &Step) -> [Vec<usize>; 2] {
    let items = step.items.len();
    let total = step.tokens();
    if items < 2 {
        return [(0..items).collect(), Vec::new()];
    }
    // Both lanes have an item; of two equally good cuts the earlier one wins.
    let mut first = 0;
    let mut best = (usize::MAX, 0);
    for (at, item) in step.items[..items - 1].iter().enumerate() {
        first += item.tokens.len();
        best = best.min((first.abs_diff(total - first), at + 1));
    }
    let (_, cut) = best;
    [(0..cut).collect(), (cut..items).collect()]
}

#[cfg(test)]
mod tests {
    use muster_types::{SeqId, TokenId};
    use proptest::prelude::*;

    use super::*;
    use crate::step::StepItem;

    fn step(sizes: &[u32]) -> Step {
        let item = |(n, &size): (usize, &u32)| StepItem {
            seq: SeqId::new(n as u64),
            start: 0,
            tokens: TokenId::all(size).collect(),
            blocks: Vec::new(),
            sample: false,
        };
        Step { items: sizes.iter().enumerate().map(item).collect(), preempted: Vec::new() }
    }

    #[test]
    fn tokens_are_balanced_without_reordering() {
        assert_eq!(split(&step(&[1, 1, 1, 1])), [vec![0, 1], vec![2, 3]]);
        assert_eq!(split(&step(&[1, 1, 64])), [vec![0, 1], vec![2]]);
        assert_eq!(split(&step(&[64, 1, 1])), [vec![0], vec![1, 2]]);
        // Cuts after the first and after the second item are equally good.
        assert_eq!(split(&step(&[1, 2, 1])), [vec![0], vec![1, 2]]);
    }

    #[test]
    fn indivisible_work_stays_in_one_lane() {
        assert_eq!(split(&step(&[])), [vec![], vec![]]);
        assert_eq!(split(&step(&[512])), [vec![0], vec![]]);
        assert_eq!(split(&step(&[1, 2])), [vec![0], vec![1]]);
    }

    proptest! {
        #[test]
        fn no_other_cut_is_better(sizes in prop::collection::vec(1_u32..100, 2..30)) {
            let [first, second] = split(&step(&sizes));
            prop_assert!(!first.is_empty() && !second.is_empty());
            prop_assert_eq!([first.clone(), second].concat(), (0..sizes.len()).collect::<Vec<_>>());
            let difference = |cut: usize| {
                sizes[..cut].iter().sum::<u32>().abs_diff(sizes[cut..].iter().sum())
            };
            let best = (1..sizes.len()).map(difference).min();
            prop_assert_eq!(Some(difference(first.len())), best);
        }
    }
}
