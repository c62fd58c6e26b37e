//! What the crate promises, from the outside: published layouts open and read back bit for bit, and every way a model
//! directory can be wrong ends in an error that names the file, the tensor or the key.

#![allow(clippy::unwrap_used, reason = "helpers outside test functions fail tests by panicking too")]

mod configs;
mod directories;
mod golden;
mod headers;
mod model;
mod properties;
mod tensors;
