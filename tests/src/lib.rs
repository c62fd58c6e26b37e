//! Harness for tests on real processes: start them, talk to them, injure them, and never leave one behind.

pub mod client;
pub mod cluster;
pub mod disturbed;
pub mod elastic;
pub mod golden;
pub mod http;
pub mod kubernetes;
pub mod liar;
pub mod load;
pub mod network;
pub mod process;
pub mod skewed;

use std::path::{Path, PathBuf};

/// The root of the workspace.
#[must_use]
pub fn workspace_root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// A model directory among the fixtures.
#[must_use]
pub fn golden_model(family: &str) -> PathBuf {
    workspace_root().join("tests/fixtures/golden").join(family)
}

/// The trained demo model.
#[must_use]
pub fn demo_model() -> PathBuf {
    workspace_root().join("models/demo")
}
