//! How a command ends badly: a line for the person, a code for the script.

use std::fmt::Display;
use std::process::ExitCode;

use muster_bench::BenchError;

use crate::out;

/// Why a command ended.
#[derive(Debug)]
pub(crate) enum Failure {
    /// What was asked for cannot be: flags, configuration, model files, a port that is taken.
    Input(String),
    /// It could be, but did not work out.
    Runtime(String),
    /// It did not, and standard output says why.
    Quiet,
    /// Whoever read standard output has gone away, which is not an error.
    OutputClosed,
    /// A signal asked for the end before the work was done.
    Interrupted,
}

impl Failure {
    pub(crate) fn input(error: impl Display) -> Self {
        Self::Input(error.to_string())
    }

    pub(crate) fn runtime(error: impl Display) -> Self {
        Self::Runtime(error.to_string())
    }

    /// Says it on standard error and gives the exit code.
    pub(crate) fn report(&self) -> ExitCode {
        let (message, code) = match self {
            Self::Input(message) => (message, 2),
            Self::Runtime(message) => (message, 1),
            Self::Quiet => return ExitCode::from(1),
            Self::OutputClosed => return ExitCode::SUCCESS,
            // As shells count a process ended by SIGINT.
            Self::Interrupted => return ExitCode::from(130),
        };
        for line in message.lines() {
            out::note(&format!("error: {line}"));
        }
        ExitCode::from(code)
    }
}

impl From<BenchError> for Failure {
    fn from(error: BenchError) -> Self {
        match error {
            BenchError::Input(message) => Self::Input(message),
            BenchError::Runtime(message) => Self::Runtime(message),
        }
    }
}

impl From<Failure> for BenchError {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Input(message) => Self::Input(message),
            Failure::Runtime(message) => Self::Runtime(message),
            other => Self::Runtime(format!("{other:?}")),
        }
    }
}
