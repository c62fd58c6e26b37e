//! Answers written, against what OpenAI's look like.

use serde_json::{Value, json};

use super::super::chat_reply::Chat;
use super::super::common::StreamUsage;
use super::super::completion_reply::Completion;
use super::super::reply::{Dialect, Head, finite};
use super::super::stream::Chunks;
use super::super::whole::Whole;
use crate::fake;
use crate::request::{Event, FinishReason, Finished, TokenLogprob, TokenLogprobs};

fn head(choices: u32) -> Head {
    Head {
        id: "x-1".into(),
        created: 5,
        model: "m".into(),
        system_fingerprint: "fp_0".into(),
        prompt_tokens: 3,
        choices,
    }
}

fn finished(choice: u32, reason: FinishReason, text: &str) -> Event {
    let classes = muster_types::ClassSet::EMPTY;
    let text = text.into();
    Event::Finished(Finished { choice, reason, output_tokens: 2, cached_prompt_tokens: 1, classes, text })
}

fn whole<D: Dialect>(choices: u32, events: Vec<Event>) -> Value {
    let mut whole = Whole::<D>::new(head(choices));
    events.into_iter().for_each(|event| whole.event(event));
    serde_json::from_str(&whole.into_json()).unwrap()
}

fn streamed<D: Dialect>(choices: u32, usage: StreamUsage, events: Vec<Event>) -> Vec<Value> {
    let mut chunks = Chunks::<D>::new(head(choices), usage);
    let mut said = chunks.open();
    for event in events {
        said.extend(chunks.event(event));
    }
    said.extend(chunks.close());
    assert_eq!(said.pop().as_deref(), Some("[DONE]"));
    said.iter().map(|chunk| serde_json::from_str(chunk).unwrap()).collect()
}

#[test]
fn a_whole_chat_answer() {
    let events = vec![
        fake::token(1, 0, 9, None),
        fake::token(0, 0, 7, None),
        finished(0, FinishReason::Stop, "!"),
        fake::token(1, 1, 8, None),
        finished(1, FinishReason::Length, ""),
    ];
    let message = |content| json!({"role": "assistant", "content": content, "refusal": null});
    assert_eq!(
        whole::<Chat>(2, events),
        json!({
            "id": "x-1", "object": "chat.completion", "created": 5, "model": "m", "system_fingerprint": "fp_0",
            "choices": [
                {"index": 0, "message": message("<7>!"), "logprobs": null, "finish_reason": "stop"},
                {"index": 1, "message": message("<9><8>"), "logprobs": null, "finish_reason": "length"},
            ],
            "usage": {
                "prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7,
                "prompt_tokens_details": {"cached_tokens": 2},
            },
        })
    );
}

#[test]
fn a_whole_completion_with_logprobs() {
    let events = vec![
        fake::token(0, 0, 7, Some(2)),
        fake::token(0, 1, 21, Some(0)),
        finished(0, FinishReason::Stop, ""),
    ];
    let answer = whole::<Completion>(1, events);
    assert_eq!(answer["object"], "text_completion");
    assert_eq!(
        answer["choices"],
        json!([{
            "index": 0, "text": "<7><21>", "finish_reason": "stop",
            "logprobs": {
                "tokens": ["<7>", "<21>"], "token_logprobs": [-0.5, -0.5],
                "top_logprobs": [{"<7>": -0.5, "<8>": -1.5}, {"<21>": -0.5}], "text_offset": [0, 3],
            },
        }])
    );
}

#[test]
fn tokens_that_are_written_alike_keep_their_entries() {
    let entry =
        |token_id, logprob| TokenLogprob { token_id, text: "\u{fffd}".into(), bytes: vec![0x80], logprob };
    let answer = |chosen, top| {
        let mut event = fake::token(0, 0, 7, None);
        if let Event::Token(frame) = &mut event {
            frame.logprobs = Some(TokenLogprobs { chosen, top });
        }
        whole::<Completion>(1, vec![event, finished(0, FinishReason::Stop, "")])["choices"][0]["logprobs"]
            .clone()
    };
    let three = vec![entry(1, -1.0), entry(2, -2.0), entry(3, -3.0)];
    let expected = json!([{"\u{fffd}": -1.0, "token_id:2": -2.0, "token_id:3": -3.0}]);
    assert_eq!(
        answer(entry(2, -2.0), three.clone())["top_logprobs"],
        expected,
        "the chosen one is among them"
    );
    let expected = json!([{"\u{fffd}": -1.0, "token_id:2": -2.0, "token_id:3": -3.0, "token_id:9": -5.0}]);
    assert_eq!(answer(entry(9, -5.0), three)["top_logprobs"], expected, "the chosen one is not");
}

#[test]
fn chat_logprobs() {
    let answer = whole::<Chat>(1, vec![fake::token(0, 0, 7, Some(1)), finished(0, FinishReason::Stop, "")]);
    let entry = json!({"token": "<7>", "logprob": -0.5, "bytes": [60, 55, 62]});
    let mut content = entry.clone();
    content["top_logprobs"] = json!([entry]);
    assert_eq!(answer["choices"][0]["logprobs"], json!({"content": [content], "refusal": null}));
}

#[test]
fn logprobs_are_always_numbers() {
    assert_eq!(finite(f32::NEG_INFINITY), -9999.0);
    assert_eq!(finite(f32::NAN), -9999.0);
    assert_eq!(finite(-1.5), -1.5);
}

#[test]
fn a_streamed_chat() {
    let events = vec![
        fake::token(0, 0, 7, None),
        fake::token(1, 0, 8, None),
        finished(1, FinishReason::Length, ""),
        finished(0, FinishReason::Stop, "!"),
    ];
    let chunks = streamed::<Chat>(2, StreamUsage::Left, events);
    let choice = |index, delta: Value, reason: Value| json!([{"index": index, "delta": delta, "logprobs": null, "finish_reason": reason}]);
    let expected = [
        choice(0, json!({"role": "assistant", "content": ""}), Value::Null),
        choice(1, json!({"role": "assistant", "content": ""}), Value::Null),
        choice(0, json!({"content": "<7>"}), Value::Null),
        choice(1, json!({"content": "<8>"}), Value::Null),
        choice(1, json!({}), json!("length")),
        choice(0, json!({"content": "!"}), Value::Null),
        choice(0, json!({}), json!("stop")),
    ];
    assert_eq!(chunks.iter().map(|chunk| chunk["choices"].clone()).collect::<Vec<_>>(), expected);
    for chunk in &chunks {
        assert_eq!((&chunk["id"], &chunk["object"]), (&json!("x-1"), &json!("chat.completion.chunk")));
        assert!(chunk.get("usage").is_none());
    }
}

#[test]
fn a_streamed_completion_with_usage() {
    let mut silent = fake::token(0, 1, 7, None);
    if let Event::Token(frame) = &mut silent {
        frame.text.clear();
    }
    let events = vec![
        fake::token(0, 0, 7, Some(0)),
        silent,
        fake::token(0, 2, 8, Some(0)),
        finished(0, FinishReason::Stop, ""),
    ];
    let chunks = streamed::<Completion>(1, StreamUsage::Included, events);
    assert_eq!(chunks.len(), 4, "two with text, one that ends, one that counts");
    assert_eq!(chunks[0]["choices"][0]["text"], "<7>");
    assert_eq!(chunks[1]["choices"][0]["logprobs"]["text_offset"], json!([3]));
    assert_eq!(chunks[2]["choices"][0]["finish_reason"], "stop");
    assert!(chunks[..3].iter().all(|chunk| chunk.get("usage") == Some(&Value::Null)));
    assert_eq!(chunks[3]["choices"], json!([]));
    assert_eq!(
        chunks[3]["usage"],
        json!({
            "prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5, "prompt_tokens_details": {"cached_tokens": 1},
        })
    );
}
