//! `muster logits`: what a model computes, in a file that any other implementation can be compared with.

use std::collections::BTreeMap;
use std::num::{NonZeroU32, NonZeroUsize};
use std::path::Path;
use std::sync::Arc;

use bytemuck::cast_slice;
use muster_checkpoint::Checkpoint;
use muster_model::evaluate::{EvaluateError, evaluate};
use muster_model::reference::{LayerChoices, Reference};
use muster_router::serve::expert_shape;
use safetensors::tensor::{Dtype, TensorView};

use super::{blocking, token_file};
use crate::args::{LogArgs, LogitsArgs};
use crate::cluster::{Workers, WorkersSpec, shares_of_cores};
use crate::engine::{self, Experts, Mode, cores};
use crate::failure::Failure;
use crate::progress::{Bar, Bars};
use crate::signals::Signals;
use crate::{models, out};

/// What a computation gave.
struct Outcome {
    logits: Vec<f32>,
    choices: Vec<(u32, LayerChoices)>,
}

pub(crate) async fn run(args: &LogitsArgs, log: &LogArgs) -> Result<(), Failure> {
    let tokens = token_file::one(&args.tokens)?;
    let checkpoint = Arc::new(models::open(&args.model, args.links.links())?);
    let mut signals = Signals::listen()?;
    let vocab = checkpoint.spec().vocab as usize;
    let outcome = if args.reference {
        signals.unless(blocking(move || reference(&checkpoint, &tokens))).await?
    } else if let Some(count) = args.workers {
        let bars = Bars::new();
        let (compute, threads) = (args.compute.compute.get(), args.compute.threads);
        let spec = WorkersSpec {
            model: &args.model,
            links: args.links.links(),
            count,
            experts_in_all: expert_shape(&checkpoint).total(),
            replicas: NonZeroU32::MIN,
            compute,
            experts: args.compute.expert_dtype,
            threads,
            busy_poll_us: args.compute.busy_poll_us,
            log,
        };
        let workers = signals.unless(Workers::start(&spec, &bars)).await?;
        let (combine, busy_poll) = (args.compute.combine, args.compute.busy_poll());
        let experts = Experts::Workers { addresses: workers.addresses().to_vec(), combine, busy_poll };
        let threads = threads.unwrap_or(shares_of_cores(count).0);
        let computed =
            compute_with(args, checkpoint, tokens, threads, experts, bars.bar("router".to_owned()));
        let outcome = signals.unless(computed).await;
        workers.stop().await;
        outcome?
    } else {
        let threads = args.compute.threads.unwrap_or(cores());
        let bar = Bar::single("model");
        signals.unless(compute_with(args, checkpoint, tokens, threads, Experts::Here, bar)).await?
    };
    write(&args.out, &outcome, vocab)?;
    let tokens = outcome.logits.len() / vocab;
    out::note(&format!(
        "{}: logits [{tokens}, {vocab}] and {} gates",
        args.out.display(),
        outcome.choices.len()
    ));
    Ok(())
}

async fn compute_with(
    args: &LogitsArgs,
    checkpoint: Arc<Checkpoint>,
    tokens: Vec<u32>,
    threads: NonZeroUsize,
    experts: Experts,
    bar: Bar,
) -> Result<Outcome, Failure> {
    let mode = Mode::of(&checkpoint, args.compute);
    let chunk = args.chunk;
    blocking(move || {
        let mut loaded = engine::load(checkpoint, mode, threads, experts, &bar)?;
        let outcome = evaluate(&loaded.trunk, loaded.dispatch.as_mut(), &tokens, chunk);
        loaded.dispatch.close();
        let outcome = outcome.map_err(failure)?;
        Ok(Outcome { logits: outcome.logits, choices: outcome.choices })
    })
    .await
}

fn reference(checkpoint: &Checkpoint, tokens: &[u32]) -> Result<Outcome, Failure> {
    let outcome = Reference::new(checkpoint).forward(tokens).map_err(Failure::input)?;
    Ok(Outcome { logits: outcome.logits, choices: outcome.choices })
}

/// Bad tokens are bad input; a step that fails is not.
pub(crate) fn failure(error: EvaluateError) -> Failure {
    match error {
        EvaluateError::Model(error) => Failure::input(error),
        EvaluateError::Step(error) => Failure::runtime(error),
    }
}

fn write(path: &Path, outcome: &Outcome, vocab: usize) -> Result<(), Failure> {
    let mut experts: BTreeMap<String, (Vec<usize>, Vec<i64>)> = BTreeMap::new();
    let mut weights: BTreeMap<String, (Vec<usize>, Vec<f32>)> = BTreeMap::new();
    for (layer, choices) in &outcome.choices {
        let shape = vec![choices.len(), choices.first().map_or(0, Vec::len)];
        let ids = choices.iter().flatten().map(|(id, _)| i64::from(*id)).collect();
        let values = choices.iter().flatten().map(|(_, weight)| *weight).collect();
        experts.insert(format!("layer.{layer}.experts"), (shape.clone(), ids));
        weights.insert(format!("layer.{layer}.weights"), (shape, values));
    }
    let logits = vec![outcome.logits.len() / vocab, vocab];
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
