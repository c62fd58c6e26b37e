//! Places for sequences on their way into the batch, taken at the edge before any work is done for a request.
//!
//! Always holds: no more sequences wait than the limit, beside those that the batch has room for; no request is
//! admitted whose first sequence would wait longer than the longest allowed wait; a place comes back when its sequence
//! runs or is dropped. Refusals do not involve the engine, which may be in the middle of a step.
//!
//! Until a first place has come free the wait is unknown, and as many sequences as the batch holds may wait.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::request::{Overload, RequestError};

/// The queue of one router.
#[derive(Debug)]
pub(crate) struct Queue {
    /// Most sequences that wait beside those that the batch has room for.
    limit: usize,
    /// Longest expected wait of an admitted request.
    patience: Duration,
    /// Sequences of a full batch, and the most that may wait while the wait is unknown.
    batch: usize,
    now: Mutex<Now>,
}

#[derive(Debug)]
struct Now {
    /// Places taken.
    taken: usize,
    /// Taken places whose sequences fit into the batch at once.
    room: usize,
    /// Mean time between free places in a full batch; `None` until one came free.
    turn: Option<Duration>,
}

/// The place of one sequence.
#[derive(Debug)]
pub(crate) struct QueuePlace(Arc<Queue>);

impl Queue {
    /// An empty queue in front of a batch of `batch` sequences.
    pub(crate) fn new(limit: usize, batch: usize, patience: Duration) -> Arc<Self> {
        Arc::new(Self { limit, patience, batch, now: Mutex::new(Now { taken: 0, room: batch, turn: None }) })
    }

    /// Takes a place for each of `count` sequences, or none.
    ///
    /// # Errors
    /// When the queue is full, or the first of the sequences would wait too long.
    pub(crate) fn take(self: &Arc<Self>, count: u32) -> Result<Vec<QueuePlace>, RequestError> {
        self.try_take(count as usize).map_err(Overload::refuse)
    }

    fn try_take(self: &Arc<Self>, count: usize) -> Result<Vec<QueuePlace>, Overload> {
        let mut now = self.now();
        if (now.taken + count).saturating_sub(now.room) > self.limit {
            return Err(Overload::Queue { limit: self.limit });
        }
        // Places that must come free before the first sequence runs, its own included.
        let turns = (now.taken + 1).saturating_sub(now.room);
        match now.turn {
            None if turns > self.batch => return Err(Overload::Start { waiting: turns - 1 }),
            None => {}
            Some(turn) => {
                let expected = turn.saturating_mul(u32::try_from(turns).unwrap_or(u32::MAX));
                if expected > self.patience {
                    return Err(Overload::Wait { expected, limit: self.patience });
                }
            }
        }
        now.taken += count;
        drop(now);
        Ok((0..count).map(|_| QueuePlace(Arc::clone(self))).collect())
    }

    /// Publishes the batch's free room and the mean time between free places. Sequences that now run release their
    /// places after this.
    pub(crate) fn publish(&self, room: usize, turn: Option<Duration>) {
        let mut now = self.now();
        (now.room, now.turn) = (room, turn);
    }

    fn now(&self) -> MutexGuard<'_, Now> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for QueuePlace {
    fn drop(&mut self) {
        self.0.now().taken -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn refusal(queue: &Arc<Queue>, count: u32) -> Overload {
        match queue.take(count) {
            Err(RequestError::Overloaded(overload)) => overload,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_can_run_at_once_does_not_count_as_waiting() {
        let queue = Queue::new(1, 4, SECOND);
        let running = queue.take(4).unwrap();
        let waiting = queue.take(1).unwrap();
        assert_eq!(refusal(&queue, 1), Overload::Queue { limit: 1 });
        // The sequences run now.
        queue.publish(0, None);
        drop(running);
        assert_eq!(refusal(&queue, 1), Overload::Queue { limit: 1 });
        // A place in the batch comes free.
        queue.publish(1, None);
        let next = queue.take(1).unwrap();
        assert_eq!(refusal(&queue, 1), Overload::Queue { limit: 1 });
        drop(waiting);
        assert!(queue.take(1).is_ok());
        drop(next);
    }

    #[test]
    fn choices_are_taken_together_or_not_at_all() {
        let queue = Queue::new(2, 1, SECOND);
        assert_eq!(refusal(&queue, 4), Overload::Queue { limit: 2 });
        assert_eq!(queue.take(3).unwrap().len(), 3);
    }

    #[test]
    fn a_first_burst_waits_for_one_batch_at_most() {
        let queue = Queue::new(100, 4, SECOND);
        let mut taken = Vec::new();
        taken.extend(queue.take(4).unwrap());
        // A request of many choices counts as one: its first sequence gets the next place.
        taken.extend(queue.take(4).unwrap());
        assert_eq!(refusal(&queue, 1), Overload::Start { waiting: 4 });
        // The first four run, and one of them ends.
        queue.publish(0, Some(SECOND / 8));
        taken.drain(..4);
        assert!(queue.take(1).is_ok());
    }

    #[test]
    fn nobody_is_let_in_to_wait_too_long() {
        let queue = Queue::new(100, 1, SECOND);
        queue.publish(0, Some(SECOND / 4));
        let waiting = queue.take(4).unwrap();
        let expected = SECOND * 5 / 4;
        assert_eq!(refusal(&queue, 1), Overload::Wait { expected, limit: SECOND });
        drop(waiting);
        queue.publish(0, Some(SECOND * 2));
        assert_eq!(refusal(&queue, 1), Overload::Wait { expected: SECOND * 2, limit: SECOND });
        // A request that need not wait is admitted at any rate.
        queue.publish(1, Some(SECOND * 2));
        assert!(queue.take(1).is_ok());
    }
}
