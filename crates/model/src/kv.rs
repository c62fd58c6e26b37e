//! Which layers of a model share KV blocks.
//!
//! What always holds: whoever plans a model's memory and whoever runs it see the same groups, since all groups come from
//! here. Knows nothing of blocks in use.

use std::num::NonZero;

use muster_engine::reach::{LayerGroups, Reach};

/// The groups of layers with these windows, in order.
pub(crate) fn groups(windows: impl Iterator<Item = Option<usize>>) -> LayerGroups {
    LayerGroups::of(&windows.map(reach).collect::<Vec<_>>())
}

/// What a layer with this window sees. A window that positions cannot fill is none.
fn reach(window: Option<usize>) -> Reach {
    let window = window.and_then(|window| u32::try_from(window).ok()).and_then(NonZero::new);
    window.map_or(Reach::All, Reach::Last)
}
