//! Behaviour of the whole product, on real processes. One module per behaviour.

#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a test that cannot go on has failed")]

mod alerts;
mod architecture;
mod chaos;
mod command_line;
mod concurrency;
mod conformance;
mod determinism;
mod discovery;
mod documented;
mod faults;
mod grpc_api;
mod http_api;
mod main_job;
mod model_defaults;
mod model_input;
mod numerics;
mod operations;
mod published_tokenizers;
mod python_clients;
mod resume;
mod security;
mod specification;
mod up;
mod weights;
