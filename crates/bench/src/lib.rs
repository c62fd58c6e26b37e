//! Measures a token generator: throughput and latency ([`rates`]), and pauses of streams while a cluster runs
//! ([`soak`]) or suffers faults ([`chaos`]).
//!
//! Knows a target by its interface only ([`Target`]), and prints nothing.

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
