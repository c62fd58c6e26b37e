//! Whether keys and values were computed for a sequence or found in the cache does not show in a bit of its logits,
//! greedy or sampled, in whatever chunks, and when blocks are so few that sequences are preempted.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::collections::BTreeMap;
use std::num::{NonZeroU32, NonZeroUsize};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use muster_checkpoint::{Checkpoint, Source};
use muster_engine::microbatch;
use muster_engine::scheduler::{
    NewSequence, PrefixCache, Progress, Scheduler, SchedulerConfig, Stats, StepItem,
};
use muster_kernels::Cpu;
use muster_model::experts::ExpertSet;
use muster_model::local::Local;
use muster_model::sampler::{History, RawSampling, SampleScratch, Sampling, sample};
use muster_model::trunk::{SeqInput, StepContext, StepState, Trunk, WantLogits};
use muster_types::{Compute, SeqId, TokenId};

const OUTPUT: u32 = 20;

struct Model {
    trunk: Trunk,
    experts: Arc<ExpertSet>,
    cpu: Arc<Cpu>,
}

/// A token and the bits of the logits it was sampled from.
type Output = Vec<(TokenId, Vec<u32>)>;

impl Model {
    fn open(family: &str, compute: Compute) -> Self {
        let directory =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/golden").join(family);
        let checkpoint = Checkpoint::open(&Source::Directory(directory)).unwrap();
        let trunk =
            Trunk::load(&checkpoint, compute, muster_types::WeightDType::Native, &mut |_| {}).unwrap();
        let keys = ExpertSet::all_keys(&checkpoint);
        let experts = Arc::new(
            ExpertSet::load(&checkpoint, &keys, compute, muster_types::WeightDType::Native, &mut |_| {})
                .unwrap(),
        );
        let cpu = Arc::new(Cpu::new(NonZeroUsize::new(2).unwrap()).unwrap());
        Self { trunk, experts, cpu }
    }

    fn tokens(&self, ids: impl IntoIterator<Item = u32>) -> Vec<TokenId> {
        let vocab = self.trunk.spec().vocab;
        ids.into_iter().map(|id| TokenId::new(id % vocab, vocab).unwrap()).collect()
    }

    /// Serves waves of prompts, each wave when the one before has ended. Outputs are in order of the prompts; the
    /// statistics are the last ones.
    fn serve(
        &self,
        config: SchedulerConfig,
        sampling: &Sampling,
        waves: &[Vec<Vec<TokenId>>],
    ) -> (Vec<Output>, Stats) {
        let mut kv = self.trunk.new_kv(config.blocks as usize).unwrap();
        let mut scheduler = Scheduler::new(config).unwrap();
        let mut local = Local::new(Arc::clone(&self.cpu), Arc::clone(&self.experts));
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
                let split = microbatch::split(&step);
                let input = |item: &usize| -> SeqInput<'_> {
                    let StepItem { start, ref tokens, ref blocks, sample, .. } = step.items[*item];
                    let logits = if sample { WantLogits::Last } else { WantLogits::None };
                    SeqInput { start, tokens, blocks, logits }
                };
                let lanes = split.each_ref().map(|lane| lane.iter().map(input).collect::<Vec<_>>());
                let mut ctx = StepContext {
                    cpu: &self.cpu,
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
                        let token = sample(sampling, logits, &History::default(), position, &mut scratch);
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

fn config(prefix_cache: PrefixCache, blocks: u32, prefill_chunk: u32) -> SchedulerConfig {
    SchedulerConfig {
        block_tokens: NonZeroU32::new(16).unwrap(),
        blocks,
        context: 96,
        max_running: 4,
        max_waiting: 16,
        step_tokens: 64,
        prefill_chunk,
        prefix_cache,
    }
}

#[test]
fn cold_and_warm_are_the_same_bits() {
    for (family, compute) in [
        ("granitemoe", Compute::Bf16),
        ("mixtral_bf16", Compute::Bf16),
        ("qwen3_moe", Compute::F32),
        ("olmoe", Compute::Bf16),
    ] {
        let model = Model::open(family, compute);
        let long = model.tokens((0..57).map(|i| i * 7 + 3));
        let other_end = model.tokens((0..57).map(|i| if i < 40 { i * 7 + 3 } else { i * 5 + 1 }));
        let short = model.tokens((0..33).map(|i| i * 7 + 3));
        let unlike = model.tokens((0..50).map(|i| i * 11 + 2));
        let prompts = [long.clone(), other_end, short, unlike, long];
        for temperature in [0.0, 0.9] {
            let raw = RawSampling { temperature, seed: 5, ..RawSampling::default() };
            let sampling = Sampling::new(raw, model.trunk.spec().vocab).unwrap();
            let serve = |config, waves: &[_]| model.serve(config, &sampling, waves);
            let alone: Vec<Output> = prompts
                .iter()
                .flat_map(|prompt| {
                    let waves = [vec![prompt.clone()]];
                    let (outputs, stats) = serve(config(PrefixCache::Off, 6, 64), &waves);
                    assert_eq!((stats.prefix_hits, stats.blocks_cached), (0, 0));
                    outputs
                })
                .collect();
            let one_by_one = prompts.clone().map(|prompt| vec![prompt]);
            let together = [prompts[..1].to_vec(), prompts[1..].to_vec()];
            for chunk in [64, 16, 5] {
                let (outputs, stats) = serve(config(PrefixCache::On, 30, chunk), &one_by_one);
                assert!(outputs == alone, "{family} at {temperature} in chunks of {chunk}: one by one");
                // 32 of the second and of the third, 48 of the last.
                assert_eq!(stats.prefix_hits, 32 + 32 + 48);
                let (outputs, stats) = serve(config(PrefixCache::On, 30, chunk), &together);
                assert!(outputs == alone, "{family} at {temperature} in chunks of {chunk}: together");
                assert_eq!(stats.prefix_hits, 32 + 32 + 48);
                let (outputs, stats) = serve(config(PrefixCache::On, 5, chunk), &together);
                assert!(outputs == alone, "{family} at {temperature} in chunks of {chunk}: in few blocks");
                assert!(stats.preemptions > 0 && stats.prefix_hits > 0, "{stats:?}");
            }
        }
    }
}
