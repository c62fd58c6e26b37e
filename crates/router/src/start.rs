//! Puts a router's parts together: tokenizer, KV budget, scheduler and the engine thread.
//!
//! Used by [`serve`](crate::serve) with experts behind gRPC, and by programs with a whole engine in one process.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use muster_checkpoint::outline::Outline;
use muster_checkpoint::{Checkpoint, CheckpointError};
use muster_engine::dispatch::ExpertDispatch;
use muster_engine::reach::{longest, most_held};
pub use muster_engine::scheduler::PrefixCache;
use muster_engine::scheduler::{ConfigError, Scheduler, SchedulerConfig};
use muster_kernels::{BLOCK_TOKENS, KvCache};
use muster_model::defaults::{DefaultsError, SamplingDefaults, Wanted};
use muster_model::footprint::Footprint;
use muster_model::trunk::device::DeviceError;
use muster_model::trunk::{Stepper, Trunk};
use muster_text::Tokenizer;
use muster_types::Reach;
use muster_types::{Combine, Compute, Limits, WeightDType};
use tokio::sync::{mpsc, oneshot};

use crate::engine::{Command, Engine};
use crate::model_info::ModelInfo;
use crate::prompt::Prompts;
pub use crate::pulse::Pulse;
use crate::queue::Queue;
use crate::service::{BoundProbe, HealthProbe, Service, Way};
use crate::text_pool::TextPool;
use crate::tokenizer::{self, TokenizerError};

/// Largest KV cache by default: enough for every running sequence at full context, up to this.
const DEFAULT_KV_BYTES: u64 = 512 << 20;

/// Loaded parts of a router.
pub struct Parts {
    /// The model on disk.
    pub checkpoint: Arc<Checkpoint>,
    /// Its loaded trunk.
    pub trunk: Arc<Trunk>,
    /// Dispatch to the experts.
    pub dispatch: Box<dyn ExpertDispatch>,
    /// Dtype of the experts' weights as held.
    pub experts: WeightDType,
    /// Source of the experts' health.
    pub health: HealthProbe,
    /// Source of the expert binding.
    pub bound: BoundProbe,
    /// Pulse that beats with every token.
    pub pulse: Arc<Pulse>,
    /// Number of workers; 0 when the experts are in this process.
    pub workers: u32,
    /// Where expert outputs are added.
    pub combine: Combine,
    /// Name to serve the model under; `None` takes the checkpoint's.
    pub model_name: Option<String>,
    /// Sampling defaults.
    pub defaults: SamplingDefaults,
    /// Sizes and times of the engine.
    pub settings: EngineSettings,
}

/// Use of the sampling settings in the model's `generation_config.json`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum ModelDefaults {
    /// They are the defaults of requests.
    #[default]
    Taken,
    /// They are not read.
    Ignored,
}

impl ModelDefaults {
    /// The defaults in force. Logs them, and the names of unsupported settings in the file.
    ///
    /// # Errors
    /// When they are used and the file is damaged or a field is out of range.
    pub fn of(self, checkpoint: &Checkpoint) -> Result<SamplingDefaults, DefaultsError> {
        if self == Self::Ignored {
            return Ok(SamplingDefaults::default());
        }
        let Wanted { defaults, not_followed } = Wanted::of(checkpoint)?;
        for field in not_followed {
            tracing::warn!("generation_config.json: {field}, which is not done here");
        }
        Ok(defaults)
    }
}

/// Sizes and times of the engine.
#[derive(Debug, Clone)]
pub struct EngineSettings {
    /// Bytes of the KV cache; `None` chooses.
    pub kv_bytes: Option<u64>,
    /// Most tokens in a step.
    pub step_tokens: u32,
    /// Most prompt tokens of one sequence in a step.
    pub prefill_chunk: u32,
    /// Whether keys and values are shared between requests with a common prefix.
    pub prefix_cache: PrefixCache,
    /// Variables of the chat template that requests may set.
    pub template_variables: BTreeSet<String>,
    /// Longest wait for one layer's experts.
    pub expert_timeout: Duration,
    /// Longest expected wait of an admitted request for a place in the batch.
    pub max_queue_wait: Duration,
    /// Caps on requests.
    pub limits: Limits,
}

impl Default for EngineSettings {
    fn default() -> Self {
        Self {
            kv_bytes: None,
            step_tokens: 1024,
            prefill_chunk: 512,
            prefix_cache: PrefixCache::On,
            template_variables: BTreeSet::new(),
            expert_timeout: Duration::from_secs(30),
            max_queue_wait: Duration::from_secs(5),
            limits: Limits::default(),
        }
    }
}

/// A router that could not be put together.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A file of the model.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The model's own sampling settings.
    #[error(transparent)]
    Defaults(#[from] DefaultsError),
    /// The tokenizer or the chat template.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The KV cache.
    #[error("kv cache: {0}")]
    Kv(#[from] DeviceError),
    /// A KV budget too small for the blocks of a few tokens.
    #[error(
        "the KV budget of {budget} bytes holds no block; {BLOCK_TOKENS} tokens take {block} bytes in all layers: give that \
         much, or more for longer sequences"
    )]
    KvBudget {
        /// Budget, bytes.
        budget: u64,
        /// Least budget, bytes.
        block: u64,
    },
    /// Sizes that do not fit together.
    #[error(transparent)]
    Sizes(#[from] ConfigError),
    /// A thread could not be started.
    #[error("a thread could not be started: {0}")]
    Thread(std::io::Error),
}

/// The running engine thread.
pub struct EngineHandle {
    /// Resolves, with an error, when the thread is gone.
    ended: oneshot::Receiver<Infallible>,
    abort: Arc<AtomicBool>,
}

/// Outcome of the engine's end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// Every request was finished.
    Clean,
    /// Running requests were ended with an error.
    CutOff,
}

impl EngineHandle {
    /// Waits for the thread to end by itself, which it does when every clone of its [`Service`] is gone.
    pub async fn ended(&mut self) {
        let _ = (&mut self.ended).await;
    }

    /// Waits up to `drain` for running requests, then ends the rest with an error. Remaining clones of the [`Service`]
    /// keep the engine waiting for requests until then.
    pub async fn stop(mut self, drain: Duration) -> Ending {
        let clean = tokio::time::timeout(drain, self.ended()).await.is_ok();
        self.abort.store(true, Ordering::Release);
        if clean { Ending::Clean } else { Ending::CutOff }
    }
}

/// Starts the engine thread.
///
/// # Errors
/// When the tokenizer is unusable or the sizes cannot work.
pub fn start(parts: Parts) -> Result<(Service, EngineHandle), StartError> {
    let Parts {
        checkpoint,
        trunk,
        dispatch,
        experts,
        health,
        bound,
        pulse,
        workers,
        combine,
        model_name,
        defaults,
        settings,
    } = parts;
    let tokenizer = tokenizer::read(&checkpoint)?;
    match &tokenizer {
        None => tracing::warn!("{}", tokenizer::remedy(&checkpoint)),
        Some(tokenizer) => match tokenizer.tokens_beyond() {
            0 => {}
            tokens => tracing::warn!(
                tokens,
                "the tokenizer has tokens beyond the vocabulary; prompts with them are refused"
            ),
        },
    }
    let (blocks, context) = kv_size(&trunk, &settings)?;
    tracing::info!(blocks, bytes = u64::from(blocks) * block_bytes(&trunk), context, "kv cache");
    let model = Stepper::new(Arc::clone(&trunk), blocks as usize, Arc::clone(trunk.device().cpu()))?;
    let limits = settings.limits;
    let most_waiting = limits.queue.saturating_add(limits.running);
    let scheduler = Scheduler::new(SchedulerConfig {
        block_tokens: BLOCK,
        groups: trunk.kv_groups().reaches().to_vec(),
        blocks,
        context,
        max_running: limits.running,
        // The most that the queue ever admits, so that every request with a place is accepted.
        max_waiting: most_waiting,
        step_tokens: settings.step_tokens,
        prefill_chunk: settings.prefill_chunk,
        prefix_cache: settings.prefix_cache,
    })?;
    let info = ModelInfo {
        defaults,
        ..describe(&checkpoint, &trunk, tokenizer.as_ref(), model_name, experts, workers, combine, context)
    };
    tracing::info!(%defaults, "sampling where a request over OpenAI HTTP says nothing");
    let eos = trunk.spec().eos.clone();
    let (sender, commands) = mpsc::channel::<Command>(most_waiting.max(1));
    let queue = Queue::new(limits.queue, limits.running, settings.max_queue_wait);
    let text = TextPool::start().map_err(StartError::Thread)?;
    let abort = Arc::new(AtomicBool::new(false));
    let engine = Engine {
        scheduler,
        model: Box::new(model),
        dispatch,
        tokenizer: tokenizer.clone(),
        expert_timeout: settings.expert_timeout,
        commands,
        queue: Arc::clone(&queue),
        abort: Arc::clone(&abort),
        pulse,
    };
    let (alive, ended) = oneshot::channel();
    std::thread::Builder::new()
        .name("muster-engine".into())
        .spawn(move || {
            // Dropped at any end of the thread.
            let _alive = alive;
            engine.run();
        })
        .map_err(StartError::Thread)?;
    let prompts = Prompts::new(&info, limits, tokenizer, settings.template_variables);
    let way = Way { commands: sender, queue, text };
    let service = Service::new(info, limits, prompts, eos, health, bound, way);
    Ok((service, EngineHandle { ended, abort }))
}

/// Checks the size of the KV cache, before anything is loaded.
///
/// # Errors
/// [`StartError::KvBudget`] when it holds nothing.
pub fn check_kv(checkpoint: &Checkpoint, compute: Compute, budget: Option<u64>) -> Result<(), StartError> {
    // The trunk's dtype affects its linears only, not the KV cache.
    let footprint =
        Footprint::of(&Outline::of(checkpoint.spec()), compute, WeightDType::Native, WeightDType::Native);
    match (budget, footprint) {
        (Some(budget), Some(footprint)) if budget < footprint.kv_sequence_bytes(1, 1) => {
            Err(StartError::KvBudget { budget, block: footprint.kv_sequence_bytes(1, 1) })
        }
        _ => Ok(()),
    }
}

const BLOCK: NonZeroU32 = match NonZeroU32::new(BLOCK_TOKENS as u32) {
    Some(block) => block,
    None => panic!("a block has tokens"),
};

/// Blocks to allocate, and the longest sequence that they allow.
fn kv_size(trunk: &Trunk, settings: &EngineSettings) -> Result<(u32, u32), StartError> {
    fit(trunk.kv_groups().reaches(), trunk.spec().context, block_bytes(trunk), settings)
}

fn block_bytes(trunk: &Trunk) -> u64 {
    KvCache::bytes_per_block(trunk.kv_shape(), trunk.compute()) as u64
}

/// [`kv_size`] for groups of layers with the given reaches, in blocks of `block` bytes.
fn fit(
    groups: &[Reach],
    context: usize,
    block: u64,
    settings: &EngineSettings,
) -> Result<(u32, u32), StartError> {
    let chunk = settings.prefill_chunk.min(settings.step_tokens);
    let context = u32::try_from(context).unwrap_or(u32::MAX);
    let everyone = most_held(groups, BLOCK, chunk, context).saturating_mul(settings.limits.running as u64);
    // At least one block for every group, or nothing can be computed.
    let least = block.saturating_mul(groups.len() as u64);
    let blocks = match settings.kv_bytes {
        Some(budget) if budget < least => return Err(StartError::KvBudget { budget, block: least }),
        Some(budget) => (budget / block).min(everyone),
        None => everyone.min((DEFAULT_KV_BYTES / block).max(groups.len() as u64)),
    };
    let blocks = u32::try_from(blocks).unwrap_or(u32::MAX);
    Ok((blocks, longest(groups, BLOCK, chunk, context, blocks)))
}

#[expect(clippy::too_many_arguments, reason = "one call site; a struct would only rename the same eight")]
fn describe(
    checkpoint: &Checkpoint,
    trunk: &Trunk,
    tokenizer: Option<&Tokenizer>,
    name: Option<String>,
    experts: WeightDType,
    workers: u32,
    combine: Combine,
    context: u32,
) -> ModelInfo {
    let spec = trunk.spec();
    let inventory = checkpoint.inventory();
    let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    ModelInfo {
        name: name.unwrap_or_else(|| checkpoint.name().to_owned()),
        family: spec.family.to_owned(),
        fingerprint: checkpoint.fingerprint(),
        parameters: inventory.parameters,
        active_parameters: inventory.active_parameters,
        layers: count(spec.layers.len()),
        moe_layers: count(spec.moe_layers().count()),
        experts_per_layer: spec.moe_layers().map(|(_, moe)| moe.experts).max().unwrap_or(0),
        experts_per_token: spec.most_experts_per_token(),
        hidden: count(spec.hidden),
        vocabulary: spec.vocab,
        context,
        compute: trunk.compute(),
        experts,
        trunk: trunk.dtype(),
        combine,
        has_tokenizer: tokenizer.is_some(),
        has_chat_template: tokenizer.is_some_and(|tokenizer| tokenizer.chat_template().is_ok()),
        defaults: SamplingDefaults::default(),
        workers,
        created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_budget_becomes_blocks_and_a_context() {
        let window = Reach::Last(NonZeroU32::new(128).unwrap());
        let fit = |groups: &[Reach], running, kv_bytes| {
            let limits = Limits { running, ..Limits::default() };
            fit(groups, 4096, 1000, &EngineSettings { kv_bytes, limits, ..EngineSettings::default() })
        };
        let size = |groups: &[Reach], running, kv_bytes| fit(groups, running, kv_bytes).unwrap();
        assert_eq!(size(&[Reach::All], 1, Some(10_999)), (10, 160));
        assert_eq!(size(&[Reach::All], 2, Some(u64::MAX)), (512, 4096));
        assert_eq!(size(&[Reach::All], 2, None), (512, 4096));
        // A step of 512 tokens and the 127 before it lie in 41 blocks.
        assert_eq!(size(&[window], 2, None), (82, 4096));
        assert_eq!(size(&[window], 2, Some(41_000)), (41, 4096));
        assert_eq!(size(&[window], 2, Some(40_000)), (40, 640));
        assert_eq!(size(&[window, Reach::All], 2, None), (2 * (41 + 256), 4096));
        assert_eq!(size(&[window, Reach::All], 2, Some(141_000)), (141, 1600));
        let refused = fit(&[window, Reach::All], 2, Some(1999)).unwrap_err().to_string();
        assert!(refused.contains("1999 bytes") && refused.contains("16 tokens take 2000 bytes"), "{refused}");
        assert_eq!(size(&[window, Reach::All], 2, Some(2000)), (2, 16));
    }
}
