//! Holding a `coordination.k8s.io/v1` Lease.
//!
//! Always holds, whatever the API server, the network or the scheduler of this machine do: a process holds the Lease only
//! until [`LeaseTimes::hold`] after it *sent* the request that was granted, by its own monotonic clock; and it takes
//! another's Lease only when the object did not change for as long as it promises, counted from when this process *got* it.
//! The first time is shorter than the second, so one lets go before another takes over, as long as their clocks run about
//! equally fast. Every change names the version of the object that it was decided by, so of several that take it at once one
//! succeeds. Wall clocks are written for people, and never read. Only a deletion of the object gives it away before its time:
//! its holder stops when it notices.
//!
//! An identity is used by one process ever, so a Lease under it was written by this process. Knows nothing of the work done
//! under the Lease.

use std::time::Duration;

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::api::{ObjectMeta, PostParams};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::api::{Access, Api, ApiError, found, within};
use crate::source::ObjectName;

/// Longest promise of another's Lease that is respected.
const LONGEST: Duration = Duration::from_secs(300);
/// Deadline of giving the Lease back at exit.
const RELEASE: Duration = Duration::from_secs(2);

/// Intervals and durations of a Lease.
#[derive(Debug, Clone, Copy)]
pub struct LeaseTimes {
    /// Time that others wait after the last renewal; whole seconds.
    pub duration: Duration,
    /// Time for which it is held after sending a renewal. Less than `duration`: the difference covers clocks that run
    /// unequally, and the time to notice.
    pub hold: Duration,
    /// Interval of renewals, or of checks of another's.
    pub renew: Duration,
    /// Deadline of one request.
    pub patience: Duration,
}

impl Default for LeaseTimes {
    fn default() -> Self {
        Self {
            duration: Duration::from_secs(6),
            hold: Duration::from_secs(5),
            renew: Duration::from_millis(1500),
            patience: Duration::from_millis(1500),
        }
    }
}

/// State of a Lease.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Held {
    until: Option<Instant>,
    /// Its holder, if known.
    pub holder: Option<String>,
    /// Why it cannot be taken or kept, in a sentence without addresses.
    pub problem: Option<String>,
}

impl Held {
    /// Whether this process holds it at this moment.
    #[must_use]
    pub fn is_held(&self) -> bool {
        self.until.is_some_and(|until| Instant::now() < until)
    }

    /// When that ends without a renewal.
    #[must_use]
    pub fn until(&self) -> Option<Instant> {
        self.until
    }
}

/// Tries to hold a Lease, while this value exists.
pub struct Tenure {
    held: watch::Receiver<Held>,
    stop: Option<oneshot::Sender<()>>,
    task: JoinHandle<()>,
}

impl Tenure {
    /// Starts to try, under a name that no other process ever has.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    #[must_use]
    pub fn start(api: Api, lease: ObjectName, identity: String, times: LeaseTimes) -> Self {
        let (sender, held) = watch::channel(Held::default());
        let (stop, stopped) = oneshot::channel();
        let candidate = Candidate { api, lease, identity, times, sender, ours: None, others: None };
        Self { held, stop: Some(stop), task: tokio::spawn(candidate.run(stopped)) }
    }

    /// The state, and its changes. The end of the time notifies nobody: ask [`Held::is_held`].
    #[must_use]
    pub fn held(&self) -> watch::Receiver<Held> {
        self.held.clone()
    }

    /// Gives it back, so that another can take it at once. The work under it must have ended.
    pub async fn release(mut self) {
        drop(self.stop.take());
        // The task has a deadline of its own.
        let _ = (&mut self.task).await;
    }
}

impl Drop for Tenure {
    fn drop(&mut self) {
        // Unless it was released, it runs out by itself.
        self.task.abort();
    }
}

struct Candidate {
    api: Api,
    lease: ObjectName,
    identity: String,
    times: LeaseTimes,
    sender: watch::Sender<Held>,
    /// The object as this process wrote it last, while it may be current.
    ours: Option<Lease>,
    /// Version of the object under another holder, and the time when this process first read it.
    others: Option<(String, Instant)>,
}

/// Next step for the Lease's current state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Move {
    Renew,
    Take,
    Wait,
}

impl Candidate {
    async fn run(mut self, mut stopped: oneshot::Receiver<()>) {
        loop {
            let begun = Instant::now();
            let outcome = tokio::select! {
                // A request that is cut off may be carried out; the Lease is ours then, and is released below.
                _ = &mut stopped => break,
                outcome = self.turn() => outcome,
            };
            let pause = match outcome {
                Ok(()) => self.times.renew.saturating_sub(begun.elapsed()),
                // Another writer was faster, or this process's own last request: read again.
                Err(ApiError::Conflict) => self.times.renew / 8,
                // It was deleted.
                Err(ApiError::NotFound) => {
                    self.tell(None, None);
                    self.times.renew / 8
                }
                Err(error) => {
                    self.complain(&error);
                    self.times.renew / 2
                }
            };
            tokio::select! {
                _ = &mut stopped => break,
                () = tokio::time::sleep(pause) => {}
            }
        }
        // This process stops holding it before others may take it.
        self.sender.send_modify(|held| held.until = None);
        let _ = tokio::time::timeout(RELEASE, self.release()).await;
    }

    async fn leases(&self) -> Result<(kube::Api<Lease>, Access), ApiError> {
        let client = self.api.client().await?;
        let own = || client.default_namespace().to_owned();
        let namespace = self.lease.namespace.clone().unwrap_or_else(own);
        let access = Access {
            verbs: "get, create and update",
            resource: "leases",
            group: "coordination.k8s.io",
            namespace: namespace.clone(),
        };
        Ok((kube::Api::namespaced(client, &namespace), access))
    }

    /// Reads the Lease, and renews or takes it if that is due.
    async fn turn(&mut self) -> Result<(), ApiError> {
        let (leases, access) = self.leases().await?;
        let patience = self.times.patience;
        // Taken out: after a request whose outcome is not known, it is read anew.
        let lease = match self.ours.take() {
            Some(lease) => Some(lease),
            None => found(patience, &access, leases.get(&self.lease.name)).await?,
        };
        let now = Instant::now();
        let step = match &lease {
            None => Move::Take,
            Some(lease) => self.judge(lease, now),
        };
        if step == Move::Wait {
            let holder = lease.and_then(|lease| holder(&lease).map(str::to_owned));
            self.tell(None, holder);
            return Ok(());
        }
        let (wanted, params) = (self.claim(lease.as_ref(), step), PostParams::default());
        let sent = Instant::now();
        let written = match lease {
            Some(_) => within(patience, &access, leases.replace(&self.lease.name, &params, &wanted)).await?,
            None => within(patience, &access, leases.create(&params, &wanted)).await?,
        };
        if holder(&written) != Some(&self.identity) {
            return Err(ApiError::Unreadable("the Lease that was written has another holder".to_owned()));
        }
        (self.ours, self.others) = (Some(written), None);
        self.tell(Some(sent + self.times.hold), Some(self.identity.clone()));
        Ok(())
    }

    fn judge(&mut self, lease: &Lease, now: Instant) -> Move {
        match holder(lease) {
            Some(holder) if holder == self.identity => Move::Renew,
            None => Move::Take,
            Some(_) => {
                let version = lease.metadata.resource_version.clone().unwrap_or_default();
                let promised = lease.spec.as_ref().and_then(|spec| spec.lease_duration_seconds);
                let promised =
                    promised.and_then(|seconds| u64::try_from(seconds).ok()).map(Duration::from_secs);
                let promised = promised.unwrap_or(self.times.duration).min(LONGEST);
                match &self.others {
                    Some((seen, since)) if *seen == version && now - *since >= promised => Move::Take,
                    Some((seen, _)) if *seen == version => Move::Wait,
                    _ => {
                        self.others = Some((version, now));
                        Move::Wait
                    }
                }
            }
        }
    }

    /// The Lease with this process as its holder.
    fn claim(&self, lease: Option<&Lease>, step: Move) -> Lease {
        let now = MicroTime(Timestamp::now());
        let old = lease.and_then(|lease| lease.spec.clone()).unwrap_or_default();
        let metadata = lease.map_or_else(
            || ObjectMeta { name: Some(self.lease.name.clone()), ..ObjectMeta::default() },
            |lease| lease.metadata.clone(),
        );
        let taken = step == Move::Take;
        let spec = LeaseSpec {
            holder_identity: Some(self.identity.clone()),
            lease_duration_seconds: i32::try_from(self.times.duration.as_secs()).ok(),
            acquire_time: if taken { Some(now.clone()) } else { old.acquire_time },
            renew_time: Some(now),
            lease_transitions: Some(old.lease_transitions.unwrap_or(0).saturating_add(i32::from(taken))),
            ..LeaseSpec::default()
        };
        Lease { metadata, spec: Some(spec) }
    }

    /// Has the Lease name no holder, if it is this process's.
    async fn release(&mut self) -> Result<(), ApiError> {
        let (leases, access) = self.leases().await?;
        let patience = self.times.patience;
        let Some(mut lease) = found(patience, &access, leases.get(&self.lease.name)).await? else {
            return Ok(());
        };
        if holder(&lease) != Some(&self.identity) {
            return Ok(());
        }
        if let Some(spec) = &mut lease.spec {
            spec.holder_identity = Some(String::new());
        }
        let params = PostParams::default();
        within(patience, &access, leases.replace(&self.lease.name, &params, &lease)).await?;
        tracing::info!(lease = %self.lease, "given back");
        Ok(())
    }

    fn tell(&self, until: Option<Instant>, holder: Option<String>) {
        self.sender.send_modify(|held| {
            if held.is_held() != until.is_some() {
                match until {
                    Some(_) => tracing::info!(lease = %self.lease, "held by this process"),
                    None => tracing::warn!(lease = %self.lease, ?holder, "lost"),
                }
            } else if until.is_none() && held.holder != holder {
                tracing::info!(lease = %self.lease, ?holder, "held by another process");
            }
            *held = Held { until, holder, problem: None };
        });
    }

    /// What was granted lasts on; what is new is that it may not be renewed.
    fn complain(&self, error: &ApiError) {
        let problem = error.to_string();
        self.sender.send_if_modified(|held| {
            if held.problem.as_ref() == Some(&problem) {
                return false;
            }
            tracing::warn!(lease = %self.lease, held = held.is_held(), detail = error.detail(), "lease: {problem}");
            held.problem = Some(problem);
            true
        });
    }
}

/// Its holder; an empty name means none.
fn holder(lease: &Lease) -> Option<&str> {
    let holder = lease.spec.as_ref().and_then(|spec| spec.holder_identity.as_deref());
    holder.filter(|holder| !holder.is_empty())
}

#[cfg(test)]
mod tests;
