//! Keeps one log event on one line, whatever its values, with the number of lines left out before it.

use std::fmt::Write as _;
use std::io::{self, Write};

/// Whether the formatter above colours its output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Colour {
    /// It does, and removes escape characters from values itself.
    On,
    /// It does not; no escape character belongs in a line.
    Off,
}

/// End of a line, where a field can be added.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    /// `field=value`, for people.
    Text(Colour),
    /// An object of JSON.
    Json,
}

/// Writes events to `inner` with their control characters spelled out.
pub(crate) struct Escaping<W> {
    inner: W,
    form: Form,
    /// Lines like the first one that were left out before it.
    left_out: u64,
}

impl<W> Escaping<W> {
    pub(crate) const fn new(inner: W, form: Form, left_out: u64) -> Self {
        Self { inner, form, left_out }
    }
}

impl<W: Write> Write for Escaping<W> {
    /// One call is one event: the formatter collects a whole event before it writes.
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        let line = one_line(&String::from_utf8_lossy(event), self.form, std::mem::take(&mut self.left_out));
        self.inner.write_all(line.as_bytes())?;
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

fn one_line(event: &str, form: Form, left_out: u64) -> String {
    let body = event.strip_suffix('\n').unwrap_or(event);
    let mut line = String::with_capacity(event.len() + 1);
    for c in body.chars() {
        let own = c == '\u{1b}' && form == Form::Text(Colour::On);
        if c.is_control() && !own {
            // Writing to a string cannot fail.
            let _ = write!(line, "{}", c.escape_default());
        } else {
            line.push(c);
        }
    }
    if left_out > 0 {
        // Writing to a string cannot fail.
        let _ = match form {
            Form::Text(_) => write!(line, " left_out={left_out}"),
            Form::Json => {
                let open = line.strip_suffix('}').map_or(line.len(), str::len);
                line.truncate(open);
                write!(line, ",\"left_out\":{left_out}}}")
            }
        };
    }
    line.push('\n');
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_never_reach_the_terminal() {
        let mut out = Vec::new();
        let event = b"model=\"a\nb\r\x1b[2J\x07\t\xc2\x9b end\n";
        let taken = Escaping::new(&mut out, Form::Text(Colour::Off), 0).write(event).unwrap();
        assert_eq!(taken, event.len());
        let text = String::from_utf8(out).unwrap();
        assert_eq!(text, "model=\"a\\nb\\r\\u{1b}[2J\\u{7}\\t\\u{9b} end\n");
    }

    #[test]
    fn own_colours_pass_and_text_is_kept() {
        let line = |event| one_line(event, Form::Text(Colour::On), 0);
        assert_eq!(line("\u{1b}[32mINFO\u{1b}[0m grüß\n"), "\u{1b}[32mINFO\u{1b}[0m grüß\n");
        assert_eq!(line("no newline"), "no newline\n");
    }
}
