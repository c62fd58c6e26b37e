//! Digests of a model's experts: written in advance for routers, and compared with the weights.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use muster_checkpoint::Checkpoint;
use muster_checkpoint::digests::{DigestFile, Places};
use muster_checkpoint::spec::{ExpertRole, Role};
use muster_model::LoadProgress;
use muster_model::card::bytes_of;
use muster_model::digests::digests;
use muster_model::experts::{ExpertForm, ExpertSet};
use muster_types::{Compute, ExpertKey, WeightDType, WeightDigest};
use serde::Serialize;

use crate::args::CheckModelArgs;
use crate::cores::cores;
use crate::failure::Failure;
use crate::progress::Bar;
use crate::{models, out, text};

/// Most differing experts that an error names.
const NAMED: usize = 8;

/// JSON of `--json` for one digest file.
#[derive(Serialize)]
pub(super) struct Digested {
    file: PathBuf,
    compute: String,
    expert_dtype: String,
    experts: usize,
    /// Packed bytes of the experts.
    bytes: u64,
    seconds: f64,
    /// Whether the file was written now; false: it was compared.
    written: bool,
}

impl Digested {
    pub(super) fn in_words(&self) -> String {
        let Self { file, compute, expert_dtype, experts, bytes, seconds, written } = self;
        let done = if *written { "written to" } else { "as in" };
        let rate = *bytes as f64 / seconds.max(1e-9) / 1e9;
        format!(
            "{experts} experts ({compute}, {expert_dtype}), {done} {}; {} read, packed and digested in {seconds:.1} s, \
             {rate:.1} GB/s",
            file.display(),
            text::bytes(*bytes)
        )
    }
}

/// Places of this model's digest files.
fn places(args: &CheckModelArgs) -> Result<Places, Failure> {
    let source = models::source(&args.model, args.links.links())?;
    Ok(Places { file: None, model: source.directory().map(Path::to_owned), cache: models::cache() })
}

/// Writes the requested digest file.
pub(super) fn make(args: &CheckModelArgs, checkpoint: &Checkpoint) -> Result<Option<Digested>, Failure> {
    let Some(asked) = &args.digests else { return Ok(None) };
    let (compute, dtype) = (checkpoint.compute(args.compute.get()), args.expert_dtype);
    let nowhere =
        || Failure::input("--digests: the built-in model has no directory; name a file: --digests=FILE");
    let file = match asked {
        Some(file) => file.clone(),
        None => places(args)?.beside(compute, dtype).ok_or_else(nowhere)?,
    };
    let (found, mut digested) = compute_all(checkpoint, compute, dtype, file)?;
    DigestFile::new(checkpoint, compute, dtype, &found).write(&digested.file).map_err(Failure::input)?;
    digested.written = true;
    Ok(Some(digested))
}

/// Compares every existing file with the weights.
///
/// # Errors
/// When experts differ: their names, their files, and both digests.
pub(super) fn compare(args: &CheckModelArgs, checkpoint: &Checkpoint) -> Result<Vec<Digested>, Failure> {
    let places = places(args)?;
    let mut compared = Vec::new();
    for compute in [Compute::F32, Compute::Bf16, Compute::Bf16Pairs] {
        for dtype in WeightDType::ALL {
            for path in places.candidates(checkpoint, compute, dtype) {
                let kept = match DigestFile::read(&path) {
                    Ok(None) => continue,
                    Ok(Some(kept)) => kept,
                    Err(error) => {
                        out::note(&error.to_string());
                        continue;
                    }
                };
                let (found, digested) = compute_all(checkpoint, compute, dtype, path)?;
                let file = digested.file.display();
                refuse_differing(checkpoint, &found, &kept, &file.to_string())?;
                if let Some(reason) = kept.stale(checkpoint, compute, dtype) {
                    out::note(&format!(
                        "{file}: routers will not use it: {reason}; make it anew with --digests"
                    ));
                }
                compared.push(digested);
            }
        }
    }
    Ok(compared)
}

fn refuse_differing(
    checkpoint: &Checkpoint,
    found: &BTreeMap<ExpertKey, WeightDigest>,
    kept: &DigestFile,
    file: &str,
) -> Result<(), Failure> {
    let differing: Vec<String> = found
        .iter()
        .filter_map(|(&key, now)| {
            let then = kept.get(key).filter(|then| then != now)?;
            let role = Role::Expert(key.layer.get(), key.expert.get(), ExpertRole::Gate);
            let shard = checkpoint.file_of(role).unwrap_or_default();
            Some(format!("  {key} in {shard}: its digest is {now}, and was {then}"))
        })
        .collect();
    if differing.is_empty() {
        return Ok(());
    }
    let more = differing.len().saturating_sub(NAMED);
    let more = if more > 0 { format!("\n  and {more} more") } else { String::new() };
    let named = differing.iter().take(NAMED).cloned().collect::<Vec<_>>().join("\n");
    Err(Failure::input(format!(
        "the weights of {} experts are not those that {file} was made of; replace the damaged files, or, if they were \
         changed on purpose, make it anew with --digests\n{named}{more}",
        differing.len()
    )))
}

fn compute_all(
    checkpoint: &Checkpoint,
    compute: Compute,
    dtype: WeightDType,
    file: PathBuf,
) -> Result<(BTreeMap<ExpertKey, WeightDigest>, Digested), Failure> {
    let (keys, bar) = (ExpertSet::all_keys(checkpoint), Bar::single("digests"));
    let total_bytes = bytes_of(&keys, &ExpertForm::of_layers(checkpoint, compute, dtype));
    let (started, done) = (Instant::now(), AtomicU64::new(0));
    let progress = |_, bytes: usize| {
        let done_bytes = done.fetch_add(bytes as u64, Ordering::Relaxed) + bytes as u64;
        bar.update(LoadProgress { done_bytes, total_bytes });
    };
    let found = digests(checkpoint, &keys, compute, dtype, cores(), &progress).map_err(Failure::input)?;
    let seconds = started.elapsed().as_secs_f64();
    bar.finish();
    let digested = Digested {
        file,
        compute: compute.to_string(),
        expert_dtype: dtype.to_string(),
        experts: keys.len(),
        bytes: total_bytes,
        seconds,
        written: false,
    };
    Ok((found, digested))
}
