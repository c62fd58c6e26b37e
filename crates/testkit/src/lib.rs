//! Test helpers. Nothing here is in a shipped binary.
//!
//! - [`conformance`]: what every expert dispatch must do, whatever it sends rows over;
//! - [`fake`]: experts without weights, whose outputs can be told apart and predicted;
//! - [`proxy`]: a network that delays, loses, freezes and resets, in front of any server.

pub mod conformance;
pub mod fake;
pub mod proxy;
