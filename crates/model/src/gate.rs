//! From gate logits to experts and weights, by recipe.
//!
//! Pure functions of one token's logits, in f32. Equal scores: the lowest expert id wins; equal groups: the lowest
//! number. Output is in ascending expert id with finite weights, or a [`GateError`] for that token alone: a NaN never
//! turns into an id.

use std::cmp::Ordering;

use muster_checkpoint::spec::{ExpertGroups, GateRecipe, GroupWorth, Renormalise, Score};
use muster_kernels::math::{sigmoid, softmax_in_place};
use muster_types::ExpertId;

/// A token without a usable choice of experts.
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
    /// A score with its selection bias is NaN or infinite.
    #[error("selection score of expert {expert} is {value}")]
    Selection {
        /// The expert.
        expert: usize,
        /// Its score and bias together.
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
    /// Selection scores of the experts.
    ranks: Vec<f32>,
    group_worths: Vec<f32>,
    picked_groups: Vec<u32>,
    picked: Vec<u32>,
    chosen: Vec<f32>,
}

/// Picks `top_k` experts for one token and appends their ids, ascending, and weights to `ids` and `weights`.
///
/// `logits` has one entry per expert, as has `selection_bias`, which is empty where the recipe has none; `top_k` is at
/// most the number of experts, and of experts in the groups that take part.
///
/// # Errors
/// When a logit, a selection score or a resulting weight is not finite; nothing is appended then.
pub fn choose(
    recipe: &GateRecipe,
    logits: &[f32],
    selection_bias: &[f32],
    top_k: usize,
    scratch: &mut GateScratch,
    ids: &mut Vec<ExpertId>,
    weights: &mut Vec<f32>,
) -> Result<(), GateError> {
    if let Some(expert) = logits.iter().position(|x| !x.is_finite()) {
        return Err(GateError::Logit { expert, value: logits[expert] });
    }
    let GateScratch { scores, ranks, group_worths, picked_groups, picked, chosen } = scratch;
    scores.clear();
    scores.extend_from_slice(logits);
    match recipe.score {
        Score::SoftmaxThenTopK => softmax_in_place(scores),
        Score::SigmoidThenTopK => scores.iter_mut().for_each(|score| *score = sigmoid(*score)),
        Score::TopKThenSoftmax | Score::TopKThenSigmoid | Score::SparseMixer { .. } => {}
    }
    ranks.clear();
    ranks.extend_from_slice(scores);
    for (rank, bias) in ranks.iter_mut().zip(selection_bias) {
        *rank += bias;
    }
    if let Some(expert) = ranks.iter().position(|x| !x.is_finite()) {
        return Err(GateError::Selection { expert, value: ranks[expert] });
    }
    if let Some(groups) = &recipe.groups {
        leave_out_groups(groups, ranks, group_worths, picked_groups);
    }
    pick(ranks, top_k, picked);
    // Softmax and sums run in the order of selection, best first, as the reference does.
    chosen.clear();
    chosen.extend(picked.iter().map(|&expert| scores[expert as usize]));
    match recipe.score {
        Score::SoftmaxThenTopK | Score::SigmoidThenTopK => {}
        Score::TopKThenSoftmax => softmax_in_place(chosen),
        Score::TopKThenSigmoid => chosen.iter_mut().for_each(|logit| *logit = sigmoid(*logit)),
        Score::SparseMixer { jitter } => mix_sparsely(logits, jitter, picked, scores, chosen),
    }
    let divisor = match recipe.renormalise {
        Renormalise::None => 1.0,
        Renormalise::Sum { plus } => chosen.iter().sum::<f32>() + plus,
        Renormalise::SumAtLeast { floor } => chosen.iter().sum::<f32>().max(floor),
    };
    // Dividing by one and multiplying by one change no bit.
    chosen.iter_mut().for_each(|weight| *weight = *weight / divisor * recipe.scale);
    for (&expert, &value) in picked.iter().zip(chosen.iter()) {
        if !value.is_finite() {
            return Err(GateError::Weight { expert, value });
        }
    }
    append_ascending(logits.len(), picked, chosen, ids, weights);
    Ok(())
}

/// Ranks experts of all but the best groups below every other: none of them is chosen, even where the selection bias
/// makes every rank of the remaining groups negative. DeepSeek's own code and transformers 5.24 do the same for sigmoid
/// scores; earlier releases of transformers ranked them 0. For DeepSeek-V2 both rank them 0, which is below every
/// softmax score but 0, whose weight is 0.
fn leave_out_groups(recipe: &ExpertGroups, ranks: &mut [f32], worths: &mut Vec<f32>, picked: &mut Vec<u32>) {
    let size = ranks.len() / recipe.groups as usize;
    worths.clear();
    worths.extend(ranks.chunks_exact(size).map(|group| {
        let (mut best, mut second) = (f32::NEG_INFINITY, f32::NEG_INFINITY);
        for &rank in group {
            second = second.max(rank.min(best));
            best = best.max(rank);
        }
        match recipe.worth {
            GroupWorth::Best => best,
            GroupWorth::BestTwo => best + second,
        }
    }));
    pick(worths, recipe.kept as usize, picked);
    for (group, ranks) in (0..).zip(ranks.chunks_exact_mut(size)) {
        if !picked.contains(&group) {
            ranks.fill(f32::NEG_INFINITY);
        }
    }
}

/// The weight of each pick: its share of a softmax over the experts that were not picked before it and whose logits are
/// near its own.
fn mix_sparsely(logits: &[f32], jitter: f32, picked: &[u32], near: &mut Vec<f32>, chosen: &mut [f32]) {
    for (pick, weight) in chosen.iter_mut().enumerate() {
        let (before, best) = (&picked[..pick], logits[picked[pick] as usize]);
        near.clear();
        near.extend((0..).zip(logits).map(|(expert, &logit)| {
            let far = (best - logit) / logit.abs().max(best) > 2.0 * jitter;
            if far || before.contains(&expert) { f32::NEG_INFINITY } else { logit }
        }));
        softmax_in_place(near);
        *weight = near[picked[pick] as usize];
    }
}

/// Indices of the `count` best scores, best first; among equals the lowest index first.
fn pick(scores: &[f32], count: usize, picked: &mut Vec<u32>) {
    picked.clear();
    picked.extend(0..u32::try_from(scores.len()).unwrap_or(u32::MAX));
    // No score is NaN here, so `partial_cmp` is total; it takes 0.0 and -0.0 for equal.
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

    const SOFTMAX: GateRecipe = GateRecipe::plain(Score::SoftmaxThenTopK, Renormalise::SUM);
    const SIGMOID: GateRecipe = GateRecipe::plain(Score::SigmoidThenTopK, Renormalise::None);
    const LOGITS: GateRecipe = GateRecipe::plain(Score::TopKThenSoftmax, Renormalise::None);

    fn run(
        recipe: &GateRecipe,
        logits: &[f32],
        bias: &[f32],
        k: usize,
    ) -> Result<(Vec<u32>, Vec<f32>), GateError> {
        let (mut ids, mut weights) = (Vec::new(), Vec::new());
        choose(recipe, logits, bias, k, &mut GateScratch::default(), &mut ids, &mut weights)?;
        Ok((ids.into_iter().map(ExpertId::get).collect(), weights))
    }

    /// An expert or a group: its rank, and the numbers that the rank was computed from.
    #[derive(Clone)]
    struct Ranked<T> {
        rank: f64,
        from: Vec<[f32; 2]>,
        what: T,
    }

    /// Sorts best first, stably. `false` when ranks from different numbers are closer than the precision of f32, so
    /// that the two precisions may order them differently.
    fn sort<T>(list: &mut [Ranked<T>]) -> bool {
        list.sort_by(|a, b| b.rank.partial_cmp(&a.rank).unwrap());
        list.windows(2).all(|pair| pair[0].rank - pair[1].rank > 2e-6 || pair[0].from == pair[1].from)
    }

    /// The rules of [`choose`] in f64: sorts experts in their groups, then the groups, then the experts of the
    /// remaining groups. `None` where f32 may rightly differ.
    fn plain(recipe: &GateRecipe, logits: &[f32], bias: &[f32], k: usize) -> Option<Vec<(u32, f64)>> {
        let softmax = |x: &[f64]| -> Vec<f64> {
            let max = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let e: Vec<f64> = x.iter().map(|v| (v - max).exp()).collect();
            let sum: f64 = e.iter().sum();
            e.iter().map(|v| v / sum).collect()
        };
        let wide: Vec<f64> = logits.iter().map(|&x| f64::from(x)).collect();
        let scores = match recipe.score {
            Score::SoftmaxThenTopK => softmax(&wide),
            Score::SigmoidThenTopK => wide.iter().map(|x| 1.0 / (1.0 + (-x).exp())).collect(),
            Score::TopKThenSoftmax | Score::TopKThenSigmoid | Score::SparseMixer { .. } => wide,
        };
        let expert = |id: usize| {
            let bias = bias.get(id).copied().unwrap_or(0.0);
            Ranked { rank: scores[id] + f64::from(bias), from: vec![[logits[id], bias]], what: id }
        };
        let mut experts: Vec<Ranked<usize>> = (0..logits.len()).map(expert).collect();
        // Sums of quarters are exact in both precisions.
        let exact = selects_by_logits(recipe.score);
        if let Some(ExpertGroups { groups, kept, worth }) = recipe.groups {
            let taken = if worth == GroupWorth::Best { 1 } else { 2 };
            let group = |members: &[Ranked<usize>]| {
                let mut best = members.to_vec();
                sort(&mut best);
                best.truncate(taken);
                let from = best.iter().flat_map(|expert| expert.from.clone()).collect();
                Ranked { rank: best.iter().map(|expert| expert.rank).sum(), from, what: members.to_vec() }
            };
            let mut list: Vec<_> = experts.chunks(logits.len() / groups as usize).map(group).collect();
            if !sort(&mut list) && !exact {
                return None;
            }
            experts = list.into_iter().take(kept as usize).flat_map(|group| group.what).collect();
            experts.sort_by_key(|expert| expert.what);
        }
        if !sort(&mut experts) && !exact {
            return None;
        }
        experts.truncate(k);
        let mut weights: Vec<f64> = experts.iter().map(|expert| scores[expert.what]).collect();
        match recipe.score {
            Score::SoftmaxThenTopK | Score::SigmoidThenTopK => {}
            Score::TopKThenSoftmax => weights = softmax(&weights),
            Score::TopKThenSigmoid => weights.iter_mut().for_each(|x| *x = 1.0 / (1.0 + (-*x).exp())),
            Score::SparseMixer { jitter } => {
                let mut left: Vec<(usize, f64)> = scores.iter().copied().enumerate().collect();
                for (weight, expert) in weights.iter_mut().zip(&experts) {
                    let best = *weight;
                    let far = |logit: f64| (best - logit) / logit.abs().max(best) > 2.0 * f64::from(jitter);
                    let near = left.iter().filter(|&&(_, logit)| !far(logit));
                    *weight = 1.0 / near.map(|(_, logit)| (logit - best).exp()).sum::<f64>();
                    left.retain(|(id, _)| *id != expert.what);
                }
            }
        }
        let sum: f64 = weights.iter().sum();
        let divisor = match recipe.renormalise {
            Renormalise::None => 1.0,
            Renormalise::Sum { plus } => sum + f64::from(plus),
            Renormalise::SumAtLeast { floor } => sum.max(f64::from(floor)),
        };
        let weights = weights.iter().map(|weight| weight / divisor * f64::from(recipe.scale));
        let mut out: Vec<(u32, f64)> = experts.iter().map(|expert| expert.what as u32).zip(weights).collect();
        out.sort_by_key(|&(id, _)| id);
        Some(out)
    }

    /// A recipe and its number of experts: groups times their size.
    fn recipes() -> impl Strategy<Value = (GateRecipe, usize)> {
        let scores = prop_oneof![
            Just(Score::SoftmaxThenTopK),
            Just(Score::SigmoidThenTopK),
            Just(Score::TopKThenSoftmax),
            Just(Score::TopKThenSigmoid),
            // Twice these are exact, so that the bound is the same in both precisions.
            Just(Score::SparseMixer { jitter: 0.125 }),
            Just(Score::SparseMixer { jitter: 0.5 }),
        ];
        let renormalise = prop_oneof![
            Just(Renormalise::None),
            Just(Renormalise::SUM),
            Just(Renormalise::Sum { plus: 0.25 }),
            Just(Renormalise::SumAtLeast { floor: 0.5 }),
        ];
        let worth = prop_oneof![Just(None), Just(Some(GroupWorth::Best)), Just(Some(GroupWorth::BestTwo))];
        let groups = (1u32..9, 1u32..9, 2usize..9);
        (scores, renormalise, worth, groups, any::<bool>(), prop_oneof![Just(1.0f32), Just(2.5)]).prop_map(
            |(score, renormalise, worth, (groups, kept, size), selection_bias, scale)| {
                let limit = worth.map(|worth| ExpertGroups { groups, kept: kept.min(groups), worth });
                let recipe =
                    GateRecipe { bias: false, score, selection_bias, groups: limit, renormalise, scale };
                (recipe, groups as usize * size)
            },
        )
    }

    fn selects_by_logits(score: Score) -> bool {
        !matches!(score, Score::SoftmaxThenTopK | Score::SigmoidThenTopK)
    }

    /// Number of experts that a recipe can choose from.
    fn eligible(recipe: &GateRecipe, experts: usize) -> usize {
        recipe.groups.map_or(experts, |limit| experts / limit.groups as usize * limit.kept as usize)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1024))]

        #[test]
        fn agrees_with_the_plain_f64_rule(
            (recipe, experts) in recipes(),
            // Multiples of 1/4 make ties common.
            quarters in prop::collection::vec(-12i32..12, 64),
            biases in prop::collection::vec(-4i32..4, 64),
            k in 1usize..65,
        ) {
            let of = |quarters: &[i32]| -> Vec<f32> { quarters.iter().map(|&q| q as f32 / 4.0).collect() };
            let (logits, bias) = (of(&quarters[..experts]), of(&biases[..experts]));
            let bias = if recipe.selection_bias { &bias[..] } else { &[] };
            let k = k.min(eligible(&recipe, experts));
            let (ids, weights) = run(&recipe, &logits, bias, k).unwrap();
            prop_assert_eq!(ids.len(), k);
            if let Some(expected) = plain(&recipe, &logits, bias, k) {
                prop_assert_eq!(&ids, &expected.iter().map(|e| e.0).collect::<Vec<_>>());
                for (weight, (_, wide)) in weights.iter().zip(&expected) {
                    prop_assert!((f64::from(*weight) - wide).abs() <= 2e-6, "{} {}", weight, wide);
                }
            }
        }

        #[test]
        fn never_gives_a_bad_id_whatever_the_bits(
            (recipe, experts) in recipes(),
            bits in prop::collection::vec(any::<u32>(), 64),
            bias_bits in prop::collection::vec(any::<u32>(), 64),
            k in 1usize..65,
        ) {
            let floats = |bits: &[u32]| -> Vec<f32> { bits.iter().map(|&b| f32::from_bits(b)).collect() };
            let (logits, bias) = (floats(&bits[..experts]), floats(&bias_bits[..experts]));
            let bias = if recipe.selection_bias { &bias[..] } else { &[] };
            let k = k.min(eligible(&recipe, experts));
            match run(&recipe, &logits, bias, k) {
                Ok((ids, weights)) => {
                    prop_assert_eq!(ids.len(), k);
                    prop_assert!(ids.windows(2).all(|w| w[0] < w[1]));
                    prop_assert!(ids.iter().all(|&id| (id as usize) < experts));
                    prop_assert!(weights.iter().all(|w| w.is_finite()));
                }
                Err(GateError::Logit { expert, .. }) => prop_assert!(!logits[expert].is_finite()),
                Err(GateError::Selection { expert, .. }) => {
                    prop_assert!(!bias[expert].is_finite() || selects_by_logits(recipe.score));
                }
                // Only an all-zero sum divides to a weight that is not finite.
                Err(GateError::Weight { .. }) => prop_assert_eq!(recipe.renormalise, Renormalise::SUM),
            }
        }
    }

    #[test]
    fn equal_scores_go_to_the_lowest_ids() {
        let (ids, weights) = run(&SOFTMAX, &[1.0, 2.0, 2.0, 2.0], &[], 2).unwrap();
        assert_eq!((ids, weights), (vec![1, 2], vec![0.5, 0.5]));
        let others = [Score::TopKThenSigmoid, Score::SparseMixer { jitter: 0.01 }]
            .map(|score| GateRecipe::plain(score, Renormalise::None));
        for recipe in [SOFTMAX, SIGMOID, LOGITS].into_iter().chain(others) {
            assert_eq!(run(&recipe, &[0.5; 6], &[], 3).unwrap().0, [0, 1, 2]);
            assert_eq!(run(&recipe, &[0.5; 6], &[0.0, 0.0, 1.0, 1.0, 1.0, 0.0], 2).unwrap().0, [2, 3]);
        }
    }

    #[test]
    fn equal_groups_go_to_the_lowest_numbers() {
        for worth in [GroupWorth::Best, GroupWorth::BestTwo] {
            let recipe = GateRecipe { groups: Some(ExpertGroups { groups: 3, kept: 1, worth }), ..SIGMOID };
            assert_eq!(run(&recipe, &[0.0, 1.0, 1.0, 0.0, 1.0, 0.0], &[], 2).unwrap().0, [0, 1]);
            let all = GateRecipe { groups: Some(ExpertGroups { groups: 1, kept: 1, worth }), ..SIGMOID };
            let logits = [0.3, 0.1, 0.9, 0.2];
            assert_eq!(run(&all, &logits, &[], 2), run(&SIGMOID, &logits, &[], 2));
        }
    }

    /// Choices of `DeepseekV3TopkRouter` and `Glm4MoeTopkRouter`, which agree, in transformers 5.24.0 on torch 2.15.0:
    /// 4 of 16 experts, from 2 of 4 groups, over these logits. If experts of left-out groups were ranked 0, the choices
    /// would be 5, 6, 7, 8; 9, 10, 11, 12; and 6, 7, 8, 12.
    #[test]
    fn groups_that_are_left_out_give_no_expert_however_low_the_others_rank() {
        let groups = Some(ExpertGroups { groups: 4, kept: 2, worth: GroupWorth::BestTwo });
        let renormalise = Renormalise::Sum { plus: 1e-20 };
        let recipe = GateRecipe { selection_bias: true, groups, renormalise, scale: 2.5, ..SIGMOID };
        let first = [
            -1.625, 0.75, 1.75, -2.75, -0.375, 0.625, -1.25, -1.75, 1.875, -1.125, -2.375, -0.875, 1.375,
            2.0, 0.5, 2.125,
        ];
        let second = [
            -3.125, -0.625, 3.875, -0.625, 0.375, 1.625, 2.125, -1.5, -0.375, -0.375, -3.625, -0.75, -4.125,
            1.375, -2.625, -2.75,
        ];
        let all_below_zero = [
            -1.546875, -1.5625, -1.5, -1.59375, -2.234375, -1.765625, -1.578125, -1.734375, -1.90625, -1.5,
            -1.609375, -2.03125, -1.78125, -1.59375, -1.59375, -1.6875,
        ];
        let some_below_zero = [
            -0.6875, -0.734375, -0.609375, -0.796875, -2.078125, -1.125, -0.75, -0.140625, 0.21875, -0.59375,
            -0.8125, -1.65625, -0.03125, -0.796875, -0.78125, -0.21875,
        ];
        struct Case<'a>(&'a [f32], &'a [f32], [u32; 4], [f32; 4]);
        let golden = [
            Case(
                &first,
                &all_below_zero,
                [1, 2, 13, 15],
                [0.513_713_96, 0.644_395_95, 0.666_213_04, 0.675_677_1],
            ),
            Case(
                &second,
                &all_below_zero,
                [1, 2, 5, 6],
                [0.285_110_44, 0.801_139_83, 0.683_230_8, 0.730_518_94],
            ),
            Case(
                &second,
                &some_below_zero,
                [6, 7, 8, 9],
                [1.181_375, 0.241_252_33, 0.538_686_3, 0.538_686_3],
            ),
        ];
        for Case(logits, bias, ids, weights) in golden {
            let (chosen, weighed) = run(&recipe, logits, bias, 4).unwrap();
            assert_eq!(chosen, ids);
            for (ours, theirs) in weighed.iter().zip(weights) {
                assert!((ours - theirs).abs() <= 1e-6, "{ours} {theirs}");
            }
        }
    }

    #[test]
    fn groups_are_ranked_by_their_best_or_their_two_best() {
        // The first group has the best expert, the second the best pair.
        let logits = [3.0, -9.0, 2.0, 2.0];
        let by = |worth| GateRecipe { groups: Some(ExpertGroups { groups: 2, kept: 1, worth }), ..LOGITS };
        assert_eq!(run(&by(GroupWorth::Best), &logits, &[], 1).unwrap().0, [0]);
        assert_eq!(run(&by(GroupWorth::BestTwo), &logits, &[], 1).unwrap().0, [2]);
    }

    #[test]
    fn a_selection_bias_chooses_and_does_not_weigh() {
        let recipe = GateRecipe { selection_bias: true, scale: 2.0, ..SIGMOID };
        assert_eq!(run(&recipe, &[0.0, 0.0], &[-1.0, 1.0], 1).unwrap(), (vec![1], vec![1.0]));
    }

    #[test]
    fn a_sparse_mixer_weighs_what_comes_near() {
        let recipe = GateRecipe::plain(Score::SparseMixer { jitter: 0.1 }, Renormalise::None);
        // 1.9 is within a fifth of 2, 1.5 is not; of the rest, 1.5 is not within a fifth of 1.9 either.
        let (ids, weights) = run(&recipe, &[1.5, 2.0, 1.9, -3.0], &[], 2).unwrap();
        assert_eq!(ids, [1, 2]);
        assert!((weights[0] - 1.0 / (1.0 + (-0.1_f32).exp())).abs() < 1e-6);
        assert_eq!(weights[1], 1.0);
        // Below zero, a logit far from a best near zero is near by its own magnitude.
        let (ids, weights) = run(&recipe, &[-0.1, -4.0], &[], 1).unwrap();
        assert_eq!((ids, weights), (vec![0], vec![1.0]));
        let (_, weights) = run(&recipe, &[0.0, 0.0], &[], 2).unwrap();
        assert_eq!(weights, [0.5, 1.0]);
    }

    #[test]
    fn all_experts_may_be_chosen() {
        let (ids, weights) = run(&SOFTMAX, &[0.5, -1.0, 2.0], &[], 3).unwrap();
        assert_eq!(ids, [0, 1, 2]);
        assert!((weights.iter().sum::<f32>() - 1.0).abs() < 1e-6);
    }

    #[test]
    fn sums_have_their_addend_or_their_floor() {
        let with = |renormalise| GateRecipe { renormalise, ..SIGMOID };
        let weigh = |renormalise| run(&with(renormalise), &[0.0, 0.0], &[], 2).unwrap().1;
        assert_eq!(weigh(Renormalise::Sum { plus: 1.0 }), [0.25, 0.25]);
        assert_eq!(weigh(Renormalise::SumAtLeast { floor: 2.0 }), [0.25, 0.25]);
        assert_eq!(weigh(Renormalise::SumAtLeast { floor: 0.5 }), [0.5, 0.5]);
        // Scores that are all zero: a sum of zero has no quotient, a floor has.
        let nothing = [-1e4, -1e4];
        assert!(matches!(run(&with(Renormalise::SUM), &nothing, &[], 1), Err(GateError::Weight { .. })));
        let floor = with(Renormalise::SumAtLeast { floor: 1e-12 });
        assert_eq!(run(&floor, &nothing, &[], 1).unwrap(), (vec![0], vec![0.0]));
    }

    #[test]
    fn one_expert_of_one_weighs_one() {
        let (ids, weights) = run(&SOFTMAX, &[0.3, 0.9], &[], 1).unwrap();
        assert_eq!((ids, weights), (vec![1], vec![1.0]));
    }

    #[test]
    fn what_is_not_finite_is_an_error_that_names_the_expert() {
        let message = |logits: &[f32], bias: &[f32]| run(&LOGITS, logits, bias, 1).unwrap_err().to_string();
        assert_eq!(message(&[0.0, f32::NAN], &[]), "gate logit of expert 1 is NaN");
        assert_eq!(message(&[f32::NEG_INFINITY, 0.0], &[]), "gate logit of expert 0 is -inf");
        assert_eq!(message(&[0.0, f32::MAX], &[0.0, f32::MAX]), "selection score of expert 1 is inf");
    }
}
