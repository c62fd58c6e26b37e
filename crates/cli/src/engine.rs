//! A complete engine in this process, with its experts here or in workers.

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;

use muster_checkpoint::Checkpoint;
use muster_config::GenerationMode;
use muster_dispatch_grpc::{ConnectConfig, Dialer, Digests, GrpcDispatch, Start, StatsHandle};
use muster_engine::dispatch::ExpertDispatch;
use muster_kernels::Cpu;
use muster_model::card::expert_shape;
use muster_model::experts::ExpertSet;
use muster_model::local::local;
use muster_model::trunk::{CpuDevice, Trunk};
use muster_router::health::Health;
use muster_router::service::{BoundProbe, Service};
use muster_router::start::{EngineHandle, EngineSettings, ModelDefaults, Parts, start};
use muster_types::{BindingName, Combine, Compute, Numerics, WeightDType};

use crate::args::ComputeArgs;
use crate::failure::Failure;
use crate::numbers::MOST_ROWS;
use crate::progress::Bar;

/// Compute mode, and dtype of the experts.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Mode {
    pub(crate) compute: Compute,
    pub(crate) experts: WeightDType,
    pub(crate) trunk: WeightDType,
}

/// Place of the experts.
pub(crate) enum Experts {
    /// In this process.
    Here,
    /// In workers.
    Workers { addresses: Vec<String>, combine: Combine, busy_poll: Duration },
}

/// A loaded trunk and the dispatch to its experts.
pub(crate) struct Loaded {
    pub(crate) checkpoint: Arc<Checkpoint>,
    pub(crate) trunk: Arc<Trunk>,
    pub(crate) dispatch: Box<dyn ExpertDispatch>,
    dtype: WeightDType,
    /// Timings of the dispatch, when it leaves the process.
    pub(crate) stats: Option<StatsHandle>,
    bound: BoundProbe,
    workers: u32,
    combine: Combine,
}

impl Mode {
    /// The requested mode.
    pub(crate) fn of(checkpoint: &Checkpoint, asked: ComputeArgs) -> Self {
        let compute = checkpoint.compute(asked.compute.get());
        Self { compute, experts: asked.expert_dtype, trunk: asked.trunk_dtype }
    }
}

/// Use of the model's own sampling settings.
pub(crate) const fn model_defaults(mode: GenerationMode) -> ModelDefaults {
    match mode {
        GenerationMode::Auto => ModelDefaults::Taken,
        GenerationMode::Ignore => ModelDefaults::Ignored,
    }
}

/// Loads this process's part of the model. Blocks.
pub(crate) fn load(
    checkpoint: Arc<Checkpoint>,
    mode: Mode,
    threads: NonZeroUsize,
    experts: Experts,
    bar: &Bar,
) -> Result<Loaded, Failure> {
    let Mode { compute, experts: dtype, trunk } = mode;
    let cpu = Arc::new(Cpu::new(threads).map_err(Failure::runtime)?);
    let device = CpuDevice::new(Arc::clone(&cpu), compute);
    let trunk = Trunk::load(&device, &checkpoint, trunk, &mut |p| bar.update(p)).map_err(Failure::input)?;
    let trunk = Arc::new(trunk);
    let dispatch: Box<dyn ExpertDispatch>;
    let bound: BoundProbe;
    let (stats, workers, combine) = match experts {
        Experts::Here => {
            let keys = ExpertSet::all_keys(&checkpoint);
            let rest = bar.after_this();
            let set = ExpertSet::load(&checkpoint, &keys, compute, dtype, &mut |p| rest.update(p))
                .map_err(Failure::input)?;
            dispatch = Box::new(local(Arc::clone(&cpu), &set).map_err(Failure::runtime)?);
            bound = Arc::new(BindingName::default);
            (None, 0, Combine::Exact)
        }
        Experts::Workers { addresses, combine, busy_poll } => {
            let workers = u32::try_from(addresses.len()).unwrap_or(u32::MAX);
            let connected = connect(&checkpoint, &cpu, mode, addresses, combine, busy_poll)?;
            let stats = connected.transport().stats();
            let health = connected.transport().health();
            bound = Arc::new(move || health.bound());
            dispatch = Box::new(connected);
            (Some(stats), workers, combine)
        }
    };
    bar.finish();
    Ok(Loaded { checkpoint, trunk, dispatch, dtype, stats, bound, workers, combine })
}

fn connect(
    checkpoint: &Checkpoint,
    cpu: &Arc<Cpu>,
    mode: Mode,
    workers: Vec<String>,
    combine: Combine,
    busy_poll: Duration,
) -> Result<GrpcDispatch, Failure> {
    let spec = checkpoint.spec();
    muster_dispatch_grpc::connect(ConnectConfig {
        workers,
        router_id: "muster".to_owned(),
        fingerprint: checkpoint.fingerprint(),
        hidden: spec.hidden,
        compute: mode.compute,
        experts: mode.experts,
        // No digest check: the workers are children of this process, on the same files.
        digests: Digests::unchecked(),
        shape: expert_shape(checkpoint),
        top_k: spec.most_experts_per_token(),
        max_rows: MOST_ROWS,
        connect_timeout: Duration::from_secs(60),
        shard_deadline: Duration::from_secs(60),
        start: Start::Complete,
        combine,
        numerics: Numerics::Exact,
        busy_poll,
        cpu: Arc::clone(cpu),
        dialer: Dialer::default(),
    })
    .map_err(Failure::runtime)
}

impl Loaded {
    /// Starts the engine thread over the loaded parts.
    pub(crate) fn serve(
        self,
        settings: EngineSettings,
        defaults: ModelDefaults,
    ) -> Result<(Service, EngineHandle), Failure> {
        let defaults = defaults.of(&self.checkpoint).map_err(Failure::input)?;
        let Self { checkpoint, trunk, dispatch, dtype: experts, bound, workers, combine, .. } = self;
        start(Parts {
            checkpoint,
            trunk,
            dispatch,
            experts,
            // The workers are children of this process, which notices their deaths.
            health: Arc::new(|| Health::Ready),
            bound,
            pulse: Arc::default(),
            workers,
            combine,
            model_name: None,
            defaults,
            settings,
        })
        .map_err(Failure::input)
    }
}
