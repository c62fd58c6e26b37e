//! The weights of one gated MLP.
//!
//! What must hold: gate and up are packed alike; down is packed like them, or all are plain numbers, bf16 or f32. So
//! the path of a call is fixed when the expert is made.

use std::fmt;

use muster_types::{Gating, Packing};

use crate::error::KernelError;
use crate::gating::{self, Biases, General};
use crate::matrix::{Elements, Matrix};
use crate::mxfp4::Mxfp4Block;
use crate::panels::{Bf16Block, F32Block, Packed, Panels};
use crate::quant::pack::{Q4Block, Q8Block};

/// The weights of one gated MLP.
pub struct Expert {
    hidden: usize,
    intermediate: usize,
    pub(crate) weights: Weights,
    gating: Gating,
    biases: Option<Box<Biases>>,
}

/// Packed matrices, by their kernels.
pub(crate) enum Weights {
    /// All are bf16 values.
    Halves { first: Halves<2>, down: Halves<1> },
    /// Some are f32.
    Wide { first: Wide<2>, down: Wide<1> },
    /// Bytes and scales.
    Q8 { first: [Panels<Q8Block>; 2], down: [Panels<Q8Block>; 1] },
    /// Nibbles and scales.
    Q4 { first: [Panels<Q4Block>; 2], down: [Panels<Q4Block>; 1] },
}

/// Matrices of bf16 values.
pub(crate) enum Halves<const M: usize> {
    Bf16([Panels<Bf16Block>; M]),
    Mxfp4([Panels<Mxfp4Block>; M]),
}

/// Matrices of plain numbers.
pub(crate) enum Wide<const M: usize> {
    F32([Panels<F32Block>; M]),
    Halves(Halves<M>),
}

impl Wide<1> {
    fn of(down: Elements) -> Option<Self> {
        match down {
            Elements::F32(w) => Some(Self::F32([w])),
            Elements::Bf16(w) => Some(Self::Halves(Halves::Bf16([w]))),
            Elements::Mxfp4(w) => Some(Self::Halves(Halves::Mxfp4([w]))),
            Elements::Q8(_) | Elements::Q4(_) => None,
        }
    }
}

impl Wide<2> {
    fn of(gate: Elements, up: Elements) -> Option<Self> {
        match (gate, up) {
            (Elements::F32(gate), Elements::F32(up)) => Some(Self::F32([gate, up])),
            (Elements::Bf16(gate), Elements::Bf16(up)) => Some(Self::Halves(Halves::Bf16([gate, up]))),
            (Elements::Mxfp4(gate), Elements::Mxfp4(up)) => Some(Self::Halves(Halves::Mxfp4([gate, up]))),
            _ => None,
        }
    }
}

impl<const M: usize> Halves<M> {
    fn packed(&self) -> (Packing, [&[u8]; M]) {
        match self {
            Self::Bf16(w) => (Packing::Bf16, bytes(w)),
            Self::Mxfp4(w) => (Packing::Mxfp4, bytes(w)),
        }
    }
}

impl<const M: usize> Wide<M> {
    fn packed(&self) -> (Packing, [&[u8]; M]) {
        match self {
            Self::F32(w) => (Packing::F32, bytes(w)),
            Self::Halves(halves) => halves.packed(),
        }
    }
}

fn bytes<B: Packed, const M: usize>(panels: &[Panels<B>; M]) -> [&[u8]; M] {
    panels.each_ref().map(|panels| panels.blocks.as_bytes())
}

impl Weights {
    fn of(gate: Matrix, up: Matrix, down: Matrix) -> Option<Self> {
        match (gate.elements, up.elements, down.elements) {
            (Elements::Q8(gate), Elements::Q8(up), Elements::Q8(down)) => {
                Some(Self::Q8 { first: [gate, up], down: [down] })
            }
            (Elements::Q4(gate), Elements::Q4(up), Elements::Q4(down)) => {
                Some(Self::Q4 { first: [gate, up], down: [down] })
            }
            (gate, up, down) => match (Wide::<2>::of(gate, up)?, Wide::<1>::of(down)?) {
                (Wide::Halves(first), Wide::Halves(down)) => Some(Self::Halves { first, down }),
                (first, down) => Some(Self::Wide { first, down }),
            },
        }
    }

    /// Packings and bytes of gate, up and down.
    fn packed(&self) -> [(Packing, &[u8]); 3] {
        let ((first, [gate, up]), (last, [down])) = match self {
            Self::Halves { first, down } => (first.packed(), down.packed()),
            Self::Wide { first, down } => (first.packed(), down.packed()),
            Self::Q8 { first, down } => ((Packing::Q8, bytes(first)), (Packing::Q8, bytes(down))),
            Self::Q4 { first, down } => ((Packing::Q4, bytes(first)), (Packing::Q4, bytes(down))),
        };
        [(first, gate), (first, up), (last, down)]
    }
}

/// An expert and the rows that it is applied to.
#[derive(Debug, Clone, Copy)]
pub struct ExpertRows<'a> {
    /// The expert.
    pub expert: &'a Expert,
    /// Row numbers into `x`; a row may occur in any number of groups.
    pub rows: &'a [u32],
}

impl Expert {
    /// `gate` and `up` are `[intermediate, hidden]`, `down` is `[hidden, intermediate]`; the activation is
    /// [`Gating::Silu`], and there are no biases.
    ///
    /// # Errors
    /// [`KernelError::ExpertShape`] if `up` or `down` does not fit `gate`; [`KernelError::ExpertTypes`] if gate and
    /// up differ in element type, or some but not all are quantised in one way.
    pub fn new(gate: Matrix, up: Matrix, down: Matrix) -> Result<Self, KernelError> {
        let (intermediate, hidden) = (gate.n(), gate.k());
        for (field, matrix, (want_n, want_k)) in
            [("up", &up, (intermediate, hidden)), ("down", &down, (hidden, intermediate))]
        {
            let (n, k) = (matrix.n(), matrix.k());
            if (n, k) != (want_n, want_k) {
                return Err(KernelError::ExpertShape { field, n, k, want_n, want_k });
            }
        }
        let weights = Weights::of(gate, up, down).ok_or(KernelError::ExpertTypes)?;
        Ok(Self { hidden, intermediate, weights, gating: Gating::Silu, biases: None })
    }

    /// The expert with another activation and with biases, or without.
    ///
    /// # Errors
    /// [`KernelError::Gating`] for constants that are unusable; [`KernelError::BiasLength`] and
    /// [`KernelError::BiasNonFinite`] for biases that are.
    pub fn with(self, gating: Gating, biases: Option<Biases>) -> Result<Self, KernelError> {
        gating::check(gating)?;
        if let Some(biases) = &biases {
            biases.check(self.intermediate, self.hidden)?;
        }
        Ok(Self { gating, biases: biases.map(Box::new), ..self })
    }

    /// The activation between the linears.
    #[must_use]
    pub const fn gating(&self) -> Gating {
        self.gating
    }

    /// The linears' biases.
    #[must_use]
    pub fn biases(&self) -> Option<&Biases> {
        self.biases.as_deref()
    }

    /// Activation and biases of gate and up, if not [`crate::gating::Plain`].
    pub(crate) fn general(&self) -> Option<General<'_>> {
        let (gating, biases, intermediate) = (self.gating, self.biases(), self.intermediate);
        (gating != Gating::Silu || biases.is_some()).then_some(General { gating, biases, intermediate })
    }

    /// The bias of the last linear.
    pub(crate) fn down_bias(&self) -> Option<&[f32]> {
        self.biases().map(|biases| biases.down.as_slice())
    }

    /// Packings of gate, up and down projection.
    #[must_use]
    pub fn packings(&self) -> [Packing; 3] {
        self.weights.packed().map(|(packing, _)| packing)
    }

    /// The parts another process can rebuild it from: packed matrices, then biases, each in the order gate, up, down.
    #[must_use]
    pub fn packed(&self) -> [&[u8]; 6] {
        let biases = self.biases.as_ref().map(|b| [&b.gate, &b.up, &b.down].map(Vec::as_slice));
        let [gate_bias, up_bias, down_bias] = biases.unwrap_or_default().map(bytemuck::cast_slice);
        let [gate, up, down] = self.weights.packed().map(|(_, bytes)| bytes);
        [gate, up, down, gate_bias, up_bias, down_bias]
    }

    /// Whether the matrices are quantised.
    pub(crate) const fn is_quantised(&self) -> bool {
        matches!(self.weights, Weights::Q8 { .. } | Weights::Q4 { .. })
    }

    /// Features of an input and of an output row.
    #[must_use]
    pub const fn hidden(&self) -> usize {
        self.hidden
    }

    /// Features between the linears.
    #[must_use]
    pub const fn intermediate(&self) -> usize {
        self.intermediate
    }

    /// Bytes that the packed weights and the biases keep in memory.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.packed().iter().map(|part| part.len()).sum()
    }
}

impl fmt::Debug for Expert {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [gate, up, down] = self.packings();
        write!(f, "Expert({gate}, {up}, {down} [{}, {}])", self.hidden, self.intermediate)
    }
}
