//! gRPC as a transport of delivery, on the engine thread, which drives the network itself while it sends and waits.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use muster_engine::delivery::{Closed, Event, Hop, Outgoing, Transport, Unsent, Wanted};
use muster_engine::dispatch::{DispatchError, Place, Rows};
use muster_proto::expert::v1;
use muster_proto::frame;
use muster_types::{Combine, DType};

use super::cluster::ClusterHandle;
use super::handle::{HealthHandle, Samples, StatsHandle};
use super::links::Links;
use super::outputs::WireRows;
use crate::busy::BusyPoll;
use crate::driver::{Driver, Reins};

/// Bytes out or back from which the keeper thread drives the network until they are collected: they exceed the sockets'
/// buffers, and the engine thread may compute meanwhile.
const LARGE_BYTES: usize = 256 << 10;

/// Workers in other processes, as delivery sees them.
pub struct Carrier {
    pub(super) links: Arc<Links>,
    pub(super) cluster: ClusterHandle,
    pub(super) samples: Arc<Samples>,
    pub(super) hidden: usize,
    pub(super) wire: DType,
    pub(super) combine: Combine,
    pub(super) deadline_ms: u32,
    pub(super) busy_poll: Duration,
    pub(super) reins: Reins,
    /// `None` once closed.
    pub(super) driver: Option<Driver>,
    /// Bytes of the largest shard since the last flush, out or back.
    pub(super) largest: usize,
}

impl Carrier {
    /// Handle to the workers' health, for other threads.
    #[must_use]
    pub fn health(&self) -> HealthHandle {
        HealthHandle(Arc::clone(&self.links))
    }

    /// Handle to the cluster's workers and their control calls, for other threads.
    #[must_use]
    pub fn cluster(&self) -> ClusterHandle {
        self.cluster.clone()
    }

    /// Handle to timing samples, for other threads.
    #[must_use]
    pub fn stats(&self) -> StatsHandle {
        StatsHandle(Arc::clone(&self.samples))
    }
}

impl Transport for Carrier {
    type Load = Bytes;
    type Outputs = WireRows;

    fn now(&self) -> Instant {
        Instant::now()
    }

    fn gather(&self, rows: Rows<'_>, picked: &[u32]) -> Result<Bytes, DispatchError> {
        match (rows.f32(), rows.bf16()) {
            (Some(rows), _) => Ok(frame::gather_f32(rows, self.hidden, picked)),
            (_, Some(rows)) => Ok(frame::gather_bf16(rows, self.hidden, picked)),
            (None, None) => Err(DispatchError::misplaced("rows", rows.place(), Place::Host)),
        }
    }

    fn pick(&self, load: &Bytes, picked: &[u32]) -> Bytes {
        let width = self.hidden * self.wire.size();
        if picked.len() * width == load.len() {
            return load.clone();
        }
        let rows = picked.iter().filter_map(|&row| load.get(row as usize * width..)?.get(..width));
        rows.collect::<Vec<_>>().concat().into()
    }

    fn send(&mut self, hop: Hop, lane: usize, shard: &Outgoing<'_, Bytes>) -> Result<(), Unsent> {
        let Outgoing { id, layer, epoch, plan, load, weights } = *shard;
        let request = v1::LayerShard {
            id,
            layer: layer.get(),
            epoch: epoch.get(),
            deadline_ms: self.deadline_ms,
            // Counted in 32 bits by the plan.
            rows: plan.rows.len() as u32,
            data: load.clone(),
            experts: plan.experts.iter().map(|expert| expert.get()).collect(),
            counts: plan.counts.clone(),
            indices: plan.indices.clone(),
            weights: weights.to_vec(),
        };
        self.links.send(hop, lane, request)?;
        let rows = plan.rows.len().max(plan.answers(self.combine));
        self.largest = self.largest.max(rows.saturating_mul(self.hidden * self.wire.size()));
        Ok(())
    }

    fn flush(&mut self) {
        // Until the sockets have taken what they can.
        self.reins.drive(tokio::task::yield_now());
        if std::mem::take(&mut self.largest) >= LARGE_BYTES {
            self.reins.lend();
        }
    }

    fn poll(&mut self, events: &mut Vec<Event<WireRows>>) {
        self.links.poll(events);
    }

    fn wait(&mut self, wanted: &Wanted, events: &mut Vec<Event<WireRows>>) -> Result<(), Closed> {
        let mut busy = BusyPoll::start(self.busy_poll);
        self.reins.drive(self.links.wait(wanted, &mut busy, events)).unwrap_or(Err(Closed))
    }

    fn version(&self) -> u64 {
        self.links.version()
    }

    fn doubt(&mut self, hop: Hop, late: usize, in_doubt: bool) {
        self.links.doubt(hop, late, in_doubt);
    }

    fn ban(&mut self, hop: Hop, reason: &str) {
        self.links.ban(hop, reason);
    }

    fn close(&mut self) {
        self.links.close();
        // Its tasks end with it.
        self.driver = None;
    }
}

impl Drop for Carrier {
    fn drop(&mut self) {
        self.close();
    }
}
