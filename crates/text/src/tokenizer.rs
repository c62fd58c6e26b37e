//! The tokenizer: text to ids and ids to text, through the `tokenizers` library.
//!
//! Always holds: every id it returns is below the model's vocabulary size.

use std::sync::Arc;

use crate::around::Around;
use crate::config::Templates;
use crate::floor::{Counts, Floor};
use crate::library::{AddedByLibrary, Library, encode};
use crate::pieces::Pieces;
use crate::seams::Seams;
use crate::template::ChatTemplate;
use crate::{Detokenizer, SpecialText, SpecialToken, SpecialTokens, TextError, TokenizerFiles};

/// Cap on a text to encode. Edges have smaller caps of their own; this one bounds what the crate can be
/// made to allocate.
const MAX_TEXT_BYTES: usize = 16 << 20;
/// Bytes of a part that a text is tokenized in. The library takes some 200 times as much memory for it.
const PART_BYTES: usize = 16 << 10;

/// Whether encoding adds the tokens that the model expects around a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Special {
    /// Add what the post-processor of `tokenizer.json` adds; `add_bos_token` and `add_eos_token` of
    /// `tokenizer_config.json` override it where they are given.
    Add,
    /// Add nothing.
    Omit,
}

/// Bounds of [`Tokenizer::encode_within`].
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Most tokens.
    pub tokens: usize,
    /// Most bytes that hold together, so that they can only be tokenized at once: a word, or a whole text where nothing is
    /// known of how the tokenizer splits it.
    pub stretch: usize,
}

/// A model's tokenizer. Cloning is cheap.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    library: Arc<Library>,
    pieces: Arc<Pieces>,
    around: Arc<Around>,
    seams: Arc<Seams>,
    floor: Arc<Floor>,
    template: Result<Arc<ChatTemplate>, TextError>,
}

impl Tokenizer {
    /// Reads the files of a tokenizer, for a model with `vocab` token ids. Tokens may have ids beyond: a text that needs
    /// one is refused.
    ///
    /// A chat template that cannot be compiled does not fail this call: [`Self::chat_template`] tells.
    ///
    /// # Errors
    /// A file is too large or malformed, or asks for what is not done here; the decoder is of a family that generative
    /// models do not use; or a token that is to be added to every text does not exist.
    pub fn from_files(files: &TokenizerFiles<'_>, vocab: u32) -> Result<Self, TextError> {
        let (library, config) = Library::read(files)?;
        let pieces = Pieces::new(library.get(), vocab)?;
        let around = Around::new(&library, &config, vocab)?;
        let (seams, floor) = (Seams::of(library.get()), Floor::of(library.get(), &pieces));
        let Templates { default, tool_use } = &config.templates;
        let template = template(default.as_deref(), tool_use.as_deref(), library.named());
        Ok(Self {
            library: Arc::new(library),
            pieces: Arc::new(pieces),
            around: Arc::new(around),
            seams: Arc::new(seams),
            floor: Arc::new(floor),
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
                template(default.as_deref(), tool_use.as_deref(), self.library.named())
            });
        }
        self
    }

    /// The ids of `text`. Special tokens spelled out in it are recognised, as the reference does, unless
    /// `tokenizer_config.json` says `split_special_tokens`.
    ///
    /// # Errors
    /// The text is too long, the tokenizer refuses it (no unknown token where one is needed), or it has a token whose id
    /// is not below the vocabulary size.
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
            let of_part = encode(self.library.get(), part.text, AddedByLibrary::None)?;
            self.library.check_ids(&of_part, self.vocab())?;
            ids.extend(of_part);
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

    /// Lower bound of the tokens of `text`, special tokens aside; 0 without a bound. Reads every byte once.
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

    /// The special tokens that have a name.
    #[must_use]
    pub fn named_tokens(&self) -> &SpecialTokens {
        self.library.named()
    }

    /// All special tokens, by id.
    #[must_use]
    pub fn special_tokens(&self) -> &[SpecialToken] {
        self.library.special()
    }

    /// How many tokens have ids that are not below the vocabulary size. A text that has one of them is refused.
    #[must_use]
    pub fn tokens_beyond(&self) -> usize {
        self.library.get().get_vocab(true).into_values().filter(|id| *id >= self.vocab()).count()
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
