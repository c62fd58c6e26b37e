//! Who can be sent what, as of one moment.
//!
//! Always holds: there is a hop and a rank for every worker of the placement. Never changes once it is made.

use std::sync::Arc;

use muster_engine::batcher::Rank;
use muster_placement::{Placement, Shape, WorkerIx};
use muster_proto::description::Description;
use muster_types::{Epoch, ExpertKey, WorkerId};

use super::config::LinkError;

/// See the module.
pub(super) struct Routes {
    pub(super) placement: Arc<Placement>,
    /// The same without this process.
    pub(super) elsewhere: Arc<Placement>,
    /// For every worker of the placement.
    hops: Vec<Hop>,
    /// For every worker: whether another is to be asked first.
    ranks: Vec<Rank>,
}

impl Routes {
    /// Routes to workers that announce themselves so, all as good as each other; and to this process, if it computes as
    /// well.
    ///
    /// # Errors
    /// When their holdings make no placement.
    pub(super) fn new(
        epoch: Epoch,
        shape: &Shape,
        live: &[(Hop, &Description)],
        here: Option<(Hop, &Description)>,
    ) -> Result<Self, LinkError> {
        let place = |held: &[(WorkerId, Vec<ExpertKey>)]| {
            let placement = Placement::from_holdings(epoch, shape, held);
            placement.map(Arc::new).map_err(|error| LinkError::Placement(error.to_string()))
        };
        let mut held: Vec<(WorkerId, Vec<ExpertKey>)> =
            live.iter().map(|(_, d)| (d.worker.clone(), d.holdings.clone())).collect();
        let mut hops: Vec<Hop> = live.iter().map(|(hop, _)| *hop).collect();
        let elsewhere = place(&held)?;
        let placement = match here {
            None => Arc::clone(&elsewhere),
            Some((hop, description)) => {
                held.push((description.worker.clone(), description.holdings.clone()));
                hops.push(hop);
                place(&held)?
            }
        };
        Ok(Self { placement, elsewhere, ranks: vec![Rank::Good; hops.len()], hops })
    }

    /// The same routes, ranked anew; `None` when that changes nothing.
    pub(super) fn ranked(&self, rank: impl Fn(&Hop) -> Rank) -> Option<Self> {
        let ranks: Vec<Rank> = self.hops.iter().map(rank).collect();
        let Self { placement, elsewhere, hops, .. } = self;
        (ranks != self.ranks).then(|| Self {
            placement: Arc::clone(placement),
            elsewhere: Arc::clone(elsewhere),
            hops: hops.clone(),
            ranks,
        })
    }

    pub(super) fn rank(&self, worker: WorkerIx) -> Rank {
        self.ranks.get(worker.index()).copied().unwrap_or(Rank::Unusable)
    }

    pub(super) fn hop(&self, worker: WorkerIx) -> Option<(Hop, &WorkerId)> {
        self.hops.get(worker.index()).copied().zip(self.placement.workers().get(worker.index()))
    }
}

/// The way to a worker.
#[derive(Debug, Clone, Copy)]
pub(super) struct Hop {
    pub(super) peer: usize,
    pub(super) session: u64,
    /// Epoch of the description that these routes were made from.
    pub(super) epoch: Epoch,
}
