//! The files that make a tokenizer, as bytes.

/// What a model directory has of the files that make a tokenizer. Which of them count when is transformers' rule.
#[derive(Debug, Clone, Copy, Default)]
pub struct TokenizerFiles<'a> {
    /// `tokenizer.json`.
    pub tokenizer: &'a [u8],
    /// `tokenizer_config.json`.
    pub config: Option<&'a [u8]>,
    /// `special_tokens_map.json`.
    pub special_tokens_map: Option<&'a [u8]>,
    /// `added_tokens.json`.
    pub added_tokens: Option<&'a [u8]>,
}

impl<'a> TokenizerFiles<'a> {
    /// A `tokenizer.json` that stands alone.
    #[must_use]
    pub fn alone(tokenizer: &'a [u8]) -> Self {
        Self { tokenizer, ..Self::default() }
    }
}
