//! Chat templates: a conversation to the text that the model was trained on.
//!
//! Jinja as the reference sets it up: `trim_blocks`, `lstrip_blocks`, Python's methods on strings, lists and
//! dictionaries, `break` and `continue`, `raise_exception`, `strftime_now`, a `tojson` that is
//! `json.dumps`, no escaping. Reads no clock: the date comes in.
//!
//! A template comes with the model, messages come from anyone. Nothing in a message is ever read as
//! template. A template itself is held to limits on its length, nesting, steps, recursion and output, so
//! that a broken or malformed one gives an error. The limits are not a sandbox: the engine does not meter
//! the memory of the values that a template computes (a string doubled forty times), nor does it notice a
//! namespace that is made to contain itself. A template deserves the trust that the weights beside it need.

use std::collections::BTreeMap;
use std::io;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{AutoEscape, Environment, Error, ErrorKind, Value};
use serde::Serialize;

use crate::config::SpecialTokens;
use crate::date::CivilDate;
use crate::tojson::tojson;
use crate::{TextError, wide_stack};

/// Cap on a template's source; published ones stay below 32 KiB.
const MAX_SOURCE_BYTES: usize = 64 << 10;
/// Cap on what one rendering may write.
pub(crate) const MAX_OUTPUT_BYTES: usize = 4 << 20;
/// Steps of one rendering. An elaborate template takes about 70 for a message, so this is nearly three times
/// what a thousand messages need; see [`wide_stack::STACK_BYTES`] for why it is not more.
const FUEL: u64 = 200_000;
/// Nested macro calls, includes and loops of one rendering, as the engine counts them.
const MAX_RECURSION: usize = 100;
/// The name a template has in its environment and in messages.
const NAME: &str = "chat_template";

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ChatMessage {
    /// Who says it: `system`, `user`, `assistant`, or what else the template knows.
    pub role: String,
    /// What is said.
    pub content: String,
}

/// Whether the text ends with the beginning of the assistant's answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GenerationPrompt {
    /// It does: the model is to answer.
    Add,
    /// It ends with the last message.
    Omit,
}

/// A compiled chat template.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    special: SpecialTokens,
}

impl ChatTemplate {
    /// Compiles `source`; `special` are the tokens it may name (`bos_token` and so on).
    ///
    /// # Errors
    /// The source is too long, nests too deeply, or is not a template.
    pub fn new(source: &str, special: SpecialTokens) -> Result<Self, TextError> {
        let (bytes, limit) = (source.len(), MAX_SOURCE_BYTES);
        if bytes > limit {
            return Err(TextError::FileTooLarge { file: "the chat template", bytes, limit });
        }
        let environment = wide_stack::run(|| {
            let mut environment = environment()?;
            environment.add_template_owned(NAME, source.to_owned())?;
            Ok(environment)
        })?;
        Ok(Self { environment, special })
    }

    /// The text of `messages`. `today` is what `strftime_now` tells a template that asks for the date;
    /// without it the function does not exist, and templates that check for it write a date of their own.
    ///
    /// Works on a thread of its own and returns when it is done.
    ///
    /// # Errors
    /// [`TextError::Template`] where the template refuses the conversation in its own words,
    /// [`TextError::TemplateFailed`] where it fails or goes past a limit.
    pub fn render(
        &self,
        messages: &[ChatMessage],
        generation_prompt: GenerationPrompt,
        today: Option<CivilDate>,
    ) -> Result<String, TextError> {
        wide_stack::run(|| {
            let context = self.context(messages, generation_prompt, today);
            let mut output = Capped::default();
            let template = self.environment.get_template(NAME)?;
            let outcome = template.render_captured_to(context, &mut output).map(drop);
            if output.overflowed {
                return Err(failed(format!("it wrote more than {MAX_OUTPUT_BYTES} bytes")));
            }
            outcome?;
            String::from_utf8(output.bytes).map_err(|e| failed(e.to_string()))
        })
    }

    fn context(
        &self,
        messages: &[ChatMessage],
        generation_prompt: GenerationPrompt,
        today: Option<CivilDate>,
    ) -> Value {
        let mut context = BTreeMap::from([
            ("messages", Value::from(Serde(messages))),
            ("add_generation_prompt", Value::from(generation_prompt == GenerationPrompt::Add)),
            ("tools", Value::from(())),
            ("documents", Value::from(())),
        ]);
        let named = [
            ("bos_token", &self.special.bos),
            ("eos_token", &self.special.eos),
            ("pad_token", &self.special.pad),
            ("unk_token", &self.special.unk),
        ];
        context.extend(
            named.into_iter().filter_map(|(name, token)| Some((name, Value::from(token.as_deref()?)))),
        );
        if let Some(date) = today {
            let strftime = move |format: &str| {
                date.strftime(format).map_err(|reason| Error::new(ErrorKind::InvalidOperation, reason))
            };
            context.insert("strftime_now", Value::from_function(strftime));
        }
        Value::from(context)
    }
}

fn environment() -> Result<Environment<'static>, TextError> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?;
    environment.set_syntax(syntax);
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_fuel(Some(FUEL));
    environment.set_recursion_limit(MAX_RECURSION);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_filter("tojson", tojson);
    environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, "raise_exception").with_source(Raised(message)))
    });
    Ok(environment)
}

/// The message of a `raise_exception`, on its way through the engine's errors.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

impl From<Error> for TextError {
    fn from(error: Error) -> Self {
        let causes = || std::iter::successors(Some(&error as &dyn std::error::Error), |e| e.source());
        if let Some(Raised(message)) = causes().find_map(|e| e.downcast_ref()) {
            return Self::Template { message: message.clone() };
        }
        let words: Vec<String> = causes().map(ToString::to_string).collect();
        failed(words.join(": "))
    }
}

fn failed(reason: String) -> TextError {
    TextError::TemplateFailed { reason }
}

/// Collects a rendering up to [`MAX_OUTPUT_BYTES`].
#[derive(Default)]
struct Capped {
    bytes: Vec<u8>,
    overflowed: bool,
}

impl io::Write for Capped {
    fn write(&mut self, more: &[u8]) -> io::Result<usize> {
        if more.len() > MAX_OUTPUT_BYTES - self.bytes.len() {
            self.overflowed = true;
            return Err(io::ErrorKind::WriteZero.into());
        }
        self.bytes.extend_from_slice(more);
        Ok(more.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
