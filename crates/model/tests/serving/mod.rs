//! A model served in this process, by the real scheduler and in two lanes.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::collections::BTreeMap;
use std::num::{NonZeroU32, NonZeroUsize};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use muster_checkpoint::{Checkpoint, Source};
use muster_engine::microbatch;
use muster_engine::scheduler::{NewSequence, PrefixCache, Progress, Scheduler, SchedulerConfig, Stats};
use muster_engine::step::{Step, StepItem};
use muster_kernels::Cpu;
use muster_model::experts::ExpertSet;
use muster_model::local::local;
use muster_model::sampler::{History, Pick, SampleScratch, Sampling, sample};
use muster_model::step::{SeqInput, WantLogits};
use muster_model::trunk::{CpuDevice, StepContext, StepState, Trunk};
use muster_types::{Compute, SeqId, TokenId};

pub(crate) const OUTPUT: u32 = 20;

pub(crate) fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/golden")
}

pub(crate) struct Model {
    pub(crate) trunk: Trunk,
    pub(crate) experts: Arc<ExpertSet>,
    pub(crate) cpu: Arc<Cpu>,
}

/// A token and the bits of the logits it was sampled from.
pub(crate) type Output = Vec<(TokenId, Vec<u32>)>;

impl Model {
    pub(crate) fn open(directory: &Path, compute: Compute) -> Self {
        let checkpoint = Checkpoint::open(&Source::Directory(directory.to_owned())).unwrap();
        let cpu = Arc::new(Cpu::new(NonZeroUsize::new(2).unwrap()).unwrap());
        let device = CpuDevice::new(Arc::clone(&cpu), compute);
        let trunk =
            Trunk::load(&device, &checkpoint, muster_types::WeightDType::Native, &mut |_| {}).unwrap();
        let keys = ExpertSet::all_keys(&checkpoint);
        let experts = Arc::new(
            ExpertSet::load(&checkpoint, &keys, compute, muster_types::WeightDType::Native, &mut |_| {})
                .unwrap(),
        );
        Self { trunk, experts, cpu }
    }

    pub(crate) fn tokens(&self, ids: impl IntoIterator<Item = u32>) -> Vec<TokenId> {
        let vocab = self.trunk.spec().vocab;
        ids.into_iter().map(|id| TokenId::new(id % vocab, vocab).unwrap()).collect()
    }

    /// Serves waves of prompts, each wave when the one before has ended, and shows every step. Outputs are in order of
    /// the prompts; the statistics are the last ones.
    pub(crate) fn serve(
        &self,
        config: SchedulerConfig,
        sampling: &Sampling,
        waves: &[Vec<Vec<TokenId>>],
        watch: &mut dyn FnMut(&Step),
    ) -> (Vec<Output>, Stats) {
        let mut kv = self.trunk.new_kv(config.blocks as usize).unwrap();
        let mut scheduler = Scheduler::new(config).unwrap();
        let mut local = local(Arc::clone(&self.cpu), &self.experts).unwrap();
        let (mut state, mut scratch) = (StepState::default(), SampleScratch::default());
        let mut outputs: BTreeMap<SeqId, (u32, Output)> = BTreeMap::new();
        let vocab = self.trunk.spec().vocab as usize;
        for prompt in waves.iter().flat_map(|wave| wave.iter().map(Some).chain([None])) {
            if let Some(prompt) = prompt {
                let id = SeqId::new(outputs.len() as u64);
                let sequence = NewSequence { id, prompt: prompt.clone(), max_tokens: OUTPUT };
                scheduler.admit(sequence).unwrap();
                outputs.insert(id, (prompt.len() as u32, Vec::new()));
                continue;
            }
            while !scheduler.is_idle() {
                let step = scheduler.schedule(3);
                watch(&step);
                let split = microbatch::split(&step);
                let input = |item: &usize| -> SeqInput<'_> {
                    let StepItem { start, ref tokens, ref blocks, sample, .. } = step.items[*item];
                    let logits = if sample { WantLogits::Last } else { WantLogits::None };
                    SeqInput { start, tokens, blocks, logits }
                };
                let lanes = split.each_ref().map(|lane| lane.iter().map(input).collect::<Vec<_>>());
                let mut ctx = StepContext {
                    kv: &mut kv,
                    dispatch: &mut local,
                    timeout: Duration::from_secs(60),
                    observe: None,
                };
                self.trunk.forward(&mut ctx, [&lanes[0], &lanes[1]], &mut state);
                for (lane, items) in split.iter().enumerate() {
                    for (place, &item) in items.iter().enumerate() {
                        let item = &step.items[item];
                        let logits = state.logits(lane, place, vocab).unwrap();
                        if !item.sample {
                            continue;
                        }
                        let (prompt, output) = outputs.get_mut(&item.seq).unwrap();
                        let position = *prompt + output.len() as u32;
                        let pick = Pick { sampling, logits, history: &History::default(), position };
                        let token = sample(&pick, &mut scratch);
                        output.push((token, logits.iter().map(|x| x.to_bits()).collect()));
                        if scheduler.append(item.seq, token).unwrap() == Progress::LengthReached {
                            scheduler.finish(item.seq);
                        }
                    }
                }
            }
        }
        (outputs.into_values().map(|(_, output)| output).collect(), scheduler.stats())
    }
}

pub(crate) fn config(
    model: &Model,
    prefix_cache: PrefixCache,
    blocks: u32,
    prefill_chunk: u32,
) -> SchedulerConfig {
    SchedulerConfig {
        block_tokens: NonZeroU32::new(16).unwrap(),
        groups: model.trunk.kv_groups().reaches().to_vec(),
        blocks,
        context: 96,
        max_running: 4,
        max_waiting: 16,
        step_tokens: 64,
        prefill_chunk,
        prefix_cache,
    }
}
