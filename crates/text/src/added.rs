//! Tokens that the files beside `tokenizer.json` add to it: their order, and their names in templates.
//!
//! The rules are those of transformers' `TokenizersBackend`, step for step (`_from_pretrained`, `__init__`):
//!
//! - With `added_tokens_decoder` in `tokenizer_config.json`, its tokens are added in the order of their numbers, and
//!   `special_tokens_map.json` and `added_tokens.json` do not count. Without it, the map's keys replace those of the
//!   configuration, and the tokens of `added_tokens.json` and `tokenizer.json` take its place.
//! - Then come tokens that have a name and are nowhere yet, then those of `extra_special_tokens` (or, where that is empty,
//!   `additional_special_tokens`).
//! - A token that exists keeps its id and gets the flags it is added with; one that does not is numbered from the end of
//!   the vocabulary, whatever number a file gives it. Nothing makes a special token plain.
//!
//! Knows nothing of ids: the library gives them.

use std::collections::{BTreeMap, HashMap, HashSet};

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::config::{self, is_a_name, is_falsy, object};
use crate::declared::{Declared, Objects, Place, is_typed, typed_special};
use crate::{SpecialTokens, TextError, pieces};

/// Names of the files, for messages.
const MAP: &str = "special_tokens_map.json";
const ADDED: &str = "added_tokens.json";
/// The names that every tokenizer has, in the reference's order (`SPECIAL_TOKENS_ATTRIBUTES`).
const NAMES: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];
const DECODER: &str = "added_tokens_decoder";
const EXTRA: &str = "extra_special_tokens";
const ADDITIONAL: &str = "additional_special_tokens";
const SPECIFIC: &str = "model_specific_special_tokens";

/// Inputs: the files, and the tokens that the library read in `tokenizer.json`.
pub(crate) struct Known<'a> {
    pub(crate) tokenizer_json: &'a [u8],
    pub(crate) special_tokens_map: Option<&'a [u8]>,
    pub(crate) added_tokens: Option<&'a [u8]>,
    /// Texts of the tokens that `tokenizer.json` adds.
    pub(crate) own: HashSet<String>,
    /// What `tokenizer.json` pads with.
    pub(crate) padding: Option<String>,
}

/// Tokens to add.
#[derive(Debug)]
pub(crate) struct Additions {
    /// Tokens that a file lists with a number, then those that have none.
    pub(crate) listed: Vec<Declared>,
    pub(crate) unlisted: Vec<Declared>,
    /// All that have a name.
    pub(crate) named: Vec<(String, Declared)>,
}

impl Additions {
    /// Reads the keys of `tokenizer_config.json` about tokens, and the other files where they count.
    ///
    /// # Errors
    /// A key or an entry is not what it must be.
    pub(crate) fn of(config: &Map<String, Value>, known: &Known<'_>) -> Result<Self, TextError> {
        let mut keys = Keys::of_config(config)?;
        let listed = match config.get(DECODER) {
            Some(decoder) => Listed::of_decoder(decoder)?,
            None => {
                if let Some(bytes) = known.special_tokens_map {
                    keys.replace_by_map(object(MAP, bytes)?)?;
                }
                Listed::of_other_files(&keys, known)?
            }
        };
        if let Some(padding) = &known.padding {
            keys.names.entry("pad_token").or_insert_with(|| {
                keys.places.insert("pad_token".into(), Place::new(pieces::FILE, "padding"));
                padding.as_str().into()
            });
        }
        let named = keys.named(&listed.by_text)?;
        let extra = keys.extra_tokens()?;
        let listed: Vec<Declared> = listed.by_number.into_values().collect();
        let mut there = known.own.clone();
        there.extend(listed.iter().map(|token| token.content.clone()));
        let mut unlisted = Unlisted { there, tokens: Vec::new(), at: HashMap::new() };
        named.iter().for_each(|(_, token)| unlisted.take(token));
        extra.iter().for_each(|token| unlisted.take(token));
        Ok(Self { listed, unlisted: unlisted.tokens, named })
    }

    /// The names and texts that templates see.
    pub(crate) fn special(&self) -> SpecialTokens {
        self.named.iter().map(|(name, token)| (name.clone(), token.content.clone())).collect()
    }
}

/// Tokens without a number, each once.
struct Unlisted {
    there: HashSet<String>,
    tokens: Vec<Declared>,
    /// Where those of a text are in `tokens`.
    at: HashMap<String, Vec<usize>>,
}

impl Unlisted {
    fn take(&mut self, token: &Declared) {
        let same = self.at.entry(token.content.clone()).or_default();
        if self.there.contains(&token.content) || same.iter().any(|&at| self.tokens[at].is_same(token)) {
            return;
        }
        same.push(self.tokens.len());
        self.tokens.push(token.clone());
    }
}

/// What the files say of names and lists; the reference's `init_kwargs`.
struct Keys {
    /// `*_token`, as written, in order.
    names: Map<String, Value>,
    /// Names of the model's own, which go before those of the same name in `names`.
    specific: Map<String, Value>,
    extra: Option<(Value, Place)>,
    additional: Option<(Value, Place)>,
    /// Where names are written that are not from `tokenizer_config.json`.
    places: BTreeMap<String, Place>,
}

impl Keys {
    fn of_config(config: &Map<String, Value>) -> Result<Self, TextError> {
        let written = |key: &str| Some((config.get(key)?.clone(), Place::new(config::FILE, key)));
        let (mut extra, mut additional) = (written(EXTRA), written(ADDITIONAL));
        if additional.is_some() && extra.as_ref().is_none_or(|(value, _)| is_falsy(value)) {
            extra = additional.take();
        }
        let (mut names, mut specific) = (Map::new(), Map::new());
        for (key, value) in config.iter().filter(|(key, _)| is_a_name(key)) {
            let of_model = value.is_string() && !NAMES.contains(&key.as_str());
            if of_model { &mut specific } else { &mut names }.insert(key.clone(), value.clone());
        }
        let mut keys = Self { names, specific, extra, additional, places: BTreeMap::new() };
        keys.extra_by_name();
        if keys.specific.is_empty() {
            match config.get(SPECIFIC) {
                None | Some(Value::Null) => {}
                Some(Value::Object(own)) => {
                    let place = Place::new(config::FILE, SPECIFIC);
                    keys.places.extend(own.keys().map(|name| (name.clone(), place.at(name))));
                    keys.specific = own.clone();
                }
                Some(_) => return Err(Place::new(config::FILE, SPECIFIC).wrong("is not an object of names")),
            }
        }
        Ok(keys)
    }

    /// Takes the keys of `special_tokens_map.json` in place of those that are there.
    fn replace_by_map(&mut self, map: Map<String, Value>) -> Result<(), TextError> {
        for (key, value) in map {
            let place = Place::new(MAP, key.as_str());
            match (key.as_str(), value) {
                (EXTRA, Value::Array(more)) => {
                    let mut all = match self.extra.take() {
                        Some((Value::Array(all), _)) => all,
                        _ => Vec::new(),
                    };
                    let more = more.into_iter().map(|token| match token {
                        Value::Object(token) => typed_special(token),
                        other => other,
                    });
                    let mut seen: HashSet<String> = all.iter().map(Value::to_string).collect();
                    all.extend(more.filter(|token| seen.insert(token.to_string())));
                    self.extra = Some((Value::Array(all), place));
                }
                (EXTRA, value) => self.extra = Some((value, place)),
                (ADDITIONAL, value) => self.additional = Some((value, place)),
                (name, value) if is_a_name(name) => {
                    let value = match value {
                        Value::Object(token) => typed_special(token),
                        other @ (Value::Null | Value::String(_)) => other,
                        other => {
                            return Err(place.wrong(format_args!("is {other}; a token is text or an object")));
                        }
                    };
                    self.places.insert(key.clone(), place);
                    self.names.insert(key, value);
                }
                _ => return Err(place.wrong("is not the name of a special token; take it out")),
            }
        }
        self.extra_by_name();
        Ok(())
    }

    /// Makes names of `extra_special_tokens` where it is an object.
    fn extra_by_name(&mut self) {
        match self.extra.take() {
            Some((Value::Object(named), place)) => {
                self.places.extend(named.keys().map(|name| (name.clone(), place.at(name))));
                self.specific.extend(named);
            }
            other => self.extra = other,
        }
    }

    fn place(&self, name: &str) -> Place {
        self.places.get(name).cloned().unwrap_or_else(|| Place::new(config::FILE, name))
    }

    /// All names and their tokens; those of `listed` have the flags that are listed.
    fn named(&self, listed: &HashMap<String, Declared>) -> Result<Vec<(String, Declared)>, TextError> {
        let mut named = Vec::new();
        for name in NAMES {
            let Some(value) = self.names.get(name).filter(|value| !value.is_null()) else { continue };
            let token = Declared::read(value, Objects::Any, self.place(name))?;
            let token = listed.get(&token.content).cloned().unwrap_or(token);
            named.push((name.to_owned(), token));
        }
        let is_token = |value: &Value| value.is_string() || is_typed(value);
        let more =
            self.names.iter().filter(|(name, value)| !NAMES.contains(&name.as_str()) && is_token(value));
        let mut of_model: Map<String, Value> =
            more.map(|(name, value)| (name.clone(), value.clone())).collect();
        of_model.extend(self.specific.clone());
        for (name, value) in of_model {
            let place = self.place(&name);
            if NAMES.contains(&name.as_str()) || SpecialTokens::is_taken(&name) {
                return Err(place.wrong("is the name of another variable of chat templates; give it its own"));
            }
            named.push((name, Declared::read(&value, Objects::Typed, place)?));
        }
        Ok(named)
    }

    /// Special tokens without a name.
    fn extra_tokens(&self) -> Result<Vec<Declared>, TextError> {
        match self.extra.as_ref().or(self.additional.as_ref()) {
            None | Some((Value::Null, _)) => Ok(Vec::new()),
            Some((Value::Array(all), place)) => all
                .iter()
                .enumerate()
                .map(|(at, value)| Declared::read(value, Objects::Typed, place.at(at)))
                .collect(),
            Some((other, place)) => {
                Err(place.wrong(format_args!("is {other}; it must be a list of tokens, or tokens by name")))
            }
        }
    }

    /// Texts of what the reference takes for special tokens when it reads `added_tokens.json`: an object of
    /// `tokenizer_config.json` is none yet.
    fn special_texts(&self) -> HashSet<String> {
        let text = |value: &Value, is_of_map: bool| match value {
            Value::String(text) => Some(text.clone()),
            Value::Object(token) if is_of_map => token.get("content")?.as_str().map(str::to_owned),
            _ => None,
        };
        let names =
            NAMES.iter().filter_map(|&name| text(self.names.get(name)?, self.places.contains_key(name)));
        let extra = self.extra.iter().filter_map(|(value, _)| value.as_array()).flatten();
        names.chain(extra.filter_map(|value| text(value, true))).collect()
    }
}

/// Tokens that a file gives a number.
#[derive(Default)]
struct Listed {
    by_number: BTreeMap<u32, Declared>,
    by_text: HashMap<String, Declared>,
}

impl Listed {
    fn of_decoder(decoder: &Value) -> Result<Self, TextError> {
        let place = Place::new(config::FILE, DECODER);
        let Value::Object(tokens) = decoder else {
            return Err(place.wrong("must be an object of tokens by their ids"));
        };
        let mut listed = Self::default();
        for (key, value) in tokens {
            let number = key
                .trim()
                .parse()
                .map_err(|_| place.wrong(format_args!("has the key {key:?}, which is not an id")))?;
            let Value::Object(token) = value else {
                return Err(place.at(key).wrong(format_args!("is {value}; it must be an object")));
            };
            listed.insert(number, Declared::of_object(token, place.at(key))?);
        }
        Ok(listed)
    }

    fn of_other_files(keys: &Keys, known: &Known<'_>) -> Result<Self, TextError> {
        let mut listed = Self::default();
        if let Some(bytes) = known.added_tokens {
            let special = keys.special_texts();
            for (text, number) in object(ADDED, bytes)? {
                let place = Place::new(ADDED, text.as_str());
                let number = number
                    .as_u64()
                    .and_then(|number| u32::try_from(number).ok())
                    .ok_or_else(|| place.wrong(format_args!("is {number}, which is not an id")))?;
                let is_special = special.contains(&text);
                listed.insert(number, Declared::plain(text, is_special, place));
            }
        }
        let invalid =
            |e: serde_json::Error| TextError::InvalidFile { file: pieces::FILE, reason: e.to_string() };
        let own: OwnTokens = serde_json::from_slice(known.tokenizer_json).map_err(invalid)?;
        for OwnToken { id, token } in own.added_tokens {
            let place = Place::new(pieces::FILE, "added_tokens");
            listed.insert(id, Declared::of_object(&token, place)?);
        }
        Ok(listed)
    }

    fn insert(&mut self, number: u32, token: Declared) {
        self.by_text.insert(token.content.clone(), token.clone());
        self.by_number.insert(number, token);
    }
}

/// What `tokenizer.json` adds, with the ids that it declares.
#[derive(Deserialize)]
struct OwnTokens {
    #[serde(default)]
    added_tokens: Vec<OwnToken>,
}

#[derive(Deserialize)]
struct OwnToken {
    id: u32,
    #[serde(flatten)]
    token: Map<String, Value>,
}
