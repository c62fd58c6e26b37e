//! Threads that share the tasks of one call after another, with minimal overhead between calls.
//!
//! What must hold: every task of a call runs exactly once; a call returns, or unwinds, only when none of its tasks runs
//! any more; a helper that wakes late, is preempted or sleeps delays only the task it has taken. Between calls a helper
//! polls for a while before it sleeps, because waking a sleeping thread takes longer than most calls; while it polls it
//! yields its core to other threads. It does not know what the tasks compute.

use std::any::Any;
use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// How long a helper polls for the next call before it sleeps. Longer than the time between two calls of a step.
const POLL_FOR: Duration = Duration::from_micros(300);
/// Polls that only pause; each later poll yields the core to another thread.
const PAUSES: u32 = 64;
/// Yields between two readings of the clock.
const OFFERS_PER_LOOK: u32 = 16;

/// Most tasks of a call.
pub(crate) const MAX_TASKS: usize = u32::MAX as usize;

/// Helping threads; the caller of [`Pool::run`] is one more.
pub(crate) struct Pool {
    shared: Arc<Shared>,
    /// Lock on the helpers: a concurrent call that does not get it runs its tasks alone.
    turn: Mutex<()>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    /// Number of the call in the high half, count of its untaken tasks in the low half.
    open: AtomicU64,
    /// The call in `open`.
    job: UnsafeCell<Option<Job>>,
    /// Tasks of the call that have ended.
    ended: AtomicUsize,
    /// Payload of the first task's panic.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    /// One per helper: set while it sleeps or is about to.
    asleep: Vec<AtomicBool>,
    stop: AtomicBool,
}

#[derive(Clone, Copy)]
struct Job {
    tasks: usize,
    task: *const (dyn Fn(usize) + Sync),
}

// SAFETY: `job` is written only by the call that has the turn, before `open` announces its tasks and while no task of
// the call before is left; it is read only by a thread that has taken one of those tasks. The closure it points to is
// `Sync` and outlives the call, which ends after the last task.
unsafe impl Sync for Shared {}
// SAFETY: the pointer in `job` may be used from any thread, as above.
unsafe impl Send for Shared {}

impl Pool {
    /// Starts `helpers` threads named `{name}-1`, `{name}-2`, …
    pub(crate) fn start(name: &str, helpers: usize) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            open: AtomicU64::new(0),
            job: UnsafeCell::new(None),
            ended: AtomicUsize::new(0),
            panic: Mutex::new(None),
            asleep: (0..helpers).map(|_| AtomicBool::new(false)).collect(),
            stop: AtomicBool::new(false),
        });
        let mut pool = Self { shared, turn: Mutex::new(()), threads: Vec::with_capacity(helpers) };
        for index in 0..helpers {
            let shared = pool.shared.clone();
            let thread = thread::Builder::new().name(format!("{name}-{}", index + 1));
            // Those that did start are stopped when `pool` is dropped.
            pool.threads.push(thread.spawn(move || shared.help(index))?);
        }
        Ok(pool)
    }

    /// Runs `task(0)..task(tasks - 1)` on the caller and up to `helpers` others.
    ///
    /// # Panics
    /// If a task does, once no other runs; or if there are more than [`MAX_TASKS`].
    pub(crate) fn run(&self, tasks: usize, helpers: usize, task: &(dyn Fn(usize) + Sync)) {
        assert!(tasks <= MAX_TASKS, "{tasks} tasks in one call");
        // Held while a task's panic unwinds, hence perhaps poisoned; the state is whole even then.
        let turn = match self.turn.try_lock() {
            Ok(turn) => Some(turn),
            Err(std::sync::TryLockError::Poisoned(turn)) => Some(turn.into_inner()),
            Err(std::sync::TryLockError::WouldBlock) => None,
        };
        let Some(turn) = turn.filter(|_| tasks > 1 && helpers > 0) else {
            (0..tasks).for_each(task);
            return;
        };
        let shared = &*self.shared;
        let call = shared.announce(tasks, task);
        for (asleep, thread) in shared.asleep.iter().zip(&self.threads).take(helpers.min(tasks - 1)) {
            if asleep.swap(false, Ordering::SeqCst) {
                thread.thread().unpark();
            }
        }
        shared.work(call);
        shared.wait(tasks);
        let panic = shared.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        drop(turn);
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        for thread in self.threads.drain(..) {
            thread.thread().unpark();
            // A helper catches the panics of its tasks, so `join` reports none.
            let _ = thread.join();
        }
    }
}

/// The number of a call.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Call(u32);

const fn unpack(open: u64) -> (Call, u32) {
    (Call((open >> 32) as u32), open as u32)
}

impl Shared {
    /// Opens the tasks of a new call.
    fn announce(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) -> Call {
        let (Call(last), _) = unpack(self.open.load(Ordering::Relaxed));
        let call = last.wrapping_add(1);
        // SAFETY: only the lifetime is forgotten; the call does not end before the last task has.
        let task: *const (dyn Fn(usize) + Sync + 'static) =
            unsafe { std::mem::transmute(std::ptr::from_ref(task)) };
        // SAFETY: this call has the turn and the call before has no task left, so no thread reads.
        unsafe { *self.job.get() = Some(Job { tasks, task }) };
        self.ended.store(0, Ordering::Relaxed);
        // Sequentially consistent with the helpers' store-then-load in `sleep`: one side sees the other.
        self.open.store(u64::from(call) << 32 | tasks as u64, Ordering::SeqCst);
        Call(call)
    }

    /// Takes tasks of `call` until none is left.
    fn work(&self, call: Call) {
        let mut ended = 0;
        let mut open = self.open.load(Ordering::Acquire);
        loop {
            let (now, left) = unpack(open);
            if now != call || left == 0 {
                break;
            }
            match self.open.compare_exchange_weak(open, open - 1, Ordering::AcqRel, Ordering::Acquire) {
                Err(found) => open = found,
                Ok(_) => {
                    // SAFETY: a task of this call is ours, so the call cannot end and its job stays as it is.
                    let job = unsafe { *self.job.get() };
                    if let Some(Job { tasks, task }) = job {
                        // SAFETY: as above: what it points to lives as long as the call.
                        let task = unsafe { &*task };
                        let run = AssertUnwindSafe(|| task(tasks - left as usize));
                        if let Err(panic) = catch_unwind(run) {
                            let mut first = self.panic.lock().unwrap_or_else(PoisonError::into_inner);
                            first.get_or_insert(panic);
                        }
                    }
                    ended += 1;
                    open = self.open.load(Ordering::Acquire);
                }
            }
        }
        if ended > 0 {
            self.ended.fetch_add(ended, Ordering::Release);
        }
    }

    /// Waits for the tasks that helpers have taken.
    fn wait(&self, tasks: usize) {
        let mut polls = 0;
        while self.ended.load(Ordering::Acquire) < tasks {
            poll(&mut polls);
        }
    }

    /// Loop of a helper.
    fn help(&self, index: usize) {
        let mut done = Call(0);
        while !self.stop.load(Ordering::SeqCst) {
            let (call, left) = unpack(self.open.load(Ordering::Acquire));
            if call != done && left > 0 {
                self.work(call);
                done = call;
            } else {
                self.await_call(index, done);
            }
        }
    }

    fn has_news(&self, done: Call) -> bool {
        let (call, left) = unpack(self.open.load(Ordering::SeqCst));
        (call != done && left > 0) || self.stop.load(Ordering::SeqCst)
    }

    fn await_call(&self, index: usize, done: Call) {
        let until = Instant::now() + POLL_FOR;
        let mut polls = 0;
        while !self.has_news(done) {
            poll(&mut polls);
            if polls > PAUSES && polls.is_multiple_of(OFFERS_PER_LOOK) && Instant::now() >= until {
                self.sleep(index, done);
                return;
            }
        }
    }

    fn sleep(&self, index: usize, done: Call) {
        let asleep = &self.asleep[index];
        asleep.store(true, Ordering::SeqCst);
        while asleep.load(Ordering::SeqCst) && !self.has_news(done) {
            thread::park();
        }
        asleep.store(false, Ordering::SeqCst);
    }
}

fn poll(polls: &mut u32) {
    *polls = polls.saturating_add(1);
    if *polls <= PAUSES {
        std::hint::spin_loop();
    } else {
        thread::yield_now();
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::sync::Barrier;
    use std::sync::atomic::AtomicU32;

    use super::*;

    fn pool(helpers: usize) -> Pool {
        Pool::start("test-pool", helpers).unwrap()
    }

    #[test]
    fn every_task_of_every_call_runs_once_also_when_helpers_sleep_between_calls() {
        for helpers in [1, 2, 4] {
            let pool = pool(helpers);
            for call in 0..2_000_usize {
                let tasks = call % 9;
                let runs: Vec<AtomicU32> = (0..tasks).map(|_| AtomicU32::new(0)).collect();
                pool.run(tasks, helpers, &|index| {
                    runs[index].fetch_add(1, Ordering::Relaxed);
                });
                assert!(runs.iter().all(|runs| runs.load(Ordering::Relaxed) == 1));
                if call % 200 == 0 {
                    thread::sleep(POLL_FOR * 4);
                }
            }
        }
    }

    #[test]
    fn a_sleeping_helper_is_woken() {
        let pool = pool(1);
        let asleep = || pool.shared.asleep[0].load(Ordering::SeqCst);
        for _ in 0..20 {
            while !asleep() {
                thread::yield_now();
            }
            // Returns only if two threads take part.
            let both = Barrier::new(2);
            pool.run(2, 1, &|_| {
                both.wait();
            });
        }
    }

    #[test]
    fn calls_at_the_same_time_do_not_wait_for_each_other() {
        let pool = pool(2);
        let inside = Barrier::new(2);
        thread::scope(|scope| {
            scope.spawn(|| {
                pool.run(2, 2, &|index| {
                    if index == 0 {
                        inside.wait();
                        inside.wait();
                    }
                });
            });
            inside.wait();
            let names = Mutex::new(HashSet::new());
            pool.run(4, 2, &|_| {
                names.lock().unwrap().insert(thread::current().id());
            });
            assert_eq!(names.into_inner().unwrap(), HashSet::from([thread::current().id()]));
            inside.wait();
        });
    }

    #[test]
    fn a_panic_comes_out_when_all_tasks_have_ended_and_the_pool_lives_on() {
        let pool = pool(2);
        for bad in [0, 7, 15] {
            let ended = AtomicU32::new(0);
            let call = AssertUnwindSafe(|| {
                pool.run(16, 2, &|index| {
                    assert_ne!(index, bad, "task {index}");
                    ended.fetch_add(1, Ordering::Relaxed);
                });
            });
            let panic = catch_unwind(call).unwrap_err();
            assert!(panic.downcast_ref::<String>().unwrap().contains(&format!("task {bad}")));
            assert_eq!(ended.load(Ordering::Relaxed), 15);
        }
        let runs = AtomicU32::new(0);
        pool.run(100, 2, &|_| {
            runs.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(runs.into_inner(), 100);
    }
}
