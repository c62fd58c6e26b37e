//! Standard output and standard error. A reader that goes away ends the program quietly.

use std::io::{self, ErrorKind, IsTerminal, Write};

use crate::failure::Failure;

/// Writes to standard output at once.
pub(crate) fn write(text: &str) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).map_err(|error| match error.kind() {
        ErrorKind::BrokenPipe => Failure::OutputClosed,
        _ => Failure::runtime(format!("cannot write to standard output: {error}")),
    })
}

/// Writes a line to standard output.
pub(crate) fn line(text: &str) -> Result<(), Failure> {
    write(&format!("{text}\n"))
}

/// Writes a model's text: unchanged into a pipe, without control characters to a terminal, which would obey them.
pub(crate) fn model_text(text: &str) -> Result<(), Failure> {
    if io::stdout().is_terminal() { write(&harmless(text)) } else { write(text) }
}

/// Writes a line to standard error. Errors are ignored.
pub(crate) fn note(text: &str) {
    let _ = writeln!(io::stderr(), "{}", harmless(text));
}

fn harmless(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && c != '\n' && c != '\t' { '\u{fffd}' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn terminals_get_no_orders_from_a_model() {
        assert_eq!(harmless("a\u{1b}[2J\r\n\tü"), "a\u{fffd}[2J\u{fffd}\n\tü");
    }
}
