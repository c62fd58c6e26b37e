//! Compute threads of processes that share this machine.

use std::num::{NonZeroU32, NonZeroUsize};
use std::thread::available_parallelism;

/// Cores of this machine available to this process.
pub(crate) fn cores() -> NonZeroUsize {
    available_parallelism().unwrap_or(NonZeroUsize::MIN)
}

/// Compute threads of a router and of each of its workers, when they share this machine.
///
/// A router waits while its workers compute and the other way round, so it may use every core. Workers compute at the
/// same time but seldom the same amount, so together they get twice the cores: the busier one uses what the other
/// leaves idle.
pub(crate) fn shares_of_cores(workers: NonZeroU32) -> (NonZeroUsize, NonZeroUsize) {
    let cores = cores();
    let each = (2 * cores.get()).div_ceil(workers.get() as usize).min(cores.get());
    (cores, NonZeroUsize::new(each).unwrap_or(NonZeroUsize::MIN))
}
