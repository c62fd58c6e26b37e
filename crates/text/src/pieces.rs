//! The bytes every token id stands for.
//!
//! Computed once at load, so that text of any id sequence is the concatenation of its pieces, read as
//! UTF-8 with U+FFFD for what is not. This covers the two families of decoders that generative models
//! use: byte-level (every token is bytes in the GPT-2 alphabet) and SentencePiece-like (replacements, then
//! `<0xNN>` byte tokens, then a strip of the text's first spaces). Any other decoder is refused at load.
//!
//! Differs from the reference for one input only: where the byte tokens of a SentencePiece-like tokenizer
//! do not form UTF-8, the reference replaces every byte of the run by U+FFFD, valid characters included,
//! which cannot be known before the run ends; here only what is invalid is replaced.

use std::collections::HashMap;

use tokenizers::decoders::DecoderWrapper;
use tokenizers::{Decoder as _, Tokenizer};

use crate::TextError;

/// Name of the file, for messages.
pub(crate) const FILE: &str = "tokenizer.json";
/// Ids are below this in every vocabulary that is accepted; published ones stay below 2^18.
const MAX_VOCAB: u32 = 1 << 22;

/// Pieces of all ids of a vocabulary. Those that the tokenizer does not know are empty.
#[derive(Debug)]
pub(crate) struct Pieces {
    vocab: u32,
    /// `bytes[ends[id - 1]..ends[id]]` is the piece of `id`.
    ends: Vec<usize>,
    bytes: Vec<u8>,
    special: Vec<bool>,
    leading: Option<LeadingStrip>,
}

/// Up to `count` times `content` is dropped at the very beginning of a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LeadingStrip {
    pub(crate) content: char,
    pub(crate) count: usize,
}

impl Pieces {
    /// Builds the table of `tokenizer` for a model with `vocab` ids.
    ///
    /// # Errors
    /// `vocab` is absurd, or the decoder is of another family.
    pub(crate) fn new(tokenizer: &Tokenizer, vocab: u32) -> Result<Self, TextError> {
        if vocab > MAX_VOCAB {
            return Err(invalid(format!(
                "a vocabulary of {vocab} ids is more than the {MAX_VOCAB} supported"
            )));
        }
        let plan = Plan::of(tokenizer.get_decoder())?;
        let added = tokenizer.get_added_vocabulary();
        let mut pieces = Self {
            vocab,
            ends: Vec::with_capacity(vocab as usize),
            bytes: Vec::new(),
            special: vec![false; vocab as usize],
            leading: plan.leading,
        };
        for (id, special) in pieces.special.iter_mut().enumerate() {
            // `id` is below `vocab`, a u32.
            if let Some(token) = tokenizer.id_to_token(id as u32) {
                *special = added.is_special_token(&token);
                plan.append(token, &mut pieces.bytes)?;
            }
            pieces.ends.push(pieces.bytes.len());
        }
        Ok(pieces)
    }

    /// Number of ids of the model.
    pub(crate) fn vocab(&self) -> u32 {
        self.vocab
    }

    /// The bytes of `id`; empty for ids that the tokenizer does not know or that are out of range.
    pub(crate) fn bytes(&self, id: u32) -> &[u8] {
        let id = id as usize;
        let Some(&end) = self.ends.get(id) else { return &[] };
        let start = if id == 0 { 0 } else { self.ends[id - 1] };
        &self.bytes[start..end]
    }

    /// Whether `id` is a special token.
    pub(crate) fn is_special(&self, id: u32) -> bool {
        self.special.get(id as usize).copied().unwrap_or(false)
    }

    /// What is dropped at the beginning of a text.
    pub(crate) fn leading(&self) -> Option<LeadingStrip> {
        self.leading
    }
}

fn invalid(reason: String) -> TextError {
    TextError::InvalidFile { file: FILE, reason }
}

/// How a token's text becomes bytes.
enum Family<'a> {
    ByteLevel(HashMap<char, u8>),
    SentencePiece { replacements: Vec<&'a DecoderWrapper>, byte_fallback: bool },
}

struct Plan<'a> {
    family: Family<'a>,
    leading: Option<LeadingStrip>,
}

impl<'a> Plan<'a> {
    fn of(decoder: Option<&'a DecoderWrapper>) -> Result<Self, TextError> {
        let steps = match decoder {
            Some(DecoderWrapper::Sequence(sequence)) => sequence.get_decoders(),
            Some(one) => std::slice::from_ref(one),
            None => return Err(invalid("`decoder` is missing, so ids cannot become text".into())),
        };
        if let [DecoderWrapper::ByteLevel(_)] = steps {
            return Ok(Self { family: Family::ByteLevel(byte_alphabet()), leading: None });
        }
        Self::sentence_piece(steps)
    }

    /// Accepts `Replace* ByteFallback? Fuse? Strip?`, the strip only of the beginning.
    fn sentence_piece(steps: &'a [DecoderWrapper]) -> Result<Self, TextError> {
        let (mut replacements, mut byte_fallback, mut fused, mut leading) = (Vec::new(), false, false, None);
        for step in steps {
            match step {
                DecoderWrapper::Replace(_) if !byte_fallback && !fused => replacements.push(step),
                DecoderWrapper::ByteFallback(_) if !fused => byte_fallback = true,
                DecoderWrapper::Fuse(_) => fused = true,
                DecoderWrapper::Strip(strip) if fused && strip.stop == 0 && leading.is_none() => {
                    leading = Some(LeadingStrip { content: strip.content, count: strip.start });
                }
                other => return Err(unsupported(other)),
            }
        }
        Ok(Self { family: Family::SentencePiece { replacements, byte_fallback }, leading })
    }

    fn append(&self, token: String, bytes: &mut Vec<u8>) -> Result<(), TextError> {
        match &self.family {
            Family::ByteLevel(alphabet) => {
                let start = bytes.len();
                for c in token.chars() {
                    let Some(&byte) = alphabet.get(&c) else {
                        // An added token outside the alphabet is its own text.
                        bytes.truncate(start);
                        bytes.extend_from_slice(token.as_bytes());
                        break;
                    };
                    bytes.push(byte);
                }
            }
            Family::SentencePiece { replacements, byte_fallback } => {
                let mut text = token;
                for step in replacements {
                    let parts =
                        step.decode_chain(vec![text]).map_err(|e| invalid(format!("decoder: {e}")))?;
                    text = parts.concat();
                }
                match byte_token(&text).filter(|_| *byte_fallback) {
                    Some(byte) => bytes.push(byte),
                    None => bytes.extend_from_slice(text.as_bytes()),
                }
            }
        }
        Ok(())
    }
}

fn unsupported(step: &DecoderWrapper) -> TextError {
    let described = serde_json::to_string(step).unwrap_or_default();
    invalid(format!(
        "decoder step {described} is not supported here: the decoder must be ByteLevel, or Replace, \
         ByteFallback, Fuse and a Strip of the beginning, in this order"
    ))
}

/// `<0xNN>` as a byte.
fn byte_token(text: &str) -> Option<u8> {
    let hex = text.strip_prefix("<0x")?.strip_suffix('>')?;
    (hex.len() == 2).then(|| u8::from_str_radix(hex, 16).ok()).flatten()
}

/// The GPT-2 byte alphabet (`bytes_to_unicode`): printable Latin-1 stands for itself, the other bytes are,
/// in order, U+0100 onwards.
fn byte_alphabet() -> HashMap<char, u8> {
    let mut next = 0x100_u32;
    (0..=u8::MAX)
        .map(|byte| {
            let c = match byte {
                b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF => char::from(byte),
                _ => {
                    next += 1;
                    char::from_u32(next - 1).unwrap_or(char::REPLACEMENT_CHARACTER)
                }
            };
            (c, byte)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn byte_alphabet_is_the_published_one() {
        let alphabet = byte_alphabet();
        assert_eq!(alphabet.len(), 256);
        for (c, byte) in [('Ġ', b' '), ('Ċ', b'\n'), ('a', b'a'), ('Ń', 0xAD), ('ÿ', 0xFF), ('Ā', 0)] {
            assert_eq!(alphabet[&c], byte, "{c}");
        }
    }

    #[test]
    fn byte_tokens_are_exactly_two_hex_digits() {
        assert_eq!(byte_token("<0xE5>"), Some(0xE5));
        assert_eq!(byte_token("<0x8f>"), Some(0x8F));
        for other in ["<0xE>", "<0xE55>", "<0xGG>", "0xE5", "<0x>", "<0x+5"] {
            assert_eq!(byte_token(other), None, "{other}");
        }
    }
}
