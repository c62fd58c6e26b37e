//! What a worker holds and what it shall hold: the only place where experts come and go.
//!
//! Always holds: what is announced is in memory and wanted; what is no longer wanted stays in memory, unannounced, until
//! routers have had the time to learn of it; and memory is not taken beyond what the worker has. Does not know who
//! decides, or how weights are had.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};
use std::time::{Duration, Instant};

use muster_dispatch_grpc::{Custody, Handed, Held, WeightSource};
use muster_model::experts::{Expert, ExpertSet};
use muster_proto::control::Assignment;
use muster_types::{ExpertKey, WeightDigest};

/// How long what is no longer wanted can still be asked for.
const RELEASE: Duration = Duration::from_millis(500);

/// An expert to be loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Task {
    pub(crate) key: ExpertKey,
    /// Addresses of workers that are said to have it.
    pub(crate) peers: Vec<String>,
    /// What its weights must be, where the leader says so.
    pub(crate) digest: Option<WeightDigest>,
}

/// What the loader is to do.
#[derive(Debug)]
pub(crate) enum Work {
    /// Load this.
    Load(Task),
    /// Tell others: something was given up.
    Released,
    /// All is over.
    Stop,
}

/// See the module.
pub(crate) struct Holder {
    experts: RwLock<ExpertSet>,
    state: Mutex<State>,
    changed: Condvar,
    /// When the process began to be a worker.
    started: Instant,
}

struct State {
    wanted: BTreeSet<ExpertKey>,
    /// Wanted and not there, the most urgent first.
    tasks: VecDeque<Task>,
    /// In memory and not wanted, with the moment from which it may go.
    released: BTreeMap<ExpertKey, Instant>,
    /// Of all that is in memory, as it was when it was loaded.
    digests: BTreeMap<ExpertKey, WeightDigest>,
    /// The last source that was passed over because what it has is damaged or different.
    trouble: Option<String>,
    stopped: bool,
    /// Counts orders.
    orders: u64,
    /// How long after the start the first expert was there, and all that were to be there first.
    useful: Option<Duration>,
    full: Option<Duration>,
}

impl State {
    /// Something is held, for the first time or not.
    fn note(&mut self, started: Instant) {
        let since = started.elapsed();
        self.useful.get_or_insert(since);
        if self.tasks.is_empty() {
            self.full.get_or_insert(since);
        }
    }
}

impl Holder {
    /// Of experts that are loaded and wanted, with their digests, in a worker that was started then.
    pub(crate) fn new(
        experts: ExpertSet,
        digests: BTreeMap<ExpertKey, WeightDigest>,
        started: Instant,
    ) -> Self {
        let mut state = State {
            wanted: experts.keys().into_iter().collect(),
            tasks: VecDeque::new(),
            released: BTreeMap::new(),
            digests,
            trouble: None,
            stopped: false,
            orders: 0,
            useful: None,
            full: None,
        };
        if !state.wanted.is_empty() {
            state.note(started);
        }
        Self { experts: RwLock::new(experts), state: Mutex::new(state), changed: Condvar::new(), started }
    }

    /// To compute with.
    pub(crate) fn experts(&self) -> RwLockReadGuard<'_, ExpertSet> {
        // Nothing panics while it holds the lock for writing.
        self.experts.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing panics while it holds the lock between two halves of a change.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether nothing shall be held.
    pub(crate) fn is_unwanted(&self) -> bool {
        self.state().wanted.is_empty()
    }

    /// Experts that are yet to be loaded.
    pub(crate) fn loading(&self) -> usize {
        self.state().tasks.len()
    }

    /// Bytes in memory.
    pub(crate) fn bytes(&self) -> u64 {
        self.experts().bytes()
    }

    /// Waits for something to do. Gives up what may go.
    pub(crate) fn next(&self) -> Work {
        let mut state = self.state();
        loop {
            if state.stopped {
                return Work::Stop;
            }
            let now = Instant::now();
            let is_due = |(&key, at): (&ExpertKey, &Instant)| (*at <= now).then_some(key);
            let due: Vec<ExpertKey> = state.released.iter().filter_map(is_due).collect();
            if !due.is_empty() {
                let mut set = self.experts.write().unwrap_or_else(PoisonError::into_inner);
                let gone: Vec<_> = due.iter().map(|&key| set.remove(key)).collect();
                drop(set);
                state.released.retain(|key, _| !due.contains(key));
                state.digests.retain(|key, _| !due.contains(key));
                drop(state);
                // Memory is given back without the locks.
                drop(gone);
                return Work::Released;
            }
            if let Some(task) = state.tasks.front() {
                return Work::Load(task.clone());
            }
            state = match state.released.values().min().map(|at| at.saturating_duration_since(now)) {
                Some(left) => {
                    self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0
                }
                None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }

    /// Waits until then, or for new orders.
    pub(crate) fn pause(&self, until: Instant) {
        let state = self.state();
        let orders = state.orders;
        let left = until.saturating_duration_since(Instant::now());
        let same = |state: &mut State| state.orders == orders && !state.stopped;
        drop(self.changed.wait_timeout_while(state, left, same));
    }

    /// When memory that is taken by what nobody wants may be had.
    pub(crate) fn next_release(&self) -> Option<Instant> {
        self.state().released.values().min().copied()
    }

    /// An expert is there. It is dropped when nobody wants it any more.
    pub(crate) fn take_in(&self, key: ExpertKey, expert: Expert, digest: WeightDigest) {
        let mut state = self.state();
        state.tasks.retain(|task| task.key != key);
        if state.wanted.contains(&key) {
            self.experts.write().unwrap_or_else(PoisonError::into_inner).insert(key, expert);
            state.digests.insert(key, digest);
            state.note(self.started);
        }
    }

    /// A source was passed over because what it has is damaged or different; in words.
    pub(crate) fn trouble(&self, text: String) {
        self.state().trouble = Some(text);
    }

    /// An expert could not be loaded: others come first.
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
    }
}

impl Custody for Holder {
    fn assign(&self, assignment: Assignment) {
        let Assignment { keep, load, peers, router, operation, .. } = assignment;
        let mut state = self.state();
        let held: BTreeSet<ExpertKey> = self.experts().keys().into_iter().collect();
        let before = std::mem::take(&mut state.wanted);
        state.orders += 1;
        state.wanted = keep.into_iter().chain(load.iter().map(|load| load.key)).collect();
        let task = |key, of: &[u32], digest| Task {
            key,
            digest,
            peers: of.iter().filter_map(|&peer| peers.get(peer as usize).cloned()).collect(),
        };
        state.tasks = load
            .iter()
            .filter(|load| !held.contains(&load.key))
            .map(|load| task(load.key, &load.peers, load.digest))
            .collect();
        // What it is to keep and lost without being told to is loaded again.
        let listed: BTreeSet<ExpertKey> = load.iter().map(|load| load.key).collect();
        let lost: Vec<Task> = state
            .wanted
            .iter()
            .filter(|key| !held.contains(key) && !listed.contains(key))
            .map(|&key| task(key, &[], None))
            .collect();
        state.tasks.extend(lost);
        let at = Instant::now() + RELEASE;
        let State { wanted, released, .. } = &mut *state;
        released.retain(|key, _| !wanted.contains(key));
        for key in held.iter().filter(|key| !wanted.contains(key)) {
            released.entry(*key).or_insert(at);
        }
        if *wanted != before {
            let (load, release) = (state.tasks.len(), state.released.len());
            tracing::info!(%router, %operation, hold = state.wanted.len(), load, release, "new orders");
        }
        drop(state);
        self.changed.notify_all();
    }

    fn held(&self) -> Held {
        let state = self.state();
        let set = self.experts();
        // What is in memory has its digest beside it: both come and go under the lock.
        let held = set.keys().into_iter().filter(|key| state.wanted.contains(key));
        let (experts, digests) =
            held.filter_map(|key| Some((key, state.digests.get(&key).copied()?))).unzip();
        Held {
            experts,
            digests,
            trouble: state.trouble.clone(),
            resident_bytes: set.bytes(),
            loading: state.tasks.len(),
            useful: state.useful,
            full: state.full,
        }
    }
}

impl WeightSource for Holder {
    fn get(&self, key: ExpertKey) -> Option<Handed> {
        let state = self.state();
        let digest = state.digests.get(&key).copied();
        Some(Handed { expert: self.experts().get(key)?, digest })
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU64;

    use muster_kernels::Matrix;
    use muster_proto::control::Load;
    use muster_proto::convert::RouterName;
    use muster_types::{Compute, ExpertId, LayerId, WeightDType};

    use super::*;

    fn key(expert: u32) -> ExpertKey {
        ExpertKey { layer: LayerId::new(0, 1).unwrap(), expert: ExpertId::new(expert, 8).unwrap() }
    }

    fn expert() -> Expert {
        let matrix = || Matrix::pack_f32(4, 4, &[0.5; 16]).unwrap();
        Expert::new(matrix(), matrix(), matrix()).unwrap()
    }

    fn digest(expert: u32) -> WeightDigest {
        WeightDigest::of([&expert.to_le_bytes()[..]])
    }

    fn holder(held: &[u32]) -> Holder {
        let digests = held.iter().map(|&n| (key(n), digest(n))).collect();
        let mut set = ExpertSet::new(4, Compute::F32, WeightDType::Native);
        for &n in held {
            set.insert(key(n), expert());
        }
        Holder::new(set, digests, Instant::now())
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

    fn next(holder: &Holder) -> Task {
        match holder.next() {
            Work::Load(task) => task,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_is_not_wanted_is_withdrawn_at_once_and_given_up_later() {
        let holder = holder(&[0, 1, 2]);
        let before = holder.bytes();
        holder.assign(orders(&[0], &[]));
        assert_eq!(announced(&holder), [0]);
        assert!(holder.get(key(1)).is_some(), "a router that does not know yet is still answered");
        assert!(holder.next_release().is_some());
        // Wanted again before it went, and one that goes.
        holder.assign(orders(&[0, 1], &[]));
        assert_eq!(announced(&holder), [0, 1]);
        assert!(matches!(holder.next(), Work::Released));
        assert!(holder.get(key(2)).is_none());
        assert_eq!((holder.bytes(), holder.next_release()), (before / 3 * 2, None));
        holder.assign(orders(&[], &[]));
        assert!(holder.is_unwanted() && holder.get(key(0)).is_some());
        assert!(matches!(holder.next(), Work::Released));
        assert_eq!(holder.bytes(), 0);
    }

    #[test]
    fn experts_are_loaded_in_order_and_announced_one_by_one() {
        let holder = holder(&[0]);
        holder.assign(orders(&[0], &[5, 3]));
        assert_eq!((announced(&holder), holder.held().loading), (vec![0], 2));
        assert_eq!(next(&holder), Task { key: key(5), peers: vec!["b:2".into()], digest: Some(digest(5)) });
        holder.defer(key(5));
        assert_eq!(next(&holder).key, key(3));
        holder.take_in(key(3), expert(), digest(3));
        assert_eq!((announced(&holder), holder.held().loading), (vec![0, 3], 1));
        // What came too late to be wanted is not kept.
        holder.assign(orders(&[0, 3], &[]));
        holder.take_in(key(5), expert(), digest(5));
        assert_eq!((announced(&holder), holder.held().loading), (vec![0, 3], 0));
        assert!(holder.get(key(5)).is_none());
        // What it is to keep and does not have is loaded too.
        holder.assign(orders(&[0, 3, 4], &[]));
        assert_eq!(next(&holder), Task { key: key(4), peers: vec![], digest: None });
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
