//! Suggestions for names that other programs use.

use clap::error::{ContextKind, ContextValue};
use clap::{CommandFactory, Error};

use crate::args::Cli;

/// Foreign names of a flag, the commands to which they apply, and the hint.
type Flag = (&'static [&'static str], &'static [&'static str], &'static str);

const FLAGS: [Flag; 8] = [
    (
        &[
            "--port",
            "-p",
            "--host",
            "--bind",
            "--listen",
            "--address",
            "--addr",
            "--http-port",
            "--grpc-port",
        ],
        &["up", "router"],
        "--http IP:PORT is where OpenAI HTTP listens, --grpc IP:PORT where gRPC does",
    ),
    (
        &["--port", "-p", "--host", "--bind", "--address", "--addr", "--http", "--grpc"],
        &["worker"],
        "--listen HOST:PORT is where routers reach a worker; it makes itself known to a router with --join HOST:PORT",
    ),
    (
        &["--http", "--url", "--host", "--port", "-p", "--router", "--address", "--addr", "--base-url"],
        &["status", "chat", "generate", "bench"],
        "--grpc http://HOST:PORT names a router, by the address of its gRPC",
    ),
    (
        &["--http", "--grpc", "--url", "--address", "--port"],
        &["drain", "probe"],
        "--admin http://HOST:PORT names a process",
    ),
    (&["--api-key"], &["up", "router"], "--api-keys FILE of `muster router` names the keys that are good"),
    (
        &["--api-key"],
        &["status", "chat", "generate", "bench"],
        "--api-key-file FILE, or the environment variable MUSTER_API_KEY, has the key",
    ),
    (
        &["--served-model-name", "--name", "--alias"],
        &["up", "router"],
        "--model-name NAME of `muster router` names the model",
    ),
    (
        &["--join"],
        &["router"],
        "a worker joins a router: muster worker --join HOST:PORT, the router's --grpc",
    ),
];

/// Foreign names of a command, and the hint.
const COMMANDS: [(&[&str], &str); 6] = [
    (
        &["serve", "server", "start", "launch"],
        "`muster up` serves a model on this machine; `muster router` and `muster worker` are its parts, on one or several",
    ),
    (
        &["run"],
        "`muster up` serves a model on this machine; `muster chat` talks to it, `muster generate` continues one prompt",
    ),
    (
        &["ask", "complete", "completion", "prompt"],
        "`muster generate` continues one prompt, `muster chat` talks",
    ),
    (&["download", "fetch", "get"], "`muster pull` fetches a model"),
    (&["ps", "list", "ls", "info", "health"], "`muster status` says how a running cluster is"),
    (
        &["check", "validate", "inspect", "show"],
        "`muster check-model` says what a model is and whether it loads",
    ),
];

/// The error with a hint for a foreign name. `arguments` are the program's.
pub(crate) fn with_hint(mut error: Error, arguments: impl IntoIterator<Item = String>) -> Error {
    let program = Cli::command();
    let command = arguments.into_iter().find(|argument| program.find_subcommand(argument).is_some());
    let said = |kind| match error.get(kind) {
        Some(ContextValue::String(name)) => Some(name.as_str()),
        _ => None,
    };
    let flag = said(ContextKind::InvalidArg).and_then(|name| flag(command.as_deref()?, name));
    let hint = flag.or_else(|| said(ContextKind::InvalidSubcommand).and_then(self::command));
    if let Some(hint) = hint {
        // clap's own suggestions only look alike.
        for guess in [ContextKind::SuggestedArg, ContextKind::SuggestedSubcommand, ContextKind::Suggested] {
            error.remove(guess);
        }
        error.insert(ContextKind::Suggested, ContextValue::StyledStrs(vec![hint.into()]));
    }
    error
}

fn flag(command: &str, name: &str) -> Option<&'static str> {
    let found =
        FLAGS.iter().find(|(names, commands, _)| names.contains(&name) && commands.contains(&command));
    found.map(|(.., hint)| *hint)
}

fn command(name: &str) -> Option<&'static str> {
    COMMANDS.iter().find(|(names, _)| names.contains(&name)).map(|(_, hint)| *hint)
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use clap::error::ErrorKind;

    use super::*;

    #[test]
    fn hints_are_for_names_that_are_not_there() {
        for (names, commands, hint) in FLAGS {
            for (name, command) in
                names.iter().flat_map(|name| commands.iter().map(move |command| (name, command)))
            {
                let given = ["muster", "--log", "warn", command, name, "1"].map(str::to_owned);
                let error = Cli::try_parse_from(&given).expect_err(name);
                assert_eq!(error.kind(), ErrorKind::UnknownArgument, "{command} {name}");
                assert!(with_hint(error, given).to_string().contains(hint), "{command} {name}");
            }
        }
        for (names, hint) in COMMANDS {
            for name in names {
                let given = ["muster", name].map(str::to_owned);
                let error = Cli::try_parse_from(&given).expect_err(name);
                assert_eq!(error.kind(), ErrorKind::InvalidSubcommand, "{name}");
                assert!(with_hint(error, given).to_string().contains(hint), "{name}");
            }
        }
    }

    #[test]
    fn hints_name_flags_that_are_there() {
        let all = Cli::command();
        for (_, commands, hint) in FLAGS {
            let flag = hint.split("--").nth(1).and_then(|rest| rest.split(' ').next()).expect("a flag");
            let there = |name: &str| {
                let command = all.find_subcommand(name).expect("a command");
                command.get_arguments().any(|argument| argument.get_long() == Some(flag))
            };
            assert!(commands.iter().any(|command| there(command)) || there("worker"), "{hint}");
        }
    }
}
