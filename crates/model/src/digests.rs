//! Digests of a checkpoint's packed experts, computed by several threads.
//!
//! Always holds: a thread has one expert in memory at a time.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use muster_checkpoint::Checkpoint;
use muster_types::{Compute, ExpertKey, WeightDType, WeightDigest};

use crate::ModelError;
use crate::experts;

/// Experts that a thread takes at a time; it reads neighbours faster than single ones.
const TOGETHER: usize = 4;

/// Digests of the given experts. `done` is called with the number of newly finished experts and their packed bytes.
///
/// # Errors
/// The first expert that cannot be read, in no order; as [`experts::read`].
pub fn digests(
    checkpoint: &Checkpoint,
    keys: &[ExpertKey],
    compute: Compute,
    dtype: WeightDType,
    threads: NonZeroUsize,
    done: &(dyn Fn(usize, usize) + Sync),
) -> Result<BTreeMap<ExpertKey, WeightDigest>, ModelError> {
    let (next, failed) = (AtomicUsize::new(0), AtomicBool::new(false));
    let found = Mutex::new(BTreeMap::new());
    let lots: Vec<&[ExpertKey]> = keys.chunks(TOGETHER).collect();
    let work = || -> Result<(), ModelError> {
        while !failed.load(Ordering::Relaxed) {
            let Some(lot) = lots.get(next.fetch_add(1, Ordering::Relaxed)) else { break };
            experts::read(checkpoint, lot, compute, dtype, &mut |_| {}, &mut |key, expert| {
                let digest = expert.digest();
                found.lock().unwrap_or_else(PoisonError::into_inner).insert(key, digest);
                done(1, expert.bytes());
            })
            .inspect_err(|_| failed.store(true, Ordering::Relaxed))?;
        }
        Ok(())
    };
    let threads = threads.get().min(lots.len()).max(1);
    let outcomes: Vec<Result<(), ModelError>> = std::thread::scope(|scope| {
        let started: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
        let own = work();
        // A panic is a fault of the code, not of the data.
        let joined = started
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        std::iter::once(own).chain(joined).collect()
    });
    outcomes.into_iter().collect::<Result<(), _>>()?;
    Ok(found.into_inner().unwrap_or_else(PoisonError::into_inner))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use muster_checkpoint::Source;

    use super::*;
    use crate::experts::{ExpertForm, ExpertSet};

    #[test]
    fn a_digest_is_the_same_however_an_expert_came_here() {
        for family in ["mixtral", "mixtral_bf16", "gpt_oss"] {
            let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/golden").join(family);
            let checkpoint = Checkpoint::open(&Source::Directory(path)).unwrap();
            let keys = ExpertSet::all_keys(&checkpoint);
            for compute in [Compute::F32, Compute::Bf16, Compute::Bf16Pairs] {
                for dtype in WeightDType::ALL {
                    let of = |threads| {
                        let threads = NonZeroUsize::new(threads).unwrap();
                        digests(&checkpoint, &keys, compute, dtype, threads, &|_, _| {}).unwrap()
                    };
                    let (one, many) = (of(1), of(7));
                    assert_eq!(one, many);
                    assert_eq!(one.len(), keys.len());
                    let distinct: std::collections::HashSet<_> = one.values().collect();
                    assert_eq!(distinct.len(), keys.len());
                    let forms = ExpertForm::of_layers(&checkpoint, compute, dtype);
                    for &key in &keys[..4] {
                        let read = experts::read_one(&checkpoint, key, compute, dtype).unwrap();
                        let form = forms[key.layer.index()].unwrap();
                        let sent = form.packed(&read).unwrap().concat();
                        assert_eq!(WeightDigest::of([&sent[..]]), one[&key], "as it is sent");
                        assert_eq!(form.unpack(&sent).unwrap().digest(), one[&key], "fetched");
                    }
                }
            }
        }
    }

    #[test]
    fn every_bit_of_the_weights_counts() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/golden/mixtral");
        let checkpoint = Checkpoint::open(&Source::Directory(path)).unwrap();
        let key = ExpertSet::all_keys(&checkpoint)[3];
        let form =
            ExpertForm::of_layers(&checkpoint, Compute::F32, WeightDType::Native)[key.layer.index()].unwrap();
        let expert = experts::read_one(&checkpoint, key, Compute::F32, WeightDType::Native).unwrap();
        let mut bytes = form.packed(&expert).unwrap().concat();
        let before = expert.digest();
        for at in (0..bytes.len()).step_by(bytes.len() / 7) {
            bytes[at] ^= 1;
            // Flipping the lowest bit of a byte makes a value infinite only if it completes an all-ones exponent.
            if let Ok(other) = form.unpack(&bytes) {
                assert_ne!(other.digest(), before);
            }
            bytes[at] ^= 1;
        }
        assert_eq!(form.unpack(&bytes).unwrap().digest(), before);
    }
}
