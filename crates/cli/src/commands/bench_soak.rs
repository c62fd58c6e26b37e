//! `muster bench --soak`: endless streams against a running cluster, each compared with its first run.
//!
//! Shows that a change to a serving cluster goes unnoticed by clients.

use std::time::{Duration, Instant};

use muster_bench::Streams;
use muster_bench::soak::{Count, Soak};
use tokio::task::LocalSet;

use crate::args::BenchArgs;
use crate::backend::{self, Backend, DEFAULT_GRPC};
use crate::failure::Failure;
use crate::signals::Signals;
use crate::{out, text};

/// Default number of concurrent streams.
const STREAMS: u32 = 16;
/// Interval of the reports.
const TELL: Duration = Duration::from_secs(1);

pub(crate) async fn run(args: &BenchArgs, time: Duration) -> Result<(), Failure> {
    let mut signals = Signals::listen()?;
    LocalSet::new().run_until(soak(args, time, &mut signals)).await
}

async fn soak(args: &BenchArgs, time: Duration, signals: &mut Signals) -> Result<(), Failure> {
    let default = [DEFAULT_GRPC.to_owned()];
    let addresses = if args.target.grpc.is_empty() { &default[..] } else { &args.target.grpc };
    let streams = args.concurrency.iter().copied().max().unwrap_or(STREAMS);
    let mut backends = Vec::new();
    for _ in 0..streams {
        // One connection per stream, so that they spread over the routers behind one name.
        backends.push(Backend::Router(backend::connect(addresses, &args.target.credentials).await?));
    }
    let Some(first) = backends.first_mut() else { return Ok(()) };
    let about = signals.unless(first.about()).await?.model;
    let kind = Streams::of(&about);
    let soak = signals.unless(async { Ok(Soak::start(kind, backends).await?) }).await?;
    let started = Instant::now();
    let mut ticks = tokio::time::interval(TELL);
    loop {
        tokio::select! {
            _ = ticks.tick() => tell(args.json, &soak.look())?,
            () = signals.next() => break,
            () = tokio::time::sleep(time.saturating_sub(started.elapsed())) => break,
        }
    }
    let count = soak.look();
    drop(soak);
    tell(args.json, &count)?;
    let Count { streams: runs, failed, different, longest_pause_ms, .. } = count;
    if !args.json {
        out::line(&format!(
            "{}: {runs} streams of {} tokens, {streams} at a time: {failed} failed, {different} differ from their first run; \
             longest pause {}",
            about.name,
            kind.tokens,
            text::span(Duration::from_millis(longest_pause_ms)),
        ))?;
    }
    if failed + different > 0 {
        return Err(Failure::runtime(format!(
            "{} streams failed or gave other tokens than at first",
            failed + different
        )));
    }
    Ok(())
}

/// Reports the counts: each time as JSON, every five seconds as text.
fn tell(json: bool, count: &Count) -> Result<(), Failure> {
    if json {
        return out::line(&serde_json::to_string(count).map_err(Failure::runtime)?);
    }
    let Count { seconds, streams, failed, different, pause_ms, .. } = count;
    if *seconds > 0 && seconds.is_multiple_of(5) {
        out::note(&format!(
            "{seconds} s: {streams} streams, {failed} failed, {different} different, longest pause lately {pause_ms} ms"
        ));
    }
    Ok(())
}
