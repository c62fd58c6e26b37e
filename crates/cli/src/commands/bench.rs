//! `muster bench`: throughput and latency of a router, or of a cluster of one's own.
//!
//! Every round starts all its requests at once, with prompts of random tokens that no other request has. Prefill is
//! measured until every sequence has its first token; decoding only while all sequences decode, so that neither is
//! flattered by the other's idle time. A run can be compared with a saved one.

use std::convert::Infallible;
use std::fmt::Display;
use std::fs::File;
use std::io::Read as _;
use std::path::Path;
use std::time::{Duration, Instant};

use muster_dispatch_grpc::StatsHandle;
use muster_router::start::ModelDefaults;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::target::with_backend;
use crate::args::{BenchArgs, LogArgs};
use crate::backend::{About, Ask, Backend, Manner, Piece};
use crate::dispatch_times::{Clock, DispatchTimes, Mark};
use crate::failure::Failure;
use crate::scrape::Metrics;
use crate::stats::{median, quantile};
use crate::{out, text};

/// Requests at a time when nobody says how many.
const CONCURRENCY: [u32; 2] = [1, 8];
/// Longest saved run that is read.
const MOST_SAVED: u64 = 1 << 20;

/// Everything that was measured.
#[derive(Serialize, Deserialize)]
struct Report {
    model: String,
    compute: String,
    expert_dtype: String,
    #[serde(default = "native")]
    trunk_dtype: String,
    workers: u32,
    prompt_tokens: u32,
    output_tokens: u32,
    rounds: u32,
    results: Vec<Measurement>,
}

/// The trunk of a run that says nothing of it.
fn native() -> String {
    muster_types::WeightDType::Native.to_string()
}

/// What was measured at one concurrency. Times are in seconds.
#[derive(Serialize, Deserialize)]
struct Measurement {
    concurrency: u32,
    prefill_tokens_per_second: f64,
    /// Missing when sequences were never all decoding at once.
    decode_tokens_per_second: Option<f64>,
    ttft: Spread,
    /// Missing when every sequence has one token only.
    inter_token: Option<Spread>,
    /// What dispatch and combine of one MoE layer cost the engine while decoding, without the longest time that experts
    /// took. For workers of one's own: the samples themselves; for a router whose metrics are read: from its
    /// histogram, 15 % off at most.
    dispatch_per_layer: Option<Spread>,
}

#[derive(Serialize, Deserialize)]
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
    if let Some(time) = args.soak {
        return super::bench_soak::run(args, time).await;
    }
    if args.chaos {
        return super::bench_chaos::run(args, log).await;
    }
    let ignored = ModelDefaults::Ignored;
    with_backend(&args.target, args.compute, ignored, log, |backend, stats| measure(args, backend, stats))
        .await
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
    let saved = args.against.as_deref().map(saved).transpose()?;
    let clock = match (stats, &args.metrics) {
        (Some(stats), _) => Clock::Samples(stats),
        (None, Some(url)) => Clock::Metrics(Metrics::at(url)?),
        (None, None) => Clock::None,
    };
    // Weights are touched and connections made before anything counts.
    drop(round(&backend, &mut prompts, 1, args.prompt_tokens, 2, &Clock::None).await?);
    let mut results = Vec::new();
    let concurrencies = if args.concurrency.is_empty() { &CONCURRENCY[..] } else { &args.concurrency };
    for &concurrency in concurrencies {
        results.push(at(args, &backend, &clock, &mut prompts, concurrency).await?);
    }
    let About { name: model, compute, experts: expert_dtype, trunk: trunk_dtype, workers, .. } = about;
    let (prompt_tokens, output_tokens, rounds) = (args.prompt_tokens, args.output_tokens, args.rounds);
    let report = Report {
        model,
        compute,
        expert_dtype,
        trunk_dtype,
        workers,
        prompt_tokens,
        output_tokens,
        rounds,
        results,
    };
    if args.json {
        return out::line(&serde_json::to_string(&report).map_err(Failure::runtime)?);
    }
    out::line(&table(&report))?;
    saved.map_or(Ok(()), |saved| out::line(&comparison(&report, &saved)))
}

fn saved(path: &Path) -> Result<Report, Failure> {
    let bad = |error: &dyn Display| Failure::input(format!("--against {}: {error}", path.display()));
    let file = File::open(path).map_err(|error| bad(&error))?;
    let mut bytes = Vec::new();
    file.take(MOST_SAVED).read_to_end(&mut bytes).map_err(|error| bad(&error))?;
    serde_json::from_slice(&bytes)
        .map_err(|error| bad(&format!("{error}; it must be what `muster bench --json` printed")))
}

async fn at(
    args: &BenchArgs,
    backend: &Backend,
    clock: &Clock,
    prompts: &mut Prompts,
    concurrency: u32,
) -> Result<Measurement, Failure> {
    let mut rounds = Vec::new();
    let mut dispatch = Vec::new();
    for _ in 0..args.rounds {
        let (round, times) =
            round(backend, prompts, concurrency, args.prompt_tokens, args.output_tokens, clock).await?;
        rounds.push(round);
        dispatch.extend(times);
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
        inter_token: Spread::of(&mut between),
        dispatch_per_layer: DispatchTimes::p50_p99(dispatch).map(|(p50, p99)| Spread { p50, p99 }),
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
    clock: &Clock,
) -> Result<(Round, Option<DispatchTimes>), Failure> {
    let (waits, mut first_tokens) = mpsc::channel(1);
    let started = Instant::now();
    let mut requests = JoinSet::new();
    for _ in 0..concurrency {
        let prompt = prompts.next(prompt_tokens);
        requests.spawn(request(backend.clone(), prompt, output_tokens, started, waits.clone()));
    }
    drop(waits);
    // Nothing is ever sent: the channel ends when all have dropped their side.
    while first_tokens.recv().await.is_some() {}
    let decoding = if output_tokens > 1 { clock.mark().await? } else { Mark::Nothing };
    let mut sequences = Vec::new();
    while let Some(arrivals) = requests.join_next().await {
        sequences.push(arrivals.map_err(Failure::runtime)??);
    }
    Ok((Round(sequences), clock.since(decoding).await?))
}

/// A sequence that has no token yet.
type Waits = mpsc::Sender<Infallible>;

async fn request(
    mut backend: Backend,
    prompt: Vec<u32>,
    output_tokens: u32,
    started: Instant,
    waits: Waits,
) -> Result<Vec<Duration>, Failure> {
    let mut waits = Some(waits);
    let manner = Manner { ignore_eos: true, ..Manner::default() };
    let mut pieces = backend.generate(Ask::Tokens(prompt), Some(output_tokens), &manner).await?;
    let mut arrivals = Vec::new();
    while let Some(piece) = pieces.next().await? {
        if matches!(piece, Piece::Token { .. }) {
            arrivals.push(started.elapsed());
            drop(waits.take());
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
            let optional = |spread: &Option<Spread>, value: fn(&Spread) -> f64| {
                spread.as_ref().map_or_else(|| "-".to_owned(), |spread| seconds(value(spread)))
            };
            vec![
                result.concurrency.to_string(),
                rate(Some(result.prefill_tokens_per_second)),
                rate(result.decode_tokens_per_second),
                seconds(result.ttft.p50),
                seconds(result.ttft.p99),
                optional(&result.inter_token, |spread| spread.p50),
                optional(&result.inter_token, |spread| spread.p99),
                optional(&result.dispatch_per_layer, |spread| spread.p50),
                optional(&result.dispatch_per_layer, |spread| spread.p99),
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
        "{}, {} compute, {} experts, {} trunk, {} workers; prompts of {} tokens, outputs of {}, {} rounds\n\n{}",
        report.model,
        report.compute,
        report.expert_dtype,
        report.trunk_dtype,
        report.workers,
        report.prompt_tokens,
        report.output_tokens,
        report.rounds,
        text::table(&header, &rows)
    )
}

/// This run's figures as multiples of a saved run's, for every concurrency that both have.
fn comparison(now: &Report, saved: &Report) -> String {
    let times = |ratio: Option<f64>| ratio.map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.2}x"));
    let p50 = |spread: &Option<Spread>| spread.as_ref().map(|spread| spread.p50);
    let rows: Vec<Vec<String>> = now
        .results
        .iter()
        .filter_map(|result| {
            let old = saved.results.iter().find(|old| old.concurrency == result.concurrency)?;
            let of = |now: Option<f64>, old: Option<f64>| times(now.zip(old).map(|(now, old)| now / old));
            Some(vec![
                result.concurrency.to_string(),
                of(Some(result.prefill_tokens_per_second), Some(old.prefill_tokens_per_second)),
                of(result.decode_tokens_per_second, old.decode_tokens_per_second),
                of(Some(result.ttft.p50), Some(old.ttft.p50)),
                of(p50(&result.inter_token), p50(&old.inter_token)),
                of(p50(&result.dispatch_per_layer), p50(&old.dispatch_per_layer)),
            ])
        })
        .collect();
    let header =
        ["requests", "prefill tok/s", "decode tok/s", "first p50", "between p50", "dispatch/layer p50"];
    let mut page = format!("\nas multiples of the saved run:\n\n{}", text::table(&header, &rows));
    for (what, now, saved) in [
        ("model", &now.model, &saved.model),
        ("compute", &now.compute, &saved.compute),
        ("workers", &now.workers.to_string(), &saved.workers.to_string()),
        ("prompt tokens", &now.prompt_tokens.to_string(), &saved.prompt_tokens.to_string()),
        ("output tokens", &now.output_tokens.to_string(), &saved.output_tokens.to_string()),
    ] {
        if now != saved {
            page.push_str(&format!("\nnot the same: {what} {now}, saved {saved}"));
        }
    }
    page
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(concurrency: u32, decode: Option<f64>) -> Report {
        let spread = |p50| Spread { p50, p99: 2.0 * p50 };
        let result = Measurement {
            concurrency,
            prefill_tokens_per_second: 100.0,
            decode_tokens_per_second: decode,
            ttft: spread(0.5),
            inter_token: decode.map(|rate| spread(1.0 / rate)),
            dispatch_per_layer: None,
        };
        Report {
            model: "m".to_owned(),
            compute: "bf16".to_owned(),
            expert_dtype: "native".to_owned(),
            trunk_dtype: native(),
            workers: 2,
            prompt_tokens: 512,
            output_tokens: 1,
            rounds: 3,
            results: vec![result],
        }
    }

    #[test]
    fn a_saved_run_reads_back_and_is_compared() {
        let saved: Report =
            serde_json::from_str(&serde_json::to_string(&report(8, Some(20.0))).unwrap()).unwrap();
        let page = comparison(&Report { workers: 4, ..report(8, Some(30.0)) }, &saved);
        assert!(page.contains("1.00x") && page.contains("1.50x") && page.contains("0.67x"), "{page}");
        assert!(page.ends_with("not the same: workers 4, saved 2"), "{page}");
        let page = comparison(&report(8, None), &saved);
        assert!(!page.contains("1.50x") && !page.contains("not the same"), "{page}");
        assert!(!comparison(&report(1, Some(30.0)), &saved).contains('x'), "no concurrency in common");
    }

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
