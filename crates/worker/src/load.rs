//! Loading at the start of a worker: the model's description, and the experts to start with.

use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::time::Instant;

use muster_checkpoint::{Checkpoint, Source};
use muster_kernels::Cpu;
use muster_model::card::{bytes_of, card, expert_shape, forms};
use muster_model::experts::{self, CpuStore, ExpertSet, PackedExpert, faster_mode};
use muster_model::{LoadProgress, ModelError};
use muster_placement::Shape;
use muster_proto::card::ModelCard;
use muster_types::{Compute, ExpertKey, WeightDType, WeightDigest};
use tokio::sync::oneshot;

use crate::loader::Sources;
use crate::{WorkerConfig, WorkerError, memory_for_experts, on_thread};

/// Most loaded experts that wait for their digest.
const UNDIGESTED: usize = 2;

/// The parts of the model that serving needs.
pub(crate) struct Loaded {
    pub(crate) cpu: Arc<Cpu>,
    pub(crate) store: Arc<CpuStore>,
    /// Digests of the loaded experts.
    pub(crate) digests: BTreeMap<ExpertKey, WeightDigest>,
    pub(crate) sources: Sources,
    pub(crate) shape: Shape,
    pub(crate) hidden: NonZeroU32,
    pub(crate) top_k: NonZeroU32,
}

/// Loads on a separate thread, which a stopping process need not wait for. A worker without a model takes its
/// description from the card, and starts without experts.
pub(crate) fn start(
    config: WorkerConfig,
    card: Option<ModelCard>,
    progress: Box<dyn FnMut(LoadProgress) + Send>,
) -> Result<oneshot::Receiver<Result<Loaded, WorkerError>>, WorkerError> {
    on_thread("muster-load", move || match (&config.source, card) {
        (Some(source), _) => load(&config, source, progress),
        (None, Some(card)) => take(&config, &card),
        (None, None) => Err(WorkerError::NoModel),
    })
}

/// Starts without experts, with the model of a router's card.
fn take(config: &WorkerConfig, card: &ModelCard) -> Result<Loaded, WorkerError> {
    let cpu = Arc::new(Cpu::new(config.threads)?);
    tracing::info!(model = card.name, compute = %card.compute, dtype = %card.experts, isa = ?cpu.isa(), "taking the router's model");
    let experts = ExpertSet::new(card.hidden.get() as usize, card.compute, card.experts);
    let store = CpuStore::new(experts, config.memory.unwrap_or_else(memory_for_experts));
    Ok(loaded(config, card, None, cpu, store, BTreeMap::new()))
}

fn load(
    config: &WorkerConfig,
    source: &Source,
    mut progress: Box<dyn FnMut(LoadProgress) + Send>,
) -> Result<Loaded, WorkerError> {
    let started = Instant::now();
    let checkpoint = Checkpoint::open(source)?;
    let keys = config.share.keys(&expert_shape(&checkpoint))?;
    let compute = checkpoint.compute(config.compute);
    let card = card(&checkpoint, compute, config.experts)?;
    let cpu = Arc::new(Cpu::new(config.threads)?);
    tracing::info!(model = checkpoint.name(), experts = keys.len(), %compute, dtype = %config.experts, isa = ?cpu.isa(), "loading experts");
    if let Some(hint) = faster_mode(compute, cpu.isa()) {
        tracing::info!("{hint}");
    }
    let needed = bytes_of(&keys, &forms(&card));
    if let Some(memory) = config.memory.filter(|&memory| needed > memory) {
        return Err(WorkerError::Memory { needed, memory });
    }
    let (experts, digests) = load_experts(&checkpoint, &keys, compute, config.experts, &mut *progress)?;
    tracing::info!(bytes = experts.bytes(), seconds = started.elapsed().as_secs_f64(), "experts loaded");
    let capacity = config.memory.unwrap_or_else(|| experts.bytes().saturating_add(memory_for_experts()));
    let store = CpuStore::new(experts, capacity);
    Ok(loaded(config, &card, Some(checkpoint), cpu, store, digests))
}

fn loaded(
    config: &WorkerConfig,
    card: &ModelCard,
    checkpoint: Option<Checkpoint>,
    cpu: Arc<Cpu>,
    store: CpuStore,
    digests: BTreeMap<ExpertKey, WeightDigest>,
) -> Loaded {
    Loaded {
        cpu,
        store: Arc::new(store),
        digests,
        sources: Sources {
            checkpoint,
            routers: config.join.clone(),
            fingerprint: card.fingerprint,
            compute: card.compute,
            dtype: card.experts,
            forms: forms(card),
        },
        shape: Shape::new(card.shape()),
        hidden: card.hidden,
        top_k: card.top_k,
    }
}

/// Reads and packs experts. Another thread computes their digests meanwhile, at no extra time.
fn load_experts(
    checkpoint: &Checkpoint,
    keys: &[ExpertKey],
    compute: Compute,
    dtype: WeightDType,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<(ExpertSet, BTreeMap<ExpertKey, WeightDigest>), ModelError> {
    let mut set = ExpertSet::new(checkpoint.spec().hidden, compute, dtype);
    let (sender, loaded) = sync_channel::<(ExpertKey, Arc<PackedExpert>)>(UNDIGESTED);
    std::thread::scope(|scope| {
        let digesting =
            scope.spawn(move || loaded.iter().map(|(key, expert)| (key, expert.digest())).collect());
        let read = experts::read(checkpoint, keys, compute, dtype, progress, &mut |key, expert| {
            set.insert(key, expert);
            if let Some(expert) = set.get(key) {
                // Fails when the other thread panicked, which is reported below.
                let _ = sender.send((key, expert));
            }
        });
        drop(sender);
        let digests = digesting.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        read.map(|()| (set, digests))
    })
}
