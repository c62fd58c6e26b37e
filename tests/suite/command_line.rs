//! What a person types at a running cluster, and what is said when it is not quite that.

use std::io::Write;
use std::process::{Command, Stdio};

use muster_tests::cluster::{Cluster, Setup};
use muster_tests::demo_model;
use muster_tests::process::{Process, eventually, muster, run};
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

#[tokio::test(flavor = "multi_thread")]
async fn a_tool_at_the_wrong_port_is_told_what_is_there() {
    let cluster = Cluster::start(Setup::new(&demo_model()));
    let (grpc, http) = (cluster.grpc(), cluster.http());
    let grpc = grpc.strip_prefix("http://").unwrap_or(&grpc);
    let tls = |address: &str| format!("https://{address}");
    let both = format!("{http},{http}");
    for (args, words) in [
        (&["status", "--grpc", &tls(grpc)][..], "speaks no TLS; write http:// in its URL"),
        (&["chat", "--grpc", &tls(grpc)], "speaks no TLS; write http:// in its URL"),
        (&["generate", "x", "--grpc", &tls(&http)], "speaks HTTP/1.1 and not gRPC"),
        (&["generate", "x", "--grpc", &both], "speaks HTTP/1.1 and not gRPC"),
        (&["probe", "--admin", grpc], "it speaks gRPC and not HTTP/1.1"),
        (&["drain", "--admin", &http], "--admin names the address that a process was started with"),
    ] {
        let output = run(args);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && said.contains(words), "{args:?}: {said}");
    }

    let worker = |join: &str| {
        let args = ["worker", "--join", join, "--listen", "127.0.0.1:0", "--model", "demo"];
        Process::start(&args.map(String::from)).unwrap()
    };
    let joining = worker(&http);
    let words = "speaks HTTP/1.1 and not gRPC, as a router does at its --http address; give the address of gRPC: a router's --grpc";
    eventually("the port is told", async || joining.log().contains(words).then_some(())).await;
    let lost = worker(&joining.address("listen"));
    let words = "is no router; give the address of a router's --grpc";
    eventually("a worker is no router", async || lost.log().contains(words).then_some(())).await;

    let args =
        ["router", "--model", "demo", "--worker", &http, "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0"];
    let error = Process::start(&args.map(String::from)).map(drop).unwrap_err();
    assert!(
        error.contains("speaks HTTP/1.1 and not gRPC") && error.contains("a worker's --listen"),
        "{error}"
    );
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

#[test]
fn a_conversation_outlives_a_full_context_and_says_how_answers_ended() {
    let cluster = Cluster::start(Setup::new(&demo_model()).compute("f32"));
    let chat = |flags: &[&str], lines: &str| {
        let mut child = Command::new(muster())
            .args(["chat", "--grpc", &cluster.grpc()])
            .args(flags)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(lines.as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (text(&output.stdout), text(&output.stderr), output.status.code())
    };
    let long = "word ".repeat(1000);
    let (answers, said, code) =
        chat(&[], &format!("{long}\n/new\nWhat is 37 + 45?\n/exit\nWhat is 1 + 1?\n"));
    assert!(said.contains("error: ") && said.contains("/new begins a new conversation"), "{said}");
    assert!(said.contains("[a new conversation]"), "{said}");
    assert!(answers.starts_with("37 + 45 = 82") && answers.lines().count() == 1, "{answers:?} {said}");
    assert_eq!(code, Some(1), "a script learns of the line that was left out");

    let (_, said, code) = chat(&["--max-tokens", "2"], "What is 37 + 45?\n");
    assert!(said.contains("[cut: 2 tokens are all that it was to have; --max-tokens"), "{said}");
    assert_eq!(code, Some(0));
    let (_, said, _) = chat(&["--generation-config", "ignore", "--ignore-eos"], "What is 37 + 45?\n");
    assert!(said.contains("[cut: the model's context of 512 tokens is full; /new begins"), "{said}");
    let (_, said, _) = chat(&["--stop", "3"], "What is 37 + 45?\n");
    assert!(said.contains("[empty: ") && said.contains("--stop"), "{said}");

    let zero = run(&["chat", "--max-tokens", "0", "--grpc", &cluster.grpc()]);
    let said = String::from_utf8_lossy(&zero.stderr);
    assert!(zero.status.code() == Some(2) && said.contains("--max-tokens"), "{said}");
}
