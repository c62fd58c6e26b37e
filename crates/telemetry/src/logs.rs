//! The log subscriber: to standard error, for people or for machines.

use std::fmt;
use std::io::{self, IsTerminal};
use std::str::FromStr;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use crate::TelemetryError;
use crate::escape::{Colour, Escaping};

/// How log events are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LogFormat {
    /// A line for people, coloured on a terminal.
    #[default]
    Human,
    /// One JSON object a line.
    Json,
}

/// A log format that does not exist.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a log format; use human or json")]
pub struct UnknownLogFormat(String);

impl FromStr for LogFormat {
    type Err = UnknownLogFormat;

    fn from_str(name: &str) -> Result<Self, UnknownLogFormat> {
        match name {
            "human" => Ok(Self::Human),
            "json" => Ok(Self::Json),
            other => Err(UnknownLogFormat(other.to_owned())),
        }
    }
}

impl fmt::Display for LogFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Human => "human",
            Self::Json => "json",
        })
    }
}

/// Sends the process's log events to standard error. `filter` is a list of `level` or `target=level`.
///
/// # Errors
/// When the filter cannot be read, or logs were set up before.
pub fn init_logs(format: LogFormat, filter: &str) -> Result<(), TelemetryError> {
    let directives =
        parse(filter).map_err(|reason| TelemetryError::Filter { filter: filter.to_owned(), reason })?;
    let registry = tracing_subscriber::registry().with(directives);
    let lines = tracing_subscriber::fmt::layer();
    let outcome = match format {
        LogFormat::Human => {
            let colour = if io::stderr().is_terminal() { Colour::On } else { Colour::Off };
            let layer = lines.with_ansi(colour == Colour::On).with_writer(Stderr(colour));
            registry.with(layer).try_init()
        }
        LogFormat::Json => {
            let layer = lines.json().flatten_event(true).with_ansi(false).with_writer(Stderr(Colour::Off));
            registry.with(layer).try_init()
        }
    };
    outcome.map_err(|_| TelemetryError::LogsTwice)
}

fn parse(filter: &str) -> Result<EnvFilter, String> {
    // A lone word that is no level would be taken for a target, and a misspelt level would silence everything.
    let words = filter.split(',').filter(|part| !part.contains(['=', '[']));
    if let Some(word) = words.into_iter().find(|word| word.parse::<LevelFilter>().is_err()) {
        return Err(format!("{word:?} is not a level; levels are error, warn, info, debug, trace and off"));
    }
    EnvFilter::builder().parse(filter).map_err(|error| error.to_string())
}

/// Makes a writer per event.
struct Stderr(Colour);

impl<'a> MakeWriter<'a> for Stderr {
    type Writer = Escaping<io::Stderr>;

    fn make_writer(&'a self) -> Self::Writer {
        Escaping::new(io::stderr(), self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_round_trip() {
        for format in [LogFormat::Human, LogFormat::Json] {
            assert_eq!(format.to_string().parse(), Ok(format));
        }
        let error = "yaml".parse::<LogFormat>().unwrap_err();
        assert_eq!(error.to_string(), "\"yaml\" is not a log format; use human or json");
    }

    #[test]
    fn a_bad_filter_is_refused_with_an_example() {
        let error = init_logs(LogFormat::Human, "muster=loudest").unwrap_err().to_string();
        assert!(error.starts_with("log filter \"muster=loudest\": "), "{error}");
        assert!(error.ends_with("`info,muster_router=debug`"), "{error}");
        assert!(parse("inof").unwrap_err().contains("\"inof\" is not a level"));
        assert!(parse("warn,muster_router=debug,[span]=trace").is_ok() && parse("OFF").is_ok());
    }
}
