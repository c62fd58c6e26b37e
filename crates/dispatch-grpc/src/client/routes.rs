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
    pub(super) fn new<'a>(
        epoch: Epoch,
        shape: &Shape,
        live: impl Iterator<Item = &'a Announced>,
        here: Option<&'a Announced>,
    ) -> Result<Self, LinkError> {
        let place = |announced: &[&Announced]| {
            let held: Vec<(&WorkerId, &[ExpertKey])> =
                announced.iter().map(|(_, told)| (&told.worker, &told.holdings[..])).collect();
            let placement = Placement::of(epoch, shape, &held);
            placement.map(Arc::new).map_err(|error| LinkError::Placement(error.to_string()))
        };
        let mut all: Vec<&Announced> = live.collect();
        let elsewhere = place(&all)?;
        all.extend(here);
        let placement = if here.is_some() { place(&all)? } else { Arc::clone(&elsewhere) };
        let hops: Vec<Hop> = all.iter().map(|(hop, _)| *hop).collect();
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

/// The way to a worker, and what it announces.
pub(super) type Announced = (Hop, Arc<Description>);

/// The way to a worker.
#[derive(Debug, Clone, Copy)]
pub(super) struct Hop {
    pub(super) peer: usize,
    pub(super) session: u64,
    /// Epoch of the description that these routes were made from.
    pub(super) epoch: Epoch,
}
