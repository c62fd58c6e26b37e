//! Models whose layers have a window: against the plain reference, with the same bits for every way of serving, and in
//! no more KV blocks than the window needs.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod serving;

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use muster_checkpoint::{Checkpoint, Source};
use muster_engine::NO_BLOCK;
use muster_engine::scheduler::PrefixCache;
use muster_engine::step::StepItem;
use muster_model::evaluate::evaluate;
use muster_model::local::local;
use muster_model::reference::Reference;
use muster_model::sampler::{RawSampling, Sampling};
use muster_types::{Compute, TokenId};
use serde_json::Value;
use serving::{Model, OUTPUT, config, fixtures};

/// The smallest fixture with a window, in a directory that only the test of this name uses.
fn windowed(test: &str, window: u32) -> PathBuf {
    let (from, to) = (fixtures().join("mixtral"), Path::new(env!("CARGO_TARGET_TMPDIR")).join(test));
    std::fs::create_dir_all(&to).unwrap();
    for file in std::fs::read_dir(from).unwrap() {
        let file = file.unwrap();
        std::fs::write(to.join(file.file_name()), std::fs::read(file.path()).unwrap()).unwrap();
    }
    let config = to.join("config.json");
    let mut json: Value = serde_json::from_slice(&std::fs::read(&config).unwrap()).unwrap();
    json["sliding_window"] = window.into();
    std::fs::write(config, json.to_string()).unwrap();
    to
}

fn evaluated(model: &Model, tokens: &[u32], chunk: usize) -> Vec<f32> {
    let mut local = local(Arc::clone(&model.cpu), &model.experts).unwrap();
    let chunk = NonZeroUsize::new(chunk).unwrap();
    evaluate(&model.trunk, &mut local, tokens, chunk).unwrap().logits
}

fn farthest(ours: &[f32], theirs: &[f32]) -> f32 {
    assert_eq!(ours.len(), theirs.len());
    ours.iter().zip(theirs).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn windows_agree_with_the_plain_reference() {
    let golden = std::fs::read(fixtures().join("mixtral/golden.json")).unwrap();
    let golden: Value = serde_json::from_slice(&golden).unwrap();
    let atol = golden["tolerance"]["atol"]["logits"].as_f64().unwrap() as f32;
    let tokens: Vec<u32> = (0..70).map(|i| (i * 7 + 3) % 320).collect();
    let whole = evaluated(&Model::open(&fixtures().join("mixtral"), Compute::F32), &tokens, 512);
    for window in [1, 8, 16, 41] {
        let directory = windowed("windows_agree_with_the_plain_reference", window);
        let model = Model::open(&directory, Compute::F32);
        let checkpoint = Checkpoint::open(&Source::Directory(directory)).unwrap();
        let reference = Reference::new(&checkpoint).forward(&tokens).unwrap().logits;
        assert!(farthest(&reference, &whole) > 10.0 * atol, "a window of {window} makes a difference");
        for chunk in [512, 16, 1] {
            let off = farthest(&evaluated(&model, &tokens, chunk), &reference);
            assert!(off <= atol, "window {window}, chunks of {chunk}: off by {off}, allowed {atol}");
        }
    }
}

/// Blocks of an item's sequence, in the only group.
fn held(item: &StepItem) -> usize {
    item.blocks.iter().filter(|&&block| block != NO_BLOCK).count()
}

#[test]
fn a_window_takes_few_blocks_and_gives_the_same_bits() {
    let directory = windowed("a_window_takes_few_blocks_and_gives_the_same_bits", 8);
    for compute in [Compute::F32, Compute::Bf16] {
        let model = Model::open(&directory, compute);
        let vocab = model.trunk.spec().vocab;
        let raw = RawSampling { temperature: 0.9, seed: 5, ..RawSampling::default() };
        let sampling = Sampling::new(raw, vocab).unwrap();
        let starts = [3, 3, 1, 2, 3];
        let prompts = starts.map(|start| model.tokens((0..70).map(|i| i * 7 + start)));
        let (all_at_once, one_by_one) = ([prompts.to_vec()], prompts.clone().map(|prompt| vec![prompt]));
        let (expected, _) =
            model.serve(config(&model, PrefixCache::Off, 30, 64), &sampling, &all_at_once, &mut |_| {});
        for (prompt, output) in prompts.iter().zip(&expected) {
            // The whole sequence again, in one chunk and without freed blocks.
            let tokens: Vec<u32> =
                prompt.iter().chain(output.iter().map(|(token, _)| token)).map(|token| token.get()).collect();
            let logits = evaluated(&model, &tokens, 512);
            let rows = logits.chunks_exact(vocab as usize).skip(prompt.len() - 1);
            for ((token, bits), row) in output.iter().zip(rows) {
                assert!(row.iter().map(|x| x.to_bits()).eq(bits.iter().copied()), "{compute}: {token:?}");
            }
            assert_eq!(output.len(), OUTPUT as usize);
        }
        let mut preempted = 0;
        for chunk in [64_u32, 16, 5] {
            let bound = 8_usize.div_ceil(16) + (chunk as usize).div_ceil(16) + 1;
            for cache in [PrefixCache::Off, PrefixCache::On] {
                for blocks in [30, bound as u32, bound as u32 + 1, bound as u32 + 2] {
                    for waves in [&all_at_once[..], &one_by_one[..]] {
                        let (outputs, stats) = model.serve(
                            config(&model, cache, blocks, chunk),
                            &sampling,
                            waves,
                            &mut |step| {
                                assert!(step.items.iter().all(|item| held(item) <= bound), "{step:?}");
                            },
                        );
                        let case = format!("{compute}, chunks of {chunk}, {cache:?}, {blocks} blocks");
                        assert!(outputs == expected, "{case}");
                        assert_eq!(stats.blocks_free, blocks, "{case}");
                        if (cache, waves.len()) == (PrefixCache::On, prompts.len()) && blocks == 30 {
                            // 64 tokens each of the second and of the last prompt.
                            assert_eq!(stats.prefix_hits, 128, "{case}");
                        }
                        preempted += stats.preemptions;
                    }
                }
            }
        }
        assert!(preempted > 0, "{compute}");
    }
}

#[test]
fn more_sequences_run_at_once_than_their_positions_have_blocks() {
    let model = Model::open(
        &windowed("more_sequences_run_at_once_than_their_positions_have_blocks", 8),
        Compute::F32,
    );
    let sampling = Sampling::new(RawSampling::default(), model.trunk.spec().vocab).unwrap();
    let prompts: Vec<Vec<TokenId>> =
        (0..4).map(|start| model.tokens((0..70).map(|i| i * 7 + start))).collect();
    let mut most = 0;
    let (_, stats) =
        model.serve(config(&model, PrefixCache::Off, 9, 16), &sampling, &[prompts], &mut |step| {
            let covered = |item: &StepItem| item.blocks.len();
            most = most.max(step.items.iter().map(covered).sum::<usize>());
        });
    // Four of 70 tokens and more, each in five blocks or six.
    assert!(most >= 20, "{most} blocks' worth of positions in a cache of nine");
    assert_eq!(stats.preemptions, 0);
}
