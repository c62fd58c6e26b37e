//! Places for sequences on their way into the batch: taken at the edge, at once, before any work is done for a request.
//!
//! What must hold: no more sequences wait than the queue holds, beside those that the batch has room for; nobody is let
//! in whose first sequence would wait longer than is worth waiting; a place comes back when its sequence runs or is gone,
//! whoever drops it. Whoever is refused is told without asking the engine, which may be in the middle of a step.
//!
//! Until a place has come free nothing says how long one takes; a burst at that time is let in up to one more batch.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::request::{Overload, RequestError};

/// The queue of one router.
#[derive(Debug)]
pub(crate) struct Queue {
    /// Sequences that may wait beside those that the batch has room for.
    limit: usize,
    /// Longest wait that a request is let in for.
    patience: Duration,
    /// Sequences that the batch holds: as many may wait before it is known how long a place takes.
    batch: usize,
    now: Mutex<Now>,
}

#[derive(Debug)]
struct Now {
    /// Places that are taken.
    taken: usize,
    /// How many of them may run as soon as the engine looks.
    room: usize,
    /// How often a place in a full batch comes free; `None` until one did.
    turn: Option<Duration>,
}

/// A place of one sequence.
#[derive(Debug)]
pub(crate) struct QueuePlace(Arc<Queue>);

impl Queue {
    /// None is taken, and the batch holds `batch`.
    pub(crate) fn new(limit: usize, batch: usize, patience: Duration) -> Arc<Self> {
        Arc::new(Self { limit, patience, batch, now: Mutex::new(Now { taken: 0, room: batch, turn: None }) })
    }

    /// Takes a place for each of `count` sequences, or none.
    ///
    /// # Errors
    /// When the queue is full, or the first of them would wait too long.
    pub(crate) fn take(self: &Arc<Self>, count: u32) -> Result<Vec<QueuePlace>, RequestError> {
        self.try_take(count as usize).map_err(Overload::refuse)
    }

    fn try_take(self: &Arc<Self>, count: usize) -> Result<Vec<QueuePlace>, Overload> {
        let mut now = self.now();
        if (now.taken + count).saturating_sub(now.room) > self.limit {
            return Err(Overload::Queue { limit: self.limit });
        }
        // Places that come free before the first of them has one, its own among them.
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

    /// Says what the engine has room for, and how often a place comes free. Whoever no longer waits gives its place back
    /// after this.
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
        // They run now.
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
        // A request of many choices is one request: its first sequence has the next place.
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
        // Whoever need not wait at all is let in, however slow it is.
        queue.publish(1, Some(SECOND * 2));
        assert!(queue.take(1).is_ok());
    }
}
