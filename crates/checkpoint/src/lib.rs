//! Model directory to verified plan: config, index, headers, and the bytes of each expert.
//!
//! [`Checkpoint::open`] reads `config.json`, the index and the header of every shard, and checks the presence, dtype
//! and shape of every tensor against the configuration before any weight byte is touched. After that,
//! [`Checkpoint::read`] reads exactly the byte range of one weight: a worker reads its experts and nothing else.
//! [`Survey::open`] needs no weights, and a [`Preset`] no file: what they have is an [`Outline`], from which sizes follow.
//!
//! What always holds: an open checkpoint has every weight that its [`spec::ModelSpec`] implies, in the shape it
//! implies; nothing is allocated by a size that a file claims before that size was compared with the file's length;
//! code, pickles and other formats beside the weights are never opened. What this crate does not know: tensors
//! libraries, devices, wires, placement. Families are told apart in `families/` and nowhere else.
//!
//! # Tensors that the plan does not name
//! One under `model.` or `lm_head.` is refused, because a model served without it would give other output than its
//! authors meant (a bias the configuration denies, a shared expert, a layer past `num_hidden_layers`). Two kinds are
//! ignored: rotary frequency buffers (`….rotary_emb.inv_freq`), and whatever lies outside those two prefixes. A head
//! beside one that is tied is ignored where it is the embedding again, byte for byte, else refused: which of the two is meant, only its authors know. `metadata.total_size` of the index is ignored as well: each header must cover its
//! file to the byte, which is the stronger check.

mod catalog;
mod checkpoint;
mod config;
pub mod digests;
mod error;
mod families;
mod files;
mod generation;
pub mod header;
mod identity;
mod index;
mod inventory;
mod json;
mod locate;
pub mod mxfp4;
pub mod outline;
mod plan;
mod read;
pub mod spec;
mod stored;
mod survey;
mod untrusted;
mod weight;

pub use checkpoint::{Checkpoint, Shard, Stored, Unused};
pub use config::ConfigError;
pub use error::{CheckpointError, FileError};
pub use families::Preset;
pub use files::Source;
pub use generation::GenerationConfig;
pub use index::IndexError;
pub use inventory::{Inventory, LayerInventory};
pub use locate::{LocateError, locate};
pub use outline::Outline;
pub use stored::{StoredAs, StoredForms};
pub use survey::Survey;
pub use weight::{Weight, WeightData};
