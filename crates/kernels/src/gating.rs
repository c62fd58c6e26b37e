//! Biases and the activation between an expert's linears.
//!
//! What must hold: a bias is added to the finished sum of products, once, in f32; the activation follows it. Operations
//! are those written at [`Gating`], each rounded once. It does not know where gate and up come from nor where results
//! go.

use muster_types::Gating;

use crate::error::KernelError;
use crate::math::{sigmoid_lanes, silu_lanes};
use crate::simd::{LANES, Simd, load_part};

/// Biases of an expert's linears.
#[derive(Debug, Clone, PartialEq)]
pub struct Biases {
    /// Bias of the gate projection, `[intermediate]`.
    pub gate: Vec<f32>,
    /// Bias of the up projection, `[intermediate]`.
    pub up: Vec<f32>,
    /// Bias of the down projection, `[hidden]`.
    pub down: Vec<f32>,
}

/// Checks the activation's constants.
pub(crate) fn check(gating: Gating) -> Result<(), KernelError> {
    match gating {
        Gating::ClampedSwish { alpha, limit } if !(alpha.is_finite() && limit.is_finite() && limit > 0.0) => {
            Err(KernelError::Gating { alpha, limit })
        }
        Gating::Silu | Gating::ClampedSwish { .. } => Ok(()),
    }
}

impl Biases {
    pub(crate) fn check(&self, intermediate: usize, hidden: usize) -> Result<(), KernelError> {
        let all = [
            ("gate", &self.gate, intermediate),
            ("up", &self.up, intermediate),
            ("down", &self.down, hidden),
        ];
        for (field, bias, want) in all {
            if bias.len() != want {
                return Err(KernelError::BiasLength { field, found: bias.len(), want });
            }
            if let Some(index) = bias.iter().position(|value| !value.is_finite()) {
                return Err(KernelError::BiasNonFinite { field, index });
            }
        }
        Ok(())
    }
}

/// An activation of the sums of gate and up. Kernels are compiled for each, so that plain experts do not pay for the
/// general one.
pub(crate) trait Activate: Copy {
    /// The activated outputs of panel `panel`. Lanes behind the last output are unspecified.
    fn of<S: Simd>(self, s: S, panel: usize, sums: [S::V; 2]) -> S::V;
}

/// [`Gating::Silu`] without biases.
#[derive(Clone, Copy)]
pub(crate) struct Plain;

impl Activate for Plain {
    #[inline(always)]
    fn of<S: Simd>(self, s: S, _: usize, [gate, up]: [S::V; 2]) -> S::V {
        s.mul(silu_lanes(s, gate), up)
    }
}

/// Any activation, with biases or without.
#[derive(Clone, Copy)]
pub(crate) struct General<'a> {
    pub(crate) gating: Gating,
    pub(crate) biases: Option<&'a Biases>,
    pub(crate) intermediate: usize,
}

impl Activate for General<'_> {
    #[inline(always)]
    fn of<S: Simd>(self, s: S, panel: usize, [mut gate, mut up]: [S::V; 2]) -> S::V {
        if let Some(biases) = self.biases {
            let from = panel * LANES;
            let to = self.intermediate.min(from + LANES);
            gate = s.add(gate, load_part(s, &biases.gate[from..to]));
            up = s.add(up, load_part(s, &biases.up[from..to]));
        }
        match self.gating {
            Gating::Silu => Plain.of(s, panel, [gate, up]),
            Gating::ClampedSwish { alpha, limit } => {
                // The bound comes first so that a NaN passes through.
                let gate = s.min(s.splat(limit), gate);
                let up = s.max(s.splat(-limit), s.min(s.splat(limit), up));
                let swish = s.mul(gate, sigmoid_lanes(s, s.mul(s.splat(alpha), gate)));
                s.mul(s.add(up, s.splat(1.0)), swish)
            }
        }
    }
}
