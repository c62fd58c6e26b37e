//! `muster generate`: one prompt, one answer.

use std::time::{Duration, Instant};

use muster_proto::v1::ChatMessage;
use serde::Serialize;

use super::target::with_backend;
use crate::args::{GenerateArgs, LogArgs, SamplingArgs};
use crate::backend::{Ask, Backend, Piece};
use crate::ending::{self, To};
use crate::engine::model_defaults;
use crate::failure::Failure;
use crate::{out, text};

/// Tokens to generate when neither a flag nor the model says how many.
const DEFAULT_TOKENS: u32 = 64;

pub(crate) async fn run(args: &GenerateArgs, log: &LogArgs) -> Result<(), Failure> {
    let defaults = model_defaults(args.sampling.generation_config);
    with_backend(&args.target, args.compute, defaults, log, |backend, _| async move {
        let prompt = match &args.prompt {
            Some(question) if args.chat => Prompt::Chat(question.clone()),
            Some(text) => Prompt::Text(text.clone()),
            None => Prompt::Tokens(args.prompt_tokens.clone()),
        };
        let output = if args.json { Output::Json } else { Output::Text };
        answer(backend, prompt, args.max_tokens, &args.sampling, output).await
    })
    .await
}

/// A prompt.
pub(crate) enum Prompt {
    Text(String),
    Tokens(Vec<u32>),
    /// A message to answer.
    Chat(String),
}

/// Format of the output.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Output {
    /// The text as it is generated, and timing on standard error.
    Text,
    /// One JSON object at the end.
    Json,
}

/// JSON of `--json`.
#[derive(Serialize)]
struct Answer {
    token_ids: Vec<u32>,
    text: String,
    finish_reason: &'static str,
    /// Absent for a chat, whose prompt becomes ids where the chat template is.
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<Vec<u32>>,
    usage: Usage,
}

#[derive(Serialize)]
struct Usage {
    prompt_tokens: u32,
    completion_tokens: u32,
    total_tokens: u64,
}

/// Generates one answer and prints it.
pub(crate) async fn answer(
    mut backend: Backend,
    prompt: Prompt,
    max_tokens: Option<u32>,
    sampling: &SamplingArgs,
    output: Output,
) -> Result<(), Failure> {
    let (shown, ids) = match &prompt {
        Prompt::Text(text) => (text.clone(), Some(backend.tokenize(text.clone()).await?)),
        Prompt::Tokens(ids) => (String::new(), Some(ids.clone())),
        Prompt::Chat(_) => (String::new(), None),
    };
    let ask = match (&ids, prompt) {
        (None, Prompt::Chat(content)) => Ask::Chat(vec![ChatMessage { role: "user".to_owned(), content }]),
        (ids, _) => Ask::Tokens(ids.clone().unwrap_or_default()),
    };
    let mut manner = backend.manner(sampling).await?;
    manner.default_tokens.get_or_insert(DEFAULT_TOKENS);
    let started = Instant::now();
    let mut pieces = backend.generate(ask, max_tokens, &manner).await?;
    let prompt_tokens = pieces.prompt_tokens();
    if output == Output::Text {
        out::model_text(&shown)?;
    }
    let (mut token_ids, mut whole, mut first) = (Vec::new(), String::new(), None);
    let (finish_reason, completion_tokens) = loop {
        let piece = match pieces.next().await {
            // Ends the unfinished line of output.
            Err(failure) if output == Output::Text => return out::line("").and(Err(failure)),
            piece => piece?,
        };
        first.get_or_insert_with(|| started.elapsed());
        let (text, end) = match piece {
            Some(Piece::Token { id, text }) => {
                token_ids.push(id);
                (text, None)
            }
            Some(Piece::Finished { reason, text, output_tokens }) => (text, Some((reason, output_tokens))),
            None => return Err(Failure::runtime("the answer ended without saying why")),
        };
        if output == Output::Text {
            out::model_text(&text)?;
        }
        whole += &text;
        if let Some(end) = end {
            break end;
        }
    };
    let answer = ending::Answer {
        reason: finish_reason,
        text: &whole,
        prompt_tokens,
        output_tokens: completion_tokens,
        to: if ids.is_none() { To::Message } else { To::Text },
    };
    let remark = answer.remark(&manner, &backend.about().await?);
    match output {
        Output::Text => {
            out::line("")?;
            if let Some(remark) = remark {
                out::note(&remark);
            }
            out::note(&timing(
                prompt_tokens,
                completion_tokens,
                first.unwrap_or_default(),
                started.elapsed(),
            ));
            Ok(())
        }
        Output::Json => {
            // The JSON object itself reports an answer that was cut.
            if let Some(remark) = remark.filter(|_| whole.trim().is_empty()) {
                out::note(&remark);
            }
            let usage = Usage {
                prompt_tokens,
                completion_tokens,
                total_tokens: u64::from(prompt_tokens) + u64::from(completion_tokens),
            };
            let answer = Answer { token_ids, text: whole, finish_reason, prompt_token_ids: ids, usage };
            out::line(&serde_json::to_string(&answer).map_err(Failure::runtime)?)
        }
    }
}

fn timing(prompt: u32, output: u32, first: Duration, whole: Duration) -> String {
    let rest = (whole.saturating_sub(first)).as_secs_f64();
    let speed = f64::from(output.saturating_sub(1)) / rest;
    let speed = if speed.is_finite() { format!(", then {speed:.1} tokens/s") } else { String::new() };
    format!("[{prompt} + {output} tokens in {}; first after {}{speed}]", text::span(whole), text::span(first))
}
