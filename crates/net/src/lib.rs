//! Listening sockets of every process, and what their peers may cost: places, time and frames.
//!
//! Owns the backlog ([`listen`]), the accept loop and the patience with one peer ([`Acceptor`], [`Socket`]), the budget of
//! HTTP/2's control frames ([`Meter`]), the rule on `Host` ([`host`]) and the detection of other protocols where gRPC was
//! expected ([`mismatch`]). Always holds: no error of `accept` ends a listener, a connection holds one of a fixed number of
//! places, and a peer that makes no progress loses it. Knows nothing of TLS, requests or access.

mod accept;
mod found;
mod frames;
pub mod host;
pub mod listen;

pub use accept::{Acceptor, Listener, Patience, Socket};
pub use found::{Asked, Found, Mismatch, look, mismatch};
pub use frames::{Flood, Meter, Opening};
