//! Published layouts of every family, small: each opens, every role reads in its promised shape, and its values are
//! those of the format's own library.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use muster_checkpoint::spec::{
    AttentionSpec, ExpertGroups, ExpertRole, GateRecipe, GroupWorth, LatentSpec, LayerRole, MlpSpec,
    ModelSpec, MoeSpec, NormKind, QkNorm, Renormalise, Role, RopePairs, RopeScaling, RopeSpec, Score,
    SharedSpec, Temperature, WeightOn, YarnSpec,
};
use muster_checkpoint::{Checkpoint, Outline, Source, StoredAs, Survey, WeightData};
use muster_types::{DType, Gating, Reach};
use safetensors::SafeTensors;
use serde_json::{Map, Value};

use crate::model::{Model, open, refused, root};

/// Every golden checkpoint there is.
fn goldens() -> Vec<String> {
    let names =
        fs::read_dir(root().join("tests/fixtures/golden")).unwrap().map(|entry| entry.unwrap().file_name());
    let mut names: Vec<String> = names.map(|name| name.into_string().unwrap()).collect();
    names.sort();
    assert!(!names.is_empty());
    names
}

fn golden(name: &str) -> PathBuf {
    root().join("tests/fixtures/golden").join(name)
}

fn opened(name: &str) -> Checkpoint {
    open(&golden(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

fn f32s(bytes: &[u8], dtype: safetensors::Dtype) -> Vec<f32> {
    match dtype {
        safetensors::Dtype::F32 => {
            bytes.chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
        }
        safetensors::Dtype::BF16 => bytes.chunks(2).map(|b| f32::from_le_bytes([0, 0, b[0], b[1]])).collect(),
        safetensors::Dtype::F8_E4M3 => bytes.iter().map(|&byte| fp8(byte)).collect(),
        // Taken apart below.
        safetensors::Dtype::U8 => bytes.iter().map(|&byte| f32::from(byte)).collect(),
        other => panic!("{other:?}"),
    }
}

fn fp8(byte: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(byte >> 3 & 15), f32::from(byte & 7) / 8.0);
    let magnitude =
        if exponent == 0 { mantissa * 2f32.powi(-6) } else { (1.0 + mantissa) * 2f32.powi(exponent - 7) };
    if byte < 0x80 { magnitude } else { -magnitude }
}

fn fp4(bits: u8) -> f32 {
    let magnitude = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0][usize::from(bits & 7)];
    if bits < 8 { magnitude } else { -magnitude }
}

fn widened(data: &WeightData) -> Vec<f32> {
    match data {
        WeightData::F32(values) => values.clone(),
        WeightData::Bf16(bits) => bits.iter().map(|&bits| f32::from_bits(u32::from(bits) << 16)).collect(),
        WeightData::Mxfp4 { blocks, scales } => {
            let value = |at: usize| {
                let bits = blocks[at / 2] >> (4 * (at % 2)) & 15;
                fp4(bits) * 2f32.powi(i32::from(scales[at / 32]) - 127)
            };
            (0..blocks.len() * 2).map(value).collect()
        }
    }
}

type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

/// Every tensor of a directory, read by the format's own library, and multiplied by its scales where it has some.
fn reference(dir: &Path) -> Tensors {
    let mut tensors = BTreeMap::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        if name.starts_with("model") && name.ends_with(".safetensors") {
            let bytes = fs::read(&path).unwrap();
            for (name, view) in SafeTensors::deserialize(&bytes).unwrap().tensors() {
                tensors.insert(name, (view.shape().to_vec(), f32s(view.data(), view.dtype())));
            }
        }
    }
    let names: Vec<String> = tensors.keys().cloned().collect();
    for name in names {
        if let Some(of) = name.strip_suffix("_scale_inv") {
            let (shape, scales) = tensors.remove(&name).unwrap();
            let ([_, cols], values) = tensors.get_mut(of).map(|(s, v)| ([s[0], s[1]], v)).unwrap();
            for (at, value) in values.iter_mut().enumerate() {
                *value *= scales[at / cols / 128 * shape[1] + at % cols / 128];
            }
        } else if let Some(of) = name.strip_suffix("_scales") {
            let (shape, scales) = tensors.remove(&name).unwrap();
            let (_, blocks) = &tensors[&format!("{of}_blocks")];
            let value = |at: usize| {
                let bits = blocks[at / 2] as u8 >> (4 * (at % 2)) & 15;
                fp4(bits) * 2f32.powi(scales[at / 32] as i32 - 127)
            };
            let values = (0..blocks.len() * 2).map(value).collect();
            tensors.insert(format!("{of}_blocks"), (vec![shape[0], shape[1], shape[2] * 32], values));
        }
    }
    tensors
}

/// Where element (row, col) of a role lies in its tensor: fused tensors have parts, and some have rows for columns.
fn place(spec: &ModelSpec, role: Role, tensor: &str, shape: &[usize], [row, col]: [usize; 2]) -> usize {
    let gpt_oss = spec.family == "gpt_oss";
    let transposed = !tensor.ends_with("_blocks") && (gpt_oss || spec.family.starts_with("llama4"));
    match (role, shape) {
        (Role::Layer(_, LayerRole::SharedUp), &[rows, cols])
            if tensor.contains("shared_mlp.input_linear") =>
        {
            (rows / 2 + row) * cols + col
        }
        (Role::Expert(_, expert, part), shape) => {
            let (expert, up) = (expert as usize, usize::from(part == ExpertRole::Up));
            match (part, shape) {
                (ExpertRole::GateBias, &[_, both]) => expert * both + 2 * row,
                (ExpertRole::UpBias, &[_, both]) => expert * both + 2 * row + 1,
                (ExpertRole::DownBias, &[_, length]) => expert * length + row,
                (ExpertRole::Down, &[_, a, b]) if transposed => (expert * a + col) * b + row,
                (ExpertRole::Down, &[_, a, b]) => (expert * a + row) * b + col,
                (_, &[_, a, b]) if transposed && gpt_oss => (expert * a + col) * b + 2 * row + up,
                (_, &[_, a, b]) if transposed => (expert * a + col) * b + row + up * b / 2,
                (_, &[_, a, b]) if gpt_oss => (expert * a + 2 * row + up) * b + col,
                (_, &[_, a, b]) => (expert * a + up * a / 2 + row) * b + col,
                _ => row * shape[1] + col,
            }
        }
        (_, &[1, _]) => row + col,
        (_, &[_, cols]) => row * cols + col,
        _ => row,
    }
}

fn check_every_role(dir: &Path) {
    let checkpoint = open(dir).unwrap_or_else(|error| panic!("{}: {error}", dir.display()));
    let (reference, spec) = (reference(dir), checkpoint.spec());
    let (mut bytes, mut covered) = (0, 0);
    for role in checkpoint.roles() {
        let stored = checkpoint.stored(role).unwrap();
        let weight = checkpoint.read(role).unwrap();
        let (shape, values) = &reference[stored.tensor];
        let [rows, cols] = [weight.rows, weight.cols];
        assert_eq!([rows, cols], [stored.rows, stored.cols], "{role}");
        assert!(cols > 1 || matches!(weight.data, WeightData::F32(_)), "{role}");
        let at = |number| place(spec, role, stored.tensor, shape, [number / cols, number % cols]);
        let expected: Vec<f32> = (0..rows * cols).map(|number| values[at(number)]).collect();
        assert_eq!(widened(&weight.data), expected, "{role}");
        bytes += stored.bytes;
        covered += rows * cols;
    }
    let used =
        reference.iter().filter(|(name, _)| !spec.unused.iter().any(|prefix| name.starts_with(prefix)));
    assert_eq!(covered, used.map(|(_, (_, values))| values.len()).sum::<usize>(), "every element has a role");
    assert_eq!(checkpoint.inventory().total_bytes, bytes);
    let unused: usize = checkpoint.unused().iter().map(|unused| unused.tensors).sum();
    let left = reference.keys().filter(|name| spec.unused.iter().any(|prefix| name.starts_with(prefix)));
    assert_eq!(unused, left.count());
}

#[test]
fn every_family_reads_back_what_was_stored() {
    goldens().iter().for_each(|name| check_every_role(&golden(name)));
}

#[test]
fn the_demo_model_reads_back_what_was_stored() {
    check_every_role(&root().join("models/demo"));
    let demo = open(&root().join("models/demo")).unwrap();
    assert_eq!((demo.name(), demo.spec().dtype, demo.spec().tied_head), ("demo", DType::Bf16, true));
    assert_eq!((demo.spec().bos, demo.spec().eos.as_slice()), (Some(1), [2].as_slice()));
    assert!(demo.stored(Role::Head).is_none());
}

fn rope(theta: f64, dim: usize, pairs: RopePairs) -> RopeSpec {
    RopeSpec { theta, dim, pairs, scaling: RopeScaling::None }
}

fn moe(experts: u32, top_k: u32, intermediate: usize, score: Score, renormalise: Renormalise) -> MlpSpec {
    let gate = GateRecipe::plain(score, renormalise);
    MlpSpec::Moe(MoeSpec {
        experts,
        top_k,
        intermediate,
        gating: Gating::Silu,
        biases: false,
        gate,
        weight_on: WeightOn::Output,
        shared: SharedSpec::None,
    })
}

#[test]
fn mixtral_is_described_as_published() {
    let spec = opened("mixtral").spec().clone();
    assert_eq!(
        (spec.family, spec.vocab, spec.hidden, spec.context, spec.layers.len()),
        ("mixtral", 320, 64, 4096, 3)
    );
    let plain = AttentionSpec {
        heads: 4,
        kv_heads: 2,
        head_dim: 16,
        scale: 0.25,
        qk_norm: QkNorm::None,
        clip_qkv: None,
        qkv_bias: false,
        o_bias: false,
        rope: Some(rope(1e6, 16, RopePairs::Halves)),
        temperature: None,
        reach: Reach::All,
        sinks: false,
        latent: None,
    };
    assert_eq!(spec.layers[0].attention, plain);
    assert_eq!(spec.layers[2].mlp, moe(8, 2, 48, Score::SoftmaxThenTopK, Renormalise::SUM));
    assert_eq!((spec.bos, spec.eos.as_slice(), spec.tied_head), (Some(1), [2].as_slice(), false));
    assert_eq!(opened("mixtral_bf16").spec().dtype, DType::Bf16);
}

#[test]
fn both_ways_of_writing_rope_and_head_width_are_understood() {
    let spec = opened("mixtral_top1").spec().clone();
    let attention = &spec.layers[0].attention;
    assert_eq!(
        (attention.rope.as_ref().unwrap().theta, attention.head_dim, spec.norm_eps),
        (50000.0, 8, 0.002)
    );
    assert_eq!(spec.moe(0).unwrap().top_k, 1);
}

#[test]
fn qwen3_moe_and_olmoe_differ_in_norms_and_renormalisation() {
    let qwen = opened("qwen3_moe").spec().clone();
    let attention = &qwen.layers[0].attention;
    assert_eq!((attention.qk_norm, attention.head_dim, attention.heads), (QkNorm::PerHead, 24, 4));
    assert_eq!(qwen.layers[0].mlp, moe(8, 3, 40, Score::SoftmaxThenTopK, Renormalise::SUM));
    let olmoe = opened("olmoe").spec().clone();
    let attention = &olmoe.layers[0].attention;
    assert_eq!((attention.qk_norm, attention.clip_qkv), (QkNorm::FullWidth, Some(1.25)));
    assert_eq!(olmoe.layers[0].mlp, moe(8, 3, 40, Score::SoftmaxThenTopK, Renormalise::None));
    assert_eq!((olmoe.bos, olmoe.eos), (None, vec![279]));
}

#[test]
fn granitemoe_has_its_multipliers() {
    let spec = opened("granitemoe").spec().clone();
    assert_eq!((spec.embedding_multiplier, spec.residual_multiplier, spec.logits_divisor), (3.0, 0.7, 1.5));
    assert_eq!((spec.layers[0].attention.scale, spec.tied_head), (0.15, true));
    assert_eq!(spec.layers[3].mlp, moe(8, 3, 40, Score::TopKThenSoftmax, Renormalise::None));
}

#[test]
fn qwen2_moe_and_granitemoeshared_have_shared_experts() {
    let qwen = opened("qwen2_moe").spec().clone();
    assert_eq!(qwen.layers[0].mlp, MlpSpec::Dense { intermediate: 96 });
    let moe = qwen.moe(3).unwrap();
    assert_eq!(moe.shared, SharedSpec::SigmoidGated { intermediate: 56 });
    assert_eq!(moe.gate, GateRecipe::plain(Score::SoftmaxThenTopK, Renormalise::None));
    let attention = &qwen.layers[0].attention;
    assert_eq!((attention.qkv_bias, attention.o_bias, attention.reach), (true, false, Reach::All));
    let granite = opened("granitemoeshared").spec().clone();
    assert_eq!(granite.moe(0).unwrap().shared, SharedSpec::Add { intermediate: 56 });
    assert_eq!((granite.family, granite.logits_divisor), ("granitemoeshared", 1.5));
}

#[test]
fn ernie4_5_moe_and_glm4_moe_select_by_a_bias() {
    let ernie = opened("ernie4_5_moe").spec().clone();
    assert_eq!(ernie.moe_layers().map(|(layer, _)| layer).collect::<Vec<_>>(), [1, 2]);
    let moe = ernie.moe(1).unwrap();
    let plain = GateRecipe::plain(Score::SoftmaxThenTopK, Renormalise::SumAtLeast { floor: 1e-12 });
    assert_eq!(moe.gate, GateRecipe { selection_bias: true, ..plain });
    assert_eq!((moe.shared, ernie.tied_head), (SharedSpec::Add { intermediate: 80 }, true));
    assert_eq!(ernie.layers[0].attention.rope, Some(rope(5e5, 16, RopePairs::Neighbours)));
    let glm = opened("glm4_moe").spec().clone();
    assert_eq!(glm.moe_layers().map(|(layer, _)| layer).collect::<Vec<_>>(), [1, 2, 3]);
    let moe = glm.moe(1).unwrap();
    let plain = GateRecipe::plain(Score::SigmoidThenTopK, Renormalise::Sum { plus: 1e-20 });
    assert_eq!(moe.gate, GateRecipe { selection_bias: true, scale: 2.5, ..plain });
    assert_eq!(moe.shared, SharedSpec::Add { intermediate: 40 });
    let attention = &glm.layers[0].attention;
    assert_eq!(attention.rope, Some(rope(1e6, 12, RopePairs::Halves)));
    assert_eq!((attention.qk_norm, attention.qkv_bias, attention.o_bias), (QkNorm::PerHead, true, false));
    assert_eq!(glm.unused, ["model.layers.4."]);
}

#[test]
fn deepseek_has_compressed_rows_and_longer_contexts() {
    let v2 = opened("deepseek_v2").spec().clone();
    let attention = &v2.layers[0].attention;
    let latent = LatentSpec {
        q_rank: None,
        kv_rank: 32,
        plain_dim: 16,
        value_dim: 16,
        norm_eps: 1e-6,
        down_bias: false,
    };
    assert_eq!(attention.latent, Some(latent));
    assert_eq!((attention.heads, attention.kv_heads, attention.head_dim), (4, 1, 48));
    assert_eq!((attention.cached_value(), attention.output_width()), (32, 64));
    let yarn = YarnSpec {
        factor: 40.0,
        original_context: 4096,
        beta_fast: 32.0,
        beta_slow: 1.0,
        truncate: true,
        amplitude: 1.0,
    };
    let scaling = RopeScaling::Yarn(yarn);
    assert_eq!(attention.rope, Some(RopeSpec { scaling, ..rope(1e4, 16, RopePairs::Neighbours) }));
    let longer = 0.1 * 0.707 * 40f64.ln() + 1.0;
    assert_eq!(attention.scale, (longer * longer / 32f64.sqrt()) as f32);
    let gate = &v2.moe(1).unwrap().gate;
    assert_eq!(gate.groups, Some(ExpertGroups { groups: 4, kept: 2, worth: GroupWorth::Best }));
    assert_eq!((gate.score, gate.renormalise, gate.scale), (Score::SoftmaxThenTopK, Renormalise::None, 2.5));
    let v3 = opened("deepseek_v3_bf16").spec().clone();
    assert_eq!((v3.dtype, v3.unused.as_slice()), (DType::Bf16, ["model.layers.3.".to_owned()].as_slice()));
    assert_eq!(v3.layers[0].attention.latent.unwrap().q_rank, Some(32));
    let gate = &v3.moe(1).unwrap().gate;
    assert_eq!(gate.groups, Some(ExpertGroups { groups: 4, kept: 3, worth: GroupWorth::BestTwo }));
}

#[test]
fn gpt_oss_alternates_and_is_the_same_in_both_forms() {
    let (packed, plain) = (opened("gpt_oss"), opened("gpt_oss_bf16"));
    let spec = packed.spec();
    assert_eq!((spec.stored.experts, spec.stored.linears), (StoredAs::Mxfp4, StoredAs::Plain(DType::Bf16)));
    let reach: Vec<Reach> = spec.layers.iter().map(|layer| layer.attention.reach).collect();
    assert_eq!(reach, [Reach::last(8), Reach::All, Reach::last(8), Reach::All]);
    let attention = &spec.layers[0].attention;
    assert_eq!((attention.sinks, attention.qkv_bias, attention.o_bias), (true, true, true));
    let RopeScaling::Yarn(yarn) = attention.rope.clone().unwrap().scaling else { panic!("YaRN expected") };
    assert_eq!((yarn.truncate, yarn.amplitude), (false, (0.1 * 32f64.ln() + 1.0) as f32));
    let moe = spec.moe(0).unwrap();
    assert_eq!((moe.gating, moe.biases), (Gating::ClampedSwish { alpha: 1.702, limit: 2.5 }, true));
    assert!(moe.gate.bias);
    assert_eq!(packed.roles().collect::<Vec<_>>(), plain.roles().collect::<Vec<_>>());
    for role in packed.roles() {
        let [packed, plain] = [&packed, &plain].map(|checkpoint| checkpoint.read(role).unwrap());
        assert_eq!(widened(&packed.data), widened(&plain.data), "{role}");
    }
}

#[test]
fn llama4_weighs_inputs_and_has_layers_that_rotate_nothing() {
    let spec = opened("llama4").spec().clone();
    assert_eq!(spec.moe_layers().map(|(layer, _)| layer).collect::<Vec<_>>(), [1, 3]);
    let (first, last) = (&spec.layers[0].attention, &spec.layers[3].attention);
    assert_eq!(
        (first.reach, first.qk_norm, first.temperature),
        (Reach::chunk(16), QkNorm::UnweightedRotated, None)
    );
    let temperature = Some(Temperature { floor: 8.0, scale: 0.1 });
    assert_eq!((last.reach, last.qk_norm, last.temperature), (Reach::All, QkNorm::None, temperature));
    assert_eq!((first.rope.as_ref().unwrap().pairs, &last.rope), (RopePairs::Neighbours, &None));
    let moe = spec.moe(1).unwrap();
    assert_eq!((moe.weight_on, moe.gate.score), (WeightOn::Input, Score::TopKThenSigmoid));
    assert_eq!(moe.shared, SharedSpec::Add { intermediate: 40 });
    let spec = opened("llama4_top2").spec().clone();
    assert_eq!(
        spec.moe_layers().map(|(layer, moe)| (layer, moe.top_k)).collect::<Vec<_>>(),
        [(0, 2), (1, 2), (3, 2)]
    );
    let rotates: Vec<bool> = spec.layers.iter().map(|layer| layer.attention.rope.is_some()).collect();
    assert_eq!(rotates, [false, true, true, false]);
}

#[test]
fn phimoe_minimax_m2_and_hunyuan_are_described_as_published() {
    let phi = opened("phimoe").spec().clone();
    assert_eq!((phi.norm, phi.head_bias), (NormKind::Layer, true));
    assert_eq!(
        phi.moe(0).unwrap().gate,
        GateRecipe::plain(Score::SparseMixer { jitter: 0.1 }, Renormalise::None)
    );
    // Beyond the context trained on first, keys in the cache would have to change.
    assert_eq!((phi.context, phi.layers[0].attention.reach), (4096, Reach::last(131_072)));
    let RopeScaling::Each { divisors, amplitude } = phi.layers[0].attention.rope.clone().unwrap().scaling
    else {
        panic!("a divisor each expected")
    };
    assert_eq!((divisors.len(), divisors[7], amplitude), (8, 2.69, 1.243_163_1));
    let minimax = opened("minimax_m2").spec().clone();
    let attention = &minimax.layers[0].attention;
    assert_eq!((attention.rotated(), attention.head_dim, attention.qk_norm), (12, 24, QkNorm::FullWidth));
    let gate = GateRecipe::plain(Score::SigmoidThenTopK, Renormalise::SUM);
    assert_eq!(minimax.moe(0).unwrap().gate, GateRecipe { selection_bias: true, ..gate });
    let hunyuan = opened("hunyuan_v1_moe").spec().clone();
    assert_eq!(hunyuan.layers[0].attention.qk_norm, QkNorm::PerHeadRotated);
    let theta = hunyuan.layers[0].attention.rope.as_ref().unwrap().theta;
    assert!((theta / (1e4 * 1000f64.powf(24.0 / 22.0)) - 1.0).abs() < 1e-12);
    assert_eq!((hunyuan.moe(2).unwrap().top_k, hunyuan.tied_head), (3, true));
}

#[test]
fn a_deepseek_in_fp8_has_biases_where_it_says() {
    let checkpoint = opened("deepseek_v3_fp8");
    let spec = checkpoint.spec();
    assert_eq!((spec.stored.experts, spec.stored.tables), (StoredAs::Fp8, StoredAs::Plain(DType::Bf16)));
    let form = |role| checkpoint.stored(role).unwrap().form;
    assert_eq!(form(Role::Expert(1, 0, ExpertRole::Up)), StoredAs::Fp8);
    assert_eq!(form(Role::Layer(0, LayerRole::KvUp)), StoredAs::Fp8);
    assert_eq!(form(Role::Layer(1, LayerRole::Gate)), StoredAs::Plain(DType::Bf16));
    assert_eq!(form(Role::Layer(0, LayerRole::QDownBias)), StoredAs::Plain(DType::Bf16));
}

/// A copy of a golden checkpoint with another configuration.
fn configured(name: &str, change: impl FnOnce(&mut Map<String, Value>)) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(golden(name)).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, dir.path().join(path.file_name().unwrap())).unwrap();
    }
    let config = fs::read(golden(name).join("config.json")).unwrap();
    let mut config: Map<String, Value> = serde_json::from_slice(&config).unwrap();
    change(&mut config);
    fs::write(dir.path().join("config.json"), serde_json::to_vec(&config).unwrap()).unwrap();
    dir
}

#[test]
fn kimi_k2_is_a_deepseek_v3() {
    let dir = configured("deepseek_v3", |config| {
        config.insert("model_type".to_owned(), "kimi_k2".into());
        let classes = serde_json::json!({"AutoConfig": "configuration_deepseek.DeepseekV3Config"});
        config.insert("auto_map".to_owned(), classes);
    });
    let (kimi, deepseek) = (open(dir.path()).unwrap(), opened("deepseek_v3"));
    assert_eq!(kimi.spec().family, "kimi_k2");
    assert_eq!(ModelSpec { family: "deepseek_v3", ..kimi.spec().clone() }, *deepseek.spec());
}

#[test]
fn a_llama4_that_sees_images_is_read_without_that_part() {
    let dir = tempfile::tempdir().unwrap();
    let config = fs::read_to_string(golden("llama4").join("config.json")).unwrap();
    let whole = format!(r#"{{"model_type": "llama4", "text_config": {config}, "vision_config": {{}}}}"#);
    fs::write(dir.path().join("config.json"), whole).unwrap();
    let text = reference(&golden("llama4"));
    let bytes: BTreeMap<String, Vec<u8>> = text
        .iter()
        .map(|(name, (_, values))| (name.clone(), values.iter().flat_map(|v| v.to_le_bytes()).collect()))
        .collect();
    let view = |name: &str, shape: &[usize]| {
        safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.to_vec(), &bytes[name]).unwrap()
    };
    let mut tensors: Vec<_> =
        text.iter().map(|(name, (shape, _))| (format!("language_model.{name}"), view(name, shape))).collect();
    tensors.push(("vision_model.patch.weight".to_owned(), view("model.norm.weight", &[64])));
    let file = safetensors::serialize(tensors, None).unwrap();
    fs::write(dir.path().join("model.safetensors"), file).unwrap();
    let (whole, text) = (open(dir.path()).unwrap(), opened("llama4"));
    assert_eq!(ModelSpec { family: "llama4_text", ..whole.spec().clone() }, *text.spec());
    for role in text.roles() {
        assert_eq!(whole.read(role).unwrap(), text.read(role).unwrap(), "{role}");
    }
    let unused = whole.unused();
    assert_eq!((unused.len(), unused[0].prefix.as_str(), unused[0].bytes), (1, "vision_model.", 256));
}

#[test]
fn experts_in_stacks_are_the_same_experts() {
    let dir = tempfile::tempdir().unwrap();
    fs::copy(golden("qwen3_moe").join("config.json"), dir.path().join("config.json")).unwrap();
    let split = reference(&golden("qwen3_moe"));
    let (layers, experts) = (opened("qwen3_moe").spec().layers.len(), 8);
    let mut stacked: Tensors = split
        .iter()
        .filter(|(name, _)| !name.contains(".experts."))
        .map(|(n, t)| (n.clone(), t.clone()))
        .collect();
    for layer in 0..layers {
        let part = |expert: usize, part: &str| {
            split[&format!("model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight")].1.clone()
        };
        let both = (0..experts).flat_map(|e| [part(e, "gate"), part(e, "up")].concat()).collect();
        let down = (0..experts).flat_map(|e| part(e, "down")).collect();
        let name = |name: &str| format!("model.layers.{layer}.mlp.experts.{name}");
        stacked.insert(name("gate_up_proj"), (vec![experts, 80, 64], both));
        stacked.insert(name("down_proj"), (vec![experts, 64, 40], down));
    }
    let bytes: Vec<Vec<u8>> =
        stacked.values().map(|(_, values)| values.iter().flat_map(|v| v.to_le_bytes()).collect()).collect();
    let views = stacked.iter().zip(&bytes).map(|((name, (shape, _)), bytes)| {
        (name, safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.clone(), bytes).unwrap())
    });
    fs::write(dir.path().join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
    let (stacked, split) = (open(dir.path()).unwrap(), opened("qwen3_moe"));
    assert_eq!(stacked.spec(), split.spec());
    for role in split.roles() {
        assert_eq!(stacked.read(role).unwrap(), split.read(role).unwrap(), "{role}");
    }
}

#[test]
fn values_of_the_published_forms_are_refused_by_key() {
    let set = |name: &str, key: &str, value: Value| {
        configured(name, |config| drop(config.insert(key.to_owned(), value)))
    };
    let fp8 = |value| set("deepseek_v3_fp8", "quantization_config", value);
    for (what, dir, says) in [
        (
            "no blocks",
            fp8(serde_json::json!({"quant_method": "fp8"})),
            "`quantization_config.weight_block_size` is missing",
        ),
        (
            "other blocks",
            fp8(serde_json::json!({"quant_method": "fp8", "weight_block_size": [64, 64]})),
            "`quantization_config.weight_block_size` is [64,64], which is not supported",
        ),
        (
            "another fp8",
            fp8(serde_json::json!({"quant_method": "fp8", "fmt": "e5m2", "weight_block_size": [128, 128]})),
            "`quantization_config.fmt` is \"e5m2\"",
        ),
        ("mxfp4 elsewhere", fp8(serde_json::json!({"quant_method": "mxfp4"})), "`quantization_config` is"),
        ("bytes without a word", fp8(Value::Null), "F8_E4M3"),
        ("a swish without a limit", set("gpt_oss", "swiglu_limit", 0.into()), "`swiglu_limit` is 0"),
        ("widths in groups", set("gpt_oss", "intermediate_size", 48.into()), "groups of 32"),
        (
            "layers of a kind",
            set("gpt_oss", "layer_types", serde_json::json!(["full_attention"])),
            "a list of 4 times",
        ),
        ("three experts", set("phimoe", "num_experts_per_tok", 3.into()), "SparseMixer picks 2"),
        (
            "flags for layers",
            set("llama4", "no_rope_layers", serde_json::json!([1, 0])),
            "a flag is needed for each of 4",
        ),
        ("rotated", set("minimax_m2", "rotary_dim", 7.into()), "`rotary_dim` is"),
        ("dropped tokens", set("hunyuan_v1_moe", "moe_drop_tokens", true.into()), "limited number of tokens"),
        ("shared keys", set("hunyuan_v1_moe", "use_cla", true.into()), "`use_cla` is true"),
        ("more of them", set("hunyuan_v1_moe", "moe_topk", serde_json::json!([3, 9, 3])), "`moe_topk` is 9"),
        (
            "other shared",
            set("hunyuan_v1_moe", "num_shared_expert", serde_json::json!([1, 2, 1])),
            "`num_shared_expert` is 2",
        ),
    ] {
        refused(what, dir.path(), &[says]);
    }
}

#[test]
fn shared_experts_stay_in_the_trunk_and_are_always_active() {
    let inventory = opened("granitemoeshared").inventory();
    let granite = opened("granitemoeshared").spec().clone();
    let shared = 3 * 56 * 64;
    let layer = 2 * 64 * 64 + 2 * 32 * 64 + 2 * 64 + 8 * 64 + shared;
    assert_eq!(inventory.layers[0].trunk_bytes, 4 * layer);
    assert_eq!(inventory.layers[0].expert_bytes, 4 * 3 * 40 * 64);
    let outer = u64::from(granite.vocab) * 64 + 64;
    assert_eq!(inventory.active_parameters, 3 * (layer + 3 * 3 * 40 * 64) + outer);
}

#[test]
fn dense_layers_and_biases_are_planned_by_the_configuration() {
    let dir = Model::qwen3_moe().written();
    let checkpoint = open(dir.path()).unwrap();
    let moe_layers: Vec<u32> = checkpoint.spec().moe_layers().map(|(layer, _)| layer).collect();
    assert_eq!(moe_layers, [1]);
    assert_eq!(checkpoint.spec().layers[3].mlp, MlpSpec::Dense { intermediate: 10 });
    let stored = |role| checkpoint.stored(Role::Layer(0, role)).map(|stored| (stored.rows, stored.cols));
    assert_eq!(stored(LayerRole::DenseDown), Some((8, 10)));
    assert_eq!((stored(LayerRole::QBias), stored(LayerRole::OBias)), (Some((8, 1)), Some((8, 1))));
    assert_eq!(stored(LayerRole::Gate), None);
    assert_eq!(
        checkpoint.inventory().layers.iter().map(|layer| layer.experts).collect::<Vec<_>>(),
        [0, 3, 0, 0]
    );
}

#[test]
fn the_inventory_adds_up() {
    let inventory = opened("mixtral").inventory();
    let expert = 3 * 48 * 64;
    let attention = 2 * 64 * 64 + 2 * 32 * 64;
    let layer = attention + 2 * 64 + 8 * 64;
    let outer = 2 * 320 * 64 + 64;
    assert_eq!(inventory.parameters, 3 * (layer + 8 * expert) + outer);
    assert_eq!(inventory.active_parameters, 3 * (layer + 2 * expert) + outer);
    assert_eq!(inventory.trunk_bytes, 4 * (3 * layer + outer));
    assert_eq!(inventory.total_bytes, 4 * inventory.parameters);
    let sizes = inventory.layers[1];
    assert_eq!((sizes.trunk_bytes, sizes.experts, sizes.expert_bytes), (4 * layer, 8, 4 * expert));
}

#[test]
fn outlines_have_what_checkpoints_have() {
    let demo = root().join("models/demo");
    for dir in goldens().iter().map(|name| golden(name)).chain([demo]) {
        let (checkpoint, name) = (open(&dir).unwrap(), dir.display());
        let (inventory, outline) = (checkpoint.inventory(), Outline::of(checkpoint.spec()));
        assert_eq!(outline.parameters(), inventory.parameters, "{name}");
        assert_eq!(outline.active_parameters(), inventory.active_parameters, "{name}");
        assert_eq!(outline.stored_bytes(), inventory.total_bytes, "{name}");
        for (layer, sizes) in outline.layers.iter().zip(&inventory.layers) {
            let bytes = layer.experts.map(|moe| moe.stored_bytes(outline.hidden, outline.experts));
            assert_eq!(bytes.unwrap_or(0), sizes.expert_bytes, "{name}");
        }
    }
    // Dense layers, biases and norms as configured.
    let checkpoint = open(Model::qwen3_moe().written().path()).unwrap();
    let outline = Outline::of(checkpoint.spec());
    assert_eq!(outline.parameters(), checkpoint.inventory().parameters);
}

#[test]
fn a_survey_needs_no_weights() {
    for name in &goldens() {
        let empty = tempfile::tempdir().unwrap();
        let survey = || Survey::open(&Source::Directory(empty.path().to_owned()));
        fs::copy(golden(name).join("config.json"), empty.path().join("config.json")).unwrap();
        let spec = ModelSpec { eos: Vec::new(), ..opened(name).spec().clone() };
        let surveyed = survey().unwrap();
        assert_eq!(
            (ModelSpec { eos: Vec::new(), ..surveyed.spec }, surveyed.indexed_bytes),
            (spec.clone(), None)
        );
        let bytes = opened(name).inventory().total_bytes;
        let index = format!(r#"{{"metadata": {{"total_size": {bytes}}}, "weight_map": {{}}}}"#);
        fs::write(empty.path().join("model.safetensors.index.json"), index).unwrap();
        let config = fs::read(golden(name).join("config.json")).unwrap();
        let mut config: Map<String, Value> = serde_json::from_slice(&config).unwrap();
        let write = |config: &Map<String, Value>| {
            fs::write(empty.path().join("config.json"), serde_json::to_vec(config).unwrap()).unwrap();
        };
        // A configuration that names no dtype: the index tells it.
        config.retain(|key, _| !key.ends_with("dtype"));
        write(&config);
        let surveyed = survey().unwrap();
        assert_eq!((surveyed.spec.dtype, surveyed.indexed_bytes), (spec.dtype, Some(bytes)), "{name}");
        config.insert("torch_dtype".to_owned(), "float8".into());
        write(&config);
        let error = survey().unwrap_err().to_string();
        assert!(error.starts_with("config.json: `torch_dtype` is \"float8\""), "{error}");
    }
}

#[test]
fn a_model_built_into_the_program_is_the_same_model() {
    let dir = Model::mixtral().written();
    let files = fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().path());
    let files = files.map(|path| {
        let name: &'static str = path.file_name().unwrap().to_str().unwrap().to_owned().leak();
        let bytes: &'static [u8] = fs::read(&path).unwrap().leak();
        (name, bytes)
    });
    let files: &'static [(&'static str, &'static [u8])] = files.collect::<Vec<_>>().leak();
    let embedded = Checkpoint::open(&Source::Embedded { name: "tiny", files }).unwrap();
    let directory = open(dir.path()).unwrap();
    assert_eq!(embedded.name(), "tiny");
    assert_eq!((embedded.spec(), embedded.fingerprint()), (directory.spec(), directory.fingerprint()));
    for role in directory.roles() {
        assert_eq!(embedded.read(role).unwrap(), directory.read(role).unwrap(), "{role}");
    }
}

#[test]
fn checkpoints_are_shared_between_threads() {
    fn shared<T: Send + Sync>() {}
    shared::<Checkpoint>();
}

#[test]
fn fused_experts_are_checked_as_a_whole() {
    for (key, value, says) in [
        ("intermediate_size", "41", "input_linear.weight` (layer 0 expert 0 gate projection) is [8, 80, 64]"),
        (
            "num_local_experts",
            "9",
            "router.layer.weight` (layer 0 gate) is [8, 64], config.json says [9, 64]",
        ),
    ] {
        let dir = tempfile::tempdir().unwrap();
        for entry in fs::read_dir(golden("granitemoe")).unwrap() {
            let path = entry.unwrap().path();
            fs::copy(&path, dir.path().join(path.file_name().unwrap())).unwrap();
        }
        let config = fs::read_to_string(golden("granitemoe").join("config.json")).unwrap();
        let mut config: Value = serde_json::from_str(&config).unwrap();
        config[key] = serde_json::from_str(value).unwrap();
        fs::remove_file(dir.path().join("config.json")).unwrap();
        fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        refused(key, dir.path(), &[says]);
    }
}
