//! What the weights of every expert must be: kept in a file from an earlier start, or computed from this router's own
//! checkpoint, on a thread of its own.
//!
//! Always holds: a file is used only if it was made for the checkpoint as it is now. Does not know what compares the
//! digests.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use muster_checkpoint::Checkpoint;
use muster_checkpoint::digests::{DigestFile, Places};
use muster_checkpoint::spec::{ExpertRole, Role};
use muster_dispatch_grpc::{Digests, DigestsTeller, Reference};
use muster_model::digests::digests;
use muster_model::experts::ExpertSet;
use muster_types::{Compute, ExpertKey, WeightDType, WeightDigest};

/// Packed bytes of experts from which on computed digests are kept: smaller models are hashed in no time.
const WORTH_KEEPING: u64 = 256 << 20;
/// Interval between progress lines in the log.
const SAY_EVERY: Duration = Duration::from_secs(5);
/// Pause before reading an unreadable expert again.
const PAUSE: Duration = Duration::from_secs(10);

/// Settings of the digests: the checkpoint, the packing and the places of files.
pub(crate) struct Checking {
    pub(crate) checkpoint: Arc<Checkpoint>,
    pub(crate) compute: Compute,
    pub(crate) dtype: WeightDType,
    pub(crate) threads: NonZeroUsize,
    pub(crate) places: Places,
}

/// Starts the thread that finds the digests.
///
/// # Errors
/// When no thread can be started.
pub(crate) fn start(checking: Checking) -> std::io::Result<Digests> {
    let keys = ExpertSet::all_keys(&checking.checkpoint);
    let (teller, digests) = Digests::pending(keys.len());
    std::thread::Builder::new().name("muster-digests".into()).spawn(move || checking.run(&keys, &teller))?;
    Ok(digests)
}

impl Checking {
    fn run(&self, keys: &[ExpertKey], teller: &DigestsTeller) {
        if let Some(kept) = self.kept(keys) {
            teller.known(reference(&self.checkpoint, &kept));
            return;
        }
        while teller.is_heard() {
            match self.compute(keys, teller) {
                Ok((found, bytes)) => {
                    teller.known(reference(&self.checkpoint, &found));
                    self.keep(&found, bytes);
                    return;
                }
                Err(error) => {
                    tracing::error!(%error, "the weights cannot be checked; trying again");
                    teller.problem(error.to_string());
                    std::thread::sleep(PAUSE);
                }
            }
        }
    }

    /// Digests from the first file that matches this checkpoint. Logs why other files are not used.
    fn kept(&self, keys: &[ExpertKey]) -> Option<BTreeMap<ExpertKey, WeightDigest>> {
        for path in self.places.candidates(&self.checkpoint, self.compute, self.dtype) {
            let file = path.display();
            match DigestFile::read(&path) {
                Ok(None) => {}
                Err(error) => tracing::warn!(%error, "digests of the weights are computed anew"),
                Ok(Some(kept)) => match kept.stale(&self.checkpoint, self.compute, self.dtype) {
                    Some(reason) => tracing::warn!(%file, reason, "digests of the weights are computed anew"),
                    None => {
                        tracing::info!(%file, experts = keys.len(), "digests of the weights were kept");
                        return Some(keys.iter().filter_map(|&key| Some((key, kept.get(key)?))).collect());
                    }
                },
            }
        }
        None
    }

    fn compute(
        &self,
        keys: &[ExpertKey],
        teller: &DigestsTeller,
    ) -> Result<(BTreeMap<ExpertKey, WeightDigest>, u64), muster_model::ModelError> {
        let Self { checkpoint, compute, dtype, threads, .. } = self;
        let (started, said) = (Instant::now(), Mutex::new(Instant::now()));
        let (known, bytes) = (AtomicUsize::new(0), AtomicU64::new(0));
        let done = |more: usize, size: usize| {
            let known = known.fetch_add(more, Ordering::Relaxed) + more;
            bytes.fetch_add(size as u64, Ordering::Relaxed);
            teller.progress(known);
            let mut said = said.lock().unwrap_or_else(PoisonError::into_inner);
            if said.elapsed() >= SAY_EVERY {
                *said = Instant::now();
                tracing::info!("checking weights: {known} of {} experts", keys.len());
            }
        };
        let found = digests(checkpoint, keys, *compute, *dtype, *threads, &done)?;
        let bytes = bytes.into_inner();
        let seconds = started.elapsed().as_secs_f64();
        tracing::info!(experts = keys.len(), bytes, seconds, "digests of the weights were computed");
        Ok((found, bytes))
    }

    /// Writes computed digests for the next start, if asked for or large enough.
    fn keep(&self, found: &BTreeMap<ExpertKey, WeightDigest>, bytes: u64) {
        if self.places.file.is_none() && bytes < WORTH_KEEPING {
            return;
        }
        let Some(path) = self.places.own(&self.checkpoint, self.compute, self.dtype) else {
            tracing::info!("digests of the weights are not kept: there is no place; see --digests");
            return;
        };
        let file = path.display();
        match DigestFile::new(&self.checkpoint, self.compute, self.dtype, found).write(&path) {
            Ok(()) => tracing::info!(%file, "digests of the weights are kept"),
            Err(error) => {
                tracing::warn!(%error, "digests of the weights cannot be kept and are computed at every start; see --digests");
            }
        }
    }
}

/// Digests with the files that hold each expert's weights.
fn reference(checkpoint: &Checkpoint, digests: &BTreeMap<ExpertKey, WeightDigest>) -> Reference {
    let mut names: HashMap<String, Arc<str>> = HashMap::new();
    let mut layers = vec![Vec::new(); checkpoint.spec().layers.len()];
    // `digests` is in ascending order and complete.
    for (key, digest) in digests {
        let role = |part| Role::Expert(key.layer.get(), key.expert.get(), part);
        let files: BTreeSet<&str> = [ExpertRole::Gate, ExpertRole::Up, ExpertRole::Down]
            .into_iter()
            .filter_map(|part| checkpoint.file_of(role(part)))
            .collect();
        let files = files.into_iter().collect::<Vec<_>>().join(" ");
        let files = names.entry(files).or_insert_with_key(|files| files.as_str().into());
        if let Some(layer) = layers.get_mut(key.layer.index()) {
            layer.push((*digest, Arc::clone(files)));
        }
    }
    Reference::new(layers)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use muster_checkpoint::Source;

    use super::*;

    /// A copy of the demo model.
    fn model(to: &Path) -> Arc<Checkpoint> {
        let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/demo");
        for entry in fs::read_dir(from).unwrap() {
            let path = entry.unwrap().path();
            if path.is_file() {
                fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
            }
        }
        open(to)
    }

    fn open(at: &Path) -> Arc<Checkpoint> {
        Arc::new(Checkpoint::open(&Source::Directory(at.to_owned())).unwrap())
    }

    fn checking(checkpoint: &Arc<Checkpoint>, places: Places) -> Checking {
        let threads = NonZeroUsize::new(2).unwrap();
        Checking {
            checkpoint: checkpoint.clone(),
            compute: Compute::Bf16,
            dtype: WeightDType::Q8,
            threads,
            places,
        }
    }

    /// Digests of all experts, once they are known.
    fn found(checking: Checking) -> Vec<WeightDigest> {
        let keys = ExpertSet::all_keys(&checking.checkpoint);
        let digests = start(checking).unwrap();
        digests.wait(|_, _| {});
        keys.into_iter().map(|key| digests.expected(key).unwrap()).collect()
    }

    fn until_written(path: &Path, not: &str) -> String {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            match fs::read_to_string(path) {
                Ok(text) if text != not => return text,
                _ => assert!(Instant::now() < deadline, "{} is not written", path.display()),
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn a_file_is_made_used_and_made_anew_when_it_is_stale_or_damaged() {
        let directory = tempfile::tempdir().unwrap();
        let (at, file) = (directory.path(), directory.path().join("kept/x.digests"));
        let checkpoint = model(at);
        let places = || Places { file: Some(file.clone()), ..Places::default() };
        let first = found(checking(&checkpoint, places()));
        let text = until_written(&file, "");
        // A sealed file of the same shards is used, even with other digests.
        let keys = ExpertSet::all_keys(&checkpoint);
        let other: BTreeMap<_, _> = keys.iter().map(|&key| (key, WeightDigest::new([1; 32]))).collect();
        let lies = DigestFile::new(&checkpoint, Compute::Bf16, WeightDType::Q8, &other);
        lies.write(&file).unwrap();
        assert_eq!(found(checking(&checkpoint, places())), vec![WeightDigest::new([1; 32]); keys.len()]);
        // A damaged file is not used.
        let sealed = fs::read_to_string(&file).unwrap();
        fs::write(&file, &sealed[..sealed.len() / 2]).unwrap();
        let cut = fs::read_to_string(&file).unwrap();
        assert_eq!(found(checking(&checkpoint, places())), first);
        assert_eq!(until_written(&file, &cut), text);
        // A file for another dtype is not used.
        assert_ne!(found(Checking { dtype: WeightDType::Q4, ..checking(&checkpoint, places()) }), first);
        let q4 = until_written(&file, &text);
        assert!(q4.contains("experts q4"), "{q4}");
        // A file for shards that changed is not used.
        lies.write(&file).unwrap();
        let before = fs::read_to_string(&file).unwrap();
        let shard = at.join("model-00001-of-00002.safetensors");
        let changed = fs::File::options().write(true).open(shard).unwrap();
        changed.set_modified(std::time::SystemTime::UNIX_EPOCH + Duration::from_secs(1)).unwrap();
        let checkpoint = open(at);
        assert!(
            lies.stale(&checkpoint, Compute::Bf16, WeightDType::Q8).unwrap().contains("shard model-00001")
        );
        assert_eq!(found(checking(&checkpoint, places())), first);
        until_written(&file, &before);
    }

    #[test]
    fn a_file_beside_the_model_is_found_and_small_models_leave_none_behind() {
        let directory = tempfile::tempdir().unwrap();
        let at = directory.path();
        let checkpoint = model(at);
        let places =
            || Places { model: Some(at.to_owned()), cache: Some(at.join("cache")), ..Places::default() };
        found(checking(&checkpoint, places()));
        assert!(!at.join("cache").exists() && !at.join(".muster").exists());
        let keys = ExpertSet::all_keys(&checkpoint);
        let other: BTreeMap<_, _> = keys.iter().map(|&key| (key, WeightDigest::new([1; 32]))).collect();
        let prepared = &places().candidates(&checkpoint, Compute::Bf16, WeightDType::Q8)[0];
        assert!(prepared.starts_with(at.join(".muster")));
        DigestFile::new(&checkpoint, Compute::Bf16, WeightDType::Q8, &other).write(prepared).unwrap();
        assert_eq!(found(checking(&checkpoint, places()))[0], WeightDigest::new([1; 32]));
    }

    #[test]
    fn files_that_cannot_be_read_are_told_of() {
        let directory = tempfile::tempdir().unwrap();
        let checkpoint = model(directory.path());
        let shard =
            fs::File::options().write(true).open(directory.path().join("model-00001-of-00002.safetensors"));
        shard.unwrap().set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
        let digests = start(checking(&checkpoint, Places::default())).unwrap();
        let deadline = Instant::now() + Duration::from_secs(60);
        while !digests.progress().is_some_and(|text| text.contains("model-00001-of-00002")) {
            assert!(Instant::now() < deadline, "{:?}", digests.progress());
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}
