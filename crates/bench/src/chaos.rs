//! Streams during faults in a cluster, each compared, token by token, with its undisturbed run.

use std::cell::Cell;
use std::rc::Rc;
use std::time::{Duration, Instant};

use serde::Serialize;
use tokio::task::JoinSet;

use crate::stats::quantile;
use crate::{BenchError, Run, Streams, Target, text};

/// Deadline of a stream's first token.
const BEGIN: Duration = Duration::from_secs(60);

/// A fault injected into the cluster.
#[derive(Debug, Clone, Copy)]
pub enum Fault {
    /// A worker dies.
    KillWorker,
    /// A worker is stopped for a while.
    StopWorker,
    /// Every worker is restarted.
    RestartWorkers,
    /// The router dies and is restarted.
    KillRouter,
}

impl Fault {
    /// All faults, in the order of the report.
    pub const ALL: [Self; 4] = [Self::KillWorker, Self::StopWorker, Self::RestartWorkers, Self::KillRouter];

    /// Name in reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::KillWorker => "a worker gets SIGKILL",
            Self::StopWorker => "a worker stands still for 5 s (SIGSTOP)",
            Self::RestartWorkers => "all workers are restarted in turn (SIGTERM)",
            Self::KillRouter => "the router gets SIGKILL and is started again, clients resume",
        }
    }
}

/// Outcome of a fault.
#[derive(Debug, Serialize)]
pub struct Outcome {
    fault: &'static str,
    streams: usize,
    /// Streams still running when the fault was over.
    disturbed: usize,
    failed: usize,
    different: usize,
    /// Longest pause of each stream, milliseconds.
    pauses_ms: Vec<u64>,
    /// Errors of failed streams.
    #[serde(skip)]
    pub errors: Vec<BenchError>,
}

/// Concurrent streams.
#[derive(Debug, Clone)]
pub struct Load<T> {
    /// Target that generates them.
    pub target: T,
    /// Number of streams.
    pub streams: u32,
    /// Prompts and lengths.
    pub kind: Streams,
}

impl<T: Target> Load<T> {
    /// Runs all streams, and `fault` once each has a token. Also returns how many were still running when it was over.
    ///
    /// # Errors
    /// The error of `fault`; those of streams are in their runs.
    pub async fn run<E>(&self, fault: impl AsyncFnOnce() -> Result<(), E>) -> Result<(Vec<Run>, usize), E> {
        let (begun, ended) = (Rc::new(Cell::new(0)), Rc::new(Cell::new(0)));
        let mut running = JoinSet::new();
        for n in 0..self.streams {
            let (begun, ended) = (Rc::clone(&begun), Rc::clone(&ended));
            let mut has_begun = false;
            let stream = self.kind.run(n, self.target.clone(), move |_| {
                if !std::mem::replace(&mut has_begun, true) {
                    begun.set(begun.get() + 1);
                }
            });
            running.spawn_local(async move {
                let run = stream.await;
                ended.set(ended.get() + 1);
                (n, run)
            });
        }
        let deadline = Instant::now() + BEGIN;
        while begun.get() < self.streams && ended.get() < self.streams && Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let until = fault().await;
        let disturbed = self.streams - ended.get();
        let mut runs = Vec::new();
        while let Some(run) = running.join_next().await {
            match run {
                Ok(run) => runs.push(run),
                Err(panic) => std::panic::resume_unwind(panic.into_panic()),
            }
        }
        until?;
        runs.sort_by_key(|(n, _)| *n);
        Ok((runs.into_iter().map(|(_, run)| run).collect(), disturbed as usize))
    }
}

impl Outcome {
    /// Outcome of runs whose undisturbed tokens are `undisturbed`.
    #[must_use]
    pub fn of(fault: Fault, disturbed: usize, runs: Vec<Run>, undisturbed: &[Vec<u32>]) -> Self {
        let (mut errors, mut different, mut pauses_ms) = (Vec::new(), 0, Vec::new());
        let streams = runs.len();
        for (run, expected) in runs.into_iter().zip(undisturbed) {
            match run {
                Err(error) => errors.push(error),
                Ok((ids, _)) if ids != *expected => different += 1,
                Ok((_, pause)) => pauses_ms.push(u64::try_from(pause.as_millis()).unwrap_or(u64::MAX)),
            }
        }
        let failed = errors.len();
        Self { fault: fault.name(), streams, disturbed, failed, different, pauses_ms, errors }
    }

    /// Number of streams that failed or gave other tokens.
    #[must_use]
    pub const fn bad(&self) -> usize {
        self.failed + self.different
    }
}

/// Report of all outcomes, as text.
#[must_use]
pub fn table(outcomes: &[Outcome]) -> String {
    let rows: Vec<Vec<String>> = outcomes
        .iter()
        .map(|outcome| {
            let mut pauses: Vec<Duration> =
                outcome.pauses_ms.iter().map(|&pause| Duration::from_millis(pause)).collect();
            let mut at = |q| quantile(&mut pauses, q).map_or_else(|| "-".to_owned(), text::span);
            vec![
                outcome.fault.to_owned(),
                outcome.streams.to_string(),
                outcome.disturbed.to_string(),
                outcome.failed.to_string(),
                outcome.different.to_string(),
                at(0.5),
                at(0.99),
                at(1.0),
            ]
        })
        .collect();
    let header = ["fault", "streams", "running after", "failed", "different", "pause p50", "p99", "most"];
    text::table(&header, &rows)
}
