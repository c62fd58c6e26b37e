//! The router's part of a layer with experts: the gate's weights and shared experts.
//!
//! Shared experts see every row, so they do not depend on the gate's choice and are computed while the routed ones are
//! in flight. Knows nothing about dispatch.

use muster_checkpoint::spec::WeightOn;

use super::device::{Device, Gate};

/// The router's part of a layer with experts.
pub(super) struct Moe<D: Device> {
    pub(super) gate: Gate<D>,
    pub(super) weight_on: WeightOn,
    pub(super) shared: Option<Shared<D>>,
}

/// A shared expert.
pub(super) struct Shared<D: Device> {
    pub(super) mlp: D::Mlp,
    /// `[1, hidden]`: the sigmoid of its product with a row scales the output.
    pub(super) scale: Option<D::Matrix>,
}

impl<D: Device> Shared<D> {
    /// Writes the output of the shared expert for every row of `x`, `[rows, hidden]`, to `out`.
    pub(super) fn run(&self, device: &D, x: &D::Buffer, scratch: &mut D::Scratch, out: &mut D::Buffer) {
        device.gated_mlp(&self.mlp, x, scratch, out);
        if let Some(scale) = &self.scale {
            device.sigmoid_gate(scale, x, scratch, out);
        }
    }
}
