//! What a layer with experts has in the router: the gate's weights and shared experts.
//!
//! Shared experts see every row, so they depend on no choice and are computed while the routed ones are away. Knows
//! nothing about dispatch.

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
    /// `[1, hidden]`: its output counts times the sigmoid of this.
    pub(super) scale: Option<D::Matrix>,
}

impl<D: Device> Shared<D> {
    /// What every row of `x` gets, `[rows, hidden]`, into `out`.
    pub(super) fn run(&self, device: &D, x: &D::Buffer, scratch: &mut D::Scratch, out: &mut D::Buffer) {
        device.gated_mlp(&self.mlp, x, scratch, out);
        if let Some(scale) = &self.scale {
            device.sigmoid_gate(scale, x, scratch, out);
        }
    }
}
