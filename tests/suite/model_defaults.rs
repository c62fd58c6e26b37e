//! Sampling settings of a model's `generation_config.json`: where they hold, who tells them, and what turns them off.

use muster_proto::v1::{GenerateRequest, GetModelRequest, Sampling};
use muster_tests::cluster::{Cluster, Setup};
use muster_tests::damaged::copy_of;
use muster_tests::process::run;
use muster_tests::{client, demo_model, http};
use serde_json::{Value, json};
use tempfile::TempDir;

/// The demo model with this `generation_config.json`.
fn model(generation_config: &Value) -> TempDir {
    let copy = copy_of(&demo_model());
    let file = copy.path().join("generation_config.json");
    std::fs::write(file, generation_config.to_string()).unwrap();
    copy
}

/// Settings that are nobody's default.
fn hot() -> Value {
    json!({"do_sample": true, "temperature": 0.9, "top_k": 7, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.05,
        "max_new_tokens": 11})
}

/// A chat whose answer does not end by itself.
fn chat(address: &str, fields: &Value) -> (String, u64) {
    let messages = json!([{"role": "user", "content": "Tell me a story."}]);
    let mut body = json!({"model": "m", "messages": messages, "seed": 5, "ignore_eos": true});
    body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    let answer = http::post(address, "/v1/chat/completions", &body);
    assert_eq!(answer.status, 200, "{}", answer.text());
    let answer = answer.json();
    let text = answer["choices"][0]["message"]["content"].as_str().unwrap().to_owned();
    (text, answer["usage"]["completion_tokens"].as_u64().unwrap())
}

fn generate(address: &str, more: &[&str]) -> Value {
    let output =
        run(&[&["generate", "Once upon a time", "--grpc", address, "--json", "--ignore-eos"], more].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn they_hold_where_a_request_says_nothing() {
    let model = model(&hot());
    let setup = Setup::new(model.path()).compute("f32").router_args(&["--model-name", "m"]);
    let cluster = Cluster::start(setup);
    let address = cluster.http();
    let spelled = json!({"temperature": 0.9, "top_k": 7, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.05,
        "max_tokens": 11});
    let plain = chat(&address, &json!({}));
    assert_eq!(plain, chat(&address, &spelled));
    assert_eq!(plain.1, 11);
    let greedy = chat(&address, &json!({"temperature": 0, "repetition_penalty": 1, "max_tokens": 20}));
    assert_eq!(greedy.1, 20, "a request may ask for more");
    assert!(!greedy.0.starts_with(&plain.0), "these settings change what is said");

    let told = cluster.client().await.get_model(GetModelRequest {}).await.unwrap().into_inner();
    let expected = Sampling {
        temperature: Some(0.9),
        top_k: Some(7),
        top_p: Some(0.95),
        min_p: Some(0.01),
        repetition_penalty: Some(1.05),
        ..Sampling::default()
    };
    assert_eq!((told.default_sampling, told.default_max_tokens), (Some(expected), Some(11)));
    let log = cluster.router.log();
    assert!(log.contains("temperature 0.9, top_k 7, top_p 0.95"), "{log}");

    // The command line asks the router for them; what the wire leaves out stays greedy.
    let address = cluster.grpc();
    let written = ["--temperature", "0.9", "--top-k", "7", "--top-p", "0.95", "--min-p", "0.01"];
    let written = [&written[..], &["--repetition-penalty", "1.05", "--max-tokens", "11"]].concat();
    let plain = generate(&address, &["--seed", "5"]);
    let ignoring = [&written[..], &["--seed", "5", "--generation-config", "ignore"]].concat();
    assert_eq!(plain, generate(&address, &ignoring));
    let ignored = generate(&address, &["--generation-config", "ignore"]);
    assert_eq!(ignored["token_ids"].as_array().unwrap().len(), 64);
    let raw = client::generate(&cluster.client().await, client::greedy(&[1, 844, 624], 20)).await.unwrap();
    let at_zero = Sampling { temperature: Some(0.0), ..Sampling::default() };
    let at_zero = GenerateRequest { sampling: Some(at_zero), ..client::greedy(&[1, 844, 624], 20) };
    assert_eq!(raw[0].ids, client::generate(&cluster.client().await, at_zero).await.unwrap()[0].ids);
}

#[test]
fn they_are_left_alone_where_that_is_asked_for() {
    let model = model(&json!({"do_sample": false, "max_new_tokens": 3, "no_repeat_ngram_size": 3}));
    let setup = |args: &[&str]| {
        Setup::new(model.path()).compute("f32").router_args(&[&["--model-name", "m"], args].concat())
    };
    let taken = Cluster::start(setup(&[]));
    let (text, tokens) = chat(&taken.http(), &json!({}));
    assert_eq!(tokens, 3);
    assert_eq!((text, 3), chat(&taken.http(), &json!({"temperature": 0, "max_tokens": 3})), "greedy");
    let log = taken.router.log();
    assert!(
        log.contains("generation_config.json: `no_repeat_ngram_size` is 3, which is not done here"),
        "{log}"
    );
    drop(taken);
    let ignored = Cluster::start(setup(&["--generation-config", "ignore"]));
    assert_eq!(chat(&ignored.http(), &json!({"max_tokens": 30})).1, 30);
    let (text, tokens) = chat(&ignored.http(), &json!({}));
    assert!(tokens > 200, "to the end of the context: {tokens}");
    assert!(text.starts_with(&chat(&ignored.http(), &json!({"temperature": 1, "max_tokens": 30})).0));
}

#[test]
fn check_model_tells_them_and_refuses_what_is_out_of_range() {
    let good = model(&json!({"temperature": 0.6, "top_k": 20, "max_new_tokens": 100, "num_beams": 4}));
    let path = good.path().display().to_string();
    let told = run(&["check-model", &path, "--headers-only"]);
    let text = String::from_utf8(told.stdout).unwrap();
    for fact in ["temperature 0.6, top_k 20, max_tokens 100", "generation_config.json: `num_beams` is 4"] {
        assert!(text.contains(fact), "{fact} in\n{text}");
    }
    let told = run(&["check-model", &path, "--headers-only", "--json"]);
    let told: Value = serde_json::from_slice(&told.stdout).unwrap();
    assert_eq!((&told["sampling"]["top_k"], &told["sampling"]["max_tokens"]), (&json!(20), &json!(100)));

    let listens = ["--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0"];
    for (field, value) in [
        ("temperature", json!(-0.5)),
        ("top_k", json!(-7)),
        ("top_p", json!(1.5)),
        ("min_p", json!(2)),
        ("repetition_penalty", json!(0)),
        ("max_new_tokens", json!(0)),
    ] {
        let bad = model(&json!({field: value}));
        let path = bad.path().display().to_string();
        let router = [&["router", "--model", &path][..], &listens].concat();
        for command in [&["check-model", &path][..], &router, &["up", "--model", &path]] {
            let refused = run(command);
            let text = String::from_utf8_lossy(&refused.stderr);
            assert_eq!(refused.status.code(), Some(2), "{command:?}: {text}");
            assert!(text.contains("generation_config.json: ") && text.contains(field), "{command:?}: {text}");
        }
    }
}
