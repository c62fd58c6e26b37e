//! What a person types at a running cluster, and what is said when it is not quite that.

use muster_tests::cluster::{Cluster, Setup};
use muster_tests::demo_model;
use muster_tests::process::run;
use serde_json::Value;

#[test]
fn an_http_port_is_not_taken_for_grpc() {
    let cluster = Cluster::start(Setup::new(&demo_model()));
    let url = format!("http://{}", cluster.http());
    let bare = cluster.http();
    for args in [
        &["generate", "x", "--grpc", &url][..],
        &["generate", "x", "--grpc", &bare],
        &["chat", "--grpc", &url],
        &["status", "--grpc", &url],
        &["bench", "--grpc", &url],
    ] {
        let output = run(args);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{args:?}");
        assert!(said.contains(&url) && said.contains("speaks HTTP/1.1 and not gRPC"), "{args:?}: {said}");
        assert!(said.contains("--grpc"), "{args:?}: {said}");
    }
}

#[test]
fn an_answer_that_is_empty_says_why_and_a_chat_is_answered() {
    let bare = run(&["generate", "What is 37 + 45?", "--model", "demo", "--compute", "f32"]);
    let said = String::from_utf8_lossy(&bare.stderr);
    assert!(bare.status.success(), "{said}");
    assert!(said.contains("[empty: demo ended the text at once") && said.contains("--chat"), "{said}");
    let asked = ["generate", "--chat", "What is 37 + 45?", "--model", "demo", "--compute", "f32"];
    let chat = run(&asked);
    let said = String::from_utf8_lossy(&chat.stderr);
    let answer = String::from_utf8_lossy(&chat.stdout);
    assert!(answer.starts_with("37 + 45 = 82"), "{answer:?} {said}");
    assert!(!said.contains("[empty"), "{said}");
    let json = run(&[&asked[..], &["--json"]].concat());
    let json: Value = serde_json::from_slice(&json.stdout).unwrap();
    assert!(json["text"].as_str().unwrap().starts_with("37 + 45 = 82"), "{json}");
    assert!(
        json["usage"]["prompt_tokens"].as_u64().unwrap() > 8 && json.get("prompt_token_ids").is_none(),
        "{json}"
    );

    let cluster = Cluster::start(Setup::new(&demo_model()).compute("f32"));
    let grpc = cluster.grpc();
    let routed = run(&["generate", "--chat", "What is 37 + 45?", "--grpc", &grpc]);
    assert_eq!(String::from_utf8_lossy(&routed.stdout), answer);
    let ended = run(&["generate", "--chat", "What is 37 + 45?", "--grpc", &grpc, "--stop", "3"]);
    let said = String::from_utf8_lossy(&ended.stderr);
    assert!(said.contains("[empty: ") && said.contains("--stop"), "{said}");
}
