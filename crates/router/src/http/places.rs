//! Places for large bodies: few, taken by bytes that came, and kept by those that go on.
//!
//! A body that is being received makes a step with every [`STEP`] bytes. Where places are short, the one whose last step
//! is longest ago gives way; without a step for [`SLOWEST`] a body is given up in any case. So a peer that promises much
//! and stalls keeps nobody out, and one that wants to has to send as much as all others. A body that is complete keeps its
//! place until it is dropped. All of them together are read at [`PACE`], so that they leave the machine to others.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;

/// Large bodies in memory at once.
pub(super) const PLACES: usize = 32;
/// Bytes of one step.
const STEP: usize = 16 << 10;
/// A body that made a step since then goes on, whoever else waits: the gaps of a long way.
const GOES_ON: Duration = Duration::from_millis(100);
/// Bytes that are read of large bodies in a second.
const PACE: usize = 16 << 20;
/// Those of half a second are read at once: a body of the usual limit alone is not held up.
const BURST: Duration = Duration::from_millis(500);
/// Shorter waits are put off: timers are no finer.
const TICK: Duration = Duration::from_millis(5);
/// The longest that one step may take.
const SLOWEST: Duration = Duration::from_secs(5);

/// The places. Clones share them.
#[derive(Clone, Default)]
pub(super) struct Large(Arc<Mutex<Places>>);

#[derive(Default)]
struct Places {
    taken: BTreeMap<u64, Taken>,
    /// How often one was taken.
    count: u64,
    /// When what came so far has had its time.
    paced: Option<Instant>,
}

struct Taken {
    /// When the last step was made; `None` of a body that is complete or waits for its turn.
    stepped: Option<Instant>,
    gives_way: CancellationToken,
}

/// A place that was lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Lost {
    /// To another body.
    #[error("the body came slowest of those under way and gave way to another; try again, or send it faster")]
    GaveWay,
    /// To nobody in particular.
    #[error("the body came too slowly: less than {STEP} bytes in {} s", SLOWEST.as_secs())]
    TooSlow,
}

/// One place. Given back when dropped.
pub(super) struct Place {
    all: Large,
    number: u64,
    gives_way: CancellationToken,
    stepped: Instant,
    /// Bytes since.
    since: usize,
}

impl Large {
    fn places(&self) -> MutexGuard<'_, Places> {
        // Nothing panics while it holds the lock.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// When more may be read, now that so many bytes came.
    fn turn(&self, now: Instant, bytes: usize) -> Instant {
        let mut places = self.places();
        let earliest = now.checked_sub(BURST).unwrap_or(now);
        let since = places.paced.map_or(earliest, |paced| paced.max(earliest));
        let turn = since + Duration::from_secs_f64(bytes as f64 / PACE as f64);
        places.paced = Some(turn);
        turn
    }

    /// A place for a body of which more has come than goes without one; `None` when all others go on.
    pub(super) fn take(&self) -> Option<Place> {
        let now = Instant::now();
        let mut places = self.places();
        if places.taken.len() >= PLACES {
            let stalled = places.taken.iter().filter_map(|(number, taken)| Some((taken.stepped?, *number)));
            let (_, number) = stalled.min().filter(|(stepped, _)| *stepped + GOES_ON <= now)?;
            if let Some(taken) = places.taken.remove(&number) {
                taken.gives_way.cancel();
            }
        }
        places.count += 1;
        let (number, gives_way) = (places.count, CancellationToken::new());
        places.taken.insert(number, Taken { stepped: Some(now), gives_way: gives_way.clone() });
        Some(Place { all: self.clone(), number, gives_way, stepped: now, since: 0 })
    }
}

impl Place {
    /// Waits for more of the body, as long as the place is kept.
    pub(super) async fn keep<T>(&self, more: impl Future<Output = T>) -> Result<T, Lost> {
        let lost = tokio::select! {
            biased;
            () = self.gives_way.cancelled() => Lost::GaveWay,
            more = timeout_at(self.stepped + SLOWEST, more) => match more {
                Ok(more) => return Ok(more),
                Err(_) => Lost::TooSlow,
            },
        };
        metrics::counter!("muster_bodies_evicted_total").increment(1);
        Err(lost)
    }

    /// So many bytes came; waits until more may.
    pub(super) async fn pace(&mut self, bytes: usize) {
        let now = Instant::now();
        let turn = self.all.turn(now, bytes);
        if turn > now + TICK {
            self.mark(None);
            tokio::time::sleep_until(turn).await;
            self.stepped = Instant::now();
            self.mark(Some(self.stepped));
        }
        self.advance(bytes);
    }

    fn advance(&mut self, bytes: usize) {
        self.since += bytes;
        if self.since >= STEP {
            (self.stepped, self.since) = (Instant::now(), 0);
            self.mark(Some(self.stepped));
        }
    }

    /// The body is complete.
    pub(super) fn complete(&self) {
        self.mark(None);
    }

    fn mark(&self, stepped: Option<Instant>) {
        if let Some(taken) = self.all.places().taken.get_mut(&self.number) {
            taken.stepped = stepped;
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.all.places().taken.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use std::future::{pending, ready};

    use tokio::time::advance;

    use super::*;

    async fn full(large: &Large) -> Vec<Place> {
        let mut places = Vec::new();
        for _ in 0..PLACES {
            places.push(large.take().unwrap());
            advance(Duration::from_millis(1)).await;
        }
        places
    }

    #[tokio::test(start_paused = true)]
    async fn who_stalls_longest_gives_way() {
        let large = Large::default();
        let mut places = full(&large).await;
        assert!(large.take().is_none(), "all of them have just come");
        advance(GOES_ON).await;
        places[0].advance(STEP);
        // Trickling is no step.
        places[1].advance(1);
        let new = large.take().unwrap();
        assert_eq!(places[1].keep(pending::<()>()).await, Err(Lost::GaveWay));
        assert_eq!(places[0].keep(ready(1)).await, Ok(1));
        drop(places.remove(1));
        assert_eq!(new.keep(ready(1)).await, Ok(1), "the place is the new one's");
        advance(GOES_ON).await;
        places[0].advance(STEP);
        for _ in 1..PLACES {
            assert!(large.take().is_some(), "and is given back");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_complete_body_keeps_its_place() {
        let large = Large::default();
        let places = full(&large).await;
        places.iter().for_each(Place::complete);
        advance(SLOWEST).await;
        assert!(large.take().is_none());
        drop(places);
        assert!(large.take().is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn all_together_have_a_pace_and_one_alone_is_not_held_up() {
        let large = Large::default();
        advance(BURST).await;
        let began = Instant::now();
        let mut alone = large.take().unwrap();
        for _ in 0..(PACE / 2 / STEP) {
            alone.pace(STEP).await;
        }
        assert_eq!(began.elapsed(), Duration::ZERO);
        drop(alone);
        let bytes = 4 * PACE;
        let read = (0..PLACES).map(|_| {
            let mut place = large.take().unwrap();
            async move {
                for _ in 0..bytes / PLACES / STEP {
                    place.pace(STEP).await;
                }
                assert_eq!(place.keep(ready(1)).await, Ok(1), "who waits for its turn does not stall");
            }
        });
        let reading: Vec<_> = read.map(tokio::spawn).collect();
        tokio::time::sleep(2 * GOES_ON).await;
        assert!(large.take().is_none(), "and gives way to nobody");
        for reading in reading {
            reading.await.unwrap();
        }
        let took = began.elapsed();
        assert!(took.abs_diff(Duration::from_secs(4)) < Duration::from_millis(100), "{took:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_step_has_its_time() {
        let large = Large::default();
        let mut place = large.take().unwrap();
        for _ in 0..10 {
            advance(SLOWEST / 2).await;
            place.advance(STEP);
            assert_eq!(place.keep(ready(1)).await, Ok(1));
        }
        let before = Instant::now();
        assert_eq!(place.keep(pending::<()>()).await, Err(Lost::TooSlow));
        assert_eq!(before.elapsed(), SLOWEST);
    }
}
