//! The model, as its experts' holders need to know it.

use std::num::NonZeroU32;

use muster_checkpoint::Checkpoint;
use muster_model::experts::ExpertForm;
use muster_placement::{ExpertSizes, Shape, SizesError};
use muster_proto::card::{ClampedSwish, LayerCard, ModelCard, PackedAs};
use muster_types::{Compute, Gating, Packing, WeightDType};

/// What a worker that has no model of its own is told; `None` when a size of the model is out of the protocol's range.
#[must_use]
pub fn card(checkpoint: &Checkpoint, compute: Compute, dtype: WeightDType) -> Option<ModelCard> {
    let spec = checkpoint.spec();
    let number = |value: usize| u32::try_from(value).ok().and_then(NonZeroU32::new);
    let forms = ExpertForm::of_layers(checkpoint, compute, dtype);
    let layer = |(at, form): (usize, &Option<ExpertForm>)| match (spec.moe(at), form) {
        (Some(moe), Some(form)) => Some(Some(LayerCard {
            experts: NonZeroU32::new(moe.experts)?,
            intermediate: number(form.intermediate)?,
            packed: form.packings.map(packed),
            biases: form.biases,
            clamped_swish: match form.gating {
                Gating::Silu => None,
                Gating::ClampedSwish { alpha, limit } => Some(ClampedSwish { alpha, limit }),
            },
        })),
        _ => Some(None),
    };
    Some(ModelCard {
        fingerprint: checkpoint.fingerprint(),
        name: checkpoint.name().to_owned(),
        hidden: number(spec.hidden)?,
        top_k: NonZeroU32::new(spec.moe_layers().map(|(_, moe)| moe.top_k).max().unwrap_or(1))?,
        compute,
        experts: dtype,
        layers: forms.iter().enumerate().map(layer).collect::<Option<_>>()?,
    })
}

const fn packed(packing: Packing) -> PackedAs {
    match packing {
        Packing::F32 => PackedAs::F32,
        Packing::Bf16 => PackedAs::Bf16,
        Packing::Q8 => PackedAs::Q8,
        Packing::Q4 => PackedAs::Q4,
        Packing::Mxfp4 => PackedAs::Mxfp4,
    }
}

/// Bytes of the packed experts of each layer.
///
/// # Errors
/// When they are too many for a placement.
pub fn expert_sizes(
    checkpoint: &Checkpoint,
    shape: &Shape,
    compute: Compute,
    dtype: WeightDType,
) -> Result<ExpertSizes, SizesError> {
    let forms = ExpertForm::of_layers(checkpoint, compute, dtype);
    let bytes = |form: &Option<ExpertForm>| form.and_then(|form| form.bytes()).unwrap_or(0) as u64;
    ExpertSizes::new(shape, forms.iter().map(bytes).collect())
}
