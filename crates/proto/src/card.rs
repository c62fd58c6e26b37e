//! A model's card: the facts that a worker without a model of its own needs to hold its experts.

use std::num::NonZeroU32;

use muster_types::{Compute, Fingerprint, Gating, Packing, WeightDType};

use crate::cluster::v1;
use crate::convert::{
    WireError, compute_from_wire, compute_to_wire, expert_dtype_from_wire, expert_dtype_to_wire,
};
use crate::handshake::fingerprint_from_wire;

/// Most layers of a model.
const MOST_LAYERS: usize = 4096;
/// Most experts of a layer.
const MOST_EXPERTS: u32 = 1 << 16;
/// Greatest width.
const WIDEST: u32 = 1 << 20;
/// Longest name of a model, bytes.
const LONGEST_NAME: usize = 256;

/// The experts of a layer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LayerCard {
    /// Number of experts.
    pub experts: NonZeroU32,
    /// Intermediate width.
    pub intermediate: NonZeroU32,
    /// Packings of gate, up and down projection.
    pub packings: [Packing; 3],
    /// Whether all three have biases.
    pub biases: bool,
    /// Activation between the projections.
    pub gating: Gating,
}

/// A model, for the workers that hold its experts.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelCard {
    /// Identity of the model.
    pub fingerprint: Fingerprint,
    /// Its name.
    pub name: String,
    /// Width of a hidden row in elements.
    pub hidden: NonZeroU32,
    /// Most experts that one row goes to.
    pub top_k: NonZeroU32,
    /// Rounding of activations.
    pub compute: Compute,
    /// Packing of experts.
    pub experts: WeightDType,
    /// Every layer; `None` for a dense one.
    pub layers: Vec<Option<LayerCard>>,
}

impl ModelCard {
    /// Converts to a message.
    #[must_use]
    pub fn to_wire(&self) -> v1::ModelCard {
        let layer = |layer: &Option<LayerCard>| match layer {
            None => v1::LayerCard::default(),
            Some(LayerCard { experts, intermediate, packings: [gate, up, down], biases, gating }) => {
                v1::LayerCard {
                    experts: experts.get(),
                    intermediate: intermediate.get(),
                    gate: packing_to_wire(*gate).into(),
                    up: packing_to_wire(*up).into(),
                    down: packing_to_wire(*down).into(),
                    biases: *biases,
                    clamped_swish: match *gating {
                        Gating::Silu => None,
                        Gating::ClampedSwish { alpha, limit } => Some(v1::ClampedSwish { alpha, limit }),
                    },
                }
            }
        };
        v1::ModelCard {
            fingerprint: self.fingerprint.as_bytes().to_vec().into(),
            name: self.name.clone(),
            hidden: self.hidden.get(),
            top_k: self.top_k.get(),
            compute: compute_to_wire(self.compute).into(),
            expert_dtype: expert_dtype_to_wire(self.experts).into(),
            layers: self.layers.iter().map(layer).collect(),
        }
    }

    /// Parses a message.
    ///
    /// # Errors
    /// The first field that breaks a rule.
    pub fn parse(message: &v1::ModelCard) -> Result<Self, WireError> {
        if message.layers.len() > MOST_LAYERS {
            let reason = format!("{} of them; at most {MOST_LAYERS} are allowed", message.layers.len());
            return Err(WireError::rule("layers", reason));
        }
        if message.name.len() > LONGEST_NAME || message.name.chars().any(char::is_control) {
            let reason = format!("must be at most {LONGEST_NAME} bytes without control characters");
            return Err(WireError::Name { field: "name", reason });
        }
        Ok(Self {
            fingerprint: fingerprint_from_wire(&message.fingerprint)?,
            name: message.name.clone(),
            hidden: number("hidden", message.hidden, WIDEST)?,
            top_k: number("top_k", message.top_k, MOST_EXPERTS)?,
            compute: compute_from_wire(message.compute)?,
            experts: expert_dtype_from_wire(message.expert_dtype)?,
            layers: message.layers.iter().map(parse_layer).collect::<Result<_, _>>()?,
        })
    }

    /// Number of routed experts in every layer.
    #[must_use]
    pub fn shape(&self) -> Vec<u32> {
        self.layers.iter().map(|layer| layer.map_or(0, |layer| layer.experts.get())).collect()
    }
}

fn parse_layer(layer: &v1::LayerCard) -> Result<Option<LayerCard>, WireError> {
    if layer.experts == 0 {
        return Ok(None);
    }
    Ok(Some(LayerCard {
        experts: number("layers.experts", layer.experts, MOST_EXPERTS)?,
        intermediate: number("layers.intermediate", layer.intermediate, WIDEST)?,
        packings: [
            packing_from_wire("layers.gate", layer.gate)?,
            packing_from_wire("layers.up", layer.up)?,
            packing_from_wire("layers.down", layer.down)?,
        ],
        biases: layer.biases,
        gating: layer.clamped_swish.as_ref().map_or(Ok(Gating::Silu), parse_clamped_swish)?,
    }))
}

fn parse_clamped_swish(message: &v1::ClampedSwish) -> Result<Gating, WireError> {
    let v1::ClampedSwish { alpha, limit } = *message;
    if !(alpha.is_finite() && limit.is_finite() && limit > 0.0) {
        let reason = format!("is alpha {alpha}, limit {limit}; both must be finite, and the limit above 0");
        return Err(WireError::rule("layers.clamped_swish", reason));
    }
    Ok(Gating::ClampedSwish { alpha, limit })
}

fn number(field: &'static str, value: u32, most: u32) -> Result<NonZeroU32, WireError> {
    if value > most {
        return Err(WireError::rule(field, format!("is {value}; at most {most} is allowed")));
    }
    NonZeroU32::new(value).ok_or(WireError::Missing(field))
}

const fn packing_to_wire(packing: Packing) -> v1::Packing {
    match packing {
        Packing::F32 => v1::Packing::F32,
        Packing::Bf16 => v1::Packing::Bf16,
        Packing::Q8 => v1::Packing::Q8,
        Packing::Q4 => v1::Packing::Q4,
        Packing::Mxfp4 => v1::Packing::Mxfp4,
    }
}

fn packing_from_wire(field: &'static str, value: i32) -> Result<Packing, WireError> {
    match v1::Packing::try_from(value) {
        Ok(v1::Packing::F32) => Ok(Packing::F32),
        Ok(v1::Packing::Bf16) => Ok(Packing::Bf16),
        Ok(v1::Packing::Q8) => Ok(Packing::Q8),
        Ok(v1::Packing::Q4) => Ok(Packing::Q4),
        Ok(v1::Packing::Mxfp4) => Ok(Packing::Mxfp4),
        Ok(v1::Packing::Unspecified) => Err(WireError::Missing(field)),
        Err(_) => Err(WireError::UnknownValue { field, value }),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn card() -> ModelCard {
        let one = NonZeroU32::MIN;
        let layer = |packings| {
            let gating = Gating::ClampedSwish { alpha: 1.702, limit: 7.0 };
            Some(LayerCard { experts: one, intermediate: one, packings, biases: true, gating })
        };
        let plain = LayerCard {
            experts: one,
            intermediate: one,
            packings: [Packing::Mxfp4; 3],
            biases: false,
            gating: Gating::Silu,
        };
        ModelCard {
            fingerprint: Fingerprint::new([3; 32]),
            name: "m".into(),
            hidden: one,
            top_k: one,
            compute: Compute::Bf16,
            experts: WeightDType::Q4,
            layers: vec![
                None,
                layer([Packing::F32, Packing::Bf16, Packing::Q8]),
                layer([Packing::Q4; 3]),
                Some(plain),
            ],
        }
    }

    #[test]
    fn a_card_survives_the_round_trip() {
        let parsed = ModelCard::parse(&card().to_wire()).unwrap();
        assert_eq!(parsed, card());
        assert_eq!(parsed.shape(), [0, 1, 1, 1]);
    }

    #[test]
    fn what_cannot_be_a_model_is_refused() {
        let good = || card().to_wire();
        let layer = |change: fn(&mut v1::LayerCard)| {
            let mut card = good();
            change(&mut card.layers[1]);
            card
        };
        let bad = [
            ("fingerprint", v1::ModelCard { fingerprint: Default::default(), ..good() }),
            ("name", v1::ModelCard { name: "a\nb".into(), ..good() }),
            ("hidden", v1::ModelCard { hidden: 0, ..good() }),
            ("hidden", v1::ModelCard { hidden: WIDEST + 1, ..good() }),
            ("top_k", v1::ModelCard { top_k: 0, ..good() }),
            ("compute", v1::ModelCard { compute: 0, ..good() }),
            ("expert_dtype", v1::ModelCard { expert_dtype: 77, ..good() }),
            ("layers", v1::ModelCard { layers: vec![v1::LayerCard::default(); MOST_LAYERS + 1], ..good() }),
            ("layers.experts", layer(|layer| layer.experts = u32::MAX)),
            ("layers.intermediate", layer(|layer| layer.intermediate = 0)),
            ("layers.gate", layer(|layer| layer.gate = 0)),
            ("layers.down", layer(|layer| layer.down = 9)),
            ("layers.clamped_swish", layer(|layer| layer.clamped_swish.as_mut().unwrap().limit = 0.0)),
            ("layers.clamped_swish", layer(|layer| layer.clamped_swish.as_mut().unwrap().alpha = f32::NAN)),
        ];
        for (field, message) in bad {
            let error = ModelCard::parse(&message).unwrap_err().to_string();
            assert!(error.contains(field), "{field}: {error}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_parsed_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..256)) {
            if let Ok(message) = <v1::ModelCard as prost::Message>::decode(bytes.as_slice()) {
                let _ = ModelCard::parse(&message);
            }
        }
    }
}
