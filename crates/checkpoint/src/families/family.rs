//! What a family is: how `config.json` becomes a [`ModelSpec`], and which tensors hold the model. Knows no family.

use muster_types::DType;

use super::trunk::{self, SplitNames, TrunkNames};
use crate::config::{Config, ConfigError};
use crate::error::CheckpointError;
use crate::plan::PlanBuilder;
use crate::spec::{MlpSpec, ModelSpec, MoeSpec};

/// One family.
#[derive(Clone, Copy)]
pub(crate) struct Family {
    /// Its `model_type`.
    pub(super) model_type: &'static str,
    /// Configuration to spec; the dtype is that of the stored matrices.
    pub(super) spec: fn(&Config, DType) -> Result<ModelSpec, ConfigError>,
    pub(super) experts: ExpertTensors,
    /// What it calls the rest.
    pub(super) names: &'static TrunkNames,
    /// The text model is part of a larger one.
    pub(super) part_of: Option<PartOf>,
}

/// Which tensors hold the gate and the experts of a layer.
#[derive(Clone, Copy)]
pub(super) enum ExpertTensors {
    /// One by one, or stacked, under these names.
    Split(&'static SplitNames),
    /// As this plans them, given the layer's number, the model's hidden size and the experts.
    Own(fn(&mut PlanBuilder<'_>, u32, usize, &MoeSpec) -> Result<(), CheckpointError>),
}

/// Where a text model is found in a larger one, whose other parts are left alone.
#[derive(Clone, Copy)]
pub(super) struct PartOf {
    /// Key of its configuration.
    pub(super) config: &'static str,
    /// Before the names of its tensors.
    pub(super) prefix: &'static str,
}

impl Family {
    /// One whose trunk has the usual names.
    pub(super) const fn new(
        model_type: &'static str,
        spec: fn(&Config, DType) -> Result<ModelSpec, ConfigError>,
        experts: ExpertTensors,
    ) -> Self {
        Self { model_type, spec, experts, names: &TrunkNames::USUAL, part_of: None }
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
