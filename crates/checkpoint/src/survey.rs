//! A model from `config.json` and the index alone, for planning before any weight is there.
//!
//! Always holds: the spec is one that this build can compute, by the same checks as when weights are opened. Does not look
//! at weights, so it cannot know whether they are whole.

use muster_types::DType;
use serde_json::Value;

use crate::checkpoint::{CONFIG_FILE, LONGEST_CONFIG};
use crate::config::{Config, ConfigError};
use crate::error::{CheckpointError, FileError};
use crate::families;
use crate::files::{Files, Source};
use crate::index::{INDEX_FILE, LONGEST_INDEX};
use crate::json::parse_object;
use crate::outline::Outline;
use crate::spec::ModelSpec;
use crate::stored::StoredAs;

/// A model whose weights need not be there.
#[derive(Debug, Clone, PartialEq)]
pub struct Survey {
    /// What it is called, as for [`crate::Checkpoint::name`].
    pub name: String,
    /// What it is. Its dtype is the one that the configuration names, else the one that the index's size tells, else bf16.
    pub spec: ModelSpec,
    /// Bytes of all tensors, as the index says.
    pub indexed_bytes: Option<u64>,
}

impl Survey {
    /// Reads the configuration, and the index if there is one.
    ///
    /// # Errors
    /// When the configuration is missing, damaged or not supported, or the index is damaged.
    pub fn open(source: &Source) -> Result<Self, CheckpointError> {
        let (files, name) = Files::open(source)?;
        let bytes = files.read_whole(CONFIG_FILE, LONGEST_CONFIG)?;
        let bytes = bytes.ok_or_else(|| FileError::Missing.of(CONFIG_FILE))?;
        let in_config = |problem| CheckpointError::Config { file: CONFIG_FILE, problem };
        let config = Config::parse(&bytes).map_err(in_config)?;
        let named = named_dtype(&config).map_err(in_config)?;
        let family = families::of(&config).map_err(in_config)?;
        let dtype = named.map_or(DType::Bf16, StoredAs::read_as);
        let mut spec = family.spec(&config, dtype).map_err(in_config)?;
        if named == Some(StoredAs::F16) {
            spec.stored = spec.stored.with_plain(StoredAs::F16);
        }
        let indexed_bytes = indexed_bytes(&files)?;
        if let (None, Some(bytes)) = (named, indexed_bytes) {
            // Three bytes a parameter lie between the two dtypes there are.
            let is_f32 = bytes / 3 > Outline::of(&spec).parameters();
            spec.dtype = if is_f32 { DType::F32 } else { DType::Bf16 };
            spec.stored = spec.stored.with_plain(StoredAs::Plain(spec.dtype));
        }
        Ok(Self { name, spec, indexed_bytes })
    }
}

/// The dtype that the configuration gives its weights; newer ones call the key `dtype`.
fn named_dtype(config: &Config) -> Result<Option<StoredAs>, ConfigError> {
    let key = if config.get("dtype").is_some() { "dtype" } else { "torch_dtype" };
    match config.get(key).and_then(Value::as_str) {
        Some("float32") => Ok(Some(StoredAs::Plain(DType::F32))),
        Some("bfloat16") => Ok(Some(StoredAs::Plain(DType::Bf16))),
        Some("float16") => Ok(Some(StoredAs::F16)),
        _ => {
            let reason = "weights must be stored as float32, bfloat16 or float16";
            config.refuse_set(key, reason).map(|()| None)
        }
    }
}

/// `metadata.total_size` of the index. Nothing depends on it but what a plan says.
fn indexed_bytes(files: &Files) -> Result<Option<u64>, CheckpointError> {
    let Some(bytes) = files.read_whole(INDEX_FILE, LONGEST_INDEX)? else { return Ok(None) };
    let index = parse_object(&bytes).map_err(|problem| CheckpointError::Config {
        file: INDEX_FILE,
        problem: ConfigError::Json(problem),
    })?;
    Ok(index.get("metadata").and_then(|metadata| metadata.get("total_size")).and_then(Value::as_u64))
}
