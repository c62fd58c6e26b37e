//! Experts that are added and removed during computation.

use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use bytes::Bytes;
use muster_types::{ExpertId, ExpertKey, LayerId, NumericsClass};

use super::{ExpertError, ExpertSet, PackedExpert, Picked};

/// Experts of a process, in the memory of its compute side.
///
/// Always holds: memory in use never exceeds [`Self::capacity`], and a removed expert counts until its last user is
/// done. The store locks internally; no operation waits for a computation.
pub trait ExpertStore: Send + Sync {
    /// Stores an expert, replacing any with this key.
    ///
    /// # Errors
    /// [`StoreError`]; nothing is stored then.
    fn insert(&self, key: ExpertKey, expert: PackedExpert) -> Result<(), StoreError>;

    /// Withdraws an expert: later lookups do not find it. Unknown keys are ignored.
    fn remove(&self, key: ExpertKey);

    /// Frees removed experts without a user. Returns their bytes.
    fn reclaim(&self) -> u64;

    /// Whether an expert is available for computation.
    fn holds(&self, key: ExpertKey) -> bool;

    /// The parts of an available [`PackedExpert`]. The expert is in use until the last of them is dropped.
    fn packed(&self, key: ExpertKey) -> Option<[Bytes; 6]>;

    /// Bytes in memory, removed experts included.
    fn resident_bytes(&self) -> u64;

    /// Bytes of removed experts that are not yet reclaimed.
    fn removed_bytes(&self) -> u64;

    /// Limit of bytes in memory.
    fn capacity(&self) -> u64;

    /// Numerics class of computation with this store.
    fn numerics(&self) -> NumericsClass;
}

/// A store's refusal of an expert.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// It does not fit.
    #[error("{key} takes {bytes} bytes; {room} of {capacity} are left")]
    Full {
        /// The expert.
        key: ExpertKey,
        /// Its size.
        bytes: u64,
        /// Bytes left.
        room: u64,
        /// Bytes of the store.
        capacity: u64,
    },
}

/// A store in host memory, for [`CpuExperts`](super::CpuExperts).
pub struct CpuStore {
    /// Locked only for operations of the map: the compute thread waits for the lock.
    held: RwLock<Held>,
    capacity: u64,
}

struct Held {
    set: ExpertSet,
    /// Removed experts, perhaps still in use.
    removed: Vec<Arc<PackedExpert>>,
}

impl Held {
    fn removed_bytes(&self) -> u64 {
        bytes_of(&self.removed)
    }

    fn bytes(&self) -> u64 {
        self.set.bytes() + self.removed_bytes()
    }
}

impl CpuStore {
    /// A store of `set` with room for `capacity` bytes in all.
    #[must_use]
    pub const fn new(set: ExpertSet, capacity: u64) -> Self {
        Self { held: RwLock::new(Held { set, removed: Vec::new() }), capacity }
    }

    /// Experts of one layer, in memory until the result is dropped.
    ///
    /// # Errors
    /// The first expert that is not loaded.
    pub fn pick(
        &self,
        layer: LayerId,
        experts: impl Iterator<Item = ExpertId>,
    ) -> Result<Picked, ExpertError> {
        self.read().set.pick(layer, experts)
    }

    fn read(&self) -> RwLockReadGuard<'_, Held> {
        // Nothing panics between two halves of a change.
        self.held.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Held> {
        self.held.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ExpertStore for CpuStore {
    fn insert(&self, key: ExpertKey, expert: PackedExpert) -> Result<(), StoreError> {
        let (bytes, capacity) = (expert.bytes() as u64, self.capacity);
        let mut held = self.write();
        let room = capacity.saturating_sub(held.bytes());
        if bytes > room {
            return Err(StoreError::Full { key, bytes, room, capacity });
        }
        let before = held.set.remove(key);
        held.removed.extend(before);
        held.set.insert(key, expert);
        Ok(())
    }

    fn remove(&self, key: ExpertKey) {
        let mut held = self.write();
        let removed = held.set.remove(key);
        held.removed.extend(removed);
    }

    fn reclaim(&self) -> u64 {
        if self.read().removed.is_empty() {
            return 0;
        }
        let unused: Vec<_> =
            self.write().removed.extract_if(.., |expert| Arc::strong_count(expert) == 1).collect();
        // Memory is freed after the lock is released.
        bytes_of(&unused)
    }

    fn holds(&self, key: ExpertKey) -> bool {
        self.read().set.holds(key)
    }

    fn packed(&self, key: ExpertKey) -> Option<[Bytes; 6]> {
        let expert = self.read().set.get(key)?;
        Some(expert.shared())
    }

    fn resident_bytes(&self) -> u64 {
        self.read().bytes()
    }

    fn removed_bytes(&self) -> u64 {
        self.read().removed_bytes()
    }

    fn capacity(&self) -> u64 {
        self.capacity
    }

    fn numerics(&self) -> NumericsClass {
        NumericsClass::CpuCanonical
    }
}

fn bytes_of(experts: &[Arc<PackedExpert>]) -> u64 {
    experts.iter().map(|expert| expert.bytes() as u64).sum()
}

#[cfg(test)]
mod tests {
    use muster_kernels::{Expert, Matrix};
    use muster_types::{Compute, WeightDType};

    use super::*;

    fn key(expert: u32) -> ExpertKey {
        ExpertKey { layer: LayerId::new(0, 1).unwrap(), expert: ExpertId::new(expert, 8).unwrap() }
    }

    fn expert() -> PackedExpert {
        let matrix = || Matrix::pack_f32(4, 4, &[0.5; 16]).unwrap();
        Expert::new(matrix(), matrix(), matrix()).unwrap().into()
    }

    /// A store with room for `experts` experts, and the bytes of one.
    fn store(experts: u64) -> (CpuStore, u64) {
        let bytes = expert().bytes() as u64;
        (CpuStore::new(ExpertSet::new(4, Compute::F32, WeightDType::Native), experts * bytes), bytes)
    }

    #[test]
    fn what_was_removed_counts_until_its_last_user_is_done() {
        let (store, one) = store(8);
        store.insert(key(0), expert()).unwrap();
        store.insert(key(1), expert()).unwrap();
        let call = store.pick(key(1).layer, [key(1).expert].into_iter()).unwrap();
        let [part, ..] = store.packed(key(1)).unwrap();
        store.remove(key(1));
        store.remove(key(1));
        assert!(!store.holds(key(1)) && store.packed(key(1)).is_none());
        assert!(store.pick(key(1).layer, [key(1).expert].into_iter()).is_err());
        assert_eq!((store.reclaim(), store.resident_bytes(), store.removed_bytes()), (0, 2 * one, one));
        drop(call);
        assert_eq!((store.reclaim(), store.removed_bytes()), (0, one), "a fetch has a part of it");
        drop(part);
        assert_eq!((store.reclaim(), store.resident_bytes(), store.removed_bytes()), (one, one, 0));
        assert!(store.holds(key(0)));
    }

    #[test]
    fn memory_is_not_taken_beyond_the_capacity() {
        let (store, one) = store(2);
        store.insert(key(0), expert()).unwrap();
        store.insert(key(1), expert()).unwrap();
        let full = StoreError::Full { key: key(2), bytes: one, room: 0, capacity: 2 * one };
        assert_eq!(store.insert(key(2), expert()), Err(full.clone()));
        store.remove(key(1));
        assert_eq!(store.insert(key(2), expert()), Err(full), "it was not reclaimed");
        store.reclaim();
        assert_eq!(store.insert(key(2), expert()), Ok(()));
        assert_eq!(store.resident_bytes(), 2 * one);
    }
}
