//! `config.json` and `generation_config.json`: every wrong value is refused by key and value.

use muster_types::Reach;
use std::fs;

use muster_checkpoint::spec::MlpSpec;
use serde_json::{Value, json};

use crate::model::{Model, open, refused};

const HUGE: u64 = 1_000_000_000;

/// A value that must be refused, and what the message must say besides the key.
fn wrong_values() -> Vec<(&'static str, Value, &'static str)> {
    let mut table = Vec::new();
    for (key, most) in [
        ("num_hidden_layers", "1 to 1024"),
        ("hidden_size", "1 to 131072"),
        ("intermediate_size", "1 to 1048576"),
        ("num_attention_heads", "1 to 1024"),
        ("num_key_value_heads", "1 to 1024"),
        ("num_local_experts", "1 to 4096"),
        ("num_experts_per_tok", "1 to 4096"),
        ("vocab_size", "1 to 16777216"),
        ("max_position_embeddings", "1 to 1073741824"),
    ] {
        for value in [json!(0), json!(-1), json!(1.5), json!("3"), json!(1e30), json!(u64::MAX), json!([1])] {
            table.push((key, value, most));
        }
    }
    for key in ["rope_theta", "rms_norm_eps"] {
        for value in [json!(0), json!(-1e-5), json!("1e-5"), json!(1e-60), json!(1e60), json!(true)] {
            table.push((key, value, "a finite number above 0"));
        }
    }
    table.extend([
        ("num_hidden_layers", json!(HUGE), "1 to 1024"),
        ("num_hidden_layers", json!(null), "null"),
        ("num_experts_per_tok", json!(7), "there are 6 experts"),
        ("num_attention_heads", json!(3), "does not divide `hidden_size`, 8"),
        ("num_key_value_heads", json!(3), "must divide `num_attention_heads`, 2"),
        ("head_dim", json!(3), "even"),
        ("head_dim", json!(0), "2 to 1024"),
        ("sliding_window", json!(0), "1 to 1073741824"),
        ("tie_word_embeddings", json!("no"), "true or false"),
        ("bos_token_id", json!(12), "0 to 11"),
        ("eos_token_id", json!([2, 12]), "0 to 11"),
        ("eos_token_id", json!("</s>"), "0 to 11"),
        ("num_experts", json!(5), "`num_experts` is 5"),
        ("hidden_act", json!("gelu"), "this build computes \"silu\""),
        ("rope_scaling", json!({"type": "dynamic", "factor": 2.0}), "`rope_scaling.type` is \"dynamic\""),
        ("rope_scaling", json!({"type": "linear"}), "`rope_scaling.factor` is missing"),
        ("rope_scaling", json!({"type": "linear", "rope_type": "yarn"}), "`type` is linear"),
        ("rope_scaling", json!({"type": "linear", "factor": 2.0, "mscale": 1}), "`rope_scaling.mscale` is 1"),
        ("rope_scaling", json!({"rope_type": "longrope", "short_factor": [1.0]}), "2 numbers above 0"),
        (
            "rope_scaling",
            json!({"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 1}),
            "`rope_scaling.low_freq_factor` is 4",
        ),
        ("expert_capacity", json!(64), "limited number of tokens"),
        ("drop_tokens", json!(true), "limited number of tokens"),
        ("rope_parameters", json!({"rope_theta": 5e4}), "`rope_parameters.rope_theta` is 50000"),
        ("rope_parameters", json!({"factor": 2.0}), "`rope_parameters.factor` is 2.0"),
        ("rope_parameters", json!(3), "an object"),
        ("partial_rotary_factor", json!(0.5), "rotates whole heads"),
        ("quantization_config", json!({"quant_method": "gptq"}), "\"fp8\" and plain F32, BF16 and F16"),
        ("quantization_config", json!({"quant_method": "mxfp4"}), "\"fp8\" and plain"),
        ("auto_map", json!({"AutoModel": "modeling_x.X"}), "never run"),
        ("layer_types", json!(["full_attention", "sliding_attention"]), "full_attention"),
        (
            "model_type",
            json!("llama"),
            "supported are deepseek_v2, deepseek_v3, ernie4_5_moe, glm4_moe, gpt_oss, granitemoe, granitemoeshared, hunyuan_v1_moe, kimi_k2, llama4, llama4_text, minimax_m2, mixtral, olmoe, phimoe, qwen2_moe, qwen3_moe",
        ),
        ("model_type", json!("switch_transformers"), "limited number of tokens"),
        ("model_type", json!("qwen3_next"), "linear attention"),
        ("model_type", json!(4), "supported are"),
        ("model_type", json!(null), "missing"),
    ]);
    table
}

#[test]
fn wrong_values_are_refused_by_key() {
    for (key, value, says) in wrong_values() {
        let mut model = Model::mixtral();
        model.config.insert(key.to_owned(), value.clone());
        let what = format!("{key} = {value}");
        let key_name = if key == "num_experts" { "num_local_experts" } else { key };
        refused(&what, model.written().path(), &["config.json: ", key_name, says]);
    }
}

#[test]
fn values_of_one_family_are_refused_by_key() {
    for (key, value, says) in [
        ("use_sliding_window", json!(true), "whole sequence"),
        ("mlp_only_layers", json!([4]), "0 to 3"),
        ("mlp_only_layers", json!(["1"]), "0 to 3"),
        ("decoder_sparse_step", json!(0), "1 to"),
        ("norm_topk_prob", json!(1), "true or false"),
        ("moe_intermediate_size", json!(0), "1 to"),
        ("attention_bias", json!("yes"), "true or false"),
    ] {
        let mut model = Model::qwen3_moe();
        model.config.insert(key.to_owned(), value);
        refused(key, model.written().path(), &["config.json: ", key, says]);
    }
    for (family, key, value, says) in [
        ("olmoe", "clip_qkv", json!(0), "above 0"),
        ("olmoe", "head_dim", json!(6), "not `hidden_size`, 8"),
        ("olmoe", "sliding_window", json!(16), "whole sequence"),
        ("granitemoe", "logits_scaling", json!(0), "above 0"),
        ("granitemoe", "attention_multiplier", json!(null), "above 0"),
        ("granitemoe", "embedding_multiplier", json!("12"), "above 0"),
        ("granitemoe", "residual_multiplier", json!(-1), "above 0"),
        ("granitemoeshared", "shared_intermediate_size", json!(-1), "0 to 1048576"),
        ("qwen2_moe", "qkv_bias", json!(1), "true or false"),
        ("qwen2_moe", "shared_expert_intermediate_size", json!(0), "1 to 1048576"),
        ("qwen2_moe", "use_sliding_window", json!(true), "whole sequence"),
        ("ernie4_5_moe", "moe_num_experts", json!(0), "1 to 4096"),
        ("ernie4_5_moe", "moe_k", json!(1), "`num_experts_per_tok` is 2"),
        ("ernie4_5_moe", "moe_norm_min", json!(0), "above 0"),
        ("ernie4_5_moe", "use_bias", json!(true), "without biases"),
        ("ernie4_5_moe", "moe_gate", json!("top2"), "\"topk\""),
        ("ernie4_5_moe", "moe_use_aux_free", json!(false), "the bias that comes with it"),
        ("ernie4_5_moe", "moe_layer_end_index", json!(-2), "0 to"),
        ("ernie4_5_moe", "moe_layer_interval", json!(0), "1 to"),
        ("ernie4_5_moe", "partial_rotary_factor", json!(0.5), "rotates whole heads"),
        ("ernie4_5_moe", "auto_map", json!({"AutoModel": "modeling_other.Other"}), "never run"),
        ("ernie4_5_moe", "auto_map", json!("modeling_ernie4_5_moe.Model"), "never run"),
        ("deepseek_v2", "rope_scaling", json!({"type": "yarn", "factor": 0}), "above 0"),
        ("deepseek_v2", "topk_method", json!("noaux_tc"), "\"group_limited_greedy\""),
        ("deepseek_v2", "norm_topk_prob", json!(true), "not renormalised"),
        ("deepseek_v2", "scoring_func", json!("sigmoid"), "\"softmax\""),
        ("deepseek_v2", "mlp_bias", json!(true), "without biases"),
        ("deepseek_v2", "num_key_value_heads", json!(1), "for 2 heads"),
        ("deepseek_v2", "auto_map", json!({"AutoModel": "modeling_x.DeepseekV2Model"}), "never run"),
        ("deepseek_v3", "scoring_func", json!("softmax"), "\"sigmoid\""),
        ("deepseek_v3", "topk_method", json!("greedy"), "\"noaux_tc\""),
        ("deepseek_v3", "quantization_config", json!({"quant_method": "awq"}), "\"fp8\" and plain"),
        ("glm4_moe", "n_group", json!(4), "it must divide the 6 experts"),
        ("glm4_moe", "topk_group", json!(2), "there are 1 groups"),
        ("glm4_moe", "routed_scaling_factor", json!(0), "above 0"),
        ("glm4_moe", "partial_rotary_factor", json!(0.2), "rotates 0"),
        ("glm4_moe", "partial_rotary_factor", json!(1.5), "an even number"),
        ("glm4_moe", "num_nextn_predict_layers", json!(17), "0 to 16"),
        ("glm4_moe", "first_k_dense_replace", json!(-1), "0 to"),
        ("glm4_moe", "use_qk_norm", json!("yes"), "true or false"),
        ("glm4_moe", "n_shared_experts", json!(4097), "0 to 4096"),
    ] {
        let mut model = Model::mixtral();
        model.config.insert("model_type".to_owned(), json!(family));
        model.config.insert(key.to_owned(), value);
        refused(key, model.written().path(), &["config.json: ", key, says]);
    }
}

#[test]
fn the_experts_of_all_layers_together_are_capped() {
    let mut model = Model::mixtral();
    model.config.insert("num_hidden_layers".to_owned(), json!(1024));
    model.config.insert("num_local_experts".to_owned(), json!(4096));
    refused(
        "4 million experts",
        model.written().path(),
        &["`num_local_experts` is 4096", "131072 experts in all"],
    );
}

#[test]
fn text_that_is_no_configuration_is_refused() {
    let deep = format!("{{\"a\": {}", "[".repeat(100_000));
    let twice = r#"{"model_type": "mixtral", "vocab_size": 12, "vocab_size": 13}"#;
    for (text, says) in [
        ("", "not valid JSON"),
        ("[]", "expected a JSON object"),
        ("{", "not valid JSON"),
        ("{} {}", "not valid JSON"),
        ("\u{feff}{}", "not valid JSON"),
        ("{}", "`model_type` is missing"),
        (r#"{"model_type": "mixtral", "rope_theta": NaN}"#, "not valid JSON"),
        (twice, "key `vocab_size` comes twice"),
        (&deep, "recursion limit"),
    ] {
        let dir = Model::mixtral().written();
        fs::write(dir.path().join("config.json"), text).unwrap();
        refused(says, dir.path(), &["config.json: ", says]);
    }
    let dir = Model::mixtral().written();
    fs::write(dir.path().join("config.json"), vec![b' '; (4 << 20) + 1]).unwrap();
    refused("4 MiB and a byte", dir.path(), &["config.json: ", "at most 4194304"]);
}

#[test]
fn absent_keys_mean_the_class_defaults() {
    let mut model = Model::mixtral();
    for key in ["hidden_act", "rms_norm_eps", "rope_theta", "max_position_embeddings", "tie_word_embeddings"]
    {
        model.config.remove(key);
    }
    model.config.remove("bos_token_id");
    model.config.insert("eos_token_id".to_owned(), json!(null));
    // Unknown keys, and keys for training, change nothing.
    model.config.insert("router_jitter_noise".to_owned(), json!(0.1));
    model.config.insert("something_else".to_owned(), json!({"a": [1]}));
    let spec = open(model.written().path()).unwrap().spec().clone();
    assert_eq!(
        (spec.norm_eps, spec.layers[0].attention.rope.as_ref().unwrap().theta, spec.context),
        (1e-5, 1e6, 131_072)
    );
    assert_eq!((spec.bos, spec.eos.len(), spec.tied_head), (Some(1), 0, false));
}

#[test]
fn windows_and_alternative_names_are_understood() {
    let mut model = Model::mixtral();
    model.config.insert("sliding_window".to_owned(), json!(32));
    model.config.remove("num_local_experts");
    model.config.insert("num_experts".to_owned(), json!(6));
    model.config.insert("rope_parameters".to_owned(), json!({"rope_type": "default", "rope_theta": 10000}));
    let spec = open(model.written().path()).unwrap().spec().clone();
    assert_eq!(spec.layers[2].attention.reach, Reach::last(32));
    assert!(matches!(&spec.layers[2].mlp, MlpSpec::Moe(moe) if moe.experts == 6));
}

#[test]
fn groups_of_experts_must_hold_what_is_chosen_from_them() {
    for (groups, kept, says) in [
        (6, 2, "groups are ranked by their two best experts"),
        (3, 1, "groups have 2 experts, and 3 experts are chosen"),
    ] {
        let mut model = Model::mixtral();
        for (key, value) in [
            ("model_type", json!("glm4_moe")),
            ("n_group", json!(groups)),
            ("topk_group", json!(kept)),
            ("num_experts_per_tok", json!(3)),
        ] {
            model.config.insert(key.to_owned(), value);
        }
        refused(says, model.written().path(), &["config.json: ", says]);
    }
}

#[test]
fn end_of_text_tokens_of_both_files_are_united() {
    let mut model = Model::mixtral();
    model.config.insert("eos_token_id".to_owned(), json!([2, 3]));
    let dir = model.written();
    let generation = dir.path().join("generation_config.json");
    fs::write(&generation, r#"{"eos_token_id": [5, 2]}"#).unwrap();
    assert_eq!(open(dir.path()).unwrap().spec().eos, [2, 3, 5]);
    fs::write(&generation, r#"{"eos_token_id": 12}"#).unwrap();
    refused("eos past the vocabulary", dir.path(), &["generation_config.json: ", "`eos_token_id` is 12"]);
    fs::write(&generation, "{").unwrap();
    refused("damaged", dir.path(), &["generation_config.json: not valid JSON"]);
}
