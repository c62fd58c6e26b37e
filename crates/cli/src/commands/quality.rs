//! Accuracy of bf16 computation against f32, and of few-bit weights against native ones: distributions over the same
//! tokens are compared.

use std::num::NonZeroUsize;
use std::sync::Arc;

use muster_checkpoint::Checkpoint;
use muster_model::evaluate::evaluate;
use muster_router::start::{EngineSettings, ModelDefaults};
use muster_router::tokenizer;
use muster_types::Compute;
use muster_types::WeightDType::{Native, Q4, Q8};
use serde::Serialize;
use tokio::runtime::Builder;

use super::logits::failure;
use super::{runtime, token_file};
use crate::args::CheckModelArgs;
use crate::backend::{Ask, Backend, Manner, Piece};
use crate::cores::cores;
use crate::engine::{self, Experts, Mode};
use crate::failure::Failure;
use crate::progress::Bar;

/// Prompts for the model's own text, used when no tokens are given.
const PROMPTS: [&str; 8] = [
    "Once upon a time",
    "The capital of France is",
    "In the beginning",
    "def main():\n",
    "12 + 30 =",
    "A mixture of experts is",
    "My favourite animal is the",
    "The weather today",
];
/// Tokens of each continuation.
const CONTINUATION: u32 = 48;

/// All comparisons.
#[derive(Serialize)]
pub(crate) struct Quality {
    /// bf16 against f32 computation, both with native experts.
    #[serde(flatten)]
    bf16: Distance,
    /// q8 against native experts, in the checkpoint's own compute mode.
    q8: Distance,
    /// q4 against native experts.
    q4: Distance,
    /// q8 against native trunk, both with native experts.
    q8_trunk: Distance,
    /// q8 experts and q8 trunk against native ones.
    q8_all: Distance,
    /// q4 experts and q8 trunk against native ones.
    q4_q8: Distance,
}

/// A comparison, over all positions.
#[derive(Serialize)]
struct Distance {
    positions: usize,
    /// Mean KL divergence of the rounded next-token distribution from the exact one, nats.
    kl_mean: f64,
    kl_max: f64,
    /// Share of positions at which both have the same likeliest token.
    top1_agreement: f64,
}

impl Quality {
    /// A line for each comparison.
    pub(crate) fn in_words(&self) -> String {
        [
            self.bf16.in_words("bf16 against f32"),
            self.q8.in_words("q8 against native experts"),
            self.q4.in_words("q4 against native experts"),
            self.q8_trunk.in_words("q8 against native trunk"),
            self.q8_all.in_words("q8 experts and trunk against native ones"),
            self.q4_q8.in_words("q4 experts and q8 trunk against native ones"),
        ]
        .join("\n")
    }
}

impl Distance {
    fn in_words(&self, what: &str) -> String {
        format!(
            "{what} at {} positions: KL mean {:.2e}, max {:.2e} nats; same likeliest token at {:.2} %",
            self.positions,
            self.kl_mean,
            self.kl_max,
            self.top1_agreement * 100.0
        )
    }
}

/// Measures all comparisons.
pub(crate) fn measure(args: &CheckModelArgs, checkpoint: Checkpoint) -> Result<Quality, Failure> {
    let checkpoint = Arc::new(checkpoint);
    let threads = args.threads.unwrap_or(cores());
    let texts = match &args.tokens {
        Some(path) => token_file::more(path)?,
        None => own_texts(&checkpoint, threads)?,
    };
    let run =
        |compute, experts, trunk| logits(&checkpoint, Mode { compute, experts, trunk }, threads, &texts);
    let exact = run(Compute::F32, Native, Native)?;
    let rounded = run(Compute::Bf16, Native, Native)?;
    let own = checkpoint.compute(None);
    let native = if own == Compute::F32 { &exact } else { &rounded };
    let vocab = checkpoint.spec().vocab as usize;
    let distance = |from: &[f32], to: &[f32]| {
        compare(from, to, vocab).ok_or_else(|| Failure::input("--tokens: there is nothing to compare"))
    };
    Ok(Quality {
        bf16: distance(&exact, &rounded)?,
        q8: distance(native, &run(own, Q8, Native)?)?,
        q4: distance(native, &run(own, Q4, Native)?)?,
        q8_trunk: distance(native, &run(own, Native, Q8)?)?,
        q8_all: distance(native, &run(own, Q8, Q8)?)?,
        q4_q8: distance(native, &run(own, Q4, Q8)?)?,
    })
}

/// The model's own continuations of a few prompts.
fn own_texts(checkpoint: &Arc<Checkpoint>, threads: NonZeroUsize) -> Result<Vec<Vec<u32>>, Failure> {
    if tokenizer::read(checkpoint).map_err(Failure::input)?.is_none() {
        let remedy = tokenizer::remedy(checkpoint);
        return Err(Failure::input(format!("--quality: give token ids with --tokens FILE: {remedy}")));
    }
    let compute = checkpoint.compute(None);
    let mode = Mode { compute, experts: Native, trunk: Native };
    let loaded = engine::load(Arc::clone(checkpoint), mode, threads, Experts::Here, &Bar::single("model"))?;
    let (service, _handle) = loaded.serve(EngineSettings::default(), ModelDefaults::Ignored)?;
    let mut backend = Backend::Here(service);
    runtime(&mut Builder::new_current_thread())?.block_on(async {
        let mut texts = Vec::with_capacity(PROMPTS.len());
        for prompt in PROMPTS {
            texts.push(continuation(&mut backend, prompt).await?);
        }
        Ok(texts)
    })
}

async fn continuation(backend: &mut Backend, prompt: &str) -> Result<Vec<u32>, Failure> {
    let mut ids = backend.tokenize(prompt.to_owned()).await?;
    let manner = Manner { ignore_eos: true, ..Manner::default() };
    let mut pieces = backend.generate(Ask::Tokens(ids.clone()), Some(CONTINUATION), &manner).await?;
    while let Some(piece) = pieces.next().await? {
        if let Piece::Token { id, .. } = piece {
            ids.push(id);
        }
    }
    Ok(ids)
}

fn logits(
    checkpoint: &Arc<Checkpoint>,
    mode: Mode,
    threads: NonZeroUsize,
    texts: &[Vec<u32>],
) -> Result<Vec<f32>, Failure> {
    let bar = Bar::single(&format!("{}, {} experts, {} trunk", mode.compute, mode.experts, mode.trunk));
    let mut loaded = engine::load(Arc::clone(checkpoint), mode, threads, Experts::Here, &bar)?;
    let mut all = Vec::new();
    for tokens in texts {
        let outcome = evaluate(&loaded.trunk, loaded.dispatch.as_mut(), tokens, NonZeroUsize::MAX);
        all.extend(outcome.map_err(failure)?.logits);
    }
    Ok(all)
}

/// `None` without positions.
fn compare(exact: &[f32], rounded: &[f32], vocab: usize) -> Option<Distance> {
    let positions = exact.len() / vocab;
    let (mut sum, mut max, mut same) = (0.0, 0f64, 0usize);
    for (exact, rounded) in exact.chunks_exact(vocab).zip(rounded.chunks_exact(vocab)) {
        let divergence = divergence(exact, rounded);
        sum += divergence;
        max = max.max(divergence);
        same += usize::from(likeliest(exact) == likeliest(rounded));
    }
    let count = positions as f64;
    (positions > 0).then(|| Distance {
        positions,
        kl_mean: sum / count,
        kl_max: max,
        top1_agreement: same as f64 / count,
    })
}

/// KL(softmax(p) ‖ softmax(q)) in nats.
fn divergence(p: &[f32], q: &[f32]) -> f64 {
    let (p_norm, q_norm) = (log_sum_exp(p), log_sum_exp(q));
    let term = |(&p, &q): (&f32, &f32)| {
        let (log_p, log_q) = (f64::from(p) - p_norm, f64::from(q) - q_norm);
        log_p.exp() * (log_p - log_q)
    };
    // Rounding errors may turn a vanishing divergence negative.
    p.iter().zip(q).map(term).sum::<f64>().max(0.0)
}

fn log_sum_exp(logits: &[f32]) -> f64 {
    let max = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    max + logits.iter().map(|&logit| (f64::from(logit) - max).exp()).sum::<f64>().ln()
}

fn likeliest(logits: &[f32]) -> Option<usize> {
    (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b]).then(b.cmp(&a)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_distributions_do_not_diverge() {
        let quality = compare(&[1.0, 2.0, 3.0], &[11.0, 12.0, 13.0], 3).unwrap();
        assert!(quality.kl_max < 1e-12 && quality.top1_agreement == 1.0 && quality.positions == 1);
        assert!(compare(&[], &[], 3).is_none());
    }

    #[test]
    fn divergence_is_what_the_formula_says() {
        // p = (1/2, 1/2), q = (1/4, 3/4): ln 2 - ln 3 / 2.
        let q = [(0.25f32).ln(), (0.75f32).ln()];
        assert!((divergence(&[0.0, 0.0], &q) - (2f64.ln() - 3f64.ln() / 2.0)).abs() < 1e-6);
        assert_eq!(likeliest(&[1.0, 3.0, 3.0]), Some(1));
    }
}
