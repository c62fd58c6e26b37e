//! The model families: the only place that knows their names, their configuration keys and their tensor names.
//!
//! A family is one row of [`FAMILIES`]: how `config.json` becomes a [`ModelSpec`], and which tensors hold a layer's
//! experts. Everything that the families share (the trunk's keys and tensor names) is in [`base`] and [`trunk`]. A value
//! that this build cannot compute is refused here, by key and value. Published models are in [`presets`], as sizes alone.

mod base;
mod deepseek;
mod ernie4_5_moe;
mod glm4_moe;
mod granitemoe;
mod mixtral;
mod olmoe;
mod presets;
mod qwen2_moe;
mod qwen3_moe;
mod trunk;

use muster_types::DType;

use crate::config::{Config, ConfigError};
use crate::error::{CheckpointError, clip};
use crate::plan::PlanBuilder;
use crate::spec::{MlpSpec, ModelSpec, MoeSpec};

pub use presets::Preset;

/// One family.
pub(crate) struct Family {
    /// Its `model_type`.
    model_type: &'static str,
    /// Configuration to spec; the dtype is that of the stored matrices.
    spec: fn(&Config, DType) -> Result<ModelSpec, ConfigError>,
    /// Plans the gate and the experts of one layer: its number, the model's hidden size, the experts.
    experts: fn(&mut PlanBuilder<'_>, u32, usize, &MoeSpec) -> Result<(), CheckpointError>,
}

const FAMILIES: [Family; 10] = [
    deepseek::V2,
    deepseek::V3,
    ernie4_5_moe::FAMILY,
    glm4_moe::FAMILY,
    granitemoe::FAMILY,
    granitemoe::SHARED,
    mixtral::FAMILY,
    olmoe::FAMILY,
    qwen2_moe::FAMILY,
    qwen3_moe::FAMILY,
];

impl Family {
    /// The family that the configuration names.
    pub(crate) fn of(config: &Config) -> Result<&'static Self, ConfigError> {
        let value =
            config.get("model_type").ok_or_else(|| ConfigError::Missing { key: "model_type".to_owned() })?;
        FAMILIES.iter().find(|family| value.as_str() == Some(family.model_type)).ok_or_else(|| {
            ConfigError::Family {
                value: clip(&value.to_string()),
                supported: FAMILIES.map(|family| family.model_type).join(", "),
            }
        })
    }

    /// The model that the configuration describes.
    pub(crate) fn spec(&self, config: &Config, dtype: DType) -> Result<ModelSpec, ConfigError> {
        (self.spec)(config, dtype)
    }

    /// Plans every tensor of the model.
    pub(crate) fn plan(&self, spec: &ModelSpec, plan: &mut PlanBuilder<'_>) -> Result<(), CheckpointError> {
        trunk::outer(plan, spec)?;
        for (layer, number) in spec.layers.iter().zip(0u32..) {
            trunk::attention(plan, number, spec.hidden, &layer.attention)?;
            match &layer.mlp {
                MlpSpec::Moe(moe) => (self.experts)(plan, number, spec.hidden, moe)?,
                MlpSpec::Dense { intermediate } => trunk::dense(plan, number, spec.hidden, *intermediate)?,
            }
        }
        Ok(())
    }
}
