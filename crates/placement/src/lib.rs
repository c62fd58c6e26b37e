//! Which worker holds which expert: pure data and decisions.
//!
//! Owns [`Shape`] (how many routed experts each layer has), [`Placement`] (an immutable snapshot of who holds
//! what) and [`split()`] (the shares a cluster starts with). Every key inside a placement is in its shape, and
//! owners are listed in ascending order. Knows nothing of health, addresses, clocks or the network.

mod placement;
mod shape;
mod split;

pub use placement::{Placement, PlacementError, WorkerIx};
pub use shape::Shape;
pub use split::{SplitError, split};
