//! How a command ends badly: a line for the person, a code for the script.

use std::fmt::Display;
use std::process::ExitCode;

use muster_bench::BenchError;

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

    /// The line for the person; `None` where there is nothing to say.
    pub(crate) fn message(&self) -> Option<&str> {
        match self {
            Self::Input(message) | Self::Runtime(message) => Some(message),
            Self::Quiet | Self::OutputClosed | Self::Interrupted => None,
        }
    }

    /// The code for the script.
    pub(crate) fn code(&self) -> ExitCode {
        match self {
            Self::Input(_) => ExitCode::from(2),
            Self::Runtime(_) | Self::Quiet => ExitCode::FAILURE,
            Self::OutputClosed => ExitCode::SUCCESS,
            // As shells count a process ended by SIGINT.
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
