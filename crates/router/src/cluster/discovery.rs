//! Workers found by DNS or Kubernetes.
//!
//! Every address that a source names is held by a [`Joined`], which keeps it connected; an address that is no longer
//! named is forgotten once it is disconnected. Workers announce their own capabilities. Knows nothing of how sources
//! are queried.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

use muster_discovery::{Api, Place, Seen, Source};
use muster_dispatch_grpc::ClusterHandle;
use muster_dispatch_grpc::client::Joined;
use tokio::sync::watch;

/// Findings of all sources, and the tasks that apply them.
#[derive(Clone, Default)]
pub(crate) struct Discovery(Arc<Vec<Watched>>);

struct Watched {
    source: Source,
    seen: watch::Receiver<Seen>,
    task: tokio::task::AbortHandle,
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Discovery {
    /// Watches `sources` from now on, on the current runtime.
    pub(crate) fn start(sources: Vec<Source>, api: &Api, cluster: &ClusterHandle) -> Self {
        let watched = sources.into_iter().map(|source| {
            let seen = muster_discovery::watch(&source, api);
            let task = tokio::spawn(follow(source.to_string(), seen.clone(), cluster.clone())).abort_handle();
            Watched { source, seen, task }
        });
        Self(Arc::new(watched.collect()))
    }

    /// Problems of the sources.
    pub(crate) fn problems(&self) -> Vec<String> {
        let problem = |watched: &Watched| {
            let seen = watched.seen.borrow();
            seen.problem.as_ref().map(|problem| format!("discovery by {}: {problem}", watched.source))
        };
        self.0.iter().filter_map(problem).collect()
    }

    /// Findings of all sources, to explain missing workers.
    pub(crate) fn findings(&self) -> Vec<String> {
        let finding = |watched: &Watched| {
            let (source, seen) = (&watched.source, watched.seen.borrow());
            match &seen.problem {
                Some(problem) => format!("discovery by {source}: {problem}"),
                None => format!("discovery by {source}: it names {} workers", seen.workers.len()),
            }
        };
        self.0.iter().map(finding).collect()
    }
}

/// Workers registered from one source, with the place that it gives for each.
type Known = BTreeMap<SocketAddr, (Place, Joined)>;

async fn follow(source: String, mut seen: watch::Receiver<Seen>, cluster: ClusterHandle) {
    let mut known = Known::new();
    let mut crowded = false;
    loop {
        let now = seen.borrow_and_update().clone();
        crowded = update(&source, &mut known, &now, &cluster, crowded);
        metrics::gauge!("muster_discovery_workers", "source" => source.clone()).set(known.len() as f64);
        let failing = f64::from(u8::from(now.problem.is_some()));
        metrics::gauge!("muster_discovery_failing", "source" => source.clone()).set(failing);
        if seen.changed().await.is_err() {
            // The watching task panicked, which is in the log. Its last findings stay.
            std::future::pending::<()>().await;
        }
    }
}

/// Applies the findings of a source. Returns whether it names more workers than a router may know.
fn update(source: &str, known: &mut Known, now: &Seen, cluster: &ClusterHandle, crowded: bool) -> bool {
    known.retain(|address, (place, _)| match now.workers.get(address) {
        Some(of) => of == place,
        None => {
            tracing::info!(%source, %address, "no longer named");
            false
        }
    });
    for (address, place) in &now.workers {
        if known.contains_key(address) {
            continue;
        }
        match cluster.join_in((*address).into(), place.domain()) {
            Ok(joined) => drop(known.insert(*address, (place.clone(), joined))),
            Err(error) => {
                if !crowded {
                    tracing::warn!(%source, %address, %error, "a worker is left out");
                }
                return true;
            }
        }
    }
    false
}
