//! The EndpointSlices of a Service, watched.
//!
//! Lists them, watches from there on, and lists again whenever a watch ends otherwise than by its own time limit. So no state
//! of a failed watch can stay behind, and the version of the API is determined anew. Known workers are kept while the API
//! server does not answer or refuses: the state then says so, one line is logged, and it is asked again.
//!
//! Two loops over [`kube::Client`], and not `kube-runtime`: that one does not end the wait for a list or for the beginning of a
//! watch, and needs a type for each version of an object.

use std::collections::BTreeMap;
use std::time::Duration;

use futures::StreamExt;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::APIGroup;
use kube::Client;
use kube::api::{ListParams, WatchEvent, WatchParams};
use kube::core::Request;
use tokio::sync::watch;
use tokio::time::timeout;

use crate::api::{Access, Api, ApiError, PATIENCE, within};
use crate::pause::Pause;
use crate::seen::Seen;
use crate::slice::{MOST_SLICES, Slice, Slices, workers};
use crate::source::ObjectName;

const GROUP: &str = "discovery.k8s.io";
/// Versions that can be read, the best first.
const VERSIONS: [&str; 2] = ["v1", "v1beta1"];
/// Length of a watch before it is renewed, seconds.
const WATCH: u32 = 30;
/// Silence after which a watch is dead: the API server ends it before.
const IDLE: Duration = Duration::from_secs(WATCH as u64 + 10);
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

pub(crate) fn watch(api: Api, service: ObjectName) -> watch::Receiver<Seen> {
    let (sender, receiver) = watch::channel(Seen::not_yet());
    tokio::spawn(async move {
        let closed = sender.clone();
        tokio::select! {
            () = closed.closed() => {}
            () = Watcher { api, service, sender, slices: BTreeMap::new() }.run() => {}
        }
    });
    receiver
}

struct Watcher {
    api: Api,
    service: ObjectName,
    sender: watch::Sender<Seen>,
    slices: BTreeMap<String, Slice>,
}

impl Watcher {
    async fn run(mut self) {
        let mut pause = Pause::new(FIRST_PAUSE, LONGEST_PAUSE);
        loop {
            match self.list_and_watch(&mut pause).await {
                // Listed again at once; if that fails, it is a problem.
                Ok(()) => {}
                Err(error) => self.complain(&error),
            }
            tokio::time::sleep(pause.next()).await;
        }
    }

    /// Ends in an error when there is no list, else when a watch broke.
    async fn list_and_watch(&mut self, pause: &mut Pause) -> Result<(), ApiError> {
        let client = self.api.client().await?;
        let own = || client.default_namespace().to_owned();
        let access = Access {
            verbs: "list and watch",
            resource: "endpointslices",
            group: GROUP,
            namespace: self.service.namespace.clone().unwrap_or_else(own),
        };
        let version = version(&client, &access).await?;
        let request =
            Request::new(format!("/apis/{GROUP}/{version}/namespaces/{}/endpointslices", access.namespace));
        let label = format!("kubernetes.io/service-name={}", self.service.name);
        let limit = u32::try_from(MOST_SLICES).unwrap_or(u32::MAX);
        let page = ListParams::default().labels(&label).limit(limit);
        let page = built(request.list(&page))?;
        let list = within(PATIENCE, &access, client.request::<Slices>(page)).await?;
        let is_cut = list.metadata.next.is_some_and(|next| !next.is_empty());
        self.slices =
            list.items.into_iter().flatten().map(|slice| (slice.metadata.name.clone(), slice)).collect();
        // Whether there still is a problem shows when the watch has begun.
        let (seen, _) = workers(&self.slices);
        self.sender.send_if_modified(|now| std::mem::replace(&mut now.workers, seen.clone()) != seen);
        let mut from = list.metadata.resource_version;
        loop {
            let params = WatchParams::default().labels(&label).timeout(WATCH);
            let watch = built(request.watch(&params, &from))?;
            match self.follow(&client, &access, watch, &mut from, is_cut).await {
                Ok(()) => pause.reset(),
                // Denied or not: if it lasts, the next list reports it.
                Err(error @ ApiError::Denied { .. }) => return Err(error),
                Err(error) => {
                    tracing::debug!(%error, detail = error.detail(), "a watch broke");
                    return Ok(());
                }
            }
        }
    }

    /// One watch to its end.
    async fn follow(
        &mut self,
        client: &Client,
        access: &Access,
        watch: http::Request<Vec<u8>>,
        from: &mut String,
        is_cut: bool,
    ) -> Result<(), ApiError> {
        let events = within(PATIENCE, access, client.request_events::<Slice>(watch)).await?;
        self.tell(is_cut);
        let mut events = std::pin::pin!(events);
        loop {
            let event = timeout(IDLE, events.next()).await.map_err(|_| ApiError::Silent(IDLE))?;
            let version = match event.transpose().map_err(|error| ApiError::of(&error, access))? {
                None => return Ok(()),
                Some(WatchEvent::Added(slice) | WatchEvent::Modified(slice)) => {
                    let version = slice.metadata.resource_version.clone();
                    let name = slice.metadata.name.clone();
                    if self.slices.len() < MOST_SLICES || self.slices.contains_key(&name) {
                        self.slices.insert(name, slice);
                    }
                    version
                }
                Some(WatchEvent::Deleted(slice)) => {
                    self.slices.remove(&slice.metadata.name);
                    slice.metadata.resource_version
                }
                Some(WatchEvent::Bookmark(mark)) => mark.metadata.resource_version,
                Some(WatchEvent::Error(status)) => {
                    return Err(ApiError::status(status.code, &status.message, access));
                }
            };
            *from = version;
            self.tell(is_cut);
        }
    }

    fn tell(&self, is_cut: bool) {
        let (workers, problem) = workers(&self.slices);
        let problem = if is_cut || self.slices.len() == MOST_SLICES {
            Some(format!("it has more than {MOST_SLICES} EndpointSlices; the rest is left out"))
        } else {
            problem
        };
        let seen = Seen { workers, problem };
        self.sender.send_if_modified(|now| {
            if now.problem != seen.problem {
                match &seen.problem {
                    Some(problem) => tracing::warn!(service = %self.service, "discovery: {problem}"),
                    None => tracing::info!(service = %self.service, workers = seen.workers.len(), "discovery: watching"),
                }
            }
            std::mem::replace(now, seen.clone()) != seen
        });
    }

    fn complain(&self, error: &ApiError) {
        let problem = error.to_string();
        self.sender.send_if_modified(|now| {
            if now.problem.as_ref() == Some(&problem) {
                return false;
            }
            tracing::warn!(
                service = %self.service, kept = now.workers.len(), detail = error.detail(), "discovery: {problem}"
            );
            now.problem = Some(problem);
            true
        });
    }
}

/// The best version that is served.
async fn version(client: &Client, access: &Access) -> Result<&'static str, ApiError> {
    let request = http::Request::get(format!("/apis/{GROUP}")).body(Vec::new());
    let request = request.map_err(|error| ApiError::Unreadable(error.to_string()))?;
    let group = match within(PATIENCE, access, client.request::<APIGroup>(request)).await {
        Ok(group) => group,
        Err(ApiError::NotFound) => return Err(ApiError::NotServed("discovery.k8s.io")),
        // Some clusters hide their served versions; v1 exists since 1.21.
        Err(ApiError::Denied { .. }) => return Ok(VERSIONS[0]),
        Err(error) => return Err(error),
    };
    let is_served = |version: &&&str| group.versions.iter().any(|served| served.version == **version);
    VERSIONS.iter().find(is_served).copied().ok_or(ApiError::NotServed("discovery.k8s.io/v1 or v1beta1"))
}

fn built(
    request: Result<http::Request<Vec<u8>>, kube::core::request::Error>,
) -> Result<http::Request<Vec<u8>>, ApiError> {
    request.map_err(|error| ApiError::Unreadable(error.to_string()))
}

#[cfg(test)]
mod tests;
