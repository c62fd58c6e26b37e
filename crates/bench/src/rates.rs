//! Throughput and latency.
//!
//! Every round starts all its requests at once, with unique prompts of random tokens. Prefill is measured until every
//! sequence has its first token; decoding only while all sequences decode, so that neither profits from the other's
//! idle time. A run can be compared with a saved one.

use std::convert::Infallible;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::clock::{DispatchTimes, Mark};
use crate::stats::{median, quantile};
use crate::{About, BenchError, Clock, Request, Target, Tokens, text};

/// All measurements of a run.
#[derive(Debug, Serialize, Deserialize)]
pub struct Report {
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

/// Trunk dtype of saved runs that lack the field.
fn native() -> String {
    muster_types::WeightDType::Native.to_string()
}

/// Measurements at one concurrency. Times are in seconds.
#[derive(Debug, Serialize, Deserialize)]
struct Measurement {
    concurrency: u32,
    prefill_tokens_per_second: f64,
    /// Absent when the sequences never all decoded at once.
    decode_tokens_per_second: Option<f64>,
    ttft: Spread,
    /// Absent when every sequence has one token only.
    inter_token: Option<Spread>,
    /// Cost of dispatch and combine of one MoE layer for the engine while decoding, without the experts' longest time.
    /// With private workers from the samples; with a router's metrics from its histogram, off by at most 15 %.
    dispatch_per_layer: Option<Spread>,
}

#[derive(Debug, Serialize, Deserialize)]
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

/// Parameters of a measurement.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Tokens of every prompt.
    pub prompt_tokens: u32,
    /// Tokens generated for every prompt; 1 measures prefill alone.
    pub output_tokens: u32,
    /// Concurrent requests, one measurement for each.
    pub concurrency: Vec<u32>,
    /// Rounds per measurement.
    pub rounds: u32,
}

/// Measures a target; `clock` gives dispatch times.
///
/// # Errors
/// When the context has no room for a sequence, or the target fails.
pub async fn measure(
    plan: &Plan,
    about: About,
    target: &impl Target,
    clock: &Clock,
) -> Result<Report, BenchError> {
    let &Plan { prompt_tokens, output_tokens, rounds, .. } = plan;
    if prompt_tokens.saturating_add(output_tokens) > about.context {
        return Err(BenchError::Input(format!(
            "--prompt-tokens {prompt_tokens} and --output-tokens {output_tokens} are more than the context of {}",
            about.context
        )));
    }
    let mut prompts = Prompts { state: 0, vocabulary: about.vocabulary };
    // Warm-up: touches weights and makes connections before anything counts.
    drop(round(target, &mut prompts, 1, prompt_tokens, 2, &Clock::None).await?);
    let mut results = Vec::new();
    for &concurrency in &plan.concurrency {
        results.push(at(plan, target, clock, &mut prompts, concurrency).await?);
    }
    let About { name: model, compute, experts: expert_dtype, trunk: trunk_dtype, workers, .. } = about;
    Ok(Report {
        model,
        compute,
        expert_dtype,
        trunk_dtype,
        workers,
        prompt_tokens,
        output_tokens,
        rounds,
        results,
    })
}

async fn at(
    plan: &Plan,
    target: &impl Target,
    clock: &Clock,
    prompts: &mut Prompts,
    concurrency: u32,
) -> Result<Measurement, BenchError> {
    let mut rounds = Vec::new();
    let mut dispatch = Vec::new();
    for _ in 0..plan.rounds {
        let (round, times) =
            round(target, prompts, concurrency, plan.prompt_tokens, plan.output_tokens, clock).await?;
        rounds.push(round);
        dispatch.extend(times);
    }
    let mut prefill: Vec<f64> = rounds.iter().map(|round| round.prefill_rate(plan.prompt_tokens)).collect();
    let mut decode: Vec<f64> = rounds.iter().filter_map(Round::decode_rate).collect();
    let mut first: Vec<Duration> = rounds.iter().flat_map(Round::first_tokens).collect();
    let mut between: Vec<Duration> = rounds.iter().flat_map(Round::gaps).collect();
    let missing = || BenchError::runtime("no tokens came back; nothing can be measured");
    Ok(Measurement {
        concurrency,
        prefill_tokens_per_second: median(&mut prefill).ok_or_else(missing)?,
        decode_tokens_per_second: median(&mut decode),
        ttft: Spread::of(&mut first).ok_or_else(missing)?,
        inter_token: Spread::of(&mut between),
        dispatch_per_layer: DispatchTimes::p50_p99(dispatch).map(|(p50, p99)| Spread { p50, p99 }),
    })
}

/// Arrival times of each sequence's tokens, since the start of the round.
struct Round(Vec<Vec<Duration>>);

async fn round(
    target: &impl Target,
    prompts: &mut Prompts,
    concurrency: u32,
    prompt_tokens: u32,
    output_tokens: u32,
    clock: &Clock,
) -> Result<(Round, Option<DispatchTimes>), BenchError> {
    let (waits, mut first_tokens) = mpsc::channel(1);
    let started = Instant::now();
    let mut requests = JoinSet::new();
    for _ in 0..concurrency {
        let prompt = prompts.next(prompt_tokens);
        requests.spawn(request(target.clone(), prompt, output_tokens, started, waits.clone()));
    }
    drop(waits);
    // Nothing is ever sent: the channel closes when all senders are dropped.
    while first_tokens.recv().await.is_some() {}
    let decoding = if output_tokens > 1 { clock.mark().await? } else { Mark::Nothing };
    let mut sequences = Vec::new();
    while let Some(arrivals) = requests.join_next().await {
        sequences.push(arrivals.map_err(BenchError::runtime)??);
    }
    Ok((Round(sequences), clock.since(decoding).await?))
}

/// Dropped by a sequence at its first token.
type Waits = mpsc::Sender<Infallible>;

async fn request(
    mut target: impl Target,
    prompt: Vec<u32>,
    tokens: u32,
    started: Instant,
    waits: Waits,
) -> Result<Vec<Duration>, BenchError> {
    let mut waits = Some(waits);
    let mut generated = target.generate(Request { prompt, tokens, temperature: 0.0, seed: None }).await?;
    let mut arrivals = Vec::new();
    while generated.next().await?.is_some() {
        arrivals.push(started.elapsed());
        drop(waits.take());
    }
    if arrivals.is_empty() {
        return Err(BenchError::runtime("a request ended without a token"));
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

    /// Tokens per second of all sequences, while they all decode.
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

/// Report as text.
#[must_use]
pub fn table(report: &Report) -> String {
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

/// Ratios of this run's figures to a saved run's, for every concurrency that both have.
#[must_use]
pub fn comparison(now: &Report, saved: &Report) -> String {
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
