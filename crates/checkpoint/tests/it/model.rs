//! A tiny good checkpoint, held as parts so that a test can break one of them before it is written.

use std::fs;
use std::path::{Path, PathBuf};

use muster_checkpoint::{Checkpoint, CheckpointError, Source};
use serde_json::{Map, Value, json};

/// One tensor, its bytes included.
#[derive(Clone)]
pub(crate) struct Tensor {
    pub(crate) name: String,
    pub(crate) dtype: &'static str,
    pub(crate) shape: Vec<usize>,
    pub(crate) bytes: Vec<u8>,
}

/// A checkpoint in parts.
#[derive(Clone)]
pub(crate) struct Model {
    pub(crate) config: Map<String, Value>,
    pub(crate) shards: Vec<(String, Vec<Tensor>)>,
    /// Written as the index; made from the shards when `None`.
    pub(crate) index: Option<Value>,
}

pub(crate) const FIRST: &str = "model-00001-of-00002.safetensors";
pub(crate) const SECOND: &str = "model-00002-of-00002.safetensors";
const HIDDEN: usize = 8;

impl Model {
    /// Three layers of six experts, two of them per token; f32; layer 2 in the second shard.
    pub(crate) fn mixtral() -> Self {
        let config = json!({
            "model_type": "mixtral", "vocab_size": 12, "hidden_size": HIDDEN, "intermediate_size": 6,
            "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 6,
            "num_experts_per_tok": 2, "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
            "max_position_embeddings": 64, "tie_word_embeddings": false, "bos_token_id": 1, "eos_token_id": 2
        });
        let mut model = Self::empty(config);
        for name in ["lm_head.weight", "model.embed_tokens.weight"] {
            model.add(0, name, &[12, HIDDEN]);
        }
        for layer in 0..3 {
            let shard = layer / 2;
            model.add_attention(shard, layer);
            let block = format!("model.layers.{layer}.block_sparse_moe");
            model.add(shard, &format!("{block}.gate.weight"), &[6, HIDDEN]);
            for expert in 0..6 {
                model.add(shard, &format!("{block}.experts.{expert}.w1.weight"), &[6, HIDDEN]);
                model.add(shard, &format!("{block}.experts.{expert}.w2.weight"), &[HIDDEN, 6]);
                model.add(shard, &format!("{block}.experts.{expert}.w3.weight"), &[6, HIDDEN]);
            }
        }
        model.add(1, "model.norm.weight", &[HIDDEN]);
        model
    }

    /// Four layers, of which 0 and 2 are dense by `decoder_sparse_step` and 3 by `mlp_only_layers`; biases; f32.
    pub(crate) fn qwen3_moe() -> Self {
        let config = json!({
            "model_type": "qwen3_moe", "vocab_size": 12, "hidden_size": HIDDEN, "intermediate_size": 10,
            "moe_intermediate_size": 6, "num_hidden_layers": 4, "num_attention_heads": 2,
            "num_key_value_heads": 1, "head_dim": 4, "num_experts": 3, "num_experts_per_tok": 2,
            "decoder_sparse_step": 2, "mlp_only_layers": [3], "attention_bias": true
        });
        let mut model = Self::empty(config);
        for name in ["lm_head.weight", "model.embed_tokens.weight"] {
            model.add(0, name, &[12, HIDDEN]);
        }
        for layer in 0..4 {
            model.add_attention(0, layer);
            let name = |name: &str| format!("model.layers.{layer}.{name}");
            for (bias, length) in [("q", 8), ("k", 4), ("v", 4), ("o", HIDDEN)] {
                model.add(0, &name(&format!("self_attn.{bias}_proj.bias")), &[length]);
            }
            model.add(0, &name("self_attn.q_norm.weight"), &[4]);
            model.add(0, &name("self_attn.k_norm.weight"), &[4]);
            if layer == 1 {
                model.add(0, &name("mlp.gate.weight"), &[3, HIDDEN]);
                (0..3).for_each(|expert| model.add_mlp(&name(&format!("mlp.experts.{expert}")), 6));
            } else {
                model.add_mlp(&name("mlp"), 10);
            }
        }
        model.add(1, "model.norm.weight", &[HIDDEN]);
        model
    }

    fn empty(config: Value) -> Self {
        let Value::Object(config) = config else { panic!("a configuration is an object") };
        let shards = [FIRST, SECOND].map(|name| (name.to_owned(), Vec::new())).to_vec();
        Self { config, shards, index: None }
    }

    fn add_attention(&mut self, shard: usize, layer: usize) {
        let name = |name: &str| format!("model.layers.{layer}.{name}.weight");
        self.add(shard, &name("input_layernorm"), &[HIDDEN]);
        self.add(shard, &name("post_attention_layernorm"), &[HIDDEN]);
        self.add(shard, &name("self_attn.q_proj"), &[8, HIDDEN]);
        self.add(shard, &name("self_attn.k_proj"), &[4, HIDDEN]);
        self.add(shard, &name("self_attn.v_proj"), &[4, HIDDEN]);
        self.add(shard, &name("self_attn.o_proj"), &[HIDDEN, 8]);
    }

    fn add_mlp(&mut self, prefix: &str, width: usize) {
        self.add(0, &format!("{prefix}.gate_proj.weight"), &[width, HIDDEN]);
        self.add(0, &format!("{prefix}.up_proj.weight"), &[width, HIDDEN]);
        self.add(0, &format!("{prefix}.down_proj.weight"), &[HIDDEN, width]);
    }

    /// Adds an f32 tensor with values that differ from each other and from those of other tensors.
    pub(crate) fn add(&mut self, shard: usize, name: &str, shape: &[usize]) {
        let count: usize = shape.iter().product();
        let seed = self.shards.iter().map(|(_, tensors)| tensors.len()).sum::<usize>() * 1000;
        let bytes = (0..count).flat_map(|i| ((seed + i) as f32 / 4096.0).to_le_bytes()).collect();
        let tensor = Tensor { name: name.to_owned(), dtype: "F32", shape: shape.to_vec(), bytes };
        self.shards[shard].1.push(tensor);
    }

    /// The tensor of this name.
    pub(crate) fn tensor(&mut self, name: &str) -> &mut Tensor {
        let found =
            self.shards.iter_mut().flat_map(|(_, tensors)| tensors).find(|tensor| tensor.name == name);
        found.unwrap_or_else(|| panic!("no tensor {name}"))
    }

    /// Takes the tensor of this name away.
    pub(crate) fn remove(&mut self, name: &str) {
        self.tensor(name);
        self.shards.iter_mut().for_each(|(_, tensors)| tensors.retain(|tensor| tensor.name != name));
    }

    /// Stores every tensor as bf16.
    pub(crate) fn store_as_bf16(&mut self) {
        for tensor in self.shards.iter_mut().flat_map(|(_, tensors)| tensors) {
            tensor.dtype = "BF16";
            tensor.bytes = tensor.bytes.chunks(4).flat_map(|f32| [f32[2], f32[3]]).collect();
        }
    }

    /// Rounded, and what is too small for the format is zero.
    pub(crate) fn store_as_f16(&mut self) {
        for tensor in self.shards.iter_mut().flat_map(|(_, tensors)| tensors) {
            let half = |bytes: &[u8]| half::f16::from_f32(f32::from_le_bytes(bytes.try_into().unwrap()));
            tensor.dtype = "F16";
            tensor.bytes = tensor.bytes.chunks(4).flat_map(|f32| half(f32).to_le_bytes()).collect();
        }
    }

    /// The index: as given, or as the shards are.
    pub(crate) fn index(&self) -> Value {
        self.index.clone().unwrap_or_else(|| {
            let pairs =
                self.shards.iter().flat_map(|(shard, tensors)| tensors.iter().map(move |t| (t, shard)));
            let map: Map<String, Value> = pairs.map(|(t, shard)| (t.name.clone(), json!(shard))).collect();
            json!({"metadata": {"total_size": 0}, "weight_map": map})
        })
    }

    /// Writes everything into `dir`.
    pub(crate) fn write(&self, dir: &Path) {
        fs::write(dir.join("config.json"), serde_json::to_vec(&self.config).unwrap()).unwrap();
        fs::write(dir.join("model.safetensors.index.json"), self.index().to_string()).unwrap();
        for (name, tensors) in &self.shards {
            fs::write(dir.join(name), shard_bytes(tensors)).unwrap();
        }
    }

    /// Writes everything into a new directory.
    pub(crate) fn written(&self) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        self.write(dir.path());
        dir
    }
}

/// The JSON text of a shard's header.
pub(crate) fn header_text(tensors: &[Tensor]) -> String {
    let mut header = Map::new();
    header.insert("__metadata__".to_owned(), json!({"format": "pt"}));
    let mut begin = 0;
    for tensor in tensors {
        let end = begin + tensor.bytes.len();
        let entry = json!({"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [begin, end]});
        header.insert(tensor.name.clone(), entry);
        begin = end;
    }
    Value::Object(header).to_string()
}

/// A whole shard: length, header, data.
pub(crate) fn shard_bytes(tensors: &[Tensor]) -> Vec<u8> {
    let data: Vec<u8> = tensors.iter().flat_map(|tensor| tensor.bytes.iter().copied()).collect();
    with_header(header_text(tensors).as_bytes(), &data)
}

/// A file with this header text and data, whatever they are.
pub(crate) fn with_header(header: &[u8], data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header, data].concat()
}

pub(crate) fn open(dir: &Path) -> Result<Checkpoint, CheckpointError> {
    Checkpoint::open(&Source::Directory(dir.to_owned()))
}

/// Opens what must not open, and checks the message: every one of `parts` in it, and one short line.
pub(crate) fn refused(what: &str, dir: &Path, parts: &[&str]) {
    let message = match open(dir) {
        Ok(_) => panic!("{what}: was accepted"),
        Err(error) => error.to_string(),
    };
    check_message(what, &message, parts);
}

pub(crate) fn check_message(what: &str, message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "{what}: {message:?} lacks {part:?}");
    }
    assert!(!message.contains('\n') && message.len() < 1500, "{what}: not one short line: {message:?}");
}

/// The repository's root.
pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}
