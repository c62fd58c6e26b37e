//! Choice of the path of a linear on bf16 weights, by the required order and the instruction set.

use muster_types::Compute;

use crate::amx::{Hardware, InTiles};
use crate::isa::Isa;

/// Paths of a linear on bf16 weights.
pub(crate) enum Path {
    /// On f32 inputs, in lanes.
    Lanes,
    /// On packed inputs, in the order of `vdpbf16ps`.
    Pairs,
    /// On packed inputs, in tiles.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
    Tiles(InTiles<Hardware>),
}

/// The path for the order of `compute`. The caller has checked that the machine has `isa`.
pub(crate) fn path(isa: Isa, compute: Compute) -> Path {
    match (compute, isa) {
        (Compute::Bf16Pairs, _) => Path::Pairs,
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a context with this instruction set is made only where it was detected.
        (Compute::Bf16, Isa::Amx) => Path::Tiles(unsafe { InTiles::new() }),
        _ => Path::Lanes,
    }
}
