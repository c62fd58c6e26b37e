//! The `tokenizers` library's tokenizer, with what the files beside `tokenizer.json` add to it.
//!
//! Truncation and padding that a `tokenizer.json` may carry from training are switched off, as the reference does when it
//! serves. What the library does by chance is refused.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::panic::{AssertUnwindSafe, catch_unwind};

use tokenizers::models::ModelWrapper;
use tokenizers::{AddedToken, Tokenizer};

use crate::added::{Additions, Known};
use crate::config::{self, CleanUp, TokenizerConfig};
use crate::declared::{Declared, Place};
use crate::{SpecialToken, SpecialTokens, TextError, TokenizerFiles, growth, pieces};

/// Cap on the size of `tokenizer.json`; published ones stay below 40 MiB.
const MAX_FILE_BYTES: usize = 64 << 20;

/// A library's tokenizer and what is known of its special tokens.
#[derive(Debug)]
pub(crate) struct Library {
    library: Tokenizer,
    named: SpecialTokens,
    special: Vec<SpecialToken>,
    /// Tokens that exist for their name alone.
    unlisted: HashSet<String>,
}

impl Library {
    /// Reads the files.
    ///
    /// # Errors
    /// One of them is too large or malformed, or asks for what is not done here.
    pub(crate) fn read(files: &TokenizerFiles<'_>) -> Result<(Self, TokenizerConfig), TextError> {
        let bytes = files.tokenizer.len();
        if bytes > MAX_FILE_BYTES {
            return Err(TextError::FileTooLarge { file: pieces::FILE, bytes, limit: MAX_FILE_BYTES });
        }
        let config = files.config.map(TokenizerConfig::from_bytes).transpose()?.unwrap_or_default();
        let mut library = contained(|| Tokenizer::from_bytes(files.tokenizer)).map_err(invalid)?;
        check_clean_up(&library, config.clean_up)?;
        let padding = library.get_padding().map(|padding| padding.pad_token.clone());
        library.with_padding(None);
        library.with_truncation(None).map_err(|e| invalid(e.to_string()))?;
        library.set_encode_special_tokens(config.split_special);
        let before = added_tokens(&library);
        let known = Known {
            tokenizer_json: files.tokenizer,
            special_tokens_map: files.special_tokens_map,
            added_tokens: files.added_tokens,
            own: before.keys().cloned().collect(),
            padding,
        };
        let additions = Additions::of(&config.tokens, &known)?;
        let unlisted = add(&mut library, &additions)?;
        check_forms(&library)?;
        growth::check(&library).map_err(invalid)?;
        let named = additions.special();
        let special = special(&library, &before, &additions);
        Ok((Self { library, named, special, unlisted }, config))
    }

    pub(crate) fn get(&self) -> &Tokenizer {
        &self.library
    }

    /// Special tokens by name.
    pub(crate) fn named(&self) -> &SpecialTokens {
        &self.named
    }

    /// Special tokens by id.
    pub(crate) fn special(&self) -> &[SpecialToken] {
        &self.special
    }

    /// Whether a token is in the vocabulary or one of the lists of added tokens, and not there for its name alone.
    pub(crate) fn is_listed(&self, token: &str) -> bool {
        self.library.token_to_id(token).is_some() && !self.unlisted.contains(token)
    }

    /// # Errors
    /// One of the ids is not below `vocab`.
    pub(crate) fn check_ids(&self, ids: &[u32], vocab: u32) -> Result<(), TextError> {
        match ids.iter().find(|id| **id >= vocab) {
            None => Ok(()),
            Some(&id) => {
                let token = self.library.id_to_token(id).unwrap_or_default();
                Err(TextError::TokenBeyondVocab { token, id, vocab })
            }
        }
    }
}

fn invalid(reason: String) -> TextError {
    TextError::InvalidFile { file: pieces::FILE, reason }
}

/// The tokens added to the vocabulary, by text.
fn added_tokens(library: &Tokenizer) -> HashMap<String, AddedToken> {
    let added = library.get_added_vocabulary().get_added_tokens_decoder().values();
    added.map(|token| (token.content.clone(), token.clone())).collect()
}

/// Adds all tokens and tells which ones were nowhere before.
fn add(library: &mut Tokenizer, additions: &Additions) -> Result<HashSet<String>, TextError> {
    let named: HashSet<&str> = additions.named.iter().map(|(_, token)| token.content.as_str()).collect();
    let added = |tokens: &[Declared]| -> Vec<AddedToken> {
        tokens.iter().map(|token| token.added(named.contains(token.content.as_str()))).collect()
    };
    let refused =
        |reason| TextError::InvalidFile { file: config::FILE, reason: format!("its added tokens: {reason}") };
    contained(|| library.add_tokens(added(&additions.listed))).map_err(refused)?;
    let unlisted = additions.unlisted.iter().filter(|token| library.token_to_id(&token.content).is_none());
    let unlisted = unlisted.map(|token| token.content.clone()).collect();
    contained(|| library.add_tokens(added(&additions.unlisted))).map_err(refused)?;
    Ok(unlisted)
}

/// The reference takes spaces out of what tokenizers other than BPE decode, where it is told to.
fn check_clean_up(library: &Tokenizer, clean_up: CleanUp) -> Result<(), TextError> {
    let is_bpe = matches!(library.get_model(), ModelWrapper::BPE(_));
    match clean_up {
        CleanUp::All => {}
        CleanUp::NotBpe if !is_bpe => {}
        CleanUp::None | CleanUp::NotBpe => return Ok(()),
    }
    Err(Place::new(config::FILE, "clean_up_tokenization_spaces").wrong(
        "is true, which takes spaces out of answers after they are decoded; that is not done here, set it to false",
    ))
}

/// Of two tokens that are the same once normalized, the library finds one or the other, by chance.
fn check_forms(library: &Tokenizer) -> Result<(), TextError> {
    let added = library.get_added_vocabulary().get_added_tokens_decoder();
    let mut seen: BTreeMap<String, &str> = BTreeMap::new();
    for (id, token) in added.iter().filter(|(_, token)| token.normalized) {
        let form = library.id_to_token(*id).unwrap_or_default();
        if let Some(other) = seen.insert(form, &token.content) {
            let mut both = [other, &token.content];
            both.sort_unstable();
            let [first, second] = both;
            return Err(invalid(format!(
                "the added tokens {first:?} and {second:?} are the same once normalized; take one out, or set its \
                 `normalized` to false where it is declared"
            )));
        }
    }
    Ok(())
}

/// Lists the special tokens. `before` is what `tokenizer.json` adds by itself.
fn special(
    library: &Tokenizer,
    before: &HashMap<String, AddedToken>,
    additions: &Additions,
) -> Vec<SpecialToken> {
    let vocabulary = library.get_added_vocabulary();
    // The last one counts.
    let declared: HashMap<&str, &Declared> = additions
        .listed
        .iter()
        .chain(&additions.unlisted)
        .map(|token| (token.content.as_str(), token))
        .collect();
    let mut names: HashMap<&str, Vec<String>> = HashMap::new();
    for (name, token) in &additions.named {
        names.entry(&token.content).or_default().push(name.clone());
    }
    let source = |token: &AddedToken| {
        let place = declared.get(token.content.as_str()).map(|declared| declared.place.to_string());
        match (before.get(&token.content), place) {
            (Some(own), Some(place)) if own != token => format!("{}, then {place}", pieces::FILE),
            (None, Some(place)) => place,
            _ => pieces::FILE.to_owned(),
        }
    };
    let added = vocabulary.get_added_tokens_decoder();
    let special = added.iter().filter(|(_, token)| vocabulary.is_special_token(&token.content));
    let mut special: Vec<SpecialToken> = special
        .map(|(id, token)| SpecialToken {
            id: *id,
            text: token.content.clone(),
            names: names.get(token.content.as_str()).cloned().unwrap_or_default(),
            source: source(token),
        })
        .collect();
    special.sort_unstable_by_key(|token| token.id);
    special
}

/// Whether the library's post-processor adds its tokens.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum AddedByLibrary {
    None,
    ItsOwn,
}

/// The ids of a text.
///
/// # Errors
/// The library refuses it.
pub(crate) fn encode(library: &Tokenizer, text: &str, added: AddedByLibrary) -> Result<Vec<u32>, TextError> {
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
