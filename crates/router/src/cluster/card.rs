//! The model, as its experts' holders need to know it.

use std::num::NonZeroU32;

use muster_checkpoint::Checkpoint;
use muster_kernels::{Packing, Quantisation};
use muster_model::experts::ExpertForm;
use muster_placement::{ExpertSizes, Shape, SizesError};
use muster_proto::card::{LayerCard, ModelCard, PackedAs};
use muster_types::{Compute, WeightDType};

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
            packed: {
                let [gate, up, down] = form.packings;
                [packed(gate)?, packed(up)?, packed(down)?]
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

/// `None` for what the wire has no name of.
const fn packed(packing: Packing) -> Option<PackedAs> {
    match packing {
        Packing::F32 => Some(PackedAs::F32),
        Packing::Bf16 => Some(PackedAs::Bf16),
        Packing::Mxfp4 => None,
        Packing::Quantised(Quantisation::Q8) => Some(PackedAs::Q8),
        Packing::Quantised(Quantisation::Q4) => Some(PackedAs::Q4),
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
