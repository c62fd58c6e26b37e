//! From a prompt to token ids: cheap checks, the cost of the work, and the work itself.
//!
//! Always holds: resulting ids are in the vocabulary and fewer than the context; of a prompt that is too long, no more
//! is tokenized than it takes to see that. Knows nothing of threads: the caller places the work.

use std::collections::BTreeSet;
use std::time::{SystemTime, UNIX_EPOCH};

use muster_text::{Bounds, Chat, CivilDate, GenerationPrompt, Special, SpecialText, TextError, Tokenizer};
use muster_types::{Limits, TokenId};

use crate::model_info::ModelInfo;
use crate::request::{Prompt, RequestError};
use crate::text_pool::Wanted;

/// Most bytes that a tokenizer takes in one piece, which needs some 200 times as much memory.
const STRETCH: usize = 256 << 10;

/// Tokenizer, chat template and limits that turn prompts of a model into ids.
#[derive(Debug)]
pub(crate) struct Prompts {
    tokenizer: Option<Tokenizer>,
    /// Variables of the chat template that requests may set.
    template_variables: BTreeSet<String>,
    limits: Limits,
    vocabulary: u32,
    context: u32,
    has_chat_template: bool,
}

impl Prompts {
    pub(crate) fn new(
        model: &ModelInfo,
        limits: Limits,
        tokenizer: Option<Tokenizer>,
        template_variables: BTreeSet<String>,
    ) -> Self {
        let ModelInfo { vocabulary, context, has_chat_template, .. } = *model;
        Self { tokenizer, template_variables, limits, vocabulary, context, has_chat_template }
    }

    /// The tokenizer, if the model has one.
    pub(crate) fn tokenizer(&self) -> Option<&Tokenizer> {
        self.tokenizer.as_ref()
    }

    /// Checks that take no work.
    ///
    /// # Errors
    /// Names the field.
    pub(crate) fn check(&self, prompt: &Prompt) -> Result<(), RequestError> {
        match prompt {
            Prompt::Tokens(ids) => self.check_count("prompt", ids.len()),
            Prompt::Text(text) => {
                self.check_bytes("prompt", text.len())?;
                self.needed("prompt").map(drop)
            }
            Prompt::Chat(chat) => {
                self.check_chat(chat)?;
                self.check_bytes("messages", chat.bytes())?;
                self.needed("messages").map(drop)
            }
        }
    }

    /// Bytes of work for a prompt: its own, and for a conversation also its intermediate forms.
    pub(crate) fn cost(prompt: &Prompt) -> usize {
        /// The conversation, the values of the template, and the rendered text.
        const COPIES: usize = 3;
        match prompt {
            Prompt::Tokens(ids) => ids.len() * size_of::<u32>(),
            Prompt::Text(text) => text.len(),
            Prompt::Chat(chat) => chat.bytes() * COPIES,
        }
    }

    /// The ids of a prompt that passed [`Self::check`].
    ///
    /// # Errors
    /// Names the field that cannot be served. `Internal` when the request is no longer wanted.
    pub(crate) fn tokens(&self, prompt: Prompt, wanted: &Wanted) -> Result<Vec<TokenId>, RequestError> {
        let most = self.context.saturating_sub(1) as usize;
        let (field, ids) = match prompt {
            Prompt::Tokens(ids) => ("prompt", ids),
            Prompt::Text(text) => ("prompt", self.encode("prompt", &text, Special::Add, most, wanted)?),
            Prompt::Chat(chat) => {
                let text = self.rendered(&chat)?;
                drop(chat);
                ("messages", self.encode("messages", &text, Special::Omit, most, wanted)?)
            }
        };
        self.check_count(field, ids.len())?;
        let check = |id| {
            TokenId::new(id, self.vocabulary).map_err(|error| RequestError::invalid(field, error.to_string()))
        };
        ids.into_iter().map(check).collect()
    }

    /// The ids of a text, no more than the context holds.
    ///
    /// # Errors
    /// When it is too long or the model has no tokenizer.
    pub(crate) fn tokenize(
        &self,
        text: &str,
        special: Special,
        wanted: &Wanted,
    ) -> Result<Vec<u32>, RequestError> {
        self.encode("text", text, special, self.context as usize, wanted)
    }

    /// The text of ids, no more than the context holds.
    ///
    /// # Errors
    /// When an id is out of range or the model has no tokenizer.
    pub(crate) fn detokenize(&self, ids: &[u32], special: SpecialText) -> Result<String, RequestError> {
        self.needed("ids")?.decode(ids, special).map_err(|error| self.refusal(&error, "ids"))
    }

    /// Checks the size of a text.
    ///
    /// # Errors
    /// Names the field.
    pub(crate) fn check_bytes(&self, field: &'static str, bytes: usize) -> Result<(), RequestError> {
        let limit = self.limits.prompt_bytes;
        if bytes > limit {
            let message = format!("has {bytes} bytes; at most {limit} are allowed");
            return Err(RequestError::invalid(field, message));
        }
        Ok(())
    }

    fn check_count(&self, field: &'static str, count: usize) -> Result<(), RequestError> {
        let context = self.context;
        if count == 0 {
            return Err(RequestError::invalid(field, "is empty; at least one token is needed"));
        }
        if count >= context as usize {
            return Err(RequestError::prompt_too_long(field, format_args!("{count} tokens"), context));
        }
        Ok(())
    }

    fn check_chat(&self, chat: &Chat) -> Result<(), RequestError> {
        let limit = self.limits.messages;
        if chat.messages.is_empty() || chat.messages.len() > limit {
            let message = format!("has {} entries; 1 to {limit} are allowed", chat.messages.len());
            return Err(RequestError::invalid("messages", message));
        }
        if !self.has_chat_template {
            let message = match self.tokenizer {
                Some(_) => "this model has no chat template; use completions with a prompt instead",
                None => {
                    "this model has no tokenizer and no chat template; use completions with token ids instead"
                }
            };
            return Err(RequestError::invalid("messages", message));
        }
        let allowed = &self.template_variables;
        if let Some(name) = chat.variables.keys().find(|name| !allowed.contains(*name)) {
            let name: String = name.chars().take(64).collect();
            let which = match allowed.is_empty() {
                true => "requests may set none here".to_owned(),
                false => format!(
                    "requests may set {}",
                    allowed.iter().map(String::as_str).collect::<Vec<_>>().join(", ")
                ),
            };
            let message = format!("has {name:?}; {which} (the router's template_variables)");
            return Err(RequestError::invalid("chat_template_kwargs", message));
        }
        Ok(())
    }

    fn rendered(&self, chat: &Chat) -> Result<String, RequestError> {
        let template = self.needed("messages")?.chat_template();
        let text = template.and_then(|template| template.render(chat, GenerationPrompt::Add, today()));
        text.map_err(|error| self.refusal(&error, "messages"))
    }

    fn encode(
        &self,
        field: &'static str,
        text: &str,
        special: Special,
        tokens: usize,
        wanted: &Wanted,
    ) -> Result<Vec<u32>, RequestError> {
        let bounds = Bounds { tokens, stretch: STRETCH };
        let ids = self.needed(field)?.encode_within(text, special, bounds, || wanted.is_wanted());
        ids.map_err(|error| self.refusal(&error, field))
    }

    fn needed(&self, field: &'static str) -> Result<&Tokenizer, RequestError> {
        let missing = || RequestError::invalid(field, "this model has no tokenizer; send token ids instead");
        self.tokenizer.as_ref().ok_or_else(missing)
    }

    fn refusal(&self, error: &TextError, field: &'static str) -> RequestError {
        match error {
            TextError::Unwanted => RequestError::Internal,
            TextError::TooManyTokens { least, most } if *most < self.context as usize => {
                RequestError::prompt_too_long(field, format_args!("{least} tokens or more"), self.context)
            }
            error => RequestError::invalid(to_blame(error, field), error.to_string()),
        }
    }
}

/// The field to blame for `error`, which for most errors is `field`.
fn to_blame(error: &TextError, field: &'static str) -> &'static str {
    match error {
        TextError::ToolsNotTaken => "tools",
        TextError::TooDeep { what, .. } if what == "tools" => "tools",
        TextError::TooDeep { .. } | TextError::Reserved { .. } => "chat_template_kwargs",
        _ => field,
    }
}

/// The date, in UTC, that chat templates may write.
fn today() -> Option<CivilDate> {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).ok()?;
    Some(CivilDate::from_unix_seconds(since.as_secs()))
}
