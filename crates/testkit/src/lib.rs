//! Test helpers. Nothing here is in a shipped binary.
//!
//! - [`conformance`]: what every expert dispatch must do, whatever it sends rows over;
//! - [`fake`]: experts without weights, whose outputs can be told apart and predicted;
//! - [`flood`]: a peer that sends HTTP/2 frames for nothing;
//! - [`proxy`]: a network that delays, loses, freezes and resets, in front of any server.

pub mod conformance;
pub mod fake;
pub mod flood;
pub mod proxy;
