//! What a router decides between two passes of the model. Pure: no clock, no I/O, no threads, no tensors.
//!
//! - [`scheduler`]: which sequences run in a step and where their keys and values lie;
//! - [`reach`]: which past positions layers see, and so which of them share KV blocks;
//! - [`microbatch`]: which of the two lanes each of them travels in;
//! - [`batcher`]: which rows go to which worker at one layer;
//! - [`dispatch`]: the seam through which they go there and come back;
//! - [`delivery`]: the life of a shard between the two, over any transport;
//! - [`compute`]: the seam to the experts where they arrive.
//!
//! The same calls in the same order give the same answers, so a run can be replayed and simulated.

pub mod batcher;
pub mod compute;
pub mod delivery;
pub mod dispatch;
mod kv;
pub mod microbatch;
mod prefix;
pub mod reach;
mod rows;
pub mod scheduler;
mod sequence;
mod spread;
pub mod step;
mod table;

pub use batcher::{BatchPlan, ShardPlan, Slot};
pub use scheduler::{
    AdmitError, ConfigError, NewSequence, PrefixCache, Progress, Scheduler, SchedulerConfig, Stats,
    UnknownSequence,
};
pub use step::{NO_BLOCK, Step, StepItem};
