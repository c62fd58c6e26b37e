//! A child process that stays: started again when it dies, after ever longer pauses where that does not help.

use std::ffi::OsString;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use crate::children::{self, Listening, Running};
use crate::failure::Failure;
use crate::progress::Bar;

/// How long a child may take to end.
pub(crate) const GRACE: Duration = Duration::from_secs(10);
const FIRST_PAUSE: Duration = Duration::from_millis(250);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// A child that lived this long did not die of what killed it before.
const STEADY: Duration = Duration::from_secs(60);

/// A child to be kept.
pub(crate) struct Kept<A> {
    /// As it is called in messages.
    pub(crate) name: String,
    /// Its arguments; for every start but the first, with where it listened at first.
    pub(crate) arguments: A,
    /// Of the process that it is, or was last; 0 before the first.
    pub(crate) pid: Arc<AtomicU32>,
}

impl<A: Fn(Option<&Listening>) -> Vec<OsString>> Kept<A> {
    /// Runs the child until told to stop; starts it again whenever it dies. Whether it became ready the first time, and
    /// where it listens, is told once.
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

    /// Starts the child after a pause, and after ever longer pauses as long as that fails.
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
