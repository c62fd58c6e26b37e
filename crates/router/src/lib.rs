//! The router: requests in, tokens out.
//!
//! [`service::Service`] is the whole of what an API edge needs: checked requests in, a stream of events out. Behind
//! it one engine thread owns scheduler, trunk and KV cache, and reaches experts through a dispatch. The edges
//! ([`grpc`], [`http`]) translate, and decide nothing.

mod canary;
pub mod cluster;
mod door;
mod engine;
#[cfg(test)]
mod fake;
pub mod grpc;
pub mod health;
pub mod http;
mod lanes;
pub mod model_info;
mod output;
mod pace;
mod prompt;
mod pulse;
mod queue;
pub mod request;
mod request_id;
mod resume;
pub mod serve;
pub mod service;
mod smoothed;
pub mod start;
mod text_pool;
pub mod tokenizer;
mod turns;
