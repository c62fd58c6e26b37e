//! The error of this crate, and why one file cannot be used. Every message is one line that names the file, the tensor or
//! key, and what to do; text that came out of a file is clipped first.

use std::io;
use std::path::PathBuf;

use crate::config::ConfigError;
use crate::header::HeaderError;
use crate::index::{INDEX_FILE, IndexError};
use crate::spec::Role;
use crate::untrusted::clip;

/// Why a model directory is not one that can be served.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The directory itself is missing, unreadable or not a directory.
    #[error("model directory {}: {reason}", .path.display())]
    Directory {
        /// The directory as it was given.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// One of its files cannot be used.
    #[error("{file}: {problem}")]
    File {
        /// Name inside the model directory.
        file: String,
        /// What is wrong with it.
        problem: FileError,
    },
    /// `config.json` or `generation_config.json` is damaged, or asks for something this build cannot compute.
    #[error("{file}: {problem}")]
    Config {
        /// Which of the two.
        file: &'static str,
        /// What is wrong with it.
        problem: ConfigError,
    },
    /// The index is damaged or disagrees with the shards.
    #[error("{INDEX_FILE}: {0}")]
    Index(IndexError),
    /// A shard's header is damaged or does not describe its file.
    #[error("{file}: {problem}")]
    Header {
        /// The shard.
        file: String,
        /// What is wrong with it.
        problem: HeaderError,
    },
    /// There are no weights in a format that is read.
    #[error(
        "no weights: neither model.safetensors nor {INDEX_FILE} is there; only safetensors are read, so convert \
         pickles (.bin) and GGUF files first"
    )]
    NoWeights,
    /// A tensor that the configuration implies is in no shard.
    #[error(
        "no shard has tensor `{tensor}` ({role}), which config.json implies; the download may be incomplete"
    )]
    MissingTensor {
        /// Its name.
        tensor: String,
        /// What it would be.
        role: Role,
    },
    /// A tensor that the configuration does not imply.
    #[error(
        "{file}: tensor `{tensor}` is no part of a {family} model as config.json describes it; serving without it \
         would give wrong output, so correct config.json or remove the tensor"
    )]
    UnplannedTensor {
        /// The shard.
        file: String,
        /// The tensor.
        tensor: String,
        /// `model_type` of the configuration.
        family: &'static str,
    },
    /// A tensor of an expert that the configuration does not count.
    #[error(
        "{file}: tensor `{tensor}` is of expert {expert}, but by config.json layer {layer} has {experts} experts; \
         correct their number there, or remove the tensor"
    )]
    ForeignExpert {
        /// The shard.
        file: String,
        /// The tensor.
        tensor: String,
        /// Its layer.
        layer: u32,
        /// The number of its expert, from 0.
        expert: u32,
        /// Experts of the layer by the configuration.
        experts: u32,
    },
    /// A head beside a head that is the embedding, and not the same.
    #[error(
        "{file}: tensor `{tensor}` is there, and is not the embedding again, although `tie_word_embeddings` makes the \
         embedding the head; set that to false in config.json to use the tensor, or remove the tensor"
    )]
    TwoHeads {
        /// The shard.
        file: String,
        /// The tensor.
        tensor: String,
    },
    /// A tensor of the wrong shape.
    #[error("{file}: tensor `{tensor}` ({role}) is {found:?}, config.json says {expected:?}")]
    Shape {
        /// The shard.
        file: String,
        /// The tensor.
        tensor: String,
        /// What it is.
        role: Role,
        /// Its shape in the header.
        found: Vec<usize>,
        /// Its shape by the configuration.
        expected: Vec<usize>,
    },
    /// A tensor of a dtype that is not read.
    #[error(
        "{file}: tensor `{tensor}` ({role}) is {found}; this build reads F32, BF16 and F16, \
         F8_E4M3 with blocks of 128 by 128 where `quantization_config` says so, and gpt_oss in MXFP4; convert the checkpoint"
    )]
    UnsupportedDtype {
        /// The shard.
        file: String,
        /// The tensor.
        tensor: String,
        /// What it is.
        role: Role,
        /// Its dtype in the header.
        found: &'static str,
    },
    /// Linear weights of more than one dtype, or experts of a layer that are stored in different ways.
    #[error(
        "{file}: tensor `{tensor}` ({role}) is {found}, but other weights of its kind are not; all must share one dtype"
    )]
    MixedDtype {
        /// The shard.
        file: String,
        /// The tensor.
        tensor: String,
        /// What it is.
        role: Role,
        /// Its dtype in the header.
        found: &'static str,
    },
    /// A file is not the one that was verified.
    #[error("{file}: changed after it was opened ({was} bytes then, {now} now); restore it and restart")]
    Changed {
        /// The shard.
        file: String,
        /// Its length when opened.
        was: u64,
        /// Its length now.
        now: u64,
    },
    /// A weight that is NaN or infinite.
    #[error(
        "{file}: tensor `{tensor}` ({role}) is {value} at row {row}, column {column}; the checkpoint is damaged"
    )]
    NonFinite {
        /// The shard.
        file: String,
        /// The tensor.
        tensor: String,
        /// What it is.
        role: Role,
        /// Row within the role.
        row: usize,
        /// Column within the role.
        column: usize,
        /// The value.
        value: f32,
    },
    /// A weight that the model does not have.
    #[error("this {family} model has no {role}")]
    NoSuchRole {
        /// What was asked for.
        role: Role,
        /// `model_type` of the configuration.
        family: &'static str,
    },
}

/// Why one file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// It is not there.
    #[error("not found in the model directory")]
    Missing,
    /// A link whose target is gone.
    #[error("is a link to nothing; the download may be incomplete")]
    Dangling,
    /// A directory, pipe or device.
    #[error("is not a regular file")]
    NotRegular,
    /// A link that leaves the directory.
    #[error(
        "is a link that leads out of the model directory; put the file itself there, or trust such links with --allow-links"
    )]
    Outside,
    /// Longer than such a file may be.
    #[error("is {length} bytes long; at most {cap} are read")]
    TooLong {
        /// Its length.
        length: u64,
        /// The cap.
        cap: u64,
    },
    /// Not a name of a file in the directory itself.
    #[error(
        "is not the plain name of a file (letters, digits and . _ - at most 200, not beginning with a dot)"
    )]
    Name,
    /// The operating system refused.
    #[error("{0}")]
    Io(io::Error),
}

impl FileError {
    pub(crate) fn of(self, file: &str) -> CheckpointError {
        CheckpointError::File { file: clip(file), problem: self }
    }
}
