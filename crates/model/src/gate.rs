//! From gate logits to experts and weights, by recipe.
//!
//! Pure functions of one token's logits, in f32. Equal scores: the lowest expert id wins. Output is in ascending
//! expert id with finite weights, or a [`GateError`] for that token alone: a NaN never turns into an id.

use std::cmp::Ordering;

use muster_checkpoint::spec::{GateRecipe, Renormalise, Score};
use muster_kernels::math::softmax_in_place;
use muster_types::ExpertId;

/// A token whose gate gave no usable choice.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
pub enum GateError {
    /// A logit is NaN or infinite.
    #[error("gate logit of expert {expert} is {value}")]
    Logit {
        /// The expert.
        expert: usize,
        /// Its logit.
        value: f32,
    },
    /// A weight came out NaN or infinite.
    #[error("gate weight of expert {expert} is {value}")]
    Weight {
        /// The expert.
        expert: u32,
        /// Its weight.
        value: f32,
    },
}

/// Buffers reused between tokens.
#[derive(Default)]
pub struct GateScratch {
    scores: Vec<f32>,
    picked: Vec<u32>,
    chosen: Vec<f32>,
}

/// Picks `top_k` experts for one token and appends their ids, ascending, and weights to `ids` and `weights`.
///
/// `logits` has one entry per expert; `top_k` is at most its length.
///
/// # Errors
/// When a logit or a resulting weight is not finite; nothing is appended then.
pub fn choose(
    recipe: &GateRecipe,
    logits: &[f32],
    top_k: usize,
    scratch: &mut GateScratch,
    ids: &mut Vec<ExpertId>,
    weights: &mut Vec<f32>,
) -> Result<(), GateError> {
    if let Some(expert) = logits.iter().position(|x| !x.is_finite()) {
        return Err(GateError::Logit { expert, value: logits[expert] });
    }
    let GateScratch { scores, picked, chosen } = scratch;
    scores.clear();
    scores.extend_from_slice(logits);
    if recipe.score == Score::SoftmaxThenTopK {
        softmax_in_place(scores);
    }
    pick(scores, top_k, picked);
    // Softmax and sums run in the order of selection, best first, as the reference does.
    chosen.clear();
    chosen.extend(picked.iter().map(|&expert| scores[expert as usize]));
    if recipe.score == Score::TopKThenSoftmax {
        softmax_in_place(chosen);
    }
    if recipe.renormalise == Renormalise::Sum {
        let sum: f32 = chosen.iter().sum();
        chosen.iter_mut().for_each(|weight| *weight /= sum);
    }
    for (&expert, &value) in picked.iter().zip(chosen.iter()) {
        if !value.is_finite() {
            return Err(GateError::Weight { expert, value });
        }
    }
    append_ascending(logits.len(), picked, chosen, ids, weights);
    Ok(())
}

/// The `count` best scores' indices, best first; among equals the lowest index first.
fn pick(scores: &[f32], count: usize, picked: &mut Vec<u32>) {
    picked.clear();
    picked.extend(0..u32::try_from(scores.len()).unwrap_or(u32::MAX));
    // Scores are finite here, so `partial_cmp` is total and takes 0.0 and -0.0 for equal.
    let order = |&a: &u32, &b: &u32| {
        let by_score = scores[b as usize].partial_cmp(&scores[a as usize]);
        by_score.unwrap_or(Ordering::Equal).then(a.cmp(&b))
    };
    if count < picked.len() {
        picked.select_nth_unstable_by(count, order);
        picked.truncate(count);
    }
    picked.sort_unstable_by(order);
}

fn append_ascending(
    experts: usize,
    picked: &[u32],
    chosen: &[f32],
    ids: &mut Vec<ExpertId>,
    weights: &mut Vec<f32>,
) {
    let experts = u32::try_from(experts).unwrap_or(u32::MAX);
    let start = ids.len();
    for (&expert, &weight) in picked.iter().zip(chosen) {
        let Ok(id) = ExpertId::new(expert, experts) else { continue };
        // Insertion sort: k is small and the buffers are the caller's.
        let at = start + ids[start..].partition_point(|&other| other < id);
        ids.insert(at, id);
        weights.insert(at, weight);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn recipe(score: Score, renormalise: Renormalise) -> GateRecipe {
        GateRecipe { score, renormalise }
    }

    fn run(recipe: &GateRecipe, logits: &[f32], k: usize) -> Result<(Vec<u32>, Vec<f32>), GateError> {
        let (mut ids, mut weights) = (Vec::new(), Vec::new());
        choose(recipe, logits, k, &mut GateScratch::default(), &mut ids, &mut weights)?;
        Ok((ids.into_iter().map(ExpertId::get).collect(), weights))
    }

    /// The same rules once more, in f64, by a full stable sort.
    fn plain(recipe: &GateRecipe, logits: &[f32], k: usize) -> Vec<(u32, f64)> {
        let softmax = |x: &[f64]| -> Vec<f64> {
            let max = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let e: Vec<f64> = x.iter().map(|v| (v - max).exp()).collect();
            let sum: f64 = e.iter().sum();
            e.iter().map(|v| v / sum).collect()
        };
        let wide: Vec<f64> = logits.iter().map(|&x| f64::from(x)).collect();
        let mut order: Vec<usize> = (0..logits.len()).collect();
        order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
        order.truncate(k);
        let mut weights: Vec<f64> = match recipe.score {
            Score::SoftmaxThenTopK => {
                let p = softmax(&wide);
                order.iter().map(|&i| p[i]).collect()
            }
            Score::TopKThenSoftmax => softmax(&order.iter().map(|&i| wide[i]).collect::<Vec<_>>()),
        };
        if recipe.renormalise == Renormalise::Sum {
            let sum: f64 = weights.iter().sum();
            weights.iter_mut().for_each(|w| *w /= sum);
        }
        let mut out: Vec<(u32, f64)> = order.iter().map(|&i| i as u32).zip(weights).collect();
        out.sort_by_key(|&(id, _)| id);
        out
    }

    fn recipes() -> impl Strategy<Value = GateRecipe> {
        (
            prop_oneof![Just(Score::SoftmaxThenTopK), Just(Score::TopKThenSoftmax)],
            prop_oneof![Just(Renormalise::None), Just(Renormalise::Sum)],
        )
            .prop_map(|(score, renormalise)| GateRecipe { score, renormalise })
    }

    proptest! {
        #[test]
        fn agrees_with_the_plain_f64_rule(
            recipe in recipes(),
            // Multiples of 1/4 make ties common and keep softmax from merging distinct scores.
            quarters in prop::collection::vec(-40i32..40, 1..65),
            k in 1usize..9,
        ) {
            let logits: Vec<f32> = quarters.iter().map(|&q| q as f32 / 4.0).collect();
            let k = k.min(logits.len());
            let (ids, weights) = run(&recipe, &logits, k).unwrap();
            let expected = plain(&recipe, &logits, k);
            prop_assert_eq!(&ids, &expected.iter().map(|e| e.0).collect::<Vec<_>>());
            for (weight, (_, wide)) in weights.iter().zip(&expected) {
                prop_assert!((f64::from(*weight) - wide).abs() <= 1e-6, "{} {}", weight, wide);
            }
        }

        #[test]
        fn never_gives_a_bad_id_whatever_the_bits(
            recipe in recipes(),
            bits in prop::collection::vec(any::<u32>(), 1..33),
            k in 1usize..9,
        ) {
            let logits: Vec<f32> = bits.iter().map(|&b| f32::from_bits(b)).collect();
            let k = k.min(logits.len());
            if let Ok((ids, weights)) = run(&recipe, &logits, k) {
                prop_assert_eq!(ids.len(), k);
                prop_assert!(ids.windows(2).all(|w| w[0] < w[1]));
                prop_assert!(ids.iter().all(|&id| (id as usize) < logits.len()));
                prop_assert!(weights.iter().all(|w| w.is_finite()));
            } else {
                prop_assert!(logits.iter().any(|x| !x.is_finite()));
            }
        }
    }

    #[test]
    fn equal_scores_go_to_the_lowest_ids() {
        let (ids, weights) =
            run(&recipe(Score::SoftmaxThenTopK, Renormalise::Sum), &[1.0, 2.0, 2.0, 2.0], 2).unwrap();
        assert_eq!(ids, [1, 2]);
        assert_eq!(weights, [0.5, 0.5]);
    }

    #[test]
    fn one_expert_of_one_weighs_one() {
        let (ids, weights) = run(&recipe(Score::SoftmaxThenTopK, Renormalise::Sum), &[0.3, 0.9], 1).unwrap();
        assert_eq!((ids, weights), (vec![1], vec![1.0]));
    }

    #[test]
    fn nan_is_an_error_that_names_the_expert() {
        let error = run(&recipe(Score::TopKThenSoftmax, Renormalise::None), &[0.0, f32::NAN], 1).unwrap_err();
        assert_eq!(error.to_string(), "gate logit of expert 1 is NaN");
    }
}
