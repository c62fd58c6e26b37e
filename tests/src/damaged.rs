//! Copies of a model on disk, and damage to an expert's weights in them.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use safetensors::SafeTensors;
use tempfile::TempDir;

/// A copy of a model's files.
///
/// # Panics
/// When it cannot be made.
#[must_use]
pub fn copy_of(model: &Path) -> TempDir {
    let to = tempfile::tempdir().expect("a temporary directory");
    for entry in std::fs::read_dir(model).expect("the model") {
        let from = entry.expect("the model").path();
        if from.is_file() {
            let name = from.file_name().expect("a name");
            std::fs::copy(&from, to.path().join(name)).expect("a copy");
        }
    }
    to
}

/// Changes the bytes of one tensor, but not the file's headers, length and modification time. Returns the file.
///
/// # Panics
/// When the model has no such tensor.
pub fn edit(model: &Path, tensor: &str, change: impl FnOnce(&mut [u8])) -> PathBuf {
    for entry in std::fs::read_dir(model).expect("the model") {
        let path = entry.expect("the model").path();
        if path.extension().is_none_or(|extension| extension != "safetensors") {
            continue;
        }
        let bytes = std::fs::read(&path).expect("a shard");
        let tensors = SafeTensors::deserialize(&bytes).expect("a valid shard");
        let Ok(view) = tensors.tensor(tensor) else { continue };
        let at = view.data().as_ptr() as usize - bytes.as_ptr() as usize;
        let mut data = view.data().to_vec();
        change(&mut data);
        let file = std::fs::File::options().write(true).open(&path).expect("a shard");
        let modified = file.metadata().and_then(|metadata| metadata.modified()).expect("a time");
        file.write_all_at(&data, at as u64).expect("it can be written");
        file.set_modified(modified).expect("a time can be set");
        return path;
    }
    panic!("{} has no {tensor}", model.display());
}

/// Makes an expert of a Mixtral in bf16 overflow for any input: its last projection gets the largest finite bf16
/// values.
///
/// # Panics
/// When the model has no such expert.
pub fn poison(model: &Path, layer: u32, expert: u32) {
    let name = format!("model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight");
    edit(model, &name, |bytes| {
        bytes.chunks_exact_mut(2).for_each(|value| value.copy_from_slice(&0x7f7f_u16.to_le_bytes()));
    });
}

/// Flips one exponent bit in the first projection of an expert of a Mixtral in bf16. Returns the file.
///
/// # Panics
/// When the model has no such expert.
pub fn flip_a_bit(model: &Path, layer: u32, expert: u32) -> PathBuf {
    let name = format!("model.layers.{layer}.block_sparse_moe.experts.{expert}.w1.weight");
    // The higher byte of the first element: seven bits of its exponent.
    edit(model, &name, |bytes| bytes[1] ^= 0x40)
}

/// Updates the modification time of a model's shards, as a write does.
///
/// # Panics
/// When there is nothing to change.
pub fn touch(model: &Path) {
    let mut touched = 0;
    for entry in std::fs::read_dir(model).expect("the model") {
        let path = entry.expect("the model").path();
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            let file = std::fs::File::options().write(true).open(&path).expect("a shard");
            file.set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(1)).expect("a time can be set");
            touched += 1;
        }
    }
    assert!(touched > 0, "{} has no shards", model.display());
}
