//! Interface to the device that holds the trunk's weights, its KV cache and the rows of a step.
//!
//! The trunk never reads a buffer: values reach the host only in [`Device::choose`] and [`Device::head`], which decide
//! by them, and for observers in [`Device::read`]. So a device may run all other operations asynchronously, in the
//! order of the calls; it reports their errors at the next of these points.
//!
//! An implementation guarantees that a row's bits depend on that row alone, as the kernels do. It resizes the buffers
//! it writes. It knows nothing of layers, sequences, lanes or dispatch.

use std::ops::Range;

use muster_checkpoint::spec::{AttentionSpec, GateRecipe};
use muster_engine::dispatch::{Rows, RowsMut, UnevenRows};
use muster_kernels::{Expert, KvShape, KvSlot, Matrix, Rope};
use muster_types::{Compute, ExpertId, TokenId};

use crate::gate::GateError;

/// A device.
pub trait Device: Send + Sync + 'static {
    /// A linear's weight.
    type Matrix: Send + Sync;
    /// One number per column, such as a norm's weight or a bias.
    type Vector: Send + Sync;
    /// The weights of a gated MLP.
    type Mlp: Send + Sync;
    /// Keys and values.
    type Kv: Send;
    /// Rows of f32, row-major. An operation's width follows from its weights; where it does not, it is an argument.
    type Buffer: Default + Send;
    /// Rows in the wire dtype, where it differs from that of [`Self::Buffer`].
    type Wire: Default + Send;
    /// Rotations of the rows of a step.
    type Angles: Default + Send;
    /// Buffers that operations reuse between calls.
    type Scratch: Default + Send;

    /// Rounding of the inputs of linears.
    fn compute(&self) -> Compute;

    /// Uploads a packed weight.
    ///
    /// # Errors
    /// When the device is out of memory.
    fn matrix(&self, packed: Matrix) -> Result<Self::Matrix, DeviceError>;

    /// Uploads a vector.
    ///
    /// # Errors
    /// When the device is out of memory.
    fn vector(&self, values: Vec<f32>) -> Result<Self::Vector, DeviceError>;

    /// Uploads the weights of an MLP.
    ///
    /// # Errors
    /// When the device is out of memory.
    fn mlp(&self, packed: Expert) -> Result<Self::Mlp, DeviceError>;

    /// A KV cache of `blocks` blocks.
    ///
    /// # Errors
    /// When the device is out of memory.
    fn kv(&self, shape: KvShape, blocks: usize) -> Result<Self::Kv, DeviceError>;

    /// Embeds tokens: their rows of `table`, times `multiplier`.
    fn embed(&self, table: &Self::Matrix, tokens: &[TokenId], multiplier: f32, out: &mut Self::Buffer);

    /// Normalises rows and rounds them for linears.
    fn norm(&self, norm: &Norm<Self>, x: &Self::Buffer, out: &mut Self::Buffer);

    /// RMS norm in place, of every run of elements as long as `weight`. Not rounded.
    fn norm_heads(&self, weight: &Self::Vector, eps: f32, x: &mut Self::Buffer);

    /// Rounds in place for linears.
    fn round(&self, x: &mut Self::Buffer);

    /// Applies a linear and its bias.
    fn linear(&self, projection: &Projection<Self>, x: &Self::Buffer, out: &mut Self::Buffer);

    /// Applies one linear per head: in every row, from the head's columns `from` to its columns `to`. Inputs are
    /// rounded.
    fn linear_heads(
        &self,
        weights: &[Self::Matrix],
        x: (&Self::Buffer, HeadColumns),
        out: (&mut Self::Buffer, HeadColumns),
        scratch: &mut Self::Scratch,
    );

    /// Copies `len` columns of every row from `from` to `to`, which is resized to as many rows.
    fn copy_columns(
        &self,
        from: (&Self::Buffer, HeadColumns),
        len: usize,
        to: (&mut Self::Buffer, HeadColumns),
    );

    /// Clamps every number to `-limit ..= limit`.
    fn clamp(&self, limit: f32, x: &mut Self::Buffer);

    /// Multiplies each row by its factor.
    fn scale_rows(&self, factors: &[f32], x: &mut Self::Buffer);

    /// Computes the rotations of rows at these positions.
    fn angles(&self, rope: &Rope, positions: &[u32], out: &mut Self::Angles);

    /// Rotates every head of every row.
    fn rotate(&self, angles: &Self::Angles, head_dim: usize, x: &mut Self::Buffer);

    /// Writes keys and values of rows. `v` is not read where values are the ends of keys.
    fn append(
        &self,
        kv: &mut Self::Kv,
        layer: usize,
        slots: &[KvSlot<'_>],
        k: &Self::Buffer,
        v: &Self::Buffer,
    );

    /// Attention of rows over the cache, rounded.
    fn attend(
        &self,
        attention: (&AttentionSpec, Option<&Self::Vector>),
        kv: &Self::Kv,
        layer: usize,
        q: &Self::Buffer,
        slots: &[KvSlot<'_>],
        out: &mut Self::Buffer,
    );

    /// Chooses experts for every row by the gate, into `choice`. Rows without a usable choice are listed in its
    /// `unusable`.
    ///
    /// # Errors
    /// When the device failed since the last check.
    fn choose(
        &self,
        gate: &Gate<Self>,
        x: &Self::Buffer,
        scratch: &mut Self::Scratch,
        choice: &mut Choice,
    ) -> Result<(), DeviceError>;

    /// Applies a gated MLP to every row.
    fn gated_mlp(
        &self,
        mlp: &Self::Mlp,
        x: &Self::Buffer,
        scratch: &mut Self::Scratch,
        out: &mut Self::Buffer,
    );

    /// Multiplies each row of `out` by the sigmoid of the product of `weight`, one row, with that row of `x`.
    fn sigmoid_gate(
        &self,
        weight: &Self::Matrix,
        x: &Self::Buffer,
        scratch: &mut Self::Scratch,
        out: &mut Self::Buffer,
    );

    /// `to += from * factor`.
    fn add_scaled(&self, from: &Self::Buffer, factor: f32, to: &mut Self::Buffer);

    /// Writes `k` copies of every row, each times its weight.
    fn weigh(&self, x: &Self::Buffer, weights: &[f32], k: usize, out: &mut Self::Buffer);

    /// Sums every `copies` rows to one, in their order.
    fn sum_copies(&self, copies: usize, hidden: usize, x: &mut Self::Buffer);

    /// Converts rows to the wire dtype, for [`Self::rows`].
    fn to_wire(&self, x: &Self::Buffer, wire: &mut Self::Wire);

    /// Rows for dispatch, as converted by [`Self::to_wire`].
    ///
    /// # Errors
    /// When they are no whole number of rows.
    fn rows<'b>(
        &self,
        x: &'b Self::Buffer,
        wire: &'b Self::Wire,
        hidden: usize,
    ) -> Result<Rows<'b>, UnevenRows>;

    /// A buffer of `len` numbers, for dispatch to write to.
    fn rows_mut<'b>(&self, len: usize, out: &'b mut Self::Buffer) -> RowsMut<'b>;

    /// Keeps these ranges of rows and drops the others.
    fn keep(&self, kept: &[Range<usize>], width: usize, x: &mut Self::Buffer);

    /// Copies of these ranges of rows.
    fn gather(&self, from: &Self::Buffer, ranges: &[Range<usize>], width: usize, out: &mut Self::Buffer);

    /// Logits of rows, on the host.
    ///
    /// # Errors
    /// When the device failed since the last check.
    fn head(
        &self,
        head: Head<'_, Self>,
        x: &Self::Buffer,
        scratch: &mut Self::Scratch,
        logits: &mut Vec<f32>,
    ) -> Result<(), DeviceError>;

    /// Copies rows to the host.
    ///
    /// # Errors
    /// When the device failed since the last check.
    fn read(&self, x: &Self::Buffer, host: &mut Vec<f32>) -> Result<(), DeviceError>;
}

/// A device that failed. Its results are lost.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct DeviceError(pub String);

/// A norm: RMS, or with a bias layer norm, which subtracts the mean too.
pub struct Norm<D: Device + ?Sized> {
    /// One per column.
    pub weight: D::Vector,
    /// One per column.
    pub bias: Option<D::Vector>,
    /// Added under the root.
    pub eps: f32,
}

/// A linear layer with a bias where the model has one.
pub struct Projection<D: Device + ?Sized> {
    /// `[out, in]`.
    pub weight: D::Matrix,
    /// One number per output.
    pub bias: Option<D::Vector>,
}

/// Weights and rules of a gate.
pub struct Gate<D: Device + ?Sized> {
    /// Projection to one logit per expert.
    pub projection: Projection<D>,
    /// Added to an expert's score when experts are chosen. Empty where there is none.
    pub selection_bias: Vec<f32>,
    /// From logits to choices.
    pub recipe: GateRecipe,
    /// Number of experts.
    pub experts: u32,
    /// Number of experts per row.
    pub top_k: u32,
}

/// Head: from the last hidden rows to logits.
pub struct Head<'a, D: Device + ?Sized> {
    /// `[vocab, hidden]`.
    pub weight: &'a D::Matrix,
    /// One per token.
    pub bias: Option<&'a D::Vector>,
    /// Divisor of the logits.
    pub divisor: f32,
}

/// Columns of every head of a row: `width` per head, from `first` on.
#[derive(Debug, Clone, Copy)]
pub struct HeadColumns {
    /// Columns per head.
    pub width: usize,
    /// First column in use.
    pub first: usize,
}

/// Choices of a gate for rows.
#[derive(Debug, Default)]
pub struct Choice {
    /// `[rows, k]`, ascending in each row.
    pub experts: Vec<ExpertId>,
    /// `[rows, k]`.
    pub weights: Vec<f32>,
    /// Rows, ascending, whose entries must be ignored.
    pub unusable: Vec<(usize, Unusable)>,
}

/// Reasons why a row has no choice.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Unusable {
    /// The row is not finite.
    Hidden,
    /// Its logits gave no usable choice.
    Gate(GateError),
}
