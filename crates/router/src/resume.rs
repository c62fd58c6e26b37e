//! Resuming a stream that broke off: checks on the client's tokens before any use, and the key that says whether two
//! routers would send the same stream.
//!
//! Always holds: tokens that passed are in the vocabulary, no more than `max_tokens`, and can be the beginning of an
//! output.

use muster_types::{BindingName, TokenId};
use sha2::{Digest, Sha256};

use crate::model_info::ModelInfo;
use crate::output::{End, Output};
use crate::request::{GenerateRequest, RequestError, Resume};

const FIELD: &str = "resume_from";

/// State of a choice at admission.
pub(crate) struct Standing {
    /// Resumed tokens, which the client already has.
    pub(crate) had: Vec<TokenId>,
    /// Output state after the tokens of `had`.
    pub(crate) output: Output,
    /// Set when `had` already ends the output.
    pub(crate) ended: Option<End>,
}

/// Names everything that determines a stream beside the settings that a client repeats: the model, its computation and
/// numerics, the prompt's tokens, and the latest end of the output.
pub(crate) fn key(model: &ModelInfo, binding: BindingName, prompt: &[TokenId], max_tokens: u32) -> String {
    let ModelInfo { fingerprint, compute, experts, trunk, combine, .. } = model;
    let mut hash = Sha256::new_with_prefix("muster stream v1\n");
    hash.update(format!("{fingerprint} {compute} {experts} {trunk} {combine} {max_tokens}"));
    // The key for a cluster of CPUs stays the one of versions without other devices.
    if binding != BindingName::default() {
        hash.update(format!(" {binding}"));
    }
    hash.update("\n");
    for token in prompt {
        hash.update(token.get().to_le_bytes());
    }
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Tokens of each choice that the client has; none where the request begins a stream.
#[derive(Debug)]
pub(crate) struct Beginnings {
    choices: Vec<Vec<TokenId>>,
    /// Key of the stream that broke off; `None` skips the comparison.
    key: Option<String>,
    resumes: bool,
}

impl Beginnings {
    /// The beginnings of a request, after the checks that take no work.
    ///
    /// # Errors
    /// Names the invalid field.
    pub(crate) fn of(request: &GenerateRequest, model: &ModelInfo) -> Result<Self, RequestError> {
        let Some(Resume { choices, key }) = &request.resume else {
            let choices = vec![Vec::new(); request.choices as usize];
            return Ok(Self { choices, key: None, resumes: false });
        };
        if choices.len() != request.choices as usize {
            let message =
                format!("choices has {} entries; the request asks for {}", choices.len(), request.choices);
            return Err(RequestError::invalid(FIELD, message));
        }
        if request.sampling.temperature > 0.0 && request.seed.is_none() {
            let message = "is absent; to resume_from a sampled stream, give the seed that its `started` told";
            return Err(RequestError::invalid("seed", message));
        }
        let most = request.max_tokens.unwrap_or(model.context).min(model.context);
        let check = |(choice, ids): (usize, &Vec<u32>)| {
            check_count(choice, ids.len(), most)?;
            let checked = ids.iter().map(|&id| TokenId::new(id, model.vocabulary)).collect::<Result<_, _>>();
            checked.map_err(|error| RequestError::invalid(FIELD, format!("choices[{choice}]: {error}")))
        };
        let choices = choices.iter().enumerate().map(check).collect::<Result<_, _>>()?;
        Ok(Self { choices, key: key.clone(), resumes: true })
    }

    /// Whether the request resumes a stream.
    pub(crate) const fn resumes(&self) -> bool {
        self.resumes
    }

    /// Resumed tokens of all choices.
    pub(crate) fn tokens(&self) -> usize {
        self.choices.iter().map(Vec::len).sum()
    }

    /// State of each choice, once the output limit and this router's resume key are known.
    ///
    /// # Errors
    /// Names the invalid field.
    pub(crate) fn standings(
        self,
        own_key: &str,
        output: &Output,
        max_tokens: u32,
    ) -> Result<Vec<Standing>, RequestError> {
        if self.key.is_some_and(|key| key != own_key) {
            let message = "key is that of another stream; model, compute mode, prompt, max_tokens and the numerics \
                           class of the workers must be as they were. If they cannot be, send the request anew, \
                           without resume_from";
            return Err(RequestError::invalid(FIELD, message));
        }
        let replay = |(choice, had): (usize, Vec<TokenId>)| {
            check_count(choice, had.len(), max_tokens)?;
            let mut output = output.clone();
            let ended = output.replay(&had, max_tokens).map_err(|at| {
                let message = format!("choices[{choice}]: token {} ends the output, but others follow", at.0);
                RequestError::invalid(FIELD, message)
            })?;
            Ok(Standing { had, output, ended })
        };
        self.choices.into_iter().enumerate().map(replay).collect()
    }
}

fn check_count(choice: usize, count: usize, most: u32) -> Result<(), RequestError> {
    if count > most as usize {
        let message = format!("choices[{choice}] has {count} tokens; max_tokens and context allow {most}");
        return Err(RequestError::invalid(FIELD, message));
    }
    Ok(())
}
