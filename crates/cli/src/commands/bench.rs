//! `muster bench`: throughput and latency of a router, or of a cluster of one's own.
//!
//! Every round starts all its requests at once, with prompts of random tokens that no other request has. Prefill is
//! measured until every sequence has its first token; decoding only while all sequences decode, so that neither is
//! flattered by the other's idle time.

use std::time::{Duration, Instant};

use muster_dispatch_grpc::StatsHandle;
use serde::Serialize;
use tokio::task::JoinSet;

use super::target::with_backend;
use crate::args::{BenchArgs, LogArgs, SamplingArgs};
use crate::backend::{About, Ask, Backend, Piece};
use crate::failure::Failure;
use crate::stats::{median, quantile};
use crate::{out, text};

/// Everything that was measured.
#[derive(Serialize)]
struct Report {
    model: String,
    compute: String,
    workers: u32,
    prompt_tokens: u32,
    output_tokens: u32,
    rounds: u32,
    results: Vec<Measurement>,
}

/// What was measured at one concurrency. Times are in seconds.
#[derive(Serialize)]
struct Measurement {
    concurrency: u32,
    prefill_tokens_per_second: f64,
    /// Missing when sequences were never all decoding at once.
    decode_tokens_per_second: Option<f64>,
    ttft: Spread,
    inter_token: Spread,
    /// What dispatch and combine of one MoE layer cost the engine while decoding, without the longest time that experts
    /// took. Only for workers of one's own.
    dispatch_per_layer: Option<Spread>,
}

#[derive(Serialize)]
struct Spread {
    p50: f64,
    p99: f64,
}

impl Spread {
    fn of(samples: &mut [Duration]) -> Option<Self> {
        let (p50, p99) = (quantile(samples, 0.50)?, quantile(samples, 0.99)?);
        Some(Self { p50: p50.as_secs_f64(), p99: p99.as_secs_f64() })
    }
}

pub(crate) async fn run(args: &BenchArgs, log: &LogArgs) -> Result<(), Failure> {
    with_backend(&args.target, args.compute, log, |backend, stats| measure(args, backend, stats)).await
}

async fn measure(args: &BenchArgs, mut backend: Backend, stats: Option<StatsHandle>) -> Result<(), Failure> {
    let about = backend.about().await?;
    let needed = args.prompt_tokens.saturating_add(args.output_tokens);
    if needed > about.context {
        return Err(Failure::input(format!(
            "--prompt-tokens {} and --output-tokens {} are more than the context of {}",
            args.prompt_tokens, args.output_tokens, about.context
        )));
    }
    let mut prompts = Prompts { state: 0, vocabulary: about.vocabulary };
    // Weights are touched and connections made before anything counts.
    drop(round(&backend, &mut prompts, 1, args.prompt_tokens, 2).await?);
    let mut results = Vec::new();
    for &concurrency in &args.concurrency {
        results.push(at(args, &backend, stats.as_ref(), &mut prompts, concurrency).await?);
    }
    let About { name: model, compute, workers, .. } = about;
    let (prompt_tokens, output_tokens, rounds) = (args.prompt_tokens, args.output_tokens, args.rounds);
    let report = Report { model, compute, workers, prompt_tokens, output_tokens, rounds, results };
    if args.json {
        return out::line(&serde_json::to_string(&report).map_err(Failure::runtime)?);
    }
    out::line(&table(&report))
}

async fn at(
    args: &BenchArgs,
    backend: &Backend,
    stats: Option<&StatsHandle>,
    prompts: &mut Prompts,
    concurrency: u32,
) -> Result<Measurement, Failure> {
    let mut rounds = Vec::new();
    let mut dispatch = Vec::new();
    for _ in 0..args.rounds {
        let before = stats.map_or(0, |stats| stats.snapshot().samples.len());
        rounds.push(round(backend, prompts, concurrency, args.prompt_tokens, args.output_tokens).await?);
        // The memory of samples is bounded; once it is full, all it has is of late.
        let samples = stats.map(|stats| stats.snapshot().samples).unwrap_or_default();
        let fresh = if samples.len() > before { &samples[before..] } else { &samples[..] };
        // Steps with no more rows than sequences are decoding.
        let decoding = fresh.iter().filter(|sample| sample.rows <= concurrency as usize);
        dispatch.extend(decoding.map(muster_dispatch_grpc::Sample::overhead));
    }
    let mut prefill: Vec<f64> = rounds.iter().map(|round| round.prefill_rate(args.prompt_tokens)).collect();
    let mut decode: Vec<f64> = rounds.iter().filter_map(Round::decode_rate).collect();
    let mut first: Vec<Duration> = rounds.iter().flat_map(Round::first_tokens).collect();
    let mut between: Vec<Duration> = rounds.iter().flat_map(Round::gaps).collect();
    let missing = || Failure::runtime("no tokens came back; nothing can be measured");
    Ok(Measurement {
        concurrency,
        prefill_tokens_per_second: median(&mut prefill).ok_or_else(missing)?,
        decode_tokens_per_second: median(&mut decode),
        ttft: Spread::of(&mut first).ok_or_else(missing)?,
        inter_token: Spread::of(&mut between).ok_or_else(missing)?,
        dispatch_per_layer: Spread::of(&mut dispatch),
    })
}

/// When the tokens of each sequence came, since the start of the round.
struct Round(Vec<Vec<Duration>>);

async fn round(
    backend: &Backend,
    prompts: &mut Prompts,
    concurrency: u32,
    prompt_tokens: u32,
    output_tokens: u32,
) -> Result<Round, Failure> {
    let started = Instant::now();
    let mut requests = JoinSet::new();
    for _ in 0..concurrency {
        requests.spawn(request(backend.clone(), prompts.next(prompt_tokens), output_tokens, started));
    }
    let mut sequences = Vec::new();
    while let Some(arrivals) = requests.join_next().await {
        sequences.push(arrivals.map_err(Failure::runtime)??);
    }
    Ok(Round(sequences))
}

async fn request(
    mut backend: Backend,
    prompt: Vec<u32>,
    output_tokens: u32,
    started: Instant,
) -> Result<Vec<Duration>, Failure> {
    let sampling = SamplingArgs { ignore_eos: true, ..SamplingArgs::greedy() };
    let mut pieces = backend.generate(Ask::Tokens(prompt), Some(output_tokens), &sampling).await?;
    let mut arrivals = Vec::new();
    while let Some(piece) = pieces.next().await? {
        if matches!(piece, Piece::Token { .. }) {
            arrivals.push(started.elapsed());
        }
    }
    if arrivals.is_empty() {
        return Err(Failure::runtime("a request ended without a token"));
    }
    Ok(arrivals)
}

impl Round {
    fn first_tokens(&self) -> impl Iterator<Item = Duration> {
        self.0.iter().filter_map(|arrivals| arrivals.first().copied())
    }

    fn gaps(&self) -> impl Iterator<Item = Duration> {
        self.0.iter().flat_map(|arrivals| arrivals.windows(2).map(|pair| pair[1].saturating_sub(pair[0])))
    }

    fn prefill_rate(&self, prompt_tokens: u32) -> f64 {
        let all = self.first_tokens().max().unwrap_or_default();
        self.0.len() as f64 * f64::from(prompt_tokens) / all.as_secs_f64()
    }

    /// Tokens per second of all sequences, while all of them decode.
    fn decode_rate(&self) -> Option<f64> {
        let from = self.first_tokens().max()?;
        let to = self.0.iter().filter_map(|arrivals| arrivals.last().copied()).min()?;
        let tokens = self.0.iter().flatten().filter(|&&at| from < at && at <= to).count();
        let time = to.checked_sub(from).filter(|time| !time.is_zero())?;
        Some(tokens as f64 / time.as_secs_f64())
    }
}

/// Random prompts, the same in every run.
struct Prompts {
    state: u64,
    vocabulary: u32,
}

impl Prompts {
    fn next(&mut self, tokens: u32) -> Vec<u32> {
        (0..tokens).map(|_| (self.random() % u64::from(self.vocabulary.max(1))) as u32).collect()
    }

    /// SplitMix64 (Steele, Lea and Flood, 2014).
    fn random(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.state ^ (self.state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
}

fn table(report: &Report) -> String {
    let seconds = |seconds: f64| text::span(Duration::from_secs_f64(seconds));
    let rate = |rate: Option<f64>| rate.map_or_else(|| "-".to_owned(), |rate| format!("{rate:.1}"));
    let rows: Vec<Vec<String>> = report
        .results
        .iter()
        .map(|result| {
            let dispatch = |value: fn(&Spread) -> f64| {
                result
                    .dispatch_per_layer
                    .as_ref()
                    .map_or_else(|| "-".to_owned(), |spread| seconds(value(spread)))
            };
            vec![
                result.concurrency.to_string(),
                rate(Some(result.prefill_tokens_per_second)),
                rate(result.decode_tokens_per_second),
                seconds(result.ttft.p50),
                seconds(result.ttft.p99),
                seconds(result.inter_token.p50),
                seconds(result.inter_token.p99),
                dispatch(|spread| spread.p50),
                dispatch(|spread| spread.p99),
            ]
        })
        .collect();
    let header = [
        "requests",
        "prefill tok/s",
        "decode tok/s",
        "first p50",
        "p99",
        "between p50",
        "p99",
        "dispatch/layer p50",
        "p99",
    ];
    format!(
        "{}, {} compute, {} workers; prompts of {} tokens, outputs of {}, {} rounds\n\n{}",
        report.model,
        report.compute,
        report.workers,
        report.prompt_tokens,
        report.output_tokens,
        report.rounds,
        text::table(&header, &rows)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round(sequences: &[&[u64]]) -> Round {
        let arrivals = |times: &&[u64]| times.iter().copied().map(Duration::from_millis).collect();
        Round(sequences.iter().map(arrivals).collect())
    }

    #[test]
    fn decoding_counts_only_while_all_sequences_decode() {
        // The second sequence starts late; the first ends early. All decode from 300 ms to 500 ms.
        let round = round(&[&[100, 200, 300, 400, 500], &[300, 400, 500, 600]]);
        assert_eq!(round.decode_rate(), Some(20.0));
        assert!((round.prefill_rate(30) - 200.0).abs() < 1e-9);
        assert_eq!(round.gaps().count(), 7);
    }

    #[test]
    fn sequences_that_never_decode_together_have_no_rate() {
        assert_eq!(round(&[&[100, 200], &[300, 400]]).decode_rate(), None);
        assert_eq!(round(&[&[100]]).decode_rate(), None);
    }

    #[test]
    fn prompts_are_in_the_vocabulary_and_all_different() {
        let mut prompts = Prompts { state: 0, vocabulary: 100 };
        let (first, second) = (prompts.next(50), prompts.next(50));
        assert!(first.iter().chain(&second).all(|id| *id < 100));
        assert_ne!(first, second);
    }
}
