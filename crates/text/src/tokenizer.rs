//! The tokenizer: text to ids and ids to text, through the `tokenizers` library.
//!
//! Always holds: every id it returns is below the model's vocabulary size. Truncation and padding that a
//! `tokenizer.json` may carry from training are switched off, as the reference does when it serves.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use crate::config::{self, SpecialTokens, Templates, TokenizerConfig};
use crate::floor::{Counts, Floor};
use crate::pieces::{self, Pieces};
use crate::seams::Seams;
use crate::template::ChatTemplate;
use crate::{Detokenizer, TextError};

/// Cap on the size of `tokenizer.json`; published ones stay below 40 MiB.
const MAX_FILE_BYTES: usize = 64 << 20;
/// Cap on a text to encode. Edges have smaller caps of their own; this one bounds what the crate can be
/// made to allocate.
const MAX_TEXT_BYTES: usize = 16 << 20;
/// Bytes of a part that a text is tokenized in. The library takes some 200 times as much memory for it.
const PART_BYTES: usize = 16 << 10;
/// A text whose ids, with and without special tokens, show which ones the tokenizer adds and where.
const PROBE: &str = "a";

/// Whether encoding adds the tokens that the model expects around a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Special {
    /// Add what the post-processor of `tokenizer.json` adds; `add_bos_token` and `add_eos_token` of
    /// `tokenizer_config.json` override it where they are given.
    Add,
    /// Add nothing.
    Omit,
}

/// How far [`Tokenizer::encode_within`] goes.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Most tokens.
    pub tokens: usize,
    /// Most bytes that hold together, so that they can only be tokenized at once: a word, or a whole text where nothing is
    /// known of how the tokenizer splits it.
    pub stretch: usize,
}

/// What decoding does with special tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SpecialText {
    /// They are text like any other.
    Keep,
    /// They leave no trace.
    Drop,
}

/// A model's tokenizer. Cloning is cheap.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    library: Arc<tokenizers::Tokenizer>,
    pieces: Arc<Pieces>,
    around: Arc<Around>,
    seams: Arc<Seams>,
    floor: Arc<Floor>,
    special: Arc<SpecialTokens>,
    template: Result<Arc<ChatTemplate>, TextError>,
}

/// The ids put before and after a text.
#[derive(Debug, Default, PartialEq, Eq)]
struct Around {
    before: Vec<u32>,
    after: Vec<u32>,
}

impl Tokenizer {
    /// Reads `tokenizer.json` and, where the model has one, `tokenizer_config.json`, for a model with
    /// `vocab` token ids.
    ///
    /// A chat template that cannot be compiled does not fail this call: [`Self::chat_template`] tells.
    ///
    /// # Errors
    /// A file is too large or malformed, a token's id is not below `vocab`, the decoder is of a family that
    /// generative models do not use, or a token that is to be added does not exist.
    pub fn from_bytes(
        tokenizer_json: &[u8],
        tokenizer_config: Option<&[u8]>,
        vocab: u32,
    ) -> Result<Self, TextError> {
        let bytes = tokenizer_json.len();
        if bytes > MAX_FILE_BYTES {
            return Err(TextError::FileTooLarge { file: pieces::FILE, bytes, limit: MAX_FILE_BYTES });
        }
        let config = tokenizer_config.map(TokenizerConfig::from_bytes).transpose()?.unwrap_or_default();
        let library = library(tokenizer_json)?;
        let pieces = Pieces::new(&library, vocab)?;
        let around = Around::new(&library, &config)?;
        let (seams, floor) = (Seams::of(&library), Floor::of(&library, &pieces));
        let Templates { default, tool_use } = &config.templates;
        let template = template(default.as_deref(), tool_use.as_deref(), &config.special);
        Ok(Self {
            library: Arc::new(library),
            pieces: Arc::new(pieces),
            around: Arc::new(around),
            seams: Arc::new(seams),
            floor: Arc::new(floor),
            special: Arc::new(config.special),
            template,
        })
    }

    /// Uses these in place of the configuration's templates: `default`, the contents of a
    /// `chat_template.jinja`, and `tool_use`, those of an `additional_chat_templates/tool_use.jinja`, which is
    /// for conversations with tools. Where there is neither, nothing changes.
    #[must_use]
    pub fn with_chat_templates(mut self, default: Option<&[u8]>, tool_use: Option<&[u8]>) -> Self {
        if default.is_some() || tool_use.is_some() {
            let read = |bytes: Option<&[u8]>, file| {
                let invalid = |e: std::str::Utf8Error| TextError::InvalidFile { file, reason: e.to_string() };
                bytes.map(|bytes| std::str::from_utf8(bytes).map(str::to_owned).map_err(invalid)).transpose()
            };
            self.template = read(default, "chat_template.jinja").and_then(|default| {
                let tool_use = read(tool_use, "additional_chat_templates/tool_use.jinja")?;
                template(default.as_deref(), tool_use.as_deref(), &self.special)
            });
        }
        self
    }

    /// The ids of `text`. Special tokens spelled out in it are recognised, as the reference does.
    ///
    /// # Errors
    /// The text is too long, or the tokenizer refuses it (no unknown token where one is needed).
    pub fn encode(&self, text: &str, special: Special) -> Result<Vec<u32>, TextError> {
        self.encode_within(text, special, Bounds { tokens: usize::MAX, stretch: usize::MAX }, || true)
    }

    /// The same, no further than `bounds` and while `is_wanted` says so. It is asked again for every few milliseconds of
    /// work. A text that has too many tokens whatever they are is refused before any work, any other as soon as there
    /// are too many; memory is taken for one part at a time.
    ///
    /// # Errors
    /// As [`Self::encode`]; beyond `bounds`, and [`TextError::Unwanted`].
    pub fn encode_within(
        &self,
        text: &str,
        special: Special,
        bounds: Bounds,
        is_wanted: impl Fn() -> bool,
    ) -> Result<Vec<u32>, TextError> {
        let bytes = text.len();
        if bytes > MAX_TEXT_BYTES {
            return Err(TextError::TextTooLong { bytes, limit: MAX_TEXT_BYTES });
        }
        let too_many = |least| TextError::TooManyTokens { least, most: bounds.tokens };
        let counts = self.floor.counts(text);
        let mut to_come = counts.sum(text);
        let least = Counts::tokens(to_come);
        if least > bounds.tokens {
            return Err(too_many(least));
        }
        let (before, after) = match special {
            Special::Add => (&self.around.before[..], &self.around.after[..]),
            Special::Omit => (&[][..], &[][..]),
        };
        let mut ids = before.to_vec();
        let mut rest = text;
        while !rest.is_empty() {
            if !is_wanted() {
                return Err(TextError::Unwanted);
            }
            let part = self.seams.first(rest, PART_BYTES);
            if part.text.len() > bounds.stretch.max(PART_BYTES) {
                return Err(TextError::StretchTooLong { bytes: part.text.len(), limit: bounds.stretch });
            }
            ids.extend(encode(&self.library, part.text, AddedByLibrary::None)?);
            to_come -= counts.sum(&rest[..rest.len() - part.rest.len()]);
            rest = part.rest;
            let least = ids.len() + Counts::tokens(to_come) + after.len();
            if least > bounds.tokens {
                return Err(too_many(least));
            }
        }
        ids.extend_from_slice(after);
        Ok(ids)
    }

    /// The ids of a rendered chat template. Nothing is added: templates write their special tokens
    /// themselves.
    ///
    /// # Errors
    /// As [`Self::encode`].
    pub fn encode_chat(&self, rendered: &str) -> Result<Vec<u32>, TextError> {
        self.encode(rendered, Special::Omit)
    }

    /// How few tokens `text` can have, special tokens aside; 0 where nothing can be said. Reads every byte once.
    #[must_use]
    pub fn least_tokens(&self, text: &str) -> usize {
        Counts::tokens(self.floor.counts(text).sum(text))
    }

    /// The text of `ids`; bytes that are not UTF-8 become U+FFFD. Ids below the vocabulary size that the
    /// tokenizer does not know (padding of the embedding) leave no text.
    ///
    /// # Errors
    /// An id is not below the vocabulary size.
    pub fn decode(&self, ids: &[u32], special: SpecialText) -> Result<String, TextError> {
        let vocab = self.pieces.vocab();
        if let Some(&id) = ids.iter().find(|id| **id >= vocab) {
            return Err(TextError::UnknownId { id, vocab });
        }
        let mut detokenizer = Detokenizer::new(Arc::clone(&self.pieces), special);
        let mut text: String = ids.iter().map(|id| detokenizer.push(*id)).collect();
        text += &detokenizer.finish();
        Ok(text)
    }

    /// The text of one id by itself, special tokens included; bytes that are not UTF-8 become U+FFFD.
    #[must_use]
    pub fn token_text(&self, id: u32) -> String {
        String::from_utf8_lossy(self.pieces.bytes(id)).into_owned()
    }

    /// The bytes of one id by itself, special tokens included; empty for an unknown id.
    #[must_use]
    pub fn token_bytes(&self, id: u32) -> Vec<u8> {
        self.pieces.bytes(id).to_vec()
    }

    /// Ids are below this.
    #[must_use]
    pub fn vocab(&self) -> u32 {
        self.pieces.vocab()
    }

    /// The texts of the special tokens that `tokenizer_config.json` names.
    #[must_use]
    pub fn special_tokens(&self) -> &SpecialTokens {
        &self.special
    }

    /// The id of the begin-of-sequence token, where the model has one.
    #[must_use]
    pub fn bos_id(&self) -> Option<u32> {
        self.library.token_to_id(self.special.bos.as_deref()?)
    }

    /// The id of the end-of-sequence token, where `tokenizer_config.json` names one. Which ids end a
    /// generation is said by `generation_config.json`.
    #[must_use]
    pub fn eos_id(&self) -> Option<u32> {
        self.library.token_to_id(self.special.eos.as_deref()?)
    }

    /// The chat template.
    ///
    /// # Errors
    /// The model has none, or it cannot be compiled; the model still serves plain prompts.
    pub fn chat_template(&self) -> Result<&ChatTemplate, TextError> {
        self.template.as_deref().map_err(Clone::clone)
    }

    /// A detokenizer for text that goes on after `prompt_tail`, the last ids of a prompt (four are enough):
    /// a character that the prompt began is completed, and no first space is dropped. With an empty tail
    /// the text stands by itself, as the answer in a chat does: decoders that drop a first space do so.
    #[must_use]
    pub fn detokenizer(&self, prompt_tail: &[u32]) -> Detokenizer {
        let text = Detokenizer::new(Arc::clone(&self.pieces), SpecialText::Drop);
        if prompt_tail.is_empty() { text } else { text.continuing(prompt_tail) }
    }
}

impl Around {
    fn new(library: &tokenizers::Tokenizer, config: &TokenizerConfig) -> Result<Self, TextError> {
        let mut around = Self::of_post_processor(library)?;
        if let Some(add) = config.add_bos {
            around.before = flagged(library, "bos", add, config.special.bos.as_deref())?;
        }
        if let Some(add) = config.add_eos {
            around.after = flagged(library, "eos", add, config.special.eos.as_deref())?;
        }
        Ok(around)
    }

    fn of_post_processor(library: &tokenizers::Tokenizer) -> Result<Self, TextError> {
        let plain = encode(library, PROBE, AddedByLibrary::None)?;
        let whole = encode(library, PROBE, AddedByLibrary::ItsOwn)?;
        // From the end, so that a probe without ids puts everything before the text.
        let found = (0..=whole.len()).rev().find(|&at| whole[at..].starts_with(&plain));
        let at = found.ok_or_else(|| TextError::InvalidFile {
            file: pieces::FILE,
            reason: "`post_processor` does more than put tokens around a text".into(),
        })?;
        Ok(Self { before: whole[..at].to_vec(), after: whole[at + plain.len()..].to_vec() })
    }
}

fn template(
    default: Option<&str>,
    tool_use: Option<&str>,
    special: &SpecialTokens,
) -> Result<Arc<ChatTemplate>, TextError> {
    if default.is_none() && tool_use.is_none() {
        return Err(TextError::NoChatTemplate);
    }
    ChatTemplate::named(default, tool_use, special).map(Arc::new)
}

/// The ids that `add_bos_token` or `add_eos_token` asks for.
fn flagged(
    library: &tokenizers::Tokenizer,
    name: &str,
    add: bool,
    token: Option<&str>,
) -> Result<Vec<u32>, TextError> {
    if !add {
        return Ok(Vec::new());
    }
    let id = token.and_then(|t| library.token_to_id(t)).ok_or_else(|| TextError::InvalidFile {
        file: config::FILE,
        reason: format!(
            "`add_{name}_token` is true, but `{name}_token` is {token:?}, which tokenizer.json does not have"
        ),
    })?;
    Ok(vec![id])
}

fn library(json: &[u8]) -> Result<tokenizers::Tokenizer, TextError> {
    let invalid = |reason| TextError::InvalidFile { file: pieces::FILE, reason };
    let mut library = contained(|| tokenizers::Tokenizer::from_bytes(json)).map_err(invalid)?;
    library.with_padding(None);
    library.with_truncation(None).map_err(|e| invalid(e.to_string()))?;
    Ok(library)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum AddedByLibrary {
    None,
    ItsOwn,
}

fn encode(library: &tokenizers::Tokenizer, text: &str, added: AddedByLibrary) -> Result<Vec<u32>, TextError> {
    let encoding = contained(|| library.encode_fast(text, added == AddedByLibrary::ItsOwn));
    encoding.map(|e| e.get_ids().to_vec()).map_err(|reason| TextError::Encode { reason })
}

/// Calls the library, which panics on some malformed files where it should give an error.
fn contained<T>(call: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(result) => result.map_err(|e| e.to_string()),
        Err(panic) => Err(match panic.downcast::<String>() {
            Ok(words) => *words,
            Err(_) => "the tokenizer library failed on it".into(),
        }),
    }
}
