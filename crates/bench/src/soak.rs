//! Endless streams, each compared with its first run.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::{Duration, Instant};

use serde::Serialize;
use tokio::task::JoinSet;

use crate::{BenchError, Streams, Target};

/// Pause after a failed stream, so that a cluster that is down is not flooded.
const AFTER_FAILURE: Duration = Duration::from_millis(200);

/// Counts over all streams so far.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Count {
    /// Seconds since the start.
    pub seconds: u64,
    /// Streams that ended.
    pub streams: u64,
    /// Tokens of all streams.
    pub tokens: u64,
    /// Streams that ended with an error.
    pub failed: u64,
    /// Streams that gave other tokens than the first time.
    pub different: u64,
    /// Longest pause between two tokens since the last [`look`](Soak::look), milliseconds.
    pub pause_ms: u64,
    /// Longest pause since the start, milliseconds.
    pub longest_pause_ms: u64,
    /// Error of the last failed stream.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_error: Option<String>,
}

/// Running streams, which end when dropped.
#[derive(Debug)]
pub struct Soak {
    count: Rc<RefCell<Count>>,
    started: Instant,
    _running: JoinSet<()>,
}

impl Soak {
    /// Runs one stream on each target, then repeats each for ever, on the caller's local set.
    ///
    /// # Errors
    /// When a first run fails.
    pub async fn start<T: Target>(kind: Streams, targets: Vec<T>) -> Result<Self, BenchError> {
        let mut expected = Vec::new();
        for (n, target) in (0..).zip(&targets) {
            expected.push(kind.run(n, target.clone(), |_| {}).await?.0);
        }
        let count = Rc::new(RefCell::new(Count::default()));
        let mut running = JoinSet::new();
        for ((n, target), expected) in (0..).zip(targets).zip(expected) {
            running.spawn_local(again_and_again(kind, n, target, expected, Rc::clone(&count)));
        }
        Ok(Self { count, started: Instant::now(), _running: running })
    }

    /// Current counts; restarts the measurement of pauses.
    pub fn look(&self) -> Count {
        let mut count = self.count.borrow_mut();
        count.seconds = self.started.elapsed().as_secs();
        let seen = count.clone();
        count.pause_ms = 0;
        seen
    }
}

async fn again_and_again<T: Target>(
    kind: Streams,
    n: u32,
    target: T,
    expected: Vec<u32>,
    count: Rc<RefCell<Count>>,
) {
    loop {
        let counted = Rc::clone(&count);
        let run = kind.run(n, target.clone(), move |pause| {
            let mut count = counted.borrow_mut();
            let pause = u64::try_from(pause.as_millis()).unwrap_or(u64::MAX);
            count.tokens += 1;
            count.pause_ms = count.pause_ms.max(pause);
            count.longest_pause_ms = count.longest_pause_ms.max(pause);
        });
        let outcome = run.await;
        let has_failed = outcome.is_err();
        {
            let mut count = count.borrow_mut();
            count.streams += 1;
            match outcome {
                Ok((ids, _)) => count.different += u64::from(ids != expected),
                Err(error) => {
                    count.failed += 1;
                    count.last_error = Some(error.to_string());
                }
            }
        }
        if has_failed {
            tokio::time::sleep(AFTER_FAILURE).await;
        }
    }
}
