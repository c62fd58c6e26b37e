//! The workers that joined and stay, and the eviction of joins when places are short.
//!
//! A join is a promise to serve at an address. Joins whose worker was never reached give way to new ones, the oldest
//! first, when their source address has too many or all places are taken. Decides; connects to nobody itself.

use std::collections::{BTreeMap, HashSet};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use muster_dispatch_grpc::Address;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Most joins from one IP address: processes of one machine, or machines behind one NAT.
const MOST_OF_ONE: usize = 256;
/// Most joins in all.
const MOST: usize = 4096;
/// Most joins of one worker: through several names of this router, and those whose end is not noticed yet.
const MOST_OF_WORKER: usize = 4;
/// Time in which a join that is not reached cannot be evicted.
const REACHED: Duration = Duration::from_secs(2);
/// Most unreached joins evicted together: a place is free only when the last attempt to reach its worker has ended.
const TOGETHER: usize = 64;

/// Addresses of connected workers.
pub(super) type Reached = HashSet<String>;

/// There is no place for another worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum NoPlace {
    /// The source address has too many joins.
    #[error("{MOST_OF_ONE} workers joined from the same address; end those that are not needed")]
    OfOne,
    /// The worker has too many joins.
    #[error("the worker at this address joined {MOST_OF_WORKER} times already; join each router once")]
    OfWorker,
    /// All places are taken.
    #[error("{MOST} workers joined; end those that are not needed")]
    AtAll,
}

/// The table of joins. Clones share one table.
#[derive(Clone, Default)]
pub(crate) struct Joins(Arc<Mutex<Table>>);

#[derive(Default)]
struct Table {
    /// By number, so the oldest first.
    joins: BTreeMap<u64, Join>,
    count: u64,
}

struct Join {
    address: String,
    from: Option<IpAddr>,
    since: Instant,
    gives_way: CancellationToken,
}

/// One join, which ends when dropped.
pub(super) struct Stay {
    all: Joins,
    number: u64,
    gives_way: CancellationToken,
}

impl Joins {
    fn table(&self) -> MutexGuard<'_, Table> {
        // Nothing panics while it holds the lock.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Admits a join of the worker at `address`.
    pub(super) fn enter(
        &self,
        address: &Address,
        from: Option<IpAddr>,
        reached: impl FnOnce() -> Reached,
    ) -> Result<Stay, NoPlace> {
        let mut table = self.table();
        let address = address.to_string();
        if table.joins.values().filter(|join| join.address == address).count() >= MOST_OF_WORKER {
            return Err(NoPlace::OfWorker);
        }
        let is_of_one = |join: &Join| from.is_some() && join.from == from;
        let of_one = table.joins.values().filter(|join| is_of_one(join)).count();
        if of_one >= MOST_OF_ONE {
            table.make_room(&reached(), 1, is_of_one).then_some(()).ok_or(NoPlace::OfOne)?;
        } else if table.joins.len() >= MOST {
            table.make_room(&reached(), 1, |_| true).then_some(()).ok_or(NoPlace::AtAll)?;
        }
        table.count += 1;
        let (number, gives_way) = (table.count, CancellationToken::new());
        let since = Instant::now();
        table.joins.insert(number, Join { address, from, since, gives_way: gives_way.clone() });
        Ok(Stay { all: self.clone(), number, gives_way })
    }

    /// Evicts up to [`TOGETHER`] joins that were never reached.
    pub(super) fn make_room(&self, reached: &Reached) {
        self.table().make_room(reached, TOGETHER, |_| true);
    }
}

impl Table {
    fn make_room(&mut self, reached: &Reached, most: usize, may: impl Fn(&Join) -> bool) -> bool {
        let idle = self.joins.iter().filter(|(_, join)| {
            may(join) && join.since.elapsed() >= REACHED && !reached.contains(&join.address)
        });
        let idle: Vec<u64> = idle.map(|(number, _)| *number).take(most).collect();
        for join in idle.iter().filter_map(|number| self.joins.remove(number)) {
            metrics::counter!("muster_joins_evicted_total").increment(1);
            join.gives_way.cancel();
        }
        !idle.is_empty()
    }
}

impl Stay {
    /// Resolves when the join is evicted.
    pub(super) async fn gives_way(&self) {
        self.gives_way.cancelled().await;
    }
}

impl Drop for Stay {
    fn drop(&mut self) {
        self.all.table().joins.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;

    fn at(number: usize) -> Address {
        format!("10.0.{}.{}:7", number / 256, number % 256).parse().unwrap()
    }

    fn from(number: u8) -> Option<IpAddr> {
        Some(IpAddr::from([10, 9, 9, number]))
    }

    fn enter(joins: &Joins, number: usize, from: Option<IpAddr>, reached: &Reached) -> Result<Stay, NoPlace> {
        joins.enter(&at(number), from, || reached.clone())
    }

    #[tokio::test(start_paused = true)]
    async fn one_machine_cannot_take_all_places() {
        let joins = Joins::default();
        let (mut reached, mut stays) = (Reached::from([at(0).to_string()]), Vec::new());
        for number in 0..MOST_OF_ONE {
            stays.push(enter(&joins, number, from(1), &reached).unwrap());
        }
        assert_eq!(enter(&joins, 999, from(1), &reached).err(), Some(NoPlace::OfOne), "all have just come");
        assert!(enter(&joins, 999, from(2), &reached).is_ok());
        advance(REACHED).await;
        let new = enter(&joins, 999, from(1), &reached).unwrap();
        let gone = |stays: &[Stay]| -> Vec<usize> {
            (0..stays.len()).filter(|&number| stays[number].gives_way.is_cancelled()).collect()
        };
        assert_eq!(gone(&stays), [1], "the oldest that was not reached");
        stays[1].gives_way().await;
        assert!(!new.gives_way.is_cancelled());
        reached.extend((0..MOST_OF_ONE).map(|number| at(number).to_string()));
        assert_eq!(enter(&joins, 998, from(1), &reached).err(), Some(NoPlace::OfOne));
        drop(stays);
        assert!(enter(&joins, 998, from(1), &reached).is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn joins_that_nobody_serves_give_way_together() {
        let joins = Joins::default();
        let stays: Vec<Stay> = (0..100)
            .map(|number| enter(&joins, number, from(number as u8), &Reached::new()).unwrap())
            .collect();
        joins.make_room(&Reached::new());
        assert!(stays.iter().all(|stay| !stay.gives_way.is_cancelled()), "all have just come");
        advance(REACHED).await;
        let reached: Reached = (10..20).map(|number| at(number).to_string()).collect();
        joins.make_room(&reached);
        let gone: Vec<_> = (0..100).filter(|&number| stays[number].gives_way.is_cancelled()).collect();
        assert_eq!(gone, (0..10).chain(20..TOGETHER + 10).collect::<Vec<_>>());
    }

    #[tokio::test(start_paused = true)]
    async fn one_worker_cannot_take_the_places_of_others() {
        let joins = Joins::default();
        let reached = Reached::from([at(0).to_string()]);
        let stays: Vec<_> = (0..260).filter_map(|_| enter(&joins, 0, from(1), &reached).ok()).collect();
        assert_eq!(stays.len(), MOST_OF_WORKER);
        assert_eq!(enter(&joins, 0, from(2), &reached).err(), Some(NoPlace::OfWorker));
        assert!(enter(&joins, 1, from(1), &reached).is_ok());
        drop(stays);
        assert!(enter(&joins, 0, from(1), &reached).is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn the_table_has_an_end() {
        let joins = Joins::default();
        let stays: Vec<Stay> =
            (0..MOST).map(|number| enter(&joins, number, None, &Reached::new()).unwrap()).collect();
        assert_eq!(enter(&joins, MOST, None, &Reached::new()).err(), Some(NoPlace::AtAll));
        advance(REACHED).await;
        assert!(enter(&joins, MOST, None, &Reached::new()).is_ok());
        assert!(stays[0].gives_way.is_cancelled() && !stays[1].gives_way.is_cancelled());
    }
}
