//! The log subscriber: to standard error, for people or for machines.

use std::fmt;
use std::io::{self, IsTerminal};
use std::str::FromStr;

use tracing::Metadata;
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer};

use crate::TelemetryError;
use crate::escape::{Colour, Escaping, Form};
use crate::limit::Limits;

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
    let outcome = match format {
        LogFormat::Human => {
            let colour = if io::stderr().is_terminal() { Colour::On } else { Colour::Off };
            subscriber(Form::Text(colour), directives, io::stderr).try_init()
        }
        LogFormat::Json => subscriber(Form::Json, directives, io::stderr).try_init(),
    };
    outcome.map_err(|_| TelemetryError::LogsTwice)
}

/// Writes the events that the directives and the limits let through.
fn subscriber<W: io::Write + 'static>(
    form: Form,
    directives: EnvFilter,
    open: fn() -> W,
) -> Box<dyn tracing::Subscriber + Send + Sync> {
    let limits = Limits::default();
    let writer = Lines { form, limits: limits.clone(), open };
    let registry = tracing_subscriber::registry().with(directives);
    let lines = tracing_subscriber::fmt::layer();
    match form {
        Form::Text(colour) => {
            let layer = lines.with_ansi(colour == Colour::On).with_writer(writer);
            Box::new(registry.with(layer.with_filter(limits)))
        }
        Form::Json => {
            let layer = lines.json().flatten_event(true).with_ansi(false).with_writer(writer);
            Box::new(registry.with(layer.with_filter(limits)))
        }
    }
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
struct Lines<W> {
    form: Form,
    limits: Limits,
    open: fn() -> W,
}

impl<'a, W: io::Write + 'static> MakeWriter<'a> for Lines<W> {
    type Writer = Escaping<W>;

    fn make_writer(&'a self) -> Self::Writer {
        Escaping::new((self.open)(), self.form, 0)
    }

    fn make_writer_for(&'a self, metadata: &Metadata<'_>) -> Self::Writer {
        Escaping::new((self.open)(), self.form, self.limits.left_out(metadata))
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::Mutex;

    use super::*;

    static WRITTEN: Mutex<Vec<u8>> = Mutex::new(Vec::new());

    struct Memory;

    impl Write for Memory {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            WRITTEN.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// Lines that `work` logs in this form.
    fn logged(form: Form, work: impl FnOnce()) -> Vec<String> {
        let directives = parse("info,chatty=debug").unwrap();
        WRITTEN.lock().unwrap().clear();
        tracing::subscriber::with_default(subscriber(form, directives, || Memory), work);
        String::from_utf8(WRITTEN.lock().unwrap().clone()).unwrap().lines().map(str::to_owned).collect()
    }

    /// One test for all: there is one place to write to.
    #[test]
    fn nobody_can_have_lines_written_without_end() {
        let refuse = |number: u64| tracing::warn!(number, "a call was refused");
        let written = || WRITTEN.lock().unwrap().iter().filter(|&&byte| byte == b'\n').count();
        for form in [Form::Text(Colour::Off), Form::Json] {
            let mut last = 1000;
            let lines = logged(form, || {
                (0..last).for_each(refuse);
                tracing::info!("another place");
                let before = written();
                while written() == before {
                    refuse(last);
                    last += 1;
                }
            });
            last -= 1;
            // More only if the machine stood still for a second.
            assert!((52..60).contains(&lines.len()), "{lines:#?}");
            let [.., other, line] = &lines[..] else { panic!("{lines:#?}") };
            assert!(other.contains("another place"), "it has an account of its own: {lines:#?}");
            let told = match form {
                Form::Json => {
                    let line: serde_json::Value = serde_json::from_str(line).unwrap();
                    assert_eq!(line["number"], last);
                    line["left_out"].as_u64().unwrap()
                }
                Form::Text(_) => {
                    let (_, told) = line.split_once(&format!("number={last} left_out=")).unwrap();
                    told.parse().unwrap()
                }
            };
            assert!(told <= last - 50 && told + 10 > last - 50, "{told} of {last}");
        }
        let lines = logged(Form::Json, || {
            (0..1000).for_each(|_| tracing::debug!(target: "chatty", "asked for by name"));
            (0..1000).for_each(|_| tracing::debug!("not asked for"));
        });
        assert_eq!(lines.len(), 1000);
    }

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
