//! A child process that is restarted when it dies, after growing pauses while restarts fail.

use std::ffi::OsString;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use crate::children::{self, Listening, Running};
use crate::failure::Failure;
use crate::progress::Bar;

/// Grace period of a child's end.
pub(crate) const GRACE: Duration = Duration::from_secs(10);
const FIRST_PAUSE: Duration = Duration::from_millis(250);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// Lifetime after which a death is unrelated to the one before.
const STEADY: Duration = Duration::from_secs(60);

/// A child to keep running.
pub(crate) struct Kept<A> {
    /// Name in messages.
    pub(crate) name: String,
    /// Its arguments; restarts get the addresses of the first start.
    pub(crate) arguments: A,
    /// Process id of the current or last process; 0 before the first.
    pub(crate) pid: Arc<AtomicU32>,
}

impl<A: Fn(Option<&Listening>) -> Vec<OsString>> Kept<A> {
    /// Runs the child until `stop` and restarts it whenever it dies. `ready` gets the outcome of the first start, with
    /// the addresses.
    pub(crate) async fn keep(
        self,
        bar: Bar,
        ready: oneshot::Sender<Result<Listening, Failure>>,
        stop: CancellationToken,
    ) {
        let first = tokio::select! {
            first = self.start(&bar, None) => first,
            () = stop.cancelled() => return,
        };
        let (mut running, at) = match first {
            Ok(started) => started,
            Err(failure) => return drop(ready.send(Err(failure))),
        };
        if ready.send(Ok(at.clone())).is_err() {
            return running.stop(GRACE).await;
        }
        let mut pause = FIRST_PAUSE;
        loop {
            let since = Instant::now();
            let status = tokio::select! {
                status = running.exited() => status,
                () = stop.cancelled() => return running.stop(GRACE).await,
            };
            if since.elapsed() > STEADY {
                pause = FIRST_PAUSE;
            }
            tracing::warn!(child = self.name, %status, "died");
            running = tokio::select! {
                again = self.start_again(&bar, &at, &mut pause) => again,
                () = stop.cancelled() => return,
            };
            tracing::warn!(child = self.name, "is back");
        }
    }

    /// Restarts the child after a pause, and after growing pauses while that fails.
    async fn start_again(&self, bar: &Bar, at: &Listening, pause: &mut Duration) -> Running {
        loop {
            tokio::time::sleep(*pause).await;
            *pause = (*pause * 2).min(LONGEST_PAUSE);
            match self.start(bar, Some(at)).await {
                Ok((running, _)) => return running,
                Err(failure) => {
                    tracing::warn!(child = self.name, ?failure, ?pause, "cannot be started again yet");
                }
            }
        }
    }

    async fn start(&self, bar: &Bar, at: Option<&Listening>) -> Result<(Running, Listening), Failure> {
        let mut running = children::spawn(&self.name, &(self.arguments)(at))?;
        let listening = running.ready(|progress| bar.update(progress)).await?;
        bar.finish();
        self.pid.store(running.pid().unwrap_or(0), Ordering::Relaxed);
        Ok((running, listening))
    }
}
