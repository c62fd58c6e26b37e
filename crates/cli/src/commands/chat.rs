//! `muster chat`: a conversation with the model of a running router.

use std::io::{self, BufRead, IsTerminal};

use muster_proto::v1::ChatMessage;
use tokio::sync::mpsc;

use crate::args::ChatArgs;
use crate::backend::{self, About, Ask, Backend, Manner, Piece};
use crate::ending::{self, To};
use crate::failure::Failure;
use crate::out;

const HELP: &str = "/new begins a new conversation, /exit or Ctrl-D ends it";

pub(crate) async fn run(args: &ChatArgs) -> Result<(), Failure> {
    let client = backend::connect(&args.grpc, &args.credentials).await?;
    let model = client.model().await.map_err(backend::failed)?;
    if !model.has_chat_template {
        let instead = if model.has_tokenizer { "with a prompt" } else { "--prompt-tokens" };
        let message =
            format!("model {} has no chat template; use `muster generate` {instead} instead", model.name);
        return Err(Failure::input(message));
    }
    let is_terminal = io::stdin().is_terminal();
    if is_terminal {
        out::note(&format!("{} is listening; {HELP}", model.name));
    }
    let mut backend = Backend::Router(client);
    let talk = Talk {
        manner: backend.manner(&args.sampling).await?,
        model: backend.about().await?,
        max_tokens: args.max_tokens,
    };
    let first: Vec<ChatMessage> = args.system.iter().map(|text| message("system", text)).collect();
    let (mut messages, mut has_refused) = (first.clone(), false);
    let mut lines = lines()?;
    loop {
        if is_terminal {
            out::write("> ")?;
        }
        let Some(line) = lines.recv().await else { break };
        let line = line.map_err(|error| Failure::input(format!("cannot read standard input: {error}")))?;
        match Typed::of(&line) {
            Typed::Nothing => continue,
            Typed::End => break,
            Typed::Help => {
                out::note(HELP);
                continue;
            }
            Typed::New => {
                messages.clone_from(&first);
                out::note("[a new conversation]");
                continue;
            }
            Typed::Message => {}
        }
        messages.push(message("user", &line));
        match talk.answer(&mut backend, &messages).await {
            Ok(text) => messages.push(message("assistant", &text)),
            // Bad input, such as a line too long for the context: the conversation goes on without it.
            Err(Failure::Input(reason)) => {
                out::note(&format!("error: {reason}"));
                out::note("[that line is left out; /new begins a new conversation]");
                messages.pop();
                has_refused = true;
            }
            Err(failure) => return Err(failure),
        }
    }
    match (is_terminal, has_refused) {
        (true, _) => out::line(""),
        // The exit code tells a script of the failure.
        (false, true) => Err(Failure::Quiet),
        (false, false) => Ok(()),
    }
}

/// Settings of all answers.
struct Talk {
    manner: Manner,
    model: About,
    max_tokens: Option<u32>,
}

impl Talk {
    async fn answer(&self, backend: &mut Backend, messages: &[ChatMessage]) -> Result<String, Failure> {
        let mut pieces =
            backend.generate(Ask::Chat(messages.to_vec()), self.max_tokens, &self.manner).await?;
        let (mut whole, mut end) = (String::new(), None);
        while let Some(piece) = pieces.next().await? {
            let text = match piece {
                Piece::Token { text, .. } => text,
                Piece::Finished { reason, text, output_tokens } => {
                    end = Some((reason, output_tokens));
                    text
                }
            };
            out::model_text(&text)?;
            whole += &text;
        }
        out::line("")?;
        if let Some((reason, output_tokens)) = end {
            let (prompt_tokens, to) = (pieces.prompt_tokens(), To::Conversation);
            let answer = ending::Answer { reason, text: &whole, prompt_tokens, output_tokens, to };
            if let Some(remark) = answer.remark(&self.manner, &self.model) {
                out::note(&remark);
            }
        }
        Ok(whole)
    }
}

/// A typed line. Lines that are no command go to the model, whatever they begin with.
#[derive(Debug, PartialEq, Eq)]
enum Typed {
    Nothing,
    New,
    Help,
    End,
    Message,
}

impl Typed {
    fn of(line: &str) -> Self {
        match line.trim() {
            "" => Self::Nothing,
            "/new" | "/clear" | "/reset" => Self::New,
            "/help" | "/?" => Self::Help,
            "/exit" | "/quit" | "/bye" => Self::End,
            _ => Self::Message,
        }
    }
}

fn message(role: &str, content: &str) -> ChatMessage {
    ChatMessage { role: role.to_owned(), content: content.to_owned() }
}

/// Lines of standard input, read on a thread of its own because reading a terminal blocks.
fn lines() -> Result<mpsc::Receiver<io::Result<String>>, Failure> {
    let (sender, receiver) = mpsc::channel(1);
    let read = move || {
        for line in io::stdin().lock().lines() {
            if sender.blocking_send(line).is_err() {
                return;
            }
        }
    };
    let thread = std::thread::Builder::new().name("muster-stdin".into()).spawn(read);
    thread.map_err(|error| Failure::runtime(format!("cannot start a thread for standard input: {error}")))?;
    Ok(receiver)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_lines_that_are_commands_are_taken_for_them() {
        for (line, typed) in [
            ("", Typed::Nothing),
            (" \t", Typed::Nothing),
            ("/new", Typed::New),
            (" /bye ", Typed::End),
            ("/help", Typed::Help),
            ("/new idea: what do you think?", Typed::Message),
            ("/etc/hosts", Typed::Message),
            ("new", Typed::Message),
        ] {
            assert_eq!(Typed::of(line), typed, "{line:?}");
        }
    }
}
