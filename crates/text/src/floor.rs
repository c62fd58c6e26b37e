//! Lower bound of a text's number of tokens, without tokenizing it.
//!
//! What must hold: no tokenization has fewer. A token that stands for `n` bytes of text counts at most `1/n` for each
//! of them, so every byte is given one over the length of the longest token that has it. A byte that may be dropped, or that one token may
//! stand for any number of, counts nothing.

use serde_json::Value;
use tokenizers::models::ModelWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{Model, Tokenizer};

use crate::pieces::Pieces;

/// A token.
const ONE: u64 = 1 << 32;
/// What a space becomes in some vocabularies.
const SPACE: char = '▁';

/// Count of every byte of a text, in units of [`ONE`] a token.
#[derive(Debug)]
pub(crate) struct Floor {
    bytes: [u64; 256],
    /// The same where the text is not all ASCII.
    foreign: [u64; 256],
}

/// What the bytes of one text count.
#[derive(Clone, Copy)]
pub(crate) struct Counts<'a>(&'a [u64; 256]);

impl Counts<'_> {
    /// Of a part of the text.
    pub(crate) fn sum(self, part: &str) -> u128 {
        part.bytes().map(|byte| u128::from(self.0[usize::from(byte)])).sum()
    }

    /// Tokens that what has this sum has at least.
    pub(crate) fn tokens(sum: u128) -> usize {
        usize::try_from(sum / u128::from(ONE)).unwrap_or(usize::MAX)
    }
}

/// How the bytes of a token relate to those of the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Change {
    /// They are the same, or there are fewer in the text.
    None,
    /// So it is for a text of ASCII; else a character of ASCII still has a byte of its own in them.
    Composed,
}

impl Floor {
    /// Reads the vocabulary. `pieces` are what its ids stand for.
    pub(crate) fn of(library: &Tokenizer, pieces: &Pieces) -> Self {
        Self::found(library, pieces).unwrap_or(Self { bytes: [0; 256], foreign: [0; 256] })
    }

    /// What the bytes of `text` count.
    pub(crate) fn counts(&self, text: &str) -> Counts<'_> {
        Counts(if text.is_ascii() { &self.bytes } else { &self.foreign })
    }

    /// `None` without a bound.
    fn found(library: &Tokenizer, pieces: &Pieces) -> Option<Self> {
        let change = match library.get_normalizer() {
            Some(normalizer) => change(&serde_json::to_value(normalizer).ok()?)?,
            None => Change::None,
        };
        let ModelWrapper::BPE(bpe) = library.get_model() else { return None };
        if bpe.get_continuing_subword_prefix().is_some() || bpe.end_of_word_suffix.is_some() {
            return None;
        }
        let is_byte_level = match library.get_pre_tokenizer() {
            Some(splitter) => ends_in_bytes(&serde_json::to_value(splitter).ok()?)?,
            None => false,
        };
        let is_whole = if is_byte_level {
            ByteLevel::alphabet().into_iter().all(|c| bpe.token_to_id(&c.to_string()).is_some())
        } else {
            bpe.byte_fallback
                && (0..=u8::MAX).all(|byte| bpe.token_to_id(&format!("<0x{byte:02X}>")).is_some())
        };
        // Else there are characters that are dropped, or that one token for the unknown may stand for many of.
        if !is_whole {
            return None;
        }
        let added = library.get_added_vocabulary().get_added_tokens_decoder();
        let takes_spaces = added.values().any(|token| token.lstrip || token.rstrip);
        let mut longest = [1_usize; 256];
        let mut note = |bytes: &[u8], length: usize| {
            bytes
                .iter()
                .for_each(|&byte| longest[usize::from(byte)] = longest[usize::from(byte)].max(length));
        };
        for (token, id) in library.get_vocab(true) {
            let piece = pieces.bytes(id);
            let spelled = if is_byte_level && !added.contains_key(&id) { &[][..] } else { token.as_bytes() };
            let length = piece.len().max(spelled.len());
            note(piece, length);
            note(spelled, length);
            if token.contains(SPACE) {
                note(b" ", length);
            }
        }
        let most = longest.into_iter().max().unwrap_or(1);
        let byte = |byte: u8| u8::is_ascii_whitespace(&byte) || byte == 0x0B || !byte.is_ascii();
        let count = |at: usize, length: usize| {
            // At most 256 of them.
            if takes_spaces && byte(at as u8) { 0 } else { ONE / length as u64 }
        };
        let bytes = std::array::from_fn(|at| count(at, longest[at]));
        let foreign = match change {
            Change::None => bytes,
            Change::Composed => std::array::from_fn(|at| if at < 128 { count(at, most) } else { 0 }),
        };
        Some(Self { bytes, foreign })
    }
}

/// `None` for what may make a text shorter in some other way.
fn change(json: &Value) -> Option<Change> {
    match json["type"].as_str()? {
        "Sequence" => {
            let steps = json["normalizers"].as_array()?.iter().map(change);
            steps
                .collect::<Option<Vec<_>>>()
                .map(|steps| if steps.contains(&Change::Composed) { Change::Composed } else { Change::None })
        }
        "NFC" | "NFD" | "NFKC" | "NFKD" => Some(Change::Composed),
        "Prepend" => Some(Change::None),
        "Replace" if json["pattern"]["String"] == " " && json["content"] == SPACE.to_string() => {
            Some(Change::None)
        }
        _ => None,
    }
}

/// Whether the last step makes bytes of the text. `None` where a step may drop something.
fn ends_in_bytes(json: &Value) -> Option<bool> {
    match json["type"].as_str()? {
        "ByteLevel" => Some(true),
        "Digits" | "Metaspace" => Some(false),
        "Punctuation" | "Split" if json["behavior"] != "Removed" => Some(false),
        "Sequence" => {
            let steps = json["pretokenizers"].as_array()?.iter().map(ends_in_bytes);
            steps.collect::<Option<Vec<_>>>().map(|steps| steps.last() == Some(&true))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_that_may_drop_something_leave_no_floor() {
        let step = |behavior: &str| serde_json::json!({"type": "Split", "pattern": {"String": " "}, "behavior": behavior});
        let bytes = serde_json::json!({"type": "ByteLevel"});
        let both = |first: Value| serde_json::json!({"type": "Sequence", "pretokenizers": [first, bytes]});
        assert_eq!(ends_in_bytes(&both(step("Isolated"))), Some(true));
        assert_eq!(ends_in_bytes(&both(step("Removed"))), None);
        assert_eq!(ends_in_bytes(&serde_json::json!({"type": "WhitespaceSplit"})), None);
        assert_eq!(change(&serde_json::json!({"type": "Strip"})), None);
        assert_eq!(
            change(&serde_json::json!({"type": "Replace", "pattern": {"String": "aa"}, "content": "b"})),
            None
        );
    }
}
