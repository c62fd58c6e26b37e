//! `model.safetensors.index.json`: which shard has which tensor. Without one, `model.safetensors` is the only shard.
//!
//! What always holds of a parsed index: shard names are plain names that end in `.safetensors`, no two differ in case
//! alone, and no tensor is listed twice. Whether the shards agree is the catalog's business.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use crate::json::parse_object;
use crate::untrusted::{clip, is_plain};

/// Name of the index.
pub(crate) const INDEX_FILE: &str = "model.safetensors.index.json";
/// Name of the only shard where there is no index.
pub(crate) const SINGLE_FILE: &str = "model.safetensors";
/// Longest index that is read, bytes.
pub(crate) const LONGEST_INDEX: u64 = 128 << 20;
const MOST_SHARDS: usize = 4096;

/// Why an index is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IndexError {
    /// Not the JSON it should be.
    #[error("{0}")]
    Json(String),
    /// A shard name that is not one.
    #[error("tensor `{tensor}` is in {shard}, which is not the plain name of a .safetensors file")]
    ShardName {
        /// The tensor.
        tensor: String,
        /// The name.
        shard: String,
    },
    /// Two shards that one file system tells apart and another does not.
    #[error("shards {0} and {1} differ in case alone")]
    CaseClash(String, String),
    /// More shards than one checkpoint has.
    #[error("lists {0} shards; at most {MOST_SHARDS} are read")]
    TooManyShards(usize),
    /// A listed shard is not there.
    #[error("shard {0} is listed but not in the model directory; the download may be incomplete")]
    MissingShard(String),
    /// A listed tensor is not where the index says.
    #[error("tensor `{tensor}` is listed in {shard}, but that file does not have it")]
    Absent {
        /// The tensor.
        tensor: String,
        /// Where it should be.
        shard: String,
    },
    /// A tensor of a shard is not listed there.
    #[error("{shard} has tensor `{tensor}`, which is not listed there; the file may belong to another model")]
    Unlisted {
        /// The tensor.
        tensor: String,
        /// Where it is.
        shard: String,
    },
    /// A tensor that two shards have.
    #[error("tensor `{tensor}` is in both {first} and {second}")]
    TwoShards {
        /// The tensor.
        tensor: String,
        /// One shard.
        first: String,
        /// The other.
        second: String,
    },
}

/// Tensor name to shard name.
pub(crate) type WeightMap = BTreeMap<String, String>;

/// Parses the index.
pub(crate) fn parse(bytes: &[u8]) -> Result<WeightMap, IndexError> {
    let mut root = parse_object(bytes).map_err(IndexError::Json)?;
    let Some(Value::Object(listed)) = root.remove("weight_map") else {
        return Err(IndexError::Json(
            "`weight_map` must be an object that maps tensors to shards".to_owned(),
        ));
    };
    let mut weight_map = WeightMap::new();
    for (tensor, shard) in listed {
        match shard {
            Value::String(shard) if is_plain(&shard) && shard.ends_with(".safetensors") => {
                weight_map.insert(tensor, shard);
            }
            other => {
                let (tensor, shard) = (clip(&tensor), clip(&other.to_string()));
                return Err(IndexError::ShardName { tensor, shard });
            }
        }
    }
    if weight_map.is_empty() {
        return Err(IndexError::Json("`weight_map` is empty".to_owned()));
    }
    Ok(weight_map)
}

/// The shards of an index, in ascending order.
pub(crate) fn shards(weight_map: &WeightMap) -> Result<BTreeSet<String>, IndexError> {
    let shards: BTreeSet<String> = weight_map.values().cloned().collect();
    if shards.len() > MOST_SHARDS {
        return Err(IndexError::TooManyShards(shards.len()));
    }
    let mut folded = BTreeMap::new();
    for shard in &shards {
        if let Some(other) = folded.insert(shard.to_ascii_lowercase(), shard) {
            return Err(IndexError::CaseClash(other.clone(), shard.clone()));
        }
    }
    Ok(shards)
}
