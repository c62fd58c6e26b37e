//! Keys, layers and their order: what wins, and how it is parsed once.

use std::collections::BTreeMap;
use std::path::Path;

use muster_types::nearest;

use crate::environment::{Environment, variable};
use crate::file::{self, Role};
use crate::problem::{ConfigError, Origin, Problem};
use crate::{router, worker};

/// Most entries of a list.
const LONGEST_LIST: usize = 4096;

/// One setting of a role.
#[derive(Debug)]
pub(crate) struct Key {
    pub(crate) name: &'static str,
    pub(crate) kind: ValueKind,
    /// As a flag would give it; `None` when there is none.
    pub(crate) default: Option<&'static str>,
}

/// What a setting is written as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ValueKind {
    Text,
    Number,
    /// A number, or a word that stands for one.
    NumberOrText,
    Switch,
    List,
}

impl ValueKind {
    pub(crate) const fn in_toml(self) -> &'static str {
        match self {
            Self::Text => "a string",
            Self::Number => "a decimal integer",
            Self::NumberOrText => "a decimal integer or a string",
            Self::Switch => "true or false",
            Self::List => "an array of strings",
        }
    }
}

/// A value as some layer gave it.
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

/// Settings given on the command line.
#[derive(Debug, Clone, Default)]
pub struct Flags(Vec<(&'static str, Raw)>);

impl Flags {
    /// None.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a setting, if it was given. `key` is written as in a file, with underscores.
    #[must_use]
    pub fn text(mut self, key: &'static str, value: Option<&str>) -> Self {
        self.0.extend(value.map(|value| (key, Raw::One(value.to_owned()))));
        self
    }

    /// Adds a list, if any of it was given.
    #[must_use]
    pub fn list(mut self, key: &'static str, values: &[String]) -> Self {
        if !values.is_empty() {
            self.0.push((key, Raw::Many(values.to_vec())));
        }
        self
    }

    /// Turns a switch on.
    #[must_use]
    pub fn on(self, key: &'static str) -> Self {
        self.text(key, Some("true"))
    }
}

/// Everything that settings come from, the weakest first.
#[derive(Debug, Clone)]
pub struct Sources<'a> {
    /// A configuration file.
    pub file: Option<&'a Path>,
    /// The environment.
    pub environment: &'a Environment,
    /// The command line.
    pub flags: &'a Flags,
}

/// Settings of one role, checked, and where each comes from.
#[derive(Debug, Clone)]
pub struct Loaded<T> {
    /// The settings.
    pub settings: T,
    /// The effective configuration as a TOML table, each value with its origin as a comment.
    pub effective: String,
}

pub(crate) fn unknown_key(name: &str, keys: &'static [Key], origin: Origin) -> Problem {
    let message = match nearest(name, keys.iter().map(|key| key.name)) {
        Some(near) => format!("unknown key; did you mean {near}?"),
        None => "unknown key".to_owned(),
    };
    let shown: String = name.chars().take(64).flat_map(char::escape_default).collect();
    Problem { origin, key: shown, message }
}

/// The winning values of one role, taken out one by one; and what was wrong with them.
pub(crate) struct Reader {
    role: Role,
    entries: BTreeMap<&'static str, Entry>,
    problems: Vec<Problem>,
}

impl Reader {
    pub(crate) fn new(role: Role, sources: &Sources<'_>) -> Self {
        let (name, keys) = role;
        let mut problems = Vec::new();
        let mut entries: BTreeMap<&'static str, Entry> = BTreeMap::new();
        for key in keys {
            if let Some(default) = key.default {
                let raw = Raw::One(default.to_owned());
                entries.insert(key.name, Entry { raw, origin: Origin::Default });
            }
        }
        if let Some(path) = sources.file {
            entries.extend(file::read(path, name, &[router::ROLE, worker::ROLE], &mut problems));
        }
        entries.extend(sources.environment.read(name, keys, &mut problems));
        for (key, raw) in &sources.flags.0 {
            let origin = Origin::Flag { name: flag_name(key) };
            match keys.iter().find(|known| known.name == *key) {
                Some(known) => drop(entries.insert(known.name, Entry { raw: raw.clone(), origin })),
                None => problems.push(unknown_key(key, keys, origin)),
            }
        }
        Self { role, entries, problems }
    }

    /// Notes that something is wrong with `key`.
    pub(crate) fn problem(&mut self, key: &'static str, message: String) {
        let origin = self.entries.get(key).map_or(Origin::Default, |entry| entry.origin.clone());
        self.problems.push(Problem { origin, key: key.to_owned(), message });
    }

    /// Whether a list has entries, be they right or wrong.
    pub(crate) fn has_entries(&self, key: &'static str) -> bool {
        match self.entries.get(key).map(|entry| &entry.raw) {
            None => false,
            Some(Raw::One(_)) => true,
            Some(Raw::Many(texts)) => !texts.is_empty(),
        }
    }

    /// The parsed value, if there is one that can be parsed.
    pub(crate) fn optional<T>(
        &mut self,
        key: &'static str,
        parse: impl Fn(&str) -> Result<T, String>,
    ) -> Option<T> {
        let text = match &self.entries.get(key)?.raw {
            Raw::One(text) => text.clone(),
            Raw::Many(_) => {
                self.problem(key, "takes one value, not several".to_owned());
                return None;
            }
        };
        if text.is_empty() {
            self.problem(key, "is empty".to_owned());
            return None;
        }
        parse(&text).map_err(|message| self.problem(key, message)).ok()
    }

    /// As [`Self::optional`], but having none is a problem.
    pub(crate) fn required<T>(
        &mut self,
        key: &'static str,
        parse: impl Fn(&str) -> Result<T, String>,
    ) -> Option<T> {
        if !self.entries.contains_key(key) {
            let role = self.role.0;
            let variable = variable(role, key);
            let message = format!("is missing; give {}, {variable}, or {key} in [{role}]", flag_name(key));
            self.problem(key, message);
            return None;
        }
        self.optional(key, parse)
    }

    /// All parsed values of a list, of which there may be none; a text is split at commas.
    pub(crate) fn list<T>(&mut self, key: &'static str, parse: impl Fn(&str) -> Result<T, String>) -> Vec<T> {
        let texts: Vec<String> = match self.entries.get(key).map(|entry| &entry.raw) {
            None => return Vec::new(),
            Some(Raw::One(text)) => text.split(',').map(|part| part.trim().to_owned()).collect(),
            Some(Raw::Many(texts)) => texts.clone(),
        };
        if texts.len() > LONGEST_LIST {
            self.problem(key, format!("has {} entries; at most {LONGEST_LIST} are allowed", texts.len()));
            return Vec::new();
        }
        let mut values = Vec::with_capacity(texts.len());
        for text in &texts {
            match parse(text) {
                Ok(value) => values.push(value),
                Err(message) => self.problem(key, message),
            }
        }
        values
    }

    /// Whether a switch is on.
    pub(crate) fn switch(&mut self, key: &'static str) -> bool {
        let parse = |text: &str| text.parse().map_err(|_| format!("{text:?} is neither true nor false"));
        self.optional(key, parse).unwrap_or(false)
    }

    /// The settings, if nothing was wrong.
    ///
    /// # Errors
    /// Everything that was.
    pub(crate) fn finish<T>(self, settings: Option<T>) -> Result<Loaded<T>, ConfigError> {
        match settings {
            Some(settings) if self.problems.is_empty() => {
                let effective = self.effective();
                Ok(Loaded { settings, effective })
            }
            _ => Err(ConfigError { problems: self.problems }),
        }
    }

    fn effective(&self) -> String {
        let (role, keys) = self.role;
        let mut text = format!("[{role}]\n");
        for key in keys {
            let Some(Entry { raw, origin }) = self.entries.get(key.name) else { continue };
            let value = match (key.kind, raw) {
                (ValueKind::List, Raw::One(text)) => strings(text.split(',').map(str::trim)),
                (_, Raw::Many(texts)) => strings(texts.iter().map(String::as_str)),
                (ValueKind::Number | ValueKind::Switch, Raw::One(text)) => text.clone(),
                (ValueKind::Text | ValueKind::NumberOrText, Raw::One(text)) => quoted(text),
            };
            text += &format!("{} = {value}  # {origin}\n", key.name);
        }
        text
    }
}

/// How the command line spells a key.
fn flag_name(key: &str) -> String {
    // Each entry of a list is given with a flag of its own.
    let name = match key {
        "workers" | "cors_origins" | "template_variables" => key.trim_end_matches('s'),
        key => key,
    };
    format!("--{}", name.replace('_', "-"))
}

fn quoted(text: &str) -> String {
    toml::Value::String(text.to_owned()).to_string()
}

fn strings<'a>(texts: impl Iterator<Item = &'a str>) -> String {
    format!("[{}]", texts.map(quoted).collect::<Vec<_>>().join(", "))
}
