//! JSON from outside, bounded while it is read: in values, in nesting, and without a key given twice.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

/// Levels of nesting of a tool, of a call's arguments, and of a template's variable.
pub(crate) const MAX_DEPTH: usize = 48;
/// Values in all that one [`BoundedJson`] reads by default.
const MAX_VALUES: usize = 1 << 16;

/// Reads a JSON value of limited nesting; how many values it may still consist of is the caller's to keep, so that
/// several share one limit.
#[derive(Debug)]
pub struct BoundedJson<'a> {
    left: &'a mut usize,
    depth: usize,
}

impl<'a> BoundedJson<'a> {
    /// What [`Self::new`] is given for a request.
    pub const VALUES: usize = MAX_VALUES;

    /// A reader of values that `left` counts down for.
    pub fn new(left: &'a mut usize) -> Self {
        Self { left, depth: MAX_DEPTH }
    }

    /// Reads a text.
    ///
    /// # Errors
    /// It is not JSON or goes past a limit.
    pub(crate) fn read(text: &str) -> Result<Value, serde_json::Error> {
        let mut left = MAX_VALUES;
        let mut json = serde_json::Deserializer::from_str(text);
        let value = BoundedJson::new(&mut left).deserialize(&mut json)?;
        json.end().map(|()| value)
    }

    fn inside<E: Error>(&mut self) -> Result<BoundedJson<'_>, E> {
        match self.depth.checked_sub(1) {
            Some(depth) => Ok(BoundedJson { left: self.left, depth }),
            None => Err(E::custom(format_args!("nested more than {MAX_DEPTH} deep"))),
        }
    }
}

impl<'de> DeserializeSeed<'de> for BoundedJson<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        match self.left.checked_sub(1) {
            Some(left) => *self.left = left,
            None => return Err(D::Error::custom("more values than are read")),
        }
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for BoundedJson<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E: Error>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_string<E: Error>(self, value: String) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(mut self, mut seq: A) -> Result<Value, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = seq.next_element_seed(self.inside()?)? {
            items.push(item);
        }
        Ok(Value::Array(items))
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<Value, A::Error> {
        let mut items = Map::new();
        while let Some(key) = map.next_key::<String>()? {
            let value = map.next_value_seed(self.inside()?)?;
            if items.contains_key(&key) {
                let key: String = key.chars().take(64).collect();
                return Err(A::Error::custom(format_args!("the key {key:?} is given twice")));
            }
            items.insert(key, value);
        }
        Ok(Value::Object(items))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_read_as_they_are() {
        let text = r#"{"b":[1,-2,2.5,1e+300,18446744073709551615,null,true,"é\n"],"a":{"c":{}},"d":[]}"#;
        assert_eq!(BoundedJson::read(text).unwrap(), serde_json::from_str::<Value>(text).unwrap());
        assert_eq!(BoundedJson::read(text).unwrap().to_string(), text);
    }

    #[test]
    fn limits_hold() {
        let deep = |depth: usize| format!("{}{}", "[".repeat(depth), "]".repeat(depth));
        assert!(BoundedJson::read(&deep(MAX_DEPTH)).is_ok());
        // An empty list at the deepest level has nothing inside.
        let error = BoundedJson::read(&deep(MAX_DEPTH + 2)).unwrap_err().to_string();
        assert!(error.contains("nested more than"), "{error}");
        let many = format!("[{}1]", "1,".repeat(MAX_VALUES));
        assert!(BoundedJson::read(&many).unwrap_err().to_string().contains("more values"));
        assert!(BoundedJson::read(r#"{"a": 1, "a": 2}"#).unwrap_err().to_string().contains("given twice"));
        for wrong in ["", "{", "[1] 2", "nul"] {
            assert!(BoundedJson::read(wrong).is_err(), "{wrong}");
        }
    }
}
