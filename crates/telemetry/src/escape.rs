//! Keeps one log event on one line, whatever came in from outside.

use std::fmt::Write as _;
use std::io::{self, Write};

/// Whether the formatter above colours its output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Colour {
    /// It does; the escape character is its own, and it takes those in values out itself.
    On,
    /// It does not; no escape character belongs in a line.
    Off,
}

/// Writes events to `inner` with their control characters spelled out.
pub(crate) struct Escaping<W> {
    inner: W,
    colour: Colour,
}

impl<W> Escaping<W> {
    pub(crate) const fn new(inner: W, colour: Colour) -> Self {
        Self { inner, colour }
    }
}

impl<W: Write> Write for Escaping<W> {
    /// One call is one event: the formatter collects a whole event before it writes.
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        let line = one_line(&String::from_utf8_lossy(event), self.colour);
        self.inner.write_all(line.as_bytes())?;
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

fn one_line(event: &str, colour: Colour) -> String {
    let body = event.strip_suffix('\n').unwrap_or(event);
    let mut line = String::with_capacity(event.len() + 1);
    for c in body.chars() {
        let own = c == '\u{1b}' && colour == Colour::On;
        if c.is_control() && !own {
            // Writing to a string cannot fail.
            let _ = write!(line, "{}", c.escape_default());
        } else {
            line.push(c);
        }
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
        let taken = Escaping::new(&mut out, Colour::Off).write(event).unwrap();
        assert_eq!(taken, event.len());
        let text = String::from_utf8(out).unwrap();
        assert_eq!(text, "model=\"a\\nb\\r\\u{1b}[2J\\u{7}\\t\\u{9b} end\n");
    }

    #[test]
    fn own_colours_pass_and_text_is_kept() {
        assert_eq!(one_line("\u{1b}[32mINFO\u{1b}[0m grüß\n", Colour::On), "\u{1b}[32mINFO\u{1b}[0m grüß\n");
        assert_eq!(one_line("no newline", Colour::On), "no newline\n");
    }
}
