//! Threads for the work on a request that comes before the engine: parsing, rendering, tokenizing.
//!
//! Always holds: waiting work is bounded in jobs and bytes, and excess is refused at once; the threads run at lower
//! priority than compute threads, and short work never queues behind long; abandoned work stops, at the latest at its
//! next check of [`Wanted`]. Knows nothing of what the work is.

use std::io;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use tokio::sync::oneshot;

use crate::request::{Overload, RequestError};

/// Most bytes of short work: some tens of milliseconds of tokenizing.
const SHORT: usize = 32 << 10;
/// Most waiting jobs, short and long.
const WAITING: [usize; 2] = [128, 32];
/// Most bytes of all jobs that wait or run.
const HELD: usize = 48 << 20;
/// Niceness of the threads for short and for long work.
const NICE: [i32; 2] = [2, 10];
/// Names of the threads.
const NAMES: [&str; 2] = ["muster-text", "muster-long"];

type Job = Box<dyn FnOnce() + Send>;

/// The thread pool. It ends when the last clone is gone.
#[derive(Debug, Clone)]
pub(crate) struct TextPool {
    /// Queues for short and for long work.
    lanes: [SyncSender<Job>; 2],
    held: Arc<AtomicUsize>,
}

/// Whether the result of some work is still wanted; long work checks it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Wanted(Arc<AtomicBool>);

impl Wanted {
    pub(crate) fn is_wanted(&self) -> bool {
        !self.0.load(Ordering::Relaxed)
    }
}

/// Clears [`Wanted`] when dropped.
struct Waits(Wanted);

impl Drop for Waits {
    fn drop(&mut self) {
        self.0.0.store(true, Ordering::Relaxed);
    }
}

/// Bytes of a job, counted until dropped.
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
    /// Starts the threads: one of each kind per four cores, at most four.
    ///
    /// # Errors
    /// The system's, when a thread cannot be started.
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

    /// Runs `work` on about `bytes` bytes and waits for it.
    ///
    /// # Errors
    /// [`Overload::Text`] when too much work waits; `Internal` when the work panicked.
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
                // Released before the result is visible.
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

    /// Bytes of all jobs that wait or run.
    #[cfg(test)]
    pub(crate) fn held(&self) -> usize {
        self.held.load(Ordering::Relaxed)
    }
}

fn work(jobs: &Mutex<Receiver<Job>>, nice: i32) {
    // Of this thread only. If refused, it runs at normal priority.
    if let Err(error) = rustix::process::setpriority_process(None, nice) {
        tracing::debug!(%error, "text threads run at the priority of the others");
    }
    loop {
        // The lock is held while waiting: one thread waits for a job, the others for the lock.
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

    /// Work that blocks until released; the receiver learns that it has begun.
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
            // Refused at once, running, or still waiting.
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
