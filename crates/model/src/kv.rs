//! Which layers of a model share KV blocks.
//!
//! What always holds: whoever plans a model's memory and whoever runs it see the same groups, since all groups come from
//! here. Knows nothing of blocks in use.

use std::num::NonZero;

use muster_checkpoint::spec::Sees;
use muster_engine::reach::{LayerGroups, Reach};

/// The groups of layers that see this, in order.
pub(crate) fn groups(layers: impl Iterator<Item = Sees>) -> LayerGroups {
    LayerGroups::of(&layers.map(reach).collect::<Vec<_>>())
}

/// The engine's word for it. What positions cannot fill is as good as all.
fn reach(sees: Sees) -> Reach {
    let positions = |count: usize| u32::try_from(count).ok().and_then(NonZero::new);
    match sees {
        Sees::All => Reach::All,
        Sees::Last(count) => positions(count).map_or(Reach::All, Reach::Last),
        Sees::Chunk(length) => positions(length).map_or(Reach::All, Reach::Chunk),
    }
}
