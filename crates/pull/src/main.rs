//! `muster-pull`: fetches a model directory from the Hugging Face hub into the standard hub cache.
//!
//! A program of its own so that the servers link no HTTP client. Prints the model's directory as the only
//! line on standard output; progress and errors go to standard error. Never prints a token.

mod fetch;
mod name;
mod select;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, Result, bail};
use clap::Parser;

use crate::name::{ModelName, Revision};

/// Longest token file that is read.
const MAX_TOKEN_BYTES: usize = 4096;

/// Fetch a model from the Hugging Face hub and print the directory it is in.
#[derive(Debug, Parser)]
#[command(name = "muster-pull", version)]
struct Args {
    /// The model, as org/name.
    name: ModelName,
    /// Branch, tag or commit.
    #[arg(long, default_value = "main")]
    revision: Revision,
    /// The hub cache [default: $HF_HOME/hub, else ~/.cache/huggingface/hub].
    #[arg(long, value_name = "DIR")]
    cache_dir: Option<PathBuf>,
    /// A file with an access token, for models that need one [default: the hub's own token file].
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
}

fn main() -> ExitCode {
    let args = Args::parse();
    match run(&args) {
        Ok(directory) => {
            #[expect(clippy::print_stdout, reason = "the directory is what the program is asked for")]
            {
                println!("{}", directory.display());
            }
            ExitCode::SUCCESS
        }
        Err(error) => {
            #[expect(clippy::print_stderr, reason = "a program's errors go to standard error")]
            {
                eprintln!("muster-pull: {error:#}");
            }
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<PathBuf> {
    let token = args.token_file.as_deref().map(read_token).transpose()?;
    fetch::fetch(&args.name, &args.revision, args.cache_dir.clone(), token)
}

fn read_token(path: &std::path::Path) -> Result<String> {
    let shown = path.display();
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read --token-file {shown}"))?;
    let token = text.trim();
    // Anything else would break the request, whose error could quote it.
    let plain = token.bytes().all(|b| b.is_ascii_graphic());
    if token.is_empty() || token.len() > MAX_TOKEN_BYTES || !plain {
        bail!("--token-file {shown} does not hold one token, a single line of printable characters");
    }
    Ok(token.to_owned())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
        let args = Args::try_parse_from(["muster-pull", "org/name", "--revision", "v1"]).unwrap();
        assert_eq!(args.name.as_str(), "org/name");
        assert!(Args::try_parse_from(["muster-pull", "../name"]).is_err());
        assert!(Args::try_parse_from(["muster-pull", "org/name", "--revision", "../main"]).is_err());
    }

    #[test]
    fn a_token_is_one_printable_line_and_never_quoted() {
        let path = std::env::temp_dir().join(format!("muster-pull-token-{}", std::process::id()));
        for (content, expected) in
            [(" tok_abc \n", Some("tok_abc")), ("", None), ("tok_abc\ntok_def", None), ("tok_abc\u{1}", None)]
        {
            std::fs::write(&path, content).unwrap();
            match (read_token(&path), expected) {
                (Ok(token), Some(expected)) => assert_eq!(token, expected),
                (Err(error), None) => assert!(!format!("{error:#}").contains("tok_"), "{error:#}"),
                (other, _) => panic!("{content:?}: {other:?}"),
            }
        }
        std::fs::remove_file(&path).unwrap();
        assert!(read_token(&path).is_err());
    }
}
