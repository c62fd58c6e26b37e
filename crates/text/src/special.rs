//! Special tokens: by the names that templates know them by, as they are listed, and what becomes of them in text.

/// Treatment of special tokens in decoding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SpecialText {
    /// They are text like any other.
    Keep,
    /// They leave no trace.
    Drop,
}

/// The texts of a model's special tokens by the names that its chat template knows them by: `bos_token`, `eos_token`,
/// `unk_token`, `sep_token`, `pad_token`, `cls_token`, `mask_token`, and those that the model adds (`image_token`).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SpecialTokens(Vec<(String, String)>);

impl SpecialTokens {
    /// The token of a name.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&str> {
        self.iter().find(|(other, _)| *other == name).map(|(_, token)| token)
    }

    /// All names and tokens, in the reference's order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(name, token)| (name.as_str(), token.as_str()))
    }

    /// Whether a template has another variable of that name.
    pub(crate) fn is_taken(name: &str) -> bool {
        const OTHERS: [&str; 6] =
            ["messages", "tools", "documents", "add_generation_prompt", "strftime_now", "raise_exception"];
        OTHERS.contains(&name)
    }
}

impl FromIterator<(String, String)> for SpecialTokens {
    fn from_iter<I: IntoIterator<Item = (String, String)>>(tokens: I) -> Self {
        Self(tokens.into_iter().collect())
    }
}

/// One special token: spelled out in a text it is one id, and it leaves no trace in an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SpecialToken {
    /// Its id.
    pub id: u32,
    /// Its text.
    pub text: String,
    /// The names that templates know it by; often none.
    pub names: Vec<String>,
    /// The file that adds it, and the key there unless that is `tokenizer.json`; where another file changes its flags,
    /// both.
    pub source: String,
}
