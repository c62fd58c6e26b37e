//! Requests read, table by table.

use muster_types::Limits;

use super::super::common::{Asked, Mode, StreamUsage};
use super::super::json::Bounds;
use super::super::{ApiError, chat_request, completion_request};
use crate::fake;
use crate::request::{Eos, Prompt};

fn bounds() -> Bounds {
    Bounds { limits: Limits::default(), context: fake::CONTEXT }
}

fn completion(body: &str) -> Result<Asked, ApiError> {
    completion_request::parse(body.as_bytes(), &bounds())
}

fn chat_with(fields: &str) -> Result<Asked, ApiError> {
    let body = format!(r#"{{"messages": [{{"role": "user", "content": "hi"}}]{fields}}}"#);
    chat_request::parse(body.as_bytes(), &bounds())
}

fn message(message: &str) -> Result<Asked, ApiError> {
    chat_request::parse(format!(r#"{{"messages": [{message}]}}"#).as_bytes(), &bounds())
}

fn with(fields: &str) -> Result<Asked, ApiError> {
    completion(&format!(r#"{{"prompt": [1]{fields}}}"#))
}

fn refused(result: Result<Asked, ApiError>, param: Option<&str>, input: &str) {
    let shown: String = input.chars().take(80).collect();
    let error = result.map(|asked| panic!("{shown} was taken as {asked:?}")).unwrap_err();
    assert_eq!(error.status.as_u16(), 400, "{shown}");
    assert_eq!(error.body.param.as_deref(), param, "{shown}: {}", error.body.message);
    assert_eq!(error.body.kind, "invalid_request_error", "{shown}");
    assert!(error.body.message.len() < 2048, "{shown}");
}

#[test]
fn bodies_that_are_not_requests() {
    let deep = format!("{}1{}", "[".repeat(10_000), "]".repeat(10_000));
    for body in ["", "{", "null", "[]", "3", "\"x\"", "not json", "\u{feff}{}", "{\"prompt", "{} {}", &deep] {
        refused(completion(body), None, body);
        refused(chat_request::parse(body.as_bytes(), &bounds()), None, body);
    }
    let bytes = b"{\"prompt\": \"\xff\"}";
    refused(completion_request::parse(bytes, &bounds()), None, "invalid UTF-8");
    let deep = format!(r#"{{"prompt": [1], "stop": {deep}}}"#);
    refused(completion(&deep), Some("stop"), "a deep field");
    refused(completion("{}"), Some("prompt"), "{}");
    refused(chat_request::parse(b"{}", &bounds()), Some("messages"), "{}");
}

#[test]
fn damage_is_refused_or_harmless() {
    let body = r#"{"prompt": [[1, 2], "é\n"], "n": 2, "temperature": 1e-1, "stop": ["a"], "logit_bias": {"1": -1},
        "stream": true, "stream_options": {"include_usage": true}, "tools": null, "user": {"a": [1, {}]}}"#;
    assert!(completion(body).is_ok());
    for end in 0..body.len() {
        let error = completion_request::parse(&body.as_bytes()[..end], &bounds()).unwrap_err();
        assert_eq!(error.status.as_u16(), 400, "{end} bytes");
    }
    for at in 0..body.len() {
        for byte in *b"\0\"\\{}[],:-0e \x80\xff" {
            let mut damaged = body.as_bytes().to_vec();
            damaged[at] = byte;
            if let Err(error) = completion_request::parse(&damaged, &bounds()) {
                assert_eq!(error.status.as_u16(), 400, "byte {at} as {byte}");
            }
        }
    }
}

#[test]
fn prompts_that_are_refused() {
    let long = format!("[{}1]", "1,".repeat(fake::CONTEXT as usize));
    let many = format!("[{}\"a\"]", "\"a\",".repeat(8));
    let cases = [
        "null",
        "[]",
        "[[]",
        "{}",
        "true",
        "1",
        "[-1]",
        "[4294967296]",
        "[9223372036854775808]",
        "[1.5]",
        "[1, \"a\"]",
        "[\"a\", 1]",
        "[[1], 2]",
        "[[1, \"a\"]]",
        "[null]",
        "[{}]",
        "\"\\ud800\"",
        "\"\u{0}\"",
        "[[[1]]]",
        &long,
        &many,
    ];
    for prompt in cases {
        refused(completion(&format!(r#"{{"prompt": {prompt}}}"#)), Some("prompt"), prompt);
    }
    refused(completion(&format!(r#"{{"prompt": [{long}]}}"#)), Some("prompt"), "a long prompt of several");
}

#[test]
fn prompts_that_are_taken() {
    let prompts = |prompt: &str| -> Vec<Prompt> {
        let asked = completion(&format!(r#"{{"prompt": {prompt}}}"#)).unwrap();
        asked.requests.into_iter().map(|request| request.prompt).collect()
    };
    assert!(matches!(&prompts(r#""a\nb""#)[..], [Prompt::Text(text)] if text == "a\nb"));
    assert!(matches!(&prompts("[1, 2, 4294967295]")[..], [Prompt::Tokens(ids)] if *ids == [1, 2, u32::MAX]));
    assert!(
        matches!(&prompts(r#"["a", "b"]"#)[..], [Prompt::Text(a), Prompt::Text(b)] if a == "a" && b == "b")
    );
    assert!(matches!(&prompts(r#"["a", [3]]"#)[..], [Prompt::Text(_), Prompt::Tokens(ids)] if *ids == [3]));
    // Whether an empty prompt can be served is the service's to say.
    assert!(matches!(&prompts("[[1], []]")[..], [_, Prompt::Tokens(ids)] if ids.is_empty()));
}

#[test]
fn fields_of_the_wrong_type_or_size() {
    let stops = format!("[{}\"a\"]", "\"a\",".repeat(16));
    let ids = format!("[{}1]", "1,".repeat(16));
    let biases: Vec<String> = (0..1025).map(|id| format!("\"{id}\": 1")).collect();
    let biases = format!("{{{}}}", biases.join(","));
    let cases = [
        ("max_tokens", "-1"),
        ("max_tokens", "4294967296"),
        ("max_tokens", "1.5"),
        ("max_tokens", "\"5\""),
        ("n", "-1"),
        ("n", "1000000000"),
        ("n", "9"),
        ("n", "\"1\""),
        ("n", "null, \"n\": 1"),
        ("temperature", "\"hot\""),
        ("temperature", "NaN"),
        ("temperature", "1e999"),
        ("temperature", "[1]"),
        ("temperature", "Infinity"),
        ("top_p", "true"),
        ("top_k", "-1"),
        ("top_k", "1.5"),
        ("min_p", "{}"),
        ("seed", "-1"),
        ("seed", "18446744073709551616"),
        ("seed", "1.5"),
        ("presence_penalty", "\"\""),
        ("stop", "1"),
        ("stop", "[1]"),
        ("stop", &stops),
        ("stop", "{}"),
        ("stop_token_ids", "[-1]"),
        ("stop_token_ids", "5"),
        ("stop_token_ids", &ids),
        ("ignore_eos", "1"),
        ("stream", "\"yes\""),
        ("logit_bias", "[1]"),
        ("logit_bias", "{\"a\": 1}"),
        ("logit_bias", "{\"-1\": 1}"),
        ("logit_bias", "{\"1\": \"x\"}"),
        ("logit_bias", "{\"1\": NaN}"),
        ("logit_bias", &biases),
        ("logit_bias", "{\"4294967296\": 1}"),
        ("model", "1"),
        ("model", "[]"),
        ("stream_options", "1"),
        ("stream_options", "{\"include_usage\": true}"),
        ("stream_options", "{\"more\": 1}"),
    ];
    for (name, value) in cases {
        let field = format!(r#", "{name}": {value}"#);
        refused(with(&field), Some(name), &field);
        refused(chat_with(&field), Some(name), &field);
    }
    for (name, value) in
        [("logprobs", "21"), ("logprobs", "1000000000"), ("logprobs", "-1"), ("logprobs", "true")]
    {
        refused(with(&format!(r#", "{name}": {value}"#)), Some(name), value);
    }
}

#[test]
fn what_is_not_supported_is_refused_by_name() {
    let both = [
        ("tools", "[{\"type\": \"function\"}]"),
        ("functions", "[{}]"),
        ("tool_choice", "\"required\""),
        ("tool_choice", "{\"type\": \"function\"}"),
        ("echo", "true"),
        ("suffix", "\"x\""),
        ("reasoning_effort", "\"high\""),
        ("modalities", "[\"audio\"]"),
        ("audio", "{\"voice\": \"x\"}"),
        ("chat_template_kwargs", "{}"),
        ("guided_regex", "\"(a+)+\""),
        ("pattern", "\"a\""),
        ("", "1"),
        ("Prompt", "\"a\""),
        ("../..", "1"),
        ("prompt_logprobs", "1"),
    ];
    for (name, value) in both {
        let field = format!(r#", "{name}": {value}"#);
        refused(with(&field), Some(name), &field);
        refused(chat_with(&field), Some(name), &field);
    }
    refused(with(r#", "best_of": 2"#), Some("best_of"), "best_of");
    refused(with(r#", "n": 2, "best_of": 1"#), Some("best_of"), "best_of");
    refused(chat_with(r#", "prompt": "x""#), Some("prompt"), "a prompt for chat");
    let schema = r#", "response_format": {"type": "json_schema", "json_schema": {"a": [1]}}"#;
    refused(chat_with(schema), Some("response_format"), schema);
    let error = with(r#", "frobnicate": 1"#).unwrap_err();
    assert_eq!(error.body.message, "Unrecognized request argument supplied: frobnicate");
}

#[test]
fn what_asks_for_nothing_is_taken() {
    let fields = r#", "tools": [], "tool_choice": "none", "functions": null, "echo": false, "suffix": "",
        "user": "x", "metadata": {"a": ["b"]}, "store": true, "service_tier": "auto", "logit_bias": null,
        "parallel_tool_calls": false, "prompt_cache_key": "k", "safety_identifier": "s", "stop": null,
        "stream_options": null, "temperature": null, "max_tokens": null, "stop_token_ids": null"#;
    assert_eq!(with(fields).unwrap().requests.len(), 1);
    assert_eq!(chat_with(fields).unwrap().requests.len(), 1);
    assert!(chat_with(r#", "response_format": {"type": "text"}"#).is_ok());
    assert!(with(r#", "n": 2, "best_of": 2"#).is_ok());
}

#[test]
fn a_field_given_twice_is_refused() {
    for (name, value) in [("temperature", "0"), ("user", "1"), ("tools", "[]")] {
        let field = format!(r#", "{name}": {value}, "{name}": {value}"#);
        refused(with(&field), Some(name), &field);
    }
}

#[test]
fn defaults_are_openais() {
    for (asked, max_tokens) in [(with("").unwrap(), Some(16)), (chat_with("").unwrap(), None)] {
        let [request] = &asked.requests[..] else { panic!("{asked:?}") };
        assert_eq!(asked.mode, Mode::Whole);
        assert_eq!((request.sampling.temperature, request.sampling.top_p), (1.0, 1.0));
        assert_eq!((request.sampling.top_k, request.sampling.repetition_penalty), (0, 1.0));
        assert_eq!((request.choices, request.seed, request.top_logprobs), (1, None, None));
        assert_eq!((request.max_tokens, request.model.as_deref()), (max_tokens, None));
        assert_eq!(request.stop.eos, Eos::Stops);
    }
}

#[test]
fn every_field_arrives() {
    let asked = with(
        r#", "model": "m", "n": 2, "temperature": 0.5, "top_p": 0.25, "top_k": 3, "min_p": 0.125, "seed": 7,
        "repetition_penalty": 1.5, "presence_penalty": -1, "frequency_penalty": 2, "logprobs": 4,
        "logit_bias": {"5": -100, "6": 1.5}, "stop": ["x", "y"], "stop_token_ids": [8], "ignore_eos": true,
        "stream": true, "stream_options": {"include_usage": true, "include_obfuscation": false},
        "max_tokens": 9"#,
    )
    .unwrap();
    let [request] = &asked.requests[..] else { panic!("{asked:?}") };
    assert_eq!(asked.mode, Mode::Stream(StreamUsage::Included));
    let sampling = &request.sampling;
    assert_eq!((sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p), (0.5, 0.25, 3, 0.125));
    assert_eq!((sampling.presence_penalty, sampling.frequency_penalty), (-1.0, 2.0));
    assert_eq!((sampling.repetition_penalty, &sampling.bias[..]), (1.5, &[(5, -100.0), (6, 1.5)][..]));
    assert_eq!((request.model.as_deref(), request.choices, request.seed), (Some("m"), 2, Some(7)));
    assert_eq!((request.max_tokens, request.top_logprobs), (Some(9), Some(4)));
    assert_eq!(
        (&request.stop.strings[..], &request.stop.token_ids[..]),
        (&["x".into(), "y".into()][..], &[8][..])
    );
    assert_eq!(request.stop.eos, Eos::Ignored);
    assert_eq!(with(r#", "stop": "x""#).unwrap().requests[0].stop.strings, ["x"]);
}

#[test]
fn choices_are_capped_over_all_prompts() {
    let ask = |n: u32| completion(&format!(r#"{{"prompt": ["a", "b", "c"], "n": {n}}}"#));
    assert_eq!(ask(2).unwrap().requests.len(), 3);
    refused(ask(3), Some("n"), "3 for each of 3 prompts");
    refused(ask(u32::MAX), Some("n"), "u32::MAX for each of 3 prompts");
}

#[test]
fn messages_become_a_conversation() {
    let asked = chat_request::parse(
        br#"{"messages": [
            {"role": "developer", "content": "be brief", "name": "x"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"text": "b", "type": "text"}]},
            {"role": "assistant", "content": "c", "refusal": null, "tool_calls": [], "audio": null}
        ]}"#,
        &bounds(),
    )
    .unwrap();
    let Prompt::Chat(messages) = &asked.requests[0].prompt else { panic!("{asked:?}") };
    let read: Vec<_> = messages.iter().map(|m| (m.role.as_str(), m.content.as_str())).collect();
    assert_eq!(read, [("system", "be brief"), ("user", "a\nb"), ("assistant", "c")]);
}

#[test]
fn messages_that_are_refused() {
    let cases = [
        "",
        "null",
        "1",
        "[]",
        "{}",
        r#"{"role": "user"}"#,
        r#"{"content": "x"}"#,
        r#"{"role": "tool", "content": "x"}"#,
        r#"{"role": "", "content": "x"}"#,
        r#"{"role": "user", "content": null}"#,
        r#"{"role": "user", "content": 1}"#,
        r#"{"role": "user", "content": []}"#,
        r#"{"role": "user", "content": ["x"]}"#,
        r#"{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///x"}}]}"#,
        r#"{"role": "user", "content": [{"type": "text"}]}"#,
        r#"{"role": "user", "content": "x", "more": 1}"#,
        r#"{"role": "user", "content": "x", "content": "y"}"#,
        r#"{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}"#,
    ];
    for case in cases {
        refused(message(case), Some("messages"), case);
    }
    let many = vec![r#"{"role": "user", "content": "x"}"#; 1025].join(",");
    refused(message(&many), Some("messages"), "1025 messages");
    let error = message(r#"{"role": "user", "content": [{"type": "image_url"}]}"#).unwrap_err();
    assert!(error.body.message.contains("image_url"), "{}", error.body.message);
}

#[test]
fn chat_settings_that_contradict_each_other() {
    refused(chat_with(r#", "top_logprobs": 2"#), Some("top_logprobs"), "top_logprobs alone");
    let both = r#", "max_tokens": 1, "max_completion_tokens": 1"#;
    refused(chat_with(both), Some("max_completion_tokens"), both);
    let asked = chat_with(r#", "logprobs": true, "top_logprobs": 2, "max_completion_tokens": 3"#).unwrap();
    assert_eq!((asked.requests[0].top_logprobs, asked.requests[0].max_tokens), (Some(2), Some(3)));
    assert_eq!(chat_with(r#", "logprobs": true"#).unwrap().requests[0].top_logprobs, Some(0));
}
