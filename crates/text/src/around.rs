//! The ids put before and after a text.
//!
//! What the post-processor of `tokenizer.json` adds; `add_bos_token` and `add_eos_token` of `tokenizer_config.json` take
//! the place of it where they are given, so that nothing is added twice. Transformers 4 does so for the classes that know
//! these keys, transformers 5 for none.

use crate::TextError;
use crate::config::{self, TokenizerConfig};
use crate::declared::Place;
use crate::library::{AddedByLibrary, Library, encode};
use crate::pieces;

/// A text whose ids, with and without special tokens, show which ones the tokenizer adds and where.
const PROBE: &str = "a";

/// The ids put before and after a text.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Around {
    pub(crate) before: Vec<u32>,
    pub(crate) after: Vec<u32>,
}

impl Around {
    /// # Errors
    /// The post-processor does more than to put tokens around a text, or one of these is not there or has an id that is
    /// not below `vocab`.
    pub(crate) fn new(library: &Library, config: &TokenizerConfig, vocab: u32) -> Result<Self, TextError> {
        let mut around = Self::of_post_processor(library)?;
        if let Some(add) = config.add_bos {
            around.before = flagged(library, "bos", add)?;
        }
        if let Some(add) = config.add_eos {
            around.after = flagged(library, "eos", add)?;
        }
        library.check_ids(&around.before, vocab)?;
        library.check_ids(&around.after, vocab)?;
        Ok(around)
    }

    fn of_post_processor(library: &Library) -> Result<Self, TextError> {
        let plain = encode(library.get(), PROBE, AddedByLibrary::None)?;
        let whole = encode(library.get(), PROBE, AddedByLibrary::ItsOwn)?;
        // From the end, so that a probe without ids puts everything before the text.
        let found = (0..=whole.len()).rev().find(|&at| whole[at..].starts_with(&plain));
        let at = found.ok_or_else(|| TextError::InvalidFile {
            file: pieces::FILE,
            reason: "`post_processor` does more than put tokens around a text".into(),
        })?;
        Ok(Self { before: whole[..at].to_vec(), after: whole[at + plain.len()..].to_vec() })
    }
}

/// The ids that `add_bos_token` or `add_eos_token` asks for. A token that only its name adds was never trained.
fn flagged(library: &Library, name: &str, add: bool) -> Result<Vec<u32>, TextError> {
    if !add {
        return Ok(Vec::new());
    }
    let token = library.named().get(&format!("{name}_token"));
    let id = token.filter(|token| library.is_listed(token)).and_then(|t| library.get().token_to_id(t));
    let id = id.ok_or_else(|| {
        Place::new(config::FILE, format!("add_{name}_token")).wrong(format_args!(
            "is true, but `{name}_token` is {token:?}, which neither tokenizer.json nor a list of added tokens has"
        ))
    })?;
    Ok(vec![id])
}
