//! Client and server over real sockets: the conformance kit, connecting, failing, and the protocol's rules.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking, like the tests")]

mod conformance;
mod connect;
mod control;
mod digests;
mod failover;
mod failure;
mod floods;
mod numerics;
mod server;
mod support;
