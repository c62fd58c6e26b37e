//! Owners of every expert, current and target: pure data and decisions.
//!
//! Owns [`Shape`] (how many routed experts each layer has), [`Placement`] (an immutable snapshot of who holds
//! what), [`split()`] (the shares a cluster starts with) and [`Share`] (one of them). On top of these:
//!
//! - [`Binding`]: which numerics class computes each expert;
//! - [`Loads`]: what was asked of each expert lately;
//! - [`plan()`]: who ought to hold what, given loads, memory and speeds;
//! - [`transition()`]: the way there, without ever giving up the last copy of an expert;
//! - [`hedge`]: when a shard is sent to another replica too;
//! - [`lease`]: which router leads;
//! - [`leader`]: the leader's decisions, on top of all these;
//! - [`Demand`] and [`workers_per_row()`]: how many workers a model takes, and what its rows take on the wire.
//!
//! Every key inside a placement is in its shape, and owners are listed in ascending order. The same arguments give
//! the same answer everywhere: nothing here reads a clock, draws a number or knows of addresses and the network.

mod binding;
mod capacity;
pub mod hedge;
pub mod leader;
pub mod lease;
mod loads;
mod placement;
mod plan;
mod shape;
mod share;
mod sizes;
mod split;
mod traffic;
mod transition;

pub use binding::Binding;
pub use capacity::Demand;
pub use loads::Loads;
pub use placement::{Held, Placement, PlacementError, WorkerIx};
pub use plan::{Figures, Goals, Holdings, Member, Target, plan};
pub use shape::Shape;
pub use share::{Share, ShareError};
pub use sizes::{ExpertSizes, SizesError};
pub use split::{SplitError, split};
pub use traffic::workers_per_row;
pub use transition::{Orders, Present, Transition, transition};
