//! Chat templates render as the reference renders them, and bad ones end in an error.

mod common;

use std::time::{Duration, Instant};

use common::message;
use muster_text::{
    Chat, ChatMessage, ChatTemplate, CivilDate, GenerationPrompt, SpecialTokens, TextError, ToolCall,
};

fn special() -> SpecialTokens {
    [("bos_token", "<s>"), ("eos_token", "</s>")]
        .map(|(name, token)| (name.to_owned(), token.to_owned()))
        .into_iter()
        .collect()
}

fn render(source: &str, messages: &[ChatMessage]) -> Result<String, TextError> {
    ChatTemplate::new(source, special())?.render(&messages.to_vec().into(), GenerationPrompt::Add, None)
}

fn rendered(source: &str) -> String {
    render(source, &[message("user", "<b> & 'q' \"d\" é\n😀"), message("assistant", "ok")]).expect("renders")
}

#[test]
fn blocks_take_their_lines_with_them_and_the_last_newline_goes() {
    let source = "a\n  {% if true %}\n  b\n  {% endif %}\nc {{ bos_token }}\n";
    assert_eq!(rendered(source), "a\n  b\nc <s>");
}

#[test]
fn special_tokens_that_a_model_lacks_are_undefined() {
    assert_eq!(rendered("{{ eos_token }}{{ pad_token is defined }}{{ unk_token }}"), "</s>False");
}

#[test]
fn tools_and_documents_are_none() {
    assert_eq!(rendered("{% if tools is none and documents is defined and not tools %}ok{% endif %}"), "ok");
}

#[test]
fn pythons_methods_and_loop_controls_work() {
    let source = "{% for m in messages %}{% if loop.index0 == 1 %}{% break %}{% endif %}\
        {{ m.get('role').upper() }}{{ m['name'] is defined }}{{ m.items()|list|length }}{% endfor %}\
        {{ ' x '.strip() }}{{ 'a,b'.split(',')[-1] }}{{ 'abc'.startswith('ab') }}{{ messages[::-1][0].role }}\
        {%- set ns = namespace(n=0) %}{% for i in [1, 2] %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}";
    assert_eq!(rendered(source), "USERFalse2xbTrueassistant3");
}

#[test]
fn tojson_is_json_dumps() {
    for (expression, expected) in [
        ("messages[0].content", r#""<b> & 'q' \"d\" é\n😀""#),
        ("messages[1]", r#"{"role": "assistant", "content": "ok"}"#),
        ("[1, 1.0, none, true, [], {}]", "[1, 1.0, null, true, [], {}]"),
    ] {
        assert_eq!(rendered(&format!("{{{{ {expression} | tojson }}}}")), expected);
    }
    let nested = "{'b': [1, {'a': none}], 'a': []}";
    let indented = "{\n  \"b\": [\n    1,\n    {\n      \"a\": null\n    }\n  ],\n  \"a\": []\n}";
    assert_eq!(rendered(&format!("{{{{ {nested} | tojson(indent=2) }}}}")), indented);
    let compact = format!("{{{{ {nested} | tojson(separators=(',', ':'), sort_keys=true) }}}}");
    assert_eq!(rendered(&compact), r#"{"a":[],"b":[1,{"a":null}]}"#);
    assert_eq!(
        rendered("{{ 'é😀\x01\\\\' | tojson(ensure_ascii=true) }}"),
        r#""\u00e9\ud83d\ude00\u0001\\""#
    );
    assert!(render("{{ missing | tojson }}", &[]).is_err());
    assert!(render("{{ 1 | tojson(colour='red') }}", &[]).is_err());
}

#[test]
fn a_refusal_is_in_the_templates_words() {
    let source = "{% macro check(m) %}{% if m.role != 'user' %}{{ raise_exception('only users: ' ~ m.role) }}\
        {% endif %}{% endmacro %}{% for m in messages %}{{ check(m) }}{% endfor %}";
    let error = render(source, &[message("tool", "x")]).unwrap_err();
    assert_eq!(error, TextError::Template { message: "only users: tool".into() });
    assert_eq!(error.to_string(), "only users: tool");
}

#[test]
fn messages_are_never_read_as_template() {
    let hostile = "{{ 1 + 1 }}{% raw %}{# x #}";
    assert_eq!(render("{{ messages[0].content }}", &[message("user", hostile)]).unwrap(), hostile);
}

#[test]
fn the_date_is_the_callers() {
    let source =
        "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% else %}26 Jul 2024{% endif %}";
    let template = ChatTemplate::new(source, special()).unwrap();
    let on = |date| template.render(&Chat::default(), GenerationPrompt::Add, date).unwrap();
    assert_eq!(on(None), "26 Jul 2024");
    assert_eq!(on(Some(CivilDate::from_unix_seconds(1_795_305_600))), "22 Nov 2026");
    let error = render("{{ strftime_now('%Y') }}", &[]).unwrap_err().to_string();
    assert!(error.contains("strftime_now"), "{error}");
}

#[test]
fn a_thousand_messages_are_within_the_limits() {
    let source = std::str::from_utf8(include_bytes!("fixtures/long_chat.jinja")).unwrap();
    let messages: Vec<_> = (0..1024).map(|n| message(["user", "assistant"][n % 2], "a < b\n\nc")).collect();
    let text = render(source, &messages).unwrap();
    assert_eq!(text.matches("<|im_start|>").count(), 1025);
}

#[test]
fn the_families_templates_take_a_thousand_messages() {
    let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/templates");
    let mut seen = 0;
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "jinja") {
            let template = ChatTemplate::new(&std::fs::read_to_string(&path).unwrap(), special()).unwrap();
            let messages: Vec<_> =
                (0..1023).map(|n| message(["user", "assistant"][n % 2], &format!("<{n}>"))).collect();
            let today = Some(CivilDate::from_unix_seconds(1_795_305_600));
            let text = template.render(&messages.into(), GenerationPrompt::Add, today).unwrap();
            assert!(text.contains("<1022>"), "{path:?}");
            seen += 1;
        }
    }
    assert!(seen >= 14);
}

#[test]
fn errors_name_their_cause() {
    for (source, words) in [
        ("{{ nosuchfunction(1) }}", "nosuchfunction"),
        ("{{ 'a'.nosuchmethod() }}", "nosuchmethod"),
        ("{{ 1|nosuchfilter }}", "nosuchfilter"),
        ("{{ 1 is nosuchtest }}", "nosuchtest"),
        ("\n\n{{ 'a' + 1 }}", "chat_template:3"),
        ("{% nosuchtag %}", "nosuchtag"),
        ("{{ '\\N{BULLET}' }}", "write the character itself"),
        ("{% macro m(a, b=a) %}{% endmacro %}", "`a`"),
        ("{{ messages|tojson(indent=99) }}", "indent"),
        ("{% autoescape true %}{{ 1 }}{% endautoescape %}", "autoescape"),
    ] {
        let error = render(source, &[message("user", "x")]).unwrap_err();
        assert!(matches!(error, TextError::TemplateFailed { .. }), "{source}: {error:?}");
        assert!(error.to_string().contains(words), "{source}: {error}");
    }
}

fn tool() -> serde_json::Value {
    serde_json::json!({"type": "function", "function": {"name": "now", "parameters": {}}})
}

#[test]
fn tools_and_calls_that_a_template_would_drop_are_refused() {
    let with_tools = Chat { tools: vec![tool()], ..vec![message("user", "x")].into() };
    let render = |source: &str, chat: &Chat| {
        ChatTemplate::new(source, special()).unwrap().render(chat, GenerationPrompt::Add, None)
    };
    let plain = "{% for m in messages %}{{ m.content }}{% endfor %}";
    assert_eq!(render(plain, &with_tools).unwrap_err(), TextError::ToolsNotTaken);
    // Words about tools are not a place for them.
    assert_eq!(
        render(&format!("tools {{# tools #}}{plain}"), &with_tools).unwrap_err(),
        TextError::ToolsNotTaken
    );
    assert!(render(&format!("{{{{ tools|tojson }}}}{plain}"), &with_tools).unwrap().contains("\"now\""));
    let call = ToolCall::new(None, "now".into(), String::new()).unwrap();
    let called = ChatMessage { role: "assistant".into(), tool_calls: vec![call], ..ChatMessage::default() };
    let with_call = Chat::from(vec![message("user", "x"), called]);
    assert_eq!(render(plain, &with_call).unwrap_err(), TextError::ToolCallsNotTaken);
    let calls = "{% for m in messages %}{{ m.content }}{{ m.tool_calls|default([])|tojson }}{% endfor %}";
    assert_eq!(
        render(calls, &with_call).unwrap(),
        r#"x[][{"type": "function", "function": {"name": "now", "arguments": {}}}]"#
    );
}

#[test]
fn a_template_gets_arguments_and_absent_content_in_its_form() {
    let call = ToolCall::new(Some("1".into()), "f".into(), r#"{"a":1.50}"#.into()).unwrap();
    let called = ChatMessage { role: "assistant".into(), tool_calls: vec![call], ..ChatMessage::default() };
    let chat = Chat::from(vec![message("user", "x"), called]);
    let calls = "{% for m in messages %}{% for c in m.tool_calls or [] %}{ARGUMENTS}{% endfor %}{CONTENT}{% endfor %}";
    let of = |arguments: &str, content: &str| {
        let source = calls.replace("{ARGUMENTS}", arguments).replace("{CONTENT}", content);
        ChatTemplate::new(&source, special()).unwrap().render(&chat, GenerationPrompt::Add, None).unwrap()
    };
    let (dictionary, text) = ("{{ c.function.arguments|tojson }}", "{{ '' + c.function.arguments }}");
    assert_eq!(of(dictionary, ""), r#"{"a": 1.5}"#);
    assert_eq!(of(text, ""), r#"{"a":1.50}"#);
    // Printed as it is, a dictionary would be in Python's notation.
    assert_eq!(of("{{ c.function.arguments }}", ""), r#"{"a":1.50}"#);
    assert_eq!(of(dictionary, "{{ 'content' in m }};"), r#"True;{"a": 1.5}False;"#);
    assert_eq!(of(dictionary, "{{ '-' if m.content is none else m.content + ';' }}"), r#"x;{"a": 1.5}-"#);
    assert_eq!(of(dictionary, "{{ m.content + ';' }}"), r#"x;{"a": 1.5};"#);
}

#[test]
fn variables_reach_the_template_and_some_names_are_taken() {
    let source = "{{ enable_thinking }}{{ bos_token }}{{ deep.a[1] }}{{ documents|length }}";
    let template = ChatTemplate::new(source, special()).unwrap();
    let render = |variables: serde_json::Value| {
        let variables = variables.as_object().unwrap().clone();
        let chat = Chat { variables, ..vec![message("user", "x")].into() };
        template.render(&chat, GenerationPrompt::Add, None)
    };
    let all = serde_json::json!({"enable_thinking": false, "bos_token": "B", "deep": {"a": [1, 2]}, "documents": [1]});
    assert_eq!(render(all).unwrap(), "FalseB21");
    for name in ["messages", "tools", "add_generation_prompt"] {
        assert_eq!(
            render(serde_json::json!({name: 1})).unwrap_err(),
            TextError::Reserved { name: name.into() }
        );
    }
    let mut deep = serde_json::json!(1);
    for _ in 0..49 {
        deep = serde_json::json!([deep]);
    }
    let error = render(serde_json::json!({ "deep": deep })).unwrap_err();
    assert_eq!(error, TextError::TooDeep { what: "deep".into(), limit: 48 });
}

#[test]
fn arguments_that_are_no_object_are_refused() {
    for arguments in
        ["[1]", "null", "{", "1 2", "\"{}\"", &format!("{}1{}", "{\"a\":".repeat(49), "}".repeat(49))]
    {
        let error = ToolCall::new(None, "f".into(), arguments.into()).unwrap_err().to_string();
        assert!(error.contains("\"f\"") && error.len() < 300, "{error}");
    }
}

#[test]
fn hostile_templates_end_in_an_error_on_a_small_stack() {
    let start = Instant::now();
    std::thread::Builder::new().stack_size(2 << 20).spawn(refuse_hostile_templates).unwrap().join().unwrap();
    assert!(start.elapsed() < Duration::from_secs(60), "took {:?}", start.elapsed());
}

fn refuse_hostile_templates() {
    let r = |s: &str, n: usize| s.repeat(n);
    let hostile = [
        ("nested ifs", r("{% if true %}", 5500)),
        ("nested parentheses", format!("{{{{ {}1{} }}}}", r("(", 40_000), r(")", 40_000))),
        ("a billion turns", "{% for i in range(10**9) %}x{% endfor %}".into()),
        ("nested loops", format!("{}x{}", r("{% for i in range(9999) %}", 4), r("{% endfor %}", 4))),
        ("itself included", "{% include 'chat_template' %}".into()),
        ("itself imported", "{% import 'chat_template' as t %}".into()),
        ("itself extended", "{% extends 'chat_template' %}".into()),
        ("another file", "{% include '/etc/passwd' %}".into()),
        ("a recursive macro", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}".into()),
        ("a recursive loop", "{% for a in [1] recursive %}{{ loop([1]) }}{% endfor %}".into()),
        ("a recursive block", "{% block a %}{{ self.a() }}{% endblock %}".into()),
        ("much output", "{{ 'a' * 50000000 }}".into()),
        (
            "much output, little by little",
            format!("{{% for i in range(50000) %}}{}{{% endfor %}}", r("x", 100)),
        ),
        ("a number too large to repeat", "{{ 'a' * 10**18 }}".into()),
        ("division by zero", "{{ 1 // 0 }}".into()),
        ("an unknown tag", "{% generations %}{% endgenerations %}".into()),
        ("an open tag", "{{ 'a".into()),
        ("a long source", r("x", (64 << 10) + 1)),
        ("json of a deep value", format!("{}{{{{ ns.x | tojson }}}}", deep_value())),
    ];
    for (what, source) in hostile {
        let error = render(&source, &[message("user", "x")]).expect_err(what);
        assert!(
            !matches!(error, TextError::Template { .. }) && !error.to_string().is_empty(),
            "{what}: {error}"
        );
    }
}

/// A list nested nearly as deeply as the steps of a rendering allow.
fn deep_value() -> String {
    let (open, close) = ("[".repeat(60), "]".repeat(60));
    format!(
        "{{% set ns = namespace(x=[]) %}}{{% for i in range(2800) %}}\
         {{% set ns.x = {open}ns.x{close} %}}{{% endfor %}}"
    )
}

#[test]
fn chains_as_long_as_a_source_may_be_do_not_exhaust_the_stack() {
    let fill = |open: &str, link: &str, close: &str| {
        let links = ((64 << 10) - open.len() - close.len()) / link.len();
        format!("{open}{}{close}", link.repeat(links))
    };
    for source in [
        fill("{{ 1", "+1", " }}"),
        fill("{{ x", ".a", " }}"),
        fill("{{ ", "-", "1 }}"),
        fill("{{ ", "not ", "1 }}"),
        fill("{{ 1", "**1", " }}"),
        fill("{{ x", "[0]", " }}"),
        fill("{{ x", "()", " }}"),
        fill("{{ 1", "|e", " }}"),
        fill("{{ 1", " or 1", " }}"),
        fill("{{ ", "1 if 0 else ", "1 }}"),
        fill("{% if 0 %}", "{%elif 0%}", "{% endif %}"),
    ] {
        // Whether it renders does not matter here; that it returns does.
        if let Ok(text) = render(&source, &[]) {
            assert!(text.len() < 100, "{text}");
        }
    }
}

#[test]
fn values_as_deep_as_the_steps_allow_do_not_exhaust_the_stack() {
    let show = format!("{}{{{{ ns.x }}}}", deep_value());
    assert!(render(&show, &[]).unwrap_err().to_string().contains("nested more than"));
    let join = format!("{}{{{{ ns.x ~ '' }}}}", deep_value());
    assert!(render(&join, &[]).unwrap().starts_with("[[[["));
    let compare = format!("{}{{% set y = ns.x %}}{{{{ y == ns.x }}}}", deep_value());
    assert_eq!(render(&compare, &[]).unwrap(), "True");
}
