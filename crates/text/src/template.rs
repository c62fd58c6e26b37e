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
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Object, Serde};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, Value};

use crate::chat::{AbsentContent, Arguments, Chat, Forms, Parts};
use crate::date::CivilDate;
use crate::python::Raised;
use crate::tojson::{MAX_OUTPUT_BYTES, tojson};
use crate::{SpecialTokens, TextError, probe, python, source, wide_stack};

/// Cap on a template's source; published ones stay below 32 KiB.
const MAX_SOURCE_BYTES: usize = 64 << 10;
/// Steps of one rendering. An elaborate template takes about 70 for a message, so this is nearly three times
/// what a thousand messages need; see [`wide_stack::STACK_BYTES`] for why it is not more.
const FUEL: u64 = 200_000;
/// Nested macro calls, includes and loops of one rendering, as the engine counts them.
const MAX_RECURSION: usize = 100;
/// The name a template has in its environment and in messages.
const NAME: &str = "chat_template";

/// Whether the text ends with the beginning of the assistant's answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GenerationPrompt {
    /// It does: the model is to answer.
    Add,
    /// It ends with the last message.
    Omit,
}

/// A model's chat template: one for all conversations, or another for those with tools.
#[derive(Debug)]
pub struct ChatTemplate {
    default: Option<Compiled>,
    tool_use: Option<Compiled>,
}

impl ChatTemplate {
    /// Compiles `source`; `special` are the tokens it may name (`bos_token` and so on).
    ///
    /// # Errors
    /// The source is too long, nests too deeply, or is not a template.
    pub fn new(source: &str, special: SpecialTokens) -> Result<Self, TextError> {
        Ok(Self { default: Some(Compiled::new(source, special)?), tool_use: None })
    }

    /// Compiles what a model has of a `default` template and one for conversations with tools.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub(crate) fn named(
        default: Option<&str>,
        tool_use: Option<&str>,
        special: &SpecialTokens,
    ) -> Result<Self, TextError> {
        let compile = |source| Compiled::new(source, special.clone());
        Ok(Self { default: default.map(compile).transpose()?, tool_use: tool_use.map(compile).transpose()? })
    }

    /// The text of `chat`. `today` is what `strftime_now` tells a template that asks for the date;
    /// without it the function does not exist, and templates that check for it write a date of their own.
    ///
    /// Works on a thread of its own and returns when it is done.
    ///
    /// # Errors
    /// [`TextError::Template`] where the template refuses the conversation in its own words,
    /// [`TextError::TemplateFailed`] where it fails or goes past a limit, [`TextError::ToolsNotTaken`] and
    /// [`TextError::ToolCallsNotTaken`] where it would leave these out, and those of [`Chat::check`].
    pub fn render(
        &self,
        chat: &Chat,
        generation_prompt: GenerationPrompt,
        today: Option<CivilDate>,
    ) -> Result<String, TextError> {
        chat.check()?;
        let tool_use = self.tool_use.as_ref().filter(|_| !chat.tools.is_empty());
        let Some(template) = tool_use.or(self.default.as_ref()) else {
            return Err(failed("the model has one for conversations with tools only".into()));
        };
        wide_stack::run(|| template.render(chat, generation_prompt, today))
    }
}

/// One compiled template.
#[derive(Debug)]
struct Compiled {
    environment: Environment<'static>,
    special: SpecialTokens,
    /// Found out when first needed.
    parts: OnceLock<Parts>,
    calls: OnceLock<Option<(Arguments, AbsentContent)>>,
}

impl Compiled {
    fn new(source: &str, special: SpecialTokens) -> Result<Self, TextError> {
        let (bytes, limit) = (source.len(), MAX_SOURCE_BYTES);
        if bytes > limit {
            return Err(TextError::FileTooLarge { file: "the chat template", bytes, limit });
        }
        let source = source::prepare(source).map_err(failed)?;
        let environment = wide_stack::run(|| {
            let mut environment = environment()?;
            environment.add_template_owned(NAME, source)?;
            Ok(environment)
        })?;
        Ok(Self { environment, special, parts: OnceLock::new(), calls: OnceLock::new() })
    }

    fn render(
        &self,
        chat: &Chat,
        generation_prompt: GenerationPrompt,
        today: Option<CivilDate>,
    ) -> Result<String, TextError> {
        let forms = self.forms(chat)?;
        let context = Arc::new(Context::new(chat, forms, &self.special, generation_prompt, today));
        let text = self.write(&context)?;
        if !chat.tools.is_empty() && !context.tools_read.load(Ordering::Relaxed) {
            return Err(TextError::ToolsNotTaken);
        }
        Ok(text)
    }

    /// The forms in which this template takes `chat`.
    fn forms(&self, chat: &Chat) -> Result<Forms, TextError> {
        // On the first day of all: what a template takes does not depend on the date.
        let day = Some(CivilDate::from_unix_seconds(0));
        let probe = |chat: &Chat, forms| {
            self.write(&Arc::new(Context::new(chat, forms, &self.special, GenerationPrompt::Add, day)))
        };
        let mut forms = Forms::REFERENCE;
        if chat.has_parts() {
            forms.parts = *self.parts.get_or_init(|| probe::parts(probe));
        }
        if chat.has_tool_calls() {
            let calls = *self.calls.get_or_init(|| probe::calls(probe));
            (forms.arguments, forms.absent) = calls.ok_or(TextError::ToolCallsNotTaken)?;
        }
        Ok(forms)
    }

    fn write(&self, context: &Arc<Context>) -> Result<String, TextError> {
        let mut output = Capped::default();
        let template = self.environment.get_template(NAME)?;
        let context = Value::from_dyn_object(Arc::clone(context));
        let outcome = template.render_captured_to(context, &mut output).map(drop);
        if output.overflowed {
            return Err(failed(format!("it wrote more than {MAX_OUTPUT_BYTES} bytes")));
        }
        outcome?;
        String::from_utf8(output.bytes).map_err(|e| failed(e.to_string()))
    }
}

/// The variables of one rendering. Notices whether the template looks at its tools.
#[derive(Debug)]
struct Context {
    variables: BTreeMap<String, Value>,
    tools_read: AtomicBool,
}

impl Context {
    fn new(
        chat: &Chat,
        forms: Forms,
        special: &SpecialTokens,
        generation_prompt: GenerationPrompt,
        today: Option<CivilDate>,
    ) -> Self {
        let tools = if chat.tools.is_empty() { Value::from(()) } else { Value::from(Serde(&chat.tools)) };
        let mut variables = BTreeMap::from([("documents".to_owned(), Value::from(()))]);
        variables.extend(special.iter().map(|(name, token)| (name.to_owned(), Value::from(token))));
        if let Some(date) = today {
            let strftime = move |format: &str| {
                date.strftime(format).map_err(|reason| Error::new(ErrorKind::InvalidOperation, reason))
            };
            variables.insert("strftime_now".into(), Value::from_function(strftime));
        }
        variables
            .extend(chat.variables.iter().map(|(name, value)| (name.clone(), Value::from(Serde(value)))));
        variables.extend([
            ("messages".to_owned(), Value::from(Serde(&chat.messages(forms)))),
            ("tools".to_owned(), tools),
            ("add_generation_prompt".to_owned(), Value::from(generation_prompt == GenerationPrompt::Add)),
        ]);
        Self { variables, tools_read: AtomicBool::new(false) }
    }
}

impl Object for Context {
    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        let name = key.as_str()?;
        if name == "tools" {
            self.tools_read.store(true, Ordering::Relaxed);
        }
        self.variables.get(name).cloned()
    }
}

fn environment() -> Result<Environment<'static>, TextError> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?;
    environment.set_syntax(syntax);
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_fuel(Some(FUEL));
    environment.set_recursion_limit(MAX_RECURSION);
    environment.add_filter("tojson", tojson);
    python::add_to(&mut environment);
    Ok(environment)
}

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
