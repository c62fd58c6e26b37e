//! The `muster` program: one executable, one subcommand per role or tool.
//!
//! Owns the command line, child processes, terminal output and exit codes (0 done, 1 failed, 2 bad input). Everything
//! else is in the libraries. `main` stays on the main thread for the life of the process, because child processes are
//! tied to the thread that spawned them.

mod args;
mod backend;
mod children;
mod cluster;
mod commands;
mod cores;
mod ending;
mod engine;
mod failure;
mod hints;
mod kept;
mod models;
mod numbers;
mod out;
mod outlet;
mod progress;
mod signals;
mod sockets;
mod text;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let given = || std::env::args_os().skip(1).map(|argument| argument.to_string_lossy().into_owned());
    let cli = args::Cli::try_parse().unwrap_or_else(|error| hints::with_hint(error, given()).exit());
    let Err(failure) = commands::run(cli) else { return ExitCode::SUCCESS };
    for line in failure.message().into_iter().flat_map(str::lines) {
        out::note(&format!("error: {line}"));
    }
    failure.code()
}
