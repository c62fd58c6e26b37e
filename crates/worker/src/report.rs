//! A worker's readiness and metrics.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use muster_admin::Readiness;
use muster_dispatch_grpc::{Custody, Held, Pressure, Smoothed};

use crate::holder::Holder;

/// Interval of metric updates.
const EVERY: Duration = Duration::from_secs(1);
/// Time over which pressure is averaged: long enough that one request does not add a worker.
const OVER: Duration = Duration::from_secs(15);

/// Inputs of readiness.
pub(crate) struct Standing {
    pub(crate) holder: Arc<Holder>,
    /// Number of memberships with routers.
    pub(crate) known: Arc<AtomicUsize>,
    /// Whether it joins routers.
    pub(crate) joins: bool,
}

impl Standing {
    pub(crate) fn readiness(&self) -> Readiness {
        if self.joins && self.known.load(Ordering::Relaxed) == 0 {
            return Readiness::NotReady(
                "no router knows this worker; see the log for the routers' answers".to_owned(),
            );
        }
        match self.holder.loading() {
            0 => Readiness::Ready,
            loading => Readiness::Degraded(format!("{loading} experts are still to be loaded")),
        }
    }
}

/// Keeps metrics up to date, for as long as it is polled.
pub(crate) async fn measure(holder: Arc<Holder>, capacity: u64, pressure: Arc<Pressure>) {
    let (mut smoothed, mut looked) = (Smoothed::new(OVER), Instant::now());
    metrics::gauge!("muster_worker_capacity_bytes").set(capacity as f64);
    loop {
        let now = Instant::now();
        let part = smoothed.look(pressure.worked_so_far(), now - looked);
        looked = now;
        metrics::gauge!("muster_worker_pressure").set(part);
        let Held { experts, resident_bytes, loading, useful, full, .. } = holder.held();
        metrics::gauge!("muster_worker_experts").set(experts.len() as f64);
        metrics::gauge!("muster_worker_loading_experts").set(loading as f64);
        metrics::gauge!("muster_worker_resident_bytes").set(resident_bytes as f64);
        for (name, after) in [("useful", useful), ("full", full)] {
            if let Some(after) = after {
                metrics::gauge!("muster_worker_start_seconds", "until" => name).set(after.as_secs_f64());
            }
        }
        tokio::time::sleep(EVERY).await;
    }
}
