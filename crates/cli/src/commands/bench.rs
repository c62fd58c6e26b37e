//! `muster bench`: throughput and latency of a router, or of a private cluster.

use std::fmt::Display;
use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use muster_bench::rates::{Plan, Report, comparison, measure, table};
use muster_bench::{Clock, Metrics};
use muster_dispatch_grpc::StatsHandle;
use muster_router::start::ModelDefaults;

use super::target::with_backend;
use crate::args::{BenchArgs, LogArgs};
use crate::backend::Backend;
use crate::failure::Failure;
use crate::out;

/// Default concurrencies.
const CONCURRENCY: [u32; 2] = [1, 8];
/// Most bytes of a saved run.
const MOST_SAVED: u64 = 1 << 20;

pub(crate) async fn run(args: &BenchArgs, log: &LogArgs) -> Result<(), Failure> {
    if let Some(time) = args.soak {
        return super::bench_soak::run(args, time).await;
    }
    if args.chaos {
        return super::bench_chaos::run(args, log).await;
    }
    let ignored = ModelDefaults::Ignored;
    with_backend(&args.target, args.compute, ignored, log, |backend, stats| rates(args, backend, stats)).await
}

async fn rates(args: &BenchArgs, mut backend: Backend, stats: Option<StatsHandle>) -> Result<(), Failure> {
    let about = backend.about().await?;
    let saved = args.against.as_deref().map(saved).transpose()?;
    let clock = match (stats, &args.metrics) {
        (Some(stats), _) => Clock::Samples(stats),
        (None, Some(url)) => Clock::Metrics(Metrics::at(url).ok_or_else(|| {
            Failure::input(format!("--metrics: {url:?} is no address; write http://host:port"))
        })?),
        (None, None) => Clock::None,
    };
    let concurrency = if args.concurrency.is_empty() { &CONCURRENCY[..] } else { &args.concurrency };
    let plan = Plan {
        prompt_tokens: args.prompt_tokens,
        output_tokens: args.output_tokens,
        concurrency: concurrency.to_vec(),
        rounds: args.rounds,
    };
    let report = measure(&plan, about.model, &backend, &clock).await?;
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
