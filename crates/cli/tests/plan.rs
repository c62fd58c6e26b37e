//! `muster plan` as a person or a script meets it.

#![allow(clippy::unwrap_used, reason = "the lint spares test functions, but not their helpers")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;

/// Runs the program with an empty environment in an empty directory: no network, no cache, no model.
fn run(arguments: &[&str]) -> Output {
    let directory = tempfile::tempdir().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_muster"));
    command.args(arguments).env_clear().current_dir(directory.path()).stdin(Stdio::null());
    command.output().unwrap()
}

fn plan(arguments: &[&str]) -> Output {
    run(&[&["plan"], arguments].concat())
}

#[track_caller]
fn text(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout.clone()).unwrap()
}

#[track_caller]
fn json(arguments: &[&str]) -> Value {
    serde_json::from_str(&text(&plan(&[arguments, &["--json"]].concat()))).unwrap()
}

#[track_caller]
fn refused(arguments: &[&str], reasons: &[&str]) {
    let output = plan(arguments);
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{text}");
    for reason in reasons {
        assert!(text.contains(reason), "{reason:?} is not in {text}");
    }
    assert!(output.stdout.is_empty());
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

#[test]
fn mixtral_is_planned_without_a_file() {
    let answer = text(&plan(&["mixtral-8x7b", "--gpu", "24GiB"]));
    for fact in [
        "47 B held (46.7 B), 13 B active per token (12.9 B)",
        "256 of 352.3 MB in bf16: 90.2 GB",
        "mistralai/Mixtral-8x7B-v0.1",
        "computes on CPUs",
        "58 of 256",
        "muster router --model mistralai/Mixtral-8x7B-v0.1 --replicas 1",
        "muster worker --join ROUTER:50051 --memory 19660MiB    # 5 times",
        "helm install",
    ] {
        assert!(answer.contains(fact), "{fact:?} is not in\n{answer}");
    }
    let report = json(&["Mixtral-8x7B", "--gpu", "24GiB"]);
    assert_eq!(report["parameters"], 46_702_792_704_u64);
    assert_eq!(report["expert_bytes"], 3 * 4096 * 14336 * 2);
    assert_eq!(report["kv_token_bytes"], 32 * 2 * 8 * 128 * 2);
    assert_eq!(report["kv_bytes"], 16_u64 * 4096 * 32 * 2 * 8 * 128 * 2);
    // 58 of 24 GiB each: 5 workers hold 256, 9 hold 512.
    assert_eq!(report["sizes"][0]["workers_by_copies"], serde_json::json!([[1, 5], [2, 9]]));
}

#[test]
fn layers_with_a_window_take_less_kv_memory() {
    let arguments = ["gpt-oss-20b", "--context", "131072", "--sequences", "4"];
    let report = json(&arguments);
    let token = 24 * 2 * 8 * 64 * 2_u64;
    assert_eq!(report["kv_token_bytes"], token);
    // Half of the layers keep everything, the others 41 blocks of 16 tokens: 512 of a step and the 127 before it.
    assert_eq!(report["kv_bytes"], 4 * (131_072 + 41 * 16) * token / 2);
    assert!(text(&plan(&arguments)).contains("less where layers no longer see it"));
    assert!(!text(&plan(&["mixtral-8x7b"])).contains("no longer see"));
}

#[test]
fn the_built_in_model_is_as_large_as_check_model_says() {
    let planned = json(&["demo"]);
    let check: Value =
        serde_json::from_str(&text(&run(&["check-model", "demo", "--headers-only", "--json"]))).unwrap();
    for key in ["family", "parameters", "active_parameters", "hidden"] {
        assert_eq!(planned[key], check[key], "{key}");
    }
    assert_eq!(planned["stored_bytes"], check["weights"]["bytes"]);
    // Whole blocks of the packing, so no padding.
    assert_eq!(planned["expert_bytes"], check["layers"][0]["expert_bytes"]);
    assert_eq!(planned["indexed_bytes"], Value::Null);
    let answer = text(&plan(&["demo", "--worker", "16MiB"]));
    assert!(
        answer.contains("--set model.source=demo") && answer.contains("router --model demo "),
        "{answer}"
    );
}

#[test]
fn a_directory_needs_no_weights() {
    let directory = tempfile::tempdir().unwrap();
    for file in ["config.json", "model.safetensors.index.json"] {
        fs::copy(root().join("models/demo").join(file), directory.path().join(file)).unwrap();
    }
    let path = directory.path().to_str().unwrap();
    let (mut there, mut built_in) = (json(&[path, "--replicas", "2"]), json(&["demo", "--replicas", "2"]));
    for report in [&mut there, &mut built_in] {
        let report = report.as_object_mut().unwrap();
        report.remove("model");
        report.remove("loaded_from");
    }
    assert_eq!(there, built_in);
    let answer = text(&plan(&[path, "--worker", "16MiB"]));
    assert!(answer.contains(&format!("--set model.hostPath.path={path}")), "{answer}");
    fs::write(directory.path().join("config.json"), r#"{"model_type": "deepseek_v3000"}"#).unwrap();
    refused(&[path], &["config.json: `model_type` is \"deepseek_v3000\"; supported are"]);
}

#[test]
fn workers_that_are_there_hold_it_or_not() {
    let fits = plan(&["mixtral-8x7b", "--devices", "64GiB,64GiB"]);
    assert!(text(&fits).contains("They hold 1 copy of every expert"));
    let short = plan(&["mixtral-8x7b", "--devices", "64GiB,64GiB", "--replicas", "2"]);
    assert_eq!(short.status.code(), Some(1));
    let answer = String::from_utf8_lossy(&short.stdout);
    // 156 of 336 MiB in four fifths of 64 GiB.
    assert!(
        answer.contains("They do not hold 2 copies of every expert: places for 200 more are missing"),
        "{answer}"
    );
    let more = json(&["mixtral-8x7b", "--worker", "64GiBx2", "--worker", "32GiB", "--replicas", "2"]);
    // 78 each: three for what is missing, and one to spare.
    assert_eq!((&more["given_missing"], &more["sizes"][0]["workers"]), (&200.into(), &4.into()));
}

#[test]
fn less_is_sent_than_every_expert_a_row() {
    let report = json(&["mixtral-8x7b", "--worker", "24GiBx4", "--devices", "24GiB", "--rate", "10"]);
    let wire = &report["wire"][0];
    let number = |key: &str| wire[key].as_f64().unwrap();
    // Five workers, three with two of eight experts and two with one: 3 (1 - 15/28) + 2 (1 - 21/28).
    let reached = 3.0 * 13.0 / 28.0 + 2.0 * 7.0 / 28.0;
    assert!((number("workers_per_row") - reached).abs() < 1e-9, "{wire}");
    assert!((number("sent_per_layer") - reached * 8192.0).abs() < 1e-6);
    assert!((number("returned_per_layer") - 2.0 * 8192.0).abs() < 1e-6);
    assert!((number("returned_per_second") - 2.0 * 8192.0 * 32.0 * 10.0).abs() < 1e-3);
    let partial = json(&["mixtral-8x7b", "--worker", "24GiBx5", "--combine", "partial"]);
    assert_eq!(partial["wire"][0]["returned_per_layer"], wire["sent_per_layer"]);
}

#[test]
fn bad_input_is_refused_with_a_reason() {
    refused(&["mixtral-8x7"], &["did you mean mixtral-8x7b?", "deepseek-v3"]);
    refused(&["mixtral"], &["did you mean mixtral-8x7b?"]);
    refused(&["password"], &["neither a well-known model", "gpt-oss-20b"]);
    refused(&[""], &["neither a well-known model"]);
    refused(&["org/model"], &["muster pull org/model"]);
    refused(&["mixtral-8x7b", "--gpu", "24"], &["\"24\" is not a size", "4GiB"]);
    refused(&["mixtral-8x7b", "--devices", "24GiB,24"], &["\"24\" is not a size"]);
    refused(&["mixtral-8x7b", "--worker", "24GiBx0"], &["64GiBx2"]);
    refused(&["mixtral-8x7b", "--worker", "200MiB"], &["for experts, which is", "too little", "as q4"]);
    refused(&["mixtral-8x7b", "--context", "40000"], &["up to 32768 tokens"]);
    refused(&["mixtral-8x7b", "--expert-dtype", "q5"], &["native, q8 or q4"]);
    refused(&[], &["MODEL"]);
}

#[test]
fn what_is_said_to_be_the_least_is_enough() {
    let output = plan(&["mixtral-8x7b", "--worker", "200MiB"]);
    let message = String::from_utf8(output.stderr).unwrap();
    // 336 MiB are four fifths of 420 MiB.
    assert!(message.contains("the least is a worker of 420 MiB"), "{message}");
    assert_eq!(json(&["mixtral-8x7b", "--worker", "420MiB"])["sizes"][0]["experts_each"], 1);
    refused(&["mixtral-8x7b", "--worker", "419MiB"], &["too little"]);
}

#[test]
fn memory_is_told_in_the_unit_that_was_asked_in() {
    let answer = text(&plan(&["mixtral-8x7b", "--worker", "64GB"]));
    for fact in ["64 GB", "51.2 GB", "--memory 51200MB", ".memory=64000M ", "workers.defaults.memory=51200MB"]
    {
        assert!(answer.contains(fact), "{fact:?} is not in\n{answer}");
    }
    assert!(!answer.contains("GiB"), "{answer}");
    let answer = text(&plan(&["mixtral-8x7b", "--worker", "64GiB"]));
    for fact in ["64 GiB", "51.2 GiB", "--memory 52428MiB", ".memory=65536Mi "] {
        assert!(answer.contains(fact), "{fact:?} is not in\n{answer}");
    }
    let mixed = text(&plan(&["mixtral-8x7b", "--worker", "64GBx2", "--worker", "64GiB"]));
    assert!(mixed.contains("64 GB ") && mixed.contains("64 GiB "), "{mixed}");
    refused(
        &["mixtral-8x7b", "--worker", "200MB"],
        &["a worker of 200 MB has 160 MB", "the least is a worker of 442 MB"],
    );
    let output = plan(&["mixtral-8x7b", "--worker", "442MB"]);
    assert_eq!(output.status.code(), Some(0));
    refused(&["mixtral-8x7b", "--worker", "440MB"], &["too little"]);
}
