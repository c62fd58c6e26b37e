//! The network's one runtime, and the turns of the two threads that drive it.
//!
//! A current-thread runtime makes progress only inside `block_on`, and one thread at a time is in there. The *owner*
//! (a router's engine thread, a worker's experts' thread) drives it while it waits for the other side, so that a message
//! on its way to or from the owner wakes no thread of this process. While the owner computes, the *keeper* thread drives:
//! at once when the owner lends it the runtime, else once the owner has been away for [`AWAY`]. The owner takes the
//! runtime back whenever it has something to wait for.
//!
//! Always holds: while neither thread is stuck in a task, one of them drives within [`AWAY`] or is about to; a hand-over
//! wakes one thread, and none happens between the layers of a step; an idle process has no wake-ups. [`Driver::drop`]
//! stops the threads, and the runtime's tasks are dropped with its last user.
//!
//! It does not know what the runtime's tasks are.

use std::future::Future;
use std::io;
use std::pin::pin;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::task::Poll;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::runtime::{Builder, Handle, Runtime};
use tokio::sync::Notify;

/// Time that the owner may be away before the keeper takes its place.
const AWAY: Duration = Duration::from_millis(10);

/// A runtime with its keeper thread.
pub(crate) struct Driver {
    core: Arc<Core>,
    keeper: Option<JoinHandle<()>>,
}

/// The owner's handle to the runtime. Does not keep it alive.
#[derive(Clone)]
pub(crate) struct Reins(Weak<Core>);

struct Core {
    /// `Some` until dropped.
    runtime: Option<Runtime>,
    handle: Handle,
    turn: Mutex<Turn>,
    /// Wakes the keeper where it waits for its turn.
    offered: Condvar,
    /// Wakes the keeper out of the runtime.
    recalled: Notify,
    /// Ends the owner's waiting when all is over.
    ended: Notify,
}

#[derive(Default)]
struct Turn {
    /// The owner drives, or waits for the keeper to let it.
    owner: bool,
    /// Number of times that it came or went.
    moves: u64,
    /// It asked the keeper to drive at once.
    lent: bool,
    /// The keeper waits until it is woken, since the owner drives for long.
    asleep: bool,
    closed: bool,
}

impl Driver {
    /// A runtime that is driven from now on, by a keeper thread of this name.
    pub(crate) fn start(name: &str) -> io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let core = Arc::new(Core {
            handle: runtime.handle().clone(),
            runtime: Some(runtime),
            turn: Mutex::new(Turn { lent: true, ..Turn::default() }),
            offered: Condvar::new(),
            recalled: Notify::new(),
            ended: Notify::new(),
        });
        let keeping = Arc::clone(&core);
        let keeper = std::thread::Builder::new().name(name.to_owned()).spawn(move || keeping.keep())?;
        Ok(Self { core, keeper: Some(keeper) })
    }

    /// Runs a task on it.
    pub(crate) fn spawn<T: Send + 'static>(
        &self,
        task: impl Future<Output = T> + Send + 'static,
    ) -> tokio::task::JoinHandle<T> {
        self.core.handle.spawn(task)
    }

    /// Handle to run tasks on it from any thread, while it lives.
    pub(crate) fn handle(&self) -> Handle {
        self.core.handle.clone()
    }

    /// For the owner, of which there is one.
    pub(crate) fn reins(&self) -> Reins {
        Reins(Arc::downgrade(&self.core))
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        self.core.turn().closed = true;
        self.core.offered.notify_all();
        self.core.recalled.notify_one();
        self.core.ended.notify_one();
        if let Some(keeper) = self.keeper.take() {
            // A panic over there is in the log already.
            let _ = keeper.join();
        }
    }
}

impl Reins {
    /// Drives the runtime on this thread until `work` is done; `None` when the driver is gone before that.
    ///
    /// Not to be called from an asynchronous task, which must not block.
    pub(crate) fn drive<T>(&self, work: impl Future<Output = T>) -> Option<T> {
        let core = self.0.upgrade()?;
        let turn = core.take();
        // After the driver's drop no owner gets in; one inside is notified.
        if core.turn().closed {
            return None;
        }
        let outcome = core.runtime.as_ref().and_then(|runtime| runtime.block_on(core.until_ended(work)));
        drop(turn);
        outcome
    }

    /// Lets the keeper drive until the next [`Self::drive`], for an owner that is away for long.
    pub(crate) fn lend(&self) {
        let Some(core) = self.0.upgrade() else { return };
        core.turn().lent = true;
        core.offered.notify_one();
    }
}

/// The owner's turn. Ends when dropped, also by a panic.
struct Taken<'a>(&'a Core);

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        let mut turn = self.0.turn();
        turn.owner = false;
        turn.moves += 1;
        if turn.asleep {
            self.0.offered.notify_one();
        }
    }
}

impl Core {
    fn turn(&self) -> MutexGuard<'_, Turn> {
        // Nothing panics while it holds the lock.
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self) -> Taken<'_> {
        let mut turn = self.turn();
        turn.owner = true;
        turn.lent = false;
        turn.moves += 1;
        drop(turn);
        // Kept for the keeper's next turn when it has none now; it looks at the turn before it believes it.
        self.recalled.notify_one();
        Taken(self)
    }

    /// Runs `work` until it is done or the driver is dropped.
    async fn until_ended<T>(&self, work: impl Future<Output = T>) -> Option<T> {
        let mut work = pin!(work);
        let mut ended = pin!(self.ended.notified());
        std::future::poll_fn(|cx| match work.as_mut().poll(cx) {
            Poll::Ready(done) => Poll::Ready(Some(done)),
            Poll::Pending => ended.as_mut().poll(cx).map(|()| None),
        })
        .await
    }

    /// The keeper's life.
    fn keep(&self) {
        while self.wait_for_turn() {
            let Some(runtime) = &self.runtime else { return };
            runtime.block_on(async {
                while !self.is_recalled() {
                    self.recalled.notified().await;
                }
            });
        }
    }

    fn is_recalled(&self) -> bool {
        let turn = self.turn();
        turn.owner || turn.closed
    }

    /// Waits until the owner has lent the runtime or has been away for [`AWAY`]; false once closed.
    fn wait_for_turn(&self) -> bool {
        let mut turn = self.turn();
        let (mut moves, mut since) = (turn.moves, Instant::now());
        loop {
            if turn.closed {
                return false;
            }
            if !turn.owner && turn.lent {
                return true;
            }
            let left = AWAY.saturating_sub(since.elapsed());
            if left.is_zero() {
                if moves != turn.moves {
                    (moves, since) = (turn.moves, Instant::now());
                    continue;
                }
                if !turn.owner {
                    return true;
                }
                turn.asleep = true;
                turn = self.offered.wait(turn).unwrap_or_else(PoisonError::into_inner);
                turn.asleep = false;
                (moves, since) = (turn.moves, Instant::now());
                continue;
            }
            turn = self.offered.wait_timeout(turn, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Drop for Core {
    fn drop(&mut self) {
        // The last user may be a task of another runtime, where waiting for this one is not allowed.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::sync::mpsc::{Receiver, channel};

    use tokio::sync::mpsc;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(20);

    fn driver() -> Driver {
        Driver::start("keeper").expect("a thread can be started")
    }

    /// A task that is there once it ran.
    fn task(driver: &Driver) -> Receiver<()> {
        let (done, seen) = channel();
        drop(driver.spawn(async move {
            tokio::task::yield_now().await;
            let _ = done.send(());
        }));
        seen
    }

    fn runs(driver: &Driver) {
        task(driver).recv_timeout(PATIENCE).expect("somebody drives");
    }

    #[test]
    fn the_keeper_drives_before_the_owner_comes_and_after_it_went() {
        let driver = driver();
        runs(&driver);
        assert_eq!(driver.reins().drive(async { 7 }), Some(7));
        runs(&driver);
    }

    #[test]
    fn the_owner_drives_while_it_waits() {
        let driver = driver();
        let reins = driver.reins();
        let (thread, seen) = channel();
        // Longer than the keeper's patience, so that it goes to sleep meanwhile.
        reins.drive(async {
            tokio::time::sleep(AWAY * 3).await;
            let here = async move { thread.send(std::thread::current().id()) };
            let _ = tokio::spawn(here).await;
        });
        assert_eq!(seen.recv_timeout(PATIENCE), Ok(std::thread::current().id()));
        runs(&driver);
    }

    #[test]
    fn what_is_lent_is_driven_and_can_be_had_back() {
        let driver = driver();
        let reins = driver.reins();
        let (ask, mut asked) = mpsc::channel::<u32>(1);
        let (answer, mut answers) = mpsc::channel::<u32>(1);
        drop(driver.spawn(async move {
            while let Some(number) = asked.recv().await {
                let _ = answer.send(number + 1).await;
            }
        }));
        // A lost wake or a turn that nobody has shows as a test that does not end.
        for round in 0..300 {
            match round % 3 {
                0 => reins.lend(),
                1 => runs(&driver),
                _ => {}
            }
            let back = reins.drive(async {
                ask.send(round).await.expect("the task is there");
                if round % 2 == 0 {
                    tokio::task::yield_now().await;
                }
                answers.recv().await
            });
            assert_eq!(back, Some(Some(round + 1)));
        }
    }

    #[test]
    fn an_owner_that_panics_gives_its_turn_back() {
        let driver = driver();
        let reins = driver.reins();
        let panicked = catch_unwind(AssertUnwindSafe(|| reins.drive(async { panic!("as a test") })));
        assert!(panicked.is_err());
        runs(&driver);
        assert_eq!(reins.drive(async { 1 }), Some(1));
    }

    #[test]
    fn the_end_ends_the_owner_s_waiting_and_drops_the_tasks() {
        let driver = driver();
        let reins = driver.reins();
        let (kept, dropped) = channel::<()>();
        drop(driver.spawn(async move {
            let _kept = kept;
            std::future::pending::<()>().await;
        }));
        let (entered, inside) = channel();
        let waiting = std::thread::spawn(move || {
            let outcome = reins.drive(async {
                let _ = entered.send(());
                std::future::pending::<()>().await;
            });
            (outcome, reins.drive(async {}))
        });
        inside.recv_timeout(PATIENCE).expect("the owner drives");
        drop(driver);
        assert_eq!(waiting.join().expect("the owner ends"), (None, None));
        assert!(dropped.recv_timeout(PATIENCE).is_err(), "nobody sends");
        assert_eq!(dropped.try_recv(), Err(std::sync::mpsc::TryRecvError::Disconnected));
    }
}
