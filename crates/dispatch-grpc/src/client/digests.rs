//! Expected digests of each expert's weights, and the workers whose weights differ.
//!
//! Always holds: no worker is connected before the digest of every expert is known, and none is used that announces
//! another one. A worker whose version tells no digests is used unverified. Does not know where digests come from.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use muster_proto::description::Description;
use muster_types::{ExpertKey, WeightDigest};
use tokio::sync::watch;

use super::error::{LinkError, OtherWeights};

/// Interval of the checks of a blocking wait.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// The digest of every expert of a model, and the files its weights lie in.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Reference(Vec<Vec<(WeightDigest, Arc<str>)>>);

impl Reference {
    /// By layer and expert: the digest, and the names of the files.
    #[must_use]
    pub const fn new(layers: Vec<Vec<(WeightDigest, Arc<str>)>>) -> Self {
        Self(layers)
    }

    fn get(&self, key: ExpertKey) -> Option<&(WeightDigest, Arc<str>)> {
        self.0.get(key.layer.index())?.get(key.expert.index())
    }
}

/// Knowledge of the expected digests.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Knowledge {
    /// Not checked: any weights are accepted.
    Unchecked,
    /// Number of experts known, of all, and the problem that holds up the rest.
    Underway {
        done: usize,
        total: usize,
        problem: Option<String>,
    },
    Known(Arc<Reference>),
}

/// See the module. Clones share one state.
#[derive(Debug, Clone)]
pub struct Digests {
    knowledge: watch::Receiver<Knowledge>,
    /// Workers that were refused, by their number, with the reason. At most as many as there are peers.
    refused: Arc<Mutex<BTreeMap<usize, OtherWeights>>>,
}

/// The publishing side of [`Digests`].
#[derive(Debug)]
pub struct DigestsTeller(watch::Sender<Knowledge>);

impl DigestsTeller {
    /// Publishes the number of known experts.
    pub fn progress(&self, known: usize) {
        self.change(|done, problem| (*done, *problem) = (known, None));
    }

    /// Publishes the problem that holds up the rest.
    pub fn problem(&self, text: String) {
        self.change(|_, problem| *problem = Some(text));
    }

    /// Publishes all digests.
    pub fn known(&self, reference: Reference) {
        self.0.send_replace(Knowledge::Known(Arc::new(reference)));
    }

    /// Whether a [`Digests`] is left.
    #[must_use]
    pub fn is_heard(&self) -> bool {
        self.0.receiver_count() > 0
    }

    fn change(&self, change: impl FnOnce(&mut usize, &mut Option<String>)) {
        self.0.send_modify(|knowledge| {
            if let Knowledge::Underway { done, problem, .. } = knowledge {
                change(done, problem);
            }
        });
    }
}

impl Drop for DigestsTeller {
    fn drop(&mut self) {
        self.problem("it stopped unexpectedly; see the log".to_owned());
    }
}

impl Digests {
    /// For `total` experts, none known yet.
    #[must_use]
    pub fn pending(total: usize) -> (DigestsTeller, Self) {
        let (teller, digests) = Self::of(Knowledge::Underway { done: 0, total, problem: None });
        (DigestsTeller(teller), digests)
    }

    /// Known from the start.
    #[must_use]
    pub fn known(reference: Reference) -> Self {
        Self::of(Knowledge::Known(Arc::new(reference))).1
    }

    /// For workers that need no check, because they read the very files of whoever asks them, or have none.
    #[must_use]
    pub fn unchecked() -> Self {
        Self::of(Knowledge::Unchecked).1
    }

    fn of(knowledge: Knowledge) -> (watch::Sender<Knowledge>, Self) {
        let (teller, knowledge) = watch::channel(knowledge);
        (teller, Self { knowledge, refused: Arc::default() })
    }

    /// Waits until workers can be checked.
    pub(super) async fn settled(&self) {
        let mut knowledge = self.knowledge.clone();
        let settled = |now: &Knowledge| !matches!(now, Knowledge::Underway { .. });
        if knowledge.wait_for(settled).await.is_err() {
            // The publishing side is gone, which `progress` reports.
            std::future::pending::<()>().await;
        }
    }

    /// As [`Self::settled`], blocking; `look` gets the numbers of known and of all experts.
    pub fn wait(&self, mut look: impl FnMut(usize, usize)) {
        // No borrow while it sleeps, which would block the publishing side.
        let underway = || match &*self.knowledge.borrow() {
            Knowledge::Underway { done, total, .. } => Some((*done, *total)),
            Knowledge::Unchecked | Knowledge::Known(_) => None,
        };
        while let Some((done, total)) = underway() {
            look(done, total);
            std::thread::sleep(LOOK_EVERY);
        }
    }

    /// The missing knowledge, in words; `None` when all is known.
    #[must_use]
    pub fn progress(&self) -> Option<String> {
        match &*self.knowledge.borrow() {
            Knowledge::Underway { done, total, problem } => {
                let problem = problem.as_ref().map(|text| format!(": {text}")).unwrap_or_default();
                Some(format!("checking weights: {done} of {total} experts{problem}"))
            }
            Knowledge::Unchecked | Knowledge::Known(_) => None,
        }
    }

    /// Expected digest of an expert, if known.
    #[must_use]
    pub fn expected(&self, key: ExpertKey) -> Option<WeightDigest> {
        match &*self.knowledge.borrow() {
            Knowledge::Known(reference) => reference.get(key).map(|(digest, _)| *digest),
            Knowledge::Unchecked | Knowledge::Underway { .. } => None,
        }
    }

    /// Compares the digests that a worker announces with the expected ones.
    pub(super) fn compare(&self, description: &Description) -> Result<(), LinkError> {
        let knowledge = self.knowledge.borrow();
        let Knowledge::Known(reference) = &*knowledge else { return Ok(()) };
        let told = description.holdings.iter().zip(&description.digests);
        let mut wrong = told.filter_map(|(&key, &theirs)| {
            let (ours, files) = reference.get(key)?;
            (*ours != theirs).then_some((key, *ours, theirs, files))
        });
        let Some((expert, ours, theirs, files)) = wrong.next() else { return Ok(()) };
        let (worker, files) = (description.worker.clone(), Arc::clone(files));
        let others = wrong.count();
        Err(LinkError::Weights(Box::new(OtherWeights { worker, expert, ours, theirs, files, others })))
    }

    fn refused(&self) -> MutexGuard<'_, BTreeMap<usize, OtherWeights>> {
        // Nothing panics while it holds the lock.
        self.refused.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records the outcome of a peer's comparison; true for a new refusal or a new reason.
    pub(super) fn note(&self, peer: usize, outcome: Result<(), &LinkError>) -> bool {
        let mut refused = self.refused();
        match outcome {
            Err(LinkError::Weights(reason)) => {
                refused.insert(peer, (**reason).clone()).as_ref() != Some(reason.as_ref())
            }
            _ => {
                refused.remove(&peer);
                false
            }
        }
    }

    /// Reasons of the refused workers, one sentence each.
    #[must_use]
    pub fn refusals(&self) -> Vec<String> {
        self.refused().values().map(|other| format!("{other}; {}", OtherWeights::REMEDY)).collect()
    }
}

#[cfg(test)]
mod tests {
    use muster_types::{ExpertId, LayerId, WorkerId};

    use super::*;

    #[test]
    fn a_refusal_is_noted_once_and_forgotten_when_it_is_over() {
        let digests = Digests::unchecked();
        let other = |expert| {
            let (layer, expert) = (LayerId::new(0, 1).unwrap(), ExpertId::new(expert, 2).unwrap());
            let of = |byte| WeightDigest::new([byte; 32]);
            let (worker, files) = (WorkerId::new("w").unwrap(), "a.safetensors".into());
            let expert = ExpertKey { layer, expert };
            let (ours, theirs) = (of(0xaa), of(0xbb));
            LinkError::Weights(Box::new(OtherWeights { worker, expert, ours, theirs, files, others: 0 }))
        };
        assert!(digests.note(3, Err(&other(0))));
        assert!(!digests.note(3, Err(&other(0))));
        assert!(digests.note(3, Err(&other(1))), "for another reason");
        let text = digests.refusals().concat();
        for part in
            ["worker w", "layer 0 expert 1", &"aa".repeat(32), &"bb".repeat(32), "sha256sum a.safetensors"]
        {
            assert!(text.contains(part), "{part} in {text}");
        }
        assert!(!digests.note(3, Err(&LinkError::Unreachable("gone".into()))));
        assert!(digests.refusals().is_empty());
    }

    #[test]
    fn whoever_was_to_tell_and_died_is_told_of() {
        let (teller, digests) = Digests::pending(7);
        teller.progress(3);
        assert_eq!(digests.progress().unwrap(), "checking weights: 3 of 7 experts");
        drop(teller);
        assert!(digests.progress().unwrap().contains("stopped unexpectedly"));
        let (teller, digests) = Digests::pending(7);
        teller.known(Reference::default());
        drop(teller);
        assert_eq!(digests.progress(), None);
    }
}
