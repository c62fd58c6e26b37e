//! Layers in several groups, which hold and free blocks separately, against the same layers in one group that frees
//! none.

use std::num::{NonZero, NonZeroUsize};
use std::path::Path;
use std::sync::Arc;

use muster_checkpoint::{Checkpoint, Source};
use muster_engine::NO_BLOCK;
use muster_engine::reach::most_held;
use muster_engine::scheduler::{NewSequence, PrefixCache, Progress, Scheduler, SchedulerConfig, Stats};
use muster_kernels::Cpu;
use muster_types::Reach;
use muster_types::{SeqId, TokenId};

use super::*;
use crate::evaluate::evaluate;
use crate::experts::ExpertSet;
use crate::local::{Local, local};
use crate::step::WantLogits;

const PROMPT: usize = 45;

pub(super) struct Model {
    pub(super) trunk: Trunk,
    experts: Arc<ExpertSet>,
    cpu: Arc<Cpu>,
    /// Sequences of up to 90 tokens: the first two begin alike.
    sequences: [Vec<TokenId>; 3],
}

impl Model {
    /// The stored model, with all layers in one group.
    pub(super) fn plain() -> Self {
        let mut model = Self::open([Reach::All; 3]);
        model.trunk.kv_groups = LayerGroups::of([Reach::All; 3]);
        model
    }

    /// The model with these reaches for its three layers.
    fn open(layers: [Reach; 3]) -> Self {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/golden/mixtral");
        let checkpoint = Checkpoint::open(&Source::Directory(directory)).unwrap();
        let (compute, dtype) = (Compute::F32, WeightDType::Native);
        let cpu = Arc::new(Cpu::new(NonZeroUsize::MIN).unwrap());
        let mut trunk =
            Trunk::load(&CpuDevice::new(Arc::clone(&cpu), compute), &checkpoint, dtype, &mut |_| {}).unwrap();
        for (layer, reach) in trunk.layers.iter_mut().zip(layers) {
            layer.attention.spec.reach = reach;
        }
        let keys = ExpertSet::all_keys(&checkpoint);
        let experts = Arc::new(ExpertSet::load(&checkpoint, &keys, compute, dtype, &mut |_| {}).unwrap());
        let token = |id: u32| TokenId::new(id % 320, 320).unwrap();
        let alike = |i: u32| token(i * 7 + 3);
        let sequences = [
            (0..90).map(alike).collect(),
            (0..90).map(|i| if i < 40 { alike(i) } else { token(i * 5 + 1) }).collect(),
            (0..90).map(|i| token(i * 11 + 2)).collect(),
        ];
        Self { trunk, experts, cpu, sequences }
    }

    pub(super) fn dispatch(&self) -> Local {
        local(Arc::clone(&self.cpu), &self.experts).unwrap()
    }

    /// Bits of the logits of all positions, from one group.
    fn expected(&mut self, layers: [Reach; 3]) -> Vec<Vec<Vec<u32>>> {
        self.trunk.kv_groups = LayerGroups::of([Reach::All; 3]);
        let of_sequence = |tokens: &Vec<TokenId>| -> Vec<Vec<u32>> {
            let ids: Vec<u32> = tokens.iter().map(|token| token.get()).collect();
            let mut dispatch = self.dispatch();
            let chunk = NonZeroUsize::new(512).unwrap();
            let logits = evaluate(&self.trunk, &mut dispatch, &ids, chunk).unwrap().logits;
            logits.chunks_exact(320).map(|row| row.iter().map(|x| x.to_bits()).collect()).collect()
        };
        let expected = self.sequences.iter().map(of_sequence).collect();
        self.trunk.kv_groups = LayerGroups::of(layers);
        expected
    }

    /// Runs all sequences with their tokens given, those of one wave together. Returns the statistics, and whether
    /// blocks were freed.
    fn run(&self, config: SchedulerConfig, waves: &[&[usize]], expected: &[Vec<Vec<u32>>]) -> (Stats, bool) {
        let mut kv = self.trunk.new_kv(config.blocks as usize).unwrap();
        let mut scheduler = Scheduler::new(config).unwrap();
        let mut dispatch = self.dispatch();
        let (mut state, mut forgot) = (StepState::default(), false);
        for &wave in waves {
            for &number in wave {
                let tokens = &self.sequences[number];
                let (prompt, max_tokens) = (tokens[..PROMPT].to_vec(), (tokens.len() - PROMPT) as u32);
                let id = SeqId::new(number as u64);
                scheduler.admit(NewSequence { id, prompt, max_tokens }).unwrap();
            }
            while !scheduler.is_idle() {
                let step = scheduler.schedule(4);
                forgot |= step.items.iter().any(|item| item.blocks.contains(&NO_BLOCK));
                let inputs: Vec<_> = step
                    .items
                    .iter()
                    .map(|item| SeqInput {
                        start: item.start,
                        tokens: &item.tokens,
                        blocks: &item.blocks,
                        logits: WantLogits::All,
                    })
                    .collect();
                let mut ctx = StepContext {
                    kv: &mut kv,
                    dispatch: &mut dispatch,
                    timeout: Duration::from_secs(60),
                    observe: None,
                };
                self.trunk.forward(&mut ctx, [&inputs, &[]], &mut state);
                for (place, item) in step.items.iter().enumerate() {
                    let number = item.seq.get() as usize;
                    let logits = state.logits(0, place, 320).unwrap();
                    for (position, row) in (item.start as usize..).zip(logits.chunks_exact(320)) {
                        let same =
                            row.iter().map(|x| x.to_bits()).eq(expected[number][position].iter().copied());
                        assert!(same, "sequence {number}, position {position}");
                    }
                    let next = item.start as usize + item.tokens.len();
                    if item.sample
                        && scheduler.append(item.seq, self.sequences[number][next]).unwrap()
                            == Progress::LengthReached
                    {
                        scheduler.finish(item.seq);
                    }
                }
            }
        }
        (scheduler.stats(), forgot)
    }
}

#[test]
fn groups_of_layers_give_the_bits_of_one_group() {
    for (layers, groups) in [
        ([Reach::last(8), Reach::All, Reach::last(8)], 3),
        ([Reach::last(24), Reach::last(8), Reach::All], 3),
        ([Reach::All, Reach::last(40), Reach::last(1)], 3),
        ([Reach::last(20); 3], 1),
        ([Reach::chunk(24), Reach::chunk(24), Reach::All], 3),
        ([Reach::chunk(32), Reach::last(8), Reach::chunk(10)], 3),
    ] {
        let mut model = Model::open(layers);
        let expected = model.expected(layers);
        let reaches = model.trunk.kv_groups().reaches().to_vec();
        assert_eq!(reaches.len(), groups);
        let mut preempted = 0;
        for prefill_chunk in [64, 16, 5] {
            for prefix_cache in [PrefixCache::Off, PrefixCache::On] {
                let block_tokens = NonZero::new(16).unwrap();
                // Blocks for one sequence, and some more.
                let least = most_held(&reaches, block_tokens, prefill_chunk, 89) as usize;
                for blocks in [20 * groups, least, least + 2, least + 4, least + 6] {
                    let config = SchedulerConfig {
                        block_tokens,
                        groups: reaches.clone(),
                        blocks: blocks as u32,
                        context: 90,
                        max_running: 3,
                        max_waiting: 3,
                        step_tokens: 64,
                        prefill_chunk,
                        prefix_cache,
                    };
                    let (stats, forgot) = model.run(config, &[&[0, 2], &[1, 0]], &expected);
                    assert!(forgot, "{layers:?}: blocks were given up");
                    assert_eq!(stats.blocks_free, blocks as u32);
                    // 32 tokens each of the second sequence and of the first one's second run.
                    if prefix_cache == PrefixCache::On && blocks == 20 * groups {
                        assert_eq!(stats.prefix_hits, 64, "{layers:?}");
                    }
                    preempted += stats.preemptions;
                }
            }
        }
        assert!(preempted > 0 || groups == 1, "{layers:?}");
    }
}
