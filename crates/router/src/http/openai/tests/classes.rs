//! What is honoured, refused and told, and in which words.

use super::super::ApiError;
use super::super::common::Asked;
use super::super::fields::{Class, Level};
use super::requests::{chat_of, chat_with, completion, one_message, refused, with};

/// Names in the ignored header of an accepted request.
fn ignored(asked: Result<Asked, ApiError>) -> String {
    let asked = asked.unwrap_or_else(|error| panic!("{}", error.body.message));
    asked.ignored.header().map(|value| value.to_str().unwrap().to_owned()).unwrap_or_default()
}

#[test]
fn what_has_no_effect_is_told() {
    let both = [
        ("\"verbosity\": \"medium\"", "verbosity"),
        ("\"modalities\": [\"text\"]", "modalities"),
        ("\"min_tokens\": 0", "min_tokens"),
        ("\"min_tokens\": 0.0", "min_tokens"),
        ("\"top_k\": -1", "top_k"),
        ("\"top_k\": 0", ""),
        ("\"best_of\": 1", "best_of"),
        ("\"n\": 2, \"best_of\": 2", "best_of"),
        ("\"parallel_tool_calls\": false", "parallel_tool_calls"),
        ("\"user\": \"x\", \"store\": true", "user, store"),
        ("\"user\": null, \"echo\": null, \"best_of\": null", ""),
        ("\"echo\": false", "echo"),
        ("\"skip_special_tokens\": true", "skip_special_tokens"),
        ("\"length_penalty\": 1.0", "length_penalty"),
        ("\"response_format\": {\"type\": \"text\"}", "response_format"),
        (
            "\"stream\": true, \"stream_options\": {\"include_usage\": true, \"continuous_usage_stats\": true}",
            "stream_options.continuous_usage_stats",
        ),
        ("\"temperature\": 0.5, \"seed\": 3", ""),
    ];
    for (fields, names) in both {
        assert_eq!(ignored(with(&format!(", {fields}"))), names, "{fields}");
        assert_eq!(ignored(chat_with(&format!(", {fields}"))), names, "{fields}");
    }
    assert_eq!(ignored(chat_with(r#", "top_logprobs": 0"#)), "top_logprobs");
    assert_eq!(ignored(chat_with(r#", "top_logprobs": 0, "logprobs": true"#)), "");
    let messages = [
        (r#"{"role": "user", "content": "x", "type": "text"}"#, "messages[].type"),
        (
            r#"{"role": "user", "content": "x", "opts": {"a": [1]}, "id": 1}"#,
            "messages[].opts, messages[].id",
        ),
        (r#"{"role": "user", "content": "x", "prefix": false, "more": null}"#, "messages[].prefix"),
        (
            r#"{"role": "user", "content": [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}]}"#,
            "messages[].content[].cache_control",
        ),
        (
            r#"{"role": "assistant", "tool_calls": [{"index": 0, "id": "1", "type": "function",
                "function": {"name": "f", "arguments": "{}", "parsed_arguments": {}}}]}"#,
            "messages[].tool_calls[].index, messages[].tool_calls[].function.parsed_arguments",
        ),
    ];
    for (body, names) in messages {
        assert_eq!(ignored(one_message(body)), names, "{body}");
    }
}

#[test]
fn a_field_and_its_alias_may_agree() {
    let reasoning = |one: &str, other: &str| {
        let body = format!(
            r#"{{"role": "assistant", "content": "x", "reasoning": {one}, "reasoning_content": {other}}}"#
        );
        one_message(&body).map(|asked| chat_of(&asked).messages[0].reasoning.clone())
    };
    let some = Some("y".to_owned());
    assert_eq!(reasoning("null", "null").unwrap(), None);
    assert_eq!(reasoning("\"y\"", "null").unwrap(), some);
    assert_eq!(reasoning("null", "\"y\"").unwrap(), some);
    assert_eq!(reasoning("\"y\"", "\"y\"").unwrap(), some);
    let error = reasoning("\"y\"", "\"z\"").unwrap_err().body.message;
    assert!(error.starts_with("messages[0]: reasoning and reasoning_content differ"), "{error}");
}

#[test]
fn of_two_token_limits_the_smaller_counts() {
    for (old, new, least, named) in [
        ("3", "5", 3, "max_tokens"),
        ("5", "3", 3, "max_completion_tokens"),
        ("null", "4", 4, "max_completion_tokens"),
    ] {
        let fields = format!(r#", "max_tokens": {old}, "max_completion_tokens": {new}"#);
        for asked in [with(&fields).unwrap(), chat_with(&fields).unwrap()] {
            assert_eq!((asked.requests[0].max_tokens, asked.token_limit), (Some(least), named), "{fields}");
        }
    }
}

#[test]
fn seeds_are_signed() {
    let seed = |seed: &str| with(&format!(r#", "seed": {seed}"#)).unwrap().requests[0].seed;
    assert_eq!(seed("null"), None);
    assert_eq!(seed("0"), Some(0));
    assert_eq!(seed("-1"), Some(u64::MAX));
    assert_eq!(seed("9223372036854775807"), Some(i64::MAX as u64));
    assert_eq!(seed("-9223372036854775808"), Some(1 << 63));
    // As some languages write whole numbers.
    assert_eq!(seed("5.0"), Some(5));
}

#[test]
fn errors_are_in_the_words_of_the_api() {
    let message = |fields: &str| with(fields).unwrap_err().body.message;
    assert_eq!(
        message(r#", "max_tokens": "5""#),
        "max_tokens: is \"5\"; it must be an integer from 1 to 4294967295"
    );
    assert_eq!(message(r#", "n": -1"#), "n: is -1; it must be an integer from 1 to 256");
    assert_eq!(message(r#", "top_p": true"#), "top_p: is true; it must be a number");
    assert_eq!(message(r#", "stream": "yes""#), "stream: is \"yes\"; it must be true or false");
    assert_eq!(message(r#", "model": {}"#), "model: is an object; it must be a string");
    assert_eq!(
        message(r#", "stop_token_ids": [1.5]"#),
        "stop_token_ids: is 1.5; it must be an integer from 0 to 4294967295"
    );
    assert_eq!(message(r#", "seed": 1, "seed": 2"#), "seed: is given more than once");
    assert!(message(r#", "top_p": NaN"#).starts_with("top_p: cannot be read: "));
    let message = |body: &str| one_message(body).unwrap_err().body.message;
    assert_eq!(
        message(r#"{"role": "user", "content": 1}"#),
        "messages[0].content: is 1; it must be a string or an array of text parts"
    );
    assert_eq!(message(r#"{"role": "user", "content": "x"}, 5"#), "messages[1]: is 5; it must be an object");
    assert_eq!(message(r#"{"role": "user"}"#), "messages[0]: content is missing");
    let error = completion("[1]").unwrap_err().body.message;
    assert_eq!(error, "the body is an array; it must be an object");
}

#[test]
fn ids_that_do_not_fit_are_counted() {
    for prompt in ["[X]", "[[X], [1]]"] {
        let long = prompt.replace('X', &vec!["7"; 100].join(","));
        let error = completion(&format!(r#"{{"prompt": {long}}}"#)).unwrap_err();
        assert_eq!(error.body.code, Some("context_length_exceeded"));
        let expected = "prompt: has 100 tokens; the model's context of 64 leaves no room for output";
        assert_eq!(error.body.message, expected);
    }
}

#[test]
fn every_honoured_field_is_read() {
    for (level, place) in [(Level::Completions, "P"), (Level::Chat, "M"), (Level::StreamOptions, "S")] {
        for (name, class) in level.fields() {
            if class != Class::Honoured || ["prompt", "messages"].contains(&name) {
                continue;
            }
            let result = match place {
                "P" => with(&format!(r#", "{name}": null"#)),
                "M" => chat_with(&format!(r#", "{name}": null"#)),
                _ => with(&format!(r#", "stream": true, "stream_options": {{"{name}": null}}"#)),
            };
            assert!(result.is_ok(), "{name}: {}", result.unwrap_err().body.message);
        }
    }
    let given = r#"{"role": "ROLE", "content": [{"type": "text", "text": "x"}], "name": "f", "reasoning": null,
        "reasoning_content": null, "tool_call_id": ID, "tool_calls": [CALLS]}"#;
    let call = r#"{"id": "1", "type": "function", "function": {"name": "f", "arguments": ""}}"#;
    let assistant = given.replace("ROLE", "assistant").replace("ID", "null").replace("CALLS", call);
    let tool = given.replace("ROLE", "tool").replace("ID", "\"1\"").replace("CALLS", "");
    assert_eq!(ignored(one_message(&format!("{assistant}, {tool}"))), "");
    for level in [Level::Message, Level::Part, Level::Call, Level::Called] {
        for (name, _) in level.fields().filter(|(_, class)| *class == Class::Honoured) {
            assert!(
                given.contains(&format!("\"{name}\"")) || call.contains(&format!("\"{name}\"")),
                "{name}"
            );
        }
    }
}

#[test]
fn objects_have_so_many_fields_and_no_more() {
    let many: Vec<String> = (0..200).map(|n| format!("\"x{n}\": 1")).collect();
    let body = format!(r#"{{"role": "user", "content": "x", {}}}"#, many.join(","));
    refused(one_message(&body), Some("messages"), &body);
}
