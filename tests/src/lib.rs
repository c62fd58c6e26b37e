//! Harness for tests on real processes: start them, talk to them, injure them, and never leave one behind.

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

/// Where golden checkpoints are; `MUSTER_GOLDEN` names others.
fn fixtures() -> PathBuf {
    let own = || workspace_root().join("tests/fixtures/golden");
    std::env::var_os("MUSTER_GOLDEN").map_or_else(own, PathBuf::from)
}

/// One of them.
#[must_use]
pub fn golden_model(family: &str) -> PathBuf {
    fixtures().join(family)
}

/// All of them: directories, each a checkpoint with what transformers computes of it.
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
