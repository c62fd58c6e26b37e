//! The measured checkpoint: the shape of `ibm-granite/granite-3.1-1b-a400m`, with random weights.
//!
//! The same bytes on every machine. Its text is meaningless; its cost equals the real model's.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::{Context as _, Result};
use serde_json::{Map, Value, json};

const HIDDEN: usize = 1024;
const LAYERS: usize = 24;
const HEADS: usize = 16;
const KV_HEADS: usize = 8;
const HEAD: usize = HIDDEN / HEADS;
const EXPERTS: usize = 32;
const EXPERTS_PER_TOKEN: usize = 8;
const WIDTH: usize = 512;
const VOCABULARY: usize = 49155;
/// Standard deviation of the weights.
const SPREAD: f32 = 0.02;
const END_OF_TEXT: &str = "<|end_of_text|>";

struct Tensor {
    name: String,
    shape: Vec<usize>,
}

impl Tensor {
    fn values(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether the tensor is a norm, which is all ones.
    fn is_norm(&self) -> bool {
        self.shape.len() == 1
    }
}

/// Writes the checkpoint into `directory`; `config.json` comes last and marks it complete.
pub(crate) fn write(directory: &Path) -> Result<()> {
    fs::create_dir_all(directory).with_context(|| format!("cannot make {}", directory.display()))?;
    let weights = File::create(directory.join("model.safetensors"))?;
    write_weights(&tensors(), &mut BufWriter::with_capacity(1 << 20, weights))?;
    let json = |name: &str, value: &Value| -> Result<()> {
        Ok(fs::write(directory.join(name), serde_json::to_vec_pretty(value)?)?)
    };
    json("tokenizer.json", &tokenizer())?;
    json(
        "tokenizer_config.json",
        &json!({
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "unk_token": END_OF_TEXT, "pad_token": END_OF_TEXT,
        }),
    )?;
    json("generation_config.json", &json!({"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}))?;
    json("config.json", &config())
}

fn config() -> Value {
    json!({
        "architectures": ["GraniteMoeForCausalLM"],
        "model_type": "granitemoe",
        "torch_dtype": "bfloat16",
        "hidden_size": HIDDEN,
        "intermediate_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": EXPERTS_PER_TOKEN,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": true,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_500_000.0,
        "rope_scaling": null,
        "max_position_embeddings": 131_072,
        "attention_bias": false,
        "attention_dropout": 0.0,
        "attention_multiplier": 1.0 / HEAD as f64,
        "embedding_multiplier": 12.0,
        "logits_scaling": 6.0,
        "residual_multiplier": 0.22,
        "initializer_range": SPREAD,
        "output_router_logits": false,
        "router_aux_loss_coef": 0.0,
        "use_cache": true,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    })
}

fn tensors() -> Vec<Tensor> {
    let mut tensors = Vec::new();
    let mut add = |name: String, shape: &[usize]| tensors.push(Tensor { name, shape: shape.to_vec() });
    add("model.embed_tokens.weight".to_owned(), &[VOCABULARY, HIDDEN]);
    for layer in 0..LAYERS {
        let part = |rest: &str| format!("model.layers.{layer}.{rest}.weight");
        add(part("input_layernorm"), &[HIDDEN]);
        add(part("self_attn.q_proj"), &[HEADS * HEAD, HIDDEN]);
        add(part("self_attn.k_proj"), &[KV_HEADS * HEAD, HIDDEN]);
        add(part("self_attn.v_proj"), &[KV_HEADS * HEAD, HIDDEN]);
        add(part("self_attn.o_proj"), &[HIDDEN, HEADS * HEAD]);
        add(part("post_attention_layernorm"), &[HIDDEN]);
        add(part("block_sparse_moe.router.layer"), &[EXPERTS, HIDDEN]);
        add(part("block_sparse_moe.input_linear"), &[EXPERTS, 2 * WIDTH, HIDDEN]);
        add(part("block_sparse_moe.output_linear"), &[EXPERTS, HIDDEN, WIDTH]);
    }
    add("model.norm.weight".to_owned(), &[HIDDEN]);
    tensors
}

fn write_weights(tensors: &[Tensor], out: &mut impl Write) -> Result<()> {
    let mut header = Map::new();
    header.insert("__metadata__".to_owned(), json!({"format": "pt"}));
    let mut start = 0;
    for tensor in tensors {
        let end = start + 2 * tensor.values();
        let entry = json!({"dtype": "BF16", "shape": tensor.shape, "data_offsets": [start, end]});
        header.insert(tensor.name.clone(), entry);
        start = end;
    }
    let mut header = serde_json::to_string(&header)?;
    // The format aligns the data to eight bytes.
    header.push_str(&" ".repeat(header.len().next_multiple_of(8) - header.len()));
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(header.as_bytes())?;
    for (number, tensor) in tensors.iter().enumerate() {
        let mut normal = Normal { state: number as u64 };
        for _ in 0..tensor.values() {
            let value = if tensor.is_norm() { 1.0 } else { SPREAD * normal.next() };
            out.write_all(&bf16(value).to_le_bytes())?;
        }
    }
    Ok(out.flush()?)
}

/// The nearest bf16, ties to even.
fn bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) as u16
}

/// Approximately normal numbers: sums of four uniform ones.
struct Normal {
    state: u64,
}

impl Normal {
    /// The next number, with mean 0 and standard deviation 1.
    fn next(&mut self) -> f32 {
        // SplitMix64 (Steele, Lea and Flood, 2014).
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.state ^ (self.state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        let bits = mixed ^ (mixed >> 31);
        let sum: u64 = (0..4).map(|part| (bits >> (16 * part)) & 0xffff).sum();
        // Four uniform numbers in [0, 1) have mean 2 and variance 4/12.
        (sum as f32 / 65536.0 - 2.0) * 3f32.sqrt()
    }
}

/// Byte-level BPE with every byte and hardly any merges.
fn tokenizer() -> Value {
    let mut vocabulary = Map::new();
    let mut words = vec![END_OF_TEXT.to_owned()];
    words.extend(byte_letters().iter().map(char::to_string));
    let space = byte_letters()[usize::from(b' ')];
    words.push(format!("{space}{space}"));
    for (id, word) in words.into_iter().enumerate() {
        vocabulary.insert(word, json!(id));
    }
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [{
            "id": 0, "content": END_OF_TEXT, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true,
        }],
        "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocabulary,
            "merges": [[space.to_string(), space.to_string()]],
        },
    })
}

/// GPT-2's character for every byte: printable Latin-1 stands for itself, others map to U+0100 and up.
fn byte_letters() -> [char; 256] {
    let mut next = 0x100;
    std::array::from_fn(|byte| {
        let byte = byte as u8;
        if matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff) {
            return char::from(byte);
        }
        let letter = char::from_u32(next).unwrap_or(char::REPLACEMENT_CHARACTER);
        next += 1;
        letter
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shape_has_the_parameters_of_the_real_model() {
        assert_eq!(tensors().iter().map(Tensor::values).sum::<usize>(), 1_334_628_352);
    }

    #[test]
    fn weights_are_bf16_with_the_spread_asked_for_and_offsets_that_fit() {
        let tensor = |name: &str, shape: &[usize]| Tensor { name: name.to_owned(), shape: shape.to_vec() };
        let mut file = Vec::new();
        write_weights(&[tensor("norm", &[3]), tensor("a", &[200, 50]), tensor("b", &[200, 50])], &mut file)
            .unwrap();
        let length = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
        let header: Value = serde_json::from_slice(&file[8..8 + length]).unwrap();
        let data = &file[8 + length..];
        assert_eq!(length % 8, 0);
        assert_eq!(header["b"]["data_offsets"], json!([20_006, 40_006]));
        assert_eq!(data.len(), 40_006);
        let values: Vec<f32> = data
            .chunks_exact(2)
            .map(|pair| f32::from_bits(u32::from(u16::from_le_bytes([pair[0], pair[1]])) << 16))
            .collect();
        assert_eq!(values[..3], [1.0; 3]);
        let (a, b) = values[3..].split_at(10_000);
        assert_ne!(a, b);
        let mean = a.iter().sum::<f32>() / 1e4;
        let spread = (a.iter().map(|x| (x - mean).powi(2)).sum::<f32>() / 1e4).sqrt();
        assert!(mean.abs() < 0.001 && (spread - SPREAD).abs() < 0.001, "{mean} {spread}");
    }

    #[test]
    fn rounding_is_to_the_nearest_even() {
        assert_eq!(bf16(1.0), 0x3f80);
        assert_eq!(bf16(f32::from_bits(0x3f80_8000)), 0x3f80);
        assert_eq!(bf16(f32::from_bits(0x3f81_8000)), 0x3f82);
        assert_eq!(bf16(f32::from_bits(0x3f80_8001)), 0x3f81);
    }

    #[test]
    fn every_byte_has_its_own_letter() {
        let letters: std::collections::BTreeSet<char> = byte_letters().into_iter().collect();
        assert_eq!(letters.len(), 256);
        assert_eq!(byte_letters()[usize::from(b' ')], 'Ġ');
    }
}
