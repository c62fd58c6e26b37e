//! Tensors against the configuration, values, and files that change while they are served.

use std::fs::{self, OpenOptions};
use std::io::{Seek, SeekFrom, Write};

use muster_checkpoint::spec::{ExpertRole, LayerRole, Role};
use muster_checkpoint::{CheckpointError, StoredAs, WeightData};
use muster_types::DType;
use serde_json::json;

use crate::model::{Model, SECOND, check_message, open, refused};

const UP: &str = "model.layers.2.block_sparse_moe.experts.5.w3.weight";
const GATE: &str = "model.layers.1.block_sparse_moe.gate.weight";
const NORM: &str = "model.layers.2.input_layernorm.weight";

type Change = fn(&mut Model);

#[test]
fn tensors_that_contradict_the_configuration_are_refused_by_name() {
    let table: [(&str, Change, &[&str]); 15] = [
        ("missing expert", |m| m.remove(UP), &[UP, "layer 2 expert 5 up projection", "no shard has"]),
        ("missing norm", |m| m.remove(NORM), &[NORM, "layer 2 attention norm"]),
        ("missing head", |m| m.remove("lm_head.weight"), &["lm_head.weight", "(head)"]),
        (
            "one expert narrower",
            |m| reshape(m, UP, &[6, 7]),
            &[SECOND, UP, "is [6, 7], config.json says [6, 8]"],
        ),
        ("transposed", |m| reshape(m, UP, &[8, 6]), &[UP, "is [8, 6], config.json says [6, 8]"]),
        ("one dimension more", |m| reshape(m, UP, &[1, 6, 8]), &[UP, "is [1, 6, 8]"]),
        (
            "gate rows",
            |m| reshape(m, GATE, &[5, 8]),
            &[GATE, "layer 1 gate", "is [5, 8], config.json says [6, 8]"],
        ),
        (
            "vocabulary",
            |m| set(m, "vocab_size", 13),
            &["model.embed_tokens.weight", "is [12, 8]", "says [13, 8]"],
        ),
        (
            "fewer layers",
            |m| set(m, "num_hidden_layers", 2),
            &["model.layers.2.", "no part of a mixtral model"],
        ),
        (
            "fewer experts",
            |m| set(m, "num_local_experts", 5),
            &["gate.weight", "is [6, 8], config.json says [5, 8]"],
        ),
        (
            "a bias",
            |m| m.add(0, "model.layers.0.self_attn.q_proj.bias", &[8]),
            &["q_proj.bias", "no part of"],
        ),
        ("a head's bias", |m| m.add(0, "lm_head.bias", &[12]), &["lm_head.bias", "no part of"]),
        ("integers", |m| stored_as(m, UP, "I16"), &[UP, "is I16; this build reads F32, BF16 and F16"]),
        (
            "an expert too many",
            |m| m.add(0, "model.layers.0.block_sparse_moe.experts.6.w1.weight", &[6, 8]),
            &["experts.6.w1.weight", "is of expert 6", "layer 0 has 6 experts"],
        ),
        (
            "two heads",
            |m| drop(m.config.insert("tie_word_embeddings".to_owned(), json!(true))),
            &["lm_head.weight", "`tie_word_embeddings`"],
        ),
    ];
    for (what, change, parts) in table {
        let mut model = Model::mixtral();
        change(&mut model);
        refused(what, model.written().path(), parts);
    }
}

fn set(model: &mut Model, key: &str, value: u64) {
    model.config.insert(key.to_owned(), json!(value));
}

fn reshape(model: &mut Model, name: &str, shape: &[usize]) {
    let tensor = model.tensor(name);
    tensor.shape = shape.to_vec();
    tensor.bytes = vec![0; shape.iter().product::<usize>() * 4];
}

fn stored_as(model: &mut Model, name: &str, dtype: &'static str) {
    let tensor = model.tensor(name);
    tensor.dtype = dtype;
    tensor.bytes.truncate(tensor.bytes.len() / 2);
}

#[test]
fn linear_weights_share_a_dtype_and_norms_need_not() {
    let mut model = Model::mixtral();
    stored_as(&mut model, UP, "BF16");
    refused(
        "one matrix in bf16",
        model.written().path(),
        &[UP, "is BF16, but other weights of its kind are not"],
    );

    let mut model = Model::mixtral();
    model.store_as_bf16();
    let f32_norm = Model::mixtral().tensor(NORM).clone();
    *model.tensor(NORM) = f32_norm;

    let dir = model.written();
    let checkpoint = open(dir.path()).unwrap();
    assert_eq!(checkpoint.spec().dtype, DType::Bf16);
    let norm = Role::Layer(2, LayerRole::AttentionNorm);
    assert_eq!(checkpoint.stored(norm).unwrap().form, StoredAs::Plain(DType::F32));
    assert_eq!(checkpoint.stored(Role::FinalNorm).unwrap().form, StoredAs::Plain(DType::Bf16));
    for role in [norm, Role::FinalNorm] {
        assert!(matches!(checkpoint.read(role).unwrap().data, WeightData::F32(_)), "{role}");
    }
    assert!(matches!(checkpoint.read(Role::Head).unwrap().data, WeightData::Bf16(_)));
}

#[test]
fn a_bias_that_the_configuration_has_and_the_shards_have_not_is_named() {
    let mut model = Model::qwen3_moe();
    model.remove("model.layers.3.self_attn.v_proj.bias");
    refused(
        "a bias",
        model.written().path(),
        &["layers.3.self_attn.v_proj.bias", "layer 3 value bias", "no shard has"],
    );
}

#[test]
fn half_precision_is_widened_and_a_gate_may_be_finer() {
    let mut model = Model::mixtral();
    model.store_as_f16();
    let dir = model.written();
    let checkpoint = open(dir.path()).unwrap();
    assert_eq!((checkpoint.spec().dtype, checkpoint.spec().stored.experts), (DType::F32, StoredAs::F16));
    let (half, whole) = (checkpoint, Model::mixtral().written());
    let whole = open(whole.path()).unwrap();
    for role in whole.roles() {
        let [half, whole] = [&half, &whole].map(|checkpoint| match checkpoint.read(role).unwrap().data {
            WeightData::F32(values) => values,
            other => panic!("{other:?}"),
        });
        // Eleven bits are kept.
        assert!(half.iter().zip(&whole).all(|(h, w)| (h - w).abs() <= w.abs() / 2048.0), "{role}");
        assert_eq!(half.len(), whole.len());
    }

    let mut model = Model::mixtral();
    let gate = model.tensor(GATE).clone();
    model.store_as_bf16();
    *model.tensor(GATE) = gate;
    let dir = model.written();
    let checkpoint = open(dir.path()).unwrap();
    let stored = checkpoint.stored(Role::Layer(1, LayerRole::Gate)).unwrap();
    assert_eq!((stored.form, checkpoint.spec().dtype), (StoredAs::Plain(DType::F32), DType::Bf16));
}

#[test]
fn tensors_that_change_nothing_are_ignored() {
    let mut model = Model::mixtral();
    model.add(0, "model.layers.0.self_attn.rotary_emb.inv_freq", &[2]);
    model.add(1, "vision_tower.patch.weight", &[3, 3]);
    let checkpoint = open(model.written().path()).unwrap();
    let known =
        checkpoint.roles().filter_map(|role| checkpoint.stored(role)).any(|s| s.tensor.contains("vision"));
    assert!(!known);
}

#[test]
fn values_that_are_not_finite_are_refused_by_place() {
    let up = Role::Expert(2, 5, ExpertRole::Up);
    for (value, says) in [(f32::NAN, "NaN"), (f32::INFINITY, "inf"), (f32::NEG_INFINITY, "-inf")] {
        let mut model = Model::mixtral();
        model.tensor(UP).bytes[4 * (3 * 8 + 2)..][..4].copy_from_slice(&value.to_le_bytes());
        for bf16 in [false, true] {
            if bf16 {
                model.store_as_bf16();
            }
            let dir = model.written();
            let checkpoint = open(dir.path()).unwrap();
            let message = checkpoint.read(up).unwrap_err().to_string();
            let place = "layer 2 expert 5 up projection";
            check_message(says, &message, &[SECOND, UP, place, &format!("is {says} at row 3, column 2")]);
            checkpoint.read(Role::Expert(2, 4, ExpertRole::Up)).unwrap();
        }
    }
}

#[test]
fn extreme_but_finite_values_pass() {
    let mut model = Model::mixtral();
    let extremes = [f32::MAX, f32::MIN, f32::MIN_POSITIVE / 4.0, -0.0, 1e38, 0.0];
    let bytes: Vec<u8> = extremes.iter().cycle().take(48).flat_map(|value| value.to_le_bytes()).collect();
    model.tensor(UP).bytes = bytes;
    let dir = model.written();
    let read = open(dir.path()).unwrap().read(Role::Expert(2, 5, ExpertRole::Up)).unwrap();
    let WeightData::F32(values) = read.data else { panic!("stored as f32") };
    let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(&values[..6]), bits(&extremes));
}

#[test]
fn a_role_outside_the_model_is_an_error() {
    let dir = Model::mixtral().written();
    let checkpoint = open(dir.path()).unwrap();
    for role in [
        Role::Expert(2, 6, ExpertRole::Up),
        Role::Expert(3, 0, ExpertRole::Up),
        Role::Expert(u32::MAX, u32::MAX, ExpertRole::Down),
        Role::Layer(0, LayerRole::QBias),
        Role::Layer(0, LayerRole::DenseUp),
    ] {
        assert!(checkpoint.stored(role).is_none());
        let message = checkpoint.read(role).unwrap_err().to_string();
        assert_eq!(message, format!("this mixtral model has no {role}"));
    }
}

#[test]
fn a_file_that_changes_while_it_is_served_is_noticed() {
    let last = Role::FinalNorm;
    let dir = Model::mixtral().written();
    let path = dir.path().join(SECOND);
    let length = fs::metadata(&path).unwrap().len();
    let checkpoint = open(dir.path()).unwrap();
    checkpoint.read(last).unwrap();

    OpenOptions::new().write(true).open(&path).unwrap().set_len(length - 1).unwrap();
    let error = checkpoint.read(last).unwrap_err();
    assert!(matches!(error, CheckpointError::Changed { was, now, .. } if (was, now) == (length, length - 1)));
    check_message("truncated", &error.to_string(), &[SECOND, "changed after it was opened"]);
    // A range that is still there is not trusted either.
    assert!(checkpoint.read(Role::Expert(2, 0, ExpertRole::Gate)).is_err());
    checkpoint.read(Role::Embedding).unwrap();
}

#[test]
fn a_file_rewritten_at_the_same_length_is_noticed() {
    let dir = Model::mixtral().written();
    let checkpoint = open(dir.path()).unwrap();
    let mut file = OpenOptions::new().write(true).open(dir.path().join(SECOND)).unwrap();
    file.seek(SeekFrom::End(-4)).unwrap();
    file.write_all(&1f32.to_le_bytes()).unwrap();
    let later = file.metadata().unwrap().modified().unwrap() + std::time::Duration::from_secs(2);
    file.set_modified(later).unwrap();
    assert!(matches!(checkpoint.read(Role::FinalNorm), Err(CheckpointError::Changed { .. })));
}

#[test]
fn a_file_replaced_by_another_is_still_the_old_one() {
    let dir = Model::mixtral().written();
    let checkpoint = open(dir.path()).unwrap();
    let before = checkpoint.read(Role::FinalNorm).unwrap();
    let other = dir.path().join("other");
    fs::write(&other, b"short").unwrap();
    fs::rename(&other, dir.path().join(SECOND)).unwrap();
    assert_eq!(checkpoint.read(Role::FinalNorm).unwrap(), before);
}

#[test]
fn a_tied_head_may_be_stored_again_byte_for_byte() {
    const HEAD: &str = "lm_head.weight";
    let mut tied = Model::mixtral();
    tied.config.insert("tie_word_embeddings".to_owned(), json!(true));
    tied.tensor(HEAD).bytes = tied.tensor("model.embed_tokens.weight").bytes.clone();
    let dir = tied.written();
    let checkpoint = open(dir.path()).unwrap();
    assert!(checkpoint.spec().tied_head && !checkpoint.roles().any(|role| role == Role::Head));
    assert_eq!(checkpoint.unused().iter().map(|unused| unused.tensors).sum::<usize>(), 1);

    let says = [HEAD, "is not the embedding again", "`tie_word_embeddings`"];
    for at in [0, 12 * 8 * 4 - 1] {
        let mut changed = tied.clone();
        changed.tensor(HEAD).bytes[at] ^= 1;
        refused("one bit", changed.written().path(), &says);
    }
    let mut narrow = tied.clone();
    stored_as(&mut narrow, HEAD, "BF16");
    refused("another dtype", narrow.written().path(), &says);
    let mut turned = tied.clone();
    turned.tensor(HEAD).shape.reverse();
    refused("another shape", turned.written().path(), &says);
    let mut biased = tied;
    biased.add(0, "lm_head.bias", &[12]);
    refused("a bias beside it", biased.written().path(), &["lm_head.bias", "no part of"]);
}
