//! `muster bench --soak`: streams without end against a running cluster, each compared with its first run.
//!
//! For whoever changes a cluster that serves, and wants to see that nobody notices.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::{Duration, Instant};

use serde::Serialize;
use tokio::task::{JoinSet, LocalSet};

use super::bench_streams::Streams;
use crate::args::BenchArgs;
use crate::backend::{self, Backend, DEFAULT_GRPC};
use crate::failure::Failure;
use crate::signals::Signals;
use crate::{out, text};

/// Streams at a time when nobody says how many.
const STREAMS: u32 = 16;
/// How often it is told how things are.
const TELL: Duration = Duration::from_secs(1);
/// Pause after a stream that failed, so that a cluster that is gone is not flooded.
const AFTER_FAILURE: Duration = Duration::from_millis(200);

/// What came of all streams so far.
#[derive(Debug, Clone, Default, Serialize)]
struct Count {
    seconds: u64,
    streams: u64,
    tokens: u64,
    /// Streams that ended with an error.
    failed: u64,
    /// Streams that gave other tokens than the first time.
    different: u64,
    /// Longest pause between two tokens of a stream, milliseconds: since the line before, and of all.
    pause_ms: u64,
    longest_pause_ms: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    last_error: Option<String>,
}

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
        // Connections of their own, so that they are spread over the routers behind one name.
        backends.push(Backend::Router(backend::connect(addresses, &args.target.credentials).await?));
    }
    let Some(first) = backends.first_mut() else { return Ok(()) };
    let about = signals.unless(first.about()).await?;
    let kind = Streams::new(about.context, about.vocabulary);
    let mut expected = Vec::new();
    for (n, backend) in (0..streams).zip(&backends) {
        expected.push(signals.unless(kind.run(n, backend.clone(), |_| {})).await?.0);
    }
    let count = Rc::new(RefCell::new(Count::default()));
    let mut running = JoinSet::new();
    for ((n, backend), expected) in (0..streams).zip(backends).zip(expected) {
        running.spawn_local(again_and_again(kind, n, backend, expected, Rc::clone(&count)));
    }
    let started = Instant::now();
    let mut ticks = tokio::time::interval(TELL);
    loop {
        tokio::select! {
            _ = ticks.tick() => tell(args.json, &count, started)?,
            () = signals.next() => break,
            () = tokio::time::sleep(time.saturating_sub(started.elapsed())) => break,
        }
    }
    tell(args.json, &count, started)?;
    drop(running);
    let Count { streams: runs, failed, different, longest_pause_ms, .. } = count.borrow().clone();
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

async fn again_and_again(
    kind: Streams,
    n: u32,
    backend: Backend,
    expected: Vec<u32>,
    count: Rc<RefCell<Count>>,
) {
    loop {
        let counted = Rc::clone(&count);
        let run = kind.run(n, backend.clone(), move |pause| {
            let mut count = counted.borrow_mut();
            let pause = u64::try_from(pause.as_millis()).unwrap_or(u64::MAX);
            count.tokens += 1;
            count.pause_ms = count.pause_ms.max(pause);
            count.longest_pause_ms = count.longest_pause_ms.max(pause);
        });
        let outcome = run.await;
        {
            let mut count = count.borrow_mut();
            count.streams += 1;
            match outcome {
                Ok((ids, _)) if ids == expected => continue,
                Ok(_) => {
                    count.different += 1;
                    continue;
                }
                Err(failure) => {
                    count.failed += 1;
                    count.last_error = Some(format!("{failure:?}"));
                }
            }
        }
        tokio::time::sleep(AFTER_FAILURE).await;
    }
}

/// As a line of JSON; for people, in one line that is written over where there is something new to see.
fn tell(json: bool, count: &RefCell<Count>, started: Instant) -> Result<(), Failure> {
    let mut count = count.borrow_mut();
    count.seconds = started.elapsed().as_secs();
    let line = serde_json::to_string(&*count).map_err(Failure::runtime)?;
    let (before, now) = (count.pause_ms, &mut *count);
    now.pause_ms = 0;
    if json {
        return out::line(&line);
    }
    let Count { seconds, streams, failed, different, .. } = now;
    if *seconds > 0 && seconds.is_multiple_of(5) {
        out::note(&format!(
            "{seconds} s: {streams} streams, {failed} failed, {different} different, longest pause lately {before} ms"
        ));
    }
    Ok(())
}
