//! `muster keys`: API keys, and their lines for routers.

use std::fs::OpenOptions;
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use muster_identity::{NewKey, key_line};

use crate::args::{KeysCommand, KeysHashArgs, KeysNewArgs};
use crate::failure::Failure;
use crate::out;

/// Longest key read from standard input, bytes.
const LONGEST: u64 = 4096;

pub(crate) fn run(command: &KeysCommand) -> Result<(), Failure> {
    match command {
        KeysCommand::New(args) => new(args),
        KeysCommand::Hash(args) => hash(args),
    }
}

fn new(args: &KeysNewArgs) -> Result<(), Failure> {
    let NewKey { key, line } = NewKey::generate(&args.name).map_err(Failure::input)?;
    match &args.file {
        Some(file) => add(file, &args.name, &line)?,
        None => {
            out::note(&format!("the line for --api-keys:\n{line}\nthe key, which cannot be shown again:"));
        }
    }
    out::line(&key)
}

/// Appends a line to the file, which is created if missing.
fn add(file: &Path, name: &str, line: &str) -> Result<(), Failure> {
    let failed = |error: std::io::Error| Failure::input(format!("{}: {error}", file.display()));
    let before = match std::fs::read_to_string(file) {
        Ok(before) => before,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
        Err(error) => return Err(failed(error)),
    };
    if before.lines().any(|line| line.split_whitespace().next() == Some(name)) {
        return Err(Failure::input(format!(
            "{}: {name} has a key already; take its line out first",
            file.display()
        )));
    }
    let gap = if before.is_empty() || before.ends_with('\n') { "" } else { "\n" };
    let mut file = OpenOptions::new().append(true).create(true).mode(0o600).open(file).map_err(failed)?;
    file.write_all(format!("{gap}{line}\n").as_bytes()).map_err(failed)
}

fn hash(args: &KeysHashArgs) -> Result<(), Failure> {
    let mut key = String::new();
    let read = std::io::stdin().take(LONGEST).read_to_string(&mut key);
    read.map_err(|error| Failure::input(format!("standard input: {error}")))?;
    let line = key_line(&args.name, key.trim_end_matches(['\r', '\n'])).map_err(Failure::input)?;
    out::line(&line)
}
