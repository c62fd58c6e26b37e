//! Failures of a command: a message for the user and an exit code.

use std::fmt::Display;
use std::process::ExitCode;

use muster_bench::BenchError;

/// Reason for the end of a command.
#[derive(Debug)]
pub(crate) enum Failure {
    /// Bad input: flags, configuration, model files, a busy port.
    Input(String),
    /// Good input, but an error at run time.
    Runtime(String),
    /// An error that standard output already reports.
    Quiet,
    /// The reader of standard output is gone, which is no error.
    OutputClosed,
    /// A signal came before the work was done.
    Interrupted,
}

impl Failure {
    pub(crate) fn input(error: impl Display) -> Self {
        Self::Input(error.to_string())
    }

    pub(crate) fn runtime(error: impl Display) -> Self {
        Self::Runtime(error.to_string())
    }

    /// Message for the user, if any.
    pub(crate) fn message(&self) -> Option<&str> {
        match self {
            Self::Input(message) | Self::Runtime(message) => Some(message),
            Self::Quiet | Self::OutputClosed | Self::Interrupted => None,
        }
    }

    /// Exit code.
    pub(crate) fn code(&self) -> ExitCode {
        match self {
            Self::Input(_) => ExitCode::from(2),
            Self::Runtime(_) | Self::Quiet => ExitCode::FAILURE,
            Self::OutputClosed => ExitCode::SUCCESS,
            // As shells report a process ended by SIGINT.
            Self::Interrupted => ExitCode::from(130),
        }
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
