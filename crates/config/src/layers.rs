//! Layers and their order: what wins, and how it is parsed once.

use std::collections::{BTreeMap, HashSet};
use std::fmt::Display;
use std::hash::Hash;
use std::path::Path;

use crate::entry::{Entry, Raw, unknown_key};
use crate::environment::Environment;
use crate::file;
use crate::group::{DefaultTo, Role, ValueKind};
use crate::problem::{ConfigError, Origin, Problem};

/// Most entries of a list.
const LONGEST_LIST: usize = 4096;

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

/// Settings that are declared together.
pub(crate) trait Settings: Sized {
    /// What could be read of them.
    type Read;

    fn read(reader: &mut Reader) -> Self::Read;

    /// The settings, if nothing is missing.
    fn whole(read: Self::Read) -> Option<Self>;
}

/// Reads the settings of a role from all layers; `check` has what one setting alone does not show.
///
/// # Errors
/// Everything that is wrong.
pub(crate) fn load<S: Settings>(
    role: &'static Role,
    sources: &Sources<'_>,
    check: impl FnOnce(&S::Read, &mut Reader),
) -> Result<Loaded<S>, ConfigError> {
    let mut reader = Reader::new(role, sources);
    // Everything is read before anything is given up, so that all problems are found.
    let read = S::read(&mut reader);
    check(&read, &mut reader);
    match S::whole(read) {
        Some(settings) if reader.problems.is_empty() => {
            Ok(Loaded { settings, effective: reader.effective() })
        }
        _ => Err(ConfigError { problems: reader.problems }),
    }
}

/// The winning values of one role, taken out one by one; and what was wrong with them.
pub(crate) struct Reader {
    role: &'static Role,
    entries: BTreeMap<&'static str, Entry>,
    problems: Vec<Problem>,
}

impl Reader {
    fn new(role: &'static Role, sources: &Sources<'_>) -> Self {
        let mut problems = Vec::new();
        let mut entries: BTreeMap<&'static str, Entry> = BTreeMap::new();
        for key in role.keys() {
            if let DefaultTo::Value(default) = key.default {
                let raw = Raw::One(default.to_owned());
                entries.insert(key.name, Entry { raw, origin: Origin::Default });
            }
        }
        if let Some(path) = sources.file {
            entries.extend(file::read(path, role, &mut problems));
        }
        entries.extend(sources.environment.read(role, &mut problems));
        for (name, raw) in &sources.flags.0 {
            match role.keys().find(|key| key.name == *name) {
                Some(key) => {
                    let origin = Origin::Flag { name: format!("--{}", key.flag()) };
                    entries.insert(key.name, Entry { raw: raw.clone(), origin });
                }
                None => problems.push(unknown_key(name, role, Origin::Flag { name: format!("--{name}") })),
            }
        }
        Self { role, entries, problems }
    }

    /// Notes that something is wrong with `key`.
    pub(crate) fn problem(&mut self, key: &'static str, message: String) {
        let origin = self.entries.get(key).map_or(Origin::Default, |entry| entry.origin.clone());
        self.problems.push(Problem { origin, key: key.to_owned(), message });
    }

    /// Notes what stands in a list twice.
    pub(crate) fn each_once<'a, T: Eq + Hash + Display + 'a>(
        &mut self,
        key: &'static str,
        values: impl Iterator<Item = &'a T>,
    ) {
        let mut seen = HashSet::new();
        for value in values {
            if !seen.insert(value) {
                self.problem(key, format!("{value} is listed twice; remove one"));
            }
        }
    }

    /// Whether a list has entries, be they right or wrong.
    pub(crate) fn has_entries(&self, key: &'static str) -> bool {
        match self.entries.get(key).map(|entry| &entry.raw) {
            None => false,
            Some(Raw::One(_)) => true,
            Some(Raw::Many(texts)) => !texts.is_empty(),
        }
    }

    /// The parsed value of a key that may have none; `None` when it cannot be parsed.
    pub(crate) fn optional<T>(
        &mut self,
        key: &'static str,
        parse: impl Fn(&str) -> Result<T, String>,
    ) -> Option<Option<T>> {
        if self.entries.contains_key(key) { self.required(key, parse).map(Some) } else { Some(None) }
    }

    /// The parsed value; having none is a problem.
    pub(crate) fn required<T>(
        &mut self,
        key: &'static str,
        parse: impl Fn(&str) -> Result<T, String>,
    ) -> Option<T> {
        let Some(entry) = self.entries.get(key) else {
            let role = self.role.name;
            let flag = key.replace('_', "-");
            let variable = self.role.variable(key);
            self.problem(key, format!("is missing; give --{flag}, {variable}, or {key} in [{role}]"));
            return None;
        };
        let text = match &entry.raw {
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

    /// All parsed values of a list, of which there may be none; a text is split at commas.
    pub(crate) fn list<T>(
        &mut self,
        key: &'static str,
        parse: impl Fn(&str) -> Result<T, String>,
    ) -> Option<Vec<T>> {
        let texts: Vec<String> = match self.entries.get(key).map(|entry| &entry.raw) {
            None => return Some(Vec::new()),
            Some(Raw::One(text)) => text.split(',').map(|part| part.trim().to_owned()).collect(),
            Some(Raw::Many(texts)) => texts.clone(),
        };
        if texts.len() > LONGEST_LIST {
            self.problem(key, format!("has {} entries; at most {LONGEST_LIST} are allowed", texts.len()));
            return None;
        }
        let mut values = Vec::with_capacity(texts.len());
        for text in &texts {
            match parse(text) {
                Ok(value) => values.push(value),
                Err(message) => self.problem(key, message),
            }
        }
        Some(values)
    }

    fn effective(&self) -> String {
        let mut text = format!("[{}]\n", self.role.name);
        for key in self.role.keys() {
            let Some(Entry { raw, origin }) = self.entries.get(key.name) else { continue };
            let value = match (key.form.kind, raw) {
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

fn quoted(text: &str) -> String {
    toml::Value::String(text.to_owned()).to_string()
}

fn strings<'a>(texts: impl Iterator<Item = &'a str>) -> String {
    format!("[{}]", texts.map(quoted).collect::<Vec<_>>().join(", "))
}
