//! What the reference's templates have from Python, where the engine and its `pycompat` differ from it.
//!
//! Always holds: what is here gives what Jinja on Python gives, or an error. It covers what published templates
//! use, not all of Python: a method, filter or argument that neither this nor the engine has is an error that
//! names it. Reads no clock and no environment.

use minijinja::value::{Kwargs, Rest, Tuple, ValueKind, from_args};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, Output, State, Value};

/// Nesting of a value that is written.
const MAX_DEPTH: usize = 64;

/// Columns that `indent` indents by at most.
const MAX_WIDTH: usize = 256;

/// Adds all of it.
pub(crate) fn add_to(environment: &mut Environment<'static>) {
    environment.set_unknown_method_callback(method);
    environment.set_formatter(write);
    environment.add_function("raise_exception", raise_exception);
    environment
        .add_function("cycler", |items: Rest<Value>| minijinja_contrib::globals::cycler(items.to_vec()));
    environment.add_function("joiner", minijinja_contrib::globals::joiner);
    environment.add_test("sequence", is_sequence);
    environment.add_test("iterable", is_iterable);
    environment.add_filter("string", string);
    environment.add_filter("trim", trim);
    environment.add_filter("length", length);
    environment.add_filter("count", length);
    environment.add_filter("replace", replace);
    environment.add_filter("indent", indent);
    environment.add_filter("default", default);
    environment.add_filter("d", default);
    environment.add_filter("escape", escape);
    environment.add_filter("e", escape);
    environment.add_filter("int", int);
    environment.add_filter("float", float);
    // These would give something, but not what the reference gives.
    for name in ["attr", "pprint"] {
        environment.remove_filter(name);
    }
}

/// The message of a `raise_exception`, on its way through the engine's errors.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Raised(pub(crate) String);

fn raise_exception(message: &Value) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, "raise_exception").with_source(Raised(str(message)?)))
}

fn refused(reason: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, reason.into())
}

/// Writes the value of `{{ … }}`.
fn write(out: &mut Output<'_>, state: &mut State<'_, '_>, value: &Value) -> Result<(), Error> {
    if *state.auto_escape() != AutoEscape::None {
        return Err(refused("autoescape is not supported"));
    }
    match value.as_str() {
        Some(text) => out.write_str(text)?,
        None => out.write_str(&str(value)?)?,
    }
    Ok(())
}

/// `str(value)`; nothing for what is undefined.
fn str(value: &Value) -> Result<String, Error> {
    if value.is_undefined() {
        return Ok(String::new());
    }
    if let Some(text) = value.as_str() {
        return Ok(text.to_owned());
    }
    let mut out = String::new();
    repr(&mut out, value, 0)?;
    Ok(out)
}

/// `repr(value)`.
fn repr(out: &mut String, value: &Value, depth: usize) -> Result<(), Error> {
    if depth > MAX_DEPTH {
        return Err(refused(format!("a value is nested more than {MAX_DEPTH} deep")));
    }
    match value.kind() {
        ValueKind::Undefined => out.push_str("Undefined"),
        ValueKind::None => out.push_str("None"),
        ValueKind::Bool => out.push_str(if value.is_true() { "True" } else { "False" }),
        ValueKind::Number => out.push_str(&number(value)),
        ValueKind::String => quote(out, value.as_str().unwrap_or_default()),
        ValueKind::Seq | ValueKind::Iterable => {
            let is_tuple = value.downcast_object_ref::<Tuple>().is_some();
            out.push(if is_tuple { '(' } else { '[' });
            let mut count = 0_usize;
            for item in value.try_iter()? {
                out.push_str(if count == 0 { "" } else { ", " });
                repr(out, &item, depth + 1)?;
                count += 1;
            }
            out.push_str(if is_tuple && count == 1 { "," } else { "" });
            out.push(if is_tuple { ')' } else { ']' });
        }
        ValueKind::Map => {
            out.push('{');
            for (at, key) in value.try_iter()?.enumerate() {
                out.push_str(if at == 0 { "" } else { ", " });
                repr(out, &key, depth + 1)?;
                out.push_str(": ");
                repr(out, &value.get_item(&key)?, depth + 1)?;
            }
            out.push('}');
        }
        other => return Err(refused(format!("{other} cannot be written as text"))),
    }
    Ok(())
}

/// A number as Python writes it.
pub(crate) fn number(value: &Value) -> String {
    match f64::try_from(value.clone()) {
        Ok(float) if !value.is_integer() => match format!("{float:?}").split_once('e') {
            Some((mantissa, exponent)) => {
                let (sign, digits) =
                    exponent.strip_prefix('-').map_or(('+', exponent), |digits| ('-', digits));
                format!("{mantissa}e{sign}{digits:0>2}")
            }
            None => format!("{float:?}").replace("NaN", "nan"),
        },
        _ => value.to_string(),
    }
}

fn quote(out: &mut String, text: &str) {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(quote);
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c == quote => out.extend(['\\', c]),
            c if is_printable(c) => out.push(c),
            c => out.push_str(&match c as u32 {
                code @ ..=0xff => format!("\\x{code:02x}"),
                code @ ..=0xffff => format!("\\u{code:04x}"),
                code => format!("\\U{code:08x}"),
            }),
        }
    }
    out.push(quote);
}

/// `c.isprintable()`, by the standard library's table of what to escape; behind another character, for it also
/// escapes a mark that begins a text.
fn is_printable(c: char) -> bool {
    c.is_ascii_graphic() || c == ' ' || !String::from_iter(['x', c]).escape_debug().skip(1).any(|c| c == '\\')
}

/// Python's white space: Unicode's, and the separators among the control characters.
fn is_space(c: char) -> bool {
    c.is_whitespace() || matches!(c, '\x1c'..='\x1f')
}

fn is_sequence(value: &Value) -> bool {
    use ValueKind::{Iterable, Map, Seq, String, Undefined};
    // `Iterable` is what a slice of a list is.
    matches!(value.kind(), Seq | Iterable | String | Map | Undefined)
}

fn is_iterable(value: &Value) -> bool {
    !value.is_none() && value.try_iter().is_ok()
}

fn string(value: &Value) -> Result<Value, Error> {
    if value.as_str().is_some() { Ok(value.clone()) } else { str(value).map(Value::from) }
}

fn trim(value: &Value, characters: Option<&str>) -> Result<String, Error> {
    Ok(strip(&str(value)?, characters, Ends::BOTH).to_owned())
}

fn length(value: &Value) -> Result<usize, Error> {
    if value.is_undefined() {
        return Ok(0);
    }
    value.len().ok_or_else(|| refused(format!("{} has no length", value.kind())))
}

fn replace(value: &Value, old: &str, new: &str, count: Option<usize>) -> Result<String, Error> {
    let text = str(value)?;
    Ok(count.map_or_else(|| text.replace(old, new), |count| text.replacen(old, new, count)))
}

/// `indent(width=4, first=false, blank=false)`.
#[expect(clippy::needless_pass_by_value, reason = "the engine hands over arguments by value")]
fn indent(
    value: &Value,
    width: Option<Value>,
    first: Option<bool>,
    blank: Option<bool>,
    named: Kwargs,
) -> Result<String, Error> {
    let width = width.or(named.get("width")?);
    let first = first.or(named.get("first")?).unwrap_or(false);
    let blank = blank.or(named.get("blank")?).unwrap_or(false);
    named.assert_all_used()?;
    let by = match width {
        None => " ".repeat(4),
        Some(width) => match width.as_str() {
            Some(text) => text.to_owned(),
            None => " ".repeat(usize::try_from(width)?.min(MAX_WIDTH)),
        },
    };
    let text = str(value)? + "\n";
    let mut out = if first { by.clone() } else { String::new() };
    for (at, line) in lines(&text, false).into_iter().enumerate() {
        if at > 0 {
            out.push('\n');
            out.push_str(if blank || !line.is_empty() { &by } else { "" });
        }
        out.push_str(line);
    }
    Ok(out)
}

/// `default(default_value='', boolean=false)`.
#[expect(clippy::needless_pass_by_value, reason = "the engine hands over arguments by value")]
fn default(
    value: &Value,
    other: Option<Value>,
    boolean: Option<bool>,
    named: Kwargs,
) -> Result<Value, Error> {
    let other = other.or(named.get("default_value")?).unwrap_or_else(|| Value::from(""));
    let boolean = boolean.or(named.get("boolean")?).unwrap_or(false);
    named.assert_all_used()?;
    Ok(if value.is_undefined() || (boolean && !value.is_true()) { other } else { value.clone() })
}

fn escape(value: &Value) -> Result<Value, Error> {
    if value.is_safe() {
        return Ok(value.clone());
    }
    let mut out = String::new();
    for c in str(value)?.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '\'' => out.push_str("&#39;"),
            '"' => out.push_str("&#34;"),
            c => out.push(c),
        }
    }
    Ok(Value::from_safe_string(out))
}

fn int(value: &Value, default: Option<Value>) -> Value {
    let whole = match value.as_str().map(|text| text.trim_matches(is_space)) {
        Some(text) => text.parse::<i64>().ok().or_else(|| truncated(text.parse().ok()?)),
        None => i64::try_from(value.clone()).ok().or_else(|| truncated(f64::try_from(value.clone()).ok()?)),
    };
    whole.map_or_else(|| default.unwrap_or_else(|| Value::from(0)), Value::from)
}

fn truncated(float: f64) -> Option<i64> {
    // Of magnitudes that a whole number has.
    (float.abs() < 9e18).then_some(float as i64)
}

fn float(value: &Value, default: Option<Value>) -> Value {
    let float = match value.as_str() {
        Some(text) => text.trim_matches(is_space).parse().ok(),
        None => f64::try_from(value.clone()).ok(),
    };
    float.map_or_else(|| default.unwrap_or_else(|| Value::from(0.0)), Value::from)
}

/// A method that the engine does not have.
fn method(state: &mut State<'_, '_>, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    let own = value.as_str().map(|text| string_method(text, name, args));
    match own {
        Some(Some(result)) => result,
        _ => minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args),
    }
}

/// A method of strings that `pycompat` lacks or has with other edges.
fn string_method(text: &str, name: &str, args: &[Value]) -> Option<Result<Value, Error>> {
    let one = || from_args::<(&str,)>(args).map(|(argument,)| argument);
    Some(match name {
        "strip" => stripped(text, args, Ends::BOTH),
        "lstrip" => stripped(text, args, Ends { left: true, right: false }),
        "rstrip" => stripped(text, args, Ends { left: false, right: true }),
        "split" => split_arguments(args).and_then(|(by, most)| split(text, by.as_deref(), most)),
        "rsplit" => {
            split_arguments(args).and_then(|(by, most)| split_from_the_end(text, by.as_deref(), most))
        }
        "splitlines" => from_args(args).map(|(keep,): (Option<bool>,)| {
            lines(text, keep.unwrap_or(false)).into_iter().map(Value::from).collect()
        }),
        "partition" => one().map(|by| match text.split_once(by) {
            Some((before, after)) => triple(before, by, after),
            None => triple(text, "", ""),
        }),
        "rpartition" => one().map(|by| match text.rsplit_once(by) {
            Some((before, after)) => triple(before, by, after),
            None => triple("", "", text),
        }),
        "removeprefix" => one().map(|prefix| Value::from(text.strip_prefix(prefix).unwrap_or(text))),
        "removesuffix" => one().map(|suffix| Value::from(text.strip_suffix(suffix).unwrap_or(text))),
        "index" => one().and_then(|what| match text.find(what) {
            Some(at) => Ok(Value::from(text[..at].chars().count())),
            None => Err(refused("substring not found")),
        }),
        "title" => from_args(args).map(|()| Value::from(title(text))),
        "isdigit" => from_args(args).and_then(|()| is_digits(text)),
        "isspace" => from_args(args).map(|()| Value::from(!text.is_empty() && text.chars().all(is_space))),
        _ => return None,
    })
}

fn triple(before: &str, by: &str, after: &str) -> Value {
    Value::from_object(Tuple::from([before, by, after].map(Value::from)))
}

#[derive(Clone, Copy)]
struct Ends {
    left: bool,
    right: bool,
}

impl Ends {
    const BOTH: Self = Self { left: true, right: true };
}

fn stripped(text: &str, args: &[Value], ends: Ends) -> Result<Value, Error> {
    let (characters,): (Option<&str>,) = from_args(args)?;
    Ok(Value::from(strip(text, characters, ends)))
}

fn strip<'a>(mut text: &'a str, characters: Option<&str>, ends: Ends) -> &'a str {
    let goes = |c| characters.map_or_else(|| is_space(c), |characters| characters.contains(c));
    if ends.left {
        text = text.trim_start_matches(goes);
    }
    if ends.right {
        text = text.trim_end_matches(goes);
    }
    text
}

/// What to split at, `None` for white space, and how often at most.
fn split_arguments(args: &[Value]) -> Result<(Option<String>, usize), Error> {
    let (by, most, named): (Option<Value>, Option<i64>, Kwargs) = from_args(args)?;
    let by = if named.has("sep") { named.get("sep")? } else { by };
    let most = if named.has("maxsplit") { named.get("maxsplit")? } else { most };
    named.assert_all_used()?;
    let by = match by.filter(|by| !by.is_none()) {
        Some(by) => {
            Some(by.as_str().ok_or_else(|| refused("split: the separator is not a string"))?.to_owned())
        }
        None => None,
    };
    if by.as_deref() == Some("") {
        return Err(refused("split: the separator is empty"));
    }
    Ok((by, most.and_then(|most| usize::try_from(most).ok()).unwrap_or(usize::MAX)))
}

fn split(text: &str, by: Option<&str>, most: usize) -> Result<Value, Error> {
    let parts: Vec<&str> = match by {
        Some(by) => text.splitn(most.saturating_add(1), by).collect(),
        None => {
            let mut parts = Vec::new();
            let mut rest = text.trim_start_matches(is_space);
            while !rest.is_empty() {
                let end = if parts.len() < most { rest.find(is_space) } else { None };
                let (part, after) = rest.split_at(end.unwrap_or(rest.len()));
                parts.push(part);
                rest = after.trim_start_matches(is_space);
            }
            parts
        }
    };
    Ok(parts.into_iter().map(Value::from).collect())
}

fn split_from_the_end(text: &str, by: Option<&str>, most: usize) -> Result<Value, Error> {
    let mut parts: Vec<&str> = match by {
        Some(by) => text.rsplitn(most.saturating_add(1), by).collect(),
        None => {
            let mut parts = Vec::new();
            let mut rest = text.trim_end_matches(is_space);
            while !rest.is_empty() {
                let gap =
                    if parts.len() < most { rest.char_indices().rfind(|(_, c)| is_space(*c)) } else { None };
                let (before, part) = rest.split_at(gap.map_or(0, |(at, c)| at + c.len_utf8()));
                parts.push(part);
                rest = before.trim_end_matches(is_space);
            }
            parts
        }
    };
    parts.reverse();
    Ok(parts.into_iter().map(Value::from).collect())
}

fn lines(text: &str, keep_ends: bool) -> Vec<&str> {
    let is_end =
        |c| matches!(c, '\n' | '\r' | '\x0b' | '\x0c' | '\x1c'..='\x1e' | '\u{85}' | '\u{2028}' | '\u{2029}');
    let mut lines = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let end = rest.find(is_end).unwrap_or(rest.len());
        let mark = if rest[end..].starts_with("\r\n") {
            2
        } else {
            rest[end..].chars().next().map_or(0, char::len_utf8)
        };
        lines.push(&rest[..if keep_ends { end + mark } else { end }]);
        rest = &rest[end + mark..];
    }
    lines
}

fn title(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut inside = false;
    for c in text.chars() {
        if inside {
            out.extend(c.to_lowercase());
        } else {
            out.extend(c.to_uppercase());
        }
        inside = c.is_lowercase() || c.is_uppercase();
    }
    out
}

fn is_digits(text: &str) -> Result<Value, Error> {
    if text.chars().any(|c| !c.is_ascii() && c.is_numeric()) {
        return Err(refused("isdigit is supported for ASCII digits only"));
    }
    Ok(Value::from(!text.is_empty() && text.chars().all(|c| c.is_ascii_digit())))
}
