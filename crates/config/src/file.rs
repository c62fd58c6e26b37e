//! The file layer: TOML with one table per role.

use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

use muster_types::nearest;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::ROLES;
use crate::entry::{Entry, Raw, unknown_key};
use crate::group::{Key, Role, ValueKind};
use crate::problem::{Origin, Problem};

/// Longest configuration file, bytes.
const LONGEST: u64 = 1 << 20;

/// Entries for the keys of `role`. Tables of the other roles are checked for unknown keys as well, so that one file can
/// serve all roles and a typing error in any table is found.
pub(crate) fn read(
    path: &Path,
    role: &'static Role,
    problems: &mut Vec<Problem>,
) -> Vec<(&'static str, Entry)> {
    let whole = |message: String| Problem {
        origin: Origin::File { path: path.to_owned(), line: None },
        key: String::new(),
        message,
    };
    let text = match text(path) {
        Ok(text) => text,
        Err(message) => {
            problems.push(whole(message));
            return Vec::new();
        }
    };
    let reader = Reader { path, text: &text };
    let (table, errors) = DeTable::parse_recoverable(&text);
    problems.extend(errors.iter().map(|error| Problem {
        origin: reader.origin(error.span().map(|span| span.start)),
        key: String::new(),
        message: error.message().to_owned(),
    }));
    let mut entries = Vec::new();
    for (name, value) in table.get_ref() {
        let origin = reader.origin(Some(name.span().start));
        let found = ROLES.into_iter().find(|known| known.name == name.get_ref());
        match (found, value.get_ref()) {
            (Some(known), DeValue::Table(table)) => {
                let read = reader.role(table, known, problems);
                if known.name == role.name {
                    entries = read;
                }
            }
            (Some(known), _) => {
                let message = format!("is a table: write its settings below a line [{}]", known.name);
                problems.push(Problem { origin, key: known.name.to_owned(), message });
            }
            (None, _) => problems.push(outside(name.get_ref(), origin)),
        }
    }
    entries
}

/// The file's contents, if it is a file of reasonable length.
fn text(path: &Path) -> Result<String, String> {
    let metadata = fs::metadata(path).map_err(|error| format!("cannot be read: {error}"))?;
    // Checked before opening, because opening a pipe waits for its other end.
    if !metadata.is_file() {
        return Err("is not a regular file".to_owned());
    }
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(|error| format!("cannot be read: {error}"))?;
    file.take(LONGEST + 1).read_to_end(&mut bytes).map_err(|error| format!("cannot be read: {error}"))?;
    if bytes.len() as u64 > LONGEST {
        return Err(format!("is longer than {LONGEST} bytes; this is no configuration file"));
    }
    String::from_utf8(bytes)
        .map_err(|error| format!("is not UTF-8 (byte {})", error.utf8_error().valid_up_to()))
}

fn outside(name: &str, origin: Origin) -> Problem {
    let tables = ROLES.map(|role| format!("[{}]", role.name));
    let home = ROLES.into_iter().find(|role| role.keys().any(|key| key.name == name));
    let hint = match (home, nearest(name, ROLES.map(|role| role.name))) {
        (Some(role), _) => format!("it belongs below a line [{}]", role.name),
        (None, Some(role)) => format!("did you mean [{role}]?"),
        (None, None) => format!("tables are {}", tables.join(" and ")),
    };
    Problem { origin, key: name.to_owned(), message: format!("unknown key; {hint}") }
}

struct Reader<'a> {
    path: &'a Path,
    text: &'a str,
}

impl Reader<'_> {
    fn origin(&self, offset: Option<usize>) -> Origin {
        let before =
            |offset: usize| self.text.as_bytes().iter().take(offset).filter(|&&byte| byte == b'\n').count();
        Origin::File { path: self.path.to_owned(), line: offset.map(|offset| before(offset) + 1) }
    }

    fn role(
        &self,
        table: &DeTable<'_>,
        role: &'static Role,
        problems: &mut Vec<Problem>,
    ) -> Vec<(&'static str, Entry)> {
        let mut entries = Vec::new();
        for (name, value) in table {
            let origin = self.origin(Some(name.span().start));
            let Some(key) = role.keys().find(|key| key.name == name.get_ref()) else {
                problems.push(unknown_key(name.get_ref(), role, origin));
                continue;
            };
            match raw(key, value) {
                Some(raw) => entries.push((key.name, Entry { raw, origin })),
                None => problems.push(Problem {
                    origin,
                    key: key.name.to_owned(),
                    message: format!(
                        "must be {}, not {}",
                        key.form.kind.in_toml(),
                        value.get_ref().type_str()
                    ),
                }),
            }
        }
        entries
    }
}

fn raw(key: &Key, value: &Spanned<DeValue<'_>>) -> Option<Raw> {
    match (key.form.kind, value.get_ref()) {
        (ValueKind::Text | ValueKind::NumberOrText, DeValue::String(text)) => {
            Some(Raw::One(text.to_string()))
        }
        // TOML allows underscores and radix prefixes; `as_str` has neither, only `radix` tells.
        (ValueKind::Number | ValueKind::NumberOrText, DeValue::Integer(number)) if number.radix() == 10 => {
            Some(Raw::One(number.as_str().to_owned()))
        }
        (ValueKind::Switch, DeValue::Boolean(on)) => Some(Raw::One(on.to_string())),
        (ValueKind::List, DeValue::Array(items)) => {
            let texts = items.iter().map(|item| item.get_ref().as_str().map(str::to_owned));
            texts.collect::<Option<Vec<_>>>().map(Raw::Many)
        }
        _ => None,
    }
}
