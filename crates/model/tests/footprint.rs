//! Sizes computed before loading against sizes of the loaded model.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::Arc;

use muster_checkpoint::{Checkpoint, Outline, Preset, Source, StoredAs, Survey};
use muster_kernels::{BLOCK_TOKENS, Cpu};
use muster_model::experts::{ExpertForm, ExpertSet};
use muster_model::footprint::Footprint;
use muster_model::trunk::{CpuDevice, Trunk};
use muster_types::{Compute, DType, ExpertId, ExpertKey, LayerId, WeightDType};

#[test]
fn computed_sizes_are_those_of_loaded_models() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let cpu = Arc::new(Cpu::new(NonZeroUsize::MIN).unwrap());
    let goldens = std::fs::read_dir(root.join("tests/fixtures/golden")).unwrap();
    for path in goldens.map(|entry| entry.unwrap().path()).chain([root.join("models/demo")]) {
        let (model, source) = (path.display(), Source::Directory(path.clone()));
        let checkpoint = Checkpoint::open(&source).unwrap();
        let outline = Outline::of(&Survey::open(&source).unwrap().spec);
        for compute in [Compute::F32, Compute::Bf16] {
            for dtype in WeightDType::ALL {
                let footprint = Footprint::of(&outline, compute, dtype, dtype).unwrap();
                let trunk =
                    Trunk::load(&CpuDevice::new(Arc::clone(&cpu), compute), &checkpoint, dtype, &mut |_| {})
                        .unwrap();
                assert_eq!(footprint.trunk_bytes, trunk.bytes(), "{model} {compute} {dtype}");
                // Blocks of every group of layers.
                let blocks = 3;
                let groups = footprint.kv_groups.reaches().len();
                let kv = trunk.new_kv(blocks * groups).unwrap().bytes() as u64;
                assert_eq!(
                    footprint.kv_token_bytes * (blocks * BLOCK_TOKENS) as u64,
                    kv,
                    "{model} {compute}"
                );
                assert_eq!(
                    footprint.kv_sequence_bytes((2 * BLOCK_TOKENS + 1) as u64, 512),
                    kv,
                    "{model} {compute}"
                );
                let forms = ExpertForm::of_layers(&checkpoint, compute, dtype);
                let formed = forms.iter().map(|form| form.map_or(0, |form| form.bytes().unwrap() as u64));
                assert!(formed.eq(footprint.expert_bytes.iter().copied()), "{model} {compute} {dtype}");
                let layer = LayerId::all(64).find(|layer| footprint.expert_bytes[layer.index()] > 0).unwrap();
                let key = |expert| ExpertKey { layer, expert };
                let keys: Vec<_> = ExpertId::all(2).map(key).collect();
                let set = ExpertSet::load(&checkpoint, &keys, compute, dtype, &mut |_| {}).unwrap();
                assert_eq!(
                    set.bytes(),
                    2 * footprint.expert_bytes[layer.index()],
                    "{model} {compute} {dtype}"
                );
            }
        }
    }
}

#[test]
fn latent_attention_keeps_the_latent_once_and_one_rotated_key() {
    let outline = Preset::find("deepseek-v3").unwrap().outline();
    let footprint = Footprint::of(&outline, Compute::Bf16, WeightDType::Native, WeightDType::Native).unwrap();
    assert_eq!(footprint.kv_token_bytes, 61 * (64 + 512) * 2);
    assert_eq!((footprint.expert_bytes[2], outline.experts), (0, StoredAs::Fp8));
    // FP8 is held in bf16.
    assert_eq!(footprint.expert_bytes[3], 3 * 7168 * 2048 * 2);
}

#[test]
fn a_window_bounds_what_its_layers_keep() {
    let outline = Preset::find("gpt-oss-20b").unwrap().outline();
    let footprint = Footprint::of(&outline, Compute::Bf16, WeightDType::Native, WeightDType::Native).unwrap();
    // Keys and values of 8 heads of 64, in 24 layers.
    let token = 24 * 2 * 8 * 64 * 2;
    assert_eq!((footprint.kv_token_bytes, footprint.kv_groups.size()), (token, 12));
    let half = |blocks: u64| blocks * 16 * token / 2;
    let bytes = |tokens| footprint.kv_sequence_bytes(tokens, 512);
    assert_eq!([1, 640, 131_072].map(bytes), [half(1 + 1), half(40 + 40), half(41 + 8192)]);
}

#[test]
fn quantised_sizes_do_not_depend_on_what_is_stored() {
    let preset = Preset::find("gpt-oss-20b").unwrap().outline();
    let plain = Outline { experts: StoredAs::Plain(DType::Bf16), ..preset.clone() };
    let expert = |outline: &Outline, dtype| {
        Footprint::of(outline, Compute::Bf16, dtype, WeightDType::Native).unwrap().expert_bytes[0]
    };
    assert_eq!(expert(&preset, WeightDType::Q4), expert(&plain, WeightDType::Q4));
    // 4.25 bits of 16, biases aside.
    let biases = 4 * (3 * 2880);
    let [four, sixteen] = [&preset, &plain].map(|outline| expert(outline, WeightDType::Native) - biases);
    assert_eq!(four * 64, sixteen * 17);
}
