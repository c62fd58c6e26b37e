//! `muster logits`: a model's logits and gate choices in a file, for comparison with other implementations.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::path::Path;

use bytemuck::cast_slice;
use muster_checkpoint::Checkpoint;
use muster_model::evaluate::{EvaluateError, evaluate};
use muster_model::reference::{LayerChoices, Reference};
use safetensors::tensor::{Dtype, TensorView};

use super::target::{Own, with_model};
use super::{blocking, token_file};
use crate::args::{LogArgs, LogitsArgs};
use crate::engine::Loaded;
use crate::failure::Failure;
use crate::signals::Signals;
use crate::{models, out};

/// Results of a computation.
struct Outcome {
    vocab: usize,
    logits: Vec<f32>,
    choices: Vec<(u32, LayerChoices)>,
}

pub(crate) async fn run(args: &LogitsArgs, log: &LogArgs) -> Result<(), Failure> {
    let tokens = token_file::one(&args.tokens)?;
    let mut signals = Signals::listen()?;
    let links = args.links.links();
    let outcome = if args.reference {
        let checkpoint = models::open(&args.model, links)?;
        signals.unless(blocking(move || reference(&checkpoint, &tokens))).await?
    } else {
        let own = Own { model: &args.model, links, workers: args.workers, compute: args.compute, log };
        let chunk = args.chunk;
        with_model(&own, &mut signals, async |loaded| {
            blocking(move || computed(loaded, &tokens, chunk)).await
        })
        .await?
    };
    let vocab = outcome.vocab;
    write(&args.out, &outcome)?;
    let tokens = outcome.logits.len() / vocab;
    out::note(&format!(
        "{}: logits [{tokens}, {vocab}] and {} gates",
        args.out.display(),
        outcome.choices.len()
    ));
    Ok(())
}

fn computed(mut loaded: Loaded, tokens: &[u32], chunk: NonZeroUsize) -> Result<Outcome, Failure> {
    let outcome = evaluate(&loaded.trunk, loaded.dispatch.as_mut(), tokens, chunk);
    loaded.dispatch.close();
    let outcome = outcome.map_err(failure)?;
    let vocab = loaded.trunk.spec().vocab as usize;
    Ok(Outcome { vocab, logits: outcome.logits, choices: outcome.choices })
}

fn reference(checkpoint: &Checkpoint, tokens: &[u32]) -> Result<Outcome, Failure> {
    let outcome = Reference::new(checkpoint).forward(tokens).map_err(Failure::input)?;
    let vocab = checkpoint.spec().vocab as usize;
    Ok(Outcome { vocab, logits: outcome.logits, choices: outcome.choices })
}

/// Invalid tokens are bad input; a failed step is a runtime failure.
pub(crate) fn failure(error: EvaluateError) -> Failure {
    match error {
        EvaluateError::Model(error) => Failure::input(error),
        EvaluateError::Step(error) => Failure::runtime(error),
    }
}

fn write(path: &Path, outcome: &Outcome) -> Result<(), Failure> {
    let mut experts: BTreeMap<String, (Vec<usize>, Vec<i64>)> = BTreeMap::new();
    let mut weights: BTreeMap<String, (Vec<usize>, Vec<f32>)> = BTreeMap::new();
    for (layer, choices) in &outcome.choices {
        let shape = vec![choices.len(), choices.first().map_or(0, Vec::len)];
        let ids = choices.iter().flatten().map(|(id, _)| i64::from(*id)).collect();
        let values = choices.iter().flatten().map(|(_, weight)| *weight).collect();
        experts.insert(format!("layer.{layer}.experts"), (shape.clone(), ids));
        weights.insert(format!("layer.{layer}.weights"), (shape, values));
    }
    let logits = vec![outcome.logits.len() / outcome.vocab, outcome.vocab];
    let mut views = vec![("logits".to_owned(), view(Dtype::F32, &logits, cast_slice(&outcome.logits))?)];
    for (name, (shape, values)) in &experts {
        views.push((name.clone(), view(Dtype::I64, shape, cast_slice(values))?));
    }
    for (name, (shape, values)) in &weights {
        views.push((name.clone(), view(Dtype::F32, shape, cast_slice(values))?));
    }
    safetensors::serialize_to_file(views, None, path)
        .map_err(|error| Failure::input(format!("--out: cannot write {}: {error}", path.display())))
}

fn view<'a>(dtype: Dtype, shape: &[usize], bytes: &'a [u8]) -> Result<TensorView<'a>, Failure> {
    TensorView::new(dtype, shape.to_vec(), bytes).map_err(Failure::runtime)
}
