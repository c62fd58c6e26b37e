//! An opened checkpoint: the model's spec, its fingerprint, and weights on demand.
//!
//! What always holds: a [`Checkpoint`] in hand passed every check that headers allow, and [`Checkpoint::read`] returns
//! finite numbers in the promised shape or an error. Knows no family and no layout; the plan does.

use std::fmt;

use bytemuck::cast_slice_mut;
use muster_types::{DType, Fingerprint};
use sha2::{Digest, Sha256};

use crate::catalog::Catalog;
use crate::config::{Config, ConfigError};
use crate::error::CheckpointError;
use crate::families::Family;
use crate::files::{FileError, Files, Source};
use crate::inventory::Inventory;
use crate::plan::{Kind, Plan, PlanBuilder, Slice, matrix_dtype};
use crate::spec::{ModelSpec, Role};

// The format is little-endian and ranges are read straight into place.
#[cfg(not(target_endian = "little"))]
compile_error!("muster-checkpoint reads weights in place, which needs a little-endian target");

pub(crate) const CONFIG_FILE: &str = "config.json";
const GENERATION_FILE: &str = "generation_config.json";
pub(crate) const LONGEST_CONFIG: u64 = 4 << 20;
const LONGEST_SIDE_FILE: u64 = 128 << 20;

/// A verified model. Holds its files open; weights are read when asked for, by any number of threads.
pub struct Checkpoint {
    name: String,
    spec: ModelSpec,
    fingerprint: Fingerprint,
    files: Files,
    catalog: Catalog,
    plan: Plan,
}

/// One weight in memory.
#[derive(Debug, Clone, PartialEq)]
pub struct Weight {
    /// Rows of a matrix, or length of a vector.
    pub rows: usize,
    /// Columns of a matrix; 1 for a vector.
    pub cols: usize,
    /// `rows * cols` elements, row-major. Matrices come in [`ModelSpec::dtype`]; vectors (norms, biases) are always f32.
    pub data: WeightData,
}

/// Elements of a weight. All finite.
#[derive(Debug, Clone, PartialEq)]
pub enum WeightData {
    /// Single precision.
    F32(Vec<f32>),
    /// bfloat16, as its bits.
    Bf16(Vec<u16>),
}

impl WeightData {
    /// Their type.
    #[must_use]
    pub const fn dtype(&self) -> DType {
        match self {
            Self::F32(_) => DType::F32,
            Self::Bf16(_) => DType::Bf16,
        }
    }
}

/// How one weight is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stored<'a> {
    /// The tensor it is, or is a part of.
    pub tensor: &'a str,
    /// Element type on disk.
    pub dtype: DType,
    /// Rows of a matrix, or length of a vector.
    pub rows: usize,
    /// Columns of a matrix; 1 for a vector.
    pub cols: usize,
    /// Bytes on disk.
    pub bytes: u64,
}

impl Checkpoint {
    /// Opens and verifies a model: configuration, index and headers. Reads no weights.
    ///
    /// # Errors
    /// When anything about the model is damaged, contradictory or not supported; see [`CheckpointError`].
    pub fn open(source: &Source) -> Result<Self, CheckpointError> {
        let (files, name) = Files::open(source)?;
        let mut identity = Identity::new();
        let bytes = files.read_whole(CONFIG_FILE, LONGEST_CONFIG)?;
        let bytes = bytes.ok_or_else(|| FileError::Missing.of(CONFIG_FILE))?;
        identity.part("config", &bytes);
        let in_config = |problem| CheckpointError::Config { file: CONFIG_FILE, problem };
        let config = Config::parse(&bytes).map_err(in_config)?;
        let family = Family::of(&config).map_err(in_config)?;
        let catalog = Catalog::read(&files, &mut identity)?;
        let dtype = matrix_dtype(&catalog);
        let mut spec = family.spec(&config, dtype).map_err(in_config)?;
        let mut plan = PlanBuilder::new(&catalog, dtype);
        family.plan(&spec, &mut plan)?;
        let plan = plan.finish(&spec)?;
        add_generation_eos(&files, &mut spec)?;
        Ok(Self { name, spec, fingerprint: identity.finish(), files, catalog, plan })
    }

    /// What the model is called: `org/name` in a hub cache, else the directory's last component, or the embedded name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What the model is.
    #[must_use]
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// Digest of `config.json`, the index, and every shard's name, length and header.
    #[must_use]
    pub fn fingerprint(&self) -> Fingerprint {
        self.fingerprint
    }

    /// Every weight of the model, in ascending order.
    pub fn roles(&self) -> impl Iterator<Item = Role> {
        self.plan.keys().copied()
    }

    /// How a weight is stored; `None` when the model has no such weight.
    #[must_use]
    pub fn stored(&self, role: Role) -> Option<Stored<'_>> {
        let slice = self.plan.get(&role)?;
        Some(Stored {
            tensor: &self.catalog.tensors[slice.tensor].name,
            dtype: slice.dtype,
            rows: slice.rows,
            cols: slice.cols,
            bytes: slice.bytes(),
        })
    }

    /// Reads one weight: exactly its bytes, in one positioned read.
    ///
    /// # Errors
    /// When the model has no such weight, the file changed after it was opened, reading fails, or an element is NaN or
    /// infinite.
    pub fn read(&self, role: Role) -> Result<Weight, CheckpointError> {
        self.read_reusing(role, None)
    }

    /// The same, into the memory of a weight that is done with: many reads touch no new pages then.
    ///
    /// # Errors
    /// As for [`Self::read`].
    pub fn read_reusing(&self, role: Role, spare: Option<WeightData>) -> Result<Weight, CheckpointError> {
        let no_such = || CheckpointError::NoSuchRole { role, family: self.spec.family };
        let slice = self.plan.get(&role).ok_or_else(no_such)?;
        let blob = &self.catalog.shards[self.catalog.tensors[slice.tensor].shard];
        // The plan checked that the range lies in the file, so this allocates no more than the file holds.
        let elements = slice.rows * slice.cols;
        let data = match slice.dtype {
            DType::F32 => {
                let mut data = match spare {
                    Some(WeightData::F32(spare)) => spare,
                    _ => Vec::new(),
                };
                data.resize(elements, 0.0);
                blob.read_at(slice.offset, cast_slice_mut(&mut data))?;
                self.refuse_non_finite(role, slice, &data, |value| value)?;
                WeightData::F32(data)
            }
            DType::Bf16 => {
                let mut data = match spare {
                    Some(WeightData::Bf16(spare)) => spare,
                    _ => Vec::new(),
                };
                data.resize(elements, 0);
                blob.read_at(slice.offset, cast_slice_mut(&mut data))?;
                self.refuse_non_finite(role, slice, &data, widen)?;
                match slice.kind {
                    Kind::Matrix => WeightData::Bf16(data),
                    Kind::Vector => WeightData::F32(data.into_iter().map(widen).collect()),
                }
            }
        };
        Ok(Weight { rows: slice.rows, cols: slice.cols, data })
    }

    /// A file beside the weights, such as `tokenizer.json`; `None` when there is none.
    ///
    /// # Errors
    /// When `name` is not a plain file name, the file is longer than 128 MiB, or reading fails.
    pub fn side_file(&self, name: &str) -> Result<Option<Vec<u8>>, CheckpointError> {
        self.files.read_whole(name, LONGEST_SIDE_FILE)
    }

    /// The chat template for conversations with tools, where it is a file of its own:
    /// `additional_chat_templates/tool_use.jinja`.
    ///
    /// # Errors
    /// When the file is longer than 128 MiB, or reading fails.
    pub fn tool_template(&self) -> Result<Option<Vec<u8>>, CheckpointError> {
        self.files.read_nested("additional_chat_templates", "tool_use.jinja", LONGEST_SIDE_FILE)
    }

    /// How big the model and its parts are.
    #[must_use]
    pub fn inventory(&self) -> Inventory {
        Inventory::of(&self.spec, &self.plan)
    }

    fn refuse_non_finite<T: Copy>(
        &self,
        role: Role,
        slice: &Slice,
        data: &[T],
        value: impl Fn(T) -> f32,
    ) -> Result<(), CheckpointError> {
        // Blocks without an early exit inside, so that the common case is vectorised.
        const BLOCK: usize = 4096;
        let damaged =
            |block: &[T]| block.iter().fold(false, |bad, &element| bad | !value(element).is_finite());
        let Some(block) = data.chunks(BLOCK).position(damaged) else { return Ok(()) };
        let rest = data.iter().enumerate().skip(block * BLOCK);
        let Some((at, value)) = rest.map(|(at, &e)| (at, value(e))).find(|(_, v)| !v.is_finite()) else {
            return Ok(());
        };
        let tensor = &self.catalog.tensors[slice.tensor];
        Err(CheckpointError::NonFinite {
            file: self.catalog.shard_name(tensor).to_owned(),
            tensor: tensor.name.clone(),
            role,
            row: at / slice.cols,
            column: at % slice.cols,
            value,
        })
    }
}

impl fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Checkpoint")
            .field("name", &self.name)
            .field("fingerprint", &self.fingerprint)
            .finish()
    }
}

fn widen(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// Adds the end-of-text tokens of `generation_config.json`, which often has more of them than the configuration.
fn add_generation_eos(files: &Files, spec: &mut ModelSpec) -> Result<(), CheckpointError> {
    let Some(bytes) = files.read_whole(GENERATION_FILE, LONGEST_CONFIG)? else { return Ok(()) };
    let eos = |bytes: &[u8]| -> Result<Vec<u32>, ConfigError> {
        Config::parse(bytes)?.numbers("eos_token_id", spec.vocab)
    };
    let more = eos(&bytes).map_err(|problem| CheckpointError::Config { file: GENERATION_FILE, problem })?;
    for id in more {
        if !spec.eos.contains(&id) {
            spec.eos.push(id);
        }
    }
    Ok(())
}

/// The model's fingerprint in the making. Each part goes in with its label and length, so that no two different
/// sequences of parts feed the digest the same bytes.
pub(crate) struct Identity(Sha256);

impl Identity {
    fn new() -> Self {
        Self(Sha256::new_with_prefix("muster checkpoint v1\n"))
    }

    pub(crate) fn part(&mut self, label: &str, bytes: &[u8]) {
        for field in [label.as_bytes(), bytes] {
            self.0.update((field.len() as u64).to_le_bytes());
            self.0.update(field);
        }
    }

    fn finish(self) -> Fingerprint {
        Fingerprint::new(self.0.finalize().into())
    }
}
