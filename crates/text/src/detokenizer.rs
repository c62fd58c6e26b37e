//! Ids to text, one id at a time.
//!
//! Holds at most the bytes of one unfinished UTF-8 character, so that the work per id is that of its own
//! bytes. Owns no vocabulary; which ids end a text is the caller's knowledge.

use std::sync::Arc;

use crate::SpecialText;
use crate::pieces::Pieces;

/// Turns ids into text as they come. Special tokens are dropped.
///
/// All pushes and the finish, joined, are [`Tokenizer::decode`](crate::Tokenizer::decode) of the same ids
/// with [`SpecialText::Drop`] (less the stripping of the text's beginning when there was a prompt tail).
#[derive(Debug, Clone)]
pub struct Detokenizer {
    pieces: Arc<Pieces>,
    special: SpecialText,
    /// A prefix of a UTF-8 character, at most 3 bytes between pushes.
    pending: Vec<u8>,
    /// How much of the text's beginning may still be stripped.
    strip: usize,
}

impl Detokenizer {
    pub(crate) fn new(pieces: Arc<Pieces>, special: SpecialText) -> Self {
        let strip = pieces.leading().map_or(0, |s| s.count);
        Self { pieces, special, pending: Vec::new(), strip }
    }

    /// The state after `tail`, in the middle of a text.
    pub(crate) fn continuing(mut self, tail: &[u32]) -> Self {
        for id in tail {
            self.push(*id);
        }
        self.strip = 0;
        self
    }

    /// Takes the next id and returns the text that became certain: empty while a character is incomplete,
    /// for special tokens, and for ids that the tokenizer does not know.
    pub fn push(&mut self, id: u32) -> String {
        if self.special == SpecialText::Drop && self.pieces.is_special(id) {
            return String::new();
        }
        self.pending.extend_from_slice(self.pieces.bytes(id));
        let text = self.take_certain();
        self.strip_beginning(text)
    }

    /// Ends the text: an incomplete character becomes U+FFFD.
    pub fn finish(&mut self) -> String {
        let text = String::from_utf8_lossy(&std::mem::take(&mut self.pending)).into_owned();
        self.strip_beginning(text)
    }

    /// Removes from `pending` all but an unfinished last character.
    fn take_certain(&mut self) -> String {
        let mut unfinished = 0;
        let mut rest = &self.pending[..];
        while let Err(error) = std::str::from_utf8(rest) {
            let Some(invalid) = error.error_len() else {
                unfinished = rest.len() - error.valid_up_to();
                break;
            };
            rest = &rest[error.valid_up_to() + invalid..];
        }
        let certain = self.pending.len() - unfinished;
        let text = String::from_utf8_lossy(&self.pending[..certain]).into_owned();
        self.pending.drain(..certain);
        text
    }

    fn strip_beginning(&mut self, mut text: String) -> String {
        let Some(leading) = self.pieces.leading() else { return text };
        let mut cut = 0;
        for c in text.chars() {
            if self.strip == 0 {
                break;
            }
            if c != leading.content {
                self.strip = 0;
                break;
            }
            self.strip -= 1;
            cut += c.len_utf8();
        }
        text.drain(..cut);
        text
    }
}
