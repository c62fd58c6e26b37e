//! A strict reader of `config.json`: typed getters that name the key, the value and what is allowed.
//!
//! Keys that no getter reads are ignored, because published configurations are full of them; a family must read, or refuse,
//! every key that would change its result. Knows no family and no tensor.

use std::fmt;
use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use crate::json::parse_object;
use crate::untrusted::clip;

/// Why a configuration is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Not a JSON object.
    #[error("{0}")]
    Json(String),
    /// A key that must be there is not.
    #[error("`{key}` is missing")]
    Missing {
        /// The key.
        key: String,
    },
    /// A value of the wrong type or out of range.
    #[error("`{key}` is {value}; allowed: {allowed}")]
    Value {
        /// The key.
        key: String,
        /// The value, as JSON.
        value: String,
        /// What it may be.
        allowed: String,
    },
    /// Two values that contradict each other.
    #[error("`{key}` is {value}, but {reason}")]
    Conflict {
        /// The key.
        key: String,
        /// The value, as JSON.
        value: String,
        /// What it contradicts.
        reason: String,
    },
    /// A value that this build cannot compute.
    #[error("`{key}` is {value}, which is not supported: {reason}")]
    Unsupported {
        /// The key.
        key: String,
        /// The value, as JSON.
        value: String,
        /// Why, or what is supported.
        reason: String,
    },
    /// A family that this build does not know.
    #[error("`model_type` is {value}; supported are {supported}")]
    Family {
        /// The value, as JSON.
        value: String,
        /// The families there are.
        supported: String,
    },
}

/// One JSON object and where it lies in the file.
#[derive(Debug)]
pub(crate) struct Config {
    /// Before every key in a message: empty, or the path of a nested object with its dot.
    path: String,
    map: Map<String, Value>,
}

impl Config {
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, ConfigError> {
        Ok(Self { path: String::new(), map: parse_object(bytes).map_err(ConfigError::Json)? })
    }

    /// The value of a key; `None` when it is absent or null.
    pub(crate) fn get(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    /// Every key with its value, null included.
    pub(crate) fn entries(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.map.iter().map(|(key, value)| (key.as_str(), value))
    }

    /// Whether a key is there, null included.
    pub(crate) fn has(&self, key: &str) -> bool {
        self.map.contains_key(key)
    }

    /// A size within `allowed`; `None` when the key is absent or null.
    pub(crate) fn optional_size(
        &self,
        key: &str,
        allowed: RangeInclusive<usize>,
    ) -> Result<Option<usize>, ConfigError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let size =
            value.as_u64().and_then(|size| usize::try_from(size).ok()).filter(|size| allowed.contains(size));
        let text = || format!("a whole number, {} to {}", allowed.start(), allowed.end());
        size.map(Some).ok_or_else(|| self.bad(key, value, text()))
    }

    /// A size within `allowed`; `default` when the key is absent.
    pub(crate) fn size(
        &self,
        key: &str,
        default: usize,
        allowed: RangeInclusive<usize>,
    ) -> Result<usize, ConfigError> {
        match self.map.get(key) {
            None => Ok(default),
            Some(Value::Null) => Err(self.bad(key, &Value::Null, "a whole number".to_owned())),
            Some(_) => Ok(self.optional_size(key, allowed)?.unwrap_or(default)),
        }
    }

    /// A whole number from 0 to `most`; `default` when the key is absent or null.
    pub(crate) fn count(&self, key: &str, default: usize, most: usize) -> Result<usize, ConfigError> {
        Ok(self.optional_size(key, 0..=most)?.unwrap_or(default))
    }

    /// A finite number above zero; `None` when the key is absent or null.
    pub(crate) fn optional_positive(&self, key: &str) -> Result<Option<f64>, ConfigError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        // Checked as f32, because that is what most of these become.
        let fits = |number: &f64| (*number as f32) > 0.0 && (*number as f32).is_finite();
        let number = value.as_f64().filter(fits);
        number.map(Some).ok_or_else(|| self.bad(key, value, "a finite number above 0".to_owned()))
    }

    /// A finite number above zero; `default` when the key is absent.
    pub(crate) fn positive(&self, key: &str, default: f64) -> Result<f64, ConfigError> {
        match self.map.get(key) {
            Some(Value::Null) => Err(self.bad(key, &Value::Null, "a finite number above 0".to_owned())),
            _ => Ok(self.optional_positive(key)?.unwrap_or(default)),
        }
    }

    /// A flag; `default` when the key is absent or null.
    pub(crate) fn flag(&self, key: &str, default: bool) -> Result<bool, ConfigError> {
        let Some(value) = self.get(key) else { return Ok(default) };
        value.as_bool().ok_or_else(|| self.bad(key, value, "true or false".to_owned()))
    }

    /// Whole numbers below `limit`: a list, or one alone; empty when the key is absent or null.
    pub(crate) fn numbers(&self, key: &str, limit: u32) -> Result<Vec<u32>, ConfigError> {
        const MOST: usize = 1024;
        let Some(value) = self.get(key) else { return Ok(Vec::new()) };
        let one = std::slice::from_ref(value);
        let items = value.as_array().map_or(one, Vec::as_slice);
        let number = |item: &Value| item.as_u64().and_then(|n| u32::try_from(n).ok()).filter(|n| *n < limit);
        let numbers = items.iter().map(number).collect::<Option<Vec<_>>>().filter(|list| list.len() <= MOST);
        let text = || format!("whole numbers, 0 to {}, at most {MOST} of them", limit.saturating_sub(1));
        numbers.ok_or_else(|| self.bad(key, value, text()))
    }

    /// A number of each layer, 1 to `most`: a list of as many, or one for all; `default` when the key is absent or null.
    pub(crate) fn per_layer(
        &self,
        key: &str,
        layers: usize,
        default: usize,
        most: usize,
    ) -> Result<Vec<usize>, ConfigError> {
        let Some(value) = self.get(key) else { return Ok(vec![default; layers]) };
        let number = |item: &Value| {
            let number = item.as_u64().and_then(|number| usize::try_from(number).ok());
            number.filter(|number| (1..=most).contains(number))
        };
        let numbers = match value.as_array() {
            Some(list) => {
                list.iter().map(number).collect::<Option<Vec<_>>>().filter(|list| list.len() == layers)
            }
            None => number(value).map(|one| vec![one; layers]),
        };
        let text = || format!("a whole number, 1 to {most}, or a list of {layers} of them");
        numbers.ok_or_else(|| self.bad(key, value, text()))
    }

    /// A nested object; `None` when the key is absent or null.
    pub(crate) fn nested(&self, key: &str) -> Result<Option<Self>, ConfigError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Object(map)) => {
                Ok(Some(Self { path: format!("{}{key}.", self.path), map: map.clone() }))
            }
            Some(other) => Err(self.bad(key, other, "an object".to_owned())),
        }
    }

    /// Refuses every key but these, unless it is null.
    pub(crate) fn only(&self, known: &[&str]) -> Result<(), ConfigError> {
        match self.map.keys().find(|key| self.get(key).is_some() && !known.contains(&key.as_str())) {
            None => Ok(()),
            Some(key) => self.refuse_set(key, &format!("known here are {}", known.join(", "))),
        }
    }

    /// Refuses the key unless it is absent or null.
    pub(crate) fn refuse_set(&self, key: &str, reason: &str) -> Result<(), ConfigError> {
        self.refuse_unless(key, reason, |_| false)
    }

    /// Refuses the key unless it is absent, null or as `allowed` says.
    pub(crate) fn refuse_unless(
        &self,
        key: &str,
        reason: &str,
        allowed: impl FnOnce(&Value) -> bool,
    ) -> Result<(), ConfigError> {
        match self.get(key) {
            Some(value) if !allowed(value) => Err(ConfigError::Unsupported {
                key: self.name(key),
                value: clip(&value.to_string()),
                reason: reason.to_owned(),
            }),
            _ => Ok(()),
        }
    }

    /// The error for a value that contradicts another.
    pub(crate) fn conflict(&self, key: &str, value: &dyn fmt::Display, reason: String) -> ConfigError {
        ConfigError::Conflict { key: self.name(key), value: clip(&value.to_string()), reason }
    }

    /// The error for a value of the wrong type or out of range.
    pub(crate) fn bad(&self, key: &str, value: &Value, allowed: String) -> ConfigError {
        ConfigError::Value { key: self.name(key), value: clip(&value.to_string()), allowed }
    }

    /// The key with the path to it.
    pub(crate) fn name(&self, key: &str) -> String {
        format!("{}{}", self.path, clip(key))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(text: &str) -> Config {
        Config::parse(text.as_bytes()).unwrap()
    }

    fn message<T: fmt::Debug>(result: Result<T, ConfigError>) -> String {
        result.unwrap_err().to_string()
    }

    #[test]
    fn sizes_name_the_key_the_value_and_the_range() {
        let c =
            config(r#"{"a": 0, "b": -1, "c": 1.5, "d": "4", "e": 18446744073709551616, "f": null, "g": 3}"#);
        for key in ["a", "b", "c", "d", "e"] {
            let text = message(c.size(key, 1, 1..=8));
            assert!(text.starts_with(&format!("`{key}` is ")), "{text}");
            assert!(text.ends_with("allowed: a whole number, 1 to 8"), "{text}");
        }
        assert!(message(c.size("f", 1, 1..=8)).contains("`f` is null"));
        assert_eq!(c.optional_size("f", 1..=8), Ok(None));
        assert_eq!((c.size("g", 1, 1..=8), c.size("absent", 7, 1..=8)), (Ok(3), Ok(7)));
    }

    #[test]
    fn positive_numbers_stay_positive_and_finite_as_f32() {
        let c = config(r#"{"a": 0, "b": -1e-5, "c": 1e-60, "d": 1e60, "e": "1", "f": true, "g": 10000}"#);
        for key in ["a", "b", "c", "d", "e", "f"] {
            assert!(message(c.positive(key, 1.0)).contains("a finite number above 0"), "{key}");
        }
        assert_eq!(c.positive("g", 1.0), Ok(10000.0));
    }

    #[test]
    fn numbers_come_alone_or_in_a_list() {
        let c = config(r#"{"a": 2, "b": [3, 1], "c": null, "d": [4], "e": "2", "f": [1.0], "g": []}"#);
        assert_eq!(c.numbers("a", 4), Ok(vec![2]));
        assert_eq!(c.numbers("b", 4), Ok(vec![3, 1]));
        assert_eq!((c.numbers("c", 4), c.numbers("g", 4)), (Ok(vec![]), Ok(vec![])));
        for key in ["d", "e", "f"] {
            assert!(c.numbers(key, 4).is_err(), "{key}");
        }
    }

    #[test]
    fn nested_keys_are_named_by_their_path() {
        let c = config(r#"{"rope": {"theta": 0, "factor": 2, "none": null}, "flat": 1}"#);
        let rope = c.nested("rope").unwrap().unwrap();
        assert!(message(rope.positive("theta", 1.0)).starts_with("`rope.theta` is 0"));
        assert!(message(rope.only(&["theta"])).starts_with("`rope.factor` is 2, which is not supported"));
        assert_eq!(rope.only(&["theta", "factor"]), Ok(()));
        assert!(c.nested("flat").is_err());
    }
}
