//! The `tojson` filter of chat templates: Python's `json.dumps`, with its separators, and without the HTML
//! escaping that template engines add.

use std::fmt::Write as _;

use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Error, ErrorKind, Value};

use crate::python;

/// Cap on what one rendering may write, and so one value in it.
pub(crate) const MAX_OUTPUT_BYTES: usize = 4 << 20;
/// Nesting of a value that is written.
const MAX_DEPTH: usize = 64;
/// Bytes of one level of indentation.
const MAX_INDENT: usize = 16;

/// `value | tojson(ensure_ascii=false, indent=none, separators=none, sort_keys=false)`.
///
/// # Errors
/// The value is not JSON (undefined, a function), is nested too deeply or is too large, or an argument is
/// unknown or of the wrong type.
#[expect(clippy::needless_pass_by_value, reason = "the engine hands over arguments by value")]
pub(crate) fn tojson(
    value: &Value,
    ascii: Option<bool>,
    indent: Option<Value>,
    separators: Option<Vec<String>>,
    options: Kwargs,
) -> Result<String, Error> {
    let ascii = ascii.or(options.get("ensure_ascii")?);
    let indent = indent_of(indent.or(options.get("indent")?))?;
    let separators = separators.or(options.get("separators")?);
    let sort_keys: Option<bool> = options.get("sort_keys")?;
    options.assert_all_used()?;
    let (item, key) = match separators.as_deref() {
        None if indent.is_some() => (",".to_owned(), ": ".to_owned()),
        None => (", ".to_owned(), ": ".to_owned()),
        Some([item, key]) => (item.clone(), key.clone()),
        Some(_) => return Err(refused("tojson: separators are a pair (item, key)".into())),
    };
    let style =
        Style { indent, item, key, ascii: ascii.unwrap_or(false), sort_keys: sort_keys.unwrap_or(false) };
    let mut writer = Writer { style, out: String::new() };
    writer.value(value, 0)?;
    Ok(writer.out)
}

/// What one level is indented with: so many spaces, or a text.
fn indent_of(value: Option<Value>) -> Result<Option<String>, Error> {
    let Some(value) = value.filter(|value| !value.is_none()) else { return Ok(None) };
    let indent = match value.as_str() {
        Some(text) => text.to_owned(),
        None => " ".repeat(usize::try_from(value).unwrap_or(usize::MAX).min(MAX_INDENT + 1)),
    };
    if indent.len() > MAX_INDENT {
        return Err(refused(format!("tojson: indent is at most {MAX_INDENT}")));
    }
    Ok(Some(indent))
}

struct Style {
    indent: Option<String>,
    item: String,
    key: String,
    ascii: bool,
    sort_keys: bool,
}

struct Writer {
    style: Style,
    out: String,
}

impl Writer {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > MAX_DEPTH {
            return Err(refused(format!("tojson: the value is nested more than {MAX_DEPTH} deep")));
        }
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self.out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => self.number(value),
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => self.array(value, depth)?,
            ValueKind::Map => self.object(value, depth)?,
            other => return Err(refused(format!("tojson: {other} is not JSON serializable"))),
        }
        if self.out.len() > MAX_OUTPUT_BYTES {
            return Err(refused(format!("tojson: more than {MAX_OUTPUT_BYTES} bytes")));
        }
        Ok(())
    }

    fn number(&mut self, value: &Value) {
        match (value.is_integer(), f64::try_from(value.clone())) {
            (false, Ok(x)) if x.is_nan() => self.out.push_str("NaN"),
            (false, Ok(x)) if x.is_infinite() => {
                self.out.push_str(if x > 0.0 { "Infinity" } else { "-Infinity" });
            }
            _ => self.out.push_str(&python::number(value)),
        }
    }

    fn string(&mut self, text: &str) {
        self.out.push('"');
        for c in text.chars() {
            match c {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{c}' => self.out.push_str("\\f"),
                c if c < ' ' || (self.style.ascii && c > '~') => self.escape(c),
                c => self.out.push(c),
            }
        }
        self.out.push('"');
    }

    fn escape(&mut self, c: char) {
        for unit in c.encode_utf16(&mut [0; 2]) {
            // Writing to a string does not fail.
            let _ = write!(self.out, "\\u{unit:04x}");
        }
    }

    fn array(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        self.out.push('[');
        let mut empty = true;
        for item in value.try_iter()? {
            self.before_item(empty, depth + 1);
            empty = false;
            self.value(&item, depth + 1)?;
        }
        self.close(empty, depth, ']');
        Ok(())
    }

    fn object(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        self.out.push('{');
        let mut keys: Vec<Value> = value.try_iter()?.collect();
        if self.style.sort_keys {
            keys.sort();
        }
        for (at, key) in keys.iter().enumerate() {
            self.before_item(at == 0, depth + 1);
            self.object_key(key)?;
            let separator = self.style.key.clone();
            self.out.push_str(&separator);
            self.value(&value.get_item(key)?, depth + 1)?;
        }
        self.close(keys.is_empty(), depth, '}');
        Ok(())
    }

    /// A key, which Python writes as a string if it is a scalar.
    fn object_key(&mut self, key: &Value) -> Result<(), Error> {
        match key.kind() {
            ValueKind::String => self.string(key.as_str().unwrap_or_default()),
            ValueKind::None | ValueKind::Bool | ValueKind::Number => {
                self.out.push('"');
                self.value(key, 0)?;
                self.out.push('"');
            }
            other => return Err(refused(format!("tojson: {other} cannot be a key"))),
        }
        Ok(())
    }

    fn before_item(&mut self, first: bool, depth: usize) {
        if !first {
            self.out.push_str(&self.style.item);
        }
        self.new_line(depth);
    }

    fn close(&mut self, empty: bool, depth: usize, bracket: char) {
        if !empty {
            self.new_line(depth);
        }
        self.out.push(bracket);
    }

    fn new_line(&mut self, depth: usize) {
        if let Some(indent) = &self.style.indent {
            self.out.push('\n');
            self.out.push_str(&indent.repeat(depth));
        }
    }
}

fn refused(reason: String) -> Error {
    Error::new(ErrorKind::InvalidOperation, reason)
}
