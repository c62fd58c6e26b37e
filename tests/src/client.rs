//! Requests over gRPC, with checks on the contract of every stream.

use muster_proto::v1::generate_event::Event;
use muster_proto::v1::inference_client::InferenceClient;
use muster_proto::v1::{
    GenerateEvent, GenerateRequest, Sampling, Stop, TokenFrame, TokenIds, finished, generate_request::Prompt,
};
use tonic::transport::Channel;
use tonic::{Status, Streaming};

/// The complete output of one choice.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Output {
    /// Tokens in order.
    pub ids: Vec<u32>,
    /// Concatenated text.
    pub text: String,
    /// Finish reason: "stop" or "length".
    pub reason: &'static str,
    /// Frames in order of arrival.
    pub frames: Vec<TokenFrame>,
}

/// A greedy request for `max_tokens` tokens after `prompt`.
#[must_use]
pub fn greedy(prompt: &[u32], max_tokens: u32) -> GenerateRequest {
    GenerateRequest {
        prompt: Some(Prompt::Tokens(TokenIds { ids: prompt.to_vec() })),
        max_tokens: Some(max_tokens),
        stop: Some(Stop { ignore_eos: true, ..Stop::default() }),
        ..GenerateRequest::default()
    }
}

/// A sampled request for `max_tokens` tokens after `prompt`.
#[must_use]
pub fn sampled(prompt: &[u32], max_tokens: u32, seed: u64) -> GenerateRequest {
    let sampling = Sampling {
        temperature: Some(0.9),
        top_k: Some(40),
        top_p: Some(0.95),
        seed: Some(seed),
        ..Sampling::default()
    };
    GenerateRequest { sampling: Some(sampling), ..greedy(prompt, max_tokens) }
}

/// Runs a request to its end.
///
/// # Errors
/// The status of the refusal or of the stream's end.
pub async fn generate(
    client: &InferenceClient<Channel>,
    request: GenerateRequest,
) -> Result<Vec<Output>, Status> {
    let choices = request.choices.unwrap_or(1) as usize;
    let stream = client.clone().generate(request).await?.into_inner();
    read(stream, choices).await
}

/// Reads a stream to its end and checks it: `started` first, indices without gaps, exactly one `finished` per choice,
/// nothing after.
///
/// # Errors
/// The status of the stream's end.
///
/// # Panics
/// When the stream breaks its contract.
pub async fn read(mut stream: Streaming<GenerateEvent>, choices: usize) -> Result<Vec<Output>, Status> {
    let mut outputs = vec![Output::default(); choices];
    let mut started = false;
    while let Some(event) = stream.message().await? {
        match event.event.expect("an event has a body") {
            Event::Started(_) => {
                assert!(!started, "started twice");
                started = true;
            }
            Event::Token(frame) => {
                assert!(started, "a token before started");
                let output = &mut outputs[frame.choice as usize];
                assert!(output.reason.is_empty(), "a token after finished");
                assert_eq!(frame.index as usize, output.ids.len(), "token indices have no gaps");
                output.ids.push(frame.token_id);
                output.text.push_str(&frame.text);
                output.frames.push(frame);
            }
            Event::Finished(end) => {
                let output = &mut outputs[end.choice as usize];
                assert!(output.reason.is_empty(), "finished twice");
                output.text.push_str(&end.text);
                output.reason = match end.reason() {
                    finished::Reason::Stop => "stop",
                    finished::Reason::Length => "length",
                    finished::Reason::Unspecified => panic!("finished without a reason"),
                };
            }
        }
    }
    assert!(outputs.iter().all(|output| !output.reason.is_empty()), "the stream ended without finished");
    Ok(outputs)
}
