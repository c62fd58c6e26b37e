//! Published layouts of every family, small: each opens, every role reads in its promised shape, and its values are
//! those of the format's own library.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use muster_checkpoint::spec::{
    AttentionSpec, ExpertGroups, ExpertRole, GateRecipe, GroupWorth, LatentSpec, LayerRole, MlpSpec,
    ModelSpec, MoeSpec, QkNorm, Renormalise, Role, RopePairs, RopeSpec, Score, SharedSpec, YarnSpec,
};
use muster_checkpoint::{Checkpoint, Outline, Source, Survey, WeightData};
use muster_types::DType;
use safetensors::SafeTensors;
use serde_json::{Map, Value};

use crate::model::{Model, open, refused, root};

const GOLDEN: [&str; 13] = [
    "mixtral",
    "mixtral_bf16",
    "mixtral_top1",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "granitemoe",
    "granitemoeshared",
    "ernie4_5_moe",
    "glm4_moe",
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v3_bf16",
];

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
        other => panic!("{other:?}"),
    }
}

fn widened(data: &WeightData) -> Vec<f32> {
    match data {
        WeightData::F32(values) => values.clone(),
        WeightData::Bf16(bits) => bits.iter().map(|&bits| f32::from_bits(u32::from(bits) << 16)).collect(),
    }
}

/// Every tensor of a directory, read by the format's own library.
fn reference(dir: &Path) -> BTreeMap<String, (Vec<usize>, Vec<f32>)> {
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
    tensors
}

/// Where a role's part of a fused tensor begins, in elements.
fn fused_start(role: Role, tensor: &str, shape: &[usize]) -> usize {
    if let (Role::Layer(_, LayerRole::SharedUp), &[rows, cols]) = (role, shape) {
        return if tensor.ends_with("shared_mlp.input_linear.weight") { rows / 2 * cols } else { 0 };
    }
    let &[_, rows, cols] = shape else { return 0 };
    match role {
        Role::Expert(_, expert, ExpertRole::Up) => (expert as usize * rows + rows / 2) * cols,
        Role::Expert(_, expert, _) => expert as usize * rows * cols,
        _ => 0,
    }
}

fn check_every_role(dir: &Path) {
    let checkpoint = open(dir).unwrap_or_else(|error| panic!("{}: {error}", dir.display()));
    let reference = reference(dir);
    let (mut bytes, mut covered) = (0, 0);
    for role in checkpoint.roles() {
        let stored = checkpoint.stored(role).unwrap();
        let weight = checkpoint.read(role).unwrap();
        let (shape, values) = &reference[stored.tensor];
        assert_eq!((weight.rows, weight.cols), (stored.rows, stored.cols), "{role}");
        match shape.as_slice() {
            [length] => {
                assert_eq!((weight.rows, weight.cols), (*length, 1), "{role}");
                assert!(matches!(weight.data, WeightData::F32(_)), "{role}");
            }
            [1, length] if weight.cols == 1 => assert_eq!(weight.rows, *length, "{role}"),
            [rows, cols] if stored.tensor.contains("shared_mlp.input_linear") => {
                assert_eq!((2 * weight.rows, weight.cols), (*rows, *cols), "{role}");
            }
            [rows, cols] => assert_eq!((weight.rows, weight.cols), (*rows, *cols), "{role}"),
            shape => assert_eq!(weight.cols, shape[2], "{role}"),
        }
        let start = fused_start(role, stored.tensor, shape);
        assert_eq!(widened(&weight.data), values[start..start + stored.rows * stored.cols], "{role}");
        bytes += stored.bytes;
        covered += stored.rows * stored.cols;
    }
    let unused = &checkpoint.spec().unused;
    let used = reference.iter().filter(|(name, _)| !unused.iter().any(|prefix| name.starts_with(prefix)));
    assert_eq!(covered, used.map(|(_, (_, values))| values.len()).sum::<usize>(), "every element has a role");
    assert_eq!(checkpoint.inventory().total_bytes, bytes);
}

#[test]
fn every_family_reads_back_what_was_stored() {
    GOLDEN.iter().for_each(|name| check_every_role(&golden(name)));
}

#[test]
fn the_demo_model_reads_back_what_was_stored() {
    check_every_role(&root().join("models/demo"));
    let demo = open(&root().join("models/demo")).unwrap();
    assert_eq!((demo.name(), demo.spec().dtype, demo.spec().tied_head), ("demo", DType::Bf16, true));
    assert_eq!((demo.spec().bos, demo.spec().eos.as_slice()), (Some(1), [2].as_slice()));
    assert!(demo.stored(Role::Head).is_none());
}

fn moe(experts: u32, top_k: u32, intermediate: usize, score: Score, renormalise: Renormalise) -> MlpSpec {
    let gate = GateRecipe::plain(score, renormalise);
    MlpSpec::Moe(MoeSpec { experts, top_k, intermediate, gate, shared: SharedSpec::None })
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
        rope: RopeSpec { theta: 1e6, dim: 16, pairs: RopePairs::Halves, yarn: None },
        window: None,
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
    assert_eq!((attention.rope.theta, attention.head_dim, spec.norm_eps), (50000.0, 8, 0.002));
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
    assert_eq!((attention.qkv_bias, attention.o_bias, attention.window), (true, false, None));
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
    assert_eq!(
        ernie.layers[0].attention.rope,
        RopeSpec { theta: 5e5, dim: 16, pairs: RopePairs::Neighbours, yarn: None }
    );
    let glm = opened("glm4_moe").spec().clone();
    assert_eq!(glm.moe_layers().map(|(layer, _)| layer).collect::<Vec<_>>(), [1, 2, 3]);
    let moe = glm.moe(1).unwrap();
    let plain = GateRecipe::plain(Score::SigmoidThenTopK, Renormalise::Sum { plus: 1e-20 });
    assert_eq!(moe.gate, GateRecipe { selection_bias: true, scale: 2.5, ..plain });
    assert_eq!(moe.shared, SharedSpec::Add { intermediate: 40 });
    let attention = &glm.layers[0].attention;
    assert_eq!(attention.rope, RopeSpec { theta: 1e6, dim: 12, pairs: RopePairs::Halves, yarn: None });
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
    let yarn =
        YarnSpec { factor: 40.0, original_context: 4096, beta_fast: 32.0, beta_slow: 1.0, amplitude: 1.0 };
    let rope = RopeSpec { theta: 1e4, dim: 16, pairs: RopePairs::Neighbours, yarn: Some(yarn) };
    assert_eq!(attention.rope, rope);
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
    for dir in GOLDEN.map(golden).into_iter().chain([demo]) {
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
    for name in GOLDEN {
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
