//! Targets of `generate`, `bench` and `logits`: `--grpc URL...`, or `--model M [--workers N]`.

use std::future::Future;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use muster_dispatch_grpc::StatsHandle;
use muster_model::card::expert_shape;
use muster_router::start::{EngineSettings, ModelDefaults};

use super::blocking;
use crate::args::{ComputeArgs, LogArgs, TargetArgs};
use crate::backend::{self, Backend, DEFAULT_GRPC};
use crate::cluster::{ClusterSpec, Workers};
use crate::cores::{cores, shares_of_cores};
use crate::engine::{self, Experts, Loaded, Mode};
use crate::failure::Failure;
use crate::models::{self, Links};
use crate::progress::Bars;
use crate::signals::Signals;

/// Longest time for the engine's end once it is unused.
const END: Duration = Duration::from_secs(5);

/// Connects to or starts a backend, passes it to `work`, and stops what was started. Statistics exist when the experts
/// are in private workers.
pub(crate) async fn with_backend<F>(
    target: &TargetArgs,
    compute: ComputeArgs,
    defaults: ModelDefaults,
    log: &LogArgs,
    work: impl FnOnce(Backend, Option<StatsHandle>) -> F,
) -> Result<(), Failure>
where
    F: Future<Output = Result<(), Failure>>,
{
    let mut signals = Signals::listen()?;
    let Some(model) = &target.model else {
        let default = [DEFAULT_GRPC.to_owned()];
        let addresses = if target.grpc.is_empty() { &default[..] } else { &target.grpc };
        let work = async {
            work(Backend::Router(backend::connect(addresses, &target.credentials).await?), None).await
        };
        return signals.unless(work).await;
    };
    let cluster = Own { model, links: target.links.links(), workers: target.workers, compute, log };
    with_model(&cluster, &mut signals, async |loaded| in_process(loaded, defaults, work).await).await
}

/// A model that this process loads.
pub(crate) struct Own<'a> {
    pub(crate) model: &'a str,
    pub(crate) links: Links,
    /// Worker processes that hold its experts; `None`: this process does.
    pub(crate) workers: Option<NonZeroU32>,
    pub(crate) compute: ComputeArgs,
    pub(crate) log: &'a LogArgs,
}

/// Loads a model, passes it to `work`, and stops what was started.
pub(crate) async fn with_model<T>(
    own: &Own<'_>,
    signals: &mut Signals,
    work: impl AsyncFnOnce(Loaded) -> Result<T, Failure>,
) -> Result<T, Failure> {
    let &Own { model, links, workers, compute, log } = own;
    let checkpoint = Arc::new(models::open(model, links)?);
    let mode = Mode::of(&checkpoint, compute);
    let bars = Bars::new();
    let (workers, experts, share, label) = match workers {
        None => (None, Experts::Here, cores(), "model"),
        Some(count) => {
            let experts_in_all = expert_shape(&checkpoint).total();
            let replicas = NonZeroU32::MIN;
            let spec = ClusterSpec { model, links, count, experts_in_all, replicas, compute, log };
            let workers = signals.unless(Workers::start(&spec, &bars)).await?;
            let experts = Experts::Workers {
                addresses: workers.addresses().to_vec(),
                combine: compute.combine,
                busy_poll: compute.busy_poll(),
            };
            (Some(workers), experts, shares_of_cores(count).0, "router")
        }
    };
    let (threads, bar) = (compute.threads.unwrap_or(share), bars.bar(label.to_owned()));
    let outcome = signals
        .unless(async {
            work(blocking(move || engine::load(checkpoint, mode, threads, experts, &bar)).await?).await
        })
        .await;
    if let Some(workers) = workers {
        workers.stop().await;
    }
    outcome
}

async fn in_process<F>(
    loaded: Loaded,
    defaults: ModelDefaults,
    work: impl FnOnce(Backend, Option<StatsHandle>) -> F,
) -> Result<(), Failure>
where
    F: Future<Output = Result<(), Failure>>,
{
    let stats = loaded.stats.clone();
    let (service, handle) = loaded.serve(EngineSettings::default(), defaults)?;
    let outcome = work(Backend::Here(service), stats).await;
    // Before the workers stop, so that the engine's last step does not fail.
    let _ = handle.stop(END).await;
    outcome
}
