//! A worker's held and wanted experts: the only place that adds and removes experts.
//!
//! Always holds: announced experts are in memory and wanted; an expert that is no longer wanted stays in memory,
//! unannounced, until routers have had time to learn of it. The store counts memory, and is not called under the lock.
//! Does not know the leader, the sources of weights, or the compute.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::pin::pin;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use muster_dispatch_grpc::{Custody, Handed, Held, WeightSource};
use muster_model::experts::{ExpertStore, PackedExpert, StoreError};
use muster_proto::control::Assignment;
use muster_types::{ExpertKey, WeightDigest};
use tokio::sync::Notify;

/// Time for which a withdrawn expert still serves.
const RELEASE: Duration = Duration::from_millis(500);
/// Interval of the checks of removed experts that are still in use.
const IN_USE: Duration = Duration::from_millis(10);

/// An expert to be loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LoadTask {
    pub(crate) key: ExpertKey,
    /// Addresses of workers that hold it, as the order says.
    pub(crate) peers: Vec<String>,
    /// Expected digest of its weights, if the order has one.
    pub(crate) digest: Option<WeightDigest>,
}

/// Next task of the loader.
#[derive(Debug)]
pub(crate) enum Work {
    /// Load an expert.
    Load(LoadTask),
    /// Announce that experts were removed.
    Released,
    /// Stop.
    Stop,
}

/// A worker's held and wanted experts; see the module.
pub(crate) struct Holder {
    /// Experts for the compute side; only the loader changes it.
    store: Arc<dyn ExpertStore>,
    state: Mutex<State>,
    changed: Condvar,
    /// Notification of new orders, for asynchronous waits.
    news: Notify,
    /// Start of the worker.
    started: Instant,
}

struct State {
    wanted: BTreeSet<ExpertKey>,
    /// Available experts, with the digests of their loaded weights: each enters the store before this map, and leaves
    /// the store after it.
    held: BTreeMap<ExpertKey, WeightDigest>,
    /// Wanted experts that are not loaded, the most urgent first.
    tasks: VecDeque<LoadTask>,
    /// Held experts that are not wanted, with the time of their removal.
    released: BTreeMap<ExpertKey, Instant>,
    /// The last source that was passed over for damaged or different weights.
    trouble: Option<String>,
    stopped: bool,
    /// Number of orders so far.
    orders: u64,
    /// Time from the start to the first expert, and to the last expert of the first order.
    useful: Option<Duration>,
    full: Option<Duration>,
}

impl State {
    /// Records both times.
    fn note(&mut self, started: Instant) {
        let since = started.elapsed();
        self.useful.get_or_insert(since);
        if self.tasks.is_empty() {
            self.full.get_or_insert(since);
        }
    }

    /// Takes out the released experts whose time of removal has come.
    fn take_due(&mut self, now: Instant) -> Vec<ExpertKey> {
        let due: Vec<_> = self.released.extract_if(.., |_, at| *at <= now).map(|(key, _)| key).collect();
        for key in &due {
            self.held.remove(key);
        }
        due
    }

    /// Time when memory of unwanted experts becomes free; `in_use`: removed experts still have users.
    fn next_release(&self, now: Instant, in_use: bool) -> Option<Instant> {
        let in_use = in_use.then(|| now + IN_USE);
        self.released.values().copied().chain(in_use).min()
    }
}

impl Holder {
    /// A holder for a store whose experts are all wanted, with their digests; `started` is the worker's start.
    pub(crate) fn new(
        store: Arc<dyn ExpertStore>,
        held: BTreeMap<ExpertKey, WeightDigest>,
        started: Instant,
    ) -> Self {
        let mut state = State {
            wanted: held.keys().copied().collect(),
            held,
            tasks: VecDeque::new(),
            released: BTreeMap::new(),
            trouble: None,
            stopped: false,
            orders: 0,
            useful: None,
            full: None,
        };
        if !state.wanted.is_empty() {
            state.note(started);
        }
        Self { store, state: Mutex::new(state), changed: Condvar::new(), news: Notify::new(), started }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing panics while it holds the lock between two halves of a change.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether no expert is wanted.
    pub(crate) fn is_unwanted(&self) -> bool {
        self.state().wanted.is_empty()
    }

    /// Number of experts still to be loaded.
    pub(crate) fn loading(&self) -> usize {
        self.state().tasks.len()
    }

    /// Bytes that experts can still be loaded into.
    pub(crate) fn room(&self) -> u64 {
        self.store.capacity().saturating_sub(self.store.resident_bytes())
    }

    /// Waits for the next task. Removes released experts when their time has come.
    pub(crate) fn next(&self) -> Work {
        loop {
            let is_freed = self.store.reclaim() > 0;
            let in_use = self.store.removed_bytes() > 0;
            let mut state = self.state();
            if state.stopped {
                return Work::Stop;
            }
            if is_freed {
                return Work::Released;
            }
            let now = Instant::now();
            let due = state.take_due(now);
            if !due.is_empty() {
                drop(state);
                due.into_iter().for_each(|key| self.store.remove(key));
                continue;
            }
            if let Some(task) = state.tasks.front() {
                return Work::Load(task.clone());
            }
            match state.next_release(now, in_use) {
                Some(at) => {
                    let left = at.saturating_duration_since(now);
                    drop(self.changed.wait_timeout(state, left));
                }
                None => drop(self.changed.wait(state)),
            }
        }
    }

    /// Waits until `until` or for new orders.
    pub(crate) fn pause(&self, until: Instant) {
        let state = self.state();
        let orders = state.orders;
        let left = until.saturating_duration_since(Instant::now());
        let same = |state: &mut State| state.orders == orders && !state.stopped;
        drop(self.changed.wait_timeout_while(state, left, same));
    }

    /// Time when memory of unwanted experts becomes free.
    pub(crate) fn next_release(&self) -> Option<Instant> {
        let in_use = self.store.removed_bytes() > 0;
        self.state().next_release(Instant::now(), in_use)
    }

    /// Stores a loaded expert; discards it if the assignment no longer includes it.
    ///
    /// # Errors
    /// When the store refuses it; it then stays on the list to load.
    pub(crate) fn take_in(
        &self,
        key: ExpertKey,
        expert: PackedExpert,
        digest: WeightDigest,
    ) -> Result<(), StoreError> {
        // Stored before it can be announced.
        self.store.insert(key, expert)?;
        let mut state = self.state();
        state.tasks.retain(|task| task.key != key);
        if state.wanted.contains(&key) {
            state.held.insert(key, digest);
            state.note(self.started);
            return Ok(());
        }
        drop(state);
        self.store.remove(key);
        self.store.reclaim();
        Ok(())
    }

    /// Whether an expert is still to be loaded.
    pub(crate) fn is_asked_for(&self, key: ExpertKey) -> bool {
        let state = self.state();
        !state.stopped && state.tasks.iter().any(|task| task.key == key)
    }

    /// Waits until an expert is no longer to be loaded.
    pub(crate) async fn called_off(&self, key: ExpertKey) {
        loop {
            let mut news = pin!(self.news.notified());
            // Subscribed before the check, so that no change is missed.
            news.as_mut().enable();
            if !self.is_asked_for(key) {
                return;
            }
            news.await;
        }
    }

    /// Records a source that was passed over for damaged or different weights, in words.
    pub(crate) fn trouble(&self, text: String) {
        self.state().trouble = Some(text);
    }

    /// Moves an expert that could not be loaded to the end of the list.
    pub(crate) fn defer(&self, key: ExpertKey) {
        let mut state = self.state();
        if let Some(at) = state.tasks.iter().position(|task| task.key == key) {
            let task = state.tasks.remove(at);
            state.tasks.extend(task);
        }
    }

    /// Ends the loader.
    pub(crate) fn stop(&self) {
        self.state().stopped = true;
        self.changed.notify_all();
        self.news.notify_waiters();
    }
}

impl Custody for Holder {
    fn assign(&self, assignment: Assignment) {
        let Assignment { keep, load, peers, router, operation, .. } = assignment;
        let task = |key, of: &[u32], digest| LoadTask {
            key,
            digest,
            peers: of.iter().filter_map(|&peer| peers.get(peer as usize).cloned()).collect(),
        };
        let listed: BTreeSet<ExpertKey> = load.iter().map(|load| load.key).collect();
        let wanted: BTreeSet<ExpertKey> = keep.into_iter().chain(listed.iter().copied()).collect();
        let mut state = self.state();
        state.orders += 1;
        let before = std::mem::replace(&mut state.wanted, wanted);
        let State { wanted, held, tasks, released, .. } = &mut *state;
        // An expert to keep that is missing is loaded again.
        let lost = wanted.iter().filter(|key| !listed.contains(key)).map(|&key| task(key, &[], None));
        let told = load.iter().map(|load| task(load.key, &load.peers, load.digest));
        *tasks = told.chain(lost).filter(|task| !held.contains_key(&task.key)).collect();
        let at = Instant::now() + RELEASE;
        released.retain(|key, _| !wanted.contains(key));
        for key in held.keys().filter(|key| !wanted.contains(key)) {
            released.entry(*key).or_insert(at);
        }
        let (hold, load, release) = (wanted.len(), tasks.len(), released.len());
        let is_new = *wanted != before;
        drop(state);
        self.changed.notify_all();
        self.news.notify_waiters();
        if is_new {
            tracing::info!(%router, %operation, hold, load, release, "new orders");
        }
    }

    fn held(&self) -> Held {
        let resident_bytes = self.store.resident_bytes();
        let state = self.state();
        let held = state.held.iter().filter(|(key, _)| state.wanted.contains(key));
        let (experts, digests) = held.map(|(&key, &digest)| (key, digest)).unzip();
        Held {
            experts,
            digests,
            trouble: state.trouble.clone(),
            resident_bytes,
            loading: state.tasks.len(),
            useful: state.useful,
            full: state.full,
        }
    }
}

impl WeightSource for Holder {
    fn get(&self, key: ExpertKey) -> Option<Handed> {
        let digest = self.state().held.get(&key).copied();
        Some(Handed { packed: self.store.packed(key)?, digest })
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU64;

    use muster_kernels::{Expert, Matrix};
    use muster_model::experts::{CpuStore, ExpertSet};
    use muster_proto::control::Load;
    use muster_proto::convert::RouterName;
    use muster_types::{Compute, ExpertId, LayerId, WeightDType};

    use super::*;

    fn key(expert: u32) -> ExpertKey {
        ExpertKey { layer: LayerId::new(0, 1).unwrap(), expert: ExpertId::new(expert, 8).unwrap() }
    }

    fn expert() -> PackedExpert {
        let matrix = || Matrix::pack_f32(4, 4, &[0.5; 16]).unwrap();
        Expert::new(matrix(), matrix(), matrix()).unwrap().into()
    }

    fn digest(expert: u32) -> WeightDigest {
        WeightDigest::of([&expert.to_le_bytes()[..]])
    }

    /// Capacity beyond the held experts.
    const MORE: u64 = 1 << 20;

    fn stored(held: &[u32]) -> Arc<CpuStore> {
        let mut set = ExpertSet::new(4, Compute::F32, WeightDType::Native);
        held.iter().for_each(|&n| set.insert(key(n), expert()));
        let capacity = set.bytes() + MORE;
        Arc::new(CpuStore::new(set, capacity))
    }

    fn holder(held: &[u32]) -> Holder {
        over(stored(held), held)
    }

    fn over(store: Arc<CpuStore>, held: &[u32]) -> Holder {
        let digests = held.iter().map(|&n| (key(n), digest(n))).collect();
        Holder::new(store, digests, Instant::now())
    }

    fn orders(keep: &[u32], load: &[u32]) -> Assignment {
        Assignment {
            router: RouterName::new("r").unwrap(),
            term: NonZeroU64::MIN,
            operation: NonZeroU64::MIN,
            seen: muster_types::Epoch::new(1),
            keep: keep.iter().map(|&n| key(n)).collect(),
            load: load
                .iter()
                .map(|&n| Load { key: key(n), peers: vec![1], digest: Some(digest(n)) })
                .collect(),
            peers: vec!["a:1".into(), "b:2".into()],
        }
    }

    fn announced(holder: &Holder) -> Vec<u32> {
        let held = holder.held();
        let digests: Vec<_> = held.experts.iter().map(|key| digest(key.expert.get())).collect();
        assert_eq!(held.digests, digests, "each has its own");
        held.experts.iter().map(|key| key.expert.get()).collect()
    }

    fn next(holder: &Holder) -> LoadTask {
        match holder.next() {
            Work::Load(task) => task,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_is_not_wanted_is_withdrawn_at_once_and_given_up_later() {
        let holder = holder(&[0, 1, 2]);
        let before = holder.held().resident_bytes;
        holder.assign(orders(&[0], &[]));
        assert_eq!(announced(&holder), [0]);
        assert!(holder.get(key(1)).is_some(), "a router that does not know yet is still answered");
        assert!(holder.next_release().is_some());
        // One expert is wanted again before its removal, another is removed.
        holder.assign(orders(&[0, 1], &[]));
        assert_eq!(announced(&holder), [0, 1]);
        assert!(matches!(holder.next(), Work::Released));
        assert!(holder.get(key(2)).is_none());
        assert_eq!((holder.held().resident_bytes, holder.next_release()), (before / 3 * 2, None));
        holder.assign(orders(&[], &[]));
        assert!(holder.is_unwanted() && holder.get(key(0)).is_some());
        assert!(matches!(holder.next(), Work::Released));
        assert_eq!((holder.held().resident_bytes, holder.room()), (0, before + MORE));
    }

    #[test]
    fn experts_are_loaded_in_order_and_announced_one_by_one() {
        let holder = holder(&[0]);
        holder.assign(orders(&[0], &[5, 3]));
        assert_eq!((announced(&holder), holder.held().loading), (vec![0], 2));
        assert_eq!(
            next(&holder),
            LoadTask { key: key(5), peers: vec!["b:2".into()], digest: Some(digest(5)) }
        );
        holder.defer(key(5));
        assert_eq!(next(&holder).key, key(3));
        holder.take_in(key(3), expert(), digest(3)).unwrap();
        assert_eq!((announced(&holder), holder.held().loading), (vec![0, 3], 1));
        // An expert that is no longer wanted when loaded is discarded.
        holder.assign(orders(&[0, 3], &[]));
        holder.take_in(key(5), expert(), digest(5)).unwrap();
        assert_eq!((announced(&holder), holder.held().loading), (vec![0, 3], 0));
        assert!(holder.get(key(5)).is_none());
        // A missing expert of `keep` is loaded too.
        holder.assign(orders(&[0, 3, 4], &[]));
        assert_eq!(next(&holder), LoadTask { key: key(4), peers: vec![], digest: None });
    }

    #[test]
    fn what_is_given_up_counts_until_its_last_user_is_done() {
        let store = stored(&[0, 1]);
        let holder = over(store.clone(), &[0, 1]);
        let all = store.resident_bytes();
        let call = store.pick(key(0).layer, [key(1).expert].into_iter()).unwrap();
        let fetch = holder.get(key(1));
        holder.assign(orders(&[0], &[]));
        // The expert is unavailable after its removal, while its memory is still in use.
        while holder.get(key(1)).is_some() {
            assert!(holder.next_release().is_some());
            holder.assign(orders(&[0], &[2]));
            let Work::Load(_) = holder.next() else { panic!("the memory is in use") };
        }
        assert!(store.pick(key(0).layer, [key(1).expert].into_iter()).is_err());
        drop(call);
        assert!(matches!(holder.next(), Work::Load(_)));
        assert_eq!(store.resident_bytes(), all, "somebody still fetches it");
        assert!(holder.next_release().is_some());
        drop(fetch);
        assert!(matches!(holder.next(), Work::Released));
        assert_eq!((store.resident_bytes(), holder.next_release()), (all / 2, None));
    }

    #[tokio::test]
    async fn a_load_is_called_off_by_orders_without_it_and_by_a_stop() {
        let holder = Arc::new(holder(&[0]));
        let waiting = |key| {
            let holder = holder.clone();
            tokio::spawn(async move { holder.called_off(key).await })
        };
        holder.assign(orders(&[0], &[1, 2]));
        let (first, second) = (waiting(key(1)), waiting(key(2)));
        tokio::task::yield_now().await;
        holder.assign(orders(&[0], &[2]));
        first.await.unwrap();
        assert!(!second.is_finished() && holder.is_asked_for(key(2)));
        holder.stop();
        second.await.unwrap();
        holder.called_off(key(7)).await;
    }

    #[test]
    fn a_stop_ends_the_loader_whatever_there_is_to_do() {
        let holder = holder(&[]);
        assert!(holder.is_unwanted());
        holder.assign(orders(&[], &[1]));
        holder.stop();
        assert!(matches!(holder.next(), Work::Stop));
        holder.pause(Instant::now() + Duration::from_secs(3600));
    }
}
