//! `muster chat`: a conversation with the model of a running router.

use std::io::{self, BufRead, IsTerminal};

use muster_proto::v1::ChatMessage;
use tokio::sync::mpsc;

use crate::args::ChatArgs;
use crate::backend::{self, Ask, Backend, Manner, Piece};
use crate::failure::Failure;
use crate::out;

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
        out::note(&format!("{} is listening; Ctrl-D ends the conversation", model.name));
    }
    let mut backend = Backend::Router(client);
    let manner = backend.manner(&args.sampling).await?;
    let mut messages: Vec<ChatMessage> = args.system.iter().map(|text| message("system", text)).collect();
    let mut lines = lines()?;
    loop {
        if is_terminal {
            out::write("> ")?;
        }
        let Some(line) = lines.recv().await else { break };
        let line = line.map_err(|error| Failure::input(format!("cannot read standard input: {error}")))?;
        if line.trim().is_empty() {
            continue;
        }
        messages.push(message("user", &line));
        match answer(&mut backend, args.max_tokens, &manner, &messages).await {
            Ok(text) => messages.push(message("assistant", &text)),
            // Too long for the context, for one: the conversation goes on without that line.
            Err(Failure::Input(reason)) if is_terminal => {
                out::note(&format!("error: {reason}"));
                messages.pop();
            }
            Err(failure) => return Err(failure),
        }
    }
    if is_terminal { out::line("") } else { Ok(()) }
}

async fn answer(
    backend: &mut Backend,
    max_tokens: Option<u32>,
    manner: &Manner,
    messages: &[ChatMessage],
) -> Result<String, Failure> {
    let mut pieces = backend.generate(Ask::Chat(messages.to_vec()), max_tokens, manner).await?;
    let mut whole = String::new();
    while let Some(piece) = pieces.next().await? {
        let (Piece::Token { text, .. } | Piece::Finished { text, .. }) = piece;
        out::model_text(&text)?;
        whole += &text;
    }
    out::line("")?;
    Ok(whole)
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
