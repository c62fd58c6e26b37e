//! `muster pull`: executes `muster-pull`, a separate program because fetching links an HTTP client.

use std::io::ErrorKind;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

use crate::args::PullArgs;
use crate::failure::Failure;

const PROGRAM: &str = "muster-pull";

/// Never returns when the program is found.
pub(crate) fn run(args: &PullArgs) -> Failure {
    let beside = std::env::current_exe().ok().map(|executable| executable.with_file_name(PROGRAM));
    let program = beside.filter(|program| program.is_file()).unwrap_or_else(|| PathBuf::from(PROGRAM));
    let error = Command::new(&program).args(&args.arguments).exec();
    match error.kind() {
        ErrorKind::NotFound => Failure::input(format!(
            "{PROGRAM} is neither beside this program nor on the PATH; build it with `cargo build --release -p {PROGRAM}`"
        )),
        _ => Failure::runtime(format!("cannot run {}: {error}", program.display())),
    }
}
