//! Sizes of a model: parameters and bytes, as stored, split the way placement needs them.
//!
//! Counts what the plan names, from headers alone; a tensor that two roles share is counted once per role's own part.

use crate::plan::Plan;
use crate::spec::{ModelSpec, Role};

/// Sizes of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inventory {
    /// Parameters in all.
    pub parameters: u64,
    /// Parameters that one token uses: the trunk, and `top_k` experts of every layer that has them.
    pub active_parameters: u64,
    /// Stored bytes in all.
    pub total_bytes: u64,
    /// Stored bytes of everything but routed experts; what a router holds.
    pub trunk_bytes: u64,
    /// Layers in order.
    pub layers: Vec<LayerInventory>,
}

/// Sizes of one layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LayerInventory {
    /// Stored bytes of its attention, norms, gate and dense MLP.
    pub trunk_bytes: u64,
    /// Routed experts; 0 in a dense layer.
    pub experts: u32,
    /// Stored bytes of one routed expert; all experts of a layer are the same size.
    pub expert_bytes: u64,
}

impl Inventory {
    pub(crate) fn of(spec: &ModelSpec, plan: &Plan) -> Self {
        let experts = |number| spec.moe(number).map_or(0, |moe| moe.experts);
        let layer = |number| LayerInventory { experts: experts(number), ..LayerInventory::default() };
        let mut inventory = Self {
            parameters: 0,
            active_parameters: 0,
            total_bytes: 0,
            trunk_bytes: 0,
            layers: (0..spec.layers.len()).map(layer).collect(),
        };
        for (role, slice) in plan {
            let (elements, bytes) = (slice.elements(), slice.bytes());
            inventory.parameters += elements;
            inventory.total_bytes += bytes;
            if let Role::Expert(number, expert, _) = *role {
                let top_k = spec.moe(number as usize).map_or(0, |moe| moe.top_k);
                // Any `top_k` experts will do, since all are the same size.
                inventory.active_parameters += if expert < top_k { elements } else { 0 };
                inventory.layers[number as usize].expert_bytes += if expert == 0 { bytes } else { 0 };
                continue;
            }
            inventory.active_parameters += elements;
            inventory.trunk_bytes += bytes;
            if let Role::Layer(number, _) = *role {
                inventory.layers[number as usize].trunk_bytes += bytes;
            }
        }
        inventory
    }
}
