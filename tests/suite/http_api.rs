//! The OpenAI-compatible HTTP API.

use std::time::Instant;

use muster_tests::cluster::{Cluster, Setup};
use muster_tests::golden::json;
use muster_tests::http::{get, post, post_bytes, raw};
use muster_tests::process::PATIENCE;
use muster_tests::{demo_model, workspace_root};
use serde_json::{Value, json};

fn demo() -> Cluster {
    Cluster::start(Setup::new(&demo_model()).compute("f32"))
}

#[test]
fn completions_whole_and_streamed_agree() {
    let cluster = demo();
    let address = cluster.http();
    let golden = json(&demo_model().join("golden.json"));
    let story = golden["prompts"][0]["text"].as_str().unwrap();
    let request = json!({"model": "demo", "prompt": "Once upon a time", "max_tokens": 40, "temperature": 0});
    let whole = post(&address, "/v1/completions", &request).json();
    assert_eq!(whole["choices"][0]["text"], story);
    assert_eq!(whole["choices"][0]["finish_reason"], "length");
    assert_eq!(whole["usage"]["completion_tokens"], 40);
    assert_eq!(whole["usage"]["prompt_tokens"], 5);

    let mut streamed = request;
    streamed["stream"] = json!(true);
    streamed["stream_options"] = json!({"include_usage": true});
    let response = post(&address, "/v1/completions", &streamed);
    assert_eq!(response.header("content-type"), Some("text/event-stream"));
    let events = response.events();
    assert_eq!(events.last().unwrap(), "[DONE]");
    let chunks: Vec<Value> =
        events[..events.len() - 1].iter().map(|event| serde_json::from_str(event).unwrap()).collect();
    let pieces = chunks.iter().filter_map(|chunk| chunk["choices"][0]["text"].as_str());
    assert_eq!(pieces.collect::<String>(), story);
    let reasons = chunks.iter().filter(|chunk| chunk["choices"][0]["finish_reason"] == "length").count();
    assert_eq!(reasons, 1, "exactly one end");
    assert_eq!(chunks.last().unwrap()["usage"]["completion_tokens"], 40);
}

#[test]
fn chat_whole_and_streamed_agree() {
    let cluster = demo();
    let address = cluster.http();
    let request = json!({
        "model": "demo",
        "messages": [{"role": "user", "content": "What is 37 + 45?"}],
        "max_tokens": 20,
        "temperature": 0,
    });
    let whole = post(&address, "/v1/chat/completions", &request).json();
    assert_eq!(whole["choices"][0]["message"]["role"], "assistant");
    let text = whole["choices"][0]["message"]["content"].as_str().unwrap();
    assert!(text.starts_with("37 + 45 = 82"), "{text:?}");
    assert_eq!(whole["choices"][0]["finish_reason"], "stop");

    let mut streamed = request;
    streamed["stream"] = json!(true);
    let events = post(&address, "/v1/chat/completions", &streamed).events();
    assert_eq!(events.last().unwrap(), "[DONE]");
    let chunks: Vec<Value> =
        events[..events.len() - 1].iter().map(|event| serde_json::from_str(event).unwrap()).collect();
    assert_eq!(chunks[0]["choices"][0]["delta"]["role"], "assistant");
    let pieces = chunks.iter().filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str());
    assert_eq!(pieces.collect::<String>(), text);
}

#[test]
fn models_probes_and_metrics() {
    let cluster = demo();
    let address = cluster.http();
    assert_eq!(get(&address, "/v1/models").json()["data"][0]["id"], "demo");
    assert_eq!(get(&address, "/v1/models/demo").json()["id"], "demo");
    assert_eq!(get(&address, "/v1/models/other").status, 404);
    assert_eq!(get(&address, "/healthz").status, 200);
    assert_eq!(get(&address, "/readyz").status, 200);
    let _ = post(&address, "/v1/completions", &json!({"model": "demo", "prompt": [1, 844], "max_tokens": 4}));
    let metrics = get(&address, "/metrics").text();
    for name in [
        "muster_kv_blocks_free",
        "muster_step_seconds",
        "muster_time_to_first_token_seconds",
        "muster_inter_token_seconds",
        "muster_tokens_generated_total",
        "muster_dispatch_seconds",
        "muster_dispatch_overhead_seconds",
    ] {
        assert!(metrics.contains(name), "{name} is missing from:\n{metrics}");
    }
}

#[test]
fn bad_input_gets_an_openai_error_and_serving_goes_on() {
    let cluster = demo();
    let address = cluster.http();
    let completion = |extra: Value| {
        let mut body = json!({"model": "demo", "prompt": "Once", "max_tokens": 4});
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        post(&address, "/v1/completions", &body)
    };
    let chat = |messages: Value| {
        post(
            &address,
            "/v1/chat/completions",
            &json!({"model": "demo", "messages": messages, "max_tokens": 4}),
        )
    };
    let deep = "[".repeat(10_000) + &"]".repeat(10_000);
    let bytes = |body: &[u8]| post_bytes(&address, "/v1/completions", "application/json", body);
    let cases = [
        ("empty body", 400, bytes(b"")),
        ("empty object", 400, bytes(b"{}")),
        ("not JSON", 400, bytes(b"hello")),
        ("truncated", 400, bytes(br#"{"model": "demo", "prompt": "#)),
        ("too deep", 400, bytes(deep.as_bytes())),
        ("broken UTF-8", 400, bytes(b"{\"model\": \"demo\", \"prompt\": \"\xff\xfe\"}")),
        ("lone surrogate", 400, bytes(br#"{"model": "demo", "prompt": "\ud800"}"#)),
        ("100 MB", 413, bytes(&vec![b' '; 100 << 20])),
        ("content type", 415, post_bytes(&address, "/v1/completions", "text/plain", b"{}")),
        ("unknown model", 404, completion(json!({"model": "gpt-4"}))),
        ("unknown field", 400, completion(json!({"frobnicate": 1}))),
        ("empty prompt", 400, completion(json!({"prompt": []}))),
        ("token id", 400, completion(json!({"prompt": [4096]}))),
        ("negative token id", 400, completion(json!({"prompt": [-1]}))),
        ("float token id", 400, completion(json!({"prompt": [1.5]}))),
        ("long prompt", 400, completion(json!({"prompt": vec![7; 600]}))),
        ("max_tokens 0", 400, completion(json!({"max_tokens": 0}))),
        ("max_tokens -1", 400, completion(json!({"max_tokens": -1}))),
        ("max_tokens huge", 400, completion(json!({"max_tokens": 2_147_483_648u64}))),
        ("n", 400, completion(json!({"n": 1_000_000}))),
        ("n 0", 400, completion(json!({"n": 0}))),
        ("temperature", 400, completion(json!({"temperature": -0.1}))),
        ("temperature text", 400, completion(json!({"temperature": "hot"}))),
        ("top_p", 400, completion(json!({"top_p": 1.5}))),
        ("stop list", 400, completion(json!({"stop": vec!["x"; 1000]}))),
        ("empty stop", 400, completion(json!({"stop": ""}))),
        ("logprobs", 400, completion(json!({"logprobs": 1_000_000_000}))),
        ("logit_bias", 400, completion(json!({"logit_bias": {"99999": 1}}))),
        ("best_of", 400, completion(json!({"best_of": 1_000_000_000}))),
        ("no messages", 400, chat(json!([]))),
        ("message without role", 400, chat(json!([{"content": "x"}]))),
        (
            "image part",
            400,
            chat(json!([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}])),
        ),
    ];
    for (name, expected, response) in cases {
        assert_eq!(response.status, expected, "{name}: {}", response.text());
        let error = &response.json()["error"];
        assert!(
            error["message"].as_str().is_some_and(|message| message.len() > 5),
            "{name}: {}",
            response.text()
        );
        assert!(!response.text().contains("/main"), "{name}: no paths in errors");
    }
    assert_eq!(get(&address, "/v1/completions").status, 405);
    assert_eq!(get(&address, "/nowhere").status, 404);
    let smuggled = format!(
        "POST /v1/completions HTTP/1.1\r\nHost: {address}\r\nContent-Length: 2\r\nContent-Length: 3\r\nConnection: close\r\n\r\n{{}}x"
    );
    assert_eq!(raw(&address, smuggled.as_bytes()).status, 400);
    let long = format!("GET /healthz HTTP/1.1\r\nHost: x\r\nX-Long: {}\r\n\r\n", "a".repeat(1 << 20));
    assert!([400, 431].contains(&raw(&address, long.as_bytes()).status));
    assert_eq!(completion(json!({})).status, 200);
}

#[test]
fn lines_of_the_log_say_which_request_they_are_about() {
    let log = "warn,muster_router=debug";
    let cluster = Cluster::start(Setup::new(&demo_model()).router_args(&["--log", log]));
    let address = cluster.http();
    let answer = raw(
        &address,
        b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nX-Request-Id: mine-42\r\n\r\n",
    );
    assert_eq!((answer.status, answer.header("x-request-id")), (200, Some("mine-42")));
    let deadline = Instant::now() + PATIENCE;
    let is_logged =
        || cluster.router.log().lines().any(|line| line.contains("mine-42") && line.contains("/v1/models"));
    while !is_logged() {
        assert!(Instant::now() < deadline, "{}", cluster.router.log());
        std::thread::yield_now();
    }
}

/// What clients of other servers send: `tests/fixtures/requests.jsonl`, a request a line with what must come of it.
#[test]
fn requests_of_foreign_clients() {
    let cluster = demo();
    let address = cluster.http();
    let cases = std::fs::read_to_string(workspace_root().join("tests/fixtures/requests.jsonl")).unwrap();
    for line in cases.lines() {
        let case: Value = serde_json::from_str(line).unwrap();
        let (why, want) = (case["why"].as_str().unwrap(), &case["want"]);
        let mut body = case["body"].clone();
        if want.get("completion_tokens").is_some() {
            body["ignore_eos"] = json!(true);
        }
        let answer = post(&address, case["path"].as_str().unwrap(), &body);
        let text = answer.text();
        assert_eq!(want["status"], answer.status, "{why}: {text}");
        let told = answer.header("x-muster-ignored").unwrap_or_default();
        if let Some(ignored) = want["ignored"].as_str() {
            assert_eq!(told, ignored, "{why}");
        }
        if let Some(expected) = want["text"].as_str() {
            assert!(answer.json()["error"]["message"].as_str().unwrap().contains(expected), "{why}: {text}");
        }
        for name in ["param", "code"] {
            if want.get(name).is_some() {
                assert_eq!(answer.json()["error"][name], want[name], "{why}: {text}");
            }
        }
        if let Some(tokens) = want.get("completion_tokens") {
            assert_eq!(&answer.json()["usage"]["completion_tokens"], tokens, "{why}: {text}");
        }
    }
}
