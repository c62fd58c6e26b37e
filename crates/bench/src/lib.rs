//! Measures whoever generates tokens: how fast they come ([`rates`]), and whether and for how long streams stand still while
//! a cluster runs ([`soak`]) or is injured ([`chaos`]).
//!
//! Knows its target by what it does ([`Target`]), and prints nothing.

pub mod chaos;
mod clock;
pub mod rates;
mod scrape;
pub mod soak;
mod stats;
mod streams;
mod target;
pub mod text;

pub use clock::Clock;
pub use scrape::Metrics;
pub use streams::{Run, Streams};
pub use target::{About, BenchError, Request, Target, Tokens};
