//! Templates in the style of the families render as transformers renders them, byte for byte.
//!
//! `fixtures/templates/golden.json` is what transformers made; `make_golden.py` beside it says how.

#![allow(clippy::unwrap_used, reason = "all of it is test code")]

mod common;

use common::json;
use muster_text::{
    Chat, ChatMessage, ChatTemplate, CivilDate, Content, GenerationPrompt, SpecialTokens, TextError, ToolCall,
};
use serde_json::Value;

const GOLDEN: &str = "tests/fixtures/templates/golden.json";
/// 2026-11-22.
const TODAY: u64 = 1_795_305_600;

fn special(golden: &Value) -> SpecialTokens {
    let tokens = golden["special"].as_object().unwrap();
    tokens.iter().map(|(name, token)| (name.clone(), token.as_str().unwrap().to_owned())).collect()
}

fn chat(value: &Value) -> Chat {
    let variables = value["more"].as_object().cloned().unwrap_or_default();
    let tools = value["tools"].as_array().cloned().unwrap_or_default();
    Chat { messages: value["messages"].as_array().unwrap().iter().map(message).collect(), tools, variables }
}

fn message(value: &Value) -> ChatMessage {
    let text = |name: &str| value[name].as_str().map(str::to_owned);
    let content = match &value["content"] {
        Value::Null => Content::Absent,
        Value::String(text) => Content::Text(text.clone()),
        Value::Array(parts) => {
            Content::Parts(parts.iter().map(|part| part["text"].as_str().unwrap().to_owned()).collect())
        }
        other => panic!("{other}"),
    };
    let call = |call: &Value| {
        let function = &call["function"];
        let arguments = match &function["arguments"] {
            Value::String(text) => text.clone(),
            object => object.to_string(),
        };
        let id = call["id"].as_str().map(str::to_owned);
        ToolCall::new(id, function["name"].as_str().unwrap().to_owned(), arguments).unwrap()
    };
    ChatMessage {
        role: text("role").unwrap(),
        content,
        reasoning: text("reasoning_content"),
        name: text("name"),
        tool_calls: value["tool_calls"].as_array().into_iter().flatten().map(call).collect(),
        tool_call_id: text("tool_call_id"),
    }
}

fn render(source: &str, golden: &Value, chat: &Chat, prompt: GenerationPrompt) -> Result<String, TextError> {
    let today = Some(CivilDate::from_unix_seconds(TODAY));
    ChatTemplate::new(source, special(golden))?.render(chat, prompt, today)
}

/// What the reference refuses and we render; no template that works there shows it.
const LENIENT: &[&str] = &[
    "{{ 1 < 'a' }}",
    "{{ none < 1 }}",
    "{{ 1 in 'a1' }}",
    "{{ ', '.join([1, 2]) }}",
    "{{ none|list }}",
    "{{ range(3)|tojson }}",
    "{{ d.items()|tojson }}",
    "{{ namespace(a=1)|tojson }}",
    "{{ messages|map(attribute='role')|tojson }}",
    "{% for m in none %}x{% endfor %}",
    "{% set ns = namespace(_a=1) %}{{ ns._a }}",
];
/// What the reference renders and we refuse.
const UNSUPPORTED: &[&str] = &[
    "{{ 'abc'.startswith('b', 1) }}",
    "{{ 'abcabc'.find('c', 3) }}",
    "{{ '%s-%s' % ('a', 1) }}",
    "{{ '½'.isdigit() }}",
    "{{ '7'.zfill(3) }}",
    "{{ 'a'.ljust(3) }}",
    "{{ 'a'.encode() }}",
    "{{ '\\N{BULLET}' }}",
    "{{ 'a b'|wordcount }}",
    "{{ 'abc def'|truncate(5) }}",
    "{{ 'a'|center(5) }}",
    "{{ '<b>x</b>'|striptags }}",
    "{{ d|attr('b') }}|{{ 'a'|attr('upper') is defined }}",
    "{{ {'a': 1, 'b': [1, {'c': none}]}|pprint }}",
    "{{ {'a': 1}|xmlattr }}",
    "{% set ns = namespace({'a': 1}, b=2) %}{{ ns.a }}{{ ns.b }}",
    "{{ list.index(1) }}",
    "{{ d.copy() }}",
    "{{ dict([('a', 1)]) }}",
    "{{ dict.fromkeys(['a', 'b'], 0) }}",
    "{% macro a(x) %}{{ x }}{{ varargs }}{{ kwargs }}{% endmacro %}{{ a(1, 2, q=3) }}",
    "{% macro a(x, y=x) %}{{ x }}{{ y }}{% endmacro %}{{ a(1) }}",
    "{{ strftime_now('%c') }}",
    "{% autoescape true %}{{ '<' }}{% endautoescape %}{% autoescape false %}{{ '<' }}{% endautoescape %}",
    "{% autoescape true %}{{ messages[1].content }}{% endautoescape %}",
];
/// What reads otherwise: views and ranges are lists to the engine, and text that is marked as safe does not escape what it is joined with.
const OTHERWISE: &[&str] = &[
    "{{ d.keys() }}",
    "{{ d.values() }}",
    "{{ d.items() }}",
    "{{ range(3) }}",
    "{{ d.items() is sequence }}",
    "{{ '<i>' + ('<b>'|safe) }}",
];

#[derive(Debug, PartialEq, Eq)]
enum Outcome {
    Alike,
    Lenient,
    Unsupported,
    Otherwise,
}

/// How ours compares with the reference's, which gives text or, where it is `null`, refuses.
fn compare(expected: &Value, ours: &Result<String, TextError>) -> Outcome {
    match (expected.as_str(), ours) {
        (Some(text), Ok(ours)) if text == ours => Outcome::Alike,
        (None, Err(_)) => Outcome::Alike,
        (None, Ok(_)) => Outcome::Lenient,
        (Some(_), Err(_)) => Outcome::Unsupported,
        (Some(_), Ok(_)) => Outcome::Otherwise,
    }
}

#[test]
fn what_templates_do_is_done_as_the_reference_does_it() {
    let golden = json(GOLDEN);
    let chat = chat(&golden["context"]);
    let features = golden["features"].as_array().unwrap();
    assert!(features.len() > 250);
    let mut wrong = Vec::new();
    let mut listed = 0;
    for feature in features {
        let source = feature["source"].as_str().unwrap();
        // Tools that a template does not look at are refused.
        let ours = render(&format!("{{% set _ = tools %}}\n{source}"), &golden, &chat, GenerationPrompt::Add);
        let expected = match () {
            () if LENIENT.contains(&source) => Outcome::Lenient,
            () if UNSUPPORTED.contains(&source) => Outcome::Unsupported,
            () if OTHERWISE.contains(&source) => Outcome::Otherwise,
            () => Outcome::Alike,
        };
        listed += usize::from(expected != Outcome::Alike);
        let outcome = compare(&feature["rendered"], &ours);
        if outcome != expected {
            wrong.push(format!(
                "{source:?}: {outcome:?}\nreference {}\n     ours {ours:?}",
                feature["rendered"]
            ));
        }
    }
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), features.len(), wrong.join("\n"));
    assert_eq!(
        listed,
        LENIENT.len() + UNSUPPORTED.len() + OTHERWISE.len(),
        "a listed feature is not in the golden"
    );
}

/// Templates without a place for tools. The reference drops these, we refuse them.
const WITHOUT_TOOLS: &[&str] = &["deepseek_v2", "ernie4_5_moe", "mixtral", "olmoe", "phimoe", "qwen2_moe"];

#[test]
fn conversations_render_as_the_reference_renders_them() {
    let golden = json(GOLDEN);
    let families = golden["families"].as_array().unwrap();
    let conversation = |name: &str| {
        golden["conversations"].as_array().unwrap().iter().find(|c| c["name"] == name).map(chat).unwrap()
    };
    let (mut wrong, mut rendered, mut without_tools) = (Vec::new(), 0, 0);
    for case in families {
        let text = |name: &str| case[name].as_str().unwrap();
        let (template, name) = (text("template"), text("name"));
        let path = format!("tests/fixtures/templates/{template}.jinja");
        let source = String::from_utf8(common::file(&path)).unwrap();
        let add = case["add_generation_prompt"].as_bool().unwrap();
        let prompt = if add { GenerationPrompt::Add } else { GenerationPrompt::Omit };
        let chat = conversation(name);
        let ours = render(&source, &golden, &chat, prompt);
        let mut expected = &case["rendered"];
        if !chat.tools.is_empty() && WITHOUT_TOOLS.contains(&template) {
            use TextError::{Template, ToolCallsNotTaken, ToolsNotTaken};
            assert!(matches!(ours, Err(ToolsNotTaken | ToolCallsNotTaken | Template { .. })), "{ours:?}");
            without_tools += 1;
            continue;
        }
        if name == "parts"
            && expected.as_str().is_none_or(|text| text.contains("{'") || !text.contains("first"))
        {
            // A template that does not take parts gets them joined.
            let is_joined = |c: &&Value| {
                c["template"] == template && c["name"] == "parts, joined" && c["add_generation_prompt"] == add
            };
            expected = &families.iter().find(is_joined).unwrap()["rendered"];
        }
        rendered += usize::from(ours.is_ok());
        if compare(expected, &ours) != Outcome::Alike {
            wrong.push(format!(
                "{template}, {name}, {add}:\nreference {expected}\n     {case}\n  ours {ours:?}"
            ));
        }
    }
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), families.len(), wrong.join("\n"));
    assert!(rendered > 400 && without_tools == WITHOUT_TOOLS.len() * 10, "{rendered}, {without_tools}");
}
