//! `--grpc URL...`, or `--model M [--workers N]`: whom `generate` and `bench` work with.

use std::future::Future;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use muster_dispatch_grpc::StatsHandle;
use muster_router::serve::expert_shape;
use muster_router::start::{EngineSettings, ModelDefaults};

use super::blocking;
use crate::args::{ComputeArgs, LogArgs, TargetArgs};
use crate::backend::{self, Backend, DEFAULT_GRPC};
use crate::cluster::{Workers, WorkersSpec, shares_of_cores};
use crate::engine::{self, Experts, Mode, cores};
use crate::failure::Failure;
use crate::models;
use crate::progress::{Bar, Bars};
use crate::signals::Signals;

/// How long the engine may take to end once nobody uses it.
const END: Duration = Duration::from_secs(5);

/// Finds or starts a backend, gives it to `work`, and takes down again what was started. The statistics are there when
/// the experts are in workers of one's own.
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
    let checkpoint = Arc::new(models::open(model, target.links.links())?);
    let Some(count) = target.workers else {
        let threads = compute.threads.unwrap_or(cores());
        let mode = Mode::of(&checkpoint, compute);
        let work = async {
            let bar = Bar::single("model");
            let loaded =
                blocking(move || engine::load(checkpoint, mode, threads, Experts::Here, &bar)).await?;
            in_process(loaded, defaults, work).await
        };
        return signals.unless(work).await;
    };
    let bars = Bars::new();
    let spec = WorkersSpec {
        model,
        links: target.links.links(),
        count,
        experts_in_all: expert_shape(&checkpoint).total(),
        replicas: NonZeroU32::MIN,
        compute: compute.compute.get(),
        experts: compute.expert_dtype,
        threads: compute.threads,
        busy_poll_us: compute.busy_poll_us,
        log,
    };
    let workers = signals.unless(Workers::start(&spec, &bars)).await?;
    let threads = compute.threads.unwrap_or(shares_of_cores(count).0);
    let mode = Mode::of(&checkpoint, compute);
    let (combine, busy_poll) = (compute.combine, compute.busy_poll());
    let experts = Experts::Workers { addresses: workers.addresses().to_vec(), combine, busy_poll };
    let bar = bars.bar("router".to_owned());
    let outcome = signals
        .unless(async {
            let loaded = blocking(move || engine::load(checkpoint, mode, threads, experts, &bar)).await?;
            in_process(loaded, defaults, work).await
        })
        .await;
    workers.stop().await;
    outcome
}

async fn in_process<F>(
    loaded: engine::Loaded,
    defaults: ModelDefaults,
    work: impl FnOnce(Backend, Option<StatsHandle>) -> F,
) -> Result<(), Failure>
where
    F: Future<Output = Result<(), Failure>>,
{
    let stats = loaded.stats.clone();
    let (service, handle) = loaded.serve(EngineSettings::default(), defaults)?;
    let outcome = work(Backend::Here(service), stats).await;
    // Before the workers go, so that the engine's last step does not end in an error.
    let _ = handle.stop(END).await;
    outcome
}
