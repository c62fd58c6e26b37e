//! An opened checkpoint: the model's spec, its fingerprint, and weights on demand.
//!
//! What always holds: a [`Checkpoint`] in hand passed every check that headers allow, and [`Checkpoint::read`] returns
//! finite numbers in the promised shape or an error. Knows no family and no layout; the plan does.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::SystemTime;

use muster_types::{Compute, DType, Fingerprint};

use crate::catalog::Catalog;
use crate::config::{Config, ConfigError};
use crate::error::{CheckpointError, FileError};
use crate::families;
use crate::files::{Files, Source};
use crate::generation::{GENERATION_FILE, GenerationConfig};
use crate::identity::Identity;
use crate::inventory::Inventory;
use crate::plan::{Plain, Plan, PlanBuilder, Slice, plain_dtype};
use crate::read::{ReadError, read};
use crate::spec::{ExpertRole, ModelSpec, Role};
use crate::stored::StoredAs;
use crate::untrusted::clip;
use crate::weight::{Weight, WeightData};

// The format is little-endian and ranges are read straight into place.
#[cfg(not(target_endian = "little"))]
compile_error!("muster-checkpoint reads weights in place, which needs a little-endian target");

pub(crate) const CONFIG_FILE: &str = "config.json";
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

/// How one weight is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stored<'a> {
    /// The tensor it is, or is a part of.
    pub tensor: &'a str,
    /// In what form.
    pub form: StoredAs,
    /// Rows of a matrix, or length of a vector.
    pub rows: usize,
    /// Columns of a matrix; 1 for a vector.
    pub cols: usize,
    /// Bytes on disk, scales included.
    pub bytes: u64,
}

/// One file of weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shard<'a> {
    /// Its plain name.
    pub name: &'a str,
    /// Bytes.
    pub length: u64,
    /// When it was changed last; `None` where that is not known, as of what is built into the program.
    pub modified: Option<SystemTime>,
}

/// Tensors that nothing needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unused {
    /// What their names begin with.
    pub prefix: String,
    /// How many there are.
    pub tensors: usize,
    /// Bytes of all of them.
    pub bytes: u64,
}

impl Checkpoint {
    /// Opens and verifies a model: configuration, index and headers. Reads no weights, but for a head that is stored although
    /// it is tied, which has to be the embedding again.
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
        let family = families::of(&config).map_err(in_config)?;
        let catalog = Catalog::read(&files, &mut identity)?;
        let plain = plain_dtype(&catalog, family.prefix());
        let dtype = if plain == Plain::Bf16 { DType::Bf16 } else { DType::F32 };
        let mut spec = family.spec(&config, dtype).map_err(in_config)?;
        let mut plan = PlanBuilder::new(&catalog, family.prefix(), plain, &spec.stored);
        family.plan(&spec, &mut plan)?;
        let plan = plan.finish(&spec)?;
        settle_forms(&mut spec, plain, &plan);
        add_generation_eos(&files, &mut spec)?;
        Ok(Self { name, spec, fingerprint: identity.finish(), files, catalog, plan })
    }

    /// What the model is called: `org/name` in a hub cache, else the directory's last component, or the embedded name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What activations are rounded to: what is asked for, else what its dtype calls for.
    #[must_use]
    pub fn compute(&self, asked: Option<Compute>) -> Compute {
        asked.unwrap_or(Compute::default_for(self.spec().dtype))
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
            form: slice.stored_as(),
            rows: slice.rows,
            cols: slice.cols,
            bytes: slice.bytes(),
        })
    }

    /// The name of the file that a weight lies in; `None` when the model has no such weight.
    #[must_use]
    pub fn file_of(&self, role: Role) -> Option<&str> {
        let slice = self.plan.get(&role)?;
        Some(self.catalog.shard_name(&self.catalog.tensors[slice.tensor]))
    }

    /// The files that weights lie in, as they were when they were opened.
    pub fn shards(&self) -> impl Iterator<Item = Shard<'_>> {
        let shards = self.catalog.shards.iter();
        shards.map(|blob| Shard { name: &blob.name, length: blob.length, modified: blob.modified() })
    }

    /// Reads one weight: exactly its bytes, in one positioned read, or the stretch that they are strewn over.
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
        let data = read(&self.catalog, slice, spare).map_err(|error| match error {
            ReadError::File(error) => error,
            ReadError::NonFinite { at, value } => {
                let tensor = &self.catalog.tensors[slice.tensor];
                CheckpointError::NonFinite {
                    file: self.catalog.shard_name(tensor).to_owned(),
                    tensor: tensor.name.clone(),
                    role,
                    row: at / slice.cols,
                    column: at % slice.cols,
                    value,
                }
            }
        })?;
        Ok(Weight { rows: slice.rows, cols: slice.cols, data })
    }

    /// A file beside the weights, such as `tokenizer.json`; `None` when there is none.
    ///
    /// # Errors
    /// When `name` is not a plain file name, the file is longer than 128 MiB, or reading fails.
    pub fn side_file(&self, name: &str) -> Result<Option<Vec<u8>>, CheckpointError> {
        self.files.read_whole(name, LONGEST_SIDE_FILE)
    }

    /// What `generation_config.json` says of sampling; nothing where there is no such file.
    ///
    /// # Errors
    /// When the file is damaged, a field has the wrong type, or reading fails.
    pub fn generation_config(&self) -> Result<GenerationConfig, CheckpointError> {
        let Some(bytes) = self.files.read_whole(GENERATION_FILE, LONGEST_CONFIG)? else {
            return Ok(GenerationConfig::default());
        };
        let in_file = |problem| CheckpointError::Config { file: GENERATION_FILE, problem };
        GenerationConfig::parse(&bytes).map_err(in_file)
    }

    /// Tensors that no weight lies in, by what their names begin with: those that predict more tokens ahead, or look at
    /// images.
    #[must_use]
    pub fn unused(&self) -> Vec<Unused> {
        let used: BTreeSet<usize> = self.plan.values().flat_map(Slice::tensors).collect();
        let mut found: BTreeMap<String, Unused> = BTreeMap::new();
        let left = self.catalog.tensors.iter().enumerate().filter(|(at, _)| !used.contains(at));
        for (_, tensor) in left {
            let known = self.spec.unused.iter().find(|prefix| tensor.name.starts_with(*prefix));
            let first = || tensor.name.split_inclusive('.').next().unwrap_or_default();
            let prefix = clip(known.map_or_else(first, String::as_str));
            let entry = found.entry(prefix.clone()).or_insert(Unused { prefix, tensors: 0, bytes: 0 });
            entry.tensors += 1;
            entry.bytes += tensor.bytes();
        }
        found.into_values().collect()
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
}

impl fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Checkpoint")
            .field("name", &self.name)
            .field("fingerprint", &self.fingerprint)
            .finish()
    }
}

/// What weights are stored as is for the files to say, where they are there.
fn settle_forms(spec: &mut ModelSpec, plain: Plain, plan: &Plan) {
    spec.stored = spec.stored.with_plain(plain.stored_as());
    let first = spec.moe_layers().next().map(|(layer, _)| Role::Expert(layer, 0, ExpertRole::Gate));
    if let Some(slice) = first.and_then(|role| plan.get(&role)) {
        spec.stored.experts = slice.stored_as();
    }
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
