//! A leader's calls to a worker: the grant of the lease, and orders of what to hold.
//!
//! Always holds: orders come from one router at a time, the one that was granted the lease last, and never an older one
//! after a newer. A [`Custody`] carries them out.

use std::num::NonZeroU64;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use muster_placement::lease::{Ask, Grant, Term, Verdict};
use muster_proto::control::{Assignment, LeadAnswer, LeadAsk};
use muster_proto::convert::RouterName;
use muster_types::{Epoch, ExpertId, ExpertKey, LayerId, WeightDigest};

use super::weights::WeightSource;

/// Holder of a worker's experts, which carries out orders.
pub trait Custody: WeightSource {
    /// Sets the experts to hold from now on, and returns soon. Called from a thread that may block.
    fn assign(&self, assignment: Assignment);

    /// Experts held and experts to load. Called from a thread that may block.
    fn held(&self) -> Held;
}

/// A worker's holdings, as it announces them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held {
    /// Servable experts, strictly ascending.
    pub experts: Vec<ExpertKey>,
    /// Digest of each one's weights.
    pub digests: Vec<WeightDigest>,
    /// Bytes of experts in memory.
    pub resident_bytes: u64,
    /// Number of experts still to load.
    pub loading: usize,
    /// Time from the start to the first expert.
    pub useful: Option<Duration>,
    /// Time from the start to the last expert of the first order.
    pub full: Option<Duration>,
    /// The last source of weights that was passed over for damaged or different weights.
    pub trouble: Option<String>,
}

/// A worker's grant and its last order.
pub(super) struct Obedience {
    origin: Instant,
    state: Mutex<State>,
}

struct State {
    grant: Grant,
    /// The last accepted order.
    operation: Option<(Term, NonZeroU64)>,
}

/// Why an order was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum Disobeyed {
    #[error("this worker obeys another router or term; ask for the lead first")]
    NotLeader,
    #[error("operation {given} is older than {last}, which was taken")]
    Older { given: u64, last: u64 },
}

impl Obedience {
    pub(super) fn new() -> Self {
        Self { origin: Instant::now(), state: Mutex::new(State { grant: Grant::default(), operation: None }) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics while it holds the lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Answers a request for the lead. `epoch` gives the description's epoch after a grant.
    pub(super) fn lead(&self, ask: &LeadAsk, epoch: impl FnOnce() -> Epoch) -> LeadAnswer {
        let (now, mut state) = (self.origin.elapsed(), self.lock());
        let before = state.grant.term();
        let wanted = Ask { term: Term::new(ask.term.get()), ttl: ask.ttl };
        let reply = state.grant.ask(now, ask.router.as_str(), wanted);
        if reply.verdict == Verdict::Granted && reply.term != before {
            tracing::info!(router = %ask.router, term = %reply.term, "obeying a new leader");
        }
        LeadAnswer {
            granted: reply.verdict == Verdict::Granted,
            holder: reply.holder.and_then(|name| RouterName::new(&name).ok()),
            term: reply.term.get(),
            left: reply.left,
            epoch: epoch(),
        }
    }

    /// Whether a router leads now.
    pub(super) fn is_led(&self) -> bool {
        self.lock().grant.is_held(self.origin.elapsed())
    }

    /// Accepts an order of the leader that is not older than the last. Orders come one at a time, each carried out before the
    /// next.
    pub(super) fn admit(&self, assignment: &Assignment) -> Result<(), Disobeyed> {
        let mut state = self.lock();
        let (term, operation) = (Term::new(assignment.term.get()), assignment.operation);
        if !state.grant.obeys(assignment.router.as_str(), term) {
            return Err(Disobeyed::NotLeader);
        }
        if let Some((_, last)) = state.operation.filter(|(of, last)| *of == term && *last > operation) {
            return Err(Disobeyed::Older { given: operation.get(), last: last.get() });
        }
        state.operation = Some((term, operation));
        Ok(())
    }
}

/// Rows computed, by layer and expert.
pub(super) struct RowCounts(Vec<Vec<AtomicU64>>);

impl RowCounts {
    pub(super) fn new(experts: &[u32]) -> Self {
        Self(experts.iter().map(|&count| (0..count).map(|_| AtomicU64::new(0)).collect()).collect())
    }

    pub(super) fn add(&self, layer: LayerId, expert: ExpertId, rows: usize) {
        if let Some(count) = self.0.get(layer.index()).and_then(|layer| layer.get(expert.index())) {
            count.fetch_add(rows as u64, Ordering::Relaxed);
        }
    }

    pub(super) fn snapshot(&self) -> Vec<Vec<u64>> {
        let layer =
            |layer: &Vec<AtomicU64>| layer.iter().map(|count| count.load(Ordering::Relaxed)).collect();
        self.0.iter().map(layer).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(router: &str, term: u64) -> LeadAsk {
        LeadAsk {
            router: RouterName::new(router).unwrap(),
            term: NonZeroU64::new(term).unwrap(),
            ttl: Duration::from_secs(60),
        }
    }

    fn order(router: &str, term: u64, operation: u64) -> Assignment {
        Assignment {
            router: RouterName::new(router).unwrap(),
            term: NonZeroU64::new(term).unwrap(),
            operation: NonZeroU64::new(operation).unwrap(),
            seen: Epoch::new(1),
            keep: vec![],
            load: vec![],
            peers: vec![],
        }
    }

    fn lead(obedience: &Obedience, ask: &LeadAsk) -> LeadAnswer {
        obedience.lead(ask, || Epoch::new(1))
    }

    #[test]
    fn orders_are_the_leader_s_and_never_older() {
        let obedience = Obedience::new();
        assert!(!obedience.is_led());
        assert_eq!(obedience.admit(&order("a", 1, 1)), Err(Disobeyed::NotLeader));
        assert!(lead(&obedience, &ask("a", 1)).granted);
        assert!(obedience.is_led());
        assert_eq!(obedience.admit(&order("a", 1, 2)), Ok(()));
        assert_eq!(obedience.admit(&order("a", 1, 2)), Ok(()), "again");
        assert_eq!(obedience.admit(&order("a", 1, 1)), Err(Disobeyed::Older { given: 1, last: 2 }));
        assert_eq!(obedience.admit(&order("a", 2, 9)), Err(Disobeyed::NotLeader));
        assert_eq!(obedience.admit(&order("b", 1, 9)), Err(Disobeyed::NotLeader));
        let refused = lead(&obedience, &ask("b", 2));
        assert!(!refused.granted);
        assert_eq!(refused.holder.map(|name| name.to_string()).as_deref(), Some("a"));
        // A higher term of the same router begins to count anew.
        assert!(lead(&obedience, &ask("a", 3)).granted);
        assert_eq!(obedience.admit(&order("a", 3, 1)), Ok(()));
    }

    #[test]
    fn rows_are_counted_per_expert() {
        let counts = RowCounts::new(&[2, 0, 1]);
        let (layer, expert) = (LayerId::new(0, 3).unwrap(), ExpertId::new(1, 2).unwrap());
        counts.add(layer, expert, 3);
        counts.add(layer, expert, 4);
        counts.add(LayerId::new(1, 3).unwrap(), expert, 4);
        assert_eq!(counts.snapshot(), [vec![0, 7], vec![], vec![0]]);
    }
}
