//! Threads for the work on a request that comes before the engine: parsing, rendering, tokenizing.
//!
//! What must hold: so much of it and no more waits, in jobs and in bytes, and what does not fit is refused at once; the
//! threads run behind those that compute, and short work does not stand behind long; work that nobody waits for any more is
//! left, at the latest at its next question. Knows nothing of what the work is.

use std::io;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use tokio::sync::oneshot;

use crate::request::{Overload, RequestError};

/// Bytes up to which work is short: some tens of milliseconds of tokenizing at most.
const SHORT: usize = 32 << 10;
/// Short jobs that may wait, and long ones.
const WAITING: [usize; 2] = [128, 32];
/// Bytes of all jobs together that wait or are worked on.
const HELD: usize = 48 << 20;
/// How far behind compute threads each kind stands, as `nice` counts.
const NICE: [i32; 2] = [2, 10];
/// Names of threads.
const NAMES: [&str; 2] = ["muster-text", "muster-long"];

type Job = Box<dyn FnOnce() + Send>;

/// The threads. They end when the last clone is gone.
#[derive(Debug, Clone)]
pub(crate) struct TextPool {
    /// For short work and for long.
    lanes: [SyncSender<Job>; 2],
    held: Arc<AtomicUsize>,
}

/// Asked by work that takes long whether somebody still waits for it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Wanted(Arc<AtomicBool>);

impl Wanted {
    pub(crate) fn is_wanted(&self) -> bool {
        !self.0.load(Ordering::Relaxed)
    }
}

/// Says so when the one who waits is gone.
struct Waits(Wanted);

impl Drop for Waits {
    fn drop(&mut self) {
        self.0.0.store(true, Ordering::Relaxed);
    }
}

/// Bytes of a job, counted while it is there.
struct Held {
    all: Arc<AtomicUsize>,
    bytes: usize,
}

impl Held {
    fn take(all: &Arc<AtomicUsize>, bytes: usize) -> Option<Self> {
        let more = |held: usize| held.checked_add(bytes).filter(|&held| held <= HELD);
        all.try_update(Ordering::Relaxed, Ordering::Relaxed, more).ok()?;
        Some(Self { all: Arc::clone(all), bytes })
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.all.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

impl TextPool {
    /// Starts the threads: one of each kind for four cores.
    ///
    /// # Errors
    /// The system's, when it gives no thread.
    pub(crate) fn start() -> io::Result<Self> {
        let threads = thread::available_parallelism().map_or(1, NonZeroUsize::get).div_ceil(4).min(4);
        let lane = |lane: usize| {
            let (sender, jobs) = sync_channel::<Job>(WAITING[lane]);
            let jobs = Arc::new(Mutex::new(jobs));
            for index in 0..threads {
                let jobs = Arc::clone(&jobs);
                let thread = thread::Builder::new().name(format!("{}-{index}", NAMES[lane]));
                thread.spawn(move || work(&jobs, NICE[lane]))?;
            }
            io::Result::Ok(sender)
        };
        Ok(Self { lanes: [lane(0)?, lane(1)?], held: Arc::default() })
    }

    /// Does `work` on about `bytes` bytes and waits for it.
    ///
    /// # Errors
    /// [`Overload::Text`] when too much waits already; `Internal` when the work panicked.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        bytes: usize,
        work: impl FnOnce(&Wanted) -> T + Send + 'static,
    ) -> Result<T, RequestError> {
        let refused = || Overload::Text.refuse();
        let held = Held::take(&self.held, bytes).ok_or_else(refused)?;
        let (done, result) = oneshot::channel();
        let wanted = Wanted::default();
        let _waits = Waits(wanted.clone());
        let job = move || {
            let held = held;
            if wanted.is_wanted() {
                let result = work(&wanted);
                // What the work was done on is gone before anybody learns of it.
                drop(held);
                let _ = done.send(result);
            }
        };
        let lane = usize::from(bytes > SHORT);
        self.lanes[lane].try_send(Box::new(job)).map_err(|error| match error {
            TrySendError::Full(_) => refused(),
            TrySendError::Disconnected(_) => RequestError::Internal,
        })?;
        result.await.map_err(|_| RequestError::Internal)
    }

    /// Bytes of all work that waits or is worked on.
    #[cfg(test)]
    pub(crate) fn held(&self) -> usize {
        self.held.load(Ordering::Relaxed)
    }
}

fn work(jobs: &Mutex<Receiver<Job>>, nice: i32) {
    // Of this thread. Where the system refuses, it only runs beside the others.
    if let Err(error) = rustix::process::setpriority_process(None, nice) {
        tracing::debug!(%error, "text threads run at the priority of the others");
    }
    loop {
        // Held while waiting: one waits for a job, the others for their turn to.
        let job = jobs.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(job) = job else { return };
        if std::panic::catch_unwind(std::panic::AssertUnwindSafe(job)).is_err() {
            tracing::error!("work on a request failed");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    const LONG: usize = SHORT + 1;
    const MOMENT: Duration = Duration::from_secs(20);

    /// Work that goes on until somebody says so; the second is told that it has begun.
    fn blocked(
        pool: &TextPool,
        bytes: usize,
    ) -> (std::sync::mpsc::Sender<()>, oneshot::Receiver<()>, tokio::task::JoinHandle<Result<(), RequestError>>)
    {
        let (go_on, wait) = std::sync::mpsc::channel::<()>();
        let (begun, has_begun) = oneshot::channel();
        let pool = pool.clone();
        let run = async move {
            let work = move |_: &Wanted| {
                let _ = begun.send(());
                let _ = wait.recv();
            };
            pool.run(bytes, work).await
        };
        (go_on, has_begun, tokio::spawn(run))
    }

    #[tokio::test]
    async fn what_does_not_fit_is_refused_at_once() {
        let pool = TextPool::start().unwrap();
        let (go_on, begun, first) = blocked(&pool, HELD);
        begun.await.unwrap();
        assert_eq!(pool.held(), HELD);
        assert_eq!(pool.run(1, |_| ()).await, Err(RequestError::Overloaded(Overload::Text)));
        drop(go_on);
        assert_eq!(first.await.unwrap(), Ok(()));
        assert_eq!(pool.held(), 0);
        assert_eq!(pool.run(1, |_| 7).await, Ok(7));
    }

    #[tokio::test]
    async fn jobs_that_wait_are_counted_and_short_ones_do_not_wait_for_long_ones() {
        let pool = TextPool::start().unwrap();
        let mut all = Vec::new();
        loop {
            let (go_on, mut begun, mut job) = blocked(&pool, LONG);
            // Refused at once, begun, or left waiting.
            if let Ok(refused) = timeout(Duration::from_millis(5), &mut job).await {
                assert_eq!(refused.unwrap(), Err(RequestError::Overloaded(Overload::Text)));
                break;
            }
            let _ = begun.try_recv();
            all.push((go_on, job));
            assert!(all.len() <= 4 + WAITING[1] + 1, "nothing is refused");
        }
        assert!(all.len() >= WAITING[1]);
        assert_eq!(timeout(MOMENT, pool.run(SHORT, |_| 7)).await.unwrap(), Ok(7));
        for (go_on, job) in all {
            drop(go_on);
            assert_eq!(job.await.unwrap(), Ok(()));
        }
    }

    #[tokio::test]
    async fn work_is_left_when_its_client_has_gone() {
        let pool = TextPool::start().unwrap();
        let (begun, has_begun) = oneshot::channel();
        let (ended, has_ended) = oneshot::channel();
        let endless = move |wanted: &Wanted| {
            let _ = begun.send(());
            while wanted.is_wanted() {
                thread::yield_now();
            }
            let _ = ended.send(());
        };
        let client = tokio::spawn({
            let pool = pool.clone();
            async move { pool.run(LONG, endless).await }
        });
        has_begun.await.unwrap();
        client.abort();
        timeout(MOMENT, has_ended).await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_panic_is_an_error_and_the_threads_go_on() {
        let pool = TextPool::start().unwrap();
        for _ in 0..3 {
            let failed: Result<(), _> = pool.run(1, |_| panic!("on purpose")).await;
            assert_eq!(failed, Err(RequestError::Internal));
        }
        assert_eq!(pool.run(1, |_| 7).await, Ok(7));
        assert_eq!(pool.held(), 0);
    }
}
