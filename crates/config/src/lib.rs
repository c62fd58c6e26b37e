//! File, environment and flags to one validated value.
//!
//! A setting is declared once (`declare::settings!`): its name, form, default, check and help, from which the command
//! line and the tables of docs/configuration.md are made. Every layer gives texts for some of them, the later layer
//! wins (file, then environment, then flags), and the winning text is parsed once. All problems are reported at once,
//! each with the place it comes from, and nothing is opened or bound before all settings are valid. Unknown keys are
//! refused everywhere.
//!
//! The one place of the program that reads `MUSTER_…` variables. Does not know the effect of settings.
//!
//! There is no general configuration library behind this: those that merge layers stop at the first bad value and
//! do not know the line it stands on.

mod declare;
mod edge;
mod entry;
mod environment;
mod file;
mod group;
mod layers;
mod problem;
mod role;
mod router;
mod shared;
mod value;
mod worker;

pub use edge::EdgeSettings;
pub use environment::Environment;
pub use group::{DefaultTo, Group, Key, Role};
pub use layers::{Flags, Loaded, Sources};
pub use problem::{ConfigError, Origin, Problem};
pub use role::RoleSettings;
pub use router::{AccessMode, AccessSettings, Fallback, GenerationMode, PlacementMode, RouterSettings};
pub use shared::{ComputeSettings, LOGGING, LogSettings, TlsSettings};
pub use value::{parse_duration, parse_replicas, parse_size, parse_socket, parse_weight_dtype};
pub use worker::WorkerSettings;

const ROLES: [&Role; 2] = [&router::ROLE, &worker::ROLE];
