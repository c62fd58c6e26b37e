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
mod dispatch_times;
mod engine;
mod failure;
mod kept;
mod models;
mod numbers;
mod out;
mod outlet;
mod plain_http;
mod progress;
mod scrape;
mod signals;
mod sockets;
mod stats;
mod text;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let cli = args::Cli::parse();
    match commands::run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(),
    }
}
