//! A sequence's logits have the same bits whether its keys and values were computed or found in the prefix cache:
//! greedy or sampled, for all chunk sizes, and with so few blocks that sequences are preempted.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod serving;

use muster_engine::scheduler::{PrefixCache, SchedulerConfig};
use muster_model::sampler::{RawSampling, Sampling};
use muster_types::Compute;
use serving::{Model, Output, config, fixtures};

#[test]
fn cold_and_warm_are_the_same_bits() {
    for (family, compute) in [
        ("granitemoe", Compute::Bf16),
        ("mixtral_bf16", Compute::Bf16),
        ("qwen3_moe", Compute::F32),
        ("olmoe", Compute::Bf16),
        ("deepseek_v3", Compute::Bf16),
        ("gpt_oss", Compute::Bf16),
        ("llama4", Compute::F32),
    ] {
        let model = Model::open(&fixtures().join(family), compute);
        // A block of every group of layers for each that one group would need.
        let groups = model.trunk.kv_groups().reaches().len() as u32;
        let config = |prefixes, blocks, chunk| config(&model, prefixes, blocks * groups, chunk);
        let long = model.tokens((0..57).map(|i| i * 7 + 3));
        let other_end = model.tokens((0..57).map(|i| if i < 40 { i * 7 + 3 } else { i * 5 + 1 }));
        let short = model.tokens((0..33).map(|i| i * 7 + 3));
        let unlike = model.tokens((0..50).map(|i| i * 11 + 2));
        let prompts = [long.clone(), other_end, short, unlike, long];
        for temperature in [0.0, 0.9] {
            let raw = RawSampling { temperature, seed: 5, ..RawSampling::default() };
            let sampling = Sampling::new(raw, model.trunk.spec().vocab).unwrap();
            let serve =
                |config: SchedulerConfig, waves: &[_]| model.serve(config, &sampling, waves, &mut |_| {});
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
                // 32 tokens each of the second and the third prompt, 48 of the last.
                assert_eq!(stats.prefix_hits, 32 + 32 + 48);
                let (outputs, stats) = serve(config(PrefixCache::On, 30, chunk), &together);
                assert!(outputs == alone, "{family} at {temperature} in chunks of {chunk}: together");
                assert_eq!(stats.prefix_hits, 32 + 32 + 48);
                let (outputs, stats) = serve(config(PrefixCache::On, 5, chunk), &together);
                assert!(outputs == alone, "{family} at {temperature} in chunks of {chunk}: in few blocks");
                assert!(stats.prefix_hits > 0, "{stats:?}");
                // Layers with a window free blocks, so that no sequence may be preempted.
                assert!(stats.preemptions > 0 || groups > 1, "{stats:?}");
            }
        }
    }
}
