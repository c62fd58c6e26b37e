//! Reference outputs beside the fixture models.

use std::path::Path;

use safetensors::SafeTensors;
use serde_json::Value;

use crate::process::run;

/// Tensors and facts of one fixture directory, or of a file that `muster logits` wrote.
pub struct Tensors {
    bytes: Vec<u8>,
}

impl Tensors {
    /// Reads a safetensors file.
    ///
    /// # Panics
    /// When it cannot.
    #[must_use]
    pub fn read(path: &Path) -> Self {
        Self { bytes: std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display())) }
    }

    fn data(&self, name: &str) -> Vec<u8> {
        let tensors = SafeTensors::deserialize(&self.bytes).expect("a valid file");
        tensors.tensor(name).unwrap_or_else(|error| panic!("{name}: {error}")).data().to_vec()
    }

    /// An f32 tensor.
    #[must_use]
    pub fn f32s(&self, name: &str) -> Vec<f32> {
        self.data(name).as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
    }

    /// An i64 tensor.
    #[must_use]
    pub fn i64s(&self, name: &str) -> Vec<i64> {
        self.data(name).as_chunks().0.iter().map(|bytes| i64::from_le_bytes(*bytes)).collect()
    }

    /// An i64 tensor of token ids.
    ///
    /// # Panics
    /// When a value is no token id.
    #[must_use]
    pub fn ids(&self, name: &str) -> Vec<u32> {
        self.i64s(name).into_iter().map(|id| u32::try_from(id).expect("an id")).collect()
    }
}

/// A JSON file.
///
/// # Panics
/// When it cannot be read.
#[must_use]
pub fn json(path: &Path) -> Value {
    let bytes = std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_slice(&bytes).expect("valid JSON")
}

/// Ids of a JSON array.
///
/// # Panics
/// When it holds anything else.
#[must_use]
pub fn ids(value: &Value) -> Vec<u32> {
    let list = value.as_array().expect("an array").iter();
    list.map(|id| u32::try_from(id.as_u64().expect("an id")).expect("an id")).collect()
}

/// Largest absolute difference; NaN when anything is NaN.
///
/// # Panics
/// When the lengths differ.
#[must_use]
pub fn farthest(ours: &[f32], theirs: &[f32]) -> f32 {
    assert_eq!(ours.len(), theirs.len());
    let differences = ours.iter().zip(theirs).map(|(a, b)| (a - b).abs());
    differences.fold(0.0, |worst: f32, d| if d > worst || d.is_nan() { d } else { worst })
}

/// Output of `muster logits` for these tokens.
///
/// # Panics
/// When the command fails.
#[must_use]
pub fn logits(model: &Path, tokens: &[u32], extra: &[&str]) -> Tensors {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let list = directory.path().join("tokens.json");
    let out = directory.path().join("out.safetensors");
    std::fs::write(&list, format!("{tokens:?}")).expect("a file can be written");
    let paths = [model, &list, &out].map(|path| path.display().to_string());
    let mut args = vec!["logits", "--model", &paths[0], "--tokens", &paths[1], "--out", &paths[2]];
    args.extend(extra);
    let output = run(&args);
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    Tensors::read(&out)
}
