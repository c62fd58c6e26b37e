//! Unparsed values of layers, with their origins. Does not know which layer wins.

use muster_types::nearest;

use crate::group::{Key, Role};
use crate::problem::{Origin, Problem};

/// An unparsed value of a layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Raw {
    One(String),
    Many(Vec<String>),
}

#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub(crate) raw: Raw,
    pub(crate) origin: Origin,
}

/// The problem of a key that the role does not have.
pub(crate) fn unknown_key(name: &str, role: &Role, origin: Origin) -> Problem {
    let message = match nearest(name, role.keys().map(Key::name)) {
        Some(near) => format!("unknown key; did you mean {near}?"),
        None => "unknown key".to_owned(),
    };
    let shown: String = name.chars().take(64).flat_map(char::escape_default).collect();
    Problem { origin, key: shown, message }
}
