//! Places for large bodies: few, taken once enough bytes have come, and kept by bodies that make progress.
//!
//! A body in transfer makes a step with every [`STEP`] bytes. When all places are taken, the body with the oldest step
//! gives way; a body without a step for [`SLOWEST`] is dropped in any case. So a peer that announces much and stalls
//! keeps nobody out, and a flood has to send as much as all others. A complete body keeps its place until dropped. All
//! large bodies together are read at [`PACE`], which leaves the machine to other work.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;

/// Most large bodies in memory.
pub(super) const PLACES: usize = 32;
/// Bytes of one step.
const STEP: usize = 16 << 10;
/// Age of a step below which its body cannot be evicted, which covers the gaps of a long network path.
const GOES_ON: Duration = Duration::from_millis(100);
/// Bytes per second at which all large bodies together are read.
const PACE: usize = 16 << 20;
/// Time's worth of bytes that may be read at once: a single body of the usual limit is not delayed.
const BURST: Duration = Duration::from_millis(500);
/// Waits up to this length are skipped: timers are no finer.
const TICK: Duration = Duration::from_millis(5);
/// Longest time for one step.
const SLOWEST: Duration = Duration::from_secs(5);

/// The table of places. Clones share it.
#[derive(Clone, Default)]
pub(super) struct Large(Arc<Mutex<Places>>);

#[derive(Default)]
struct Places {
    taken: BTreeMap<u64, Taken>,
    /// Places taken so far, for numbering.
    count: u64,
    /// Time up to which the pace is used up by bytes read so far.
    paced: Option<Instant>,
}

struct Taken {
    /// Time of the last step; `None` if the body is complete or waits for its turn.
    stepped: Option<Instant>,
    gives_way: CancellationToken,
}

/// Reasons for losing a place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Lost {
    /// Another body took the place.
    #[error("the body came slowest of those under way and gave way to another; try again, or send it faster")]
    GaveWay,
    /// The body made no step for [`SLOWEST`].
    #[error("the body came too slowly: less than {STEP} bytes in {} s", SLOWEST.as_secs())]
    TooSlow,
}

/// One place. Given back when dropped.
pub(super) struct Place {
    all: Large,
    number: u64,
    gives_way: CancellationToken,
    stepped: Instant,
    /// Bytes since the last step.
    since: usize,
}

impl Large {
    fn places(&self) -> MutexGuard<'_, Places> {
        // Nothing panics while it holds the lock.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Time at which more may be read, after `bytes` more have come.
    fn turn(&self, now: Instant, bytes: usize) -> Instant {
        let mut places = self.places();
        let earliest = now.checked_sub(BURST).unwrap_or(now);
        let since = places.paced.map_or(earliest, |paced| paced.max(earliest));
        let turn = since + Duration::from_secs_f64(bytes as f64 / PACE as f64);
        places.paced = Some(turn);
        turn
    }

    /// A place for a body too large to go without one; `None` when all places are taken and all bodies make progress.
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
    /// Waits for more of the body, or until the place is lost.
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

    /// Accounts for `bytes` received bytes, and waits until more may be read.
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

    /// Marks the body as complete, which keeps its place until dropped.
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
        // A trickle of bytes is no step.
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
