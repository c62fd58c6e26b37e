//! Model directories that differ from others in the bytes of one tensor.

use std::path::Path;

use tempfile::TempDir;

/// A copy of the model in `directory`, with `change` applied to the bytes of one tensor.
///
/// # Panics
/// When the model cannot be copied, or has no such tensor.
#[must_use]
pub fn with_tensor(directory: &Path, tensor: &str, change: impl FnOnce(&mut [u8])) -> TempDir {
    let copy = tempfile::tempdir().expect("a directory for the copy");
    let mut change = Some(change);
    for entry in std::fs::read_dir(directory).expect("the model is there") {
        let path = entry.expect("it can be listed").path();
        let to = copy.path().join(path.file_name().expect("it has a name"));
        if path.extension().is_none_or(|kind| kind != "safetensors") {
            std::fs::copy(&path, to).expect("it can be copied");
            continue;
        }
        let mut bytes = std::fs::read(&path).expect("it can be read");
        let header = 8 + u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes")) as usize;
        let json: serde_json::Value = serde_json::from_slice(&bytes[8..header]).expect("a header");
        if let Some(offsets) = json[tensor]["data_offsets"].as_array() {
            let [start, end] = [0, 1].map(|at| offsets[at].as_u64().expect("an offset") as usize);
            let change = change.take().expect("a tensor is in one file");
            change(&mut bytes[header + start..header + end]);
        }
        std::fs::write(to, bytes).expect("it can be written");
    }
    assert!(change.is_none(), "{} has no tensor {tensor}", directory.display());
    copy
}
