//! Values of fields: numbers in a range, texts, and lists that stop at their cap. `null` equals an absent field.

use std::collections::HashSet;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};

/// Largest magnitude up to which every integer is exact in a JavaScript number.
const EXACT: f64 = 9_007_199_254_740_992.0;

/// An integer of this range.
#[derive(Debug, Clone, Copy)]
pub(super) struct Integer {
    least: i64,
    most: i64,
}

impl Integer {
    /// Signed 64 bits.
    pub(super) const ANY: Self = Self { least: i64::MIN, most: i64::MAX };

    pub(super) const fn new(least: i64, most: i64) -> Self {
        Self { least, most }
    }
}

/// Reads a count.
pub(super) fn count<'de, A: MapAccess<'de>>(
    map: &mut A,
    least: i64,
    most: u32,
) -> Result<Option<u32>, A::Error> {
    let value = map.next_value_seed(Integer::new(least, i64::from(most)))?;
    Ok(value.and_then(|value| u32::try_from(value).ok()))
}

impl<'de> DeserializeSeed<'de> for Integer {
    type Value = Option<i64>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Option<i64>, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl Integer {
    fn check<E: Error>(self, value: Option<i64>, given: impl fmt::Display) -> Result<Option<i64>, E> {
        match value.filter(|value| (self.least..=self.most).contains(value)) {
            Some(value) => Ok(Some(value)),
            None => Err(E::custom(format_args!("is {given}; it must be {}", Wanted(self)))),
        }
    }
}

/// The range in words.
struct Wanted(Integer);

impl fmt::Display for Wanted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "an integer from {} to {}", self.0.least, self.0.most)
    }
}

impl<'de> Visitor<'de> for Integer {
    type Value = Option<i64>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", Wanted(*self))
    }

    fn visit_unit<E: Error>(self) -> Result<Option<i64>, E> {
        Ok(None)
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<Option<i64>, E> {
        self.check(Some(value), value)
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Option<i64>, E> {
        self.check(i64::try_from(value).ok(), value)
    }

    /// Some languages write whole numbers with a decimal point.
    fn visit_f64<E: Error>(self, value: f64) -> Result<Option<i64>, E> {
        let is_whole = value.fract() == 0.0 && value.abs() <= EXACT;
        self.check(is_whole.then_some(value as i64), value)
    }
}

/// A number; the service checks its range.
pub(super) struct Number;

impl<'de> DeserializeSeed<'de> for Number {
    type Value = Option<f32>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Option<f32>, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Number {
    type Value = Option<f32>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a number")
    }

    fn visit_unit<E: Error>(self) -> Result<Option<f32>, E> {
        Ok(None)
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<Option<f32>, E> {
        Ok(Some(value as f32))
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Option<f32>, E> {
        Ok(Some(value as f32))
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Option<f32>, E> {
        Ok(Some(value as f32))
    }
}

/// Reads a boolean.
pub(super) fn flag<'de, A: MapAccess<'de>>(map: &mut A) -> Result<Option<bool>, A::Error> {
    map.next_value_seed(Flag)
}

struct Flag;

impl<'de> DeserializeSeed<'de> for Flag {
    type Value = Option<bool>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Option<bool>, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Flag {
    type Value = Option<bool>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("true or false")
    }

    fn visit_unit<E: Error>(self) -> Result<Option<bool>, E> {
        Ok(None)
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<Option<bool>, E> {
        Ok(Some(value))
    }
}

/// A list of integers with a cap; `null` is an empty one.
pub(super) struct Integers(pub(super) usize);

impl<'de> DeserializeSeed<'de> for Integers {
    type Value = Vec<u32>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Vec<u32>, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Integers {
    type Value = Vec<u32>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "an array of at most {} integers", self.0)
    }

    fn visit_unit<E: Error>(self) -> Result<Vec<u32>, E> {
        Ok(Vec::new())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vec<u32>, A::Error> {
        let mut values = Vec::new();
        while values.len() < self.0 {
            let entry = Integer::new(0, i64::from(u32::MAX));
            let Some(value) = seq.next_element_seed(entry)? else { return Ok(values) };
            // `null` inside a list is refused.
            let value = value.and_then(|value| u32::try_from(value).ok());
            values.push(value.ok_or_else(|| A::Error::custom("has an entry that is null"))?);
        }
        end(&mut seq, self.0)?;
        Ok(values)
    }
}

/// One string, or a list of strings with a cap; `null` is an empty one.
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

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vec<String>, A::Error> {
        let mut values = Vec::new();
        while values.len() < self.0 {
            let Some(value) = seq.next_element()? else { return Ok(values) };
            values.push(value);
        }
        end(&mut seq, self.0)?;
        Ok(values)
    }
}

/// Refuses a list that goes on after `most` elements.
fn end<'de, A: SeqAccess<'de>>(seq: &mut A, most: usize) -> Result<(), A::Error> {
    match seq.next_element::<IgnoredAny>()? {
        None => Ok(()),
        Some(_) => Err(A::Error::custom(format_args!("has more than {most} entries"))),
    }
}

/// `{"token id": bias}` with a cap; `null` is an empty map.
pub(super) struct Biases(pub(super) usize);

impl<'de> DeserializeSeed<'de> for Biases {
    type Value = Vec<(u32, f32)>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Biases {
    type Value = Vec<(u32, f32)>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of token ids and biases")
    }

    fn visit_unit<E: Error>(self) -> Result<Self::Value, E> {
        Ok(Vec::new())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let (mut biases, mut ids) = (Vec::new(), HashSet::new());
        while let Some(key) = map.next_key::<String>()? {
            let wrong = || A::Error::custom(format_args!("has the key {key:?}, which is no token id"));
            let id: u32 = key.parse().map_err(|_| wrong())?;
            // Only the canonical spelling, so that no id occurs twice.
            if id.to_string() != key {
                return Err(wrong());
            }
            if !ids.insert(id) {
                return Err(A::Error::custom(format_args!("has the token id {id} twice")));
            }
            if biases.len() == self.0 {
                return Err(A::Error::custom(format_args!("has more than {} entries", self.0)));
            }
            let bias = map.next_value_seed(Number)?;
            biases.push((id, bias.ok_or_else(|| A::Error::custom(format_args!("[{id}] is null")))?));
        }
        Ok(biases)
    }
}
