//! From untrusted JSON to typed fields: strict about names, bounded in what it allocates, exact about where it
//! failed.
//!
//! A field that is not known is an error, as OpenAI's is; so is one given twice, on which two readers could
//! disagree. Lists stop at their cap while they are read. Nesting is limited by `serde_json`.

use std::fmt;
use std::marker::PhantomData;

use muster_model::defaults::SamplingDefaults;
use muster_types::Limits;
use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::super::error::ApiError;

/// What a request may be as large as, and what it is where it says nothing.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bounds {
    pub(crate) limits: Limits,
    /// Longest sequence of the model.
    pub(crate) context: u32,
    /// The model's own, for fields that are not given.
    pub(crate) defaults: SamplingDefaults,
}

/// An object read field by field.
pub(super) trait Fields: Default {
    /// Reads the value of the field `name`, or leaves `map` alone when there is no such field.
    fn read<'de, A: MapAccess<'de>>(
        &mut self,
        name: &str,
        map: &mut A,
        bounds: &Bounds,
    ) -> Result<Known, A::Error>;
}

/// Whether a field exists.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Known {
    Yes,
    No,
}

/// Reads a whole body.
///
/// # Errors
/// 400, naming the field where there is one.
pub(super) fn parse<F: Fields>(body: &[u8], bounds: &Bounds) -> Result<F, ApiError> {
    let text = std::str::from_utf8(body).map_err(|error| {
        ApiError::bad_body(format_args!("the body is not UTF-8 from byte {} on", error.valid_up_to()))
    })?;
    let mut place = Place::Body;
    let mut json = serde_json::Deserializer::from_str(text);
    let object = Object { bounds, place: &mut place, fields: PhantomData };
    let parsed = object.deserialize(&mut json).and_then(|fields| json.end().map(|()| fields));
    parsed.map_err(|error| place.explain(&error))
}

/// Where reading has got to.
enum Place {
    Body,
    Field(String),
    Unknown(String),
    Twice(String),
}

impl Place {
    fn explain(&self, error: &serde_json::Error) -> ApiError {
        match self {
            Self::Body => ApiError::bad_body(format_args!("the body is not a JSON object: {error}")),
            Self::Field(name) => ApiError::field(name, error),
            Self::Unknown(name) => ApiError::unrecognized(name),
            Self::Twice(name) => ApiError::field(name, "is given more than once"),
        }
    }
}

struct Object<'a, F> {
    bounds: &'a Bounds,
    place: &'a mut Place,
    fields: PhantomData<F>,
}

impl<'de, F: Fields> DeserializeSeed<'de> for Object<'_, F> {
    type Value = F;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<F, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de, F: Fields> Visitor<'de> for Object<'_, F> {
    type Value = F;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<F, A::Error> {
        let mut fields = F::default();
        // At most as long as the list of known fields.
        let mut seen = Vec::new();
        while let Some(name) = map.next_key::<String>()? {
            if seen.contains(&name) {
                *self.place = Place::Twice(name);
                return Err(A::Error::custom("given twice"));
            }
            *self.place = Place::Field(name.clone());
            if fields.read(&name, &mut map, self.bounds)? == Known::No {
                *self.place = Place::Unknown(name);
                return Err(A::Error::custom("unknown"));
            }
            *self.place = Place::Body;
            seen.push(name);
        }
        Ok(fields)
    }
}

/// A feature that is not there: only a value that asks for nothing is taken.
#[derive(Debug, Default)]
pub(super) struct Unsupported;

const UNSUPPORTED: &str = "is not supported here; leave it out";

impl<'de> Deserialize<'de> for Unsupported {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Self)
    }
}

impl<'de> Visitor<'de> for Unsupported {
    type Value = Self;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "nothing: this {UNSUPPORTED}")
    }

    fn visit_unit<E: Error>(self) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<Self, E> {
        if value { Err(E::custom(UNSUPPORTED)) } else { Ok(self) }
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<Self, E> {
        if matches!(value, "" | "none" | "auto") { Ok(self) } else { Err(E::custom(UNSUPPORTED)) }
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self, A::Error> {
        if seq.next_element::<IgnoredAny>()?.is_some() {
            Err(A::Error::custom(UNSUPPORTED))
        } else {
            Ok(self)
        }
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self, A::Error> {
        if map.next_key::<IgnoredAny>()?.is_some() { Err(A::Error::custom(UNSUPPORTED)) } else { Ok(self) }
    }
}

/// A list of at most so many values; `null` is an empty one.
pub(super) struct AtMost<T>(usize, PhantomData<T>);

impl<T> AtMost<T> {
    pub(super) fn new(most: usize) -> Self {
        Self(most, PhantomData)
    }
}

impl<'de, T: Deserialize<'de>> DeserializeSeed<'de> for AtMost<T> {
    type Value = Vec<T>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Vec<T>, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de, T: Deserialize<'de>> Visitor<'de> for AtMost<T> {
    type Value = Vec<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "an array of at most {}", self.0)
    }

    fn visit_unit<E: Error>(self) -> Result<Vec<T>, E> {
        Ok(Vec::new())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vec<T>, A::Error> {
        let mut values = Vec::new();
        while values.len() < self.0 {
            let Some(value) = seq.next_element()? else { return Ok(values) };
            values.push(value);
        }
        match seq.next_element::<IgnoredAny>()? {
            None => Ok(values),
            Some(_) => Err(A::Error::custom(format_args!("more than {} values", self.0))),
        }
    }
}

/// One string or a list of at most so many.
pub(super) struct Strings(pub(super) usize);

impl<'de> DeserializeSeed<'de> for Strings {
    type Value = Vec<String>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Vec<String>, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Strings {
    type Value = Vec<String>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a string or an array of at most {} strings", self.0)
    }

    fn visit_unit<E: Error>(self) -> Result<Vec<String>, E> {
        Ok(Vec::new())
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<Vec<String>, E> {
        Ok(vec![value.to_owned()])
    }

    fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<Vec<String>, A::Error> {
        AtMost::new(self.0).visit_seq(seq)
    }
}
