//! Health and status of the cluster as this router knows it, for probes and operators.

use std::collections::HashMap;
use std::num::NonZeroU32;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use muster_dispatch_grpc::{Digests, HealthHandle, WorkerHealth, WorkerState};
use muster_proto::cluster::v1;
use muster_proto::cluster::v1::status_reply::Health as WireHealth;
use muster_proto::cluster::v1::worker_status::State as WireState;

use super::discovery::Discovery;
use crate::health::Health;
use crate::pulse::Pulse;

/// State published by the leader's task.
#[derive(Default)]
pub(crate) struct LeaderView(Mutex<View>);

#[derive(Default)]
struct View {
    /// Term in which this router leads, and the imbalance of its plan.
    leads: Option<(u64, f64)>,
    /// Latest row counts, by session.
    rows: HashMap<u64, u64>,
    /// Reason for which this router cannot lead, if any.
    barred: Option<String>,
}

impl LeaderView {
    fn lock(&self) -> MutexGuard<'_, View> {
        // Nothing panics while it holds the lock.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn leads(&self, term: u64, imbalance: f64) {
        metrics::gauge!("muster_placement_leads").set(1.0);
        self.lock().leads = Some((term, imbalance));
    }

    pub(crate) fn resigned(&self) {
        metrics::gauge!("muster_placement_leads").set(0.0);
        self.lock().leads = None;
    }

    fn bar(&self) -> Option<String> {
        self.lock().barred.as_ref().map(|by| format!("this router cannot lead the placement: {by}"))
    }

    /// Sets or clears the reason for which this router cannot lead.
    pub(crate) fn barred(&self, by: Option<String>) {
        self.lock().barred = by;
    }

    pub(crate) fn counted(&self, rows: HashMap<u64, u64>) {
        self.lock().rows = rows;
    }
}

/// The cluster as this router knows it.
pub(crate) struct Cluster {
    pub(crate) router: String,
    pub(crate) workers: HealthHandle,
    /// Expected digests of the experts' weights, and the workers refused for others.
    pub(crate) digests: Digests,
    pub(crate) leader: Arc<LeaderView>,
    pub(crate) pulse: Arc<Pulse>,
    pub(crate) discovery: Discovery,
    /// Routed experts of the model.
    pub(crate) experts: u32,
    /// Wanted replicas of each expert.
    pub(crate) replicas: NonZeroU32,
    /// Set once this router is about to end.
    pub(crate) is_leaving: AtomicBool,
}

impl Cluster {
    /// Whether every expert has a reachable owner.
    pub(crate) fn is_covered(&self) -> bool {
        self.workers.unreachable_experts() == 0
    }

    /// Marks this router as about to end, so that health turns to not ready.
    pub(crate) fn leave(&self) {
        self.is_leaving.store(true, Ordering::Relaxed);
    }

    pub(crate) fn health(&self) -> Health {
        if self.is_leaving.load(Ordering::Relaxed) {
            return Health::NotReady { reason: "this router is about to end".to_owned() };
        }
        let (missing, unreachable) = (self.workers.missing_experts(), self.workers.unreachable_experts());
        if unreachable > 0 {
            // No worker is connected before the expected digests are known.
            let none = || format!("{unreachable} experts have no live worker");
            let mut reasons = vec![self.digests.progress().unwrap_or_else(none)];
            reasons.extend(self.digests.refusals());
            reasons.extend(self.discovery.findings());
            reasons.extend(self.leader.bar());
            return Health::NotReady { reason: reasons.join("; ") };
        }
        if let Some(trouble) = self.pulse.trouble() {
            return Health::NotReady { reason: format!("tokens do not come: {trouble}") };
        }
        let mut reasons = Vec::new();
        if missing > 0 {
            reasons.push(format!(
                "{missing} experts have no live worker and are computed by the router, slowly"
            ));
        }
        let under = self.workers.fewer_copies_than(self.replicas);
        if under > missing {
            reasons.push(format!("{} experts have fewer copies than {}", under - missing, self.replicas));
        }
        let of =
            |is: fn(&WorkerState) -> bool| self.workers.workers().iter().filter(|w| is(&w.state)).count();
        reasons.extend(self.digests.progress());
        let refused = self.digests.refusals();
        // Refused workers are reachable, so they are not counted as down.
        let down = of(|state| matches!(state, WorkerState::Down { .. })).saturating_sub(refused.len());
        reasons.extend(refused);
        match down {
            0 => {}
            1 => reasons.push("a worker cannot be reached".to_owned()),
            down => reasons.push(format!("{down} workers cannot be reached")),
        }
        reasons.extend(self.discovery.problems());
        reasons.extend(self.leader.bar());
        if reasons.is_empty() { Health::Ready } else { Health::Degraded { reasons } }
    }

    /// The complete status.
    pub(crate) fn status(&self) -> v1::StatusReply {
        let (health, reasons) = match self.health() {
            Health::Ready => (WireHealth::Ready, Vec::new()),
            Health::Degraded { reasons } => (WireHealth::Degraded, reasons),
            Health::NotReady { reason } => (WireHealth::NotReady, vec![reason]),
        };
        let (leads, rows) = {
            let view = self.leader.lock();
            (view.leads, view.rows.clone())
        };
        let (term, imbalance) = leads.unwrap_or_default();
        v1::StatusReply {
            router_id: self.router.clone(),
            health: health.into(),
            reasons,
            epoch: self.workers.epoch(),
            leads: leads.is_some(),
            term,
            experts: self.experts,
            missing_experts: u32::try_from(self.workers.missing_experts()).unwrap_or(u32::MAX),
            workers: self.workers.workers().iter().map(|worker| worker_status(worker, &rows)).collect(),
            imbalance,
            numerics: self.workers.bound().to_string(),
        }
    }
}

fn worker_status(worker: &WorkerHealth, rows: &HashMap<u64, u64>) -> v1::WorkerStatus {
    let announced = worker.announced.as_deref();
    let (state, reason) = match &worker.state {
        WorkerState::Connected => (WireState::Serving, String::new()),
        WorkerState::Draining => (WireState::Draining, String::new()),
        WorkerState::Down { reason, .. } => (WireState::Down, reason.clone()),
    };
    let millis =
        |time: Option<Duration>| time.map_or(0, |time| u64::try_from(time.as_millis()).unwrap_or(u64::MAX));
    v1::WorkerStatus {
        worker_id: announced.map_or_else(String::new, |d| d.worker.as_str().to_owned()),
        address: worker.address.clone(),
        state: state.into(),
        reason,
        experts: announced.map_or(0, |d| u32::try_from(d.holdings.len()).unwrap_or(u32::MAX)),
        loading: announced.map_or(0, |d| d.loading),
        resident_bytes: announced.map_or(0, |d| d.resident_bytes),
        capacity_bytes: announced.map_or(0, |d| d.capacity),
        speed: announced.map_or(0.0, |d| d.speed.get()),
        domain: worker.domain.clone().unwrap_or_default(),
        epoch: announced.map_or(0, |d| d.epoch.get()),
        late_shards: u32::try_from(worker.late_shards).unwrap_or(u32::MAX),
        banned_ms: u32::try_from(worker.banned.as_millis()).unwrap_or(u32::MAX),
        useful_ms: millis(announced.and_then(|d| d.useful)),
        full_ms: millis(announced.and_then(|d| d.full)),
        unverified_experts: announced.map_or(0, |d| {
            u32::try_from(d.holdings.len() - d.digests.len().min(d.holdings.len())).unwrap_or(u32::MAX)
        }),
        numerics: announced.map_or_else(String::new, |d| d.numerics.to_string()),
        trouble: announced.and_then(|d| d.trouble.clone()).unwrap_or_default(),
        rows: worker.session.and_then(|session| rows.get(&session)).copied().unwrap_or(0),
    }
}
