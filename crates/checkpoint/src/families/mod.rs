//! The model families: the only place that knows their names, their configuration keys and their tensor names.
//!
//! A family is one row of [`FAMILIES`], and a file. What they share is in [`base`] (keys) and [`trunk`] (tensor names). A value
//! that this build cannot compute is refused here, by key and value. Published models are in [`presets`], as sizes alone.

mod base;
mod deepseek;
mod defaults;
mod ernie4_5_moe;
mod family;
mod glm4_moe;
mod gpt_oss;
mod granitemoe;
mod hunyuan_v1_moe;
mod llama4;
mod minimax_m2;
mod mixtral;
mod olmoe;
mod phimoe;
mod presets;
mod qwen2_moe;
mod qwen3_moe;
mod rope;
mod trunk;

use crate::config::{Config, ConfigError};
use crate::untrusted::clip;
use family::Family;

pub use presets::Preset;

const FAMILIES: [Family; 17] = [
    deepseek::V2,
    deepseek::V3,
    ernie4_5_moe::FAMILY,
    glm4_moe::FAMILY,
    gpt_oss::FAMILY,
    granitemoe::FAMILY,
    granitemoe::SHARED,
    hunyuan_v1_moe::FAMILY,
    deepseek::KIMI_K2,
    llama4::WHOLE,
    llama4::TEXT,
    minimax_m2::FAMILY,
    mixtral::FAMILY,
    olmoe::FAMILY,
    phimoe::FAMILY,
    qwen2_moe::FAMILY,
    qwen3_moe::FAMILY,
];

/// Families that are known and cannot be served, and why.
const REFUSED: [(&str, &str); 5] = [
    ("switch_transformers", CAPACITY),
    ("nllb-moe", CAPACITY),
    ("qwen3_next", "its layers of linear attention are not computed"),
    (
        "longcat_flash",
        "its layers have two attentions each and experts that stand for nothing, which is not computed",
    ),
    ("jamba", "its state-space layers are not computed"),
];
const CAPACITY: &str =
    "its experts take a limited number of tokens and drop the rest (capacity), which is not computed";

/// The family that the configuration names.
pub(crate) fn of(config: &Config) -> Result<&'static Family, ConfigError> {
    let value =
        config.get("model_type").ok_or_else(|| ConfigError::Missing { key: "model_type".to_owned() })?;
    if let Some((_, reason)) = REFUSED.iter().find(|(known, _)| value.as_str() == Some(known)) {
        config.refuse_set("model_type", reason)?;
    }
    FAMILIES.iter().find(|family| value.as_str() == Some(family.model_type)).ok_or_else(|| {
        ConfigError::Family {
            value: clip(&value.to_string()),
            supported: FAMILIES.map(|family| family.model_type).join(", "),
        }
    })
}
