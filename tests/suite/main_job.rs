//! What a person types first.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use muster_tests::golden::{ids, json, logits};
use muster_tests::process::{PATIENCE, Process, muster, run, run_command};
use muster_tests::{demo_model, golden_model, workspace_root};
use serde_json::Value;

fn stdout(args: &[&str]) -> String {
    let output = run(args);
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn up_with_a_prompt_prints_the_story() {
    let text = stdout(&["up", "--prompt", "Once upon a time", "--compute", "f32", "--max-tokens", "40"]);
    let golden = json(&demo_model().join("golden.json"));
    let story = &golden["prompts"][0];
    assert_eq!(story["prompt"], "Once upon a time");
    let expected = story["text"].as_str().unwrap();
    assert!(text.contains(expected), "{text:?} does not contain {expected:?}");
}

#[test]
fn up_works_from_anywhere_without_a_home() {
    let directory = tempfile::tempdir().unwrap();
    let output = run_command(
        Command::new(muster())
            .args(["up", "--prompt", "Once upon a time", "--max-tokens", "8"])
            .current_dir(directory.path())
            .env_clear(),
    );
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(!output.stdout.is_empty());
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0, "it left files behind");
}

/// Greedy ids through a router and two workers, for every prompt of the demo model's golden file.
fn cluster_ids(case: &Value, compute: &str) -> Vec<u32> {
    let prompt: Vec<String> = ids(&case["prompt_ids"]).iter().map(ToString::to_string).collect();
    let output = stdout(&[
        "generate",
        "--model",
        &demo_model().display().to_string(),
        "--workers",
        "2",
        "--compute",
        compute,
        "--prompt-tokens",
        &prompt.join(","),
        "--max-tokens",
        "40",
        "--ignore-eos",
        "--json",
    ]);
    let output: Value = serde_json::from_str(&output).unwrap();
    assert_eq!(output["finish_reason"], "length");
    ids(&output["token_ids"])
}

#[test]
fn the_demo_model_gives_its_golden_tokens_in_f32() {
    let golden = json(&demo_model().join("golden.json"));
    for case in golden["prompts"].as_array().unwrap() {
        assert_eq!(cluster_ids(case, "f32"), ids(&case["ids"]), "{}", case["name"]);
    }
}

/// Most that bf16 moves the best logit against a rival on the demo model, as docs/numerics.md states it.
const BF16_MARGIN_CHANGE: f64 = 0.8;

#[test]
fn bf16_chooses_the_golden_tokens_wherever_the_margin_allows() {
    let golden = json(&demo_model().join("golden.json"));
    let mut compared = 0;
    for case in golden["prompts"].as_array().unwrap() {
        let (prompt, expected) = (ids(&case["prompt_ids"]), ids(&case["ids"]));
        let tokens: Vec<u32> = prompt.iter().chain(&expected).copied().collect();
        let logits = logits(&demo_model(), &tokens, &["--compute", "bf16", "--workers", "2"]).f32s("logits");
        let vocab = logits.len() / tokens.len();
        let margins = case["margins"].as_array().unwrap().iter().map(|margin| margin.as_f64().unwrap());
        for (n, (margin, id)) in
            margins.zip(&expected).enumerate().filter(|(_, (margin, _))| *margin > BF16_MARGIN_CHANGE)
        {
            let row = &logits[(prompt.len() - 1 + n) * vocab..][..vocab];
            let best = (0..vocab).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap();
            assert_eq!(best, *id as usize, "{} token {n}, margin {margin}", case["name"]);
            compared += 1;
        }
    }
    assert!(compared >= 150, "only {compared} tokens had margin enough");
}

fn alive(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"));
    // A zombie has ended; only its parent has not noticed.
    stat.is_ok_and(|stat| !stat.rsplit(')').next().unwrap_or("").trim_start().starts_with('Z'))
}

fn children(pid: u32) -> Vec<u32> {
    let listed = std::fs::read_dir("/proc").unwrap().filter_map(Result::ok);
    let pids = listed.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|child| {
        let stat = std::fs::read_to_string(Path::new("/proc").join(child.to_string()).join("stat"));
        let parent =
            stat.ok().and_then(|stat| stat.rsplit(')').next()?.split_whitespace().nth(1)?.parse().ok());
        parent == Some(pid)
    })
    .collect()
}

#[test]
fn children_die_with_the_parent_however_it_dies() {
    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGKILL] {
        let mut up = Process::start_up(&["--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0"]).unwrap();
        let pids = children(up.pid());
        assert_eq!(pids.len(), 3, "two workers and a router: {pids:?}");
        up.signal(signal);
        up.wait().expect("it ends");
        let deadline = Instant::now() + PATIENCE;
        while pids.iter().any(|&pid| alive(pid)) {
            assert!(Instant::now() < deadline, "signal {signal} left {pids:?} behind");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

#[test]
fn up_offers_what_works_with_the_model() {
    let told = |model: &Path| {
        let model = model.display().to_string();
        let flags = ["--model", &model, "--workers", "1", "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0"];
        Process::start_up(&flags).unwrap().told().to_owned()
    };
    let demo = told(&demo_model());
    for offered in [" chat --grpc", " generate \"Once upon a time\"", "/v1/completions"] {
        assert!(demo.contains(offered), "{offered}: {demo}");
    }
    let bare = golden_model("olmoe");
    let without = told(&bare);
    assert!(
        without.contains("no tokenizer.json") && without.contains("generate --prompt-tokens 1,2,3"),
        "{without}"
    );
    assert!(!without.contains(" chat ") && !without.contains("Once upon"), "{without}");
    let output =
        stdout(&["generate", "--model", &bare.display().to_string(), "--prompt-tokens", "1,2,3", "--json"]);
    assert!(output.contains("token_ids"), "{output}");
}

#[test]
fn check_model_describes_the_demo() {
    let text = stdout(&["check-model", &demo_model().display().to_string()]);
    for fact in [
        "mixtral",
        "9.4 M",
        "8 experts each",
        "top-2",
        "512 tokens",
        "331.8 kB",
        "every weight was read",
        "1 \"<s>\" bos_token (tokenizer.json)",
        "chat template  yes: user, system, assistant",
    ] {
        assert!(text.contains(fact), "{fact:?} is missing from:\n{text}");
    }
}

#[test]
fn bench_reports_every_figure() {
    let output = stdout(&[
        "bench",
        "--model",
        &demo_model().display().to_string(),
        "--workers",
        "2",
        "--prompt-tokens",
        "64",
        "--output-tokens",
        "8",
        "--concurrency",
        "1,2",
        "--json",
    ]);
    let report: Value = serde_json::from_str(&output).unwrap();
    let results = report["results"].as_array().unwrap();
    assert_eq!(results.iter().map(|r| r["concurrency"].as_u64().unwrap()).collect::<Vec<_>>(), [1, 2]);
    for result in results {
        for rate in ["prefill_tokens_per_second", "decode_tokens_per_second"] {
            assert!(result[rate].as_f64().is_some_and(|rate| rate > 0.0), "{rate}: {result}");
        }
        for latency in ["ttft", "inter_token", "dispatch_per_layer"] {
            let [p50, p99] = ["p50", "p99"].map(|p| result[latency][p].as_f64().unwrap());
            assert!(0.0 < p50 && p50 <= p99, "{latency}: {result}");
        }
    }
}

#[test]
fn the_example_configuration_is_accepted() {
    let file = workspace_root().join("deploy/muster.toml").display().to_string();
    for (role, expected) in [("router", "kv_memory = \"512MiB\""), ("worker", "model = \"demo\"")] {
        let text = stdout(&[role, "--config", &file, "--print-config"]);
        assert!(text.contains(expected), "{text}");
    }
}
