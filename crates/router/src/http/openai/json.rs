//! From untrusted JSON to typed fields: treated as the table of [`fields`](super::fields) says, with bounded allocation
//! and errors that name the place in the API's own words.
//!
//! A field given twice is an error, because two readers could pick different values. Lists stop at their cap while they
//! are read.
//! Nesting is limited by `serde_json`.

use std::cell::RefCell;
use std::fmt::{self, Write as _};
use std::marker::PhantomData;

use muster_model::defaults::SamplingDefaults;
use muster_text::BoundedJson;
use muster_types::Limits;
use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::Value;
use serde_json::error::Category;

use super::super::error::ApiError;
use super::fields::{Class, Level};
use super::ignored::Ignored;

/// Most fields of an object.
const FIELDS: usize = 128;

/// Most characters of a value that an error quotes.
const QUOTED: usize = 48;

/// Limits of a request, and defaults of absent fields.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bounds {
    pub(crate) limits: Limits,
    /// Longest sequence of the model.
    pub(crate) context: u32,
    /// The model's own defaults.
    pub(crate) defaults: SamplingDefaults,
}

/// State of reading a body: its bounds, the current path, and fields without effect.
pub(super) struct Reading<'a> {
    pub(super) bounds: &'a Bounds,
    /// Path from the body to the current value; after an error, the path at which it happened.
    path: RefCell<Vec<Step>>,
    ignored: RefCell<Ignored>,
    /// An error with more detail than serde's text.
    fault: RefCell<Option<ApiError>>,
}

enum Step {
    Field(String),
    Element(usize),
}

/// An object read field by field.
pub(super) trait Fields: Default {
    /// Level of its fields in the table.
    const LEVEL: Level;

    /// Reads the value of `name`, an honoured field.
    fn read<'de, A: MapAccess<'de>>(
        &mut self,
        name: &str,
        map: &mut A,
        reading: &Reading<'_>,
    ) -> Result<(), A::Error>;
}

/// Parses a whole body. Also returns the fields without effect.
///
/// # Errors
/// 400, naming the field where there is one.
pub(super) fn parse<F: Fields>(body: &[u8], bounds: &Bounds) -> Result<(F, Ignored), ApiError> {
    let text = std::str::from_utf8(body).map_err(|error| {
        ApiError::bad_body(format_args!("the body is not UTF-8 from byte {} on", error.valid_up_to()))
    })?;
    let reading =
        Reading { bounds, path: RefCell::default(), ignored: RefCell::default(), fault: RefCell::default() };
    let mut json = serde_json::Deserializer::from_str(text);
    let parsed = Object::new(&reading).deserialize(&mut json).and_then(|fields| json.end().map(|()| fields));
    match parsed {
        Ok(fields) => Ok((fields, reading.ignored.into_inner())),
        Err(error) => Err(reading.explain(&error)),
    }
}

impl Reading<'_> {
    fn within<T, E>(&self, step: Step, read: impl FnOnce() -> Result<T, E>) -> Result<T, E> {
        self.path.borrow_mut().push(step);
        let value = read()?;
        self.path.borrow_mut().pop();
        Ok(value)
    }

    /// Records the current field as one without effect.
    pub(super) fn ignore(&self) {
        let path = self.path.borrow();
        let mut name = String::new();
        for step in &*path {
            let _ = match step {
                Step::Field(field) if name.is_empty() => write!(name, "{field}"),
                Step::Field(field) => write!(name, ".{field}"),
                Step::Element(_) => write!(name, "[]"),
            };
        }
        self.ignored.borrow_mut().push(&name);
    }

    fn explain(&self, error: &serde_json::Error) -> ApiError {
        if let Some(fault) = self.fault.take() {
            return fault;
        }
        let words = in_words(error);
        let path = self.path.borrow();
        let Some(Step::Field(field)) = path.first() else {
            return ApiError::bad_body(format_args!("the body {words}"));
        };
        let mut place = String::new();
        for step in &path[1..] {
            let _ = match step {
                Step::Field(field) => write!(place, ".{field}"),
                Step::Element(at) => write!(place, "[{at}]"),
            };
        }
        ApiError::inside(field, &place, words)
    }

    fn unknown(&self, level: Level, name: &str) {
        let meant = level.meant(name);
        let fault = match &self.path.borrow()[..] {
            [Step::Field(outer), _, ..] => {
                let meant = meant.unwrap_or_else(|| "leave it out".to_owned());
                ApiError::field(outer, format_args!("has no field {name:?}; {meant}"))
            }
            _ => ApiError::unrecognized(name, meant.as_deref()),
        };
        *self.fault.borrow_mut() = Some(fault);
    }
}

/// The text of an error in JSON's words; with line and column only where the body is not JSON, as elsewhere the field's
/// name says more.
fn in_words(error: &serde_json::Error) -> String {
    let text = error.to_string();
    if error.classify() != Category::Data {
        return format!("cannot be read: {text}");
    }
    let place = format!(" at line {} column {}", error.line(), error.column());
    let text = text.strip_suffix(&place).unwrap_or(&text);
    let given = text.strip_prefix("invalid type: ").or_else(|| text.strip_prefix("invalid value: "));
    match given.and_then(|given| given.rsplit_once(", expected ")) {
        Some((given, wanted)) => format!("is {}; it must be {wanted}", value_in_words(given)),
        None => text.to_owned(),
    }
}

/// Serde's description of a value, as the client wrote it.
fn value_in_words(given: &str) -> String {
    let kinds = ["string ", "integer ", "floating point ", "boolean "];
    let plain = kinds.iter().find_map(|kind| given.strip_prefix(kind));
    let words = match (plain, given) {
        (Some(value), _) => value.trim_matches('`'),
        (None, "sequence") => "an array",
        (None, "map") => "an object",
        (None, other) => other,
    };
    match words.char_indices().nth(QUOTED) {
        None => words.to_owned(),
        Some((end, _)) => format!("{}…", &words[..end]),
    }
}

/// An object.
pub(super) struct Object<'a, F> {
    reading: &'a Reading<'a>,
    fields: PhantomData<F>,
}

impl<'a, F> Object<'a, F> {
    pub(super) fn new(reading: &'a Reading<'_>) -> Self {
        Self { reading, fields: PhantomData }
    }
}

impl<'de, F: Fields> DeserializeSeed<'de> for Object<'_, F> {
    type Value = F;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<F, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de, F: Fields> Visitor<'de> for Object<'_, F> {
    type Value = F;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<F, A::Error> {
        let reading = self.reading;
        let mut fields = F::default();
        let mut seen: Vec<String> = Vec::new();
        while let Some(name) = map.next_key::<String>()? {
            if seen.len() == FIELDS {
                return Err(A::Error::custom(format_args!("has more than {FIELDS} fields")));
            }
            reading.within(Step::Field(name.clone()), || {
                if seen.contains(&name) {
                    return Err(A::Error::custom("is given more than once"));
                }
                match F::LEVEL.class(&name) {
                    Some(Class::Honoured) => fields.read(&name, &mut map, reading),
                    Some(Class::Refused(nothing)) => map.next_value_seed(Nothing { nothing, reading }),
                    Some(Class::Told) => {
                        if map.next_value::<Option<IgnoredAny>>()?.is_some() {
                            reading.ignore();
                        }
                        Ok(())
                    }
                    None => {
                        reading.unknown(F::LEVEL, &name);
                        Err(A::Error::custom("is unknown"))
                    }
                }
            })?;
            seen.push(name);
        }
        Ok(fields)
    }
}

/// An object, or `null`.
pub(super) struct Optional<'a, F>(Object<'a, F>);

impl<'a, F> Optional<'a, F> {
    pub(super) fn new(reading: &'a Reading<'_>) -> Self {
        Self(Object::new(reading))
    }
}

impl<'de, F: Fields> DeserializeSeed<'de> for Optional<'_, F> {
    type Value = Option<F>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Option<F>, D::Error> {
        deserializer.deserialize_option(self)
    }
}

impl<'de, F: Fields> Visitor<'de> for Optional<'_, F> {
    type Value = Option<F>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.expecting(f)
    }

    fn visit_unit<E: Error>(self) -> Result<Option<F>, E> {
        Ok(None)
    }

    fn visit_none<E: Error>(self) -> Result<Option<F>, E> {
        Ok(None)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Option<F>, D::Error> {
        self.0.deserialize(deserializer).map(Some)
    }
}

/// A refused field: accepts only `null` and values that ask for nothing.
struct Nothing<'a> {
    nothing: &'static [&'static str],
    reading: &'a Reading<'a>,
}

impl<'de> DeserializeSeed<'de> for Nothing<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        let mut left = BoundedJson::VALUES;
        let given = BoundedJson::new(&mut left).deserialize(deserializer)?;
        let is_same = |text: &&str| {
            let nothing = serde_json::from_str(text).unwrap_or(Value::Null);
            nothing == given || (nothing.is_number() && nothing.as_f64() == given.as_f64())
        };
        if given.is_null() {
            return Ok(());
        }
        if self.nothing.iter().any(is_same) {
            self.reading.ignore();
            return Ok(());
        }
        Err(D::Error::custom(match self.nothing {
            [only] => format!("is not supported here; leave it out, or give {only}"),
            _ => "is not supported here; leave it out".to_owned(),
        }))
    }
}

/// A list of objects with a cap; `null` is an empty one.
pub(super) struct Objects<'a, F> {
    most: usize,
    reading: &'a Reading<'a>,
    fields: PhantomData<F>,
}

impl<'a, F> Objects<'a, F> {
    pub(super) fn new(most: usize, reading: &'a Reading<'_>) -> Self {
        Self { most, reading, fields: PhantomData }
    }
}

impl<'de, F: Fields> DeserializeSeed<'de> for Objects<'_, F> {
    type Value = Vec<F>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Vec<F>, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de, F: Fields> Visitor<'de> for Objects<'_, F> {
    type Value = Vec<F>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "an array of at most {} objects", self.most)
    }

    fn visit_unit<E: Error>(self) -> Result<Vec<F>, E> {
        Ok(Vec::new())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vec<F>, A::Error> {
        let mut objects = Vec::new();
        while objects.len() < self.most {
            let next = self
                .reading
                .within(Step::Element(objects.len()), || seq.next_element_seed(Object::new(self.reading)))?;
            let Some(next) = next else { return Ok(objects) };
            objects.push(next);
        }
        match seq.next_element::<IgnoredAny>()? {
            None => Ok(objects),
            Some(_) => Err(A::Error::custom(format_args!("has more than {} entries", self.most))),
        }
    }
}
