//! Rate at which places in a full batch come free, from which waits in the queue are estimated.
//!
//! Only time with a full batch counts, because only then does a free place admit a waiting sequence. Has no clock of
//! its own; the same observations give the same answers.

use std::time::Duration;

use crate::smoothed::Smoothed;

/// Whether the batch has room for another sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Batch {
    HasRoom,
    Full,
}

/// Mean time between free places.
#[derive(Debug, Default)]
pub(crate) struct Turns {
    /// Seconds between two.
    between: Option<Smoothed>,
    /// Time with a full batch since the last free place; zero once the batch has room.
    since: Duration,
}

impl Turns {
    /// Records a stretch of time with the number of sequences that ended at its end.
    pub(crate) fn observe(&mut self, took: Duration, batch: Batch, ended: usize) {
        if batch == Batch::HasRoom {
            self.since = Duration::ZERO;
            return;
        }
        self.since += took;
        if ended > 0 {
            let each = std::mem::take(&mut self.since).as_secs_f64() / ended as f64;
            // Sequences that ended together count one by one.
            (0..ended.min(64)).for_each(|_| Smoothed::take(&mut self.between, each));
        }
    }

    /// Mean time between free places; `None` before the first. It grows while none comes free.
    pub(crate) fn between(&self) -> Option<Duration> {
        let mean = Duration::from_secs_f64(self.between?.get());
        Some(mean.max(self.since))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STEP: Duration = Duration::from_millis(10);

    #[test]
    fn the_mean_time_is_what_sequences_took_to_end() {
        let mut turns = Turns::default();
        assert_eq!(turns.between(), None);
        for step in 0..200 {
            turns.observe(STEP, Batch::Full, usize::from(step % 5 == 4));
        }
        let between = turns.between().unwrap().as_secs_f64();
        assert!((0.049..0.051).contains(&between), "{between}");
    }

    #[test]
    fn a_batch_that_ends_together_is_as_fast_as_one_by_one() {
        let mut turns = Turns::default();
        for step in 0..400 {
            turns.observe(STEP, Batch::Full, if step % 40 == 39 { 8 } else { 0 });
        }
        let between = turns.between().unwrap().as_secs_f64();
        assert!((0.049..0.051).contains(&between), "{between}");
    }

    #[test]
    fn a_standstill_is_noticed_while_it_lasts() {
        let mut turns = Turns::default();
        turns.observe(STEP, Batch::Full, 1);
        turns.observe(STEP * 500, Batch::Full, 0);
        assert_eq!(turns.between(), Some(STEP * 500));
        turns.observe(STEP, Batch::HasRoom, 0);
        assert_eq!(turns.between(), Some(STEP));
    }

    #[test]
    fn time_in_which_there_was_room_does_not_count() {
        let mut turns = Turns::default();
        turns.observe(STEP * 1000, Batch::HasRoom, 3);
        assert_eq!(turns.between(), None);
        turns.observe(STEP, Batch::Full, 1);
        assert_eq!(turns.between(), Some(STEP));
    }
}
