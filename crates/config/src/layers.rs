//! Layers, their order of precedence, and the parsing of the winning values.

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
    /// No flags.
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

    /// Adds a list, if it has entries.
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

/// Sources of settings, the weakest first.
#[derive(Debug, Clone)]
pub struct Sources<'a> {
    /// A configuration file.
    pub file: Option<&'a Path>,
    /// The environment.
    pub environment: &'a Environment,
    /// The command line.
    pub flags: &'a Flags,
}

/// Checked settings of one role, and their origins.
#[derive(Debug, Clone)]
pub struct Loaded<T> {
    /// The settings.
    pub settings: T,
    /// The effective configuration as a TOML table, each value with its origin as a comment.
    pub effective: String,
}

/// Settings that are declared together.
pub(crate) trait Settings: Sized {
    /// The parsed values, `None` where one is wrong.
    type Read;

    fn read(reader: &mut Reader) -> Self::Read;

    /// The settings, if nothing is missing.
    fn whole(read: Self::Read) -> Option<Self>;
}

/// Reads the settings of a role from all layers; `check` has the rules that span several settings.
///
/// # Errors
/// All problems.
pub(crate) fn load<S: Settings>(
    role: &'static Role,
    sources: &Sources<'_>,
    check: impl FnOnce(&S::Read, &mut Reader),
) -> Result<Loaded<S>, ConfigError> {
    let mut reader = Reader::new(role, sources);
    // All settings are read before the first failure returns, so that all problems are found.
    let read = S::read(&mut reader);
    check(&read, &mut reader);
    match S::whole(read) {
        Some(settings) if reader.problems.is_empty() => {
            Ok(Loaded { settings, effective: reader.effective() })
        }
        _ => Err(ConfigError { problems: reader.problems }),
    }
}

/// The winning values of one role, read one by one, and their problems.
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

    /// Records a problem of `key`.
    pub(crate) fn problem(&mut self, key: &'static str, message: String) {
        let origin = self.entries.get(key).map_or(Origin::Default, |entry| entry.origin.clone());
        self.problems.push(Problem { origin, key: key.to_owned(), message });
    }

    /// Records duplicates in a list as problems.
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

    /// Whether a list has entries, valid or not.
    pub(crate) fn has_entries(&self, key: &'static str) -> bool {
        match self.entries.get(key).map(|entry| &entry.raw) {
            None => false,
            Some(Raw::One(_)) => true,
            Some(Raw::Many(texts)) => !texts.is_empty(),
        }
    }

    /// The parsed value of an optional key; `None` when it cannot be parsed.
    pub(crate) fn optional<T>(
        &mut self,
        key: &'static str,
        parse: impl Fn(&str) -> Result<T, String>,
    ) -> Option<Option<T>> {
        if self.entries.contains_key(key) { self.required(key, parse).map(Some) } else { Some(None) }
    }

    /// The parsed value of a required key; a missing value is a problem.
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

    /// All parsed values of a list, which may be empty; a text is split at commas.
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
