//! What the trunk asks of the device that holds its weights, its KV cache and the rows of a step.
//!
//! The walk through the layers never looks into a buffer: numbers reach the host where something is decided by them, in
//! [`Device::choose`] and [`Device::head`], and for observers in [`Device::read`]. So a device may run everything between them behind the
//! caller's back, in the order of the calls; and what goes wrong on the way is told at the next of these points.
//!
//! What an implementation keeps: a row's bits depend on that row alone, as the kernels promise. It resizes the
//! buffers it writes. It knows nothing of layers, sequences, lanes or dispatch.

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
    /// A norm's weight, a bias, or whatever else is one number per column.
    type Vector: Send + Sync;
    /// The weights of a gated MLP.
    type Mlp: Send + Sync;
    /// Keys and values.
    type Kv: Send;
    /// Rows of f32, row-major. An operation's width follows from its weights; where it does not, it is an argument.
    type Buffer: Default + Send;
    /// Rows in the type that dispatch sends, where that is not [`Self::Buffer`]'s.
    type Wire: Default + Send;
    /// Rotations of the rows of a step.
    type Angles: Default + Send;
    /// Whatever operations keep between calls.
    type Scratch: Default + Send;

    /// What inputs of linears are rounded to.
    fn compute(&self) -> Compute;

    /// Takes a packed weight.
    ///
    /// # Errors
    /// When it has no room.
    fn matrix(&self, packed: Matrix) -> Result<Self::Matrix, DeviceError>;

    /// Takes numbers.
    ///
    /// # Errors
    /// When it has no room.
    fn vector(&self, values: Vec<f32>) -> Result<Self::Vector, DeviceError>;

    /// Takes the weights of an MLP.
    ///
    /// # Errors
    /// When it has no room.
    fn mlp(&self, packed: Expert) -> Result<Self::Mlp, DeviceError>;

    /// A KV cache of so many blocks.
    ///
    /// # Errors
    /// When it has no room.
    fn kv(&self, shape: KvShape, blocks: usize) -> Result<Self::Kv, DeviceError>;

    /// Rows of a table, times `multiplier`.
    fn embed(&self, table: &Self::Matrix, tokens: &[TokenId], multiplier: f32, out: &mut Self::Buffer);

    /// Rows normed, and rounded as linears read them.
    fn norm(&self, norm: &Norm<Self>, x: &Self::Buffer, out: &mut Self::Buffer);

    /// RMS norm in place of every stretch as long as `weight`. Not rounded.
    fn norm_heads(&self, weight: &Self::Vector, eps: f32, x: &mut Self::Buffer);

    /// Rounds as linears read their input.
    fn round(&self, x: &mut Self::Buffer);

    /// A linear and its bias.
    fn linear(&self, projection: &Projection<Self>, x: &Self::Buffer, out: &mut Self::Buffer);

    /// One linear per head: of every row, `from`'s columns of a head give `to`'s columns of that head. Inputs are
    /// rounded.
    fn linear_heads(
        &self,
        weights: &[Self::Matrix],
        x: (&Self::Buffer, HeadColumns),
        out: (&mut Self::Buffer, HeadColumns),
        scratch: &mut Self::Scratch,
    );

    /// Of every row, `len` columns of `from` to columns of `to`, which comes to have as many rows.
    fn copy_columns(
        &self,
        from: (&Self::Buffer, HeadColumns),
        len: usize,
        to: (&mut Self::Buffer, HeadColumns),
    );

    /// Every number to within `-limit ..= limit`.
    fn clamp(&self, limit: f32, x: &mut Self::Buffer);

    /// Rows times a factor each.
    fn scale_rows(&self, factors: &[f32], x: &mut Self::Buffer);

    /// Rotations of rows at these positions.
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

    /// The gate's choice for every row, into `choice`. A row without a usable one is told in its `unusable`.
    ///
    /// # Errors
    /// When the device failed since it was last asked.
    fn choose(
        &self,
        gate: &Gate<Self>,
        x: &Self::Buffer,
        scratch: &mut Self::Scratch,
        choice: &mut Choice,
    ) -> Result<(), DeviceError>;

    /// A gated MLP of every row.
    fn gated_mlp(
        &self,
        mlp: &Self::Mlp,
        x: &Self::Buffer,
        scratch: &mut Self::Scratch,
        out: &mut Self::Buffer,
    );

    /// Rows of `out` times the sigmoid of what `weight`, one row, makes of those of `x`.
    fn sigmoid_gate(
        &self,
        weight: &Self::Matrix,
        x: &Self::Buffer,
        scratch: &mut Self::Scratch,
        out: &mut Self::Buffer,
    );

    /// `to += from * factor`.
    fn add_scaled(&self, from: &Self::Buffer, factor: f32, to: &mut Self::Buffer);

    /// Of every row as many copies as it has weights, each times its weight.
    fn weigh(&self, x: &Self::Buffer, weights: &[f32], k: usize, out: &mut Self::Buffer);

    /// Every `copies` rows become one, added up in their order.
    fn sum_copies(&self, copies: usize, hidden: usize, x: &mut Self::Buffer);

    /// Makes ready what [`Self::rows`] shows of these rows.
    fn to_wire(&self, x: &Self::Buffer, wire: &mut Self::Wire);

    /// Rows for dispatch, as they were made ready.
    ///
    /// # Errors
    /// When they are no whole number of rows.
    fn rows<'b>(
        &self,
        x: &'b Self::Buffer,
        wire: &'b Self::Wire,
        hidden: usize,
    ) -> Result<Rows<'b>, UnevenRows>;

    /// Room for so many numbers, for dispatch to write to.
    fn rows_mut<'b>(&self, len: usize, out: &'b mut Self::Buffer) -> RowsMut<'b>;

    /// Keeps these ranges of rows.
    fn keep(&self, kept: &[Range<usize>], width: usize, x: &mut Self::Buffer);

    /// Copies of these ranges of rows.
    fn gather(&self, from: &Self::Buffer, ranges: &[Range<usize>], width: usize, out: &mut Self::Buffer);

    /// Logits of rows, on the host.
    ///
    /// # Errors
    /// When the device failed since it was last asked.
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
    /// When the device failed since it was last asked.
    fn read(&self, x: &Self::Buffer, host: &mut Vec<f32>) -> Result<(), DeviceError>;
}

/// A device that failed. What it had computed is lost.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct DeviceError(pub String);

/// A norm: RMS, or with a bias one that takes the mean away too.
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
    /// One per output.
    pub bias: Option<D::Vector>,
}

/// What a gate decides by.
pub struct Gate<D: Device + ?Sized> {
    /// One output per expert.
    pub projection: Projection<D>,
    /// Added to an expert's score when experts are chosen. Empty where there is none.
    pub selection_bias: Vec<f32>,
    /// From logits to choices.
    pub recipe: GateRecipe,
    /// How many there are.
    pub experts: u32,
    /// How many a row gets.
    pub top_k: u32,
}

/// What the last hidden rows become.
pub struct Head<'a, D: Device + ?Sized> {
    /// `[vocab, hidden]`.
    pub weight: &'a D::Matrix,
    /// One per token.
    pub bias: Option<&'a D::Vector>,
    /// Divides logits.
    pub divisor: f32,
}

/// Columns of every head of a row: `width` per head, from `first` on.
#[derive(Debug, Clone, Copy)]
pub struct HeadColumns {
    /// Of one head.
    pub width: usize,
    /// The first that counts.
    pub first: usize,
}

/// What gates decided about rows.
#[derive(Debug, Default)]
pub struct Choice {
    /// `[rows, k]`, ascending in each row.
    pub experts: Vec<ExpertId>,
    /// `[rows, k]`.
    pub weights: Vec<f32>,
    /// Rows, ascending, whose entries are to be ignored.
    pub unusable: Vec<(usize, Unusable)>,
}

/// Why a row has no choice.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Unusable {
    /// The row is not finite.
    Hidden,
    /// Its logits gave none.
    Gate(GateError),
}
