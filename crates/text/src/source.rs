//! Rewrites a template's source so that our engine reads it as the reference does.
//!
//! Line breaks are one character, as the reference reads them. `{% generation %}` marks what a model is trained
//! on and shows in no text; here it only keeps its scope. Escapes in strings are Python's. Knows as much of the
//! syntax as it takes to find tags and strings; what is malformed is left for the engine to refuse.

use std::borrow::Cow;

/// Rewrites `source`.
///
/// # Errors
/// A string has an escape that cannot be read here.
pub(crate) fn prepare(source: &str) -> Result<String, String> {
    let source = source.replace("\r\n", "\n").replace('\r', "\n");
    let mut out = String::with_capacity(source.len() + 64);
    let mut rest = source.as_str();
    while let Some(at) = rest.find('{') {
        let (text, tag) = rest.split_at(at);
        out.push_str(text);
        rest = match tag.as_bytes().get(1) {
            Some(b'#') => comment(&mut out, tag),
            Some(b'%') => block(&mut out, tag)?,
            Some(b'{') => expression(&mut out, tag, 2, "}}")?,
            _ => copy(&mut out, tag, Some(1)),
        };
    }
    out.push_str(rest);
    Ok(out)
}

/// Copies up to `end`, or everything, and returns the rest.
fn copy<'a>(out: &mut String, text: &'a str, end: Option<usize>) -> &'a str {
    let (done, rest) = text.split_at(end.unwrap_or(text.len()));
    out.push_str(done);
    rest
}

/// A comment. The reference takes what is before it on its line away, as with other tags.
fn comment<'a>(out: &mut String, tag: &'a str) -> &'a str {
    if !tag[2..].starts_with(['-', '+']) {
        let kept = out.trim_end_matches(|c: char| c.is_whitespace() && c != '\n').len();
        if kept == 0 || out[..kept].ends_with('\n') {
            out.truncate(kept);
        }
    }
    copy(out, tag, tag[2..].find("#}").map(|end| end + 4))
}

/// A tag `{% … %}`, with all of its text where it is `raw`.
fn block<'a>(out: &mut String, tag: &'a str) -> Result<&'a str, String> {
    let name_at = 2 + tag[2..].find(|c: char| !matches!(c, '-' | '+') && !c.is_whitespace()).unwrap_or(0);
    let name_length = tag[name_at..].find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(0);
    let (head, name) = (&tag[..name_at], &tag[name_at..name_at + name_length]);
    let tail_at = name_at + name_length;
    let tail = tag[tail_at..].trim_start();
    let closed = ["%}", "-%}", "+%}"].into_iter().find(|close| tail.starts_with(close));
    match (name, closed) {
        ("generation" | "endgeneration", Some(_)) => {
            out.push_str(head);
            out.push_str(if name == "generation" { "with " } else { "endwith " });
            Ok(tail)
        }
        ("raw", Some(close)) => {
            out.push_str(head);
            // The reference keeps a line break here, which other tags take with them.
            out.push_str(if close == "%}" { "raw +%}" } else { "raw -%}" });
            let text = &tail[close.len()..];
            Ok(copy(out, text, end_of_raw(text)))
        }
        ("macro", _) => {
            check_defaults(&tag[tail_at..])?;
            expression(out, tag, tail_at, "%}")
        }
        _ => expression(out, tag, tail_at, "%}"),
    }
}

/// The engine takes the default of a macro's parameter from around the macro, the reference from the parameters
/// before it.
fn check_defaults(signature: &str) -> Result<(), String> {
    let mut before: Vec<&str> = Vec::new();
    let (mut depth, mut in_default, mut rest) = (0_usize, false, signature);
    while let Some(c) = rest.chars().next() {
        let mut length = c.len_utf8();
        match c {
            '(' | '[' | '{' => depth += 1,
            ')' | ']' | '}' if depth <= 1 => return Ok(()),
            ')' | ']' | '}' => depth -= 1,
            ',' if depth == 1 => in_default = false,
            '=' if depth == 1 => in_default = true,
            '\'' | '"' => length = rest.len() - string(&mut String::new(), rest, c)?.len(),
            c if c.is_alphabetic() || c == '_' => {
                length = rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len());
                let name = &rest[..length];
                if depth == 1 && !in_default {
                    before.push(name);
                } else if in_default && before.contains(&name) {
                    return Err(format!(
                        "a macro's default that reads its parameter `{name}` is not supported"
                    ));
                }
            }
            _ => {}
        }
        rest = &rest[length..];
    }
    Ok(())
}

/// Where the tag `{% endraw %}` begins.
fn end_of_raw(text: &str) -> Option<usize> {
    let is_end = |&(at, _): &(usize, &str)| {
        text[at + 2..].trim_start_matches(['-', '+']).trim_start().starts_with("endraw")
    };
    text.match_indices("{%").find(is_end).map(|(at, _)| at)
}

/// Copies `tag` from its beginning to after `close`, where that stands outside brackets and strings; what is
/// before `from` is copied as it is.
fn expression<'a>(out: &mut String, tag: &'a str, from: usize, close: &str) -> Result<&'a str, String> {
    let mut rest = copy(out, tag, Some(from));
    let mut open = 0_usize;
    while let Some(c) = rest.chars().next() {
        if open == 0 && rest.starts_with(close) {
            return Ok(copy(out, rest, Some(close.len())));
        }
        match c {
            '\'' | '"' => {
                rest = string(out, rest, c)?;
                continue;
            }
            '(' | '[' | '{' => open += 1,
            ')' | ']' | '}' => open = open.saturating_sub(1),
            _ => {}
        }
        rest = copy(out, rest, Some(c.len_utf8()));
    }
    Ok(rest)
}

/// Copies a string that begins and ends with `quote`.
fn string<'a>(out: &mut String, text: &'a str, quote: char) -> Result<&'a str, String> {
    let mut rest = copy(out, text, Some(1));
    while let Some(at) = rest.find(['\\', quote]) {
        rest = copy(out, rest, Some(at));
        if rest.starts_with(quote) {
            return Ok(copy(out, rest, Some(1)));
        }
        let (length, written) = escape(rest)?;
        out.push_str(&written);
        rest = &rest[length..];
    }
    Ok(copy(out, rest, None))
}

/// The length of the escape that `text` begins with, and how our engine reads the same.
fn escape(text: &str) -> Result<(usize, Cow<'_, str>), String> {
    let Some(kind) = text[1..].chars().next() else { return Ok((1, text[..1].into())) };
    Ok(match kind {
        '\n' => (2, "".into()),
        '/' => (2, "\\\\/".into()),
        'a' => (2, "\\x07".into()),
        'v' => (2, "\\x0b".into()),
        'U' => {
            let code = text.get(2..10).and_then(|digits| u32::from_str_radix(digits, 16).ok());
            let c = code.and_then(char::from_u32).ok_or_else(|| format!("`{text:.10}` is no character"))?;
            (10, if matches!(c, '\'' | '"' | '\\') { format!("\\{c}") } else { c.to_string() }.into())
        }
        'N' => return Err("`\\N{…}` in a string is not supported: write the character itself".into()),
        c => (1 + c.len_utf8(), text[..1 + c.len_utf8()].into()),
    })
}

#[cfg(test)]
mod tests {
    use super::prepare;

    #[test]
    fn what_is_alike_is_left_alone() {
        for source in [
            "",
            "text { { } %} }}",
            "{# {% generation %} \\/ #}",
            "{{ '{% generation %}' ~ \"}}\" }}",
            "{{ {'a': {'b': '}}'}} }}{% set x = [1, {}] %}",
            "{% raw -%}{% generation %}'\\/{%- endraw %}",
            "{{ 'a\\n\\'\\\\' }}",
            "{{ 'open",
            "{% open",
            "{%",
            "{{ 'x\\",
            "{# open",
            "{% raw -%} open",
            "é{{ 'é' }}世",
        ] {
            assert_eq!(prepare(source).unwrap(), source);
        }
    }

    #[test]
    fn what_is_read_differently_is_rewritten() {
        for (source, expected) in [
            ("a\r\nb\rc", "a\nb\nc"),
            ("{%- generation -%}a{%generation%}", "{%- with -%}a{%with %}"),
            ("{% endgeneration +%}", "{% endwith +%}"),
            ("{% raw %}\n{% endraw %}", "{% raw +%}\n{% endraw %}"),
            ("{{ '\\/\\a\\v\\U0001F600\\U00000027' }}", "{{ '\\\\/\\x07\\x0b😀\\'' }}"),
        ] {
            assert_eq!(prepare(source).unwrap(), expected);
        }
        assert!(prepare("{{ '\\N{BULLET}' }}").unwrap_err().contains("write the character"));
        assert!(prepare("{{ '\\U0011' }}").unwrap_err().contains("no character"));
    }

    #[test]
    fn a_comment_takes_what_is_before_it_on_its_line() {
        for (source, expected) in [
            ("a\n  {# c #}\nb", "a\n{# c #}\nb"),
            (" \t{# c #}", "{# c #}"),
            ("a {# c #}", "a {# c #}"),
            ("\n {#+ c #}", "\n {#+ c #}"),
            ("{{ 1 }} {# c #}", "{{ 1 }} {# c #}"),
            ("\n {#- c #}{#}", "\n {#- c #}{#}"),
        ] {
            assert_eq!(prepare(source).unwrap(), expected);
        }
    }

    #[test]
    fn a_default_that_reads_another_parameter_is_refused() {
        for source in ["{% macro m(a, b=a) %}", "{%- macro m(a, b=[f('x', a)]) -%}"] {
            assert!(prepare(source).unwrap_err().contains("`a`"), "{source}");
        }
        for source in ["{% macro m(a, b='a', c=[d, (1)]) %}", "{% macro m() %}", "{% macro", "{% macro m('"] {
            assert_eq!(prepare(source).unwrap(), source);
        }
    }
}
