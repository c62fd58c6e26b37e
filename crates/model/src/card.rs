//! The model's card, for the workers that hold its experts, and the experts' forms and sizes by that card.

use std::num::NonZeroU32;

use muster_checkpoint::Checkpoint;
use muster_placement::{ExpertSizes, Shape, SizesError};
use muster_proto::card::{LayerCard, ModelCard};
use muster_types::{Compute, ExpertKey, WeightDType};

use crate::experts::ExpertForm;

/// A size of the model that the protocol cannot carry.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the model's {what} is {value}; the protocol carries 1 to 4294967295")]
pub struct CardError {
    what: &'static str,
    value: usize,
}

/// Number of routed experts in every layer, for placement.
#[must_use]
pub fn expert_shape(checkpoint: &Checkpoint) -> Shape {
    let spec = checkpoint.spec();
    Shape::new((0..spec.layers.len()).map(|layer| spec.moe(layer).map_or(0, |moe| moe.experts)).collect())
}

/// Card for a worker without a model of its own.
///
/// # Errors
/// When a size of the model is out of the protocol's range.
pub fn card(checkpoint: &Checkpoint, compute: Compute, dtype: WeightDType) -> Result<ModelCard, CardError> {
    let spec = checkpoint.spec();
    let forms = ExpertForm::of_layers(checkpoint, compute, dtype);
    let layer = |(at, form): (usize, &Option<ExpertForm>)| match (spec.moe(at), form) {
        (Some(moe), Some(form)) => Ok(Some(LayerCard {
            experts: size("number of experts", moe.experts as usize)?,
            intermediate: size("intermediate size", form.intermediate)?,
            packings: form.packings,
            biases: form.biases,
            gating: form.gating,
        })),
        _ => Ok(None),
    };
    Ok(ModelCard {
        fingerprint: checkpoint.fingerprint(),
        name: checkpoint.name().to_owned(),
        hidden: size("hidden size", spec.hidden)?,
        top_k: size("number of experts per token", spec.most_experts_per_token() as usize)?,
        compute,
        experts: dtype,
        layers: forms.iter().enumerate().map(layer).collect::<Result<_, _>>()?,
    })
}

/// The experts' form in each layer, by the card.
#[must_use]
pub fn forms(card: &ModelCard) -> Vec<Option<ExpertForm>> {
    let form = |layer: &LayerCard| ExpertForm {
        hidden: card.hidden.get() as usize,
        intermediate: layer.intermediate.get() as usize,
        packings: layer.packings,
        gating: layer.gating,
        biases: layer.biases,
    };
    card.layers.iter().map(|layer| layer.as_ref().map(form)).collect()
}

/// Bytes of the packed experts of each layer.
///
/// # Errors
/// When they are too many for a placement.
pub fn expert_sizes(card: &ModelCard) -> Result<ExpertSizes, SizesError> {
    let bytes = |form: &Option<ExpertForm>| form.and_then(|form| form.bytes()).unwrap_or(0) as u64;
    ExpertSizes::new(&Shape::new(card.shape()), forms(card).iter().map(bytes).collect())
}

/// Bytes of these experts, packed.
#[must_use]
pub fn bytes_of(keys: &[ExpertKey], forms: &[Option<ExpertForm>]) -> u64 {
    let form = |key: &ExpertKey| forms.get(key.layer.index()).copied().flatten();
    keys.iter().filter_map(form).filter_map(|form| form.bytes()).map(|bytes| bytes as u64).sum()
}

fn size(what: &'static str, value: usize) -> Result<NonZeroU32, CardError> {
    u32::try_from(value).ok().and_then(NonZeroU32::new).ok_or(CardError { what, value })
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use muster_checkpoint::Source;

    use super::*;

    #[test]
    fn a_card_says_what_the_checkpoint_does() {
        let golden = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/golden");
        for (name, dtype) in [
            ("mixtral", WeightDType::Native),
            ("mixtral_bf16", WeightDType::Q8),
            ("deepseek_v3", WeightDType::Q4),
            ("gpt_oss", WeightDType::Native),
        ] {
            let checkpoint = Checkpoint::open(&Source::Directory(golden.join(name))).unwrap();
            let compute = checkpoint.compute(None);
            let card = card(&checkpoint, compute, dtype).unwrap();
            assert_eq!(forms(&card), ExpertForm::of_layers(&checkpoint, compute, dtype), "{name}");
            assert_eq!(Shape::new(card.shape()), expert_shape(&checkpoint), "{name}");
        }
    }
}
