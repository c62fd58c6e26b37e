//! Logits of every position of one sequence, through the real trunk and any dispatch: a tool to compare with other
//! implementations.

use std::num::NonZeroUsize;
use std::time::Duration;

use muster_engine::dispatch::ExpertDispatch;
use muster_kernels::BLOCK_TOKENS;
use muster_types::TokenId;

use crate::ModelError;
use crate::reference::LayerChoices;
use crate::step::{SeqInput, StepError, WantLogits};
use crate::trunk::device::Device;
use crate::trunk::{GateView, StepContext, StepState, Trunk, View};

/// Results of an evaluation.
pub struct Evaluation {
    /// `[tokens, vocab]`, row-major.
    pub logits: Vec<f32>,
    /// Per MoE layer: its number and the choices of every token.
    pub choices: Vec<(u32, LayerChoices)>,
    /// Per layer: the residual stream after it, `[tokens, hidden]`.
    pub hidden: Vec<Vec<f32>>,
}

/// An evaluation that failed.
#[derive(Debug, thiserror::Error)]
pub enum EvaluateError {
    /// The tokens or the cache are unusable.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A step failed.
    #[error(transparent)]
    Step(#[from] StepError),
}

/// Runs `tokens` in chunks of at most `chunk`.
///
/// # Errors
/// When `tokens` is empty, names a token the model lacks or is longer than its context; or a step fails.
pub fn evaluate<D: Device>(
    trunk: &Trunk<D>,
    dispatch: &mut dyn ExpertDispatch,
    tokens: &[u32],
    chunk: NonZeroUsize,
) -> Result<Evaluation, EvaluateError> {
    let spec = trunk.spec();
    let tokens = checked(tokens, spec.vocab, spec.context)?;
    let blocks = tokens.len().div_ceil(BLOCK_TOKENS) * trunk.kv_groups().reaches().len();
    let mut kv = trunk.new_kv(blocks).map_err(ModelError::from)?;
    let table: Vec<u32> = (0..).take(blocks).collect();
    let mut state = StepState::<D>::default();
    let mut out =
        Evaluation { logits: Vec::new(), choices: Vec::new(), hidden: vec![Vec::new(); spec.layers.len()] };
    for (index, part) in tokens.chunks(chunk.get()).enumerate() {
        // In range: the sequence is no longer than the context, whose length is u32.
        let start = (index * chunk.get()) as u32;
        let input = SeqInput { start, tokens: part, blocks: &table, logits: WantLogits::All };
        let Evaluation { choices, hidden, .. } = &mut out;
        let mut observe = |view: View<'_>| match view {
            View::Gate(view) => record(choices, &view),
            View::Collect { .. } => {}
            View::Hidden { layer, rows } => hidden[layer.index()].extend_from_slice(rows),
        };
        let mut ctx = StepContext {
            kv: &mut kv,
            dispatch,
            timeout: Duration::from_secs(60),
            observe: Some(&mut observe),
        };
        trunk.forward(&mut ctx, [&[input], &[]], &mut state);
        out.logits.extend_from_slice(state.logits(0, 0, spec.vocab as usize)?);
    }
    Ok(out)
}

fn checked(tokens: &[u32], vocab: u32, context: usize) -> Result<Vec<TokenId>, ModelError> {
    if tokens.is_empty() {
        return Err(ModelError::Input("the token list is empty".into()));
    }
    if tokens.len() > context {
        let len = tokens.len();
        return Err(ModelError::Input(format!(
            "{len} tokens are more than the model's context of {context}"
        )));
    }
    let check = |&id| TokenId::new(id, vocab).map_err(|error| ModelError::Input(error.to_string()));
    tokens.iter().map(check).collect()
}

fn record(layers: &mut Vec<(u32, LayerChoices)>, view: &GateView<'_>) {
    let layer = view.layer.get();
    let at = layers.iter().position(|entry| entry.0 == layer).unwrap_or_else(|| {
        layers.push((layer, Vec::new()));
        layers.len() - 1
    });
    let choices = view.choices;
    let rows = choices.experts().chunks_exact(choices.k()).zip(choices.weights().chunks_exact(choices.k()));
    layers[at].1.extend(
        rows.map(|(ids, weights)| ids.iter().map(|id| id.get()).zip(weights.iter().copied()).collect()),
    );
}
