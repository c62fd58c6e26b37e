//! A token as a file beside `tokenizer.json` writes it: its text, or an object with flags.
//!
//! Owns what such an object may have and what the reference takes for a flag that is left out. Knows nothing of which file
//! counts when.

use std::fmt;

use serde_json::{Map, Value};
use tokenizers::AddedToken;

use crate::TextError;

/// Marks an object as a token, in `tokenizer_config.json`.
const TYPE: (&str, &str) = ("__type", "AddedToken");

/// A key of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Place {
    file: &'static str,
    key: String,
}

impl Place {
    pub(crate) fn new(file: &'static str, key: impl Into<String>) -> Self {
        Self { file, key: key.into() }
    }

    /// A key or an index inside.
    pub(crate) fn at(&self, key: impl fmt::Display) -> Self {
        Self { file: self.file, key: format!("{}[{key}]", self.key) }
    }

    /// The error of what is there.
    pub(crate) fn wrong(&self, reason: impl fmt::Display) -> TextError {
        TextError::InvalidFile { file: self.file, reason: format!("`{}` {reason}", self.key) }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.file, self.key)
    }
}

/// Which objects are tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Objects {
    /// All.
    Any,
    /// Those that say `"__type": "AddedToken"`.
    Typed,
}

/// A token and where it is written.
#[derive(Debug, Clone)]
pub(crate) struct Declared {
    pub(crate) content: String,
    /// `None` where there is text alone.
    flags: Option<Flags>,
    pub(crate) place: Place,
}

#[derive(Debug, Clone, Copy)]
struct Flags {
    lstrip: bool,
    rstrip: bool,
    single_word: bool,
    /// Where it is left out, special tokens are not normalized and others are.
    normalized: Option<bool>,
    special: bool,
}

impl Declared {
    pub(crate) fn of_text(content: impl Into<String>, place: Place) -> Self {
        Self { content: content.into(), flags: None, place }
    }

    /// A token of these flags and no others.
    pub(crate) fn plain(content: impl Into<String>, special: bool, place: Place) -> Self {
        let flags =
            Flags { lstrip: false, rstrip: false, single_word: false, normalized: Some(!special), special };
        Self { content: content.into(), flags: Some(flags), place }
    }

    /// Reads an object.
    ///
    /// # Errors
    /// It has no `content`, or a flag is not a boolean.
    pub(crate) fn of_object(object: &Map<String, Value>, place: Place) -> Result<Self, TextError> {
        let content = match object.get("content") {
            Some(Value::String(content)) => content.clone(),
            Some(other) => {
                return Err(place.wrong(format_args!("has the `content` {other}, which is not text")));
            }
            None => return Err(place.wrong("is an object without `content`; a token needs its text there")),
        };
        let flag = |name: &str| match object.get(name) {
            Some(Value::Bool(value)) => Ok(Some(*value)),
            None => Ok(None),
            Some(other) => {
                Err(place.wrong(format_args!("has `{name}`: {other}; write true or false, or leave it out")))
            }
        };
        let flags = Flags {
            lstrip: flag("lstrip")?.unwrap_or(false),
            rstrip: flag("rstrip")?.unwrap_or(false),
            single_word: flag("single_word")?.unwrap_or(false),
            normalized: flag("normalized")?,
            special: flag("special")?.unwrap_or(false),
        };
        Ok(Self { content, flags: Some(flags), place })
    }

    /// Reads text or an object.
    ///
    /// # Errors
    /// It is something else, or as [`Self::of_object`].
    pub(crate) fn read(value: &Value, objects: Objects, place: Place) -> Result<Self, TextError> {
        match value {
            Value::String(content) => Ok(Self::of_text(content.as_str(), place)),
            Value::Object(object) if objects == Objects::Any || is_typed(value) => {
                Self::of_object(object, place)
            }
            Value::Object(_) => Err(place.wrong(
                "is an object without `\"__type\": \"AddedToken\"`, which is not taken for a token there; add that, or write \
                 the token's text alone",
            )),
            other => Err(place.wrong(format_args!("is {other}; a token is text or an object"))),
        }
    }

    /// Whether it is text, and no object.
    pub(crate) fn is_text(&self) -> bool {
        self.flags.is_none()
    }

    /// What the library adds. A token that has a name is special.
    pub(crate) fn added(&self, is_named: bool) -> AddedToken {
        let Some(flags) = self.flags else { return AddedToken::from(self.content.as_str(), true) };
        let special = flags.special || is_named;
        AddedToken::from(self.content.as_str(), special)
            .lstrip(flags.lstrip)
            .rstrip(flags.rstrip)
            .single_word(flags.single_word)
            .normalized(flags.normalized.unwrap_or(!special))
    }

    /// Whether the reference takes the two for one: both are text, or objects that mean the same.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        self.content == other.content
            && self.is_text() == other.is_text()
            && self.added(false) == other.added(false)
    }
}

/// Whether the object says that it is a token.
pub(crate) fn is_typed(value: &Value) -> bool {
    value.get(TYPE.0).is_some_and(|kind| kind == TYPE.1)
}

/// The object as one that says so, of a special token.
pub(crate) fn typed_special(mut object: Map<String, Value>) -> Value {
    object.insert(TYPE.0.into(), TYPE.1.into());
    object.insert("special".into(), true.into());
    Value::Object(object)
}
