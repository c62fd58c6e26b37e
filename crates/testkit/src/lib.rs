//! Test helpers. No shipped binary contains them.
//!
//! - [`conformance`]: the contract of every expert dispatch, on any transport;
//! - [`fake`]: experts without weights, whose outputs can be told apart and predicted;
//! - [`flood`]: a peer that floods a server with HTTP/2 frames;
//! - [`proxy`]: a network that delays, loses, freezes and resets, in front of any server.

pub mod conformance;
pub mod fake;
pub mod flood;
pub mod proxy;
