//! The tokenizer of a model directory: its files, and advice where there is none.

use muster_checkpoint::{Checkpoint, CheckpointError};
use muster_text::{TextError, Tokenizer, TokenizerFiles};

/// The file that is read.
const TOKENIZER: &str = "tokenizer.json";
/// Tokenizer files in unsupported forms, which transformers can convert to `tokenizer.json`.
const OTHER_FORMS: [&str; 5] =
    ["tokenizer.model", "tiktoken.model", "tekken.json", "spiece.model", "vocab.json"];

/// A tokenizer that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// A file of the model.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The file's content.
    #[error("tokenizer: {0}")]
    Text(#[from] TextError),
}

/// Reads the model's tokenizer and its chat templates; `None` where there is no `tokenizer.json`.
///
/// # Errors
/// When a file cannot be read, or its content cannot be used.
pub fn read(checkpoint: &Checkpoint) -> Result<Option<Tokenizer>, TokenizerError> {
    let Some(tokenizer) = checkpoint.side_file(TOKENIZER)? else { return Ok(None) };
    let config = checkpoint.side_file("tokenizer_config.json")?;
    let special_tokens_map = checkpoint.side_file("special_tokens_map.json")?;
    let added_tokens = checkpoint.side_file("added_tokens.json")?;
    let files = TokenizerFiles {
        tokenizer: &tokenizer,
        config: config.as_deref(),
        special_tokens_map: special_tokens_map.as_deref(),
        added_tokens: added_tokens.as_deref(),
    };
    let tokenizer = Tokenizer::from_files(&files, checkpoint.spec().vocab)?;
    let default = checkpoint.side_file("chat_template.jinja")?;
    let tool_use = checkpoint.tool_template()?;
    Ok(Some(tokenizer.with_chat_templates(default.as_deref(), tool_use.as_deref())))
}

/// Advice for a model without `tokenizer.json`.
#[must_use]
pub fn remedy(checkpoint: &Checkpoint) -> String {
    let found =
        OTHER_FORMS.into_iter().find(|name| checkpoint.side_file(name).is_ok_and(|file| file.is_some()));
    let what = match found {
        Some(other) => format!(
            "only {other}, which is not read; make one of it with transformers, in the model directory: python -c \"from \
             transformers import AutoTokenizer; AutoTokenizer.from_pretrained('.').save_pretrained('.')\""
        ),
        None => format!(
            "and no other form of it; put the one it was published with beside config.json as {TOKENIZER}"
        ),
    };
    format!("the model has no {TOKENIZER}, {what}. Until then it takes and gives token ids alone")
}
