//! The model families: the only place that knows their names, their configuration keys and their tensor names.
//!
//! A family is one row of [`FAMILIES`]: how `config.json` becomes a [`ModelSpec`], and which tensors hold a layer's
//! experts. Everything that the families share (the trunk's keys and tensor names) is in [`base`] and [`trunk`]. A value
//! that this build cannot compute is refused here, by key and value. Published models are in [`presets`], as sizes alone.

mod base;
mod deepseek;
mod ernie4_5_moe;
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

use muster_types::DType;

use crate::config::{Config, ConfigError};
use crate::error::{CheckpointError, clip};
use crate::plan::PlanBuilder;
use crate::spec::{MlpSpec, ModelSpec, MoeSpec};
use trunk::{SplitNames, TrunkNames};

pub use presets::Preset;

/// One family.
#[derive(Clone, Copy)]
pub(crate) struct Family {
    /// Its `model_type`.
    model_type: &'static str,
    /// Configuration to spec; the dtype is that of the stored matrices.
    spec: fn(&Config, DType) -> Result<ModelSpec, ConfigError>,
    experts: ExpertTensors,
    /// What it calls the rest.
    names: &'static TrunkNames,
    /// The text model is part of a larger one.
    part_of: Option<PartOf>,
}

/// Which tensors hold the gate and the experts of a layer.
#[derive(Clone, Copy)]
enum ExpertTensors {
    /// One by one, or stacked, under these names.
    Split(&'static SplitNames),
    /// As this plans them, given the layer's number, the model's hidden size and the experts.
    Own(fn(&mut PlanBuilder<'_>, u32, usize, &MoeSpec) -> Result<(), CheckpointError>),
}

/// Where a text model is found in a larger one, whose other parts are left alone.
#[derive(Clone, Copy)]
struct PartOf {
    /// Key of its configuration.
    config: &'static str,
    /// Before the names of its tensors.
    prefix: &'static str,
}

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

impl Family {
    /// One whose trunk has the usual names.
    const fn new(
        model_type: &'static str,
        spec: fn(&Config, DType) -> Result<ModelSpec, ConfigError>,
        experts: ExpertTensors,
    ) -> Self {
        Self { model_type, spec, experts, names: &TrunkNames::USUAL, part_of: None }
    }

    /// The family that the configuration names.
    pub(crate) fn of(config: &Config) -> Result<&'static Self, ConfigError> {
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

    /// The model that the configuration describes.
    pub(crate) fn spec(&self, config: &Config, dtype: DType) -> Result<ModelSpec, ConfigError> {
        match self.part_of.map(|part| config.nested(part.config)).transpose()?.flatten() {
            Some(text) => (self.spec)(&text, dtype),
            None => (self.spec)(config, dtype),
        }
    }

    /// What comes before the names of all its tensors.
    pub(crate) fn prefix(&self) -> &'static str {
        self.part_of.map_or("", |part| part.prefix)
    }

    /// Plans every tensor of the model.
    pub(crate) fn plan(&self, spec: &ModelSpec, plan: &mut PlanBuilder<'_>) -> Result<(), CheckpointError> {
        trunk::outer(plan, spec)?;
        for (layer, number) in spec.layers.iter().zip(0u32..) {
            trunk::layer(plan, number, spec, &layer.attention, self.names)?;
            match &layer.mlp {
                MlpSpec::Moe(moe) => match self.experts {
                    ExpertTensors::Split(names) => {
                        trunk::split_experts(plan, number, spec.hidden, moe, names)?;
                    }
                    ExpertTensors::Own(experts) => experts(plan, number, spec.hidden, moe)?,
                },
                MlpSpec::Dense { intermediate } => {
                    trunk::dense(plan, number, spec.hidden, *intermediate, self.names)?;
                }
            }
        }
        Ok(())
    }
}
