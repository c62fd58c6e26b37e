//! A model whose first layer routes every token to one of its experts.

use std::path::Path;

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use tempfile::TempDir;

use crate::golden_model;

/// The expert that every token is routed to.
pub const HOT: usize = 7;

/// In layer 0 every token chooses expert [`HOT`] and one other that depends on the token: with two experts per token,
/// `HOT` gets half of all rows. Built from the golden Mixtral, with one direction of the hidden space that is constant
/// and that the gate responds to.
///
/// # Panics
/// When the fixture is not as expected.
#[must_use]
pub fn skewed_model() -> TempDir {
    let to = tempfile::tempdir().expect("a temporary directory");
    for entry in std::fs::read_dir(golden_model("mixtral")).expect("the fixture") {
        let from = entry.expect("the fixture").path();
        let name = from.file_name().expect("a name");
        match name.to_str() {
            Some(shard) if shard.starts_with("model-") => skew(&from, &to.path().join(name)),
            _ => drop(std::fs::copy(&from, to.path().join(name)).expect("a copy")),
        }
    }
    to
}

fn skew(from: &Path, to: &Path) {
    let bytes = std::fs::read(from).expect("a file of the fixture");
    let tensors = SafeTensors::deserialize(&bytes).expect("a valid file").tensors();
    let changed: Vec<(String, Vec<usize>, Vec<u8>)> = tensors
        .into_iter()
        .map(|(name, tensor)| {
            assert_eq!(tensor.dtype(), Dtype::F32);
            let shape = tensor.shape().to_vec();
            let mut values: Vec<f32> =
                tensor.data().as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
            let width = shape.last().copied().unwrap_or(1);
            match name.as_str() {
                "model.embed_tokens.weight" => {
                    values.iter_mut().step_by(width).for_each(|first| *first = 1.0);
                }
                "model.layers.0.post_attention_layernorm.weight" => values[0] = 1.0,
                "model.layers.0.block_sparse_moe.gate.weight" => {
                    values.iter_mut().step_by(width).for_each(|first| *first = 0.0);
                    let hot = HOT * width;
                    values[hot..hot + width].fill(0.0);
                    values[hot] = 100.0;
                }
                _ => {}
            }
            (name, shape, values.iter().flat_map(|value| value.to_le_bytes()).collect())
        })
        .collect();
    let views = changed.iter().map(|(name, shape, bytes)| {
        (name, TensorView::new(Dtype::F32, shape.clone(), bytes).expect("as many bytes as before"))
    });
    safetensors::serialize_to_file(views, None, to).expect("a file can be written");
}
