//! Well-known models as data, for planning without a file: what their published configurations say.
//!
//! Every number is that of the `config.json` of [`Preset::repository`] on the Hugging Face hub; how weights are stored is
//! what that repository's safetensors have. Additional layers that only predict further tokens are left out, as they are
//! when such a model is served.

use muster_types::{DType, Reach};

use crate::outline::{AttentionOutline, ExpertsOutline, LayerOutline, Outline};
use crate::stored::StoredAs;

/// A published model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Preset {
    /// Its name here.
    pub name: &'static str,
    /// Its name on the hub.
    pub repository: &'static str,
    /// `model_type` of its configuration.
    pub family: &'static str,
    layers: usize,
    /// So many layers, the first ones, have a gated MLP of this width instead of experts.
    dense: (usize, usize),
    hidden: usize,
    vocab: usize,
    context: usize,
    tied_head: bool,
    attention: AttentionOutline,
    /// Every other layer, the first one among them, sees only so many positions.
    window: Option<usize>,
    experts: ExpertsOutline,
    /// Width of shared experts, all of them together.
    shared: usize,
    linears: StoredAs,
    experts_stored: StoredAs,
}

impl Preset {
    /// All of them.
    #[must_use]
    pub const fn all() -> &'static [Self] {
        &PRESETS
    }

    /// The one of this name.
    #[must_use]
    pub fn find(name: &str) -> Option<&'static Self> {
        PRESETS.iter().find(|preset| preset.name == name)
    }

    /// Its dimensions.
    #[must_use]
    pub fn outline(&self) -> Outline {
        let (dense_layers, dense_width) = self.dense;
        let layer = |number: usize| {
            let window = self.window.filter(|_| number.is_multiple_of(2));
            let reach = window.map_or(Reach::All, Reach::last);
            if number < dense_layers {
                LayerOutline {
                    attention: self.attention,
                    reach,
                    dense: dense_width,
                    shared_scale: false,
                    experts: None,
                }
            } else {
                LayerOutline {
                    attention: self.attention,
                    reach,
                    dense: self.shared,
                    shared_scale: false,
                    experts: Some(self.experts),
                }
            }
        };
        Outline {
            vocab: self.vocab,
            hidden: self.hidden,
            context: self.context,
            tied_head: self.tied_head,
            norm_biases: false,
            head_bias: false,
            stored: BF16,
            linears: self.linears,
            experts: self.experts_stored,
            layers: (0..self.layers).map(layer).collect(),
        }
    }
}

const BF16: StoredAs = StoredAs::Plain(DType::Bf16);

const fn experts(count: u32, top_k: u32, intermediate: usize) -> ExpertsOutline {
    ExpertsOutline { count, top_k, intermediate, biases: false, gate_bias: false, selection_bias: false }
}

const fn grouped(heads: usize, kv_heads: usize, head_dim: usize, vectors: usize) -> AttentionOutline {
    AttentionOutline::Grouped { heads, kv_heads, head_dim, vectors }
}

/// What the others differ from.
const MIXTRAL: Preset = Preset {
    name: "mixtral-8x7b",
    repository: "mistralai/Mixtral-8x7B-v0.1",
    family: "mixtral",
    layers: 32,
    dense: (0, 0),
    hidden: 4096,
    vocab: 32000,
    context: 32768,
    tied_head: false,
    attention: grouped(32, 8, 128, 0),
    window: None,
    experts: experts(8, 2, 14336),
    shared: 0,
    linears: BF16,
    experts_stored: BF16,
};

const GPT_OSS: Preset = Preset {
    name: "gpt-oss-20b",
    repository: "openai/gpt-oss-20b",
    family: "gpt_oss",
    layers: 24,
    hidden: 2880,
    vocab: 201_088,
    context: 131_072,
    // Biases of queries, keys, values and outputs, and a sink per head.
    attention: grouped(64, 8, 64, 64 * 64 + 2 * 8 * 64 + 2880 + 64),
    window: Some(128),
    experts: ExpertsOutline {
        count: 32,
        top_k: 4,
        intermediate: 2880,
        biases: true,
        gate_bias: true,
        selection_bias: false,
    },
    experts_stored: StoredAs::Mxfp4,
    ..MIXTRAL
};

const PRESETS: [Preset; 10] = [
    MIXTRAL,
    Preset {
        name: "mixtral-8x22b",
        repository: "mistralai/Mixtral-8x22B-v0.1",
        layers: 56,
        hidden: 6144,
        context: 65536,
        attention: grouped(48, 8, 128, 0),
        experts: experts(8, 2, 16384),
        ..MIXTRAL
    },
    Preset {
        name: "qwen3-30b-a3b",
        repository: "Qwen/Qwen3-30B-A3B",
        family: "qwen3_moe",
        layers: 48,
        hidden: 2048,
        vocab: 151_936,
        context: 40960,
        // Norms of queries and keys, one head wide.
        attention: grouped(32, 4, 128, 2 * 128),
        experts: experts(128, 8, 768),
        ..MIXTRAL
    },
    Preset {
        name: "qwen3-235b-a22b",
        repository: "Qwen/Qwen3-235B-A22B",
        family: "qwen3_moe",
        layers: 94,
        hidden: 4096,
        vocab: 151_936,
        context: 40960,
        attention: grouped(64, 4, 128, 2 * 128),
        experts: experts(128, 8, 1536),
        ..MIXTRAL
    },
    Preset {
        name: "deepseek-v3",
        repository: "deepseek-ai/DeepSeek-V3",
        family: "deepseek_v3",
        layers: 61,
        dense: (3, 18432),
        hidden: 7168,
        vocab: 129_280,
        context: 163_840,
        attention: AttentionOutline::Latent {
            heads: 128,
            q_rank: Some(1536),
            kv_rank: 512,
            nope: 128,
            rope: 64,
            value: 128,
            biases: 0,
        },
        experts: ExpertsOutline { selection_bias: true, ..experts(256, 8, 2048) },
        shared: 2048,
        linears: StoredAs::Fp8,
        experts_stored: StoredAs::Fp8,
        ..MIXTRAL
    },
    GPT_OSS,
    Preset {
        name: "gpt-oss-120b",
        repository: "openai/gpt-oss-120b",
        layers: 36,
        experts: ExpertsOutline { count: 128, ..GPT_OSS.experts },
        ..GPT_OSS
    },
    Preset {
        name: "olmoe-1b-7b",
        repository: "allenai/OLMoE-1B-7B-0924",
        family: "olmoe",
        layers: 16,
        hidden: 2048,
        vocab: 50304,
        context: 4096,
        // Norms of queries and keys, as wide as the projections.
        attention: grouped(16, 16, 128, 2 * 2048),
        experts: experts(64, 8, 1024),
        ..MIXTRAL
    },
    Preset {
        name: "granite-3.1-1b-a400m",
        repository: "ibm-granite/granite-3.1-1b-a400m-instruct",
        family: "granitemoe",
        layers: 24,
        hidden: 1024,
        vocab: 49155,
        context: 131_072,
        tied_head: true,
        attention: grouped(16, 8, 64, 0),
        experts: experts(32, 8, 512),
        ..MIXTRAL
    },
    Preset {
        name: "granite-3.1-3b-a800m",
        repository: "ibm-granite/granite-3.1-3b-a800m-instruct",
        family: "granitemoe",
        layers: 32,
        hidden: 1536,
        vocab: 49155,
        context: 131_072,
        tied_head: true,
        attention: grouped(24, 8, 64, 0),
        experts: experts(40, 8, 512),
        ..MIXTRAL
    },
];

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::config::Config;
    use crate::families;

    /// Figures of the makers, in billions, and how many decimals they are given with.
    struct Published {
        name: &'static str,
        total: f64,
        active: f64,
        decimals: i32,
    }

    const fn published(name: &'static str, total: f64, active: f64, decimals: i32) -> Published {
        Published { name, total, active, decimals }
    }

    const PUBLISHED: [Published; 10] = [
        // "Mixtral of experts", Mistral AI, 11 December 2023: 46.7B total, 12.9B per token.
        published("mixtral-8x7b", 46.7, 12.9, 1),
        // "Cheaper, Better, Faster, Stronger", Mistral AI, 17 April 2024: 141B, 39B active.
        published("mixtral-8x22b", 141.0, 39.0, 0),
        // Model cards of Qwen/Qwen3-30B-A3B and Qwen/Qwen3-235B-A22B: 30.5B and 3.3B, 235B and 22B.
        published("qwen3-30b-a3b", 30.5, 3.3, 1),
        published("qwen3-235b-a22b", 235.0, 22.0, 0),
        // DeepSeek-V3 Technical Report, abstract: 671B total, 37B activated.
        published("deepseek-v3", 671.0, 37.0, 0),
        // gpt-oss model card, table 1: 20.91B and 3.61B, 116.83B and 5.13B.
        published("gpt-oss-20b", 20.91, 3.61, 2),
        published("gpt-oss-120b", 116.83, 5.13, 2),
        // OLMoE: Open Mixture-of-Experts Language Models, table 1: 6.9B and 1.3B.
        published("olmoe-1b-7b", 6.9, 1.3, 1),
        // Model cards of granite-3.1-1b-a400m and granite-3.1-3b-a800m: 1.3B and 400M, 3.3B and 800M.
        published("granite-3.1-1b-a400m", 1.3, 0.4, 1),
        published("granite-3.1-3b-a800m", 3.3, 0.8, 1),
    ];

    #[test]
    fn totals_are_those_published() {
        assert!(PRESETS.iter().map(|preset| preset.name).eq(PUBLISHED.iter().map(|known| known.name)));
        for (preset, known) in PRESETS.iter().zip(&PUBLISHED) {
            let outline = preset.outline();
            let total = outline.parameters() as f64 / 1e9;
            // A hundredth, or what rounding took away where that is more: 1.3 B stands for 1.25 to 1.35.
            let rounding = 0.5 * 10f64.powi(-known.decimals);
            let allowed = (known.total / 100.0).max(rounding);
            assert!((total - known.total).abs() <= allowed, "{}: {total} and {}", preset.name, known.total);
            // Makers differ in whether the embedding, of which a token reads one row, is active.
            let active = outline.active_parameters() as f64 / 1e9;
            let without = active - (outline.vocab * outline.hidden) as f64 / 1e9;
            let range = without * 0.98..=active * 1.02;
            assert!(range.contains(&known.active), "{}: {range:?} and {}", preset.name, known.active);
        }
    }

    #[test]
    fn totals_are_those_of_the_files() {
        // Elements of all tensors of the published safetensors, scales and the layers that predict further tokens left out.
        let counted = [
            ("mixtral-8x7b", 46_702_792_704),
            ("mixtral-8x22b", 140_620_634_112),
            ("qwen3-30b-a3b", 30_532_122_624),
            ("qwen3-235b-a22b", 235_093_634_560),
            ("deepseek-v3", 671_026_419_200),
            ("olmoe-1b-7b", 6_919_161_856),
            ("granite-3.1-1b-a400m", 1_334_628_352),
        ];
        for (name, parameters) in counted {
            assert_eq!(Preset::find(name).unwrap().outline().parameters(), parameters, "{name}");
        }
    }

    #[test]
    fn four_bit_checkpoints_are_as_large_as_published() {
        // gpt-oss model card, table 1: 12.8 GiB and 60.8 GiB.
        for (name, gib) in [("gpt-oss-20b", 12.8), ("gpt-oss-120b", 60.8)] {
            let bytes = Preset::find(name).unwrap().outline().stored_bytes() as f64 / f64::from(1 << 30);
            assert!((bytes / gib - 1.0).abs() < 0.01, "{name}: {bytes} GiB");
        }
    }

    #[test]
    fn families_that_are_known_read_the_published_configuration_alike() {
        let configs = [
            (
                "mixtral-8x7b",
                json!({"model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336,
                    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
                    "num_local_experts": 8, "num_experts_per_tok": 2, "vocab_size": 32000,
                    "max_position_embeddings": 32768, "tie_word_embeddings": false, "rope_theta": 1e6}),
            ),
            (
                "qwen3-30b-a3b",
                json!({"model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144,
                    "moe_intermediate_size": 768, "num_hidden_layers": 48, "num_attention_heads": 32,
                    "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8,
                    "norm_topk_prob": true, "decoder_sparse_step": 1, "mlp_only_layers": [],
                    "vocab_size": 151_936, "max_position_embeddings": 40960, "tie_word_embeddings": false}),
            ),
            (
                "olmoe-1b-7b",
                json!({"model_type": "olmoe", "hidden_size": 2048, "intermediate_size": 1024,
                    "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 16,
                    "num_experts": 64, "num_experts_per_tok": 8, "vocab_size": 50304,
                    "max_position_embeddings": 4096, "tie_word_embeddings": false}),
            ),
            (
                "granite-3.1-1b-a400m",
                json!({"model_type": "granitemoe", "hidden_size": 1024, "intermediate_size": 512,
                    "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 8,
                    "num_local_experts": 32, "num_experts_per_tok": 8, "vocab_size": 49155,
                    "max_position_embeddings": 131_072, "tie_word_embeddings": true}),
            ),
        ];
        for (name, config) in configs {
            let config = Config::parse(config.to_string().as_bytes()).unwrap();
            let spec = families::of(&config).unwrap().spec(&config, DType::Bf16).unwrap();
            let preset = Preset::find(name).unwrap();
            assert_eq!(preset.outline(), Outline::of(&spec), "{name}");
        }
    }
}
