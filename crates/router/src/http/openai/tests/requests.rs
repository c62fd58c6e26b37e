//! Requests read, table by table.

use muster_model::defaults::SamplingDefaults;
use muster_model::sampler::RawSampling;
use muster_text::{Chat, ChatMessage, Content, ToolCall};
use muster_types::Limits;

use super::super::common::{Asked, Mode, StreamUsage};
use super::super::json::Bounds;
use super::super::{ApiError, chat_request, completion_request};
use crate::fake;
use crate::request::{Eos, OverContext, Prompt};

pub(super) fn bounds() -> Bounds {
    Bounds { limits: Limits::default(), context: fake::CONTEXT, defaults: SamplingDefaults::default() }
}

pub(super) fn completion(body: &str) -> Result<Asked, ApiError> {
    completion_request::parse(body.as_bytes(), &bounds())
}

pub(super) fn chat_with(fields: &str) -> Result<Asked, ApiError> {
    let body = format!(r#"{{"messages": [{{"role": "user", "content": "hi"}}]{fields}}}"#);
    chat_request::parse(body.as_bytes(), &bounds())
}

pub(super) fn one_message(message: &str) -> Result<Asked, ApiError> {
    chat_request::parse(format!(r#"{{"messages": [{message}]}}"#).as_bytes(), &bounds())
}

pub(super) fn with(fields: &str) -> Result<Asked, ApiError> {
    completion(&format!(r#"{{"prompt": [1]{fields}}}"#))
}

pub(super) fn refused(result: Result<Asked, ApiError>, param: Option<&str>, input: &str) {
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
    let many = format!("[{}\"a\"]", "\"a\",".repeat(256));
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
    // The service decides whether an empty prompt is allowed.
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
        ("max_tokens", "0"),
        ("max_completion_tokens", "-1"),
        ("max_tokens", "4294967296"),
        ("max_tokens", "1.5"),
        ("max_tokens", "\"5\""),
        ("n", "-1"),
        ("n", "1000000000"),
        ("n", "257"),
        ("n", "0"),
        ("n", "\"1\""),
        ("n", "null, \"n\": 1"),
        ("temperature", "\"hot\""),
        ("temperature", "NaN"),
        ("temperature", "1e999"),
        ("temperature", "[1]"),
        ("temperature", "Infinity"),
        ("top_p", "true"),
        ("top_k", "-2"),
        ("top_k", "4294967296"),
        ("top_k", "1.5"),
        ("min_p", "{}"),
        ("seed", "9223372036854775808"),
        ("seed", "-9223372036854775809"),
        ("seed", "18446744073709551616"),
        ("seed", "\"1\""),
        ("seed", "1.5"),
        ("presence_penalty", "\"\""),
        ("stop", "1"),
        ("stop", "[1]"),
        ("stop", &stops),
        ("stop", "{}"),
        ("stop_token_ids", "[-1]"),
        ("stop_token_ids", "[null]"),
        ("stop_token_ids", "5"),
        ("stop_token_ids", &ids),
        ("ignore_eos", "1"),
        ("stream", "\"yes\""),
        ("logit_bias", "[1]"),
        ("logit_bias", "{\"a\": 1}"),
        ("logit_bias", "{\"-1\": 1}"),
        ("logit_bias", "{\"+1\": 1}"),
        ("logit_bias", "{\"01\": 1}"),
        ("logit_bias", "{\"1\": 100, \"1\": -100}"),
        ("logit_bias", "{\"1\": \"x\"}"),
        ("logit_bias", "{\"1\": NaN}"),
        ("logit_bias", "{\"1\": null}"),
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
        for result in [with(&field), chat_with(&field)] {
            let message = result.unwrap_err().body.message;
            for word in ["u32", "u64", "i64", "f32", "map", "sequence", "struct"] {
                assert!(!message.contains(word), "{field}: {message}");
            }
        }
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
        ("guided_regex", "\"(a+)+\""),
        ("pattern", "\"a\""),
        ("", "1"),
        ("Prompt", "\"a\""),
        ("../..", "1"),
        ("prompt_logprobs", "1"),
        ("prompt_logprobs", "0"),
        ("min_tokens", "1"),
        ("length_penalty", "1.5"),
        ("use_beam_search", "true"),
        ("skip_special_tokens", "false"),
        ("include_stop_str_in_output", "true"),
        ("allowed_token_ids", "[1]"),
        ("bad_words", "[\"x\"]"),
        ("guided_json", "{\"type\": \"object\"}"),
        ("structured_outputs", "{\"regex\": \"a\"}"),
        ("cache_salt", "\"s\""),
        ("web_search_options", "{}"),
        ("response_format", "{\"type\": \"json_object\"}"),
        ("temprature", "0.5"),
        ("max_new_tokens", "5"),
    ];
    for (name, value) in both {
        let field = format!(r#", "{name}": {value}"#);
        refused(with(&field), Some(name), &field);
        refused(chat_with(&field), Some(name), &field);
    }
    refused(with(r#", "chat_template_kwargs": {}"#), Some("chat_template_kwargs"), "for completions");
    refused(with(r#", "best_of": 2"#), Some("best_of"), "best_of");
    refused(with(r#", "n": 2, "best_of": 1"#), Some("best_of"), "best_of");
    refused(chat_with(r#", "prompt": "x""#), Some("prompt"), "a prompt for chat");
    let schema = r#", "response_format": {"type": "json_schema", "json_schema": {"a": [1]}}"#;
    refused(chat_with(schema), Some("response_format"), schema);
    let message = |fields: &str| with(fields).unwrap_err().body.message;
    assert_eq!(message(r#", "frobnicate": 1"#), "Unrecognized request argument supplied: frobnicate");
    let typo = "Unrecognized request argument supplied: temprature; did you mean temperature?";
    assert_eq!(message(r#", "temprature": 0.5"#), typo);
    assert!(message(r#", "messages": []"#).ends_with("it is a field of /v1/chat/completions"));
    let option = r#", "stream": true, "stream_options": {"include_useage": true}"#;
    assert_eq!(
        message(option),
        "stream_options: has no field \"include_useage\"; did you mean include_usage?"
    );
    refused(with(option), Some("stream_options"), option);
    for part in ["prefix", "partial", "images", "audio", "refusal"] {
        let body = format!(r#"{{"role": "assistant", "content": "x", "{part}": true}}"#);
        refused(one_message(&body), Some("messages"), &body);
        let text = one_message(&body).unwrap_err().body.message;
        assert!(text.starts_with(&format!("messages[0].{part}: is not supported here")), "{text}");
    }
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
    assert_eq!(ask(85).unwrap().requests.len(), 3);
    refused(ask(86), Some("n"), "86 for each of 3 prompts");
    let error = ask(86).unwrap_err().body.message;
    assert!(error.contains("258 choices in all; 256 are allowed (the router's max_choices)"), "{error}");
    let few = Bounds { limits: Limits { choices: 2, ..Limits::default() }, ..bounds() };
    let body = br#"{"prompt": ["a", "b", "c"]}"#;
    refused(completion_request::parse(body, &few), Some("prompt"), "three prompts where two are allowed");
    refused(ask(u32::MAX), Some("n"), "u32::MAX for each of 3 prompts");
}

#[test]
fn messages_become_a_conversation() {
    let asked = chat_request::parse(
        br#"{"messages": [
            {"role": "developer", "content": "be brief", "name": "x"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"text": "b", "type": "text"}]},
            {"role": "assistant", "content": "c", "refusal": null, "tool_calls": [], "audio": null,
             "reasoning_content": "hm"}
        ]}"#,
        &bounds(),
    )
    .unwrap();
    let name = |text: &str| Some(text.to_owned());
    let expected = [
        ChatMessage { name: name("x"), ..ChatMessage::new("system", "be brief") },
        ChatMessage { content: Content::Parts(vec!["a".into(), "b".into()]), ..ChatMessage::new("user", "") },
        ChatMessage { reasoning: name("hm"), ..ChatMessage::new("assistant", "c") },
    ];
    assert_eq!(chat_of(&asked).messages, expected);
}

pub(super) fn chat_of(asked: &Asked) -> &Chat {
    match &asked.requests[0].prompt {
        Prompt::Chat(chat) => chat,
        other => panic!("{other:?}"),
    }
}

#[test]
fn calls_and_their_answers_become_messages() {
    let asked = chat_request::parse(
        br#"{"messages": [
            {"role": "user", "content": "weather?"},
            {"role": "assistant", "content": null, "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{\"a\": [1, 2.0]}"}},
                {"index": 1, "id": "c2", "function": {"name": "g", "arguments": ""}}]},
            {"role": "tool", "tool_call_id": "c1", "name": "f", "content": "sun"},
            {"role": "tool", "tool_call_id": "c2", "content": [{"type": "text", "text": "rain"}]}
        ]}"#,
        &bounds(),
    )
    .unwrap();
    let [_, calls, first, second] = &chat_of(&asked).messages[..] else { panic!("{asked:?}") };
    let call = |id: &str, name: &str, arguments: &str| {
        ToolCall::new(Some(id.into()), name.into(), arguments.into()).unwrap()
    };
    assert_eq!(calls.content, Content::Absent);
    assert_eq!(calls.tool_calls, [call("c1", "f", r#"{"a": [1, 2.0]}"#), call("c2", "g", "")]);
    assert_eq!((first.role.as_str(), first.tool_call_id.as_deref()), ("tool", Some("c1")));
    assert_eq!((first.name.as_deref(), second.tool_call_id.as_deref()), (Some("f"), Some("c2")));
}

const TOOL: &str = r#"{"type": "function", "function": {"name": "f", "description": "does", "strict": true,
    "parameters": {"type": "object", "properties": {"b": {}, "a": {}}}}}"#;

#[test]
fn tools_and_variables_reach_the_template_as_they_are() {
    let fields = format!(
        r#", "tools": [{TOOL}], "tool_choice": "auto", "parallel_tool_calls": true,
        "chat_template_kwargs": {{"enable_thinking": false, "documents": [{{"text": "x"}}]}}"#
    );
    let asked = chat_with(&fields).unwrap();
    let expected: serde_json::Value = serde_json::from_str(TOOL).unwrap();
    assert_eq!(chat_of(&asked).tools, std::slice::from_ref(&expected));
    assert_eq!(chat_of(&asked).tools[0].to_string(), expected.to_string());
    let variables = serde_json::json!({"enable_thinking": false, "documents": [{"text": "x"}]});
    assert_eq!(serde_json::Value::Object(chat_of(&asked).variables.clone()), variables);
    // With `tool_choice` "none" the template gets no tools.
    let none = chat_with(&format!(r#", "tools": [{TOOL}], "tool_choice": "none""#)).unwrap();
    assert!(chat_of(&none).tools.is_empty());
    let nothing = chat_with(r#", "tools": null, "tool_choice": null, "chat_template_kwargs": null"#).unwrap();
    assert_eq!(chat_of(&nothing).tools.len() + chat_of(&nothing).variables.len(), 0);
}

#[test]
fn tools_that_are_refused() {
    let many = vec![TOOL; 129].join(",");
    let deep = format!(r#"{{"a": {}1{}}}"#, "[".repeat(60), "]".repeat(60));
    let cases = [
        "{}",
        "1",
        "[1]",
        "[{}]",
        r#"[{"type": "function"}]"#,
        r#"[{"type": "function", "function": {}}]"#,
        r#"[{"type": "function", "function": {"name": ""}}]"#,
        r#"[{"type": "function", "function": {"name": 1}}]"#,
        r#"[{"type": "function", "function": {"name": "f", "description": 1}}]"#,
        r#"[{"type": "function", "function": {"name": "f", "parameters": []}}]"#,
        r#"[{"type": "function", "function": {"name": "f", "name": "g"}}]"#,
        r#"[{"type": "web_search", "function": {"name": "f"}}]"#,
        &format!("[{many}]"),
        &format!(r#"[{{"type": "function", "function": {{"name": "f", "parameters": {deep}}}}}]"#),
        &format!(
            r#"[{{"type": "function", "function": {{"name": "f", "parameters": {{"a": [{}1]}}}}}}]"#,
            "1,".repeat(1 << 16)
        ),
    ];
    for case in cases {
        refused(chat_with(&format!(r#", "tools": {case}"#)), Some("tools"), case);
    }
    let error = chat_with(r#", "tools": [{"type": "web_search"}]"#).unwrap_err();
    assert!(error.body.message.contains("web_search"), "{}", error.body.message);
    for case in [r#""required""#, r#"{"type": "function", "function": {"name": "f"}}"#, "1", "[]"] {
        let fields = format!(r#", "tools": [{TOOL}], "tool_choice": {case}"#);
        refused(chat_with(&fields), Some("tool_choice"), case);
    }
    let variables: Vec<String> = (0..33).map(|n| format!("\"v{n}\": 1")).collect();
    for case in ["[]", "1", "\"x\"", &deep, &format!("{{{}}}", variables.join(","))] {
        refused(
            chat_with(&format!(r#", "chat_template_kwargs": {case}"#)),
            Some("chat_template_kwargs"),
            case,
        );
    }
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
        r#"{"role": "user", "content": "x", "content": "y"}"#,
        r#"{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}"#,
        r#"{"role": "assistant", "content": null}"#,
        r#"{"role": "assistant", "content": null, "tool_calls": []}"#,
        r#"{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}"#,
        r#"{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}"#,
        r#"{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}"#,
        r#"{"role": "assistant", "tool_calls": [{"type": "custom", "function": {"name": "f", "arguments": ""}}]}"#,
        r#"{"role": "user", "content": "x", "tool_calls": [{"function": {"name": "f", "arguments": ""}}]}"#,
        r#"{"role": "user", "content": "x", "tool_call_id": "1"}"#,
        r#"{"role": "user", "content": "x", "reasoning_content": "y"}"#,
        r#"{"role": "assistant", "content": "x", "reasoning_content": "y", "reasoning": "z"}"#,
        r#"{"role": "tool", "tool_call_id": "1"}"#,
        r#"{"role": "function", "name": "f", "content": "x"}"#,
    ];
    for case in cases {
        refused(one_message(case), Some("messages"), case);
    }
    let many = vec![r#"{"role": "user", "content": "x"}"#; 1025].join(",");
    refused(one_message(&many), Some("messages"), "1025 messages");
    let error = one_message(r#"{"role": "user", "content": [{"type": "image_url"}]}"#).unwrap_err();
    assert!(error.body.message.contains("image_url"), "{}", error.body.message);
}

#[test]
fn chat_settings_that_contradict_each_other() {
    refused(chat_with(r#", "top_logprobs": 2"#), Some("top_logprobs"), "top_logprobs alone");
    let asked = chat_with(r#", "logprobs": true, "top_logprobs": 2, "max_completion_tokens": 3"#).unwrap();
    assert_eq!((asked.requests[0].top_logprobs, asked.requests[0].max_tokens), (Some(2), Some(3)));
    assert_eq!(chat_with(r#", "logprobs": true"#).unwrap().requests[0].top_logprobs, Some(0));
}

/// The request of a chat body with `fields`, under the model's `defaults`.
fn beside(defaults: SamplingDefaults, fields: &str) -> crate::request::GenerateRequest {
    let bounds = Bounds { defaults, ..bounds() };
    let body = format!(r#"{{"messages": [{{"role": "user", "content": "hi"}}]{fields}}}"#);
    chat_request::parse(body.as_bytes(), &bounds).unwrap().requests.remove(0)
}

#[test]
fn the_models_own_settings_are_the_defaults_field_by_field() {
    let none = SamplingDefaults::default();
    let plain = RawSampling { temperature: 1.0, ..RawSampling::default() };
    assert_eq!(beside(none, "").sampling, plain);
    type Field = (&'static str, SamplingDefaults, RawSampling);
    let fields: [Field; 5] = [
        (
            "temperature",
            SamplingDefaults { temperature: Some(0.5), ..none },
            RawSampling { temperature: 0.5, ..plain.clone() },
        ),
        ("top_k", SamplingDefaults { top_k: Some(20), ..none }, RawSampling { top_k: 20, ..plain.clone() }),
        ("top_p", SamplingDefaults { top_p: Some(0.5), ..none }, RawSampling { top_p: 0.5, ..plain.clone() }),
        ("min_p", SamplingDefaults { min_p: Some(0.5), ..none }, RawSampling { min_p: 0.5, ..plain.clone() }),
        (
            "repetition_penalty",
            SamplingDefaults { repetition_penalty: Some(1.5), ..none },
            RawSampling { repetition_penalty: 1.5, ..plain.clone() },
        ),
    ];
    for (field, defaults, expected) in fields {
        assert_eq!(beside(defaults, "").sampling, expected, "{field}");
        // What a request gives wins, and so does what changes nothing.
        let given = beside(defaults, &format!(r#", "{field}": 1"#)).sampling;
        let without = beside(none, &format!(r#", "{field}": 1"#)).sampling;
        assert_eq!(given, without, "{field}");
    }
}

#[test]
fn the_models_own_length_is_what_the_context_leaves_of_it() {
    let defaults = SamplingDefaults { max_tokens: Some(200), ..SamplingDefaults::default() };
    let asked = beside(defaults, "");
    assert_eq!((asked.max_tokens, asked.over_context), (Some(200), OverContext::Cut));
    let asked = beside(defaults, r#", "max_tokens": 300"#);
    assert_eq!((asked.max_tokens, asked.over_context), (Some(300), OverContext::Refused));
    // Completions have a default of their own.
    let bounds = Bounds { defaults, ..bounds() };
    let asked = completion_request::parse(br#"{"prompt": [1]}"#, &bounds).unwrap().requests.remove(0);
    assert_eq!(asked.max_tokens, Some(16));
}
