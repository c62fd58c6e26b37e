//! Sampling: from logits to a token.
//!
//! No state: the random number of a position is a function of (seed, position), so a sequence can be continued
//! anywhere from its tokens alone. Ties go to the lowest token id. Order of steps: penalties, bias, temperature,
//! top-k, top-p, min-p, draw.

use std::collections::BTreeMap;
use std::sync::{Mutex, OnceLock, PoisonError};

use muster_kernels::Cpu;
use muster_kernels::math::{exp, log_sum_exp};
use muster_types::TokenId;

/// Checked sampling settings.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    temperature: f32,
    top_k: usize,
    top_p: f32,
    min_p: f32,
    repetition_penalty: f32,
    presence_penalty: f32,
    frequency_penalty: f32,
    seed: u64,
    bias: Vec<(TokenId, f32)>,
}

/// Unchecked settings from outside. `Default` is greedy decoding.
#[derive(Debug, Clone, PartialEq)]
pub struct RawSampling {
    /// 0 is greedy.
    pub temperature: f32,
    /// 0 keeps all tokens.
    pub top_k: u32,
    /// 1 keeps all tokens.
    pub top_p: f32,
    /// 0 keeps all tokens.
    pub min_p: f32,
    /// 1 changes nothing.
    pub repetition_penalty: f32,
    /// 0 changes nothing.
    pub presence_penalty: f32,
    /// 0 changes nothing.
    pub frequency_penalty: f32,
    /// Seed of the random numbers.
    pub seed: u64,
    /// Added to logits, by token id.
    pub bias: Vec<(u32, f32)>,
}

impl Default for RawSampling {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            seed: 0,
            bias: Vec::new(),
        }
    }
}

/// A setting outside its range.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field} {problem}")]
pub struct InvalidSampling {
    /// The field of [`RawSampling`], by its name in the public APIs.
    pub field: &'static str,
    /// The problem and the accepted values.
    pub problem: String,
}

impl InvalidSampling {
    fn range(field: &'static str, value: f32, range: &str) -> Self {
        Self { field, problem: format!("is {value}; it must be {range}") }
    }

    fn bias(problem: String) -> Self {
        Self { field: "logit_bias", problem }
    }
}

impl Sampling {
    /// Checks every field.
    ///
    /// # Errors
    /// Names the first field that is out of range. NaN is always out of range.
    pub fn new(raw: RawSampling, vocab: u32) -> Result<Self, InvalidSampling> {
        let check = |field, value: f32, low: f32, high: f32, range| {
            if value >= low && value <= high {
                Ok(value)
            } else {
                Err(InvalidSampling::range(field, value, range))
            }
        };
        let mut bias = Vec::with_capacity(raw.bias.len());
        for (id, value) in raw.bias {
            let value = check("logit_bias", value, -100.0, 100.0, "between -100 and 100")?;
            let id = TokenId::new(id, vocab)
                .map_err(|error| InvalidSampling::bias(format!("has a bad key: {error}")))?;
            bias.push((id, value));
        }
        let penalty = "between -2 and 2";
        let top_p = raw.top_p;
        if top_p <= 0.0 {
            return Err(InvalidSampling::range("top_p", top_p, "above 0, at most 1"));
        }
        Ok(Self {
            temperature: check("temperature", raw.temperature, 0.0, 100.0, "between 0 and 100")?,
            top_k: raw.top_k as usize,
            top_p: check("top_p", top_p, 0.0, 1.0, "above 0, at most 1")?,
            min_p: check("min_p", raw.min_p, 0.0, 1.0, "between 0 and 1")?,
            repetition_penalty: check(
                "repetition_penalty",
                raw.repetition_penalty,
                0.01,
                100.0,
                "between 0.01 and 100",
            )?,
            presence_penalty: check("presence_penalty", raw.presence_penalty, -2.0, 2.0, penalty)?,
            frequency_penalty: check("frequency_penalty", raw.frequency_penalty, -2.0, 2.0, penalty)?,
            seed: raw.seed,
            bias,
        })
    }

    /// The same settings with another seed: choice `index` of a request.
    #[must_use]
    pub fn for_choice(&self, index: u32) -> Self {
        Self { seed: self.seed.wrapping_add(u64::from(index)), ..self.clone() }
    }

    /// Whether sampling depends on the sequence's earlier tokens.
    const fn looks_back(&self) -> bool {
        self.repetition_penalty != 1.0 || self.presence_penalty != 0.0 || self.frequency_penalty != 0.0
    }
}

/// Counts of a sequence's tokens, for penalties. `Default` is for settings without penalties.
#[derive(Debug, Clone, Default)]
pub struct History {
    /// Count in the output; 0 for tokens of the prompt only. `None` without penalties.
    seen: Option<BTreeMap<TokenId, u32>>,
}

impl History {
    /// History of a sequence with this prompt and these settings. Reads the prompt only where penalties are set.
    #[must_use]
    pub fn new(sampling: &Sampling, prompt: &[TokenId]) -> Self {
        Self { seen: sampling.looks_back().then(|| prompt.iter().map(|&id| (id, 0)).collect()) }
    }

    /// Counts a generated token.
    pub fn push(&mut self, token: TokenId) {
        if let Some(seen) = &mut self.seen {
            *seen.entry(token).or_default() += 1;
        }
    }
}

/// A token's natural log-probability.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LogProb {
    /// The token.
    pub token: TokenId,
    /// Its log-probability under the unmodified logits.
    pub logprob: f32,
}

/// Buffers reused between tokens.
#[derive(Default)]
pub struct SampleScratch {
    logits: Vec<f32>,
    candidates: Vec<(f32, TokenId)>,
}

/// One token to pick.
#[derive(Clone, Copy)]
pub struct Pick<'a> {
    /// Its sampling settings.
    pub sampling: &'a Sampling,
    /// Finite, one per token of the vocabulary.
    pub logits: &'a [f32],
    /// The sequence's token counts.
    pub history: &'a History,
    /// The absolute position the token will have.
    pub position: u32,
}

/// Picks the tokens of a step, on all threads of a [`Cpu`].
#[derive(Default)]
pub struct Sampler {
    /// At most one per thread.
    scratch: Mutex<Vec<SampleScratch>>,
}

impl Sampler {
    /// The token of each pick, equal to that of [`sample`].
    pub fn sample(&self, cpu: &Cpu, picks: &[Pick<'_>]) -> Vec<TokenId> {
        /// Most multiply-adds per entry of the vocabulary: an exponential or two.
        const WORK: usize = 16;
        let free = || self.scratch.lock().unwrap_or_else(PoisonError::into_inner);
        let tokens: Vec<OnceLock<TokenId>> = picks.iter().map(|_| OnceLock::new()).collect();
        let task = |at: usize| {
            // The lock is not held while a token is picked.
            let taken = free().pop();
            let mut scratch = taken.unwrap_or_default();
            tokens[at].get_or_init(|| sample(&picks[at], &mut scratch));
            free().push(scratch);
        };
        let entries: usize = picks.iter().map(|pick| pick.logits.len()).sum();
        cpu.run(picks.len(), entries.saturating_mul(WORK), &task);
        tokens.into_iter().filter_map(OnceLock::into_inner).collect()
    }
}

/// Picks the next token.
#[must_use]
pub fn sample(pick: &Pick<'_>, scratch: &mut SampleScratch) -> TokenId {
    let Pick { sampling, logits, history, position } = *pick;
    let SampleScratch { logits: adjusted, candidates } = scratch;
    let logits = if sampling.looks_back() || !sampling.bias.is_empty() {
        adjusted.clear();
        adjusted.extend_from_slice(logits);
        penalise(sampling, history, adjusted);
        &*adjusted
    } else {
        logits
    };
    let greedy = best(logits);
    if sampling.temperature == 0.0 {
        return greedy;
    }
    let vocab = u32::try_from(logits.len()).unwrap_or(u32::MAX);
    candidates.clear();
    candidates.extend(logits.iter().map(|logit| logit / sampling.temperature).zip(TokenId::all(vocab)));
    let max = candidates.iter().map(|c| c.0).fold(f32::NEG_INFINITY, f32::max);
    if !max.is_finite() {
        // A temperature close to zero overflows; its limit is greedy.
        return greedy;
    }
    filter(sampling, max, candidates);
    draw(candidates, max, uniform(sampling.seed, position))
}

fn penalise(sampling: &Sampling, history: &History, logits: &mut [f32]) {
    let Sampling { repetition_penalty, presence_penalty, frequency_penalty, .. } = *sampling;
    if sampling.looks_back() {
        for (&token, &count) in history.seen.iter().flatten() {
            let logit = &mut logits[token.index()];
            *logit = if *logit > 0.0 { *logit / repetition_penalty } else { *logit * repetition_penalty };
            if count > 0 {
                *logit -= presence_penalty + frequency_penalty * count as f32;
            }
        }
    }
    for &(token, bias) in &sampling.bias {
        logits[token.index()] += bias;
    }
}

/// The lowest token with the largest logit.
fn best(logits: &[f32]) -> TokenId {
    /// The lanes of a register, or a multiple.
    const LANES: usize = 16;
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let (chunks, rest) = logits.as_chunks::<LANES>();
    let largest =
        |lanes: [f32; LANES], chunk: &[f32; LANES]| std::array::from_fn(|at| larger(lanes[at], chunk[at]));
    let lanes = chunks.iter().fold([f32::NEG_INFINITY; LANES], largest);
    let max = lanes.iter().chain(rest).copied().fold(f32::NEG_INFINITY, larger);
    let vocab = u32::try_from(logits.len()).unwrap_or(u32::MAX);
    let at = logits.iter().position(|&logit| logit == max).unwrap_or(0);
    TokenId::all(vocab).nth(at).expect("a vocabulary has tokens")
}

/// Filters the candidates by top-k, top-p and min-p. Their order is descending logit if top-k or top-p is on, token
/// order otherwise.
fn filter(sampling: &Sampling, max: f32, candidates: &mut Vec<(f32, TokenId)>) {
    let order = |a: &(f32, TokenId), b: &(f32, TokenId)| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1));
    let limits_k = sampling.top_k > 0 && sampling.top_k < candidates.len();
    if limits_k {
        candidates.select_nth_unstable_by(sampling.top_k, order);
        candidates.truncate(sampling.top_k);
    }
    if sampling.min_p > 0.0 && sampling.top_p >= 1.0 {
        // No later filter needs the full sum, so unlikely tokens are dropped before sorting.
        candidates.retain(|c| exp(c.0 - max) >= sampling.min_p);
    }
    if limits_k || sampling.top_p < 1.0 {
        candidates.sort_unstable_by(order);
    }
    if sampling.top_p < 1.0 {
        let total: f32 = candidates.iter().map(|c| exp(c.0 - max)).sum();
        let mut mass = 0.0;
        let enough = candidates.iter().position(|c| {
            mass += exp(c.0 - max);
            mass >= sampling.top_p * total
        });
        candidates.truncate(enough.map_or(candidates.len(), |at| at + 1));
        candidates.retain(|c| exp(c.0 - max) >= sampling.min_p);
    }
}

/// Inverse of the cumulative distribution at `u`.
fn draw(candidates: &[(f32, TokenId)], max: f32, u: f64) -> TokenId {
    let weight = |c: &(f32, TokenId)| f64::from(exp(c.0 - max));
    let total: f64 = candidates.iter().map(weight).sum();
    let mut rest = u * total;
    for candidate in candidates {
        rest -= weight(candidate);
        if rest < 0.0 {
            return candidate.1;
        }
    }
    // Rounding may leave a remainder at the end; it belongs to the last token with any weight.
    candidates.iter().rev().find(|c| weight(c) > 0.0).unwrap_or(&candidates[0]).1
}

/// A number in [0, 1) that depends on seed and position only: the SplitMix64 output function (Steele, Lea and
/// Flood, OOPSLA 2014) applied to the seed and again with the position.
fn uniform(seed: u64, position: u32) -> f64 {
    let mix = |mut z: u64| {
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;
    let keyed = mix(seed.wrapping_add(GOLDEN));
    let word = mix(keyed.wrapping_add(GOLDEN.wrapping_mul(u64::from(position) + 1)));
    (word >> 11) as f64 / (1u64 << 53) as f64
}

/// Log-probabilities of the chosen token and of the `top` likeliest, best first, from unmodified logits.
#[must_use]
pub fn logprobs(logits: &[f32], chosen: TokenId, top: usize) -> (LogProb, Vec<LogProb>) {
    let norm = log_sum_exp(logits);
    let of = |token: TokenId| LogProb { token, logprob: logits[token.index()] - norm };
    let mut ids: Vec<TokenId> = TokenId::all(u32::try_from(logits.len()).unwrap_or(u32::MAX)).collect();
    let order = |a: &TokenId, b: &TokenId| logits[b.index()].total_cmp(&logits[a.index()]).then(a.cmp(b));
    if top < ids.len() {
        ids.select_nth_unstable_by(top, order);
        ids.truncate(top);
    }
    ids.sort_unstable_by(order);
    (of(chosen), ids.into_iter().map(of).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const VOCAB: u32 = 64;

    fn token(id: u32) -> TokenId {
        TokenId::new(id, VOCAB).unwrap()
    }

    fn settings(change: impl FnOnce(&mut RawSampling)) -> Sampling {
        let mut raw = RawSampling { temperature: 1.0, ..RawSampling::default() };
        change(&mut raw);
        Sampling::new(raw, VOCAB).unwrap()
    }

    fn pick(sampling: &Sampling, logits: &[f32], position: u32) -> u32 {
        sample(
            &Pick { sampling, logits, history: &History::default(), position },
            &mut SampleScratch::default(),
        )
        .get()
    }

    fn ramp() -> Vec<f32> {
        (0..VOCAB).map(|i| ((i * 37) % VOCAB) as f32 / 16.0).collect()
    }

    #[test]
    fn frequencies_follow_the_probabilities() {
        let logits: Vec<f32> = vec![0.0, 1.0, 2.0, f32::from(-40i8)];
        let sampling = settings(|raw| raw.seed = 7);
        let mut counts = [0u32; 4];
        let draws = 40_000;
        for position in 0..draws {
            counts[pick(&sampling, &logits, position) as usize] += 1;
        }
        let total: f64 = logits.iter().map(|&x| f64::from(x).exp()).sum();
        for (count, logit) in counts.iter().zip(&logits) {
            let expected = f64::from(*logit).exp() / total;
            let seen = f64::from(*count) / f64::from(draws);
            assert!((seen - expected).abs() < 0.01, "{seen} for {expected}");
        }
    }

    #[test]
    fn greedy_takes_the_lowest_of_equals() {
        let sampling = Sampling::new(RawSampling::default(), VOCAB).unwrap();
        assert_eq!(pick(&sampling, &[1.0, 3.0, 3.0], 0), 1);
    }

    #[test]
    fn a_tiny_temperature_is_greedy() {
        let sampling = settings(|raw| raw.temperature = 1e-40);
        assert_eq!(pick(&sampling, &[1.0, 3.0, 2.0], 5), 1);
    }

    #[test]
    fn every_filter_keeps_only_what_it_should() {
        let logits = ramp();
        let mut order: Vec<u32> = (0..VOCAB).collect();
        order.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]).then(a.cmp(&b)));
        let support = |sampling: &Sampling| {
            let mut ids: Vec<u32> = (0..4000).map(|p| pick(sampling, &logits, p)).collect();
            ids.sort_unstable();
            ids.dedup();
            ids
        };
        let sorted = |mut ids: Vec<u32>| {
            ids.sort_unstable();
            ids
        };
        assert_eq!(support(&settings(|raw| raw.top_k = 3)), sorted(order[..3].to_vec()));
        assert_eq!(support(&settings(|raw| raw.top_k = 1)), [order[0]]);
        let weights: Vec<f64> = order.iter().map(|&i| f64::from(logits[i as usize]).exp()).collect();
        let total: f64 = weights.iter().sum();
        let mut mass = 0.0;
        let nucleus = 1 + weights
            .iter()
            .position(|w| {
                mass += w;
                mass >= 0.3 * total
            })
            .unwrap();
        assert_eq!(support(&settings(|raw| raw.top_p = 0.3)), sorted(order[..nucleus].to_vec()));
        let likely = weights.iter().filter(|&&w| w >= 0.5 * weights[0]).count();
        assert_eq!(support(&settings(|raw| raw.min_p = 0.5)), sorted(order[..likely].to_vec()));
    }

    #[test]
    fn penalties_and_bias_move_logits_as_documented() {
        let sampling = settings(|raw| {
            raw.repetition_penalty = 2.0;
            raw.presence_penalty = 0.5;
            raw.frequency_penalty = 0.25;
            raw.bias = vec![(3, 1.5)];
        });
        let mut history = History::new(&sampling, &[token(0), token(1)]);
        history.push(token(1));
        history.push(token(1));
        let mut logits = vec![4.0, -4.0, 4.0, 0.0];
        penalise(&sampling, &history, &mut logits);
        assert_eq!(logits, [2.0, -8.0 - 0.5 - 0.5, 4.0, 1.5]);
    }

    #[test]
    fn a_history_that_nobody_asks_for_is_not_kept() {
        let mut history = History::new(&settings(|raw| raw.bias = vec![(3, 1.5)]), &[token(0), token(1)]);
        history.push(token(1));
        assert!(history.seen.is_none());
        for change in [
            (|raw| raw.repetition_penalty = 1.1) as fn(&mut RawSampling),
            |raw| raw.presence_penalty = -0.5,
            |raw| raw.frequency_penalty = 0.5,
        ] {
            assert!(History::new(&settings(change), &[token(0)]).seen.is_some());
        }
    }

    /// The sampler without shortcuts: every step over (logit, token) pairs of the whole vocabulary.
    fn plainly(pick: &Pick<'_>) -> TokenId {
        let sampling = pick.sampling;
        let mut adjusted = pick.logits.to_vec();
        penalise(sampling, pick.history, &mut adjusted);
        let mut candidates: Vec<(f32, TokenId)> =
            adjusted.into_iter().zip(TokenId::all(u32::try_from(pick.logits.len()).unwrap())).collect();
        let better = |a: (f32, TokenId), b: (f32, TokenId)| if b.0 > a.0 { b } else { a };
        let greedy = candidates.iter().copied().reduce(better).unwrap().1;
        if sampling.temperature == 0.0 {
            return greedy;
        }
        candidates.iter_mut().for_each(|candidate| candidate.0 /= sampling.temperature);
        let max = candidates.iter().map(|c| c.0).fold(f32::NEG_INFINITY, f32::max);
        if !max.is_finite() {
            return greedy;
        }
        filter(sampling, max, &mut candidates);
        draw(&candidates, max, uniform(sampling.seed, pick.position))
    }

    #[test]
    fn bad_settings_are_named() {
        let bad = |change: fn(&mut RawSampling)| {
            let mut raw = RawSampling::default();
            change(&mut raw);
            Sampling::new(raw, VOCAB).unwrap_err().to_string()
        };
        assert_eq!(bad(|r| r.temperature = -1.0), "temperature is -1; it must be between 0 and 100");
        assert_eq!(bad(|r| r.temperature = f32::NAN), "temperature is NaN; it must be between 0 and 100");
        assert_eq!(bad(|r| r.top_p = 0.0), "top_p is 0; it must be above 0, at most 1");
        assert_eq!(bad(|r| r.top_p = f32::NAN), "top_p is NaN; it must be above 0, at most 1");
        assert_eq!(bad(|r| r.min_p = 1.5), "min_p is 1.5; it must be between 0 and 1");
        assert_eq!(
            bad(|r| r.presence_penalty = f32::INFINITY),
            "presence_penalty is inf; it must be between -2 and 2"
        );
        assert!(
            bad(|r| r.bias = vec![(64, 0.0)])
                .starts_with("logit_bias has a bad key: token id 64 is out of range")
        );
        assert!(bad(|r| r.bias = vec![(1, f32::NAN)]).starts_with("logit_bias is NaN"));
    }

    #[test]
    fn logprobs_sum_to_one() {
        let (chosen, top) = logprobs(&ramp(), token(5), VOCAB as usize);
        let sum: f64 = top.iter().map(|t| f64::from(t.logprob).exp()).sum();
        assert!((sum - 1.0).abs() < 1e-4);
        assert!(top.contains(&chosen));
        assert!(top.windows(2).all(|w| w[0].logprob >= w[1].logprob));
        assert_eq!(logprobs(&ramp(), token(5), 0).1, []);
    }

    fn any_sampling() -> impl Strategy<Value = Sampling> {
        let range = (
            prop_oneof![Just(0.0_f32), 1e-6_f32..3.0, Just(1e-40)],
            0_u32..70,
            0.001_f32..=1.0,
            0.0_f32..=1.0,
        );
        let penalties = (
            prop_oneof![2 => Just(1.0_f32), 1 => 0.01_f32..3.0],
            prop_oneof![2 => Just(0.0_f32), 1 => -2.0_f32..2.0],
            prop_oneof![2 => Just(0.0_f32), 1 => -2.0_f32..2.0],
        );
        let bias = prop::collection::vec((0..VOCAB, -100.0_f32..100.0), 0..3);
        (range, penalties, bias, any::<u64>()).prop_map(
            |((temperature, top_k, top_p, min_p), penalties, bias, seed)| {
                let (repetition_penalty, presence_penalty, frequency_penalty) = penalties;
                let raw = RawSampling {
                    temperature,
                    top_k,
                    top_p,
                    min_p,
                    repetition_penalty,
                    presence_penalty,
                    frequency_penalty,
                    seed,
                    bias,
                };
                Sampling::new(raw, VOCAB).unwrap()
            },
        )
    }

    proptest! {
        #[test]
        fn tokens_of_a_step_are_those_picked_plainly(
            sequences in prop::collection::vec(
                (
                    any_sampling(),
                    // Coarse logits have ties, and include both zeros.
                    prop_oneof![
                        prop::collection::vec((-4_i8..4).prop_map(|x| if x == 3 { -0.0 } else { f32::from(x) }), VOCAB as usize),
                        prop::collection::vec(-3e38_f32..3e38, VOCAB as usize),
                        prop::collection::vec(-20.0_f32..20.0, VOCAB as usize),
                    ],
                    prop::collection::vec(0..VOCAB, 0..20),
                    any::<u32>(),
                ),
                0..40,
            ),
            threads in 1_usize..4,
        ) {
            let cpu = Cpu::new(threads.try_into().unwrap()).unwrap();
            let histories: Vec<History> = sequences
                .iter()
                .map(|(sampling, _, tokens, _)| {
                    let tokens: Vec<TokenId> = tokens.iter().map(|&id| token(id)).collect();
                    let (prompt, output) = tokens.split_at(tokens.len() / 2);
                    let mut history = History::new(sampling, prompt);
                    output.iter().for_each(|&token| history.push(token));
                    history
                })
                .collect();
            let picks: Vec<Pick<'_>> = sequences
                .iter()
                .zip(&histories)
                .map(|((sampling, logits, _, position), history)| Pick { sampling, logits, history, position: *position })
                .collect();
            let plain: Vec<TokenId> = picks.iter().map(plainly).collect();
            prop_assert_eq!(Sampler::default().sample(&cpu, &picks), plain);
        }

        #[test]
        fn always_a_token_of_the_vocabulary_and_always_the_same(
            logits in prop::collection::vec(-3e38f32..3e38, 1..64),
            temperature in prop_oneof![Just(0.0f32), 1e-6f32..100.0],
            top_k in 0u32..70,
            top_p in 0.001f32..=1.0,
            min_p in 0.0f32..=1.0,
            seed in any::<u64>(),
            position in any::<u32>(),
        ) {
            let sampling = settings(|raw| {
                *raw = RawSampling { temperature, top_k, top_p, min_p, seed, ..RawSampling::default() };
            });
            let first = pick(&sampling, &logits, position);
            prop_assert!((first as usize) < logits.len());
            prop_assert_eq!(first, pick(&sampling, &logits, position));
        }
    }
}
