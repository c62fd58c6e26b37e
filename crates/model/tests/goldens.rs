//! Every family against outputs of transformers, and against the plain reference; and promise 3 inside one process: the
//! same bits for every chunking.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use muster_checkpoint::{Checkpoint, Source};
use muster_kernels::{Cpu, Isa};
use muster_model::evaluate::{Evaluation, evaluate};
use muster_model::experts::ExpertSet;
use muster_model::local::local;
use muster_model::reference::{LayerChoices, Reference};
use muster_model::trunk::{CpuDevice, Trunk};
use muster_types::Compute;
use muster_types::WeightDType::{self, Native, Q4, Q8};
use safetensors::SafeTensors;
use serde_json::Value;

struct Model {
    checkpoint: Checkpoint,
    trunk: Trunk,
    experts: Arc<ExpertSet>,
    cpu: Arc<Cpu>,
}

impl Model {
    fn open(directory: &Path, compute: Compute, isa: Isa, threads: usize) -> Self {
        Self::held_as(directory, compute, [Native; 2], isa, threads)
    }

    fn held_as(
        directory: &Path,
        compute: Compute,
        [experts, trunk]: [WeightDType; 2],
        isa: Isa,
        threads: usize,
    ) -> Self {
        let checkpoint = Checkpoint::open(&Source::Directory(directory.to_owned())).unwrap();
        let cpu = Arc::new(Cpu::with_isa(NonZeroUsize::new(threads).unwrap(), isa).unwrap());
        let device = CpuDevice::new(Arc::clone(&cpu), compute);
        let trunk = Trunk::load(&device, &checkpoint, trunk, &mut |_| {}).unwrap();
        let keys = ExpertSet::all_keys(&checkpoint);
        let experts = Arc::new(ExpertSet::load(&checkpoint, &keys, compute, experts, &mut |_| {}).unwrap());
        Self { checkpoint, trunk, experts, cpu }
    }

    fn evaluate(&self, tokens: &[u32], chunk: usize) -> Evaluation {
        let mut local = local(Arc::clone(&self.cpu), &self.experts).unwrap();
        let chunk = NonZeroUsize::new(chunk).unwrap();
        evaluate(&self.trunk, &mut local, tokens, chunk).unwrap()
    }

    fn greedy(&self, prompt: &[u32], count: usize) -> Vec<u32> {
        let mut tokens = prompt.to_vec();
        let vocab = self.checkpoint.spec().vocab as usize;
        for _ in 0..count {
            let logits = self.evaluate(&tokens, 512).logits;
            tokens.push(argmax(&logits[logits.len() - vocab..]));
        }
        tokens.split_off(prompt.len())
    }
}

fn argmax(logits: &[f32]) -> u32 {
    let best = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b]).then(b.cmp(&a)));
    u32::try_from(best.unwrap()).unwrap()
}

/// Directory of the golden checkpoints; `MUSTER_GOLDEN` names another.
fn fixtures() -> PathBuf {
    let own = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/golden");
    std::env::var_os("MUSTER_GOLDEN").map_or_else(own, PathBuf::from)
}

/// The golden checkpoints, each with the outputs of transformers.
fn families() -> Vec<String> {
    let names = std::fs::read_dir(fixtures()).unwrap().map(|entry| entry.unwrap().file_name());
    let mut names: Vec<String> = names.map(|name| name.into_string().unwrap()).collect();
    names.sort();
    assert!(!names.is_empty(), "{} is empty", fixtures().display());
    names
}

struct Golden {
    meta: Value,
    bytes: Vec<u8>,
}

impl Golden {
    fn read(directory: &Path) -> Self {
        let meta = serde_json::from_slice(&std::fs::read(directory.join("golden.json")).unwrap()).unwrap();
        Self { meta, bytes: std::fs::read(directory.join("golden.safetensors")).unwrap() }
    }

    fn f32s(&self, name: &str) -> Vec<f32> {
        let tensors = SafeTensors::deserialize(&self.bytes).unwrap();
        let data = tensors.tensor(name).unwrap().data().to_vec();
        data.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
    }

    fn ids(&self, name: &str) -> Vec<u32> {
        let tensors = SafeTensors::deserialize(&self.bytes).unwrap();
        let data = tensors.tensor(name).unwrap().data().to_vec();
        data.chunks_exact(8)
            .map(|b| u32::try_from(i64::from_le_bytes(b.try_into().unwrap())).unwrap())
            .collect()
    }

    /// Absolute tolerance for one kind of tensor.
    fn atol(&self, kind: &str) -> f32 {
        let atol = self.meta["tolerance"]["atol"][kind].as_f64();
        atol.unwrap_or_else(|| panic!("no tolerance for {kind}: {}", self.meta["tolerance"])) as f32
    }
}

fn farthest(ours: &[f32], theirs: &[f32]) -> f32 {
    assert_eq!(ours.len(), theirs.len());
    ours.iter()
        .zip(theirs)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, |worst, d| if d > worst || d.is_nan() { d } else { worst })
}

fn check_choices(golden: &Golden, prompt: &str, choices: &[(u32, LayerChoices)], who: &str) {
    let atol = golden.atol("topk_weights");
    for (layer, rows) in choices {
        let ids: Vec<u32> = rows.iter().flatten().map(|c| c.0).collect();
        let weights: Vec<f32> = rows.iter().flatten().map(|c| c.1).collect();
        assert_eq!(
            ids,
            golden.ids(&format!("{prompt}.layer{layer}.topk_ids")),
            "{who} {prompt} layer {layer}"
        );
        let off = farthest(&weights, &golden.f32s(&format!("{prompt}.layer{layer}.topk_weights")));
        assert!(off <= atol, "{who} {prompt} layer {layer}: weights are off by {off}, allowed {atol}");
    }
}

fn check_hidden(golden: &Golden, prompt: &str, hidden: &[Vec<f32>], who: &str) {
    for (layer, ours) in hidden.iter().enumerate() {
        let off = farthest(ours, &golden.f32s(&format!("{prompt}.layer{layer}.hidden")));
        let atol = golden.atol("hidden");
        assert!(off <= atol, "{who} {prompt} layer {layer}: hidden states are off by {off}, allowed {atol}");
    }
}

#[test]
fn every_family_agrees_with_transformers() {
    for family in families() {
        let directory = fixtures().join(&family);
        let golden = Golden::read(&directory);
        let model = Model::open(&directory, Compute::F32, Isa::detect(), 2);
        for prompt in ["prompt0", "prompt1"] {
            let tokens = golden.ids(&format!("{prompt}.input_ids"));
            let expected = golden.f32s(&format!("{prompt}.logits"));
            let ours = model.evaluate(&tokens, 512);
            let off = farthest(&ours.logits, &expected);
            let atol = golden.atol("logits");
            assert!(off <= atol, "{family} {prompt}: logits are off by {off}, allowed {atol}");
            check_choices(&golden, prompt, &ours.choices, &family);
            check_hidden(&golden, prompt, &ours.hidden, &family);

            let greedy = model.greedy(&tokens, 24);
            assert_eq!(greedy, golden.ids(&format!("{prompt}.greedy_ids")), "{family} {prompt}");
        }
    }
}

#[test]
fn the_plain_reference_agrees_with_transformers() {
    for family in families() {
        let directory = fixtures().join(&family);
        let golden = Golden::read(&directory);
        let checkpoint = Checkpoint::open(&Source::Directory(directory)).unwrap();
        let tokens = golden.ids("prompt1.input_ids");
        let output = Reference::new(&checkpoint).forward(&tokens).unwrap();
        let off = farthest(&output.logits, &golden.f32s("prompt1.logits"));
        let atol = golden.atol("logits");
        assert!(off <= atol, "{family}: logits are off by {off}, allowed {atol}");
        check_choices(&golden, "prompt1", &output.choices, &family);
        check_hidden(&golden, "prompt1", &output.hidden, &family);
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

/// Dtypes of experts and trunk: every value of each occurs.
const HELD: [[WeightDType; 2]; 4] = [[Native, Native], [Q8, Native], [Q4, Q8], [Native, Q4]];

#[test]
fn chunks_threads_and_instruction_sets_do_not_change_a_bit() {
    for family in families() {
        let directory = fixtures().join(&family);
        let tokens = Golden::read(&directory).ids("prompt1.input_ids");
        for (compute, held) in [Compute::F32, Compute::Bf16, Compute::Bf16Pairs]
            .into_iter()
            .flat_map(|c| HELD.map(|held| (c, held)))
        {
            let mut seen: BTreeMap<String, Vec<u32>> = BTreeMap::new();
            for isa in Isa::available() {
                let threads = if isa == Isa::detect() { 2 } else { 1 };
                let model = Model::held_as(&directory, compute, held, isa, threads);
                for chunk in [512, 7, 1] {
                    let logits = model.evaluate(&tokens, chunk).logits;
                    seen.insert(format!("{isa} in chunks of {chunk}"), bits(&logits));
                }
            }
            let (first, expected) = seen.iter().next().unwrap();
            for (case, logits) in &seen {
                assert!(logits == expected, "{family} {compute} {held:?}: {case} differs from {first}");
            }
        }
    }
}

#[test]
fn the_demo_model_gives_its_golden_tokens() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/demo");
    let golden: Value =
        serde_json::from_slice(&std::fs::read(directory.join("golden.json")).unwrap()).unwrap();
    let model = Model::open(&directory, Compute::F32, Isa::detect(), 2);
    for case in golden["prompts"].as_array().unwrap() {
        let list = |key: &str| -> Vec<u32> {
            case[key].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
        };
        let (prompt, expected) = (list("prompt_ids"), list("ids"));
        // Teacher-forced: one pass gives the greedy choice at every position.
        let all: Vec<u32> = prompt.iter().chain(&expected).copied().collect();
        let logits = model.evaluate(&all, 512).logits;
        let vocab = model.checkpoint.spec().vocab as usize;
        let ours: Vec<u32> = logits.chunks_exact(vocab).map(argmax).collect();
        assert_eq!(ours[prompt.len() - 1..all.len() - 1], expected, "{}", case["name"]);
    }
}

/// The figures of docs/numerics.md for bf16 on the demo model.
#[test]
fn bf16_stays_within_its_stated_distance_of_f32() {
    let (mean, top1, margin) = distance_from_f32(Compute::Bf16);
    assert!(mean <= STATED_MEAN_KL && top1 >= STATED_TOP1 && margin <= STATED_MARGIN_CHANGE);
}

/// The figures of docs/numerics.md for bf16-pairs, within the same bounds.
#[test]
fn bf16_pairs_stay_within_their_stated_distance_of_f32() {
    let (mean, top1, margin) = distance_from_f32(Compute::Bf16Pairs);
    assert!(mean <= STATED_MEAN_KL && top1 >= STATED_TOP1 && margin <= STATED_MARGIN_CHANGE);
}

/// Mean divergence, share of positions with the same likeliest token, and the largest change of a margin.
#[expect(clippy::print_stdout, reason = "docs/numerics.md states the figures")]
fn distance_from_f32(compute: Compute) -> (f64, f64, f32) {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/demo");
    let golden: Value =
        serde_json::from_slice(&std::fs::read(directory.join("golden.json")).unwrap()).unwrap();
    let [exact, rounded] =
        [Compute::F32, compute].map(|compute| Model::open(&directory, compute, Isa::detect(), 2));
    let vocab = exact.checkpoint.spec().vocab as usize;
    let (mut positions, mut agree, mut divergence, mut worst) = (0u32, 0u32, 0.0, 0.0f32);
    for case in golden["prompts"].as_array().unwrap() {
        let lists = ["prompt_ids", "ids"].map(|key| case[key].as_array().unwrap().clone());
        let tokens: Vec<u32> = lists.iter().flatten().map(|id| id.as_u64().unwrap() as u32).collect();
        let (wide, narrow) = (exact.evaluate(&tokens, 512).logits, rounded.evaluate(&tokens, 512).logits);
        for (p, q) in wide.chunks_exact(vocab).zip(narrow.chunks_exact(vocab)) {
            positions += 1;
            agree += u32::from(argmax(p) == argmax(q));
            divergence += kl(p, q);
            worst = worst.max(margin_change(p, q));
        }
    }
    let (mean, top1) = (divergence / f64::from(positions), f64::from(agree) / f64::from(positions));
    println!(
        "{compute}, {positions} positions: mean KL {mean:.2e}, top-1 {top1:.4}, largest margin change {worst:.3}"
    );
    (mean, top1, worst)
}

/// The figures of docs/numerics.md for quantised weights on the demo model.
#[test]
fn few_bit_weights_stay_within_their_stated_distance_of_native_ones() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/demo");
    let golden: Value =
        serde_json::from_slice(&std::fs::read(directory.join("golden.json")).unwrap()).unwrap();
    let open = |held| Model::held_as(&directory, Compute::Bf16, held, Isa::detect(), 2);
    let native = open([Native, Native]);
    let vocab = native.checkpoint.spec().vocab as usize;
    for (held, (most, least)) in [
        ([Q8, Native], STATED_Q8),
        ([Q4, Native], STATED_Q4),
        ([Native, Q8], STATED_TRUNK),
        ([Q8, Q8], STATED_BOTH),
        ([Q4, Q8], STATED_Q4),
    ] {
        let (few, name) = (open(held), format!("{} experts, {} trunk", held[0], held[1]));
        let (mut positions, mut agree, mut divergence) = (0u32, 0u32, 0.0);
        for case in golden["prompts"].as_array().unwrap() {
            let lists = ["prompt_ids", "ids"].map(|key| case[key].as_array().unwrap().clone());
            let tokens: Vec<u32> = lists.iter().flatten().map(|id| id.as_u64().unwrap() as u32).collect();
            let (wide, narrow) = (native.evaluate(&tokens, 512).logits, few.evaluate(&tokens, 512).logits);
            for (p, q) in wide.chunks_exact(vocab).zip(narrow.chunks_exact(vocab)) {
                positions += 1;
                agree += u32::from(argmax(p) == argmax(q));
                divergence += kl(p, q);
            }
        }
        let (mean, top1) = (divergence / f64::from(positions), f64::from(agree) / f64::from(positions));
        println!("{name}, {positions} positions: mean KL {mean:.2e}, top-1 {top1:.4}");
        assert!(mean > 0.0 && mean <= most && top1 >= least, "{name}: {mean:.2e} {top1:.4}");
    }
}

/// Greatest mean divergence, least agreement.
const STATED_Q8: (f64, f64) = (2e-4, 0.98);
const STATED_Q4: (f64, f64) = (5e-3, 0.94);
const STATED_TRUNK: (f64, f64) = (3e-4, 0.98);
const STATED_BOTH: (f64, f64) = (5e-4, 0.97);
const STATED_MEAN_KL: f64 = 3e-4;
const STATED_TOP1: f64 = 0.99;
const STATED_MARGIN_CHANGE: f32 = 0.8;

/// How far rounding moves the best logit against any other that could overtake it: one at most 4 below.
fn margin_change(p: &[f32], q: &[f32]) -> f32 {
    let best = argmax(p) as usize;
    let rivals = (0..p.len()).filter(|&other| p[best] - p[other] <= 4.0);
    rivals.map(|other| ((p[best] - p[other]) - (q[best] - q[other])).abs()).fold(0.0, f32::max)
}

/// Kullback-Leibler divergence of softmax(q) from softmax(p), nats.
fn kl(p: &[f32], q: &[f32]) -> f64 {
    let normalised = |x: &[f32]| -> Vec<f64> {
        let max = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let norm = x.iter().map(|v| f64::from(v - max).exp()).sum::<f64>().ln();
        x.iter().map(|v| f64::from(v - max) - norm).collect()
    };
    normalised(p).iter().zip(normalised(q)).map(|(p, q)| p.exp() * (p - q)).sum()
}
