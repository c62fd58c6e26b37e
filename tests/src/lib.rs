//! Harness for tests on real processes: starts them, sends requests, injects faults, and never leaves one behind.

pub mod client;
pub mod cluster;
pub mod damaged;
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

/// Directory of the golden checkpoints; `MUSTER_GOLDEN` overrides it.
fn fixtures() -> PathBuf {
    let own = || workspace_root().join("tests/fixtures/golden");
    std::env::var_os("MUSTER_GOLDEN").map_or_else(own, PathBuf::from)
}

/// One golden checkpoint.
#[must_use]
pub fn golden_model(family: &str) -> PathBuf {
    fixtures().join(family)
}

/// All golden checkpoints: directories with a model and the outputs of transformers.
///
/// # Panics
/// When there are none.
#[must_use]
pub fn families() -> Vec<String> {
    let entries = std::fs::read_dir(fixtures()).expect("golden checkpoints can be listed");
    let names = entries.map(|entry| entry.expect("they can be listed to the end").file_name());
    let mut names: Vec<String> = names.map(|name| name.to_string_lossy().into_owned()).collect();
    names.sort();
    assert!(!names.is_empty(), "{} is empty", fixtures().display());
    names
}

/// The trained demo model.
#[must_use]
pub fn demo_model() -> PathBuf {
    workspace_root().join("models/demo")
}
