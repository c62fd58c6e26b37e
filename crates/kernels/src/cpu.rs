//! The execution context: an instruction set and the threads that share the work of a call.
//!
//! What must hold: a result depends neither on the number of threads nor on which thread runs which task: each task
//! writes to a place of its own, and nothing is reduced across tasks. It does not know what the tasks compute.

use std::fmt;
use std::num::NonZeroUsize;

use crate::error::KernelError;
use crate::isa::Isa;
use crate::pool::Pool;

/// Multiply-adds below which sharing costs more than it gains (a few microseconds of work).
const INLINE_WORK: usize = 1 << 16;

/// What kernels run on: an instruction set and a pool of named threads (`muster-compute-N`).
///
/// The calling thread takes its share of the work and counts as one; with one thread there is no pool. Several threads
/// may call at a time; they share the pool.
pub struct Cpu {
    isa: Isa,
    threads: usize,
    helpers: Option<Pool>,
}

impl Cpu {
    /// A context of `threads` threads with the fastest instruction set of this machine.
    ///
    /// # Errors
    /// [`KernelError::Threads`] if the system refuses the threads.
    pub fn new(threads: NonZeroUsize) -> Result<Self, KernelError> {
        Self::with_isa(threads, Isa::detect())
    }

    /// A context of `threads` threads with a chosen instruction set.
    ///
    /// # Errors
    /// [`KernelError::IsaUnavailable`] if this machine lacks it, [`KernelError::Threads`] as for [`Cpu::new`].
    pub fn with_isa(threads: NonZeroUsize, isa: Isa) -> Result<Self, KernelError> {
        if !isa.is_available() {
            return Err(KernelError::IsaUnavailable { isa, best: Isa::detect() });
        }
        let threads = threads.get();
        let helpers = if threads == 1 {
            None
        } else {
            let pool = Pool::start("muster-compute", threads - 1)
                .map_err(|source| KernelError::Threads { threads, source })?;
            Some(pool)
        };
        Ok(Self { isa, threads, helpers })
    }

    /// The instruction set in use.
    #[must_use]
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Threads that share a call's work, the caller included.
    #[must_use]
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// Threads that a call of `work` multiply-adds uses: one where it is too small to share.
    pub(crate) fn threads_for(&self, work: usize) -> usize {
        if work < INLINE_WORK { 1 } else { self.threads }
    }

    /// Runs `task(0)..task(tasks - 1)`, each once, in any order; `work` is their total in multiply-adds.
    pub fn run(&self, tasks: usize, work: usize, task: &(dyn Fn(usize) + Sync)) {
        let threads = self.threads_for(work).min(tasks);
        match &self.helpers {
            Some(pool) if threads > 1 => pool.run(tasks, threads - 1, task),
            _ => (0..tasks).for_each(task),
        }
    }
}

impl fmt::Debug for Cpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cpu").field("isa", &self.isa).field("threads", &self.threads).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::sync::Mutex;

    use super::*;

    #[test]
    fn every_task_runs_once_whatever_the_threads() {
        for threads in 1..=5 {
            let cpu = Cpu::new(NonZeroUsize::new(threads).unwrap()).unwrap();
            for tasks in [0, 1, 2, 7, 1000] {
                let seen = Mutex::new(Vec::new());
                cpu.run(tasks, usize::MAX, &|index| seen.lock().unwrap().push(index));
                let mut seen = seen.into_inner().unwrap();
                seen.sort_unstable();
                assert_eq!(seen, (0..tasks).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn large_work_is_shared_between_named_threads_and_small_work_is_not() {
        let cpu = Cpu::new(NonZeroUsize::new(2).unwrap()).unwrap();
        let names = |work| {
            let names = Mutex::new(HashSet::new());
            // Both tasks of shared work must run at once before either ends.
            let barrier = std::sync::Barrier::new(if work < INLINE_WORK { 1 } else { 2 });
            cpu.run(2, work, &|_| {
                barrier.wait();
                names.lock().unwrap().insert(std::thread::current().name().map(str::to_owned));
            });
            names.into_inner().unwrap()
        };
        assert_eq!(names(INLINE_WORK - 1).len(), 1);
        let shared = names(INLINE_WORK);
        assert_eq!(shared.len(), 2);
        assert!(shared.contains(&Some("muster-compute-1".to_owned())));
    }
}
