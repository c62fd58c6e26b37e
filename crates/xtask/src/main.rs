//! `cargo xtask`: tools for working on Muster. Nothing that is served depends on this crate.
//!
//! `ab` compares a cluster with its alternatives; `model` writes the measured checkpoint; `chaos` repeats the chaos
//! tests. Runs the `muster` binary as a user would; knows nothing of its internals.

mod ab;
mod chaos;
mod model;
mod page;
mod probe;
mod process;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(name = "xtask", about = "Tools for working on Muster")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Measure a Muster cluster side by side with llama.cpp and transformers.
    Ab(ab::Args),
    /// Repeat the chaos tests and tell how long streams stood still.
    Chaos(chaos::Args),
    /// Write the checkpoint that is measured: the shape of granite-3.1-1b-a400m, random weights, 2.7 GB.
    Model {
        /// The directory to write.
        directory: PathBuf,
    },
}

fn main() -> ExitCode {
    let outcome = match Cli::parse().command {
        Command::Ab(args) => ab::run(&args),
        Command::Chaos(args) => chaos::run(&args),
        Command::Model { directory } => model::write(&directory),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            note(&format!("xtask: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

/// Prints a line on standard error.
#[expect(clippy::print_stderr, reason = "progress and errors of a program")]
fn note(line: &str) {
    eprintln!("{line}");
}

/// Prints a result on standard output.
#[expect(clippy::print_stdout, reason = "the outcome of a program")]
fn print(text: &str) {
    println!("{text}");
}
